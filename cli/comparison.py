"""The results of compare.py as text and as a figure: means over the seeds, and differences."""

import pathlib
import statistics
from typing import Any

from cli.errors import UserError, require_matplotlib
from cli.files import read_json, written_whole

MEASURED = (
    "exact_match",
    "multiple_choice",
    "perplexity",
    "trainable",
    "bits_per_weight",
    "seconds",
)
METHODS = ("LoRA", "QLoRA", "QLoRA w/ GPTQ", "QA-LoRA")  # a line each in the figure


def summary(rows: list[dict]) -> dict[str, dict[str, tuple[float, float]]]:
    """{row: {metric: (mean, standard deviation over the seeds)}} in the order of the rows."""
    found = {}
    for name in dict.fromkeys(row["row"] for row in rows):
        same = [row for row in rows if row["row"] == name]
        found[name] = {m: mean_and_spread([row[m] for row in same]) for m in MEASURED}
    return found


def mean_and_spread(values: list[float]) -> tuple[float, float]:
    """Mean and standard deviation; the latter is 0 for a single value."""
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return statistics.mean(values), spread


def table(rows: list[dict]) -> str:
    """The summary as text."""
    header = "exact match  multiple choice      perplexity  trainable  bits/weight  seconds"
    lines = [f"{'':44}   {header}"]
    for name, measured in summary(rows).items():
        exact, choice = percent(*measured["exact_match"]), percent(*measured["multiple_choice"])
        perplexity, spread = measured["perplexity"]
        trainable, bits, seconds = (
            measured[m][0] for m in ("trainable", "bits_per_weight", "seconds")
        )
        lines.append(
            f"{name:44}{exact:>14}{choice:>17}{perplexity:9.3f} ± {spread:.3f}"
            f"{trainable:11.0f}{bits:13.2f}{seconds:9.0f}"
        )
    return "\n".join(lines)


def percent(mean: float, spread: float) -> str:
    """Such as `97.5 ±  0.4`."""
    return f"{100 * mean:.1f} ± {100 * spread:4.1f}"


def differences(rows: list[dict]) -> str:
    """Lines on what a change is worth: exact match in points, seed by seed; mean and deviation.

    Only models over the same base are compared, as bases differ more than methods do.
    """
    exact = {(row["row"], row["seed"]): row["exact_match"] for row in rows}
    names = list(dict.fromkeys(row["row"] for row in rows))
    lines = []
    for name in names:
        for against in (name.partition(",")[0], name.replace("QA-LoRA", "QLoRA w/ GPTQ")):
            if against == name or against not in names or name.startswith("GPTQ"):
                continue
            seeds = [seed for row, seed in exact if row == name]
            gain = [100 * (exact[name, seed] - exact[against, seed]) for seed in seeds]
            mean, spread = mean_and_spread(gain)
            lines.append(f"{name} against {against}: {mean:+.1f} ± {spread:.1f}")
    return "\n".join(lines)


def read_rows(path: pathlib.Path) -> list[dict]:
    """The rows in a results' file; UserError if it holds anything else."""
    rows = read_json(path).get("rows")
    needed = {"row", "seed", *MEASURED}
    is_ours = isinstance(rows, list) and len(rows) > 0
    is_ours = is_ours and all(isinstance(row, dict) and needed <= row.keys() for row in rows)
    if not is_ours:
        raise UserError(f"{path} holds no results of compare.py")
    return rows


def plot(path: pathlib.Path) -> None:
    """Prints a results' file; draws exact match against bits per weight beside it, as a .png.

    Exact match is in points above LoRA on the same base. Ablations are left out.
    """
    rows = read_rows(path)
    print(table(rows) + "\n\n" + differences(rows))
    require_matplotlib()
    from matplotlib.figure import Figure  # optional

    figure = Figure(figsize=(7, 4.2))
    draw(figure.subplots(), rows)
    with written_whole(path.with_suffix(".png")) as beside:
        figure.savefig(beside, format="png", dpi=150, bbox_inches="tight")


def draw(axes: Any, rows: list[dict]) -> None:
    """Draws one line a method; `axes` are matplotlib's."""
    lora = {row["seed"]: row["exact_match"] for row in rows if row["row"] == "LoRA"}
    drawn = []
    for row in rows:
        if "," not in row["row"]:
            above = 100 * (row["exact_match"] - lora[row["seed"]])
            drawn.append(row | {"exact_match": above})
    points = {method: [] for method in METHODS}
    for name, measured in summary(drawn).items():
        method = name.removesuffix(" bits").rstrip("234").rstrip()
        if method in points:
            points[method].append((measured["bits_per_weight"][0], *measured["exact_match"]))
    for method, found in points.items():
        bits, mean, spread = zip(*sorted(found), strict=True)
        axes.errorbar(bits, mean, spread, marker="o", capsize=3, label=method)
    axes.set(xscale="log", xlabel="bits per weight of the deployed model")
    axes.set(ylabel="exact match, points above LoRA")
    lowest = axes.get_xlim()[0]
    ticks = [t for t in (3, 4, 5, 6, 7, 8, 9, 10, 16, 32) if t > lowest]
    axes.set_xticks(ticks, [str(t) for t in ticks])
    axes.minorticks_off()
    axes.legend()
