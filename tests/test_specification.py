"""QA-LoRA (Xu et al., ICLR 2024, arXiv 2309.14717) in fifteen properties, in the paper's order.

W [O, I] is a weight: O outputs (the paper's D_out), I inputs (D_in) in G groups (L) of g. W~ is
what is stored for it, R the rank (D_int), s = alpha / R. "Exact": integers, so nothing is rounded.
"""

import contextlib
import copy
import json
import runpy
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import quant
import train
from cli.errors import UserError
from formats import adapter, huggingface, load_model, quantized
from llama import CONFIGS, LINEARS, Llama, LlamaConfig, linears
from merge import merge
from qalora import LoRALinear, QALoRALinear, adapter_parameters, add_adapters
from quant import Quantized, QuantLinear, dequantize, quantize_gptq, quantize_model, quantize_rtn
from text import batches, templates, tokenizer


def normal(rows, groups, group_size, seed):
    torch.manual_seed(seed)
    return torch.randn(rows, groups, group_size, dtype=torch.float64)


def integer_layer(bits, rows, groups, group_size, rank, seed):  # as if it were trained; s = 2
    torch.manual_seed(seed)
    codes = torch.randint(2**bits, (rows, groups * group_size), dtype=torch.uint8)
    scale, offset = torch.randint(2, (rows, groups)), torch.randint(-2, 3, (rows, groups))
    base = QuantLinear.from_quantized(Quantized(codes, scale.half(), offset.float()), bits)
    layer = QALoRALinear(base, rank, alpha=2 * rank)
    layer.lora_A.data.random_(-1, 2)
    layer.lora_B.data.random_(-1, 2)
    return layer


def llama():
    torch.manual_seed(0)
    return Llama(LlamaConfig(400, 32, 64, 2, 4, 2, max_position_embeddings=256))


def trained(model):  # by three steps on batches of 4
    rows, learned, seen = torch.randint(400, (12, 9)).numpy(), torch.arange(9).numpy() > 1, []
    examples = [batches.Example(row, learned) for row in rows]
    optimizer = torch.optim.AdamW(adapter_parameters(model).values(), lr=0.02)
    model.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    list(train.fine_tune(model, examples, optimizer, 3, 4, micro_batch_size=2, clip=1.0, seed=0))
    assert len(torch.cat(seen).unique(dim=0)) == 12  # each once
    return model


BITS, RANKS, SEEDS = st.sampled_from([2, 3, 4]), st.integers(1, 5), st.integers(0, 2**31)
SHAPES = st.integers(1, 5), st.integers(1, 8), st.integers(1, 40) | st.just(32)  # O, G, g
WEIGHTS = st.builds(normal, *SHAPES, SEEDS)
LAYERS = st.builds(integer_layer, BITS, *SHAPES, RANKS, SEEDS)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
TEXTS, ANSWERS = st.text(max_size=12), st.text(min_size=1, max_size=12)
TRAIN = "--weights weights --data records.json --bits 3 --save-every 2 --lr 1e-3"


@given(BITS, WEIGHTS, st.integers(-20, 4), DTYPES)
def test_a_group_stores_a_scale_an_offset_and_a_code_for_each_weight(bits, w, size, dtype):
    """1. W~ = α · codes + β, codes = round((W - β) / α), a scale α and offset β a group (eq. 1)."""
    w = (w * 2.0**size).to(dtype)
    codes, scale, offset = quantized = quantize_rtn(w.flatten(1), bits, w.shape[2])
    w, scale, offset = w.double(), scale[..., None].double(), offset[..., None].double()
    stored = scale * codes.view(w.shape) + offset  # in float64
    assert torch.equal(dequantize(quantized, dtype), stored.flatten(1).float().to(dtype))
    # half a step, and W - β and its quotient in float32: 2^-24 of at most 2^bits steps each
    assert ((w - stored).abs() <= scale * (0.5 + 2.0 ** (bits - 23))).all()
    low, high = w.aminmax(dim=2, keepdim=True)
    step = (high - low) / (2**bits - 1)
    assert torch.equal(offset, low) and codes.max() < 2**bits
    assert ((0.9999 * step <= scale) & (scale <= 1.001 * step + 2**-24)).all()  # up to float16


@given(LAYERS)
def test_a_weight_takes_its_bits_and_its_share_of_a_scale_and_an_offset(layer):
    """2. bits + (16 + 32) / g, rows padded to 32 codes: 5.5 bits for 4 bits in groups of 32."""
    base, bits, (rows, groups) = layer.base, layer.base.bits, layer.base.scale.shape
    width = base.in_features + -base.in_features % 32
    assert 8 * sum(t.nbytes for t in base.buffers()) == rows * (width * bits + groups * (16 + 32))
    codes = torch.randint(2**bits, (rows, base.in_features), dtype=torch.uint8)
    assert torch.equal(quant.unpack(quant.pack(codes, bits), bits, base.in_features), codes)


def least_error(w_Ng, bits):
    """The least |w - α · codes - β|² of all α, β and codes, which are all tried; exact where 0."""
    g = w_Ng.shape[1]
    codes = torch.cartesian_prod(*[torch.arange(2**bits)] * g)
    codes = codes[codes.amax(1) > codes.amin(1)]  # equal codes are never better
    w, c = (g * t.double() - t.double().sum(1, keepdim=True) for t in (w_Ng, codes))  # without β
    w_2, c_2 = w.square().sum(1, keepdim=True), c.square().sum(1)
    return ((w_2 * c_2 - (w @ c.t()).square()) / c_2).amin(1) / g**2  # at α = w · c / c²


@pytest.mark.parametrize("bits, g", [(2, 3), (2, 5), (3, 4), (4, 3)])
def test_lora_cannot_be_merged_unless_its_update_is_constant_in_each_group(bits, g):
    """3. W~ + s · B A, A [R, I], is not always α · codes + β (3.3): try all updates of -1, 0, 1."""
    torch.manual_seed(0)
    updates = torch.cartesian_prod(*[torch.arange(-1.0, 2)] * g)  # [N, g]
    stays = torch.ones(len(updates), dtype=torch.bool)
    for _ in range(20):
        lora = LoRALinear(nn.Linear(g, len(updates), bias=False), rank=g, alpha=g)
        lora.base.weight.data = 8.0 * torch.randint(2**bits, (1, g)).expand_as(updates)
        lora.lora_A.data, lora.lora_B.data = torch.eye(g), updates
        stays &= least_error(merge(lora).weight, bits) == 0
    assert torch.equal(stays, updates.amax(1) == updates.amin(1))
    assert least_error(torch.tensor([[0, 8, 16 + 1]]), 2).item() == pytest.approx(1 / 6)


@given(LAYERS)
def test_qalora_can_be_merged_as_it_moves_offsets_and_nothing_else(layer):
    """4. α · codes + β + s · B A = α · codes + β', A [R, G] (section 3.3); any β' can be had."""
    rows, groups = layer.base.offset.shape
    full = QALoRALinear(copy.deepcopy(layer.base), rank=groups, alpha=groups)
    full.lora_A.data = torch.eye(groups)  # B is the change: O · G degrees of freedom, as offsets
    full.lora_B.data = torch.randint(2**20, (rows, groups)).float()
    for adapted, change in ((layer, 2 * layer.lora_B @ layer.lora_A), (full, full.lora_B)):
        w_OGg = adapted.base.dequantize().unflatten(1, (groups, -1)) + change[..., None]
        assert torch.equal(merge(adapted).dequantize(), w_OGg.flatten(1))


@given(LAYERS, DTYPES | st.just(torch.float64))
def test_the_adapter_sees_the_input_summed_over_each_group(layer, dtype):
    """5. y = x W~^T + s · pool(x) A^T B^T (algorithm 1) and its gradients, in float64; exact."""
    w, a, b = layer.base.dequantize(), layer.lora_A, layer.lora_B
    few = torch.rand(2, w.shape[1]).argsort() < 6  # inputs: sums stay below bfloat16's 256
    x, grad = few * torch.randint(-1, 2, few.shape), torch.randint(-1, 2, (2, len(w)))
    x_, a_, b_ = (t.detach().double().requires_grad_() for t in (x, a, b))
    pooled = nn.functional.avg_pool1d(x_, layer.base.group_size) * layer.base.group_size
    expected = x_ @ w.double().t() + 2 * pooled @ a_.t() @ b_.t()
    expected.backward(grad.double())
    x = x.to(dtype).requires_grad_()
    y = layer(x)
    y.backward(grad.to(dtype))
    for ours, exact in ((y, expected), (x.grad, x_.grad), (a.grad, a_.grad), (b.grad, b_.grad)):
        assert torch.equal(ours, exact.to(ours.dtype))


@given(LAYERS, DTYPES | st.just(torch.float64))
def test_a_new_adapter_changes_no_bit(layer, dtype):
    """6. B = 0, so s · B A = 0. A is random, so the gradient of B is not 0."""
    new = QALoRALinear(layer.base, layer.rank, alpha=16)
    x = torch.randn(3, layer.base.in_features).to(dtype)
    assert torch.equal(new(x), layer.base(x)) and new.lora_A.any()


@given(BITS, WEIGHTS, RANKS, st.integers(-20, 10), DTYPES)
def test_a_merged_layer_returns_the_adapted_layers_bits(bits, w_OGg, rank, size, dtype):
    """7. x (W~ + s · B A)^T: not exact, but what is rounded is rounded alike."""
    quantized = quantize_rtn(w_OGg.flatten(1), bits, w_OGg.shape[2])
    layer = QALoRALinear(QuantLinear.from_quantized(quantized, bits), rank, alpha=7)
    layer.lora_B.data.normal_(std=2.0**size)
    x = torch.randn(2, 3, layer.base.in_features).to(dtype)
    adapted, merged = layer(x), merge(layer)
    assert type(merged) is QuantLinear and torch.equal(merged(x), adapted)


@settings(max_examples=15)
@given(BITS, st.sampled_from([1, 8, 32]), st.sets(st.sampled_from(LINEARS), min_size=1), DTYPES)
def test_merging_a_trained_model_keeps_its_logits_and_moves_offsets_only(bits, g, names, dtype):
    """8. β' = β + s · B A; α, codes and all other layers stay, and every bit of the output (7)."""
    base = quantize_model(llama(), bits, g).to(dtype)
    adapted = trained(add_adapters(copy.deepcopy(base), 4, 16, names))
    merged, tokens = merge(copy.deepcopy(adapted)), torch.randint(400, (3, 20))
    assert torch.equal(merged(tokens), adapted(tokens))
    before, after = base.state_dict(), merged.state_dict()
    changed = {name for name in before | after if not torch.equal(before[name], after[name])}
    assert changed == {f"{path}.offset" for path, _ in linears(base, names)}


def test_merging_twice_or_nothing_or_what_does_not_fit_is_an_error(tmp_path):
    """9. β + s · B A is wrong a second time, and where B A has other groups than β."""
    model = add_adapters(quantize_model(llama(), 4, 16), 2, 16)
    adapter.save_adapter(model, tmp_path / "adapter")
    for module in (merge(model), llama(), nn.Linear(2, 2)):
        with pytest.raises(UserError, match="no adapter"):
            merge(module)
    with pytest.raises(UserError, match="group size"):
        adapter.load_adapter(quantize_model(llama(), 4, 8), tmp_path / "adapter")


def test_the_trainable_parameters_are_the_papers():
    """10. LoRA (I + O) · R, QA-LoRA (G + O) · R: table 2, in millions, at R = 64, groups of 32."""
    table = {"7b": [160, 89], "13b": [250, 140], "33b": [488, 272], "65b": [800, 447]}
    for size, millions in table.items():
        with torch.device("meta"):
            models = Llama(CONFIGS[size]), quantized.quantized_skeleton(CONFIGS[size], 4, 32)
            parameters = [add_adapters(model, 64, 16).parameters() for model in models]
        trainable = [sum(p.numel() for p in ps if p.requires_grad) for ps in parameters]
        assert [round(n / 1e6) for n in trainable] == millions


@given(BITS, WEIGHTS)
def test_gptq_is_rounding_to_nearest_where_inputs_are_uncorrelated(bits, w_OGg):
    """11. min |(W - W~) x|² with H = x x^T: if H is diagonal no weight makes up for another."""
    w, group_size = w_OGg.flatten(1), w_OGg.shape[2]
    hessian = torch.diag(2.0 ** torch.randint(-20, 21, w.shape[1:]))
    gptq = quantize_gptq(w, hessian, bits, group_size, search=False)
    assert all(map(torch.equal, gptq, quantize_rtn(w, bits, group_size)))


@settings(max_examples=10)
@given(BITS, st.booleans(), SEEDS)
def test_gptq_is_better_where_inputs_are_correlated(bits, search, seed):
    torch.manual_seed(seed)
    w, x = torch.randn(64, 96), torch.randn(200, 24) @ torch.randn(24, 96)  # 96 inputs, rank 24
    gptq = dequantize(quantize_gptq(w, x.t() @ x, bits, 32, search))
    rtn = dequantize(quantize_rtn(w, bits, 32))
    assert ((w - gptq) @ x.t()).norm() < 0.7 * ((w - rtn) @ x.t()).norm()


def test_blocks_are_calibrated_on_what_the_quantized_blocks_before_them_give():
    """12. H = x x^T for a block's own float layers, x what the quantized blocks before it give."""
    model, tokens, inputs = llama(), torch.randint(400, (4, 16)), []
    float_block = copy.deepcopy(model.model.layers[1])
    gptq = mock.Mock(side_effect=lambda w, *_: quantize_rtn(w, 2, 8))
    with mock.patch("quant.quantize_gptq", gptq):
        quantize_model(model, 2, 8, tokens)
    model.model.layers[1] = float_block
    for _, layer in linears(float_block):
        layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0].flatten(0, 1)))
    model(tokens)
    for call, x in zip(gptq.call_args_list[7:], inputs, strict=True):  # sums in float32
        torch.testing.assert_close(call.args[1], x.t() @ x / 64, rtol=1e-4, atol=1e-5)


@given(st.lists(st.tuples(TEXTS, ANSWERS), min_size=1, max_size=4), st.integers(80, 120), RANKS)
def test_only_response_tokens_are_learned(world, texts, max_length, size):
    """13. loss = mean of -log p(y_t | x, y_<t): x the prompt, y the response and its end (EOS)."""
    encoder, losses = tokenizer.load_tokenizer(world / "weights"), []
    records = [(templates.Turn("user", x), templates.Turn("assistant", y)) for x, y in texts]
    examples, _ = batches.encode(records, encoder, max_length)
    logits_BTV = normal(len(texts), max_length, 400, seed=0).float().requires_grad_()
    parts = iter(logits_BTV.split(size))  # of a micro-batch each
    network = mock.Mock(side_effect=lambda x, keep_BT: next(parts)[:, : x.shape[1]][keep_BT])
    network.parameters.return_value = iter([logits_BTV])
    loss = train.accumulate_gradients(network, examples, micro_batch_size=size)
    for (prompt, response), logits, grad in zip(texts, logits_BTV, logits_BTV.grad, strict=True):
        prompt = [1, *encoder.encode(templates.alpaca_prompt(prompt))]
        tokens = torch.tensor([*prompt, *encoder.encode(response), 2][:max_length])
        places = torch.arange(len(prompt) - 1, len(tokens) - 1)  # each predicts the token after it
        assert torch.equal(grad.any(1).nonzero()[:, 0], places)
        losses += [nn.functional.cross_entropy(logits[t], tokens[t + 1]).item() for t in places]
    assert loss == pytest.approx(sum(losses) / len(losses), rel=1e-5)  # of float32


def command(folder, script, words):
    with contextlib.chdir(folder), mock.patch("sys.argv", [script, *words.split()]):
        runpy.run_module(script, run_name="__main__")


@pytest.fixture(scope="module")
def world(tmp_path_factory):  # a folder with weights/, records.json and run/, a finished run
    folder = tmp_path_factory.mktemp("world")
    huggingface.save_pretrained(llama(), folder / "weights")
    records = [{"instruction": f"Count to {n}.", "output": str([*range(n)])} for n in range(9)]
    texts = [templates.alpaca_prompt(r["instruction"]) + r["output"] for r in records]
    tokenizer.train_tokenizer(texts, folder / "weights" / "tokenizer.model", 400)
    (folder / "records.json").write_text(json.dumps(records * 3))
    command(folder, "train", f"{TRAIN} --steps 5 --out run")
    return folder


@pytest.mark.parametrize("steps", [1, 4])
def test_a_run_resumed_is_the_run_uninterrupted_to_the_bit(world, steps):
    """14. A step is a function of the settings, of its number and of the step before it."""
    command(world, "train", f"{TRAIN} --steps {steps} --out resumed-{steps}")
    command(world, "train", f"--resume --steps 5 --out resumed-{steps}")
    files = [world / run / "adapter" / "adapter.safetensors" for run in ("run", f"resumed-{steps}")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_what_is_written_and_exported_is_the_merged_model(world):
    """15. In a GGUF file's Q4_1, d · code + m: the same codes, d = α, m = β' rounded to float16."""
    gguf = pytest.importorskip("gguf", reason="needs gguf: pip install gguf")
    command(world, "merge", "run --out merged")
    command(world, "export", "merged --out merged.gguf")
    merged, adapted = load_model(world / "merged"), load_model(world / "run" / "base")
    adapter.load_adapter(adapted, world / "run" / "adapter")
    tokens = torch.randint(400, (3, 20))
    assert torch.equal(merged(tokens), adapted(tokens)) and not adapter_parameters(merged)
    written = {t.name: t for t in gguf.GGUFReader(world / "merged.gguf").tensors}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, n_blocks=2)
    for path, layer in linears(merged):
        layer.offset = layer.offset.half().float()
        w, tensor = layer.dequantize(), written[f"{names.get_name(path)}.weight"]
        if path.endswith(("q_proj", "k_proj")):  # llama.cpp rotates neighbours, not two halves
            w = w.unflatten(0, (-1, 2, 4)).transpose(1, 2).flatten(0, 2)
        assert torch.equal(torch.tensor(gguf.dequantize(tensor.data, tensor.tensor_type)), w), path
