"""What merge.py promises: a merged model is a plain quantized model that returns the adapted model's bits, always.

No tolerance anywhere in this file: `torch.equal` is the claim.
"""

import copy
import hashlib
import json
import pathlib
import shutil
import subprocess
import sys

import pytest
import torch
from hypothesis import given, strategies as st
from torch.nn import functional as F

import merge
from cli import UserError, run_command
from data import train_tokenizer
from llama import LINEARS, Cache, Llama, LlamaConfig, load_pretrained, save_pretrained
from qalora import LoRALinear, QALoRALinear, adapter_parameters, add_adapters, save_adapter
from quant import Quantized, QuantLinear, load_quantized, quantize_model, save_quantized

ROOT = pathlib.Path(__file__).resolve().parent.parent
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SEEDS = st.integers(0, 2 ** 32 - 1)
SMALL = LlamaConfig(vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                    num_key_value_heads=2, max_position_embeddings=64)


def tokens(seed, *shape):
    return torch.randint(40, shape, generator=torch.Generator().manual_seed(seed))


def quantized_llama(bits=3, group_size=8, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return quantize_model(Llama(SMALL), bits, group_size).to(dtype)


def trained(model, steps=3):
    """`model` after some steps of AdamW on random tokens."""
    optimizer = torch.optim.AdamW(adapter_parameters(model).values(), lr=0.02)
    for step in range(steps):
        batch = tokens(step, 4, 12)
        F.cross_entropy(model(batch[:, :-1]).float().flatten(0, 1), batch[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def same(a, b):
    return all(torch.equal(x, y) and x.dtype == y.dtype for x, y in zip(a, b, strict=True))


# ------------------------------------------------------------------------------------------------ one layer

@given(st.sampled_from(DTYPES), st.sampled_from([2, 3, 4]), st.integers(1, 5), st.integers(1, 4), st.integers(1, 40),
       st.integers(1, 5), SEEDS, st.sampled_from([1e-6, 1, 1e4]), st.lists(st.integers(1, 5), max_size=2),
       st.booleans())
def test_a_merged_layer_returns_the_adapted_layers_bits(dtype, bits, rows, groups, group_size, rank, seed, size, lead,
                                                        autocast):
    """Whatever the adapter holds, however small or large; under autocast too."""
    torch.manual_seed(seed)
    quantized = Quantized(torch.randint(2 ** bits, (rows, groups * group_size), dtype=torch.uint8),
                          torch.rand(rows, groups).half(), torch.randn(rows, groups))
    layer = QALoRALinear(QuantLinear.from_quantized(quantized, bits), rank, alpha=7)  # 7 / rank is seldom exact
    layer.lora_A.data, layer.lora_B.data = size * torch.randn(rank, groups), torch.randn(rows, rank)
    x = torch.randn(*lead, groups * group_size).to(dtype)
    before = copy.deepcopy(layer)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        adapted = layer(x)
        plain = merge.merge(layer)
        bits_of = lambda y: y.detach().view(torch.uint8)  # float16 ends at 65504: NaN, beyond, is no equal of NaN
        assert type(plain) is QuantLinear and same([bits_of(plain(x))], [bits_of(adapted)])
    assert adapted.isfinite().all() or dtype == torch.float16
    assert same([plain.packed, plain.scale, plain.offset],
                [before.base.packed, before.base.scale, before.effective_offset()])
    assert not plain.offset.requires_grad


# ------------------------------------------------------------------------------------------------ a whole model

@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits, group_size, targets", [(4, 16, LINEARS), (3, 8, LINEARS), (2, 1, LINEARS),
                                                       (4, 8, ("q_proj", "down_proj"))])
def test_a_merged_model_returns_the_adapted_models_bits_after_real_training(dtype, bits, group_size, targets):
    base = quantized_llama(bits, group_size, dtype)
    adapted = trained(add_adapters(copy.deepcopy(base), 4, 16, targets))
    merged = merge.merge(copy.deepcopy(adapted))
    batch = tokens(99, 3, 20)
    assert same([merged(batch)], [adapted(batch)])
    assert not torch.equal(merged(batch), base(batch)), "training changed nothing: this would prove nothing"
    with torch.inference_mode():
        assert same([merged(batch[:1, :1])], [adapted(batch[:1, :1])])
        for model in (adapted, merged):
            model.cache = Cache(SMALL, 3, 20, dtype, "cpu")
            model(batch[:, :7], model.cache)
        assert same([merged(batch[:, 7:8], merged.cache)], [adapted(batch[:, 7:8], adapted.cache)])

    before, after = base.state_dict(), merged.state_dict()
    assert list(after) == list(before)
    for name in after:  # in the layers that had adapters, offsets moved; all else stayed
        moved = name.endswith(".offset") and name.split(".")[-2] in targets
        assert same([after[name]], [before[name]]) != moved and after[name].shape == before[name].shape, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lora_merges_into_plain_float_layers(dtype):
    """The baseline's merge adds to the weights; its outputs are equal up to rounding only, and its dtype stays."""
    torch.manual_seed(0)
    base = Llama(SMALL).to(dtype)
    adapted = trained(add_adapters(copy.deepcopy(base), 4, 16))
    merged = merge.merge(copy.deepcopy(adapted))
    assert not any(isinstance(m, LoRALinear) for m in merged.modules())
    described = lambda model: [(name, p.dtype, p.shape) for name, p in model.named_parameters()]
    assert described(merged) == described(base)
    batch = tokens(99, 3, 20)
    change, error = (adapted(batch) - base(batch)).norm(), (merged(batch) - adapted(batch)).norm()
    assert error < change * (1e-4 if dtype == torch.float32 else 0.2), (error, change)


def test_merging_without_adapters_is_an_error():
    merged = merge.merge(add_adapters(quantized_llama(), 2, 16))
    for module in (quantized_llama(), Llama(SMALL), torch.nn.Linear(2, 2), merged):  # merging twice, too
        with pytest.raises(UserError, match="no adapter"):
            merge.merge(module)


# ------------------------------------------------------------------------------------------------ folders

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
    save_adapter(adapted, run / "adapter", base=merge.fingerprint(run / "base"))
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


def contents(folder):
    return {p.relative_to(folder): hashlib.sha256(p.read_bytes()).digest() for p in folder.rglob("*") if p.is_file()}


def test_the_command_writes_a_plain_model_folder_with_the_same_bits(finished_run, tmp_path, monkeypatch, capsys):
    run, adapted = finished_run
    before = contents(run)
    status, said, _ = command(monkeypatch, capsys, run, "--out", tmp_path / "deep" / "merged")
    assert status == 0 and said == f"merged {run} into {tmp_path / 'deep' / 'merged'}\n"
    assert contents(run) == before
    assert sorted(str(p) for p in contents(tmp_path / "deep")) == \
        ["merged/config.json", "merged/model.safetensors", "merged/tokenizer.model"]
    batch = tokens(99, 3, 20)
    for model in (merge.load_model(tmp_path / "deep" / "merged"), load_quantized(tmp_path / "deep" / "merged"),
                  merge.load_model(run)):
        assert same([model(batch)], [adapted(batch)])
        assert sum(isinstance(m, QuantLinear) for m in model.modules()) == 7 * SMALL.num_hidden_layers


def test_a_model_is_loaded_from_every_kind_of_folder(finished_run, tmp_path):
    batch, float_model = tokens(99, 3, 20), Llama(SMALL)
    save_pretrained(float_model, tmp_path)
    assert same([merge.load_model(tmp_path)(batch)], [float_model(batch)])
    assert same([merge.load_model(finished_run[0] / "base")(batch)], [quantized_llama()(batch)])
    half = merge.load_model(finished_run[0], dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


def test_a_lora_run_is_merged_into_a_float_model(tmp_path, monkeypatch, capsys):
    run, model = tmp_path / "run", Llama(SMALL)
    save_pretrained(model, run / "base")
    train_tokenizer(["merging keeps every bit"], run / "base" / "tokenizer.model", 275)
    (run / "run.json").write_text("{}")
    save_adapter(trained(add_adapters(model, 4, 16)), run / "adapter", base=merge.fingerprint(run / "base"))
    assert command(monkeypatch, capsys, run, "--out", tmp_path / "merged")[0] == 0
    batch = tokens(99, 3, 20)
    assert same([load_pretrained(tmp_path / "merged")(batch)], [merge.merge(model)(batch)])


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def another_tokenizer(run):
    train_tokenizer(["another text entirely"], run / "base" / "tokenizer.model", 272)


def another_base(run):
    shutil.rmtree(run / "base")
    save_quantized(quantize_model(Llama(SMALL), 3, 8), run / "base")


def the_weights_of_another_base(run):
    save_quantized(quantized_llama(seed=7), run.parent / "other")
    shutil.copy(run.parent / "other" / "model.safetensors", run / "base")


def test_what_other_programs_leave_in_a_base_does_not_make_it_another(run):
    before = merge.fingerprint(run / "base")
    (run / "base" / "._model.safetensors").write_bytes(b"left by a file manager")
    (run / "base" / "README.md").write_text("mine")
    (run / "base" / "old.bin").mkdir()
    assert merge.fingerprint(run / "base") == before


@pytest.mark.parametrize("damage, says", [
    (lambda run: (run / "run.json").unlink(), "no run of train.py"),
    (lambda run: shutil.rmtree(run), "no run of train.py"),
    (lambda run: shutil.rmtree(run / "adapter"), "no finished adapter"),
    (lambda run: shutil.rmtree(run / "base"), "base, the model that the adapter was trained over, is missing"),
    (another_base, "trained over the base"),
    (the_weights_of_another_base, "trained over the base"),
    (lambda run: (run / "base" / "model.safetensors").unlink(), "base/model.safetensors"),
    (lambda run: cut(run / "base" / "model.safetensors"), "base/model.safetensors"),
    (lambda run: (run / "base" / "config.json").unlink(), "base"),
    (lambda run: (run / "base" / "config.json").write_text("[]"), "base/config.json"),
    (lambda run: (run / "base" / "tokenizer.model").unlink(), "base/tokenizer.model"),
    (lambda run: cut(run / "base" / "tokenizer.model"), "base/tokenizer.model"),
    (another_tokenizer, "base/tokenizer.model is not the one"),
    (lambda run: cut(run / "adapter" / "adapter.safetensors"), "adapter/adapter.safetensors"),
    (lambda run: (run / "adapter" / "adapter.safetensors").unlink(), "adapter/adapter.safetensors"),
    (lambda run: (run / "adapter" / "adapter.json").unlink(), "adapter/adapter.json"),
    (lambda run: (run / "adapter" / "adapter.json").write_text("{"), "adapter/adapter.json"),
    (lambda run: (run / "adapter" / "adapter.json").write_text(
        (run / "adapter" / "adapter.json").read_text().replace('"base"', '"basis"')), "trained over the base"),
    (lambda run: (run.parent / "out").write_text("mine"), "out exists"),
    (lambda run: ((run.parent / "out").mkdir(), (run.parent / "out" / "mine").touch()), "out exists"),
])
def test_what_cannot_be_merged_ends_in_one_line_and_leaves_nothing(run, monkeypatch, capsys, damage, says):
    damage(run)
    before, _ = contents(run.parent), capsys.readouterr()  # damaging has a progress bar
    status, said, error = command(monkeypatch, capsys, run, "--out", run.parent / "out")
    assert status == 2 and not said
    assert error.startswith("error: ") and error.count("\n") == 1 and says in error, error
    assert contents(run.parent) == before


@pytest.mark.parametrize("arguments", [[], ["run"], ["--out", "x"], ["run", "--out"],
                                       ["run", "--out", "x", "--bits", "3"]])
def test_wrong_options_end_in_one_line(monkeypatch, capsys, arguments):
    status, said, error = command(monkeypatch, capsys, *arguments)
    assert status == 2 and not said and error.startswith("error: ") and error.count("\n") == 1 and "merge.py --help" in error


def test_the_command_line_refuses_a_model_without_adapters(tmp_path):
    save_quantized(quantized_llama(), tmp_path / "plain")
    ended = subprocess.run([sys.executable, ROOT / "merge.py", tmp_path / "plain", "--out", tmp_path / "out"],
                           capture_output=True, text=True)
    assert ended.returncode == 2 and not ended.stdout and not (tmp_path / "out").exists()
    assert ended.stderr.startswith("error: ") and ended.stderr.count("\n") == 1 and "no adapter" in ended.stderr
