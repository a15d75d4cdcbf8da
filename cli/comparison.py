"""The results of compare.py as text and as a figure: means over the seeds, and differences."""

import math
import pathlib
import re
import statistics
from typing import Any

from cli.errors import UserError, require_matplotlib
from cli.files import read_json, written_whole
from cli.plan import FULL_RANK, OURS

METRICS = {  # of a model: heading, factor, digits after the point
    "loss": ("loss", 1, 3),  # only of a real language model
    "exact_match": ("exact match", 100, 1),
    "multiple_choice": ("mult. choice", 100, 1),
    "perplexity": ("perplexity", 1, 3),
}
MEASURED = ("trainable", "bits_per_weight", "seconds")
METHODS = ("LoRA", "QLoRA", "QLoRA w/ GPTQ", *OURS)  # lines in a figure


def judged(rows: list[dict]) -> list[dict]:
    """The rows of models whose training did not diverge."""
    return [row for row in rows if not row.get("diverged")]


def metrics_of(rows: list[dict]) -> list[str]:
    """Those that all rows have."""
    return [metric for metric in METRICS if all(metric in row for row in rows)]


def summary(rows: list[dict]) -> dict[str, dict[str, tuple[float, float | None]]]:
    """{row: {metric: (mean, standard deviation over the seeds)}} in the order of the rows."""
    found, measured = {}, (*metrics_of(rows), *MEASURED)
    for name in dict.fromkeys(row["row"] for row in rows):
        same = [row for row in rows if row["row"] == name]
        found[name] = {m: mean_and_spread([row[m] for row in same]) for m in measured}
    return found


def mean_and_spread(values: list[float]) -> tuple[float, float | None]:
    """Mean and standard deviation; a single value has none, and infinity none that is a number."""
    if len(values) == 1:
        return values[0], None
    if not all(map(math.isfinite, values)):
        return sum(values) / len(values), math.nan
    return statistics.fmean(values), statistics.stdev(values)


def table(rows: list[dict]) -> str:
    """The summary as text; exact match and multiple choice in percent."""
    whole = judged(rows)
    metrics = metrics_of(whole)
    headings = "".join(f"{METRICS[metric][0]:>17}" for metric in metrics)
    lines = [f"{'':48}{headings}  trainable  bits/weight  seconds"]
    for name, measured in summary(whole).items():
        scores = "".join(f"{in_words(metric, *measured[metric]):>17}" for metric in metrics)
        trainable, bits, seconds = (measured[m][0] for m in MEASURED)
        lines.append(f"{name:48}{scores}{trainable:11.0f}{bits:13.2f}{seconds:9.0f}")
    for row in rows:
        if row.get("diverged"):
            lines.append(f"{row['row']} diverged on seed {row['seed']}, and is not in its means")
    return "\n".join(lines)


def in_words(metric: str, mean: float, spread: float | None, sign: str = "") -> str:
    """Such as `97.5 ± 0.4`."""
    _, factor, digits = METRICS[metric]
    around = "" if spread is None else f" ± {factor * spread:.{digits}f}"
    return f"{factor * mean:{sign}.{digits}f}{around}"


def differences(rows: list[dict]) -> str:
    """Lines on what a change is worth by each metric, seed by seed; mean and deviation.

    Only models over the same base are compared, as bases differ more than methods do.
    """
    rows = judged(rows)
    by_name = {(row["row"], row["seed"]): row for row in rows}
    names, metrics = list(dict.fromkeys(row["row"] for row in rows)), metrics_of(rows)
    lines = []
    for name in names:
        for against in opponents(name):
            seeds = [s for row, s in by_name if row == name and (against, s) in by_name]
            if not seeds:
                continue
            gains = []
            for metric in metrics:
                gain = [by_name[name, s][metric] - by_name[against, s][metric] for s in seeds]
                worth = in_words(metric, *mean_and_spread(gain), sign="+")
                gains.append(f"{METRICS[metric][0]} {worth}")
            lines.append(f"{name} against {against}: {', '.join(gains)}")
    return "\n".join(lines)


def opponents(name: str) -> list[str]:
    """The rows that a row is compared with: the same unablated, and other methods' like it."""
    if name.startswith(("GPTQ", "RTN")):
        return []
    method, at_bits = re.fullmatch(r"(?s)(.*?)( [234] bits.*|,.*|)", name).groups()
    others = {"QA-LoRA": ["QLoRA w/ GPTQ"], FULL_RANK: ["QA-LoRA", "QLoRA w/ GPTQ"]}
    found = [other + at_bits for other in others.get(method, [])]
    plain = name.partition(",")[0]
    return found if plain == name else [plain, *found]


def read_rows(path: pathlib.Path) -> list[dict]:
    """The rows in a results' file; UserError if it holds anything else."""
    if not path.exists():
        raise UserError(f"there is no {path}; give a results' file of compare.py, its --out")
    rows = read_json(path).get("rows")
    if not (isinstance(rows, list) and rows and all(map(is_row, rows))):
        raise UserError(f"{path} holds no results of compare.py")
    return rows


def is_row(row: Any) -> bool:
    """Whether `row` is what compare.py has measured of a model."""
    if not (isinstance(row, dict) and isinstance(row.get("row"), str)):
        return False
    numbers = [row.get("seed")]
    if not row.get("diverged"):
        present = [metric for metric in METRICS if metric in row]
        numbers += [row.get(m) for m in ("exact_match", *MEASURED, *present)]
    return all(isinstance(number, int | float) for number in numbers)


def plot(path: pathlib.Path) -> None:
    """Prints a results' file; draws each metric against bits per weight beside it, as a .png."""
    rows = read_rows(path)
    print(table(rows) + "\n\n" + differences(rows))
    require_matplotlib()
    rows = judged(rows)
    if not any(row["row"] == "LoRA" for row in rows):
        raise UserError(f"{path} has no LoRA, beside which the figure would show the others")
    drawing = path.with_suffix(".png")
    with written_whole(drawing) as beside:
        picture(rows).savefig(beside, format="png", dpi=150)
    print(f"\ndrawn in {drawing}")


def picture(rows: list[dict]) -> Any:
    """A figure of matplotlib: every metric beside LoRA's on the same base."""
    from matplotlib.figure import Figure  # optional

    metrics = metrics_of(rows)
    columns = 2 if len(metrics) == 4 else len(metrics)
    lines = len(metrics) // columns
    figure = Figure(figsize=(5 * columns, 4 * lines), layout="constrained")
    places = figure.subplots(lines, columns, squeeze=False).flat
    for axes, metric in zip(places, metrics, strict=True):
        draw(axes, rows, metric)
    places[0].legend()
    return figure


def draw(axes: Any, rows: list[dict], metric: str) -> None:
    """Draws one line a method, without ablations; `axes` are matplotlib's.

    As differences from LoRA on the same base; of perplexities, ratios.
    """
    heading, factor, _ = METRICS[metric]
    is_ratio = metric == "perplexity"
    lora = {row["seed"]: row[metric] for row in rows if row["row"] == "LoRA"}
    points = {method: {} for method in METHODS}
    for row in rows:
        method = re.sub(r" [234] bits$", "", row["row"])
        if method in points and row["seed"] in lora:
            found = points[method].setdefault(row["bits_per_weight"], [])
            beside = lora[row["seed"]]
            found.append(row[metric] / beside if is_ratio else factor * (row[metric] - beside))
    for method, found in points.items():
        bits = sorted(found)
        if bits:
            mean, spread = zip(*(mean_and_spread(found[b]) for b in bits), strict=True)
            bars = [s or 0.0 for s in spread]
            axes.errorbar(bits, mean, bars, marker="o", capsize=3, label=method)
    unit = ", points" if factor == 100 else ""
    axes.set(xscale="log", xlabel="bits per weight of the deployed model")
    axes.set(ylabel=f"{heading} over LoRA's" if is_ratio else f"{heading}{unit}, less LoRA's")
    if is_ratio:
        axes.set(yscale="log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
    lowest, highest = axes.get_xlim()
    ticks = [t for t in (2, 3, 4, 5, 6, 7, 8, 9, 10, 16, 32) if lowest < t < highest]
    axes.set_xticks(ticks, [str(t) for t in ticks])
    axes.xaxis.minorticks_off()
