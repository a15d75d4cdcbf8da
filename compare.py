"""The paper's comparison at toy scale: models fine-tuned and deployed at 4, 3 or 2 bits.

    python compare.py                                the table, three seeds: 1 to 2 hours on 2 cores
    python compare.py --quick                        a smaller world and model, no ablations: 3 min
    python compare.py --plot results/compare.json    prints it again, draws results/compare.png

Every seed has a world, a tokenizer and a pretrained base of its own, kept in runs/ and shared by
all methods. All methods see the same examples in the same order, for the same number of steps, with
the same rank. What differs is the learning rate. Each row of the table takes the one whose deployed
model answered best about the validation people, on a seed that is not reported; ablations take the
rate of their row. The people of the test are met only after that, on fresh seeds.

Unlike train.py's, this base is dense: 24,000 bits of facts in 460,000 weights. So quantizing hurts
it as it hurts a real LLaMA: hardly at 4 bits, a little at 3 and badly at 2. (Asked 300 of its facts
in its own words, one such base knew all; after GPTQ in groups of 8 it knew 99.7, 99.0 and 91.7 % at
4, 3 and 2 bits; at 2 bits in groups of 16 and 32, 80.7 and 70.7 %. A base of a million weights and
a third of the people hardly noticed 2 bits.) In groups of 8 the adapters see 16 pooled inputs; in
a LLaMA-7B they see 128 or more.
"""

import concurrent.futures
import contextlib
import copy
import dataclasses
import functools
import json
import multiprocessing
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

import evals
from baselines import quantize_model_nf4
from cli.comparison import differences, plot, table
from cli.errors import Parser, positive, run_command
from cli.files import new_file, written_whole
from cli.measure import bits_per_weight
from cli.runs import adamw
from cli.toy import pretrain, toy_calibration
from llama import LINEARS, Llama, LlamaConfig, load_pretrained
from merge import merge
from qalora import adapter_parameters, add_adapters
from quant import quantize_model
from text.batches import Example, calibration_windows, encode, token_stream
from text.instructions import Record
from text.tokenizer import Tokenizer, load_tokenizer
from text.toy import ATTRIBUTES, World, make_world
from train import fine_tune


@dataclasses.dataclass(frozen=True)
class Study:
    """What all jobs of a comparison share; the results' file holds it as "settings"."""

    model: dict  # of the bases: fields of LlamaConfig
    people: int  # in a world
    pretraining: dict  # steps, lr, batch_size, length, warmup: see cli.toy.pretrain
    bits: tuple[int, ...]  # descending
    group_size: int  # inputs that share a scale and an offset
    group_sizes: tuple[int, ...]  # of the ablation, at the fewest bits
    rank: int  # of all adapters
    alpha: float
    steps: int  # of fine-tuning
    batch_size: int  # examples in a step
    rates: tuple[float, ...]  # learning rates to choose from
    ablations: bool  # whether to run them


FULL = Study(
    model=dict(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
    ),
    people=1000,
    pretraining=dict(steps=5000, lr=3e-3, batch_size=16, length=128, warmup=200),
    bits=(4, 3, 2),
    group_size=8,
    group_sizes=(8, 16, 32, 64),
    rank=8,
    alpha=16.0,
    steps=150,
    batch_size=32,
    rates=(1.25e-4, 2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3),
    ablations=True,
)
_HALF = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=2)
_TWO_HEADS = dict(num_attention_heads=2, num_key_value_heads=2)
QUICK = dataclasses.replace(
    FULL,
    model=FULL.model | _HALF | _TWO_HEADS,
    people=300,
    pretraining=dict(steps=2000, lr=1e-2, batch_size=16, length=96, warmup=100),
    steps=100,
    rates=(1e-3, 2e-3),
    ablations=False,
)
CHOOSING_SEED = 0  # the learning rates are chosen here; seeds 1, 2, ... are reported
MAX_LENGTH = 512  # tokens of an example
CALIBRATION_TOKENS = 2**14


class Job(NamedTuple):
    """One fine-tuning, or none ("base"), and all that is deployed from it.

    The three requantizations of QLoRA share one adapter, unless they prefer other learning rates.
    The defaults are those of the table's rows.
    """

    seed: int
    method: str  # "base", "LoRA", "QLoRA" or "QA-LoRA"
    lr: float = 0.0
    bits: int = 0  # of QA-LoRA's base; the others' models are quantized afterwards, to all bits
    group_size: int = 0  # likewise
    search: bool = True  # of GPTQ's ranges
    targets: tuple[str, ...] = LINEARS
    share: float = 1.0  # of the fine-tuning examples


# ---- the worlds and their splits


def base_folder(study: Study, seed: int) -> pathlib.Path:
    """Where the base of a seed is kept; it is pretrained if it is not there."""
    sizes = (*study.model.values(), study.people, *study.pretraining.values(), seed)
    folder = pathlib.Path("runs/compare-bases") / "-".join(str(size) for size in sizes)
    if not (folder / "config.json").exists():
        world = make_world(seed, study.people)
        pretrain(world, folder, LlamaConfig(**study.model), seed=seed, **study.pretraining)
    return folder


def split(world: World) -> tuple[list[Record], list[Record]]:
    """(records to fine-tune on, records to choose by): the last quarter of the people is apart."""
    people = len(world.train) // len(ATTRIBUTES)
    border = (people - people // 4) * len(ATTRIBUTES)
    return world.train[:border], world.train[border:]


def judge(model: Llama, tokenizer: Tokenizer, world: World, choosing: bool) -> dict[str, float]:
    """The metrics of a deployed model: on the validation people when choosing, else on the test."""
    if choosing:
        records = split(world)[1]
        examples = encode(records, tokenizer, MAX_LENGTH)[0]
        return {
            "exact_match": evals.exact_match(model, tokenizer, records, 8),
            "loss": evals.response_loss(model, examples, 64),
        }
    stream = token_stream(world.heldout, tokenizer)
    choices = evals.multiple_choice(model, tokenizer, world.choices, 256)
    return {
        "exact_match": evals.exact_match(model, tokenizer, world.test, 8),
        "multiple_choice": choices["accuracy"],
        "perplexity": evals.perplexity(model, stream, 64, None, 64),
    }


# ---- one job


def run(study: Study, job: Job, rates: dict[str, float] | None) -> list[dict]:
    """Runs a job; returns a dict for every model deployed from it: row, job and measurements.

    rates: {row: learning rate}, so that only rows that chose the job's rate are deployed; None
    while choosing.
    """
    folder = base_folder(study, job.seed)
    world = make_world(job.seed, study.people)
    tokenizer, model = load_tokenizer(folder), load_pretrained(folder)
    records = split(world)[0]
    shown = toy_calibration(world._replace(train=records))
    context = model.config.max_position_embeddings
    calibration = calibration_windows(shown, tokenizer, context, CALIBRATION_TOKENS)
    if job.method == "QLoRA":
        quantize_model_nf4(model)
    if job.method == "QA-LoRA":
        quantize_model(model, job.bits, job.group_size, calibration, job.search)
    fitted = {"trainable": 0, "seconds": 0.0}
    if job.method != "base":
        used = records[: round(job.share * len(records))]
        fitted = adapt(study, job, model, encode(used, tokenizer, MAX_LENGTH)[0])
    rows = []
    for name, make in deployments(study, job, model, calibration, choosing=rates is None):
        if rates is None or job.method == "base" or rates[name.partition(",")[0]] == job.lr:
            deployed = make()
            row = {"row": name, **job._asdict(), **fitted}
            row["bits_per_weight"] = bits_per_weight(deployed)
            rows.append(row | judge(deployed, tokenizer, world, choosing=rates is None))
    return rows


def adapt(study: Study, job: Job, model: Llama, examples: list[Example]) -> dict[str, float]:
    """Adds adapters to `model` and trains them; returns their number and the CPU's seconds."""
    torch.manual_seed(job.seed)
    add_adapters(model, study.rank, study.alpha, job.targets)
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
    study: Study, job: Job, model: Llama, calibration: Tensor, choosing: bool
) -> Iterator[tuple[str, Callable[[], Llama]]]:
    """(row, a function that makes its model) for all that is deployed; merges `model` meanwhile."""
    name = job.method + suffix(study, job)
    if job.method == "QLoRA":
        yield name, lambda: model
    if job.method != "base":
        merge(model)
    if job.method != "QLoRA":
        yield name, lambda: model
    if job.method in ("base", "QLoRA"):
        for row, bits, group_size, search in requantizations(study, job, choosing):
            tokens = None if row.startswith("RTN") else calibration
            yield row, functools.partial(requantized, model, bits, group_size, tokens, search)


def requantized(
    model: Llama, bits: int, group_size: int, calibration: Tensor | None, search: bool
) -> Llama:
    """A quantized copy."""
    return quantize_model(copy.deepcopy(model), bits, group_size, calibration, search)


def requantizations(study: Study, job: Job, choosing: bool) -> Iterator[tuple[str, int, int, bool]]:
    """(row, bits, group size, search) for every model to be made from a float one."""
    plain = job == Job(job.seed, job.method, job.lr)
    ablations = plain and study.ablations and not choosing
    lowest = study.bits[-1]
    method = "GPTQ" if job.method == "base" else "QLoRA w/ GPTQ"
    for bits in study.bits if plain else (lowest,):
        if job.method == "base":
            yield f"RTN {bits} bits", bits, study.group_size, True
        group_sizes, searches = (study.group_size,), (True,)
        if ablations and bits == lowest and job.method == "QLoRA":
            group_sizes = study.group_sizes
        if ablations and bits < 4:
            searches = (True, False)
        for group_size in group_sizes:
            for search in searches if group_size == study.group_size else (True,):
                made = job._replace(bits=bits, group_size=group_size, search=search)
                yield method + suffix(study, made), bits, group_size, search


def suffix(study: Study, job: Job) -> str:
    """The end of a row's name: bits, if quantized in groups; after a comma, what is ablated."""
    end = f" {job.bits} bits" if job.bits else ""
    if job.group_size not in (0, study.group_size):
        end += f", groups of {job.group_size}"
    if not job.search:
        end += ", min-max ranges"
    if job.targets != LINEARS:
        end += ", attention only"
    if job.share < 1:
        end += f", 1/{round(1 / job.share)} of the examples"
    return end


# ---- all jobs


def main_jobs(study: Study, seed: int) -> list[Job]:
    """The fine-tunings of the table, without their learning rates."""
    qalora = [Job(seed, "QA-LoRA", 0.0, bits, study.group_size) for bits in study.bits]
    return [Job(seed, "LoRA"), Job(seed, "QLoRA"), *qalora]


def ablation_jobs(study: Study, seed: int) -> list[Job]:
    """One change at a time: groups, ranges, adapted layers, examples; mostly at the fewest bits."""
    attention = ("q_proj", "k_proj", "v_proj", "o_proj")
    qalora = Job(seed, "QA-LoRA", 0.0, study.bits[-1], study.group_size)
    both = (qalora, Job(seed, "QLoRA"))
    other_sizes = [size for size in study.group_sizes if size != study.group_size]
    jobs = [qalora._replace(group_size=size) for size in other_sizes]
    jobs += [qalora._replace(search=False, bits=bits) for bits in study.bits if bits < 4]
    jobs += [job._replace(targets=attention) for job in both]
    jobs += [job._replace(share=1 / 8) for job in both]
    return jobs


def choose(rows: list[dict]) -> dict[str, float]:
    """{row: learning rate} of most exact matches on the validation people, then of least loss."""
    best = {}
    for row in sorted(rows, key=lambda row: (row["exact_match"], -row["loss"])):
        best[row["row"]] = row["lr"]
    return best


def rated(study: Study, job: Job, rates: dict[str, float]) -> list[Job]:
    """The job once for every learning rate that a row deployed from it has chosen.

    An ablation takes its plain row's; QLoRA's are deployed as they are and at the fewest bits.
    """
    if job.method == "QLoRA" and job != Job(job.seed, "QLoRA"):
        chosen = {rates["QLoRA"], rates[f"QLoRA w/ GPTQ {study.bits[-1]} bits"]}
    else:
        start = f"{job.method} {job.bits} bits" if job.bits else job.method
        chosen = {lr for row, lr in rates.items() if row.startswith(start)}
    return [job._replace(lr=lr) for lr in sorted(chosen)]


def compare(study: Study, seeds: list[int], workers: int) -> dict:
    """Runs everything; returns what the results' file holds."""
    with pool_of(workers) as pool:
        bases = [CHOOSING_SEED, *seeds]
        list(pool.map(base_folder, [study] * len(bases), bases))
        jobs = []
        for job in main_jobs(study, CHOOSING_SEED):
            jobs += [job._replace(lr=lr) for lr in study.rates]
        validation = run_all(pool, study, jobs, None)
        rates = choose(validation)
        print("learning rates:", json.dumps(rates), flush=True)
        rows = run_all(pool, study, reported_jobs(study, seeds, rates), rates)
    bases = [row for row in rows if row["method"] == "base"]
    rows.sort(key=order(bases + validation + rows))
    return {
        "settings": dataclasses.asdict(study),
        "seeds": seeds,
        "rates": rates,
        "validation": validation,
        "rows": rows,
    }


def reported_jobs(study: Study, seeds: list[int], rates: dict[str, float]) -> list[Job]:
    """All jobs whose rows are reported."""
    jobs = [Job(seed, "base") for seed in seeds]
    for plan in (main_jobs, ablation_jobs) if study.ablations else (main_jobs,):
        for seed in seeds:
            for job in plan(study, seed):
                jobs += rated(study, job, rates)
    return jobs


def run_all(
    pool: concurrent.futures.Executor, study: Study, jobs: list[Job], rates: dict[str, float] | None
) -> list[dict]:
    """The rows of all jobs, in the order of the jobs; prints each when it is done."""
    start = time.monotonic()
    futures = [pool.submit(run, study, job, rates) for job in jobs]
    for done, future in enumerate(concurrent.futures.as_completed(futures), 1):
        for row in future.result():
            progress = f"{done}/{len(jobs)}, {time.monotonic() - start:.0f} s"
            which = f"seed {row['seed']}, lr {row['lr']:g}, {row['row']}"
            print(f"[{progress}] {which}: exact match {row['exact_match']:.3f}", flush=True)
    rows = []
    for future in futures:
        rows += future.result()
    return rows


@contextlib.contextmanager
def pool_of(workers: int) -> Iterator[concurrent.futures.Executor]:
    """A pool of processes. An exception, such as Ctrl-C, ends them at once, with what is queued."""
    context = multiprocessing.get_context("spawn")
    executor = concurrent.futures.ProcessPoolExecutor
    with executor(workers, context, initializer=prepare_worker) as pool:
        try:
            yield pool
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.terminate()
            raise


def prepare_worker() -> None:
    """One thread, as matrices are small; no progress bars, as two would overwrite each other."""
    torch.set_num_threads(1)
    sys.stderr = pathlib.Path(os.devnull).open("w")  # noqa: SIM115, open to the end


def order(rows: list[dict]) -> Callable[[dict], tuple]:
    """A sorting key: the table's rows, then the ablations, each in the order of its first row."""
    names = list(dict.fromkeys(row["row"] for row in rows))

    def key(row):
        return "," in row["row"], names.index(row["row"]), row["seed"]

    return key


def main() -> None:
    """Runs the command line."""
    parser = Parser(prog="compare.py", description=__doc__)
    add = parser.add_argument
    add("--seeds", type=positive(int), help="how many seeds are reported (3; with --quick 1)")
    add("--quick", action="store_true", help="about 3 minutes on 2 cores")
    add("--workers", type=positive(int), default=2, help="processes at a time (2)")
    add("--out", type=new_file, help="the results' file (runs/compare.json)")
    add("--plot", type=pathlib.Path, metavar="FILE", help="only print and draw a results' file")
    args = parser.parse_args()
    if args.plot:
        if args.quick or args.seeds or args.out:
            parser.error(
                "--plot draws a file that is there; --quick, --seeds and --out would make another"
            )
        plot(args.plot)
        return
    out = args.out or new_file(f"runs/compare{'-quick' if args.quick else ''}.json")
    study, seeds = (QUICK, 1) if args.quick else (FULL, 3)
    results = compare(study, list(range(1, 1 + (args.seeds or seeds))), args.workers)
    with written_whole(out) as beside:
        beside.write_text(json.dumps(results, indent=1) + "\n")
    rows = results["rows"]
    print(f"\n{table(rows)}\n\n{differences(rows)}\n\nwritten to {out}")


if __name__ == "__main__":
    run_command(main)
