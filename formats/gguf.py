"""GGUF files of llama.cpp: a quantized model written as one, and such a file as a base.

A Q4_1 block is 32 weights, w = d * code + m, with d and m in float16: our scale, codes and offset.
So nothing is quantized again; codes and our scales are copied, and offsets round, from float32 to
float16, as do finer scales of an imported model. That is the price of the format, and it is
reported. (GPTQ's files want integer zero points, which a merged offset is not.)

Reading takes a file as it is: the layers in Q4_0, Q4_1 and Q4_K become layers in groups with the
same codes. Those in other types, as half of two kinds of layers in a Q4_K_M file, stay as they are.

The `gguf` package (pip install gguf) knows the container and the constants; it is imported only
where it is needed. `formats/gguf_blocks.py` has the blocks, `formats/gguf_back.py` writes a file
back that a base came from, `formats/gguf_vocabulary.py` has the tokenizer.
"""

import dataclasses
import functools
import itertools
import pathlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cli.errors import UserError
from formats.files import checked_config, fill, in_one_dtype
from formats.gguf_back import keep_rest, to_blocks
from formats.gguf_blocks import (
    IN_GROUPS,
    from_blocks,
    in_file_order,
    in_our_order,
    rotary_heads,
)
from formats.gguf_container import gguf_name, gguf_package, write_tensors
from formats.gguf_rope import ROPE_FREQS, divisors, linear_scaling, llama3_scaling
from formats.gguf_vocabulary import tokenizer_of, write_vocabulary
from formats.groups import is_linear, layers_in_groups
from formats.huggingface import parameter_shapes
from formats.quantized import describe, save_quantized
from formats.rest import GGUF_REST, Rest, check_floats, damaged
from llama import Llama, LlamaConfig
from text.tokenizer import Tokenizer

HYPERPARAMETERS = {  # and of each field of a LlamaConfig, after "llama."
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.key_length": "head_dim",
    "rope.freq_base": "rope_theta",
    "vocab_size": "vocab_size",
}
REMEDY = "make the file again with llama-quantize MODEL.gguf OUT.gguf Q4_1"
SAME_AS_HEAD_DIM = ("attention.value_length", "rope.dimension_count")


# ---- reading: what every format has


def matches(path: pathlib.Path) -> bool:
    """Whether `path` is, by its name, a GGUF file."""
    return path.suffix.lower() == ".gguf" and path.is_file()


def read_config(path: pathlib.Path) -> LlamaConfig:
    """The LlamaConfig of a file, from its header. Raises UserError as `open_gguf` does."""
    _, _, config, _ = open_gguf(path)
    return config


def quantization_of(path: pathlib.Path) -> dict:
    """What its blocks are: 4 bits in groups of 32; and the layers that are in other types."""
    _, _, _, tensors = open_gguf(path)
    kinds, layers = kinds_in(tensors), {}
    for name in filter(is_linear, tensors):
        name = name.removesuffix(".weight")
        layers[name] = (4, 32) if name in kinds else None
    return describe(layers)


def check(path: pathlib.Path) -> None:
    """Raises UserError as `open_gguf` does."""
    open_gguf(path)


def load_model(path: pathlib.Path, dtype: torch.dtype | None = None, device: str = "cpu") -> Llama:
    """The model in a file, with its codes; dtype: what the float parts are cast to.

    Scales, codes and offsets are taken as they are. All the rest is dequantized, to float32 only
    where the file keeps its embedding so, as 16 bits let `compute_dtype` choose bfloat16. Raises
    UserError as `open_gguf` does, and for numbers that are not finite.
    """
    _, _, config, tensors = open_gguf(path)
    with torch.device("meta"):
        model = Llama(config)
    for name, kind in kinds_in(tensors).items():
        tensor = tensors[f"{name}.weight"]
        blocks = in_our_order(torch.from_numpy(tensor.data.copy()), rotary_heads(name, config))
        model.set_submodule(name, from_blocks(blocks, kind, f"{path}: {tensor.name}"))
    return in_one_dtype(fill(model, float_weights(path, config, tensors)), dtype, device)


def float_weights(path: pathlib.Path, config: LlamaConfig, tensors: dict) -> dict[str, Callable]:
    """{parameter: a function that reads it}, dequantized; see `open_gguf`."""
    kept = {"F32": torch.float32, "BF16": torch.bfloat16}
    stored = kept.get(tensors["model.embed_tokens.weight"].tensor_type.name, torch.float16)
    weights = {}
    for name, tensor in tensors.items():
        heads = rotary_heads(name, config)
        weights[name] = functools.partial(dequantized, path, tensor, stored, heads)
    return weights


def check_written(path: pathlib.Path, model: Llama, rest: Rest) -> None:
    """Raises UserError unless the file that was written back is that of the model."""
    try:
        _, _, config, tensors = open_gguf(path)
        check_floats(rest, model, float_weights(path, config, tensors))
    except UserError:
        raise damaged(rest.path) from None
    if config != model.config:
        raise damaged(rest.path)


def kinds_in(tensors: dict[str, Any]) -> dict[str, str]:
    """{our name of a layer in groups: its type} in a file's tensors by our names."""
    kinds = {}
    for name, tensor in tensors.items():
        if is_linear(name) and tensor.tensor_type.name in IN_GROUPS:
            kinds[name.removesuffix(".weight")] = tensor.tensor_type.name
    return kinds


def files(path: pathlib.Path) -> list[pathlib.Path]:
    """The file itself."""
    return [path]


def import_base(path: pathlib.Path, folder: pathlib.Path) -> None:
    """Writes a file as a folder of our own: nothing is calibrated or quantized."""
    reader, _, config, tensors = open_gguf(path)
    model = load_model(path)
    keep_rest(reader, kinds_in(tensors), config, folder / GGUF_REST)
    save_quantized(model, folder)


def load_tokenizer(path: pathlib.Path) -> Tokenizer:
    """The file's own tokenizer; UserError as `open_gguf` does, and for one of an unknown kind."""
    _, metadata, config, _ = open_gguf(path)
    tokenizer = tokenizer_of(metadata, path)
    if len(tokenizer.vocabulary.pieces) != config.vocab_size:
        raise UserError(
            f"{path}: its vocabulary does not have its embedding's {config.vocab_size} pieces; "
            "fetch it again"
        )
    return tokenizer


def check_tokenizer(path: pathlib.Path, tokenizer: Tokenizer) -> None:
    """Raises UserError as `load_tokenizer` does, and when `tokenizer` is not the file's own."""
    own = load_tokenizer(path)
    theirs = own.vocabulary.pieces
    for i, ours in enumerate(tokenizer.vocabulary.pieces):
        if i >= len(theirs) or ours != theirs[i]:
            theirs_i = theirs[i] if i < len(theirs) else None
            raise UserError(
                f"{path}: piece {i} of its vocabulary is {theirs_i!r}, the tokenizer's is "
                f"{ours!r}; leave out --tokenizer"
            )
    if (own.bos, own.eos) != (tokenizer.bos, tokenizer.eos):
        raise UserError(
            f"{path}: BOS and EOS are {own.bos} and {own.eos}, the tokenizer's {tokenizer.bos} and "
            f"{tokenizer.eos}; leave out --tokenizer"
        )


# ---- reading: the file


def open_gguf(path: pathlib.Path) -> tuple:
    """(GGUFReader, metadata, LlamaConfig, {our name: ReaderTensor}); reads no weights.

    Raises UserError when the file is damaged, asks for what `Llama` does not compute, or has no
    linear layer in a type that can take up an adapter.
    """
    stat = path.stat()
    reader, metadata = read_header(path, stat.st_mtime_ns, stat.st_size, stat.st_ino)
    found = {tensor.name: tensor for tensor in reader.tensors}
    config = gguf_config(path, metadata, tied="output.weight" not in found)
    if ROPE_FREQS in found:
        scaling = llama3_scaling(path, found.pop(ROPE_FREQS), config)
        config = dataclasses.replace(config, rope_scaling=scaling)
    layers = config.num_hidden_layers
    if f"blk.{layers - 1}.attn_norm.weight" not in found:  # a damaged number may ask for millions
        raise UserError(
            f"{path}: has no tensors for the last of {layers} layers; fetch it again, or join the "
            "parts of a split file with llama-gguf-split --merge"
        )
    tensors = {}
    for name, shape in parameter_shapes(config).items():
        tensor = tensors[name] = found.pop(gguf_name(name), None)
        if tensor is None:
            raise UserError(f"{path}: {gguf_name(name)} is missing; fetch the file again")
        check_tensor(path, tensor, shape)
    if found:
        raise UserError(f"{path}: {next(iter(found))} is unexpected; LLaMA has no such weight")
    check_places(path, reader)
    if not kinds_in(tensors):
        first = next(tensor for name, tensor in tensors.items() if is_linear(name))
        raise UserError(
            f"{path}: {first.name} is {first.tensor_type.name}, and only {', '.join(IN_GROUPS)} "
            f"can take up an adapter; {REMEDY}"
        )
    return reader, metadata, config, tensors


@functools.lru_cache(maxsize=1)  # seconds for a large vocabulary, and a run asks a dozen times
def read_header(path: pathlib.Path, *version: int) -> tuple:
    """(GGUFReader, metadata); version: what changes with the file.

    Raises UserError for a damaged file, or one of another architecture.
    """
    gguf = gguf_package()
    try:
        reader = gguf.GGUFReader(path)
        metadata = {key: field.contents() for key, field in reader.fields.items()}
    except OSError:
        raise
    except Exception as e:  # a broken file can raise anything: the parser is not ours
        raise UserError(
            f"{path}: no GGUF file, or a damaged one ({type(e).__name__}); fetch it again"
        ) from None
    architecture = metadata.get("general.architecture")
    if reader.byte_order == "S" or architecture != "llama":
        raise UserError(
            f"{path}: only little-endian files of architecture llama are supported, not "
            f"{architecture}"
        )
    return reader, metadata


def check_places(path: pathlib.Path, reader: Any) -> None:
    """Raises UserError unless every tensor begins where the one before it ends, as padded."""
    in_order = sorted(reader.tensors, key=lambda tensor: tensor.data_offset)
    for before, tensor in itertools.pairwise(in_order):
        end = int(before.data_offset + before.n_bytes)
        if tensor.data_offset != end + (int(reader.data_offset) - end) % int(reader.alignment):
            raise UserError(
                f"{path}: {tensor.name} does not begin where {before.name} ends; fetch it again"
            )


def check_tensor(path: pathlib.Path, tensor: Any, shape: tuple) -> None:
    """Raises UserError unless a tensor has `shape` and can be read."""
    gguf, kind = gguf_package(), tensor.tensor_type
    found = tensor.shape.tolist()[::-1]
    if tuple(found) != shape:
        raise UserError(
            f"{path}: {tensor.name} has the shape {found}, but the hyperparameters ask for "
            f"{list(shape)}"
        )
    try:
        gguf.dequantize(tensor.data.reshape(-1, tensor.data.shape[-1])[:1], kind)
    except NotImplementedError:
        raise UserError(
            f"{path}: {tensor.name} is {kind.name}, which the gguf package cannot read; {REMEDY}"
        ) from None


def gguf_config(path: pathlib.Path, metadata: dict, tied: bool) -> LlamaConfig:
    """The LlamaConfig in a file's metadata; UserError for what is missing, invalid or unknown."""
    given = {}
    for key, value in metadata.items():
        if key.startswith("llama."):
            given[key.removeprefix("llama.")] = value
    pieces = metadata.get("tokenizer.ggml.tokens")
    fields = {
        "num_key_value_heads": given.get("attention.head_count"),
        "rms_norm_eps": None,
        "vocab_size": len(pieces) if isinstance(pieces, list) else None,
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id", 1),
        "eos_token_id": metadata.get("tokenizer.ggml.eos_token_id", 2),
        "tie_word_embeddings": tied,
    }
    for key, field in HYPERPARAMETERS.items():
        if key in given:
            fields[field] = given.pop(key)
    fields["rope_scaling"] = linear_scaling(path, given)
    config = checked_config(path, fields)
    plain = {"expert_count": 0, "expert_used_count": 0}
    plain |= dict.fromkeys(SAME_AS_HEAD_DIM, config.head_dim)
    for key, value in given.items():
        if key != "tensor_data_layout" and (key not in plain or value != plain[key]):
            raise UserError(f"{path}: llama.{key} = {value} is not supported")
    return config


def dequantized(
    path: pathlib.Path, tensor: Any, dtype: torch.dtype, heads: int | None = None
) -> Tensor:
    """A tensor of a GGUF file in `dtype` and our order; UserError where it is not finite."""
    kind, rows = tensor.tensor_type, []
    stored = tensor.data.reshape(-1, tensor.data.shape[-1])
    for start in range(0, len(stored), 4096):  # in float32 all of an embedding would take gigabytes
        part = gguf_package().dequantize(stored[start : start + 4096], kind)
        rows.append(torch.tensor(part).to(dtype))
    values = in_our_order(torch.cat(rows).view(*tensor.shape.tolist()[::-1]), heads)
    if not values.isfinite().all():
        raise UserError(
            f"{path}: {tensor.name} has NaN or infinite values, or such as {dtype} cannot hold; "
            "fetch it again"
        )
    return values


# ---- writing a new file


def write_gguf(
    model: Llama,
    tokenizer: Tokenizer,
    path: pathlib.Path,
    embeddings: torch.dtype = torch.float16,
) -> None:
    """Writes a quantized model and its tokenizer as a new GGUF file `path`.

    embeddings: the dtype of embedding and output head, float16 or float32; norms are float32.
    Raises UserError when a Q4_1 file cannot hold the model or the tokenizer, or `embeddings` a
    number.
    """
    gguf = gguf_package()
    types = {
        torch.uint8: gguf.GGMLQuantizationType.Q4_1,
        torch.float16: gguf.GGMLQuantizationType.F16,
        torch.float32: gguf.GGMLQuantizationType.F32,
    }
    writer = gguf.GGUFWriter(path, "llama")
    write_metadata(writer, model.config, tokenizer)
    places, end = [], 0
    for name, (shape, dtype, read) in stored_tensors(model, embeddings).items():
        size = shape.numel() * dtype.itemsize
        numpy_dtype = torch.empty(0, dtype=dtype).numpy().dtype
        writer.add_tensor_info(gguf_name(name), shape, numpy_dtype, size, types[dtype])
        places.append((end, read))
        end += writer.ggml_pad(size, writer.data_alignment)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    start = writer.ggml_pad(path.stat().st_size, writer.data_alignment)
    write_tensors(path, start, places, start + end)


def write_metadata(writer: Any, config: LlamaConfig, tokenizer: Tokenizer) -> None:
    """Adds all hyperparameters and the vocabulary to a GGUFWriter."""
    gguf = gguf_package()
    writer.add_type("model")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_1)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for key, field in HYPERPARAMETERS.items():
        is_float = field in ("rms_norm_eps", "rope_theta")
        add = writer.add_float32 if is_float else writer.add_uint32
        add(f"llama.{key}", getattr(config, field))
    for key in SAME_AS_HEAD_DIM:
        writer.add_uint32(f"llama.{key}", config.head_dim)
    if config.rope_scaling and config.rope_scaling["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(config.rope_scaling["factor"])
    write_vocabulary(writer, tokenizer, config.vocab_size)


def stored_tensors(model: Llama, embeddings: torch.dtype) -> dict[str, tuple]:
    """{our name: (shape, dtype, a function that returns the tensor)}; Q4_1 blocks are uint8.

    A tied output head is left out, as llama.cpp then takes the embedding.
    """
    tensors, scaling = {}, model.config.rope_scaling
    if scaling and scaling["rope_type"] == "llama3":
        by = divisors(model.config, scaling)
        tensors[ROPE_FREQS] = by.shape, torch.float32, lambda: by
    for name, p in model.named_parameters():
        dtype = torch.float32 if p.dim() == 1 else embeddings
        rows = in_file_order(p.detach(), rotary_heads(name, model.config))
        tensors[name] = p.shape, dtype, functools.partial(finite, name, rows, dtype)
    for name, layer in layers_in_groups(model).items():
        shape = torch.Size((layer.out_features, layer.in_features // 32 * 20))
        read = functools.partial(to_blocks, layer, "Q4_1", None, rotary_heads(name, model.config))
        tensors[f"{name}.weight"] = shape, torch.uint8, read
    return tensors


def finite(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor` in `dtype`; UserError where that is not finite."""
    if not tensor.to(dtype).isfinite().all():
        raise UserError(
            f"{name} has values that {dtype} cannot hold; write it with --embeddings f32"
        )
    return tensor.to(dtype)
