"""What a run says at its end is true."""

import json

import numpy
import pytest
import torch
from helpers_runs import RECORDS, options, run

import evals
import llama
from cli import base, data, report
from text.batches import Example, token_stream
from text.tokenizer import load_tokenizer
from text.toy import make_world


def test_equal_bits_are_found_only_where_all_bits_of_all_examples_are_equal():
    model = torch.nn.Embedding(6, 4)
    examples = [
        Example(numpy.array(tokens, numpy.uint16), numpy.array([False, True]))
        for tokens in ([1, 2], [3, 4], [5, 1])
    ]
    before = report.logits_digest(model, examples, 2)
    assert report.logits_digest(model, examples, 2) == before
    with torch.no_grad():
        model.weight.view(torch.int32)[5, -1] += (
            1  # one unit in the last place, seen in the last batch only
        )
    assert report.logits_digest(model, examples, 2) != before


def test_a_float_merge_is_not_said_to_be_bit_identical(world, tmp_path):
    run(tmp_path / "log", options(world, tmp_path / "run", method="lora", quantizer=None))
    assert json.loads((tmp_path / "run" / "results.json").read_text())["bit_identical"] is False


def test_the_default_run_scores_every_stage_and_says_whether_bits_are_equal(
    world, tmp_path, monkeypatch
):
    small, out = make_world(people=6), tmp_path / "run"
    for module in (base, report):
        monkeypatch.setattr(module, "TOY_BASE", world / "weights")
    monkeypatch.setattr(data, "make_world", lambda: small)
    words = [
        "--steps",
        "20",
        "--batch-size",
        "4",
        "--lr",
        "0.01",
        "--calibration-tokens",
        "1000",
        "--out",
    ]
    text = run(tmp_path / "log", [*words, str(out)])
    asked = f"merged logits on all {len(small.test)} test questions"
    assert f"{asked}: bit-identical to the adapted model's" in text
    rows = json.loads((out / "results.json").read_text())["table"]
    assert [row["model"] for row in rows] == [
        "base (float)",
        "base (INT4)",
        "adapted INT4",
        "merged INT4",
    ]
    bits = [row["bits_per_weight"] for row in rows]
    assert bits == [32, 5.5, bits[2], 5.5] and bits[2] > 5.5
    scores = [
        [row[name] for name in ("exact_match", "multiple_choice", "perplexity")] for row in rows
    ]
    assert scores[2] == scores[3] and len({score[2] for score in scores}) == 3, scores
    tokenizer, model = load_tokenizer(world / "weights"), llama.load_pretrained(world / "weights")
    stream = token_stream(small.heldout, tokenizer)
    assert scores[0][2] == evals.perplexity(model, stream, 64, "", 64)


def test_the_loss_curve_is_drawn(world, tmp_path):
    pytest.importorskip("matplotlib", reason="needs matplotlib: pip install matplotlib")
    run(tmp_path / "log", [*options(world, tmp_path / "run"), "--plot"])
    assert (tmp_path / "run" / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_without_validation_examples_the_bits_are_compared_all_the_same(world, tmp_path):
    (tmp_path / "five.json").write_text(json.dumps(RECORDS[:5]))
    words = options(world, tmp_path / "run", data=tmp_path / "five.json", steps=1)
    text = run(tmp_path / "log", words)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["validation_examples"] == 0 and results["bit_identical"] is True
    assert "bit identical: True" in text
