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
import zipfile
from collections.abc import Callable
from typing import NamedTuple

import safetensors
import torch
from torch import Tensor, nn

from cli.errors import UserError
from cli.files import written_whole
from llama import Llama, LlamaConfig

GGUF_REST = "gguf.safetensors"  # all of a GGUF file but its linear layers, beside a base of it


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


def checked_config(path: pathlib.Path, fields: dict) -> LlamaConfig:
    """A LlamaConfig of the fields with its names; UserError for missing or invalid ones."""
    values = {}
    for field in dataclasses.fields(LlamaConfig):
        value = values[field.name] = fields.get(field.name, field.default)
        if value is dataclasses.MISSING or value is None:
            raise UserError(f"{path}: {field.name} is missing")
        if not _sensible(field, value):
            raise UserError(
                f"{path}: {field.name} = {json.dumps(value)} is not a sensible "
                f"{field.type.__name__}"
            )
    config = LlamaConfig(**values)
    D, H, KV = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
    if D % (2 * H) or H % KV:
        raise UserError(
            f"{path}: width {D}, {H} heads and {KV} key-value heads do not divide into even-sized "
            "heads"
        )
    if fields.get("head_dim", config.head_dim) not in (None, config.head_dim):
        head_dim = json.dumps(fields["head_dim"])
        raise UserError(f"{path}: head_dim = {head_dim} contradicts width {D} and {H} heads")
    return config


def _sensible(field, value):
    if field.type is bool:
        return type(value) is bool
    if field.type is float:
        return type(value) in (int, float) and 0 < value < math.inf
    smallest = 0 if field.name.endswith("token_id") else 1
    return type(value) is int and smallest <= value < 2**24


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
        expected = _kind(wanted.get(name), name in buffers)
        found = _kind(tensors.get(name), name in buffers)
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


def _kind(tensor, exact):
    """Shape and dtype; any float dtype will do where it need not be `exact`."""
    if tensor is None:
        return None
    dtype = "float" if tensor.is_floating_point() and not exact else tensor.dtype
    return (*tensor.shape, dtype)
