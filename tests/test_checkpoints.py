"""A checkpoint is resumed only by the run that wrote it."""

import json
import os
import random
import shutil

import pytest
import torch
from helpers_runs import (
    ENGLISH,
    RECORDS,
    adapter,
    close,
    metrics,
    options,
    refusal,
    run,
    save_random,
)
from test_formats_damaged import Attack

from formats import load_model
from llama import linears


def test_resuming_refuses_what_would_be_another_run(world, whole, tmp_path, monkeypatch):
    assert "nothing to resume" in refusal(monkeypatch, "--resume", "--out", tmp_path)
    assert "--lr 0.5 contradicts" in refusal(monkeypatch, "--resume", "--out", whole, "--lr", 0.5)
    assert "--steps 3" in refusal(monkeypatch, "--resume", "--out", whole, "--steps", 3)
    assert "--fresh" in refusal(monkeypatch, "--resume", "--out", whole, "--fresh")
    shutil.copytree(whole, tmp_path / "run")
    for damaged in ('{"steps": 6', '{"steps": 6}', "[]"):
        (tmp_path / "run" / "run.json").write_text(damaged)
        assert "run.json is damaged" in refusal(monkeypatch, "--resume", "--out", tmp_path / "run")
    settings = json.loads((whole / "run.json").read_text())
    for changed in (
        dict(lr="fast"),
        dict(steps=2.5),
        dict(seed=None),
        dict(bits=[4]),
        dict(checkpointing=True),
        dict(method="other"),
        dict(model="tinyy"),
        dict(resume=True),
        dict(speed=1),
    ):
        (tmp_path / "run" / "run.json").write_text(json.dumps(settings | changed))
        assert "run.json is damaged" in refusal(
            monkeypatch, "--resume", "--out", tmp_path / "run"
        ), changed


@pytest.mark.parametrize(
    "changed",
    [
        dict(alpha=32.0),
        dict(lr=0.5),
        dict(seed=5),
        dict(batch_size=8),
        dict(rank=1),
        dict(targets="q_proj"),
        dict(clip=9.0),
        dict(max_length=32),
        dict(method="lora"),
    ],
)
def test_a_run_whose_settings_were_edited_is_not_resumed(world, whole, tmp_path, changed):
    shutil.copytree(whole, tmp_path / "run")
    settings = json.loads((whole / "run.json").read_text()) | changed | {"steps": 8}
    (tmp_path / "run" / "run.json").write_text(json.dumps(settings))
    before = adapter(tmp_path / "run")
    run(tmp_path / "log", ["--resume", "--out", str(tmp_path / "run")], status=2)
    assert adapter(tmp_path / "run") == before


def test_a_run_that_ran_out_of_memory_may_go_on_with_less(world, whole, tmp_path):
    run(tmp_path / "log", options(world, tmp_path / "run", steps=2))
    run(
        tmp_path / "log",
        [
            "--resume",
            "--out",
            str(tmp_path / "run"),
            "--steps",
            "6",
            "--micro-batch-size",
            "1",
            "--checkpointing",
            "0",
            "--save-every",
            "3",
        ],
    )
    close(metrics(tmp_path / "run"), metrics(whole))
    assert json.loads((tmp_path / "run" / "run.json").read_text())["micro_batch_size"] == 1


def test_a_checkpoint_is_read_without_running_code(world, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    torch.save({"optimizer": Attack(), "step": 6}, tmp_path / "run" / "step-6" / "optimizer.pt")
    text = run(
        tmp_path / "log",
        ["--resume", "--out", str(tmp_path / "run"), "--steps", "8"],
        status=2,
        before=lambda: os.chdir(tmp_path),
    )
    assert "optimizer.pt is missing or damaged" in text and not (tmp_path / "attacked").exists()


def test_a_number_in_run_json_may_be_written_as_a_word(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    settings = json.loads((whole / "run.json").read_text())
    (tmp_path / "run" / "run.json").write_text(
        json.dumps(settings | {"steps": "8", "lr": str(settings["lr"])})
    )
    run(tmp_path / "log", ["--resume", "--out", str(tmp_path / "run")])
    assert len(metrics(tmp_path / "run")) == 8


def test_a_run_whose_data_was_edited_is_not_resumed(world, tmp_path):
    """Whichever record it is, one to train on or one held out for validation; but the file may have
    moved."""
    records, out = tmp_path / "records.json", tmp_path / "run"
    shutil.copy(world / "records.json", records)
    run(tmp_path / "log", options(world, out, data=records, steps=2))
    told = (out / "run.json").read_text()
    again = ["--resume", "--out", str(out), "--steps", "4"]
    order = list(range(len(RECORDS)))
    random.Random(0).shuffle(order)  # as train.py does, which holds out the first
    for i in (order[0], order[-1]):
        records.write_text(
            json.dumps(RECORDS[:i] + [RECORDS[i] | {"output": "another"}] + RECORDS[i + 1 :])
        )
        assert "was trained with examples" in run(tmp_path / "log", again, status=2)
    assert (out / "run.json").read_text() == told
    run(tmp_path / "log", [*again, "--data", str(world / "records.json")])
    assert json.loads((out / "run.json").read_text())["data"] == str(world / "records.json")


def test_a_base_made_anew_by_another_calibration_is_not_trained_on(world, tmp_path):
    out, calibration = tmp_path / "run", tmp_path / "calibration.txt"
    base = out / "base" / "model.safetensors"
    calibration.write_text(ENGLISH)
    words = options(
        world, out, quantizer="gptq", calibration=calibration, calibration_tokens=512, steps=2
    )
    run(tmp_path / "log", words)
    before, again = base.read_bytes(), ["--resume", "--out", str(out), "--steps", "4"]
    calibration.write_text(ENGLISH[::-1])
    assert "has changed since" in run(tmp_path / "log", again, status=2)
    shutil.rmtree(out / "base")
    assert "was trained with base" in run(tmp_path / "log", again, status=2)
    assert base.read_bytes() != before
    calibration.write_text(ENGLISH)
    shutil.rmtree(out / "base")
    run(tmp_path / "log", again)
    assert base.read_bytes() == before


@pytest.mark.parametrize(
    "name",
    [
        "step-6/optimizer.pt",
        "step-6/settings.json",
        "step-6/adapter.safetensors",
        "base/model.safetensors",
        "base/config.json",
        "base/tokenizer.model",
        "base/made_from.json",
    ],
)
@pytest.mark.parametrize("content", [b"", b"garbage\xff", None])
def test_resuming_over_a_damaged_file_is_refused_in_one_line(world, whole, tmp_path, name, content):
    file = shutil.copytree(whole, tmp_path / "run") / name
    file.unlink()
    if content is not None:
        file.write_bytes(content)
    words = ["--resume", "--out", str(tmp_path / "run")]
    if name == "base/made_from.json" and content is None:
        run(tmp_path / "log", words)  # makes the base again
    else:
        run(tmp_path / "log", words, status=2)
    assert adapter(tmp_path / "run") == adapter(whole)


def test_resuming_over_changed_weights_is_refused(world, tmp_path, monkeypatch):
    shutil.copytree(world / "weights", tmp_path / "weights")
    words = options(world, tmp_path / "run", weights=tmp_path / "weights")
    run(tmp_path / "log", words)
    save_random(tmp_path / "weights", seed=7)
    message = refusal(monkeypatch, "--resume", "--out", tmp_path / "run", "--steps", 8)
    assert "weights" in message and "without --resume" in message


def test_files_that_have_moved_are_named_anew_on_resuming(world, tmp_path):
    here, there, out = tmp_path / "here", tmp_path / "there", tmp_path / "run"
    shutil.copytree(world / "weights", here)
    (here / "tokenizer.model").rename(here / "spelling.model")
    (here / "calibration.txt").write_text(ENGLISH)

    def named(at):
        return dict(weights=at, tokenizer=at / "spelling.model", calibration=at / "calibration.txt")

    words = dict(quantizer="gptq", calibration_tokens=512)
    run(tmp_path / "log", options(world, out, steps=2, **words, **named(here)))
    here.rename(there)
    settings = (out / "run.json").read_text()
    (out / "run.json").write_text(settings.replace('"device": "cpu"', '"device": "cuda"'))
    moved = [f"--{name}={path}" for name, path in named(there).items()]
    run(
        tmp_path / "log", ["--resume", "--out", str(out), "--steps", "4", "--device", "cpu", *moved]
    )
    run(tmp_path / "log", options(world, tmp_path / "whole", steps=4, **words, **named(there)))
    assert adapter(out) == adapter(tmp_path / "whole")


def test_a_checkpoint_that_is_a_link_is_resumed_and_only_the_link_goes(world, whole, tmp_path):
    out = shutil.copytree(whole, tmp_path / "run")
    (out / "step-6").rename(tmp_path / "elsewhere")
    (out / "step-6").symlink_to(tmp_path / "elsewhere")
    run(tmp_path / "log", ["--resume", "--out", str(out), "--steps", "8"])
    assert [path.name for path in out.glob("step-*")] == ["step-8"]
    assert (tmp_path / "elsewhere" / "optimizer.pt").exists()


def test_a_run_of_full_rank_is_resumed_and_merged_to_the_same_bits(world, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(tmp_path / "log", options(world, whole, rank="full", steps=4))
    run(tmp_path / "log", options(world, parts, rank="full", steps=2))
    run(tmp_path / "log", ["--resume", "--steps", "4", "--out", str(parts)])
    assert adapter(parts) == adapter(whole)
    assert json.loads((whole / "results.json").read_text())["bit_identical"] is True
    base, tuned = load_model(whole / "base"), load_model(whole)  # with its adapter merged in
    for (path, before), (_, after) in zip(linears(base), linears(tuned), strict=True):
        assert torch.equal(before.packed, after.packed) and torch.equal(before.scale, after.scale)
        moved = (before.offset != after.offset).float().mean()
        assert moved > 0.9, f"{path}: only {moved:.0%} of the offsets moved"


def test_a_run_from_when_scales_could_learn_is_resumed_unless_they_did(
    world, tmp_path, monkeypatch
):
    out = tmp_path / "run"
    run(tmp_path / "log", options(world, out, steps=1))
    settings = json.loads((out / "run.json").read_text())
    (out / "run.json").write_text(json.dumps({**settings, "adapt": "scales"}))
    assert "scales no longer learn" in refusal(monkeypatch, "--resume", "--out", out)
    (out / "run.json").write_text(json.dumps({**settings, "adapt": "offsets"}))
    run(tmp_path / "log", ["--resume", "--steps", "2", "--out", str(out)])
    assert json.loads((out / "run.json").read_text()) == settings | {"steps": 2}
