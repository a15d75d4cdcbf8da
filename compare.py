"""The paper's comparison: models fine-tuned by its methods and deployed at 4, 3 or 2 bits.

    python compare.py                              the toy study, three seeds: 1.5 hours, 2 cores
    python compare.py --quick                      a smaller world and model, no ablations: 3 min
    python compare.py --weights MODEL --data RECORDS.json --text FILE.txt --choices FILE.jsonl
    python compare.py --plot results/compare.json  prints it again, draws results/compare.png

All methods see the same examples in the same order, for the same number of steps, with the same
rank, but for QA-LoRA at full rank, where each offset learns by itself. What differs is the learning
rate. Each row of the table takes the one whose deployed model has the least loss on examples held
back from fine-tuning, on a seed that is not reported; rates are doubled or halved until the best
has a worse one on either side. Ablations take the rate of their row. The test is met only after
that, on fresh seeds.

Finished jobs are kept beside the results, in OUT.jobs, and bases in runs/compare-bases. So a
comparison that was interrupted goes on where it was, and one with another ablation runs that, and
again only the jobs whose models it quantizes.

The toy study has a world, a tokenizer and a pretrained base for every seed. Unlike train.py's, this
base is dense: 24,000 bits of facts in 460,000 weights. So quantizing hurts it as it hurts a real
LLaMA: hardly at 4 bits, a little at 3 and badly at 2. (Asked 300 of its facts in its own words, one
such base knew all; after GPTQ in groups of 8 it knew 99.7, 99.0 and 91.7 % at 4, 3 and 2 bits; at 2
bits in groups of 16 and 32, 80.7 and 70.7 %. A base of a million weights and a third of the people
hardly noticed 2 bits.) In groups of 8 the adapters see 16 pooled inputs; in a LLaMA-7B they see 128
or more.

With --weights, a real language model is fine-tuned on all but the last 100 of the records, and
judged on those, by the perplexity of a text, and on multiple-choice questions. All seeds share the
model; the order of the examples and the adapters' first values are theirs. A model that is
quantized already is dequantized, and that is the float model of the comparison. It takes about four
hours for 135 million weights on 2 cores with bfloat16 instructions: docs/results.md has the result.
"""

import argparse
import concurrent.futures
import copy
import dataclasses
import functools
import json
import pathlib
import signal
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import formats
from baselines import quantize_model_nf4
from cli.comparison import METRICS, differences, plot, table
from cli.errors import Parser, UserError, positive, run_command
from cli.files import new_file, written_whole
from cli.jobs import call_all, pool_of, run_and_keep
from cli.measure import bits_per_weight
from cli.plan import (
    CHOOSING_SEED,
    FULL_RANK,
    OURS,
    Job,
    Study,
    at_an_end,
    base_jobs,
    choose,
    deployed_rows,
    main_jobs,
    name_of,
    next_rates,
    order,
    reported_jobs,
    requantizations,
    row_of,
)
from cli.runs import adamw, kept_from_other_runs
from cli.settings import fetched
from cli.subjects import Material, Toy, real
from evals import joined
from llama import Llama
from merge import merge
from qalora import adapter_parameters, add_adapters
from quant import check_group_size, load_quantized, quantize_model, save_quantized
from text.batches import Example
from train import fine_tune

_DENSE = dict(
    vocab_size=512,
    hidden_size=128,
    intermediate_size=128,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=4,
    max_position_embeddings=512,
    rms_norm_eps=1e-5,
)
_HALF = dict(
    hidden_size=64,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
)
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
FULL = Study(
    subject=Toy(
        model=_DENSE,
        people=1000,
        pretraining=dict(steps=5000, lr=3e-3, batch_size=16, length=128, warmup=200),
    ),
    bits=(4, 3, 2),
    group_size=8,
    rank=8,
    alpha=16.0,
    steps=150,
    batch_size=32,
    rates=(5e-4, 1e-3, 2e-3),
    ablations=(
        dict(bits=2, group_size=16),
        dict(bits=2, group_size=32),
        dict(bits=2, group_size=64),
        dict(bits=3, search=False),
        dict(bits=2, search=False),
        dict(bits=2, targets=ATTENTION),
        dict(bits=2, share=1 / 8),
    ),
)
QUICK = dataclasses.replace(
    FULL,
    subject=Toy(
        model=_DENSE | _HALF,
        people=300,
        pretraining=dict(steps=2000, lr=1e-2, batch_size=16, length=96, warmup=100),
    ),
    steps=100,
    rates=(1e-3, 2e-3),
    ablations=(),
)
REAL = dict(  # of a real language model, whose subject comes from the command line
    bits=(4, 3, 2),
    group_size=32,
    rank=16,
    alpha=32.0,
    steps=125,
    batch_size=8,
    rates=(2.5e-4, 5e-4, 1e-3),
    ablations=(dict(bits=4, group_size=64),),
)
REAL_FILES = ("weights", "data", "text", "choices")
FACTOR = 2**6  # rates stay within so many times the first ones, and such a part of them


# ---- one job


def run(study: Study, job: Job, rows: tuple[str, ...] | None) -> list[dict]:
    """Runs a job; returns a dict for every model deployed from it: row, job and measurements.

    rows: the names of those to deploy; None while choosing, which is all of the table's. Where
    training diverges, the dicts say that instead.
    """
    choosing = rows is None
    material = study.subject.material(job.seed, choosing)
    model = material.model
    if job.method == "QLoRA":
        quantize_model_nf4(model)
    if job.method in OURS:
        model = quantized_base(study, job, material)
    fitted = {"trainable": 0, "seconds": 0.0}
    if job.method != "base":
        used = material.examples[: round(job.share * len(material.examples))]
        try:
            fitted = adapt(study, job, model, used)
        except FloatingPointError:
            names = rows or deployed_rows(study, job, choosing)
            return [{"row": name, **job._asdict(), "diverged": True} for name in names]
    measured = []
    for name, make in deployments(study, job, model, material, choosing):
        if choosing or name in rows:
            deployed = make()
            row = {"row": name, **job._asdict(), **fitted}
            row["bits_per_weight"] = bits_per_weight(deployed)
            measured.append(row | material.judge(deployed))
    return measured


def quantized_base(study: Study, job: Job, material: Material | None = None) -> Llama:
    """The job's base, quantized by GPTQ to its bits; kept, as several jobs share it."""
    name = f"gptq-{job.bits}-{job.group_size}-{'search' if job.search else 'min-max'}"
    folder = study.subject.folder(job.seed) / name
    if not (folder / "config.json").exists():
        material = material or study.subject.material(job.seed, choosing=True)  # or not: the same
        save_quantized(requantized(material.model, job, material.calibration), folder)
    try:
        return load_quantized(folder)
    except UserError as e:
        raise UserError(f"{e}; or remove {folder}, and it is made again") from None


def prepare_base(study: Study, job: Job) -> None:
    """Makes the job's base where it is not there, so that no two jobs do at once."""
    quantized_base(study, job)


def adapt(study: Study, job: Job, model: Llama, examples: list[Example]) -> dict[str, float]:
    """Adds adapters to `model` and trains them; returns their number and the CPU's seconds."""
    torch.manual_seed(job.seed)
    rank = "full" if job.method == FULL_RANK else study.rank
    add_adapters(model, rank, study.alpha, job.targets)
    parameters = list(adapter_parameters(model).values())
    start = time.process_time()  # one thread a process, so this is the time on a quiet machine
    steps = fine_tune(
        model,
        examples,
        adamw(parameters, job.lr, paged=False),
        study.steps,
        study.batch_size,
        micro_batch_size=study.batch_size,
        clip=1.0,
        seed=job.seed,
    )
    for _ in steps:
        pass
    trainable = sum(p.numel() for p in parameters)
    return {"trainable": trainable, "seconds": time.process_time() - start}


def deployments(
    study: Study, job: Job, model: Llama, material: Material, choosing: bool
) -> Iterator[tuple[str, Callable[[], Llama]]]:
    """(row, a function that makes its model) for all that is deployed; merges `model` meanwhile."""
    name = row_of(study, job)
    if job.method == "QLoRA":
        yield name, lambda: model  # to be called at once: before it is merged
    if job.method != "base":
        merge(model)
    if job.method != "QLoRA":
        yield name, lambda: model
    for made in requantizations(study, job, choosing):
        tokens = None if made.method == "RTN" else material.calibration
        make = functools.partial(requantized, model, made, tokens)
        if made.method == "GPTQ":
            make = functools.partial(quantized_base, study, made, material)
        yield row_of(study, made), make


def requantized(model: Llama, job: Job, calibration: Tensor | None) -> Llama:
    """A quantized copy, by GPTQ or by RTN."""
    return quantize_model(copy.deepcopy(model), job.bits, job.group_size, calibration, job.search)


# ---- all jobs


def choose_rates(study: Study, run_all: Callable) -> tuple[dict[str, float], list[dict]]:
    """({row: learning rate}, the rows that were tried), none at an end of what was tried.

    Where FACTOR stops the search before that, it is printed. Raises UserError as `choose` does.
    """
    jobs = main_jobs(study, CHOOSING_SEED)
    low, high = min(study.rates) / FACTOR, max(study.rates) * FACTOR
    waiting = dict.fromkeys(jobs, study.rates)
    rows = {job: [] for job in jobs}
    while waiting:
        todo = []
        for job, rates in waiting.items():
            todo += [(job, lr) for lr in rates]
        results = run_all([(job._replace(lr=lr), None) for job, lr in todo])
        for (job, _), result in zip(todo, results, strict=True):
            rows[job] += result
        waiting = {}
        for job in jobs:
            more = [lr for lr in next_rates(rows[job]) if low < lr < high]
            if more:
                waiting[job] = more
    for job in jobs:
        for name, lr in at_an_end(rows[job]).items():
            print(f"{name}: the best learning rate, {lr:g}, is the last of those tried")
    found = joined(rows.values())
    return choose(found), found


def compare(study: Study, seeds: list[int], workers: int, kept: pathlib.Path) -> dict:
    """Runs everything that is not in the file `kept`; returns what the results' file holds."""
    with pool_of(workers) as pool:
        run_all = functools.partial(run_jobs, pool, study, kept)
        all_seeds = [CHOOSING_SEED, *seeds]
        call_all(pool, study.subject.prepare, [(seed,) for seed in all_seeds])
        call_all(pool, prepare_base, [(study, job) for job in base_jobs(study, all_seeds)])
        rates, validation = choose_rates(study, run_all)
        print("learning rates:", json.dumps(rates), flush=True)
        rows = joined(run_all(reported_jobs(study, seeds, rates)))
    first = [row for row in rows if row["method"] == "base"]
    rows.sort(key=order(first + validation + rows))
    return {
        "settings": study.describe(),
        "seeds": seeds,
        "rates": rates,
        "validation": validation,
        "rows": rows,
    }


def run_jobs(
    pool: concurrent.futures.Executor, study: Study, kept: pathlib.Path, jobs: list[tuple]
) -> list[list[dict]]:
    """The rows of each (job, rows to deploy)."""
    names = [name_of(study, *job) for job in jobs]
    arguments = {name: (study, *job) for name, job in zip(names, jobs, strict=True)}
    done = run_and_keep(pool, kept, run, arguments, tell)
    return [done[name] for name in names]


def tell(progress: str, rows: list[dict]) -> None:
    """Prints what a job has measured."""
    for row in rows:
        scores = ["diverged"]
        if not row.get("diverged"):
            scores = [f"{metric} {row[metric]:.4g}" for metric in METRICS if metric in row]
            scores.append(f"{row['seconds']:.0f} s of training")
        which = f"seed {row['seed']}, lr {row['lr']:g}, {row['row']}"
        print(f"[{progress}] {which}: {', '.join(scores)}", flush=True)


def study_of(args: argparse.Namespace) -> Study:
    """The study that the command line asks for."""
    files = {name: getattr(args, name) for name in REAL_FILES}
    if not any(files.values()):
        return QUICK if args.quick else FULL
    if args.quick or not all(files.values()):
        raise UserError(
            "a real language model needs --weights, --data, --text and --choices, and no --quick"
        )
    files |= fetched(files)
    study = Study(subject=real(**files), **REAL)
    weights = files["weights"]
    if formats.quantization_of(weights):
        print(f"{weights} is quantized; what it dequantizes to, in bfloat16, is the float model")
    ablations = [c for c in study.ablations if fits(weights, c.get("group_size", study.group_size))]
    if not fits(weights, study.group_size):
        raise UserError(
            f"{weights}: groups of {study.group_size}, which are compared here, do not divide all "
            "of its layers; choose another model"
        )
    if len(ablations) < len(study.ablations):
        print(f"{weights}: not all groups of the ablations divide its layers; those are left out")
    return dataclasses.replace(study, ablations=tuple(ablations))


def fits(weights: str, group_size: int) -> bool:
    """Whether all layers of a model can be quantized in groups of this size."""
    try:
        check_group_size(formats.read_config(weights), group_size)
    except UserError:
        return False
    return True


def check_out(out: pathlib.Path, args: argparse.Namespace) -> None:
    """Raises UserError where the results would replace what the comparison reads."""
    for name in REAL_FILES:
        file = getattr(args, name)
        if file and pathlib.Path(file).resolve() == out.resolve():
            raise UserError(f"--out {out} is what --{name} reads; name another file")


def main() -> None:
    """Runs the command line."""
    parser = Parser(prog="compare.py", description=__doc__)
    add = parser.add_argument
    add("--weights", help="a real language model, as for train.py")
    add("--data", help="with it: 300 or more records, as for train.py; the last 100 are the test")
    add("--text", help="and a text; the perplexity of its first 32,768 tokens is taken")
    add("--choices", help="and lines of question, choices, answer, as for evals.py")
    add("--seeds", type=positive(int), help="how many seeds are reported (3; with --quick 1)")
    add("--quick", action="store_true", help="about 3 minutes on 2 cores")
    add("--workers", type=positive(int), default=2, help="processes at a time (2)")
    add("--out", type=new_file, help="the results' file (runs/compare, -quick or -real, .json)")
    add("--plot", type=pathlib.Path, metavar="FILE", help="only print and draw a results' file")
    args = parser.parse_args()
    if args.plot:
        others = (args.seeds, args.out, args.weights, args.data, args.text, args.choices)
        if args.quick or any(others):
            parser.error("--plot draws a file that is there; the other options would make another")
        plot(args.plot)
        return
    if args.out:
        check_out(args.out, args)
    study = study_of(args)
    quick = "-quick" if args.quick else ""
    out = args.out or new_file(f"runs/compare{'-real' if args.weights else quick}.json")
    kept = new_file(f"{out}.jobs")
    seeds = args.seeds or (1 if args.quick else 3)
    kept.touch()
    with kept_from_other_runs(kept):
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C, so that workers end
        results = compare(study, list(range(1, 1 + seeds)), args.workers, kept)
    with written_whole(out) as beside:
        beside.write_text(json.dumps(results, indent=1) + "\n")
    rows = results["rows"]
    print(f"\n{table(rows)}\n\n{differences(rows)}\n\nwritten to {out}")


if __name__ == "__main__":
    run_command(main)
