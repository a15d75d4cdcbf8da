"""What other formats share: streams of codes, narrowed scales, what rounding is said to cost."""

import functools

import pytest
import torch
from helpers import SEEDS, integers
from hypothesis import given
from hypothesis import strategies as st

from cli.errors import UserError
from formats.groups import dense, from_stream, imported, rounding, to_stream
from quant import Quantized, QuantLinear


@given(st.sampled_from([1, 2, 3, 4, 5, 6, 8]), st.integers(1, 3), st.integers(1, 3), SEEDS)
def test_a_row_of_codes_is_one_little_endian_stream_of_bits(bits, rows, units, seed):
    """By hand: a row is one large integer, whose lowest bits are the first code."""
    codes = integers(seed, 0, 2**bits - 1, rows, 32 * units, dtype=torch.uint8)
    words = to_stream(codes, bits)
    assert words.dtype == torch.uint32 and words.shape == (rows, units * bits)
    for row, stream in zip(codes.tolist(), words.tolist(), strict=True):
        number = sum(code << (bits * i) for i, code in enumerate(row))
        assert number == sum(word << (32 * i) for i, word in enumerate(stream))
    assert torch.equal(from_stream(words, bits), codes)
    assert torch.equal(from_stream(words.view(torch.int32), bits, 5), codes[:, :5])


def taken_in(scale, offset=0.0):
    """A layer of one group for each scale, all with codes 0."""
    codes, offset = torch.zeros(1, 4 * len(scale), dtype=torch.uint8), torch.tensor(offset)
    return imported(codes, scale[None], offset.expand(1, len(scale)), 4, "file: tensor t")


@given(st.lists(st.floats(width=16, allow_nan=False, allow_infinity=False), min_size=1))
def test_scales_are_float16_where_that_holds_all_of_them(values):
    exact = torch.tensor(values)
    for dtype in (torch.float32, torch.float16):
        scale = taken_in(exact.to(dtype)).scale
        assert scale.dtype == torch.float16 and torch.equal(scale[0].float(), exact)
    for finer in (1 + 2**-12, 2.0**-26, 1e6):
        scale = torch.tensor([*values, finer])
        kept = taken_in(scale).scale
        assert kept.dtype == torch.float32 and torch.equal(kept[0], scale)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_scales_and_offsets_that_are_no_numbers_are_refused(bad):
    for scale, offset in ((torch.tensor([1.0, bad]), 0.0), (torch.tensor([1.0]), bad)):
        with pytest.raises(UserError, match="file: tensor t has NaN or infinite values"):
            taken_in(scale, offset)


def test_a_matrix_is_dense_in_the_dtype_of_its_scales_where_that_holds_it():
    codes = torch.tensor([[0, 15]], dtype=torch.uint8)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        parts = torch.tensor([[2.0]], dtype=dtype), torch.tensor([[-1.0]])
        weight = dense(functools.partial(Quantized, codes, *parts), "f: t")
        assert weight.dtype == dtype and weight.tolist() == [[-1, 29]]
    parts = torch.tensor([[59968.0]], dtype=torch.float16), torch.tensor([[0.0]])
    with pytest.raises(UserError, match="f: t has .* such as torch.float16 cannot hold"):
        dense(functools.partial(Quantized, codes, *parts), "f: t")


def layer(scale, offset, bits=4):
    codes = torch.zeros(1, 32 * len(scale), dtype=torch.uint8)
    parts = torch.tensor([scale]), torch.tensor([offset])
    return QuantLinear.from_quantized(Quantized(codes, *parts), bits)


def said(scale, offset, kinds=(torch.float16, torch.float16), bits=4):
    return rounding({"q_proj": layer(scale, offset, bits)}, {"q_proj": kinds})


MOVES = "its scales and offsets are float16, whose rounding moves weights by"


def test_rounding_is_said_in_quantization_steps():
    """The last group has scale 0: its weights are all equal, so it has no step."""
    told = said([-0.5, 0.25, 0.0], [1 + 2**-12, 1.0, 1 + 2**-12])
    assert told == f"{MOVES} {2**-12:.2g} of a quantization step on average, {2**-11:.2g} at most"
    # a scale moves a weight most at its highest code: 15 times, and 3 times at 2 bits
    for bits, codes in ((4, 15), (2, 3)):
        told = said([0.5, 1 + 2**-12], [1.0, 1.0], bits=bits)
        most = codes * 2**-12 / (1 + 2**-12)
        steps = f"{most / 2:.2g} of a quantization step on average, {most:.2g} at most"
        assert told == f"{MOVES} {steps}"
    # the offset goes up where the scale goes down: by 1 at code 0, by 1 - 15 at code 15
    told = said([1 + 2**-12], [1 + 3 * 2**-12])
    assert told.endswith(f" {14 * 2**-12 / (1 + 2**-12):.2g} at most")


@pytest.mark.parametrize(
    "kinds, names",
    [
        ((torch.float32, torch.float32), "float32"),
        ((torch.bfloat16, torch.float32), "bfloat16 and float32"),
    ],
)
def test_it_says_where_nothing_is_rounded(kinds, names):
    told = said([0.5], [1 + 2**-12], kinds)
    assert told == f"its scales and offsets are {names}, and none is rounded"


@pytest.mark.parametrize("scale, offset, value", [(1e5, 0.0, "100000"), (1.0, -7e4, "70000")])
def test_what_float16_cannot_hold_is_refused(scale, offset, value):
    with pytest.raises(UserError, match=f"q_proj: {value} is beyond torch.float16; where training"):
        said([scale], [offset])
    assert "none is rounded" in said([scale], [offset], (torch.float32, torch.float32))
