"""What qalora.py promises: the paper's layer, what it trains, and which layers get one.

Small integers make floating-point arithmetic exact, so the tests ask for equality.
"""

import copy

import pytest
import torch
from helpers import BITS, TWO_LAYERS, dense, integers, quantized_llama, same
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from cli.errors import UserError
from llama import LINEARS, Llama
from qalora import LoRALinear, QALoRALinear, adapter_parameters, add_adapters
from quant import Quantized, QuantLinear, unpack

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SEEDS, RANKS = st.integers(0, 2**32 - 1), st.integers(1, 5)
ROWS, GROUPS, GROUP_SIZES = st.integers(1, 5), st.integers(1, 4), st.integers(1, 20)


def quant_layer(seed, rows, groups, group_size, bits):
    """A QuantLinear with scales 0 to 2 and offsets -4 to 4."""
    codes = integers(seed, 0, 2**bits - 1, rows, groups * group_size, dtype=torch.uint8)
    scale = integers(seed + 1, 0, 2, rows, groups).half()
    quantized = Quantized(codes, scale, integers(seed + 2, -4, 4, rows, groups))
    return QuantLinear.from_quantized(quantized, bits)


def adapted_layer(seed, rows, groups, group_size, bits, rank, alpha):
    """A QALoRALinear with integers in its adapter."""
    layer = QALoRALinear(quant_layer(seed, rows, groups, group_size, bits), rank, alpha)
    layer.lora_A.data = integers(seed + 3, -2, 2, rank, groups)
    layer.lora_B.data = integers(seed + 4, -2, 2, rows, rank)
    return layer


# ---- the layer


@given(BITS, ROWS, GROUPS, GROUP_SIZES, RANKS, SEEDS, st.integers(1, 64))
def test_the_effective_offset_moves_by_alpha_over_rank_times_b_a(
    bits, rows, groups, group_size, rank, seed, alpha
):
    """Rounding: of s, of s * B @ A and of the sum, each by 2^-24 of numbers below 64 * 20."""
    layer = adapted_layer(seed, rows, groups, group_size, bits, rank, alpha)
    product = layer.lora_B.double() @ layer.lora_A.double()
    moved = layer.base.offset.double() + alpha / rank * product
    assert layer.effective_offset().dtype == torch.float32
    assert (layer.effective_offset().double() - moved).abs().max() <= 3 * 2.0**-24 * 64 * 20


def test_a_starts_kaiming_uniform_and_b_zero():
    """Kaiming-uniform with a = sqrt(5), as in LoRA's own code: uniform up to 1 / sqrt(groups)."""
    layer = QALoRALinear(quant_layer(0, 8, 100, 1, 4), 50, 16)
    assert layer.lora_A.shape == (50, 100) and layer.lora_B.shape == (8, 50)
    assert not layer.lora_B.any()
    quantiles = torch.quantile(layer.lora_A.detach() * 10, torch.linspace(0, 1, 5))
    # 5000 draws: within 5 %
    assert (quantiles - torch.tensor([-1, -0.5, 0, 0.5, 1])).abs().max() < 0.05, quantiles


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_adapter_works_in_float32_under_autocast_and_after_casts_of_the_model(dtype):
    """Both 16-bit floats hold the factors 1 + 2^-7; neither holds their product."""
    base = quant_layer(0, 1, 2, 1, 4)
    base.scale.zero_()
    base.offset.fill_(-1)
    layer = QALoRALinear(base, 1, 1)
    layer.lora_A.data = torch.tensor([[1 + 2.0**-7, 1]])
    layer.lora_B.data = torch.tensor([[1 + 2.0**-7]])
    offset = torch.tensor([[2.0**-6 + 2.0**-14, 2.0**-7]])
    x = torch.tensor([[1.0, -2.0]])  # y = 2^-14
    with torch.autocast("cpu", dtype):
        assert torch.equal(layer.effective_offset(), offset) and layer(x).item() == 2.0**-14
    layer.to(dtype)
    assert torch.equal(layer.effective_offset(), offset) and layer(x).item() == 2.0**-14


@pytest.mark.parametrize("dtype", DTYPES)
def test_training_keeps_neither_the_input_nor_a_dense_weight(dtype):
    """Kept are codes, scales, offsets, the adapter, and the input pooled to a 32nd of its width."""
    layer = adapted_layer(0, 128, 8, 32, 4, rank=4, alpha=4)
    x, kept = torch.randn(64, 256).to(dtype).requires_grad_(), {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(x)
    own = sum(t.nbytes for t in layer.state_dict().values())
    own += layer.base.offset.nbytes  # the effective offset's
    assert x.untyped_storage().data_ptr() not in kept
    assert sum(kept.values()) <= own + 64 * 8 * max(4, x.element_size()), kept


@settings(max_examples=40)
@given(st.sampled_from(DTYPES), BITS, ROWS, GROUPS, GROUP_SIZES, RANKS, SEEDS, st.floats(-20, 10))
def test_finer_and_negative_scales_of_other_quantizers_are_kept_and_merge_to_the_same_bits(
    dtype, bits, rows, groups, group_size, rank, seed, magnitude
):
    layer = adapted_layer(seed, rows, groups, group_size, bits, rank, alpha=3)
    draw = torch.Generator().manual_seed(seed)
    scale = torch.randn(rows, groups, generator=draw) * 2.0**magnitude
    layer.base.scale = scale.clone()
    layer.to(dtype)
    x = torch.randn(3, groups * group_size, generator=draw).to(dtype)
    y = layer(x)
    assert torch.equal(layer.base.scale, scale)
    codes = unpack(layer.base.packed, bits, groups * group_size).double()
    exact = dense(Quantized(codes, scale, layer.effective_offset().detach()))
    # a weight is rounded once, and so are the products, their sum (of up to 80) and the result;
    # float16 has steps of 2^-24 where it is subnormal
    largest = codes.max() * scale.double().abs().max() + layer.effective_offset().abs().max()
    size = x.double().abs().sum(1, keepdim=True) * largest
    bound = 3 * torch.finfo(dtype).eps * size + 2.0**-24 * (1 + x.double().abs().sum())
    assert ((y - x.double() @ exact.t()).abs() <= bound).all()
    merged = layer.merged()
    assert torch.equal(merged(x), y)
    assert merged.scale.dtype == torch.float32 and torch.equal(merged.scale, scale)


def test_training_changes_the_adapter_and_nothing_else():
    torch.manual_seed(0)
    layer = QALoRALinear(quant_layer(0, 8, 4, 8, 4), 2, 16)
    before = copy.deepcopy(layer)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        layer(torch.randn(5, 32)).square().mean().backward()
        optimizer.step()
    assert same(layer.base.state_dict().values(), before.base.state_dict().values())
    assert not torch.equal(layer.lora_A, before.lora_A)
    assert not torch.equal(layer.lora_B, before.lora_B)


# ---- at full rank


@given(BITS, ROWS, GROUPS, GROUP_SIZES, SEEDS)
def test_at_full_rank_every_offset_moves_by_a_parameter_of_its_own(
    bits, rows, groups, group_size, seed
):
    """y = x @ (scale * codes + offset + B)^T and its gradients in float64; exact, for any alpha."""
    layer = QALoRALinear(quant_layer(seed, rows, groups, group_size, bits), "full", 77)
    layer.lora_B.data = integers(seed + 4, -2, 2, rows, groups)
    x = integers(seed + 5, -2, 2, 3, groups * group_size).requires_grad_()
    grad = integers(seed + 6, -2, 2, 3, rows)
    b, x_ = (t.detach().double().requires_grad_() for t in (layer.lora_B, x))
    w = layer.base.dequantize().double() + b.repeat_interleave(group_size, 1)
    expected = x_ @ w.t()
    expected.backward(grad.double())
    y = layer(x)
    y.backward(grad)
    assert list(adapter_parameters(layer)) == ["lora_B"]
    for ours, exact in ((y, expected), (layer.lora_B.grad, b.grad), (x.grad, x_.grad)):
        assert ours.dtype == torch.float32 and torch.equal(ours.double(), exact)


@given(st.sampled_from(DTYPES), BITS, ROWS, GROUPS, GROUP_SIZES, SEEDS, st.floats(-20, 10))
def test_a_layer_of_full_rank_begins_as_its_base_and_merges_to_the_same_bits(
    dtype, bits, rows, groups, group_size, seed, magnitude
):
    base = quant_layer(seed, rows, groups, group_size, bits)
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(3, groups * group_size, generator=draw).to(dtype)
    y, layer = base(x), QALoRALinear(base, "full", 16)
    assert torch.equal(layer(x), y)
    layer.lora_B.data = torch.randn(rows, groups, generator=draw) * 2.0**magnitude
    layer.to(dtype)
    codes, adapted = base.packed.clone(), layer(x)
    merged = layer.merged()
    assert torch.equal(merged(x), adapted) and torch.equal(merged.packed, codes)
    assert merged.offset.dtype == torch.float32


# ---- the baseline


@given(RANKS, SEEDS, st.sampled_from([0.5, 1, 2]))
def test_lora_is_its_formula_and_changes_nothing_at_first(rank, seed, s):
    base = nn.Linear(12, 5, bias=False)
    base.weight.data = integers(seed, -3, 3, 5, 12)
    layer = LoRALinear(copy.deepcopy(base), rank, s * rank)
    x = integers(seed + 1, -3, 3, 2, 3, 12)
    assert layer.lora_A.shape == (rank, 12) and layer.lora_B.shape == (5, rank)
    assert same([layer(x)], [base(x)])
    layer.lora_A.data = integers(seed + 2, -2, 2, rank, 12)
    layer.lora_B.data = integers(seed + 3, -2, 2, 5, rank)
    y = x @ base.weight.t() + s * (x @ layer.lora_A.t() @ layer.lora_B.t())
    assert same([layer(x), layer.merged()(x)], [y, y])


# ---- the whole model


@settings(max_examples=20)
@given(st.lists(st.sampled_from(LINEARS), min_size=1, unique=True), RANKS | st.just("full"))
def test_only_the_adapters_of_the_targets_are_trainable(targets, rank):
    model = quantized_llama()
    names = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in targets}
    before = model.state_dict()
    assert add_adapters(model, rank, 16, targets) is model
    adapters = adapter_parameters(model)
    halves = {f"{name}.lora_B" for name in names}
    halves |= set() if rank == "full" else {f"{name}.lora_A" for name in names}
    assert adapters.keys() == halves
    assert adapters.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(p.dtype == torch.float32 for p in adapters.values())
    kept = {name: t for name, t in model.state_dict().items() if name not in adapters}
    left = {name.replace(".base.", "."): t for name, t in kept.items()}
    assert left.keys() == before.keys()
    assert same([left[name] for name in before], before.values())


def test_a_baseline_has_no_full_rank():
    model = Llama(TWO_LAYERS)
    with pytest.raises(UserError, match="^full rank is for layers that are quantized in groups"):
        add_adapters(model, "full", 16)
    assert not adapter_parameters(model)


def test_quantized_linears_get_qalora_and_float_ones_lora():
    quantized = add_adapters(quantized_llama(), 2, 16)
    in_float = add_adapters(Llama(TWO_LAYERS), 2, 16)
    for name, _ in Llama(TWO_LAYERS).named_modules():
        if name.rpartition(".")[2] in LINEARS:
            assert type(quantized.get_submodule(name)) is QALoRALinear
            assert type(in_float.get_submodule(name)) is LoRALinear


@pytest.mark.parametrize("name", ["qproj", "lm_head", "self_attn.q_proj", ""])
def test_a_target_that_is_no_linear_of_a_block_is_refused(name):
    model = quantized_llama()
    with pytest.raises(
        UserError, match=f"{name!r}.*q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj"
    ):
        add_adapters(model, 2, 16, ["q_proj", name])
    assert not adapter_parameters(model)
