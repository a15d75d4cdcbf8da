"""A run is a model: merged by the command, loaded from every kind of folder, or refused in one
line."""

import hashlib
import json
import pathlib
import shutil
import subprocess
import sys

import pytest
import torch
from helpers import contents, same
from helpers_merge import SMALL, quantized_llama, tokens, trained

import merge
from cli.errors import run_command
from formats import fingerprint, load_model
from formats.adapter import save_adapter
from formats.huggingface import save_pretrained
from formats.quantized import load_quantized, save_quantized
from llama import Llama, load_pretrained
from qalora import add_adapters
from quant import QuantLinear, quantize_model
from text.tokenizer import train_tokenizer

ROOT = pathlib.Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    """(folder, adapted model): the parts of a run that merging reads."""
    run = tmp_path_factory.mktemp("runs") / "small"
    base = quantized_llama()
    save_quantized(base, run / "base")
    train_tokenizer(["merging keeps every bit"], run / "base" / "tokenizer.model", 275)
    adapted = trained(add_adapters(base, 4, 16))
    spelling = hashlib.sha256((run / "base" / "tokenizer.model").read_bytes()).hexdigest()
    (run / "base" / "made_from.json").write_text(json.dumps({"tokenizer": spelling}))
    save_adapter(adapted, run / "adapter", base=fingerprint(run / "base"))
    (run / "run.json").write_text("{}")
    return run, adapted


@pytest.fixture
def run(finished_run, tmp_path):
    """A copy of the run, to be damaged."""
    return pathlib.Path(shutil.copytree(finished_run[0], tmp_path / "run"))


def command(monkeypatch, capsys, *arguments):
    """(exit status, stdout, stderr) of merge.py."""
    monkeypatch.setattr(sys, "argv", ["merge.py", *map(str, arguments)])
    try:
        status = run_command(merge.main) or 0
    except SystemExit as stop:
        status = stop.code
    return status, *capsys.readouterr()


def test_the_command_writes_a_plain_model_folder_with_the_same_bits(
    finished_run, tmp_path, monkeypatch, capsys
):
    run, adapted = finished_run
    before = contents(run)
    status, said, _ = command(monkeypatch, capsys, run, "--out", tmp_path / "deep" / "merged")
    assert status == 0 and said == f"merged {run} into {tmp_path / 'deep' / 'merged'}\n"
    assert contents(run) == before
    assert sorted(str(p) for p in contents(tmp_path / "deep")) == [
        "merged/config.json",
        "merged/model.safetensors",
        "merged/tokenizer.model",
    ]
    batch = tokens(99, 3, 20)
    for model in (
        load_model(tmp_path / "deep" / "merged"),
        load_quantized(tmp_path / "deep" / "merged"),
        load_model(run),
    ):
        assert same([model(batch)], [adapted(batch)])
        assert (
            sum(isinstance(m, QuantLinear) for m in model.modules()) == 7 * SMALL.num_hidden_layers
        )


def test_a_model_is_loaded_from_every_kind_of_folder(finished_run, tmp_path):
    batch, float_model = tokens(99, 3, 20), Llama(SMALL)
    save_pretrained(float_model, tmp_path)
    assert same([load_model(tmp_path)(batch)], [float_model(batch)])
    assert same([load_model(finished_run[0] / "base")(batch)], [quantized_llama()(batch)])
    half = load_model(finished_run[0], dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


def test_a_lora_run_is_merged_into_a_float_model(tmp_path, monkeypatch, capsys):
    run, model = tmp_path / "run", Llama(SMALL)
    save_pretrained(model, run / "base")
    train_tokenizer(["merging keeps every bit"], run / "base" / "tokenizer.model", 275)
    (run / "run.json").write_text("{}")
    save_adapter(
        trained(add_adapters(model, 4, 16)), run / "adapter", base=fingerprint(run / "base")
    )
    assert command(monkeypatch, capsys, run, "--out", tmp_path / "merged")[0] == 0
    batch = tokens(99, 3, 20)
    assert same([load_pretrained(tmp_path / "merged")(batch)], [merge.merge(model)(batch)])


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def a_folder_in_the_way(run):
    (run.parent / "out").mkdir()
    (run.parent / "out" / "mine").touch()


def another_tokenizer(run):
    train_tokenizer(["another text entirely"], run / "base" / "tokenizer.model", 272)


def another_base(run):
    shutil.rmtree(run / "base")
    save_quantized(quantize_model(Llama(SMALL), 3, 8), run / "base")


def the_weights_of_another_base(run):
    save_quantized(quantized_llama(seed=7), run.parent / "other")
    shutil.copy(run.parent / "other" / "model.safetensors", run / "base")


def test_what_other_programs_leave_in_a_base_does_not_make_it_another(run):
    before = fingerprint(run / "base")
    (run / "base" / "._model.safetensors").write_bytes(b"left by a file manager")
    (run / "base" / "README.md").write_text("mine")
    (run / "base" / "old.bin").mkdir()
    assert fingerprint(run / "base") == before


@pytest.mark.parametrize(
    "damage, says",
    [
        (lambda run: (run / "run.json").unlink(), "no run of train.py"),
        (lambda run: shutil.rmtree(run), "no run of train.py"),
        (lambda run: shutil.rmtree(run / "adapter"), "no finished adapter"),
        (
            lambda run: shutil.rmtree(run / "base"),
            "base, the model that the adapter was trained over, is missing",
        ),
        (another_base, "trained over the base"),
        (the_weights_of_another_base, "trained over the base"),
        (lambda run: (run / "base" / "model.safetensors").unlink(), "base/model.safetensors"),
        (lambda run: cut(run / "base" / "model.safetensors"), "base/model.safetensors"),
        (lambda run: (run / "base" / "config.json").unlink(), "is missing or has no config.json"),
        (lambda run: (run / "base" / "config.json").write_text("[]"), "base/config.json"),
        (lambda run: (run / "base" / "tokenizer.model").unlink(), "base/tokenizer.model"),
        (lambda run: cut(run / "base" / "tokenizer.model"), "base/tokenizer.model"),
        (another_tokenizer, "is not the one that the run was trained with"),
        (lambda run: cut(run / "adapter" / "adapter.safetensors"), "adapter/adapter.safetensors"),
        (
            lambda run: (run / "adapter" / "adapter.safetensors").unlink(),
            "adapter/adapter.safetensors",
        ),
        (lambda run: (run / "adapter" / "adapter.json").unlink(), "adapter/adapter.json"),
        (lambda run: (run / "adapter" / "adapter.json").write_text("{"), "adapter/adapter.json"),
        (
            lambda run: (run / "adapter" / "adapter.json").write_text(
                (run / "adapter" / "adapter.json").read_text().replace('"base"', '"basis"')
            ),
            "trained over the base",
        ),
        (lambda run: (run.parent / "out").write_text("mine"), "out exists"),
        (a_folder_in_the_way, "out exists"),
    ],
)
def test_what_cannot_be_merged_ends_in_one_line_and_leaves_nothing(
    run, monkeypatch, capsys, damage, says
):
    damage(run)
    before, _ = contents(run.parent), capsys.readouterr()  # damaging has a progress bar
    status, said, error = command(monkeypatch, capsys, run, "--out", run.parent / "out")
    assert status == 2 and not said
    assert error.startswith("error: ") and error.count("\n") == 1 and says in error, error
    assert contents(run.parent) == before


@pytest.mark.parametrize(
    "arguments",
    [[], ["run"], ["--out", "x"], ["run", "--out"], ["run", "--out", "x", "--bits", "3"]],
)
def test_wrong_options_end_in_one_line(monkeypatch, capsys, arguments):
    status, said, error = command(monkeypatch, capsys, *arguments)
    assert (
        status == 2
        and not said
        and error.startswith("error: ")
        and error.count("\n") == 1
        and "merge.py --help" in error
    )


def test_the_command_line_refuses_a_model_without_adapters(tmp_path):
    save_quantized(quantized_llama(), tmp_path / "plain")
    ended = subprocess.run(
        [sys.executable, ROOT / "merge.py", tmp_path / "plain", "--out", tmp_path / "out"],
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 2 and not ended.stdout and not (tmp_path / "out").exists()
    assert (
        ended.stderr.startswith("error: ")
        and ended.stderr.count("\n") == 1
        and "no adapter" in ended.stderr
    )
