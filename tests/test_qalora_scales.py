"""QALoRALinear with scales: these learn too, and a merged layer still returns the same bits."""

import copy
import json
import math

import pytest
import torch
from helpers import (
    BITS,
    SEEDS,
    codes_of,
    integers,
    linears,
    quantized_llama,
    random_quantized,
    run_in_process,
    same,
)
from helpers_merge import SMALL, tokens, trained
from helpers_merge import quantized_llama as small_llama
from helpers_runs import options, run
from hypothesis import given, settings
from hypothesis import strategies as st

import export
import formats
from formats.adapter import load_adapter, save_adapter
from kernels import matmul
from llama import Llama
from merge import merge
from qalora import QALoRALinear, adapter_parameters, add_adapters
from quant import Quantized, QuantLinear, pack, unpack

DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
SHAPES = st.integers(1, 5), st.integers(1, 4), st.integers(1, 40)  # rows, groups, inputs of each


def integer_layer(seed, rows, groups, group_size, bits, rank):
    """Integers in the base and in both adapters, s = 1: float arithmetic is exact."""
    codes = integers(seed, 0, 2**bits - 1, rows, groups * group_size, dtype=torch.uint8)
    scale, offset = integers(seed + 1, -2, 3, rows, groups), integers(seed + 2, -4, 4, rows, groups)
    base = QuantLinear.from_quantized(Quantized(codes, scale.half(), offset), bits)
    layer = QALoRALinear(base, rank, rank, scales=True)
    for i, p in enumerate((layer.lora_A, layer.lora_B, layer.scale_A, layer.scale_B)):
        p.data = integers(seed + 3 + i, -2, 2, *p.shape)
    return layer


@given(BITS, *SHAPES, st.integers(1, 5), SEEDS)
def test_scales_move_by_a_low_rank_factor_and_offsets_as_without(
    bits, rows, groups, group_size, rank, seed
):
    """y = x @ (scale * (1 + s * B' A') * codes + offset + s * B A)^T, and all gradients; exact."""
    layer = integer_layer(seed, rows, groups, group_size, bits, rank)
    x, grad = integers(seed + 7, -2, 2, 3, groups * group_size), integers(seed + 8, -2, 2, 3, rows)
    names = ("lora_A", "lora_B", "scale_A", "scale_B")
    exact = [getattr(layer, name).detach().double().requires_grad_() for name in names]
    exact.append(x.double().requires_grad_())
    a, b, scale_a, scale_b, x_ = exact
    scale = layer.base.scale.double() * (1 + scale_b @ scale_a)
    offset = layer.base.offset.double() + b @ a
    codes = codes_of(layer.base).double()
    w = scale[..., None] * codes.view(rows, groups, -1) + offset[..., None]
    expected = x_ @ w.flatten(1).t()
    expected.backward(grad.double())
    x.requires_grad_()
    y = layer(x)
    y.backward(grad)
    assert torch.equal(layer.effective_scale().double(), scale)
    assert torch.equal(y.double(), expected)
    for ours, oracle in zip([getattr(layer, name) for name in names] + [x], exact, strict=True):
        assert torch.equal(ours.grad.double(), oracle.grad)


@given(
    BITS,
    *SHAPES,
    st.integers(1, 5),
    SEEDS,
    DTYPES,
    st.sampled_from([1e-6, 1e-3, 0.3]),
    st.booleans(),
)
def test_a_merged_layer_returns_the_adapted_layers_bits(
    bits, rows, groups, group_size, rank, seed, dtype, size, finer
):
    """Scales are rounded alike to what the base stores: float16, or float32 where it is finer."""
    base = QuantLinear.from_quantized(random_quantized(seed, rows, groups, group_size, bits), bits)
    if finer:
        base.scale = base.scale.float() * 1.0001
    stored, packed = base.scale.dtype, base.packed.clone()
    layer = QALoRALinear(base, rank, 7, scales=True)
    for p in (layer.lora_B, layer.scale_B):
        p.data = size * torch.randn(p.shape, generator=torch.Generator().manual_seed(seed))
    before = base.scale.clone()
    x = torch.randn(2, 3, groups * group_size, generator=torch.Generator().manual_seed(seed)).to(
        dtype
    )
    adapted, moved = layer(x), layer.effective_scale().detach()
    merged = merge(layer)
    assert torch.equal(merged(x), adapted)
    assert merged.scale.dtype == stored and torch.equal(merged.packed, packed)
    assert torch.equal(merged.scale.float(), moved.float()) and not merged.scale.requires_grad
    if size == 0.3 and not finer:
        assert not torch.equal(before, merged.scale) or not before.any()


@pytest.mark.parametrize("pieces", [1, 2, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_ranges_do_not_depend_on_the_pieces_they_are_computed_in(
    monkeypatch, dtype, pieces
):
    """Every row has codes of its own; sums of 32 products stay exact in bfloat16's 8 bits."""
    codes = integers(0, 0, 3, 10, 64, dtype=torch.uint8)
    x, grad = integers(1, -1, 1, 4, 64), integers(2, -1, 1, 4, 10)
    w_OGg = (grad.t() @ x).view(10, 2, 32)
    expected = [(w_OGg * codes.view(10, 2, 32)).sum(-1), w_OGg.sum(-1)]
    monkeypatch.setattr(matmul, "IN_CACHE", 64 * 10 // pieces)
    scale = torch.ones(10, 2).half()
    found = matmul.range_gradients(grad.to(dtype), x.to(dtype), pack(codes, 2), scale, 2, unpack)
    assert same(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_over_a_group_are_taken_in_float32(dtype):
    """300 inputs of weight gradient 1: bfloat16 counts to 256 only."""
    packed, scale = pack(torch.ones(1, 320, dtype=torch.uint8), 2), torch.ones(1, 1).half()
    x = torch.cat((torch.ones(1, 301), torch.zeros(1, 19)), 1).to(dtype)
    for found in matmul.range_gradients(torch.ones(1, 1, dtype=dtype), x, packed, scale, 2, unpack):
        assert found.dtype == torch.float32 and found.item() == 301


@pytest.mark.parametrize("use", ["compiler", "checkpointing"])
def test_compiled_and_recomputed_scales_learn_to_the_same_bits(monkeypatch, use):
    results = []
    for on in (False, True):
        model = trained(add_adapters(small_llama(2, 8), 2, 16, scales=True))
        monkeypatch.setattr(matmul, "USE_COMPILER", use == "compiler" and on)
        model.model.checkpointing = use == "checkpointing" and on
        for p in adapter_parameters(model).values():
            p.grad = None
        model(tokens(3, 2, 8)).square().sum().backward()
        results.append([p.grad for p in adapter_parameters(model).values()])
    assert same(*results)


@given(BITS, *SHAPES, SEEDS, DTYPES)
def test_a_new_adapter_changes_no_bit(bits, rows, groups, group_size, seed, dtype):
    base = QuantLinear.from_quantized(random_quantized(seed, rows, groups, group_size, bits), bits)
    x = torch.randn(3, groups * group_size).to(dtype)
    layer = QALoRALinear(base, 2, 16, scales=True)
    assert torch.equal(layer(x), base(x)) and layer.scale_A.any()


def test_the_gradient_passes_through_the_rounding_of_a_scale():
    """A change of 2^-13 is lost in float16's steps of 2^-10, but not the gradient of it."""
    codes = torch.tensor([[3]], dtype=torch.uint8)
    base = QuantLinear.from_quantized(
        Quantized(codes, torch.ones(1, 1).half(), torch.zeros(1, 1)), 2
    )
    layer = QALoRALinear(base, 1, 1, scales=True)
    layer.scale_A.data, layer.scale_B.data = torch.tensor([[1.0]]), torch.tensor([[2.0**-13]])
    layer(torch.tensor([[2.0]])).backward()
    assert layer.effective_scale().item() == 1.0
    assert layer.scale_B.grad.item() == 6.0 and layer.scale_A.grad.item() == 6 * 2.0**-13


@pytest.mark.parametrize("scales", [False, True])
def test_the_input_is_kept_for_the_backward_pass_only_where_scales_learn(scales):
    base = QuantLinear.from_quantized(random_quantized(0, 128, 8, 32, 4), 4)
    layer = QALoRALinear(base, 4, 4, scales)
    x, kept = torch.randn(64, 256, requires_grad=True), set()

    def keep(tensor):
        kept.add(tensor.untyped_storage().data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(x)
    assert (x.untyped_storage().data_ptr() in kept) == scales


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_a_trained_model_moves_scales_and_offsets_only(dtype):
    base = small_llama(3, 8, dtype)
    adapted = trained(
        add_adapters(copy.deepcopy(base), 4, 16, ("q_proj", "down_proj"), scales=True)
    )
    assert len(adapter_parameters(adapted)) == 4 * 2 * SMALL.num_hidden_layers
    merged, batch = merge(copy.deepcopy(adapted)), tokens(99, 3, 20)
    assert torch.equal(merged(batch), adapted(batch))
    before, after = base.state_dict(), merged.state_dict()
    assert list(after) == list(before)
    for name in after:
        adapts = name.split(".")[-2] in ("q_proj", "down_proj")
        moved = adapts and name.endswith((".offset", ".scale"))
        assert same([after[name]], [before[name]]) != moved, name


def test_a_float_model_has_no_scales_to_adapt():
    """LoRA, the baseline, takes no notice."""
    model = add_adapters(Llama(SMALL), 2, 16, scales=True)
    assert all(name.endswith(("lora_A", "lora_B")) for name in adapter_parameters(model))


@settings(max_examples=10)
@given(st.integers(1, 4), st.booleans())
def test_a_saved_adapter_comes_back_with_its_scales(tmp_path_factory, rank, scales):
    folder = tmp_path_factory.mktemp("run") / "adapter"
    model = add_adapters(quantized_llama(), rank, 16, scales=scales)
    for p in adapter_parameters(model).values():
        p.data = torch.randn_like(p)
    save_adapter(model, folder)
    back = quantized_llama()
    assert load_adapter(back, folder).get("scales", False) is scales
    assert same(back.state_dict().values(), model.state_dict().values())


@pytest.mark.parametrize("kind", ["gguf", "mlx"])
def test_a_run_that_adapts_scales_is_resumed_merged_and_exported(
    world, tmp_path, monkeypatch, capsys, kind
):
    """The same bits as without an interruption; the codes of the base; what is exported loads."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    words = dict(adapt="scales", group_size=32, lr=0.01)
    run(tmp_path / "log", options(world, whole, steps=4, **words))
    run(tmp_path / "log", options(world, parts, steps=2, **words))
    run(tmp_path / "log", ["--resume", "--steps", "4", "--out", str(parts)])
    files = [folder / "adapter" / "adapter.safetensors" for folder in (whole, parts)]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert json.loads((whole / "results.json").read_text())["bit_identical"] is True
    assert json.loads((whole / "adapter" / "adapter.json").read_text())["scales"] is True
    merged, base = formats.load_model(whole), formats.load_model(whole / "base")
    moved = 0
    for (name, layer), before in zip(linears(merged).items(), linears(base).values(), strict=True):
        assert torch.equal(layer.packed, before.packed), name
        moved += not torch.equal(layer.scale, before.scale)
    assert moved == len(linears(base))
    pytest.importorskip("gguf", reason="needs gguf: pip install gguf")
    out = tmp_path / ("tuned.gguf" if kind == "gguf" else "tuned")
    assert run_in_process(monkeypatch, capsys, export.main, whole, "--out", out)[0] == 0
    for (name, layer), ours in zip(
        linears(formats.load_model(out)).items(), linears(merged).values(), strict=True
    ):
        assert torch.equal(layer.scale.float(), ours.scale.float()), name
        assert torch.equal(codes_of(layer), codes_of(ours)), name
    assert math.isfinite(formats.load_model(out)(torch.tensor([[1, 2, 3]])).sum())


def test_a_checkpoint_of_other_adapters_is_not_resumed(world, tmp_path):
    out = tmp_path / "run"
    run(tmp_path / "log", options(world, out, steps=1))
    settings_file = out / "run.json"
    kept = json.loads(settings_file.read_text())
    settings_file.write_text(json.dumps({**kept, "adapt": "scales"}))
    said = run(tmp_path / "log", ["--resume", "--steps", "2", "--out", str(out)], status=2)
    assert "was trained with adapt offsets, now it is scales" in said


def test_a_run_from_before_scales_could_be_adapted_is_resumed(world, tmp_path):
    out = tmp_path / "run"
    run(tmp_path / "log", options(world, out, steps=1))
    for file in (out / "run.json", next(out.glob("step-*")) / "settings.json"):
        kept = json.loads(file.read_text())
        assert kept.pop("adapt") == "offsets"
        file.write_text(json.dumps(kept))
    run(tmp_path / "log", ["--resume", "--steps", "2", "--out", str(out)])
    assert json.loads((out / "run.json").read_text())["adapt"] == "offsets"
