"""Measuring speed and memory: contenders in turns, floors, and the steps that are measured."""

import copy
import functools
import gc
import pathlib
import platform
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

import kernels.matmul
import quant
from cli.machine import trim_heap
from llama import LINEARS, Cache, LlamaConfig, linears, rotary_table
from qalora import add_adapters

RANK, ALPHA, BITS, GROUP_SIZE = 64, 16, 4, 32


def take_turns(contenders: dict, turns: int, device: str) -> dict[str, list[float]]:
    """{name: seconds of each turn} for {name: function}, after one turn that does not count."""
    seconds = {name: [] for name in contenders}
    for turn in range(turns + 1):
        for name, run in contenders.items():
            taken = timed(run, device)
            if turn:
                seconds[name].append(taken)
    return seconds


def timed(run: Callable, device: str) -> float:
    """Seconds that a call of `run` takes, on a GPU the mean of three by its own clock."""
    if device == "cpu":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    return gpu_seconds(run, 3)


def gpu_seconds(run: Callable, calls: int = 1) -> float:
    """Seconds that a call of `run` takes by the GPU's own clock, the mean of `calls` calls."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(calls):
        run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3 / calls


def once(run: Callable, device: str) -> float:
    """Seconds of a single call."""
    return gpu_seconds(run) if device == "cuda" else timed(run, device)


def floors(facts: dict, dtype: torch.dtype, operations: float, moved: float) -> dict[str, float]:
    """The least milliseconds for so many operations and bytes read, on a machine of `facts`."""
    return {
        "arithmetic": 1e3 * operations / facts["matmul"][str(dtype)],
        "memory": 1e3 * moved / facts["copy"],
    }


def compare(
    what: str, contenders: dict, turns: int, device: str, least: dict, parts: int = 1
) -> list[dict]:
    """Prints a table of {name: function, or None for a peer not installed}; returns its rows.

    parts: how many equal parts (layers, tokens) a call has. Times and `least`, the floors, are for
    one part.
    """
    arithmetic, memory = f"{least['arithmetic']:.3g} ms", f"{least['memory']:.3g} ms"
    print(f"\n{what} (floors: arithmetic {arithmetic}, memory {memory})", flush=True)
    seconds = take_turns({name: run for name, run in contenders.items() if run}, turns, device)
    first, rows = next(iter(seconds.values())), []
    for name in contenders:
        if name not in seconds:
            print(f"  {name:44} left out: what it needs is not installed")
            continue
        ratios = [a / b for a, b in zip(seconds[name], first, strict=True)]
        row = {
            "what": what,
            "name": name,
            "milliseconds": 1e3 * statistics.median(seconds[name]) / parts,
            "floors": least,
            "ratio": statistics.median(ratios),
            "from": min(ratios),
            "to": max(ratios),
        }
        spread = f"({row['from']:.2f} to {row['to']:.2f})"
        times = f"{row['milliseconds']:9.4g} ms   {row['ratio']:5.2f} x"
        print(f"  {name:44} {times} {spread}", flush=True)
        rows.append(row)
    return rows


def processor(device: str) -> str:
    """The name of the GPU, or of the CPU and of its vector instructions that matter here."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    name, info = platform.processor() or platform.machine(), pathlib.Path("/proc/cpuinfo")
    if not info.exists():
        return name
    facts = {}
    for line in info.read_text().splitlines():
        key, _, value = line.partition(":")
        facts[key.strip()] = value.strip()
    known = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
    flags = [flag for flag in known if flag in facts.get("flags", "")]
    return f"{facts.get('model name', name)} ({', '.join(flags)})"


def machine(device: str) -> dict:
    """The machine's name, its matmul rates (operations a second) and its bandwidth.

    The bandwidth counts bytes read and bytes written, a second.
    """
    rates = {}
    for dtype in (torch.float32, torch.bfloat16):
        rows, size = (512, 4096) if device == "cpu" else (8192, 8192)
        x = torch.randn(rows, size, dtype=dtype, device=device)
        w = torch.randn(size, size, dtype=dtype, device=device)
        multiply = functools.partial(torch.mm, x, w.t())
        seconds = take_turns({"matmul": multiply}, 5, device)["matmul"]
        rates[str(dtype)] = 2 * rows * size**2 / statistics.median(seconds)
    size = 2**28 if device == "cpu" else 2**32  # far more than caches hold
    source, target = torch.empty(2, size, dtype=torch.uint8, device=device).fill_(1)
    seconds = take_turns({"copy": lambda: target.copy_(source)}, 5, device)["copy"]
    return {
        "device": processor(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "matmul": rates,
        "copy": 2 * source.nbytes / statistics.median(seconds),
    }


def bits_per_weight(model: nn.Module) -> float:
    """Bits that the blocks' linear layers and their adapters hold in memory, per weight."""
    layers = [layer for _, layer in linears(model)]
    bases = [getattr(layer, "base", layer) for layer in layers]
    weights = sum(base.in_features * base.out_features for base in bases)
    held = 0
    for layer in layers:
        held += sum(tensor.nbytes for tensor in layer.state_dict().values())
    return 8 * held / weights


def weights_in_words(model: nn.Module) -> str:
    """How many bits a weight has, and what the float layers of a model in groups take."""
    layers = [layer for _, layer in linears(model)]
    floats = [layer for layer in layers if type(layer) is nn.Linear]
    words = f"{bits_per_weight(model):.2f} bits a weight"
    if floats and len(floats) < len(layers):
        held = sum(layer.weight.nbytes for layer in floats) / 1e9
        words += f" ({len(floats)} of {len(layers)} layers stay frozen in float, {held:.3g} GB)"
    return words


def peak_memory(run: Callable, device: str) -> int | None:
    """Bytes that `run()` needs at its peak, beyond what is held; None if that cannot be known."""
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    if platform.system() != "Linux":
        return None

    def status(key):
        lines = pathlib.Path("/proc/self/status").read_text().splitlines()
        found = next(line for line in lines if line.startswith(key))
        return 1024 * int(found.split()[1])

    trim_heap()  # what was freed then counts when it is used again
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = status("VmRSS")
    run()
    return status("VmHWM") - before


def most_held(device: str, reset: bool = False) -> int | None:
    """The most bytes that tensors have held on the GPU; `reset` forgets what was held before."""
    if device == "cpu":
        return None
    if reset:
        torch.cuda.reset_peak_memory_stats()
    return torch.cuda.max_memory_allocated()


@functools.cache
def can_compile() -> bool:
    """Whether torch.compile works here, which takes a C++ compiler."""
    kernels.matmul.USE_COMPILER = True
    packed, scale, offset = (
        torch.zeros(1, 32, dtype=torch.uint8),
        torch.ones(1, 2),
        torch.zeros(1, 2),
    )
    kernels.matmul.dense_piece(packed, scale, offset, 4, 64, torch.float32, quant.dense)
    works, kernels.matmul.USE_COMPILER = kernels.matmul.USE_COMPILER, False
    return works


def compiled(run: Callable) -> Callable | None:
    """`run` with compiled dequantizing, as in a long run on a CPU; None without a compiler."""
    if not can_compile():
        return None

    def now():
        kernels.matmul.USE_COMPILER = True
        run()
        kernels.matmul.USE_COMPILER = False

    return now


def training_step(
    blocks: nn.Module, config: LlamaConfig, tokens: int, dtype: torch.dtype, device: str
) -> Callable:
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


def step_floors(
    facts: dict, dtype: torch.dtype, blocks: nn.Module, tokens: int
) -> dict[str, float]:
    """The floors of a training step on packed blocks, whose weights multiply and are read twice."""
    layers = [layer.base for _, layer in linears(blocks)]
    weights = sum(layer.in_features * layer.out_features for layer in layers)
    held = 0
    for layer in layers:
        held += sum(buffer.nbytes for buffer in layer.buffers())
    return floors(facts, dtype, 4 * weights * tokens, 2 * held)


def adapted(
    model: nn.Module,
    layers: int = 1,
    rank: int = RANK,
    replace: Callable | None = None,
) -> nn.Module:
    """A copy of the first blocks with adapters; `replace` is applied to each linear first."""
    blocks = copy.deepcopy(model.model.layers[:layers])
    for path, layer in linears(blocks) if replace else ():
        blocks.set_submodule(path, replace(layer))
    return add_adapters(blocks, rank, ALPHA)


def bitsandbytes_and_peft(model: nn.Module, device: str, layers: int = 1) -> nn.Module | None:
    """peft's LoRA over bitsandbytes' NF4, on the first blocks; None if one is not installed."""
    try:
        import bitsandbytes
        import peft
    except ImportError:
        return None

    def nf4(layer):
        new = bitsandbytes.nn.Linear4bit(
            layer.in_features,
            layer.out_features,
            bias=False,
            quant_type="nf4",
            compute_dtype=layer.weight.dtype,
        )
        new.weight = bitsandbytes.nn.Params4bit(
            layer.weight.data, requires_grad=False, quant_type="nf4"
        )
        return new.to(device)

    blocks = copy.deepcopy(model.model.layers[:layers]).requires_grad_(False)
    for path, layer in linears(blocks):
        blocks.set_submodule(path, nf4(layer))
    settings = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(LINEARS))
    return peft.inject_adapter_in_model(settings, blocks)


def one_token(model: nn.Module, dtype: torch.dtype, device: str) -> Callable:
    """A function that decodes one token after 64 others."""
    cache, token = Cache(model.config, 1, 65, dtype, device), torch.full((1, 1), 5, device=device)
    cache.keys.normal_()
    cache.values.normal_()

    @torch.inference_mode()
    def run():
        cache.length = 64
        model(token, cache)

    return run
