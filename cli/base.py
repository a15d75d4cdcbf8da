"""A run's base/: the quantized model beside which adapters are trained, made once and recognised.

base/made_from.json says of which weights, with which tokenizer and how the base was made. While
that still holds, the base is not made again.
"""

import hashlib
import json
import os
import pathlib
import random
import shutil
from collections.abc import Callable

import torch

import formats
from baselines import quantize_model_nf4
from cli.data import in_format
from cli.errors import UserError
from cli.files import is_leftover, read_json, remove, written_whole
from cli.machine import compute_dtype, trim_heap
from cli.runs import checkpoints, newest_checkpoint, set_adapter_aside
from cli.settings import Settings, config_of, save_settings
from cli.toy import TOY_BASE, pretrain, toy_calibration
from formats.files import fill
from formats.huggingface import save_pretrained
from formats.quantized import save_quantized
from formats.rest import kept_in
from llama import Block, Llama
from quant import quantize_model
from text.batches import calibration_windows
from text.instructions import Record, read_records
from text.tokenizer import Tokenizer
from text.toy import World, make_world

# What a run writes
PARTS = ("base", "adapter", "previous-adapter", "merged")
FILES = ("metrics.jsonl", "results.json", "loss.png")


def prepare(settings: Settings, world: World | None, records: list[Record]) -> None:
    """What one process does for all: the run's folder, the tiny model where wanted, the base.

    Raises UserError for what would go wrong later: weights, disk room, an unfinished earlier run.
    """
    out = pathlib.Path(settings.out)
    check_out(settings, out)
    check_unfinished(settings, out)
    needs_pretraining = not settings.weights and (
        settings.fresh or not (TOY_BASE / "config.json").exists()
    )
    made = not needs_pretraining and base_is_made(settings)
    if settings.weights and not made:
        formats.check(settings.weights)
    check_room(settings, made)
    calibration = None  # read now, as their file may be refused
    if uses_gptq(settings) and not made:
        calibration = calibration_records(settings.calibration, world, records)
    remove_leftovers(out)
    finished = (out / "adapter").exists()
    if not (settings.resume or finished):  # now, so that --resume works if what follows is cut off
        start_over(settings)
    if needs_pretraining:
        pretrain(make_world(), TOY_BASE)
        made = base_is_made(settings)  # the same seed makes the same model
    if not made:
        make_base(settings, calibration)
    if finished and not settings.resume:  # a finished run stays until the new base is there
        start_over(settings)


def check_out(settings: Settings, out: pathlib.Path) -> None:
    """Raises UserError where the run would overwrite its own weights, or what is no run's."""
    source, run = source_of(settings.weights).resolve(), out.resolve()
    made = [(out / part).resolve() for part in ("base", "merged")]  # they may be links
    another = "choose another --out"
    if source == run or any(source.is_relative_to(folder) for folder in made):
        raise UserError(f"--out {out} would overwrite the weights {source}; {another}")
    for folder in (run, *run.parents):
        if (folder.parent / "run.json").exists() and is_part(folder):
            raise UserError(f"--out {out} is inside the run {folder.parent}; {another}")
    if not (out / "run.json").exists():
        names = (*PARTS, *FILES, *formats.FORMATS.values())  # the last make it a model's folder
        for path in (*(out / name for name in names), *checkpoints(out)):
            if path.exists():
                raise UserError(f"--out {out} has a {path.name} that is no run's; {another}")
    elif (out / "adapter").exists() and not (settings.resume or settings.fresh):
        started_from = source_in_run_json(out)
        if started_from not in (source, None):
            raise UserError(
                f"--out {out} holds the finished run of {started_from}; {another}, or replace it "
                "with --fresh"
            )


def is_part(folder: pathlib.Path) -> bool:
    """Whether `folder`, in the folder of a run, is what runs write there."""
    return folder.name in PARTS or folder in checkpoints(folder.parent)


def source_in_run_json(out: pathlib.Path) -> pathlib.Path | None:
    """The weights that the run in a folder started from; None where run.json is damaged."""
    try:
        return source_of(read_json(out / "run.json").get("weights")).resolve()
    except (UserError, TypeError, ValueError):
        return None


def check_unfinished(settings: Settings, out: pathlib.Path) -> None:
    """Raises UserError where a run in the folder would be lost, or is further than --steps."""
    newest = newest_checkpoint(out)
    if newest is None:
        return
    if settings.resume and int(newest.name[5:]) > settings.steps:
        raise UserError(
            f"--steps {settings.steps}: {newest} is already further; give a larger number"
        )
    finished = (out / "adapter").exists()
    if settings.weights and not (finished or settings.resume or settings.fresh):
        raise UserError(
            f"{out} holds an unfinished run: go on with --resume, or remove {newest} to start "
            "over, or choose another --out"
        )


def remove_leftovers(out: pathlib.Path) -> None:
    """Removes what a run that was killed while it wrote has left."""
    for path in out.iterdir():
        if is_leftover(path):
            remove(path)


def start_over(settings: Settings) -> None:
    """Clears an earlier run away, but keeps its adapter as previous-adapter/; writes run.json."""
    out = pathlib.Path(settings.out)
    for folder in checkpoints(out):  # renamed first: half a folder is no checkpoint
        remove(folder.rename(out / f".{folder.name}.{os.getpid()}.unfinished"))
    set_adapter_aside(out)
    save_settings(settings)


# ---- is it there already?


def source_of(weights: str | None) -> pathlib.Path:
    """What the base is made of: the weights, or else the pretrained tiny model."""
    return pathlib.Path(weights or TOY_BASE)


def uses_gptq(settings: Settings) -> bool:
    """Whether making the base takes calibration."""
    if settings.method != "qalora" or settings.quantizer != "gptq":
        return False
    return not settings.weights or formats.quantization_of(settings.weights) is None


def tokenizer_of(settings: Settings) -> Tokenizer:
    """The tokenizer that is named, or else that of the weights."""
    return formats.load_tokenizer(settings.tokenizer or source_of(settings.weights))


def made_from(settings: Settings, tokenizer: Tokenizer) -> str:
    """The text of made_from.json for a base with these settings."""
    source = source_of(settings.weights)
    record = {
        "method": settings.method,
        "source": formats.fingerprint(source),
        "tokenizer": tokenizer.digest(),
    }
    if settings.method == "qalora":
        for name in ("bits", "group_size", "quantizer"):
            record[name] = getattr(settings, name)
    if uses_gptq(settings):
        record["calibration"] = None  # the training data, whatever they are
        if settings.calibration:
            content = pathlib.Path(settings.calibration).read_bytes()
            record["calibration"] = hashlib.sha256(content).hexdigest()
        record["calibration_tokens"] = settings.calibration_tokens
    return json.dumps(record, indent=2) + "\n"


def base_is_made(settings: Settings) -> bool:
    """Whether the run's base/ is there and was made from the same weights in the same way.

    Raises UserError when a run that is to be resumed was trained over another base.
    """
    out = pathlib.Path(settings.out)
    record, rest = out / "base" / "made_from.json", kept_in(out / "base")
    if settings.fresh or not record.exists() or (rest and not rest.exists()):
        return False
    if record.read_bytes() == made_from(settings, tokenizer_of(settings)).encode():
        print(f"base: {out}/base is already made from these weights in this way")
        return True
    if settings.resume and newest_checkpoint(out):
        raise UserError(
            f"{source_of(settings.weights)}, its tokenizer, the calibration or run.json has "
            f"changed since {out}/base was made, so the run cannot go on; put the old files back, "
            f"or remove {out}/step-* and start without --resume"
        )
    print(f"base: {out}/base was made from other weights or in another way; making it again")
    return False


# ---- making it


def make_base(settings: Settings, calibration: list[Record] | None) -> None:
    """Writes the run's base/, quantized by GPTQ on `calibration` where that is wanted."""
    source = source_of(settings.weights)
    tokenizer = tokenizer_of(settings)
    record = made_from(settings, tokenizer)  # of the weights as they are now
    with written_whole(pathlib.Path(settings.out) / "base") as folder:
        folder.mkdir()
        tokenizer.save(folder)
        if formats.quantization_of(source) is not None:
            formats.import_base(source, folder)
        else:
            quantize_into(folder, source, settings, calibration, tokenizer)
        (folder / "made_from.json").write_text(record)


def quantize_into(
    folder: pathlib.Path,
    source: pathlib.Path,
    settings: Settings,
    records: list[Record] | None,
    tokenizer: Tokenizer,
) -> None:
    """Writes float weights as the base of a method: float for lora, NF4 for qlora, else codes.

    Blocks are read one after another, so that no more than one is in memory in float.
    """
    config, weights = formats.open_weights(source)
    with torch.device("meta"):
        model = Llama(config)
    if settings.method == "lora":
        save_pretrained(fill(model, weights), folder)
        return
    stored = weights["model.embed_tokens.weight"]().dtype
    dtype = compute_dtype(stored, settings.device)
    fill_all_but_blocks(model, weights, dtype, settings.device)
    load_block = block_loader(weights, dtype, settings.device)
    if settings.method == "qlora":
        quantize_model_nf4(model, load_block)
        save_quantized(fill(model, weights, dtype=stored), folder, quantizer="nf4")
        return
    calibration = None
    if settings.quantizer == "gptq":
        context = config.max_position_embeddings
        asked = in_format(tokenizer, settings.template)
        calibration = calibration_windows(records, asked, context, settings.calibration_tokens)
    bits, group_size = settings.bits, settings.group_size
    quantize_model(model, bits, group_size, calibration, load_block=load_block)
    fill(model, weights, dtype=stored)  # what stays float, without the rounding to `dtype`
    save_quantized(model, folder, quantizer=settings.quantizer)


def fill_all_but_blocks(model: Llama, weights: dict, dtype: torch.dtype, device: str) -> None:
    """Reads embedding, last norm and output head into a model on the meta device."""
    for name in ("model.embed_tokens", "model.norm", "lm_head"):
        if f"{name}.weight" in weights:
            fill(model.get_submodule(name), weights, f"{name}.", dtype, device)
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight


def block_loader(weights: dict, dtype: torch.dtype, device: str) -> Callable[[Block, int], None]:
    """A function that reads one block, for `quantize_model`."""

    def load_block(block, index):
        trim_heap()  # gives back what the block before it has used
        fill(block, weights, f"model.layers.{index}.", dtype, device)

    return load_block


def calibration_records(
    calibration: str | None, world: World | None, records: list[Record]
) -> list[Record]:
    """What GPTQ is calibrated on: a file, else the toy world's texts, else the training data."""
    if world and not calibration:
        return toy_calibration(world)
    records = read_records(calibration).records if calibration else list(records)
    random.Random(0).shuffle(records)
    return records


# ---- room on the disk


def check_room(settings: Settings, base_is_made: bool) -> None:
    """Raises UserError when the disk cannot hold base (unless made), checkpoints and result.

    Old checkpoints count as room, as new ones replace them; an old base does not.
    """
    out = pathlib.Path(settings.out)
    with torch.device("meta"):
        model = Llama(config_of(settings.weights))
    base = 0 if base_is_made else base_bytes(settings, model)
    adapter_and_state = 2 * 3 * adapter_bytes(settings, model)  # twice; AdamW has two moments
    replaced = 0
    for folder in (*checkpoints(out), out / "previous-adapter"):
        replaced += sum(file.stat().st_size for file in folder.glob("*"))
    need = base + max(0, adapter_and_state - replaced)
    free = shutil.disk_usage(out).free
    if need > free:
        raise UserError(
            f"--out {out} has {free / 1e9:.3f} GB free where the run may need {need / 1e9:.3f} GB; "
            "choose a disk with more room"
        )


def base_bytes(settings: Settings, model: Llama) -> float:
    """About how large base/ becomes."""
    source = source_of(settings.weights)
    kept = formats.quantization_of(source) if settings.weights else None
    is_run = settings.weights and formats.format_of(source) is formats.run
    if settings.weights and settings.method == "lora" and not is_run:  # merged, it may be larger
        return sum(file.stat().st_size for file in formats.files(source))
    block_weights = sum(p.numel() for p in model.model.layers.parameters())
    other_weights = sum(p.numel() for p in model.parameters()) - block_weights
    in_groups = settings.bits / 8 + 8 / settings.group_size  # a scale has 2 to 4 bytes, an offset 4
    bytes_per_weight = {"qalora": in_groups, "qlora": 4.127 / 8, "lora": 4}[settings.method]
    if not kept:
        return block_weights * bytes_per_weight + 4 * other_weights
    frozen = [name for name, kind in kept.get("layers", {}).items() if kind is None]
    frozen_weights = sum(model.get_submodule(name).weight.numel() for name in frozen)
    floats = 4 * (other_weights + frozen_weights)  # at most
    size = sum(file.stat().st_size for file in formats.files(source))
    rest = min(size, floats)  # as it was in the file, which GGUF and MLX keep
    return (block_weights - frozen_weights) * bytes_per_weight + floats + rest


def adapter_bytes(settings: Settings, model: Llama) -> int:
    """How large an adapter is, in float32."""
    pooled = settings.group_size if settings.method == "qalora" else 1
    targets = settings.targets.split(",")
    full = settings.rank == "full"
    numbers = 0
    for name, p in model.named_parameters():
        if name.split(".")[-2] in targets:
            outputs, width = len(p), p.shape[1] // pooled
            numbers += outputs * width if full else settings.rank * (outputs + width)
    return 4 * numbers
