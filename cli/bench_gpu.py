"""The tables of bench.py for a GPU, on blocks and whole models of the size of LLaMA-7B."""

import dataclasses
import functools
import gc
import itertools
import statistics
import time
import traceback
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import quant
import train
from cli.measure import (
    ALPHA,
    BITS,
    GROUP_SIZE,
    RANK,
    adapted,
    bitsandbytes_and_peft,
    compare,
    floors,
    most_held,
    once,
    one_token,
    peak_memory,
    step_floors,
)
from cli.report import merge_and_compare
from cli.runs import adamw
from formats.files import fill
from llama import CONFIGS, Llama, LlamaConfig, linears, rotary_table
from qalora import adapter_parameters, add_adapters
from quant import dequantize, quantize_gptq, quantize_model
from text.batches import Example

PEER = "bitsandbytes and peft: QLoRA"


def random_weights(config: LlamaConfig, dtype: torch.dtype, device: str) -> dict[str, Callable]:
    """{parameter name: a function that draws it}, as `formats.open_weights` has it for files."""

    def draw(shape):
        if len(shape) == 1:
            return torch.ones(shape, dtype=dtype, device=device)
        return torch.randn(shape, dtype=dtype, device=device).mul_(0.02)

    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in Llama(config).named_parameters()}
    return {name: functools.partial(draw, shape) for name, shape in shapes.items()}


def random_model(
    config: LlamaConfig,
    dtype: torch.dtype,
    device: str,
    calibration: torch.Tensor | None = None,
    packed: bool = True,
) -> Llama:
    """A LLaMA of random weights: packed block by block (by GPTQ on `calibration`), or dense."""
    weights = random_weights(config, dtype, device)
    with torch.device("meta"):
        model = Llama(config)
    if not packed:
        return fill(model, weights, device=device).requires_grad_(False)
    for name in ("model.embed_tokens", "model.norm", "lm_head"):
        fill(model.get_submodule(name), weights, f"{name}.", device=device)

    def load_block(block, index):
        fill(block, weights, f"model.layers.{index}.", device=device)

    quantize_model(model, BITS, GROUP_SIZE, calibration, load_block=load_block)
    return model.requires_grad_(False)


def exactness(device: str) -> list[dict]:
    """The largest errors of a packed layer, as shares of the largest value in float64."""
    rows = []
    shapes = ((1, 96, 256, 32), (8, 100, 704, 64), (40, 100, 704, 64), (9, 33, 1056, 33))
    cases = itertools.product((2, 3, 4), (torch.bfloat16, torch.float16), shapes)
    for bits, dtype, (tokens, out, inputs, size) in cases:
        q = quant.quantize_rtn(torch.randn(out, inputs, device=device), bits, size)
        packed = quant.pack(q.codes, bits)
        x = torch.randn(tokens, inputs, device=device).to(dtype)
        leaves = x.clone().requires_grad_(), q.offset.clone().requires_grad_()
        y = quant.quant_matmul(leaves[0], packed, q.scale, leaves[1], bits)
        gy = torch.randn_like(y)
        gx, go = torch.autograd.grad(y, leaves, gy)
        w = dequantize(q, torch.float64)
        pooled = x.double().unflatten(1, (-1, size)).sum(-1)
        exact = {
            "y": (y, x.double() @ w.t()),
            "x's gradient": (gx, gy.double() @ w),
            "offset's gradient": (go, gy.double().t() @ pooled),
        }
        errors = {}
        for name, (found, true) in exact.items():
            errors[name] = ((found - true).abs().max() / true.abs().max()).item()
        layer = f"{bits} bits, {dtype}, {tokens} x {inputs} -> {out}"
        rows.append({"what": "exactness", "name": layer, **errors})
    for name in errors:
        worst = {}
        for kind in ("torch.bfloat16", "torch.float16"):
            worst[kind] = max(row[name] for row in rows if kind in row["name"])
        print(f"{name}: largest error over the largest value: {worst}", flush=True)
    return rows


def passes(
    blocks: nn.Module,
    config: LlamaConfig,
    batch: int,
    tokens: int,
    dtype: torch.dtype,
    device: str,
    autocast: bool = False,
) -> Callable:
    """A function that goes forward and backward through `blocks`, recomputing each, as train.py."""
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


def pass_ratios(
    config: LlamaConfig, facts: dict, sizes: Sequence, turns: int, dtype: torch.dtype, device: str
) -> list[dict]:
    """Forward and backward through blocks of 7B, in turns; and the profiles of two contenders."""
    layers = config.num_hidden_layers
    dense, packed = (random_model(config, dtype, device, packed=packed) for packed in (False, True))
    blocks = {
        "dense, LoRA in bfloat16": adapted(dense, layers).to(dtype),  # the fastest that LoRA can be
        "dense, LoRA in float32": adapted(dense, layers),
        "ours: 4 bits, QA-LoRA": adapted(packed, layers),
    }
    library = bitsandbytes_and_peft(dense, device, layers)
    rows = []
    for batch, tokens in sizes:
        least = step_floors(facts, dtype, blocks["ours: 4 bits, QA-LoRA"], batch * tokens)
        least = {name: 1.5 * value for name, value in least.items()}  # and the recomputation
        runs = {name: passes(b, config, batch, tokens, dtype, device) for name, b in blocks.items()}
        for autocast, name in ((False, PEER), (True, f"{PEER}, autocast")):
            runs[name] = library and passes(library, config, batch, tokens, dtype, device, autocast)
        if device == "cuda":  # recorded: the ratios where launches cost nothing
            for name in ("dense, LoRA in bfloat16", "ours: 4 bits, QA-LoRA", PEER):
                runs[f"{name}, recorded"] = runs[name] and recorded(runs[name])
        what = f"forward, recompute, backward of a block, {batch} x {tokens} tokens"
        least = {name: value / layers for name, value in least.items()}
        for row in compare(what, runs, turns, device, least, parts=layers):
            if "recorded" not in row["name"]:
                row["peak bytes"] = peak_memory(runs[row["name"]], device)
            rows.append(row)
        del runs
    for name in ("dense, LoRA in bfloat16", "ours: 4 bits, QA-LoRA"):
        rows += profiled(name, passes(blocks[name], config, *sizes[1], dtype, device), device)
    return rows


def profiled(name: str, run: Callable, device: str, most: int = 16) -> list[dict]:
    """The kernels of a call of `run` that take longest; prints them."""
    run()
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if device == "cuda":
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
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
    kernels, whole = total / 1e3, 1e3 * seconds
    print(f"\n{what}: {whole:.4g} ms, of which {launches} kernels take {kernels:.4g}")
    row = {"what": what, "name": "all", "milliseconds": whole, "kernels": kernels}
    rows = [row | {"calls": launches}]
    for e in events[:most]:
        row = {"what": what, "name": e.key[:90], "milliseconds": spent(e) / 1e3}
        rows.append(row | {"calls": e.count})
        print(f"  {spent(e) / 1e3:9.4g} ms {e.count:5} x  {e.key[:90]}", flush=True)
    return rows


def gptq_on_gpu(
    config: LlamaConfig, blocks: int, windows: tuple, device: str, dtype: torch.dtype
) -> list[dict]:
    """GPTQ of so many blocks, as train.py does it, and of each shape of a layer alone."""
    calibration = torch.randint(config.vocab_size, windows, device=device)
    most_held(device, reset=True)
    rows, short = [], dataclasses.replace(config, num_hidden_layers=blocks)
    make = functools.partial(random_model, short, dtype, device, calibration)
    seconds = once(make, device)
    row = {
        "what": f"GPTQ on {windows[0]} x {windows[1]} tokens",
        "name": f"{blocks} blocks",
        "seconds": seconds,
        "seconds a block": seconds / blocks,
        "peak bytes": most_held(device),
    }
    layers = config.num_hidden_layers
    rate = f"at that rate {layers} blocks take {seconds / blocks * layers:.0f} s"
    print(f"\nGPTQ of {blocks} blocks: {seconds:.1f} s; {rate}", flush=True)
    rows.append(row)
    wide, narrow = config.intermediate_size, config.hidden_size
    for out, inputs in ((narrow, narrow), (wide, narrow), (narrow, wide)):
        x = torch.randn(2 * inputs, inputs, device=device)
        hessian, w = x.t() @ x / len(x), torch.randn(out, inputs, device=device) * 0.02
        for search in (False, True):
            run = functools.partial(quantize_gptq, w, hessian, BITS, GROUP_SIZE, search)
            seconds = once(run, device)
            name = f"{inputs} -> {out}, search={search}"
            rows.append({"what": "GPTQ of a layer", "name": name, "seconds": seconds})
            print(f"  layer {name}: {seconds:.2f} s", flush=True)
    return rows


def fine_tuning(model: nn.Module, steps: int, length: int, facts: dict, device: str) -> list[dict]:
    """train.fine_tune on `model` with random records; then merging, which must keep the bits."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(3, model.config.vocab_size, (64, length), dtype=np.int32)
    learned = np.arange(length) >= length // 4
    examples = [Example(row, learned) for row in tokens]
    model.model.checkpointing = True
    add_adapters(model, RANK, ALPHA)
    before = most_held(device, reset=True)  # the model, and what tables before this one have left
    optimizer = adamw(list(adapter_parameters(model).values()), 2e-5, paged=False)
    recipe = dict(steps=steps, batch_size=16, micro_batch_size=4, clip=0.3, seed=0)
    lines, speeds, start = [], [], time.perf_counter()
    for line in train.fine_tune(model, examples, optimizer, **recipe):
        lines.append(line)
        speeds.append(line["tokens"] / (time.perf_counter() - start))
        start = time.perf_counter()
    speeds = speeds[steps // 4 :]
    row = {
        "what": "train.py's steps",
        "name": f"16 x {length} tokens, micro-batches of 4",
        "losses": [line["loss"] for line in lines],
        "tokens a second": statistics.median(speeds),
        "from": min(speeds),
        "to": max(speeds),
        "bytes before": before,
        "peak bytes": most_held(device),
    }
    weights = model.lm_head.weight.numel()
    for _, layer in linears(model):
        weights += layer.base.in_features * layer.base.out_features
    rate = facts["matmul"][str(torch.bfloat16)]
    row["share of the matmul rate"] = 6 * weights * row["tokens a second"] / rate
    model.model.checkpointing = False
    row["bit identical"] = merge_and_compare(model, examples[:8], 4)
    print(f"\n{row}", flush=True)
    return [row]


def recorded(run: Callable) -> Callable:
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


def whole_inference(
    model: nn.Module, facts: dict, turns: int, tokens: int, dtype: torch.dtype, device: str
) -> list[dict]:
    """Decoding at one place in the cache, and prefill, beside a dense model of the same size."""
    dense = random_model(model.config, dtype, device, packed=False)

    def held(m):  # by all but the embedding, of which one row is read
        return sum(t.nbytes for t in m.state_dict().values()) - m.model.embed_tokens.weight.nbytes

    runs = {"dense": one_token(dense, dtype, device), "ours": one_token(model, dtype, device)}
    weights = sum(p.numel() for p in dense.parameters())
    if device == "cuda":
        runs |= {f"{name}, recorded": recorded(run) for name, run in runs.items()}
    least = floors(facts, dtype, 2 * weights, held(model))
    rows = compare("decoding one token, whole model", runs, 3 * turns, device, least)
    for row in rows:
        least = 1e3 * held(dense if "dense" in row["name"] else model) / facts["copy"]
        row["share of the bandwidth"] = least / row["milliseconds"]
        print(f"  {row['name']}: {row['share of the bandwidth']:.1%} of the bandwidth")
    rows += profiled("decoding one token", runs["ours"], device)
    prompt = torch.zeros(1, tokens, dtype=torch.long, device=device)
    runs = {}
    for name, m in (("dense", dense), ("ours", model)):
        runs[name] = torch.inference_mode()(functools.partial(m, prompt))
    weights = sum(p.numel() for p in dense.model.layers.parameters())
    least = floors(facts, dtype, 2 * weights * tokens, held(model))
    what = f"prefill of {tokens} tokens, whole model"
    return rows + compare(what, runs, turns, device, least)


def on_gpu(
    facts: dict,
    quick: bool,
    write: Callable,
    config: LlamaConfig = CONFIGS["7b"],
    device: str = "cuda",
    dtype: torch.dtype = torch.bfloat16,
    windows: tuple = (128, 2048),
    sizes: Sequence = ((1, 512), (4, 512), (4, 2048)),
    length: int = 512,
    prompt: int = 2048,
) -> list[dict]:
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
