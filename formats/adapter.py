"""An adapter's folder: adapter.safetensors, and adapter.json with rank, alpha and targets."""

import json
import math
import pathlib

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from baselines import LoRALinear
from cli.errors import UserError
from cli.files import read_json, written_whole
from llama import LINEARS
from qalora import QALoRALinear, adapter_parameters, add_adapters


def save_adapter(model: nn.Module, folder: str | pathlib.Path, **origin) -> None:
    """Writes the adapters of `model` into a new folder; `origin` is kept in adapter.json."""
    adapted = (QALoRALinear, LoRALinear)
    layers = {name: m for name, m in model.named_modules() if isinstance(m, adapted)}
    first = next(iter(layers.values()))
    targets = sorted({name.rpartition(".")[2] for name in layers}, key=LINEARS.index)
    settings = {"rank": first.rank, "alpha": first.alpha, "targets": targets, **origin}
    with written_whole(folder) as beside:
        beside.mkdir()
        parameters = adapter_parameters(model)
        tensors = {name: p.detach().cpu().contiguous() for name, p in parameters.items()}
        save_file(tensors, beside / "adapter.safetensors")
        (beside / "adapter.json").write_text(json.dumps(settings, indent=2) + "\n")


def load_adapter(model: nn.Module, folder: str | pathlib.Path) -> dict:
    """Adds the adapters kept in `folder` to `model`; returns what adapter.json says.

    Raises UserError when that is missing or describes no adapter, and as `restore_adapter` does.
    """
    path = pathlib.Path(folder) / "adapter.json"
    if not path.is_file():
        raise UserError(f"{path}: no such file; train the adapter again")
    settings = read_json(path)
    rank, alpha, targets = (settings.get(name) for name in ("rank", "alpha", "targets"))
    good_rank = rank == "full" or (type(rank) is int and rank > 0)
    good_alpha = type(alpha) in (int, float) and 0 < alpha < math.inf
    good_targets = type(targets) is list and targets and all(t in LINEARS for t in targets)
    if not (good_rank and good_alpha and good_targets):
        raise UserError(
            f"{path}: rank {rank}, alpha {alpha}, targets {targets} are no adapter's; "
            "train it again"
        )
    add_adapters(model, rank, alpha, targets)
    restore_adapter(model, folder)
    return settings


def restore_adapter(model: nn.Module, folder: str | pathlib.Path) -> None:
    """Copies the tensors of a folder's adapter.safetensors into the adapters of `model`.

    Raises UserError when the file is missing or damaged, or a tensor does not fit: an adapter
    trained over other groups has no meaning here.
    """
    path, parameters = pathlib.Path(folder) / "adapter.safetensors", adapter_parameters(model)
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as e:
        raise UserError(f"{path} is missing or damaged ({e}); train the adapter again") from e
    for name in sorted(parameters.keys() | tensors.keys()):
        wanted = list(parameters[name].shape) if name in parameters else None
        found = list(tensors[name].shape) if name in tensors else None
        if wanted != found:
            raise UserError(
                f"{path}: {name} is {found or 'missing'} where the model needs "
                f"{wanted or 'none'}; it belongs to a model with other layers or another group "
                "size, or has another rank"
            )
        parameters[name].data.copy_(tensors[name])
