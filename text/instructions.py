"""The forms in which people have their instructions, read into conversations.

A `Record` is what was said, turn by turn, whatever the file looked like. How the turns are written
for a model is decided elsewhere. The records are held as strings; the file itself is not, see
text/records.py.
"""

import itertools
import operator
import pathlib
import re
from typing import NamedTuple

from cli.errors import UserError
from text.records import values_in


class Turn(NamedTuple):
    """What one speaker says."""

    role: str  # "system", "user", "assistant" or "tool"; "text" for plain text
    text: str
    input: str = ""  # of a user's turn: what its instruction is about


Record = tuple[Turn, ...]  # a conversation; plain text is one Turn("text", ...)


class Data(NamedTuple):
    """The conversations of a file, and what of it is not among them."""

    records: list[Record]
    form: str  # a name in FORMS, or "toy world"
    left_out: int  # records without an answer
    first_left_out: str  # where the first of them is, such as "line 17"; "" if there are none


FORMS = {  # the fields that a form needs; a record has the first form whose fields it has
    "Alpaca": ("instruction", "output"),
    "Dolly": ("instruction", "response"),
    "OpenOrca": ("question", "response"),
    "questions": ("question", "answer"),  # GSM8K and many others
    "FLAN v2": ("inputs", "targets"),
    "Self-instruct": ("prompt", "completion"),
    "prompts": ("prompt", "response"),
    "queries": ("query", "response"),  # MetaMathQA
    "LongForm": ("input", "output"),
    "messages": ("messages",),
    "conversations": ("conversations",),
    "text": ("text",),
    "Chip2": ("text",),  # this and Guanaco are told from plain text by their markers
    "Guanaco": ("text",),
}
INPUTS = {"Alpaca": "input", "Dolly": "context"}  # the field of the input, which may be missing
MESSAGES = {  # the fields of a turn: who speaks, and what is said
    "messages": ("role", "content"),
    "conversations": ("from", "value"),
}
# The fields of the system's turn, which may be missing
SYSTEMS = {
    "Alpaca": ("system",),
    "OpenOrca": ("system_prompt",),
    "messages": ("system", "system_prompt"),
    "conversations": ("system", "system_prompt"),
}
# An answer in Self-instruct's file for fine-tuning GPT-3 ends so, and begins with a space
GPT3_END = "<|endoftext|>"
MARKERS = {  # how a text names the next speaker; Guanaco's stand at a line's begin or in a line
    "Chip2": re.compile(r"^<(human|bot)>:", re.MULTILINE),
    "Guanaco": re.compile(r"### (Human|Assistant):"),
}
ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "function": "tool",
    "tool": "tool",
    "observation": "tool",
    "ipython": "tool",
    "tool_response": "tool",
}


def read_records(path: str | pathlib.Path) -> Data:
    """Reads the conversations of a file of any kind that `values_in` knows.

    The first record decides the form of the file. A record whose answer is empty teaches nothing:
    it is left out and counted, as files of real data have a few.

    Raises UserError with the place of the first bad record, or if more than a tenth of all records
    has no answer.
    """
    records = []
    form = None
    count = left_out = 0
    first = ("", 0)
    for count, (place, value) in enumerate(values_in(path), 1):
        try:
            form = _check_form(value, form)
            record = _record_of(value, form)
        except ValueError as e:
            raise UserError(f"{path}, {place} (record {count}): {e}") from None
        if record:
            records.append(record)
            continue
        if form == "text" and not records:
            form = None  # a blank text does not tell whether the others are dialogues
        if not left_out:
            first = (place, count)
        left_out += 1
    _check_answered(path, form, count, left_out, *first)
    return Data(records, form, left_out, first[0])


def _check_answered(path, form, count, left_out, place, number):
    """UserError if too many of `count` records have no answer; the first is at `place`."""
    if not count:
        raise UserError(
            f"{path} holds no records; give a JSON list, JSON lines, CSV, Parquet or a .txt file"
        )
    if left_out == count:
        raise UserError(
            f"{path}: the responses of all {count} records are empty or missing; "
            "there is nothing to learn"
        )
    # Blank texts are common between paragraphs, and no sign that the file is not what it seems
    if form != "text" and 10 * left_out > count:
        raise UserError(
            f"{path}: {left_out} of {count} records have no answer, the first of them on "
            f"{place} (record {number}); correct or remove them"
        )


def _check_form(value, expected):
    """The form of one record. `expected` is that of the records before it; None for the first.

    Raises ValueError if the record has no form, or another one.
    """
    if not isinstance(value, dict):
        kind = type(value).__name__
        raise ValueError(f"a record must be an object with named fields, not {kind}")
    form = next((form for form in FORMS if _has_fields(value, FORMS[form])), None)
    if form is None:
        known = "; ".join(dict.fromkeys(", ".join(fields) for fields in FORMS.values()))
        found = ", ".join(list(value)[:8]) or "none"
        needed = f"one of {known}"
        if expected:
            needed = f"{', '.join(FORMS[expected])}, as in the records before"
        raise ValueError(f"its fields ({found}) make no known form; needed: {needed}")
    if form == "questions" and "choices" in value:
        raise ValueError("multiple choice is for evals.py --multiple-choice; there is no answer")
    if expected is None:
        return _layout(value["text"]) if form == "text" else form
    if FORMS[form] != FORMS[expected]:
        raise ValueError(
            f"it has the form {form} ({', '.join(FORMS[form])}), the records before have the form "
            f"{expected} ({', '.join(FORMS[expected])}); split the file by form"
        )
    return expected


def _has_fields(value, fields):
    return all(field in value for field in fields)


def _layout(text):
    """The form of a text: a dialogue has a marker of the human and, later, one of the assistant."""
    for form, markers in MARKERS.items():
        names = markers.findall(text) if isinstance(text, str) else []
        roles = [ROLES[name.lower()] for name in names]
        if "user" in roles and "assistant" in roles[roles.index("user") :]:
            return form
    return "text"


def _record_of(value, form):
    """The conversation in one value of a file; None if it has no answer."""
    if form in MESSAGES:
        return _conversation(_system(value, form) + _messages(value[form], *MESSAGES[form]))
    if form in MARKERS:
        return _conversation(_messages_in_text(_optional(value, "text"), MARKERS[form]))
    if form == "text":
        text = _optional(value, "text")
        return (Turn("text", text),) if text.strip() else None
    if form == "Alpaca" and value.get("history"):
        raise ValueError("history is not supported; write the conversation as messages")
    asked, answered = FORMS[form]
    question = Turn("user", _string(value, asked), _optional(value, INPUTS.get(form)))
    answer = _optional(value, answered)
    if form == "Self-instruct":
        answer = answer.removesuffix(GPT3_END).removeprefix(" ")
    if not answer.strip():
        return None
    before = [Turn(*said) for said in _system(value, form)]
    return *before, question, Turn("assistant", answer)


def _system(value, form):
    """[("system", text)] of the fields beside a conversation that hold it."""
    texts = [_optional(value, field) for field in SYSTEMS.get(form, ())]
    return [("system", text) for text in texts if text.strip()]


def _conversation(said):
    """What was said, [(role, text)], as a Record that ends with an answer; None if one is missing.

    Consecutive turns of one speaker are joined. Nobody learns from an empty answer, nor can the
    conversation go on without it, so it is left out with all of its turns.
    """
    turns = []
    for role, group in itertools.groupby(_without_unasked(said), operator.itemgetter(0)):
        turns.append(Turn(role, "\n\n".join(text for _, text in group)))
    while turns and turns[-1].role != "assistant":
        turns.pop()
    answers = [turn.text for turn in turns if turn.role == "assistant"]
    return tuple(turns) if answers and all(map(str.strip, answers)) else None


def _without_unasked(said):
    """What was said, without empty system messages and all else before the first question."""
    asked = False
    for role, text in said:
        if role == "system" and not text.strip():
            continue
        if role == "system" and asked:
            raise ValueError("a system message comes after a user's; it must come first")
        asked |= role == "user"
        if asked or role == "system":
            yield role, text


def _messages(turns, role_field, text_field):
    """[(role, text)] of a list of messages. Some people's conversations have messages' fields."""
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError("a conversation must be a list of objects")
    said = []
    for turn in turns:
        fields = (role_field, text_field)
        if role_field not in turn and "role" in turn:
            fields = ("role", "content")
        name = _string(turn, fields[0]).lower()
        if turn.get("weight") == "0":
            raise ValueError("a weight of 0, for a turn not to be learned, is not supported")
        if name not in ROLES:
            raise ValueError(f"unknown {fields[0]} {name!r}; known: {', '.join(ROLES)}")
        text = _text_of(turn, fields[1], ROLES[name])
        if text is not None:
            said.append((ROLES[name], text))
    return said


def _text_of(turn, field, role):
    """The text of a message, also one in parts; None if it only calls a tool."""
    content = turn.get(field)
    if not content and (turn.get("tool_calls") or turn.get("function_call")):
        return None
    if isinstance(content, list):
        return "".join(_text_of_part(part, field) for part in content)
    if content is None and field in turn and role == "assistant":
        return ""
    return _string(turn, field)


def _text_of_part(part, field):
    if not isinstance(part, dict):
        return _checked(part, f"a part of {field}")
    kind = part.get("type")
    if kind != "text":
        raise ValueError(f"a part of {field} has the type {kind}; only text can be learned")
    return _string(part, "text")


def _messages_in_text(text, markers):
    """[(role, text)] of a dialogue in one text; what stands before the first marker is system's."""
    before, *parts = markers.split(text)
    said = [("system", before.strip())]
    for name, words in zip(parts[::2], parts[1::2], strict=True):
        said.append((ROLES[name.lower()], words.strip()))
    return said


def _optional(value, field):
    """The text in a field; "" if there is none: the field is null, missing, or no field (None)."""
    return "" if value.get(field) is None else _string(value, field)


def _string(value, field):
    """The text in a field; ValueError if it is missing, no string, or no valid Unicode."""
    if field not in value:
        raise ValueError(f"no {field}")
    return _checked(value[field], field)


def _checked(text, name):
    """A text, after a look at it; ValueError if it is no string or no valid Unicode."""
    if not isinstance(text, str):
        raise ValueError(f"{name} is {type(text).__name__}, not a string")
    try:
        text.encode()
    except UnicodeEncodeError as e:
        half = text[e.start].encode("unicode_escape").decode()
        raise ValueError(f"{name} has half a character ({half}), which is no text") from None
    return text
