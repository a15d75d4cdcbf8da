"""GGUF Q4_1 files of llama.cpp: a quantized model written as one, and such a file as a base.

A Q4_1 block is 32 weights, w = d * code + m, with d and m in float16: our scale, codes and offset. So
nothing is quantized again; codes and scales are copied, and only offsets round, from float32 to
float16. That is the price of the format, and it is reported. (GPTQ's files want integer zero points,
which a merged offset is not.)

The way back takes a Q4_1 file as it is: its d, codes and m become the base. All its bytes except those
of the quantized layers are kept beside it, in gguf.safetensors, and written back in their places: what
fine-tuning did not change comes out byte for byte.

The `gguf` package (pip install gguf) knows the container and the constants; it is imported only where
it is needed.
"""

import functools
import io
import json
import pathlib
import struct

import safetensors
import torch
from safetensors.torch import save_file

from cli.errors import UserError
from cli.files import written_whole
from formats.files import checked_config, fill, open_file
from formats.quantized import save_quantized
from llama import LINEARS, Llama, LlamaConfig, linears
from quant import Quantized, QuantLinear, quantized_skeleton, unpack

TENSORS = {  # llama.cpp's name of each module
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
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
    "rope.freq_base": "rope_theta",
    "rope.dimension_count": "head_dim",
    "vocab_size": "vocab_size",
}


def gguf_package():
    """The `gguf` module; UserError where it is not installed."""
    try:
        import gguf
    except ImportError:
        raise UserError(
            "reading and writing GGUF needs the gguf package; run: pip install gguf"
        ) from None
    return gguf


def gguf_name(name):
    """llama.cpp's name of a parameter of ours: "model.layers.3.mlp.up_proj.weight" is "blk.3.ffn_up.weight"."""
    module = name.removesuffix(".weight")
    if module.startswith("model.layers."):
        _, _, layer, module = module.split(".", 3)
        return f"blk.{layer}.{TENSORS[module]}.weight"
    return f"{TENSORS[module]}.weight"


# ---- one matrix: our three tensors, llama.cpp's blocks


def to_q4_1(layer, heads=None):
    """The Q4_1 blocks of a QuantLinear, uint8 [O, I / 32 * 20]; a larger group repeats its scale and offset.

    A block is d and m, both float16, then 16 bytes; byte j holds code j and, in its high half, code j + 16.
    `heads`: reorder rows for the rotary embedding. Ours, like Hugging Face's, pairs channel i of a head with channel
    i + K/2; llama.cpp's pairs neighbours.
    """
    d, m = (
        t.half()
        .repeat_interleave(layer.group_size // 32, dim=1)
        .unsqueeze(-1)
        .view(torch.uint8)  # [O, I/32, 2]
        for t in (layer.scale, layer.offset)
    )
    codes = unpack(layer.packed, layer.bits, layer.in_features).unflatten(
        1, (-1, 2, 16)
    )  # [O, I/32, 2, 16]
    blocks = torch.cat([d, m, codes[:, :, 0] | codes[:, :, 1] << 4], dim=-1).flatten(1)
    return blocks.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2) if heads else blocks


def from_q4_1(blocks, heads=None):
    """The inverse: a 4-bit QuantLinear with groups of 32 from blocks uint8 [O, I / 32 * 20]."""
    if heads:
        blocks = blocks.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)
    d, m, pairs = blocks.unflatten(1, (-1, 20)).split([2, 2, 16], dim=-1)
    scale, offset = (t.contiguous().view(torch.float16).squeeze(-1) for t in (d, m))  # [O, I/32]
    codes = torch.cat([pairs & 15, pairs >> 4], dim=-1).flatten(1)
    return QuantLinear.from_quantized(Quantized(codes, scale, offset.float()), 4)


def rotary_heads(name, config):
    """How many heads the rows of the layer `name` make, where they go through the rotary embedding, else None."""
    return {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(
        name.rpartition(".")[2]
    )


def offset_rounding(model):
    """(largest, mean) change of an offset by float16, in units of its group's scale, the quantization step.

    Groups with scale 0, whose weights are all equal, have no such unit and do not count. Raises UserError, naming the
    layer, for what float16 cannot hold.
    """
    largest, total, count = 0.0, 0.0, 0
    for name, layer in quantized_layers(model).items():
        m = layer.offset.half()
        if not (m.isfinite().all() and layer.scale.isfinite().all()):
            raise UserError(
                f"{name}: an offset of {layer.offset.abs().max().item():g} is beyond float16, in which "
                "Q4_1 stores it; the training has diverged, train again with a smaller --lr"
            )
        steps = ((m.float() - layer.offset).abs() / layer.scale.float())[layer.scale != 0]
        largest = max(largest, steps.max().item() if len(steps) else 0.0)
        total, count = total + steps.sum(dtype=torch.float64).item(), count + len(steps)
    return largest, total / max(count, 1)


def quantized_layers(model):
    """{name: QuantLinear} of a model; UserError unless all seven of each block are such, in fitting groups."""
    layers = dict(linears(model))
    for name, layer in layers.items():
        if not isinstance(layer, QuantLinear):
            raise UserError(
                f"{name} is not quantized in groups; only what --method qalora trains becomes Q4_1"
            )
        if layer.group_size % 32:
            raise UserError(
                f"{name}: groups of {layer.group_size} do not fill Q4_1's blocks of 32 weights with one "
                "scale and offset; quantize with a --group-size that is a multiple of 32"
            )
    return layers


# ---- the vocabulary


def vocabulary(tokenizer, size):
    """(pieces, scores, types, add_space_prefix) as GGUF keeps them, filled up to `size` with unused pieces.

    sentencepiece's numbers for types (1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused, 6 byte) are GGUF's.
    Raises UserError for a tokenizer that is larger than `size`, or that does what llama.cpp does not: llama.cpp
    merges pieces by score (sentencepiece's BPE) and normalizes nothing but spaces.
    """
    model = list(protobuf_fields(tokenizer.serialized_model_proto()))
    pieces = [dict(protobuf_fields(value)) for number, value in model if number == 1]
    trainer, normalizer = (dict(protobuf_fields(dict(model).get(number, b""))) for number in (2, 3))
    if len(pieces) > size:
        raise UserError(
            f"the tokenizer has {len(pieces)} pieces, the embedding {size}: they do not belong together; "
            "copy the model's own tokenizer.model into its folder"
        )
    differs = {
        "it is not a BPE model": trainer.get(3, 1) != 2,
        "it puts spaces after words": trainer.get(24, 0),
        "it changes characters": normalizer.get(2),
        "it removes spaces": normalizer.get(4, 1),
        "it does not escape spaces": not normalizer.get(5, 1),
    }
    for what, does in differs.items():
        if does:
            raise UserError(
                f"llama.cpp would tokenize otherwise than this sentencepiece model: {what}; "
                "only tokenizers like LLaMA's can be exported"
            )
    padding = range(len(pieces), size)
    return (
        [p[1].decode() for p in pieces] + [f"[PAD{i}]" for i in padding],
        [struct.unpack("<f", p.get(2, bytes(4)))[0] for p in pieces] + [-10000.0 for _ in padding],
        [p.get(3, 1) for p in pieces] + [5 for _ in padding],
        bool(normalizer.get(3, 1)),
    )


def protobuf_fields(message):
    """Yields (number, value) for each field of a protocol buffer: an int for a varint, bytes for all else."""
    stream = io.BytesIO(message)

    def varint():
        value = shift = 0
        while True:
            byte = stream.read(1)[0]
            value, shift = value | (byte & 127) << shift, shift + 7
            if byte < 128:
                return value

    while stream.tell() < len(message):
        key = varint()
        sizes = {1: 8, 5: 4}  # of a double and a float; other bytes come with their length
        yield key >> 3, varint() if key & 7 == 0 else stream.read(sizes.get(key & 7) or varint())


# ---- writing


def write_gguf(model, tokenizer, path, embeddings=torch.float16):
    """Writes a quantized model and its tokenizer as a new GGUF file `path`.

    embeddings: the dtype of embedding and output head, float16 or float32; norms are float32. Raises UserError when
    the model or the tokenizer has no place in a GGUF Q4_1 file, or a number none in its dtype.
    """
    gguf = gguf_package()
    layers = quantized_layers(model)
    types = {
        torch.uint8: gguf.GGMLQuantizationType.Q4_1,
        torch.float16: gguf.GGMLQuantizationType.F16,
        torch.float32: gguf.GGMLQuantizationType.F32,
    }
    writer = gguf.GGUFWriter(path, "llama")
    write_metadata(writer, gguf, model.config, tokenizer)
    places, end = [], 0
    for name, (shape, dtype, read) in stored_tensors(model, layers, embeddings).items():
        size = shape.numel() * dtype.itemsize
        writer.add_tensor_info(
            gguf_name(name), shape, torch.empty(0, dtype=dtype).numpy().dtype, size, types[dtype]
        )
        places.append((end, read))
        end += writer.ggml_pad(size, writer.data_alignment)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    start = writer.ggml_pad(path.stat().st_size, writer.data_alignment)
    write_tensors(path, start, places, start + end)


def write_metadata(writer, gguf, config, tokenizer):
    """Adds all hyperparameters and the vocabulary to a GGUFWriter."""
    writer.add_type("model")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_1)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for key, field in HYPERPARAMETERS.items():
        value = getattr(config, field)
        (writer.add_float32 if field in ("rms_norm_eps", "rope_theta") else writer.add_uint32)(
            f"llama.{key}", value
        )
    pieces, scores, types, add_space_prefix = vocabulary(tokenizer, config.vocab_size)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(pieces)
    writer.add_token_scores(scores)
    writer.add_token_types(types)
    writer.add_bos_token_id(tokenizer.bos_id())
    writer.add_eos_token_id(tokenizer.eos_id())
    writer.add_unk_token_id(tokenizer.unk_id())
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(add_space_prefix)


def stored_tensors(model, layers, embeddings):
    """{name: (shape, dtype, function that returns it)} of all tensors in a GGUF file; Q4_1 blocks are uint8."""
    tensors = {}
    for (
        name,
        p,
    ) in (
        model.named_parameters()
    ):  # a tied output head is not among them: llama.cpp takes the embedding
        dtype = torch.float32 if p.dim() == 1 else embeddings
        tensors[name] = p.shape, dtype, functools.partial(finite, name, p.detach(), dtype)
    for name, layer in layers.items():
        shape = torch.Size((layer.out_features, layer.in_features // 32 * 20))
        read = functools.partial(to_q4_1, layer, rotary_heads(name, model.config))
        tensors[f"{name}.weight"] = shape, torch.uint8, read
    return tensors


def finite(name, tensor, dtype):
    """`tensor` in `dtype`; UserError where that is not finite."""
    if not tensor.to(dtype).isfinite().all():
        raise UserError(
            f"{name} has values that {dtype} cannot hold; write it with --embeddings f32"
        )
    return tensor.to(dtype)


def write_tensors(path, start, places, size):
    """Writes tensors into a file that has its header; `places` are pairs: offset after `start`, function."""
    with open(path, "r+b") as f:
        for offset, read in places:
            f.seek(start + offset)
            f.write(read().contiguous().numpy())
        f.truncate(size)


# ---- reading, and writing back

REST = "gguf.safetensors"  # in the folder of a model that came from a GGUF file: all of it but the linear layers


def is_gguf(weights):
    """Whether these weights are one GGUF file; all others are folders. By the name, as the file need not exist."""
    return pathlib.Path(weights).suffix.lower() == ".gguf" and not pathlib.Path(weights).is_dir()


def open_gguf(path):
    """(GGUFReader, LlamaConfig, {our name: ReaderTensor}) of a Q4_1 file; reads the header only.

    Raises UserError when the file is damaged, asks for what `Llama` does not compute, or has linears in other types.
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
    if reader.byte_order == "S" or metadata.get("general.architecture") != "llama":
        raise UserError(
            f"{path}: only little-endian files of architecture llama are supported, not "
            f"{metadata.get('general.architecture')}"
        )
    found = {tensor.name: tensor for tensor in reader.tensors}
    config = gguf_config(path, metadata, tied="output.weight" not in found)
    if (
        f"blk.{config.num_hidden_layers - 1}.attn_norm.weight" not in found
    ):  # a damaged number may ask for millions
        raise UserError(
            f"{path}: has no tensors for the last of {config.num_hidden_layers} layers; fetch it again, "
            "or join the parts of a split file with llama-gguf-split --merge"
        )
    if config.hidden_size % 32 or config.intermediate_size % 32:
        raise UserError(
            f"{path}: widths of {config.hidden_size} and {config.intermediate_size} are not both "
            "multiples of 32, so not all its layers can be Q4_1"
        )
    model = quantized_skeleton(config, 4, 32)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    shapes |= {
        f"{name}.weight": (m.out_features, m.in_features)
        for name, m in quantized_layers(model).items()
    }
    tensors = {}
    for name, shape in shapes.items():
        tensor = tensors[name] = found.pop(gguf_name(name), None)
        if tensor is None:
            raise UserError(f"{path}: {gguf_name(name)} is missing; fetch the file again")
        check_tensor(gguf, path, tensor, shape, name.split(".")[-2] in LINEARS)
    if found:
        raise UserError(f"{path}: {next(iter(found))} is unexpected; LLaMA has no such weight")
    in_order = sorted(reader.tensors, key=lambda tensor: tensor.data_offset)
    for before, tensor in zip(in_order, in_order[1:]):
        if not 0 <= tensor.data_offset - before.data_offset - before.n_bytes < reader.alignment:
            raise UserError(
                f"{path}: {tensor.name} does not begin where {before.name} ends; fetch it again"
            )
    return reader, config, tensors


def check_tensor(gguf, path, tensor, shape, linear):
    """UserError unless a tensor has `shape`, and is Q4_1 or, where it is not a linear layer's, can be dequantized."""
    if tuple(reversed(tensor.shape.tolist())) != shape:
        raise UserError(
            f"{path}: {tensor.name} has the shape {tensor.shape.tolist()[::-1]}, "
            f"but the hyperparameters ask for {list(shape)}"
        )
    if linear and tensor.tensor_type != gguf.GGMLQuantizationType.Q4_1:
        raise UserError(
            f"{path}: {tensor.name} is {tensor.tensor_type.name}, and only Q4_1 can take up an adapter; "
            "make the file anew with llama-quantize MODEL.gguf OUT.gguf Q4_1"
        )
    try:
        gguf.dequantize(tensor.data.reshape(-1, tensor.data.shape[-1])[:1], tensor.tensor_type)
    except NotImplementedError:
        raise UserError(
            f"{path}: {tensor.name} is {tensor.tensor_type.name}, which the gguf package cannot read; "
            "make the file anew with llama-quantize MODEL.gguf OUT.gguf Q4_1"
        ) from None


def gguf_config(path, metadata, tied):
    """The LlamaConfig in a GGUF file's metadata. Raises UserError for what is missing, senseless or not supported."""
    given = {
        key.removeprefix("llama."): value
        for key, value in metadata.items()
        if key.startswith("llama.")
    }
    fields = {field: given.pop(key) for key, field in HYPERPARAMETERS.items() if key in given}
    pieces = metadata.get("tokenizer.ggml.tokens")
    fields = {
        "num_key_value_heads": fields.get("num_attention_heads"),
        "rms_norm_eps": None,
        "vocab_size": len(pieces) if isinstance(pieces, list) else None,
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id", 1),
        "eos_token_id": metadata.get("tokenizer.ggml.eos_token_id", 2),
        "tie_word_embeddings": tied,
        **fields,
    }
    config = checked_config(path, fields)
    plain = {
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "expert_count": 0,
        "expert_used_count": 0,
        "rope.scaling.type": "none",
        "rope.scale_linear": 1.0,
    }
    for key, value in given.items():
        if key != "tensor_data_layout" and (key not in plain or value != plain[key]):
            raise UserError(f"{path}: llama.{key} = {value} is not supported")
    return config


def check_tokenizer(path, tokenizer):
    """Raises UserError for all that `open_gguf` does, and when the tokenizer is not the file's."""
    reader, config, _ = open_gguf(path)
    contents = lambda key: reader.fields[key].contents() if key in reader.fields else None
    if contents("tokenizer.ggml.model") != "llama":
        raise UserError(
            f"{path}: its tokenizer is of kind {contents('tokenizer.ggml.model')}, not sentencepiece's"
        )
    pieces = contents("tokenizer.ggml.tokens")
    if not isinstance(pieces, list) or len(pieces) != config.vocab_size:
        raise UserError(
            f"{path}: its vocabulary has not the embedding's {config.vocab_size} pieces; fetch it again"
        )
    ours = [tokenizer.id_to_piece(i) for i in range(tokenizer.vocab_size())]
    for i, piece in enumerate(ours):
        if i >= len(pieces) or piece != pieces[i]:
            raise UserError(
                f"{path}: piece {i} of its vocabulary is {pieces[i] if i < len(pieces) else None!r}, "
                f"the tokenizer's is {piece!r}; name the model's own file with --tokenizer"
            )
    if tokenizer.eos_id() != config.eos_token_id or tokenizer.bos_id() != config.bos_token_id:
        raise UserError(
            f"{path}: BOS and EOS are {config.bos_token_id} and {config.eos_token_id}, the tokenizer's "
            f"{tokenizer.bos_id()} and {tokenizer.eos_id()}; name the model's own file with --tokenizer"
        )


def matches(path: pathlib.Path) -> bool:
    """Whether `path` is, by its name, a GGUF file."""
    return path.suffix.lower() == ".gguf" and path.is_file()


def read_config(path: pathlib.Path) -> LlamaConfig:
    """The LlamaConfig of a Q4_1 file; reads the header only. Raises UserError as `open_gguf` does."""
    return open_gguf(path)[1]


def quantization_of(path: pathlib.Path) -> dict:
    """What Q4_1 is: 4 bits in groups of 32."""
    return {"bits": 4, "group_size": 32}


def check(path: pathlib.Path):
    """Raises UserError as `open_gguf` does."""
    open_gguf(path)


def load_model(path: pathlib.Path, dtype: torch.dtype | None = None, device: str = "cpu") -> Llama:
    """The model in a Q4_1 file, with its codes; dtype: what the float parts are cast to.

    d, codes and m are taken as they are. Embedding, norms and head are dequantized, to float32 only
    where the file keeps its embedding so, as 16 bits let `compute_dtype` choose bfloat16. Raises
    UserError as `open_gguf` does, and for numbers that are not finite.
    """
    gguf = gguf_package()
    _, config, tensors = open_gguf(path)
    model = quantized_skeleton(config, 4, 32)
    kept = {"F32": torch.float32, "BF16": torch.bfloat16}
    stored = kept.get(tensors["model.embed_tokens.weight"].tensor_type.name, torch.float16)
    weights = {}
    for name, tensor in tensors.items():
        module = name.removesuffix(".weight")
        if module.rpartition(".")[2] not in LINEARS:
            weights[name] = functools.partial(dequantized, gguf, path, tensor, stored)
            continue
        blocks = torch.from_numpy(tensor.data.copy())
        layer = from_q4_1(blocks, rotary_heads(module, config))
        if not (layer.scale.isfinite().all() and layer.offset.isfinite().all()):
            raise UserError(f"{path}: {tensor.name} has NaN or infinite values; fetch it again")
        model.set_submodule(module, layer)
    return fill(model, weights).requires_grad_(False).to(device, dtype)


def import_base(path: pathlib.Path, folder: pathlib.Path):
    """Writes a Q4_1 file as a folder of our own: nothing is calibrated or quantized."""
    reader, _, tensors = open_gguf(path)
    save_quantized(load_model(path), folder)
    others = [t for name, t in tensors.items() if name.split(".")[-2] not in LINEARS]
    save_rest(reader, others, folder / REST)


def dequantized(gguf, path, tensor, dtype):
    """A tensor of a GGUF file in `dtype`; UserError where it is not finite."""
    values = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy()).to(dtype)
    if not values.isfinite().all():
        raise UserError(
            f"{path}: {tensor.name} has NaN or infinite values, or such as {dtype} cannot hold; "
            "fetch it again"
        )
    return values


def save_rest(reader, others, path):
    """Keeps what `write_back` needs of a GGUF file: its header, the bytes of `others`, and where each tensor lies."""
    copy = lambda start, size: torch.from_numpy(reader.data[start : start + size].copy())
    kept = {tensor.name: copy(tensor.data_offset, tensor.n_bytes) for tensor in others}
    places = {tensor.name: tensor.data_offset for tensor in reader.tensors}
    layout = {"places": json.dumps(places), "size": str(len(reader.data))}
    with written_whole(path) as beside:
        save_file({"header": copy(0, reader.data_offset), **kept}, beside, metadata=layout)


def write_back(model, rest, path):
    """Writes a model that came from a GGUF file as one: the old file's bytes, but for the quantized layers."""
    kept = open_file(rest)
    with safetensors.safe_open(rest, framework="pt") as file:
        layout = file.metadata()
    if "header" not in kept or not layout or not {"places", "size"} <= layout.keys():
        raise UserError(
            f"{rest} is not what import_gguf wrote; import the GGUF file again with train.py --fresh"
        )
    path.write_bytes(kept["header"].read().numpy())
    blocks = {
        gguf_name(name): functools.partial(to_q4_1, layer, rotary_heads(name, model.config))
        for name, layer in quantized_layers(model).items()
    }
    places = [
        (offset, blocks.get(name) or kept[name].read)
        for name, offset in json.loads(layout["places"]).items()
    ]
    write_tensors(path, 0, places, int(layout["size"]))
