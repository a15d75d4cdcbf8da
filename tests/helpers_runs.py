"""Small runs of train.py, and what they leave.

The command line runs as a user runs it in the tests of the whole way. Elsewhere it runs as a forked
copy of this process, which is the same but for three seconds of importing, and which can be told to
fail at a chosen moment.
"""

import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch

# PyTorch's optimizers import it when first used: a forked copy need not spend those seconds
import torch._dynamo
from tqdm import tqdm

import llama
import train
from cli import machine
from cli.errors import UserError, run_command
from cli.settings import Settings, recipe
from formats.huggingface import save_pretrained

ROOT = pathlib.Path(train.__file__).parent


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


CONFIG = llama.LlamaConfig(
    vocab_size=512,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
)


NOUNS = [
    "town",
    "river",
    "house",
    "garden",
    "baker",
    "miner",
    "singer",
    "cook",
    "horse",
    "apple",
    "bread",
    "stone",
    "window",
    "letter",
    "winter",
    "summer",
]


RECORDS = []
for word in NOUNS:
    for times in (1, 2, 3):
        asked = f"Say how many letters {word} has, {times} times."
        RECORDS.append({"instruction": asked, "output": f"{len(word)} " * times})


def save_random(folder, seed=0, config=CONFIG, dtype=torch.float32):
    """A folder with a random model, by default computed in float32 by every CPU; the tokenizer is
    the caller's."""
    torch.manual_seed(seed)
    folder.mkdir(parents=True, exist_ok=True)
    model = llama.Llama(config)
    for p in model.parameters():
        if p.dim() == 2:
            torch.nn.init.normal_(p, std=0.2)
    save_pretrained(model.to(dtype), folder)
    return folder


ENGLISH = pathlib.Path(__file__).read_text()  # any long text: 512 pieces need so many pairs


def options(world, out, **changed):
    """The words of a small command line."""
    words = (
        dict(
            weights=world / "weights",
            data=world / "records.json",
            out=out,
            quantizer="rtn",
            steps=6,
            batch_size=4,
            micro_batch_size=2,
            max_length=96,
            rank=4,
            lr=1e-3,
            save_every=2,
        )
        | changed
    )
    given = []
    for name, value in words.items():
        if value is not None:
            given += [f"--{name.replace('_', '-')}", str(value)]
    return given


def command(script, *words, status=0, environment=None, **more):
    """Runs a script of this project as a user does; returns what it printed on (stdout, stderr).
    environment: variables to add."""
    done = subprocess.run(
        [sys.executable, ROOT / script, *map(str, words)],
        env={**ENVIRONMENT, **(environment or {})},
        capture_output=True,
        text=True,
        timeout=300,
        **more,
    )
    assert done.returncode == status, (done.returncode, done.stdout[-2000:], done.stderr[-2000:])
    return done.stdout, done.stderr


def fork(log, words, rank=0, processes=1, port=0, before=None):
    """Starts `python train.py WORDS` as a forked copy of this process; returns its id. Output goes
    to `log`."""
    pid = os.fork()
    if pid:
        return pid
    status = 70
    # A shell's background job inherits that SIGINT is ignored. tqdm's lock is shared by all forked
    # copies, and one that is killed never lets go
    signal.signal(signal.SIGINT, signal.default_int_handler)
    tqdm.set_lock(threading.RLock())
    try:
        sys.stdout = sys.stderr = pathlib.Path(log).open("w", buffering=1)  # noqa: SIM115
        if processes > 1:
            os.environ |= {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(processes),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
        machine.RANK, machine.WORLD = rank, processes
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
        assert time.monotonic() < end and os.waitpid(pid, os.WNOHANG) == (0, 0), (
            "it ended, or never came so far"
        )
        time.sleep(0.0005)


def metrics(out, *names):
    """The named values of every line of a run's metrics.jsonl."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [
        tuple(line.get(name) for name in names or ("step", "loss", "grad_norm")) for line in lines
    ]


def close(found, expected):
    """Asserts that two lists of metrics are equal but for the rounding of float32 sums."""
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-4, atol=1e-5)


def adapter(out):
    return (out / "adapter" / "adapter.safetensors").read_bytes()


def settings_of(**changed):
    """The settings of the tiny model with some changed."""
    return Settings(**recipe({"model": "tiny"}) | changed)


def refusal(monkeypatch, *words):
    """The message that a command line is refused with."""
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, words)])
    with pytest.raises(UserError) as e:
        train.main()
    return str(e.value)
