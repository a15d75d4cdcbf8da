"""The paper's comparison at toy scale: what is left of a model that is fine-tuned and deployed at 4, 3 or 2 bits.

    python compare.py                                the table, three seeds: one to two hours on 2 cores
    python compare.py --quick                        a smaller world and model, no ablations: about 3 minutes
    python compare.py --plot results/compare.json    prints it again, draws results/compare.png (matplotlib)

Every seed is a world, a tokenizer and a pretrained base of its own, kept in runs/ and shared by all methods. All
methods see the same examples in the same order, for the same number of steps, with the same rank. What differs is
the learning rate: each row of the table takes the one whose deployed model answered best about the validation people,
on a seed that is not reported; ablations take over the rate of their row. The people of the test are met only after
that, on fresh seeds.

A `Job` is one fine-tuning and all that is deployed from it, so that the three requantizations of QLoRA share their
adapter unless they prefer another learning rate. Unlike train.py's, this base is dense: 24,000 bits of facts in 460,000
weights, so that quantizing hurts as it hurts a real LLaMA, hardly at 4 bits, a little at 3 and badly at 2. (Asked 300 of
its facts in its own words, one such base knew all, after GPTQ in groups of 8 still 99.7, 99.0 and 91.7 % at 4, 3 and 2
bits, at 2 bits in groups of 16 and 32 80.7 and 70.7 %. Bases of a million weights and a third of the people, which were
used before, hardly noticed 2 bits.) In groups of 8 the adapters see 16 pooled inputs; in a LLaMA-7B they see 128 or more.
"""

import concurrent.futures
import contextlib
import copy
import json
import multiprocessing
import pathlib
import statistics
import sys
import tempfile
import time
from typing import NamedTuple

import torch

import data
import evals
from cli import Parser, UserError, new_file, run_command, written_whole
from llama import LINEARS, LlamaConfig, load_pretrained, read_json
from merge import merge
from nf4 import quantize_model_nf4
from qalora import adapter_parameters, add_adapters
from quant import quantize_model
from settings import positive
from train import bits_per_weight, calibration_texts, calibration_windows, fine_tune, pretrain

FULL = dict(
    model=dict(vocab_size=512, hidden_size=128, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
               num_key_value_heads=4, max_position_embeddings=512, rms_norm_eps=1e-5),
    people=1000, pretraining=dict(steps=5000, lr=3e-3, batch_size=16, length=128, warmup=200), bits=[4, 3, 2], group_size=8,
    group_sizes=[8, 16, 32, 64], rank=8, alpha=16.0, steps=150, batch_size=32,
    rates=[1.25e-4, 2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3], ablations=True)
SMALL = FULL["model"] | dict(hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                             num_key_value_heads=2)
QUICK = FULL | dict(model=SMALL, people=300, pretraining=dict(steps=2000, lr=1e-2, batch_size=16, length=96, warmup=100),
                    steps=100, rates=[1e-3, 2e-3], ablations=False)
CHOOSING_SEED = 0  # the learning rates are chosen here; seeds 1, 2, ... are reported
MEASURED = ("exact_match", "multiple_choice", "perplexity", "trainable", "bits_per_weight", "seconds")


class Job(NamedTuple):
    """One fine-tuning, or none ("base"), and all that is deployed from it. The defaults are the table's."""
    seed: int
    method: str  # "base", "LoRA", "QLoRA" or "QA-LoRA"
    lr: float = 0.0
    bits: int = 0  # of QA-LoRA's base; the others' models are quantized afterwards, to all bits
    group_size: int = 0  # likewise
    search: bool = True
    targets: tuple = LINEARS
    share: float = 1.0  # of the fine-tuning examples


# ---- the worlds and their splits

def base_folder(r, seed):
    """Where the base of a seed is kept; it is pretrained if it is not there."""
    name = "-".join(map(str, (*r["model"].values(), r["people"], *r["pretraining"].values(), seed)))
    folder = pathlib.Path("runs/compare-bases") / name
    if not (folder / "config.json").exists():
        world = data.make_world(seed, r["people"])
        pretrain(world, folder, LlamaConfig(**r["model"]), seed=seed, **r["pretraining"])
    return folder


def split(world):
    """(records to fine-tune on, records to choose by): the people of the last quarter are kept apart."""
    people = len(world.train) // len(data.ATTRIBUTES)
    border = (people - people // 4) * len(data.ATTRIBUTES)
    return world.train[:border], world.train[border:]


def judge(model, tokenizer, world, choosing):
    """The metrics of one deployed model: on the validation people when choosing, else on the test's."""
    if choosing:
        records = split(world)[1]
        examples = data.encode(records, tokenizer, 512)[0]
        return {"exact_match": evals.exact_match(model, tokenizer, records, 8),
                "loss": evals.response_loss(model, examples, 64)}
    stream = data.token_stream(world.heldout, tokenizer)
    return {"exact_match": evals.exact_match(model, tokenizer, world.test, 8),
            "multiple_choice": evals.multiple_choice(model, tokenizer, world.choices, 256)["accuracy"],
            "perplexity": evals.perplexity(model, stream, 64, None, 64)}


# ---- one job

def run(r, job, rates):
    """Runs a job; returns one dict for every model deployed from it: its name, the job and what was measured.

    rates: {row: learning rate}, so that only the rows that chose the job's rate are deployed; None while choosing.
    """
    folder, world = base_folder(r, job.seed), data.make_world(job.seed, r["people"])
    tokenizer, model = data.load_tokenizer(folder), load_pretrained(folder)
    records = split(world)[0]
    examples = data.encode(records[:round(job.share * len(records))], tokenizer, 512)[0]
    texts = calibration_texts({"calibration": None}, world._replace(train=records))
    calibration = calibration_windows(texts, tokenizer, model.config, 2 ** 14)
    if job.method == "QLoRA":
        quantize_model_nf4(model)
    if job.method == "QA-LoRA":
        quantize_model(model, job.bits, job.group_size, calibration, search=job.search)
    fitted = {"trainable": 0, "seconds": 0.0} if job.method == "base" else adapt(r, job, model, examples)
    rows = []

    def deploy(name, make=lambda: model):
        if rates is None or job.method == "base" or rates[name.partition(",")[0]] == job.lr:
            deployed = make()
            rows.append({"row": name, **job._asdict(), **fitted, "bits_per_weight": bits_per_weight(deployed),
                         **judge(deployed, tokenizer, world, choosing=rates is None)})

    if job.method == "QLoRA":
        deploy("QLoRA" + suffix(r, job))
    if job.method != "base":
        merge(model)
    if job.method != "QLoRA":
        deploy(job.method + suffix(r, job))
    if job.method in ("base", "QLoRA"):
        for name, *how in requantizations(r, job, rates is None, calibration):
            deploy(name, lambda: quantize_model(copy.deepcopy(model), *how))
    return rows


def requantizations(r, job, choosing, calibration):
    """(name of the row, then the arguments of quantize_model) for every model to be made from a float one."""
    plain = job == Job(job.seed, job.method, job.lr)
    for bits in r["bits"] if plain else r["bits"][-1:]:
        lowest, ablations = bits == r["bits"][-1], plain and r["ablations"] and not choosing
        if job.method == "base":
            yield f"RTN {bits} bits", bits, r["group_size"]
        for group_size in r["group_sizes"] if ablations and lowest and job.method == "QLoRA" else [r["group_size"]]:
            for search in (True, False) if ablations and bits < 4 and group_size == r["group_size"] else [True]:
                made = job._replace(bits=bits, group_size=group_size, search=search)
                name = "GPTQ" if job.method == "base" else "QLoRA w/ GPTQ"
                yield name + suffix(r, made), bits, group_size, calibration, None, search


def suffix(r, job):
    """The end of a row's name: its bits, if quantized in groups, and after a comma what is not as in the table."""
    return ((f" {job.bits} bits" if job.bits else "")
            + (f", groups of {job.group_size}" if job.group_size not in (0, r["group_size"]) else "")
            + (", min-max ranges" if not job.search else "") + (", attention only" if job.targets != LINEARS else "")
            + (f", 1/{round(1 / job.share)} of the examples" if job.share < 1 else ""))


def adapt(r, job, model, examples):
    """Adds adapters to `model` and trains them; returns their number and the processor's seconds that it took."""
    torch.manual_seed(job.seed)
    add_adapters(model, r["rank"], r["alpha"], job.targets)
    start = time.process_time()  # one thread a process, so this is the time on a quiet machine
    with tempfile.TemporaryDirectory() as out:
        settings = dict(out=out, lr=job.lr, steps=r["steps"], seed=job.seed, clip=1.0, save_every=r["steps"],
                        batch_size=r["batch_size"], micro_batch_size=r["batch_size"], resume=False, device="cpu",
                        paged_optimizer=False)
        fine_tune(settings, model, examples, [])
    trainable = sum(p.numel() for p in adapter_parameters(model).values())
    return {"trainable": trainable, "seconds": time.process_time() - start}


# ---- all jobs

def main_jobs(r, seed):
    """The fine-tunings of the table, without their learning rates."""
    qalora = [Job(seed, "QA-LoRA", 0.0, bits, r["group_size"]) for bits in r["bits"]]
    return [Job(seed, "LoRA"), Job(seed, "QLoRA"), *qalora]


def ablation_jobs(r, seed):
    """What is changed, one thing at a time: groups, ranges, adapted layers, examples; mostly at the fewest bits."""
    lowest, attention = r["bits"][-1], ("q_proj", "k_proj", "v_proj", "o_proj")
    qalora, qlora = Job(seed, "QA-LoRA", 0.0, lowest, r["group_size"]), Job(seed, "QLoRA")
    return ([qalora._replace(group_size=g) for g in r["group_sizes"] if g != r["group_size"]]
            + [qalora._replace(search=False, bits=bits) for bits in r["bits"] if bits < 4]
            + [job._replace(targets=attention) for job in (qalora, qlora)]
            + [job._replace(share=share) for job in (qalora, qlora) for share in (1 / 8,)])


def choose(rows):
    """{row: learning rate} from rows measured on validation people: most exact matches, then the least loss."""
    best = {}
    for row in sorted(rows, key=lambda row: (row["exact_match"], -row["loss"])):
        best[row["row"]] = row["lr"]
    return best


def rated(r, job, rates):
    """The job once for every learning rate that a row deployed from it has chosen; an ablation takes its plain row's."""
    start = job.method + (f" {job.bits} bits" if job.bits else "")
    if job.method == "QLoRA" and job != Job(job.seed, "QLoRA"):  # an ablation: deployed as it is and at the fewest bits
        chosen = {rates["QLoRA"], rates[f"QLoRA w/ GPTQ {r['bits'][-1]} bits"]}
    else:
        chosen = {lr for row, lr in rates.items() if row.startswith(start)}
    return [job._replace(lr=lr) for lr in sorted(chosen)]


def summary(rows):
    """{row: {metric: (mean, standard deviation over the seeds)}} in the order of the rows."""
    names, spread = dict.fromkeys(row["row"] for row in rows), {}
    for name in names:
        same = [row for row in rows if row["row"] == name]
        spread[name] = {m: (statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0)
                        for m in MEASURED for values in [[row[m] for row in same]]}
    return spread


def table(rows):
    """The summary as text."""
    lines = [f"{'':44}   exact match  multiple choice      perplexity  trainable  bits/weight  seconds"]
    for name, s in summary(rows).items():
        exact, choice = (f"{100 * s[m][0]:.1f} ± {100 * s[m][1]:4.1f}" for m in ("exact_match", "multiple_choice"))
        lines.append(f"{name:44}{exact:>14}{choice:>17}{s['perplexity'][0]:9.3f} ± {s['perplexity'][1]:.3f}"
                     f"{s['trainable'][0]:11.0f}{s['bits_per_weight'][0]:13.2f}{s['seconds'][0]:9.0f}")
    return "\n".join(lines)


def differences(rows):
    """Lines on what a change is worth: points of exact match, mean and spread of the differences seed by seed.

    The seeds' bases differ more than the methods do, so only the difference on the same base tells.
    """
    exact = {(row["row"], row["seed"]): row["exact_match"] for row in rows}
    names, lines = list(dict.fromkeys(row["row"] for row in rows)), []
    for name in names:
        for against in (name.partition(",")[0], name.replace("QA-LoRA", "QLoRA w/ GPTQ")):
            if against != name and against in names and not name.startswith("GPTQ"):
                gain = [100 * (exact[name, seed] - exact[against, seed]) for n, seed in exact if n == name]
                spread = statistics.stdev(gain) if len(gain) > 1 else 0.0
                lines.append(f"{name} against {against}: {statistics.mean(gain):+.1f} ± {spread:.1f}")
    return "\n".join(lines)


def run_all(pool, r, jobs, rates):
    """The rows of all jobs, in the order of the jobs; tells of each job when it is done."""
    futures, start = [pool.submit(run, r, job, rates) for job in jobs], time.monotonic()
    for done, future in enumerate(concurrent.futures.as_completed(futures), 1):
        for row in future.result():
            print(f"[{done}/{len(jobs)}, {time.monotonic() - start:.0f} s] seed {row['seed']}, lr {row['lr']:g}, "
                  f"{row['row']}: exact match {row['exact_match']:.3f}", flush=True)
    return [row for future in futures for row in future.result()]


def compare(r, seeds, workers):
    """Runs everything; returns what the results' file holds."""
    with pool_of(workers) as pool:
        list(pool.map(base_folder, [r] * (1 + len(seeds)), [CHOOSING_SEED, *seeds]))
        jobs = [job._replace(lr=lr) for job in main_jobs(r, CHOOSING_SEED) for lr in r["rates"]]
        validation = run_all(pool, r, jobs, None)
        rates = choose(validation)
        print("learning rates:", json.dumps(rates), flush=True)
        jobs = [Job(seed, "base") for seed in seeds]
        for plan in (main_jobs, ablation_jobs) if r["ablations"] else (main_jobs,):
            jobs += [job for seed in seeds for plain in plan(r, seed) for job in rated(r, plain, rates)]
        rows = run_all(pool, r, jobs, rates)
    rows.sort(key=order([row for row in rows if row["method"] == "base"] + validation + rows))
    return {"settings": r, "seeds": seeds, "rates": rates, "validation": validation, "rows": rows}


@contextlib.contextmanager
def pool_of(workers):
    """A pool of processes that an exception, such as Ctrl-C, ends at once; by itself it would finish what is queued."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, context, initializer=prepare_worker) as pool:
        try:
            yield pool
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.terminate()
            raise


def order(rows):
    """A sorting key: the main table first, then the ablations, each in the order of its first row."""
    names = list(dict.fromkeys(row["row"] for row in rows))
    return lambda row: ("," in row["row"], names.index(row["row"]), row["seed"])


def prepare_worker():
    torch.set_num_threads(1)  # the matrices are so small that a second thread mostly waits
    sys.stderr = open("/dev/null", "w")  # the progress bars of two processes would write over each other


def plot(path):
    """Prints a results' file, and draws exact match against bits per weight beside it, one line a method.

    As points above LoRA on the same base; the ablations are left out.
    """
    rows = read_json(path).get("rows")
    needed = {"row", "seed", *MEASURED}
    if not (isinstance(rows, list) and rows and all(isinstance(row, dict) and needed <= row.keys() for row in rows)):
        raise UserError(f"{path} holds no results of compare.py")
    print(table(rows) + "\n\n" + differences(rows))
    try:
        from matplotlib.figure import Figure
    except ImportError as e:
        raise UserError("--plot needs matplotlib: pip install matplotlib") from e
    lora = {row["seed"]: row["exact_match"] for row in rows if row["row"] == "LoRA"}
    drawn = [row | {"exact_match": 100 * (row["exact_match"] - lora[row["seed"]])} for row in rows
             if "," not in row["row"]]
    figure = Figure(figsize=(7, 4.2))
    axes = figure.subplots()
    for method in ("LoRA", "QLoRA", "QLoRA w/ GPTQ", "QA-LoRA"):
        points = sorted((s["bits_per_weight"][0], *s["exact_match"]) for name, s in summary(drawn).items()
                        if name == method or name.startswith(f"{method} ") and name[len(method) + 1].isdigit())
        axes.errorbar(*zip(*points), marker="o", capsize=3, label=method)
    axes.set(xscale="log", xlabel="bits per weight of the deployed model", ylabel="exact match, points above LoRA")
    axes.set_xticks(ticks := [t for t in (3, 4, 5, 6, 7, 8, 9, 10, 16, 32) if t > axes.get_xlim()[0]], map(str, ticks))
    axes.minorticks_off()
    axes.legend()
    with written_whole(path.with_suffix(".png")) as beside:
        figure.savefig(beside, format="png", dpi=150, bbox_inches="tight")


def main():
    parser = Parser(prog="compare.py", description=__doc__)
    parser.add_argument("--seeds", type=positive(int), help="how many seeds are reported (3; with --quick 1)")
    parser.add_argument("--quick", action="store_true", help="about 3 minutes on 2 cores")
    parser.add_argument("--workers", type=positive(int), default=2, help="processes at a time (2)")
    parser.add_argument("--out", type=new_file, help="the results' file (runs/compare.json)")
    parser.add_argument("--plot", type=pathlib.Path, metavar="FILE", help="only print and draw a results' file")
    args = parser.parse_args()
    if args.plot:
        if args.quick or args.seeds or args.out:
            parser.error("--plot draws a file that is there; --quick, --seeds and --out would make another")
        return plot(args.plot)
    out = args.out or new_file(f"runs/compare{'-quick' if args.quick else ''}.json")
    seeds = list(range(1, 1 + (args.seeds or (1 if args.quick else 3))))
    results = compare(QUICK if args.quick else FULL, seeds, args.workers)
    with written_whole(out) as beside:
        beside.write_text(json.dumps(results, indent=1) + "\n")
    print("\n" + table(results["rows"]) + "\n\n" + differences(results["rows"]) + f"\n\nwritten to {out}")


if __name__ == "__main__":
    run_command(main)
