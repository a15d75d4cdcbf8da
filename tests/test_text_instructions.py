"""text/instructions.py: every form of file is read exactly, or refused by line."""

import json

import pytest
from helpers import TEXTS
from hypothesis import assume, given
from hypothesis import strategies as st

from cli.errors import UserError
from text.instructions import Record, alpaca_prompt, read_records

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


def read(folder, content, name="records.json"):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_records(path)


def test_prompts_follow_alpacas_published_template():
    assert alpaca_prompt("Add.") == WITHOUT_INPUT
    assert alpaca_prompt("Add.", "1 2") == WITH_INPUT


MESSAGES = [{"role": "user", "content": "Add."}, {"role": "assistant", "content": "3"}]
CONVERSATION = [{"from": "human", "value": "Add."}, {"from": "gpt", "value": "3"}]


@pytest.mark.parametrize(
    "value, form, prompt",
    [
        ({"instruction": "Add.", "input": "1 2", "output": "3"}, "Alpaca", WITH_INPUT),
        ({"instruction": "Add.", "input": "", "output": "3"}, "Alpaca", WITHOUT_INPUT),
        ({"instruction": "Add.", "input": None, "output": "3"}, "Alpaca", WITHOUT_INPUT),
        (
            {"instruction": "Add.", "output": "3", "text": "all of it", "id": 7},
            "Alpaca",
            WITHOUT_INPUT,
        ),
        ({"inputs": "Add.", "targets": "3", "task": "sum"}, "FLAN v2", WITHOUT_INPUT),
        ({"prompt": "Add.", "completion": "3"}, "Self-instruct", WITHOUT_INPUT),
        ({"input": "Add.", "output": "3", "source": "x"}, "LongForm", WITHOUT_INPUT),
        ({"messages": MESSAGES}, "messages", WITHOUT_INPUT),
        ({"conversations": CONVERSATION}, "conversations", WITHOUT_INPUT),
        ({"text": "3", "meta": {}}, "text", ""),
    ],
)
def test_each_form_is_recognised_by_its_fields(tmp_path, value, form, prompt):
    expected = [Record(prompt, "3")] * 2, form
    assert read(tmp_path, json.dumps([value, value])) == expected
    assert read(tmp_path, f"\n{json.dumps(value)}\n\n{json.dumps(value)}") == expected
    assert read(tmp_path, "\ufeff" + json.dumps([value, value], indent=3)) == expected


@given(
    st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=6),
    st.booleans(),
    st.sampled_from([None, 0, 2]),
)
def test_what_was_written_is_what_is_read(tmp_path_factory, pairs, ascii_only, indent):
    assume(any(response.strip() for _, response in pairs))
    values = [{"prompt": prompt, "completion": response} for prompt, response in pairs]
    expected = [Record(alpaca_prompt(prompt), response) for prompt, response in pairs]
    folder = tmp_path_factory.mktemp("written")
    a_list = json.dumps(values, ensure_ascii=ascii_only, indent=indent)
    assert read(folder, a_list)[0] == expected
    lines = "\r\n".join(json.dumps(value, ensure_ascii=ascii_only) for value in values)
    assert read(folder, lines)[0] == expected


def test_a_text_file_is_a_record_a_paragraph(tmp_path):
    records, form = read(tmp_path, "\n\nOne\nand one.\n \n\nTwo.\r\n\r\nThree.\n", "story.txt")
    assert form == "text"
    assert records == [Record("", "One\nand one."), Record("", "Two."), Record("", "Three.")]


def test_a_conversation_teaches_every_answer_with_all_that_was_said_before(tmp_path):
    turns = [
        ("system", "Be brief."),
        ("assistant", "Hello!"),
        ("user", "Add."),
        ("assistant", "3"),
        ("assistant", "Yes."),
        ("user", "And"),
        ("user", "now?"),
        ("assistant", "4"),
        ("user", "Bye"),
    ]
    first = "Be brief.\n\n### Instruction:\nAdd.\n\n### Response:"
    second = f"{first} 3\n\nYes.\n\n### Instruction:\nAnd\n\nnow?\n\n### Response:"
    expected = [Record(first, "3\n\nYes."), Record(second, "4")]
    value = {"messages": [{"role": role, "content": text} for role, text in turns]}
    assert read(tmp_path, json.dumps(value)) == (expected, "messages")


GOOD = '{"instruction": "Add.", "output": "3"}'
BAD = [  # (the second of three records, what its error says)
    ('{"instruction": "Add.", "output": 3}', "output is int, not a string"),
    ('{"instruction": ["Add."], "output": "3"}', "instruction is list, not a string"),
    ('{"instruction": "Add.", "input": 1, "output": "3"}', "input is int, not a string"),
    ('{"instruction": "Add.", "input": [], "output": "3"}', "input is list, not a string"),
    ('{"instruction": null, "output": "3"}', "instruction is NoneType, not a string"),
    (
        '{"instruction": "Add."}',
        r"its fields \(instruction\) make no known form; needed: instruction, output",
    ),
    ("{}", r"its fields \(none\)"),
    ('{"inputs": "Add.", "targets": "3"}', "FLAN v2.*records before have the form Alpaca"),
    ('{"input": "Add.", "output": "3"}', "LongForm.*records before have the form Alpaca"),
    ('"Add."', "a record must be an object with named fields, not str"),
    ('["Add.", "3"]', "a record must be an object with named fields, not list"),
    ("null", "a record must be an object"),
    (r'{"instruction": "Add.", "output": "\ud83d"}', "surrogates not allowed"),
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


USER = {"role": "user", "content": "Add."}
NO_ANSWER = "no user's turn is followed by an assistant's"


@pytest.mark.parametrize(
    "turns, message",
    [
        ("Hello", "a conversation must be a list"),
        (["Hello"], "a conversation must be a list of objects"),
        ([], NO_ANSWER),
        ([{"role": "assistant", "content": "3"}], NO_ANSWER),
        ([USER], NO_ANSWER),
        ([USER, {"role": "robot", "content": "3"}], "unknown role 'robot'; known: system"),
        ([USER, {"content": "3"}], "no role"),
        ([USER, {"role": "system", "content": "Be brief."}], "a system message"),
        ([{"role": "user", "content": None}], "content is NoneType"),
    ],
)
def test_a_bad_conversation_is_refused_by_line(tmp_path, turns, message):
    with pytest.raises(UserError, match=rf"line 1 \(record 1\): {message}"):
        read(tmp_path, json.dumps({"messages": turns}))


@pytest.mark.parametrize(
    "content, message",
    [
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
        (
            '{"instruction": "Add.", "output": ""}\n{"instruction": "Add.", "output": " "}',
            "responses of all 2 records",
        ),
    ],
)
def test_a_file_that_is_no_list_of_records_is_refused(tmp_path, content, message):
    with pytest.raises(UserError, match=rf"records.json,? ?.*{message}"):
        read(tmp_path, content)


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(UserError, match="cannot read .*absent.json: No such file"):
        read_records(tmp_path / "absent.json")
    with pytest.raises(UserError, match="cannot read .*: Is a directory"):
        read_records(tmp_path)


def test_the_self_instruct_records_are_read(material):
    path = material("self-instruct-seeds.json")
    records, form = read_records(path)
    assert form == "Alpaca" and len(records) == 175
    for value, record in zip(json.loads(path.read_bytes()), records, strict=True):
        assert record.response == value["output"]
        assert value["instruction"] in record.prompt and value["input"] in record.prompt
