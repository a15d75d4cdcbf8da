"""Speed and memory on this machine, as ratios to a dense model and to other quantized ones measured in the same run.

    python bench.py --quick                                    3 minutes on 2 cores with AVX-512, 6 without
    python bench.py --json bench.json --plot growth.png        everything
    python bench.py --device cuda --quick --json gpu.json      other tables, 2.5 minutes on an H200
    python -m pytest tests/test_bench.py

Contenders take turns (A B A B ...), so that a busy machine slows all of them; a table shows the median time, and over
the turns the median, least and largest ratio to the first line. Weights are random: time does not depend on them.
The tables for a GPU, on blocks and whole models of 7B, are those of `on_gpu`; without --quick GPTQ is of all 32 blocks.
The floors beside are what the machine's own matmul rate and copy bandwidth, measured first, allow. Peers (bitsandbytes
and peft, llama-cpp-python) take part where they are installed. What was measured is written up in BENCHMARKS.md.
"""

import copy
import ctypes
import dataclasses
import functools
import gc
import importlib.util
import itertools
import json
import pathlib
import platform
import random
import statistics
import tempfile
import time
import traceback

import numpy as np
import torch
from torch.utils.checkpoint import checkpoint

import quant
import train
from cli import Parser, new_file, run_command, written_whole
from data import Example, make_world, train_tokenizer
from export import write_gguf
from int4 import prepare_inference
from llama import CONFIGS, LINEARS, Cache, Llama, check_device, compute_dtype, fill, linears, rotary_table
from nf4 import NF4Linear
from qalora import add_adapters
from quant import dequantize, min_max_range, nearest_codes, quantize_gptq, quantize_model

RANK, ALPHA, BITS, GROUP_SIZE = 64, 16, 4, 32
WIDE = dataclasses.replace(CONFIGS["7b"], num_hidden_layers=2, vocab_size=512)  # blocks of LLaMA-7B, almost no head
NARROW = dataclasses.replace(WIDE, hidden_size=1024, intermediate_size=2816, num_attention_heads=8,
                             num_key_value_heads=8, num_hidden_layers=1)
GROWTH = {"tokens": (128, 256, 512, 1024, 2048, 4096), "layers": (1, 2, 4, 8), "rank": (8, 32, 128, 256),
          "group size": (16, 32, 64, 128)}
QUICK_GROWTH = {"tokens": (128, 512, 2048), "layers": (1, 4), "rank": (8, 256), "group size": (16, 128)}


# ---- measuring

def take_turns(contenders, turns, device):
    """{name: seconds of each turn} for {name: function}, after one turn that does not count."""
    seconds = {name: [] for name in contenders}
    for turn in range(turns + 1):
        for name, run in contenders.items():
            taken = timed(run, device)
            if turn:
                seconds[name].append(taken)
    return seconds


def timed(run, device):
    """Seconds that a call of `run` takes, on a GPU the mean of three by its own clock."""
    if device == "cpu":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    return gpu_seconds(run, 3)


def gpu_seconds(run, calls=1):
    """Seconds between a GPU's beginning and its end with `calls` calls of `run`, by the call."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(calls):
        run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3 / calls


def floors(facts, dtype, operations, moved):
    """Milliseconds that so many operations, and so many bytes read, take at least on a machine with such `facts`."""
    return {"arithmetic": 1e3 * operations / facts["matmul"][str(dtype)], "memory": 1e3 * moved / facts["copy"]}


def compare(what, contenders, turns, device, least, parts=1):
    """Prints a table of {name: function or None}, None standing for a peer not installed; returns its rows.

    parts: how many equal parts (layers, tokens) a call consists of; times and `least`, the floors, are given per part.
    """
    print(f"\n{what} (floors: arithmetic {least['arithmetic']:.3g} ms, memory {least['memory']:.3g} ms)", flush=True)
    seconds = take_turns({name: run for name, run in contenders.items() if run}, turns, device)
    first, rows = next(iter(seconds.values())), []
    for name in contenders:
        if name not in seconds:
            print(f"  {name:44} left out: what it needs is not installed")
            continue
        ratios = [a / b for a, b in zip(seconds[name], first)]
        row = {"what": what, "name": name, "milliseconds": 1e3 * statistics.median(seconds[name]) / parts,
               "floors": least,
               "ratio": statistics.median(ratios), "from": min(ratios), "to": max(ratios)}
        print("  {name:44} {milliseconds:9.4g} ms   {ratio:5.2f} x ({from:.2f} to {to:.2f})".format(**row), flush=True)
        rows.append(row)
    return rows


def machine(device):
    """This machine's name, matmul rates (operations a second, by dtype) and bandwidth (bytes read and written a second)."""
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    if pathlib.Path("/proc/cpuinfo").exists() and device == "cpu":
        facts = dict(map(str.strip, line.split(":", 1)) for line in open("/proc/cpuinfo") if ":" in line)
        flags = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in facts.get("flags", "")]
        name = f"{facts.get('model name', name)} ({', '.join(flags)})"
    rates = {}
    for dtype in (torch.float32, torch.bfloat16):
        rows, size = (512, 4096) if device == "cpu" else (8192, 8192)
        x, w = torch.randn(rows, size, dtype=dtype, device=device), torch.randn(size, size, dtype=dtype, device=device)
        seconds = take_turns({"matmul": lambda: x @ w.t()}, 5, device)["matmul"]
        rates[str(dtype)] = 2 * rows * size ** 2 / statistics.median(seconds)
    size = 2 ** 28 if device == "cpu" else 2 ** 32  # far more than caches hold
    source, target = torch.empty(2, size, dtype=torch.uint8, device=device).fill_(1)
    seconds = take_turns({"copy": lambda: target.copy_(source)}, 5, device)["copy"]
    return {"device": name, "threads": torch.get_num_threads(), "torch": torch.__version__, "matmul": rates,
            "copy": 2 * source.nbytes / statistics.median(seconds)}


def peak_memory(run, device):
    """Bytes that `run()` needs at its peak, beyond what is held before; None where the system does not tell."""
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    if platform.system() != "Linux":
        return None
    lines = lambda: pathlib.Path("/proc/self/status").read_text().splitlines()
    status = lambda key: next(int(line.split()[1]) for line in lines() if line.startswith(key)) * 1024
    ctypes.CDLL(None).malloc_trim(0)  # what was freed goes back to the system, so that it counts when used again
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = status("VmRSS")
    run()
    return status("VmHWM") - before


@functools.cache
def can_compile():
    """Whether torch.compile works here, which takes a C++ compiler."""
    quant.USE_COMPILER = True
    quant.dense(torch.zeros(1, 32, dtype=torch.uint8), torch.ones(1, 2), torch.zeros(1, 2), 4, 64, torch.float32)
    works, quant.USE_COMPILER = quant.USE_COMPILER, False
    return works


def compiled(run):
    """`run` with what a long run on a CPU comes to use (see `quant.dense`); all others here take the plain path.

    None without a compiler.
    """
    if not can_compile():
        return None

    def now():
        quant.USE_COMPILER = True
        run()
        quant.USE_COMPILER = False
    return now


# ---- what is measured

def training_step(blocks, config, tokens, dtype, device):
    """A function that goes forward and backward through `blocks` and updates their adapters."""
    x = torch.randn(1, tokens, config.hidden_size, dtype=dtype, device=device).requires_grad_()
    rotary, grad = rotary_table(config, torch.arange(tokens, device=device)), torch.randn_like(x)
    optimizer = torch.optim.AdamW([p for p in blocks.parameters() if p.requires_grad])

    def step():
        y = x
        for block in blocks:
            y = block(y, rotary)
        y.backward(grad)
        optimizer.step()
        optimizer.zero_grad()
        x.grad = None
    return step


def step_floors(facts, dtype, blocks, tokens):
    """The floors of a training step on packed blocks: each weight multiplies forward and backward, and is read twice."""
    layers = [layer.base for _, layer in linears(blocks)]
    weights = sum(layer.in_features * layer.out_features for layer in layers)
    return floors(facts, dtype, 4 * weights * tokens, 2 * sum(b.nbytes for layer in layers for b in layer.buffers()))


def adapted(model, layers=1, rank=RANK, replace=None):
    """A copy of the model's first blocks, each linear put through `replace`, with adapters on all of them."""
    blocks = copy.deepcopy(model.model.layers[:layers])
    for path, layer in linears(blocks) if replace else ():
        blocks.set_submodule(path, replace(layer))
    return add_adapters(blocks, rank, ALPHA)


def bitsandbytes_and_peft(model, device, layers=1):
    """The adapter library's LoRA over bitsandbytes' NF4, on the model's first blocks; None if one is not installed."""
    try:
        import bitsandbytes
        import peft
    except ImportError:
        return None

    def nf4(layer):
        new = bitsandbytes.nn.Linear4bit(layer.in_features, layer.out_features, bias=False, quant_type="nf4",
                                         compute_dtype=layer.weight.dtype)
        new.weight = bitsandbytes.nn.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4")
        return new.to(device)

    blocks = copy.deepcopy(model.model.layers[:layers]).requires_grad_(False)
    for path, layer in linears(blocks):
        blocks.set_submodule(path, nf4(layer))
    settings = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(LINEARS))
    return peft.inject_adapter_in_model(settings, blocks)


def one_token(model, dtype, device):
    """A function that decodes one token after 64 others."""
    cache, token = Cache(model.config, 1, 65, dtype, device), torch.full((1, 1), 5, device=device)
    cache.keys.normal_(), cache.values.normal_()

    @torch.inference_mode()
    def run():
        cache.length = 64
        model(token, cache)
    return run


def llama_cpp_token(quantized):
    """The same in llama.cpp, from our Q4_1 file; None if llama-cpp-python or gguf is not installed."""
    try:
        import gguf  # noqa: F401, what write_gguf needs
        import llama_cpp
    except ImportError:
        return None
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        tokenizer = train_tokenizer(make_world().documents(random.Random(0)), folder / "tokenizer.model", 512)
        write_gguf(quantized, tokenizer, folder / "model.gguf")
        threads = torch.get_num_threads()
        llm = llama_cpp.Llama(str(folder / "model.gguf"), n_ctx=128, n_threads=threads, use_mmap=False, verbose=False)
    for _ in range(64):  # at once they crashed it on a CPU with AMX
        llm.eval([5])

    def run():
        llm.n_tokens = 64
        llm.eval([5])
    return run


def gptq_by_columns(w_OI, hessian_II, bits, group_size, block=128, damping=0.01):
    """The reference: Frantar et al. (2023), algorithm 1, one column after another in lazy blocks of 128; (scale,
    offset) of a group are taken when its first column's turn comes. Returns the quantized matrix."""
    w = w_OI.clone()
    h = hessian_II + damping * hessian_II.diagonal().mean() * torch.eye(len(hessian_II))
    u = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    for start in range(0, w.shape[1], block):
        end = min(start + block, w.shape[1])
        errors = torch.zeros(len(w), end - start)
        for i in range(start, end):
            if i % group_size == 0:
                scale, offset = min_max_range(w[:, None, i:i + group_size], bits)
            codes = nearest_codes(w[:, i].view(-1, 1, 1), scale, offset, bits).view(-1)
            rounded = scale[:, 0].float() * codes + offset[:, 0]
            errors[:, i - start] = (w[:, i] - rounded) / u[i, i]
            w[:, i + 1:end] -= torch.outer(errors[:, i - start], u[i, i + 1:end])
            w[:, i] = rounded
        w[:, end:] -= errors @ u[start:end, end:]
    return w


def gptq(size, turns, facts):
    """GPTQ of a size x size layer against the reference; the rows also hold the relative output error.

    Of its arithmetic the floor counts a third of size³ operations for the factor, and size³ for the errors' way on.
    """
    w = torch.randn(size, size) * 0.02
    x = torch.randn(4 * size, size // 8) @ torch.randn(size // 8, size) / (size // 8) ** 0.5
    x += 0.3 * torch.randn(4 * size, size)
    hessian = x.t() @ x / len(x)
    contenders = {"reference, column by column": lambda: gptq_by_columns(w, hessian, BITS, GROUP_SIZE)}
    for search in (False, True):
        contenders[f"quantize_gptq, search={search}"] = lambda search=search: dequantize(
            quantize_gptq(w, hessian, BITS, GROUP_SIZE, search=search))
    results = {}  # the last of each
    keep = lambda name, run: lambda: results.update({name: run()})
    contenders = {name: keep(name, run) for name, run in contenders.items()}
    least = floors(facts, torch.float32, 4 / 3 * size ** 3, w.nbytes + hessian.nbytes)
    rows = compare(f"GPTQ of a {size} x {size} layer", contenders, turns, "cpu", least)
    for row in rows:
        d = w - results[row["name"]]
        row["error"] = (((d @ hessian) * d).sum() / ((w @ hessian) * w).sum()).item()
        print(f"  {row['name']:44} relative squared output error {row['error']:.5f}")
    return rows


def growth(turns, values, facts, dtype, device):
    """How a training step's time grows with what `values` names, on narrow blocks; a list of rows."""
    dense = Llama(dataclasses.replace(NARROW, num_hidden_layers=8)).to(device, dtype)
    model_of = functools.cache(lambda group_size: quantize_model(copy.deepcopy(dense), BITS, group_size))
    usual = {"tokens": 512, "layers": 1, "rank": RANK, "group size": GROUP_SIZE}
    rows = []
    for name in values:
        for value in values[name]:
            now = {**usual, name: value}
            models = {"dense, LoRA": dense, "packed, QA-LoRA": model_of(now["group size"])}
            blocks = {kind: adapted(model, now["layers"], now["rank"]) for kind, model in models.items()}
            steps = {kind: training_step(b, NARROW, now["tokens"], dtype, device) for kind, b in blocks.items()}
            steps = {kind: compiled(step) or step for kind, step in steps.items()}
            least = step_floors(facts, dtype, blocks["packed, QA-LoRA"], now["tokens"])
            for row in compare(f"step on width 1024, {name} {value}", steps, turns, device, least):
                rows.append({**row, "axis": name, "value": value})
    return rows


def plot(rows, path):
    """Draws the rows of `growth`, one picture an axis."""
    from matplotlib import pyplot
    pyplot.switch_backend("agg")
    figure, pictures = pyplot.subplots(1, 4, figsize=(14, 3.2), layout="constrained")
    for picture, axis in zip(pictures, dict.fromkeys(row["axis"] for row in rows)):
        for name in dict.fromkeys(row["name"] for row in rows):
            line = [row for row in rows if (row["axis"], row["name"]) == (axis, name)]
            picture.plot([row["value"] for row in line], [row["milliseconds"] for row in line], "o-", label=name)
        picture.set(xlabel=axis, ylabel="ms a step", xlim=(0, None), ylim=(0, None))
    pictures[0].legend()
    with written_whole(path) as beside:
        figure.savefig(beside, format="png", dpi=110)


def inference(dense, quantized, facts, turns, dtype, device):
    """Decoding and prefill, time per block."""
    ready, low = prepare_inference(copy.deepcopy(quantized)), copy.deepcopy(dense).bfloat16()
    layers, weights = len(dense.model.layers), sum(p.numel() for p in dense.model.layers[0].parameters())
    held = sum(b.nbytes for b in ready.model.layers[0].buffers())
    rows = compare("decoding one token, per block", {
        f"dense {dtype}": one_token(dense, dtype, device),
        "dense torch.bfloat16": one_token(low, torch.bfloat16, device),  # the same where bfloat16 is native
        f"ours, 4 bits, {8 * held / weights:.2f} bits held a weight": one_token(ready, dtype, device),
        "llama.cpp, Q4_1": llama_cpp_token(quantized) if device == "cpu" else None,
    }, 10 * turns, device, floors(facts, dtype, 2 * weights, held), parts=layers)
    tokens = torch.zeros(1, 256, dtype=torch.long, device=device)
    prefill = lambda model: torch.inference_mode()(lambda: model(tokens))
    return rows + compare("prefill of 256 tokens, per block", {
        f"dense {dtype}": prefill(dense), "ours, packed": compiled(prefill(quantized)),
        "ours, packed, not compiled": prefill(quantized), "ours, prepared for decoding": prefill(ready),
    }, turns, device, floors(facts, dtype, 2 * weights * 256, held), parts=layers)


def training(dense, quantized, facts, counts, turns, dtype, device):
    """Steps on one block, and their memory."""
    weights = sum(p.numel() for p in dense.model.layers[0].parameters())
    blocks = {f"dense {dtype}, LoRA": adapted(dense), "ours: 4 bits, QA-LoRA": adapted(quantized),
              "ours: NF4, QLoRA": adapted(dense, replace=lambda layer: NF4Linear.from_weight(layer.weight.detach())),
              "bitsandbytes and peft: NF4, QLoRA": bitsandbytes_and_peft(dense, device)}
    held = 8 * sum(b.nbytes for b in blocks["ours: 4 bits, QA-LoRA"].buffers()) / weights
    print(f"\nours: 4 bits, QA-LoRA: {held:.3f} bits held a weight while training")
    rows = [{"what": "bits held a weight while training", "name": "ours: 4 bits, QA-LoRA", "bits": held}]
    for tokens in counts:
        least = step_floors(facts, dtype, blocks["ours: 4 bits, QA-LoRA"], tokens)
        steps = {name: b and training_step(b, dense.config, tokens, dtype, device) for name, b in blocks.items()}
        plain = steps["ours: 4 bits, QA-LoRA"]
        steps |= {"ours: 4 bits, QA-LoRA": compiled(plain), "ours: 4 bits, QA-LoRA, not compiled": plain}
        for row in compare(f"training step, one block of 7B, {tokens} tokens", steps, turns, device, least):
            row["peak bytes"] = peak = peak_memory(steps[row["name"]], device)
            print(f"  {row['name']:44} {peak / 2 ** 20:9.0f} MiB more at its peak" if peak is not None else "")
            rows.append(row)
    return rows


# ---- on a GPU

def once(run, device):
    """Seconds of a single call."""
    return gpu_seconds(run) if device == "cuda" else timed(run, device)


def most_held(device, anew=False):
    """The most bytes that tensors have held on the GPU; `anew`: since now, which is what they hold."""
    if device == "cpu":
        return None
    if anew:
        torch.cuda.reset_peak_memory_stats()
    return torch.cuda.max_memory_allocated()


def random_weights(config, dtype, device):
    """{name: function that draws that parameter of a LLaMA}, as `open_weights` has for one on the disk."""
    def draw(shape):
        if len(shape) == 1:
            return torch.ones(shape, dtype=dtype, device=device)
        return torch.randn(shape, dtype=dtype, device=device).mul_(0.02)

    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in Llama(config).named_parameters()}
    return {name: functools.partial(draw, shape) for name, shape in shapes.items()}


def random_model(config, dtype, device, calibration=None, packed=True):
    """A LLaMA of random weights made block by block: packed (by GPTQ with `calibration` tokens), else dense."""
    weights = random_weights(config, dtype, device)
    with torch.device("meta"):
        model = Llama(config)
    if not packed:
        return fill(model, weights, device=device).requires_grad_(False)
    for name in ("model.embed_tokens", "model.norm", "lm_head"):
        fill(model.get_submodule(name), weights, f"{name}.", device=device)
    return quantize_model(model, BITS, GROUP_SIZE, calibration, weights).requires_grad_(False)


def exactness(device):
    """Largest errors of what a packed layer computes, as shares of the largest exact value; float64 is exact."""
    rows = []
    shapes = ((1, 96, 256, 32), (8, 100, 704, 64), (40, 100, 704, 64), (9, 33, 1056, 33))
    for bits, dtype, (tokens, out, inputs, size) in itertools.product(
            (2, 3, 4), (torch.bfloat16, torch.float16), shapes):
        q = quant.quantize_rtn(torch.randn(out, inputs, device=device), bits, size)
        packed = quant.pack(q.codes, bits)
        x = torch.randn(tokens, inputs, device=device).to(dtype)
        leaves = x.clone().requires_grad_(), q.offset.clone().requires_grad_()
        y = quant.quant_matmul(leaves[0], packed, q.scale, leaves[1], bits)
        gy = torch.randn_like(y)
        gx, go = torch.autograd.grad(y, leaves, gy)
        w = dequantize(q, torch.float64)
        pooled = x.double().unflatten(1, (-1, size)).sum(-1)
        exact = {"y": (y, x.double() @ w.t()), "x's gradient": (gx, gy.double() @ w),
                 "offset's gradient": (go, gy.double().t() @ pooled)}
        errors = {name: ((found - true).abs().max() / true.abs().max()).item()
                  for name, (found, true) in exact.items()}
        layer = f"{bits} bits, {dtype}, {tokens} x {inputs} -> {out}"
        rows.append({"what": "exactness", "name": layer, **errors})
    for name in errors:
        worst = {kind: max(row[name] for row in rows if kind in row["name"])
                 for kind in ("torch.bfloat16", "torch.float16")}
        print(f"{name}: largest error over the largest value: {worst}", flush=True)
    return rows


def passes(blocks, config, batch, tokens, dtype, device, autocast=False):
    """A function that goes forward and backward through `blocks` as train.py does, recomputing each block."""
    x = torch.randn(batch, tokens, config.hidden_size, dtype=dtype, device=device).requires_grad_()
    rotary, grad = rotary_table(config, torch.arange(tokens, device=device)), torch.randn_like(x)
    trained = [p for p in blocks.parameters() if p.requires_grad]

    def run():
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            y = x
            for block in blocks:
                y = checkpoint(block, y, rotary, use_reentrant=False, preserve_rng_state=False)
        y.backward(grad)
        for p in (x, *trained):
            p.grad = None
    return run


def pass_ratios(config, facts, sizes, turns, dtype, device):
    """Forward and backward through blocks of 7B, in turns; and the profiles of two contenders."""
    layers = config.num_hidden_layers
    dense, packed = (random_model(config, dtype, device, packed=packed) for packed in (False, True))
    blocks = {
        "dense, LoRA in bfloat16": adapted(dense, layers).to(dtype),  # the fastest a LoRA can be here
        "dense, LoRA in float32": adapted(dense, layers),
        "ours: 4 bits, QA-LoRA": adapted(packed, layers),
    }
    library = bitsandbytes_and_peft(dense, device, layers)
    rows = []
    for batch, tokens in sizes:
        least = step_floors(facts, dtype, blocks["ours: 4 bits, QA-LoRA"], batch * tokens)
        least = {name: 1.5 * value for name, value in least.items()}  # and the recomputation
        runs = {name: passes(b, config, batch, tokens, dtype, device) for name, b in blocks.items()}
        for autocast in (False, True):
            name = f"bitsandbytes and peft: QLoRA{', autocast' if autocast else ''}"
            runs[name] = library and passes(library, config, batch, tokens, dtype, device, autocast)
        if device == "cuda":  # what is left of the ratios where launches cost nothing
            told = ("dense, LoRA in bfloat16", "ours: 4 bits, QA-LoRA", "bitsandbytes and peft: QLoRA")
            runs |= {f"{name}, recorded": runs[name] and recorded(runs[name]) for name in told}
        what = f"forward, recompute, backward of a block, {batch} x {tokens} tokens"
        for row in compare(what, runs, turns, device, {n: v / layers for n, v in least.items()}, parts=layers):
            if "recorded" not in row["name"]:
                row["peak bytes"] = peak_memory(runs[row["name"]], device)
            rows.append(row)
        del runs
    for name in ("dense, LoRA in bfloat16", "ours: 4 bits, QA-LoRA"):
        rows += profiled(name, passes(blocks[name], config, *sizes[1], dtype, device), device)
    return rows


def profiled(name, run, device, most=16):
    """The kernels of a call of `run` that take longest; prints them."""
    run()
    kinds = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * (device == "cuda")
    with torch.profiler.profile(activities=kinds) as profile:
        seconds = once(run, device)

    def spent(e):
        return e.self_device_time_total if device == "cuda" else e.self_cpu_time_total

    events = profile.key_averages()
    if device == "cuda":
        events = [e for e in events if str(e.device_type).endswith("CUDA")]
    events = sorted(events, key=spent, reverse=True)
    total, launches = sum(map(spent, events)), sum(e.count for e in events)
    what = f"profile of {name}"
    print(f"\n{what}: {1e3 * seconds:.4g} ms, of which kernels {total / 1e3:.4g}, {launches} of them")
    rows = [{"what": what, "name": "all", "milliseconds": 1e3 * seconds, "kernels": total / 1e3,
             "calls": launches}]
    for e in events[:most]:
        rows.append({"what": what, "name": e.key[:90], "milliseconds": spent(e) / 1e3, "calls": e.count})
        print(f"  {spent(e) / 1e3:9.4g} ms {e.count:5} x  {e.key[:90]}", flush=True)
    return rows


def gptq_on_gpu(config, blocks, windows, device, dtype):
    """GPTQ block by block as train.py does it, of so many blocks, and of each shape of a layer alone."""
    calibration = torch.randint(config.vocab_size, windows, device=device)
    most_held(device, anew=True)
    rows, short = [], dataclasses.replace(config, num_hidden_layers=blocks)
    seconds = once(lambda: random_model(short, dtype, device, calibration), device)
    row = {"what": f"GPTQ on {windows[0]} x {windows[1]} tokens", "name": f"{blocks} blocks",
           "seconds": seconds, "seconds a block": seconds / blocks, "peak bytes": most_held(device)}
    print(f"\nGPTQ of {blocks} blocks: {seconds:.1f} s; at that rate {config.num_hidden_layers} blocks take "
          f"{seconds / blocks * config.num_hidden_layers:.0f} s", flush=True)
    rows.append(row)
    wide, narrow = config.intermediate_size, config.hidden_size
    for out, inputs in ((narrow, narrow), (wide, narrow), (narrow, wide)):
        x = torch.randn(2 * inputs, inputs, device=device)
        hessian, w = x.t() @ x / len(x), torch.randn(out, inputs, device=device) * 0.02
        for search in (False, True):
            seconds = once(lambda: quantize_gptq(w, hessian, BITS, GROUP_SIZE, search), device)
            name = f"{inputs} -> {out}, search={search}"
            rows.append({"what": "GPTQ of a layer", "name": name, "seconds": seconds})
            print(f"  layer {name}: {seconds:.2f} s", flush=True)
    return rows


def fine_tuning(model, steps, length, facts, device):
    """train.fine_tune on `model` with random records; then merging, which must keep the bits."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(3, model.config.vocab_size, (64, length), dtype=np.int32)
    examples = [Example(row, length // 4) for row in tokens]
    model.model.checkpointing = True
    add_adapters(model, RANK, ALPHA)
    before = most_held(device, anew=True)  # the model, and what tables before this one have left
    with tempfile.TemporaryDirectory() as out:
        s = dict(out=out, steps=steps, batch_size=16, micro_batch_size=4, clip=0.3, lr=2e-5, seed=0,
                 save_every=steps, device=device, resume=False, paged_optimizer=0, method="qalora",
                 bits=BITS)
        train.fine_tune(s, model, examples, [])
        lines = (pathlib.Path(out) / "metrics.jsonl").read_text().splitlines()
    lines = [json.loads(line) for line in lines]
    speeds = [line["tokens_per_second"] for line in lines[steps // 4:]]
    row = {"what": "train.py's steps", "name": f"16 x {length} tokens, micro-batches of 4",
           "losses": [line["loss"] for line in lines], "tokens a second": statistics.median(speeds),
           "from": min(speeds), "to": max(speeds), "bytes before": before,
           "peak bytes": most_held(device)}
    weights = sum(layer.in_features * layer.out_features for layer in (m.base for _, m in linears(model)))
    weights += model.lm_head.weight.numel()
    rate = facts["matmul"][str(torch.bfloat16)]
    row["share of the matmul rate"] = 6 * weights * row["tokens a second"] / rate
    model.model.checkpointing = False
    row["bit identical"] = train.merge_and_compare(model, examples[:8], 4)
    print(f"\n{row}", flush=True)
    return [row]


def recorded(run):
    """`run` recorded as a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def whole_inference(model, facts, turns, tokens, dtype, device):
    """Decoding with a whole model, at one fixed place in the cache, and prefill, beside a dense model of its size."""
    dense = random_model(model.config, dtype, device, packed=False)

    def held(m):  # by all but the embedding, of which one row is read
        return sum(t.nbytes for t in m.state_dict().values()) - m.model.embed_tokens.weight.nbytes

    runs = {"dense": one_token(dense, dtype, device), "ours": one_token(model, dtype, device)}
    weights = sum(p.numel() for p in dense.parameters())
    if device == "cuda":
        runs |= {f"{name}, recorded": recorded(run) for name, run in runs.items()}
    rows = compare("decoding one token, whole model", runs, 3 * turns, device,
                   floors(facts, dtype, 2 * weights, held(model)))
    for row in rows:
        least = 1e3 * held(dense if "dense" in row["name"] else model) / facts["copy"]
        row["share of the bandwidth"] = least / row["milliseconds"]
        print(f"  {row['name']}: {row['share of the bandwidth']:.1%} of the bandwidth")
    rows += profiled("decoding one token", runs["ours"], device)
    prompt = torch.zeros(1, tokens, dtype=torch.long, device=device)
    runs = {name: torch.inference_mode()(functools.partial(m, prompt))
            for name, m in (("dense", dense), ("ours", model))}
    weights = sum(p.numel() for p in dense.model.layers.parameters())
    return rows + compare(f"prefill of {tokens} tokens, whole model", runs, turns, device,
                          floors(facts, dtype, 2 * weights * tokens, held(model)))


def on_gpu(facts, quick, write, config=CONFIGS["7b"], device="cuda", dtype=torch.bfloat16,
           windows=(128, 2048), sizes=((1, 512), (4, 512), (4, 2048)), length=512, prompt=2048):
    """All tables for a GPU; `write(rows)` is called after each, so that none is lost.

    A table that fails is told, and the next one is begun. With `quick` GPTQ is of one block.
    """
    turns, steps = (3, 10) if quick else (7, 20)
    kept = {}

    def whole():
        kept["model"] = random_model(config, dtype, device)
        return fine_tuning(kept["model"], steps, length, facts, device)

    few = dataclasses.replace(config, num_hidden_layers=min(4, config.num_hidden_layers))
    blocks = 1 if quick else config.num_hidden_layers
    tables = [
        lambda: exactness(device),
        lambda: pass_ratios(few, facts, sizes, turns, dtype, device),
        whole,
        lambda: whole_inference(kept["model"], facts, turns, prompt, dtype, device),
        lambda: gptq_on_gpu(config, blocks, windows, device, dtype),
    ]
    rows = []
    for table in tables:
        start = time.perf_counter()
        try:
            rows += table()
        except Exception:
            rows.append({"what": "failed", "name": traceback.format_exc()})
            print(rows[-1]["name"], flush=True)
        write(rows)
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
        print(f"[{time.perf_counter() - start:.0f} s]", flush=True)
    return rows


def main():
    parser = Parser(prog="bench.py", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer turns and tokens, a smaller layer for GPTQ")
    parser.add_argument("--json", type=new_file, help="write all rows to this file")
    parser.add_argument("--plot", type=new_file, help="draw how cost grows (PNG, needs matplotlib)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    if args.plot and not importlib.util.find_spec("matplotlib"):
        parser.error("--plot needs matplotlib; run: pip install matplotlib")
    check_device(args.device)
    torch.manual_seed(0)
    quant.USE_COMPILER = False
    turns, dtype = 3 if args.quick else 7, compute_dtype(torch.bfloat16, args.device)
    facts = machine(args.device)
    print(json.dumps(facts, indent=1), flush=True)

    def write(rows):
        if args.json:
            with written_whole(args.json) as beside:
                beside.write_text(json.dumps({"machine": facts, "rows": rows}, indent=1) + "\n")

    if args.device == "cuda":
        on_gpu(facts, args.quick, write)
        return
    dense = Llama(WIDE).to(args.device, dtype)
    quantized = quantize_model(copy.deepcopy(dense), BITS, GROUP_SIZE)
    rows = inference(dense, quantized, facts, turns, dtype, args.device)
    rows += training(dense, quantized, facts, (512,) if args.quick else (512, 2048), turns, dtype, args.device)
    rows += gptq(2048 if args.quick else 4096, turns, facts)
    rows += growth(2 if args.quick else 5, QUICK_GROWTH if args.quick else GROWTH, facts, dtype, args.device)
    if args.plot:
        plot([row for row in rows if "axis" in row], args.plot)
    write(rows)


if __name__ == "__main__":
    run_command(main)
