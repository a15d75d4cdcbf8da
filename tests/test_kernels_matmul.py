"""The packed product is the same number however much is dequantized at a time, compiled or not."""

import os
import subprocess
import sys
import weakref

import pytest
import torch
from helpers import dense, exact_case, integers, normal, pool, random_quantized, same
from helpers_runs import ROOT
from torch.nn import functional as F

import quant
from kernels import compiled, matmul
from quant import (
    dequantize,
    pack,
    quant_matmul,
    quantize_rtn,
)

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("at_a_time", [1, 64 * 3, 64 * 7, 64 * 200])
@pytest.mark.parametrize(
    "bits, group_size", [(4, 32), (4, 16), (3, 8), (2, 4), (2, 32), (4, 64)]
)  # or in two planes
@pytest.mark.parametrize("dtype", DTYPES)
def test_it_does_not_matter_how_much_is_dequantized_at_a_time(
    monkeypatch, dtype, bits, group_size, at_a_time
):
    x, q = exact_case(0, 7, 64 // group_size, group_size, bits, (5,))
    grad = integers(1, -1, 1, 5, 7).to(dtype)
    results = []
    for _ in range(2):
        leaf = x.to(dtype).requires_grad_()
        y = quant_matmul(leaf, pack(q.codes, bits), q.scale, q.offset, bits)
        results.append([y, *torch.autograd.grad(y, leaf, grad)])
        monkeypatch.setattr(matmul, "DENSE_AT_A_TIME", at_a_time * leaf.itemsize)
        monkeypatch.setattr(matmul, "IN_CACHE", at_a_time // 2)
    assert same(*results)


@pytest.mark.parametrize("finer", [1, -1 / 3])  # as imported files have them, in float32
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_compiled_it_has_the_same_bits(monkeypatch, dtype, bits, finer):
    """Not up to rounding: a run that was resumed, or merged, after the compiler came in must not
    tell."""
    q = random_quantized(bits, 24, 8, 32, bits)
    q.scale[:8] = torch.tensor(
        [2.0**-24, 3 * 2.0**-24, 0, 65504, 2.0**-14, 1, 1 / 3, 1e-5]
    )  # its least and largest
    if finer != 1:
        q = q._replace(scale=finer * q.scale.float())
    x, results = normal(0, 7, 256).to(dtype), []
    for use in (False, True):
        monkeypatch.setattr(matmul, "USE_COMPILER", use)
        leaf = x.clone().requires_grad_()
        y = quant_matmul(leaf, pack(q.codes, bits), q.scale, q.offset, bits)
        results.append([y, *torch.autograd.grad(y.float().square().sum(), leaf)])
    assert same(*results) and matmul.USE_COMPILER, "it was not compiled"


def test_what_was_compiled_for_another_cpus_instructions_is_not_taken(tmp_path):
    """torch.compile keeps it on the disk, which may move to another machine."""
    script = (
        "import torch\n"
        "from kernels import compiled\n"
        "from quant import pack\n"
        "codes = torch.randint(16, (64, 256), dtype=torch.uint8)\n"
        "scale, offset = torch.ones(64, 8).half(), torch.zeros(64, 8)\n"
        "w = compiled.dense(pack(codes, 4), scale, offset, 4, torch.float32, planes=2)\n"
        "assert torch.equal(w, codes.float())\n"
    )
    for cpu in ({"ATEN_CPU_CAPABILITY": "avx2"}, {}):  # where this one has AVX-512, they differ
        env = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path), **cpu}
        subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=env, check=True)


def test_it_is_compiled_only_after_much_work_and_goes_on_where_that_fails(monkeypatch):
    q, calls = random_quantized(0, 512, 16, 32, 4), []

    def multiply():
        return quant_matmul(torch.ones(3, 512), pack(q.codes, 4), q.scale, q.offset, 4)

    def no_compiler(*arguments):
        calls.append(arguments)
        raise RuntimeError("no working C++ compiler found")

    monkeypatch.setattr(compiled, "_compiled", lambda: no_compiler)
    monkeypatch.setattr(matmul, "USE_COMPILER", None)
    monkeypatch.setattr(matmul, "dequantized", 0)
    monkeypatch.setattr(matmul, "COMPILE_AFTER", 2 * 512 * 512)  # two such products
    expected = [multiply(), multiply()][0]
    assert not calls
    assert same([multiply(), multiply()], [expected] * 2) and len(calls) == 1, "it asked again"


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("dtype, eps", [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
def test_in_low_precision_it_errs_no_more_than_a_dense_layer(monkeypatch, dtype, eps, bits):
    """Weights and results are each rounded once, in input gradients too. The offset's gradient is a
    product of the
    rounded pooled input, and rounded. (Codes and offsets apart, in bfloat16, would err three times
    as much.)"""
    monkeypatch.setattr(
        matmul, "DENSE_AT_A_TIME", 2 * 2**14
    )  # 16 pieces, whose sum is not to be rounded 16 times
    w, x, grad = (
        normal(0, 256, 1024) * 0.02,
        normal(1, 64, 1024).to(dtype),
        normal(2, 64, 256).to(dtype),
    )
    q = quantize_rtn(w, bits, 32)
    x_, offset = x.clone().requires_grad_(), q.offset.clone().requires_grad_()
    y = quant_matmul(x_, pack(q.codes, bits), q.scale, offset, bits)
    y.backward(grad)

    def error(got, exact):
        return ((got.double() - exact).norm() / exact.norm()).item()

    w, w_low = dense(q), dequantize(q).to(dtype)
    y_exact, x_grad_exact = x.double() @ w.t(), grad.double() @ w
    assert error(y, y_exact) < 1.05 * error(F.linear(x, w_low), y_exact)
    assert error(x_.grad, x_grad_exact) < 1.05 * error(grad @ w_low, x_grad_exact)
    assert error(offset.grad, grad.double().t() @ pool(x.double(), 32)) < eps


def test_no_dense_piece_is_kept_beside_the_next_or_after_the_matmul(monkeypatch):
    made, honest = [], quant.dense

    def listening(*arguments):
        assert all(piece() is None for piece in made)
        w = honest(*arguments)
        made.append(weakref.ref(w))
        return w

    monkeypatch.setattr(quant, "dense", listening)
    monkeypatch.setattr(matmul, "DENSE_AT_A_TIME", 2**15)
    q, x = random_quantized(0, 128, 8, 32, 4), normal(0, 64, 256).float().requires_grad_()
    y = quant_matmul(x, pack(q.codes, 4), q.scale, q.offset, 4)
    assert len(made) == 4 and all(piece() is None for piece in made)
    y.sum().backward()
    assert len(made) == 8 and all(piece() is None for piece in made)


def test_where_rows_are_padded_nothing_is_compiled(monkeypatch):
    q, x = random_quantized(0, 24, 8, 3, 4), normal(0, 7, 24).float()
    expected = quant_matmul(x, pack(q.codes, 4), q.scale, q.offset, 4)
    monkeypatch.setattr(matmul, "USE_COMPILER", True)
    assert same([quant_matmul(x, pack(q.codes, 4), q.scale, q.offset, 4)], [expected])
