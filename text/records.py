"""What a file holds, value by value: JSON, JSON lines, CSV, Parquet and plain text.

Files are read in chunks and never held whole: 500,000 records are a gigabyte, and often all of it
is one line. What the values mean is not known here; text/instructions.py knows the forms of
instructions. Numbers become the text that stands in the file, as an answer of 3.10 must not be
learned as 3.1.

`pyarrow` (pip install pyarrow) is imported only for Parquet.
"""

import codecs
import csv
import decimal
import gzip
import itertools
import json
import os
import pathlib
import re
import zlib
from collections.abc import Iterator
from typing import Any

from tqdm import tqdm

from cli import machine
from cli.errors import UserError

CHUNK = 2**18  # bytes that are read at a time
ROWS = 1000  # of Parquet that are made Python's at a time
SPACE = re.compile(r"[ \t\n\r]*")  # what JSON counts as space
LONGEST_WORD = 16  # characters; longer than -Infinity or \ud83d\ude00, which may be cut off
CONSTANTS = {"NaN": None}  # how Python writes a number that is missing
DECODER = json.JSONDecoder(
    parse_int=str, parse_float=str, parse_constant=lambda name: CONSTANTS.get(name, name)
)


def values_in(path: str | pathlib.Path) -> Iterator[tuple[str, Any]]:
    """Yields (place, value) for what a file holds; the place is for errors, such as "line 12".

    The name decides: a record a row of .csv (the first row names the fields) and .parquet, and
    {"text": paragraph} for each paragraph of .txt. Any other file is a JSON list or JSON lines.
    All but .parquet may be packed, as in NAME.jsonl.gz.

    Raises UserError, with the line or row, for what cannot be read.
    """
    path = pathlib.Path(path)
    name = path.name.lower()
    if name.endswith(".parquet"):
        for row, value in _parquet_rows(path):
            yield f"row {row}", value
        return
    texts = _texts(path)
    name = name.removesuffix(".gz")
    if name.endswith(".txt"):
        found = _paragraphs(_lines(texts))
    elif name.endswith(".csv"):
        found = _csv_rows(path, _lines(texts))
    else:
        found = _json_values(path, texts)
    for line, value in found:
        yield f"line {line}", value


def read_text(path: str | pathlib.Path) -> str:
    """The whole of a UTF-8 file, without a byte order mark.

    Raises UserError, with the line of the first byte that is not UTF-8.
    """
    try:
        return pathlib.Path(path).read_bytes().decode("utf-8-sig")
    except OSError as e:
        raise _unreadable(path, e) from None
    except UnicodeDecodeError as e:
        raise _not_utf8(path, 1, e) from None


# ---- bytes into text


def _opened(path):
    try:
        return path.open("rb")
    except OSError as e:
        raise _unreadable(path, e) from None


def _unreadable(path, error):
    return UserError(f"cannot read {path}: {error.strerror}")


def _bar_options(path):
    """How a progress bar looks: one process shows it, and only if reading takes over a second."""
    return {"desc": f"reading {path.name}", "delay": 1, "disable": machine.RANK > 0}


def _chunks(path):
    """The bytes of a file, unpacked if its name ends in .gz, piece by piece."""
    is_packed = path.name.lower().endswith(".gz")
    with _opened(path) as file:
        size = os.fstat(file.fileno()).st_size  # 0 for a pipe: the bar shows no total
        with tqdm.wrapattr(file, "read", total=size, **_bar_options(path)) as counted:
            content = gzip.GzipFile(fileobj=counted) if is_packed else counted
            try:
                while chunk := content.read(CHUNK):
                    yield chunk
            except (EOFError, gzip.BadGzipFile, zlib.error) as e:
                raise UserError(f"{path}: damaged .gz ({e}); fetch it again") from None
            except OSError as e:
                raise _unreadable(path, e) from None


def _texts(path):
    """The text of a UTF-8 file, piece by piece, without a byte order mark; no piece is empty."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    line = 1
    mark = "\ufeff"
    for chunk in itertools.chain(_chunks(path), [b""]):
        try:
            text = decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as e:
            raise _not_utf8(path, line, e) from None
        if "\0" in text:  # UTF-16, or a part of the file that was never written
            line += text.count("\n", 0, text.index("\0"))
            raise UserError(f"{path}, line {line}: byte 0x00 is no text; save the file as UTF-8")
        if text:
            line += text.count("\n")
            text, mark = text.removeprefix(mark), ""
        if text:
            yield text


def _not_utf8(path, line, error):
    """The error for bytes that are not UTF-8; `line` is where the bytes being decoded begin."""
    line += error.object.count(b"\n", 0, error.start)
    byte = error.object[error.start]
    return UserError(f"{path}, line {line}: byte {byte:#04x} is not UTF-8; save the file as UTF-8")


def _lines(texts):
    r"""The lines of a text that comes in pieces, each with its \n."""
    begun = []
    for text in texts:
        *whole, rest = text.split("\n")
        for line in whole:
            yield "".join([*begun, line, "\n"])
            begun = []
        if rest:
            begun.append(rest)
    if begun:
        yield "".join(begun)


# ---- plain text and CSV


def _paragraphs(lines):
    """(line number, {"text": paragraph}) for what stands between blank lines.

    Space before the first paragraph and after the last one is no part of them.
    """
    paragraph, begin, ended = [], 0, True
    for number, line in enumerate(lines, 1):
        if not line.strip():
            ended = True
            continue
        if ended:
            if paragraph:
                yield begin, {"text": "".join(paragraph).removesuffix("\n").removesuffix("\r")}
            else:
                line = line.lstrip()
            paragraph, begin, ended = [], number, False
        paragraph.append(line)
    if paragraph:
        yield begin, {"text": "".join(paragraph).rstrip()}


def _csv_rows(path, lines):
    """(number of its first line, {field: text}) for each row behind the header."""
    csv.field_size_limit(2**31 - 1)  # of this process: 128 KiB without it, less than some answers
    rows = csv.reader(lines, strict=True)
    header = None
    while True:
        line = rows.line_num + 1
        try:
            row = next(rows, None)
        except csv.Error as e:
            raise UserError(f"{path}, line {line}: {e}; correct or remove this row") from None
        if row is None:
            return
        if not row:  # a blank line
            continue
        if header is None:
            header = [name.strip() for name in row]
            if len(set(header)) < len(header):
                raise UserError(f"{path}, line {line}: the header has a name twice; rename one")
        elif len(row) != len(header):
            raise UserError(
                f"{path}, line {line}: {len(row)} fields, where the header names {len(header)}; "
                "correct or remove this row"
            )
        else:
            yield line, dict(zip(header, row, strict=True))


# ---- JSON


def _json_values(path, texts):
    """(line number, value) for the items of one JSON list, or for JSON lines."""
    window = _Window(texts)
    if window.peek() == "[":
        return _json_items(path, window)
    rest = itertools.chain([window.text[window.position :]], texts)
    return _json_lines(path, _lines(rest), window.line)


def _json_lines(path, lines, first):
    for number, line in enumerate(lines, first):
        if not line.strip():
            continue
        try:
            value = DECODER.decode(line)
        except (ValueError, RecursionError) as e:
            raise _not_json(path, number, getattr(e, "msg", e)) from None
        yield number, value


def _json_items(path, window):
    """The items of the list that begins where a window stands."""
    if window.skip() != "]":
        while True:
            line = window.line
            value = _read_item(path, window)
            yield line, value
            separator = window.peek()
            if separator == "]":
                break
            if separator != ",":
                raise _not_json(path, window.line, "Expecting ',' delimiter")
            window.skip()
    if window.skip():
        raise _not_json(path, window.line, "Extra data")


def _read_item(path, window):
    """The value that begins where a window stands, which moves behind it.

    Near the end of what is in memory, half a value may look like an error or, as 12 of 123 does,
    like a value. Then it is read again with more text.
    """
    while True:
        value, problem = None, ""
        try:
            value, end = DECODER.raw_decode(window.text, window.position)
        except json.JSONDecodeError as e:
            end, problem = e.pos, e.msg
        except RecursionError as e:
            raise _not_json(path, window.line, e) from None
        cut_off = problem.startswith("Unterminated string")  # its position is the string's begin
        cut_off |= end > len(window.text) - LONGEST_WORD
        if cut_off and window.refill():
            continue
        window.move(end)
        if problem:
            raise _not_json(path, window.line, problem)
        return value


def _not_json(path, line, reason):
    return UserError(
        f"{path}, line {line}: not JSON ({reason}); "
        "expected a JSON list of records, or one record a line"
    )


class _Window:
    """The part in memory of a text that comes in pieces, and where in it reading stands."""

    def __init__(self, pieces):
        self.pieces = pieces
        self.text = ""
        self.position = 0
        self.line = 1  # the number of the line at the position

    def move(self, position):
        self.line += self.text.count("\n", self.position, position)
        self.position = position

    def skip(self):
        """Moves behind a bracket or a comma, and to the next character; see peek."""
        self.move(self.position + 1)
        return self.peek()

    def peek(self):
        """The next character that is no space, to which it moves; "" at the end of the text."""
        while True:
            self.move(SPACE.match(self.text, self.position).end())
            if self.position < len(self.text):
                return self.text[self.position]
            if not self.refill():
                return ""

    def refill(self):
        """Forgets what was read and takes more of the text; False if there is no more.

        It takes at least as much as is left, so a long value is read again only a few times: the
        work grows with the length, not with its square.
        """
        left = len(self.text) - self.position
        taken = []
        length = 0
        for piece in self.pieces:
            taken.append(piece)
            length += len(piece)
            if length >= left:
                break
        if taken:
            self.text = "".join([self.text[self.position :], *taken])
            self.position = 0
        return bool(taken)


# ---- Parquet


def _parquet_rows(path):
    """(row number, {field: value}); a number's value is its text."""
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise UserError(f"reading {path} needs pyarrow; run: pip install pyarrow") from None
    row = 0
    with _opened(path) as file:
        try:
            table = ParquetFile(file, buffer_size=CHUNK)
            count = table.metadata.num_rows
            with tqdm(total=count, unit=" rows", **_bar_options(path)) as bar:
                for batch in table.iter_batches(ROWS, use_threads=False):
                    columns = [_column_values(column) for column in batch.columns]
                    for values in zip(*columns, strict=True):
                        row += 1
                        yield row, dict(zip(batch.schema.names, values, strict=True))
                    bar.update(len(batch))
        except (pyarrow.ArrowException, OSError, ValueError) as e:
            where = f"{path}, after row {row}" if row else path
            raise UserError(f"{where}: no valid Parquet ({e}); fetch it again") from None


def _column_values(column):
    """A column's values; those of numbers and times as text, as Arrow writes it (0.1 of 4 bytes).

    A number that is missing, as pandas writes it (NaN), is null.
    """
    from pyarrow import types

    kind = column.type
    if types.is_integer(kind) or types.is_decimal(kind) or types.is_temporal(kind):
        return column.cast("string").to_pylist()
    if types.is_floating(kind):
        return [None if text == "nan" else text for text in column.cast("string").to_pylist()]
    return [_numbers_as_text(value) for value in column.to_pylist()]


def _numbers_as_text(value):
    if isinstance(value, dict):
        return {name: _numbers_as_text(field) for name, field in value.items()}
    if isinstance(value, list):
        return [_numbers_as_text(item) for item in value]
    is_number = isinstance(value, int | float | decimal.Decimal) and not isinstance(value, bool)
    return str(value) if is_number else value
