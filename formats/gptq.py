"""GPTQ folders (AutoGPTQ, GPTQModel, transformers) as a base: codes, scales and zeros as they are.

A linear layer NAME of I inputs and O outputs, in G groups, is

    NAME.qweight  int32 [I * bits / 32, O]   the codes of an output: one little-endian bit stream
    NAME.qzeros   int32 [G, O * bits / 32]   the zeros of a group: likewise
    NAME.scales   [G, O]                     float16, sometimes wider
    NAME.g_idx    int32 [I]                  the group of each input

with w[o, i] = scale * (code - zero). So offset = -scale * zero, exact in float32 for 16-bit scales:
11 bits times 4. A base can come from such a folder; a merged model cannot go back into one, as its
zeros are no integers.

Layers may differ in bits and groups ("dynamic"), or be float. The layout is that of GPTQModel's
`TorchLinear`, whose 3-bit codes, in blocks of 32 in three words, are the same plain bit stream.
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cli.errors import UserError
from cli.files import read_json
from formats.files import Stored, fill, in_one_dtype, open_file, weight_files
from formats.groups import dense, from_stream, imported
from formats.huggingface import (
    check_the_rest,
    config_of,
    float_weights,
    open_listed,
    read_float,
)
from formats.quantized import describe, kinds_of, save_quantized
from llama import Llama, LlamaConfig, linears
from quant import Quantized, QuantLinear

PARTS = ("qweight", "qzeros", "scales")
# Fields that change the arithmetic but no tensor's name or shape; any other value is refused
PLAIN = {"is_marlin_format": False, "rotation": None, "adapter": None, "activation": None}


class Fields(NamedTuple):
    """What GPTQ's config says of all layers."""

    file: pathlib.Path
    bits: int
    group_size: int  # -1: the whole row is one group
    desc_act: bool  # inputs were quantized in the order of their activations
    dynamic: bool  # some layers have bits or a group size of their own
    less_one: bool  # zeros are stored minus one, as in v1
    in_words: bool  # that one was taken from all fields of a word at once, see `read_zeros`


# ---- the config


def matches(path: pathlib.Path) -> bool:
    """Whether `path` is a folder whose config.json, or quantize_config.json, names GPTQ."""
    return own_fields(path) is not None


def own_fields(path: pathlib.Path) -> tuple[pathlib.Path, dict] | None:
    """(file, GPTQ's fields in it), or None where there are none.

    They are config.json's quantization_config, or where that is missing a whole
    quantize_config.json, as AutoGPTQ wrote it at first.
    """
    file, beside = path / "config.json", path / "quantize_config.json"
    if not file.exists():
        return None
    config = read_json(file)
    fields = config.get("quantization_config")
    if fields is None and config.get("quantization") is None and beside.exists():
        file, fields = beside, {"quant_method": "gptq", **read_json(beside)}
    is_gptq = isinstance(fields, dict) and fields.get("quant_method") == "gptq"
    return (file, fields) if is_gptq else None


def read_fields(path: pathlib.Path) -> Fields:
    """The checked fields; UserError for any that asks for what is not read here."""
    file, fields = own_fields(path)

    def refuse(name, only):
        raise UserError(
            f"{file}: GPTQ with {name} = {json.dumps(fields.get(name))} is not supported, only "
            f"{only}"
        )

    for name, plain in PLAIN.items():
        if fields.get(name, plain) not in (plain, None):
            refuse(name, json.dumps(plain))
    layout = "gptq"
    for name in ("checkpoint_format", "format"):  # the older name, and the newer one, which counts
        layout = fields.get(name) or layout
        if layout not in ("gptq", "gptq_v2"):
            refuse(name, "gptq and gptq_v2")
    bits, group_size = fields.get("bits"), fields.get("group_size")
    if type(bits) is not int or bits not in (2, 3, 4):
        refuse("bits", "2, 3 and 4")
    if type(group_size) is not int or not (group_size > 0 or group_size == -1):
        refuse("group_size", "a positive number or -1")
    dynamic = bool(fields.get("dynamic"))
    desc_act, in_words = bool(fields.get("desc_act")), written_by_gptqmodel(fields)
    return Fields(file, bits, group_size, desc_act, dynamic, layout == "gptq", in_words)


def written_by_gptqmodel(fields: dict) -> bool:
    """Whether GPTQModel is named among the tools that made the folder: "gptqmodel:7.7.0"."""
    meta = fields.get("meta")
    quantizers = meta.get("quantizer") if isinstance(meta, dict) else None
    names = quantizers if isinstance(quantizers, list) else [quantizers]
    return any(str(name).lower().startswith("gptqmodel:") for name in names)


# ---- what every format has


def read_config(path: pathlib.Path) -> LlamaConfig:
    """The LlamaConfig; a quantized head is not tied to the embedding, whatever config.json says.

    Raises UserError as `read_fields`, `huggingface.config_of` and `open_folder` do.
    """
    read_fields(path)
    file = path / "config.json"
    config = config_of(file, read_json(file))
    _, found = open_folder(path)
    if "lm_head.qweight" in found:
        config = dataclasses.replace(config, tie_word_embeddings=False)
    return config


def files(path: pathlib.Path) -> list[pathlib.Path]:
    """The config, quantize_config.json where that has GPTQ's fields, and the files of weights."""
    file, _ = own_fields(path)
    return sorted({path / "config.json", file, *weight_files(path)})


def quantization_of(path: pathlib.Path) -> dict:
    """{"bits", "group_size"}, and "layers" where they vary, from the shapes of the tensors."""
    model, _, _ = open_gptq(path)
    return describe(kinds_of(model))


def check(path: pathlib.Path) -> None:
    """Raises UserError as `open_gptq` does."""
    open_gptq(path)


def load_model(path: pathlib.Path, dtype: torch.dtype | None = None, device: str = "cpu") -> Llama:
    """The model of a folder, with its codes; dtype: what the float parts are cast to.

    Linear layers that are not quantized stay float; a quantized head becomes float. Layers are read
    one after another. Raises UserError as `open_gptq` does, and for numbers that are not finite.
    """
    model, weights, layers = open_gptq(path)
    for name, read in layers.items():
        bits = model.get_submodule(name).bits
        model.set_submodule(name, imported(*read(), bits, f"{path}: tensor {name}.scales"))
    return in_one_dtype(fill(model, weights), dtype, device)


def import_base(path: pathlib.Path, folder: pathlib.Path) -> None:
    """Writes the folder as one of our own: nothing is calibrated or quantized."""
    save_quantized(load_model(path), folder)


# ---- the tensors


def open_gptq(path: pathlib.Path) -> tuple[Llama, dict[str, Callable], dict[str, Callable]]:
    """(model, {parameter: a function that reads it}, {layer: a function that reads its Quantized}).

    The model is on the meta device, with QuantLinears. Reads headers, the groups of inputs and
    biases. Raises UserError for a config or a tensor that does not fit, by name; that scales and
    float weights are finite is checked when they are read.
    """
    fields, config = read_fields(path), read_config(path)
    file, found = open_folder(path)
    with torch.device("meta"):
        model = Llama(config)
    layers, weights, known = {}, {}, set()
    for name, layer in [*linears(model), ("lm_head", model.lm_head)]:
        known |= check_bias(found, name, layer.out_features)
        if not any(f"{name}.{part}" in found for part in PARTS):
            continue
        known |= {f"{name}.{part}" for part in (*PARTS, "g_idx")}
        bits, group_size = checked_layer(file, found, name, layer, fields)
        read = functools.partial(read_layer, found, name, bits, fields)
        if layer is model.lm_head:
            where = f"{path}: tensor lm_head.scales"
            weights["lm_head.weight"] = functools.partial(dense, read, where)
            continue
        layers[name] = read
        with torch.device("meta"):
            packed = QuantLinear(layer.in_features, layer.out_features, bits, group_size)
        model.set_submodule(name, packed)
    if not layers:
        raise UserError(f"{file}: no layer has a tensor qweight, though {fields.file} names GPTQ")
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters() if name not in weights}
    weights |= float_weights(file, found, shapes)
    check_the_rest(found, known | set(shapes), config.tie_word_embeddings)
    return model, weights, layers


def open_folder(path: pathlib.Path) -> tuple[pathlib.Path, dict[str, Stored]]:
    """(file, tensors by name) of the one index of safetensors files, or of the one such file.

    AutoGPTQ's names tell bits and group size: gptq_model-4bit-128g.safetensors. Pickles are not
    read; GPTQModel does not read them either.
    """
    indexes = sorted(path.glob("[!.]*.safetensors.index.json"))
    if len(indexes) == 1:
        return indexes[0], open_listed(path, indexes[0])
    names = [file for file in weight_files(path) if file.suffix == ".safetensors"]
    if len(names) == 1 and not indexes:
        return names[0], open_file(names[0])
    listed = ", ".join(file.name for file in [*indexes, *names]) or "none"
    raise UserError(
        f"{path}: one .safetensors file or one index of several is needed, found {listed}; remove "
        "what is not the GPTQ model, or save it as safetensors"
    )


def checked_layer(
    file: pathlib.Path, found: dict[str, Stored], name: str, layer: nn.Linear, fields: Fields
) -> tuple[int, int]:
    """(bits, group size) of a quantized layer.

    Raises UserError where one of its tensors is missing, or contradicts the others or the config.
    """
    for part in PARTS:
        if f"{name}.{part}" not in found:
            raise UserError(f"{file}: tensor {name}.{part} is missing")
    qweight, qzeros, scales = (found[f"{name}.{part}"] for part in PARTS)
    if f"{name}.weight" in found:
        raise wrong(qweight, f"is there, and so is {name}.weight; remove the wrong one")
    check_dtype(qweight, torch.int32)
    check_dtype(qzeros, torch.int32)
    check_dtype(scales, torch.float16, torch.bfloat16, torch.float32)
    inputs = layer.in_features
    bits, group_size = layer_kind(qweight, qzeros, scales, layer.out_features, inputs)
    if bits == 8 and name != "lm_head":  # GPTQModel's choice for the head, which becomes float here
        raise wrong(qweight, "is of 8 bits; layers of 2, 3 and 4 bits can be fine-tuned")
    usual = fields.bits, inputs if fields.group_size == -1 else min(fields.group_size, inputs)
    if (bits, group_size) != usual and not fields.dynamic:
        raise wrong(
            qweight if bits != fields.bits else scales,
            f"is of {bits} bits in groups of {group_size}, but {fields.file.name} says "
            f"{fields.bits} bits in groups of {fields.group_size}",
        )
    check_order(file, found, name, torch.arange(inputs) // group_size, fields)
    return bits, group_size


def layer_kind(
    qweight: Stored, qzeros: Stored, scales: Stored, outputs: int, inputs: int
) -> tuple[int, int]:
    """(bits, group size) from the shapes of a layer's tensors; UserError where they do not fit."""
    weights, shape = f"{outputs} x {inputs}", list(qweight.shape)
    bits, rest = divmod(32 * qweight.shape[0], inputs) if shape else (0, 0)
    if bits not in (2, 3, 4, 8) or rest or shape[1:] != [outputs]:
        raise wrong(qweight, f"{shape} does not hold {weights} codes of 2, 3, 4 or 8 bits")
    shape = list(scales.shape)
    groups = shape[0] if shape else 0
    if groups == 0 or inputs % groups or shape[1:] != [outputs]:
        raise wrong(scales, f"{shape} does not divide {weights} weights into groups")
    # GPTQModel leaves the rest of a last word empty, as for a head of 32,001 outputs
    if qzeros.shape != (groups, -(-outputs * bits // 32)):
        shape = list(qzeros.shape)
        raise wrong(qzeros, f"{shape} does not hold {groups} x {outputs} zeros of {bits} bits")
    return bits, inputs // groups


def check_order(
    file: pathlib.Path, found: dict[str, Stored], name: str, in_order: Tensor, fields: Fields
) -> None:
    """Raises UserError unless a layer's groups of inputs are `in_order`, its g_idx without order.

    A missing g_idx says that they are, but where desc_act is set.
    """
    stored = found.get(f"{name}.g_idx")
    if stored is None:
        if fields.desc_act:
            raise UserError(f"{file}: tensor {name}.g_idx is missing, which desc_act needs")
        return
    check_dtype(stored, torch.int32, torch.int64)
    if not torch.equal(stored.read().long(), in_order):
        raise wrong(
            stored,
            "does not put the inputs into groups in their order (desc_act); QA-LoRA sums them over "
            "each group, so quantize the model again with desc_act=False",
        )


def check_bias(found: dict[str, Stored], name: str, out_features: int) -> set[str]:
    """The name of a layer's bias where there is one; UserError unless that is all zeros."""
    stored = found.get(f"{name}.bias")
    if stored is None:
        return set()
    if stored.shape != (out_features,) or stored.read().any():
        raise wrong(stored, f"is not {out_features} zeros; LLaMA has no biases")
    return {stored.name}


def check_dtype(stored: Stored, *allowed: torch.dtype) -> None:
    """Raises UserError unless a tensor has one of these dtypes."""
    dtype = stored.read().dtype
    if dtype not in allowed:
        raise wrong(stored, f"holds {dtype}, not {' or '.join(map(str, allowed))}")


def wrong(stored: Stored, what: str) -> UserError:
    """A UserError that names file and tensor."""
    return UserError(f"{stored.file}: tensor {stored.name} {what}")


def read_layer(found: dict[str, Stored], name: str, bits: int, fields: Fields) -> Quantized:
    """Codes, scales and offsets of a layer that `open_gptq` has checked.

    An offset is exact for scales of 16 bits; for those of float32 it may round.
    """
    scale_GO = read_float(found[f"{name}.scales"])
    outputs = scale_GO.shape[1]
    zero_GO = read_zeros(found[f"{name}.qzeros"].read(), bits, outputs, fields)
    offset_GO = -scale_GO.float() * zero_GO
    words = found[f"{name}.qweight"].read().t()  # [O, I * bits / 32]
    codes = from_stream(words, bits)
    return Quantized(codes, transposed(scale_GO), transposed(offset_GO))


def transposed(matrix: Tensor) -> Tensor:
    """Transposed and contiguous; also its strides are where a dimension has size 1."""
    return matrix.t().flatten().view(matrix.shape[::-1])


def read_zeros(qzeros: Tensor, bits: int, out_features: int, fields: Fields) -> Tensor:
    """The zeros [G, O], 0 to 2^bits - 1, of int32 [G, words].

    Format v1 stores zero - 1, so that a zero of 0 becomes the largest code. AutoGPTQ and others
    mean that within its own bits, and their readers drop the carry. GPTQModel, but for 3 bits,
    subtracts and adds 1 in all fields of a word at once, so that a 0 borrows from its neighbour;
    dropping the carry would leave that one too low.
    """
    if fields.less_one and fields.in_words and bits != 3:
        return from_stream(qzeros + (2**32 - 1) // (2**bits - 1), bits, out_features)
    zeros = from_stream(qzeros, bits, out_features)
    return (zeros + 1) & (2**bits - 1) if fields.less_one else zeros
