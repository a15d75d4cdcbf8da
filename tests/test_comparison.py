"""cli/comparison.py: means, spreads and differences of what was measured, and nothing else."""

import json
import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cli import comparison
from cli.errors import UserError


def measured(name, seed, **metrics):
    """A row of a results' file."""
    row = {"row": name, "seed": seed, "exact_match": 0.5, "perplexity": 2.0}
    return {**row, **dict.fromkeys(comparison.MEASURED, 1), **metrics}


@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=6))
def test_mean_and_spread_are_those_of_the_statistics_module(values):
    names = ("exact_match", "perplexity", *comparison.MEASURED)
    rows = [measured("a", seed, **dict.fromkeys(names, v)) for seed, v in enumerate(values)]
    assert comparison.summary(rows)["a"].keys() == set(names)
    for mean, spread in comparison.summary(rows)["a"].values():
        assert mean == pytest.approx(statistics.mean(values))
        assert spread == pytest.approx(statistics.stdev(values))


def test_differences_are_taken_seed_by_seed():
    match = {
        "QLoRA w/ GPTQ 2 bits": (0.4, 0.7),
        "QA-LoRA 2 bits": (0.5, 0.9),
        "QA-LoRA at full rank 2 bits": (0.5, 1.0),
        "QA-LoRA 2 bits, attention only": (0.5, 0.5),
    }
    rows = []
    for name, values in match.items():
        rows += [dict(row=name, seed=seed, exact_match=v) for seed, v in enumerate(values)]
    assert comparison.differences(rows).splitlines() == [
        "QA-LoRA 2 bits against QLoRA w/ GPTQ 2 bits: exact match +15.0 ± 7.1",
        "QA-LoRA at full rank 2 bits against QA-LoRA 2 bits: exact match +5.0 ± 7.1",
        "QA-LoRA at full rank 2 bits against QLoRA w/ GPTQ 2 bits: exact match +20.0 ± 14.1",
        "QA-LoRA 2 bits, attention only against QA-LoRA 2 bits: exact match -20.0 ± 28.3",
    ]


def test_a_single_value_has_no_spread_and_an_infinite_one_no_number():
    assert comparison.mean_and_spread([3.5]) == (3.5, None)
    for value in (math.inf, math.nan):
        mean, spread = comparison.mean_and_spread([1.0, value])
        assert not math.isfinite(mean) and math.isnan(spread)
    assert comparison.in_words("exact_match", 0.123, None) == "12.3"
    assert comparison.in_words("loss", 0.5, 0.25, sign="+") == "+0.500 ± 0.250"
    rows = [measured("base", 1, perplexity=math.inf), measured("base", 2)]
    assert "inf ± nan" in comparison.table(rows)


def test_training_that_diverged_is_told_and_counts_in_no_mean():
    rows = [measured("LoRA", seed) for seed in (1, 2)]
    rows += [
        measured("QLoRA w/ GPTQ 2 bits", 1, exact_match=0.25),
        measured("QLoRA w/ GPTQ 2 bits", 2, exact_match=0.75),
        measured("QA-LoRA 2 bits", 1, exact_match=1.0),
        {"row": "QA-LoRA 2 bits", "seed": 2, "diverged": True},
        {"row": "QLoRA", "seed": 1, "diverged": True},
    ]
    lines = comparison.table(rows).splitlines()
    assert lines[3].split()[:4] == ["QA-LoRA", "2", "bits", "100.0"]
    assert lines[4:] == [
        "QA-LoRA 2 bits diverged on seed 2, and is not in its means",
        "QLoRA diverged on seed 1, and is not in its means",
    ]
    worth = "exact match +75.0, perplexity +0.000"
    assert comparison.differences(rows) == f"QA-LoRA 2 bits against QLoRA w/ GPTQ 2 bits: {worth}"


@given(st.data())
def test_a_changed_results_file_is_shown_or_refused_in_a_line(tmp_path_factory, data):
    """One place of it is left out, or has a value of any other kind."""
    names = ("LoRA", "LoRA", "QA-LoRA 2 bits", "QA-LoRA 2 bits")
    content = {"rows": [measured(name, seed % 2) for seed, name in enumerate(names)]}
    row = data.draw(st.sampled_from(content["rows"]))
    key = data.draw(st.sampled_from(sorted(row)))
    values = [None, "x", [1], {}, True, 5, -1.5, math.inf, math.nan]
    if data.draw(st.booleans()):
        del row[key]
    else:
        row[key] = data.draw(st.sampled_from(values))
    path = tmp_path_factory.mktemp("plot") / "results.json"
    path.write_text(json.dumps(content))
    try:
        found = comparison.read_rows(path)
    except UserError as e:
        assert str(e) == f"{path} holds no results of compare.py"
        return
    comparison.table(found)
    comparison.differences(found)
    pytest.importorskip("matplotlib", reason="needs matplotlib: pip install matplotlib")
    comparison.picture(found)


def test_a_figure_needs_lora_to_show_the_others_beside(tmp_path):
    pytest.importorskip("matplotlib", reason="needs matplotlib: pip install matplotlib")
    path = tmp_path / "results.json"
    path.write_text(json.dumps({"rows": [measured("QLoRA", 1)]}))
    with pytest.raises(UserError, match="has no LoRA"):
        comparison.plot(path)
    with pytest.raises(UserError, match="there is no .*; give a results' file"):
        comparison.read_rows(tmp_path / "missing.json")
