"""Hugging Face's folders of a float LLaMA: config.json, safetensors or pytorch_model.bin files."""

import functools
import json
import pathlib
from collections.abc import Callable
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from cli.errors import UserError
from cli.files import read_json, written_whole
from formats.files import (
    Stored,
    all_finite,
    checked_config,
    checked_scaling,
    fill,
    open_file,
    weight_files,
    write_config,
)
from llama import Llama, LlamaConfig

ARCHITECTURES = {  # of each model_type; Mistral without its sliding window is a LLaMA
    "llama": [["LlamaForCausalLM"], ["LLaMAForCausalLM"], None],
    "mistral": [["MistralForCausalLM"], None],
}
# What transformers takes for a field that is left out, where that is not as for a LLaMA
MISTRAL = {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096}
# Fields that change a LLaMA's arithmetic but not the names and shapes of its tensors, which are
# checked in full. The first value is what is computed here; the others mean the same
PLAIN = {
    "hidden_act": ["silu"],
    "attention_bias": [False, None],
    "mlp_bias": [False, None],
    "partial_rotary_factor": [1, None],
    "original_max_position_embeddings": [None],  # transformers takes it before rope_scaling's
    "auto_map": [None],
}


def matches(path: pathlib.Path) -> bool:
    """Whether `path` is a folder with a config.json; `quantized` is asked before this."""
    return (path / "config.json").exists()


def files(path: pathlib.Path) -> list[pathlib.Path]:
    """config.json and the files of weights."""
    return sorted([path / "config.json", *weight_files(path)])


def quantization_of(path: pathlib.Path) -> None:
    """None: a float model."""
    return None


def read_config(path: pathlib.Path) -> LlamaConfig:
    """The LlamaConfig in config.json; UserError as `config_of`, and for quantized weights."""
    file = path / "config.json"
    fields = read_json(file)
    if fields.get("quantization_config") is not None:
        method = json.dumps(fields["quantization_config"])[:60]
        raise UserError(
            f"{file}: quantization_config = {method} is not supported; float weights, GPTQ and MLX "
            "are"
        )
    return config_of(file, fields)


def config_of(file: pathlib.Path, fields: dict) -> LlamaConfig:
    """The LlamaConfig of the fields in `file`, but for how the weights are quantized.

    Raises UserError for any field that asks for what is not computed here.
    """
    kind = fields.get("model_type")
    architectures = fields.get("architectures")
    if kind not in list(ARCHITECTURES) or architectures not in ARCHITECTURES[kind]:
        raise UserError(
            f"{file}: model_type = {json.dumps(kind)} with architectures = "
            f"{json.dumps(architectures)} is not supported, only llama with LlamaForCausalLM and "
            "mistral with MistralForCausalLM are"
        )
    if kind == "mistral":
        fields = {**MISTRAL, **fields}
    for name, allowed in PLAIN.items():
        value = fields.get(name, allowed[0])
        if value not in allowed:
            raise UserError(
                f"{file}: {name} = {json.dumps(value)} is not supported, only "
                f"{json.dumps(allowed[0])} is"
            )
    fields |= read_rope(file, fields)
    if fields.get("num_key_value_heads") is None:  # older than grouped-query attention
        fields["num_key_value_heads"] = fields.get("num_attention_heads")
    config = checked_config(file, fields)
    check_window(file, fields.get("sliding_window"), config.max_position_embeddings)
    return config


def check_window(file: pathlib.Path, window: Any, context: int) -> None:
    """Raises UserError for a sliding window, unless it is as wide as the context."""
    if window is not None and not (type(window) is int and window >= context):
        raise UserError(
            f"{file}: sliding_window = {json.dumps(window)} is not supported; every token attends "
            f"to all before it, up to max_position_embeddings = {context}"
        )


def read_rope(file: pathlib.Path, fields: dict) -> dict:
    """rope_scaling, and rope_theta where it is given, as a LlamaConfig has them.

    Old configs keep them in these fields, those of transformers 5 in rope_parameters. Raises
    UserError where they contradict each other, or ask for what is not computed here.
    """
    thetas, scalings = [fields.get("rope_theta")], []
    for name in ("rope_scaling", "rope_parameters"):
        rope = fields.get(name)
        if rope is None:
            continue
        if not isinstance(rope, dict):
            raise UserError(f"{file}: {name} = {json.dumps(rope)} is no JSON object")
        if rope.get("partial_rotary_factor", 1) not in (1, None):
            raise UserError(f"{file}: {name}.partial_rotary_factor is not supported, only 1 is")
        thetas.append(rope.get("rope_theta"))
        scalings.append(checked_scaling(file, name, rope))
    thetas = [theta for theta in thetas if theta is not None]
    if any(theta != thetas[0] for theta in thetas) or any(s != scalings[0] for s in scalings):
        raise UserError(
            f"{file}: rope_theta, rope_scaling and rope_parameters contradict each other; remove "
            "what is wrong"
        )
    read = {"rope_scaling": scalings[0] if scalings else None}
    return {**read, "rope_theta": thetas[0]} if thetas else read


def open_weights(path: pathlib.Path) -> tuple[LlamaConfig, dict[str, Callable[[], Tensor]]]:
    """(config, {parameter name: a function that reads the tensor}).

    Names and shapes are checked here, for the whole checkpoint; that a tensor holds finite floats,
    when it is read. UserError names file and tensor.
    """
    config = read_config(path)
    file, found = open_folder(path)
    weights = float_weights(file, found, parameter_shapes(config))
    check_the_rest(found, set(weights), config.tie_word_embeddings)
    return config, weights


def float_weights(
    file: pathlib.Path, found: dict[str, Stored], shapes: dict[str, tuple]
) -> dict[str, Callable[[], Tensor]]:
    """{name: a function that reads it} of tensors; UserError if one is missing or misshapen."""
    weights = {}
    for name, shape in shapes.items():
        if name not in found:
            raise UserError(f"{file}: tensor {name} is missing")
        stored = found[name]
        if stored.shape != shape:
            raise UserError(
                f"{stored.file}: tensor {name} has the shape {list(stored.shape)}, but the config "
                f"asks for {list(shape)}"
            )
        weights[name] = functools.partial(read_float, stored)
    return weights


def parameter_shapes(config: LlamaConfig) -> dict[str, tuple]:
    """The shape of every parameter of a Llama by name; tied ones once."""
    with torch.device("meta"):
        model = Llama(config)
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


def check_the_rest(found: dict[str, Stored], known: set[str], tied: bool) -> None:
    """Raises UserError for a tensor that no parameter takes, unless the others imply it."""
    for name, stored in found.items():
        if name in known or name.endswith("rotary_emb.inv_freq") or name == "rope.freqs":
            continue
        if not (tied and name == "lm_head.weight"):
            raise UserError(f"{stored.file}: tensor {name} is unexpected; LLaMA has no such weight")
        if not torch.equal(stored.read(), found["model.embed_tokens.weight"].read()):
            raise UserError(
                f"{stored.file}: tensor {name} is not the embedding, though config.json ties them"
            )


def read_float(stored: Stored) -> Tensor:
    """A stored tensor; UserError unless it holds finite floating-point numbers."""
    tensor = stored.read()
    if tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise UserError(
            f"{stored.file}: tensor {stored.name} holds {tensor.dtype}, not floating-point numbers"
        )
    if not all_finite(tensor):
        raise UserError(f"{stored.file}: tensor {stored.name} has NaN or infinite values")
    return tensor


def open_folder(folder: pathlib.Path) -> tuple[pathlib.Path, dict[str, Stored]]:
    """(file, tensors by name) of the one file, or of the index and all the files it lists.

    Raises UserError where a file or a listed tensor is missing, or a tensor is there twice.
    """
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{name}.index.json"
        if (folder / name).exists():
            return folder / name, open_file(folder / name)
        if index.exists():
            return index, open_listed(folder, index)
    raise UserError(
        f"{folder}: found no model.safetensors or pytorch_model.bin, nor an index of several files"
    )


def open_listed(folder: pathlib.Path, index: pathlib.Path) -> dict[str, Stored]:
    """The tensors by name of all files that an index lists; UserError as in `open_folder`."""
    listed = read_json(index).get("weight_map")
    names = list(listed.values()) if isinstance(listed, dict) else [None]
    if not all(isinstance(file, str) and "/" not in file for file in names):
        raise UserError(
            f"{index}: weight_map does not say which file of this folder holds which tensor"
        )
    found = {}
    for file in sorted(set(names)):
        for name, stored in open_file(folder / file).items():
            if name in found:
                other = found[name].file.name
                raise UserError(f"{stored.file}: tensor {name} is also in {other}")
            found[name] = stored
    for name, file in listed.items():
        if name not in found or found[name].file.name != file:
            raise UserError(
                f"{folder / file}: tensor {name} is missing, though {index.name} says it is here"
            )
    return found


def check(path: pathlib.Path) -> None:
    """Raises UserError for a tensor that is missing or of another shape; reads headers only."""
    open_weights(path)


def load_model(path: pathlib.Path, dtype: torch.dtype | None = None, device: str = "cpu") -> Llama:
    """The model; dtype None keeps the checkpoint's own (its embedding's, where they differ)."""
    return load_float(open_weights(path), dtype, device)


def load_float(opened: tuple, dtype: torch.dtype | None, device: str) -> Llama:
    """The model of what `open_weights` returned."""
    config, weights = opened
    with torch.device("meta"):
        model = Llama(config)
    fill(model, weights, dtype=dtype, device=device)
    return model.to(model.model.embed_tokens.weight.dtype)


def save_pretrained(model: Llama, folder: str | pathlib.Path) -> None:
    """Writes a float model as a Hugging Face folder; other files in it, as the tokenizer, stay."""
    folder = pathlib.Path(folder)
    with written_whole(folder / "model.safetensors") as path:
        tensors = {name: p.detach().contiguous() for name, p in model.named_parameters()}
        safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
    write_config(model.config, folder)
