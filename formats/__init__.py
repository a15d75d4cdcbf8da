"""Model files in and out: `load_model(path)` takes whatever is at `path`.

A format is a module in this folder and a line in FORMATS. It has

    matches(path)           whether `path` is in this format
    read_config(path)       its LlamaConfig
    files(path)             the files that make it what it is, whose bytes tell models apart
    quantization_of(path)   {"bits", "group_size", ...}, or None for float weights
    check(path)             raises UserError for what is missing or misshapen, before slow work
    load_model(path, dtype, device)

and, so that it can be fine-tuned,

    open_weights(path)          float weights: (config, {parameter name: a function that reads it})
    import_base(path, folder)   quantized ones: writes a folder of our own, without the tokenizer
    load_tokenizer(path)               } only where the file of weights
    check_tokenizer(path, tokenizer)   } brings its vocabulary

A run of train.py is accepted wherever a model is.
"""

import pathlib
from types import ModuleType

import torch

from cli.errors import UserError
from formats import gguf, gptq, huggingface, meta, mlx, quantized, run
from formats.files import fingerprint_of
from llama import Llama, LlamaConfig
from text import tokenizer as tokenizer_files
from text.tokenizer import Tokenizer

__all__ = [
    "check",
    "check_tokenizer",
    "files",
    "fingerprint",
    "format_of",
    "import_base",
    "load_model",
    "load_pretrained",
    "load_tokenizer",
    "open_weights",
    "quantization_of",
    "read_config",
]

FORMATS = {  # the file in a folder, or the end of a file's name; the first that matches is the one
    run: "run.json",
    gguf: ".gguf",
    gptq: "config.json",
    mlx: "config.json",
    quantized: "config.json",
    huggingface: "config.json",
    meta: "params.json",
}
ENDINGS = tuple(name for name in FORMATS.values() if name.startswith("."))


def format_of(path: str | pathlib.Path) -> ModuleType:
    """The module for what is at `path`; UserError if there is none."""
    path = pathlib.Path(path)
    for module in FORMATS:
        if module.matches(path):
            return module
    if not path.exists():
        raise UserError(f"there is no {path}; name a model or a run")
    *names, last = dict.fromkeys(FORMATS.values())
    raise UserError(
        f"{path}: found none of {', '.join(names)} or {last}; name a folder with LLaMA weights, a "
        "run's folder, or a .gguf file itself"
    )


def read_config(path: str | pathlib.Path) -> LlamaConfig:
    """The dimensions of the model at `path`."""
    return format_of(path).read_config(pathlib.Path(path))


def files(path: str | pathlib.Path) -> list[pathlib.Path]:
    """The config and weight files of a model: of a folder, of a run, or the file itself."""
    return format_of(path).files(pathlib.Path(path))


def fingerprint(path: str | pathlib.Path) -> str:
    """SHA-256 of a model, in seconds."""
    return fingerprint_of(files(path))


def quantization_of(path: str | pathlib.Path) -> dict | None:
    """Bits, group size and more of quantized weights; None for float ones."""
    return format_of(path).quantization_of(pathlib.Path(path))


def check(path: str | pathlib.Path) -> None:
    """Raises UserError for weights that are missing or misshapen."""
    format_of(path).check(pathlib.Path(path))


def check_tokenizer(path: str | pathlib.Path, tokenizer: Tokenizer) -> None:
    """Raises UserError when the weights come with a vocabulary that is not the tokenizer's."""
    module = format_of(path)
    if hasattr(module, "check_tokenizer"):
        module.check_tokenizer(pathlib.Path(path), tokenizer)


def load_tokenizer(path: str | pathlib.Path) -> Tokenizer:
    """The tokenizer of the model at `path`, or in a file of its own."""
    path = pathlib.Path(path)
    for module in FORMATS:
        if hasattr(module, "load_tokenizer") and module.matches(path):
            return module.load_tokenizer(path)
    return tokenizer_files.load_tokenizer(path)


def open_weights(path: str | pathlib.Path) -> tuple:
    """(config, {parameter name: a function that reads it}) of float weights."""
    module = format_of(path)
    if module.quantization_of(pathlib.Path(path)) is not None:
        raise UserError(f"{path}: this model is quantized; a float model is needed here")
    return module.open_weights(pathlib.Path(path))


def import_base(path: str | pathlib.Path, folder: pathlib.Path) -> None:
    """Writes quantized weights as a folder of our own, with the same codes."""
    format_of(path).import_base(pathlib.Path(path), folder)


def load_model(
    path: str | pathlib.Path, dtype: torch.dtype | None = None, device: str = "cpu"
) -> Llama:
    """The Llama of a float, quantized or merged model, or of a run (base and adapter, merged).

    dtype: what the float parts are cast to; None keeps what is stored. Raises UserError when there
    is no model, or a run is not finished or does not belong together.
    """
    return format_of(path).load_model(pathlib.Path(path), dtype, device)


def load_pretrained(
    path: str | pathlib.Path, dtype: torch.dtype | None = None, device: str = "cpu"
) -> Llama:
    """The float model at `path`; dtype None keeps the checkpoint's own."""
    return huggingface.load_float(open_weights(path), dtype, device)
