"""text/instructions.py: every form of file is read exactly, or refused by line."""

import json
import sys
import tracemalloc

import pytest
from helpers import TEXTS
from hypothesis import given
from hypothesis import strategies as st

from cli.errors import UserError
from text.instructions import FORMS, Data, Turn, read_records


def read(folder, content, name="records.json"):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_records(path)


def record(*turns):
    """A conversation of (role, text) or (role, text, input)."""
    return tuple(Turn(*turn) for turn in turns)


def conversation(folder, messages, **more):
    """The only conversation of a file in messages' form."""
    records, form, left_out, _ = read(folder, json.dumps([{"messages": messages, **more}]))
    assert form == "messages" and not left_out
    return records[0]


ADDING = record(("user", "Add."), ("assistant", "3"))
ADDING_TWO = record(("user", "Add.", "1 2"), ("assistant", "3"))
INSTRUCTED = record(("system", "Be brief."), *ADDING)
TEXT = record(("text", "3"))
MESSAGES = [{"role": "user", "content": "Add."}, {"role": "assistant", "content": "3"}]
CONVERSATION = [{"from": "human", "value": "Add."}, {"from": "gpt", "value": "3"}]


@pytest.mark.parametrize(
    "value, form, expected",
    [
        ({"instruction": "Add.", "input": "1 2", "output": "3"}, "Alpaca", ADDING_TWO),
        ({"instruction": "Add.", "input": "", "output": "3"}, "Alpaca", ADDING),
        ({"instruction": "Add.", "input": None, "output": "3"}, "Alpaca", ADDING),
        ({"instruction": "Add.", "output": "3", "text": "all of it", "id": 7}, "Alpaca", ADDING),
        ({"instruction": "Add.", "context": "1 2", "response": "3"}, "Dolly", ADDING_TWO),
        ({"instruction": "Add.", "response": "3"}, "Dolly", ADDING),
        (
            {"system_prompt": "Be brief.", "question": "Add.", "response": "3"},
            "OpenOrca",
            INSTRUCTED,
        ),
        (
            {"system": "Be brief.", "instruction": "Add.", "output": "3", "history": []},
            "Alpaca",
            INSTRUCTED,
        ),
        ({"query": "Add.", "response": "3"}, "queries", ADDING),
        ({"system": "Be brief.", "messages": MESSAGES}, "messages", INSTRUCTED),
        (
            {"system_prompt": "Be brief.", "conversations": CONVERSATION},
            "conversations",
            INSTRUCTED,
        ),
        ({"system_prompt": " ", "question": "Add.", "response": "3"}, "OpenOrca", ADDING),
        ({"system_prompt": None, "question": "Add.", "response": "3"}, "OpenOrca", ADDING),
        ({"question": "Add.", "response": "3"}, "OpenOrca", ADDING),
        ({"question": "Add.", "answer": "3"}, "questions", ADDING),
        ({"inputs": "Add.", "targets": "3", "task": "sum"}, "FLAN v2", ADDING),
        ({"prompt": "Add.", "completion": "3"}, "Self-instruct", ADDING),
        ({"prompt": "Add.", "response": "3"}, "prompts", ADDING),
        ({"input": "Add.", "output": "3", "source": "x"}, "LongForm", ADDING),
        ({"messages": MESSAGES, "prompt": "Add."}, "messages", ADDING),
        ({"conversations": CONVERSATION}, "conversations", ADDING),
        ({"conversations": MESSAGES}, "conversations", ADDING),
        ({"text": "3", "meta": {}}, "text", TEXT),
    ],
)
def test_each_form_is_recognised_by_its_fields(tmp_path, value, form, expected):
    expected = Data([expected] * 2, form, 0, "")
    assert form in FORMS
    assert read(tmp_path, json.dumps([value, value])) == expected
    assert read(tmp_path, f"\n{json.dumps(value)}\n\n{json.dumps(value)}") == expected
    assert read(tmp_path, "\ufeff" + json.dumps([value, value], indent=3)) == expected


PUBLISHED = {  # each data set of the paper: a record as it is published, and what is said in it
    "Alpaca": (
        '{"instruction": "Name the capital.", "input": "Norway", "output": "Oslo."}',
        record(("user", "Name the capital.", "Norway"), ("assistant", "Oslo.")),
    ),
    "FLAN v2": (
        '{"inputs": "Is tea a plant?\\n\\nOPTIONS:\\n- no\\n- yes", "targets": "yes", '
        '"task_source": "Flan2021", "task_name": "bool_q:1.0.0", "template_type": "zs_opt"}',
        record(("user", "Is tea a plant?\n\nOPTIONS:\n- no\n- yes"), ("assistant", "yes")),
    ),
    "Self-instruct": (
        '{"prompt": "Name a strong tea.\\n\\nOutput:", "completion": " Assam.<|endoftext|>"}',
        record(("user", "Name a strong tea.\n\nOutput:"), ("assistant", "Assam.")),
    ),
    "LongForm": (
        '{"input": "Describe Assam.", "output": "Assam is a tea.\\n\\nIt is strong.", '
        '"source": "Wikipedia", "subset": "wiki"}',
        record(("user", "Describe Assam."), ("assistant", "Assam is a tea.\n\nIt is strong.")),
    ),
    "Chip2": (
        '{"text": "\\n<human>: I like tea. Which one is strong?\\n<bot>: Assam is strong.", '
        '"metadata": {"source": "unified_chip2"}}',
        record(("user", "I like tea. Which one is strong?"), ("assistant", "Assam is strong.")),
    ),
}


@pytest.mark.parametrize("form", PUBLISHED)
def test_the_papers_data_sets_are_read_as_they_are_published(tmp_path, form):
    text, expected = PUBLISHED[form]
    assert read(tmp_path, f"{text}\n{text}\n", "data.jsonl") == Data([expected] * 2, form, 0, "")
    assert read(tmp_path, f"[{text}, {text}]") == Data([expected] * 2, form, 0, "")


@given(
    st.lists(st.tuples(TEXTS, TEXTS.filter(str.strip)), min_size=1, max_size=6),
    st.booleans(),
    st.sampled_from([None, 0, 2]),
)
def test_what_was_written_is_what_is_read(tmp_path_factory, pairs, ascii_only, indent):
    values = [{"prompt": prompt, "response": response} for prompt, response in pairs]
    expected = [record(("user", prompt), ("assistant", response)) for prompt, response in pairs]
    folder = tmp_path_factory.mktemp("written")
    a_list = json.dumps(values, ensure_ascii=ascii_only, indent=indent)
    assert read(folder, a_list).records == expected
    lines = "\r\n".join(json.dumps(value, ensure_ascii=ascii_only) for value in values)
    assert read(folder, lines).records == expected


def test_a_table_is_read_as_json_is(tmp_path):
    text = 'instruction,input,output\nAdd.,1 2,3\n"Add.",,3\n'
    assert read(tmp_path, text, "a.csv") == Data([ADDING_TWO, ADDING], "Alpaca", 0, "")


def test_a_number_is_learned_as_it_is_written(tmp_path):
    text = '[{"question": 12, "answer": 3.10}, {"question": "a", "answer": Infinity}'
    expected = [record(("user", "12"), ("assistant", "3.10"))]
    expected += [record(("user", "a"), ("assistant", "Infinity"))]
    assert read(tmp_path, f"{text}]").records == expected
    missing = ['{"question": "a", "answer": NaN}', *['{"question": "a", "answer": "b"}'] * 9]
    assert read(tmp_path, "\n".join(missing)).left_out == 1, "as Python writes a missing number"


def test_a_text_file_is_a_record_a_paragraph(tmp_path):
    data = read(tmp_path, "\n\nOne\nand one.\n \n\nTwo.\r\n\r\nThree.\n", "story.txt")
    texts = ["One\nand one.", "Two.", "Three."]
    assert data == Data([record(("text", text)) for text in texts], "text", 0, "")


# ---- records without an answer


@pytest.mark.parametrize("answer", [None, "", " \n"])
@pytest.mark.parametrize("form", ["Alpaca", "Dolly", "OpenOrca", "questions", "FLAN v2", "prompts"])
def test_a_record_without_an_answer_is_left_out_and_counted(tmp_path, form, answer):
    asked, answered = FORMS[form]
    values = [{asked: "Add.", answered: "3"}] * 20
    values[6] = values[3] = {asked: "Add.", answered: answer}
    lines = "\n".join(json.dumps(value) for value in values)
    assert read(tmp_path, lines) == Data([ADDING] * 18, form, 2, "line 4")
    values[19] = values[3]
    with pytest.raises(
        UserError,
        match=r"records.json: 3 of 20 records have no answer, the first of them on line 1 "
        r"\(record 4\); correct or remove them",
    ):
        read(tmp_path, json.dumps(values))
    with pytest.raises(UserError, match="the responses of all 2 records are empty or missing"):
        read(tmp_path, json.dumps([values[3]] * 2))


@pytest.mark.parametrize(
    "said",
    [
        [],
        [("assistant", "3")],
        [("user", "Add.")],
        [("assistant", "3"), ("user", "Add.")],
        [("user", "Add."), ("assistant", None)],
        [("user", "Add."), ("assistant", " ")],
        [("user", "Add."), ("assistant", "3"), ("user", "Yes?"), ("assistant", "")],
        [("user", "Add."), ("assistant", ""), ("user", "Well?"), ("assistant", "3")],
        [("system", "Be brief."), ("user", "Add."), ("tool", "3")],
    ],
)
def test_a_conversation_without_an_answer_is_left_out_and_counted(tmp_path, said):
    turns = [{"role": r, "content": text, "tool_calls": None} for r, text in said]
    values = [{"messages": turns}, *[{"messages": MESSAGES}] * 9]
    assert read(tmp_path, json.dumps(values)) == Data([ADDING] * 9, "messages", 1, "line 1")
    with pytest.raises(UserError, match="1 of 9 records have no answer"):
        read(tmp_path, json.dumps(values[:9]))


def test_a_blank_text_does_not_decide_whether_the_others_are_dialogues(tmp_path):
    texts = ["", " ", "### Human: a### Assistant: b"] + ["### Human: c### Assistant: d"] * 40
    data = read(tmp_path, json.dumps([{"text": text} for text in texts]))
    assert (data.form, data.left_out, data.first_left_out) == ("Guanaco", 2, "line 1")
    assert data.records[0] == record(("user", "a"), ("assistant", "b"))


def test_questions_with_choices_are_not_instructions(tmp_path):
    with pytest.raises(UserError, match=r"line 1 \(record 1\): multiple choice is for evals.py"):
        read(tmp_path, '{"question": "Is tea a plant?", "choices": ["no", "yes"], "answer": 1}')


@pytest.mark.parametrize("completion", ["<|endoftext|>", " \n<|endoftext|>"])
def test_gpt3s_end_of_text_is_no_answer(tmp_path, completion):
    values = [{"prompt": "a", "completion": "b<|endoftext|>c"}] * 9
    data = read(tmp_path, json.dumps([*values, {"prompt": "a", "completion": completion}]))
    expected = record(("user", "a"), ("assistant", "b<|endoftext|>c"))
    assert data == Data([expected] * 9, "Self-instruct", 1, "line 1")
    values = [{"prompt": "a", "response": completion}]
    assert read(tmp_path, json.dumps(values)).records[0][1].text == completion, "another form"


def test_dialogues_without_an_answer_are_left_out_and_counted(tmp_path):
    good, bad = {"text": "### Human: a### Assistant: b"}, {"text": "### Human: a### Assistant: "}
    assert read(tmp_path, json.dumps([bad] + [good] * 9)).left_out == 1
    with pytest.raises(UserError, match="2 of 10 records have no answer"):
        read(tmp_path, json.dumps([bad] * 2 + [good] * 8))


def test_blank_texts_are_left_out_however_many_they_are(tmp_path):
    values = [{"text": text} for text in (None, "3", "", " \n", "3")]
    assert read(tmp_path, json.dumps(values, indent=0)) == Data([TEXT] * 2, "text", 3, "line 2")
    with pytest.raises(UserError, match="the responses of all 1 records"):
        read(tmp_path, '{"text": ""}')


# ---- what is refused

GOOD = '{"instruction": "Add.", "output": "3"}'
BAD = [  # (the second of three records, what its error says)
    ('{"instruction": "Add.", "output": true}', "output is bool, not a string"),
    ('{"instruction": ["Add."], "output": "3"}', "instruction is list, not a string"),
    ('{"instruction": "Add.", "input": {}, "output": "3"}', "input is dict, not a string"),
    ('{"instruction": "Add.", "input": [], "output": "3"}', "input is list, not a string"),
    ('{"instruction": null, "output": "3"}', "instruction is NoneType, not a string"),
    ('{"instruction": null, "output": null}', "instruction is NoneType, not a string"),
    (
        '{"instruction": "Add."}',
        r"its fields \(instruction\) make no known form; needed: instruction, output, as in",
    ),
    ("{}", r"its fields \(none\)"),
    ('{"inputs": "Add.", "targets": "3"}', "FLAN v2.*records before have the form Alpaca"),
    ('{"input": "Add.", "output": "3"}', "LongForm.*records before have the form Alpaca"),
    ('{"text": "<human>: a\\n<bot>: b"}', r"form text \(text\).*records before.*Alpaca"),
    ('"Add."', "a record must be an object with named fields, not str"),
    ('["Add.", "3"]', "a record must be an object with named fields, not list"),
    ("null", "a record must be an object"),
    (r'{"instruction": "Add.", "output": "\ud83d"}', "half a character"),
]


@pytest.mark.parametrize("bad, message", BAD)
@pytest.mark.parametrize(
    "pattern, line",
    [
        ("[{0}, {1}, {0}]", 1),
        ("\n[{0}, {1}, {0}]", 2),
        ("[\n{0},\n\n  {1},\n{0}]", 4),
        ("{0}\n{1}\n{0}\n", 2),
        ("\n{0}\r\n\n{1}", 4),
    ],
)
def test_the_first_bad_record_is_named_by_file_line_and_number(
    tmp_path, bad, message, pattern, line
):
    with pytest.raises(UserError, match=rf"records.json, line {line} \(record 2\): .*{message}"):
        read(tmp_path, pattern.format(GOOD, bad))


def test_a_file_of_no_known_form_is_told_the_known_ones(tmp_path):
    with pytest.raises(
        UserError, match="one of instruction, output; .*messages; conversations; text$"
    ):
        read(tmp_path, '{"instructions": "Add."}')


USER = {"role": "user", "content": "Add."}


@pytest.mark.parametrize(
    "turns, message",
    [
        ("Hello", "a conversation must be a list"),
        ({}, "a conversation must be a list"),
        (None, "a conversation must be a list"),
        (["Hello"], "a conversation must be a list of objects"),
        (
            [USER, {"role": "robot", "content": "3"}],
            "unknown role 'robot'; known: system, dev",
        ),
        ([USER, {"content": "3"}], "no role"),
        ([USER, {"role": "assistant"}], "no content"),
        ([USER, {"role": None, "content": "3"}], "role is NoneType"),
        ([USER, {"role": "system", "content": "Be brief."}], "a system message"),
        ([{"role": "user", "content": None}], "content is NoneType"),
        ([{"role": "tool", "content": None}], "content is NoneType"),
        ([{"role": "user", "content": {"text": "Add."}}], "content is dict"),
        ([{"role": "user", "content": ["\ud83d"]}], ".*half a character"),
        ([{"role": "user", "content": [None]}], "a part of content is NoneType"),
        (
            [{"role": "user", "content": [{"type": "image_url"}]}],
            "a part of content has the type image_url; only text can be learned",
        ),
    ],
)
def test_a_bad_conversation_is_refused_by_line(tmp_path, turns, message):
    with pytest.raises(UserError, match=rf"line 1 \(record 1\): {message}"):
        read(tmp_path, json.dumps({"messages": turns}))


def test_a_text_that_is_none_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"line 1 \(record 1\): text is list, not a string"):
        read(tmp_path, '{"text": ["a"]}')


def test_a_bad_turn_is_told_the_fields_of_its_form(tmp_path):
    for turn, message in [({"value": "3"}, "no from"), ({"from": "me"}, "unknown from 'me'")]:
        with pytest.raises(UserError, match=message):
            read(tmp_path, json.dumps({"conversations": [turn]}))


@pytest.mark.parametrize(
    "content, message",
    [
        ("", "holds no records"),
        (" \n\n", "holds no records"),
        ("[]", "holds no records"),
        ('[\n{"text": "a"}\n,\n', "line 4: not JSON"),
        ('{"text": "a"}\n{"text": "b"} c', "line 2: not JSON"),
        ('{"text": "a"}\n' + "1" * 5000, "must be an object with named fields, not str"),
        (b'{"text": "a"}\n{"text": "caf\xe9"}', "line 2: byte 0xe9 is not UTF-8"),
    ],
)
def test_a_file_that_is_no_list_of_records_is_refused(tmp_path, content, message):
    with pytest.raises(UserError, match=rf"records.json,? ?.*{message}"):
        read(tmp_path, content)


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(UserError, match="cannot read .*absent.json: No such file"):
        read_records(tmp_path / "absent.json")


# ---- large files and real ones


def size(data):
    """What the records take, in bytes; texts that all records share are left out."""
    total = sys.getsizeof(data.records)
    for turns in data.records:
        total += sys.getsizeof(turns)
        for turn in turns:
            total += sys.getsizeof(turn) + sys.getsizeof(turn.text)
    return total


@pytest.mark.parametrize("name", ["one-line.json", "lines.jsonl", "table.csv"])
def test_a_large_file_is_never_held_beside_its_records(tmp_path, name):
    path = tmp_path / name
    words = "Assam is strong. " * 100
    value = json.dumps({"prompt": "Describe Assam, the tea. " * 10, "response": words + "é"})
    separator = {"one-line.json": ", ", "lines.jsonl": "\n"}.get(name)
    with path.open("w", encoding="utf-8") as file:
        if name == "table.csv":
            file.write("prompt,response\n" + f"Describe Assam.,{words}\n" * 15_000)
        else:
            start, end = ("[", "]") if name == "one-line.json" else ("", "")
            file.write(start + separator.join([value] * 15_000) + end)
    assert path.stat().st_size > 25e6
    tracemalloc.start()
    try:
        data = read_records(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(data.records) == 15_000
    assert peak - size(data) < 4e6
    roles = set()
    for turns in data.records:
        roles |= {id(turn.role) for turn in turns}
    assert len(roles) == 2, "every role is one string"


def test_the_self_instruct_records_are_read(material):
    path = material("self-instruct-seeds.json")
    data = read_records(path)
    assert data.form == "Alpaca" and len(data.records) == 175 and not data.left_out
    for value, (question, answer) in zip(json.loads(path.read_bytes()), data.records, strict=True):
        assert question == Turn("user", value["instruction"], value["input"])
        assert answer == Turn("assistant", value["output"])
