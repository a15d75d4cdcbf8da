"""Group quantization: every weight is `scale * code + offset`, scale and offset shared by a group of inputs.

A row of a weight matrix is cut into groups of `group_size` consecutive inputs. Each group keeps a float16 scale, a
float32 offset and one 2-, 3- or 4-bit code a weight. The offset is a real number (the paper's `zero` in another form:
offset = -scale * zero), and that is what lets QA-LoRA fold an adapter into it without loss.

In reading order: packing codes; choosing scales and codes (RTN, GPTQ); multiplying by a packed matrix; the layer;
quantizing a whole model block by block; the folder it is kept in.
"""

import ctypes
import functools
import json
import pathlib
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch import nn
from torch.autograd.function import once_differentiable
from tqdm import tqdm

from cli import UserError, written_whole
from llama import LINEARS, Llama, all_finite, fill, linears, open_file, read_config, read_json, rotary_table, write_config

DENSE_AT_A_TIME = 2 ** 24  # bytes: a smaller matmul takes longer a weight, and glibc maps 32 MB anew every time
IN_CACHE = 2 ** 20  # weights: 4 MB in float32 and 1 MB of codes
FEW_TOKENS = 8  # so many cost a Triton kernel that unpacks for each what unpacking once and a matmul cost, by count


# ---- codes of 2, 3 or 4 bits, packed at exactly that cost

def packed_width(in_features, bits):
    """Bytes that a row of `in_features` codes takes: `bits` a code, the row padded to a multiple of 32 codes."""
    assert bits in (2, 3, 4), f"bits must be 2, 3 or 4, not {bits}"
    return -(-in_features // 32) * 4 * bits


def pack(codes_OI, bits):
    """Packs uint8 codes [O, I], all below 2^bits, into uint8 [O, packed_width(I, bits)].

    A row's bytes are planes. With n the row length padded to a multiple of 32, byte j holds: at 4 bits, code j in its
    low half and code j + n/2 in its high half; at 2 bits, the codes j, j + n/4, j + n/2 and j + 3n/4, lowest first; at
    3 bits, the two low bits as at 2 bits, then n/8 bytes more whose bit k of byte j is the high bit of code j + k*n/8.
    Planes unpack into long contiguous runs: 6 ms for a 4096 x 4096 matrix on a CPU, where the order of GGUF's Q4_1,
    whose runs are 16 long, took 27 ms. `export.py` reorders them.
    """
    assert codes_OI.dtype == torch.uint8 and packed_width(codes_OI.shape[-1], bits)
    codes = nn.functional.pad(codes_OI, (0, -codes_OI.shape[-1] % 32))
    if bits == 3:
        return torch.cat([_join_planes(codes & 3, 2), _join_planes(codes >> 2, 1)], dim=-1)
    return _join_planes(codes, bits)


def unpack(packed, bits, in_features):
    """The inverse of `pack`: uint8 [O, packed_width(in_features, bits)] to uint8 codes [O, in_features]."""
    if bits == 3:
        two_thirds = packed.shape[-1] // 3 * 2
        codes = _split_planes(packed[..., :two_thirds], 2).add_(_split_planes(packed[..., two_thirds:], 1), alpha=4)
    else:
        codes = _split_planes(packed, bits)
    return codes[..., :in_features]


def _join_planes(fields, width):  # [O, n] fields of `width` bits -> [O, n * width / 8] bytes
    planes = fields.chunk(8 // width, dim=-1)
    return torch.stack([plane << (width * k) for k, plane in enumerate(planes)]).sum(dim=0, dtype=torch.uint8)


def _split_planes(packed, width):  # the inverse
    fields = packed.new_empty(*packed.shape[:-1], packed.shape[-1] * 8 // width)
    lowest, *others = fields.chunk(8 // width, dim=-1)
    torch.bitwise_and(packed, 2 ** width - 1, out=lowest)  # written to its place: half the time of torch.cat
    for k, plane in enumerate(others, 1):
        torch.bitwise_right_shift(packed, width * k, out=plane)
    for plane in others[:-1]:  # above the last one nothing is left
        plane.bitwise_and_(2 ** width - 1)
    return fields


# ---- choosing scale, offset and codes

class Quantized(NamedTuple):
    """A quantized matrix: w[o, i] is approximately scale[o, g] * codes[o, i] + offset[o, g], with g = i // group_size."""
    codes: torch.Tensor   # [O, I] uint8
    scale: torch.Tensor   # [O, G] float16
    offset: torch.Tensor  # [O, G] float32


def dequantize(quantized, dtype=torch.float32):
    """The matrix [O, I] that a `Quantized` stands for, computed in float32 at least, then rounded to `dtype`."""
    codes, scale, offset = quantized
    wide = torch.promote_types(dtype, torch.float32)
    w_OGg = codes.to(wide).view(*scale.shape, -1)
    w_OGg.mul_(scale.to(wide).unsqueeze(-1)).add_(offset.to(wide).unsqueeze(-1))  # torch.addcmul takes far longer
    return w_OGg.view(codes.shape).to(dtype)


def quantize_rtn(w_OI, bits, group_size):
    """Rounds each weight to the nearest of 2^bits levels between its group's smallest and largest weight.

    w_OI: [O, I] of any floating dtype. Returns Quantized. A constant group gets scale 0 and is exact; no other group
    does. Raises UserError when `group_size` does not divide I, or a range is not finite or too wide for float16.
    """
    w_OGg = _grouped(w_OI.float(), group_size)
    scale, offset = min_max_range(w_OGg, bits)
    return Quantized(nearest_codes(w_OGg, scale, offset, bits).view(w_OI.shape), scale, offset)


def _grouped(w_OI, group_size):  # [O, I] -> [O, G, group_size]
    if w_OI.shape[1] % group_size:
        raise UserError(f"group size {group_size} does not divide its {w_OI.shape[1]} inputs")
    return w_OI.reshape(w_OI.shape[0], -1, group_size)


def min_max_range(w_OGg, bits):
    """Scale [O, G] and offset [O, G] whose codes 0 and 2^bits - 1 meet each group's smallest and largest weight."""
    low, high = w_OGg.aminmax(dim=-1)
    return round_up_to_float16(high - low, 2 ** bits - 1), low


def round_up_to_float16(spread, levels):
    """The smallest float16 scales with scale * levels >= spread, so that the codes still reach the largest weight.

    Raises UserError when that is beyond float16's 65504, or `spread` is not a number.
    """
    scale = (spread / levels).half()
    too_small = scale.float() * levels < spread  # exact: 11 bits times 4 bits fit in float32's 24
    scale = torch.where(too_small, (scale.view(torch.int16) + 1).view(torch.float16), scale)  # the next float16
    if not scale.isfinite().all():
        raise UserError(f"weights that span {spread.max().item():g} in one group need a scale that float16 cannot hold")
    return scale


def nearest_codes(w_OGg, scale, offset, bits):
    """The codes [O, G, group_size] (uint8) nearest to `w_OGg` for scale and offset [O, G]; 0 where the scale is 0."""
    step = torch.where(scale == 0, 1, scale).float().unsqueeze(-1)
    return ((w_OGg - offset.unsqueeze(-1)) / step).round_().clamp_(0, 2 ** bits - 1).to(torch.uint8)


def quantize_gptq(w_OI, hessian_II, bits, group_size, search=True, damping=0.01):
    """GPTQ (Frantar et al., 2023): rounds one input after another, each making up for the errors made before it.

    hessian_II: the sum (or mean) of x xᵀ over the calibration inputs x. With H = R Rᵀ, R upper triangular, the
    squared output error trace((W-Ŵ) H (W-Ŵ)ᵀ) is the squared length of (W-Ŵ) R, whose column k holds the errors of
    the inputs 0..k only. So go through the inputs in order, and round each weight to where it cancels its column's
    `drift`, what the errors before it have put there. This is the LDL form of GPTQ (Chee et al., "QuIP", 2023,
    theorem 6): the same result from one Cholesky factor, without inverting H. A group's range is taken when its turn
    comes, from the weights as corrected until then; their error times its block of R is what the group adds in the end.

    search=False takes a group's range from its smallest to its largest weight. search=True may cut that and fits
    scale and offset to the codes, as real offsets allow: on the 1024 x 1024 layer of tests/test_search.py the relative
    output error at 2, 3 and 4 bits is 0.188, 0.091 and 0.045, not 0.430, 0.145 and 0.065 (RTN 0.393, 0.168, 0.078).
    In compare.py at 2 bits it is worth 5.5 +- 0.8 points of exact match to QA-LoRA, 8.3 +- 1.2 to QLoRA w/ GPTQ.
    Arguments, result and errors otherwise as in `quantize_rtn`.
    """
    in_features = w_OI.shape[1]
    _grouped(w_OI, group_size)
    factor = damped_factor(hessian_II, damping)
    w = w_OI.float().t().contiguous()  # [I, O], so that one input's weights are contiguous
    drift, error = torch.zeros_like(w), torch.empty_like(w)
    codes = torch.empty(w.shape, dtype=torch.uint8, device=w.device)
    scales, offsets = [], []

    def settle(low, high):
        block = factor[low:high, low:high]
        corrected = w[low:high] + torch.linalg.solve_triangular(block.t(), drift[low:high], upper=False)
        found, scale, offset = quantize_group(corrected, block, bits, search)
        codes[low:high] = found
        error[low:high] = w[low:high] - (scale.float() * found + offset)
        scales.append(scale), offsets.append(offset)

    in_order(0, in_features, group_size, factor, drift, error, settle)
    return Quantized(codes.t().contiguous(), torch.stack(scales, dim=1), torch.stack(offsets, dim=1))


def in_order(low, high, unit, factor, drift, error, settle):
    """Calls settle(low, high) for one `unit` of inputs after another: it reads their `drift`, writes their `error`.

    The errors inside a half of the inputs reach the other half by one matrix product, halves are halved again: that
    is the lazy batching of GPTQ's paper, carried through to the single input.
    """
    if high - low == unit:
        return settle(low, high)
    middle = low + -(-(high - low) // (2 * unit)) * unit
    in_order(low, middle, unit, factor, drift, error, settle)
    drift[middle:high].addmm_(factor[low:middle, middle:high].t(), error[low:middle])
    in_order(middle, high, unit, factor, drift, error, settle)


def quantize_group(w_gO, factor_gg, bits, search):
    """(codes [g, O] in float, scale [O], offset [O]) for one group that make |(w - ŵ)ᵀ factor| small."""
    if not search:
        scale, offset = min_max_range(w_gO.t(), bits)
        return round_in_order(w_gO, factor_gg, scale, offset, bits), scale, offset
    scale, offset = best_range(w_gO, factor_gg.diagonal().square(), bits)
    for _ in range(2):  # a third round gains nothing
        codes = round_in_order(w_gO, factor_gg, scale, offset, bits)
        scale, offset = fit_range(w_gO, factor_gg, codes, scale, offset)
    return codes, scale, offset


def round_in_order(w_gO, factor_gg, scale, offset, bits):
    """GPTQ's codes [g, O], in float, for a group whose scale [O] and offset [O] are given."""
    step = torch.where(scale == 0, torch.inf, scale.float())  # a group with scale 0 is constant: all its codes are 0
    w = (w_gO - offset) / step  # in steps, so that an error is w - code
    if kernels := triton_for(w, (torch.float32,)):  # one launch where the loop below takes some two hundred
        return kernels.round_in_order(w, factor_gg, bits)
    drift, error, codes = torch.zeros_like(w), torch.empty_like(w), torch.empty_like(w)
    diagonal = factor_gg.diagonal().tolist()

    def settle(k, _):
        torch.add(w[k], drift[k], alpha=1 / diagonal[k], out=codes[k]).round_().clamp_(0, 2 ** bits - 1)
        torch.sub(w[k], codes[k], out=error[k])

    in_order(0, len(w), 1, factor_gg, drift, error, settle)
    return codes


def best_range(w_gO, importance_g, bits):
    """Scale [O] and offset [O] of the cut range whose nearest levels leave the least error, weighted by importance.

    Tries to cut 0, 10, ..., 40 % off the range's lower and upper end, then 5 % more or less of either.
    """
    low, high = w_gO.amin(dim=0), w_gO.amax(dim=0)
    x_gO = (w_gO - low) / torch.where(high == low, 1, high - low)  # from 0 to 1
    cut, least = torch.zeros(2, w_gO.shape[1], device=w_gO.device), torch.full_like(low, torch.inf)
    scratch = torch.empty_like(x_gO), torch.empty_like(x_gO)  # new memory for every trial takes longer than its sums
    for step, reach in ((0.1, torch.arange(5)), (0.05, torch.arange(-1, 2))):
        trials = cut + step * torch.cartesian_prod(reach, reach).unsqueeze(-1).to(cut)  # [T, 2, O]
        if w_gO.is_cuda:  # all trials at once: there the launches take the time
            cut, least = _best_trial(x_gO, importance_g, trials, bits, cut, least)
            continue
        for trial in trials:
            error = _clipping_error(x_gO, importance_g, *trial, bits, *scratch)
            cut, least = torch.where(error < least, trial, cut), torch.minimum(error, least)
    below, above = cut
    return round_up_to_float16((1 - below - above) * (high - low), 2 ** bits - 1), low + below * (high - low)


def _best_trial(x_gO, importance_g, trials_T2O, bits, cut, least):
    """(cut [2, O], its error [O]): the best of the trials and of what was found before."""
    below, above = trials_T2O.unsqueeze(2).unbind(1)  # [T, 1, O] each
    step = (1 - below - above) / (2 ** bits - 1)
    exact = torch.addcmul(-below / step, x_gO, 1 / step)  # [T, g, O]
    error = exact.round().clamp_(0, 2 ** bits - 1).sub_(exact).square_()
    error = (importance_g @ error) * step.squeeze(1).square()  # [T, O]
    errors, found = torch.cat((least.unsqueeze(0), error)).min(dim=0)
    cuts = torch.cat((cut.unsqueeze(0), trials_T2O))
    return cuts.gather(0, found.expand(1, 2, -1))[0], errors


def _clipping_error(x_gO, importance_g, below, above, bits, exact, codes):  # [O]
    step = (1 - below - above) / (2 ** bits - 1)
    torch.addcmul(-below / step, x_gO, 1 / step, out=exact)
    torch.round(exact, out=codes).clamp_(0, 2 ** bits - 1)
    return importance_g @ codes.sub_(exact).square_() * step.square()


def fit_range(w_gO, factor_gg, codes_gO, scale, offset):
    """The scale [O] and offset [O] that fit the codes best, by least squares of (w - scale * codes - offset)ᵀ factor.

    Where that is no better than those given they stay. So they do for a scale below 0 or far from the given one: where
    all codes are equal the fitted scale is a quotient of rounding errors.
    """
    target, codes = factor_gg.t() @ w_gO, factor_gg.t() @ codes_gO
    one = factor_gg.sum(dim=0).unsqueeze(1)  # [g, 1]: what an offset of 1 adds to every column
    mean = lambda y: one.t() @ y / one.square().sum()  # [1, O]: the offset nearest to y
    spread = codes - one * mean(codes)
    fitted_scale = ((spread * target).sum(dim=0) / spread.square().sum(dim=0)).half()
    fitted_offset = mean(target - fitted_scale * codes)[0]
    error = lambda scale, offset: (target - scale * codes).sub_(offset * one).square_().sum(dim=0)
    better = (fitted_scale > 0) & (fitted_scale < 4 * scale)  # neither holds for NaN
    better &= error(fitted_scale, fitted_offset) < error(scale, offset)
    return torch.where(better, fitted_scale, scale), torch.where(better, fitted_offset, offset)


def damped_factor(hessian_II, damping):
    """Upper triangular R [I, I] (float32) with R Rᵀ = H + damping * mean(diagonal) * identity.

    Where that matrix is not positive definite the damping is raised tenfold until it is. For a semidefinite H no
    squared diagonal entry of R lies below `damping`; a far smaller one would be rounding, and blow up all it divides.
    """
    assert hessian_II.isfinite().all(), "the Hessian has NaN or infinite entries"
    inputs, mean = len(hessian_II), hessian_II.diagonal().double().mean().item()
    if mean < torch.finfo(torch.float32).tiny:  # no inputs at all: any multiple of the identity means RTN
        h = torch.zeros_like(hessian_II, dtype=torch.float32)
    else:  # no entry of a semidefinite matrix exceeds its trace, so clamping only touches what is none
        h = (hessian_II / mean).float().clamp_(-inputs, inputs)
    diagonal = h.diagonal().clone()
    while True:
        h.diagonal().copy_(diagonal + damping)
        lower, failed = torch.linalg.cholesky_ex(h.flip(0, 1))  # flipped, so that the flipped factor is upper
        if not failed and (lower.diagonal().square() >= damping / 2).all():
            return lower.flip(0, 1)
        damping = max(10 * damping, 1e-6)


# ---- multiplying by a packed matrix

def quant_matmul(x, packed, scale, offset, bits):
    """y = x @ (scale * codes + offset)ᵀ for a packed weight, differentiable in x and offset.

    x: [..., I] float; packed: [O, packed_width(I, bits)]; scale: [O, G] float16; offset: [O, G]; result [..., O] in x's
    dtype. The weight, mostly a part of it at a time, is dequantized, rounded once to x's dtype and multiplied: as exact as
    a dense layer of that dtype. In a group whose codes differ, rounding weight by weight lets through a change of the
    offset far below bfloat16's steps, in the mean over the group; a bfloat16 offset beside the codes would swallow it.
    """
    assert x.shape[-1] % scale.shape[1] == 0 and packed.shape[1] == packed_width(x.shape[-1], bits), \
        f"x {tuple(x.shape)} does not fit packed {tuple(packed.shape)} and scale {tuple(scale.shape)} at {bits} bits"
    if not torch.is_autocast_enabled(x.device.type):  # the usual case, spared a context: Python's time counts on a GPU
        return QuantMatmul.apply(x, packed, scale, offset, bits)
    with torch.autocast(x.device.type, enabled=False):
        return QuantMatmul.apply(x, packed, scale, offset, bits)


class QuantMatmul(torch.autograd.Function):
    """`quant_matmul`. Saves the packed codes and the pooled input, never x and never a dense weight.

    The offset's gradient is grad_yᵀ @ pool(x), pool(x) [N, G] the sum of x over each group: the paper's equation 2.
    """

    @staticmethod
    def forward(ctx, x, packed, scale, offset, bits):
        x_NI = x.reshape(-1, x.shape[-1])
        y_NO = product(x_NI, packed, scale, offset, bits, triton_for(x))
        pooled_NG = pooled(x_NI, scale.shape[1], triton_for(x)) if ctx.needs_input_grad[3] else None
        ctx.save_for_backward(packed, scale, offset, pooled_NG)
        ctx.bits, ctx.x_shape = bits, x.shape
        return y_NO.view(*x.shape[:-1], len(packed))

    @staticmethod
    @once_differentiable  # the pooled input is saved as a number, so a second derivative would be wrong
    def backward(ctx, grad_y):
        packed, scale, offset, pooled_NG = ctx.saved_tensors
        gy_NO = grad_y.reshape(-1, grad_y.shape[-1])
        grad_x = grad_offset = None
        if ctx.needs_input_grad[3]:
            grad_offset = (gy_NO.t() @ pooled_NG).to(offset.dtype)
        if ctx.needs_input_grad[0]:
            gx_NI = input_gradient(gy_NO, packed, scale, offset, ctx.bits, ctx.x_shape[-1], triton_for(grad_y))
            grad_x = gx_NI.view(ctx.x_shape)
        return grad_x, None, None, grad_offset, None


def pooled(x_NI, groups, kernels=None):
    """The sum of x over each group of inputs, [N, G] in x's dtype, rounded once."""
    if kernels:
        return kernels.pool(x_NI, groups)
    return x_NI.unflatten(1, (groups, -1)).sum(dim=-1)


def product(x_NI, packed, scale, offset, bits, kernels=None):
    """x @ wᵀ, [N, O]. On a CPU some rows of w at a time, so that it is never dense as a whole."""
    tokens, in_features = x_NI.shape
    if kernels and 0 < tokens <= FEW_TOKENS and in_features // scale.shape[1] % 4 == 0:
        return kernels.multiply(x_NI, packed, scale, offset, bits)
    if kernels:
        return x_NI @ kernels.dense(packed, scale, offset, bits, in_features, x_NI.dtype).t()
    y_NO = x_NI.new_empty(tokens, len(packed))
    at_a_time = power_of_two(DENSE_AT_A_TIME // x_NI.itemsize // in_features)
    for rows in (slice(start, start + at_a_time) for start in range(0, len(packed), at_a_time)):
        w = dense(packed[rows], scale[rows], offset[rows], bits, in_features, x_NI.dtype)
        torch.mm(x_NI, w.t(), out=y_NO[:, rows])
        del w  # so that the next part takes its place
    return y_NO


def input_gradient(gy_NO, packed, scale, offset, bits, in_features, kernels=None):
    """gy @ w, [N, I]. Some columns of w at a time, as adding up what rows of it give would round a sum again and again.

    Bytes from the same place in each plane are a packing too: of the codes at that place in each plane. Where a group
    lies in two planes w is dequantized as a whole.
    """
    planes, group_size = plane_count(bits), in_features // scale.shape[1]
    if kernels:
        return gy_NO @ kernels.dense(packed, scale, offset, bits, in_features, gy_NO.dtype)
    if not whole_groups(in_features, group_size, bits):
        return gy_NO @ dense(packed, scale, offset, bits, in_features, gy_NO.dtype)
    packed, scale, offset = packed.unflatten(1, (bits * planes // 8, -1)), *(
        t.unflatten(1, (planes, -1)) for t in (scale, offset))  # [O, planes, bytes or groups of a plane]
    gx = gy_NO.new_empty(len(gy_NO), planes, in_features // planes)
    at_a_time = power_of_two(DENSE_AT_A_TIME // gy_NO.itemsize // (len(packed) * planes * group_size))
    for groups in (slice(start, start + at_a_time) for start in range(0, scale.shape[2], at_a_time)):
        inputs = slice(groups.start * group_size, groups.stop * group_size)
        part = packed[..., inputs].flatten(1), scale[..., groups].flatten(1), offset[..., groups].flatten(1)
        w = dense(*part, bits, part[1].shape[1] * group_size, gy_NO.dtype)
        gx[..., inputs] = (gy_NO @ w).unflatten(1, (planes, -1))
        del w
    return gx.flatten(1)


def plane_count(bits):
    """How many planes, stretches of consecutive inputs, share a row's bytes."""
    return 8 if bits == 3 else 8 // bits  # at 3 bits as many as the high bits do


def whole_groups(in_features, group_size, bits):
    """Whether rows are packed without padding and no group lies in two planes."""
    return in_features % 32 == 0 and in_features // plane_count(bits) % group_size == 0


def power_of_two(limit):
    """The largest power of two up to `limit`, at least 1: pieces of such sizes are mostly alike, and compiled once."""
    return 1 << max(1, limit).bit_length() - 1


USE_COMPILER = None  # None: on a CPU, after COMPILE_AFTER weights. Tests and bench.py set True or False
COMPILE_AFTER = 2 ** 34  # weights that the plain path has dequantized; some seconds' work, which is what compiling takes
dequantized = 0


def dense(packed, scale, offset, bits, in_features, dtype):
    """The matrix [O, in_features] that a packed one stands for: `dequantize` after `unpack`, to the bit.

    That takes five to eight passes over the weights, over as many at a time as a CPU's cache holds. Where much is
    dequantized on a CPU, torch.compile makes them one, which takes a third to a half of the time. Without a C++ compiler
    the plain path goes on.
    """
    global dequantized, USE_COMPILER
    wide = torch.promote_types(dtype, torch.float32)
    weights = len(packed) * in_features
    dequantized += weights if weights >= 2 ** 18 else 0  # in small matrices it is not the passes that take the time
    wanted = dequantized > COMPILE_AFTER if USE_COMPILER is None else USE_COMPILER
    if wanted and packed.device.type == "cpu" and whole_groups(in_features, in_features // scale.shape[1], bits):
        try:
            scale_, offset_ = (t.to(wide).view(len(t), plane_count(bits), -1, 1) for t in (scale, offset))
            return _compiled()(packed, scale_, offset_, bits, dtype)
        except Exception:  # no compiler, or no room for the files it writes
            USE_COMPILER = False
    if packed.device.type != "cpu" or weights <= IN_CACHE or dtype == wide:
        return dequantize(Quantized(unpack(packed, bits, in_features), scale, offset), dtype)
    w_OI = torch.empty(len(packed), in_features, dtype=dtype, device=packed.device)
    for w, *part in zip(*(t.split(max(1, IN_CACHE // in_features)) for t in (w_OI, packed, scale, offset))):
        w.copy_(dequantize(Quantized(unpack(part[0], bits, in_features), *part[1:]), wide))
    return w_OI


@functools.cache
def _compiled():
    torch._dynamo.config.recompile_limit = 64  # shapes of pieces, in training and in inference mode
    return torch.compile(_plane_by_plane, dynamic=False)


def _plane_by_plane(packed, scale, offset, bits, dtype):  # scale, offset [O, planes, groups of a plane, 1]
    rows, planes, groups, _ = scale.shape
    number = lambda fields: fields.view(rows, groups, -1).to(scale.dtype)
    made = []
    for k in range(planes):
        # Fields stay where they lie, 2^at times too large, and their scales shrink by as much: no rounding, no shifts
        at = k // 2 * 2 if bits == 3 else bits * k
        if bits == 3:
            first, second, high = packed.chunk(3, dim=1)  # two low bits of even and of odd planes, and the high bits
            codes = number((second if k % 2 else first) & 3 << at) + number(high & 1 << k) * 2.0 ** (2 + at - k)
        else:
            codes = number(packed & 2 ** bits - 1 << at)
        made.append((codes * (scale[:, k] * 2.0 ** -at) + offset[:, k]).to(dtype))
    return torch.stack(made, dim=1).view(rows, -1)


USE_TRITON = None  # None: for tensors on a GPU that can. Tests set True (Triton's interpreter on a CPU) or False


def triton_for(x, dtypes=(torch.bfloat16, torch.float16)):
    """The module `triton_kernels` if it shall and can compute with tensors like `x`, else None: the plain path."""
    able = x.is_cuda and x.dtype in dtypes and torch.cuda.get_device_capability(x.device)[0] >= 8
    return _triton_kernels() if (able if USE_TRITON is None else USE_TRITON) else None


@functools.cache
def _triton_kernels():
    try:
        import triton_kernels
        return triton_kernels
    except ImportError:  # no Triton here
        return None


class QuantLinear(nn.Module):
    """A linear layer without bias whose weight [O, I] is packed. Not trainable; `QALoRALinear` adds what is.

    Buffers: packed [O, packed_width(I, bits)] uint8, scale [O, G] float16, offset [O, G] float32.
    """

    def __init__(self, in_features, out_features, bits, group_size):
        super().__init__()
        assert in_features % group_size == 0, f"group size {group_size} does not divide {in_features} inputs"
        self.in_features, self.out_features, self.bits, self.group_size = in_features, out_features, bits, group_size
        groups = (out_features, in_features // group_size)
        self.register_buffer("packed", torch.empty(out_features, packed_width(in_features, bits), dtype=torch.uint8))
        self.register_buffer("scale", torch.empty(groups, dtype=torch.float16))
        self.register_buffer("offset", torch.empty(groups, dtype=torch.float32))

    @classmethod
    def from_quantized(cls, quantized, bits):
        """A layer that holds `quantized`; the group size follows from the shapes."""
        out_features, in_features = quantized.codes.shape
        with torch.device("meta"):
            layer = cls(in_features, out_features, bits, in_features // quantized.scale.shape[1])
        layer.packed, layer.scale, layer.offset = pack(quantized.codes, bits), quantized.scale, quantized.offset
        return layer

    def forward(self, x):  # [..., I] -> [..., O]
        return quant_matmul(x, self.packed, self.scale, self.offset, self.bits)

    def dequantize(self):
        """The weight [O, I] in float32."""
        return dequantize(Quantized(unpack(self.packed, self.bits, self.in_features), self.scale, self.offset))

    def extra_repr(self):
        return f"{self.in_features}, {self.out_features}, bits={self.bits}, group_size={self.group_size}"

    def _apply(self, fn, recurse=True):
        # .to(dtype) is for activations: as bytes, the buffers change their device but never their precision
        for name, buffer in self._buffers.items():
            self._buffers[name] = fn(buffer.view(torch.uint8)).view(buffer.dtype)
        return self


# ---- a whole model

HEARS_WITH = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}  # same input, so the same Hessian
CALIBRATION_BATCH = 2048  # tokens that go through a block at once


def quantize_model(model, bits, group_size, calibration_tokens=None, weights=None, search=True):
    """Replaces the seven linear layers of every block by QuantLinears, in place; returns the model.

    calibration_tokens: [N, T] for GPTQ, in sequence: each block is calibrated on the outputs of the blocks before it
    as quantized; None means RTN. Embedding, norms and output head stay in float. `weights` (of `open_weights`): blocks
    still on the meta device are read from there in their turn, so that no more than one is ever dense. `search` as in
    `quantize_gptq`.
    Raises UserError, naming the layer, when the group size does not divide its inputs or float16 cannot hold a scale.
    """
    check_group_size(model.config, group_size)
    embedding = model.model.embed_tokens.weight
    hidden = None
    if calibration_tokens is not None:
        rotary = rotary_table(model.config, torch.arange(calibration_tokens.shape[1], device=embedding.device))
        batches = calibration_tokens.to(embedding.device).split(max(1, CALIBRATION_BATCH // calibration_tokens.shape[1]))
        with torch.no_grad():
            hidden = [model.model.embed_tokens(tokens) for tokens in batches]
    label = f"quantizing to {bits} bits by {'RTN' if hidden is None else 'GPTQ'}"
    for i, block in enumerate(tqdm(model.model.layers, label, unit="block")):
        if weights is not None:
            fill(block, weights, f"model.layers.{i}.", embedding.dtype, embedding.device)
        quantize_block(block, f"model.layers.{i}.", bits, group_size, hidden, rotary if hidden else None, search)
        trim_heap()
    return model


def trim_heap():
    """Gives freed memory back to the system. glibc would keep it, as holes between the results: as much again as they are."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


@torch.no_grad()
def quantize_block(block, prefix, bits, group_size, hidden=None, rotary=None, search=True):
    """Quantizes one block's linear layers in place, by GPTQ on the inputs `hidden` (a list of [B, T, D]) or by RTN.

    `hidden` is advanced to the quantized block's outputs.
    """
    hessians = input_hessians(block, hidden, rotary) if hidden else {}
    for path, layer in linears(block):
        name = path.rpartition(".")[2]
        try:
            if hidden:
                quantized = quantize_gptq(layer.weight, hessians[HEARS_WITH.get(name, name)], bits, group_size, search)
            else:
                quantized = quantize_rtn(layer.weight, bits, group_size)
        except UserError as e:
            raise UserError(f"{prefix}{path}: {e}") from e
        block.set_submodule(path, QuantLinear.from_quantized(quantized, bits))
    for i in range(len(hidden or ())):
        hidden[i] = block(hidden[i], rotary)


def input_hessians(block, hidden, rotary):
    """{layer name: the mean of x xᵀ over its inputs x, float32 [I, I]} for the layers that have an input of their own."""
    hessians = {}

    def listen(name):
        def add(layer, inputs):
            x = inputs[0].flatten(0, -2)  # [N, I]
            hessians[name] = hessians.get(name, 0) + squared(x) / tokens
        return add

    tokens = sum(x.shape[0] * x.shape[1] for x in hidden)
    named = {path.rpartition(".")[2]: layer for path, layer in block.named_modules()}
    hooks = [named[n].register_forward_pre_hook(listen(n)) for n in LINEARS if n not in HEARS_WITH]
    for x in hidden:
        block(x, rotary)
    for hook in hooks:
        hook.remove()
    return hessians


def squared(x_NI):
    """xᵀ x in float32, [I, I]."""
    if x_NI.is_cuda and x_NI.itemsize == 2:  # products of 16-bit floats are exact in float32, and many times as fast
        return torch.mm(x_NI.t(), x_NI, out_dtype=torch.float32)
    x = x_NI.float()
    return x.t() @ x


def check_group_size(config, group_size):
    """Raises UserError, naming the first layer, when `group_size` does not divide the inputs of every linear layer."""
    for layer, inputs in (("self_attn.q_proj", config.hidden_size), ("mlp.down_proj", config.intermediate_size)):
        if group_size < 1 or inputs % group_size:
            fitting = [g for g in (2 ** k for k in range(9)) if config.hidden_size % g == config.intermediate_size % g == 0]
            raise UserError(f"model.layers.0.{layer}: group size {group_size} does not divide its {inputs} inputs; "
                            f"choose one of {', '.join(map(str, fitting))}")


def quantized_skeleton(config, bits, group_size):
    """A Llama on the meta device whose blocks have QuantLinears: shapes without memory."""
    with torch.device("meta"):
        model = Llama(config)
        for path, layer in linears(model):
            model.set_submodule(path, QuantLinear(layer.in_features, layer.out_features, bits, group_size))
    return model


# ---- the folder of a quantized model

def save_quantized(model, folder, dtype=None, **origin):
    """Writes a quantized model's config.json and model.safetensors into `folder` (new, or with other files in it).

    config.json's `quantization` records bits, group size and what `origin` adds.
    dtype: what embedding, norms and head are stored in, when not as they are.
    """
    folder = pathlib.Path(folder)
    layer = next(m for m in model.modules() if hasattr(m, "group_size"))
    tensors = {name: p.detach().to(dtype or p.dtype) for name, p in model.named_parameters()}  # tied ones once
    tensors |= dict(model.named_buffers())
    with written_whole(folder / "model.safetensors") as beside:
        save_file({name: t.contiguous().cpu() for name, t in tensors.items()}, beside)
    quantization = {"bits": layer.bits, "group_size": layer.group_size, **origin}
    write_config(model.config, folder, {"quantization": quantization})


def quantization_of(folder):
    """The `quantization` entry of a model folder's config.json; None for a float model."""
    path = pathlib.Path(folder) / "config.json"
    if not path.exists():
        return None  # Meta's original folders have none
    quantization = read_json(path).get("quantization")
    if quantization is None:
        return None
    if not isinstance(quantization, dict):
        raise UserError(f"{path}: quantization = {json.dumps(quantization)} says nothing of bits and group size")
    bits, group_size = quantization.get("bits"), quantization.get("group_size")
    if bits not in (2, 3, 4) or type(bits) is not int or type(group_size) is not int:
        raise UserError(f"{path}: quantization to {bits} bits in groups of {group_size} is not supported")
    return quantization


def load_quantized(folder, dtype=None, device="cpu"):
    """The Llama in a folder written by `save_quantized`; on the CPU its tensors stay memory-mapped files.

    dtype: what embedding, norms and head are cast to. Raises UserError when the folder is not a quantized model, or a
    tensor is missing, superfluous or of another shape.
    """
    folder = pathlib.Path(folder)
    quantization = quantization_of(folder)
    if quantization is None:
        raise UserError(f"{folder} holds no quantized model; make one with train.py --weights {folder} --data FILE")
    config, file = read_config(folder), folder / "model.safetensors"
    bits, group_size = quantization["bits"], quantization["group_size"]
    check_group_size(config, group_size)
    return load_tensors(quantized_skeleton(config, bits, group_size), file, dtype, device)


def load_tensors(model, file, dtype, device):
    """Gives a model on the meta device the tensors in `file`; arguments and errors as for `load_quantized`."""
    tensors = {name: stored.read() for name, stored in open_file(file).items()}
    for name, t in tensors.items():
        if t.is_floating_point() and not all_finite(t):
            raise UserError(f"{file}: tensor {name} has NaN or infinite values")
    buffers = dict(model.named_buffers())
    wanted = {**dict(model.named_parameters()), **buffers}  # tied weights appear once
    for name in sorted(wanted.keys() | tensors.keys()):
        kinds = [(*t[name].shape, "float" if t[name].is_floating_point() and name not in buffers else t[name].dtype)
                 if name in t else None for t in (wanted, tensors)]
        if kinds[0] != kinds[1]:
            raise UserError(f"{file}: {name} is {kinds[1] or 'missing'} where {kinds[0] or 'no such tensor'} belongs; "
                            "quantize the model again")
    if model.config.tie_word_embeddings:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    model.load_state_dict(tensors, assign=True)
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model.requires_grad_(False).to(device, dtype)
