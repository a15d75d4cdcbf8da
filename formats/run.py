"""A run of train.py as a model: its base with its adapter merged in, in memory or as a folder."""

import functools
import pathlib
from shlex import quote
from types import ModuleType

import torch

from cli.errors import UserError
from cli.files import read_json, written_whole
from formats import huggingface, quantized
from formats.adapter import load_adapter
from formats.files import fingerprint_of, weight_files
from formats.rest import copy_rest
from llama import Llama, LlamaConfig
from merge import merge
from quant import QuantLinear
from text import tokenizer as tokenizer_files
from text.tokenizer import Tokenizer


def matches(path: pathlib.Path) -> bool:
    """Whether `path` is the folder of a run."""
    return (path / "run.json").exists()


def format_of_base(path: pathlib.Path) -> ModuleType:
    """The module that reads a run's base: ours, unless the run is LoRA beside a float model.

    Raises UserError where there is no base.
    """
    base = path / "base"
    if not (base / "config.json").exists():
        raise UserError(
            f"{base}, the model that the adapter was trained over, is missing or has no "
            "config.json; copy it there again"
        )
    return quantized if quantized.matches(base) else huggingface


def read_config(path: pathlib.Path) -> LlamaConfig:
    """The LlamaConfig of the run's base."""
    return format_of_base(path).read_config(path / "base")


def quantization_of(path: pathlib.Path) -> dict | None:
    """The base's; None for LoRA and QLoRA, whose merged models are float."""
    quantization = format_of_base(path).quantization_of(path / "base")
    if quantization and quantization.get("quantizer") == "nf4":
        return None
    return quantization


def files(path: pathlib.Path) -> list[pathlib.Path]:
    """The files of the run's base and adapter."""
    return format_of_base(path).files(path / "base") + weight_files(path / "adapter")


def check(path: pathlib.Path) -> None:
    """Raises UserError as `load_run` does."""
    load_run(path)


def import_base(path: pathlib.Path, folder: pathlib.Path) -> None:
    """Writes the merged model into `folder`, to be fine-tuned again."""
    copy_rest(path / "base", folder)
    quantized.save_quantized(load_run(path), folder)


def open_weights(path: pathlib.Path) -> tuple:
    """(config, {parameter name: a function that returns the tensor}) of a merged float model."""
    model = load_run(path)
    parameters = model.named_parameters()
    return model.config, {name: functools.partial(torch.Tensor.detach, p) for name, p in parameters}


def load_run(
    run: str | pathlib.Path, dtype: torch.dtype | None = None, device: str = "cpu"
) -> Llama:
    """A run's base with the run's adapter merged into it.

    dtype: what the float parts are cast to; None keeps what is stored. Raises UserError when the
    run is not finished, or base or tokenizer is not what the adapter was trained with.
    """
    run = pathlib.Path(run)
    base = run / "base"
    if not matches(run):
        raise UserError(
            f"{run} is no run of train.py (it has no run.json): there is no adapter to merge"
        )
    if not (run / "adapter").is_dir():
        raise UserError(
            f"{run} has no finished adapter yet; go on with: python train.py --resume --out "
            f"{quote(str(run))}"
        )
    format_ = format_of_base(run)
    model = format_.load_model(base, dtype, device)
    settings = load_adapter(model, run / "adapter")
    wanted, found = settings.get("base"), fingerprint_of(format_.files(base))
    if wanted != found:
        raise UserError(
            f"{run}/adapter was trained over the base {str(wanted)[:12]}, but {base} is "
            f"{str(found)[:12]}: merged, they would be wrong; train again with --fresh"
        )
    check_tokenizer_of_run(base)
    return merge(model)


def check_tokenizer_of_run(base: pathlib.Path) -> None:
    """Raises UserError when the tokenizer in base/ is not the one that the run was trained with."""
    record = base / "made_from.json"
    if not record.exists():
        return
    if tokenizer_files.load_tokenizer(base).digest() != read_json(record).get("tokenizer"):
        raise UserError(
            f"the tokenizer in {base} is not the one that the run was trained with; copy that one "
            "there again"
        )


load_model = load_run  # as every format calls it


def load_tokenizer(path: pathlib.Path) -> Tokenizer:
    """The tokenizer of the run's base, with the chat template that the run was trained in."""
    tokenizer = tokenizer_files.load_tokenizer(path / "base")
    settings = path / "adapter" / "adapter.json"
    template = read_json(settings).get("template") if settings.is_file() else None
    return tokenizer.with_template(template) if isinstance(template, str) else tokenizer


def save_merged(model: Llama, run: pathlib.Path, folder: str | pathlib.Path) -> None:
    """Writes a merged model and its run's tokenizer as a model folder."""
    with written_whole(folder) as beside:
        beside.mkdir()
        load_tokenizer(run).save(beside)
        copy_rest(run / "base", beside)
        in_groups = any(isinstance(layer, QuantLinear) for layer in model.modules())
        save = quantized.save_quantized if in_groups else huggingface.save_pretrained
        save(model, beside)
