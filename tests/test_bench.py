"""bench.py: its arithmetic, its reference algorithm, and that all of it runs, on models too small
for times to tell."""

import dataclasses
import functools
import importlib.util
import json
import sys

import pytest
import torch

import bench
from cli import bench_gpu, measure
from cli.machine import compute_dtype
from kernels import compiled as compiled_path
from kernels import matmul
from llama import CONFIGS, Llama
from quant import dequantize, largest_first, quantize_gptq, quantize_model


def test_contenders_take_turns_and_the_first_turn_does_not_count(monkeypatch):
    clock, order = [0.0], []
    monkeypatch.setattr(measure.time, "perf_counter", lambda: clock[0])

    def contender(name, seconds):
        def run():
            order.append(name)
            clock[0] += seconds.pop(0)

        return run

    measured = measure.take_turns(
        {"a": contender("a", [9, 1, 2]), "b": contender("b", [9, 3, 8])}, 2, "cpu"
    )
    assert order == ["a", "b"] * 3
    assert measured == {"a": [1, 2], "b": [3, 8]}


def test_ratios_are_of_the_same_turn_and_who_is_missing_is_told(monkeypatch, capsys):
    monkeypatch.setattr(
        measure, "take_turns", lambda *_: {"a": [1.0, 2.0, 4.0], "b": [2.0, 2.0, 12.0]}
    )
    least = measure.floors(
        {"matmul": {"torch.float32": 4e9}, "copy": 2e9}, torch.float32, operations=8e6, moved=8e6
    )
    rows = measure.compare("racing", {"a": print, "b": print, "c": None}, 3, "cpu", least, parts=2)
    assert [row["name"] for row in rows] == ["a", "b"]
    assert rows[1] == {
        "what": "racing",
        "name": "b",
        "milliseconds": 1000,
        "floors": {"arithmetic": 2, "memory": 4},
        "ratio": 2,
        "from": 1,
        "to": 3,
    }
    printed = capsys.readouterr().out
    assert "racing (floors: arithmetic 2 ms, memory 4 ms)" in printed
    assert "c  " in printed.split("left out: what it needs is not installed")[0].splitlines()[-1]


@pytest.mark.parametrize("bits,group_size", [(4, 32), (2, 16), (3, 64)])
def test_the_reference_gptq_and_ours_are_the_same_algorithm(bits, group_size):
    torch.manual_seed(0)
    w, x = (
        torch.randn(24, 256),
        torch.randn(1000, 32) @ torch.randn(32, 256) + torch.randn(1000, 256),
    )
    hessian = x.t() @ x / len(x)
    order = largest_first(hessian, group_size)  # in which the reference then takes them too
    w, hessian = w[:, order], hessian[order][:, order]
    ours = dequantize(quantize_gptq(w, hessian, bits, group_size, search=False))
    reference = bench.gptq_by_columns(w, hessian, bits, group_size)
    # a weight halfway between two codes may differ
    assert ((ours - reference).abs() > 1e-4).float().mean() < 0.01
    assert not torch.equal(w, reference)


def test_peak_memory_is_that_of_what_is_held_at_once():
    small, large = 2**27, 2**28  # above 32 MiB, which glibc maps afresh and gives back at once
    noise = 2**25  # of what else the process holds

    def ones(size):
        return torch.ones(size, dtype=torch.uint8)

    together = measure.peak_memory(lambda: [ones(size) for size in (large, small)], "cpu")
    in_turn = measure.peak_memory(lambda: [len(ones(small)) for _ in range(2)], "cpu")
    assert abs(together - large - small) < noise
    assert abs(in_turn - small) < noise


def test_a_compiled_contender_compiles_and_is_left_out_where_that_cannot_be(monkeypatch):
    seen = []
    measure.can_compile.cache_clear()
    measure.compiled(lambda: seen.append(matmul.USE_COMPILER))()
    assert seen == [True] and matmul.USE_COMPILER is False

    def broken():
        raise RuntimeError("no compiler")

    monkeypatch.setattr(compiled_path, "_compiled", broken)
    measure.can_compile.cache_clear()
    assert measure.compiled(print) is None
    measure.can_compile.cache_clear()


def test_a_training_step_changes_the_adapters_and_nothing_else():
    config = dataclasses.replace(CONFIGS["tiny"], num_hidden_layers=1)
    blocks = measure.adapted(quantize_model(Llama(config), 4, 32))
    before = {name: t.clone() for name, t in blocks.state_dict().items()}
    measure.training_step(blocks, config, 8, torch.float32, "cpu")()
    changed = {name for name, t in blocks.state_dict().items() if not torch.equal(t, before[name])}
    assert {name for name in before if "lora_B" in name} <= changed and all(
        "lora" in name for name in changed
    )


def test_everything_is_measured_and_written(monkeypatch, tmp_path, capsys):
    small = dict(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    config = dataclasses.replace(CONFIGS["7b"], **small)
    monkeypatch.setattr(bench, "WIDE", config)
    monkeypatch.setattr(bench, "NARROW", config)
    facts = {"matmul": {"torch.float32": 1e9, "torch.bfloat16": 1e9}, "copy": 1e9}
    monkeypatch.setattr(bench, "machine", lambda device: facts)
    monkeypatch.setattr(
        bench, "gptq", functools.partial(lambda gptq, size, *rest: gptq(64, *rest), bench.gptq)
    )
    plot = ["--plot", str(tmp_path / "b.png")] if importlib.util.find_spec("matplotlib") else []
    monkeypatch.setattr(
        sys,
        "argv",
        ["bench.py", "--quick", "--device", "cpu", *plot, "--json", str(tmp_path / "b.json")],
    )
    bench.main()
    rows = json.loads((tmp_path / "b.json").read_text())["rows"]
    names = {}
    for row in rows:
        names.setdefault(row["what"], []).append(row["name"])
    assert len(names) == 2 + 2 + 1 + 3 + 2 + 2 + 2  # inference, training, GPTQ, growth
    assert names["training step, one block of 7B, 512 tokens"][:3] == [
        f"dense {compute_dtype(torch.bfloat16, 'cpu')}, LoRA",
        "ours: 4 bits, QA-LoRA",
        "ours: NF4, QLoRA",
    ]
    assert all(
        row["ratio"] > 0 and row["from"] <= row["ratio"] <= row["to"]
        for row in rows
        if "ratio" in row
    )
    assert not plot or (tmp_path / "b.png").read_bytes().startswith(b"\x89PNG")
    assert "llama.cpp, Q4_1" in capsys.readouterr().out


def test_the_tables_for_a_gpu_are_all_measured_and_written_one_by_one():
    config = dataclasses.replace(CONFIGS["tiny"], num_hidden_layers=1)
    facts = {"matmul": {"torch.float32": 1e9, "torch.bfloat16": 1e9}, "copy": 1e9}
    counts = []
    rows = bench_gpu.on_gpu(
        facts,
        True,
        lambda rows: counts.append(len(rows)),
        config,
        "cpu",
        torch.float32,
        (2, 64),
        ((1, 8), (2, 8)),
        16,
        8,
    )
    assert not [row["name"] for row in rows if row["what"] == "failed"]
    assert len(counts) == 5 and counts == sorted(set(counts)) and counts[-1] == len(rows)
    steps = next(row for row in rows if row["what"] == "train.py's steps")
    assert steps["bit identical"] and len(steps["losses"]) == 10
