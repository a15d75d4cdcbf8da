"""What quant.py promises: codes cost exactly their bits, and rounding to nearest is the best.

Weights and scales are small integers times powers of two wherever that is possible: floating-point
arithmetic is then exact, and the tests ask for equality. Where they allow for rounding they say
which.
"""

import numpy as np
import pytest
import torch
from helpers import BITS, SEEDS, dense, integers, normal, random_quantized, same
from hypothesis import example, given
from hypothesis import strategies as st

from cli.errors import UserError
from quant import (
    Quantized,
    dequantize,
    pack,
    packed_width,
    quantize_gptq,
    quantize_rtn,
    unpack,
)

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
ROWS, GROUPS, GROUP_SIZES = st.integers(1, 5), st.integers(1, 4), st.integers(1, 40)
EVERY_SCALE = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float64)  # 0 to 65504

# ---- packed codes


def packed_by_hand(row, bits):
    """The bytes of one row of codes, from the docstring of `pack`, in Python's integers."""
    row = row + [0] * (-len(row) % 32)
    n = len(row)
    if bits == 4:
        return [row[j] | row[j + n // 2] << 4 for j in range(n // 2)]
    low = [sum((row[j + k * n // 4] & 3) << 2 * k for k in range(4)) for j in range(n // 4)]
    high = [sum((row[j + k * n // 8] >> 2) << k for k in range(8)) for j in range(n // 8)]
    return low if bits == 2 else low + high


@given(BITS, ROWS, st.integers(1, 100), SEEDS)
@example(4, 1, 32, 0)
def test_packed_bytes_lie_as_the_docstring_says(bits, rows, width, seed):
    codes = integers(seed, 0, 2**bits - 1, rows, width, dtype=torch.uint8)
    assert pack(codes, bits).tolist() == [packed_by_hand(row, bits) for row in codes.tolist()]


@given(BITS, ROWS, st.integers(1, 3), SEEDS)
def test_every_byte_string_is_some_packing(bits, rows, blocks, seed):
    packed = integers(seed, 0, 255, rows, blocks * 4 * bits, dtype=torch.uint8)
    assert same([pack(unpack(packed, bits, blocks * 32), bits)], [packed])


@pytest.mark.parametrize("bits", [0, 1, 5, 8])
def test_only_2_3_and_4_bits_exist(bits):
    with pytest.raises(AssertionError, match=f"not {bits}"):
        packed_width(32, bits)


# ---- rounding to nearest


def rtn_by_hand(w_OI, bits, group_size):
    """In float64: the smallest scale that spans a group, the smallest weight, the nearest codes."""
    codes, scales, offsets = [], [], []
    for row in w_OI.double().numpy():
        for start in range(0, len(row), group_size):
            w = row[start : start + group_size]
            scale = EVERY_SCALE[np.searchsorted(EVERY_SCALE * (2**bits - 1), w.max() - w.min())]
            codes.append(np.round((w - w.min()) / scale) if scale else 0 * w)
            scales.append(scale)
            offsets.append(w.min())
    shape = (w_OI.shape[0], -1)
    return Quantized(
        torch.tensor(np.concatenate(codes), dtype=torch.uint8).view(shape),
        torch.tensor(np.array(scales), dtype=torch.float16).view(shape),
        torch.tensor(np.array(offsets), dtype=torch.float32).view(shape),
    )


@given(BITS, ROWS, GROUPS, GROUP_SIZES, SEEDS, st.integers(-34, 5), st.integers(0, 1000))
@example(4, 2, 2, 8, 0, -34, 3)  # spans below float16's smallest number
@example(4, 2, 2, 8, 0, 9, 959)  # just below its largest
def test_rtn_is_the_rounding_by_hand(bits, rows, groups, group_size, seed, exponent, largest):
    w = integers(seed, -largest, largest, rows, groups * group_size) * 2.0**exponent
    assert same(quantize_rtn(w, bits, group_size), rtn_by_hand(w, bits, group_size))


@given(BITS, ROWS, GROUPS, GROUP_SIZES, SEEDS, st.integers(-149, 13), st.integers(-30, 30))
def test_rtn_is_within_half_a_scale_at_every_magnitude(
    bits, rows, groups, group_size, seed, exponent, shift
):
    """But for rounding: w - offset and the division by scale each err by 2^-24 of 2^bits codes."""
    w = ((normal(seed, rows, groups * group_size) + shift) * 2.0**exponent).float()
    quantized = quantize_rtn(w, bits, group_size)
    error = (w.double() - dense(quantized)).abs().view(rows, groups, group_size).amax(-1)
    assert quantized.codes.max() < 2**bits
    bound = quantized.scale.double() * (0.5 + 2.0 ** (bits - 23))
    assert (error <= bound).all(), (error / quantized.scale).max()


@given(
    ROWS,
    GROUPS,
    GROUP_SIZES,
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=20, max_size=20),
    BITS,
)
def test_constant_groups_are_exact_with_scale_zero(rows, groups, group_size, values, bits):
    of_groups = torch.tensor(values[: rows * groups]).view(rows, groups)
    w = of_groups.repeat_interleave(group_size, dim=1)
    quantized = quantize_rtn(w, bits, group_size)
    assert not quantized.scale.any() and not quantized.codes.any()
    assert same([dequantize(quantized)], [w])


@given(BITS, st.integers(2, 40), st.integers(-149, 13), st.integers(0, 39))
def test_a_group_that_is_not_constant_never_gets_scale_zero(bits, group_size, exponent, where):
    w = torch.zeros(1, group_size)
    w[0, where % group_size] = 2.0**exponent  # 2^-149 is float32's smallest number
    assert quantize_rtn(w, bits, group_size).scale.item() > 0


@given(st.sampled_from(DTYPES), BITS, ROWS, GROUPS, GROUP_SIZES, SEEDS)
def test_weights_of_every_dtype_are_quantized_as_their_float32_values(
    dtype, bits, rows, groups, group_size, seed
):
    w = (normal(seed, rows, groups * group_size) / 50).to(dtype)
    assert same(quantize_rtn(w, bits, group_size), quantize_rtn(w.float(), bits, group_size))


@given(BITS, ROWS, GROUPS, GROUP_SIZES, SEEDS, st.integers(-30, 30))
def test_dequantizing_rounds_to_float32_once(bits, rows, groups, group_size, seed, exponent):
    q = random_quantized(seed, rows, groups, group_size, bits)
    q = q._replace(offset=(normal(seed, rows, groups) * 2.0**exponent).float())
    assert same([dequantize(q)], [dense(q).float()])


@given(BITS)
def test_float16_overflow_is_refused_and_what_just_fits_is_not(bits):
    levels = 2**bits - 1
    assert quantize_rtn(torch.tensor([[0, 65504.0 * levels]]), bits, 2).scale.item() == 65504
    no_numbers = [0, torch.nan], [0, torch.inf], [-torch.inf, -torch.inf]
    for wrong in ([0, 65505.0 * levels], [-3e38, 3e38], *no_numbers):
        with pytest.raises(UserError, match="float16 cannot hold"):
            quantize_rtn(torch.tensor([wrong]), bits, 2)


@given(st.integers(1, 40), st.integers(1, 100), BITS)
def test_a_group_size_that_does_not_divide_is_refused_with_both_numbers(group_size, width, bits):
    w, hessian = torch.zeros(2, width), torch.eye(width)
    for quantize in (
        lambda: quantize_rtn(w, bits, group_size),
        lambda: quantize_gptq(w, hessian, bits, group_size),
    ):
        if width % group_size:
            with pytest.raises(UserError, match=rf"\b{group_size}\b.*\b{width}\b"):
                quantize()
        else:
            quantize()
