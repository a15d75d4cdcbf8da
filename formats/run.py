"""A run of train.py as a model: its base with its adapter merged in, in memory or as a folder."""

import hashlib
import pathlib
import shutil

import torch

import formats
from cli.errors import UserError
from cli.files import read_json, written_whole
from formats.adapter import load_adapter
from formats.files import fingerprint
from formats.huggingface import save_pretrained
from formats.quantized import save_quantized
from llama import Llama, LlamaConfig
from merge import merge
from quant import QuantLinear
from text.tokenizer import load_tokenizer


def matches(path: pathlib.Path) -> bool:
    """Whether `path` is the folder of a run."""
    return (path / "run.json").exists()


def read_config(path: pathlib.Path) -> LlamaConfig:
    """The base's."""
    return formats.read_config(path / "base")


def load_run(
    run: str | pathlib.Path, dtype: torch.dtype | None = None, device: str = "cpu"
) -> Llama:
    """A run's base with the run's adapter merged into it.

    dtype: what the float parts are cast to; None keeps what is stored. Raises UserError when the
    run is not finished, or base or tokenizer is not what the adapter was trained with.
    """
    run = pathlib.Path(run)
    base = run / "base"
    if not (run / "adapter").is_dir():
        raise UserError(
            f"{run} has no finished adapter yet; go on with train.py --resume --out {run}"
        )
    if not base.is_dir():
        raise UserError(
            f"{base}, the model that the adapter was trained over, is missing; copy it there again"
        )
    model = formats.load_model(base, dtype, device)
    settings = load_adapter(model, run / "adapter")
    wanted, found = settings.get("base"), fingerprint(base)
    if wanted != found:
        raise UserError(
            f"{run}/adapter was trained over the base {str(wanted)[:12]}, but {base} is "
            f"{str(found)[:12]}: merged, they would be wrong; train again with --fresh"
        )
    check_tokenizer_of_run(base)
    return merge(model)


def check_tokenizer_of_run(base: pathlib.Path):
    """Raises UserError when the tokenizer in base/ is not the one that the run was trained with."""
    record, tokenizer = base / "made_from.json", base / "tokenizer.model"
    if not record.exists():
        return
    found = hashlib.sha256(tokenizer.read_bytes()).hexdigest()
    if found != read_json(record).get("tokenizer"):
        raise UserError(
            f"{tokenizer} is not the one that the run was trained with; copy that one there again"
        )


load_model = load_run


def save_merged(model: Llama, run: pathlib.Path, folder: str | pathlib.Path):
    """Writes a merged model and its run's tokenizer as a model folder."""
    with written_whole(folder) as beside:
        beside.mkdir()
        tokenizer = load_tokenizer(run / "base")
        (beside / "tokenizer.model").write_bytes(tokenizer.serialized_model_proto())
        kept = run / "base" / "gguf.safetensors"  # what export.py writes back into a GGUF file
        if kept.exists():
            shutil.copyfile(kept, beside / kept.name)
        quantized = any(isinstance(layer, QuantLinear) for layer in model.modules())
        save = save_quantized if quantized else save_pretrained
        save(model, beside)
