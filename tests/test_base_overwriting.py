"""A run is never written over its own weights, nor over what no run has written."""

import shutil

import pytest
from helpers import contents
from helpers_runs import adapter, options, refusal, run


@pytest.mark.parametrize("inside", ["", "base", "base/copy", "merged"])
def test_a_run_is_not_written_over_the_weights_that_it_starts_from(
    world, whole, tmp_path, monkeypatch, inside
):
    out = shutil.copytree(whole, tmp_path / "run")
    if not (out / inside).exists():
        shutil.copytree(whole / "base", out / inside)
    before = contents(out)
    words = options(world, out, weights=out / inside, quantizer=None)
    assert "would overwrite the weights" in refusal(monkeypatch, *words)
    assert contents(out) == before


def test_a_run_in_the_default_folder_is_not_written_over_itself(
    world, whole, tmp_path, monkeypatch
):
    out = shutil.copytree(whole, tmp_path / "runs" / "run")
    before = contents(out)
    monkeypatch.chdir(tmp_path)
    message = refusal(monkeypatch, "--weights", "runs/run", "--data", world / "records.json")
    assert "--out runs/run would overwrite the weights" in message
    assert contents(out) == before


@pytest.mark.parametrize("part", ["base", "merged"])
def test_a_link_in_a_runs_folder_does_not_lead_to_overwritten_weights(
    world, tmp_path, monkeypatch, part
):
    weights = shutil.copytree(world / "weights", tmp_path / "weights")
    before = contents(weights)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / part).symlink_to(weights)
    words = options(world, tmp_path / "run", weights=weights)
    assert "would overwrite the weights" in refusal(monkeypatch, *words)
    assert contents(weights) == before


@pytest.mark.parametrize("part", ["base", "adapter", "step-6", "merged/deep"])
def test_a_run_inside_a_part_of_another_is_refused(world, whole, tmp_path, monkeypatch, part):
    out = shutil.copytree(whole, tmp_path / "run")
    before = contents(out)
    message = refusal(monkeypatch, *options(world, out / part))
    assert f"is inside the run {out}" in message and contents(out) == before
    run(tmp_path / "log", options(world, out / "another", steps=1))  # beside its parts one may be


@pytest.mark.parametrize(
    "mine",
    ["base", "adapter", "previous-adapter", "merged", "step-7", "metrics.jsonl", "config.json"],
)
def test_what_no_run_has_written_is_not_written_over(world, tmp_path, monkeypatch, mine):
    out = tmp_path / "mine"
    (out / mine).mkdir(parents=True)
    (out / mine / "notes.txt").write_text("mine")
    message = refusal(monkeypatch, *options(world, out))
    assert f"has a {mine} that is no run's" in message
    assert list(contents(out).values()) == [b"mine"]


def test_only_what_a_killed_process_left_is_removed(world, tmp_path):
    out = tmp_path / "run"
    (out / ".base.12.unfinished").mkdir(parents=True)
    (out / ".step-1.12.old").mkdir()
    (out / ".env.old").write_text("mine")
    run(tmp_path / "log", options(world, out, steps=1))
    assert [path.name for path in out.glob(".*")] == [".env.old"]


@pytest.mark.parametrize(
    "content", ['{"steps": 3', "[]", '{"weights": 5}', '{"weights": "a\\u0000"}']
)
@pytest.mark.parametrize("finished", [True, False])
def test_over_a_damaged_run_json_one_starts_over_as_the_message_says(
    world, whole, tmp_path, monkeypatch, content, finished
):
    out = shutil.copytree(whole, tmp_path / "run")
    if not finished:
        shutil.rmtree(out / "adapter")
    (out / "run.json").write_text(content)
    advice = f"remove {out}/step-* and start without --resume"
    assert advice in refusal(monkeypatch, "--resume", "--out", out)
    shutil.rmtree(out / "step-6")
    run(tmp_path / "log", options(world, out))
    assert adapter(out) == adapter(whole)


def test_a_finished_run_is_not_replaced_by_one_of_other_weights_unless_told_so(
    world, whole, tmp_path, monkeypatch
):
    out = shutil.copytree(whole, tmp_path / "run")
    before = contents(out)
    words = options(world, out, weights=world / "other-weights", steps=1)
    assert "holds the finished run of" in refusal(monkeypatch, *words)
    assert contents(out) == before
    run(tmp_path / "log", [*words, "--fresh"])
    assert (out / "previous-adapter" / "adapter.safetensors").read_bytes() == adapter(whole)
