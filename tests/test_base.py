"""The base is made once, recognised by what it was made from, and made in little memory."""

import contextlib
import dataclasses
import json
import pathlib
import re
import shutil
import subprocess
import sys
import time

import hypothesis.strategies as st
import pytest
import torch
from helpers import contents, exchange
from helpers_runs import (
    CONFIG,
    ENGLISH,
    ENVIRONMENT,
    RECORDS,
    adapter,
    metrics,
    options,
    refusal,
    run,
    save_random,
    settings_of,
)
from hypothesis import given, settings

import formats
import llama
from cli import base, data
from formats import fingerprint, load_model
from formats.files import open_file
from formats.huggingface import save_pretrained
from text.instructions import read_records
from text.tokenizer import load_tokenizer, train_tokenizer


def test_a_base_is_reused_unless_it_would_be_another(world, tmp_path):
    out, log = tmp_path / "run", tmp_path / "log"
    file = out / "base" / "model.safetensors"

    def state():
        return (file.stat().st_ino, file.stat().st_mtime_ns)

    run(log, options(world, out, steps=1))
    first = state()
    text = run(log, options(world, out, steps=1, seed=5, data=world / "fewer.json", lr=0.1, rank=2))
    assert state() == first and "already made from these weights" in text
    for change in (
        dict(bits=3),
        dict(group_size=16),
        dict(quantizer="gptq"),
        dict(quantizer="gptq", calibration_tokens=512),
        dict(quantizer="gptq", calibration=world / "fewer.json"),
        dict(fresh=""),
    ):
        before, words = state(), [word for word in options(world, out, steps=1, **change) if word]
        text = run(log, words)
        assert state() != before and ("making it again" in text or "fresh" in change), change
        quantization = json.loads((out / "base" / "config.json").read_text())["quantization"]
        assert all(
            quantization[k] == v
            for k, v in change.items()
            if k in ("bits", "group_size", "quantizer")
        ), change


def test_weights_that_have_changed_in_place_make_the_base_again(world, tmp_path):
    weights = shutil.copytree(world / "weights", tmp_path / "weights")
    words = options(world, tmp_path / "run", weights=weights, steps=1)
    run(tmp_path / "log", words)
    before = contents(tmp_path / "run" / "base")
    shutil.copy(world / "other-weights" / "model.safetensors", weights)
    assert "making it again" in run(tmp_path / "log", words)
    assert contents(tmp_path / "run" / "base") != before


def test_a_new_run_in_a_finished_ones_folder_keeps_only_that_ones_adapter(world, whole, tmp_path):
    out = pathlib.Path(shutil.copytree(whole, tmp_path / "run"))
    run(tmp_path / "log", options(world, out, steps=2, seed=5))
    run(tmp_path / "log", options(world, tmp_path / "alone", steps=2, seed=5))
    assert (out / "previous-adapter" / "adapter.safetensors").read_bytes() == adapter(whole)
    assert adapter(out) == adapter(tmp_path / "alone") != adapter(whole)
    assert json.loads((out / "run.json").read_text())["seed"] == 5 and metrics(out) == metrics(
        tmp_path / "alone"
    )
    assert [folder.name for folder in out.glob("*step-*")] == ["step-2"]


@given(place=st.floats(0, 1, exclude_max=True))
@settings(max_examples=20)
def test_checkpoints_that_differ_anywhere_are_told_apart(world, place):
    file, folder = world / "weights" / "model.safetensors", world / "changed"
    folder.mkdir(exist_ok=True)
    content = bytearray(file.read_bytes())
    content[int(place * len(content))] ^= 1
    (folder / file.name).write_bytes(content)
    shutil.copy(world / "weights" / "config.json", folder)
    assert fingerprint(folder) != fingerprint(world / "weights")
    (folder / file.name).write_bytes(file.read_bytes())
    assert fingerprint(folder) == fingerprint(world / "weights")
    (folder / "config.json").write_text(
        (folder / "config.json").read_text().replace("10000.0", "20000.0")
    )
    assert fingerprint(folder) != fingerprint(world / "weights")


def test_data_is_read_once_and_calibration_only_for_a_gptq_that_runs(world, tmp_path, monkeypatch):
    def read(path):
        print(f"reading {path}.")
        return read_records(path)

    for module in (data, base):
        monkeypatch.setattr(module, "read_records", read)
    out, other = tmp_path / "run", dict(calibration=world / "fewer.json")
    gptq = dict(quantizer="gptq", bits=3, **other)
    for changed, expected in (
        ({}, ["records"]),
        (other, ["records"]),  # rounding to nearest
        (dict(quantizer="gptq"), ["records"]),
        (gptq, ["records", "fewer"]),
        (gptq, ["records"]),
    ):  # the base is there
        text = run(tmp_path / "log", options(world, out, steps=1, **changed))
        assert re.findall(r"reading \S*?(\w+)\.json", text) == expected, changed


def cut_short(world, tmp_path, name):
    """--weights: a copy of world/NAME whose tensors end too early."""
    file = shutil.copytree(world / name, tmp_path / "cut") / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    return dict(weights=tmp_path / "cut")


def with_nan(world, tmp_path):
    """--weights: a copy of world/weights with one NaN, which is found when its tensor is read."""
    folder = shutil.copytree(world / "weights", tmp_path / "nan")
    model = llama.load_pretrained(folder)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[-1, -1] = torch.nan
    save_pretrained(model, folder)
    return dict(weights=folder)


@pytest.mark.parametrize(
    "wrong, says",
    [
        ("calibration", "bad.json holds no records"),
        ("weights", "truncated or corrupt"),
        ("quantized weights", "truncated or corrupt"),
        ("a weight", "has NaN or infinite values"),
    ],
)
def test_a_refused_file_leaves_the_finished_run_that_was_there(world, whole, tmp_path, wrong, says):
    out = tmp_path / "run"
    run(tmp_path / "log", options(world, out, steps=1))
    before = contents(out)
    (tmp_path / "bad.json").write_text("[]")
    changed = {
        "calibration": lambda: dict(quantizer="gptq", calibration=tmp_path / "bad.json"),
        "weights": lambda: cut_short(world, tmp_path, "weights"),
        "quantized weights": lambda: cut_short(world, tmp_path, "whole/base"),
        "a weight": lambda: with_nan(world, tmp_path),
    }[wrong]()
    if wrong == "quantized weights":
        changed["quantizer"] = None
    words = [*options(world, out, **changed), "--fresh"]  # as the weights are others
    assert says in run(tmp_path / "log", words, status=2)
    assert contents(out) == before


def test_gptq_is_calibrated_on_the_training_data_or_what_is_named(world, tmp_path):
    made = {}
    for name, changed in dict(
        all={},
        fewer=dict(data=world / "fewer.json"),
        named=dict(data=world / "fewer.json", calibration=world / "records.json"),
    ).items():
        words = options(
            world, tmp_path / name, steps=1, quantizer="gptq", calibration_tokens=1000, **changed
        )
        run(tmp_path / "log", words)
        made[name] = (tmp_path / name / "base" / "model.safetensors").read_bytes()
    assert made["all"] == made["named"] != made["fewer"]
    drawn = base.calibration_records(None, None, read_records(world / "records.json").records)
    assert sorted(drawn) == sorted(exchange(r["instruction"], r["output"]) for r in RECORDS)


def test_weights_that_change_while_they_are_quantized_are_not_taken_for_those_that_were(
    world, tmp_path, monkeypatch
):
    weights = shutil.copytree(world / "weights", tmp_path / "weights")
    given = dict(out=str(tmp_path / "run"), weights=str(weights), quantizer="rtn", device="cpu")
    now = settings_of(**given)
    base.make_base(now, None)
    assert base.base_is_made(now)
    quantize = base.quantize_into

    def quantize_while_they_change(*arguments):
        quantize(*arguments)
        shutil.copy(world / "other-weights" / "model.safetensors", weights)

    monkeypatch.setattr(base, "quantize_into", quantize_while_they_change)
    base.make_base(now, None)
    assert not base.base_is_made(now)


def test_another_tokenizer_makes_the_base_anew(world, tmp_path):
    run(tmp_path / "log", options(world, tmp_path / "run", steps=1))
    train_tokenizer([ENGLISH], tmp_path / "tokenizer.model", 400)
    other = dict(tokenizer=tmp_path / "tokenizer.model", max_length=256)
    run(tmp_path / "log", options(world, tmp_path / "run", steps=1, **other))
    assert load_tokenizer(tmp_path / "run").largest_id() == 399


@pytest.fixture(
    scope="module",
    params=[
        ("qalora", "rtn", torch.float32),
        ("qalora", "rtn", torch.bfloat16),
        ("qlora", "nf4", torch.float32),
    ],
    ids="{0[1]} {0[2]}".format,
)
def peaks(request, tmp_path_factory):
    """The quantizer, and of a model of few layers and one of many: (MB of private memory that
    quantizing added at its
    peak, MB of the base's file, and of the dense one).

    In float32 every block is a private copy; in bfloat16 what is freed on the way lies between the
    results.
    """
    method, quantizer, dtype = request.param
    found = []
    for layers in (4, 24):
        folder = tmp_path_factory.mktemp(f"{layers}-layers")
        save_random(
            folder, config=llama.LlamaConfig(512, 768, 2048, layers, 12, 12), dtype=torch.bfloat16
        )
        code = (
            "import pathlib, sys, torch\n"
            "from cli import base, machine\n"
            "from cli.settings import Settings, recipe\n"
            "weights, out = map(pathlib.Path, sys.argv[1:])\n"
            "out.mkdir()\n"
            f"base.compute_dtype = lambda *_: {dtype}\n"
            f"given = dict(method='{method}', quantizer='{quantizer}', device='cpu')\n"
            "settings = Settings(**recipe({'model': 'tiny'}) | given)\n"
            "machine.trim_heap()\n"  # what importing has left free
            "print('ready', flush=True), sys.stdin.readline()\n"
            "base.quantize_into(out, weights, settings, None, None)\n"
        )
        process = subprocess.Popen(
            [sys.executable, "-c", code, folder, folder / "base"],
            env=ENVIRONMENT,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        assert process.stdout.readline() == "ready\n"
        start = peak = private_megabytes(process.pid)
        process.stdin.write("\n")
        process.stdin.flush()
        while process.poll() is None:
            peak = max(peak, private_megabytes(process.pid))
            time.sleep(0.001)
        assert process.returncode == 0
        dense = (folder / "model.safetensors").stat().st_size / 1e6
        found.append(
            (peak - start, (folder / "base" / "model.safetensors").stat().st_size / 1e6, dense)
        )
        shutil.rmtree(folder)
    return quantizer, *found


def private_megabytes(pid):
    """RssAnon of a process: memory that is no mapped file; 0 when it has ended."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for line in pathlib.Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024 / 1e6
    return 0


def test_memory_while_quantizing_grows_with_the_packed_size(peaks):
    _, (few, few_packed, few_dense), (many, many_packed, many_dense) = peaks
    packed, dense = many_packed - few_packed, many_dense - few_dense
    assert dense > 2.5 * packed > 0
    assert many - few < (packed + dense) / 2, (many, few, packed, dense)


def test_memory_while_quantizing_is_the_packed_model_two_dense_blocks_and_what_one_layer_takes(
    peaks,
):
    quantizer, *found = peaks
    block = (4 * 768**2 + 3 * 768 * 2048) * 4 / 1e6  # as it is computed with, in float32
    layer = {
        "rtn": 0,
        "nf4": 2 * 5 * 768 * 2048 * 4 / 1e6,
    }  # quotients and codes in 32 bits, and holes until a block is done
    for peak, packed, _ in found:  # 45: holes in the heap, of which 3 to 31 were seen
        assert peak < packed + 2 * block + layer[quantizer] + 45, (peak, packed, block)


def test_a_new_run_needs_no_room_for_the_checkpoint_that_it_replaces(
    world, whole, tmp_path, monkeypatch
):
    out = shutil.copytree(whole, tmp_path / "run")
    one = sum(file.stat().st_size for file in (out / "step-6").iterdir())
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 0, int(1.3 * one))
    )
    assert "is already made" in run(tmp_path / "log", options(world, out))


def test_the_base_of_another_method_is_made_anew(world, tmp_path):
    found = []
    for method in ("lora", "qlora"):
        run(
            tmp_path / "log",
            options(world, tmp_path / "run", method=method, quantizer=None, steps=1),
        )
        found.append((formats.quantization_of(tmp_path / "run" / "base") or {}).get("quantizer"))
    assert found == [None, "nf4"]


@pytest.mark.parametrize("method", ["qalora", "qlora", "lora"])
def test_a_base_keeps_the_16_bits_that_its_embedding_came_in(world, tmp_path, method):
    save_random(tmp_path / "weights", dtype=torch.float16)
    shutil.copy(world / "weights" / "tokenizer.model", tmp_path / "weights")
    run(
        tmp_path / "log",
        options(
            world,
            tmp_path / "run",
            weights=tmp_path / "weights",
            method=method,
            steps=1,
            quantizer="gptq" if method == "qalora" else None,
            calibration_tokens=512,
        ),
    )
    stored, given = (
        open_file(tmp_path / folder / "model.safetensors") for folder in ("run/base", "weights")
    )
    for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
        assert stored[name].read().dtype == torch.float16 and torch.equal(
            stored[name].read(), given[name].read()
        )


def test_calibration_is_drawn_from_all_records_whose_order_stays(world):
    records = read_records(world / "records.json").records
    before = list(records)
    drawn = base.calibration_records(None, None, records)
    assert records == before and drawn != records and sorted(drawn) == sorted(records)


def test_a_disk_without_room_is_refused_before_anything_is_written(
    world, whole, tmp_path, monkeypatch
):
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 10_000)
    )
    message = refusal(monkeypatch, *options(world, tmp_path / "run"))
    assert (
        "GB free" in message and "more room" in message and not (tmp_path / "run" / "base").exists()
    )


def test_a_new_base_needs_room_beside_the_old_one(world, whole, tmp_path, monkeypatch):
    shutil.copytree(whole, tmp_path / "run")
    half = (tmp_path / "run" / "base" / "model.safetensors").stat().st_size // 2
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - half, half)
    )
    assert "is already made" in run(tmp_path / "log", options(world, tmp_path / "run"))
    assert "more room" in refusal(monkeypatch, *options(world, tmp_path / "run", bits=3))
    assert load_model(tmp_path / "run"), "what was there is gone"


@pytest.mark.parametrize(
    "how, dtype",
    [
        (dict(method="qlora", quantizer=None, rank=16), torch.float32),
        (dict(rank=32), torch.float32),
        (dict(method="lora", quantizer=None, rank=16), torch.float32),
        (dict(rank=32, targets="q_proj,v_proj"), torch.float32),
        (dict(rank="full", group_size=2), torch.float32),
        (dict(method="lora", quantizer=None, rank=16), torch.bfloat16),
        (dict(method="lora", quantizer=None, rank=16), "a QLoRA run"),
    ],
)
def test_a_run_needs_the_room_that_its_base_and_its_checkpoints_take(
    world, tmp_path, monkeypatch, how, dtype
):
    weights = tmp_path / "weights"
    stored = dtype if isinstance(dtype, torch.dtype) else torch.float32
    save_random(weights, config=dataclasses.replace(CONFIG, num_hidden_layers=8), dtype=stored)
    shutil.copy(world / "weights" / "tokenizer.model", weights)
    if dtype == "a QLoRA run":  # 4 bits a weight, but merged it is float
        first = dict(weights=weights, method="qlora", quantizer=None, steps=1)
        run(tmp_path / "log", options(world, tmp_path / "first", **first))
        weights = tmp_path / "first"
    words = dict(weights=weights, steps=1, **how)
    run(tmp_path / "log", options(world, tmp_path / "run", **words))
    base, checkpoint = (
        (tmp_path / "run" / name).stat().st_size
        for name in ("base/model.safetensors", "step-1/optimizer.pt")
    )
    need = base + 2 * 1.5 * checkpoint  # two checkpoints: the adapter beside its two moments
    for room, enough in ((0.9 * need, False), (1.1 * need, True)):
        monkeypatch.setattr(
            shutil,
            "disk_usage",
            lambda path, room=room: shutil._ntuple_diskusage(10**9, 0, int(room)),
        )
        if enough:
            run(tmp_path / "log", options(world, tmp_path / "again", **words))
        else:
            assert "more room" in refusal(monkeypatch, *options(world, tmp_path / "again", **words))
