"""This project's own folders of a quantized model: groups of codes, or NF4.

config.json has Hugging Face's fields and a `quantization` entry with bits and group size. Linear
layers that have others are listed there, as are those that stayed float: what was imported may mix.
model.safetensors has the packed codes, scales and offsets, and embedding, norms and head in float.
"""

import collections
import json
import pathlib
import shutil
from typing import Any

import torch
from safetensors.torch import save_file

from baselines import NF4Linear
from cli.errors import UserError
from cli.files import read_json, written_whole
from formats import huggingface
from formats.files import load_tensors, write_config
from formats.rest import RESTS, copy_rest
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
    layers = quantization.get("layers", {})
    for kind in (quantization, *(layers.values() if isinstance(layers, dict) else [layers])):
        check_kind(file, kind)
    return quantization


def check_kind(file: pathlib.Path, kind: Any) -> None:
    """Raises UserError unless `kind` has the bits and the group size of a layer, or is None."""
    fields = kind if isinstance(kind, dict) else {}
    bits, group_size = fields.get("bits"), fields.get("group_size")
    good_bits = bits in (2, 3, 4) and type(bits) is int
    if kind is not None and not (good_bits and type(group_size) is int and group_size > 0):
        raise UserError(
            f"{file}: quantization to {bits} bits in groups of {group_size} is not supported"
        )


def skeleton(path: pathlib.Path) -> Llama:
    """The model of a folder on the meta device: its shapes without memory."""
    config, quantization = read_config(path), quantization_of(path)
    if quantization.get("quantizer") == "nf4":
        return nf4_skeleton(config)
    layers = quantization.get("layers", {})
    if not layers:
        check_group_size(config, quantization["group_size"])
    try:
        return quantized_skeleton(config, quantization["bits"], quantization["group_size"], layers)
    except UserError as e:
        raise UserError(f"{path / 'config.json'}: {e}") from None


def quantized_skeleton(
    config: LlamaConfig, bits: int, group_size: int, layers: dict | None = None
) -> Llama:
    """A Llama on the meta device whose blocks have QuantLinears: shapes without memory.

    layers: {name: {"bits": int, "group_size": int}} of those that have others, or None for a float
    one. Raises UserError for a name that is no linear layer's, or groups that do not fit.
    """
    others = dict(layers or {})
    with torch.device("meta"):
        model = Llama(config)
        for path, layer in linears(model):
            kind = others.pop(path, {"bits": bits, "group_size": group_size})
            if kind is None:
                continue
            if layer.in_features % kind["group_size"]:
                raise UserError(
                    f"group size {kind['group_size']} does not divide the {layer.in_features} "
                    f"inputs of {path}"
                )
            packed = QuantLinear(layer.in_features, layer.out_features, **kind)
            model.set_submodule(path, packed)
    if others:
        raise UserError(f"{next(iter(others))} is quantized, but the model has no such layer")
    return model


def kinds_of(model: Llama) -> dict[str, tuple[int, int] | None]:
    """{linear layer: (bits, group size), or None for a float one}."""
    kinds = {}
    for name, layer in linears(model):
        kinds[name] = None
        if hasattr(layer, "group_size"):
            kinds[name] = layer.bits, layer.group_size
    return kinds


def describe(kinds: dict[str, tuple[int, int] | None]) -> dict:
    """The `quantization` entry for these layers: {"bits", "group_size"}, "layers" that differ."""
    counts = collections.Counter(kind for kind in kinds.values() if kind)
    usual = counts.most_common(1)[0][0]
    entry = dict(zip(("bits", "group_size"), usual, strict=True))
    others = {}
    for name, kind in kinds.items():
        if kind != usual:
            others[name] = kind and dict(zip(entry, kind, strict=True))
    return {**entry, "layers": others} if others else entry


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
    tensors = {}
    for name, p in model.named_parameters():  # tied ones once
        tensors[name] = p.detach().to(dtype or p.dtype)
    tensors |= dict(model.named_buffers())
    with written_whole(folder / "model.safetensors") as beside:
        save_file({name: t.contiguous().cpu() for name, t in tensors.items()}, beside)
    quantization = {**describe(kinds_of(model)), **origin}
    for name in RESTS:  # so that it is missed where it is lost
        if (folder / name).exists():
            quantization["rest"] = name
    write_config(model.config, folder, {"quantization": quantization})


def import_base(path: pathlib.Path, folder: pathlib.Path) -> None:
    """Copies a model into `folder` to be fine-tuned, without its tokenizer."""
    for name in ("model.safetensors", "config.json"):
        shutil.copyfile(path / name, folder / name)
    copy_rest(path, folder)
