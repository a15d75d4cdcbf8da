"""Which jobs a comparison has, what their rows are called, and which learning rate each takes.

A job is one fine-tuning; a row is one deployed model. Nothing is computed here.
"""

import dataclasses
import json
import math
from collections.abc import Callable
from typing import NamedTuple

from cli.errors import UserError
from cli.subjects import Real, Toy
from llama import LINEARS

CHOOSING_SEED = 0  # the learning rates are chosen here; seeds 1, 2, ... are reported
FULL_RANK = "QA-LoRA at full rank"
OURS = ("QA-LoRA", FULL_RANK)


@dataclasses.dataclass(frozen=True)
class Study:
    """What all jobs of a comparison share; the results' file holds it as "settings"."""

    subject: Toy | Real  # what the methods are compared on
    bits: tuple[int, ...]  # descending
    group_size: int  # inputs that share a scale and an offset
    rank: int  # of all adapters but those of full rank
    alpha: float
    steps: int  # of fine-tuning
    batch_size: int  # examples in a step
    rates: tuple[float, ...]  # learning rates to begin with
    ablations: tuple[dict, ...] = ()  # fields of a Job that change, and the bits at which

    def describe(self) -> dict:
        """All of it, fit for JSON."""
        return {**dataclasses.asdict(self), "subject": self.subject.describe()}


class Job(NamedTuple):
    """One fine-tuning, or none ("base"), and all that is deployed from it.

    The requantizations of QLoRA share one adapter, unless they prefer other learning rates. The
    defaults are those of the table's rows. A model that is quantized afterwards is a Job, too, with
    the method "RTN", "GPTQ" or "QLoRA w/ GPTQ".
    """

    seed: int
    method: str  # "base", "LoRA", "QLoRA" or one of OURS
    lr: float = 0.0
    bits: int = 0  # of QA-LoRA's base; the others' models are quantized afterwards, to all bits
    group_size: int = 0  # likewise
    search: bool = True  # of GPTQ's ranges
    targets: tuple[str, ...] = LINEARS
    share: float = 1.0  # of the fine-tuning examples


# ---- rows


def row_of(study: Study, job: Job) -> str:
    """A row's name: the method, and bits if quantized in groups; after a comma, what is ablated."""
    in_groups = job.bits and job.method != "QLoRA"
    name = f"{job.method} {job.bits} bits" if in_groups else job.method
    if job.group_size not in (0, study.group_size):
        name += f", groups of {job.group_size}"
    if not job.search:
        name += ", min-max ranges"
    if job.targets != LINEARS:
        name += ", attention only"
    if job.share < 1:
        name += f", 1/{round(1 / job.share)} of the examples"
    return name


def requantizations(study: Study, job: Job, choosing: bool) -> list[Job]:
    """A Job for every model that is quantized afterwards: the base, by RTN too, or merged QLoRA.

    A change of what is adapted or learned from has been trained for; it is deployed at its bits.
    """
    if job.method not in ("base", "QLoRA"):
        return []
    method = "GPTQ" if job.method == "base" else "QLoRA w/ GPTQ"
    plain = job._replace(method=method, group_size=study.group_size)
    if job.bits:
        return [plain]
    made = [plain._replace(bits=bits) for bits in study.bits]
    if not choosing:
        made += [plain._replace(**change) for change in study.ablations if not retrains(change)]
    if job.method == "base":
        made += [gptq._replace(method="RTN") for gptq in made if gptq.search]
    return made


def retrains(change: dict) -> bool:
    """Whether an ablation needs another adapter, even where the base is quantized afterwards."""
    return not change.keys().isdisjoint(("targets", "share"))


def deployed_rows(study: Study, job: Job, choosing: bool = False) -> list[str]:
    """The names of all rows that a job is deployed as, by default those that are reported."""
    rows = [row_of(study, job)]
    return rows + [row_of(study, made) for made in requantizations(study, job, choosing)]


def order(rows: list[dict]) -> Callable[[dict], tuple]:
    """A sorting key: the table's rows, then the ablations, each in the order of its first row."""
    names = list(dict.fromkeys(row["row"] for row in rows))

    def key(row):
        return "," in row["row"], names.index(row["row"]), row["seed"]

    return key


# ---- jobs


def main_jobs(study: Study, seed: int) -> list[Job]:
    """The fine-tunings of the table, without their learning rates."""
    jobs = [Job(seed, "LoRA"), Job(seed, "QLoRA")]
    for method in OURS:
        jobs += [Job(seed, method, 0.0, bits, study.group_size) for bits in study.bits]
    return jobs


def ablation_jobs(study: Study, seed: int) -> list[Job]:
    """One change at a time. QLoRA's are trained only where that is not for the table already."""
    jobs = []
    for change in study.ablations:
        for method in OURS:
            jobs.append(Job(seed, method, group_size=study.group_size)._replace(**change))
        if retrains(change):
            jobs.append(Job(seed, "QLoRA")._replace(**change))
    return jobs


def base_jobs(study: Study, seeds: list[int]) -> list[Job]:
    """A job for every quantized base that others share."""
    jobs = []
    for seed in with_own_base(study, seeds):
        for job in main_jobs(study, seed) + ablation_jobs(study, seed):
            if job.method in OURS:
                jobs.append(Job(seed, "GPTQ", 0.0, job.bits, job.group_size, job.search))
    return list(dict.fromkeys(jobs))


def with_own_base(study: Study, seeds: list[int]) -> list[int]:
    """The seeds whose base no seed before them has."""
    first = {}
    for seed in seeds:
        first.setdefault(study.subject.folder(seed), seed)
    return list(first.values())


def reported_jobs(
    study: Study, seeds: list[int], rates: dict[str, float]
) -> list[tuple[Job, tuple[str, ...]]]:
    """All jobs whose rows are reported, seed by seed, and which rows."""
    jobs, own_base = [], with_own_base(study, seeds)
    for seed in seeds:
        base = [Job(seed, "base")] if seed in own_base else []
        for job in (*base, *main_jobs(study, seed), *ablation_jobs(study, seed)):
            jobs += rated(study, job, rates)
    return jobs


def name_of(study: Study, job: Job, rows: tuple[str, ...] | None) -> str:
    """All that a job's result depends on, as JSON; not which others there are beside it."""
    shared = study.describe()
    del shared["rates"], shared["ablations"]
    shared["subject"].pop("files", None)  # wherever they are
    usual = Job(0, "")
    chosen = {field: v for field, v in job._asdict().items() if v != getattr(usual, field)}
    return json.dumps([shared, {"seed": job.seed, **chosen}, rows])


# ---- learning rates


def choose(rows: list[dict]) -> dict[str, float]:
    """{row: learning rate} with the least loss on what is held back for choosing.

    Raises UserError where a row has no finite loss.
    """
    best = best_rates(rows)
    lost = [name for name in dict.fromkeys(row["row"] for row in rows) if name not in best]
    if lost:
        least = min(row["lr"] for row in rows)
        raise UserError(
            f"{', '.join(lost)}: all learning rates that were tried diverged, down to {least:g}; "
            "look for what is unusual in the model or the records"
        )
    return best


def best_rates(rows: list[dict]) -> dict[str, float]:
    """As `choose`, without the rows that have no finite loss."""
    best = {}
    for row in rows:
        name, loss = row["row"], row.get("loss", math.inf)
        if math.isfinite(loss) and (name not in best or loss < best[name]["loss"]):
            best[name] = row
    return {name: row["lr"] for name, row in best.items()}


def rated(study: Study, job: Job, rates: dict[str, float]) -> list[tuple[Job, tuple[str, ...]]]:
    """The job once for every learning rate that one of its rows has chosen, with those rows.

    An ablation takes that of its plain row.
    """
    rows = {}
    for name in deployed_rows(study, job):
        lr = 0.0 if job.method == "base" else rates[name.partition(",")[0]]
        rows.setdefault(lr, []).append(name)
    return [(job._replace(lr=lr), tuple(names)) for lr, names in sorted(rows.items())]


def at_an_end(rows: list[dict]) -> dict[str, float]:
    """{row: learning rate} of a job's rows that chose the least or the greatest rate tried."""
    tried = {row["lr"] for row in rows}
    return {name: lr for name, lr in best_rates(rows).items() if lr in (min(tried), max(tried))}


def next_rates(rows: list[dict]) -> list[float]:
    """Half the least rate that was tried for a job, or twice the greatest, where a row chose it.

    Also half the least while some row has diverged at every rate.
    """
    tried, ends = {row["lr"] for row in rows}, at_an_end(rows).values()
    lost = {row["row"] for row in rows} - best_rates(rows).keys()
    more = []
    if lost or min(tried) in ends:
        more.append(min(tried) / 2)
    if max(tried) in ends:
        more.append(2 * max(tried))
    return more
