"""Triton kernels for GPUs: unpacking, multiplying without unpacking, pooling, rounding a group.

`dense` writes the matrix for an ordinary matmul: right for many tokens, whose matmul takes far
longer. `multiply` unpacks in registers: right for few tokens, where a layer takes as long as its
bytes take to be read, and where every instruction a weight costs counts. Both compute in float32,
as Triton's interpreter needs (version 3.9 gets bfloat16 arithmetic and tl.dot wrong), and round
once. A row's bytes are planes (see `quant.pack`), so neighbouring lanes read neighbouring bytes and
inputs. Programs go through runs of inputs that share plane and group, so scale and offset are
loaded once a run. Left out: tensor cores in `multiply` (the interpreter could not check them) and
autotuning (seconds at every start).

`kernels/matmul.py` imports this file only where it is used: on a GPU, or in Triton's interpreter:

    python -m pytest tests/test_kernels_triton.py   in the interpreter
    python -m pytest tests/test_gpu.py              the same tests and more, on a GPU
"""

import torch
import triton
import triton.language as tl

PLANES = {2: 4, 3: 8, 4: 2}  # how many planes, stretches of consecutive inputs, share a row's bytes


def dense(
    packed: torch.Tensor,
    scale: torch.Tensor,
    offset: torch.Tensor,
    bits: int,
    in_features: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """scale * code + offset, [O, I] in `dtype`; packed [O, bytes], scale and offset [O, G]."""
    rows, groups = scale.shape
    plane, run = _runs(packed, bits, in_features // groups, 64)
    w_OI = torch.empty(rows, in_features, dtype=dtype, device=packed.device)
    with torch.cuda.device_of(packed):
        # of 60 shapes tried on an H200 among the fastest
        _dense_kernel[rows, triton.cdiv(plane, 512)](
            packed.contiguous(),
            scale.contiguous(),
            offset.contiguous(),
            w_OI,
            rows,
            in_features,
            plane,
            packed.shape[1],
            groups,
            bits,
            PLANES[bits],
            in_features // groups,
            1,
            512 // run,
            run,
            num_warps=2,
        )
    return w_OI


def pool(x_NI: torch.Tensor, groups: int) -> torch.Tensor:
    """The sum of x over each group of inputs, [N, G] in x's dtype, summed in float32."""
    size, count = x_NI.shape[1] // groups, len(x_NI) * groups
    out_NG = torch.empty(len(x_NI), groups, dtype=x_NI.dtype, device=x_NI.device)
    wide = triton.next_power_of_2(size)
    at_a_time = max(1, 4096 // wide)
    if count:
        with torch.cuda.device_of(x_NI):
            _pool_kernel[triton.cdiv(count, at_a_time),](
                x_NI.contiguous(), out_NG, count, size, wide, at_a_time
            )
    return out_NG


def round_in_order(w_gO: torch.Tensor, factor_gg: torch.Tensor, bits: int) -> torch.Tensor:
    """The codes [g, O], in float, of `quant.round_in_order`; w in steps above its offset."""
    size, rows = w_gO.shape
    codes_gO = torch.empty(size, rows, dtype=w_gO.dtype, device=w_gO.device)
    with torch.cuda.device_of(w_gO):
        _round_kernel[triton.cdiv(rows, 32),](
            w_gO.contiguous(),
            factor_gg.contiguous(),
            codes_gO,
            rows,
            2.0**bits - 1,
            size,
            triton.next_power_of_2(size),
            32,
        )
    return codes_gO


def multiply(
    x_NI: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor, bits: int
) -> torch.Tensor:
    """x @ (scale * codes + offset)ᵀ, [N, O] in x's dtype, reading the packed matrix once per token.

    The group size must be a multiple of 4: four inputs of a plane are the bytes of one 32-bit word.
    """
    (tokens, inputs), (rows, groups) = x_NI.shape, scale.shape
    assert inputs // groups % 4 == 0, f"a group of {inputs // groups} inputs ends inside a word"
    plane, run = _runs(packed, bits, inputs // groups, 64 // PLANES[bits])
    y_NO = torch.empty(tokens, rows, dtype=x_NI.dtype, device=x_NI.device)
    with torch.cuda.device_of(packed):
        _multiply_kernel[triton.cdiv(rows, 4), tokens](
            x_NI.contiguous(),
            packed.contiguous().view(torch.int32),
            scale.contiguous(),
            offset.contiguous(),
            y_NO,
            rows,
            inputs,
            plane,
            packed.shape[1] // 4,
            groups,
            0x3F800000,
            bits,
            PLANES[bits],
            inputs // groups,
            4,
            64,
            run,
            min(run // 4, 2),
            num_warps=2,
        )
    return y_NO


def _runs(packed, bits, group_size, most):
    """(inputs of a plane, inputs of a run: the most, up to `most`, that share plane and group)."""
    plane = 8 * packed.shape[1] // bits // PLANES[bits]
    return plane, min(most, (plane | group_size) & -(plane | group_size))


@triton.jit
def _codes(row, j, k: tl.constexpr, plane, inside, BITS: tl.constexpr):
    """The codes of inputs j + k * plane as float32; `row` is the row's first byte, j < plane."""
    if BITS == 3:
        low = tl.load(row + j + (k % 2) * plane, mask=inside, other=0) >> (k // 2 * 2)
        high = tl.load(row + j + 2 * plane, mask=inside, other=0) >> k
        code = (low & 3) | ((high & 1) << 2)
    else:
        code = (tl.load(row + j, mask=inside, other=0) >> (BITS * k)) & (2**BITS - 1)
    return code.to(tl.float32)


@triton.jit
def _dense_kernel(
    packed,
    scale,
    offset,
    out,
    rows,
    inputs,
    plane,
    width,
    groups,
    BITS: tl.constexpr,
    PLANES: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    RUNS: tl.constexpr,
    RUN: tl.constexpr,
):
    o = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None, None]
    # [1, RUNS, 1], in the first plane
    first = (tl.program_id(1) * RUNS + tl.arange(0, RUNS)[None, :, None]) * RUN
    lane = tl.arange(0, RUN)[None, None, :]
    for k in tl.static_range(PLANES):
        i = first + k * plane
        # a last plane is short where the row was padded
        inside = (o < rows) & (first < plane) & (i < inputs)
        # [ROWS, RUNS, 1]
        s = tl.load(scale + o * groups + i // GROUP_SIZE, mask=inside, other=0).to(tl.float32)
        b = tl.load(offset + o * groups + i // GROUP_SIZE, mask=inside, other=0)
        code = _codes(packed + o * width, first + lane, k, plane, inside, BITS)  # [ROWS, RUNS, RUN]
        tl.store(out + o * inputs + i + lane, (s * code + b).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _pool_kernel(x, out, count, SIZE: tl.constexpr, WIDE: tl.constexpr, GROUPS: tl.constexpr):
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    lane = tl.arange(0, WIDE)
    inside = (group < count)[:, None] & (lane < SIZE)[None, :]
    values = tl.load(x + group[:, None] * SIZE + lane[None, :], mask=inside, other=0).to(tl.float32)
    tl.store(out + group, tl.sum(values, axis=1).to(out.dtype.element_ty), mask=group < count)


@triton.jit
def _round_kernel(
    w, factor, codes, rows, highest, SIZE: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr
):
    o = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[None, :]
    i = tl.arange(0, WIDE)[:, None]
    inside = (i < SIZE) & (o < rows)
    weights = tl.load(w + i * rows + o, mask=inside, other=0)  # [WIDE, ROWS], all in registers
    drift, made = tl.zeros([WIDE, ROWS], tl.float32), tl.zeros([WIDE, ROWS], tl.float32)
    for k in range(SIZE):
        this = tl.sum(tl.where(i == k, weights, 0.0), axis=0)[None, :]
        drifted = tl.sum(tl.where(i == k, drift, 0.0), axis=0)[None, :]
        exact = this + drifted / tl.load(factor + k * SIZE + k)
        code = tl.minimum(tl.maximum(exact, 0.0), highest)
        # 1.5 * 2^23: rounds to the nearest integer, halves to even
        code = (code + 12582912.0) - 12582912.0
        drift += tl.load(factor + k * SIZE + i, mask=i < SIZE, other=0) * (this - code)
        made = tl.where(i == k, code, made)
    tl.store(codes + i * rows + o, made, mask=inside)


@triton.jit
def _multiply_kernel(
    x,
    words,
    scale,
    offset,
    y,
    rows,
    inputs,
    plane,
    width,
    groups,
    one,
    BITS: tl.constexpr,
    PLANES: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    RUNS: tl.constexpr,
    RUN: tl.constexpr,
    WORDS: tl.constexpr,
):
    # What lies outside is read from the last place inside, which costs less than a mask, and
    # multiplied by x = 0
    o = tl.minimum(tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None, None], rows - 1)
    x += tl.program_id(1) * inputs
    total = tl.zeros([ROWS, RUNS, WORDS], tl.float32)
    for start in range(0, plane, RUNS * RUN):
        first = start + tl.arange(0, RUNS)[None, :, None] * RUN  # as in _dense_kernel
        low = words + o * width + tl.minimum(first, plane - RUN) // 4
        high = low + plane // 2  # at 3 bits the third stretch of bytes, whose bits are high bits
        for k in tl.static_range(PLANES):
            i = tl.minimum(first + k * plane, inputs - RUN)
            inside = (first < plane) & (first + k * plane < inputs)
            s = tl.load(scale + o * groups + i // GROUP_SIZE).to(tl.float32)
            b = tl.load(offset + o * groups + i // GROUP_SIZE)
            if BITS == 3:
                dot, sum = _run(
                    x + i,
                    inside,
                    low + k % 2 * (plane // 4),
                    high,
                    k // 2 * 2,
                    k,
                    3,
                    one,
                    ROWS,
                    RUNS,
                    RUN,
                    WORDS,
                )
                s *= 2.0 ** (9 - k // 2 * 2)
            else:
                dot, sum = _run(
                    x + i, inside, low, high, BITS * k, k, BITS, one, ROWS, RUNS, RUN, WORDS
                )
                s *= 2.0 ** (8 - BITS * k)
            total += s * dot + (b - s) * sum  # dot holds each code's 1 as well
    result = tl.sum(tl.sum(total, axis=2), axis=1)  # [ROWS]
    o = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    tl.store(y + tl.program_id(1) * rows + o, result.to(y.dtype.element_ty), mask=o < rows)


@triton.jit
def _run(
    x,
    inside,
    low,
    high,
    AT: tl.constexpr,
    K: tl.constexpr,
    BITS: tl.constexpr,
    one,
    ROWS: tl.constexpr,
    RUNS: tl.constexpr,
    RUN: tl.constexpr,
    WORDS: tl.constexpr,
):
    """(the sum of x * (1 + code * 2^-n), the sum of x) over runs of inputs, [., RUNS, WORDS] in
    float32.

    A float between 1 and 2 is the bits of `one` (the integer 0x3F800000) and a fraction, so bits of
    a word put into the
    fraction, with `one` or-ed to them, are 1 + code * 2^-n. One shift puts a whole byte there, for
    all its planes: n is
    8 - AT for a code AT bits up in its byte, one more at 3 bits. `one` is no constant here, as the
    compiler would load
    a constant again for each weight.
    """
    dot, sum = tl.zeros([ROWS, RUNS, WORDS], tl.float32), tl.zeros([1, RUNS, WORDS], tl.float32)
    for part in tl.static_range(RUN // (4 * WORDS)):
        lane = tl.arange(0, 4 * WORDS)[None, None, :]
        values = tl.load(x + part * 4 * WORDS + lane, mask=inside, other=0).to(tl.float32)
        even, odd = tl.split(tl.reshape(values, (1, RUNS, 2 * WORDS, 2)))
        x0, x2 = tl.split(tl.reshape(even, (1, RUNS, WORDS, 2)))
        x1, x3 = tl.split(tl.reshape(odd, (1, RUNS, WORDS, 2)))
        sum += (x0 + x1) + (x2 + x3)
        lane = tl.arange(0, WORDS)[None, None, :]
        word, third = tl.load(low + part * WORDS + lane), 0
        if BITS == 3:
            third = tl.load(high + part * WORDS + lane)
        dot += _one_and_code(word, third, 0, AT, K, BITS, one) * x0
        dot += _one_and_code(word, third, 1, AT, K, BITS, one) * x1
        dot += _one_and_code(word, third, 2, AT, K, BITS, one) * x2
        dot += _one_and_code(word, third, 3, AT, K, BITS, one) * x3
    return dot, sum


@triton.jit
def _one_and_code(
    word, third, BYTE: tl.constexpr, AT: tl.constexpr, K: tl.constexpr, BITS: tl.constexpr, one
):
    """1 + code * 2^-n for the code in one byte of each word (see `_run`)."""
    if BITS == 3:
        bits = _lifted(word, BYTE, 14) & (3 << (14 + AT)) | one
        bits |= _lifted(third, BYTE, 16 + AT - K) & (4 << (14 + AT))
    else:
        bits = _lifted(word, BYTE, 15) & ((2**BITS - 1) << (15 + AT)) | one
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _lifted(word, BYTE: tl.constexpr, TO: tl.constexpr):
    """The word moved so that the lowest bit of one of its bytes becomes bit TO."""
    if TO >= 8 * BYTE:
        return word << (TO - 8 * BYTE)
    else:
        return word >> (8 * BYTE - TO)
