"""text/records.py: what was written is what is read, whatever the file and wherever it is cut."""

import csv
import decimal
import gzip
import io
import json
import os
import re
import sys
import threading

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tqdm import tqdm

from cli.errors import UserError
from text import records
from text.records import read_text, values_in

CHUNKS = st.sampled_from([1, 2, 3, 4, 5, 6, 7, 50, 2**18])
SIZES = [1, 2, 3, 7, 2**18]
TEXTS = st.text(st.characters(codec="utf-8"), max_size=12)
NO_NUL = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=12)
VALUES = st.recursive(  # but numbers, which have a test of their own
    st.none() | st.booleans() | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=8,
)
ROWS = st.lists(st.fixed_dictionaries({"a": NO_NUL, "b, c": NO_NUL}), min_size=1, max_size=5)


def packed(content):
    return gzip.compress(content, mtime=0)


def read(folder, content, name="records.json", chunk=2**18):
    """What a file holds that is read in chunks of so many bytes."""
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records, "CHUNK", chunk)
        return list(values_in(path))


def values(found):
    return [value for _, value in found]


def places(found):
    return [place for place, _ in found]


# ---- JSON


@given(
    st.lists(VALUES, max_size=5),
    CHUNKS,
    st.booleans(),
    st.sampled_from([None, 0, 2, "\t"]),
    st.sampled_from(["", "\ufeff", " \n\r\n"]),
    st.booleans(),
)
def test_a_json_list_is_read_as_it_was_written(
    tmp_path_factory, items, chunk, ascii_only, indent, before, is_packed
):
    text = before + json.dumps(items, ensure_ascii=ascii_only, indent=indent) + " \n"
    content, name = text.encode(), "records.json"
    if is_packed:
        content, name = packed(content), "records.json.gz"
    found = read(tmp_path_factory.mktemp("list"), content, name, chunk)
    assert values(found) == items
    assert all(re.fullmatch(r"line \d+", place) for place in places(found))


@given(
    st.lists(VALUES.filter(lambda value: not isinstance(value, list)), max_size=5),
    CHUNKS,
    st.booleans(),
    st.sampled_from(["\n", "\r\n", "\n\n \n"]),
    st.sampled_from(["", "\ufeff"]),
    st.booleans(),
)
def test_json_lines_are_read_as_they_were_written(
    tmp_path_factory, items, chunk, ascii_only, end, before, is_packed
):
    lines = [json.dumps(item, ensure_ascii=ascii_only) for item in items]
    content, name = (before + end.join(lines)).encode(), "records.jsonl"
    if is_packed:
        content, name = packed(content), "records.JSONL.GZ"
    found = read(tmp_path_factory.mktemp("lines"), content, name, chunk)
    assert values(found) == items
    assert places(found) == [f"line {1 + i * end.count(chr(10))}" for i in range(len(items))]


NUMBERS = ["3.10", "0", "-0", "12345678901234567890123", "-1.5E+10", "1e-7", "0.1", "9" * 5000]
NUMBERS += ["Infinity", "-Infinity"]


@pytest.mark.parametrize("chunk", SIZES)
def test_a_number_is_its_own_text_wherever_it_is_cut(tmp_path, chunk):
    assert values(read(tmp_path, f"[{','.join(NUMBERS)}]", chunk=chunk)) == NUMBERS
    assert values(read(tmp_path, f"[{' , '.join(NUMBERS)} ]", chunk=chunk)) == NUMBERS
    assert values(read(tmp_path, "\n".join(NUMBERS), chunk=chunk)) == NUMBERS
    inside = f'{{"a": [{", ".join(NUMBERS)}], "b": {{"c": 1.50}}}}'
    assert values(read(tmp_path, inside, chunk=chunk)) == [{"a": NUMBERS, "b": {"c": "1.50"}}]


def test_a_word_may_be_cut_after_any_of_its_letters(tmp_path):
    text = r'[-Infinity, 1.5e-10, "\ud83d\ude00", {"a\u00e9": [false, null]}, "a\ufeff'
    text += '\ufeff"]'
    expected = ["-Infinity", "1.5e-10", "\U0001f600", {"aé": [False, None]}, "a\ufeff\ufeff"]
    for chunk in range(1, len(text) + 5):
        assert values(read(tmp_path, text, chunk=chunk)) == expected, chunk


@pytest.mark.parametrize("chunk", SIZES)
def test_an_item_is_placed_on_the_line_where_it_begins(tmp_path, chunk):
    text = '\n[\n{"a":\n\n"b"},\n\n  {"a": "b"}, "c",\r\n\nnull\n]\n'
    found = read(tmp_path, text, chunk=chunk)
    assert places(found) == ["line 3", "line 7", "line 7", "line 9"]
    found = read(tmp_path, '\n{"a": "b"}\r\n\n \nnull\n', chunk=chunk)
    assert places(found) == ["line 2", "line 5"]


NOT_JSON = [  # (content, the values before the error, the line of the error, why)
    ('["a"\n"b"]', 1, 2, "Expecting ',' delimiter"),
    ('["a",\n"b"\n', 2, 3, "Expecting ',' delimiter"),
    ('["a",\n]', 1, 2, "Expecting value"),
    ('["a",\n\n', 1, 3, "Expecting value"),
    ("[", 0, 1, "Expecting value"),
    ("[\n,", 0, 2, "Expecting value"),
    ('["a"]\n\nmore', 1, 3, "Extra data"),
    ('["a"]\n["b"]', 1, 2, "Extra data"),
    ('["a",\n"b\nc"]', 1, 2, "Invalid control character"),
    ('["a",\n"b', 1, 2, "Unterminated string"),
    ('["a",\n"\\x"]', 1, 2, r"Invalid \\escape"),
    ('["a",\n"\\u12"]', 1, 2, r"Invalid \\uXXXX escape"),
    ('["a",\n{"b"\n:\n1 2}]', 1, 4, "Expecting ',' delimiter"),
    ('["a",\n{"b": tru', 1, 2, "Expecting value"),
    ('["a",\n{"b": 1.', 1, 2, "Expecting ',' delimiter"),
    ('{"a": 1}\n{"b": 2', 1, 2, "Expecting ',' delimiter"),
    ('{"a": 1}\n\n{"b": 2} c\n', 1, 3, "Extra data"),
    ('{\n"a": 1}', 0, 1, "Expecting property name"),
    ("once upon a time", 0, 1, "Expecting value"),
]


@pytest.mark.parametrize("content, before, line, reason", NOT_JSON)
@pytest.mark.parametrize("chunk", SIZES)
def test_what_is_not_json_is_refused_by_line_after_what_comes_before(
    tmp_path, content, before, line, reason, chunk, monkeypatch
):
    path = tmp_path / "records.json"
    path.write_text(content)
    monkeypatch.setattr(records, "CHUNK", chunk)
    found = []
    with pytest.raises(UserError, match=rf"records.json, line {line}: not JSON \({reason}"):
        for pair in values_in(path):
            found.append(pair)
    assert len(found) == before


@pytest.mark.parametrize("chunk", [1000, 2**18])
@pytest.mark.parametrize("content", ['["a",\n' + "[" * 100_000, '{"a": 1}\n' + '{"a":' * 100_000])
def test_values_inside_values_without_end_are_refused(tmp_path, content, chunk):
    with pytest.raises(UserError, match=r"line 2: not JSON \(maximum recursion depth"):
        read(tmp_path, content, chunk=chunk)


def test_an_error_in_a_long_list_is_found_before_the_rest_is_read(tmp_path, monkeypatch):
    path = tmp_path / "records.json"
    path.write_text('["a", {"b" 1}' + ', "c"' * 10_000 + "]")
    monkeypatch.setattr(records, "CHUNK", 100)
    taken = []
    chunks = records._chunks

    def watched(path):
        for chunk in chunks(path):
            taken.append(chunk)
            yield chunk

    monkeypatch.setattr(records, "_chunks", watched)
    with pytest.raises(UserError, match="line 1: not JSON"):
        list(values_in(path))
    assert len(taken) < 5


def test_the_work_for_a_long_value_grows_with_its_length(tmp_path, monkeypatch):
    """Reading it anew with every chunk would take the square: 1,000 times its length."""
    decoded = []

    class Counting(json.JSONDecoder):
        def raw_decode(self, text, start=0):
            decoded.append(len(text) - start)
            return super().raw_decode(text, start)

    monkeypatch.setattr(records, "DECODER", Counting())
    long = "long" * 50_000
    assert values(read(tmp_path, json.dumps([long, "a", long]), chunk=100)) == [long, "a", long]
    assert sum(decoded) < 5 * 2 * len(long)


# ---- other kinds of files


@given(ROWS, CHUNKS, st.sampled_from(["", "\ufeff"]), st.booleans(), st.booleans())
def test_csv_rows_are_read_as_they_were_written(
    tmp_path_factory, rows, chunk, before, quoted, is_packed
):
    text = io.StringIO()
    quoting = csv.QUOTE_ALL if quoted else csv.QUOTE_MINIMAL
    writer = csv.DictWriter(text, ["a", "b, c"], quoting=quoting)
    writer.writeheader()
    writer.writerows(rows)
    content, name = (before + text.getvalue()).encode(), "records.csv"
    if is_packed:
        content, name = packed(content), "records.csv.gz"
    assert values(read(tmp_path_factory.mktemp("csv"), content, name, chunk)) == rows


@pytest.mark.parametrize("chunk", SIZES)
def test_csv_fields_may_span_lines_and_be_long(tmp_path, chunk):
    long = "long " * 40_000  # 200,000 characters; by itself the csv module takes 131,072
    content = f'a, b\n\n1,"2\n\n3"\n\n{long if chunk > 7 else ""},"say ""hi"""\r\n3.10,\n'
    found = read(tmp_path, content, "records.csv", chunk)
    assert places(found) == ["line 3", "line 7", "line 8"]
    last = {"a": "3.10", "b": ""}
    first = {"a": "1", "b": "2\n\n3"}
    assert values(found) == [first, {"a": long if chunk > 7 else "", "b": 'say "hi"'}, last]


@pytest.mark.parametrize(
    "content, message",
    [
        ('a,b\n1,"2\n3"\n4\n', "line 4: 1 fields, where the header names 2"),
        ("a,b\n\n1,2,3\n", "line 3: 3 fields, where the header names 2"),
        ('a,b\n1,2\n3,"4\n5,6\n', "line 3: unexpected end of data"),
        ('a,b\n1,2\n3,"4" 5\n', "line 3: ',' expected after '\"'"),
        ("a,b\n1,2\n3,\0\n", "line 3: byte 0x00 is no text; save the file as UTF-8"),
    ],
)
@pytest.mark.parametrize("chunk", SIZES)
def test_a_bad_csv_row_is_refused_by_its_first_line(tmp_path, content, message, chunk):
    with pytest.raises(UserError, match=f"records.csv, {re.escape(message)}"):
        read(tmp_path, content, "records.csv", chunk)


@given(st.text("ab \t\r\n\x85é", max_size=30), CHUNKS, st.booleans())
@example("\n\n  One\nand one. \n \n\n  Two. \r\n\r\nThree.\n \n", 1, False)
def test_a_text_file_is_read_paragraph_by_paragraph(tmp_path_factory, text, chunk, is_packed):
    expected = [p for p in re.split(r"\r?\n\s*\n", text.strip()) if p]
    content, name = text.encode(), "story.txt"
    if is_packed:
        content, name = packed(content), "story.txt.gz"
    found = read(tmp_path_factory.mktemp("text"), content, name, chunk)
    assert values(found) == [{"text": paragraph} for paragraph in expected]
    lines = text.split("\n")
    for place, value in found:
        first = lines[int(place.removeprefix("line ")) - 1]
        assert first.strip() == value["text"].split("\n")[0].strip() != ""


def test_a_paragraph_is_placed_on_its_first_line(tmp_path):
    found = read(tmp_path, "\n \n\none\nand\none\n\n\ntwo\n", "story.TXT")
    assert found == [("line 4", {"text": "one\nand\none"}), ("line 9", {"text": "two"})]


def write_parquet(path, rows, row_group_size=None, **columns):
    table = pyarrow.Table.from_pylist(rows, pyarrow.schema(columns) if columns else None)
    pyarrow.parquet.write_table(table, path, row_group_size=row_group_size)
    return path


@given(
    st.lists(
        st.fixed_dictionaries(
            {
                "a": TEXTS | st.none(),
                "turns": st.lists(st.fixed_dictionaries({"role": TEXTS, "ok": st.booleans()})),
            }
        ),
        min_size=1,
        max_size=5,
    ),
    st.integers(1, 3),
    st.integers(1, 3),
)
def test_parquet_rows_are_read_as_they_were_written(tmp_path_factory, rows, group, batch):
    turns = pyarrow.list_(pyarrow.struct({"role": pyarrow.string(), "ok": pyarrow.bool_()}))
    path = tmp_path_factory.mktemp("parquet") / "records.parquet"
    write_parquet(path, rows, group, a=pyarrow.string(), turns=turns)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records, "ROWS", batch)
        found = list(values_in(path))
    assert values(found) == rows
    assert places(found) == [f"row {number}" for number in range(1, len(rows) + 1)]


def test_numbers_in_parquet_are_texts(tmp_path):
    row = {"a": 12, "b": [0.5, 1e30], "c": {"d": decimal.Decimal("3.10")}, "e": True, "f": None}
    path = write_parquet(tmp_path / "records.parquet", [row])
    expected = {"a": "12", "b": ["0.5", "1e+30"], "c": {"d": "3.10"}, "e": True, "f": None}
    assert list(values_in(path)) == [("row 1", expected)]


def test_numbers_and_times_of_every_width_are_as_they_were_written(tmp_path):
    columns = {
        "small": pyarrow.array([0.1, float("nan")], pyarrow.float32()),
        "time": pyarrow.array([1700000000123456789, None], pyarrow.timestamp("ns")),
        "day": pyarrow.array([19675, None], pyarrow.date32()),
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    first = {"small": "0.1", "time": "2023-11-14 22:13:20.123456789", "day": "2023-11-14"}
    rows = [value for _, value in values_in(tmp_path / "a.parquet")]
    assert rows == [first, dict.fromkeys(first)]


def test_an_empty_file_holds_nothing(tmp_path):
    for name in ("a.json", "a.jsonl", "a.csv", "a.txt", "a.json.gz"):
        assert read(tmp_path, "", name) == []
        assert read(tmp_path, packed(b" \n\n") if name.endswith("gz") else " \n\n", name) == []
    assert read(tmp_path, "a,b\r\n", "a.csv") == []
    assert read(tmp_path, "[ ]") == []
    path = write_parquet(tmp_path / "a.parquet", [], a=pyarrow.string())
    assert list(values_in(path)) == []


# ---- what cannot be read


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.csv", "a.txt"])
@pytest.mark.parametrize(
    "content, line, byte",
    [
        (b'"caf\xe9"', 1, "0xe9 is not UTF-8"),
        (b'\xef\xbb\xbf"a"\n\n"caf\xe9"', 3, "0xe9 is not UTF-8"),
        (b'"a"\n"\xc3\xa9"\n"\xe6\xbc', 3, "0xe6 is not UTF-8"),
        (b'"a"\n"\xe6\n"', 2, "0xe6 is not UTF-8"),
        (b"\xff\xfe[\0]\0", 1, "0xff is not UTF-8"),
        (b"\xef\xbb", 1, "0xef is not UTF-8"),
        (b'"a"\n"b\0"', 2, "0x00 is no text"),
    ],
)
@pytest.mark.parametrize("chunk", SIZES)
def test_a_byte_that_is_no_text_is_named_with_its_line(tmp_path, name, content, line, byte, chunk):
    message = rf"{name}, line {line}: byte {byte}"
    with pytest.raises(UserError, match=message):
        read(tmp_path, content, name, chunk)
    with pytest.raises(UserError, match=message.replace(name, f"{name}.gz")):
        read(tmp_path, packed(content), f"{name}.gz", chunk)


@pytest.mark.parametrize("name", ["a.json", "a.jsonl.gz", "a.csv", "a.txt", "a.parquet"])
def test_a_file_that_cannot_be_opened_is_refused(tmp_path, name):
    with pytest.raises(UserError, match=f"cannot read .*{name}: No such file"):
        list(values_in(tmp_path / name))
    (tmp_path / name).mkdir()
    with pytest.raises(UserError, match=f"cannot read .*{name}: Is a directory"):
        list(values_in(tmp_path / name))


@pytest.mark.parametrize("chunk", SIZES)
def test_a_damaged_gz_is_refused(tmp_path, chunk):
    whole = packed(b'["a", "b"]' + b" " * 1000)
    flipped = bytearray(whole)
    flipped[-8] ^= 1  # of the checksum
    broken = bytearray(whole)
    broken[10:14] = b"\xff" * 4
    bad = {"cut off": whole[:-12], "no gz": b'["a"]', "checksum": flipped, "blocks": broken}
    for content in [*bad.values(), whole + b"more"]:
        with pytest.raises(UserError, match=r"a.json.gz: damaged .gz \(.+\); fetch it again"):
            read(tmp_path, bytes(content), "a.json.gz", chunk)


def test_a_damaged_parquet_file_is_refused_by_row(tmp_path, monkeypatch):
    path = write_parquet(tmp_path / "a.parquet", [{"a": f"text {i}"} for i in range(2000)], 1000)
    whole = path.read_bytes()
    second = pyarrow.parquet.read_metadata(path).row_group(1).column(0)
    monkeypatch.setattr(records, "ROWS", 500)
    for content in (b"", b"text", whole[:-1], whole[:100] + whole[-100:]):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"a.parquet: no valid Parquet \(.+\); fetch it again"):
            list(values_in(path))
    damaged = bytearray(whole)
    start = second.dictionary_page_offset
    damaged[start : start + second.total_compressed_size] = b"\xff" * second.total_compressed_size
    path.write_bytes(damaged)
    with pytest.raises(UserError, match=r"a.parquet, after row 1000: no valid Parquet \("):
        list(values_in(path))


def test_what_parquet_holds_and_python_cannot_is_refused(tmp_path, monkeypatch):
    text = pyarrow.array([b"caf\xe9"]).view(pyarrow.string())
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"a": text}), path)
    with pytest.raises(UserError, match=r"a.parquet: no valid Parquet \(.*utf-8.*0xe9"):
        list(values_in(path))

    def refuse(*arguments, **options):
        raise pyarrow.ArrowNotImplementedError("unknown codec")

    monkeypatch.setattr(pyarrow.parquet, "ParquetFile", refuse)
    with pytest.raises(UserError, match=r"a.parquet: no valid Parquet \(unknown codec\); fetch"):
        list(values_in(path))


def test_parquet_without_its_package_says_what_to_install(tmp_path, monkeypatch):
    path = write_parquet(tmp_path / "a.parquet", [{"a": "b"}])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    message = r"reading .*a\.parquet needs pyarrow; run: pip install pyarrow"
    with pytest.raises(UserError, match=message):
        list(values_in(path))
    assert values(read(tmp_path, '["a"]')) == ["a"], "other files do not need it"


# ---- beside the values


def test_reading_shows_a_bar_of_the_files_bytes_only_if_it_takes_long(
    tmp_path, monkeypatch, capsys
):
    content = json.dumps(["a" * 1000] * 100)  # 100,400 bytes
    assert len(read(tmp_path, content)) == 100
    assert capsys.readouterr().err == ""

    class Shown(tqdm):
        def __init__(self, *arguments, **options):
            assert options.pop("delay") == 1
            super().__init__(*arguments, mininterval=0, **options)

    monkeypatch.setattr(records, "tqdm", Shown)
    read(tmp_path, content)
    assert re.search(r"reading records.json: 100%.* 98.0k/98.0k", capsys.readouterr().err)
    compressed = packed(content.encode())
    read(tmp_path, compressed, "records.json.gz")
    shown = capsys.readouterr().err
    assert re.search(rf"records.json.gz: 100%.* {len(compressed)}/{len(compressed)}", shown)
    list(values_in(write_parquet(tmp_path / "a.parquet", [{"a": "b"}] * 7)))
    assert re.search(r"a.parquet: 100%.* 7/7 ", capsys.readouterr().err)
    monkeypatch.setattr(records.machine, "RANK", 1)
    read(tmp_path, content)
    assert capsys.readouterr().err == "", "of several processes, only one shows it"


def test_a_pipe_is_read_like_a_file(tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    writer = threading.Thread(target=path.write_text, args=('["a",\n"b"]',))
    writer.start()
    assert list(values_in(path)) == [("line 1", "a"), ("line 2", "b")]
    writer.join()


def test_a_whole_text_is_read_without_its_byte_order_mark(tmp_path):
    path = tmp_path / "text"
    path.write_bytes("\ufeffOne\r\n\0\n\ufeffé".encode())
    assert read_text(path) == "One\r\n\0\n\ufeffé"
    path.write_bytes(b"\xef\xbb\xbfOne\n\ncaf\xe9")
    with pytest.raises(UserError, match="text, line 3: byte 0xe9 is not UTF-8; save the file as"):
        read_text(path)
    with pytest.raises(UserError, match="cannot read .*absent: No such file"):
        read_text(tmp_path / "absent")
