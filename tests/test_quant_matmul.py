"""What quant.py promises of the product with a packed matrix, and of the layer that holds one.

How the product is cut into pieces and compiled is tested in test_kernels_matmul.py.
"""

import copy
import weakref

import pytest
import torch
from helpers import (
    BITS,
    SEEDS,
    dense,
    exact_case,
    integers,
    normal,
    random_quantized,
    same,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st

from quant import QuantLinear, dequantize, pack, quant_matmul, quantize_rtn

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
ROWS, GROUPS, GROUP_SIZES = st.integers(1, 5), st.integers(1, 4), st.integers(1, 40)
LEADS = st.lists(st.integers(0, 3), max_size=2).map(tuple)


@given(st.sampled_from(DTYPES), BITS, ROWS, GROUPS, GROUP_SIZES, LEADS, SEEDS)
@example(torch.float32, 4, 600, 2, 32, (3,), 0)  # more rows than are unpacked at a time
@example(torch.bfloat16, 3, 257, 2, 16, (2, 2), 0)
def test_the_product_is_dequantize_then_matmul(dtype, bits, rows, groups, group_size, lead, seed):
    """Exact numbers: in every dtype nothing is rounded but the result."""
    x, q = exact_case(seed, rows, groups, group_size, bits, lead)
    y = quant_matmul(x.to(dtype), pack(q.codes, bits), q.scale, q.offset, bits)
    assert same([y], [(x @ dense(q).t()).to(dtype)])


@given(st.sampled_from(DTYPES), BITS, ROWS, GROUPS, GROUP_SIZES, LEADS, SEEDS, st.booleans())
@example(torch.float32, 4, 600, 2, 32, (3,), 0, False)
def test_its_gradients_are_those_of_dequantize_then_matmul(
    dtype, bits, rows, groups, group_size, lead, seed, strided
):
    """By autograd, in float64, through x @ (scale * codes + offset)ᵀ; exact numbers again."""
    x, q = exact_case(seed, rows, groups, group_size, bits, lead)
    grad = integers(seed + 5, -1, 1, *lead, rows, dtype=torch.float64)
    grad *= normal(seed + 6, *grad.shape).argsort(-1) < 8
    if strided and lead:  # gradients and inputs come transposed, too
        x, grad = (t.transpose(0, -1).contiguous().transpose(0, -1) for t in (x, grad))
    x_exact, offset_exact = x.clone().requires_grad_(), q.offset.double().requires_grad_()
    (x_exact @ dense(q._replace(offset=offset_exact)).t()).backward(grad)

    x, offset = x.to(dtype).requires_grad_(), q.offset.clone().requires_grad_()
    quant_matmul(x, pack(q.codes, bits), q.scale, offset, bits).backward(grad.to(dtype))
    assert same([x.grad, offset.grad], [x_exact.grad.to(dtype), offset_exact.grad.float()])


@given(BITS, ROWS, GROUPS, st.integers(1, 5), SEEDS)
@settings(max_examples=10)
def test_its_gradients_pass_finite_differences(bits, rows, groups, group_size, seed):
    q = random_quantized(seed, rows, groups, group_size, bits)
    x = normal(seed, 2, groups * group_size).requires_grad_()
    offset = q.offset.double().requires_grad_()
    packed = pack(q.codes, bits)

    def product(x, offset):
        return quant_matmul(x, packed, q.scale, offset, bits)

    assert torch.autograd.gradcheck(product, (x, offset))
    assert torch.autograd.gradcheck(product, (x, q.offset))
    assert torch.autograd.gradcheck(product, (x.detach(), offset))


def test_a_second_derivative_is_refused_rather_than_wrong():
    q = random_quantized(0, 2, 2, 4, 4)
    x = torch.ones(1, 8, requires_grad=True)
    y = quant_matmul(x, pack(q.codes, 4), q.scale, q.offset.requires_grad_(), 4)
    (first,) = torch.autograd.grad(y.square().sum(), q.offset, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_change_of_the_offsets_below_the_dtypes_steps_has_its_whole_effect_in_the_mean(dtype):
    """bfloat16 has steps of 2^-13 at weights of 0.02; the change is 2^-16.

    The 32 weights of a group are rounded at 32 places between two steps. The mean over 256 rows of
    4,096 weights varies by 1 %, measured over draws.
    """
    q = quantize_rtn(normal(0, 256, 4096) * 0.02, 4, 32)
    packed, x = pack(q.codes, 4), torch.ones(1, 4096, dtype=dtype)

    def mean_product(offset):
        w = dequantize(q._replace(offset=offset), dtype)
        return (x.double() @ w.double().t()).mean()

    effect = (mean_product(q.offset + 2.0**-16) - mean_product(q.offset)) / 4096
    assert effect.item() == pytest.approx(2.0**-16, rel=0.05)
    y = quant_matmul(x, packed, q.scale, q.offset + 2.0**-16, 4)
    assert y.dtype == dtype and not torch.equal(y, quant_matmul(x, packed, q.scale, q.offset, 4))


@pytest.mark.parametrize("dtype", DTYPES)
def test_backward_keeps_codes_and_pooled_inputs_but_no_dense_weight_and_not_the_input(dtype):
    q = random_quantized(0, 128, 8, 32, 4)
    packed, offset = pack(q.codes, 4), q.offset.requires_grad_()
    x = normal(0, 64, 256).to(dtype).requires_grad_()
    kept = {}  # storage -> bytes, as several tensors may share one

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        quant_matmul(x, packed, q.scale, offset, 4)
    assert x.untyped_storage().data_ptr() not in kept
    pooled = 64 * 8 * x.element_size()
    assert sum(kept.values()) <= packed.nbytes + q.scale.nbytes + offset.nbytes + pooled, kept
    x = x * 1
    y, still_there = quant_matmul(x, packed, q.scale, offset, 4), weakref.ref(x)
    del x
    assert y.requires_grad and still_there() is None, "the input is kept by other means"


def test_autocast_changes_nothing():
    q, x = random_quantized(0, 8, 2, 16, 4), normal(0, 4, 32).float()
    with torch.autocast("cpu", torch.bfloat16):
        cast = quant_matmul(x, pack(q.codes, 4), q.scale, q.offset, 4)
    assert same([cast], [quant_matmul(x, pack(q.codes, 4), q.scale, q.offset, 4)])


def test_shapes_that_do_not_fit_are_shown():
    q = random_quantized(0, 8, 2, 32, 4)
    with pytest.raises(AssertionError, match=r"\(3, 96\).*\(8, 32\)"):
        quant_matmul(torch.zeros(3, 96), pack(q.codes, 4), q.scale, q.offset, 4)


# ---- the layer


@given(BITS, ROWS, GROUPS, GROUP_SIZES, SEEDS)
def test_a_layer_holds_what_it_was_given(bits, rows, groups, group_size, seed):
    q = random_quantized(seed, rows, groups, group_size, bits)
    layer = QuantLinear.from_quantized(q, bits)
    x = integers(seed, -3, 3, 2, groups * group_size)
    assert (layer.bits, layer.group_size) == (bits, group_size)
    assert (layer.in_features, layer.out_features) == (groups * group_size, rows)
    y = quant_matmul(x, pack(q.codes, bits), q.scale, q.offset, bits)
    assert same([layer.dequantize(), layer(x)], [dequantize(q), y])
    assert list(layer.state_dict()) == ["packed", "scale", "offset"]
    assert not list(layer.parameters())


@pytest.mark.parametrize(
    "cast",
    [
        lambda m: m.to(torch.float16),
        lambda m: m.half(),
        lambda m: m.double(),
        lambda m: m.bfloat16(),
        lambda m: m.to("cpu", torch.bfloat16),
        copy.deepcopy,
    ],
)
def test_casting_a_model_leaves_the_quantized_numbers_alone(cast):
    q = random_quantized(0, 4, 2, 16, 3)
    # numbers that bfloat16 would not hold
    q = q._replace(scale=normal(0, 4, 2).abs().half(), offset=normal(1, 4, 2).float())
    model = cast(torch.nn.Sequential(QuantLinear.from_quantized(q, 3), torch.nn.Linear(4, 4)))
    kept = [model[0].packed, model[0].scale, model[0].offset]
    assert same(kept, [pack(q.codes, 3), q.scale, q.offset])
