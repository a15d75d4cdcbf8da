"""What every command promises: one line and exit status 2 for what goes wrong, and files that are whole or absent."""

import io
import os
import pathlib
import subprocess
import sys

import pytest
import safetensors.torch
import torch
from hypothesis import assume, given, strategies as st

import cli
from cli import Parser, UserError, new_file, run_command, written_whole

ROOT = pathlib.Path(__file__).resolve().parent.parent


def ending(capsys, main, *more):
    """(exit status, what stderr got) of a command in this process."""
    with pytest.raises(SystemExit) as stop:
        run_command(main, *more)
    return stop.value.code, capsys.readouterr().err


def test_what_a_terminal_cannot_show_is_written_in_its_letters(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    run_command(lambda: print("25 ± 3 %"))
    assert raw.getvalue() == b"25 \\xb1 3 %\n"


def raises(error):
    def main():
        raise error
    return main


# ------------------------------------------------------------------------------------------------ how commands end

@pytest.mark.parametrize("error, line", [
    (UserError("no such\n  folder"), "error: no such folder\n"),  # one line, however the message came about
    (FileNotFoundError(2, "No such file or directory", "runs/x"), "error: No such file or directory: runs/x\n"),
    (PermissionError(13, "Permission denied", "/home/x"), "error: Permission denied: /home/x\n"),
    (OSError("odd"), "error: odd\n"),
])
def test_a_mistake_ends_in_one_line_that_says_where(capsys, error, line):
    assert ending(capsys, raises(error)) == (2, line)


@pytest.mark.parametrize("error", [
    OSError(28, "No space left on device", "runs/x"),
    RuntimeError("[enforce fail at inline_container.cc:1]. PytorchStreamWriter: No space left on device"),
    safetensors.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
])
def test_a_full_disk_ends_in_one_line_with_advice(capsys, error):
    status, text = ending(capsys, raises(error))
    assert status == 2 and text.count("\n") == 1 and "no space left" in text.lower() and "free some space" in text


def test_out_of_memory_ends_in_one_line_with_advice(capsys):
    for main in (raises(torch.OutOfMemoryError("CUDA out of memory")), raises(MemoryError()),
                 lambda: torch.empty(2 ** 50)):  # the CPU allocator's own error
        status, text = ending(capsys, main, "lower --batch-size")
        assert (status, text) == (2, "error: out of memory; lower --batch-size\n")


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), AssertionError("bits"), KeyError("x"),
                                   safetensors.SafetensorError("odd")])
def test_a_programmers_mistake_keeps_its_traceback(error):
    with pytest.raises(type(error)):
        run_command(raises(error))


def test_success_neither_exits_nor_says_anything(capsys):
    assert run_command(lambda: print("done")) is None
    assert capsys.readouterr() == ("done\n", "")


def test_an_interrupt_ends_as_a_shell_expects(capsys):
    assert ending(capsys, raises(KeyboardInterrupt())) == (130, "stopped\n")


@pytest.mark.parametrize("lines", [1, 100_000])  # one line stays in Python's buffer until the end, many do not
@pytest.mark.parametrize("where, status, said", [("closed pipe", 1, ""), ("full disk", 2, "error: No space left")])
def test_output_that_nobody_takes_is_no_traceback(lines, where, status, said):
    """`python evals.py ... | head` and `python evals.py ... > file` on a full disk, even when buffered."""
    # torch takes seconds to import and has no part in this: a stand-in bears the two names that cli.py wants
    script = ("import sys; sys.modules['torch'] = sys.modules['safetensors'] = s = type(sys)('stand_in')\n"
              "s.OutOfMemoryError = s.SafetensorError = MemoryError\n"
              f"import cli; cli.run_command(lambda: [print('x' * 20) for _ in range({lines})])")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    if where == "closed pipe":
        reader, out = os.pipe()
        os.close(reader)
    else:
        out = os.open("/dev/full", os.O_WRONLY)
    ended = subprocess.run([sys.executable, "-c", script], stdout=out, stderr=subprocess.PIPE, text=True, cwd=ROOT,
                           env=environment)
    os.close(out)
    assert ended.returncode == status and ended.stderr.startswith(said), ended
    assert ended.stderr.count("\n") == (1 if said else 0), ended


@pytest.mark.parametrize("closed", ["1>&-", "2>&-", "1>&- 2>&-"])
def test_a_command_whose_output_is_closed_from_the_start_does_its_work(tmp_path, closed):
    (tmp_path / "command.py").write_text(
        "import sys; sys.modules['torch'] = sys.modules['safetensors'] = s = type(sys)('stand_in')\n"
        "s.OutOfMemoryError = s.SafetensorError = MemoryError\n"
        "import cli, pathlib\n"
        "def main():\n"
        "    print('to nobody'), print('to nobody', file=sys.stderr), sys.stderr.write('bar')\n"
        "    pathlib.Path(sys.argv[1]).write_text('done')\n"
        "cli.run_command(main)\n")
    ended = subprocess.run(f'"{sys.executable}" "{tmp_path}/command.py" "{tmp_path}/result" {closed}', shell=True,
                           capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert (ended.returncode, (tmp_path / "result").read_text()) == (0, "done"), ended


@pytest.mark.parametrize("arguments", [["--bist", "4"], ["--bits"], ["--bits", "four"], ["--bi", "4"]])
def test_a_wrong_option_is_a_user_error_too(capsys, arguments):
    parser = Parser(prog="train.py")
    parser.add_argument("--bits", type=int)
    status, text = ending(capsys, lambda: parser.parse_args(arguments))
    assert status == 2 and text.startswith("error: ") and text.count("\n") == 1 and "train.py --help" in text


# ------------------------------------------------------------------------------------------------ whole files

class Crash(Exception):
    pass


def put(path, content):
    """Makes a file of bytes, or a folder of such (folders within folders too)."""
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.mkdir()
        for name, inner in content.items():
            put(path / name, inner)


def found(path):
    """What `put` made."""
    return path.read_bytes() if path.is_file() else {p.name: found(p) for p in path.iterdir()}


content = st.recursive(st.binary(max_size=20), lambda inner: st.dictionaries(st.sampled_from("abc"), inner))


@given(before=st.none() | content, after=content, crash=st.booleans())
def test_what_was_there_stays_whole_until_the_new_is(tmp_path_factory, before, after, crash):
    assume(before is None or type(before) is type(after))  # the other cases are the next tests
    folder = tmp_path_factory.mktemp("whole")
    path = folder / "thing"
    if before is not None:
        put(path, before)
    try:
        with written_whole(path) as beside:
            assert beside.parent == path.parent  # on the same file system, so that it can be renamed
            put(beside, after)
            assert not path.exists() if before is None else found(path) == before
            if crash:
                raise Crash
    except Crash:
        after = before
    assert found(folder) == ({} if after is None else {"thing": after}), "something was left beside"


def test_a_folder_does_not_replace_a_file(tmp_path):
    (tmp_path / "out").write_bytes(b"mine")
    with pytest.raises(OSError), written_whole(tmp_path / "out") as beside:
        beside.mkdir()
    assert found(tmp_path) == {"out": b"mine"}


def test_a_file_does_not_replace_a_folder(tmp_path):
    put(tmp_path / "out", {"mine": b"1"})
    with pytest.raises(UserError, match="out is a folder"), written_whole(tmp_path / "out") as beside:
        beside.write_bytes(b"2")
    assert found(tmp_path) == {"out": {"mine": b"1"}}


def test_a_file_that_cannot_be_written_is_refused_before_the_work(tmp_path, capsys):
    put(tmp_path / "folder", {"mine": b"1"})
    assert ending(capsys, lambda: new_file(tmp_path / "folder"))[0] == 2
    assert ending(capsys, lambda: new_file("/proc/nowhere/file"))[0] == 2
    assert ending(capsys, lambda: new_file(tmp_path / "folder" / "mine" / "file"))[0] == 2
    assert new_file(str(tmp_path / "new" / "file")) == tmp_path / "new" / "file"
    assert found(tmp_path) == {"folder": {"mine": b"1"}, "new": {}}


def test_an_error_without_a_name_gets_that_of_the_file_it_was_for(tmp_path, capsys):
    def main():
        with written_whole(tmp_path / "run.json"), open("/dev/full", "w") as file:
            file.write("x")
    assert ending(capsys, main) == (
        2, f"error: No space left on device: {tmp_path}/run.json; free some space or choose another folder\n")
    assert found(tmp_path) == {}


def test_folders_above_are_made(tmp_path):
    with written_whole(str(tmp_path / "a" / "b" / "file")) as beside:
        beside.write_bytes(b"1")
    assert found(tmp_path) == {"a": {"b": {"file": b"1"}}}


def test_everything_is_on_the_disk_before_it_bears_its_name(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(cli.os, "fsync", lambda fd: synced.append((os.fstat(fd).st_ino, (tmp_path / "run").exists())))
    with written_whole(tmp_path / "run") as beside:
        put(beside, {"a": b"1", "deeper": {"b": b"2"}})
    files = [tmp_path / "run" / "a", tmp_path / "run" / "deeper" / "b"]
    assert sorted(synced) == sorted((file.stat().st_ino, False) for file in files)


def test_what_an_earlier_crash_left_under_the_same_name_is_replaced(tmp_path):
    put(tmp_path / f".out.{os.getpid()}.unfinished", {"stale": b"1"})
    with written_whole(tmp_path / "out") as beside:
        assert not beside.exists()
        put(beside, b"new")
    assert found(tmp_path) == {"out": b"new"}


@pytest.mark.parametrize("folder", [True, False])
def test_what_a_link_points_to_is_replaced_and_the_link_stays(tmp_path, folder):
    (tmp_path / "disk").mkdir()
    target, link = tmp_path / "disk" / "target", tmp_path / "link"
    for text in ("old", "new"):
        with written_whole(link if text == "new" else target) as beside:
            if folder:
                beside.mkdir()
            (beside / "file" if folder else beside).write_text(text)
        if text == "old":
            link.symlink_to(target)
    assert link.is_symlink() and (target / "file" if folder else target).read_text() == "new"
    assert sorted(f.name for f in tmp_path.rglob("*") if f.name != "file") == ["disk", "link", "target"]


def test_the_folder_one_is_in_can_be_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with written_whole(".") as beside:
        beside.mkdir()
        (beside / "file").write_text("new")
    assert (tmp_path / "file").read_text() == "new"


def test_a_folder_that_takes_no_file_is_refused_before_the_work(capsys):
    assert ending(capsys, lambda: new_file("/proc/file"))[0] == 2
