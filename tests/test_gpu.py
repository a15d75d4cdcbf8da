"""What holds on a GPU too: the commands as users type them, each in a process of its own that sees
the GPU.

    python -m pytest tests/test_gpu.py
"""

import importlib.util
import pathlib
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import GIVEN
from helpers_runs import adapter, close, metrics, options, save_random

import train

ROOT = pathlib.Path(train.__file__).parent
VISIBLE = {**GIVEN, "PYTHONPATH": str(ROOT), "QALORA_TESTS_ON_GPU": "1"}
DEVICE = "cuda"


def python(*words, status=0):
    """Runs Python where the GPU is seen; returns what it printed on (stdout, stderr)."""
    done = subprocess.run(
        [sys.executable, *map(str, words)],
        env=VISIBLE,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == status, (done.returncode, done.stdout[-3000:], done.stderr[-3000:])
    return done.stdout, done.stderr


@pytest.fixture(scope="module", autouse=True)
def gpus():
    """How many there are. Asked of another process, as conftest.py hides them from this one."""
    count = (
        int(python("-c", "import torch; print(torch.cuda.device_count())")[0])
        if torch.version.cuda
        else 0
    )
    if not count:
        pytest.skip("needs a GPU")
    return count


@pytest.fixture(scope="module")
def folder(world):
    """`world` with weights in bfloat16 as well, which is what the Triton kernels are for."""
    save_random(world / "bfloat16", dtype=torch.bfloat16)
    shutil.copy(world / "weights" / "tokenizer.model", world / "bfloat16")
    return world


@pytest.fixture(scope="module")
def whole(folder):
    """A run over bfloat16 weights with GPTQ."""
    out = folder / "on-the-gpu"
    printed, _ = python(
        "train.py",
        *options(folder, out, weights=folder / "bfloat16", quantizer="gptq", device=DEVICE),
    )
    assert "bit identical: True" in printed, printed
    return out


def test_the_triton_kernels_keep_their_promises_without_the_interpreter():
    printed, _ = python(
        "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_kernels_triton.py"
    )
    assert "passed" in printed and "skipped" not in printed, printed


def test_float32_training_has_the_losses_of_the_cpu(folder, tmp_path):
    for device in ("cpu", DEVICE):
        python("train.py", *options(folder, tmp_path / device, device=device))
    close(metrics(tmp_path / "cpu"), metrics(tmp_path / DEVICE))


def test_bfloat16_training_learns_and_goes_on_after_an_interruption(folder, whole):
    losses = [loss for (loss,) in metrics(whole, "loss")]
    assert len(losses) == 6 and losses[-1] < losses[0], losses
    before = adapter(whole)
    python("train.py", "--resume", "--out", whole, "--steps", 8)
    assert len(metrics(whole)) == 8 and adapter(whole) != before


def test_what_was_trained_is_merged_judged_and_sampled(whole, tmp_path):
    merged = tmp_path / "merged"
    python("merge.py", whole, "--out", merged)
    (tmp_path / "text.txt").write_text("Say how many letters town has, 3 times. " * 9)
    judged, texts = [], []
    for model in (whole, merged):
        judged.append(
            python("evals.py", model, "--perplexity", tmp_path / "text.txt", "--device", DEVICE)[0]
        )
        texts.append(
            python(
                "sample.py",
                model,
                "--prompt",
                "Say how",
                "--max-new-tokens",
                24,
                "--device",
                DEVICE,
            )[0]
        )
    assert judged[0] == judged[1] and "perplexity" in judged[0]
    assert texts[0] == texts[1] and texts[0].startswith("Say how")


def test_float32_generation_has_the_text_of_the_cpu(folder):
    words = [
        "sample.py",
        folder / "weights",
        "--prompt",
        "Say how many letters",
        "--max-new-tokens",
        40,
        "--device",
    ]
    assert python(*words, DEVICE) == python(*words, "cpu")


def test_processes_with_a_gpu_each_train_as_one_does(folder, gpus, tmp_path):
    # with one GPU: NCCL with itself
    words = options(folder, tmp_path / "many", batch_size=4 * gpus, device=DEVICE)
    python(
        "-m",
        "torch.distributed.run",
        f"--nproc_per_node={gpus}",
        "--standalone",
        "train.py",
        *words,
    )
    python("train.py", *options(folder, tmp_path / "one", batch_size=4 * gpus, device=DEVICE))
    close(metrics(tmp_path / "many"), metrics(tmp_path / "one"))


def test_out_of_memory_on_the_gpu_says_what_to_lower(folder, tmp_path):
    little = (
        "import runpy, sys, torch; torch.cuda.set_per_process_memory_fraction(2e-4); "
        "sys.argv[0] = 'train.py'; runpy.run_path('train.py', run_name='__main__')"
    )
    _, text = python(
        "-c", little, *options(folder, tmp_path / "run", rank=100_000, device=DEVICE), status=2
    )
    assert (
        "\nerror: out of memory; lower --micro-batch-size" in text and text.count("error") == 1
    ), text


PAGED_AGAIN = """
import torch, train
from cli import runs
p = torch.nn.Parameter(torch.ones(1000, 200, device="cuda"))
p.grad = torch.ones_like(p)
before, after = (runs.adamw([p], lr=0.1, paged=True) for _ in range(2))
before.step()
after.load_state_dict(before.state_dict())
runs.page_again(after)
moments = [(after.state[p][name], before.state[p][name]) for name in ("state1", "state2")]
print([a.is_paged and b.is_paged and torch.equal(a.cpu(), b.cpu()) for a, b in moments])
"""


def test_a_paged_optimizer_trains_as_the_other_does_or_says_what_it_needs(folder, tmp_path):
    words = dict(device=DEVICE, paged_optimizer=1)
    if not importlib.util.find_spec("bitsandbytes"):
        _, text = python("train.py", *options(folder, tmp_path / "paged", **words), status=2)
        assert "pip install bitsandbytes" in text and text.count("error") == 1, text
        return
    assert "[True, True]" in python("-c", PAGED_AGAIN)[0]
    python("train.py", *options(folder, tmp_path / "paged", steps=4, **words))
    python("train.py", "--resume", "--out", tmp_path / "paged", "--steps", 6)
    python("train.py", *options(folder, tmp_path / "plain", device=DEVICE))
    close(metrics(tmp_path / "paged"), metrics(tmp_path / "plain"))
