"""A run survives being killed, stopped and resumed, and never mixes with another."""

import json
import os
import re
import resource
import shlex
import shutil
import signal
import time

import hypothesis.strategies as st
import pytest
import torch
from helpers import contents
from helpers_runs import (
    RECORDS,
    adapter,
    fork,
    metrics,
    options,
    refusal,
    run,
    wait,
    wait_for,
)
from hypothesis import given, settings

import evals
import train
from cli import base, report, runs
from cli.errors import UserError
from formats import load_model
from formats.adapter import save_adapter


@settings(max_examples=8)
@given(st.floats(0, 1))
def test_a_run_killed_at_any_moment_resumes_to_the_same_bits(world, whole, moment):
    out = world / "killed"
    shutil.rmtree(out, ignore_errors=True)
    words = options(world, out, save_every=1)
    start = time.monotonic()
    pid = fork(world / "log", words)
    while (
        time.monotonic()
        < start + moment * test_a_run_killed_at_any_moment_resumes_to_the_same_bits.duration
    ):
        time.sleep(0.001)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    run(world / "log", ["--resume", "--out", str(out)] if (out / "run.json").exists() else words)
    assert adapter(out) == adapter(whole) and metrics(out) == metrics(whole)
    assert not list(out.glob(".*")), "a killed process's leftovers"


test_a_run_killed_at_any_moment_resumes_to_the_same_bits.duration = (
    0.8  # seconds, about what a forked run takes
)


@pytest.mark.parametrize(
    "moment",
    ["before it is saved", "while it is saved", "after it is saved", "while the older goes"],
)
def test_a_run_killed_around_a_checkpoint_resumes_to_the_same_bits(
    world, whole, tmp_path, monkeypatch, moment
):
    die, save = lambda *_: os.kill(os.getpid(), signal.SIGKILL), runs.save_checkpoint

    def remove_in_part(folder):
        (folder / "optimizer.pt").unlink()
        die()

    def saved(settings, identity, step, *rest):
        if step == 4 and moment == "before it is saved":
            die()
        if step == 4 and moment == "while it is saved":
            monkeypatch.setattr(torch, "save", die)
        if step == 4 and moment == "while the older goes":
            monkeypatch.setattr(shutil, "rmtree", remove_in_part)
        save(settings, identity, step, *rest)
        if step == 4:
            die()

    monkeypatch.setattr(runs, "save_checkpoint", saved)
    run(tmp_path / "log", options(world, tmp_path / "run"), status=-signal.SIGKILL)
    monkeypatch.undo()
    expected = {"before it is saved": "step-2", "while it is saved": "step-2"}.get(moment, "step-4")
    assert runs.newest_checkpoint(tmp_path / "run").name == expected
    run(tmp_path / "log", ["--resume", "--out", str(tmp_path / "run")])
    assert adapter(tmp_path / "run") == adapter(whole) and metrics(tmp_path / "run") == metrics(
        whole
    )
    assert [f.name for f in (tmp_path / "run").glob("*step-*")] == ["step-6"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_save_and_say_how_to_go_on(world, tmp_path, number):
    out, log = tmp_path / "a run", tmp_path / "log"
    pid = fork(log, options(world, out, steps=100_000, save_every=100_000))
    wait_for(lambda: (out / "metrics.jsonl").exists() and len(metrics(out)) > 2, pid)
    os.kill(pid, number)
    assert wait(pid) == 1
    steps = len(metrics(out))
    assert runs.newest_checkpoint(out).name == f"step-{steps}"
    last = log.read_text().splitlines()[-1]
    said, command_line = last.split(" go on with: python train.py ")
    assert said == f"stopped after step {steps};" and shlex.split(command_line) == [
        "--resume",
        "--out",
        str(out),
    ]
    run(log, shlex.split(command_line) + ["--steps", str(steps + 2)])
    run(log, options(world, tmp_path / "whole", steps=steps + 2))
    assert adapter(out) == adapter(tmp_path / "whole") and metrics(out) == metrics(
        tmp_path / "whole"
    )


def test_a_signal_while_another_base_is_made_leaves_the_finished_run_that_was_there(
    world, whole, tmp_path, monkeypatch
):
    shutil.copytree(whole, tmp_path / "run")
    before = contents(tmp_path / "run")
    monkeypatch.setattr(
        base, "quantize_model", lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM)
    )
    text = run(tmp_path / "log", options(world, tmp_path / "run", bits=3), status=130)
    assert text.splitlines()[-1] == "stopped"  # there is nothing to resume
    assert contents(tmp_path / "run") == before


def test_a_run_interrupted_while_its_new_base_is_made_goes_on(world, whole, tmp_path, monkeypatch):
    shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "adapter")  # so that there is no finished run to keep
    monkeypatch.setattr(
        base, "quantize_model", lambda *_, **__: os.kill(os.getpid(), signal.SIGINT)
    )
    text = run(tmp_path / "log", [*options(world, tmp_path / "run", bits=3), "--fresh"], status=1)
    assert (
        text.splitlines()[-1]
        == f"stopped; go on with: python train.py --resume --out {tmp_path / 'run'}"
    )
    monkeypatch.undo()
    run(tmp_path / "log", ["--resume", "--out", str(tmp_path / "run")])
    run(tmp_path / "log", options(world, tmp_path / "other", bits=3))
    assert adapter(tmp_path / "run") == adapter(tmp_path / "other")


def test_a_signal_that_comes_with_the_last_step_stops_before_the_comparison(
    world, whole, tmp_path, monkeypatch
):
    save = runs.save_checkpoint

    def saved(settings, identity, step, *rest):
        save(settings, identity, step, *rest)
        if step == 6:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(runs, "save_checkpoint", saved)
    text = run(tmp_path / "log", options(world, tmp_path / "run"), status=1)
    assert (
        text.splitlines()[-1].startswith("stopped; go on with")
        and not (tmp_path / "run" / "adapter").exists()
    )
    monkeypatch.undo()
    run(tmp_path / "log", ["--resume", "--out", str(tmp_path / "run")])
    assert adapter(tmp_path / "run") == adapter(whole)


def test_a_signal_that_comes_while_a_checkpoint_is_saved_stops_after_the_next_step(
    world, tmp_path, monkeypatch
):
    save = runs.save_checkpoint

    def saved(settings, identity, step, *rest):
        save(settings, identity, step, *rest)
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(runs, "save_checkpoint", saved)
    assert "stopped after step 3" in run(
        tmp_path / "log", options(world, tmp_path / "run"), status=1
    )
    assert runs.newest_checkpoint(tmp_path / "run").name == "step-3"


def signalled(monkeypatch, step):
    """Lets a signal come while that step is computed."""
    honest, calls = train.accumulate_gradients, iter(range(1, 100))

    def accumulate(*arguments):
        if next(calls) == step:
            os.kill(os.getpid(), signal.SIGINT)
        return honest(*arguments)

    monkeypatch.setattr(train, "accumulate_gradients", accumulate)


def test_a_signal_does_not_wait_for_the_validation(world, tmp_path, monkeypatch):
    honest, out = evals.response_loss, tmp_path / "run"

    def response_loss(model, examples, *rest):
        print(f"loss on {len(examples)} examples.")
        return honest(model, examples, *rest)

    monkeypatch.setattr(evals, "response_loss", response_loss)
    signalled(monkeypatch, 3)
    text = run(tmp_path / "log", options(world, out, save_every=2), status=1)
    assert re.findall(r"loss on (\d+) examples", text) == ["2", "4"]  # of 48, 2 are held out
    losses = [loss for (loss,) in metrics(out, "validation_loss")]
    assert (out / "step-3").exists() and losses == [None, losses[1], None] and losses[1] > 0


def test_a_model_that_diverged_is_not_saved_on_a_signal_either(world, tmp_path, monkeypatch):
    out = tmp_path / "run"
    signalled(monkeypatch, 1)
    text = run(tmp_path / "log", options(world, out, lr=1e30), status=2)
    assert "step 1: the loss after this step is nan" in text and not list(out.glob("step-*"))


def test_a_second_signal_stops_at_once(world, tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "save_checkpoint", lambda *_: time.sleep(60))
    pid = fork(tmp_path / "log", options(world, tmp_path / "run"))
    wait_for(
        lambda: (
            (tmp_path / "run" / "metrics.jsonl").exists() and len(metrics(tmp_path / "run")) > 1
        ),
        pid,
    )
    for _ in range(2):
        os.kill(pid, signal.SIGTERM)
        time.sleep(0.3)
    assert wait(pid, 10) == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("stage", [(base, "quantize_model"), (report, "merge_and_judge")])
def test_a_signal_before_or_after_training_says_how_to_go_on(
    world, whole, tmp_path, monkeypatch, number, stage
):
    out, log = tmp_path / "run", tmp_path / "log"
    monkeypatch.setattr(*stage, lambda *_, **__: os.kill(os.getpid(), number))
    text = run(log, options(world, out), status=1)
    assert text.splitlines()[-1] == f"stopped; go on with: python train.py --resume --out {out}"
    assert not list(out.glob(".*"))
    monkeypatch.undo()
    run(log, ["--resume", "--out", str(out)])
    assert adapter(out) == adapter(whole) and metrics(out) == metrics(whole)


def test_a_full_disk_is_an_error_that_leaves_the_checkpoint_before_it(
    world, whole, tmp_path, monkeypatch
):
    out, save = tmp_path / "run", runs.save_checkpoint

    def saved(settings, identity, step, *rest):
        if step == 4:  # the adapter still fits, the optimizer's state does not
            size = (out / "step-2" / "adapter.safetensors").stat().st_size + 1000
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
        save(settings, identity, step, *rest)

    monkeypatch.setattr(runs, "save_checkpoint", saved)
    text = run(tmp_path / "log", options(world, out), status=2)
    assert (
        f"{out}/step-4 could not be written" in text
        and "the disk is full" in text
        and "--resume" in text
    )
    monkeypatch.undo()
    assert runs.newest_checkpoint(out).name == "step-2" and not list(out.glob(".*"))
    run(tmp_path / "log", ["--resume", "--out", str(out)])
    assert adapter(out) == adapter(whole)


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_last_good_checkpoint(
    world, tmp_path, monkeypatch
):
    out = tmp_path / "run"
    explode = options(world, out, lr=1e30, save_every=1)
    text = run(tmp_path / "log", explode, status=2)
    assert (
        "step 1: the validation loss after this step is nan" in text
        and "--lr" in text
        and "there is no good checkpoint" in text
    )
    assert not list(out.glob("step-*")) and not (out / "adapter").exists()

    shutil.rmtree(out)
    losses = iter([0.5, 0.5, 0.5, float("nan")])
    honest = train.accumulate_gradients

    def accumulate(*arguments):
        honest(*arguments)
        return next(losses)

    monkeypatch.setattr(train, "accumulate_gradients", accumulate)
    text = run(tmp_path / "log", options(world, out), status=2)
    assert "step 4: the loss is nan" in text and f"last good checkpoint is {out}/step-2" in text
    assert len(metrics(out)) == 3


def test_the_newest_checkpoint_is_that_of_the_highest_number(tmp_path):
    for step in (900, 1000):
        (tmp_path / f"step-{step}").mkdir()
    assert runs.newest_checkpoint(tmp_path).name == "step-1000"


def test_a_copy_of_a_checkpoint_is_the_users_own(whole, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    shutil.copytree(out / "step-6", out / "step-6.bak")
    run(tmp_path / "log", ["--resume", "--out", str(out), "--steps", "8"])
    assert sorted(folder.name for folder in out.glob("step-*")) == ["step-6.bak", "step-8"]


@pytest.mark.parametrize(
    "weights, model, expected",
    [
        ("w/TinyLlama-1.1B-v1.0", None, "runs/TinyLlama-1.1B-v1.0"),
        ("w/model.gguf", None, "runs/model"),
        ("w/any", "7b", "runs/7b"),
        (None, "13b", "runs/13b"),
        (None, None, "runs/tiny"),
    ],
)
def test_resuming_looks_where_the_start_has_written(
    tmp_path, monkeypatch, weights, model, expected
):
    monkeypatch.chdir(tmp_path)
    words = []
    for name, value in (("--weights", weights), ("--model", model)):
        words += [name, value] if value else []
    assert f"there is no {expected}/run.json" in refusal(monkeypatch, "--resume", *words)


def test_a_variable_that_only_looks_like_torchruns_changes_nothing(
    world, whole, tmp_path, monkeypatch
):
    monkeypatch.setenv("WORLD_SIZE", "1")
    run(tmp_path / "log", options(world, tmp_path / "run"))
    assert adapter(tmp_path / "run") == adapter(whole)


def test_two_runs_at_once_do_not_share_a_folder(world, tmp_path):
    out = tmp_path / "run"
    first = fork(tmp_path / "first-log", options(world, out, steps=100_000))
    try:
        wait_for(lambda: (out / "metrics.jsonl").exists() and len(metrics(out)) > 2, first)
        for words in (options(world, out), ["--resume", "--out", str(out)]):
            assert f"another run is using {out}" in run(tmp_path / "log", words, status=2)
    finally:
        os.kill(first, signal.SIGKILL)
        wait(first)
    steps = int(runs.newest_checkpoint(out).name[5:]) + 2
    run(tmp_path / "log", ["--resume", "--out", str(out), "--steps", str(steps)])
    assert len(metrics(out)) == steps


def test_an_unfinished_run_is_not_thrown_away(world, tmp_path, monkeypatch):
    out = tmp_path / "run"
    monkeypatch.setattr(
        train,
        "save_adapter",
        lambda model, folder, **origin: os._exit(9) if origin else save_adapter(model, folder),
    )
    run(tmp_path / "log", options(world, out), status=9)
    monkeypatch.undo()
    message = refusal(monkeypatch, *options(world, out))
    assert (
        "unfinished run" in message and f"remove {out}/step-6" in message and "--resume" in message
    )
    assert (out / "step-6").exists()


def test_a_model_that_diverged_in_its_last_step_is_never_saved(world, tmp_path):
    (tmp_path / "five.json").write_text(json.dumps(RECORDS[:5]))  # too few to validate on
    words = options(world, tmp_path / "run", data=tmp_path / "five.json", lr=1e30, steps=1)
    text = run(tmp_path / "log", words, status=2)
    assert "step 1: the loss after this step is nan" in text and "lower --lr" in text
    assert not list((tmp_path / "run").glob("step-*")) and not (tmp_path / "run/adapter").exists()


def test_a_finished_run_that_goes_on_is_not_taken_for_finished(world, whole, tmp_path, monkeypatch):
    out = shutil.copytree(whole, tmp_path / "run")
    save = runs.save_checkpoint

    def saved(settings, identity, step, *rest):
        save(settings, identity, step, *rest)
        if step == 8:
            os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(runs, "save_checkpoint", saved)
    words = ["--resume", "--out", str(out), "--steps", "10"]
    run(tmp_path / "log", words, status=-signal.SIGKILL)
    monkeypatch.undo()
    assert (out / "previous-adapter" / "adapter.safetensors").read_bytes() == adapter(whole)
    with pytest.raises(UserError, match="no finished adapter yet"):
        load_model(out)
    assert "holds an unfinished run" in refusal(monkeypatch, *options(world, out))
    run(tmp_path / "log", ["--resume", "--out", str(out)])
    assert len(metrics(out)) == 10 and load_model(out)
