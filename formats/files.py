"""Files of weights: what is in them, checked, and read only when it is needed.

`open_file` returns a record for every tensor, whose function reads it through the memory map of its
file. So a model larger than memory can be quantized block by block.
"""

import dataclasses
import functools
import hashlib
import json
import math
import pathlib
import typing
import zipfile
from collections.abc import Callable
from typing import NamedTuple

import safetensors
import torch
from torch import Tensor, nn

from cli.errors import UserError
from cli.files import written_whole
from llama import Llama, LlamaConfig


class Stored(NamedTuple):
    """One tensor in one file: where it is, its shape, and a function that reads it."""

    file: pathlib.Path
    name: str
    shape: tuple
    read: Callable[[], Tensor]


def open_file(path: pathlib.Path) -> dict[str, Stored]:
    """The tensors of a file by name: safetensors, or a pickle with nothing but tensors in it.

    Both are memory-mapped, except pickles older than PyTorch 1.6. Raises UserError if the file
    cannot be read.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; the download is incomplete")
    try:
        found = _open_safetensors(path) if path.suffix == ".safetensors" else _open_pickle(path)
        if not found:
            raise ValueError("no tensors")
    except Exception as e:  # a damaged file can raise any exception
        raise UserError(
            f"{path}: not a file of weights, or truncated or corrupt ({type(e).__name__}); "
            "fetch it again, or save it as safetensors"
        ) from None
    return found


def _open_safetensors(path):
    file = safetensors.safe_open(path, framework="pt")
    found = {}
    for name in file.keys():  # noqa: SIM118, no dictionary
        shape = tuple(file.get_slice(name).get_shape())
        found[name] = Stored(path, name, shape, functools.partial(file.get_tensor, name))
    return found


def _open_pickle(path):
    mapped = zipfile.is_zipfile(path)
    content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    found = {}
    for name, tensor in content.items():
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
            raise ValueError("not only tensors")
        found[name] = Stored(path, name, tuple(tensor.shape), tensor.detach)
    return found


def weight_files(folder: pathlib.Path) -> list[pathlib.Path]:
    """The files in `folder` that may hold weights, by name."""
    files = []
    for file in sorted(folder.iterdir()):
        visible = file.is_file() and not file.name.startswith(".")
        if visible and file.suffix in (".safetensors", ".bin", ".pth"):
            files.append(file)
    return files


def all_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite; unlike `isfinite`, without a copy (but of float8)."""
    if not tensor.numel():
        return True
    wide = tensor.float() if tensor.itemsize == 1 else tensor  # float8 has no aminmax
    return all(extreme.isfinite() for extreme in wide.aminmax())  # NaN gets through aminmax


def fingerprint_of(files: list[pathlib.Path]) -> str:
    """SHA-256 of the files of a model, in seconds.

    Of a file above 64 MB, 4,096 samples are read. Even one block trained further differs in some of
    them, so that tells models apart.
    """
    sha = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        sha.update(f"{file.name} {size}".encode())
        with file.open("rb") as f:
            for start in range(0, size, max(2**14, size // 4096)):
                f.seek(start)
                sha.update(f.read(2**14))
    return sha.hexdigest()


# ---- the config


SCALINGS = {  # the numbers that each type of rope scaling needs; the first two scale nothing
    "default": (),
    "none": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
# What else may stand beside them: the formats check what they mean
BESIDE_SCALING = {
    "rope_type",
    "type",
    "rope_theta",
    "partial_rotary_factor",
    "original_max_position_embeddings",
}


def checked_config(path: pathlib.Path, fields: dict) -> LlamaConfig:
    """A LlamaConfig of the fields with its names; UserError for missing or invalid ones.

    rope_scaling is taken as it is: it comes from `checked_scaling`.
    """
    values = {}
    for field in dataclasses.fields(LlamaConfig):
        value = values[field.name] = fields.get(field.name, field.default)
        kinds = typing.get_args(field.type) or (field.type,)
        if value is dataclasses.MISSING or (value is None and type(None) not in kinds):
            raise UserError(f"{path}: {field.name} is missing")
        if not (value is None or dict in kinds or _sensible(field.name, value, kinds)):
            raise UserError(
                f"{path}: {field.name} = {json.dumps(value)} is not a sensible {kinds[0].__name__}"
            )
    D, H = values["hidden_size"], values["num_attention_heads"]
    KV, K = values["num_key_value_heads"], values["head_dim"]
    if D % H or H % KV or (K or D // H) % 2:
        own = f" of head_dim {K}" if K else ""
        raise UserError(
            f"{path}: width {D}, {H} heads{own} and {KV} key-value heads do not divide into "
            "even-sized heads"
        )
    return LlamaConfig(**values)


def _sensible(name, value, kinds):
    if bool in kinds:
        return type(value) is bool
    if float in kinds:
        return type(value) in (int, float) and 0 < value < math.inf
    if isinstance(value, list):
        several = list[int] in kinds and len(value) > 0
        return several and all(_sensible(name, one, (int,)) for one in value)
    smallest = 0 if name.endswith("token_id") else 1
    return type(value) is int and smallest <= value < 2**24


def checked_scaling(path: pathlib.Path, name: str, scaling: dict) -> dict | None:
    """A LlamaConfig's rope_scaling from Hugging Face's fields; None where nothing is scaled.

    name: what the file calls `scaling`, for the message. Raises UserError for a type that
    `llama.scale_frequencies` does not compute, and for a field that is missing, invalid or unknown.
    """
    scaling = {field: value for field, value in scaling.items() if value is not None}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in list(SCALINGS):
        raise UserError(
            f"{path}: {name} of type {json.dumps(kind)} is not supported, only default, linear and "
            "llama3 are"
        )
    if scaling.get("type", kind) != kind:
        raise UserError(f"{path}: {name} has two types; remove the wrong one")
    checked = {"rope_type": kind}
    for field in SCALINGS[kind]:
        value = checked[field] = scaling.get(field)
        if value is None:
            raise UserError(f"{path}: {name}.{field} is missing, which type {kind} needs")
        number = type(value) in (int, float) and 0 < value < 2**53
        if not number or (field == "factor" and value < 1):
            raise UserError(f"{path}: {name}.{field} = {json.dumps(value)} is not sensible")
    unknown = scaling.keys() - checked.keys() - BESIDE_SCALING
    if unknown:
        field = min(unknown)
        value = json.dumps(scaling[field])
        raise UserError(f"{path}: {name}.{field} = {value} is not supported with type {kind}")
    if kind == "llama3" and checked["low_freq_factor"] >= checked["high_freq_factor"]:
        raise UserError(
            f"{path}: {name}.high_freq_factor = {checked['high_freq_factor']} is not above its "
            f"low_freq_factor = {checked['low_freq_factor']}"
        )
    return checked if SCALINGS[kind] else None


def write_config(
    config: LlamaConfig, folder: str | pathlib.Path, extra: dict | None = None
) -> None:
    """Writes `config.json` with Hugging Face's fields and the `extra` ones."""
    fields = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        **dataclasses.asdict(config),
        **(extra or {}),
    }
    with written_whole(pathlib.Path(folder) / "config.json") as beside:
        beside.write_text(json.dumps(fields, indent=1) + "\n", encoding="utf-8")


# ---- into a model


def fill(
    module: nn.Module,
    weights: dict[str, Callable[[], Tensor]],
    prefix: str = "",
    dtype: torch.dtype | None = None,
    device: str = "cpu",
) -> nn.Module:
    """Gives a module on the meta device its parameters, each from `weights[prefix + name]()`.

    Without a change of dtype or device nothing is copied: memory-mapped weights stay mapped. Shared
    parameters stay shared. Returns the module.
    """
    made = {}
    for name, old in list(module.named_parameters(remove_duplicate=False)):
        if id(old) not in made:
            tensor = weights[prefix + name]().to(device=device, dtype=dtype)
            made[id(old)] = nn.Parameter(tensor)
        owner, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(owner), leaf, made[id(old)])
    return module


def in_one_dtype(model: Llama, dtype: torch.dtype | None, device: str) -> Llama:
    """A model whose float parts, frozen, are in `dtype`; None: in one that holds all of them."""
    dtypes = (p.dtype for p in model.parameters())
    dtype = dtype or functools.reduce(torch.promote_types, dtypes)
    return model.requires_grad_(False).to(device, dtype)


def load_tensors(model: Llama, file: pathlib.Path, dtype: torch.dtype | None, device: str) -> Llama:
    """Gives a model on the meta device the tensors in `file`, which must be just its own.

    dtype: what embedding, norms and head are cast to. Raises UserError when a tensor is missing,
    unknown, of another shape or dtype, or not finite.
    """
    tensors = {name: stored.read() for name, stored in open_file(file).items()}
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not all_finite(tensor):
            raise UserError(f"{file}: tensor {name} has NaN or infinite values")
    buffers = dict(model.named_buffers())
    wanted = {**dict(model.named_parameters()), **buffers}  # tied weights appear once
    for name in sorted(wanted.keys() | tensors.keys()):
        expected = _kind(wanted.get(name), name, name in buffers)
        found = _kind(tensors.get(name), name, name in buffers)
        if expected != found:
            raise UserError(
                f"{file}: {name} is {found or 'missing'} where {expected or 'no such tensor'} "
                "belongs; quantize the model again"
            )
    tied = model.config.tie_word_embeddings
    if tied:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    model.load_state_dict(tensors, assign=True)
    if tied:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model.requires_grad_(False).to(device, dtype)


def _kind(tensor, name, exact):
    """Shape and dtype; any float dtype will do where it need not be `exact`."""
    if tensor is None:
        return None
    dtype = "float" if tensor.is_floating_point() and not exact else tensor.dtype
    if name.endswith(".scale") and dtype == torch.float32:
        dtype = torch.float16  # finer than our own scales: from an imported file
    return (*tensor.shape, dtype)
