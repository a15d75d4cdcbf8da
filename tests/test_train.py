"""What train.py promises: runs that survive being killed, stopped and shared, and mistakes that cost nothing.

The command line runs as a user runs it in the tests of the whole way; elsewhere as a forked copy of this process,
which is the same but for three seconds of importing, and can be told to fail at a chosen moment.

    python -m pytest tests/test_train.py
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import random
import re
import resource
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import hypothesis.strategies as st
import numpy
import pytest
import torch
from hypothesis import given, settings
from tqdm import tqdm

import data
import evals
import llama
import merge
import qalora
import quant
import settings as options_of_train
import torch._dynamo  # PyTorch's optimizers import it when first used: a forked copy need not spend those seconds
import train
from cli import UserError, run_command
from test_llama import Attack

ROOT = pathlib.Path(train.__file__).parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
CONFIG = llama.LlamaConfig(vocab_size=512, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
                           num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256)
NOUNS = "town river house garden baker miner singer cook horse apple bread stone window letter winter summer".split()
RECORDS = [{"instruction": f"Say how many letters {word} has, {times} times.", "output": f"{len(word)} " * times}
           for word in NOUNS for times in (1, 2, 3)]


def save_random(folder, seed=0, config=CONFIG, dtype=torch.float32):
    """A folder with a random model, by default computed in float32 by every CPU; the tokenizer is the caller's."""
    torch.manual_seed(seed)
    folder.mkdir(parents=True, exist_ok=True)
    model = llama.Llama(config)
    for p in model.parameters():
        if p.dim() == 2:
            torch.nn.init.normal_(p, std=0.2)
    llama.save_pretrained(model.to(dtype), folder)
    return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with weights/, other-weights/, records.json and fewer.json."""
    folder = tmp_path_factory.mktemp("world")
    for seed, name in enumerate(("weights", "other-weights")):
        save_random(folder / name, seed)
    prompts = [data.alpaca_prompt(r["instruction"]) + r["output"] for r in RECORDS]
    data.train_tokenizer(prompts + [" ".join(NOUNS) * 20, ENGLISH], folder / "weights" / "tokenizer.model", 512)
    shutil.copy(folder / "weights" / "tokenizer.model", folder / "other-weights")
    (folder / "records.json").write_text(json.dumps(RECORDS))
    (folder / "fewer.json").write_text(json.dumps(RECORDS[:30]))
    return folder


ENGLISH = pathlib.Path(data.__file__).read_text()  # any long text: a tokenizer of 512 pieces needs that many pairs


def options(world, out, **changed):
    """The words of a small command line."""
    words = dict(weights=world / "weights", data=world / "records.json", out=out, quantizer="rtn", steps=6,
                 batch_size=4, micro_batch_size=2, max_length=96, rank=4, lr=1e-3, save_every=2) | changed
    given = {f"--{name.replace('_', '-')}": value for name, value in words.items() if value is not None}
    return [str(word) for pair in given.items() for word in pair]


def command(script, *words, status=0, **more):
    """Runs a script of this project as a user does; returns what it printed on (stdout, stderr)."""
    done = subprocess.run([sys.executable, ROOT / script, *map(str, words)], env=ENVIRONMENT, capture_output=True,
                          text=True, timeout=300, **more)
    assert done.returncode == status, (done.returncode, done.stdout[-2000:], done.stderr[-2000:])
    return done.stdout, done.stderr


def fork(log, words, rank=0, processes=1, port=0, before=None):
    """Starts `python train.py WORDS` as a forked copy of this process; returns its id. Output goes to `log`."""
    pid = os.fork()
    if pid:
        return pid
    status = 70
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job inherits that it is ignored
    tqdm.set_lock(threading.RLock())  # its own is shared by all forked copies, and one that is killed never lets go
    try:
        sys.stdout = sys.stderr = open(log, "w", buffering=1)
        if processes > 1:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes),
                           "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        train.RANK, train.WORLD = rank, processes
        sys.argv = ["train.py", *words]
        if before:
            before()
        run_command(train.main)
        status = 0
    except SystemExit as e:
        if isinstance(e.code, str):
            print(e.code, file=sys.stderr)
        status = e.code if isinstance(e.code, int) else 1
    except BaseException:
        import traceback
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def wait(pid, seconds=300):
    """The exit status of a forked run, negative for the signal that killed it."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    raise AssertionError(f"process {pid} still runs after {seconds} s")


def run(log, words, status=0, **more):
    """A whole forked run; returns what it printed."""
    found, text = wait(fork(log, words, **more)), pathlib.Path(log).read_text()
    assert found == status and "Traceback" not in text, (found, text[-3000:])
    assert status != 2 or f"\n{text}".count("\nerror: ") == 1, text
    return text


def wait_for(condition, pid):
    """Waits until `condition()` is true while the process lives."""
    end = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < end and os.waitpid(pid, os.WNOHANG) == (0, 0), "it ended, or never came so far"
        time.sleep(0.0005)


def metrics(out, *names):
    """The named values of every line of a run's metrics.jsonl."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [tuple(line.get(name) for name in names or ("step", "loss", "grad_norm")) for line in lines]


def close(found, expected):
    """Asserts that two lists of metrics are equal but for the rounding of float32 sums."""
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-4, atol=1e-5)


def adapter(out):
    return (out / "adapter" / "adapter.safetensors").read_bytes()


def refusal(monkeypatch, *words):
    """The message that a command line is refused with."""
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, words)])
    with pytest.raises(UserError) as e:
        train.main()
    return str(e.value)


@pytest.fixture(scope="module")
def whole(world):
    """An uninterrupted run."""
    run(world / "whole-log", options(world, world / "whole"))
    return world / "whole"


# ---- the whole way on a real LLaMA, by the command line alone

def test_a_real_llama_from_float_to_merged_int4_killed_on_the_way(material, tmp_path):
    weights, seeds = material("stories260K"), material("self-instruct-seeds.json")
    texts = [text for r in json.loads(seeds.read_text()) for text in (r["instruction"], r["output"])]
    data.train_tokenizer(texts, tmp_path / "tokenizer.model", 512)
    common = ["--weights", weights, "--tokenizer", tmp_path / "tokenizer.model", "--data", seeds, "--steps", 6,
              "--rank", 4, "--batch-size", 4, "--micro-batch-size", 2, "--max-length", 128, "--lr", 1e-3,
              "--save-every", 2, "--calibration-tokens", 2048, "--out"]

    _, message = command("train.py", *common, tmp_path / "refused", status=2)
    assert message.count("\n") == 1 and message.startswith("error: model.layers.0.mlp.down_proj: group size 32") \
        and "172" in message and not (tmp_path / "refused").exists(), message

    printed, _ = command("train.py", *common, tmp_path / "whole", "--group-size", 4)
    assert "175 records in Alpaca form" in printed and "bit identical: True" in printed, printed
    results = json.loads((tmp_path / "whole" / "results.json").read_text())
    assert results["validation_loss_adapted"] < results["validation_loss_base"]

    out = tmp_path / "killed"
    killed = subprocess.Popen([sys.executable, ROOT / "train.py", *map(str, common), out, "--group-size", "4"],
                              env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(lambda: list(out.glob(".step-4.*.unfinished")) or (out / "step-6").exists(), killed.pid)
    killed.kill()
    assert killed.wait() == -signal.SIGKILL and not (out / "adapter").exists()
    printed, _ = command("train.py", "--resume", "--out", out)
    assert f"{out}/base is already made" in printed
    assert adapter(out) == adapter(tmp_path / "whole") and metrics(out) == metrics(tmp_path / "whole")
    assert not list(out.glob(".*"))

    merged = tmp_path / "merged"
    command("merge.py", out, "--out", merged)
    (tmp_path / "text.txt").write_text("Once upon a time there was a little girl. She loved to play outside.")
    (tmp_path / "choices.jsonl").write_text("\n".join(material("hellaswag-500.jsonl").read_text().split("\n")[:4]))
    judged = [command("evals.py", folder, "--perplexity", tmp_path / "text.txt", "--multiple-choice",
                      tmp_path / "choices.jsonl")[0] for folder in (merged, out)]
    assert judged[0] == judged[1] and "perplexity" in judged[0] and "4 questions" in judged[0]
    text, _ = command("sample.py", merged, "--instruction", "Name a colour.", "--max-new-tokens", 8)
    assert text.strip()


@pytest.mark.parametrize("quantization", [3, {}, {"bits": 4}, {"bits": [], "group_size": 32}])
def test_weights_quantized_in_a_way_that_is_none_are_refused(world, tmp_path, monkeypatch, quantization):
    shutil.copytree(world / "weights", tmp_path / "odd")
    llama.write_config(CONFIG, tmp_path / "odd", {"quantization": quantization})
    message = refusal(monkeypatch, *options(world, tmp_path / "run", weights=tmp_path / "odd"))
    assert f"{tmp_path / 'odd'}/config.json: quantization" in message and not (tmp_path / "run").exists()


def test_a_merged_model_can_be_fine_tuned_again(world, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["merge.py", str(whole), "--out", str(tmp_path / "merged")])
    merge.main()
    again = options(world, tmp_path / "again", weights=tmp_path / "merged", steps=2)
    printed = run(tmp_path / "log", again)
    assert "bit identical: True" in printed
    first, second = (merge.load_model(folder) for folder in (tmp_path / "merged", tmp_path / "again" / "base"))
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values()))
    assert "is quantized already, to 4 bits in groups of 32" in refusal(monkeypatch, *again, "--bits", 3)


def test_an_adapter_is_not_merged_into_another_base(world, whole, tmp_path, monkeypatch):
    run(tmp_path / "log", options(world, tmp_path / "other", weights=world / "other-weights", steps=2))
    shutil.copytree(whole, tmp_path / "mixed")
    shutil.rmtree(tmp_path / "mixed" / "base")
    shutil.copytree(tmp_path / "other" / "base", tmp_path / "mixed" / "base")
    _, message = command("merge.py", tmp_path / "mixed", "--out", tmp_path / "merged", status=2)
    assert "was trained over the base" in message and not (tmp_path / "merged").exists()


# ---- killed, stopped, resumed

@settings(max_examples=8)
@given(st.floats(0, 1))
def test_a_run_killed_at_any_moment_resumes_to_the_same_bits(world, whole, moment):
    out = world / "killed"
    shutil.rmtree(out, ignore_errors=True)
    words = options(world, out, save_every=1)
    start = time.monotonic()
    pid = fork(world / "log", words)
    while time.monotonic() < start + moment * test_a_run_killed_at_any_moment_resumes_to_the_same_bits.duration:
        time.sleep(0.001)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    run(world / "log", ["--resume", "--out", str(out)] if (out / "run.json").exists() else words)
    assert adapter(out) == adapter(whole) and metrics(out) == metrics(whole)
    assert not list(out.glob(".*")), "a killed process's leftovers"


test_a_run_killed_at_any_moment_resumes_to_the_same_bits.duration = 0.8  # seconds, about what a forked run takes


@pytest.mark.parametrize("moment", ["before it is saved", "while it is saved", "after it is saved",
                                    "while the older goes"])
def test_a_run_killed_around_a_checkpoint_resumes_to_the_same_bits(world, whole, tmp_path, monkeypatch, moment):
    die, save = lambda *_: os.kill(os.getpid(), signal.SIGKILL), train.save_checkpoint

    def saved(s, step, *rest):
        if step == 4 and moment == "before it is saved":
            die()
        if step == 4 and moment == "while it is saved":
            monkeypatch.setattr(torch, "save", die)
        if step == 4 and moment == "while the older goes":
            monkeypatch.setattr(shutil, "rmtree", lambda folder: ((folder / "optimizer.pt").unlink(), die()))
        save(s, step, *rest)
        if step == 4:
            die()

    monkeypatch.setattr(train, "save_checkpoint", saved)
    run(tmp_path / "log", options(world, tmp_path / "run"), status=-signal.SIGKILL)
    monkeypatch.undo()
    expected = {"before it is saved": "step-2", "while it is saved": "step-2"}.get(moment, "step-4")
    assert train.newest_checkpoint(tmp_path / "run").name == expected
    run(tmp_path / "log", ["--resume", "--out", str(tmp_path / "run")])
    assert adapter(tmp_path / "run") == adapter(whole) and metrics(tmp_path / "run") == metrics(whole)
    assert [f.name for f in (tmp_path / "run").glob("*step-*")] == ["step-6"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_save_and_say_how_to_go_on(world, tmp_path, number):
    out, log = tmp_path / "a run", tmp_path / "log"
    pid = fork(log, options(world, out, steps=100_000, save_every=100_000))
    wait_for(lambda: (out / "metrics.jsonl").exists() and len(metrics(out)) > 2, pid)
    os.kill(pid, number)
    assert wait(pid) == 1
    steps = len(metrics(out))
    assert train.newest_checkpoint(out).name == f"step-{steps}"
    last = log.read_text().splitlines()[-1]
    said, command_line = last.split(" go on with: python train.py ")
    assert said == f"stopped after step {steps};" and shlex.split(command_line) == ["--resume", "--out", str(out)]
    run(log, shlex.split(command_line) + ["--steps", str(steps + 2)])
    run(log, options(world, tmp_path / "whole", steps=steps + 2))
    assert adapter(out) == adapter(tmp_path / "whole") and metrics(out) == metrics(tmp_path / "whole")


def test_a_signal_while_another_base_is_made_leaves_the_finished_run_that_was_there(world, whole, tmp_path, monkeypatch):
    shutil.copytree(whole, tmp_path / "run")
    before = {file: file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file()}
    monkeypatch.setattr(train, "quantize_model", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    text = run(tmp_path / "log", options(world, tmp_path / "run", bits=3), status=130)
    assert text.splitlines()[-1] == "stopped"  # there is nothing to resume
    assert {file: file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file()} == before


def test_a_run_interrupted_while_its_new_base_is_made_goes_on(world, whole, tmp_path, monkeypatch):
    shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "adapter")  # so that there is no finished run to keep
    monkeypatch.setattr(train, "quantize_model", lambda *_: os.kill(os.getpid(), signal.SIGINT))
    text = run(tmp_path / "log", [*options(world, tmp_path / "run", bits=3), "--fresh"], status=1)
    assert text.splitlines()[-1] == f"stopped; go on with: python train.py --resume --out {tmp_path / 'run'}"
    monkeypatch.undo()
    run(tmp_path / "log", ["--resume", "--out", str(tmp_path / "run")])
    run(tmp_path / "log", options(world, tmp_path / "other", bits=3))
    assert adapter(tmp_path / "run") == adapter(tmp_path / "other")


def test_a_signal_that_comes_with_the_last_step_stops_before_the_comparison(world, whole, tmp_path, monkeypatch):
    save = train.save_checkpoint
    monkeypatch.setattr(train, "save_checkpoint", lambda s, step, *rest: (
        save(s, step, *rest), os.kill(os.getpid(), signal.SIGINT) if step == 6 else None))
    text = run(tmp_path / "log", options(world, tmp_path / "run"), status=1)
    assert text.splitlines()[-1].startswith("stopped; go on with") and not (tmp_path / "run" / "adapter").exists()
    monkeypatch.undo()
    run(tmp_path / "log", ["--resume", "--out", str(tmp_path / "run")])
    assert adapter(tmp_path / "run") == adapter(whole)


def test_a_signal_that_comes_while_a_checkpoint_is_saved_stops_after_the_next_step(world, tmp_path, monkeypatch):
    save = train.save_checkpoint

    def saved(s, step, *rest):
        save(s, step, *rest)
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(train, "save_checkpoint", saved)
    assert "stopped after step 3" in run(tmp_path / "log", options(world, tmp_path / "run"), status=1)
    assert train.newest_checkpoint(tmp_path / "run").name == "step-3"


def test_a_second_signal_stops_at_once(world, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "save_checkpoint", lambda *_: time.sleep(60))
    pid = fork(tmp_path / "log", options(world, tmp_path / "run"))
    wait_for(lambda: (tmp_path / "run" / "metrics.jsonl").exists() and len(metrics(tmp_path / "run")) > 1, pid)
    for _ in range(2):
        os.kill(pid, signal.SIGTERM)
        time.sleep(0.3)
    assert wait(pid, 10) == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("stage", ["quantize_model", "finish"])
def test_a_signal_before_or_after_training_says_how_to_go_on(world, whole, tmp_path, monkeypatch, number, stage):
    out, log = tmp_path / "run", tmp_path / "log"
    monkeypatch.setattr(train, stage, lambda *_: os.kill(os.getpid(), number))
    text = run(log, options(world, out), status=1)
    assert text.splitlines()[-1] == f"stopped; go on with: python train.py --resume --out {out}"
    assert not list(out.glob(".*"))
    monkeypatch.undo()
    run(log, ["--resume", "--out", str(out)])
    assert adapter(out) == adapter(whole) and metrics(out) == metrics(whole)


def test_a_full_disk_is_an_error_that_leaves_the_checkpoint_before_it(world, whole, tmp_path, monkeypatch):
    out, save = tmp_path / "run", train.save_checkpoint

    def saved(s, step, *rest):
        if step == 4:  # the adapter still fits, the optimizer's state does not
            size = (out / "step-2" / "adapter.safetensors").stat().st_size + 1000
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
        save(s, step, *rest)

    monkeypatch.setattr(train, "save_checkpoint", saved)
    text = run(tmp_path / "log", options(world, out), status=2)
    assert f"{out}/step-4 could not be written" in text and "the disk is full" in text and "--resume" in text
    monkeypatch.undo()
    assert train.newest_checkpoint(out).name == "step-2" and not list(out.glob(".*"))
    run(tmp_path / "log", ["--resume", "--out", str(out)])
    assert adapter(out) == adapter(whole)


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_last_good_checkpoint(world, tmp_path, monkeypatch):
    out = tmp_path / "run"
    explode = options(world, out, lr=1e30, save_every=1)
    text = run(tmp_path / "log", explode, status=2)
    assert "step 1: the validation loss is nan" in text and "--lr" in text and "there is no good checkpoint" in text
    assert not list(out.glob("step-*")) and not (out / "adapter").exists()

    shutil.rmtree(out)
    losses = iter([0.5, 0.5, 0.5, float("nan")])
    honest = train.accumulate_gradients
    monkeypatch.setattr(train, "accumulate_gradients", lambda *a: (honest(*a), next(losses))[1])
    text = run(tmp_path / "log", options(world, out), status=2)
    assert "step 4: the loss is nan" in text and f"last good checkpoint is {out}/step-2" in text
    assert len(metrics(out)) == 3


def test_the_newest_checkpoint_is_that_of_the_highest_number(tmp_path):
    for step in (900, 1000):
        (tmp_path / f"step-{step}").mkdir()
    assert train.newest_checkpoint(tmp_path).name == "step-1000"


def test_a_copy_of_a_checkpoint_is_the_users_own(whole, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    shutil.copytree(out / "step-6", out / "step-6.bak")
    run(tmp_path / "log", ["--resume", "--out", str(out), "--steps", "8"])
    assert sorted(folder.name for folder in out.glob("step-*")) == ["step-6.bak", "step-8"]


@pytest.mark.parametrize("weights, model, expected", [
    ("w/TinyLlama-1.1B-v1.0", None, "runs/TinyLlama-1.1B-v1.0"), ("w/model.gguf", None, "runs/model"),
    ("w/any", "7b", "runs/7b"), (None, "13b", "runs/13b"), (None, None, "runs/tiny")])
def test_resuming_looks_where_the_start_has_written(tmp_path, monkeypatch, weights, model, expected):
    monkeypatch.chdir(tmp_path)
    words = [word for name, value in (("--weights", weights), ("--model", model)) if value for word in (name, value)]
    assert f"there is no {expected}/run.json" in refusal(monkeypatch, "--resume", *words)


def test_a_variable_that_only_looks_like_torchruns_changes_nothing(world, whole, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    run(tmp_path / "log", options(world, tmp_path / "run"))
    assert adapter(tmp_path / "run") == adapter(whole)


def test_resuming_refuses_what_would_be_another_run(world, whole, tmp_path, monkeypatch):
    assert "nothing to resume" in refusal(monkeypatch, "--resume", "--out", tmp_path)
    assert "--lr 0.5 contradicts" in refusal(monkeypatch, "--resume", "--out", whole, "--lr", 0.5)
    assert "--steps 3" in refusal(monkeypatch, "--resume", "--out", whole, "--steps", 3)
    assert "--fresh" in refusal(monkeypatch, "--resume", "--out", whole, "--fresh")
    shutil.copytree(whole, tmp_path / "run")
    for damaged in ('{"steps": 6', '{"steps": 6}', "[]"):
        (tmp_path / "run" / "run.json").write_text(damaged)
        assert "run.json is damaged" in refusal(monkeypatch, "--resume", "--out", tmp_path / "run")
    settings = json.loads((whole / "run.json").read_text())
    for changed in (dict(lr="fast"), dict(steps=2.5), dict(seed=None), dict(bits=[4]), dict(checkpointing=True),
                    dict(method="other"), dict(resume=True), dict(speed=1)):
        (tmp_path / "run" / "run.json").write_text(json.dumps(settings | changed))
        assert "run.json is damaged" in refusal(monkeypatch, "--resume", "--out", tmp_path / "run"), changed


@pytest.mark.parametrize("changed", [dict(alpha=32.0), dict(lr=0.5), dict(seed=5), dict(batch_size=8), dict(rank=1),
                                     dict(targets="q_proj"), dict(clip=9.0), dict(max_length=32), dict(method="lora")])
def test_a_run_whose_settings_were_edited_is_not_resumed(world, whole, tmp_path, changed):
    shutil.copytree(whole, tmp_path / "run")
    settings = json.loads((whole / "run.json").read_text()) | changed | {"steps": 8}
    (tmp_path / "run" / "run.json").write_text(json.dumps(settings))
    before = adapter(tmp_path / "run")
    run(tmp_path / "log", ["--resume", "--out", str(tmp_path / "run")], status=2)
    assert adapter(tmp_path / "run") == before


def test_a_run_that_ran_out_of_memory_may_go_on_with_less(world, whole, tmp_path):
    run(tmp_path / "log", options(world, tmp_path / "run", steps=2))
    run(tmp_path / "log", ["--resume", "--out", str(tmp_path / "run"), "--steps", "6", "--micro-batch-size", "1",
                           "--checkpointing", "0", "--save-every", "3"])
    close(metrics(tmp_path / "run"), metrics(whole))
    assert json.loads((tmp_path / "run" / "run.json").read_text())["micro_batch_size"] == 1


def test_a_checkpoint_is_read_without_running_code(world, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    torch.save({"optimizer": Attack(), "step": 6}, tmp_path / "run" / "step-6" / "optimizer.pt")
    text = run(tmp_path / "log", ["--resume", "--out", str(tmp_path / "run"), "--steps", "8"], status=2,
               before=lambda: os.chdir(tmp_path))
    assert "optimizer.pt is missing or damaged" in text and not (tmp_path / "attacked").exists()


def test_a_number_in_run_json_may_be_written_as_a_word(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    settings = json.loads((whole / "run.json").read_text())
    (tmp_path / "run" / "run.json").write_text(json.dumps(settings | {"steps": "8", "lr": str(settings["lr"])}))
    run(tmp_path / "log", ["--resume", "--out", str(tmp_path / "run")])
    assert len(metrics(tmp_path / "run")) == 8


def test_a_run_whose_data_was_edited_is_not_resumed(world, tmp_path):
    """Whichever record it is, one to train on or one held out for validation; but the file may have moved."""
    records, out = tmp_path / "records.json", tmp_path / "run"
    shutil.copy(world / "records.json", records)
    run(tmp_path / "log", options(world, out, data=records, steps=2))
    told = (out / "run.json").read_text()
    again = ["--resume", "--out", str(out), "--steps", "4"]
    order = list(range(len(RECORDS)))
    random.Random(0).shuffle(order)  # as train.py does, which holds out the first
    for i in (order[0], order[-1]):
        records.write_text(json.dumps(RECORDS[:i] + [RECORDS[i] | {"output": "another"}] + RECORDS[i + 1:]))
        assert "was trained with examples" in run(tmp_path / "log", again, status=2)
    assert (out / "run.json").read_text() == told
    run(tmp_path / "log", [*again, "--data", str(world / "records.json")])
    assert json.loads((out / "run.json").read_text())["data"] == str(world / "records.json")


def test_a_base_made_anew_by_another_calibration_is_not_trained_on(world, tmp_path):
    out, calibration = tmp_path / "run", tmp_path / "calibration.txt"
    base = out / "base" / "model.safetensors"
    calibration.write_text(ENGLISH)
    words = options(world, out, quantizer="gptq", calibration=calibration, calibration_tokens=512, steps=2)
    run(tmp_path / "log", words)
    before, again = base.read_bytes(), ["--resume", "--out", str(out), "--steps", "4"]
    calibration.write_text(ENGLISH[::-1])
    assert "has changed since" in run(tmp_path / "log", again, status=2)
    shutil.rmtree(out / "base")
    assert "was trained with base" in run(tmp_path / "log", again, status=2)
    assert base.read_bytes() != before
    calibration.write_text(ENGLISH)
    shutil.rmtree(out / "base")
    run(tmp_path / "log", again)
    assert base.read_bytes() == before


@pytest.mark.parametrize("name", ["step-6/optimizer.pt", "step-6/settings.json", "step-6/adapter.safetensors",
                                  "base/model.safetensors", "base/config.json", "base/tokenizer.model", "base/made_from.json"])
@pytest.mark.parametrize("content", [b"", b"garbage\xff", None])
def test_resuming_over_a_damaged_file_is_refused_in_one_line(world, whole, tmp_path, name, content):
    file = shutil.copytree(whole, tmp_path / "run") / name
    file.unlink()
    if content is not None:
        file.write_bytes(content)
    words = ["--resume", "--out", str(tmp_path / "run")]
    if name == "base/made_from.json" and content is None:
        run(tmp_path / "log", words)  # makes the base again
    else:
        run(tmp_path / "log", words, status=2)
    assert adapter(tmp_path / "run") == adapter(whole)


def test_two_runs_at_once_do_not_share_a_folder(world, tmp_path):
    out = tmp_path / "run"
    first = fork(tmp_path / "first-log", options(world, out, steps=100_000))
    wait_for(lambda: (out / "metrics.jsonl").exists() and len(metrics(out)) > 2, first)
    for words in (options(world, out), ["--resume", "--out", str(out)]):
        assert f"another run is at work in {out}" in run(tmp_path / "log", words, status=2)
    os.kill(first, signal.SIGKILL)
    wait(first)
    steps = int(train.newest_checkpoint(out).name[5:]) + 2
    run(tmp_path / "log", ["--resume", "--out", str(out), "--steps", str(steps)])
    assert len(metrics(out)) == steps


def test_resuming_over_changed_weights_is_refused(world, tmp_path, monkeypatch):
    shutil.copytree(world / "weights", tmp_path / "weights")
    words = options(world, tmp_path / "run", weights=tmp_path / "weights")
    run(tmp_path / "log", words)
    save_random(tmp_path / "weights", seed=7)
    message = refusal(monkeypatch, "--resume", "--out", tmp_path / "run", "--steps", 8)
    assert "weights" in message and "without --resume" in message


def test_an_unfinished_run_is_not_thrown_away(world, tmp_path, monkeypatch):
    out = tmp_path / "run"
    monkeypatch.setattr(train, "save_adapter", lambda model, folder, **origin: os._exit(9) if origin else
                        qalora.save_adapter(model, folder))
    run(tmp_path / "log", options(world, out), status=9)
    monkeypatch.undo()
    message = refusal(monkeypatch, *options(world, out))
    assert "unfinished run" in message and f"remove {out}/step-6" in message and "--resume" in message
    assert (out / "step-6").exists()


# ---- the base

def test_a_base_is_reused_unless_it_would_be_another(world, tmp_path):
    out, log = tmp_path / "run", tmp_path / "log"
    file = out / "base" / "model.safetensors"
    state = lambda: (file.stat().st_ino, file.stat().st_mtime_ns)
    run(log, options(world, out, steps=1))
    first = state()
    text = run(log, options(world, out, steps=1, seed=5, data=world / "fewer.json", lr=0.1, rank=2))
    assert state() == first and "already made from these weights" in text
    for change in (dict(bits=3), dict(group_size=16), dict(quantizer="gptq"), dict(weights=world / "other-weights"),
                   dict(quantizer="gptq"), dict(quantizer="gptq", calibration_tokens=512),
                   dict(quantizer="gptq", calibration=world / "fewer.json"), dict(fresh="")):
        before, words = state(), [word for word in options(world, out, steps=1, **change) if word]
        text = run(log, words)
        assert state() != before and ("making it anew" in text or "fresh" in change), change
        quantization = json.loads((out / "base" / "config.json").read_text())["quantization"]
        assert all(quantization[k] == v for k, v in change.items() if k in ("bits", "group_size", "quantizer")), change


def test_a_new_run_in_a_finished_ones_folder_keeps_only_that_ones_adapter(world, whole, tmp_path):
    out = pathlib.Path(shutil.copytree(whole, tmp_path / "run"))
    run(tmp_path / "log", options(world, out, steps=2, seed=5))
    run(tmp_path / "log", options(world, tmp_path / "alone", steps=2, seed=5))
    assert (out / "previous-adapter" / "adapter.safetensors").read_bytes() == adapter(whole)
    assert adapter(out) == adapter(tmp_path / "alone") != adapter(whole)
    assert json.loads((out / "run.json").read_text())["seed"] == 5 and metrics(out) == metrics(tmp_path / "alone")
    assert [folder.name for folder in out.glob("*step-*")] == ["step-2"]


@given(place=st.floats(0, 1, exclude_max=True))
@settings(max_examples=20)
def test_checkpoints_that_differ_anywhere_are_told_apart(world, place):
    file, folder = world / "weights" / "model.safetensors", world / "changed"
    folder.mkdir(exist_ok=True)
    content = bytearray(file.read_bytes())
    content[int(place * len(content))] ^= 1
    (folder / file.name).write_bytes(content)
    shutil.copy(world / "weights" / "config.json", folder)
    assert train.fingerprint(folder) != train.fingerprint(world / "weights")
    (folder / file.name).write_bytes(file.read_bytes())
    assert train.fingerprint(folder) == train.fingerprint(world / "weights")
    (folder / "config.json").write_text((folder / "config.json").read_text().replace("10000.0", "20000.0"))
    assert train.fingerprint(folder) != train.fingerprint(world / "weights")


def test_data_is_read_once_and_calibration_only_for_a_gptq_that_runs(world, tmp_path, monkeypatch):
    read = data.read_records
    monkeypatch.setattr(data, "read_records", lambda path: (print(f"reading {path}."), read(path))[1])
    out, other = tmp_path / "run", dict(calibration=world / "fewer.json")
    gptq = dict(quantizer="gptq", bits=3, **other)
    for changed, expected in ((dict(), ["records"]), (other, ["records"]),  # rounding to nearest
                              (dict(quantizer="gptq"), ["records"]), (gptq, ["records", "fewer"]),
                              (gptq, ["records"])):  # the base is there
        text = run(tmp_path / "log", options(world, out, steps=1, **changed))
        assert re.findall(r"reading \S*?(\w+)\.json", text) == expected, changed


def cut_short(world, tmp_path, name):
    """--weights: a copy of world/NAME whose tensors end too early."""
    file = shutil.copytree(world / name, tmp_path / "cut") / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    return dict(weights=tmp_path / "cut")


def with_nan(world, tmp_path):
    """--weights: a copy of world/weights with one NaN, which is found when its tensor is read."""
    folder = shutil.copytree(world / "weights", tmp_path / "nan")
    model = llama.load_pretrained(folder)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[-1, -1] = torch.nan
    llama.save_pretrained(model, folder)
    return dict(weights=folder)


@pytest.mark.parametrize("wrong", ["calibration", "weights", "quantized weights", "a weight"])
def test_a_refused_file_leaves_the_finished_run_that_was_there(world, whole, tmp_path, wrong):
    out = tmp_path / "run"
    run(tmp_path / "log", options(world, out, steps=1))
    before = {file.relative_to(out): file.read_bytes() for file in out.rglob("*") if file.is_file()}
    (tmp_path / "bad.json").write_text("[]")
    changed = {"calibration": lambda: dict(quantizer="gptq", calibration=tmp_path / "bad.json"),
               "weights": lambda: cut_short(world, tmp_path, "weights"),
               "quantized weights": lambda: cut_short(world, tmp_path, "whole/base"),
               "a weight": lambda: with_nan(world, tmp_path)}[wrong]()
    run(tmp_path / "log", options(world, out, **changed), status=2)
    assert {file.relative_to(out): file.read_bytes() for file in out.rglob("*") if file.is_file()} == before


def test_gptq_is_calibrated_on_the_training_data_or_what_is_named(world, tmp_path):
    made = {}
    for name, changed in dict(all=dict(), fewer=dict(data=world / "fewer.json"),
                              named=dict(data=world / "fewer.json", calibration=world / "records.json")).items():
        words = options(world, tmp_path / name, steps=1, quantizer="gptq", calibration_tokens=1000, **changed)
        run(tmp_path / "log", words)
        made[name] = (tmp_path / name / "base" / "model.safetensors").read_bytes()
    assert made["all"] == made["named"] != made["fewer"]
    texts = train.calibration_texts({"calibration": None}, None, data.read_records(world / "records.json")[0])
    assert sorted(texts) == sorted(f"{data.alpaca_prompt(r['instruction'])} {r['output']}".strip() for r in RECORDS)


def test_weights_that_change_while_they_are_quantized_are_not_taken_for_those_that_were(world, tmp_path, monkeypatch):
    weights = shutil.copytree(world / "weights", tmp_path / "weights")
    s = dict(out=tmp_path / "run", weights=weights, tokenizer=None, method="qalora", bits=4, group_size=32,
             quantizer="rtn", calibration_tokens=1, device="cpu", fresh=False, resume=False)
    train.prepare_base(s, None)
    assert train.base_is_made(s)
    make = train.make_base

    def make_while_they_change(*arguments):
        make(*arguments)
        shutil.copy(world / "other-weights" / "model.safetensors", weights)

    monkeypatch.setattr(train, "make_base", make_while_they_change)
    train.prepare_base(s, None)
    assert not train.base_is_made(s)


def test_another_tokenizer_makes_the_base_anew(world, tmp_path):
    run(tmp_path / "log", options(world, tmp_path / "run", steps=1))
    data.train_tokenizer([ENGLISH], tmp_path / "tokenizer.model", 400)
    other = dict(tokenizer=tmp_path / "tokenizer.model", max_length=256)
    run(tmp_path / "log", options(world, tmp_path / "run", steps=1, **other))
    assert data.load_tokenizer(tmp_path / "run").vocab_size() == 400


@pytest.fixture(scope="module", params=[("qalora", "rtn", torch.float32), ("qalora", "rtn", torch.bfloat16),
                                        ("qlora", "nf4", torch.float32)],
                ids="{0[1]} {0[2]}".format)
def peaks(request, tmp_path_factory):
    """The quantizer, and of a model of few layers and one of many: (MB of private memory that quantizing added at its
    peak, MB of the base's file, and of the dense one).

    In float32 every block is a private copy; in bfloat16 what is freed on the way lies between the results.
    """
    method, quantizer, dtype = request.param
    found = []
    for layers in (4, 24):
        folder = tmp_path_factory.mktemp(f"{layers}-layers")
        save_random(folder, config=llama.LlamaConfig(512, 768, 2048, layers, 12, 12), dtype=torch.bfloat16)
        code = ("import pathlib, sys, torch, quant, train\n"
                "weights, out = map(pathlib.Path, sys.argv[1:])\n"
                "out.mkdir()\n"
                f"train.compute_dtype = lambda *_: {dtype}\n"
                "quant.trim_heap()\n"  # what importing has left free
                "print('ready', flush=True), sys.stdin.readline()\n"
                f"settings = dict(method='{method}', bits=4, group_size=32, quantizer='{quantizer}', device='cpu')\n"
                "train.make_base(settings, weights, out, None)\n")
        process = subprocess.Popen([sys.executable, "-c", code, folder, folder / "base"], env=ENVIRONMENT, text=True,
                                   stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        assert process.stdout.readline() == "ready\n"
        start = peak = private_megabytes(process.pid)
        process.stdin.write("\n"), process.stdin.flush()
        while process.poll() is None:
            peak = max(peak, private_megabytes(process.pid))
            time.sleep(0.001)
        assert process.returncode == 0
        dense = (folder / "model.safetensors").stat().st_size / 1e6
        found.append((peak - start, (folder / "base" / "model.safetensors").stat().st_size / 1e6, dense))
        shutil.rmtree(folder)
    return quantizer, *found


def private_megabytes(pid):
    """RssAnon of a process: memory that is no mapped file; 0 when it has ended."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for line in open(f"/proc/{pid}/status"):
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024 / 1e6
    return 0


def test_memory_while_quantizing_grows_with_the_packed_size(peaks):
    _, (few, few_packed, few_dense), (many, many_packed, many_dense) = peaks
    packed, dense = many_packed - few_packed, many_dense - few_dense
    assert dense > 2.5 * packed > 0
    assert many - few < (packed + dense) / 2, (many, few, packed, dense)


def test_memory_while_quantizing_is_the_packed_model_two_dense_blocks_and_what_one_layer_takes(peaks):
    quantizer, *found = peaks
    block = (4 * 768 ** 2 + 3 * 768 * 2048) * 4 / 1e6  # as it is computed with, in float32
    layer = {"rtn": 0, "nf4": 2 * 5 * 768 * 2048 * 4 / 1e6}  # quotients and codes in 32 bits, and holes until a block is done
    for peak, packed, _ in found:
        assert peak < packed + 2 * block + layer[quantizer] + 30, (peak, packed, block)


# ---- training

def test_accumulation_and_checkpointing_do_not_change_the_losses(world, whole, tmp_path):
    for i, changed in enumerate((dict(micro_batch_size=4), dict(micro_batch_size=1), dict(checkpointing=0))):
        run(tmp_path / "log", options(world, tmp_path / str(i), **changed))
        close(metrics(tmp_path / str(i)), metrics(whole))
    assert json.loads((whole / "run.json").read_text())["checkpointing"] == 1, "nothing was compared"


def test_checkpointing_recomputes_each_block_and_can_be_left_out(world, tmp_path, monkeypatch):
    honest = llama.checkpoint
    monkeypatch.setattr(llama, "checkpoint", lambda *a, **more: (print("recomputed later"), honest(*a, **more))[1])
    for wanted in (1, 0):
        text = run(tmp_path / "log", options(world, tmp_path / str(wanted), steps=2, checkpointing=wanted))
        assert text.count("recomputed later") == wanted * 2 * 2 * CONFIG.num_hidden_layers  # steps, micro-batches


def test_the_loss_is_the_mean_over_the_batchs_response_tokens(world, whole):
    s = json.loads((whole / "run.json").read_text())
    tokenizer = data.load_tokenizer(whole)
    examples, _ = train.make_examples(s, *data.read_records(s["data"]), tokenizer, lambda *_: None)
    batch = [examples[i] for i in data.batch_order(tuple(len(e.tokens) for e in examples), 4, 0, 0)]
    model, total, count = quant.load_quantized(whole / "base", torch.float32), 0.0, 0
    for tokens, prompt_length in batch:  # one by one and without padding
        log_probs = model(torch.tensor(tokens[None], dtype=torch.long))[0].log_softmax(-1)
        total -= sum(log_probs[t - 1, tokens[t]].item() for t in range(prompt_length, len(tokens)))
        count += len(tokens) - prompt_length
    assert metrics(whole, "loss")[0][0] == pytest.approx(total / count, rel=1e-5)


def test_training_is_adamw_at_a_constant_rate_on_gradients_cut_to_clip(world, tmp_path):
    run(tmp_path / "log", options(world, tmp_path / "run", lr=0.004, clip=0.05, checkpointing=0, seed=2))
    s = json.loads((tmp_path / "run" / "run.json").read_text())
    examples, other = (train.make_examples(s | {"seed": seed}, *data.read_records(s["data"]),
                                           data.load_tokenizer(tmp_path / "run"), print)[0] for seed in (2, 3))
    assert [e.tokens.tolist() for e in examples] != [e.tokens.tolist() for e in other]
    torch.manual_seed(s["seed"])
    model = qalora.add_adapters(quant.load_quantized(tmp_path / "run" / "base", torch.float32), 4, 16.0)
    parameters = list(qalora.adapter_parameters(model).values())
    moments, expected = [(torch.zeros_like(p), torch.zeros_like(p)) for p in parameters], []
    for step in range(6):
        batch = [examples[i] for i in data.batch_order(tuple(len(e.tokens) for e in examples), 4, step, s["seed"])]
        losses = []
        for tokens, prompt_length in batch:
            log_probs = model(torch.tensor(tokens[None], dtype=torch.long))[0].log_softmax(-1)
            losses += [-log_probs[t - 1, tokens[t]] for t in range(prompt_length, len(tokens))]
        loss = sum(losses) / len(losses)
        gradients = torch.autograd.grad(loss, parameters)
        norm = sum(g.square().sum() for g in gradients).sqrt()
        expected.append((step + 1, loss.item(), norm.item()))
        for p, g, (m, v) in zip(parameters, gradients, moments):  # Kingma and Ba (2015), algorithm 1
            g = g * min(1, 0.05 / norm)
            m.mul_(0.9).add_(0.1 * g), v.mul_(0.999).add_(0.001 * g * g)
            unbiased = m / (1 - 0.9 ** (step + 1)), v / (1 - 0.999 ** (step + 1))
            p.data -= 0.004 * unbiased[0] / (unbiased[1].sqrt() + 1e-8)
    norms = [norm for *_, norm in expected]
    assert min(norms) > 0.05 and max(norms) > 2 * min(norms), "all gradients are cut, and each by another factor"
    close(metrics(tmp_path / "run"), expected)


def test_validation_examples_are_held_out_and_what_is_cut_or_left_out_is_counted(world):
    tokenizer, printed = data.load_tokenizer(world / "weights"), []
    records = [data.Record("", word * n) for n, word in enumerate((NOUNS * 2)[:30], 1)] + [data.Record("a" * 400, "b")]
    s = dict(max_length=40, seed=3)
    train_examples, held_out = train.make_examples(s, records, "text", tokenizer, printed.append)
    lengths = [2 + len(tokenizer.encode(r.prompt)) + len(tokenizer.encode(r.response)) for r in records]
    cut = sum(length > 40 for length in lengths)
    assert printed == [f"data: 31 records in text form, {cut} longer than 40 tokens and cut, 1 of these left out, as no "
                       "response was left"] and 1 < cut < 31
    assert len(held_out) == 30 // 20
    all_tokens = lambda examples: sorted(e.tokens.tolist() for e in examples)
    assert all_tokens(train_examples + held_out) == all_tokens(data.encode(records, tokenizer, 40)[0])


@pytest.mark.parametrize("method, bits", [("lora", 32), ("qlora", 4.2)])
def test_the_baselines_go_the_whole_way(world, tmp_path, monkeypatch, method, bits):
    out = tmp_path / "run"
    text = run(tmp_path / "log", options(world, out, method=method, quantizer=None, save_every=3))
    found = float(re.search(r"beside (\d+\.\d+) bits a weight", text)[1])
    assert found == pytest.approx(bits, abs=0.1)
    results = json.loads((out / "results.json").read_text())
    assert results["validation_loss_adapted"] < results["validation_loss_base"]
    before = adapter(out)
    run(tmp_path / "log", ["--resume", "--out", str(out), "--steps", "8"])
    assert len(metrics(out)) == 8 and adapter(out) != before
    monkeypatch.setattr(sys, "argv", ["merge.py", str(out), "--out", str(tmp_path / "merged")])
    merge.main()
    assert quant.quantization_of(tmp_path / "merged") is None
    adapted = merge.load_model(out / "base")
    qalora.load_adapter(adapted, out / "adapter")
    tokens = torch.arange(60).view(2, 30)
    torch.testing.assert_close(llama.load_pretrained(tmp_path / "merged")(tokens), adapted(tokens), rtol=0, atol=1e-3)
    run(tmp_path / "log", options(world, tmp_path / "again", weights=tmp_path / "merged", steps=1))


@pytest.mark.parametrize("option, value", [("bits", 2), ("group_size", 16), ("quantizer", "rtn")])
def test_a_baseline_that_has_no_use_for_an_option_refuses_it(world, tmp_path, monkeypatch, option, value):
    words = options(world, tmp_path / "run", **{"method": "qlora", "quantizer": None, option: value})
    assert f"--{option.replace('_', '-')} means nothing to --method qlora" in refusal(monkeypatch, *words)


def test_only_the_targets_are_trained(world, whole, tmp_path):
    run(tmp_path / "log", options(world, tmp_path / "run", targets="q_proj,v_proj"))
    found = json.loads((tmp_path / "run" / "adapter" / "adapter.json").read_text())
    assert found["targets"] == ["q_proj", "v_proj"]
    base, merged = quant.load_quantized(tmp_path / "run" / "base"), merge.load_model(tmp_path / "run")
    changed = {name for name, t in base.state_dict().items() if not torch.equal(t, merged.state_dict()[name])}
    assert changed == {f"model.layers.{i}.self_attn.{n}_proj.offset" for i in range(2) for n in "qv"}
    merged = merge.load_model(whole)  # all seven
    changed = {name for name, t in base.state_dict().items() if not torch.equal(t, merged.state_dict()[name])}
    assert len(changed) == 14 and all(name.endswith(".offset") for name in changed)


def test_each_line_of_metrics_and_the_validation_loss(world, whole):
    assert [step for step, in metrics(whole, "step")] == [1, 2, 3, 4, 5, 6]
    assert [loss is not None for loss, in metrics(whole, "validation_loss")] == [False, True] * 3
    results = json.loads((whole / "results.json").read_text())
    assert results["bit_identical"] is True
    assert results["validation_loss_adapted"] == metrics(whole, "validation_loss")[-1][0]
    assert results["validation_loss_adapted"] < results["validation_loss_base"]
    assert all(speed > 0 for speed, in metrics(whole, "tokens_per_second"))
    bars = (world / "whole-log").read_text().split("fine-tuning:")
    assert re.search(r"6/6 \[\d\d:\d\d<\d\d:\d\d, .*step/s, GB=\d+\.\d, loss=\d+\.\d+, tokens_per_s=\d+\]", bars[-1])


def test_in_bfloat16_the_adapters_and_their_optimizer_stay_in_float32(world, tmp_path, monkeypatch):
    monkeypatch.setattr(llama, "compute_dtype", lambda stored, device: torch.bfloat16)
    text = run(tmp_path / "log", options(world, tmp_path / "run", checkpointing=1))
    assert "bit identical: True" in text
    stored = llama.open_file(tmp_path / "run" / "adapter" / "adapter.safetensors")
    assert {t.read().dtype for t in stored.values()} == {torch.float32}
    state = torch.load(tmp_path / "run" / "step-6" / "optimizer.pt", weights_only=True)["optimizer"]["state"]
    assert {t.dtype for entry in state.values() for t in entry.values()} == {torch.float32}


@pytest.mark.parametrize("model, lr", [("7b", 2e-5), ("13b", 2e-5), ("33b", 1e-5), ("65b", 1e-5)])
def test_the_default_for_real_sizes_is_the_papers_recipe(world, tmp_path, monkeypatch, model, lr):
    llama.write_config(llama.CONFIGS[model], tmp_path)
    shutil.copy(world / "weights" / "tokenizer.model", tmp_path)
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10 ** 12, 0, 10 ** 12))
    for words in (["--weights", tmp_path], ["--weights", tmp_path, "--model", model]):
        words += ["--data", world / "records.json", "--out", tmp_path / "out"]
        monkeypatch.setattr(sys, "argv", ["train.py", *map(str, words)])
        found = options_of_train.read_settings("")
        recipe = dict(method="qalora", bits=4, group_size=32, quantizer="gptq", rank=64, alpha=16, lr=lr, clip=0.3,
                      batch_size=16, steps=10_000, targets=",".join(llama.LINEARS), checkpointing=1)
        assert {name: found[name] for name in recipe} == recipe


# ---- what is not said, what is passed on, and what is called equal

def read(monkeypatch, *words):
    """The settings of a command line."""
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, words)])
    return options_of_train.read_settings("")


def test_what_is_not_said_is_as_the_help_says(world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    llama.write_config(llama.CONFIGS["7b"], tmp_path / "llama.7b")
    shutil.copy(world / "weights" / "tokenizer.model", tmp_path / "llama.7b")
    words = ["--weights", tmp_path / "llama.7b", "--data", world / "records.json"]
    expected = dict(max_length=512, micro_batch_size=4, save_every=100, calibration_tokens=128 * 2048, seed=0)
    found = read(monkeypatch, *words)
    assert {name: found[name] for name in expected} == expected
    assert read(monkeypatch, *words, "--model", "7b")["out"] == "runs/7b"


def test_records_are_cut_to_the_context_of_a_model_that_has_less_than_512_tokens(world, tmp_path, monkeypatch):
    assert read(monkeypatch, *options(world, tmp_path / "run", max_length=None))["max_length"] == 256


def test_weights_that_are_quantized_tell_their_bits_and_group_size(world, tmp_path, monkeypatch):
    weights = shutil.copytree(world / "weights", tmp_path / "merged")
    quant.save_quantized(quant.quantize_model(llama.load_pretrained(weights), 3, 16), weights)
    found = read(monkeypatch, *options(world, tmp_path / "run", weights=weights))
    assert (found["bits"], found["group_size"]) == (3, 16)
    for wrong in (dict(bits=4), dict(group_size=32), dict(method="lora", quantizer=None)):
        message = refusal(monkeypatch, *options(world, tmp_path / "run", weights=weights, **wrong))
        assert "is quantized already, to 3 bits in groups of 16" in message


@pytest.mark.parametrize("changed", [dict(hidden_size=8192), dict(num_hidden_layers=31), dict(intermediate_size=11040),
                                     dict(num_attention_heads=64), dict(num_key_value_heads=8)])
def test_every_size_that_contradicts_the_files_is_refused(world, tmp_path, monkeypatch, changed):
    (name, value), = changed.items()
    llama.write_config(dataclasses.replace(llama.CONFIGS["7b"], **changed), tmp_path)
    message = refusal(monkeypatch, *options(world, tmp_path / "run", weights=tmp_path, model="7b"))
    assert f"--model 7b has {name} {getattr(llama.CONFIGS['7b'], name)}" in message and f"has {value};" in message


def test_files_that_have_moved_are_named_anew_on_resuming(world, tmp_path):
    here, there, out = tmp_path / "here", tmp_path / "there", tmp_path / "run"
    shutil.copytree(world / "weights", here)
    (here / "tokenizer.model").rename(here / "spelling.model")
    (here / "calibration.txt").write_text(ENGLISH)
    named = lambda at: dict(weights=at, tokenizer=at / "spelling.model", calibration=at / "calibration.txt")
    words = dict(quantizer="gptq", calibration_tokens=512)
    run(tmp_path / "log", options(world, out, steps=2, **words, **named(here)))
    here.rename(there)
    settings = (out / "run.json").read_text()
    (out / "run.json").write_text(settings.replace('"device": "cpu"', '"device": "cuda"'))
    moved = [word for name, path in named(there).items() for word in (f"--{name}", str(path))]
    run(tmp_path / "log", ["--resume", "--out", str(out), "--steps", "4", "--device", "cpu", *moved])
    run(tmp_path / "log", options(world, tmp_path / "whole", steps=4, **words, **named(there)))
    assert adapter(out) == adapter(tmp_path / "whole")


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_the_baselines_take_widths_that_no_group_divides(world, tmp_path, method):
    save_random(tmp_path / "weights", config=dataclasses.replace(CONFIG, intermediate_size=88))
    shutil.copy(world / "weights" / "tokenizer.model", tmp_path / "weights")
    run(tmp_path / "log", options(world, tmp_path / "run", weights=tmp_path / "weights", method=method, quantizer=None,
                                  steps=1))


def test_a_new_run_needs_no_room_for_the_checkpoint_that_it_replaces(world, whole, tmp_path, monkeypatch):
    out = shutil.copytree(whole, tmp_path / "run")
    one = sum(file.stat().st_size for file in (out / "step-6").iterdir())
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10 ** 9, 0, int(1.3 * one)))
    assert "is already made" in run(tmp_path / "log", options(world, out))


def test_the_base_of_another_method_is_made_anew(world, tmp_path):
    found = []
    for method in ("lora", "qlora"):
        run(tmp_path / "log", options(world, tmp_path / "run", method=method, quantizer=None, steps=1))
        found.append((quant.quantization_of(tmp_path / "run" / "base") or {}).get("quantizer"))
    assert found == [None, "nf4"]


@pytest.mark.parametrize("method", ["qalora", "qlora", "lora"])
def test_a_model_of_tied_embeddings_goes_the_whole_way(world, tmp_path, method):
    save_random(tmp_path / "weights", config=dataclasses.replace(CONFIG, tie_word_embeddings=True))
    shutil.copy(world / "weights" / "tokenizer.model", tmp_path / "weights")
    run(tmp_path / "log", options(world, tmp_path / "run", weights=tmp_path / "weights", method=method, quantizer=None,
                                  steps=1, calibration_tokens=512))
    model = merge.load_model(tmp_path / "run")
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("method", ["qalora", "qlora", "lora"])
def test_a_base_keeps_the_16_bits_that_its_embedding_came_in(world, tmp_path, method):
    save_random(tmp_path / "weights", dtype=torch.float16)
    shutil.copy(world / "weights" / "tokenizer.model", tmp_path / "weights")
    run(tmp_path / "log", options(world, tmp_path / "run", weights=tmp_path / "weights", method=method, steps=1,
                                  quantizer="gptq" if method == "qalora" else None, calibration_tokens=512))
    stored, given = (llama.open_file(tmp_path / folder / "model.safetensors") for folder in ("run/base", "weights"))
    for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
        assert stored[name].read().dtype == torch.float16 and torch.equal(stored[name].read(), given[name].read())


def test_ten_records_are_enough_though_none_is_held_out(world, tmp_path):
    (tmp_path / "ten.json").write_text(json.dumps(RECORDS[:10]))
    run(tmp_path / "log", options(world, tmp_path / "run", data=tmp_path / "ten.json"))
    assert json.loads((tmp_path / "run" / "results.json").read_text())["validation_examples"] == 0
    assert metrics(tmp_path / "run", "validation_loss") == [(None,)] * 6


def test_the_loss_of_16_bit_logits_is_computed_in_float32():
    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            logits = torch.randn(5, 300, generator=torch.Generator().manual_seed(0))
            self.logits = torch.nn.Parameter(logits.bfloat16())

        def forward(self, tokens_BT, keep_BT):
            return self.logits

    network, tokens = Network(), torch.arange(3, 10).numpy()
    loss = train.accumulate_gradients(network, [data.Example(tokens, 2)], 1)
    expected = torch.nn.functional.cross_entropy(network.logits.float(), torch.arange(5, 10))
    assert loss == pytest.approx(expected.item(), rel=1e-6)


def test_equal_bits_are_found_only_where_all_bits_of_all_examples_are_equal():
    model = torch.nn.Embedding(6, 4)
    examples = [data.Example(numpy.array(tokens, numpy.uint16), 1) for tokens in ([1, 2], [3, 4], [5, 1])]
    before = train.logits_digest(model, examples, 2)
    assert train.logits_digest(model, examples, 2) == before
    with torch.no_grad():
        model.weight.view(torch.int32)[5, -1] += 1  # one unit in the last place, seen in the last batch only
    assert train.logits_digest(model, examples, 2) != before


def test_a_float_merge_is_not_said_to_be_bit_identical(world, tmp_path):
    run(tmp_path / "log", options(world, tmp_path / "run", method="lora", quantizer=None))
    assert json.loads((tmp_path / "run" / "results.json").read_text())["bit_identical"] is False


def test_calibration_texts_are_drawn_from_all_records_whose_order_stays(world):
    records, _ = data.read_records(world / "records.json")
    before = list(records)
    texts = train.calibration_texts({"calibration": None}, None, records)
    assert records == before and texts != [f"{r.prompt} {r.response}".strip() for r in records]


def test_at_most_200_examples_are_held_out(world):
    tokenizer = data.load_tokenizer(world / "weights")
    records, s = [data.Record("", "house")] * 4100, dict(max_length=40, seed=0)
    found = train.make_examples(s, records, "text", tokenizer, lambda *_: None)
    assert [len(examples) for examples in found] == [3900, 200]


@pytest.mark.parametrize("count, context, shape", [(500, 256, (1, 256)), (1000, 256, (3, 256)), (100, 256, (1, 100)),
                                                  (5000, 4096, (2, 2048))])
def test_calibration_takes_as_many_tokens_as_asked_in_windows_of_2048_or_the_context(world, count, context, shape):
    config = dataclasses.replace(CONFIG, max_position_embeddings=context)
    windows = train.calibration_windows([ENGLISH] * 3, data.load_tokenizer(world / "weights"), config, count)
    assert windows.shape == shape


def test_the_default_run_scores_every_stage_and_says_whether_bits_are_equal(world, tmp_path, monkeypatch):
    small, out = data.make_world(people=6), tmp_path / "run"
    monkeypatch.setattr(train, "TOY_BASE", world / "weights")
    monkeypatch.setattr(data, "make_world", lambda: small)
    words = "--steps 20 --batch-size 4 --lr 0.01 --calibration-tokens 1000 --out".split()
    text = run(tmp_path / "log", [*words, str(out)])
    assert f"merged logits on all {len(small.test)} test questions: bit-identical to the adapted model's" in text
    rows = json.loads((out / "results.json").read_text())["table"]
    assert [row["model"] for row in rows] == ["base (float)", "base (INT4)", "adapted INT4", "merged INT4"]
    bits = [row["bits_per_weight"] for row in rows]
    assert bits == [32, 5.5, bits[2], 5.5] and bits[2] > 5.5
    scores = [[row[name] for name in ("exact_match", "multiple_choice", "perplexity")] for row in rows]
    assert scores[2] == scores[3] and len({score[2] for score in scores}) == 3, scores
    tokenizer, model = data.load_tokenizer(world / "weights"), llama.load_pretrained(world / "weights")
    stream = data.token_stream(small.heldout, tokenizer)
    assert scores[0][2] == evals.perplexity(model, stream, 64, "", 64)


# ---- several processes

DRIVER = """
import json, os, pathlib, sys, torch
import train
collate, out = train.data.collate, sys.argv[sys.argv.index("--out") + 1]

def seen(examples):
    with open(pathlib.Path(out) / f"seen-{os.environ.get('RANK', 0)}.jsonl", "a") as f:
        f.write(json.dumps([e.tokens.tolist() for e in examples]) + chr(10))
    return collate(examples)

honest, load = train.accumulate_gradients, train.evals.load
def watched(network, *arguments):
    train.data.collate = seen
    try:
        return honest(network, *arguments)
    finally:
        train.data.collate = collate
        for name, buffer in network.named_buffers():
            assert "mark" not in name or buffer.item() == train.RANK, "one process's buffers were sent to another"
train.accumulate_gradients = watched

def marked(*arguments):
    model, tokenizer = load(*arguments)
    model.register_buffer("mark", torch.tensor([train.RANK]))
    return model, tokenizer
train.evals.load = marked

if os.environ.get("RANK") == "1":
    def refuse(path):
        raise AssertionError(f"process 1 writes {path}")
    train.written_whole = train.save_adapter.__globals__["written_whole"] = refuse
train.run_command(train.main)
"""


def seen_by(out, ranks, per_step):
    """For each step the sorted examples that all ranks together computed with."""
    lines = [[json.loads(line) for line in (out / f"seen-{r}.jsonl").read_text().splitlines()] for r in range(ranks)]
    together = [sum(micro, []) for micro in zip(*lines)]
    return [sorted(sum(together[i:i + per_step], [])) for i in range(0, len(together), per_step)]


@pytest.mark.parametrize("batch, micro", [(4, 1), (4, 2), (10, 3)])  # 6 times 10 is more than an epoch
def test_two_processes_train_as_one_does(world, tmp_path, batch, micro):
    (tmp_path / "driver.py").write_text(DRIVER)
    words = options(world, tmp_path / "two", batch_size=batch, micro_batch_size=micro)
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone",
                    tmp_path / "driver.py", *words], env=ENVIRONMENT, check=True, timeout=300, capture_output=True)
    (tmp_path / "one").mkdir()
    command(tmp_path / "driver.py", *options(world, tmp_path / "one", batch_size=batch))
    two, one = seen_by(tmp_path / "two", 2, -(-batch // 2 // micro)), seen_by(tmp_path / "one", 1, batch // 2)
    assert two == one and len(one) == 6 and all(len(examples) == batch for examples in one)
    close(metrics(tmp_path / "two"), metrics(tmp_path / "one"))
    a, b = (llama.open_file(tmp_path / n / "adapter" / "adapter.safetensors") for n in ("two", "one"))
    for name in a:
        torch.testing.assert_close(a[name].read(), b[name].read(), rtol=1e-2, atol=1e-4)


def fork_two(folder, words):
    """Starts one run in two processes, which log to log-0 and log-1; returns their ids."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [fork(folder / f"log-{rank}", words, rank=rank, processes=2, port=port) for rank in range(2)]


def test_a_signal_to_one_of_two_processes_stops_both_after_the_same_step(world, tmp_path):
    out = tmp_path / "run"
    pids = fork_two(tmp_path, options(world, out, steps=100_000, save_every=100_000))
    wait_for(lambda: (out / "metrics.jsonl").exists() and len(metrics(out)) > 2, pids[0])
    os.kill(pids[1], signal.SIGTERM)
    assert [wait(pid) for pid in pids] == [1, 1], [(tmp_path / f"log-{rank}").read_text() for rank in range(2)]
    assert train.newest_checkpoint(out).name == f"step-{len(metrics(out))}"
    assert "go on with" in (tmp_path / "log-0").read_text() and "go on with" not in (tmp_path / "log-1").read_text()


@pytest.mark.parametrize("killed", [0, 1])
def test_the_death_of_one_of_two_processes_is_one_line_in_the_other(world, tmp_path, killed):
    out = tmp_path / "run"
    pids = fork_two(tmp_path, options(world, out, steps=100_000))
    wait_for(lambda: (out / "metrics.jsonl").exists() and len(metrics(out)) > 2, pids[0])
    os.kill(pids[killed], signal.SIGKILL)
    assert wait(pids[killed]) == -signal.SIGKILL and wait(pids[1 - killed]) == 2
    text = (tmp_path / f"log-{1 - killed}").read_text()
    assert "Traceback" not in text and text.count("error: ") == 1 and f"--resume --out {out}" in text, text
    steps = int(train.newest_checkpoint(out).name[5:]) + 2
    run(tmp_path / "log", ["--resume", "--out", str(out), "--steps", str(steps)])


def test_each_process_takes_its_gpu_before_any_is_computed_on(world, tmp_path, monkeypatch):
    for name, value in dict(is_available=lambda: True, device_count=lambda: 2, set_device=lambda gpu: taken.append(gpu)).items():
        monkeypatch.setattr(torch.cuda, name, value)
    for rank, said, expected in ((1, "--device cuda cannot be used here", [1]), (2, "process 2 has no GPU: there are 2", [])):
        taken = []
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        assert said in refusal(monkeypatch, *options(world, tmp_path / "run", device="cuda"))
        assert taken == expected


def test_a_batch_that_the_processes_cannot_share_is_refused(world, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert "--batch-size 4 cannot be shared by 3 processes" in refusal(monkeypatch, *options(world, tmp_path / "run"))


# ---- mistakes, before the first slow stage

def test_without_weights_it_is_said_where_they_are_to_be_had(tmp_path):
    _, message = command("train.py", "--model", "7b", status=2, cwd=tmp_path)
    assert "weights/7b" in message and "huggingface.co/meta-llama" in message
    assert "python train.py --model 7b --weights FOLDER" in message and 2 < message.count("\n") < 8
    assert message.splitlines()[-1].startswith("error: ") and not list(tmp_path.iterdir())


def test_a_size_that_contradicts_the_files_shows_both(world, tmp_path, monkeypatch):
    message = refusal(monkeypatch, *options(world, tmp_path / "run", model="7b"))
    assert "--model 7b has hidden_size 4096" in message and f"{world / 'weights'} has 64" in message


@pytest.mark.parametrize("changed, expected", [
    (dict(bits=5), "--bits"), (dict(model="8b"), "unknown --model 8b"), (dict(targets="q_proj,w_proj"), "'w_proj'"),
    (dict(lr="nan"), "--lr"), (dict(steps=0), "--steps"), (dict(seed=2 ** 70), "--seed"),
    (dict(data="missing.json"), "missing.json: there is no such file"), (dict(data=None), "--data FILE is missing"),
    (dict(device="cuda:99"), "--device cuda:99"), (dict(device="meta"), "--device meta"),
    (dict(max_length=257), "--max-length 257 is more than the model's context of 256 tokens"),
    (dict(group_size=7), "model.layers.0.self_attn.q_proj"),
    (dict(tokenizer="none.model"), "none.model does not exist"), (dict(max_length=4), "raise --max-length"),
    (dict(weights="nowhere"), "there are no weights in nowhere"),
    (dict(weights="no.gguf"), "--weights no.gguf: there is no such file"),
    (dict(weights="NO.GGUF"), "--weights NO.GGUF: there is no such file")])
def test_a_wrong_option_is_refused_and_leaves_nothing(world, tmp_path, monkeypatch, changed, expected):
    assert expected in refusal(monkeypatch, *options(world, tmp_path / "run", **changed))
    assert not (tmp_path / "run" / "base").exists() and not (tmp_path / "run" / "run.json").exists()


@pytest.mark.parametrize("option", ["data", "calibration"])
def test_a_bad_record_is_found_before_anything_is_quantized(world, tmp_path, monkeypatch, option):
    (tmp_path / "bad.jsonl").write_text('{"instruction": "a", "output": "b"}\n{"instruction": "a", "output": 7}\n')
    bad = {option: tmp_path / "bad.jsonl"}
    message = refusal(monkeypatch, *options(world, tmp_path / "run", quantizer="gptq", **bad))
    assert "bad.jsonl, line 2" in message and not (tmp_path / "run" / "base").exists()


def test_an_out_that_cannot_be_written_is_refused(world, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    assert "cannot be written" in refusal(monkeypatch, *options(world, tmp_path / "file" / "run"))


def test_a_disk_without_room_is_refused_before_anything_is_written(world, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10 ** 9, 10 ** 9, 10_000))
    message = refusal(monkeypatch, *options(world, tmp_path / "run"))
    assert "GB free" in message and "more room" in message and not (tmp_path / "run" / "base").exists()


def test_a_new_base_needs_room_beside_the_old_one(world, whole, tmp_path, monkeypatch):
    shutil.copytree(whole, tmp_path / "run")
    half = (tmp_path / "run" / "base" / "model.safetensors").stat().st_size // 2
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10 ** 9, 10 ** 9 - half, half))
    assert "is already made" in run(tmp_path / "log", options(world, tmp_path / "run"))
    assert "more room" in refusal(monkeypatch, *options(world, tmp_path / "run", bits=3))
    assert merge.load_model(tmp_path / "run"), "what was there is gone"


@pytest.mark.parametrize("how, dtype", [
    (dict(method="qlora", quantizer=None, rank=16), torch.float32), (dict(rank=32), torch.float32),
    (dict(method="lora", quantizer=None, rank=16), torch.float32), (dict(rank=32, targets="q_proj,v_proj"), torch.float32),
    (dict(method="lora", quantizer=None, rank=16), torch.bfloat16)])
def test_a_run_needs_the_room_that_its_base_and_its_checkpoints_take(world, tmp_path, monkeypatch, how, dtype):
    save_random(tmp_path / "weights", config=dataclasses.replace(CONFIG, num_hidden_layers=8), dtype=dtype)
    shutil.copy(world / "weights" / "tokenizer.model", tmp_path / "weights")
    words = dict(weights=tmp_path / "weights", steps=1, **how)
    run(tmp_path / "log", options(world, tmp_path / "run", **words))
    base, checkpoint = ((tmp_path / "run" / name).stat().st_size for name in ("base/model.safetensors", "step-1/optimizer.pt"))
    need = base + 2 * 1.5 * checkpoint  # two checkpoints, which hold the adapter beside its two moments
    for room, enough in ((0.9 * need, False), (1.1 * need, True)):
        monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10 ** 9, 0, int(room)))
        if enough:
            run(tmp_path / "log", options(world, tmp_path / "again", **words))
        else:
            assert "more room" in refusal(monkeypatch, *options(world, tmp_path / "again", **words))


def test_a_tokenizer_larger_than_the_embedding_is_refused_by_name(world, tmp_path, monkeypatch):
    save_random(tmp_path / "weights", config=dataclasses.replace(CONFIG, vocab_size=500))
    message = refusal(monkeypatch, *options(world, tmp_path / "run", weights=tmp_path / "weights",
                                            tokenizer=world / "weights" / "tokenizer.model"))
    assert all(part in message for part in (f"{world}/weights/tokenizer.model has 512 pieces", f"{tmp_path}/weights",
                                            "model.embed_tokens.weight", "500", "--tokenizer"))


def test_paging_where_there_is_nothing_to_page_says_so(world, whole, tmp_path):
    text = run(tmp_path / "log", options(world, tmp_path / "run", paged_optimizer=1, device="cpu"))
    assert "--paged-optimizer: on --device cpu there is nothing to page" in text
    assert adapter(tmp_path / "run") == adapter(whole)


def test_running_out_of_memory_says_what_to_lower(world, whole, tmp_path):
    code = "import train; print(open('/proc/self/status').read().split('VmData:')[1].split()[0])"
    imported = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, check=True).stdout
    limit = int(imported) * 1024 + 200 * 2 ** 20
    _, text = command("train.py", *options(world, tmp_path / "run", rank=100_000), status=2,
                      preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit, limit)))
    assert "\nerror: out of memory; lower --micro-batch-size" in text and text.count("error") == 1, text


def test_a_plot_without_matplotlib_is_refused_at_once(world, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install matplotlib" in refusal(monkeypatch, *options(world, tmp_path / "run"), "--plot")
    assert not (tmp_path / "run" / "base").exists()


def test_the_loss_curve_is_drawn(world, tmp_path):
    pytest.importorskip("matplotlib", reason="needs matplotlib: pip install matplotlib")
    run(tmp_path / "log", [*options(world, tmp_path / "run"), "--plot"])
    assert (tmp_path / "run" / "loss.png").read_bytes().startswith(b"\x89PNG")
