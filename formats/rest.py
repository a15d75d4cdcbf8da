"""What a base keeps of the file that it came from, so that export.py can write that file back.

Beside model.safetensors stands gguf.safetensors or mlx.safetensors: all tensors that are no layers
in groups, as bytes, and in its metadata what else the format needs.
"""

import json
import pathlib
import shutil
from collections.abc import Callable
from typing import Any, NamedTuple

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor

from cli.errors import UserError
from cli.files import json_object, read_json, written_whole
from formats.files import open_file
from llama import Llama

GGUF_REST, MLX_REST = RESTS = ("gguf.safetensors", "mlx.safetensors")


class Rest(NamedTuple):
    """What was kept: tensors by the file's names, and what its format wrote beside them."""

    path: pathlib.Path
    tensors: dict[str, Tensor]  # they stay memory-mapped
    layout: dict[str, Any]


def save_rest(path: pathlib.Path, tensors: dict[str, Tensor], layout: dict[str, Any]) -> None:
    """Writes what `open_rest` reads; layout: of what JSON has."""
    text = json.dumps({"tensors": sorted(tensors), **layout})
    with written_whole(path) as beside:
        save_file(tensors, beside, metadata={"layout": text})


def open_rest(path: pathlib.Path) -> Rest:
    """What was kept; UserError where it is damaged."""
    try:
        tensors = {name: stored.read() for name, stored in open_file(path).items()}
        with safetensors.safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get("layout", "{}")
        layout = json_object(text.encode(), path)
    except UserError:
        raise damaged(path) from None
    if layout.get("tensors") != sorted(tensors):
        raise damaged(path)
    return Rest(path, tensors, layout)


def damaged(path: pathlib.Path) -> UserError:
    """The error for a rest that does not belong to its model."""
    return UserError(
        f"{path} is missing, damaged, or of another model; import the file that the model came "
        "from again, with train.py --fresh"
    )


def check_floats(rest: Rest, model: Llama, weights: dict[str, Callable[[], Tensor]]) -> None:
    """Raises UserError unless what was kept is what the model has; weights: functions that read it.

    Either was changed since, or what was kept is another model's.
    """
    for name, p in model.named_parameters():
        if name not in weights or not torch.equal(weights[name]().to(p.dtype), p):
            raise damaged(rest.path)


def kept_in(folder: pathlib.Path) -> pathlib.Path | None:
    """The file in a model's folder that keeps the rest, by its config.json; None for no such."""
    file = folder / "config.json"
    quantization = read_json(file).get("quantization") if file.exists() else None
    name = quantization.get("rest") if isinstance(quantization, dict) else None
    return folder / name if name in RESTS else None


def rest_of(folder: pathlib.Path, name: str) -> Rest | None:
    """What a model, or the base of a run, has kept of a file of this format, if it came from one.

    Raises UserError where that is missing or damaged.
    """
    for place in (folder, folder / "base"):
        file = kept_in(place)
        if file and file.name == name:
            return open_rest(file)
    return None


def copy_rest(path: pathlib.Path, folder: pathlib.Path) -> None:
    """Copies what a base has kept into another folder of the same model."""
    for name in RESTS:
        if (path / name).exists():
            shutil.copyfile(path / name, folder / name)
