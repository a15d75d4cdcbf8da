"""compare.py: rates are chosen without the test, numbers are what they are called, no row lacks."""

import dataclasses
import json
import math
import pathlib
import random
import sys

import pytest
import torch
from helpers_compare import Here
from hypothesis import given
from hypothesis import strategies as st

import compare
import quant
from cli import comparison, jobs, plan, subjects
from cli.errors import UserError, run_command
from cli.runs import kept_from_other_runs
from llama import Llama, LlamaConfig
from text.toy import make_world

SMALL = dataclasses.replace(
    compare.FULL,
    subject=dataclasses.replace(
        compare.FULL.subject,
        model=compare.FULL.subject.model
        | dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1),
        people=24,
        pretraining=compare.FULL.subject.pretraining | dict(steps=3),
    ),
    steps=1,
    batch_size=4,
    group_size=8,
    bits=(3, 2),
    rates=(1e-3, 1e-2),
    ablations=(
        dict(bits=2, group_size=16),
        dict(bits=2, search=False),
        dict(bits=2, targets=compare.ATTENTION),
        dict(bits=2, share=1 / 8),
    ),
)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """(results of a comparison too short to learn anything, the calls of `judge_toy` it made)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("compare"))
        judged, judge = [], subjects.judge_toy

        def listening(tokenizer, world, choosing, model):
            judged.append((world, choosing))
            return judge(tokenizer, world, choosing, model)

        patch.setattr(subjects, "judge_toy", listening)
        patch.setattr(compare, "FACTOR", 4)
        patch.setattr(jobs, "concurrent", Here)
        patch.setattr(jobs, "prepare_worker", lambda: None)
        return compare.compare(SMALL, [1], 1, pathlib.Path("small.jobs")), judged


def people_of(records):
    """The names in questions, each of which ends in `NAME live?`, `NAME have?` and so on."""
    asked = [question.text.split("?")[0] for question, _ in records]
    return {" ".join([word for word in text.split() if word[0].isupper()][1:]) for text in asked}


@given(st.integers(0, 2**32), st.integers(24, 100))
def test_the_people_of_fine_tuning_of_validation_and_of_the_test_are_three_groups(seed, people):
    world = make_world(seed, people)
    tuning, validation = subjects.split(world)
    groups = [people_of(part) for part in (tuning, validation, world.test)]
    assert all(groups) and len(set.union(*groups)) == sum(map(len, groups)) == people
    assert tuning + validation == world.train


def test_the_learning_rates_are_chosen_without_the_test_and_on_a_seed_that_is_not_reported(small):
    results, judged = small
    choosing = [i for i, (_, choosing) in enumerate(judged) if choosing]
    assert choosing == list(range(len(results["validation"]))), (
        "some test was judged before all rates were chosen"
    )
    assert {row["seed"] for row in results["validation"]} == {compare.CHOOSING_SEED}
    assert {row["seed"] for row in results["rows"]} == {1}
    for row in results["validation"]:
        assert [metric for metric in comparison.METRICS if metric in row] == ["loss"]


def test_judging_for_a_choice_reads_neither_test_choices_nor_held_out_text(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    toy = SMALL.subject
    toy.prepare(0)
    monkeypatch.setattr(subjects, "make_world", lambda *a: world)
    world = make_world(0, toy.people)._replace(test=None, choices=None, heldout=None)
    model, _, _, judge = toy.material(0, choosing=True)
    assert judge(model).keys() == {"loss"}


@pytest.mark.parametrize("lost", [math.nan, math.inf, -math.inf])
def test_the_chosen_rate_has_the_least_loss_and_none_that_diverged_is_chosen(lost):
    measured = [("a", 4, lost), ("a", 1, 0.5), ("a", 3, 0.4), ("b", 1, 0.1), ("b", 2, 0.2)]
    rows = [dict(zip(("row", "lr", "loss"), values, strict=True)) for values in measured]
    for _ in range(5):
        assert plan.choose(random.sample(rows, len(rows))) == {"a": 3, "b": 1}
    diverged = [rows[0], {"row": "c", "lr": 2, "diverged": True}, *rows[3:]]
    with pytest.raises(UserError, match="^a, c: all learning rates that were tried diverged"):
        plan.choose(diverged)


def test_training_that_diverges_ends_no_comparison(small, tmp_path, monkeypatch, capsys):
    def diverging(*arguments):
        raise FloatingPointError("step 1: the loss is nan")

    monkeypatch.chdir(tmp_path)
    SMALL.subject.prepare(0)
    monkeypatch.setattr(compare, "adapt", diverging)
    job = compare.Job(0, "QLoRA", 1e3)
    names = ["QLoRA", "QLoRA w/ GPTQ 3 bits", "QLoRA w/ GPTQ 2 bits"]
    for deployed, wanted in ((None, names), (tuple(names[1:]), names[1:])):
        rows = compare.run(SMALL, job, deployed)
        compare.tell("1/1", rows)
        assert [(row["row"], row["lr"], row["diverged"]) for row in rows] == [
            (name, 1e3, True) for name in wanted
        ]
        assert "QLoRA w/ GPTQ 2 bits: diverged\n" in capsys.readouterr().out
        rest = [row for row in small[0]["rows"] if row["row"] not in names]
        shown = comparison.table([*rest, *rows])
        assert "QLoRA w/ GPTQ 2 bits diverged on seed 0, and is not in its means" in shown


@given(st.integers(-6, 6), st.integers(-6, 6))
def test_rates_are_doubled_and_halved_until_the_best_has_a_worse_one_on_either_side(one, other):
    """Two rows of one job, each with a best rate of its own, a power of two."""
    best, tried, rows = {"a": 2.0**one, "b": 2.0**other}, [], []

    def run_all(todo):
        found = []
        for job, deployed in todo:
            assert deployed is None
            tried.append(job.lr)
            made = []
            for name, rate in best.items():
                loss = abs(math.log2(job.lr / rate))
                made.append({"row": name, "lr": job.lr, "loss": loss})
            found.append(made)
        return found

    study = dataclasses.replace(SMALL, rates=(1.0, 2.0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare, "main_jobs", lambda study, seed: [compare.Job(seed, "LoRA")])
        patch.setattr(compare, "FACTOR", 2**9)
        rates, rows = compare.choose_rates(study, run_all)
    assert rates == best and len(rows) == 2 * len(tried)
    assert len(set(tried)) == len(tried), "a rate was tried twice"
    for rate in best.values():
        assert min(tried) < rate < max(tried)


def test_lower_rates_are_tried_while_all_diverge():
    tried = []

    def run_all(todo):
        tried.extend(job.lr for job, _ in todo)
        rows = []
        for job, _ in todo:
            found = {"loss": -job.lr} if job.lr < 1e-3 else {"diverged": True}
            rows.append([{"row": "a", "lr": job.lr, **found}])
        return rows

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare, "main_jobs", lambda study, seed: [compare.Job(seed, "LoRA")])
        rates, _ = compare.choose_rates(SMALL, run_all)
    assert rates == {"a": 5e-4} and sorted(tried) == [2.5e-4, 5e-4, *SMALL.rates]


def test_rates_are_not_tried_for_ever_and_the_last_one_is_not_chosen_in_silence(capsys):
    def run_all(todo):
        return [[{"row": "a", "lr": job.lr, "loss": -job.lr}] for job, _ in todo]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare, "main_jobs", lambda study, seed: [compare.Job(seed, "LoRA")])
        rates, rows = compare.choose_rates(SMALL, run_all)
    assert rates["a"] < compare.FACTOR * max(SMALL.rates) and len(rows) < 10
    said = f"a: the best learning rate, {rates['a']:g}, is the last of those tried\n"
    assert capsys.readouterr().out == said


def test_a_job_of_other_settings_is_another_job(monkeypatch):
    seen = []
    monkeypatch.setattr(
        compare, "run_and_keep", lambda *a: seen.append(list(a[3])) or dict.fromkeys(a[3], [])
    )
    job = compare.Job(1, "QA-LoRA", 1e-3, 2, 8)
    monkeypatch.setattr(subjects, "VERSION", 1)
    studies = [SMALL, dataclasses.replace(SMALL, steps=2), dataclasses.replace(SMALL, rank=3)]
    for study in studies:
        for rows in (None, ("a",)):
            compare.run_jobs(None, study, None, [(job, rows), (job._replace(seed=2), rows)])
    monkeypatch.setattr(subjects, "VERSION", 2)
    compare.run_jobs(None, SMALL, None, [(job, None)])
    names = sum(seen, [])
    assert len(set(names)) == len(names) == 13


def test_a_job_does_not_depend_on_the_others_beside_it():
    """So that a comparison with another method or ablation leaves it as it is."""
    job = compare.Job(1, "QA-LoRA", 1e-3, 2, 8)
    fewer = dataclasses.replace(SMALL, ablations=(), rates=(1.0,))
    for rows in (None, ("a",)):
        assert plan.name_of(SMALL, job, rows) == plan.name_of(fewer, job, rows)


def test_every_base_is_made_once_before_the_jobs_that_share_it():
    toy = plan.base_jobs(SMALL, [0, 1])
    assert len(set(toy)) == len(toy)
    quantized = {(job.seed, job.bits, job.group_size, job.search) for job in toy}
    wanted = {(3, 8, True), (2, 8, True), (2, 16, True), (2, 8, False)}
    assert quantized == {(0, *base) for base in wanted} | {(1, *base) for base in wanted}
    digests = dict.fromkeys(("weights", "tokenizer", "data", "text", "choices"), "0" * 64)
    real = compare.Study(subjects.Real({}, digests, "float32"), **compare.REAL)
    shared = plan.base_jobs(real, [0, 1, 2])
    assert {job.seed for job in shared} == {0}, "a real model is the same for all seeds"
    rates = dict.fromkeys(["LoRA", "QLoRA"], 0.1)
    for name in ("QLoRA w/ GPTQ", *plan.OURS):
        rates |= {f"{name} {bits} bits": 0.1 for bits in real.bits}
    jobs = plan.reported_jobs(real, [1, 2], rates)
    bases = [rows for job, rows in jobs if job.method == "base"]
    assert len(bases) == 1 and {"base", "RTN 4 bits, groups of 64", "GPTQ 2 bits"} <= set(bases[0])
    names = []
    for job, rows in jobs:
        names += [(job.seed, name) for name in rows]
    assert len(set(names)) == len(names)


def test_every_method_bit_width_and_ablation_has_one_row_a_seed(small):
    results, _ = small
    table = ["base", "LoRA", "QLoRA"]
    in_groups = ("GPTQ", "QLoRA w/ GPTQ", *plan.OURS)
    for method in ("RTN", *in_groups):
        table += [f"{method} {bits} bits" for bits in (3, 2)]
    ablations = [f"{method} 2 bits, groups of 16" for method in ("RTN", *in_groups)]
    ablations += [f"{method} 2 bits, min-max ranges" for method in in_groups]
    for method in ("QLoRA", *[f"{name} 2 bits" for name in in_groups[1:]]):
        ablations += [f"{method}, attention only", f"{method}, 1/8 of the examples"]
    assert sorted(row["row"] for row in results["rows"]) == sorted(table + ablations)
    for row in results["rows"]:
        assert {"exact_match", "multiple_choice", "perplexity", *comparison.MEASURED} <= row.keys()
    assert json.loads(json.dumps(results))["rows"][0]["row"] == "base"


def test_every_row_was_trained_with_the_rate_of_least_loss(small):
    results, _ = small
    assert results["rates"].keys() == {row["row"] for row in results["validation"]}
    for name, lr in results["rates"].items():
        losses = {row["lr"]: row["loss"] for row in results["validation"] if row["row"] == name}
        assert losses[lr] == min(losses.values())
    for row in results["rows"]:
        assert row["lr"] == results["rates"].get(row["row"].partition(",")[0], 0.0), row


def test_no_model_is_fine_tuned_with_a_rate_that_none_of_its_rows_chose():
    rates = {
        "LoRA": 0.1,
        "QLoRA": 0.2,
        "QLoRA w/ GPTQ 3 bits": 0.3,
        "QLoRA w/ GPTQ 2 bits": 0.4,
        "QA-LoRA 3 bits": 0.5,
        "QA-LoRA 2 bits": 0.6,
        "QA-LoRA at full rank 3 bits": 0.7,
        "QA-LoRA at full rank 2 bits": 0.8,
    }

    def used(job):
        return [rated.lr for rated, _ in plan.rated(SMALL, job, rates)]

    plain = {(job.method, job.bits): used(job) for job in compare.main_jobs(SMALL, 1)}
    assert plain == {
        ("LoRA", 0): [0.1],
        ("QLoRA", 0): [0.2, 0.3, 0.4],
        ("QA-LoRA", 3): [0.5],
        ("QA-LoRA", 2): [0.6],
        ("QA-LoRA at full rank", 3): [0.7],
        ("QA-LoRA at full rank", 2): [0.8],
    }
    for job in plan.ablation_jobs(SMALL, 1):
        # those of QLoRA are deployed as they are and at the bits of the ablation
        assert used(job) == ([0.2, 0.4] if job.method == "QLoRA" else plain[job.method, job.bits])


@pytest.mark.parametrize(
    "words, said",
    [
        ("--quick --workers 0", "--workers"),
        ("--quick --seeds 0", "--seeds"),
        ("--quick --seeds -1", "--seeds"),
        ("--quick --out folder", "folder is a folder"),
        ("--quick --out results.json/file", "results.json"),
        ("--plot results.json", "holds no results"),
        ("--plot folder/notes.txt", "not valid JSON"),
        ("--plot folder/bench.json", "holds no results"),
        ("--plot results.json --quick", "would make another"),
        ("--plot results.json --weights x", "would make another"),
        ("--plot results.json --text x", "would make another"),
        ("--weights folder", "needs --weights, --data, --text and --choices"),
        ("--quick --choices results.json", "needs --weights, --data, --text and --choices"),
        ("--weights x --data results.json --text y --choices z --out results.json", "--data reads"),
        ("--plot missing.json", "there is no missing.json"),
    ],
)
def test_a_wrong_option_is_refused_before_anything_is_trained(
    tmp_path, monkeypatch, capsys, words, said
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "results.json").write_text("{}")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes.txt").write_text("mine")
    (tmp_path / "folder" / "bench.json").write_text('{"rows": [{"what": "GPTQ", "name": "ours"}]}')
    monkeypatch.setattr(sys, "argv", ["compare.py", *words.split()])
    with pytest.raises(SystemExit) as e:
        run_command(compare.main)
    assert e.value.code == 2 and said in capsys.readouterr().err
    left = sorted(f.name for f in tmp_path.rglob("*"))
    assert left == ["bench.json", "folder", "notes.txt", "results.json"]


def test_two_comparisons_do_not_share_their_results(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["compare.py", "--quick", "--out", "out.json"])
    kept = pathlib.Path("out.json.jobs")
    kept.touch()
    with kept_from_other_runs(kept), pytest.raises(SystemExit):
        run_command(compare.main)
    assert f"another run is using {kept}" in capsys.readouterr().err


def test_deployed_bits_are_codes_and_a_share_of_scale_and_offset(small):
    results, _ = small
    for row in results["rows"]:
        name = row["row"]
        if " bits" in name:
            bits, group = int(name.split(" bits")[0][-1]), 16 if "groups of 16" in name else 8
            assert row["bits_per_weight"] == bits + (16 + 32) / group, row
        elif name.startswith("QLoRA"):  # NF4, and a float32 adapter beside it
            weights = 4 * 32 * 32 + 3 * 32 * 64
            assert 4.1 < row["bits_per_weight"] - 32 * row["trainable"] / weights < 4.3, row
        else:
            assert row["bits_per_weight"] == 32, row


def test_trainable_parameters_are_counted_from_the_shapes(small):
    results, _ = small
    attention, mlp = [(32, 32)] * 4, [(64, 32)] * 2 + [(32, 64)]  # outputs, inputs of the one layer
    for row in results["rows"]:
        layers = attention if "attention only" in row["row"] else attention + mlp
        group = 16 if "groups of 16" in row["row"] else 8
        if row["row"].startswith(("LoRA", "QLoRA")):
            group = 1
        low = sum(SMALL.rank * (outputs + inputs // group) for outputs, inputs in layers)
        full = sum(outputs * inputs // group for outputs, inputs in layers)
        expected = {"base": 0, "QA-LoRA at full rank": full}.get(row["method"], low)
        assert row["trainable"] == expected, row


def test_a_jobs_search_reaches_gptq(monkeypatch):
    seen, gptq = [], quant.quantize_gptq
    monkeypatch.setattr(quant, "quantize_gptq", lambda *a: seen.append(a[4]) or gptq(*a))
    model = Llama(LlamaConfig(**SMALL.subject.model))
    tokens = torch.randint(512, (2, 32))
    for search in (True, False):
        compare.requantized(model, compare.Job(0, "GPTQ", 0.0, 2, 8, search), tokens)
    assert seen == [True] * 7 + [False] * 7


def test_a_jobs_share_is_the_part_of_the_examples_that_it_learns_from(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    SMALL.subject.prepare(0)
    learned, adapt = [], compare.adapt

    def listening(study, job, model, examples):
        learned.append(len(examples))
        return adapt(study, job, model, examples)

    monkeypatch.setattr(compare, "adapt", listening)
    for share in (1.0, 1 / 8):
        compare.run(SMALL, compare.Job(0, "LoRA", 1e-3, share=share), ("LoRA",))
    assert learned == [learned[0], round(learned[0] / 8)]


def test_the_table_shows_every_row(small):
    results, _ = small
    heading, *lines = comparison.table(results["rows"]).splitlines()
    names = list(dict.fromkeys(row["row"] for row in results["rows"]))
    assert [line[:48].rstrip() for line in lines] == names


def test_the_figure_is_drawn(small, tmp_path):
    pytest.importorskip("matplotlib", reason="needs matplotlib: pip install matplotlib")
    path = tmp_path / "compare.json"
    path.write_text(json.dumps(small[0]))
    comparison.plot(path)
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    axes = comparison.picture(small[0]["rows"]).axes[0]
    assert axes.get_legend_handles_labels()[1] == list(comparison.METHODS)


def test_without_matplotlib_the_figure_is_refused_by_its_name(small, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    (tmp_path / "compare.json").write_text(json.dumps(small[0]))
    with pytest.raises(UserError, match="pip install matplotlib"):
        comparison.plot(tmp_path / "compare.json")
