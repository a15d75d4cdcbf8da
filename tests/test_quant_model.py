"""What quant.py promises of a whole model: what is quantized, and on which inputs."""

import copy
import functools
import weakref

import numpy as np
import pytest
import torch
from helpers import THREE_LAYERS, TOKENS, integers, linears, random_llama, same

import formats
import quant
from cli.errors import UserError
from formats.files import fill
from formats.huggingface import save_pretrained
from llama import Llama, load_pretrained
from quant import QuantLinear, dequantize, pack, quantize_model, quantize_rtn


@pytest.mark.parametrize("bits, group_size", [(2, 8), (3, 4), (4, 1)])
def test_without_calibration_every_linear_of_every_block_is_rounded_and_nothing_else(
    bits, group_size
):
    model = random_llama()
    before = {name: p.clone() for name, p in model.named_parameters()}
    assert quantize_model(model, bits, group_size) is model
    layers = linears(model)
    assert len(layers) == 7 * THREE_LAYERS.num_hidden_layers
    for name, layer in layers.items():
        expected = quantize_rtn(before.pop(f"{name}.weight"), bits, group_size)
        assert isinstance(layer, QuantLinear)
        assert layer.bits == bits and layer.group_size == group_size
        packed = pack(expected.codes, bits)
        assert same([layer.packed, layer.scale, layer.offset], [packed, *expected[1:]])
    left = dict(model.named_parameters())
    assert left.keys() == before.keys() and same(left.values(), before.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_calibration_in_several_batches_and_in_bfloat16_is_on_the_same_inputs(monkeypatch, dtype):
    """GPTQ is replaced by RTN that notes its arguments.

    Expected is the mean of x xᵀ over each linear's inputs x in a model whose blocks before are
    quantized (to 2 bits: a large change), and the linear's own block is not.
    """
    asked = []

    def note(w, hessian, bits, group_size, *_, **__):
        asked.append((w.clone(), hessian.clone()))
        return quantize_rtn(w, bits, group_size)

    monkeypatch.setattr(quant, "quantize_gptq", note)
    monkeypatch.setattr(quant, "CALIBRATION_BATCH", 40)  # 96 tokens take several batches
    model = random_llama(scale=8).to(dtype)
    mirror = copy.deepcopy(model)
    quantize_model(model, 2, 8, TOKENS)
    inputs = {}

    def keep(name, layer, arguments):
        inputs[name] = arguments[0].flatten(0, 1)

    for name, layer in linears(mirror).items():
        layer.register_forward_pre_hook(functools.partial(keep, name))
    for name in linears(model):
        if name.endswith("q_proj"):  # first of its block: those before are quantized in the mirror
            mirror(TOKENS)
            seen = dict(inputs)
        w, hessian = asked.pop(0)
        layer, x = mirror.get_submodule(name), seen[name].double()
        assert same([w], [layer.weight.data])
        rtol, atol = (1e-4, 1e-5) if dtype == torch.float32 else (0.05, 0.01)
        expected = x.t() @ x / len(x)
        torch.testing.assert_close(hessian.double(), expected, rtol=rtol, atol=atol, msg=name)
        layer.weight.data = dequantize(quantize_rtn(w, 2, 8)).to(dtype)
    assert not asked


def test_gptq_brings_a_models_logits_nearer_than_rtn():
    ratios = []
    for seed in range(5):
        exact, rtn, gptq = (random_llama(seed, scale=4) for _ in range(3))
        quantize_model(rtn, 3, 8)
        quantize_model(gptq, 3, 8, integers(seed, 0, 39, 32, 32, dtype=torch.long))
        errors = [(model(TOKENS) - exact(TOKENS)).norm() for model in (gptq, rtn)]
        ratios.append((errors[0] / errors[1]).item())
    assert np.mean(ratios) < 0.95, ratios


@pytest.mark.parametrize("tokens", [None, TOKENS], ids=["RTN", "GPTQ"])
@pytest.mark.parametrize("tied", [False, True])
def test_streaming_the_weights_gives_the_same_bits_with_one_dense_block_at_a_time(
    tmp_path, tokens, tied
):
    save_pretrained(random_llama(tie_word_embeddings=tied), tmp_path)
    loaded = quantize_model(load_pretrained(tmp_path), 3, 8, tokens)
    config, weights = formats.open_weights(tmp_path)
    with torch.device("meta"):
        model = Llama(config)
    blocks, model.model.layers = model.model.layers, torch.nn.ModuleList()
    fill(model, weights)  # all but the blocks
    model.model.layers = blocks

    seen = {}  # the dense weights that have been there

    def check(name):
        for other, layer in linears(model).items():
            block = ".".join(other.split(".")[:3])
            ours = name.startswith(f"{block}.")
            in_float = not isinstance(layer, QuantLinear) and not layer.weight.is_meta
            assert ours or not in_float, f"{other} is dense at {name}"
            if in_float:
                seen[other] = weakref.ref(layer.weight)
            gone = other not in seen or seen[other]() is None
            assert ours or gone, f"{other} is kept by other means at {name}"

    def watched(name, read):
        def look():
            check(name)
            return read()

        return look

    watched_weights = {name: watched(name, read) for name, read in weights.items()}

    def load_block(block, index):
        fill(block, watched_weights, f"model.layers.{index}.")

    streamed = quantize_model(model, 3, 8, tokens, load_block=load_block)
    assert len(seen) >= 6 * THREE_LAYERS.num_hidden_layers, "nothing was watched"
    assert loaded.state_dict().keys() == streamed.state_dict().keys()
    assert same(loaded.state_dict().values(), streamed.state_dict().values())


@pytest.mark.parametrize("tokens", [None, TOKENS], ids=["RTN", "GPTQ"])
@pytest.mark.parametrize("value", [1e9, float("nan")])
def test_a_scale_that_float16_cannot_hold_names_the_layer(tokens, value):
    model = random_llama()
    model.model.layers[1].mlp.down_proj.weight.data[3, 5] = value
    with pytest.raises(UserError, match=r"model\.layers\.1\.mlp\.down_proj\b.*float16 cannot hold"):
        quantize_model(model, 4, 8, tokens)


@pytest.mark.parametrize(
    "group_size, layer, inputs",
    [
        (32, "self_attn.q_proj", 16),
        (16, "mlp.down_proj", 24),
        (3, "self_attn.q_proj", 16),
        (0, "self_attn.q_proj", 16),
        (-8, "self_attn.q_proj", 16),
    ],
)
def test_a_group_size_that_does_not_fit_names_layer_and_numbers_and_what_would(
    group_size, layer, inputs
):
    model = random_llama()
    with pytest.raises(
        UserError, match=rf"model\.layers\.0\.{layer}\b.* {group_size} .* {inputs} .*1, 2, 4, 8$"
    ):
        quantize_model(model, 4, group_size)
    assert not any(isinstance(m, QuantLinear) for m in model.modules())


def test_the_inputs_of_o_proj_are_all_heads_together_and_groups_must_divide_them():
    model = random_llama(head_dim=10)  # 2 heads: 20 inputs, in a model 16 wide
    with pytest.raises(UserError, match=r"self_attn\.o_proj: .* 8 .* 20 inputs; .*1, 2, 4$"):
        quantize_model(model, 4, 8)
    assert quantize_model(model, 4, 4).model.layers[0].self_attn.o_proj.in_features == 20


def test_search_is_the_default_of_a_model_and_can_be_left_out(monkeypatch):
    asked = []

    def note(w, hessian, bits, group_size, search):
        asked.append((search, hessian.dtype))
        return quantize_rtn(w, bits, group_size)

    monkeypatch.setattr(quant, "quantize_gptq", note)
    for more, expected in (({}, True), ({"search": False}, False)):
        asked.clear()
        quantize_model(random_llama().bfloat16(), 4, 8, TOKENS, **more)
        assert asked == [(expected, torch.float32)] * 7 * THREE_LAYERS.num_hidden_layers
