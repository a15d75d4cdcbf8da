"""Two Triton kernels for GPUs: unpack a quantized matrix, and multiply by it without unpacking. Optional.

`dense` writes the matrix in 16 bits for an ordinary matmul: right for many tokens, whose matmul takes far longer.
`multiply` unpacks in registers: right for few tokens, where a layer takes as long as its bytes take to be read. Both
compute in float32, as Triton's interpreter needs (version 3.9 gets bfloat16 arithmetic and tl.dot wrong), and round
once. A row's bytes are planes (see `quant.pack`), so neighbouring lanes read neighbouring bytes and inputs. Left out:
tensor cores in `multiply` (it waits for memory anyway) and autotuning (seconds at every start).

`quant.py` imports this file only where it shall be used: on a GPU, or in Triton's interpreter, which needs no GPU:

    TRITON_INTERPRET=1 python -m pytest tests/test_triton.py
"""

import torch
import triton
import triton.language as tl

PLANES = {2: 4, 3: 8, 4: 2}  # how many runs of consecutive inputs the bits of a row's bytes hold


def dense(packed, scale, offset, bits, in_features, dtype):
    """scale * code + offset, [O, I] in `dtype`, of packed [O, bytes], scale and offset [O, G]; any shape."""
    rows, width = packed.shape
    plane = 8 * width // bits // PLANES[bits]
    w_OI = torch.empty(rows, in_features, dtype=dtype, device=packed.device)
    with torch.cuda.device_of(packed):
        _dense_kernel[triton.cdiv(rows, 8), triton.cdiv(plane, 128)](
            packed, scale, offset.contiguous(), w_OI, rows, in_features, plane, width, in_features // scale.shape[1],
            bits, PLANES[bits], 8, 128)
    return w_OI


def can_multiply(scale, bits, in_features):
    """Whether `multiply` takes this shape: groups of 2^k inputs, none of them in two planes. All of LLaMA's are."""
    group_size, plane = in_features // scale.shape[1], in_features // PLANES[bits]
    return in_features % 32 == 0 and plane % group_size == 0 and group_size.bit_count() == 1


def multiply(x_NI, packed, scale, offset, bits):
    """x @ (scale * codes + offset)ᵀ, [N, O] in x's dtype, reading the packed matrix once per token."""
    assert can_multiply(scale, bits, x_NI.shape[1]), f"{x_NI.shape[1]} inputs in {scale.shape[1]} groups, {bits} bits"
    (tokens, inputs), (rows, width), groups = x_NI.shape, packed.shape, scale.shape[1]
    group_size = inputs // groups
    y_NO = torch.empty(tokens, rows, dtype=x_NI.dtype, device=x_NI.device)
    with torch.cuda.device_of(packed):
        _multiply_kernel[triton.cdiv(rows, 2), tokens](
            x_NI.contiguous(), packed, scale, offset.contiguous(), y_NO, rows, inputs, inputs // PLANES[bits], width,
            groups, groups // PLANES[bits], bits, PLANES[bits], group_size, 2, max(1, 1024 // group_size))
    return y_NO


@triton.jit
def _codes(row, j, k: tl.constexpr, plane, inside, BITS: tl.constexpr):
    """The codes of inputs j + k * plane as float32; `row` points to the first byte of the row, j < plane."""
    if BITS == 3:
        low = tl.load(row + j + (k % 2) * plane, mask=inside, other=0) >> (k // 2 * 2)
        high = tl.load(row + j + 2 * plane, mask=inside, other=0) >> k
        code = (low & 3) | ((high & 1) << 2)
    else:
        code = (tl.load(row + j, mask=inside, other=0) >> (BITS * k)) & (2 ** BITS - 1)
    return code.to(tl.float32)


@triton.jit
def _dense_kernel(packed, scale, offset, out, rows, inputs, plane, width, group_size,
                  BITS: tl.constexpr, PLANES: tl.constexpr, ROWS: tl.constexpr, BYTES: tl.constexpr):
    o = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    j = tl.program_id(1) * BYTES + tl.arange(0, BYTES)[None, :]
    for k in tl.static_range(PLANES):
        i = j + k * plane
        inside = (o < rows) & (j < plane) & (i < inputs)  # a last plane is short where the row was padded
        code = _codes(packed + o * width, j, k, plane, inside, BITS)
        group = o * (inputs // group_size) + i // group_size
        s = tl.load(scale + group, mask=inside, other=0).to(tl.float32)
        b = tl.load(offset + group, mask=inside, other=0)
        tl.store(out + o * inputs + i, (s * code + b).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _multiply_kernel(x, packed, scale, offset, y, rows, inputs, plane, width, groups, plane_groups,
                     BITS: tl.constexpr, PLANES: tl.constexpr, GROUP_SIZE: tl.constexpr,
                     ROWS: tl.constexpr, GROUPS: tl.constexpr):
    o = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None, None]  # [ROWS, 1, 1]
    token = tl.program_id(1)
    lane = tl.arange(0, GROUP_SIZE)[None, None, :]
    total = tl.zeros([ROWS, GROUPS, GROUP_SIZE], tl.float32)
    for first in range(0, plane_groups, GROUPS):
        g = first + tl.arange(0, GROUPS)[None, :, None]  # [1, GROUPS, 1]: groups of the first plane
        inside = (o < rows) & (g < plane_groups)
        for k in tl.static_range(PLANES):
            group = g + k * plane_groups
            code = _codes(packed + o * width, g * GROUP_SIZE + lane, k, plane, inside, BITS)
            s = tl.load(scale + o * groups + group, mask=inside, other=0).to(tl.float32)
            b = tl.load(offset + o * groups + group, mask=inside, other=0)
            values = tl.load(x + token * inputs + group * GROUP_SIZE + lane, mask=g < plane_groups, other=0)
            total += (s * code + b) * values.to(tl.float32)
    result = tl.sum(tl.sum(total, axis=2), axis=1)  # [ROWS]
    o = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    tl.store(y + token * rows + o, result.to(y.dtype.element_ty), mask=o < rows)
