"""Speed and memory on this machine, as ratios to a dense model measured in the same run.

    python bench.py --quick                                3 minutes on 2 cores, 6 without AVX-512
    python bench.py --json bench.json --plot growth.png    everything
    python bench.py --device cuda --quick --json gpu.json  other tables, 2.5 minutes on an H200
    python -m pytest tests/test_bench.py

Contenders take turns (A B A B ...), so that a busy machine slows all of them. A table shows the
median time, and over the turns the median, least and greatest ratio to the first line. Weights are
random: time does not depend on them. The floors are what the machine's own matmul rate and copy
bandwidth, measured first, allow. Peers (bitsandbytes and peft, llama-cpp-python) take part where
they are installed. The tables for a GPU are in cli/bench_gpu.py. BENCHMARKS.md has what was
measured.
"""

import copy
import dataclasses
import functools
import json
import pathlib
import random
import tempfile
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

import kernels.matmul
from baselines import NF4Linear
from cli.bench_gpu import on_gpu
from cli.errors import Parser, require_matplotlib, run_command
from cli.files import new_file, write_json, written_whole
from cli.machine import check_device, compute_dtype, default_device
from cli.measure import (
    BITS,
    GROUP_SIZE,
    RANK,
    adapted,
    bitsandbytes_and_peft,
    compare,
    compiled,
    floors,
    machine,
    one_token,
    peak_memory,
    step_floors,
    training_step,
)
from formats.gguf import write_gguf
from kernels.int4 import prepare_inference
from llama import CONFIGS, Llama
from quant import dequantize, min_max_range, nearest_codes, quantize_gptq, quantize_model
from text.tokenizer import train_tokenizer
from text.toy import make_world

# Blocks of LLaMA-7B with almost no output head
WIDE = dataclasses.replace(CONFIGS["7b"], num_hidden_layers=2, vocab_size=512)
NARROW = dataclasses.replace(
    WIDE,
    hidden_size=1024,
    intermediate_size=2816,
    num_attention_heads=8,
    num_key_value_heads=8,
    num_hidden_layers=1,
)
GROWTH = {
    "tokens": (128, 256, 512, 1024, 2048, 4096),
    "layers": (1, 2, 4, 8),
    "rank": (8, 32, 128, 256),
    "group size": (16, 32, 64, 128),
}
QUICK_GROWTH = {
    "tokens": (128, 512, 2048),
    "layers": (1, 4),
    "rank": (8, 256),
    "group size": (16, 128),
}


def llama_cpp_token(quantized: nn.Module) -> Callable | None:
    """`one_token` in llama.cpp, from our Q4_1 file; None if a package is not installed."""
    try:
        import gguf  # noqa: F401, what write_gguf needs
        import llama_cpp
    except ImportError:
        return None
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        texts = make_world().documents(random.Random(0))
        tokenizer = train_tokenizer(texts, folder / "tokenizer.model", 512)
        write_gguf(quantized, tokenizer, folder / "model.gguf")
        threads = torch.get_num_threads()
        llm = llama_cpp.Llama(
            str(folder / "model.gguf"), n_ctx=128, n_threads=threads, use_mmap=False, verbose=False
        )
    for _ in range(64):  # at once they crashed it on a CPU with AMX
        llm.eval([5])

    def run():
        llm.n_tokens = 64
        llm.eval([5])

    return run


def gptq_by_columns(
    w_OI: torch.Tensor,
    hessian_II: torch.Tensor,
    bits: int,
    group_size: int,
    block: int = 128,
    damping: float = 0.01,
) -> Tensor:
    """The reference: Frantar et al. (2023), algorithm 1, column by column in lazy blocks of 128.

    A group's scale and offset are chosen when its first column's turn comes. Returns the quantized
    matrix.
    """
    w = w_OI.clone()
    h = hessian_II + damping * hessian_II.diagonal().mean() * torch.eye(len(hessian_II))
    u = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    for start in range(0, w.shape[1], block):
        end = min(start + block, w.shape[1])
        errors = torch.zeros(len(w), end - start)
        for i in range(start, end):
            if i % group_size == 0:
                scale, offset = min_max_range(w[:, None, i : i + group_size], bits)
            codes = nearest_codes(w[:, i].view(-1, 1, 1), scale, offset, bits).view(-1)
            rounded = scale[:, 0].float() * codes + offset[:, 0]
            errors[:, i - start] = (w[:, i] - rounded) / u[i, i]
            w[:, i + 1 : end] -= torch.outer(errors[:, i - start], u[i, i + 1 : end])
            w[:, i] = rounded
        w[:, end:] -= errors @ u[start:end, end:]
    return w


def gptq(size: int, turns: int, facts: dict) -> list[dict]:
    """GPTQ of a size x size layer against the reference; the rows have the relative output error.

    The floor counts size^3 / 3 operations for the factor and size^3 for passing errors on.
    """
    w = torch.randn(size, size) * 0.02
    x = torch.randn(4 * size, size // 8) @ torch.randn(size // 8, size) / (size // 8) ** 0.5
    x += 0.3 * torch.randn(4 * size, size)
    hessian = x.t() @ x / len(x)
    results = {}  # the last of each

    def reference():
        results["reference, column by column"] = gptq_by_columns(w, hessian, BITS, GROUP_SIZE)

    def ours(search):
        quantized = quantize_gptq(w, hessian, BITS, GROUP_SIZE, search=search)
        results[f"quantize_gptq, search={search}"] = dequantize(quantized)

    contenders = {"reference, column by column": reference}
    for search in (False, True):
        contenders[f"quantize_gptq, search={search}"] = functools.partial(ours, search)
    least = floors(facts, torch.float32, 4 / 3 * size**3, w.nbytes + hessian.nbytes)
    rows = compare(f"GPTQ of a {size} x {size} layer", contenders, turns, "cpu", least)
    for row in rows:
        d = w - results[row["name"]]
        row["error"] = (((d @ hessian) * d).sum() / ((w @ hessian) * w).sum()).item()
        print(f"  {row['name']:44} relative squared output error {row['error']:.5f}")
    return rows


def growth(turns: int, values: dict, facts: dict, dtype: torch.dtype, device: str) -> list[dict]:
    """How a training step's time grows with what `values` names, on narrow blocks."""
    dense = Llama(dataclasses.replace(NARROW, num_hidden_layers=8)).to(device, dtype)

    @functools.cache
    def packed(group_size):
        return quantize_model(copy.deepcopy(dense), BITS, group_size)

    usual = {"tokens": 512, "layers": 1, "rank": RANK, "group size": GROUP_SIZE}
    rows = []
    for name in values:
        for value in values[name]:
            now = {**usual, name: value}
            models = {"dense, LoRA": dense, "packed, QA-LoRA": packed(now["group size"])}
            steps = {}
            for kind, model in models.items():
                blocks = adapted(model, now["layers"], now["rank"])
                step = training_step(blocks, NARROW, now["tokens"], dtype, device)
                steps[kind] = compiled(step) or step
            least = step_floors(facts, dtype, blocks, now["tokens"])  # of the packed ones
            for row in compare(f"step on width 1024, {name} {value}", steps, turns, device, least):
                rows.append({**row, "axis": name, "value": value})
    return rows


def plot(rows: list[dict], path: str | pathlib.Path) -> None:
    """Draws the rows of `growth`, one picture an axis."""
    from matplotlib import pyplot

    pyplot.switch_backend("agg")
    figure, pictures = pyplot.subplots(1, 4, figsize=(14, 3.2), layout="constrained")
    axes = dict.fromkeys(row["axis"] for row in rows)
    for picture, axis in zip(pictures, axes, strict=False):
        for name in dict.fromkeys(row["name"] for row in rows):
            line = [row for row in rows if (row["axis"], row["name"]) == (axis, name)]
            values, times = [row["value"] for row in line], [row["milliseconds"] for row in line]
            picture.plot(values, times, "o-", label=name)
        picture.set(xlabel=axis, ylabel="ms a step", xlim=(0, None), ylim=(0, None))
    pictures[0].legend()
    with written_whole(path) as beside:
        figure.savefig(beside, format="png", dpi=110)


def inference(
    dense: nn.Module, quantized: nn.Module, facts: dict, turns: int, dtype: torch.dtype, device: str
) -> list[dict]:
    """Decoding and prefill, time per block."""
    ready, low = prepare_inference(copy.deepcopy(quantized)), copy.deepcopy(dense).bfloat16()
    layers = len(dense.model.layers)
    weights = sum(p.numel() for p in dense.model.layers[0].parameters())
    held = sum(b.nbytes for b in ready.model.layers[0].buffers())
    least = floors(facts, dtype, 2 * weights, held)
    ours = f"ours, 4 bits, {8 * held / weights:.2f} bits held a weight"
    contenders = {
        f"dense {dtype}": one_token(dense, dtype, device),
        "dense torch.bfloat16": one_token(low, torch.bfloat16, device),  # perhaps the same
        ours: one_token(ready, dtype, device),
        "llama.cpp, Q4_1": llama_cpp_token(quantized),
    }
    what = "decoding one token, per block"
    rows = compare(what, contenders, 10 * turns, device, least, parts=layers)
    tokens = torch.zeros(1, 256, dtype=torch.long, device=device)

    def prefill(model):
        return torch.inference_mode()(lambda: model(tokens))

    contenders = {
        f"dense {dtype}": prefill(dense),
        "ours, packed": compiled(prefill(quantized)),
        "ours, packed, not compiled": prefill(quantized),
        "ours, prepared for decoding": prefill(ready),
    }
    least = floors(facts, dtype, 2 * weights * 256, held)
    what = "prefill of 256 tokens, per block"
    return rows + compare(what, contenders, turns, device, least, parts=layers)


def training(
    dense: nn.Module,
    quantized: nn.Module,
    facts: dict,
    counts: Sequence[int],
    turns: int,
    dtype: torch.dtype,
    device: str,
) -> list[dict]:
    """Steps on one block, and their memory."""
    weights = sum(p.numel() for p in dense.model.layers[0].parameters())

    def in_nf4(layer):
        return NF4Linear.from_weight(layer.weight.detach())

    ours = "ours: 4 bits, QA-LoRA"
    blocks = {
        f"dense {dtype}, LoRA": adapted(dense),
        ours: adapted(quantized),
        "ours: NF4, QLoRA": adapted(dense, replace=in_nf4),
        "bitsandbytes and peft: NF4, QLoRA": bitsandbytes_and_peft(dense, device),
    }
    held = 8 * sum(b.nbytes for b in blocks[ours].buffers()) / weights
    print(f"\n{ours}: {held:.3f} bits held a weight while training")
    rows = [{"what": "bits held a weight while training", "name": ours, "bits": held}]
    for tokens in counts:
        least = step_floors(facts, dtype, blocks[ours], tokens)
        steps = {}
        for name, b in blocks.items():
            steps[name] = b and training_step(b, dense.config, tokens, dtype, device)
        plain = steps[ours]
        steps[ours], steps[f"{ours}, not compiled"] = compiled(plain), plain
        what = f"training step, one block of 7B, {tokens} tokens"
        for row in compare(what, steps, turns, device, least):
            row["peak bytes"] = peak = peak_memory(steps[row["name"]], device)
            if peak is not None:
                print(f"  {row['name']:44} {peak / 2**20:9.0f} MiB more at its peak")
            rows.append(row)
    return rows


def main() -> None:
    """Runs the command line."""
    parser = Parser(prog="bench.py", description=__doc__)
    add = parser.add_argument
    add("--quick", action="store_true", help="fewer turns and tokens, a smaller layer for GPTQ")
    add("--json", type=new_file, help="write all rows to this file")
    add("--plot", type=new_file, help="draw how cost grows (PNG, needs matplotlib)")
    add("--device", choices=["cpu", "cuda"], default=default_device())
    args = parser.parse_args()
    if args.plot:
        require_matplotlib()
    check_device(args.device)
    torch.manual_seed(0)
    kernels.matmul.USE_COMPILER = False
    turns, dtype = 3 if args.quick else 7, compute_dtype(torch.bfloat16, args.device)
    facts = machine(args.device)
    print(json.dumps(facts, indent=1), flush=True)

    def write(rows):
        if args.json:
            write_json({"machine": facts, "rows": rows}, args.json)

    if args.device == "cuda":
        on_gpu(facts, args.quick, write)
        return
    dense = Llama(WIDE).to(args.device, dtype)
    quantized = quantize_model(copy.deepcopy(dense), BITS, GROUP_SIZE)
    rows = inference(dense, quantized, facts, turns, dtype, args.device)
    tokens, size = ((512,), 2048) if args.quick else ((512, 2048), 4096)
    rows += training(dense, quantized, facts, tokens, turns, dtype, args.device)
    rows += gptq(size, turns, facts)
    turns, values = (2, QUICK_GROWTH) if args.quick else (5, GROWTH)
    rows += growth(turns, values, facts, dtype, args.device)
    if args.plot:
        plot([row for row in rows if "axis" in row], args.plot)
    write(rows)


if __name__ == "__main__":
    run_command(main)
