"""What qalora.py promises: the paper's layer, its parameters, and adapters that are only loaded where they belong.

As in test_quant.py, small integers make floating-point arithmetic exact, and the tests ask for equality.
"""

import copy
import json

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

from cli import UserError
from llama import CONFIGS, LINEARS, Llama, LlamaConfig
from qalora import LoRALinear, QALoRALinear, adapter_parameters, add_adapters, load_adapter, save_adapter
from quant import Quantized, QuantLinear, quantize_model, quantized_skeleton

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
BITS, SEEDS, RANKS = st.sampled_from([2, 3, 4]), st.integers(0, 2 ** 32 - 1), st.integers(1, 5)
ROWS, GROUPS, GROUP_SIZES = st.integers(1, 5), st.integers(1, 4), st.integers(1, 20)
SMALL = LlamaConfig(vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
                    num_key_value_heads=1, max_position_embeddings=64)


def integers(seed, low, high, *shape, dtype=torch.float32):
    """Integers from low to high, both included."""
    return torch.randint(low, high + 1, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def quant_layer(seed, rows, groups, group_size, bits):
    """A QuantLinear with scales 0 to 2, offsets -4 to 4, and its dense weight in float64."""
    codes = integers(seed, 0, 2 ** bits - 1, rows, groups * group_size, dtype=torch.uint8)
    scale, offset = integers(seed + 1, 0, 2, rows, groups).half(), integers(seed + 2, -4, 4, rows, groups)
    spread_out = lambda per_group: per_group.double().repeat_interleave(group_size, dim=1)
    layer = QuantLinear.from_quantized(Quantized(codes, scale, offset), bits)
    return layer, spread_out(scale) * codes.double() + spread_out(offset)


def adapted_layer(seed, rows, groups, group_size, bits, rank, alpha):
    """A QALoRALinear with integers in its adapter, and its base's dense weight."""
    base, w = quant_layer(seed, rows, groups, group_size, bits)
    layer = QALoRALinear(base, rank, alpha)
    layer.lora_A.data = integers(seed + 3, -2, 2, rank, groups)
    layer.lora_B.data = integers(seed + 4, -2, 2, rows, rank)
    return layer, w


def quantized_llama(seed=0, bits=3, group_size=8):
    torch.manual_seed(seed)
    return quantize_model(Llama(SMALL), bits, group_size)


def same(a, b):
    return all(torch.equal(x, y) and x.dtype == y.dtype for x, y in zip(a, b, strict=True))


# ------------------------------------------------------------------------------------------------ the layer

@given(st.sampled_from(DTYPES), BITS, ROWS, GROUPS, GROUP_SIZES, RANKS, SEEDS)
def test_a_new_adapter_changes_no_bit(dtype, bits, rows, groups, group_size, rank, seed):
    base, _ = quant_layer(seed, rows, groups, group_size, bits)
    x = torch.randn(3, groups * group_size, generator=torch.Generator().manual_seed(seed)).to(dtype)
    assert same([QALoRALinear(copy.deepcopy(base), rank, 16)(x)], [base(x)])


@given(st.sampled_from([torch.float64, torch.float32]), BITS, ROWS, GROUPS, GROUP_SIZES, RANKS, SEEDS,
       st.sampled_from([0.5, 1, 2, 4]))
def test_outputs_and_gradients_are_those_of_the_papers_formula(dtype, bits, rows, groups, group_size, rank, seed, s):
    """y = x @ W̃ᵀ + s * pool(x) @ Aᵀ @ Bᵀ, written out in float64 and differentiated by autograd, for x, A and B."""
    layer, w = adapted_layer(seed, rows, groups, group_size, bits, rank, alpha=s * rank)
    x, grad = (integers(seed + k, -2, 2, 2, 3, n, dtype=torch.float64) for k, n in ((5, w.shape[1]), (6, rows)))
    x_, a, b = (t.detach().double().requires_grad_() for t in (x, layer.lora_A, layer.lora_B))
    pooled = torch.stack([x_[..., g * group_size:(g + 1) * group_size].sum(-1) for g in range(groups)], dim=-1)
    y = x_ @ w.t() + s * pooled @ a.t() @ b.t()
    y.backward(grad)

    x = x.to(dtype).requires_grad_()
    got = layer(x)
    got.backward(grad.to(dtype))
    assert same([got, x.grad], [y.to(dtype), x_.grad.to(dtype)])
    assert same([layer.lora_A.grad, layer.lora_B.grad], [a.grad.float(), b.grad.float()])


@given(BITS, ROWS, GROUPS, GROUP_SIZES, RANKS, SEEDS, st.integers(1, 64))
def test_the_effective_offset_moves_by_alpha_over_rank_times_b_a(bits, rows, groups, group_size, rank, seed, alpha):
    """Rounding: of s, of s * B @ A and of the sum, each by 2^-24 of numbers below 64 * 20."""
    layer, _ = adapted_layer(seed, rows, groups, group_size, bits, rank, alpha)
    moved = layer.base.offset.double() + alpha / rank * (layer.lora_B.double() @ layer.lora_A.double())
    assert layer.effective_offset().dtype == torch.float32
    assert (layer.effective_offset().double() - moved).abs().max() <= 3 * 2.0 ** -24 * 64 * 20


def test_a_starts_kaiming_uniform_and_b_zero():
    """Kaiming-uniform with a = sqrt(5), as in LoRA's own code: uniform up to 1 / sqrt(groups)."""
    layer = QALoRALinear(quant_layer(0, 8, 100, 1, 4)[0], 50, 16)
    assert layer.lora_A.shape == (50, 100) and layer.lora_B.shape == (8, 50) and not layer.lora_B.any()
    quantiles = torch.quantile(layer.lora_A.detach() * 10, torch.linspace(0, 1, 5))  # 5000 draws: within 5 %
    assert (quantiles - torch.tensor([-1, -0.5, 0, 0.5, 1])).abs().max() < 0.05, quantiles


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_adapter_works_in_float32_under_autocast_and_after_casts_of_the_model(dtype):
    """Factors of 1 + 2^-7, which both 16-bit floats hold, and their product 1 + 2^-6 + 2^-14, which neither does."""
    base, _ = quant_layer(0, 1, 2, 1, 4)
    base.scale.zero_(), base.offset.fill_(-1)
    layer = QALoRALinear(base, 1, 1)
    layer.lora_A.data, layer.lora_B.data = torch.tensor([[1 + 2.0 ** -7, 1]]), torch.tensor([[1 + 2.0 ** -7]])
    offset, x = torch.tensor([[2.0 ** -6 + 2.0 ** -14, 2.0 ** -7]]), torch.tensor([[1.0, -2.0]])  # y = 2^-14
    with torch.autocast("cpu", dtype):
        assert torch.equal(layer.effective_offset(), offset) and layer(x).item() == 2.0 ** -14
    layer.to(dtype)
    assert torch.equal(layer.effective_offset(), offset) and layer(x).item() == 2.0 ** -14


@pytest.mark.parametrize("dtype", DTYPES)
def test_training_keeps_neither_the_input_nor_a_dense_weight(dtype):
    """Kept are the packed codes, scales, offsets, the adapter and the input pooled to a 32nd of its width."""
    layer, _ = adapted_layer(0, 128, 8, 32, 4, rank=4, alpha=4)
    x, kept = torch.randn(64, 256).to(dtype).requires_grad_(), {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(x)
    own = sum(t.nbytes for t in layer.state_dict().values()) + layer.base.offset.nbytes  # and the effective offset's
    assert x.untyped_storage().data_ptr() not in kept
    assert sum(kept.values()) <= own + 64 * 8 * max(4, x.element_size()), kept


def test_training_changes_the_adapter_and_nothing_else():
    torch.manual_seed(0)
    layer = QALoRALinear(quant_layer(0, 8, 4, 8, 4)[0], 2, 16)
    before = copy.deepcopy(layer)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        layer(torch.randn(5, 32)).square().mean().backward()
        optimizer.step()
    assert same(layer.base.state_dict().values(), before.base.state_dict().values())
    assert not torch.equal(layer.lora_A, before.lora_A) and not torch.equal(layer.lora_B, before.lora_B)


# ------------------------------------------------------------------------------------------------ the baseline

@given(RANKS, SEEDS, st.sampled_from([0.5, 1, 2]))
def test_lora_is_its_formula_and_changes_nothing_at_first(rank, seed, s):
    base = nn.Linear(12, 5, bias=False)
    base.weight.data = integers(seed, -3, 3, 5, 12)
    layer, x = LoRALinear(copy.deepcopy(base), rank, s * rank), integers(seed + 1, -3, 3, 2, 3, 12)
    assert layer.lora_A.shape == (rank, 12) and layer.lora_B.shape == (5, rank)
    assert same([layer(x)], [base(x)])
    layer.lora_A.data, layer.lora_B.data = integers(seed + 2, -2, 2, rank, 12), integers(seed + 3, -2, 2, 5, rank)
    y = x @ base.weight.t() + s * (x @ layer.lora_A.t() @ layer.lora_B.t())
    assert same([layer(x), layer.merged()(x)], [y, y])


# ------------------------------------------------------------------------------------------------ the whole model

@pytest.mark.parametrize("size, qalora, lora", [("7b", 89, 160), ("13b", 140, 250), ("33b", 272, 488),
                                                ("65b", 447, 800)])
def test_the_papers_numbers_of_trainable_parameters(size, qalora, lora):
    """In millions, at rank 64, groups of 32, all seven linears: the figures the paper prints."""
    with torch.device("meta"):
        models = quantized_skeleton(CONFIGS[size], 4, 32), Llama(CONFIGS[size])
    trainable = [sum(p.numel() for p in add_adapters(m, 64, 16).parameters() if p.requires_grad) for m in models]
    assert [round(n / 1e6) for n in trainable] == [qalora, lora]


@settings(max_examples=20)
@given(st.lists(st.sampled_from(LINEARS), min_size=1, unique=True), RANKS)
def test_only_the_adapters_of_the_targets_are_trainable(targets, rank):
    model = quantized_llama()
    names = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in targets}
    before = model.state_dict()
    assert add_adapters(model, rank, 16, targets) is model
    adapters = adapter_parameters(model)
    assert adapters.keys() == {f"{name}.lora_{half}" for name in names for half in "AB"}
    assert adapters.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(p.dtype == torch.float32 for p in adapters.values())
    left = {name.replace(".base.", "."): t for name, t in model.state_dict().items() if name not in adapters}
    assert left.keys() == before.keys() and same([left[name] for name in before], before.values())


def test_quantized_linears_get_qalora_and_float_ones_lora():
    quantized, dense = add_adapters(quantized_llama(), 2, 16), add_adapters(Llama(SMALL), 2, 16)
    for name, _ in Llama(SMALL).named_modules():
        if name.rpartition(".")[2] in LINEARS:
            assert type(quantized.get_submodule(name)) is QALoRALinear
            assert type(dense.get_submodule(name)) is LoRALinear


@pytest.mark.parametrize("name", ["qproj", "lm_head", "self_attn.q_proj", ""])
def test_a_target_that_is_no_linear_of_a_block_is_refused(name):
    model = quantized_llama()
    with pytest.raises(UserError, match=f"{name!r}.*q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj"):
        add_adapters(model, 2, 16, ["q_proj", name])
    assert not adapter_parameters(model)


# ------------------------------------------------------------------------------------------------ the folder

def randomized(model):
    """The adapters' parameters drawn anew, B too."""
    torch.manual_seed(1)
    for p in adapter_parameters(model).values():
        p.data = torch.randn_like(p)
    return model


@settings(max_examples=20)
@given(st.lists(st.sampled_from(LINEARS), min_size=1, unique=True), RANKS, st.sampled_from([1, 16, 0.5]))
def test_a_saved_adapter_comes_back_bit_for_bit(tmp_path_factory, targets, rank, alpha):
    folder = tmp_path_factory.mktemp("run") / "adapter"
    model = randomized(add_adapters(quantized_llama(), rank, alpha, targets))
    save_adapter(model, folder, base="abc", method="qalora")
    assert sorted(p.name for p in folder.iterdir()) == ["adapter.json", "adapter.safetensors"]
    back = quantized_llama()
    assert load_adapter(back, folder) == {
        "rank": rank, "alpha": alpha, "targets": [name for name in LINEARS if name in targets], "base": "abc",
        "method": "qalora"}
    assert same(back.state_dict().values(), model.state_dict().values())
    tokens = integers(0, 0, 39, 2, 9, dtype=torch.long)
    assert torch.equal(back(tokens), model(tokens))


@pytest.fixture
def saved(tmp_path):
    save_adapter(randomized(add_adapters(quantized_llama(), 2, 16)), tmp_path / "adapter", base="abc")
    return tmp_path / "adapter"


def refused(folder, says, model=None):
    with pytest.raises(UserError, match=says) as error:
        load_adapter(model or quantized_llama(), folder)
    assert str(folder) in str(error.value)


@pytest.mark.parametrize("group_size", [1, 2, 4])
def test_an_adapter_of_other_groups_is_refused(saved, group_size):
    """One number a group: over other groups it would be nonsense."""
    refused(saved, rf"lora_A is \[2, 3\] where the model needs \[2, {24 // group_size}\].*group size",
            quantized_llama(group_size=group_size))


def test_an_adapter_of_another_method_is_refused(saved):
    refused(saved, "lora_A", Llama(SMALL))


@pytest.mark.parametrize("change, says", [
    (lambda t: t.pop("model.layers.1.mlp.up_proj.lora_B"), "up_proj.lora_B is missing"),
    (lambda t: t.update({"model.layers.2.mlp.up_proj.lora_B": torch.zeros(24, 2)}), "layers.2.mlp.up_proj.lora_B"),
    (lambda t: t.update({"model.layers.0.mlp.up_proj.lora_B": torch.zeros(25, 2)}), "layers.0.mlp.up_proj.lora_B"),
    (lambda t: t.clear(), "missing"),
])
def test_adapter_tensors_that_do_not_fit_are_named(saved, change, says):
    tensors = safetensors.torch.load_file(saved / "adapter.safetensors")
    change(tensors)
    safetensors.torch.save_file(tensors, saved / "adapter.safetensors")
    refused(saved, says)


def test_a_truncated_adapter_is_refused(saved):
    content = (saved / "adapter.safetensors").read_bytes()
    for length in [0, 7, 8, 100, len(content) // 2, len(content) - 1]:
        (saved / "adapter.safetensors").write_bytes(content[:length])
        refused(saved, "damaged")


@pytest.mark.parametrize("name", ["adapter.json", "adapter.safetensors"])
def test_a_missing_file_is_refused_by_name(saved, name):
    (saved / name).unlink()
    refused(saved, name)


@pytest.mark.parametrize("change", [
    {"rank": 0}, {"rank": -1}, {"rank": "2"}, {"rank": 2.0}, {"rank": True}, {"rank": None}, {"rank": 3},
    {"alpha": "16"}, {"alpha": None}, {"alpha": 0}, {"alpha": float("nan")}, {"alpha": float("inf")},
    {"targets": "q_proj"}, {"targets": None}, {"targets": []}, {"targets": [1]}, {"targets": ["q_proj"]},
    {"targets": [["q_proj"]]}], ids=str)
def test_settings_that_do_not_describe_the_adapter_are_refused(saved, change):
    path = saved / "adapter.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    refused(saved, "adapter")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}", '{"rank": 2, "alpha": 16}', "[" * 9999],
                         ids=lambda text: text[:9])
def test_settings_that_are_none_are_refused(saved, text):
    (saved / "adapter.json").write_text(text)
    refused(saved, "adapter.json")
