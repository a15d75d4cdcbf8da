"""GPTQ's search of ranges: on the known layer, over many draws, and each step against an oracle."""

import functools
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quant import (
    best_range,
    damped_factor,
    dequantize,
    fit_range,
    quantize_gptq,
    quantize_rtn,
    round_in_order,
)

BITS, GROUP_SIZES, SEEDS = st.integers(2, 4), st.integers(2, 40), st.integers(0, 2**31)


def layer(seed, inputs, outputs, spread=0.8):
    """Weights of deviation 0.02; the Hessian of inputs z M diag(exp(spread * n)).

    z and n are normal, M is near 1.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    w = (0.02 * normal(outputs, inputs)).float()
    mixing = torch.eye(inputs) + 0.7 * normal(inputs, inputs) / inputs**0.5
    mixing = mixing + 2 * torch.outer(normal(inputs), normal(inputs)) / inputs
    x = mixing * torch.exp(spread * normal(inputs))
    return w, x.t() @ x


def output_error(w, quantized, hessian):
    """The relative error of the layer's outputs, sqrt(E |(W - Ŵ) x|² / E |W x|²)."""
    error, w = (w - dequantize(quantized)).double(), w.double()
    return (((error @ hessian) * error).sum() / ((w @ hessian) * w).sum()).sqrt().item()


def output_errors(w, hessian, bits, group_size):
    """Those of GPTQ, of RTN, and of GPTQ without the search."""
    gptq = quantize_gptq(w, hessian, bits, group_size)
    rtn = quantize_rtn(w, bits, group_size)
    plain = quantize_gptq(w, hessian, bits, group_size, search=False)
    return [output_error(w, quantized, hessian) for quantized in (gptq, rtn, plain)]


def one_group(seed, group_size, rows=20):
    """(w_gO, factor_gg) as a group finds them."""
    w, hessian = layer(seed, group_size, rows)
    return w.t().contiguous(), damped_factor(hessian, 0.01)


@pytest.mark.parametrize(
    "bits, plain, searched", [(2, 0.4246, 0.1857), (3, 0.1406, 0.0895), (4, 0.0631, 0.0444)]
)
def test_on_the_1024_wide_layer_gptq_beats_the_better_of_plain_gptq_and_rtn(bits, plain, searched):
    w, hessian = layer(0, 1024, 1024)
    errors = output_errors(w, hessian, bits, 32)
    assert errors[0] < 0.75 * min(errors[1:]), errors
    assert errors[0] == pytest.approx(searched, rel=0.01), errors
    assert errors[2] == pytest.approx(plain, rel=0.01), errors


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize(
    "group_size, spread", [(8, 0.8), (32, 0), (32, 0.3), (32, 1.5), (128, 0.8)]
)
def test_over_many_layers_it_beats_both(bits, group_size, spread):
    """On every draw, whether the inputs have equal or very different sizes."""
    for seed in range(5):
        w, hessian = layer(seed, 256, 48, spread)
        found, rtn, plain = output_errors(w, hessian, bits, group_size)
        assert found < 0.95 * min(rtn, plain), (seed, found, rtn, plain)


@given(BITS, GROUP_SIZES, st.integers(1, 3), SEEDS)
def test_where_nothing_is_correlated_no_row_is_worse_than_rtn(bits, group_size, groups, seed):
    w, hessian = layer(seed, groups * group_size, 20)
    weight = damped_factor(torch.diag(hessian.diagonal()), 0.01).diagonal().square()

    def error(quantized):
        return ((w - dequantize(quantized)).square() * weight).sum(dim=1)

    found = error(quantize_gptq(w, torch.diag(hessian.diagonal()), bits, group_size))
    rtn = error(quantize_rtn(w, bits, group_size))
    assert (found <= rtn * 1.005 + 1e-12).all()  # the search does without the rounding to float16


@given(BITS, st.integers(8, 40), SEEDS)
def test_a_best_range_is_the_best_of_all_that_are_tried(bits, group_size, seed):
    """Against a loop over all pairs of cuts in float64.

    First multiples of 10 %, the more bits the fewer, then the nine around the best of them.
    """
    w, factor = one_group(seed, group_size, rows=3)
    importance, levels = factor.diagonal().double().square(), 2**bits - 1
    scale, offset = best_range(w, importance.float(), bits)

    def error(row, scale, offset):
        codes = ((row - offset) / scale).round().clamp(0, levels)
        return (importance * (row - scale * codes - offset).square()).sum().item()

    def best_of(row, cuts):
        low, width = row.min(), row.max() - row.min()
        tried = []
        for a, b in cuts:
            tried.append((error(row, (1 - a - b) * width / levels, low + a * width), a, b))
        return min(tried)

    for row, s, o in zip(w.t().double(), scale.double(), offset.double(), strict=True):
        coarse = [(i / 10, j / 10) for i, j in itertools.product(range(7 - bits), repeat=2)]
        _, a, b = best_of(row, coarse)
        fine = [(a + i / 20, b + j / 20) for i, j in itertools.product((-1, 0, 1), repeat=2)]
        best, _, _ = best_of(row, fine)
        # float16 moves no level by more than a 1024th of the group's range
        float16 = importance.sum().sqrt().item() * (row.max() - row.min()).item() / 1024
        assert error(row, s, o) ** 0.5 == pytest.approx(best**0.5, abs=float16)


@given(BITS, GROUP_SIZES, SEEDS, st.floats(0.3, 3), st.floats(-1, 1))
def test_a_fitted_range_is_the_least_squares_solution(bits, group_size, seed, stretch, shift):
    """Against numpy's lstsq on the two columns codes·R and 1·R, row by row.

    And it is never worse than what was given.
    """
    w, factor = one_group(seed, group_size, rows=4)
    scale, offset = best_range(w, factor.diagonal().square(), bits)
    codes = round_in_order(w, factor, scale, offset, bits)
    given_scale, given_offset = (stretch * scale.float()).half(), offset + shift * scale.float()
    found = fit_range(w, factor, codes, given_scale, given_offset)
    f = factor.double().numpy()

    def squared_error(target, columns, s, o):
        return np.square(target - columns @ [float(s), float(o)]).sum()

    for k, (s, o) in enumerate(zip(*found, strict=True)):
        columns = np.stack([codes[:, k].double().numpy() @ f, f.sum(axis=0)], axis=1)
        target = w[:, k].double().numpy() @ f
        error = functools.partial(squared_error, target, columns)
        optimum = np.linalg.lstsq(columns, target, rcond=None)[0]
        assert error(s, o) <= error(given_scale[k], given_offset[k]) * (1 + 1e-5)
        # not where all codes are equal, so that one column is a multiple of the other, nor beyond
        # what `fit_range` takes
        if np.unique(codes[:, k]).size > 1 and 1e-4 < optimum[0] < 3.9 * given_scale[k]:
            assert error(s, o) <= error(*optimum) * (1 + 1e-3) + 1e-6 * np.square(target).sum()


@given(BITS, GROUP_SIZES, st.integers(1, 4), SEEDS, st.integers(-60, 60))
def test_constant_groups_stay_exact_and_no_other_gets_scale_zero(
    bits, group_size, groups, seed, level
):
    _, hessian = layer(seed, groups * group_size, 1)
    w = torch.full((3, groups * group_size), level / 64)
    w[1, -1] += 1
    found = quantize_gptq(w, hessian, bits, group_size)
    assert torch.equal(dequantize(found)[[0, 2]], w[[0, 2]]) and not found.scale[[0, 2]].any()
    assert found.scale[1, -1] > 0 and dequantize(found).isfinite().all()


@given(BITS, st.integers(1, 4), SEEDS, st.integers(-6, 12))
def test_larger_weights_get_the_same_codes(bits, groups, seed, exponent):
    """Up to what float16 rounds; a power of two above its denormal numbers is nothing to it."""
    w, hessian = layer(seed, groups * 16, 10)
    found = quantize_gptq(w, hessian, bits, 16)
    larger = quantize_gptq(w * 2.0**exponent, hessian, bits, 16)
    if found.scale.min() > 2.0 ** (-14 + max(0, -exponent)):
        assert torch.equal(found.codes, larger.codes)
        assert torch.equal(found.offset * 2.0**exponent, larger.offset)


@given(BITS, GROUP_SIZES, SEEDS)
def test_what_the_groups_leave_is_the_error_of_the_whole(bits, group_size, seed):
    """|(W - Ŵ) R|² is the sum over groups of |(w - ŵ) R_gg|² with w as corrected.

    So greedy search is sound.
    """
    w, hessian = layer(seed, 3 * group_size, 5)
    factor = damped_factor(hessian, 0.01).double()
    quantized = quantize_gptq(w, hessian, bits, group_size)
    error, total = (w - dequantize(quantized)).double(), 0
    for low in range(0, 3 * group_size, group_size):
        here, before = slice(low, low + group_size), slice(0, low)
        inverse = factor[here, here].inverse()
        corrected_error = error[:, here] + error[:, before] @ factor[before, here] @ inverse
        total += (corrected_error @ factor[here, here]).square().sum()
    assert total.item() == pytest.approx((error @ factor).square().sum().item(), rel=1e-6)


@given(BITS, GROUP_SIZES, st.integers(0, 3), SEEDS)
def test_where_all_codes_are_equal_a_scale_stays_what_it_was_or_gets_better(
    bits, group_size, code, seed
):
    """The slope through points at one place is a ratio of rounding errors, even infinite."""
    w, factor = one_group(seed, group_size)
    scale, offset = best_range(w, factor.diagonal().square(), bits)
    codes = torch.full_like(w, code)

    def error(s, o):
        difference = (w - s.float() * codes - o).t().double()
        return (difference @ factor.double()).square().sum(dim=1)

    found = fit_range(w, factor, codes, scale, offset)
    assert (found[0] > 0).all() and (found[0] < 4 * scale).all()
    assert (error(*found) <= error(scale, offset) * 1.0001).all()
