"""This project's own folders of a quantized model: groups of codes, or NF4.

config.json has Hugging Face's fields and a `quantization` entry with bits and group size;
model.safetensors has the packed codes, scales and offsets, and embedding, norms and head in float.
"""

import json
import pathlib
import shutil

import torch
from safetensors.torch import save_file

from baselines import NF4Linear
from cli.errors import UserError
from cli.files import read_json, written_whole
from formats import huggingface
from formats.files import GGUF_REST, load_tensors, write_config
from llama import Llama, LlamaConfig, linears
from quant import QuantLinear, check_group_size

read_config = huggingface.read_config
files = huggingface.files


def matches(path: pathlib.Path) -> bool:
    """Whether `path` is a folder whose config.json has a `quantization` entry."""
    file = path / "config.json"
    return file.exists() and read_json(file).get("quantization") is not None


def quantization_of(path: pathlib.Path) -> dict:
    """The `quantization` entry of config.json; UserError where bits or group size are invalid."""
    file = path / "config.json"
    quantization = read_json(file)["quantization"]
    if not isinstance(quantization, dict):
        raise UserError(
            f"{file}: quantization = {json.dumps(quantization)} says nothing of bits and group size"
        )
    bits, group_size = quantization.get("bits"), quantization.get("group_size")
    if bits not in (2, 3, 4) or type(bits) is not int or type(group_size) is not int:
        raise UserError(
            f"{file}: quantization to {bits} bits in groups of {group_size} is not supported"
        )
    return quantization


def skeleton(path: pathlib.Path) -> Llama:
    """The model of a folder on the meta device: its shapes without memory."""
    config, quantization = read_config(path), quantization_of(path)
    if quantization.get("quantizer") == "nf4":
        return nf4_skeleton(config)
    check_group_size(config, quantization["group_size"])
    return quantized_skeleton(config, quantization["bits"], quantization["group_size"])


def quantized_skeleton(config: LlamaConfig, bits: int, group_size: int) -> Llama:
    """A Llama on the meta device whose blocks have QuantLinears: shapes without memory."""
    with torch.device("meta"):
        model = Llama(config)
        for path, layer in linears(model):
            packed = QuantLinear(layer.in_features, layer.out_features, bits, group_size)
            model.set_submodule(path, packed)
    return model


def nf4_skeleton(config: LlamaConfig) -> Llama:
    """A Llama on the meta device whose blocks have NF4Linears."""
    with torch.device("meta"):
        model = Llama(config)
        for name, layer in linears(model):
            model.set_submodule(name, NF4Linear(layer.in_features, layer.out_features))
    return model


def check(path: pathlib.Path) -> None:
    """Raises UserError for a tensor that is missing, of another shape, or not finite."""
    load_model(path)


def load_model(path: pathlib.Path, dtype: torch.dtype | None = None, device: str = "cpu") -> Llama:
    """The Llama of a folder; on the CPU its tensors stay memory-mapped files.

    dtype: what embedding, norms and head are cast to. Raises UserError when a tensor is missing,
    unknown or of another shape.
    """
    return load_tensors(skeleton(path), path / "model.safetensors", dtype, device)


def load_quantized(
    folder: str | pathlib.Path, dtype: torch.dtype | None = None, device: str = "cpu"
) -> Llama:
    """As `load_model`; UserError for a folder that holds no codes in groups with offsets."""
    folder = pathlib.Path(folder)
    if not matches(folder):
        raise UserError(
            f"{folder} holds no quantized model; make one with train.py --weights {folder} "
            "--data FILE"
        )
    if quantization_of(folder).get("quantizer") == "nf4":
        raise UserError(f"{folder} is quantized to NF4, not in groups with offsets")
    return load_model(folder, dtype, device)


def save_quantized(
    model: Llama, folder: str | pathlib.Path, dtype: torch.dtype | None = None, **origin
) -> None:
    """Writes config.json and model.safetensors into `folder` (new, or with other files in it).

    The `quantization` entry records bits, group size and what `origin` adds. dtype: what embedding,
    norms and head are stored in, when not as they are.
    """
    folder = pathlib.Path(folder)
    layer = next(m for m in model.modules() if hasattr(m, "group_size"))
    tensors = {}
    for name, p in model.named_parameters():  # tied ones once
        tensors[name] = p.detach().to(dtype or p.dtype)
    tensors |= dict(model.named_buffers())
    with written_whole(folder / "model.safetensors") as beside:
        save_file({name: t.contiguous().cpu() for name, t in tensors.items()}, beside)
    quantization = {"bits": layer.bits, "group_size": layer.group_size, **origin}
    write_config(model.config, folder, {"quantization": quantization})


def import_base(path: pathlib.Path, folder: pathlib.Path) -> None:
    """Copies a model into `folder` to be fine-tuned, without its tokenizer."""
    for name in ("model.safetensors", "config.json", GGUF_REST):  # the last if it has one
        if (path / name).exists():
            shutil.copyfile(path / name, folder / name)
