"""Layers for PyTorch's int4 kernel multiply by the same weights, in bfloat16's precision."""

import copy
import gc
import weakref

import pytest
import torch
from helpers import BITS, SEEDS, dense, integers, normal, random_quantized
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from kernels import int4, matmul
from quant import QuantLinear, quantize_rtn


def int4_case(seed, rows, groups, group_size, bits=4):
    """(QuantLinear, its exact weight [O, I] in float64) with scales that bfloat16 holds."""
    quantized = random_quantized(seed, rows, groups, group_size, bits)
    return QuantLinear.from_quantized(quantized, bits), dense(quantized)


@given(
    BITS,
    st.integers(1, 5),
    st.integers(1, 4),
    st.sampled_from([32, 64, 128]),
    st.integers(1, 200),
    SEEDS,
)
@example(4, 9, 2, 32, 129, 0)  # more rows than are unpacked at a time, the last piece a short one
@example(4, 1, 1, 32, 128, 0)  # the last number of tokens that the kernel gets
@example(4, 1, 1, 32, 129, 0)  # the first that are multiplied by unpacked rows
@settings(max_examples=30)
def test_a_prepared_layer_multiplies_by_the_same_weights(
    bits, blocks, groups, group_size, tokens, seed
):
    """Inputs are small integers, which bfloat16 holds, so that only sums round: to bfloat16 where
    the kernel is used."""
    layer, w = int4_case(seed, blocks * int4.int4_interleaving(), groups, group_size, bits)
    x = integers(seed, -4, 4, tokens, groups * group_size)
    model = int4.prepare_inference(nn.Sequential(copy.deepcopy(layer)))
    assert isinstance(model[0], int4.Int4Linear)
    assert {*dict(model[0].named_buffers())} == {
        "int4",
        "scale_zero",
    }  # the packed original is dropped
    for dtype in (torch.float32, torch.bfloat16):
        y = model(x.to(dtype).view(1, tokens, -1))
        assert y.dtype == dtype and y.shape == (1, tokens, len(w))
        exact, size = x.double() @ w.t(), x.double().abs() @ w.abs().t()
        precise = dtype == torch.float32 and tokens > int4.FEW_TOKENS
        assert ((y[0] - exact).abs() <= (1e-6 if precise else 2**-7) * size).all()


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("tokens", [1, 200])
def test_a_prepared_layer_errs_by_bfloat16s_rounding_of_scale_and_middle_weight(tokens, bits):
    """By 0.0035 of the result, measured; a dense bfloat16 layer by 0.0024."""
    layer = QuantLinear.from_quantized(quantize_rtn(normal(0, 128, 1024) * 0.02, bits, 32), bits)
    x = normal(1, tokens, 1024).float()
    exact = x @ layer.dequantize().t()
    assert (int4.prepare_inference(nn.Sequential(layer))(x) - exact).norm() < 0.004 * exact.norm()


def test_a_layer_is_let_go_once_it_is_repacked():
    layer, _ = int4_case(0, int4.int4_interleaving(), 2, 32)
    model, original = nn.Sequential(layer), weakref.ref(layer.packed)
    del layer
    int4.prepare_inference(model)
    gc.collect()
    assert original() is None


@pytest.mark.parametrize("rows, group_size", [(48, 32), (64, 16), (64, 48)])
def test_a_layer_that_the_int4_kernel_does_not_take_stays(rows, group_size):
    layer, _ = int4_case(0, rows, 2, group_size)
    assert int4.prepare_inference(nn.Sequential(layer))[0] is layer


def test_a_prepared_layer_may_unpack_any_number_of_rows_at_a_time(monkeypatch):
    layer, _ = int4_case(0, 3 * int4.int4_interleaving(), 2, 32)
    layer, x = int4.prepare_inference(nn.Sequential(layer))[0], integers(0, -4, 4, 200, 64)
    whole = layer(x)
    monkeypatch.setattr(
        matmul, "IN_CACHE", 2 * 64 * int4.int4_interleaving()
    )  # two blocks, then one
    assert torch.equal(layer(x), whole)


def test_where_the_int4_order_is_unknown_nothing_is_prepared(monkeypatch):
    monkeypatch.setattr(
        torch, "_convert_weight_to_int4pack_for_cpu", lambda codes, _: codes[:, ::2].to(torch.uint8)
    )
    int4.int4_interleaving.cache_clear()
    try:
        layer, _ = int4_case(0, 64, 2, 32)
        assert int4.prepare_inference(nn.Sequential(layer))[0] is layer
    finally:
        int4.int4_interleaving.cache_clear()
