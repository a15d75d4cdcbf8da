"""text/templates.py: a conversation is written as its template says, and only answers are learned.

The chat formats are written here by hand, as their makers describe them: each once in Jinja, as a
model brings it, and once in Python, token by token.
"""

import json
import sys

import pytest
from helpers import exchange
from helpers_text import SOMETHING, TEXTS, conversations
from hypothesis import example, given

from cli.errors import UserError
from text import byte_level, templates
from text.batches import encode, encode_asking
from text.instructions import Turn
from text.templates import MARK, Template, alpaca_prompt
from text.tokenizer import CHAT_TEMPLATE, JSON, load_tokenizer, make_tokenizer
from text.vocabulary import CONTROL

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA2 = """
{%- if messages[0]['role'] == 'system' %}
    {%- set turns = messages[1:] %}
    {%- set first = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}
{%- else %}
    {%- set turns = messages %}
    {%- set first = '' %}
{%- endif %}
{%- for message in turns %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Conversation roles must alternate user/assistant/user/...') }}
    {%- endif %}
    {%- if message['role'] == 'user' %}
        {{- bos_token + '[INST] ' + ((first if loop.first else '') + message['content']).strip() }}
        {{- ' [/INST]' }}
    {%- else %}
        {{- ' ' + message['content'].strip() + ' ' + eos_token }}
    {%- endif %}
{%- endfor %}
"""
LLAMA3 = (
    "{% for message in messages %}{% set content = '<|start_header_id|>' + message['role'] + "
    "'<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' %}{% if loop.first %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    "{% endif %}"
)


@pytest.fixture(scope="session")
def byte_tokenizer(learned):
    """A byte-level tokenizer with the control tokens of two formats."""
    pieces, kinds, merges = learned
    names = ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    pieces, kinds = [*pieces, *names], [*kinds, *[CONTROL] * len(names)]
    content = byte_level.make_json(pieces, kinds, merges, "smollm", bos=None)
    config = {"bos_token": "<|begin|>", "eos_token": "<|im_end|>"}
    files = {JSON: content, "tokenizer_config.json": json.dumps(config).encode()}
    return make_tokenizer(files, "tokenizer.json")


# ---- what is read, and what of it is learned


def by_hand(tokenizer, parts):
    """(tokens, learned) of parts: (text, or [control token's name]; whether it is learned)."""
    tokens, learned = [], []
    for part, is_learned in parts:
        is_text = isinstance(part, str)
        new = tokenizer.encode(part) if is_text else map(tokenizer.vocabulary.pieces.index, part)
        new = list(new)
        tokens += new
        learned += [is_learned] * len(new)
    return tokens, learned


def learned_by(tokenizer, record):
    """(tokens, learned) of the example that is made of a record."""
    (made,), _ = encode([record], tokenizer, sys.maxsize)
    return made.tokens.tolist(), made.learned.tolist()


@given(conversations())
def test_chatml_learns_the_answer_and_the_end_of_its_turn(byte_tokenizer, record):
    parts, before = [], ""
    for turn in record if record[0].role == "system" else (Turn("system", "Be kind."), *record):
        answers = turn.role == "assistant"
        parts += [(before, False)] * bool(before)
        parts += [(["<|im_start|>"], False), (f"{turn.role}\n", False), (turn.text, answers)]
        if not answers:  # a text of its own is cut into words as a whole
            parts[-2:] = [(f"{turn.role}\n{turn.text}", False)]
        parts.append((["<|im_end|>"], answers))
        before = "\n"
    found = learned_by(byte_tokenizer.with_template(CHATML), record)
    assert found == by_hand(byte_tokenizer, parts)


@given(conversations())
def test_llama_3_learns_the_answer_and_the_end_of_its_turn(byte_tokenizer, record):
    parts = [(["<|begin|>"], False)]
    for role, text, _ in record:
        answers = role == "assistant"
        parts += [(["<|start_header_id|>"], False), (role, False), (["<|end_header_id|>"], False)]
        parts += [("\n\n", False), (text.strip(), True)] * answers
        parts += [(f"\n\n{text.strip()}", False)] * (not answers)
        parts.append((["<|eot_id|>"], answers))
    found = learned_by(byte_tokenizer.with_template(LLAMA3), record)
    assert found == by_hand(byte_tokenizer, parts)


@given(conversations())
def test_llama_2_learns_the_answer_and_eos(toy_tokenizer, record):
    parts, system = [], ""
    if record[0].role == "system":
        system = f"<<SYS>>\n{record[0].text}\n<</SYS>>\n\n"
    for role, text, _ in record:
        if role == "user":
            parts += [(["<s>"], False), (f"[INST] {(system + text).strip()} [/INST]", False)]
            system = ""
        if role == "assistant":  # sentencepiece puts the space before it
            parts += [(f"{text.strip()} ", True), (["</s>"], True)]
    found = learned_by(toy_tokenizer.with_template(LLAMA2), record)
    assert found == by_hand(toy_tokenizer, parts)


@pytest.mark.parametrize(
    "kind, source",
    [
        ("toy_tokenizer", LLAMA2),
        ("toy_tokenizer", None),
        ("byte_tokenizer", CHATML),
        ("byte_tokenizer", LLAMA2),
        ("byte_tokenizer", LLAMA3),
        ("byte_tokenizer", None),
    ],
)
@given(record=conversations())
@example(record=(Turn("user", "a", "of what?"), Turn("assistant", "b")))
def test_every_answer_is_learned_after_the_very_tokens_that_ask_for_it(
    request, kind, source, record
):
    tokenizer = request.getfixturevalue(kind)
    tokenizer = tokenizer.with_template(source) if source else tokenizer
    tokens, learned = learned_by(tokenizer, record)
    begins = [i for i in range(1, len(tokens)) if learned[i] and not learned[i - 1]]
    asked = [k for k, turn in enumerate(record) if turn.role == "assistant"]
    assert len(begins) == len(asked)
    for begin, k in zip(begins, asked, strict=True):
        assert encode_asking(record[:k], tokenizer) == tokens[:begin]
        answer = tokens[begin:]
        answer = answer[: answer.index(tokenizer.answer_ends[-1])]
        assert tokenizer.decode_answer(answer).strip() == record[k].text.strip()
    assert learned[-1] and tokens[-1] in tokenizer.answer_ends


@given(TEXTS, TEXTS)
def test_data_never_become_control_tokens(byte_tokenizer, asked, answer):
    tokenizer = byte_tokenizer.with_template(CHATML)
    tokens, _ = learned_by(tokenizer, exchange(asked, answer))
    found = [tokenizer.vocabulary.pieces[i] for i in tokens if i in tokenizer.controls]
    assert found == ["<|im_start|>", "<|im_end|>"] * 3
    whole = f"<|im_start|>user\n{asked}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>"
    parts = tokenizer.template.parts(exchange(asked, answer))
    assert "".join(part.text for part in parts).endswith(whole)


def test_a_conversation_is_one_example_and_later_words_are_not_read(byte_tokenizer):
    tokenizer = byte_tokenizer.with_template(CHATML)
    record = (*exchange("a", "b"), *exchange("c", "d"))
    assert len(encode([record], tokenizer, 1000)[0]) == 1
    assert learned_by(tokenizer, (*record, Turn("user", "e"))) == learned_by(tokenizer, record)


def test_a_tools_turn_is_read_but_not_learned(byte_tokenizer, toy_tokenizer):
    record = (Turn("user", "a"), Turn("tool", "42"), Turn("assistant", "b"))
    for tokenizer in (byte_tokenizer.with_template(CHATML), toy_tokenizer):
        tokens, learned = learned_by(tokenizer, record)
        first = learned.index(True)
        assert "42" in tokenizer.decode(tokens[:first]) and all(learned[first:])
        assert tokenizer.decode_answer(tokens[first:-1]).strip() == "b"


# ---- Alpaca's


WITHOUT_INPUT = """Below is an instruction that describes a task. \
Write a response that appropriately completes the request.

### Instruction:
Add.

### Response:"""
WITH_INPUT = """\
Below is an instruction that describes a task, paired with an input that provides further context. \
Write a response that appropriately completes the request.

### Instruction:
Add.

### Input:
1 2

### Response:"""


def test_prompts_follow_alpacas_published_template():
    assert alpaca_prompt("Add.") == WITHOUT_INPUT
    assert alpaca_prompt("Add.", "1 2") == WITH_INPUT


def test_alpacas_answers_end_with_eos_and_more_questions_follow(toy_tokenizer):
    record = (*exchange("Add.", "3"), Turn("user", "Now", "4 5"), Turn("assistant", "9"))
    tokens, learned = learned_by(toy_tokenizer, record)
    more = "\n\n### Instruction:\nNow\n\n### Input:\n4 5\n\n### Response:"
    parts = [(["<s>"], False), (WITHOUT_INPUT, False), ("3", True), (["</s>"], True)]
    parts += [(more, False), ("9", True), (["</s>"], True)]
    assert (tokens, learned) == by_hand(toy_tokenizer, parts)


def test_a_system_message_takes_the_place_of_alpacas_first_lines(toy_tokenizer):
    record = (Turn("system", "Be brief."), *exchange("Add.", "3"))
    tokens, learned = learned_by(toy_tokenizer, record)
    asked = "Be brief.\n\n### Instruction:\nAdd.\n\n### Response:"
    parts = [(["<s>"], False), (asked, False), ("3", True), (["</s>"], True)]
    assert (tokens, learned) == by_hand(toy_tokenizer, parts)


def test_alpacas_bos_is_the_models_rule(toy_tokenizer, byte_tokenizer):
    assert encode_asking([Turn("user", "Add.")], toy_tokenizer)[0] == 1
    assert encode_asking([Turn("user", "Add.")], byte_tokenizer) == byte_tokenizer.encode(
        WITHOUT_INPUT
    )


# ---- which template


def test_a_template_of_its_own_file_comes_before_that_of_the_config(toy_tokenizer, tmp_path):
    toy_tokenizer.save(tmp_path)
    assert load_tokenizer(tmp_path).chat_template is None
    config = {"chat_template": [{"name": "tools", "template": "t"}]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert load_tokenizer(tmp_path).chat_template is None
    config["chat_template"].append({"name": "default", "template": "d"})
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert load_tokenizer(tmp_path).chat_template == "d"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "c"}))
    found = load_tokenizer(tmp_path)
    assert found.chat_template == found.template.source == "c"
    (tmp_path / CHAT_TEMPLATE).write_text("é")
    assert load_tokenizer(tmp_path).chat_template == "é"
    (tmp_path / CHAT_TEMPLATE).write_bytes(b"\xff")
    with pytest.raises(UserError, match=f"{CHAT_TEMPLATE}, line 1: byte 0xff"):
        load_tokenizer(tmp_path)


def test_another_template_is_saved_with_the_tokenizer_and_changes_no_digest(
    toy_tokenizer, tmp_path
):
    changed = toy_tokenizer.with_template(f"é\n{LLAMA2}")
    changed.save(tmp_path)
    assert load_tokenizer(tmp_path).chat_template == f"é\n{LLAMA2}"
    assert load_tokenizer(tmp_path).digest() == toy_tokenizer.digest()
    assert toy_tokenizer.chat_template is None


def test_the_end_of_a_turn_ends_an_answer_even_where_the_files_name_it_nowhere(
    byte_tokenizer, tmp_path
):
    end = byte_tokenizer.vocabulary.pieces.index("<|eot_id|>")
    assert byte_tokenizer.with_template(CHATML).stops == (byte_tokenizer.eos,)
    changed = byte_tokenizer.with_template(LLAMA3)
    assert changed.answer_ends == changed.stops == (byte_tokenizer.eos, end)
    changed.save(tmp_path)  # for other programs too
    assert load_tokenizer(tmp_path).stops == (byte_tokenizer.eos, end)
    byte_tokenizer.save(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    (tmp_path / CHAT_TEMPLATE).write_text(LLAMA3)  # a folder of somebody else's
    found = load_tokenizer(tmp_path)
    assert found.stops == (byte_tokenizer.eos,) and found.answer_ends == changed.stops


def test_a_template_may_use_what_hugging_faces_do(byte_tokenizer):
    source = (
        "{% for m in messages %}{% if m.role == 'user' %}{% continue %}{% endif %}"
        "{% generation %}{{ {'é': m.content} | tojson }}{% endgeneration %}{% break %}{% endfor %}"
        "{{ strftime_now('%d %b %Y') }}{{ 2 * 3 }}{{ 2 ** 3 }}{{ tools is none }}"
        "{{ documents is none }}{{ '%s' % 1 }}{{ {'b': 1, 'a': [2]} | tojson(indent=None) }}"
    )
    template = Template(source, {}, "", "")
    expected = '{"é": "<b>"}26 Jul 202468TrueTrue1{"b": 1, "a": [2]}'
    assert template.render(exchange("a", "<b>"), MARK) == expected


# ---- strangers' code


LOOP = "{% for i in range(99999) %}"
BAD = {
    "{% for %}": "is not valid.*Expected",
    "{{ x | nofilter }}": "is not valid.*nofilter",
    f"{LOOP}{LOOP}{{% endfor %}}{{% endfor %}}": "does not end within",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "RecursionError|does not end",
    "{{ ''.__class__.__mro__ }}": "SecurityError",
    "{{ messages.append(1) }}": "SecurityError",
    "{{ messages[0].clear() }}": "SecurityError",
    "{{ 'a' * 10 ** 9 }}": "SecurityError",
    "{{ 9 ** 999 }}": "SecurityError",
    "{{ range(10 ** 9) }}": "OverflowError",
    "{{ messages[0].content + 1 }}": "TypeError",
    "{{ undefined.attribute }}": "UndefinedError",
    "{{ raise_exception('System role not supported') }}": "System role not supported",
    "{% include 'other' %}": "no loader|TypeError",
    "{% for m in messages %}{{ m.content }}{% endfor %}{{ messages | length }}": "otherwise once",
    "{# nothing #}": "leaves out the answer",
    "{{ 'a' * 2 }}": "leaves out the answer|SecurityError",
    "{{ '\\ud800' }}": "surrogates not allowed",
    "{{ messages[0].content }}": "leaves out the answer",
}


@pytest.mark.parametrize("source", BAD)
def test_a_template_that_does_not_work_is_named_in_one_line(toy_tokenizer, source, tmp_path):
    toy_tokenizer.save(tmp_path)
    (tmp_path / CHAT_TEMPLATE).write_text(source)
    tokenizer, before = load_tokenizer(tmp_path), sys.gettrace()
    for use in (
        lambda: encode([exchange("Hello", "you"), exchange("a", "b")], tokenizer, 100),
        lambda: tokenizer.answer_ends,
        lambda: toy_tokenizer.with_template(source),
    ):
        with pytest.raises(UserError, match=BAD[source]) as caught:
            use()
    assert sys.gettrace() is before
    assert "\n" not in str(caught.value) and "--template" in str(caught.value)
    assert source[:5] in str(caught.value)


@pytest.mark.parametrize("field", ["text", "value", "Content"])
def test_a_template_that_does_not_write_what_is_said_is_refused(toy_tokenizer, field):
    source = f"{{% for m in messages %}}{{{{ m.role + ': ' }}}}{{{{ m.{field} }}}}{{% endfor %}}"
    with pytest.raises(UserError, match="does not write what is said"):
        toy_tokenizer.with_template(source)
    with pytest.raises(UserError, match="leaves out the answer"):  # as of Python's str.format
        toy_tokenizer.with_template("### Instruction:\n{instruction}\n### Response:\n{output}")


def test_a_conversation_that_a_template_refuses_is_named(toy_tokenizer):
    record = (Turn("user", "Who is there?"), Turn("user", "I"), Turn("assistant", "b"))
    with pytest.raises(UserError, match="'Who is there\\?'.*roles must alternate"):
        encode([exchange("a", "b"), record], toy_tokenizer.with_template(LLAMA2), 100)


def test_a_long_conversation_has_steps_enough(byte_tokenizer):
    record = exchange("a", "b") * 400
    tokens, learned = learned_by(byte_tokenizer.with_template(LLAMA3), record[:60])
    assert sum(learned) == 30 * 2
    source = LLAMA3.replace("{{ content }}", "{% for i in range(20) %}{% endfor %}{{ content }}")
    template = Template(source, {}, "", "")
    assert template.render(record, MARK).count("<|eot_id|>") == 800


def test_a_mark_is_in_none_of_the_texts():
    assert templates.mark_beside([Turn("user", f"a{MARK * 3}", MARK)]) == MARK * 4


def test_a_control_token_inside_anothers_name_stays_text_too():
    controls = {"<|a|>": 1, "|a|>": 2, ">b": 3, "<s>": 4}
    template = Template(
        "{% for m in messages %}{{ m.content + '<s>' }}{% endfor %}", controls, "", "<s>"
    )
    parts = template.parts(exchange("<|a|>b|a|>", "<|a|><|a|>b"))
    assert [(p.text, p.control) for p in parts if p.control] == [("<s>", 4)] * 2
    assert "".join(part.text for part in parts) == "<|a|>b|a|><s><|a|><|a|>b<s>"


def test_a_control_token_of_a_single_character_is_never_made_of_a_text():
    source = "{% for m in messages %}{{ m.content + '<s>' }}{% endfor %}"
    parts = Template(source, {"<s>": 1, ">": 2}, "", "<s>").parts(exchange(">", ">"))
    assert [part.control for part in parts] == [None, 1, None, 1]


def test_the_longest_control_token_is_found():
    template = Template("<s>{{ messages[-1].content }}<s>>", {"<s>": 1, "<s>>": 2}, "", "<s>")
    assert [part.control for part in template.asking([Turn("user", "a")])] == [1, None, 2]


def test_an_answer_without_a_control_token_at_its_end_ends_with_eos_each_time(toy_tokenizer):
    source = "{% for m in messages %}{{ '\n' + m.role + ': ' + m.content }}{% endfor %}"
    source += "{% if add_generation_prompt %}{{ '\nassistant:' }}{% endif %}"
    tokenizer = toy_tokenizer.with_template(source)
    record = (*exchange("a", "b"), *exchange("c", "d"))
    tokens, learned = learned_by(tokenizer, record)
    parts = [("\nuser: a\nassistant:", False), ("b", True), (["</s>"], True)]
    parts += [("\nuser: c\nassistant:", False), ("d", True), (["</s>"], True)]
    assert (tokens, learned) == by_hand(tokenizer, parts)
    assert encode_asking(record[:3], tokenizer) == tokens[: len(tokens) - 2]


@given(answer=SOMETHING)
@example(answer="Hi")
@example(answer=" Hi")
@example(answer="\n\nHi")
def test_sentencepiece_puts_no_space_before_an_answer_that_follows_a_line_break(
    toy_tokenizer, answer
):
    source = "{% for m in messages %}{{ m.role + ':\n' + m.content + eos_token }}{% endfor %}"
    source += "{% if add_generation_prompt %}{{ 'assistant:\n' }}{% endif %}"
    tokens, _ = learned_by(toy_tokenizer.with_template(source), exchange("a", answer))
    whole = toy_tokenizer.encode(f"assistant:\n{answer}")  # a line break merges with nothing here
    assert tokens == [*toy_tokenizer.encode("user:\na"), 2, *whole, 2]


def test_a_control_token_before_the_words_does_not_end_an_answer(byte_tokenizer):
    source = CHATML.replace("'\n' + message['content']", "'\n<|end|>' + message['content']")
    tokens, learned = learned_by(byte_tokenizer.with_template(source), exchange("a", "b"))
    said = [tokens[i] for i in range(len(tokens)) if learned[i]]
    ids = [byte_tokenizer.vocabulary.pieces.index(name) for name in ("<|end|>", "<|im_end|>")]
    assert said == [ids[0], *byte_tokenizer.encode("b"), ids[1]]
    source = source.replace(" + '<|im_end|>' + '\n' }}", " }}")  # and none behind them
    tokens, learned = learned_by(byte_tokenizer.with_template(source), exchange("a", "b"))
    said = [tokens[i] for i in range(len(tokens)) if learned[i]]
    assert said == [ids[0], *byte_tokenizer.encode("b"), byte_tokenizer.eos]
