"""text/instructions.py: of conversations nothing is lost but what nobody asked for or answered."""

import json

import pytest
from test_text_instructions import ADDING, CONVERSATION, MESSAGES, conversation, read, record

from cli.errors import UserError
from text.instructions import ROLES, Data, Turn


def test_a_conversation_keeps_what_leads_to_its_last_answer(tmp_path):
    turns = [
        ("assistant", "Hello!"),
        ("system", "Be brief."),
        ("tool", "Ready."),
        ("system", " "),
        ("system", "Be kind."),
        ("assistant", ""),
        ("user", "Add."),
        ("assistant", "3"),
        ("assistant", "Yes."),
        ("system", ""),
        ("user", "And"),
        ("user", "now?"),
        ("tool", "2"),
        ("tool", "2"),
        ("assistant", "4"),
        ("user", "Bye"),
        ("tool", "5"),
    ]
    expected = record(
        ("system", "Be brief.\n\nBe kind."),
        ("user", "Add."),
        ("assistant", "3\n\nYes."),
        ("user", "And\n\nnow?"),
        ("tool", "2\n\n2"),
        ("assistant", "4"),
    )
    assert conversation(tmp_path, [{"role": r, "content": text} for r, text in turns]) == expected


@pytest.mark.parametrize(
    "names, role",
    [
        ("user human prompter", "user"),
        ("assistant gpt chatgpt bing bard model bot", "assistant"),
        ("function tool observation ipython tool_response", "tool"),
        ("system developer", "system"),
    ],
)
def test_every_name_of_a_speaker_is_known(tmp_path, names, role):
    assert sorted(names.split()) == sorted(name for name in ROLES if ROLES[name] == role)
    for name in names.split():
        said = [{"from": name, "value": "b"}]
        if role != "system":
            said.insert(0, {"from": "user", "value": "a"})
        said += CONVERSATION
        found = read(tmp_path, json.dumps([{"conversations": said}])).records[0]
        merged = {"user": ("user", "a\n\nb\n\nAdd."), "assistant": ("assistant", "b")}
        assert merged.get(role, (role, "b")) in [turn[:2] for turn in found]
        assert found[-1] == Turn("assistant", "3")


def test_a_message_may_come_in_parts(tmp_path):
    parts = [{"type": "text", "text": "Ad"}, "d", {"type": "text", "text": ".", "image_url": None}]
    assert conversation(tmp_path, [{"role": "user", "content": parts}, MESSAGES[1]]) == ADDING


@pytest.mark.parametrize("content", [{"content": None}, {"content": ""}, {"content": []}, {}])
@pytest.mark.parametrize("call", [{"tool_calls": [{"id": "1"}]}, {"function_call": {"name": "f"}}])
def test_a_turn_that_only_calls_a_tool_says_nothing(tmp_path, content, call):
    calling = {"role": "assistant", **content, **call}
    answer = {"role": "tool", "content": "1 2", "tool_calls": None}
    expected = record(("user", "Add."), ("tool", "1 2"), ("assistant", "3"))
    assert conversation(tmp_path, [MESSAGES[0], calling, answer, MESSAGES[1]]) == expected
    saying = {"role": "assistant", "content": "Wait.", **call}
    found = conversation(tmp_path, [MESSAGES[0], saying, answer, MESSAGES[1]])
    assert found[1] == Turn("assistant", "Wait.")


GUANACO = "### Human: Hi### Assistant: Hello!### Human: Tea?\nOr # milk?\n### Assistant:\nTea.\n"


@pytest.mark.parametrize(
    "text, form, turns",
    [
        (
            GUANACO,
            "Guanaco",
            [("user", "Hi"), ("assistant", "Hello!")]
            + [("user", "Tea?\nOr # milk?"), ("assistant", "Tea.")],
        ),
        (f"{GUANACO}### Human: Bye", "Guanaco", None),
        ("Be kind. ### Human: a### Assistant: b", "Guanaco", [("system", "Be kind.")]),
        (
            "<human>: a <bot>: b\n<bot>: c\n\n",
            "Chip2",
            [("user", "a <bot>: b"), ("assistant", "c")],
        ),
        ("<human>: a\n <bot>: b", "text", [("text", "<human>: a\n <bot>: b")]),
        ("<bot>: a\n<human>: b", "text", [("text", "<bot>: a\n<human>: b")]),
        ("### Assistant: a### Human: b", "text", [("text", "### Assistant: a### Human: b")]),
        ("## Human: a## Assistant: b\n", "text", [("text", "## Human: a## Assistant: b\n")]),
    ],
)
def test_a_text_with_speakers_is_a_conversation(tmp_path, text, form, turns):
    data = read(tmp_path, json.dumps({"text": text}))
    if turns is None:  # what is said behind the last answer is dropped
        turns = read(tmp_path, json.dumps({"text": GUANACO})).records[0]
    assert (data.form, data.left_out) == (form, 0)
    assert data.records[0][: len(turns)] == record(*turns)
    assert form != "text" or len(data.records[0]) == 1


def test_the_first_text_decides_for_the_file(tmp_path):
    plain, dialogue = {"text": "Assam."}, {"text": "<human>: a\n<bot>: b"}
    data = read(tmp_path, json.dumps([plain, dialogue]))
    expected = [record(("text", "Assam.")), record(("text", "<human>: a\n<bot>: b"))]
    assert data == Data(expected, "text", 0, "")
    data = read(tmp_path, json.dumps([dialogue] * 10 + [plain], indent=0))
    expected = [record(("user", "a"), ("assistant", "b"))] * 10
    assert data == Data(expected, "Chip2", 1, "line 32")


@pytest.mark.parametrize("name", ["Human", "USER", "Assistant", "GPT"])
def test_names_of_speakers_may_have_capitals(tmp_path, name):
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    turns[name in ("Assistant", "GPT")]["from"] = name
    found = read(tmp_path, json.dumps([{"conversations": turns}]))
    assert found.records == [record(("user", "a"), ("assistant", "b"))]


@pytest.mark.parametrize(
    "value, said",
    [
        ({"messages": [*MESSAGES, {**MESSAGES[1], "weight": 0}]}, "a weight of 0"),
        ({"instruction": "a", "output": "b", "history": [["c", "d"]]}, "history is not supported"),
    ],
)
def test_what_would_change_the_meaning_is_not_passed_over(tmp_path, value, said):
    with pytest.raises(UserError, match=said):
        read(tmp_path, json.dumps([value]))
