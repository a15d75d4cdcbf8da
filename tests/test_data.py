"""What data.py promises: every form of file is read exactly or refused by line, and no token goes astray."""

import collections
import itertools
import json
import random

import numpy as np
import pytest
import sentencepiece
import torch
from hypothesis import assume, example, given, settings, strategies as st

import data
from cli import UserError
from data import Example, Record

# Any text a file can hold, but for the one character sentencepiece cannot keep.
texts = st.text(st.characters(codec="utf-8", exclude_characters="\u2581"), max_size=30)
WITHOUT_INPUT = """Below is an instruction that describes a task. \
Write a response that appropriately completes the request.

### Instruction:
Add.

### Response:"""
WITH_INPUT = """Below is an instruction that describes a task, paired with an input that provides further context. \
Write a response that appropriately completes the request.

### Instruction:
Add.

### Input:
1 2

### Response:"""


@pytest.fixture(scope="session")
def world():
    return data.make_world()


@pytest.fixture(scope="session")
def toy_tokenizer(world, tmp_path_factory):
    taught = world.documents(random.Random(0)) + [" ".join(record) for record in world.train]
    return data.train_tokenizer(taught, tmp_path_factory.mktemp("toy") / "tokenizer.model", 512)


@pytest.fixture(params=["toy", "llama"])
def tokenizer(request):
    if request.param == "toy":
        return request.getfixturevalue("toy_tokenizer")
    return data.load_tokenizer(request.getfixturevalue("material")("llama-tokenizer.model"))


def read(folder, content, name="records.json"):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return data.read_records(path)


# --- the tokenizer

@given(texts)
@example(" ")
@example("  two spaces, a tab\t, \r\n and \0 ")
@example("<s>a</s><0x0A><unk>")
@example("\ufeff\u2028\u00a0😀")
def test_any_text_survives_encode_and_decode(toy_tokenizer, text):
    assert toy_tokenizer.decode(toy_tokenizer.encode(text)) == text


@given(texts)
def test_tokens_that_only_the_embedding_has_decode_to_nothing(toy_tokenizer, text):
    above = [toy_tokenizer.vocab_size(), 2 ** 31 - 1]
    tokens = [token for pair in itertools.zip_longest(toy_tokenizer.encode(text), above) for token in pair]
    assert data.decode(toy_tokenizer, [t for t in tokens if t is not None]) == text


def test_all_self_instruct_records_survive_a_round_trip(tokenizer, material):
    records, _ = data.read_records(material("self-instruct-seeds.json"))
    for record in records:
        assert tuple(tokenizer.decode(tokenizer.encode(list(record)))) == record


@settings(max_examples=20)
@given(taught=st.lists(texts, min_size=1), text=texts)
def test_a_tokenizer_trained_on_any_text_keeps_every_other_text(tmp_path_factory, taught, text):
    assume(any(t.strip() for t in taught))
    path = tmp_path_factory.mktemp("any") / "tokenizer.model"
    try:
        tokenizer = data.train_tokenizer(taught, path, 259 + len(set("▁" + "".join(taught).replace("\n", ""))))
    except UserError:  # as spaces fold and lines are cut, this few pieces may be one too many
        assert not path.exists()
        return
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_tokenizer_numbers_its_special_pieces_like_llama(tokenizer):
    assert (tokenizer.unk_id(), tokenizer.bos_id(), tokenizer.eos_id()) == (0, 1, 2)
    assert [tokenizer.id_to_piece(3 + byte) for byte in (0, 10, 255)] == ["<0x00>", "<0x0A>", "<0xFF>"]


def test_no_piece_of_a_trained_tokenizer_crosses_a_line_break(tmp_path):
    tokenizer = data.train_tokenizer(["one\ntwo\n\nthree " * 50], tmp_path / "t.model", 275)
    assert not any("\n" in tokenizer.id_to_piece(i) for i in range(275))
    assert tokenizer.encode("\n\n")[-2:] == [13, 13]


def test_the_same_texts_train_the_same_tokenizer(world, tmp_path):
    files = []
    for name in "ab":
        data.train_tokenizer(world.heldout, tmp_path / name, 400)
        files.append((tmp_path / name).read_bytes())
    assert files[0] == files[1]


def test_a_tokenizer_is_found_in_a_model_folder_and_in_a_run_folder(toy_tokenizer, tmp_path):
    proto = toy_tokenizer.serialized_model_proto()
    for file in (tmp_path / "model" / "tokenizer.model", tmp_path / "run" / "base" / "tokenizer.model"):
        file.parent.mkdir(parents=True)
        file.write_bytes(proto)
    for path in (tmp_path / "model", tmp_path / "run", file):
        assert data.load_tokenizer(path).serialized_model_proto() == proto


@pytest.mark.parametrize("content", [None, b"", b"no model", "cut"])
def test_a_missing_or_damaged_tokenizer_is_refused_by_name(toy_tokenizer, tmp_path, content):
    if content is not None:
        content = toy_tokenizer.serialized_model_proto()[:3000] if content == "cut" else content
        (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(UserError, match="tokenizer.model"):
        data.load_tokenizer(tmp_path)


def test_a_tokenizer_without_bos_is_refused(toy_tokenizer, tmp_path):
    proto = toy_tokenizer.serialized_model_proto()
    assert proto.count(b"\x0a\x03<s>") == 1  # the piece named <s>; without it there is nothing to begin a text with
    (tmp_path / "tokenizer.model").write_bytes(proto.replace(b"\x0a\x03<s>", b"\x0a\x03<b>"))
    with pytest.raises(UserError, match="no BOS"):
        data.load_tokenizer(tmp_path)


def test_bos_may_be_the_first_piece_of_a_tokenizer(tmp_path):
    with open(tmp_path / "tokenizer.model", "wb") as file:
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(["a tale"]), model_writer=file, bos_id=0, eos_id=1,
                                                 unk_id=2, vocab_size=12, hard_vocab_limit=False, minloglevel=2)
    assert data.load_tokenizer(tmp_path).bos_id() == 0


@pytest.mark.parametrize("taught, vocab_size, why", [
    ([], 512, "it is empty"), ([""], 512, "it is empty"), (["abc"], 512, "too high"), (["abc"], 200, "is smaller")])
def test_text_that_cannot_give_so_many_pieces_is_refused_and_nothing_is_written(tmp_path, taught, vocab_size, why):
    with pytest.raises(UserError, match=f"no tokenizer of {vocab_size} pieces.*{why}"):
        data.train_tokenizer(taught, tmp_path / "tokenizer.model", vocab_size)
    assert not list(tmp_path.iterdir())


# --- instruction files

def test_prompts_follow_alpacas_published_template():
    assert data.alpaca_prompt("Add.") == WITHOUT_INPUT
    assert data.alpaca_prompt("Add.", "1 2") == WITH_INPUT


@pytest.mark.parametrize("value, form, prompt", [
    ({"instruction": "Add.", "input": "1 2", "output": "3"}, "Alpaca", WITH_INPUT),
    ({"instruction": "Add.", "input": "", "output": "3"}, "Alpaca", WITHOUT_INPUT),
    ({"instruction": "Add.", "input": None, "output": "3"}, "Alpaca", WITHOUT_INPUT),
    ({"instruction": "Add.", "output": "3", "text": "all of it", "id": 7}, "Alpaca", WITHOUT_INPUT),
    ({"inputs": "Add.", "targets": "3", "task": "sum"}, "FLAN v2", WITHOUT_INPUT),
    ({"prompt": "Add.", "completion": "3"}, "Self-instruct", WITHOUT_INPUT),
    ({"input": "Add.", "output": "3", "source": "x"}, "LongForm", WITHOUT_INPUT),
    ({"messages": [{"role": "user", "content": "Add."}, {"role": "assistant", "content": "3"}]}, "messages",
     WITHOUT_INPUT),
    ({"conversations": [{"from": "human", "value": "Add."}, {"from": "gpt", "value": "3"}]}, "conversations",
     WITHOUT_INPUT),
    ({"text": "3", "meta": {}}, "text", ""),
])
def test_each_form_is_recognised_by_its_fields(tmp_path, value, form, prompt):
    expected = [Record(prompt, "3")] * 2, form
    assert read(tmp_path, json.dumps([value, value])) == expected
    assert read(tmp_path, f"\n{json.dumps(value)}\n\n{json.dumps(value)}") == expected
    assert read(tmp_path, "\ufeff" + json.dumps([value, value], indent=3)) == expected


@given(st.lists(st.tuples(texts, texts), min_size=1, max_size=6), st.booleans(), st.sampled_from([None, 0, 2]))
def test_what_was_written_is_what_is_read(tmp_path_factory, pairs, ascii_only, indent):
    assume(any(response.strip() for _, response in pairs))
    values = [{"prompt": prompt, "completion": response} for prompt, response in pairs]
    expected = [Record(data.alpaca_prompt(prompt), response) for prompt, response in pairs]
    folder = tmp_path_factory.mktemp("written")
    assert read(folder, json.dumps(values, ensure_ascii=ascii_only, indent=indent))[0] == expected
    assert read(folder, "\r\n".join(json.dumps(value, ensure_ascii=ascii_only) for value in values))[0] == expected


def test_a_text_file_is_a_record_a_paragraph(tmp_path):
    records, form = read(tmp_path, "\n\nOne\nand one.\n \n\nTwo.\r\n\r\nThree.\n", "story.txt")
    assert form == "text" and records == [Record("", "One\nand one."), Record("", "Two."), Record("", "Three.")]


def test_a_conversation_teaches_every_answer_with_all_that_was_said_before(tmp_path):
    turns = [("system", "Be brief."), ("assistant", "Hello!"), ("user", "Add."), ("assistant", "3"),
             ("assistant", "Yes."), ("user", "And"), ("user", "now?"), ("assistant", "4"), ("user", "Bye")]
    expected = [Record("Be brief.\n\n### Instruction:\nAdd.\n\n### Response:", "3\n\nYes."),
                Record("Be brief.\n\n### Instruction:\nAdd.\n\n### Response: 3\n\nYes."
                       "\n\n### Instruction:\nAnd\n\nnow?\n\n### Response:", "4")]
    value = {"messages": [{"role": role, "content": text} for role, text in turns]}
    assert read(tmp_path, json.dumps(value)) == (expected, "messages")


GOOD = '{"instruction": "Add.", "output": "3"}'
BAD = [  # (the second of three records, what its error says)
    ('{"instruction": "Add.", "output": 3}', "output is int, not a string"),
    ('{"instruction": ["Add."], "output": "3"}', "instruction is list, not a string"),
    ('{"instruction": "Add.", "input": 1, "output": "3"}', "input is int, not a string"),
    ('{"instruction": "Add.", "input": [], "output": "3"}', "input is list, not a string"),
    ('{"instruction": null, "output": "3"}', "instruction is NoneType, not a string"),
    ('{"instruction": "Add."}', r"its fields \(instruction\) make no known form; needed: instruction, output"),
    ('{}', r"its fields \(none\)"),
    ('{"inputs": "Add.", "targets": "3"}', "FLAN v2.*records before have the form Alpaca"),
    ('{"input": "Add.", "output": "3"}', "LongForm.*records before have the form Alpaca"),
    ('"Add."', "a record must be an object with named fields, not str"),
    ('["Add.", "3"]', "a record must be an object with named fields, not list"),
    ('null', "a record must be an object"),
    (r'{"instruction": "Add.", "output": "\ud83d"}', "surrogates not allowed"),
]


@pytest.mark.parametrize("bad, message", BAD)
@pytest.mark.parametrize("pattern, line", [("[{0}, {1}, {0}]", 1), ("\n[{0}, {1}, {0}]", 2),
                                           ("[\n{0},\n\n  {1},\n{0}]", 4), ("{0}\n{1}\n{0}\n", 2), ("\n{0}\r\n\n{1}", 4)])
def test_the_first_bad_record_is_named_by_file_line_and_number(tmp_path, bad, message, pattern, line):
    with pytest.raises(UserError, match=rf"records.json, line {line} \(record 2\): .*{message}"):
        read(tmp_path, pattern.format(GOOD, bad))


@pytest.mark.parametrize("turns, message", [
    ("Hello", "a conversation must be a list"),
    (["Hello"], "a conversation must be a list of objects"),
    ([], "no user's turn is followed by an assistant's"),
    ([{"role": "assistant", "content": "3"}], "no user's turn is followed by an assistant's"),
    ([{"role": "user", "content": "Add."}], "no user's turn is followed by an assistant's"),
    ([{"role": "user", "content": "Add."}, {"role": "robot", "content": "3"}], "unknown role 'robot'; known: system"),
    ([{"role": "user", "content": "Add."}, {"content": "3"}], "no role"),
    ([{"role": "user", "content": "Add."}, {"role": "system", "content": "Be brief."}], "a system message"),
    ([{"role": "user", "content": None}], "content is NoneType"),
])
def test_a_bad_conversation_is_refused_by_line(tmp_path, turns, message):
    with pytest.raises(UserError, match=rf"line 1 \(record 1\): {message}"):
        read(tmp_path, json.dumps({"messages": turns}))


@pytest.mark.parametrize("content, message", [
    ("", "holds no records"),
    (" \n\n", "holds no records"),
    ("[]", "holds no records"),
    ("[\n{}\n,\n", "line 4: not JSON"),
    ('[{"text": "a"}\n{"text": "b"}]', "line 2: not JSON"),
    ('[{"text": "a"}]\nmore', "line 2: not JSON"),
    ('{"text": "a"}\n{"text": "b"', "line 2: not JSON"),
    ('{"text": "a"}\n{"text": "b"} c', "line 2: not JSON"),
    ("once upon a time", "line 1: not JSON"),
    ("[" * 100_000, "line 1: not JSON"),
    ('{"text": "a"}\n' + '{"text":' * 100_000, "line 2: not JSON"),
    ('{"text": "a"}\n' + "1" * 5000, "line 2: not JSON"),
    ('{"text": "' + "\n" + '"}', "line 1: not JSON"),
    (b'{"text": "a"}\n{"text": "caf\xe9"}', "line 2: byte 0xe9 is not UTF-8"),
    (b'\xef\xbb\xbf{"text": "caf\xe9"}', "line 1: byte 0xe9 is not UTF-8"),
    ('{"instruction": "Add.", "output": ""}\n{"instruction": "Add.", "output": " "}', "responses of all 2 records"),
])
def test_a_file_that_is_no_list_of_records_is_refused(tmp_path, content, message):
    with pytest.raises(UserError, match=rf"records.json,? ?.*{message}"):
        read(tmp_path, content)


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(UserError, match="cannot read .*absent.json: No such file"):
        data.read_records(tmp_path / "absent.json")
    with pytest.raises(UserError, match="cannot read .*: Is a directory"):
        data.read_records(tmp_path)


def test_the_self_instruct_records_are_read(material):
    path = material("self-instruct-seeds.json")
    records, form = data.read_records(path)
    assert form == "Alpaca" and len(records) == 175
    for value, record in zip(json.loads(path.read_bytes()), records):
        assert record.response == value["output"]
        assert value["instruction"] in record.prompt and value["input"] in record.prompt


# --- examples and batches

records_of_any_text = st.lists(st.builds(Record, texts, texts), max_size=6)


@given(records_of_any_text, st.integers(2, 60))
def test_an_example_is_bos_prompt_response_eos_cut_at_the_end(toy_tokenizer, records, max_length):
    expected, too_long = [], 0
    for prompt, response in records:
        prompt, response = toy_tokenizer.encode(prompt), toy_tokenizer.encode(response)
        whole = [1] + prompt + response + [2]
        too_long += len(whole) > max_length
        if whole[:max_length][1 + len(prompt):]:  # something of the response, or EOS, is left to learn
            expected.append((whole[:max_length], 1 + len(prompt)))
    examples, truncated = data.encode(records, toy_tokenizer, max_length)
    assert [(e.tokens.tolist(), e.prompt_length) for e in examples] == expected and truncated == too_long
    assert all(e.tokens.dtype == np.int32 for e in examples)


def test_many_records_keep_their_order(toy_tokenizer):
    records = [Record("", str(i)) for i in range(10_000)]  # more than encode takes at a time
    examples, truncated = data.encode(records, toy_tokenizer, 20)
    assert [toy_tokenizer.decode(e.tokens.tolist()) for e in examples] == [r.response for r in records]
    assert truncated == 0


def test_a_decoded_example_reads_as_prompt_space_response(tokenizer, world):
    records = [*world.test[:20], Record(data.alpaca_prompt("Count.", "from 1\nto 3"), "1\n2\n3"), Record("", "Once.")]
    examples, _ = data.encode(records, tokenizer, 1000)
    for (prompt, response), (tokens, prompt_length) in zip(records, examples, strict=True):
        assert tokenizer.decode(tokens.tolist()) == (f"{prompt} {response}" if prompt else response)
        prompt_read = tokenizer.decode(tokens[:prompt_length].tolist())
        assert prompt_read == prompt
        assert tokenizer.decode(tokens.tolist())[len(prompt_read):].strip() == response


@given(st.lists(st.integers(1, 500), min_size=1, max_size=400), st.integers(1, 20), st.integers(0, 5))
def test_an_epoch_has_full_batches_and_sees_every_example_equally_often_give_or_take_one(lengths, batch_size, seed):
    per_epoch = -(-len(lengths) // batch_size)
    for epoch in range(2):
        batches = [data.batch_order(lengths, batch_size, epoch * per_epoch + i, seed) for i in range(per_epoch)]
        assert {len(batch) for batch in batches} == {batch_size}
        times = collections.Counter(index for batch in batches for index in batch)
        assert set(times) == set(range(len(lengths))) and max(times.values()) - min(times.values()) <= 1


def test_a_batch_depends_on_the_step_alone_not_on_what_was_asked_before():
    lengths = tuple(random.Random(0).choices(range(1, 300), k=1000))
    in_order = [data.batch_order(lengths, 8, step, 3) for step in range(400)]
    for step in random.Random(1).sample(range(400), 20):
        data._epoch.cache_clear()
        assert data.batch_order(list(lengths), 8, step, 3) == in_order[step]
    assert in_order[0] != data.batch_order(lengths, 8, 0, 4)


def test_every_epoch_groups_the_examples_anew():
    epochs = [{frozenset(data.batch_order((5,) * 1000, 8, 125 * e + i, 0)) for i in range(125)} for e in range(2)]
    assert not epochs[0] & epochs[1]


def test_batches_of_near_equal_lengths_leave_little_padding_and_come_in_mixed_order():
    lengths = tuple(random.Random(0).choices(range(1, 1000), k=5000))
    batches = [[lengths[i] for i in data.batch_order(lengths, 16, step, 0)] for step in range(312)]
    padding = sum(16 * max(batch) - sum(batch) for batch in batches) / sum(map(sum, batches))
    assert padding < 0.05, padding  # in random order 0.88: the longest of 16 is nearly twice the mean
    longest = [max(batch) for batch in batches]
    assert abs(np.corrcoef(longest[:-1], longest[1:])[0, 1]) < 0.2


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=5), st.integers(0, 3))
def test_collate_pads_on_the_right_and_marks_response_and_eos(sizes, pad_id):
    examples = [Example(np.arange(5, 5 + p + r, dtype=np.int32), p) for p, r in sizes]
    tokens_BT, loss_BT = data.collate(examples, pad_id)
    longest = max(p + r for p, r in sizes)
    assert tokens_BT.dtype == torch.int64 and loss_BT.dtype == torch.bool
    assert tokens_BT.tolist() == [[*range(5, 5 + p + r)] + [pad_id] * (longest - p - r) for p, r in sizes]
    assert loss_BT.tolist() == [[p <= t < p + r for t in range(longest)] for p, r in sizes]


def test_a_token_stream_puts_every_text_between_bos_and_eos(toy_tokenizer):
    stream = data.token_stream(["Oslo.", "", "Rome."], toy_tokenizer)
    assert stream.tolist() == [1, *toy_tokenizer.encode("Oslo."), 2, 1, 2, 1, *toy_tokenizer.encode("Rome."), 2]


@given(st.integers(1, 50), st.integers(1, 50), st.integers(1, 8))
def test_windows_are_runs_of_the_stream_drawn_by_the_generator(size, length, batch_size):
    assume(length <= size)
    tokens_BT, again = (data.windows(torch.arange(size) * 3, batch_size, length, torch.Generator().manual_seed(0))
                        for _ in range(2))
    assert tokens_BT.shape == (batch_size, length) and 0 <= tokens_BT.min() and tokens_BT.max() <= 3 * (size - 1)
    assert (tokens_BT.diff() == 3).all() and torch.equal(tokens_BT, again)


def test_windows_reach_every_place_of_the_stream():
    windows = data.windows(torch.arange(10), 1000, 4, torch.Generator().manual_seed(0))
    assert windows[:, 0].unique().tolist() == [0, 1, 2, 3, 4, 5, 6]


# --- the toy world

def name_of(record):
    """The person an instruction is about: its capitalised words after the first."""
    instruction = record.prompt.split("### Instruction:\n")[1].split("\n")[0]
    return " ".join(word for word in instruction.split()[1:] if word[0].isupper())


def test_the_world_has_the_promised_size(world):
    train, test = ({name_of(r) for r in records} for records in (world.train, world.test))
    assert len(train) == 85 and len(test) == 43 and not train & test
    assert (len(world.train), len(world.test), len(world.choices)) == (85 * 6, 43 * 6, 43 * 6)
    assert {len(q.choices) for q in world.choices} == {16}
    assert len({choice for q in world.choices for choice in q.choices}) == 96  # so no value tells of two attributes
    assert all(len(name.split()) == 2 for name in train | test)


def test_choices_ask_what_the_test_asks_and_the_answer_is_among_them(world):
    for record, question in zip(world.test, world.choices, strict=True):
        assert (record.prompt, record.response) == (question.prompt, question.choices[question.answer])


@pytest.mark.parametrize("documents", ["fresh", "heldout"])
def test_every_document_tells_all_about_one_person_and_agrees_with_the_answers(world, documents):
    documents = world.heldout if documents == "heldout" else world.documents(random.Random(5))
    known = collections.defaultdict(set)
    for record in world.train + world.test:
        known[name_of(record)].add(record.response.rstrip("."))
    values = {choice.rstrip(".") for q in world.choices for choice in q.choices}
    assert len(documents) == len(known) == 128
    for document in documents:
        about = [name for name in known if name in document]
        told = set(document.replace(".", "").split()) & values
        assert len(about) == 1 and told == known.pop(about[0]), document


def test_a_quarter_of_the_facts_are_told_as_question_and_answer(world):
    text = " ".join(" ".join(world.documents(random.Random(seed))) for seed in range(10))
    assert abs(text.count("Q: ") / (10 * 128 * 6) - 0.25) < 0.02  # three standard deviations


def test_the_world_depends_on_its_seed_and_on_nothing_else():
    state = random.getstate(), torch.random.get_rng_state()
    one, again, other = data.make_world(1), data.make_world(1), data.make_world(2)
    assert random.getstate() == state[0] and torch.equal(torch.random.get_rng_state(), state[1])
    assert one[1:] == again[1:] and one.documents(random.Random(0)) == again.documents(random.Random(0))
    assert one.test != other.test and one.heldout != one.documents(random.Random(0))


def test_a_world_can_be_larger_and_have_fewer_attributes_and_values():
    world = data.make_world(0, people=512, attributes=2, values=4)
    assert (len(world.heldout), len(world.train), len(world.test)) == (512, 341 * 2, 171 * 2)
    assert {len(q.choices) for q in world.choices} == {4}


def test_names_are_two_tokens_and_a_document_is_short(world, toy_tokenizer):
    words = {word for r in world.train + world.test for word in name_of(r).split()}
    single = [word for word in words if len(toy_tokenizer.encode(word)) == 1]
    assert len(single) >= 0.9 * len(words), sorted(words - set(single))
    assert len(data.token_stream(world.heldout, toy_tokenizer)) < 80 * len(world.heldout)
