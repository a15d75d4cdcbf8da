"""cli/jobs.py: jobs in several processes end with the one that started them, and are kept."""

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
from helpers_compare import Here
from helpers_runs import ENVIRONMENT
from hypothesis import given
from hypothesis import strategies as st

from cli import jobs
from cli.errors import UserError

COMMAND = """
import os, pathlib, signal, sys, time
from cli import jobs
from cli.errors import run_command

def work():
    pathlib.Path("worker").write_text(str(os.getpid()))
    time.sleep(60)

def main():
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with jobs.pool_of(2) as pool:
        waiting = [pool.submit(work) for _ in range(4)]
        print("started", flush=True)
        for future in waiting:
            future.result()

if __name__ == "__main__":
    run_command(main)
"""


@pytest.fixture
def command(tmp_path):
    """A process group whose processes wait; ended at last, whatever becomes of it."""
    (tmp_path / "command.py").write_text(COMMAND)
    process = subprocess.Popen(
        [sys.executable, "command.py"],
        cwd=tmp_path,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout.readline() == "started\n"
    yield process
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def worker_of(command, folder):
    """The number of a process that works, once one does."""
    while not (folder / "worker").exists() or not (folder / "worker").read_text():
        assert command.poll() is None
        time.sleep(0.05)
    return int((folder / "worker").read_text())


def wait_until_gone(pid):
    with contextlib.suppress(FileNotFoundError):
        while " Z " not in pathlib.Path(f"/proc/{pid}/stat").read_text():
            time.sleep(0.05)


@pytest.mark.parametrize("working", [False, True], ids=["while they start", "while they work"])
def test_ctrl_c_ends_all_processes_in_one_word(command, tmp_path, working):
    """A terminal sends it to all processes of the group."""
    if working:
        worker = worker_of(command, tmp_path)
    os.killpg(command.pid, signal.SIGINT)
    assert command.communicate() == ("", "stopped\n")
    assert command.returncode == 130
    if working:
        wait_until_gone(worker)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_processes_end_with_the_one_that_started_them(command, tmp_path, number):
    worker = worker_of(command, tmp_path)
    os.kill(command.pid, number)
    wait_until_gone(worker)
    said = command.communicate()[1]
    assert number == signal.SIGKILL or said == "stopped\n"


def test_a_process_that_is_killed_ends_the_command_in_one_line(command, tmp_path):
    os.kill(worker_of(command, tmp_path), signal.SIGKILL)
    said = command.communicate()[1]
    assert command.returncode == 2
    assert said.startswith("error: a process was killed") and "lower --workers" in said
    assert said.count("\n") == 1


def test_ctrl_c_does_not_wait_for_the_jobs_that_are_queued():
    queued = []
    with pytest.raises(KeyboardInterrupt), jobs.pool_of(1) as pool:
        queued += [pool.submit(time.sleep, 20) for _ in range(4)]
        raise KeyboardInterrupt
    assert not any(job.done() and not job.cancelled() and job.exception() is None for job in queued)


def test_a_finished_job_is_not_done_again_and_one_cut_off_is(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(jobs, "concurrent", Here)
    monkeypatch.setattr(jobs, "prepare_worker", lambda: None)
    kept, ran, told = tmp_path / "kept", [], []

    def run(number):
        ran.append(number)
        return [number, 2 * number]

    def go(*numbers):
        ran.clear()
        named = {f"job {n}": (n,) for n in numbers}
        with jobs.pool_of(1) as pool:
            return jobs.run_and_keep(pool, kept, run, named, lambda *a: told.append(a))

    assert go(1, 2) == {"job 1": [1, 2], "job 2": [2, 4]} and ran == [1, 2]
    assert len(told) == 2 and told[1][1] == [2, 4]
    assert "are done already" not in capsys.readouterr().out
    assert go(2, 3, 1) == {"job 2": [2, 4], "job 3": [3, 6], "job 1": [1, 2]} and ran == [3]
    assert f"2 of 3 jobs are done already, in {kept}" in capsys.readouterr().out
    whole = kept.read_text()
    for cut in (1, 5, len("job 3") + 2):
        kept.write_text(whole[:-cut])
        assert go(1, 2, 3)["job 3"] == [3, 6] and ran == [3]
        assert go(1, 2, 3)["job 3"] == [3, 6] and ran == [], "the cut line spoiled the next"


@given(st.data())
def test_what_is_kept_is_read_whatever_else_stands_in_the_file(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("kept") / "kept"
    whole = {"a": [{"row": "x", "lr": 0.1}], "b": []}
    others = st.one_of(
        st.binary(max_size=40).filter(lambda line: b"\n" not in line),
        st.sampled_from([b"5", b"null", b'["c"]', b'["c", null]', b'[["c"], []]', b"[" * 9999]),
    )
    lines = [json.dumps(entry).encode() for entry in whole.items()]
    lines += data.draw(st.lists(others, max_size=5))
    path.write_bytes(b"\n".join(data.draw(st.permutations(lines))))
    assert jobs.read_kept(path) == whole


def test_an_error_in_one_of_the_calls_is_raised():
    def fail(number):
        if number == 2:
            raise UserError("two")

    with pytest.raises(UserError, match="two"):
        jobs.call_all(Here.futures.ProcessPoolExecutor(), fail, [(1,), (2,), (3,)])
