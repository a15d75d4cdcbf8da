"""Several processes train as one does, and stop together."""

import json
import os
import signal
import socket
import subprocess
import sys

import pytest
import torch
from helpers_runs import (
    ENVIRONMENT,
    close,
    command,
    fork,
    metrics,
    options,
    refusal,
    run,
    wait,
    wait_for,
)

from cli import machine, runs
from formats.files import open_file

DRIVER = """
import json, os, pathlib, sys, torch
import train
from cli import machine
from cli.errors import run_command
collate, out = train.collate, sys.argv[sys.argv.index("--out") + 1]

def seen(examples):
    with open(pathlib.Path(out) / f"seen-{os.environ.get('RANK', 0)}.jsonl", "a") as f:
        f.write(json.dumps([e.tokens.tolist() for e in examples]) + chr(10))
    return collate(examples)

honest, load = train.accumulate_gradients, train.evals.load
def watched(network, *arguments):
    train.collate = seen
    try:
        return honest(network, *arguments)
    finally:
        train.collate = collate
        for name, buffer in network.named_buffers():
            mine = "mark" not in name or buffer.item() == machine.RANK
            assert mine, "one process's buffers were sent to another"
train.accumulate_gradients = watched

def marked(*arguments):
    model, tokenizer = load(*arguments)
    model.register_buffer("mark", torch.tensor([machine.RANK]))
    return model, tokenizer
train.evals.load = marked

if os.environ.get("RANK") == "1":
    def refuse(path):
        raise AssertionError(f"process 1 writes {path}")
    for module in list(sys.modules.values()):  # each that imported it has a name of its own for it
        if "written_whole" in vars(module):
            module.written_whole = refuse
run_command(train.main)
"""


def seen_by(out, ranks, per_step):
    """For each step the sorted examples that all ranks together computed with."""
    lines = [
        [json.loads(line) for line in (out / f"seen-{r}.jsonl").read_text().splitlines()]
        for r in range(ranks)
    ]
    together = [sum(micro, []) for micro in zip(*lines, strict=True)]
    return [sorted(sum(together[i : i + per_step], [])) for i in range(0, len(together), per_step)]


@pytest.mark.parametrize(
    "batch, micro", [(4, 1), (4, 2), (10, 3)]
)  # 6 times 10 is more than an epoch
def test_two_processes_train_as_one_does(world, tmp_path, batch, micro):
    (tmp_path / "driver.py").write_text(DRIVER)
    words = options(world, tmp_path / "two", batch_size=batch, micro_batch_size=micro)
    subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc_per_node=2",
            "--standalone",
            tmp_path / "driver.py",
            *words,
        ],
        env=ENVIRONMENT,
        check=True,
        timeout=300,
        capture_output=True,
    )
    (tmp_path / "one").mkdir()
    command(tmp_path / "driver.py", *options(world, tmp_path / "one", batch_size=batch))
    two, one = (
        seen_by(tmp_path / "two", 2, -(-batch // 2 // micro)),
        seen_by(tmp_path / "one", 1, batch // 2),
    )
    assert two == one and len(one) == 6 and all(len(examples) == batch for examples in one)
    close(metrics(tmp_path / "two"), metrics(tmp_path / "one"))
    a, b = (open_file(tmp_path / n / "adapter" / "adapter.safetensors") for n in ("two", "one"))
    for name in a:
        torch.testing.assert_close(a[name].read(), b[name].read(), rtol=1e-2, atol=1e-4)


def fork_two(folder, words):
    """Starts one run in two processes, which log to log-0 and log-1; returns their ids."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [
        fork(folder / f"log-{rank}", words, rank=rank, processes=2, port=port) for rank in range(2)
    ]


def test_a_signal_to_one_of_two_processes_stops_both_after_the_same_step(world, tmp_path):
    out = tmp_path / "run"
    pids = fork_two(tmp_path, options(world, out, steps=100_000, save_every=100_000))
    wait_for(lambda: (out / "metrics.jsonl").exists() and len(metrics(out)) > 2, pids[0])
    os.kill(pids[1], signal.SIGTERM)
    assert [wait(pid) for pid in pids] == [1, 1], [
        (tmp_path / f"log-{rank}").read_text() for rank in range(2)
    ]
    assert runs.newest_checkpoint(out).name == f"step-{len(metrics(out))}"
    assert (
        "go on with" in (tmp_path / "log-0").read_text()
        and "go on with" not in (tmp_path / "log-1").read_text()
    )


@pytest.mark.parametrize("killed", [0, 1])
def test_the_death_of_one_of_two_processes_is_one_line_in_the_other(world, tmp_path, killed):
    out = tmp_path / "run"
    pids = fork_two(tmp_path, options(world, out, steps=100_000))
    wait_for(lambda: (out / "metrics.jsonl").exists() and len(metrics(out)) > 2, pids[0])
    os.kill(pids[killed], signal.SIGKILL)
    assert wait(pids[killed]) == -signal.SIGKILL and wait(pids[1 - killed]) == 2
    text = (tmp_path / f"log-{1 - killed}").read_text()
    assert (
        "Traceback" not in text and text.count("error: ") == 1 and f"--resume --out {out}" in text
    ), text
    steps = int(runs.newest_checkpoint(out).name[5:]) + 2
    run(tmp_path / "log", ["--resume", "--out", str(out), "--steps", str(steps)])


def test_each_process_takes_its_gpu_before_any_is_computed_on(world, tmp_path, monkeypatch):
    for name, value in dict(
        is_available=lambda: True, device_count=lambda: 2, set_device=lambda gpu: taken.append(gpu)
    ).items():
        monkeypatch.setattr(torch.cuda, name, value)
    for rank, said, expected in (
        (1, "--device cuda cannot be used here", [1]),
        (2, "process 2 has no GPU: there are 2", []),
    ):
        taken = []
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        assert said in refusal(monkeypatch, *options(world, tmp_path / "run", device="cuda"))
        assert taken == expected


def test_a_batch_that_the_processes_cannot_share_is_refused(world, tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "WORLD", 3)  # from torchrun's WORLD_SIZE
    assert "--batch-size 4 cannot be shared by 3 processes" in refusal(
        monkeypatch, *options(world, tmp_path / "run")
    )
