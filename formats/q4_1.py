"""A matrix in GGUF's Q4_1 blocks, and sentencepiece's vocabulary as GGUF keeps it."""

import io
import struct
from collections.abc import Iterator

import torch
from sentencepiece import SentencePieceProcessor
from torch import Tensor, nn

from cli.errors import UserError
from llama import LlamaConfig, linears
from quant import Quantized, QuantLinear, unpack

# ---- a matrix


def to_q4_1(layer: QuantLinear, heads: int | None = None) -> Tensor:
    """The Q4_1 blocks of a layer, uint8 [O, I / 32 * 20]; a larger group repeats scale and offset.

    A block is d and m, both float16, then 16 bytes; byte j holds code j and, in its high half, code
    j + 16 (ggml's `block_q4_1`). heads: rows are reordered for the rotary embedding: ours, like
    Hugging Face's, pairs channel i of a head with channel i + K/2; llama.cpp's pairs neighbours.
    """
    d, m = _as_bytes(layer.scale, layer), _as_bytes(layer.offset, layer)
    codes = unpack(layer.packed, layer.bits, layer.in_features)
    low, high = codes.unflatten(1, (-1, 2, 16)).unbind(2)  # [O, I/32, 16] each
    blocks = torch.cat([d, m, low | high << 4], dim=-1).flatten(1)
    if heads:
        blocks = blocks.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
    return blocks


def _as_bytes(values_OG, layer):  # float16, [O, I/32, 2]
    repeated = values_OG.half().repeat_interleave(layer.group_size // 32, dim=1)
    return repeated.unsqueeze(-1).view(torch.uint8)


def from_q4_1(blocks: Tensor, heads: int | None = None) -> QuantLinear:
    """The inverse: a 4-bit layer with groups of 32 from blocks uint8 [O, I / 32 * 20]."""
    if heads:
        blocks = blocks.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)
    d, m, pairs = blocks.unflatten(1, (-1, 20)).split([2, 2, 16], dim=-1)
    scale = d.contiguous().view(torch.float16).squeeze(-1)  # [O, I/32]
    offset = m.contiguous().view(torch.float16).squeeze(-1)
    codes = torch.cat([pairs & 15, pairs >> 4], dim=-1).flatten(1)
    return QuantLinear.from_quantized(Quantized(codes, scale, offset.float()), 4)


def rotary_heads(name: str, config: LlamaConfig) -> int | None:
    """How many heads a layer's rows are, if they go through the rotary embedding."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    return heads.get(name.rpartition(".")[2])


def quantized_layers(model: nn.Module) -> dict[str, QuantLinear]:
    """The linear layers by name; UserError unless all are QuantLinears in groups that fit Q4_1."""
    layers = dict(linears(model))
    for name, layer in layers.items():
        if not isinstance(layer, QuantLinear):
            raise UserError(
                f"{name} is not quantized in groups; only what --method qalora trains becomes Q4_1"
            )
        if layer.group_size % 32:
            raise UserError(
                f"{name}: groups of {layer.group_size} do not fill Q4_1's blocks of 32 weights "
                "with one scale and offset; quantize with a --group-size that is a multiple of 32"
            )
    return layers


def offset_rounding(model: nn.Module) -> tuple[float, float]:
    """(largest, mean) change of an offset by float16, in quantization steps: its group's scale.

    Groups with scale 0, whose weights are all equal, have no step and do not count. Raises
    UserError, naming the layer, for what float16 cannot hold.
    """
    largest, total, count = 0.0, 0.0, 0
    for name, layer in quantized_layers(model).items():
        m = layer.offset.half()
        if not (m.isfinite().all() and layer.scale.isfinite().all()):
            offset = f"{layer.offset.abs().max().item():g}"
            raise UserError(
                f"{name}: an offset of {offset} is beyond float16, in which Q4_1 stores it; the "
                "training has diverged, train again with a smaller --lr"
            )
        steps = ((m.float() - layer.offset).abs() / layer.scale.float())[layer.scale != 0]
        if len(steps):
            largest = max(largest, steps.max().item())
        total += steps.sum(dtype=torch.float64).item()
        count += len(steps)
    return largest, total / max(count, 1)


# ---- the vocabulary


def vocabulary(
    tokenizer: SentencePieceProcessor, size: int
) -> tuple[list[str], list[float], list[int], bool]:
    """(pieces, scores, types, add_space_prefix) as GGUF keeps them, padded to `size` pieces.

    sentencepiece's numbers for types (1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused,
    6 byte) are GGUF's. Raises UserError for a tokenizer that is larger than `size`, or that does
    what llama.cpp does not: it merges pieces by score (sentencepiece's BPE) and normalizes nothing
    but spaces.
    """
    model = list(protobuf_fields(tokenizer.serialized_model_proto()))
    pieces = [dict(protobuf_fields(value)) for number, value in model if number == 1]
    trainer = dict(protobuf_fields(dict(model).get(2, b"")))
    normalizer = dict(protobuf_fields(dict(model).get(3, b"")))
    if len(pieces) > size:
        raise UserError(
            f"the tokenizer has {len(pieces)} pieces, the embedding {size}: they do not belong "
            "together; copy the model's own tokenizer.model into its folder"
        )
    check_like_llama(trainer, normalizer)
    padding = range(len(pieces), size)
    names = [piece[1].decode() for piece in pieces] + [f"[PAD{i}]" for i in padding]
    scores = [struct.unpack("<f", piece.get(2, bytes(4)))[0] for piece in pieces]
    types = [piece.get(3, 1) for piece in pieces]
    scores += [-10000.0] * len(padding)
    types += [5] * len(padding)
    return names, scores, types, bool(normalizer.get(3, 1))


def check_like_llama(trainer: dict, normalizer: dict) -> None:
    """Raises UserError where llama.cpp would tokenize otherwise than a sentencepiece model.

    The two are messages of sentencepiece_model.proto, as field numbers and values.
    """
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


def protobuf_fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yields (number, value) of each field of a protocol buffer: an int for a varint, or bytes."""
    stream = io.BytesIO(message)

    def varint():
        value = shift = 0
        while True:
            byte = stream.read(1)[0]
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    fixed = {1: 8, 5: 4}  # bytes of a double and a float; others come with their length
    while stream.tell() < len(message):
        key = varint()
        number, kind = key >> 3, key & 7
        yield number, varint() if kind == 0 else stream.read(fixed.get(kind) or varint())
