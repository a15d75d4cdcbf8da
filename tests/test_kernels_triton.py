"""Triton's kernels: on a GPU where there is one, else in its interpreter. Oracle: float64."""

import os
import pathlib
import subprocess
import sys
import types

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import quant
from kernels import matmul
from qalora import QALoRALinear
from quant import Quantized, QuantLinear, dequantize, pack, quant_matmul

pytest.importorskip("triton", reason="needs triton: pip install triton")
from kernels import triton_kernels  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BITS, SEEDS = st.sampled_from([2, 3, 4]), st.integers(0, 2**32)


@pytest.fixture(autouse=True)
def triton_forced(monkeypatch):
    monkeypatch.setattr(matmul, "USE_TRITON", True)
    assert matmul._triton_kernels() is triton_kernels


def case(seed, tokens, rows, groups, group_size, bits):
    """(x [tokens, I], a Quantized) with random numbers on DEVICE."""
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(2**bits, (rows, groups * group_size), dtype=torch.uint8, generator=g)
    scale, offset = (
        torch.rand(rows, groups, generator=g).half(),
        torch.randn(rows, groups, generator=g),
    )
    x = torch.randn(tokens, groups * group_size, generator=g)
    return x.to(DEVICE), Quantized(*(t.to(DEVICE) for t in (codes, scale, offset)))


def transposed_in_memory(t):
    return t.t().contiguous().t()


def rounded_once(w, exact):
    """Whether w is `exact` in w's dtype; the interpreter truncates to bfloat16 where a GPU rounds
    to nearest."""
    if DEVICE == "cpu" and w.dtype == torch.bfloat16:
        return ((w - exact).abs() <= 2**-7 * exact.abs()).all()
    return torch.equal(w, exact.to(w.dtype))


@given(
    st.sampled_from(DTYPES), BITS, st.integers(1, 20), st.integers(1, 6), st.integers(1, 40), SEEDS
)
@example(torch.bfloat16, 3, 9, 33, 32, 0)  # more bytes in a plane than a program takes
@example(torch.float16, 4, 8, 3, 32, 0)  # a group in two planes
@example(torch.float16, 2, 3, 43, 256, 0)  # and one as wide as three runs of 64
def test_dense_is_scale_times_code_plus_offset_rounded_once(
    dtype, bits, rows, groups, group_size, seed
):
    _, q = case(seed, 1, rows, groups, group_size, bits)
    # exact in float32
    q = q._replace(offset=(8 * q.offset).round() / 8, scale=(8 * q.scale).round() / 8)
    stored = map(transposed_in_memory, (pack(q.codes, bits), q.scale, q.offset))
    w = triton_kernels.dense(*stored, bits, groups * group_size, dtype)

    def spread_out(t):
        return t.double().repeat_interleave(group_size, dim=1)

    exact = spread_out(q.scale) * q.codes.double() + spread_out(q.offset)
    assert w.dtype == dtype and rounded_once(w, exact), (w - exact).abs().max()


@given(
    st.sampled_from(DTYPES),
    BITS,
    st.integers(1, 3),
    st.integers(1, 7),
    st.integers(1, 6),
    st.integers(1, 18).map(lambda fours: 4 * fours),
    SEEDS,
)
@example(torch.float32, 4, 1, 3, 18, 256, 0)  # more inputs than a program takes at once
@example(torch.float32, 3, 2, 3, 5, 64, 0)  # groups in two planes
def test_multiply_is_dequantize_then_matmul(dtype, bits, tokens, rows, groups, group_size, seed):
    x, q = case(seed, tokens, rows, groups, group_size, bits)
    x = x.to(dtype)
    y = triton_kernels.multiply(
        *map(transposed_in_memory, (x, pack(q.codes, bits), q.scale, q.offset)), bits
    )
    w = dequantize(q._replace(scale=q.scale.double(), offset=q.offset.double()))
    exact = x.double() @ w.double().t()
    # float32 holds a code as 1 + code / 512 at worst, so that it rounds what is up to 1024 scales
    # large
    largest = 1024 * q.scale.double() + q.offset.double().abs()
    size = x.double().abs() @ largest.repeat_interleave(group_size, dim=1).t()
    assert y.dtype == dtype
    assert ((y - exact).abs() <= 2**-23 * size + torch.finfo(dtype).eps * exact.abs()).all(), (
        (y - exact).abs().max()
    )


@given(st.sampled_from(DTYPES), st.integers(0, 9), st.integers(1, 6), st.integers(1, 70), SEEDS)
@example(torch.bfloat16, 40, 9, 32, 0)  # more groups than a program takes
def test_pooled_inputs_are_sums_over_groups_rounded_once(dtype, tokens, groups, group_size, seed):
    x = torch.randint(
        -8, 8, (tokens, groups * group_size), generator=torch.Generator().manual_seed(seed)
    )
    x = x.to(DEVICE, dtype)  # sums of integers are exact in float32
    exact = x.double().view(tokens, groups, group_size).sum(dim=-1)
    found = triton_kernels.pool(transposed_in_memory(x), groups)
    assert found.dtype == dtype and rounded_once(found, exact)


@settings(max_examples=15)
@given(BITS, st.integers(1, 70), st.integers(1, 40), SEEDS)
def test_a_group_is_rounded_in_order_as_on_the_plain_path(bits, size, rows, seed):
    g = torch.Generator().manual_seed(seed)
    w = (2**bits * torch.rand(size, rows, generator=g)).to(DEVICE)
    factor = torch.rand(size, size, generator=g).triu(1) / size + torch.eye(size)
    factor, scale, offset = (
        factor.to(DEVICE),
        torch.ones(rows, device=DEVICE).half(),
        torch.zeros(rows, device=DEVICE),
    )
    made = []
    for matmul.USE_TRITON in (False, True):
        made.append(quant.round_in_order(w, factor, scale, offset, bits))
    assert made[1].min() >= 0 and made[1].max() < 2**bits and torch.equal(made[1], made[1].round())
    # sums in another order: a weight halfway between two codes may differ
    same = (made[0] == made[1]).all(dim=0)
    assert same.float().mean() >= 0.9 or rows < 10 and (~same).sum() <= 1


@settings(max_examples=15)
@given(
    BITS,
    st.integers(1, 40),
    st.integers(1, 9),
    st.integers(1, 5),
    st.sampled_from([8, 24, 32, 33]),
    SEEDS,
)
@example(4, 8, 5, 4, 32, 0)  # the last number of tokens that is multiplied unpacked
@example(4, 9, 5, 4, 32, 0)  # and the first that is not
def test_quant_matmul_and_its_gradients_are_those_of_the_plain_path(
    bits, tokens, rows, groups, group_size, seed
):
    x, q = case(seed, tokens, rows, groups, group_size, bits)
    results = []
    for matmul.USE_TRITON in (False, True):
        leaves = x.clone().requires_grad_(), q.offset.clone().requires_grad_()
        y = quant_matmul(leaves[0], pack(q.codes, bits), q.scale, leaves[1], bits)
        results.append([y.detach(), *torch.autograd.grad(y.square().sum(), leaves)])
    for plain, triton in zip(*results, strict=True):
        torch.testing.assert_close(
            triton, plain, rtol=1e-3, atol=1e-3 * plain.abs().max().item() + 1e-6
        )


@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize("dtype", DTYPES)
def test_adapted_and_merged_layers_return_the_same_bits(dtype, tokens):
    x, q = case(0, tokens, 12, 4, 32, 4)
    layer = QALoRALinear(QuantLinear.from_quantized(q, 4), rank=2, alpha=3.0)
    torch.nn.init.normal_(layer.lora_B)
    adapted = layer(x.to(dtype))
    assert torch.equal(adapted, layer.merged()(x.to(dtype)))
    assert not torch.equal(
        adapted, quant_matmul(x.to(dtype), pack(q.codes, 4), q.scale, q.offset, 4)
    )


def test_without_being_forced_a_cpu_takes_the_plain_path(monkeypatch):
    for switch in (None, False):
        monkeypatch.setattr(matmul, "USE_TRITON", switch)
        assert matmul.triton_for(torch.zeros(1, dtype=torch.bfloat16)) is None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (9, 0)])
def test_a_gpu_takes_them_where_it_has_bfloat16_and_computes_in_16_bits(
    monkeypatch, dtype, capability
):
    monkeypatch.setattr(matmul, "USE_TRITON", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    x = types.SimpleNamespace(is_cuda=True, dtype=dtype, device="cuda")
    assert matmul.triton_for(x) is (
        triton_kernels if capability >= (8, 0) and dtype != torch.float32 else None
    )


def test_without_triton_the_plain_path_is_taken(monkeypatch):
    monkeypatch.setitem(sys.modules, "kernels.triton_kernels", None)
    monkeypatch.delattr("kernels.triton_kernels")
    matmul._triton_kernels.cache_clear()
    try:
        assert matmul.triton_for(torch.zeros(1)) is None
    finally:
        matmul._triton_kernels.cache_clear()


@pytest.mark.parametrize(
    "tokens, group_size, expected",
    [(1, 32, ["multiply", "dense"]), (40, 32, ["dense", "dense"]), (1, 33, ["dense", "dense"])],
)
def test_few_tokens_are_multiplied_unpacked_and_gradients_by_a_dense_matrix(
    monkeypatch, tokens, group_size, expected
):
    called = []

    def listening(name):
        kernel = getattr(triton_kernels, name)

        def listen(*arguments):
            called.append(name)
            return kernel(*arguments)

        return listen

    for name in ("multiply", "dense"):
        monkeypatch.setattr(triton_kernels, name, listening(name))
    x, q = case(0, tokens, 4, 2, group_size, 4)
    quant_matmul(x.requires_grad_(), pack(q.codes, 4), q.scale, q.offset, 4).sum().backward()
    assert called == expected


COMPILE = """
import triton, triton_kernels
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

POINTERS = {"packed": "*u8", "scale": "*fp16", "offset": "*fp32", "words": "*i32", "x": "*bf16",
"out": "*bf16", "y": "*bf16"}
for bits, planes in triton_kernels.PLANES.items():
    for kernel, rows, runs, run in ((triton_kernels._dense_kernel, 1, 16, 32),
                                    (triton_kernels._multiply_kernel, 4, 64, 64 // planes)):
        sizes = dict(BITS=bits, PLANES=planes, ROWS=rows, RUNS=runs, RUN=run, WORDS=2,
        GROUP_SIZE=32)
        constants = {name: sizes[name] for name in kernel.arg_names if name in sizes}
        types = {n: "constexpr" if n in constants else POINTERS.get(n, "i32") for n in
        kernel.arg_names}
        made = triton.compile(ASTSource(kernel, types, constants), target=GPUTarget("cuda", 90, 32))
        # H100, H200
        print(bits, kernel.__name__, ".target sm_90" in made.asm["ptx"], len(made.asm["cubin"]) > 0)
"""


def test_the_kernels_compile_for_a_gpu_that_is_not_here(tmp_path):
    root = pathlib.Path(triton_kernels.__file__).parent
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(root), "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert len(lines) == 6 and all(line.endswith("True True") for line in lines), lines
