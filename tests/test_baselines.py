"""baselines.py and QLoRA: the 16 values, what they cost, how far a weight moves, layers, folders,
merging to float."""

import statistics

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

import formats
from baselines import (
    BLOCK,
    NF4,
    SCALE_BLOCK,
    VALUES,
    NF4Linear,
    dequantize_nf4,
    quantize_model_nf4,
    quantize_nf4,
)
from cli.errors import UserError
from formats import fingerprint, load_model
from formats.adapter import save_adapter
from formats.files import fill
from formats.huggingface import save_pretrained
from formats.quantized import load_quantized, save_quantized
from formats.run import save_merged
from kernels import matmul
from llama import Llama, LlamaConfig, load_pretrained
from merge import merge
from qalora import LoRALinear, adapter_parameters, add_adapters
from text.tokenizer import train_tokenizer

SIDES, SEEDS = st.integers(1, 70), st.integers(0, 2**31)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64])
LARGEST_GAP = 0.3038072  # between two neighbouring values, -1 and -0.696


def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tiny_model(seed=0, tied=False):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=24,
        intermediate_size=36,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=tied,
    )
    return Llama(config)


def trained(model, rank=3, seed=0):
    """`model` with adapters that are not zero."""
    add_adapters(model, rank, 6.0)
    for i, p in enumerate(adapter_parameters(model).values()):
        p.data = 0.1 * normal(seed + i, *p.shape)
    return model


# ---- the format


def test_the_values_are_quantiles_of_a_normal_distribution():
    """8 above zero, 7 below, each side evenly spaced in probability from 1/2 to 0.9677083; zero;
    scaled to 1."""
    outermost, quantile = 0.9677083, statistics.NormalDist().inv_cdf

    def side(n):
        return [quantile(outermost + (0.5 - outermost) * k / n) for k in range(n)]

    values = sorted(side(8) + [0.0] + [-q for q in side(7)])
    assert VALUES.tolist() == pytest.approx([v / quantile(outermost) for v in values], abs=2e-7)


def test_a_weight_costs_4_127_bits():
    layer = NF4Linear.from_weight(normal(0, 1024, 1024))
    bits = 8 * sum(b.numel() * b.element_size() for b in layer.buffers()) / 1024**2
    assert bits == pytest.approx(4 + 8 / 64 + 32 / (64 * 256), abs=1e-4) and round(bits, 3) == 4.127


@given(SIDES, SIDES, SEEDS, DTYPES)
@example(1, 1, 0, torch.float32)
@example(257, 64, 0, torch.float32)  # one block more than share a scale of scales
def test_buffers_have_the_sizes_that_ragged_matrices_need(rows, columns, seed, dtype):
    layer = NF4Linear.from_weight(normal(seed, rows, columns).to(dtype))
    blocks = -(-rows * columns // BLOCK)
    assert {name: (b.numel(), b.dtype) for name, b in layer.named_buffers()} == {
        "packed": (32 * blocks, torch.uint8),
        "scale": (blocks, torch.float8_e4m3fn),
        "scale_of_scale": (-(-blocks // SCALE_BLOCK), torch.float32),
        "scale_mean": (1, torch.float32),
    }
    assert {n: (b.numel(), b.dtype) for n, b in NF4Linear(columns, rows).named_buffers()} == {
        n: (b.numel(), b.dtype) for n, b in layer.named_buffers()
    }


def exact_scales(w):  # the largest magnitude of each block, one a weight
    flat = w.double().flatten()
    scales = torch.stack([block.abs().max() for block in flat.split(BLOCK)])
    return scales, scales.repeat_interleave(BLOCK)[: len(flat)].view(w.shape)


@given(SIDES, SIDES, SEEDS, DTYPES, st.integers(-12, 12))
def test_every_weight_is_within_half_a_gap_and_the_error_of_its_scale(
    rows, columns, seed, dtype, exponent
):
    """An 8-bit float has 3 bits after the first: a scale is off by at most 1/16 of its distance
    from the mean."""
    w = (normal(seed, rows, columns) * 2.0**exponent).to(dtype)
    scales, scale_OI = exact_scales(w)
    found = dequantize_nf4(quantize_nf4(w), w.shape).double()
    assert found.shape == w.shape
    distance = (scales - scales.mean()).abs().max() / 16
    assert (
        (found - w.double()).abs() <= scale_OI * LARGEST_GAP / 2 + distance + 1e-6 * scale_OI
    ).all()


@given(SEEDS, st.integers(1, 300), st.integers(-6, 6))
def test_the_codes_are_the_nearest_values(seed, blocks, exponent):
    """Read back byte by byte, against a search through all 16 values."""
    w = normal(seed, blocks, BLOCK) * 2.0**exponent
    packed = quantize_nf4(w).packed.view(blocks, 32).long()
    codes = torch.stack([packed % 16, packed // 16], dim=2).view(blocks, BLOCK)
    wanted = w.double() / w.double().abs().amax(dim=1, keepdim=True)
    distances = (wanted.unsqueeze(-1) - VALUES.double()).abs()
    assert (
        distances.gather(2, codes.unsqueeze(-1)).squeeze(-1) <= distances.amin(dim=2) + 1e-6
    ).all()


@given(SIDES, SIDES, SEEDS)
def test_matrices_of_the_16_values_come_back_exactly_where_all_scales_are_equal(
    rows, columns, seed
):
    codes = torch.randint(16, (rows, columns), generator=torch.Generator().manual_seed(seed))
    w = VALUES[codes]
    w.view(-1)[::BLOCK] = 1.0  # each block reaches its scale
    assert torch.equal(dequantize_nf4(quantize_nf4(4 * w), w.shape), 4 * w)


@pytest.mark.parametrize("blocks", [1, 3, 7])
def test_it_does_not_matter_how_much_is_dequantized_at_a_time(monkeypatch, blocks):
    quantized, shape = (
        quantize_nf4(torch.randn(5, 90, generator=torch.Generator().manual_seed(0))),
        torch.Size((5, 90)),
    )
    whole = dequantize_nf4(quantized, shape)
    monkeypatch.setattr(matmul, "IN_CACHE", blocks * BLOCK)
    assert torch.equal(dequantize_nf4(quantized, shape), whole)


def test_zeros_stay_zero_and_blocks_of_zeros_too():
    assert not dequantize_nf4(quantize_nf4(torch.zeros(3, 50)), torch.Size((3, 50))).any()
    w = normal(0, 4, BLOCK)
    w[2] = 0
    assert not dequantize_nf4(quantize_nf4(w), w.shape)[2].any()


def test_double_quantization_hardly_adds_to_the_error():
    """On normal weights the relative error is that of NF4 with float32 scales, measured 0.0924,
    within 1 %."""
    w = normal(0, 1024, 1024)
    q = quantize_nf4(w)
    _, scale_OI = exact_scales(w)
    unscaled = dequantize_nf4(
        NF4(q.packed, torch.zeros_like(q.scale), q.scale_of_scale, torch.ones(1)), w.shape
    )

    def error(found):
        return ((found - w).square().sum() / w.square().sum()).sqrt().item()

    once, twice = error(unscaled * scale_OI.float()), error(dequantize_nf4(q, w.shape))
    assert once == pytest.approx(0.0924, rel=0.02) and once < twice < 1.01 * once, (once, twice)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_no_numbers_are_a_programmers_mistake(wrong):
    with pytest.raises(AssertionError, match="NaN or infinite"):
        quantize_nf4(torch.tensor([[1.0, wrong]]))


# ---- the layer


@given(SIDES, SIDES, SEEDS, DTYPES, st.lists(st.integers(0, 3), max_size=2))
def test_a_layer_multiplies_with_its_dequantized_weight_and_so_does_its_gradient(
    rows, columns, seed, dtype, lead
):
    layer = NF4Linear.from_weight(normal(seed, rows, columns))
    x = normal(seed + 1, *lead, columns).to(dtype).requires_grad_()
    same_x, w = x.detach().clone().requires_grad_(), layer.weight.to(dtype)
    y, wanted = layer(x), same_x @ w.t()
    direction = normal(seed + 2, *y.shape).to(dtype)
    y.backward(direction)
    wanted.backward(direction)
    assert y.dtype == dtype and torch.equal(y, wanted)
    tolerance = 1e-1 if dtype.itemsize == 2 else 1e-4
    assert torch.allclose(x.grad, same_x.grad, rtol=tolerance, atol=tolerance)


def test_between_forward_and_backward_no_dense_weight_is_kept():
    layer, kept = NF4Linear.from_weight(normal(0, 64, 64)), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(normal(1, 5, 64).requires_grad_())
    assert not kept


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_casting_a_layer_leaves_its_buffers_as_they_are(dtype):
    layer = NF4Linear.from_weight(normal(0, 8, 8))
    before = {name: (b.dtype, b.view(torch.uint8).clone()) for name, b in layer.named_buffers()}
    layer.to(dtype)
    for name, b in layer.named_buffers():
        assert b.dtype == before[name][0] and torch.equal(b.view(torch.uint8), before[name][1])


# ---- the model and its folder


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_is_quantized_in_place_and_its_folder_gives_the_same_logits(tmp_path, tied):
    model, tokens = tiny_model(tied=tied), torch.arange(20).view(2, 10)
    before = model(tokens)
    assert quantize_model_nf4(model) is model
    assert sum(isinstance(m, NF4Linear) for m in model.modules()) == 7 * 2
    after = model(tokens)
    assert 0 < (after - before).abs().max() < 0.2 * before.abs().max()
    save_quantized(model, tmp_path, quantizer="nf4")
    entry = formats.quantization_of(tmp_path)
    assert (entry["bits"], entry["group_size"], entry["quantizer"]) == (4, 64, "nf4")
    assert torch.equal(load_model(tmp_path)(tokens), after)
    assert load_model(tmp_path, torch.bfloat16)(tokens).dtype == torch.bfloat16


def test_a_model_can_be_read_block_by_block():
    whole = tiny_model()
    weights = {name: (lambda p=p: p.detach()) for name, p in whole.named_parameters()}
    with torch.device("meta"):
        model = Llama(whole.config)
    for name in ("model.embed_tokens", "model.norm", "lm_head"):
        model.get_submodule(name).weight = whole.get_submodule(name).weight

    def load_block(block, index):
        fill(block, weights, f"model.layers.{index}.")

    quantize_model_nf4(model, load_block)
    tokens = torch.arange(10).view(1, 10)
    assert torch.equal(model(tokens), quantize_model_nf4(whole)(tokens))


def test_a_folder_in_nf4_is_not_taken_for_groups_with_offsets(tmp_path):
    save_quantized(quantize_model_nf4(tiny_model()), tmp_path, quantizer="nf4")
    with pytest.raises(UserError, match="NF4"):
        load_quantized(tmp_path)


# ---- LoRA and QLoRA


@given(SIDES, SIDES, st.integers(1, 5), SEEDS, st.booleans())
def test_a_lora_layer_is_the_papers_formula_and_its_merge_is_one_float_matrix(
    rows, columns, rank, seed, nf4
):
    w = normal(seed, rows, columns)
    base = NF4Linear.from_weight(w) if nf4 else torch.nn.Linear(columns, rows, bias=False)
    if not nf4:
        base.weight = torch.nn.Parameter(w)
    layer = LoRALinear(base, rank, 6.0)
    x = normal(seed + 1, 4, columns)
    assert torch.equal(layer(x), base(x)), "B is zero at first"
    layer.lora_B.data = normal(seed + 2, rows, rank)
    wanted = base.weight.double() + 6.0 / rank * layer.lora_B.double() @ layer.lora_A.double()
    merged = merge(layer)
    assert type(merged) is torch.nn.Linear and merged.bias is None
    assert torch.allclose(merged.weight.double(), wanted, rtol=1e-5, atol=1e-5)
    assert torch.allclose(layer(x), merged(x), rtol=1e-4, atol=1e-3)


def test_a_qlora_model_trains_only_its_adapters():
    model = add_adapters(quantize_model_nf4(tiny_model()), 3, 6.0)
    before = {name: b.view(torch.uint8).clone() for name, b in model.named_buffers()}
    optimizer = torch.optim.AdamW(adapter_parameters(model).values(), lr=1e-2)
    tokens, losses = torch.arange(20).view(2, 10), []
    for _ in range(30):
        logits = model(tokens[:, :-1]).flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits, tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.3, losses
    assert all(torch.equal(b.view(torch.uint8), before[name]) for name, b in model.named_buffers())
    assert {name for name, p in model.named_parameters() if p.requires_grad} == set(
        adapter_parameters(model)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("nf4", [False, True])
def test_a_merged_model_is_float_in_the_models_own_dtype_and_computes_the_same(nf4, dtype):
    model = tiny_model().to(dtype)
    model = trained(quantize_model_nf4(model) if nf4 else model)
    tokens = torch.arange(20).view(2, 10)
    adapted = model(tokens).float()
    merged = merge(model)
    assert {p.dtype for p in merged.parameters()} == {dtype} and not list(merged.buffers())
    error = (merged(tokens).float() - adapted).abs().max() / adapted.abs().max()
    assert error < (1e-5 if dtype == torch.float32 else 0.05), error


def test_a_scale_that_is_not_a_number_is_refused(tmp_path):
    model = quantize_model_nf4(tiny_model())
    model.model.layers[1].mlp.up_proj.scale.view(torch.uint8)[0] = 0x7F  # NaN in float8_e4m3fn
    save_quantized(model, tmp_path, quantizer="nf4")
    with pytest.raises(UserError, match="layers.1.mlp.up_proj.scale has NaN"):
        load_model(tmp_path)


@pytest.mark.parametrize("nf4", [False, True])
def test_a_run_of_the_baselines_loads_merged_and_is_saved_as_a_float_model(tmp_path, nf4):
    model, run = tiny_model(), tmp_path / "run"
    (run / "base").mkdir(parents=True)
    train_tokenizer(["any text of the baselines"], run / "base" / "tokenizer.model", 275)
    (run / "run.json").write_text("{}")
    if nf4:
        save_quantized(quantize_model_nf4(model), run / "base", quantizer="nf4")
    else:
        save_pretrained(model, run / "base")
    save_adapter(trained(model), run / "adapter", base=fingerprint(run / "base"))
    tokens = torch.arange(20).view(2, 10)
    wanted = model(tokens)
    assert torch.allclose(load_model(run)(tokens), wanted, atol=1e-5)
    save_merged(load_model(run), run, tmp_path / "merged")
    assert torch.allclose(load_pretrained(tmp_path / "merged")(tokens), wanted, atol=1e-5)
