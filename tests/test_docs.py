"""What README.md and docs/ say is true: commands run, links lead somewhere, tables are the results.

A fenced block that begins with ```sh is run line by line, except what .ci/run types itself. One
marked `needs-weights` is run with small random weights in the place of a 7B's (see `small`); lines
that start another program are not. One marked `needs-smollm2` is run by test_real_model.py, one
marked `slow` or `needs-network` only parsed; test_cli_fetch.py runs the like of the latter.
```python blocks are run.
"""

import importlib
import io
import json
import pathlib
import re
import runpy
import shlex
import shutil
import statistics

import pytest
import torch
from helpers_docs import BLOCK, blocks, commands, run_here
from helpers_runs import ROOT

import compare
from cli.comparison import differences, summary
from cli.files import remove
from cli.settings import option_parser
from cli.toy import table
from formats.quantized import quantized_skeleton
from llama import CONFIGS, Llama
from qalora import adapter_parameters, add_adapters
from text.tokenizer import load_tokenizer

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TYPED_BY_CI = (
    "python train.py",
    "python -m pytest",
    "python -m pytest tests/test_specification.py",
)
MARKS = ("needs-weights", "needs-smollm2", "needs-network", "slow")
OTHER_PROGRAMS = ("llama-cli", "mlx_lm.generate")
LITTLE = ["--steps", "2", "--rank", "2", "--max-length", "64", "--quantizer", "rtn"]
LITTLE += ["--batch-size", "4", "--micro-batch-size", "2", "--device", "cpu"]


def small(words):
    """A command about a 7B, made one about small random weights that takes a second."""
    words = [word for word in words if word not in ("--model", "7b")]
    if words[1] == "train.py" and "--resume" not in words:
        is_float = words[words.index("--weights") + 1] == "DIR"
        words += [word for word in LITTLE if is_float or word not in ("--quantizer", "rtn")]
    if words[1] == "sample.py":
        words += ["--max-new-tokens", "4"]
    return words


@pytest.fixture
def place(world, whole, tmp_path, monkeypatch):
    """A folder with everything that the pages name: DIR, alpaca.json, GPTQ_DIR and more."""
    pytest.importorskip("gguf", reason="needs gguf: pip install gguf")
    monkeypatch.chdir(tmp_path)
    shutil.copytree(world / "weights", "DIR")
    shutil.copy(world / "records.json", "alpaca.json")
    shutil.copy(world / "weights" / "tokenizer.model", tmp_path)
    run_here(["python", "export.py", str(whole), "--out", "MLX_DIR"], monkeypatch)
    importlib.import_module("helpers_foreign").write(load_tokenizer(tmp_path / "tokenizer.model"))
    pathlib.Path("wiki.txt").write_text("Once upon a time there was a town. " * 20)
    question = {"question": "A town is", "choices": ["a place", "a song"], "answer": 0}
    pathlib.Path("hellaswag.jsonl").write_text(json.dumps(question) + "\n")
    for part in ("dev", "test"):
        folder = pathlib.Path("mmlu/data") / part
        folder.mkdir(parents=True)
        rows = "What is a town?,place,song,colour,pet,A\n" * 5
        (folder / f"anatomy_{part}.csv").write_text(rows)
    return tmp_path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_about_a_real_llama_run_on_small_weights(page, place, monkeypatch):
    for words in commands(page, "needs-weights"):
        if words[0] not in OTHER_PROGRAMS:
            if words[1] in ("export.py", "merge.py"):  # a page may write to one place again
                remove(pathlib.Path(words[words.index("--out") + 1]))
            if words[1] == "train.py" and "--resume" not in words:
                shutil.rmtree(words[words.index("--out") + 1], ignore_errors=True)
            monkeypatch.setattr("sys.stdin", io.StringIO("What is a town?"))  # to chat about
            run_here(small(words), monkeypatch)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_other_commands_run_as_they_are(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "results", "results")
    for words in commands(page, ""):
        if " ".join(words) not in TYPED_BY_CI:
            pytest.importorskip("matplotlib", reason="needs matplotlib: pip install matplotlib")
            run_here(words, monkeypatch)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_examples_run(page):
    for text in blocks(page, "python", ""):
        assert len(text.splitlines()) <= 20
        exec(compile(text, str(page), "exec"), {})


def test_every_shell_block_is_run_or_marked_and_what_ci_types_is_in_the_readme():
    for page in PAGES:
        found = BLOCK.findall(page.read_text())
        assert 2 * len(found) == page.read_text().count("```"), f"{page}: a fence names no language"
        for language, mark, _ in found:
            assert language in ("sh", "python", "text", "json"), (page, language)
            shown = language in ("text", "json")  # test_real_model.py looks at data.md's
            assert shown or mark in ("", *MARKS), (page, mark)
    typed = (ROOT / ".ci" / "run").read_text()
    for line in blocks(PAGES[0], "sh", "")[0].splitlines():
        assert line.partition("#")[0].strip() in typed, line


class Parsed(Exception):
    """Raised where a slow command would begin to work: its options were accepted."""


def test_slow_commands_have_options_that_exist(tmp_path, monkeypatch):
    def stop(*arguments):
        raise Parsed

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(compare, "compare", stop)
    slow = []
    for page in PAGES:
        slow += commands(page, "slow")
    assert slow
    for words in slow:
        assert words[:2] == ["python", "compare.py"], words
        monkeypatch.setattr("sys.argv", words[1:])
        with pytest.raises(Parsed):
            compare.main()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_train_py_has_the_options_that_the_text_names(page):
    """Commands inside sentences are not run; only their options are parsed."""
    for _, script, *words in commands(page, "needs-network"):
        assert script == "train.py"
        option_parser("").parse_args(words)
    for code in re.findall(r"`([^`\n]+)`", page.read_text()):
        if "train.py " in code and "--help" not in code:
            options = code.partition("train.py ")[2].removesuffix("...")
            option_parser("").parse_args(shlex.split(options))


def test_the_picture_is_what_its_script_draws():
    picture = runpy.run_path(str(ROOT / "docs" / "draw_picture.py"))["picture"]
    assert picture() == (ROOT / "docs" / "qalora.svg").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", [*PAGES, ROOT / "BENCHMARKS.md"], ids=lambda page: page.name)
def test_links_lead_to_files_and_their_headings(page):
    for target, heading in re.findall(r"\]\(([^)#]+)#?([^)]*)", page.read_text()):
        if not target.startswith("https://"):
            assert (page.parent / target).exists(), target
            if heading:
                assert heading in headings(page.parent / target), f"{target}#{heading}"


def headings(page):
    """The names by which GitHub links to a page's headings."""
    lines = [line.lstrip("# ") for line in page.read_text().splitlines() if line.startswith("#")]
    return [re.sub(r"[^\w -]", "", line).lower().replace(" ", "-") for line in lines]


# ---- tables


def rows_under(page, heading):
    """The cells of the table below the line `heading` begins."""
    lines = page.read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(heading))
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip(" *") for cell in line.strip("|").split("|")])
    return rows


def test_the_readmes_table_is_that_of_the_default_run():
    results = json.loads((ROOT / "results" / "toy.json").read_text())
    assert results["bit_identical"]
    shown = "\n".join(line.rstrip() for line in blocks(PAGES[0], "text", "")[0].splitlines())
    assert table(results["table"]) in shown


ON_A_REAL_MODEL = (  # metric, factor, digits of the columns
    ("loss", 1, 3),
    ("exact_match", 100, 1),
    ("multiple_choice", 100, 1),
    ("perplexity", 1, 1),
)
RENAMED = {
    "base, not fine-tuned": "base",
    "LoRA, float32": "LoRA",
    "QLoRA, NF4 and float adapter": "QLoRA",
}


def test_the_comparisons_table_is_that_of_its_results():
    found = summary(json.loads((ROOT / "results" / "compare.json").read_text())["rows"])
    rows = rows_under(ROOT / "docs" / "results.md", "| deployed model |")
    assert len(rows) == 14
    for name, bits, trainable, exact, choice, perplexity in rows:
        measured = found[RENAMED.get(name, name.replace(", ", " "))]
        percent = [
            "{:.1f} ± {:.1f}".format(*(100 * number for number in measured[metric]))
            for metric in ("exact_match", "multiple_choice")
        ]
        assert [exact, choice] == percent, name
        assert perplexity == "{:.3f} ± {:.3f}".format(*measured["perplexity"]), name
        assert bits == f"{measured['bits_per_weight'][0]:.3g}", name
        assert trainable == f"{measured['trainable'][0]:,.0f}", name


def test_the_real_models_tables_are_its_results():
    rows = json.loads((ROOT / "results" / "real.json").read_text())["rows"]
    found, page = summary(rows), ROOT / "docs" / "results.md"
    shown = rows_under(page, "| SmolLM2-135M |")
    assert len(shown) == 23
    for name, bits, *cells in shown:
        measured = found[name]
        assert bits == f"{measured['bits_per_weight'][0]:.3g}", name
        for (metric, factor, digits), cell in zip(ON_A_REAL_MODEL, cells, strict=True):
            mean, spread = measured[metric]
            around = "" if spread is None else f" ± {factor * spread:.{digits}f}"
            assert cell == f"{factor * mean:,.{digits}f}{around}", (name, metric)
    by_name = {(row["row"], row["seed"]): row for row in rows}
    worth = rows_under(page, "| on SmolLM2-135M |")
    assert len(worth) == 12
    for i, (title, *cells) in enumerate(worth):
        methods = re.fullmatch("(QA-.*) against (Q.*): .*", title).groups()
        metric, factor, digits = ON_A_REAL_MODEL[i % 4]
        for bits, cell in zip((4, 3, 2), cells, strict=True):
            ours, other = (
                [factor * by_name[f"{method} {bits} bits", seed][metric] for seed in (1, 2, 3, 4)]
                for method in methods
            )
            assert cell == gain(ours, other, digits), title


def gain(ours, other, digits):
    """By how much some numbers are above others, as a table has it."""
    gains = [a - b for a, b in zip(ours, other, strict=True)]
    around = f" ± {statistics.stdev(gains):.{digits}f}" if len(gains) > 1 else ""
    return f"{statistics.mean(gains):+.{digits}f}{around}".replace("-", "−")


def test_the_laptops_table_is_what_evals_py_printed():
    measured = json.loads((ROOT / "results" / "smollm2.json").read_text())["models"]
    rows = rows_under(ROOT / "docs" / "laptop.md", "| | loss a token")
    assert [row[0] for row in rows] == list(measured)
    for name, *shown in rows:
        row = measured[name]
        expected = [f"{row['response_loss']:.2f}", f"{row['equal_answers']:.0f}"]
        for metric in ("hellaswag", "hellaswag_normalised", "mmlu"):
            expected.append("{:.1f} ± {:.1f}".format(*row[metric]))
        assert shown == expected, name


ABLATIONS = {
    "the table": "",
    "the same, attention only": ", attention only",
    "the same, GPTQ": ", min-max ranges",
    "the same, an eighth": ", 1/8 of the examples",
    "groups of 16": ", groups of 16",
    "groups of 32": ", groups of 32",
    "groups of 64": ", groups of 64",
}


def test_the_differences_are_those_of_the_results():
    rows = json.loads((ROOT / "results" / "compare.json").read_text())["rows"]
    lines = dict(line.split(": ") for line in differences(rows).splitlines())
    shown = rows_under(ROOT / "docs" / "results.md", "| | 4 bits | 3 bits | 2 bits |")
    assert len(shown) == len(ABLATIONS)
    for title, *cells in shown:
        what = next(words for start, words in ABLATIONS.items() if title.startswith(start))
        for bits, cell in zip((4, 3, 2), cells, strict=True):
            if cell:
                row = f"QA-LoRA {bits} bits{what} against QLoRA w/ GPTQ {bits} bits{what}"
                exact, *_ = lines[row].split(", ")
                assert exact == f"exact match {cell.replace('−', '-')}", row


def test_what_full_rank_is_worth_is_measured():
    shown = rows_under(ROOT / "docs" / "results.md", "| QA-LoRA at full rank against the low rank")
    for name, words, cells in zip(("compare", "real"), ("exact match", "loss"), shown, strict=True):
        rows = json.loads((ROOT / "results" / f"{name}.json").read_text())["rows"]
        lines = dict(line.split(": ") for line in differences(rows).splitlines())
        for bits, cell in zip((4, 3, 2), cells[1:], strict=True):
            row = f"QA-LoRA at full rank {bits} bits against QA-LoRA {bits} bits"
            assert f"{words} {cell.replace('−', '-')}," in lines[row], row


PLAIN, FULL = dict(kind="plain", lr=2.5e-4), dict(kind="full", lr=2e-4)
TRIED = {  # how a line begins: what was run, what it is compared with, on which seeds
    "full rank": (FULL, PLAIN, (1, 2, 3)),
    "A's rows orthonormal": (dict(PLAIN, kind="ortho"), PLAIN, (1, 2, 3)),
    "B's rate 16 times": (dict(kind="lora+", lr=6.25e-5, ratio=16), PLAIN, (1,)),
    "rank 4 on average": (dict(PLAIN, kind="by-error", rank=4), dict(PLAIN, rank=4), (1, 2, 3)),
    "each offset's rate": (dict(FULL, kind="full, rate by group scale"), FULL, (1,)),
    "each layer's rate": (dict(FULL, kind="full, rate by layer width"), FULL, (1,)),
    "60 steps of the float model's outputs": (dict(PLAIN, teach=60), PLAIN, (1, 2, 3)),
    "60 steps more (one": (dict(PLAIN, steps=185), PLAIN, (1,)),
    "60 steps more (three": (dict(PLAIN, steps=185), PLAIN, (1, 2, 3)),
    "210 steps more": (dict(PLAIN, steps=335), PLAIN, (1, 2)),
    "a base that GPTQ makes": (dict(PLAIN, damping=0.1), PLAIN, (1, 2, 3)),
}
RESULT = {"on", "bits", "seed", "n", "loss", "secs"}


def test_what_was_tried_is_measured():
    lines = (ROOT / "results" / "candidates.jsonl").read_text().splitlines()
    run = [row for row in map(json.loads, lines) if row["on"] == "SmolLM2-135M"]

    def losses(settings, bits, seeds):
        same = [row for row in run if settings == {k: row[k] for k in row.keys() - RESULT}]
        found = {row["seed"]: row["loss"] for row in same if row["bits"] == bits}
        return [found[seed] for seed in seeds]

    shown = rows_under(ROOT / "docs" / "results.md", "| tried on SmolLM2-135M")
    shown = [row for row in shown if "(test, " not in row[0]]
    for (title, *cells), (start, (ours, other, seeds)) in zip(shown, TRIED.items(), strict=True):
        assert title.startswith(start)
        for bits, cell in zip((3, 2), cells, strict=True):
            if cell:
                measured = gain(losses(ours, bits, seeds), losses(other, bits, seeds), 3)
                assert cell == measured, (title, bits)


GPTQ = {  # how a line begins, after its bits: what was run
    "inputs in their own order": ("own", 0.01),
    "large ones first": ("largest first", 0.01),
    "large ones first, damping 0.001": ("largest first", 0.001),
    "large ones first, damping 0.1": ("largest first", 0.1),
}


def test_what_gptq_is_worth_on_a_real_model_is_measured():
    lines = (ROOT / "results" / "gptq.jsonl").read_text().splitlines()
    found = {}
    for row in map(json.loads, lines):
        if row.keys().isdisjoint(("correction", "refit")):
            run = row["bits"], row["order"], row["damping"]
            found.setdefault(run, {})[row["slice"]] = row["perplexity"], row["loss"]
    shown = rows_under(ROOT / "docs" / "results.md", "| | perplexity, three slices")
    assert len(shown) == len(found) == 2 * len(GPTQ)
    for title, *cells in shown:
        bits, what = title.split(" bits, ")
        slices = found[int(bits), *GPTQ[what]]
        perplexities, losses = zip(*(slices[number] for number in (0, 1, 2)), strict=True)
        digits = 1 if bits == "3" else 0
        assert cells == [
            ", ".join(f"{number:.{digits}f}" for number in perplexities),
            f"{statistics.mean(perplexities):.{digits}f}",
            ", ".join(f"{number:.2f}" for number in losses),
            f"{statistics.mean(losses):.2f}",
        ], title


def test_the_memory_of_real_sizes_follows_from_their_shapes():
    rows = json.loads((ROOT / "results" / "gpu.json").read_text())["rows"]
    peaks = {(row["what"], row["name"]): row.get("peak bytes") for row in rows}
    what = "forward, recompute, backward of a block, 4 x 512 tokens"
    of_a_block = peaks[what, "ours: 4 bits, QA-LoRA"] / CONFIGS["7b"].hidden_size
    of_a_step = peaks["train.py's steps", "16 x 512 tokens, micro-batches of 4"]
    for name, *cells in rows_under(ROOT / "docs" / "real-llama.md", "| | base |"):
        config = CONFIGS[name]
        with torch.device("meta"):
            dense, packed = Llama(config), quantized_skeleton(config, 4, 32)
            adapters = adapter_parameters(add_adapters(packed, 64, 16))
        linears = sum(p.numel() for p in dense.model.layers.parameters() if p.dim() == 2)
        outside = sum(p.numel() for p in (dense.lm_head.weight, dense.model.embed_tokens.weight))
        trained = sum(p.numel() for p in adapters.values())
        weights = sum(p.numel() for p in dense.parameters())
        base, head, adapter, activations, total, float16, hours = (
            float(cell.split()[0]) for cell in cells
        )
        tokens, rate = 10_000 * 16 * 512, 400e12
        assert base == pytest.approx(linears * (0.5 + 6 / 32) / 1e9, abs=0.06)
        assert head == pytest.approx(outside * 2 / 1e9, abs=0.06)
        assert adapter == pytest.approx(trained * 16 / 1e9, abs=0.06)  # with gradient, two moments
        kept = 2 * config.num_hidden_layers * config.hidden_size + 14 * config.vocab_size
        computed = 4 * 512 * kept + of_a_block * config.hidden_size
        assert activations == pytest.approx(computed / 1e9, abs=0.06)
        assert total == pytest.approx(base + head + adapter + activations, abs=0.11)
        assert name != "7b" or total == pytest.approx(of_a_step / 1e9, rel=0.05)
        assert float16 == pytest.approx(weights * 2 / 1e9, abs=0.06)
        recomputed = 6 * (weights - outside / 2) * tokens / rate / 3600
        assert hours == pytest.approx(recomputed, rel=0.06)


def test_the_gpus_table_is_that_of_its_results():
    rows = json.loads((ROOT / "results" / "gpu.json").read_text())["rows"]
    names = {
        "dense, LoRA in bfloat16": "dense, LoRA in bfloat16",
        "dense, LoRA in float32": "dense, LoRA in float32",
        "4 bits, QA-LoRA": "ours: 4 bits, QA-LoRA",
        "bitsandbytes and peft, QLoRA": "bitsandbytes and peft: QLoRA",
        "the same under autocast": "bitsandbytes and peft: QLoRA, autocast",
        "recorded: dense, LoRA in bfloat16": "dense, LoRA in bfloat16, recorded",
        "recorded: 4 bits, QA-LoRA": "ours: 4 bits, QA-LoRA, recorded",
        "recorded: bitsandbytes and peft, QLoRA": "bitsandbytes and peft: QLoRA, recorded",
    }
    shown = rows_under(ROOT / "BENCHMARKS.md", "| forward, recomputation and backward")
    measured = {(row["what"], row["name"]): row.get("milliseconds") for row in rows}
    for title, *cells in shown[1:]:
        for size, cell in zip(("1 x 512", "4 x 512", "4 x 2048"), cells, strict=True):
            what = f"forward, recompute, backward of a block, {size} tokens"
            milliseconds = measured[what, names[title]]
            assert float(cell.split()[0]) == pytest.approx(milliseconds, rel=0.01), (title, size)


def test_the_study_is_the_documented_one():
    """results/compare.json was made with the settings that compare.py has."""
    settings = json.loads((ROOT / "results" / "compare.json").read_text())["settings"]
    assert settings == json.loads(json.dumps(compare.FULL.describe()))
