"""Group quantization: every weight is `scale * code + offset`, one scale and offset for a group.

A row of a weight matrix is cut into groups of `group_size` consecutive inputs. Each group keeps a
float16 scale, a float32 offset and one 2-, 3- or 4-bit code a weight. The offset is a real number
(the paper's zero point in another form: offset = -scale * zero), and that is what lets QA-LoRA fold
an adapter into it without loss.

In reading order: packing codes; choosing scales and codes (RTN, then GPTQ); multiplying by a packed
matrix; the layer; quantizing a whole model block by block.

Dimension key: O outputs, I inputs, G groups (I / group_size), g inputs of one group, N tokens.
"""

import functools
import pathlib
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from tqdm import tqdm

import kernels.gptq
import kernels.matmul
from cli.errors import UserError
from llama import LINEARS, Block, Llama, LlamaConfig, linears, rotary_table

# ---- codes of 2, 3 or 4 bits, packed at exactly that cost


def packed_width(in_features: int, bits: int) -> int:
    """Bytes of a row of `in_features` codes, which is padded to a multiple of 32 codes."""
    assert bits in (2, 3, 4), f"bits must be 2, 3 or 4, not {bits}"
    return -(-in_features // 32) * 4 * bits


def pack(codes_OI: Tensor, bits: int) -> Tensor:
    """Packs uint8 codes [O, I], all below 2^bits, into uint8 [O, packed_width(I, bits)].

    A row's bytes are planes. With n the row length padded to a multiple of 32, byte j holds
    at 4 bits: code j in its low half and code j + n/2 in its high half;
    at 2 bits: the codes j, j + n/4, j + n/2 and j + 3n/4, lowest first;
    at 3 bits: the two low bits as at 2 bits; n/8 more bytes follow, and bit k of their byte j is
    the high bit of code j + k*n/8.
    Planes unpack into long contiguous runs, four times faster than the runs of 16 of GGUF's Q4_1.
    """
    assert codes_OI.dtype == torch.uint8 and packed_width(codes_OI.shape[-1], bits)
    codes = nn.functional.pad(codes_OI, (0, -codes_OI.shape[-1] % 32))
    if bits == 3:
        return torch.cat([_join_planes(codes & 3, 2), _join_planes(codes >> 2, 1)], dim=-1)
    return _join_planes(codes, bits)


def unpack(packed: Tensor, bits: int, in_features: int) -> Tensor:
    """The inverse of `pack`: uint8 [O, packed_width(I, bits)] to uint8 codes [O, in_features]."""
    if bits == 3:
        two_thirds = packed.shape[-1] // 3 * 2
        codes = _split_planes(packed[..., :two_thirds], 2)
        codes.add_(_split_planes(packed[..., two_thirds:], 1), alpha=4)
    else:
        codes = _split_planes(packed, bits)
    return codes[..., :in_features]


def _join_planes(fields, width):  # [O, n] fields of `width` bits -> [O, n * width / 8] bytes
    planes = fields.chunk(8 // width, dim=-1)
    shifted = [plane << (width * k) for k, plane in enumerate(planes)]
    return torch.stack(shifted).sum(dim=0, dtype=torch.uint8)


def _split_planes(packed, width):  # the inverse
    fields = packed.new_empty(*packed.shape[:-1], packed.shape[-1] * 8 // width)
    lowest, *others = fields.chunk(8 // width, dim=-1)
    torch.bitwise_and(packed, 2**width - 1, out=lowest)  # in place: 2x faster than torch.cat
    for k, plane in enumerate(others, 1):
        torch.bitwise_right_shift(packed, width * k, out=plane)
    for plane in others[:-1]:  # the last plane has no higher bits
        plane.bitwise_and_(2**width - 1)
    return fields


# ---- choosing scale, offset and codes: rounding to nearest


class Quantized(NamedTuple):
    """w[o, i] is about scale[o, k] * codes[o, i] + offset[o, k]; k is the group of input i."""

    codes: Tensor  # [O, I] uint8
    scale: Tensor  # [O, G] float16; float32 where an imported file has finer ones
    offset: Tensor  # [O, G] float32


def dequantize(quantized: Quantized, dtype: torch.dtype = torch.float32) -> Tensor:
    """The matrix [O, I] that `quantized` stands for, computed in float32 at least, then rounded."""
    codes, scale, offset = quantized
    wide = torch.promote_types(dtype, torch.float32)
    w_OGg = codes.to(wide).view(*scale.shape, -1)
    w_OGg.mul_(scale.to(wide).unsqueeze(-1)).add_(offset.to(wide).unsqueeze(-1))
    return w_OGg.view(codes.shape).to(dtype)


def quantize_rtn(w_OI: Tensor, bits: int, group_size: int) -> Quantized:
    """Rounds each weight to the nearest of 2^bits levels between its group's least and greatest.

    w_OI: [O, I] of any floating dtype. Only a constant group gets scale 0; it is exact.
    Raises UserError when `group_size` does not divide I, or when a group's range is not finite or
    too wide for a float16 scale.
    """
    w_OGg = _grouped(w_OI.detach().float(), group_size)
    scale, offset = min_max_range(w_OGg, bits)
    return Quantized(nearest_codes(w_OGg, scale, offset, bits).view(w_OI.shape), scale, offset)


def _grouped(w_OI, group_size):  # [O, I] -> [O, G, g]
    if w_OI.shape[1] % group_size:
        raise UserError(f"group size {group_size} does not divide its {w_OI.shape[1]} inputs")
    return w_OI.reshape(w_OI.shape[0], -1, group_size)


def min_max_range(w_OGg: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Scale and offset [O, G] that put codes 0 and 2^bits - 1 on a group's least and greatest."""
    low, high = w_OGg.aminmax(dim=-1)
    return round_up_to_float16(high - low, 2**bits - 1), low


def round_up_to_float16(spread: Tensor, levels: int) -> Tensor:
    """The smallest float16 scales with scale * levels >= spread: codes still reach the greatest.

    Raises UserError when a scale is beyond float16's 65504, or `spread` is not a number.
    """
    scale = (spread / levels).half()
    too_small = scale.float() * levels < spread  # exact: 11 bits times 4 bits fit in float32's 24
    next_scale = (scale.view(torch.int16) + 1).view(torch.float16)
    scale = torch.where(too_small, next_scale, scale)
    if not scale.isfinite().all():
        span = f"{spread.max().item():g}"
        raise UserError(
            f"weights that span {span} in one group need a scale that float16 cannot hold"
        )
    return scale


def nearest_codes(w_OGg: Tensor, scale: Tensor, offset: Tensor, bits: int) -> Tensor:
    """The uint8 codes [O, G, g] nearest to `w_OGg` for scale and offset [O, G]; 0 at scale 0.

    Or for one group: codes [O, g], scale and offset [O].
    """
    step = torch.where(scale == 0, 1, scale).float().unsqueeze(-1)
    codes = ((w_OGg - offset.unsqueeze(-1)) / step).round_()
    return codes.clamp_(0, 2**bits - 1).to(torch.uint8)


# ---- choosing scale, offset and codes: GPTQ


def quantize_gptq(
    w_OI: Tensor,
    hessian_II: Tensor,
    bits: int,
    group_size: int,
    search: bool = True,
    damping: float = 0.01,
) -> Quantized:
    """GPTQ (Frantar et al., 2023): rounds input by input; each makes up for the errors before it.

    hessian_II: the sum (or mean) of x x^T over the calibration inputs x. Let H = R R^T, R upper
    triangular. The squared output error trace((W - Q) H (W - Q)^T) is the squared length of
    (W - Q) R, whose column k holds the errors of the inputs 0..k only. So go through the inputs in
    order, and round each weight so that it cancels its column's `drift`, which is what the errors
    before it have put there. This is the LDL form of GPTQ (Chee et al., "QuIP", 2023, theorem 6):
    the same result from one Cholesky factor, without inverting H. A group's range is chosen when
    its turn comes, from its weights as corrected until then. The order is `largest_first`.

    search=False: a range reaches from a group's least to its greatest weight. search=True may cut
    it, and fits scale and offset to the codes: 0.44, 0.64 and 0.70 times the output error at 2, 3
    and 4 bits (tests/test_quant_search.py). damping: see `damped_factor`. Other arguments, result
    and errors as in `quantize_rtn`.
    """
    _grouped(w_OI, group_size)
    order_I = largest_first(hessian_II, group_size)
    factor = damped_factor(hessian_II[order_I[:, None], order_I], damping)
    w = w_OI.detach().float().t()[order_I]  # [I, O]: the weights of one input are contiguous
    drift, error = torch.zeros_like(w), torch.empty_like(w)
    codes = torch.empty(w.shape, dtype=torch.uint8, device=w.device)
    scales, offsets = [], []

    def round_one_group(low, high):
        block = factor[low:high, low:high]
        correction = torch.linalg.solve_triangular(block.t(), drift[low:high], upper=False)
        found, scale, offset = quantize_group(w[low:high] + correction, block, bits, search)
        codes[low:high] = found
        error[low:high] = w[low:high] - (scale.float() * found + offset)
        scales.append(scale)
        offsets.append(offset)

    in_order(0, len(w), group_size, factor, drift, error, round_one_group)
    place_I = order_I.argsort()
    place_G = place_I[::group_size] // group_size
    placed = codes[place_I], torch.stack(scales)[place_G], torch.stack(offsets)[place_G]
    return Quantized(*(t.t().contiguous() for t in placed))


def largest_first(hessian_II: Tensor, group_size: int) -> Tensor:
    """The order [I] in which inputs are rounded: those first whose errors would cost most.

    Groups by the mean square of their inputs, and so the inputs within a group, which stays whole:
    GPTQ's activation order as far as groups of consecutive inputs allow.
    """
    power_Gg = hessian_II.diagonal().view(-1, group_size)
    inputs_Gg = power_Gg.argsort(dim=1, descending=True, stable=True)
    inputs_Gg += torch.arange(0, len(hessian_II), group_size, device=power_Gg.device)[:, None]
    return inputs_Gg[power_Gg.mean(dim=1).argsort(descending=True, stable=True)].flatten()


def in_order(
    low: int,
    high: int,
    unit: int,
    factor: Tensor,
    drift: Tensor,
    error: Tensor,
    round_one: Callable,
) -> None:
    """Calls round_one(low, high) for one `unit` of inputs after another.

    `round_one` reads their `drift` and writes their `error`. The errors in one half of the inputs
    reach the other half by one matrix product, and halves are halved again: GPTQ's lazy batching,
    carried through to the single input.
    """
    if high - low == unit:
        round_one(low, high)
        return
    middle = low + -(-(high - low) // (2 * unit)) * unit
    in_order(low, middle, unit, factor, drift, error, round_one)
    drift[middle:high].addmm_(factor[low:middle, middle:high].t(), error[low:middle])
    in_order(middle, high, unit, factor, drift, error, round_one)


def quantize_group(
    w_gO: Tensor, factor_gg: Tensor, bits: int, search: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(codes [g, O] in float, scale [O], offset [O]) of one group, for a small output error."""
    if not search:
        scale, offset = min_max_range(w_gO.t(), bits)
        return round_in_order(w_gO, factor_gg, scale, offset, bits), scale, offset
    scale, offset = best_range(w_gO, factor_gg.diagonal().square(), bits)
    # Rounding in order only matters in the end: a first fit to codes so rounded is no better
    codes = nearest_codes(w_gO.t(), scale, offset, bits).t().float()
    scale, offset = fit_range(w_gO, factor_gg, codes, scale, offset)
    codes = round_in_order(w_gO, factor_gg, scale, offset, bits)
    return codes, *fit_range(w_gO, factor_gg, codes, scale, offset)


def round_in_order(
    w_gO: Tensor, factor_gg: Tensor, scale: Tensor, offset: Tensor, bits: int
) -> Tensor:
    """GPTQ's codes [g, O], in float, for one group whose scale [O] and offset [O] are given."""
    step = torch.where(scale == 0, torch.inf, scale.float())  # scale 0: constant, all codes are 0
    w = (w_gO - offset) / step  # in steps, so that an error is w - code
    triton = kernels.matmul.triton_for(w, (torch.float32,))
    if triton:  # one launch on a GPU, where the loop below takes hundreds
        return triton.round_in_order(w, factor_gg, bits)
    # An input's drift is a sum over the inputs before it; all of w is summed at once, then the
    # codes are taken off in order
    pull = factor_gg / factor_gg.diagonal()  # [g, g], a column in steps of its own input
    exact, codes = pull.t() @ w, torch.empty_like(w)

    def round_one_input(k, _):
        torch.round(exact[k], out=codes[k]).clamp_(0, 2**bits - 1)

    in_order(0, len(w), 1, -pull, exact, codes, round_one_input)
    return codes


def best_range(w_gO: Tensor, importance_g: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Scale [O] and offset [O] of the cut range whose nearest levels leave the least error.

    Errors are squared and weighted by importance. Tries to cut 0, 10, ... % off the range's lower
    and upper end, up to 40 % at 2 bits, 30 % at 3 and 20 % at 4: the more levels, the less it pays.
    Then tries 5 % more or less at either end, which may also widen the range.
    """
    low, high = w_gO.amin(dim=0), w_gO.amax(dim=0)
    x_gO = (w_gO - low) / torch.where(high == low, 1, high - low)  # from 0 to 1
    cut = torch.zeros(2, w_gO.shape[1], device=w_gO.device)
    least = torch.full_like(low, torch.inf)
    for step, reach in ((0.1, torch.arange(7 - bits)), (0.05, torch.arange(-1, 2))):
        trials_T2O = cut + step * torch.cartesian_prod(reach, reach).unsqueeze(-1).to(cut)
        cut, least = kernels.gptq.best_trial(x_gO, importance_g, trials_T2O, bits, cut, least)
    below, above = cut
    spread = (1 - below - above) * (high - low)
    return round_up_to_float16(spread, 2**bits - 1), low + below * (high - low)


def fit_range(
    w_gO: Tensor, factor_gg: Tensor, codes_gO: Tensor, scale: Tensor, offset: Tensor
) -> tuple[Tensor, Tensor]:
    """The scale [O] and offset [O] that fit the codes best, or those given where they fit better.

    Least squares of (w - scale * codes - offset)^T factor. A fitted scale at or below 0, or far
    above the given one, is not taken: where all codes are equal it is a ratio of rounding errors.
    """
    one = factor_gg.sum(dim=0)  # [g]: what an offset of 1 adds to every column
    size = one.square().sum()
    mean = factor_gg @ one / size  # [g]: mean @ y is the offset nearest to y
    rest = factor_gg - torch.outer(mean, one)  # y^T rest: what that offset leaves of y^T factor
    mean_w, mean_code = mean @ w_gO, mean @ codes_gO
    weighted_codes = (rest @ rest.t()) @ codes_gO
    spread = (weighted_codes * codes_gO).sum(dim=0)
    best_scale = (weighted_codes * w_gO).sum(dim=0) / spread

    def excess(scale, offset):  # [O]: how far the squared error is above the least
        off_by = offset - (mean_w - scale * mean_code)
        return (scale - best_scale).square() * spread + off_by.square() * size

    fitted_scale = best_scale.half()
    fitted_offset = mean_w - fitted_scale * mean_code
    better = (fitted_scale > 0) & (fitted_scale < 4 * scale)  # neither holds for NaN
    better &= excess(fitted_scale, fitted_offset) < excess(scale, offset)
    scale = torch.where(better, fitted_scale, scale)
    return scale, torch.where(better, fitted_offset, offset)


def damped_factor(hessian_II: Tensor, damping: float) -> Tensor:
    """Upper triangular R [I, I] (float32) with R R^T = H + damping * mean(diagonal) * identity.

    Where that matrix is not positive definite the damping is raised tenfold until it is. For a
    semidefinite H no squared diagonal entry of R lies below `damping`; a far smaller one would be a
    rounding error, and dividing by it would amplify that.
    """
    extremes = torch.stack(hessian_II.aminmax())  # NaN if any entry is
    assert extremes.isfinite().all(), "the Hessian has NaN or infinite entries"
    inputs, mean = len(hessian_II), hessian_II.diagonal().double().mean().item()
    if mean < torch.finfo(torch.float32).tiny:  # no inputs: any multiple of the identity means RTN
        h = torch.zeros_like(hessian_II, dtype=torch.float32)
    else:  # no entry of a semidefinite matrix exceeds its trace
        h = (hessian_II / mean).float().clamp_(-inputs, inputs)
    diagonal = h.diagonal().clone()
    while True:
        h.diagonal().copy_(diagonal + damping)
        lower, failed = torch.linalg.cholesky_ex(h.flip(0, 1))  # flipped: its factor is then upper
        if not failed and (lower.diagonal().square() >= damping / 2).all():
            return lower.flip(0, 1)
        damping = max(10 * damping, 1e-6)


# ---- multiplying by a packed matrix


def dense(
    packed: Tensor,
    scale: Tensor,
    offset: Tensor,
    bits: int,
    in_features: int,
    dtype: torch.dtype,
) -> Tensor:
    """The matrix [O, in_features] that a packed one stands for, rounded once to `dtype`."""
    return dequantize(Quantized(unpack(packed, bits, in_features), scale, offset), dtype)


def quant_matmul(x: Tensor, packed: Tensor, scale: Tensor, offset: Tensor, bits: int) -> Tensor:
    """y = x @ (scale * codes + offset)^T for a packed weight, differentiable in x and offset.

    x: [..., I] float; packed: [O, packed_width(I, bits)] uint8; scale and offset: [O, G] float16
    or float32; result [..., O] in x's dtype. The weight is dequantized in float32, rounded once
    to x's dtype and multiplied, so y is as exact as that of a dense layer of that dtype. A change
    of the offset far below bfloat16's steps still shows, in the mean over a group of unequal codes.
    """
    fits = x.shape[-1] % scale.shape[1] == 0 and packed.shape[1] == packed_width(x.shape[-1], bits)
    shapes = f"x {tuple(x.shape)}, packed {tuple(packed.shape)}, scale {tuple(scale.shape)}"
    assert fits, f"{shapes} do not belong together at {bits} bits"
    if not torch.is_autocast_enabled(x.device.type):  # entering a context takes a GPU's time
        return QuantMatmul.apply(x, packed, scale, offset, bits)
    with torch.autocast(x.device.type, enabled=False):
        return QuantMatmul.apply(x, packed, scale, offset, bits)


class QuantMatmul(torch.autograd.Function):
    """`quant_matmul`. Saves packed, scale, offset and the pooled x; neither x nor a dense weight.

    The offset's gradient is grad_y^T @ pool(x); pool(x) [N, G] is the sum of x over each group (the
    paper's algorithm 1). `kernels/` computes what the comment beside a call says, faster.
    """

    @staticmethod
    def forward(ctx, x, packed, scale, offset, bits):
        """[..., I] -> [..., O]."""
        x_NI = x.reshape(-1, x.shape[-1])
        # x @ dense(...)^T
        y_NO = kernels.matmul.product(x_NI, packed, scale, offset, bits, dense)
        pooled_NG = None
        if ctx.needs_input_grad[3]:  # x.unflatten(1, (groups, -1)).sum(-1)
            pooled_NG = kernels.matmul.pool(x_NI, scale.shape[1])
        ctx.save_for_backward(packed, scale, offset, pooled_NG)
        ctx.bits, ctx.x_shape = bits, x.shape
        return y_NO.view(*x.shape[:-1], len(packed))

    @staticmethod
    @once_differentiable  # the pooled input is a constant here: a second derivative would be wrong
    def backward(ctx, grad_y):
        """[..., O] -> the gradients of x [..., I] and of offset [O, G]."""
        packed, scale, offset, pooled_NG = ctx.saved_tensors
        gy_NO = grad_y.reshape(-1, grad_y.shape[-1])
        grad_x = grad_offset = None
        if ctx.needs_input_grad[3]:
            # [G, O], then transposed: 2x faster than grad_y^T @ pool(x) where O > G (CPU)
            grad_offset = (pooled_NG.t() @ gy_NO).t().to(offset.dtype)
        if ctx.needs_input_grad[0]:
            weight = packed, scale, offset, ctx.bits  # grad_y @ dense(...)
            gx_NI = kernels.matmul.input_gradient(gy_NO, *weight, ctx.x_shape[-1], dense)
            grad_x = gx_NI.view(ctx.x_shape)
        return grad_x, None, None, grad_offset, None


class QuantLinear(nn.Module):
    """A linear layer without bias whose weight [O, I] is packed. `QALoRALinear` makes it trainable.

    Buffers: packed [O, packed_width(I, bits)] uint8, scale [O, G] float16 (or float32, see
    `Quantized`), offset [O, G] float32.
    """

    def __init__(self, in_features: int, out_features: int, bits: int, group_size: int):
        super().__init__()
        fits = in_features % group_size == 0
        assert fits, f"group size {group_size} does not divide {in_features} inputs"
        self.in_features, self.out_features = in_features, out_features
        self.bits, self.group_size = bits, group_size
        width = packed_width(in_features, bits)
        groups = in_features // group_size
        self.register_buffer("packed", torch.empty(out_features, width, dtype=torch.uint8))
        self.register_buffer("scale", torch.empty(out_features, groups, dtype=torch.float16))
        self.register_buffer("offset", torch.empty(out_features, groups, dtype=torch.float32))

    @classmethod
    def from_quantized(cls, quantized: Quantized, bits: int) -> "QuantLinear":
        """A layer that holds `quantized`; the group size follows from the shapes."""
        out_features, in_features = quantized.codes.shape
        with torch.device("meta"):
            layer = cls(in_features, out_features, bits, in_features // quantized.scale.shape[1])
        layer.packed = pack(quantized.codes, bits)
        layer.scale, layer.offset = quantized.scale, quantized.offset
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] -> [..., O]."""
        return quant_matmul(x, self.packed, self.scale, self.offset, self.bits)

    def dequantize(self) -> Tensor:
        """The weight [O, I] in float32."""
        weight = self.packed, self.scale, self.offset, self.bits
        return dense(*weight, self.in_features, torch.float32)

    def extra_repr(self) -> str:
        """What `print(layer)` shows."""
        shape = f"{self.in_features}, {self.out_features}"
        return f"{shape}, bits={self.bits}, group_size={self.group_size}"

    def _apply(self, fn, recurse=True):
        # .to(dtype) is for activations: buffers move as bytes, so they never lose precision
        for name, buffer in self._buffers.items():
            self._buffers[name] = fn(buffer.view(torch.uint8)).view(buffer.dtype)
        return self


# ---- a whole model

SHARES_INPUT_OF = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}
CALIBRATION_BATCH = 2048  # tokens that go through a block at once


def quantize_model(
    model: Llama,
    bits: int,
    group_size: int,
    calibration_tokens: Tensor | None = None,
    search: bool = True,
    load_block: Callable | None = None,
) -> Llama:
    """Replaces the seven linear layers of every block by QuantLinears, in place; returns the model.

    calibration_tokens: [N, T] for GPTQ, block after block: each is calibrated on the outputs of the
    quantized blocks before it. None means RTN. Embedding, norms and output head stay in float.
    search: as in `quantize_gptq`. load_block(block, index) is called before a block's turn, to fill
    a block on the meta device, so that no more than one need be in memory in float.
    Raises UserError, naming the layer, when the group size does not divide its inputs or float16
    cannot hold a scale.
    """
    check_group_size(model.config, group_size)
    hidden = rotary = None
    if calibration_tokens is not None:
        tokens_NT = calibration_tokens.to(model.model.embed_tokens.weight.device)
        length = tokens_NT.shape[1]
        rotary = rotary_table(model.config, torch.arange(length, device=tokens_NT.device))
        batches = tokens_NT.split(max(1, CALIBRATION_BATCH // length))
        hidden = [model.model.embed_tokens(batch).detach() for batch in batches]
    label = f"quantizing to {bits} bits by {'GPTQ' if hidden else 'RTN'}"
    for i, block in enumerate(tqdm(model.model.layers, label, unit="block")):
        if load_block:
            load_block(block, i)
        quantize_block(block, f"model.layers.{i}.", bits, group_size, hidden, rotary, search)
    return model


@torch.no_grad()
def quantize_block(
    block: Block,
    prefix: str,
    bits: int,
    group_size: int,
    hidden: list[Tensor] | None = None,
    rotary: tuple | None = None,
    search: bool = True,
) -> None:
    """Quantizes a block's linear layers in place, by GPTQ on its inputs `hidden`, or by RTN.

    `hidden`, a list of [B, T, D], is advanced to the quantized block's outputs.
    """
    hessians = input_hessians(block, hidden, rotary) if hidden else {}
    for path, layer in linears(block):
        name = path.rpartition(".")[2]
        try:
            if hidden:
                hessian = hessians[SHARES_INPUT_OF.get(name, name)]
                quantized = quantize_gptq(layer.weight, hessian, bits, group_size, search)
            else:
                quantized = quantize_rtn(layer.weight, bits, group_size)
        except UserError as e:
            raise UserError(f"{prefix}{path}: {e}") from e
        block.set_submodule(path, QuantLinear.from_quantized(quantized, bits))
    for i in range(len(hidden or ())):
        hidden[i] = block(hidden[i], rotary)


def input_hessians(block: Block, hidden: list[Tensor], rotary: tuple) -> dict[str, Tensor]:
    """{layer name: the mean of x x^T over its inputs x, float32 [I, I]} for each distinct input."""
    hessians, hooks = {}, []
    tokens = sum(x.shape[0] * x.shape[1] for x in hidden)

    def add(name, layer, inputs):
        x_NI = inputs[0].flatten(0, -2)
        hessians[name] = hessians.get(name, 0) + kernels.gptq.gram(x_NI) / tokens  # x^T @ x

    for path, layer in linears(block, [name for name in LINEARS if name not in SHARES_INPUT_OF]):
        add_here = functools.partial(add, path.rpartition(".")[2])
        hooks.append(layer.register_forward_pre_hook(add_here))
    for x in hidden:
        block(x, rotary)
    for hook in hooks:
        hook.remove()
    return hessians


def check_group_size(config: LlamaConfig, group_size: int) -> None:
    """Raises UserError, naming the layer, when a linear layer's inputs are no whole groups."""
    widths = {
        "self_attn.q_proj": config.hidden_size,
        "self_attn.o_proj": config.num_attention_heads * config.head_dim,
        "mlp.down_proj": config.intermediate_size,
    }
    for layer, inputs in widths.items():
        if group_size < 1 or inputs % group_size:
            sizes = (2**k for k in range(9))
            fitting = [str(g) for g in sizes if all(width % g == 0 for width in widths.values())]
            raise UserError(
                f"model.layers.0.{layer}: group size {group_size} does not divide its {inputs} "
                f"inputs; choose one of {', '.join(fitting)}"
            )


# ---- files: formats/ reads and writes them; it imports this module


def save_quantized(
    model: Llama, folder: str | pathlib.Path, dtype: torch.dtype | None = None, **origin
) -> None:
    """Writes a quantized model into a folder; see `formats/quantized.py`."""
    from formats.quantized import save_quantized as save

    save(model, folder, dtype, **origin)


def load_quantized(
    folder: str | pathlib.Path, dtype: torch.dtype | None = None, device: str = "cpu"
) -> Llama:
    """Reads the folder of a quantized model; see `formats/quantized.py`."""
    from formats.quantized import load_quantized as load

    return load(folder, dtype, device)
