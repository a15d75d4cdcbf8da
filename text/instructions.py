"""Instruction files: the forms in which people have them, read into prompts and responses.

A `Record` is a prompt and the response to learn, whatever the file looked like. An instruction
becomes a prompt in Alpaca's template; plain text has an empty prompt. A file is read whole, so one
reader serves all forms (the 52,000 Alpaca records are 23 MB).
"""

import itertools
import json
import pathlib
import re
from collections.abc import Iterator
from typing import NamedTuple

from cli.errors import UserError


class Record(NamedTuple):
    """A prompt, and the response that is to be learned."""

    prompt: str
    response: str


# Stanford Alpaca's template (Taori et al., 2023), word for word
REQUEST = "Write a response that appropriately completes the request."
PREAMBLE = f"Below is an instruction that describes a task. {REQUEST}"
PREAMBLE_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    f"context. {REQUEST}"
)
FORMS = {  # the fields that a form needs; a record has the first form whose fields it has
    "Alpaca": ("instruction", "output"),  # and perhaps input
    "FLAN v2": ("inputs", "targets"),
    "Self-instruct": ("prompt", "completion"),  # Chip2 too
    "LongForm": ("input", "output"),
    "messages": ("messages",),
    "conversations": ("conversations",),
    "text": ("text",),
}
ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}


def alpaca_prompt(instruction: str, input: str = "") -> str:
    """Alpaca's template, with or without input, up to and including `### Response:`."""
    if input:
        return (
            f"{PREAMBLE_WITH_INPUT}\n\n### Instruction:\n{instruction}"
            f"\n\n### Input:\n{input}\n\n### Response:"
        )
    return f"{PREAMBLE}\n\n### Instruction:\n{instruction}\n\n### Response:"


def read_records(path: str | pathlib.Path) -> tuple[list[Record], str]:
    """Reads a JSON list, JSON lines or a .txt file; returns the records and their form in FORMS.

    The first record's fields decide the form of the file. In a .txt file every paragraph is a
    record. Raises UserError with file and line of the first bad record.
    """
    text = read_text(path)
    if pathlib.Path(path).suffix.lower() == ".txt":
        records = [Record("", p) for p in re.split(r"\r?\n\s*\n", text.strip()) if p]
        form = "text"
    else:
        records, form = _records_in_json(path, text)
    if not records:
        raise UserError(f"{path} holds no records; give a JSON list, JSON lines or a .txt file")
    if not any(record.response.strip() for record in records):
        raise UserError(
            f"{path}: the responses of all {len(records)} records are empty; "
            "there is nothing to learn"
        )
    return records, form


def read_text(path: str | pathlib.Path) -> str:
    """The whole of a UTF-8 file, without a byte order mark.

    Raises UserError, with the line of the first byte that is not UTF-8.
    """
    try:
        return pathlib.Path(path).read_bytes().decode("utf-8-sig")
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror}") from None
    except UnicodeDecodeError as e:
        line = e.object.count(b"\n", 0, e.start) + 1
        byte = e.object[e.start]
        raise UserError(
            f"{path}, line {line}: byte {byte:#04x} is not UTF-8; save the file as UTF-8"
        ) from None


def _records_in_json(path, text):
    records = []
    form = None
    for number, (line, value) in enumerate(_json_values(path, text), 1):
        try:
            form = _check_form(value, form)
            records += _records_of(value, form)
        except ValueError as e:
            raise UserError(f"{path}, line {line} (record {number}): {e}") from None
    return records, form


def _json_values(path, text):
    """[(line number, value)] for the items of one JSON list, or for JSON lines."""
    is_list = text.lstrip().startswith("[")
    line = 1
    values = []
    try:
        if is_list:
            values = json.loads(text)
            return list(zip(_item_lines(text, len(values)), values, strict=True))
        for line, row in enumerate(text.split("\n"), 1):
            if row.strip():
                values.append((line, json.loads(row)))
        return values
    except (ValueError, RecursionError) as e:
        if is_list:
            line = getattr(e, "lineno", 1)
        reason = getattr(e, "msg", e)
        raise UserError(
            f"{path}, line {line}: not JSON ({reason}); "
            "expected a JSON list of records, or one record a line"
        ) from None


def _item_lines(text, count) -> Iterator[int]:
    """The line on which each of the `count` items of a valid JSON list begins."""
    decoder = json.JSONDecoder()
    separator = re.compile(r"[\s,]*")
    line, last, end = 1, 0, text.index("[") + 1
    for _ in range(count):
        start = separator.match(text, end).end()
        line += text.count("\n", last, start)
        last = start
        yield line
        end = decoder.raw_decode(text, start)[1]


def _check_form(value, expected):
    """The form of one record. `expected` is that of the records before it; None for the first.

    Raises ValueError if the record has no form, or another one.
    """
    if not isinstance(value, dict):
        kind = type(value).__name__
        raise ValueError(f"a record must be an object with named fields, not {kind}")
    form = next((form for form in FORMS if _has_fields(value, FORMS[form])), None)
    if form is None:
        known = "; ".join(", ".join(fields) for fields in FORMS.values())
        found = ", ".join(list(value)[:8]) or "none"
        needed = f"one of {known}"
        if expected:
            needed = f"{', '.join(FORMS[expected])}, as in the records before"
        raise ValueError(f"its fields ({found}) make no known form; needed: {needed}")
    if expected not in (None, form):
        raise ValueError(
            f"it has the form {form} ({', '.join(FORMS[form])}), the records before have the form "
            f"{expected} ({', '.join(FORMS[expected])}); split the file by form"
        )
    return form


def _has_fields(value, fields):
    return all(field in value for field in fields)


def _records_of(value, form):
    """The Records in one item of a file: one, or one for each answer of a conversation."""
    if form == "messages":
        return _conversation(value["messages"], "role", "content")
    if form == "conversations":
        return _conversation(value["conversations"], "from", "value")
    if form == "text":
        return [Record("", _string(value, "text"))]
    asked, answered = FORMS[form]
    input = ""
    if form == "Alpaca" and value.get("input") is not None:
        input = _string(value, "input")
    prompt = alpaca_prompt(_string(value, asked), input)
    return [Record(prompt, _string(value, answered))]


def _conversation(turns, role_field, text_field):
    """One Record for each of the assistant's turns; its prompt is all that was said before.

    So every answer is learned, though the beginning of a long conversation is read again for each
    of them. A system message replaces Alpaca's preamble. Consecutive turns of one speaker count as
    one. What the assistant says before it is asked anything is left out.
    """
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError("a conversation must be a list of objects")
    said = [(_string(turn, role_field), _string(turn, text_field)) for turn in turns]
    unknown = next((role for role, _ in said if role not in ROLES), None)
    if unknown is not None:
        raise ValueError(f"unknown {role_field} {unknown!r}; known: {', '.join(ROLES)}")
    records = []
    preamble, prompt = PREAMBLE, ""
    for role, group in itertools.groupby(said, lambda turn: ROLES[turn[0]]):
        text = "\n\n".join(text for _, text in group)
        if role == "system" and prompt:
            raise ValueError("a system message comes after a user's; it must come first")
        if role == "system":
            preamble = text
        elif role == "user":
            prompt = f"{prompt or preamble}\n\n### Instruction:\n{text}\n\n### Response:"
        elif prompt:
            records.append(Record(prompt, text))
            prompt += f" {text}"
    if not records:
        raise ValueError("no user's turn is followed by an assistant's; remove this conversation")
    return records


def _string(value, field):
    """The text in a field; ValueError if it is missing, no string, or no valid Unicode."""
    if field not in value:
        raise ValueError(f"no {field}")
    text = value[field]
    if not isinstance(text, str):
        raise ValueError(f"{field} is {type(text).__name__}, not a string")
    text.encode()  # JSON can hold half a surrogate pair (\ud83d): UnicodeEncodeError, a ValueError
    return text
