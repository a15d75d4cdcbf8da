"""Every command ends in one line and exit status 2 for what a user or the machine has caused."""

import io
import os
import pathlib
import subprocess
import sys

import pytest
import safetensors
import torch
from helpers import ending

from cli.errors import Parser, UserError, run_command

ROOT = pathlib.Path(__file__).resolve().parent.parent
# torch takes seconds to import and has no part in this: a stand-in has the names that are wanted
STAND_IN = """import sys
sys.modules["torch"] = sys.modules["safetensors"] = stand_in = type(sys)("stand_in")
stand_in.OutOfMemoryError = stand_in.SafetensorError = MemoryError
"""


def test_what_a_terminal_cannot_show_is_written_in_its_letters(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    run_command(lambda: print("25 ± 3 %"))
    assert raw.getvalue() == b"25 \\xb1 3 %\n"


def raises(error):
    def main():
        raise error

    return main


@pytest.mark.parametrize(
    "error, line",
    [
        (UserError("no such\n  folder"), "no such folder"),  # one line, whatever the message
        (FileNotFoundError(2, "No such file", "runs/x"), "No such file: runs/x"),
        (PermissionError(13, "Permission denied", "/home/x"), "Permission denied: /home/x"),
        (OSError("odd"), "odd"),
    ],
)
def test_a_mistake_ends_in_one_line_that_says_where(capsys, error, line):
    assert ending(capsys, raises(error)) == (2, f"error: {line}\n")


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device", "runs/x"),
        RuntimeError("[enforce fail at x.cc:1]. PytorchStreamWriter: No space left on device"),
        safetensors.SafetensorError("I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_ends_in_one_line_with_advice(capsys, error):
    status, text = ending(capsys, raises(error))
    assert status == 2 and text.count("\n") == 1
    assert "no space left" in text.lower() and "free some space" in text


def test_out_of_memory_ends_in_one_line_with_advice(capsys):
    def too_large():
        torch.empty(2**50)  # the CPU allocator's own error

    on_a_gpu = raises(torch.OutOfMemoryError("CUDA out of memory"))
    for main in (on_a_gpu, raises(MemoryError()), too_large):
        status, text = ending(capsys, main, "lower --batch-size")
        assert (status, text) == (2, "error: out of memory; lower --batch-size\n")


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("shapes differ"),
        AssertionError("bits"),
        KeyError("x"),
        safetensors.SafetensorError("odd"),
    ],
)
def test_a_programmers_mistake_keeps_its_traceback(error):
    with pytest.raises(type(error)):
        run_command(raises(error))


def test_success_neither_exits_nor_says_anything(capsys):
    assert run_command(lambda: print("done")) is None
    assert capsys.readouterr() == ("done\n", "")


def test_an_interrupt_ends_as_a_shell_expects(capsys):
    assert ending(capsys, raises(KeyboardInterrupt())) == (130, "stopped\n")


@pytest.mark.parametrize("lines", [1, 100_000])  # one line stays in Python's buffer, many do not
@pytest.mark.parametrize(
    "where, status, said", [("closed pipe", 1, ""), ("full disk", 2, "error: No space left")]
)
def test_output_that_nobody_takes_is_no_traceback(lines, where, status, said):
    """`python evals.py ... | head`, and `python evals.py > file` on a full disk; buffered too."""
    script = (
        f"{STAND_IN}from cli.errors import run_command\n"
        f"run_command(lambda: [print('x' * 20) for _ in range({lines})])"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    if where == "closed pipe":
        reader, out = os.pipe()
        os.close(reader)
    else:
        out = os.open("/dev/full", os.O_WRONLY)
    ended = subprocess.run(
        [sys.executable, "-c", script],
        stdout=out,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=environment,
    )
    os.close(out)
    assert ended.returncode == status and ended.stderr.startswith(said), ended
    assert ended.stderr.count("\n") == (1 if said else 0), ended


@pytest.mark.parametrize("closed", ["1>&-", "2>&-", "1>&- 2>&-"])
def test_a_command_whose_output_is_closed_from_the_start_does_its_work(tmp_path, closed):
    (tmp_path / "command.py").write_text(
        f"{STAND_IN}import pathlib\n"
        "from cli.errors import run_command\n"
        "def main():\n"
        "    print('to nobody')\n"
        "    print('to nobody', file=sys.stderr)\n"
        "    sys.stderr.write('bar')\n"
        "    pathlib.Path(sys.argv[1]).write_text('done')\n"
        "run_command(main)\n"
    )
    ended = subprocess.run(
        f'"{sys.executable}" "{tmp_path}/command.py" "{tmp_path}/result" {closed}',
        shell=True,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert (ended.returncode, (tmp_path / "result").read_text()) == (0, "done"), ended


@pytest.mark.parametrize(
    "arguments", [["--bist", "4"], ["--bits"], ["--bits", "four"], ["--bi", "4"]]
)
def test_a_wrong_option_is_a_user_error_too(capsys, arguments):
    parser = Parser(prog="train.py")
    parser.add_argument("--bits", type=int)
    status, text = ending(capsys, lambda: parser.parse_args(arguments))
    assert status == 2 and text.startswith("error: ") and text.count("\n") == 1
    assert "train.py --help" in text
