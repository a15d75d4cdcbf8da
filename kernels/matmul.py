"""Where a packed matrix is multiplied: by Triton kernels on a GPU, in pieces on a CPU.

quant.py hands in its plain `dense(packed, scale, offset, bits, in_features, dtype) -> w [O, I]`.
On a CPU the weight is dequantized and multiplied a piece at a time, so it is never dense as a
whole; where much is dequantized, torch.compile makes that one pass (`kernels/compiled.py`). All of
this gives the same numbers as `x @ dense(...)^T`, faster and in less memory. (Triton rounds scale *
code + offset once. For a float16 scale that is no difference: its product with a code is exact.)

Dimension key: O outputs, I inputs, G groups, N tokens.
"""

import functools
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from kernels import compiled

DENSE_AT_A_TIME = 2**24  # bytes; less is slower a weight, and glibc maps 32 MB afresh each time
IN_CACHE = 2**20  # weights: 4 MB in float32 and 1 MB of codes
FEW_TOKENS = 8  # up to here, by count, unpacking for each token costs less than unpacking once
COMPILE_AFTER = 2**34  # weights; dequantizing them takes some seconds, as compiling does

USE_TRITON = None  # None: for tensors on a GPU that can. True (tests, in the interpreter) or False
USE_COMPILER = None  # None: on a CPU, after COMPILE_AFTER weights. True or False (tests, bench.py)
dequantized = 0  # weights so far, in matrices that are worth compiling for


def product(
    x_NI: Tensor, packed: Tensor, scale: Tensor, offset: Tensor, bits: int, dense: Callable
) -> Tensor:
    """x @ w^T, [N, O] in x's dtype."""
    tokens, in_features = x_NI.shape
    triton = triton_for(x_NI)
    if triton and 0 < tokens <= FEW_TOKENS and in_features // scale.shape[1] % 4 == 0:
        return triton.multiply(x_NI, packed, scale, offset, bits)
    if triton:
        return x_NI @ triton.dense(packed, scale, offset, bits, in_features, x_NI.dtype).t()
    y_NO = x_NI.new_empty(tokens, len(packed))
    rows_at_a_time = power_of_two(DENSE_AT_A_TIME // x_NI.itemsize // in_features)
    for start in range(0, len(packed), rows_at_a_time):
        rows = slice(start, start + rows_at_a_time)
        piece = packed[rows], scale[rows], offset[rows]
        w = dense_piece(*piece, bits, in_features, x_NI.dtype, dense)
        torch.mm(x_NI, w.t(), out=y_NO[:, rows])
        del w  # the next piece takes its memory
    return y_NO


def input_gradient(
    gy_NO: Tensor,
    packed: Tensor,
    scale: Tensor,
    offset: Tensor,
    bits: int,
    in_features: int,
    dense: Callable,
) -> Tensor:
    """gy @ w, [N, I] in gy's dtype.

    Pieces are columns of w here: adding up what pieces of rows give would round a sum again and
    again. The bytes at one place of each plane are a packing too, of the codes at that place in
    each plane. Where w is small or a group lies in two planes, w is dequantized as a whole.
    """
    planes, group_size = plane_count(bits), in_features // scale.shape[1]
    triton = triton_for(gy_NO)
    if triton:
        return gy_NO @ triton.dense(packed, scale, offset, bits, in_features, gy_NO.dtype)
    fits = gy_NO.itemsize * len(packed) * in_features <= DENSE_AT_A_TIME
    if fits or not whole_groups(in_features, group_size, bits):
        weight = packed, scale, offset
        return gy_NO @ dense_piece(*weight, bits, in_features, gy_NO.dtype, dense)
    packed = packed.unflatten(1, (bits * planes // 8, -1))  # [O, ., bytes of a plane]
    scale = scale.unflatten(1, (planes, -1))  # [O, planes, groups of a plane]
    offset = offset.unflatten(1, (planes, -1))
    gx = gy_NO.new_empty(len(gy_NO), planes, in_features // planes)
    bytes_a_group = gy_NO.itemsize * len(packed) * planes * group_size
    groups_at_a_time = power_of_two(DENSE_AT_A_TIME // bytes_a_group)
    for start in range(0, scale.shape[2], groups_at_a_time):
        groups = slice(start, start + groups_at_a_time)
        inputs = slice(groups.start * group_size, groups.stop * group_size)
        piece = [packed[..., inputs], scale[..., groups], offset[..., groups]]
        piece = [t.flatten(1) for t in piece]
        columns = piece[1].shape[1] * group_size
        w = dense_piece(*piece, bits, columns, gy_NO.dtype, dense)
        gx[..., inputs] = (gy_NO @ w).unflatten(1, (planes, -1))
        del w  # the next piece takes its memory
    return gx.flatten(1)


def dense_piece(
    packed: Tensor,
    scale: Tensor,
    offset: Tensor,
    bits: int,
    in_features: int,
    dtype: torch.dtype,
    dense: Callable,
) -> Tensor:
    """`dense`, to the bit: compiled where that pays, else a cacheful of rows at a time."""
    wide = torch.promote_types(dtype, torch.float32)
    weights = len(packed) * in_features
    group_size = in_features // scale.shape[1]
    if compiler_wanted(weights, packed.device) and whole_groups(in_features, group_size, bits):
        w = compiled.dense(packed, scale, offset, bits, dtype, plane_count(bits))
        if w is not None:
            return w
        stop_compiling()
    if packed.device.type != "cpu" or weights <= IN_CACHE or dtype == wide:
        return dense(packed, scale, offset, bits, in_features, dtype)
    w_OI = torch.empty(len(packed), in_features, dtype=dtype, device=packed.device)
    rows = max(1, IN_CACHE // in_features)
    for start in range(0, len(packed), rows):
        part = slice(start, start + rows)
        w_OI[part] = dense(packed[part], scale[part], offset[part], bits, in_features, wide)
    return w_OI


def compiler_wanted(weights: int, device: torch.device) -> bool:
    """Whether to compile by now; counts the weights that are dequantized."""
    global dequantized
    if device.type != "cpu":
        return False
    if weights >= 2**18:  # in small matrices it is not the passes that take the time
        dequantized += weights
    return dequantized > COMPILE_AFTER if USE_COMPILER is None else USE_COMPILER


def stop_compiling() -> None:
    """Turns compiling off: there is no compiler, or no room for its files."""
    global USE_COMPILER
    USE_COMPILER = False


def plane_count(bits: int) -> int:
    """How many planes, stretches of consecutive inputs, share a row's bytes (see `quant.pack`)."""
    return 8 if bits == 3 else 8 // bits


def whole_groups(in_features: int, group_size: int, bits: int) -> bool:
    """Whether rows are packed without padding and no group lies in two planes."""
    return in_features % 32 == 0 and in_features // plane_count(bits) % group_size == 0


def power_of_two(limit: int) -> int:
    """The largest power of two up to `limit`, at least 1: most pieces then have the same size."""
    return 1 << max(1, limit).bit_length() - 1


def pool(x_NI: Tensor, groups: int) -> Tensor:
    """The sum of x over each group of inputs, [N, G] in x's dtype, rounded once."""
    triton = triton_for(x_NI)
    if triton:
        return triton.pool(x_NI, groups)
    return x_NI.unflatten(1, (groups, -1)).sum(dim=-1)


def triton_for(x: Tensor, dtypes: tuple = (torch.bfloat16, torch.float16)) -> ModuleType | None:
    """`kernels.triton_kernels` where it is wanted and can compute with `x`, else None."""
    wanted = USE_TRITON
    if wanted is None:
        wanted = x.is_cuda and x.dtype in dtypes
        wanted = wanted and torch.cuda.get_device_capability(x.device)[0] >= 8
    return _triton_kernels() if wanted else None


@functools.cache
def _triton_kernels():
    try:
        from kernels import triton_kernels
    except ImportError:  # Triton is not installed
        return None
    return triton_kernels
