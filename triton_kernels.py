"""Two Triton kernels for GPUs: unpack a quantized matrix, and multiply by it without unpacking. Optional.

`dense` writes the matrix for an ordinary matmul: right for many tokens, whose matmul takes far longer.
`multiply` unpacks in registers: right for few tokens, where a layer takes as long as its bytes take to be read. Both
compute in float32, as Triton's interpreter needs (version 3.9 gets bfloat16 arithmetic and tl.dot wrong), and round
once. A row's bytes are planes (see `quant.pack`), so neighbouring lanes read neighbouring bytes and inputs. Programs go
through runs of inputs that share plane and group, so that scale and offset are loaded once a run and any shape will
do. Left out: tensor cores in `multiply` (the interpreter could not check them) and autotuning (seconds at every start).

`quant.py` imports this file only where it shall be used: on a GPU, or in Triton's interpreter, which needs no GPU:

    TRITON_INTERPRET=1 python -m pytest tests/test_triton.py
"""

import torch
import triton
import triton.language as tl

PLANES = {2: 4, 3: 8, 4: 2}  # how many planes, stretches of consecutive inputs, share a row's bytes


def dense(packed, scale, offset, bits, in_features, dtype):
    """scale * code + offset, [O, I] in `dtype`, of packed [O, bytes], scale and offset [O, G]; any shape."""
    rows, groups = scale.shape
    plane, run = _runs(packed, bits, in_features // groups)
    w_OI = torch.empty(rows, in_features, dtype=dtype, device=packed.device)
    with torch.cuda.device_of(packed):
        _dense_kernel[triton.cdiv(rows, 8), triton.cdiv(plane, 128)](
            packed.contiguous(), scale.contiguous(), offset.contiguous(), w_OI, rows, in_features, plane,
            packed.shape[1], groups, bits, PLANES[bits], in_features // groups, 8, 128 // run, run)
    return w_OI


def multiply(x_NI, packed, scale, offset, bits):
    """x @ (scale * codes + offset)ᵀ, [N, O] in x's dtype, reading the packed matrix once per token; any shape."""
    (tokens, inputs), (rows, groups) = x_NI.shape, scale.shape
    plane, run = _runs(packed, bits, inputs // groups)
    y_NO = torch.empty(tokens, rows, dtype=x_NI.dtype, device=x_NI.device)
    with torch.cuda.device_of(packed):
        _multiply_kernel[triton.cdiv(rows, 2), tokens](
            x_NI.contiguous(), packed.contiguous(), scale.contiguous(), offset.contiguous(), y_NO, rows, inputs, plane,
            packed.shape[1], groups, bits, PLANES[bits], inputs // groups, 2, 1024 // run, run)
    return y_NO


def _runs(packed, bits, group_size):
    """(inputs of a plane, inputs of a run): 2^k that share plane and group, as many as do, but at most 64."""
    plane = 8 * packed.shape[1] // bits // PLANES[bits]
    return plane, min(64, (plane | group_size) & -(plane | group_size))


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
def _dense_kernel(packed, scale, offset, out, rows, inputs, plane, width, groups,
                  BITS: tl.constexpr, PLANES: tl.constexpr, GROUP_SIZE: tl.constexpr,
                  ROWS: tl.constexpr, RUNS: tl.constexpr, RUN: tl.constexpr):
    o = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None, None]
    first = (tl.program_id(1) * RUNS + tl.arange(0, RUNS)[None, :, None]) * RUN  # [1, RUNS, 1], in the first plane
    lane = tl.arange(0, RUN)[None, None, :]
    for k in tl.static_range(PLANES):
        i = first + k * plane
        inside = (o < rows) & (first < plane) & (i < inputs)  # a last plane is short where the row was padded
        s = tl.load(scale + o * groups + i // GROUP_SIZE, mask=inside, other=0).to(tl.float32)  # [ROWS, RUNS, 1]
        b = tl.load(offset + o * groups + i // GROUP_SIZE, mask=inside, other=0)
        code = _codes(packed + o * width, first + lane, k, plane, inside, BITS)  # [ROWS, RUNS, RUN]
        tl.store(out + o * inputs + i + lane, (s * code + b).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _multiply_kernel(x, packed, scale, offset, y, rows, inputs, plane, width, groups,
                     BITS: tl.constexpr, PLANES: tl.constexpr, GROUP_SIZE: tl.constexpr,
                     ROWS: tl.constexpr, RUNS: tl.constexpr, RUN: tl.constexpr):
    o = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None, None]
    token, lane = tl.program_id(1), tl.arange(0, RUN)[None, None, :]
    total = tl.zeros([ROWS, RUNS, RUN], tl.float32)
    for start in range(0, plane, RUNS * RUN):
        first = start + tl.arange(0, RUNS)[None, :, None] * RUN  # as in _dense_kernel
        for k in tl.static_range(PLANES):
            i = first + k * plane
            inside = (o < rows) & (first < plane) & (i < inputs)
            s = tl.load(scale + o * groups + i // GROUP_SIZE, mask=inside, other=0).to(tl.float32)
            b = tl.load(offset + o * groups + i // GROUP_SIZE, mask=inside, other=0)
            code = _codes(packed + o * width, first + lane, k, plane, inside, BITS)
            values = tl.load(x + token * inputs + i + lane, mask=(first < plane) & (i < inputs), other=0)
            total += (s * code + b) * values.to(tl.float32)
    result = tl.sum(tl.sum(total, axis=2), axis=1)  # [ROWS]
    o = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    tl.store(y + token * rows + o, result.to(y.dtype.element_ty), mask=o < rows)
