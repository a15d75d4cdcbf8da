"""GGUF Q4_1 files of llama.cpp: a quantized model written as one, and such a file as a base.

A Q4_1 block is 32 weights, w = d * code + m, with d and m in float16: our scale, codes and offset.
So nothing is quantized again; codes and scales are copied, and only offsets round, from float32 to
float16. That is the price of the format, and it is reported. (GPTQ's files want integer zero
points, which a merged offset is not.)

Reading takes a Q4_1 file as it is: its d, codes and m become the base. All its bytes except those
of the quantized layers are kept beside the base, in gguf.safetensors, and written back to their
places: what fine-tuning did not change comes out byte for byte.

The `gguf` package (pip install gguf) knows the container and the constants; it is imported only
where it is needed. `formats/q4_1.py` has the blocks, `formats/gguf_vocabulary.py` the tokenizer.
"""

import dataclasses
import functools
import itertools
import json
import pathlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor

from cli.errors import UserError
from cli.files import written_whole
from formats.files import GGUF_REST, checked_config, fill, open_file
from formats.gguf_rope import ROPE_FREQS, divisors, linear_scaling, llama3_scaling
from formats.gguf_vocabulary import tokenizer_of, with_format, write_vocabulary
from formats.q4_1 import from_q4_1, quantized_layers, rotary_heads, to_q4_1
from formats.quantized import quantized_skeleton, save_quantized
from llama import LINEARS, Llama, LlamaConfig
from text.tokenizer import Tokenizer

TENSORS = {  # llama.cpp's name of each module
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "rope_freqs": "rope_freqs",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
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
SAME_AS_HEAD_DIM = ("attention.value_length", "rope.dimension_count")


def gguf_package() -> ModuleType:
    """The `gguf` module; UserError where it is not installed."""
    try:
        import gguf
    except ImportError:
        raise UserError(
            "reading and writing GGUF needs the gguf package; run: pip install gguf"
        ) from None
    return gguf


def gguf_name(name: str) -> str:
    """llama.cpp's name of a parameter: model.layers.3.mlp.up_proj.weight is blk.3.ffn_up.weight."""
    module, prefix = name.removesuffix(".weight"), ""
    if module.startswith("model.layers."):
        _, _, layer, module = module.split(".", 3)
        prefix = f"blk.{layer}."
    return f"{prefix}{TENSORS[module]}.weight"


# ---- reading: what every format has


def matches(path: pathlib.Path) -> bool:
    """Whether `path` is, by its name, a GGUF file."""
    return path.suffix.lower() == ".gguf" and path.is_file()


def read_config(path: pathlib.Path) -> LlamaConfig:
    """The LlamaConfig of a Q4_1 file, from its header. Raises UserError as `open_gguf` does."""
    _, _, config, _ = open_gguf(path)
    return config


def quantization_of(path: pathlib.Path) -> dict:
    """What Q4_1 is: 4 bits in groups of 32."""
    return {"bits": 4, "group_size": 32}


def check(path: pathlib.Path) -> None:
    """Raises UserError as `open_gguf` does."""
    open_gguf(path)


def load_model(path: pathlib.Path, dtype: torch.dtype | None = None, device: str = "cpu") -> Llama:
    """The model in a Q4_1 file, with its codes; dtype: what the float parts are cast to.

    d, codes and m are taken as they are. Embedding, norms and head are dequantized, to float32 only
    where the file keeps its embedding so, as 16 bits let `compute_dtype` choose bfloat16. Raises
    UserError as `open_gguf` does, and for numbers that are not finite.
    """
    _, _, config, tensors = open_gguf(path)
    model = quantized_skeleton(config, 4, 32)
    kept = {"F32": torch.float32, "BF16": torch.bfloat16}
    stored = kept.get(tensors["model.embed_tokens.weight"].tensor_type.name, torch.float16)
    weights = {}
    for name, tensor in tensors.items():
        module = name.removesuffix(".weight")
        if module.rpartition(".")[2] not in LINEARS:
            weights[name] = functools.partial(dequantized, path, tensor, stored)
            continue
        blocks = torch.from_numpy(tensor.data.copy())
        layer = from_q4_1(blocks, rotary_heads(module, config))
        if not (layer.scale.isfinite().all() and layer.offset.isfinite().all()):
            raise UserError(f"{path}: {tensor.name} has NaN or infinite values; fetch it again")
        model.set_submodule(module, layer)
    return fill(model, weights).requires_grad_(False).to(device, dtype)


def files(path: pathlib.Path) -> list[pathlib.Path]:
    """The file itself."""
    return [path]


def import_base(path: pathlib.Path, folder: pathlib.Path) -> None:
    """Writes a Q4_1 file as a folder of our own: nothing is calibrated or quantized."""
    reader, _, _, tensors = open_gguf(path)
    save_quantized(load_model(path), folder)
    quantized = {t.name for name, t in tensors.items() if name.split(".")[-2] in LINEARS}
    others = [tensor for tensor in reader.tensors if tensor.name not in quantized]
    save_rest(reader, others, folder / GGUF_REST)


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
    """(GGUFReader, metadata, LlamaConfig, {our name: ReaderTensor}); reads the header only.

    Raises UserError when the file is damaged, asks for what `Llama` does not compute, or has linear
    layers in other types than Q4_1.
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
    found = {tensor.name: tensor for tensor in reader.tensors}
    config = gguf_config(path, metadata, tied="output.weight" not in found)
    if ROPE_FREQS in found:
        scaling = llama3_scaling(path, found.pop(ROPE_FREQS), config)
        config = dataclasses.replace(config, rope_scaling=scaling)
    check_sizes(path, config, found)
    tensors = {}
    for name, shape in expected_shapes(config).items():
        tensor = tensors[name] = found.pop(gguf_name(name), None)
        if tensor is None:
            raise UserError(f"{path}: {gguf_name(name)} is missing; fetch the file again")
        check_tensor(path, tensor, shape, name.split(".")[-2] in LINEARS)
    if found:
        raise UserError(f"{path}: {next(iter(found))} is unexpected; LLaMA has no such weight")
    check_places(path, reader)
    return reader, metadata, config, tensors


def check_sizes(path: pathlib.Path, config: LlamaConfig, found: dict) -> None:
    """Raises UserError where a damaged number asks for millions of layers, or for odd widths."""
    layers = config.num_hidden_layers
    if f"blk.{layers - 1}.attn_norm.weight" not in found:
        raise UserError(
            f"{path}: has no tensors for the last of {layers} layers; fetch it again, or join the "
            "parts of a split file with llama-gguf-split --merge"
        )
    D, F = config.hidden_size, config.intermediate_size
    attended = config.num_attention_heads * config.head_dim
    if D % 32 or F % 32 or attended % 32:
        raise UserError(
            f"{path}: widths of {D}, {F} and {attended} are not all multiples of 32, so not all "
            "its layers can be Q4_1"
        )


def expected_shapes(config: LlamaConfig) -> dict[str, tuple]:
    """The shape of every tensor of a model by our names."""
    model = quantized_skeleton(config, 4, 32)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    for name, layer in quantized_layers(model).items():
        shapes[f"{name}.weight"] = layer.out_features, layer.in_features
    return shapes


def check_places(path: pathlib.Path, reader: Any) -> None:
    """Raises UserError unless every tensor begins where the one before it ends."""
    in_order = sorted(reader.tensors, key=lambda tensor: tensor.data_offset)
    for before, tensor in itertools.pairwise(in_order):
        gap = tensor.data_offset - before.data_offset - before.n_bytes
        if not 0 <= gap < reader.alignment:
            raise UserError(
                f"{path}: {tensor.name} does not begin where {before.name} ends; fetch it again"
            )


def check_tensor(path: pathlib.Path, tensor: Any, shape: tuple, is_linear: bool) -> None:
    """Raises UserError unless a tensor has `shape` and can be read; linear layers must be Q4_1."""
    gguf, kind = gguf_package(), tensor.tensor_type
    remedy = "make the file again with llama-quantize MODEL.gguf OUT.gguf Q4_1"
    found = tensor.shape.tolist()[::-1]
    if tuple(found) != shape:
        raise UserError(
            f"{path}: {tensor.name} has the shape {found}, but the hyperparameters ask for "
            f"{list(shape)}"
        )
    if is_linear and kind != gguf.GGMLQuantizationType.Q4_1:
        raise UserError(
            f"{path}: {tensor.name} is {kind.name}, and only Q4_1 can take up an adapter; {remedy}"
        )
    try:
        gguf.dequantize(tensor.data.reshape(-1, tensor.data.shape[-1])[:1], kind)
    except NotImplementedError:
        raise UserError(
            f"{path}: {tensor.name} is {kind.name}, which the gguf package cannot read; {remedy}"
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


def dequantized(path: pathlib.Path, tensor: Any, dtype: torch.dtype) -> Tensor:
    """A tensor of a GGUF file in `dtype`; UserError where it is not finite."""
    values = gguf_package().dequantize(tensor.data, tensor.tensor_type)
    values = torch.from_numpy(values.copy()).to(dtype)
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
        tensors[name] = p.shape, dtype, functools.partial(finite, name, p.detach(), dtype)
    for name, layer in quantized_layers(model).items():
        shape = torch.Size((layer.out_features, layer.in_features // 32 * 20))
        read = functools.partial(to_q4_1, layer, rotary_heads(name, model.config))
        tensors[f"{name}.weight"] = shape, torch.uint8, read
    return tensors


def finite(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor` in `dtype`; UserError where that is not finite."""
    if not tensor.to(dtype).isfinite().all():
        raise UserError(
            f"{name} has values that {dtype} cannot hold; write it with --embeddings f32"
        )
    return tensor.to(dtype)


def write_tensors(
    path: pathlib.Path, start: int, places: list[tuple[int, Callable]], size: int
) -> None:
    """Writes tensors into a file that has its header, and makes it `size` bytes long.

    places: for each tensor its offset after `start`, and a function that returns it.
    """
    with path.open("r+b") as f:
        for offset, read in places:
            f.seek(start + offset)
            f.write(read().contiguous().numpy())
        f.truncate(size)


# ---- writing back into the file that a model came from


def save_rest(reader: Any, others: list, path: pathlib.Path) -> None:
    """Keeps what `write_back` needs: header, the bytes of `others`, and where each tensor lies."""

    def copy(start, size):
        return torch.from_numpy(reader.data[start : start + size].copy())

    kept = {tensor.name: copy(tensor.data_offset, tensor.n_bytes) for tensor in others}
    kept["header"] = copy(0, reader.data_offset)
    places = {tensor.name: tensor.data_offset for tensor in reader.tensors}
    layout = {"places": json.dumps(places), "size": str(len(reader.data))}
    with written_whole(path) as beside:
        save_file(kept, beside, metadata=layout)


def write_back(model: Llama, tokenizer: Tokenizer, rest: pathlib.Path, path: pathlib.Path) -> None:
    """Writes the GGUF file that a model came from, with the quantized layers as they are now.

    Where the tokenizer has another chat template than the file, that is replaced as well. Raises
    UserError where what was kept of the file is damaged.
    """
    kept = open_file(rest)
    with safetensors.safe_open(rest, framework="pt") as file:
        layout = file.metadata() or {}
    if "header" not in kept or not {"places", "size"} <= layout.keys():
        raise UserError(
            f"{rest} is damaged, or was not written by train.py; import the GGUF file again with "
            "train.py --fresh"
        )
    header, size = kept["header"].read().numpy().tobytes(), int(layout["size"])
    path.write_bytes(header)
    write_tensors(path, 0, [], size)  # GGUFReader wants a file of the whole length
    changed = with_format(header, gguf_package().GGUFReader(path), tokenizer)
    path.write_bytes(changed)
    readers = {name: stored.read for name, stored in kept.items()}
    for name, layer in quantized_layers(model).items():
        heads = rotary_heads(name, model.config)
        readers[gguf_name(f"{name}.weight")] = functools.partial(to_q4_1, layer, heads)
    moved = len(changed) - len(header)
    places = [(at, readers[name]) for name, at in json.loads(layout["places"]).items()]
    write_tensors(path, moved, places, size + moved)
