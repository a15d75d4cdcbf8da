"""MLX's folders (mlx-lm, affine mode): a quantized model written as one, and one as a base.

A layer NAME is three tensors: the codes NAME.weight (uint32, each row one little-endian stream of
bits), NAME.scales and NAME.biases, w = scale * code + bias: our codes, scale and offset. So nothing
is quantized again, and codes of 2 and 3 bits take 2 and 3 bits in a real client, mlx-lm. Scales and
biases are float16, bfloat16 or float32, so nothing need be rounded either.

Reading takes layers of 2, 3 and 4 bits as they are. All other tensors are kept beside the base, in
mlx.safetensors, and written back: what fine-tuning did not change comes out byte for byte.

Nothing here needs the `mlx` package. What is read and what is refused follows mlx_lm/utils.py.
"""

import functools
import json
import pathlib
from collections.abc import Callable
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from cli.errors import UserError
from cli.files import read_json
from formats import huggingface
from formats.files import Stored, all_finite, fill, in_one_dtype, write_config
from formats.groups import (
    dense,
    from_stream,
    holds,
    imported,
    is_linear,
    layers_in_groups,
    rounding,
    to_stream,
)
from formats.quantized import describe, kinds_of, save_quantized
from formats.rest import MLX_REST, Rest, check_floats, damaged, save_rest
from llama import Llama, LlamaConfig
from quant import Quantized, QuantLinear, unpack
from text.tokenizer import MODEL, Tokenizer

BITS = (1, 2, 3, 4, 5, 6, 8)  # of MLX; adapters go beside layers of 2, 3 and 4
GROUPS = (128, 64, 32)
PARTS = ("weight", "scales", "biases")  # of a quantized module
FLOATS = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
PLAIN = {"rope_traditional": False, "model_file": None}  # fields of mlx-lm, and what we compute

files = huggingface.files


# ---- reading: what every format has


def matches(path: pathlib.Path) -> bool:
    """Whether `path` is a folder with MLX's `quantization` in config.json and tensors *.scales.

    Folders of our own have *.scale. Where no weights can be read, config.json decides: mlx-lm
    writes the entry twice.
    """
    file = path / "config.json"
    fields = read_json(file) if file.exists() else {}
    if not isinstance(fields.get("quantization"), dict):
        return False
    try:
        _, found = huggingface.open_folder(path)
    except UserError:
        return "quantization_config" in fields
    return any(name.endswith(".scales") for name in found)


def read_config(path: pathlib.Path) -> LlamaConfig:
    """The LlamaConfig in config.json; UserError for what `Llama` does not compute."""
    file = path / "config.json"
    fields = {"tie_word_embeddings": True, **read_json(file)}  # as mlx-lm does
    for name, plain in PLAIN.items():
        if fields.get(name, plain) != plain:
            raise UserError(f"{file}: {name} = {json.dumps(fields[name])} is not supported")
    return huggingface.config_of(file, fields)


def quantization_of(path: pathlib.Path) -> dict:
    """Bits and group size of the layers in groups, from headers; UserError as `open_mlx`."""
    _, _, kinds = open_mlx(path)
    layers = {}
    for name, kind in kinds.items():
        if is_linear(name):
            layers[name] = kind if is_in_groups(name, kind) else None
    return describe(layers)


def check(path: pathlib.Path) -> None:
    """Raises UserError as `open_mlx` does; reads headers only."""
    open_mlx(path)


def load_model(path: pathlib.Path, dtype: torch.dtype | None = None, device: str = "cpu") -> Llama:
    """The model in a folder, with its codes; dtype: what the float parts are cast to.

    Layers of 2 to 4 bits are taken as they are, their scales in float16 where that holds them.
    What else is quantized is dequantized, to the dtype of its scales; where then not all float
    parts have the same dtype, to one that holds them all. Raises UserError as `open_mlx` does, and
    for tensors that are not finite or of another dtype.
    """
    config, found, kinds = open_mlx(path)
    with torch.device("meta"):
        model = Llama(config)
    for module, kind in kinds.items():
        if is_in_groups(module, kind):
            parts = read_affine(found, module, kind[0])
            layer = imported(*parts, kind[0], f"{path}: tensor {module}.weight")
            model.set_submodule(module, layer)
    return in_one_dtype(fill(model, float_weights(path, found, kinds)), dtype, device)


def float_weights(path: pathlib.Path, found: dict[str, Stored], kinds: dict) -> dict[str, Callable]:
    """{parameter: a function that reads it} of what is no layer in groups; see `open_mlx`."""
    weights = {}
    for module, kind in kinds.items():
        name = f"{module}.weight"
        if kind is None:
            weights[name] = functools.partial(read_checked, found[name], FLOATS.values())
        elif not is_in_groups(module, kind):
            read = functools.partial(read_affine, found, module, kind[0])
            weights[name] = functools.partial(dense, read, f"{path}: tensor {name}")
    return weights


def import_base(path: pathlib.Path, folder: pathlib.Path) -> None:
    """Writes a folder of MLX as one of our own: nothing is calibrated or quantized."""
    model = load_model(path)
    keep_rest(path, folder / MLX_REST)
    save_quantized(model, folder)


# ---- reading: the folder


def open_mlx(path: pathlib.Path) -> tuple[LlamaConfig, dict[str, Stored], dict[str, tuple | None]]:
    """(config, tensors by name, {module: (bits, group size), or None for a float one}).

    Reads headers only. Raises UserError, naming file and tensor, for what is missing, unknown,
    misshapen or contradicts config.json, for other modes than affine, and where no linear layer
    can take up an adapter.
    """
    file = path / "config.json"
    config = read_config(path)
    quantization = read_json(file)["quantization"]
    usual = checked_kind(file, "quantization", quantization)
    where, found = huggingface.open_folder(path)
    kinds, known = {}, set()
    for name, shape in huggingface.parameter_shapes(config).items():
        module = name.removesuffix(".weight")
        if name not in found:
            raise UserError(f"{where}: tensor {name} is missing; fetch it again")
        if f"{module}.scales" in found and len(shape) == 2:
            kinds[module] = kind_of(found, module, shape)
            known |= {f"{module}.{part}" for part in PARTS}
        elif found[name].shape == shape:
            kinds[module] = None
            known.add(name)
        else:
            raise UserError(
                f"{found[name].file}: tensor {name} has the shape {list(found[name].shape)}, but "
                f"the config asks for {list(shape)}, and there is no {module}.scales"
            )
        check_said(file, module, kinds[module], usual, quantization.get(module))
    huggingface.check_the_rest(found, known, config.tie_word_embeddings)
    if not any(is_in_groups(module, kind) for module, kind in kinds.items()):
        raise UserError(
            f"{where}: no linear layer has 2, 3 or 4 bits, which adapters need; make "
            "a folder with mlx_lm.convert --quantize --q-bits 4"
        )
    return config, found, kinds


def is_in_groups(module: str, kind: tuple | None) -> bool:
    """Whether a module becomes a QuantLinear."""
    return is_linear(module) and kind is not None and kind[0] in (2, 3, 4)


def checked_kind(file: pathlib.Path, name: str, said: Any) -> tuple[int, int]:
    """(bits, group size) of an entry in config.json; UserError for what MLX's affine mode lacks."""
    fields = said if isinstance(said, dict) else {}
    mode = fields.get("mode", "affine")
    if mode != "affine":
        raise UserError(
            f"{file}: {name}: mode {json.dumps(mode)} is not supported, only affine is; make a "
            "folder with mlx_lm.convert --quantize --q-bits 4"
        )
    bits, group_size = fields.get("bits"), fields.get("group_size")
    for number, allowed in ((bits, BITS), (group_size, GROUPS)):
        if type(number) is not int or number not in allowed:
            raise UserError(
                f"{file}: {name} = {json.dumps(said)[:60]} has no bits and group_size that MLX has"
            )
    return bits, group_size


def check_said(
    file: pathlib.Path, module: str, kind: tuple | None, usual: tuple, said: Any
) -> None:
    """Raises UserError unless a module's tensors have what config.json says of it, if it does.

    said: its own entry: {"bits", "group_size"}, true for the usual ones, false for a float module.
    """
    if said is None:
        wanted = kind and usual
    elif type(said) is bool:
        wanted = usual if said else None
    else:
        wanted = checked_kind(file, f"quantization.{module}", said)
    if kind != wanted:
        names = []
        for one in (wanted, kind):
            names.append(f"{one[0]} bits in groups of {one[1]}" if one else "floats")
        raise UserError(
            f"{file}: {module} has {names[0]} by `quantization`, but its tensors have {names[1]}; "
            "give it an entry of its own there"
        )


def kind_of(found: dict[str, Stored], module: str, shape: tuple) -> tuple[int, int]:
    """(bits, group size) of a module with weights [O, I]; UserError where its shapes give none."""
    weight, scales, biases = (found.get(f"{module}.{part}") for part in PARTS)
    if biases is None:
        raise UserError(f"{scales.file}: tensor {module}.biases is missing; fetch it again")
    shapes = {stored.name: list(stored.shape) for stored in (weight, scales, biases)}
    outputs, inputs = shape
    fits = scales.shape == biases.shape and all(len(one) == 2 for one in shapes.values())
    if fits and weight.shape[0] == scales.shape[0] == outputs and scales.shape[1]:
        bits, left = divmod(weight.shape[1] * 32, inputs)
        group_size, over = divmod(inputs, scales.shape[1])
        if not left and not over and bits in BITS and group_size in GROUPS:
            return bits, group_size
    raise UserError(
        f"{weight.file}: {shapes} cannot hold {outputs} rows of {inputs} codes in groups of 32, 64 "
        "or 128"
    )


def read_checked(stored: Stored, dtypes: Any) -> Tensor:
    """A stored tensor; UserError where it is of no dtype in `dtypes`, or not finite."""
    tensor = stored.read()
    if tensor.dtype not in dtypes:
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise UserError(f"{stored.file}: tensor {stored.name} holds {tensor.dtype}, not {wanted}")
    if tensor.is_floating_point() and not all_finite(tensor):
        raise UserError(f"{stored.file}: tensor {stored.name} has NaN or infinite values")
    return tensor


def read_affine(found: dict[str, Stored], module: str, bits: int) -> Quantized:
    """The codes, scales and biases of a module, in the dtypes of the file."""
    weight, scales, biases = (found[f"{module}.{part}"] for part in PARTS)
    codes = from_stream(read_checked(weight, [torch.uint32]), bits)
    floats = FLOATS.values()
    return Quantized(codes, read_checked(scales, floats), read_checked(biases, floats))


# ---- writing


def keep_rest(path: pathlib.Path, file: pathlib.Path) -> None:
    """Keeps what writing back needs: all tensors but those in groups, and of those the dtypes."""
    _, found, kinds = open_mlx(path)
    kept, dtypes = {}, {}
    for name, stored in found.items():
        module = name.rpartition(".")[0]
        if not is_in_groups(module, kinds.get(module)):
            kept[name] = stored.read()
        elif module not in dtypes:
            pair = [found[f"{module}.{part}"].read().dtype for part in ("scales", "biases")]
            dtypes[module] = [str(dtype).removeprefix("torch.") for dtype in pair]
    config = (path / "config.json").read_text(encoding="utf-8")
    save_rest(file, kept, {"config": config, "dtypes": dtypes})


def write_mlx(
    model: Llama, tokenizer: Tokenizer, folder: pathlib.Path, scales: str | None = None
) -> list[str]:
    """Writes a quantized model and its tokenizer into a new folder; returns the lines to print.

    scales: "f16" rounds scales and offsets to float16, "f32" keeps float32; None takes float16
    where that holds all of them. Embedding, norms, head and layers that stayed float keep their
    dtype. Raises UserError for groups that MLX does not have, or what float16 cannot hold.
    """
    layers = layers_in_groups(model)
    exact = all(
        holds(torch.float16, layer.scale) and holds(torch.float16, layer.offset)
        for layer in layers.values()
    )
    half = scales == "f16" or (exact and scales is None)
    dtype = torch.float16 if half else torch.float32
    dtypes = dict.fromkeys(layers, (dtype, dtype))
    lines = [rounding(layers, dtypes)]
    for size in sorted({layer.group_size for layer in layers.values()} - set(GROUPS)):
        lines.append(
            f"its groups of {size} became groups of {mlx_group(size)} that repeat scale and offset"
        )
    floats = {name: p.detach() for name, p in model.named_parameters()}  # tied ones once
    write_weights(folder, floats, layers, dtypes)
    stops = tokenizer.stops[0] if len(tokenizer.stops) == 1 else list(tokenizer.stops)
    entry = mlx_quantization(model)
    extra = {"eos_token_id": stops, "quantization": entry, "quantization_config": entry}
    write_config(model.config, folder, extra)
    write_tokenizer(tokenizer, folder)
    return lines


def write_back(
    model: Llama, tokenizer: Tokenizer, rest: Rest, folder: pathlib.Path, scales: str | None = None
) -> list[str]:
    """Writes the folder that a model came from, with its layers as they are now; returns lines.

    scales: None keeps each dtype but that of biases that it does not hold: those are float32. "f16"
    and "f32" are for all scales and biases. Raises UserError where `rest` is damaged.
    """
    layers, dtypes = layers_in_groups(model), {}
    for name, (scale, bias) in dtypes_before(rest, layers).items():
        offset = layers[name].offset
        dtypes[name] = scale, bias if holds(bias, offset) else torch.float32
    if scales:
        dtype = torch.float16 if scales == "f16" else torch.float32
        dtypes = dict.fromkeys(layers, (dtype, dtype))
    lines = [rounding(layers, dtypes)]
    write_weights(folder, dict(rest.tensors), layers, dtypes)
    try:
        (folder / "config.json").write_text(rest.layout["config"], encoding="utf-8")
        config, found, kinds = open_mlx(folder)
        if config != model.config:
            raise damaged(rest.path)
        check_floats(rest, model, float_weights(folder, found, kinds))
    except (UserError, KeyError, TypeError):
        raise damaged(rest.path) from None
    write_tokenizer(tokenizer, folder)
    return lines


def write_weights(
    folder: pathlib.Path,
    tensors: dict[str, Tensor],
    layers: dict[str, QuantLinear],
    dtypes: dict[str, tuple[torch.dtype, torch.dtype]],
) -> None:
    """Writes `tensors` as they are, and the layers with scales and biases in `dtypes`."""
    for name, layer in layers.items():
        tensors |= as_affine(name, layer, *dtypes[name])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "mlx"})


def dtypes_before(rest: Rest, layers: dict) -> dict[str, tuple[torch.dtype, torch.dtype]]:
    """{layer: its dtypes of scales and biases in the folder that it came from}."""
    kept = rest.layout.get("dtypes")
    if not isinstance(kept, dict) or kept.keys() != layers.keys():
        raise damaged(rest.path)
    dtypes = {}
    for name, pair in kept.items():
        if not (isinstance(pair, list) and len(pair) == 2 and all(d in list(FLOATS) for d in pair)):
            raise damaged(rest.path)
        dtypes[name] = FLOATS[pair[0]], FLOATS[pair[1]]
    return dtypes


def mlx_group(group_size: int) -> int:
    """MLX's largest group of which `group_size`, a multiple of 32, is one."""
    return next(size for size in GROUPS if group_size % size == 0)


def mlx_quantization(model: Llama) -> dict:
    """The `quantization` entry of config.json, with one for each layer that has others."""

    def entry(kind):
        return {"group_size": mlx_group(kind["group_size"]), "bits": kind["bits"]}

    usual = describe(kinds_of(model))
    found = entry(usual)
    for name, kind in usual.get("layers", {}).items():
        found[name] = False if kind is None else entry(kind)
    return found


def as_affine(
    name: str, layer: QuantLinear, scale: torch.dtype, bias: torch.dtype
) -> dict[str, Tensor]:
    """The three tensors of a layer; a group larger than MLX's is repeated."""
    times = layer.group_size // mlx_group(layer.group_size)
    codes = unpack(layer.packed, layer.bits, layer.in_features)
    return {
        f"{name}.weight": to_stream(codes, layer.bits),
        f"{name}.scales": layer.scale.to(scale).repeat_interleave(times, dim=1),
        f"{name}.biases": layer.offset.to(bias).repeat_interleave(times, dim=1),
    }


def write_tokenizer(tokenizer: Tokenizer, folder: pathlib.Path) -> None:
    """Writes a tokenizer's files, and in tokenizer_config.json what mlx-lm's transformers needs.

    That is which tokens are BOS and EOS, and the class that takes the vocabulary as it is: for a
    tokenizer.json the general one, for a sentencepiece model none. In LlamaTokenizer transformers 5
    makes other tokens of texts with runs of spaces, or with one at the beginning.
    """
    tokenizer.save(folder)
    file, pieces = folder / "tokenizer_config.json", tokenizer.vocabulary.pieces
    before = read_json(file) if file.exists() else {}
    fields = {"eos_token": pieces[tokenizer.eos], **before}
    if tokenizer.named_bos is not None:
        fields.setdefault("bos_token", pieces[tokenizer.named_bos])
    fields["tokenizer_class"] = "PreTrainedTokenizerFast"
    if MODEL in tokenizer.files:
        del fields["tokenizer_class"]
        fields["add_bos_token"] = bool(tokenizer.bos)
    if fields != before:
        file.write_text(json.dumps(fields, indent=1) + "\n", encoding="utf-8")
