"""A run's folder while it trains: lock, metrics, checkpoints; and its signals and processes.

A checkpoint is a folder step-N/ that bears this name only when it is complete.
"""

import contextlib
import datetime
import fcntl
import json
import math
import os
import pathlib
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from shlex import quote

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import nn
from tqdm import tqdm

import evals
from cli import machine
from cli.errors import UserError
from cli.files import read_json, remove, write_json, written_whole
from cli.machine import memory_in_use
from cli.settings import Settings, as_text
from formats.adapter import restore_adapter, save_adapter
from text.batches import Example

# A checkpoint can only be resumed if these settings, and base and data, are what they were
LASTING = (
    "method",
    "bits",
    "group_size",
    "rank",
    "alpha",
    "targets",
    "lr",
    "clip",
    "batch_size",
    "max_length",
    "seed",
)


def resume_command(out: str | pathlib.Path) -> str:
    """What to type to go on with a run."""
    return f"python train.py --resume --out {quote(str(out))}"


# ---- around a run


@contextlib.contextmanager
def guarded(settings: Settings) -> Iterator[None]:
    """Keeps other runs out of the folder; on an interruption says how to go on."""
    out = pathlib.Path(settings.out)
    if machine.WORLD == 1:  # with several processes one that waits for the others would not react
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    with kept_from_other_runs(out):
        try:
            yield
        except KeyboardInterrupt:
            started = out / "run.json"
            ours = started.exists() and started.read_text() == as_text(settings)
            if machine.RANK or not ours:  # an earlier run's: there is nothing to resume
                raise
            sys.exit(f"stopped; go on with: {resume_command(out)}")
        except RuntimeError as e:
            lost = isinstance(e, dist.DistError) or "gloo" in str(e)  # gloo has no error class
            if machine.WORLD == 1 or not lost:
                raise
            raise UserError(
                f"process {machine.RANK} of {machine.WORLD} has lost another, whose own message "
                f"says why; go on with the same command and --resume --out {quote(settings.out)}"
            ) from e


@contextlib.contextmanager
def kept_from_other_runs(out: pathlib.Path) -> Iterator[None]:
    """Locks a folder or a file; raises UserError when another run is using it."""
    folder = os.open(out, os.O_RDONLY)
    try:
        if machine.RANK == 0:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with the process
    except BlockingIOError as e:
        raise UserError(
            f"another run is using {out}; wait for its end, or choose another --out"
        ) from e
    except OSError:  # some network file systems cannot lock
        pass
    try:
        yield
    finally:
        os.close(folder)


def join_processes() -> None:
    """Lets torchrun's processes wait here until all have come; does nothing for a single one."""
    if machine.WORLD > 1 or dist.is_torchelastic_launched():
        dist.init_process_group(timeout=datetime.timedelta(days=2))  # NCCL on GPUs, gloo on CPUs
        dist.barrier()


def leave_processes() -> None:
    """Ends what `join_processes` began."""
    if dist.is_initialized():
        dist.destroy_process_group()


# ---- around the training loop


def record(
    steps: Iterable[dict],
    settings: Settings,
    identity: dict,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    done: int,
    held_out: list[Example],
    few: list[Example],
) -> None:
    """Runs the training loop `steps` to its end, or to a signal: progress, metrics, checkpoints.

    steps: yields a dict with step, loss, grad_norm and tokens after every optimizer step.
    identity: what else a resumed run must share (the base and the examples).
    done: the steps that were done before. The loss is taken before a checkpoint is saved, so that
    none is of a model that has diverged; on the examples `held_out`, if any, or else on a `few`,
    and on a signal too, as nobody waits then for the validation of a large model.
    Raises UserError, naming the last good checkpoint, when a number is not finite.
    """
    out = pathlib.Path(settings.out)
    bar = tqdm(
        total=settings.steps,
        desc="fine-tuning",
        unit="step",
        initial=done,
        disable=machine.RANK > 0,
    )
    with bar, stopped_by_signals() as signals, metrics_from(out, done) as write_metrics:
        start = time.monotonic()
        for line in finite_steps(steps, out):
            step = line["step"]
            speed = line.pop("tokens") / (time.monotonic() - start)
            line |= {"lr": settings.lr, "tokens_per_second": round(speed, 1)}
            last, stop = step == settings.steps, in_any_process(signals, settings.device)
            save = step % settings.save_every == 0 or last or stop
            if save:
                validates = bool(held_out) and not stop
                judged = held_out if validates else few
                value = evals.response_loss(model, judged, settings.micro_batch_size)
                label = "validation loss" if validates else "loss"
                check_finite(out, step, f"{label} after this step", value)
                if validates:
                    line["validation_loss"] = value
            write_metrics(line)  # before the checkpoint, as resuming can only cut lines off
            if save:
                save_checkpoint(settings, identity, step, model, optimizer)
            show(bar, line, settings.device)
            if stop and not last:
                bar.close()
                how = f"stopped after step {step}; go on with: {resume_command(out)}"
                sys.exit(how if machine.RANK == 0 else 1)
            start = time.monotonic()
    if signals and machine.WORLD == 1:  # it came with the last step
        raise KeyboardInterrupt


def finite_steps(steps: Iterable[dict], out: pathlib.Path) -> Iterator[dict]:
    """The steps; a FloatingPointError of theirs becomes a UserError that names a way out."""
    try:
        yield from steps
    except FloatingPointError as e:
        raise UserError(f"{e}; {way_back(out)}") from e


def check_finite(out: pathlib.Path, step: int, name: str, value: float) -> None:
    """Raises UserError, naming the last good checkpoint, for a value that is not finite."""
    if not math.isfinite(value):
        raise UserError(f"step {step}: the {name} is {value:g}; {way_back(out)}")


def way_back(out: pathlib.Path) -> str:
    """What to do when training has diverged."""
    good = newest_checkpoint(out)
    if good is None:
        return "there is no good checkpoint; start over with a lower --lr"
    return f"the last good checkpoint is {good}; remove it to start over with a lower --lr"


def show(bar: tqdm, line: dict, device: str) -> None:
    """Moves the progress bar on by one step."""
    speed, memory = line["tokens_per_second"], memory_in_use(device)
    loss = f"{line['loss']:.3f}"
    bar.set_postfix(loss=loss, tokens_per_s=f"{speed:.0f}", GB=f"{memory:.1f}", refresh=False)
    bar.update()


@contextlib.contextmanager
def stopped_by_signals() -> Iterator[list]:
    """Yields a list that gets the first Ctrl-C or SIGTERM; a second one has its usual effect."""
    received = []
    before = {}

    def restore():
        for number, handler in before.items():
            signal.signal(number, handler)

    def receive(number, frame):
        received.append(number)
        restore()

    for number in (signal.SIGINT, signal.SIGTERM):
        before[number] = signal.signal(number, receive)
    try:
        yield received
    finally:
        restore()


def in_any_process(signals: list, device: str) -> bool:
    """Whether any process has received a signal, so that all stop after the same step."""
    if not dist.is_initialized():
        return bool(signals)
    received = torch.tensor(len(signals), device=device)
    dist.all_reduce(received)
    return received.item() > 0


@contextlib.contextmanager
def metrics_from(out: pathlib.Path, done: int) -> Iterator[Callable[[dict], None]]:
    """Cuts metrics.jsonl back to `done` lines; yields a function that appends one."""
    path = out / "metrics.jsonl"
    if machine.RANK:
        yield lambda line: None
        return
    lines = path.read_bytes().splitlines(keepends=True)[:done] if path.exists() else []
    with written_whole(path) as beside:
        beside.write_bytes(b"".join(lines))
    with path.open("a", buffering=1) as file:  # line by line, so that it can be read at any time
        yield lambda line: file.write(json.dumps(line) + "\n")


# ---- checkpoints


def checkpoints(out: pathlib.Path) -> list[pathlib.Path]:
    """The folders step-N/ in the order of N; others, such as step-4.bak, are the user's own."""
    folders = [folder for folder in out.glob("step-*") if folder.name[5:].isdecimal()]
    return sorted(folders, key=lambda folder: int(folder.name[5:]))


def newest_checkpoint(out: pathlib.Path) -> pathlib.Path | None:
    """The step-N/ with the highest N."""
    return next(reversed(checkpoints(out)), None)


def lasting(settings: Settings, identity: dict) -> dict:
    """What a checkpoint and the run that resumes it must share."""
    return {name: getattr(settings, name) for name in LASTING} | identity


def save_checkpoint(
    settings: Settings,
    identity: dict,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
) -> None:
    """Writes step-N/: adapter, AdamW's state, what must not change; then removes older ones.

    Only process 0 writes. Raises UserError when it cannot be written; the older ones stay.
    """
    if machine.RANK > 0:
        return
    out = pathlib.Path(settings.out)
    try:
        with written_whole(out / f"step-{step}") as beside:
            save_adapter(model, beside)  # makes the folder
            state = {"step": step, "optimizer": optimizer.state_dict()}
            torch.save(state, beside / "optimizer.pt")
            write_json(lasting(settings, identity), beside / "settings.json")
    except (OSError, RuntimeError, SafetensorError) as e:  # all three can mean a full disk
        raise UserError(
            f"{out}/step-{step} could not be written ({e}); if the disk is full, free some space, "
            f"then go on with: {resume_command(out)}"
        ) from e
    for folder in checkpoints(out):
        if folder.name != f"step-{step}":
            remove(folder)


def load_checkpoint(settings: Settings, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Restores the newest checkpoint into adapters and optimizer; returns its step, 0 without one.

    Raises UserError when it is damaged.
    """
    folder = newest_checkpoint(pathlib.Path(settings.out))
    if folder is None:
        return 0
    restore_adapter(model, folder)
    try:
        state = torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True)
        optimizer.load_state_dict(state["optimizer"])
        step = state["step"]
    except Exception as e:  # a damaged file can raise any exception
        raise UserError(
            f"{folder}/optimizer.pt is missing or damaged ({type(e).__name__}); remove {folder} "
            "and start without --resume"
        ) from e
    if settings.paged_optimizer:
        page_again(optimizer)
    if step < settings.steps and machine.RANK == 0:  # it is no longer finished
        set_adapter_aside(pathlib.Path(settings.out))
    return step


def set_adapter_aside(out: pathlib.Path) -> None:
    """Renames the result of the run before to previous-adapter/, replacing an older one."""
    if (out / "adapter").exists():
        remove(out / "previous-adapter")
        (out / "adapter").rename(out / "previous-adapter")


def adamw(parameters: Sequence[nn.Parameter], lr: float, paged: bool) -> torch.optim.Optimizer:
    """AdamW without weight decay. paged: its two moments live in memory that a GPU pages out."""
    if not paged:
        return torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    try:
        from bitsandbytes.optim import PagedAdamW32bit
    except ImportError as e:
        raise UserError("--paged-optimizer needs bitsandbytes: pip install bitsandbytes") from e
    return PagedAdamW32bit(parameters, lr=lr, weight_decay=0.0)


def page_again(optimizer: torch.optim.Optimizer) -> None:
    """Moves a paged AdamW's state back to paged memory; its loading puts it on the GPU."""
    for parameter, moments in optimizer.state.items():
        for name in ("state1", "state2"):
            moments[name] = optimizer.get_state_buffer(parameter).copy_(moments[name])


def check_same_run(settings: Settings, identity: dict) -> None:
    """Raises UserError when settings, base or data are not those of the newest checkpoint."""
    folder = newest_checkpoint(pathlib.Path(settings.out))
    if folder is None:
        return
    file = folder / "settings.json"
    before = read_json(file) if file.exists() else {}
    places = {
        "base": f"{settings.out}/base",
        "examples": f"--data {settings.data} or the chat template",
    }
    for name, value in lasting(settings, identity).items():
        if name not in before:
            raise UserError(
                f"{folder}/settings.json lacks {name}; remove {folder} and start without --resume"
            )
        if before[name] != value:
            place = places.get(name, f"{settings.out}/run.json")
            raise UserError(
                f"{folder} was trained with {name} {before[name]}, now it is {value}: {place} has "
                f"changed; put it back, or remove {folder} and start without --resume"
            )
