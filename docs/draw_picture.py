"""Draws docs/qalora.svg, the picture at the top of the README.

    python docs/draw_picture.py

The weights in the upper half are quantized by quant.py, so the codes, scales and offsets shown are
what it stores. (In groups of 4 inputs, to fit on a page; the default is 32.) The picture has a
light and a dark set of colours; a viewer takes the one it prefers. Blue is frozen and quantized,
orange is trained, grey is float. What is trained also has a thick border, so colour is never all
that tells.
"""

import pathlib
import sys
from collections.abc import Iterator
from html import escape

import torch

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from quant import Quantized, quantize_rtn  # noqa: E402, the path comes first

WIDTH, HEIGHT = 920, 700
WEIGHTS = [0.12, 0.51, -0.09, 0.26, -0.25, 0.06, 0.20, -0.10]  # one row of W, in two groups
GROUP_SIZE = 4
LORA_UPDATE = [0.5, -0.3, 0.8, 0.2, -0.6, 0.4, -0.2, 0.7]  # heights of the bars, for show
QALORA_UPDATE = [0.6] * 4 + [-0.4] * 4

STYLE = """
    text { font-family: system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif;
           font-size: 15px; fill: var(--ink); }
    .title { font-size: 17px; font-weight: 600; }
    .small { font-size: 13.5px; fill: var(--faint); }
    .middle { text-anchor: middle; }
    .right { text-anchor: end; }
    .number { font-variant-numeric: tabular-nums; }
    .page { fill: var(--page); }
    .line { stroke: var(--ink); stroke-width: 1.4; fill: none; }
    .rule { stroke: var(--rule); stroke-width: 1; }
    .axis { stroke: var(--faint); stroke-width: 1; }
    .head { fill: var(--ink); }
    .sum { fill: var(--page); stroke: var(--ink); stroke-width: 1.4; }
    .float { fill: var(--float); stroke: var(--faint); stroke-width: 1.2; }
    .frozen { fill: var(--frozen); stroke: var(--blue); stroke-width: 1.2; }
    .trained { fill: var(--trained); stroke: var(--orange); stroke-width: 3; }
    svg { --page: #ffffff; --ink: #1f2328; --faint: #59636e; --rule: #d1d9e0; --float: #eff2f5;
          --frozen: #d6ebf7; --blue: #0072b2; --trained: #fde9cf; --orange: #d55e00; }
    @media (prefers-color-scheme: dark) {
      svg { --page: #0d1117; --ink: #f0f6fc; --faint: #9aa4af; --rule: #3d444d; --float: #262c36;
            --frozen: #0f3350; --blue: #56b4e9; --trained: #4a2a08; --orange: #f0a030; }
    }
"""


def text(x: float, y: float, words: str, kind: str = "") -> str:
    """Words whose baseline is at y."""
    return f'<text x="{x:g}" y="{y:g}" class="{kind}">{escape(words)}</text>'


def box(x: float, y: float, width: float, height: float, words: str, kind: str) -> str:
    """A box with words in its middle; kind is float, frozen or trained."""
    shape = f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="4"'
    label = text(x + width / 2, y + height / 2 + 5, words, "middle number")
    return f'{shape} class="{kind}"/>{label}'


def arrow(*points: tuple[float, float]) -> str:
    """A line through the points, which ends in an arrowhead."""
    (x0, y0), (x, y) = points[-2:]
    path = " ".join(f"{px:g},{py:g}" for px, py in points)
    if x != x0:
        back = -7 if x > x0 else 7
        head = f"{x:g},{y:g} {x + back:g},{y - 4:g} {x + back:g},{y + 4:g}"
    else:
        back = -7 if y > y0 else 7
        head = f"{x:g},{y:g} {x - 4:g},{y + back:g} {x + 4:g},{y + back:g}"
    return f'<polyline points="{path}" class="line"/><polygon points="{head}" class="head"/>'


def plus(x: float, y: float) -> str:
    """The sign of a sum."""
    circle = f'<circle cx="{x:g}" cy="{y:g}" r="10" class="sum"/>'
    return circle + text(x, y + 5.5, "+", "middle")


def rule(y: float) -> str:
    """A thin line across the picture."""
    return f'<line x1="24" x2="{WIDTH - 24}" y1="{y:g}" y2="{y:g}" class="rule"/>'


# ---- the upper half: what is stored


def signed(value: float) -> str:
    """Two decimals, with a true minus sign."""
    return f"{value:.2f}".replace("-", "\N{MINUS SIGN}")


def stored(quantized: Quantized) -> Iterator[str]:
    """One row of W, and the codes, scales and offsets that stand for it."""
    left, cell, gap = 200, 66, 24
    heading = "What is stored: one row of a 4-bit weight matrix, in groups of inputs"
    yield text(24, 38, heading, "title")
    labels = [
        ("weights", ""),
        ("codes", "4 bits each"),
        ("scale", "one a group"),
        ("offset", "one a group"),
    ]
    for k, (name, cost) in enumerate(labels):
        yield text(24, 83 + 42 * k, name)
        yield text(left - 16, 83 + 42 * k, cost, "small right")
    for i, weight in enumerate(WEIGHTS):
        group = i // GROUP_SIZE
        x = left + i * cell + group * gap
        yield box(x, 62, cell - 4, 32, signed(weight), "float")
        yield box(x, 104, cell - 4, 32, str(quantized.codes[0, i].item()), "frozen")
        if i % GROUP_SIZE == 0:
            width = GROUP_SIZE * cell - 4
            scale, offset = quantized.scale[0, group].item(), quantized.offset[0, group].item()
            yield box(x, 146, width, 32, signed(scale), "frozen")
            yield box(x, 188, width, 32, signed(offset), "trained")
    first = f"{signed(quantized.scale[0, 0].item())} · {quantized.codes[0, 0].item()}"
    first += f" + ({signed(quantized.offset[0, 0].item())})"
    example = f"here: {signed(WEIGHTS[0])} ≈ {first}"
    yield text(left, 252, f"weight ≈ scale · code + offset,  {example}")


# ---- the lower half: three methods


def flow(y: float, upper: list, lower: list) -> Iterator[str]:
    """x through two branches to a sum: a list of (width, words, kind) for each branch."""
    left, end = 138, 418
    top, bottom = y + 16, y + 64
    yield text(left - 18, top + 5, "x", "middle")
    for boxes, middle in ((upper, top), (lower, bottom)):
        x, before = left + 22, (left - 6, top)
        for width, words, kind in boxes:
            start = before if before[1] == middle else (left + 4, top)
            points = [start, (x, middle)]
            if start[1] != middle:
                points = [start, (start[0], middle), (x, middle)]
            yield arrow(*points)
            yield box(x, middle - 16, width, 32, words, kind)
            before = (x + width, middle)
            x += width + 22
        if boxes is upper:
            yield arrow(before, (end - 10, top))
        else:
            yield arrow(before, (end, bottom), (end, top + 10))
    yield plus(end, top)
    yield arrow((end + 10, top), (end + 32, top))
    yield text(end + 43, top + 5, "y", "middle")


def bars(y: float, heights: list[float], caption: str) -> Iterator[str]:
    """What the adapter adds to each weight of the row: a bar for a weight."""
    left, step, gap, middle = 494, 15, 10, y + 32
    for i, height in enumerate(heights):
        x = left + i * step + (i // GROUP_SIZE) * gap
        top = middle - max(0, 28 * height)
        size = f'width="{step - 4}" height="{abs(28 * height):g}"'
        yield f'<rect x="{x:g}" y="{top:g}" {size} class="trained" style="stroke-width:1.5"/>'
    end = left + len(heights) * step + gap
    yield f'<line x1="{left - 4}" x2="{end}" y1="{middle}" y2="{middle}" class="axis"/>'
    yield text((left + end) / 2, y + 84, caption, "small middle")


def methods() -> Iterator[str]:
    """LoRA, QLoRA and QA-LoRA: the layer while it is trained, its update, and the layer after."""
    yield rule(274)
    yield text(24, 306, "Three ways to fine-tune it", "title")
    legend = ((330, "float"), (468, "frozen"), (628, "trained"))
    names = {"float": "float", "frozen": "quantized", "trained": "trained"}
    for x, kind in legend:
        yield f'<rect x="{x + 164}" y="292" width="22" height="16" rx="3" class="{kind}"/>'
        yield text(x + 193, 305.5, names[kind], "small")
    after = 676
    heads = {112: "while training", 490: "added to each weight", after: "after merging"}
    for x, head in heads.items():
        yield text(x, 344, head, "small")
    y = 362
    lora = [(46, "A", "trained"), (46, "B", "trained"), (46, "· s", "float")]
    yield text(24, y + 21, "LoRA", "title")
    yield from flow(y, [(182, "W", "float")], lora)
    yield from bars(y, LORA_UPDATE, "each one differently")
    yield box(after, y, 220, 32, "W + s·BA", "float")
    yield text(after, y + 56, "float: no bits are saved", "small")
    y += 112
    yield rule(y - 14)
    yield text(24, y + 21, "QLoRA", "title")
    yield from flow(y, [(182, "W in 4 bits (NF4)", "frozen")], lora)
    yield from bars(y, LORA_UPDATE, "each one differently")
    yield box(after, y, 220, 32, "W + s·BA", "float")
    yield text(after, y + 56, "float again; quantizing it", "small")
    yield text(after, y + 74, "once more loses accuracy", "small")
    y += 112
    yield rule(y - 14)
    yield text(24, y + 21, "QA-LoRA", "title")
    pooled = [(62, "pool", "float"), (144, "offset + s·BA", "trained")]
    yield from flow(y, [(228, "scale · codes", "frozen")], pooled)
    yield from bars(y, QALORA_UPDATE, "the same within a group")
    yield box(after, y, 106, 32, "scale · codes", "frozen")
    yield box(after + 114, y, 106, 32, "new offset", "frozen")
    yield text(after, y + 56, "new offset = offset + s·BA:", "small")
    yield text(after, y + 74, "still 4 bits, the same output", "small")


def picture() -> str:
    """The whole SVG."""
    quantized = quantize_rtn(torch.tensor([WEIGHTS]), bits=4, group_size=GROUP_SIZE)
    title = "A row as codes, scales and offsets; LoRA, QLoRA and QA-LoRA, before and after merging"
    shapes = [*stored(quantized), *methods()]
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'width="{WIDTH}" height="{HEIGHT}" role="img" aria-label="{title}">',
        f"<title>{title}</title>",
        f"<style>{STYLE}</style>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" rx="8" class="page"/>',
        *shapes,
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    path = ROOT / "docs" / "qalora.svg"
    path.write_text(picture(), encoding="utf-8")
    print(f"wrote {path}")
