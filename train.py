"""QA-LoRA from end to end: quantize a LLaMA, train adapters beside it, fold them in, judge it.

    python train.py                                      a tiny LLaMA in a toy world, in minutes
    python train.py --model 7b                           LLaMA-7B on Alpaca; fetches both
    python train.py --model 7b --weights DIR --data alpaca.json --out runs/7b
    python train.py --resume --out runs/7b               goes on after an interruption
    torchrun --nproc_per_node=2 train.py --model 7b ...  on several GPUs (or processes)

A run is a folder: run.json (every setting), base/ (the quantized model), step-N/ (a checkpoint),
adapter/ (the result), metrics.jsonl (a line a step), results.json. A step's batch is a function of
the settings and the step alone, and nothing else is drawn at random. So a resumed run goes on to
the same bits, and several processes only share the work.
"""

import contextlib
import math
import pathlib
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import evals
import formats
from cli import base, machine, report, runs
from cli.data import data_of, digest, in_format, make_examples
from cli.errors import run_command
from cli.measure import weights_in_words
from cli.settings import Settings, read_settings, save_settings
from formats.adapter import save_adapter
from qalora import adapter_parameters, add_adapters
from text.batches import Example, batch_order, collate

# ---- the training loop: the base is frozen, only the adapters learn


def fine_tune(
    network: nn.Module,
    examples: Sequence[Example],
    optimizer: torch.optim.Optimizer,
    steps: int,
    batch_size: int,
    micro_batch_size: int,
    clip: float,
    seed: int,
    first_step: int = 0,
) -> Iterator[dict]:
    """Trains what `optimizer` holds; yields step, loss, grad_norm and tokens after every step.

    Raises FloatingPointError, before anything is updated, when loss or gradient is not finite.
    """
    parameters = []
    for group in optimizer.param_groups:
        parameters += group["params"]
    lengths = tuple(len(example.tokens) for example in examples)
    for step in range(first_step, steps):
        batch = [examples[i] for i in batch_order(lengths, batch_size, step, seed)]
        loss = accumulate_gradients(network, batch, micro_batch_size)
        norm = nn.utils.clip_grad_norm_(parameters, clip).item()
        for name, value in (("loss", loss), ("gradient", norm)):
            if not math.isfinite(value):
                raise FloatingPointError(f"step {step + 1}: the {name} is {value:g}")
        optimizer.step()
        optimizer.zero_grad()
        tokens = sum(len(example.tokens) for example in batch)
        yield {"step": step + 1, "loss": loss, "grad_norm": norm, "tokens": tokens}


def accumulate_gradients(
    network: nn.Module, batch: Sequence[Example], micro_batch_size: int
) -> float:
    """Adds the gradients of a batch's loss to the parameters'; returns the loss.

    The loss is the mean over the batch's response tokens. Every micro-batch's sum is divided by
    their number in the whole batch, so neither micro-batches nor the number of processes change it.
    Of the batch, this process takes every WORLD-th example.
    """
    response_tokens = sum(int(example.learned.sum()) for example in batch)
    mine = batch[machine.RANK :: machine.WORLD]
    micro_batches = [mine[i : i + micro_batch_size] for i in range(0, len(mine), micro_batch_size)]
    device, total = next(network.parameters()).device, 0.0
    for micro_batch in micro_batches:
        tokens_BT, learned_BT = (t.to(device) for t in collate(micro_batch))
        more_follow = dist.is_initialized() and micro_batch is not micro_batches[-1]
        with network.no_sync() if more_follow else contextlib.nullcontext():  # shared once a step
            logits_NV = network(tokens_BT[:, :-1], keep_BT=learned_BT[:, 1:])
            targets_N = tokens_BT[learned_BT]
            loss = F.cross_entropy(logits_NV.float(), targets_N, reduction="sum") / response_tokens
            (loss * machine.WORLD).backward()  # DistributedDataParallel takes the mean
        total += loss.detach()
    if dist.is_initialized():
        dist.all_reduce(total)
    return total.item()


# ---- a whole run


def run(settings: Settings) -> None:
    """A whole run: data, base, adapters, training, merging, judging."""
    out = pathlib.Path(settings.out)
    is_first = machine.RANK == 0
    max_length, seed = settings.max_length, settings.seed
    world, data = data_of(settings.data, settings.template)
    if settings.weights:  # so that bad data is found before anything slow
        tokenizer = in_format(base.tokenizer_of(settings), settings.template)
        train, held_out = make_examples(data, tokenizer, max_length, seed)
    else:
        torch.set_num_threads(1)  # the tiny model's matrices are too small for two
    if is_first:
        base.prepare(settings, world, data.records)
    runs.join_processes()
    model, tokenizer = evals.load(out / "base", settings.device)
    tokenizer = in_format(tokenizer, settings.template)
    if not settings.weights:
        train, held_out = make_examples(data, tokenizer, max_length, seed)
    template = None if data.form == "text" else tokenizer.template.source
    del data
    model.model.checkpointing = bool(settings.checkpointing)
    weights = weights_in_words(model)
    torch.manual_seed(seed)
    add_adapters(model, settings.rank, settings.alpha, settings.targets.split(","))
    if is_first:
        count = sum(p.numel() for p in adapter_parameters(model).values())
        print(f"fine-tuning {count:,} parameters beside {weights}, on {len(train)} examples")
    identity = {"base": formats.fingerprint(out / "base"), "examples": digest(train + held_out)}
    train_adapters(settings, model, train, held_out, identity)
    if is_first:
        origin = {"method": settings.method, "base": identity["base"], "template": template}
        save_adapter(model, out / "adapter", **origin)
        report.conclude(settings, model, tokenizer, world, train, held_out)
    runs.leave_processes()


def train_adapters(
    settings: Settings,
    model: nn.Module,
    examples: list[Example],
    held_out: list[Example],
    identity: dict,
) -> None:
    """Trains the adapters of `model` in place; with --resume from the newest checkpoint on."""
    done = 0
    parameters = list(adapter_parameters(model).values())
    optimizer = runs.adamw(parameters, settings.lr, settings.paged_optimizer)
    if settings.resume:
        runs.check_same_run(settings, identity)
        if machine.RANK == 0:
            save_settings(settings)
        done = runs.load_checkpoint(settings, model, optimizer)
    network = model
    if dist.is_initialized():  # all start equal, so nothing is sent before the first step
        network = nn.parallel.DistributedDataParallel(
            model, broadcast_buffers=False, init_sync=False
        )
    steps = fine_tune(
        network,
        examples,
        optimizer,
        settings.steps,
        settings.batch_size,
        settings.micro_batch_size,
        settings.clip,
        settings.seed,
        done,
    )
    runs.record(steps, settings, identity, model, optimizer, done, held_out, few=examples[:4])


def main() -> None:
    """Runs the command line."""
    settings = read_settings(__doc__)
    with runs.guarded(settings):
        run(settings)


if __name__ == "__main__":
    relief = "--micro-batch-size (--resume takes a new one), --max-length, --rank"
    run_command(main, f"lower {relief} or --calibration-tokens")
