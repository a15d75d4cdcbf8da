"""Matrices in GGUF's blocks of 4-bit codes: Q4_0, Q4_1 and Q4_K (ggml-quants.c, ggml-common.h).

All three are scale * code + offset in groups of 32, so all can be a base. Only Q4_1 has an offset
of its own, so what was tuned is written as Q4_1, with the same codes; d and m are then float16.
Layers come and go in our order of rows, blocks in the file's.
"""

import torch
from torch import Tensor

from formats.groups import imported
from llama import LlamaConfig
from quant import Quantized, QuantLinear, unpack

IN_GROUPS = ("Q4_0", "Q4_1", "Q4_K")  # what can take up an adapter
HEAD = 16  # bytes at the start of a Q4_K block that are no codes


# ---- reading


def from_blocks(blocks: Tensor, kind: str, name: str) -> QuantLinear:
    """The layer in blocks uint8 [O, bytes] of a kind in IN_GROUPS: 4 bits in groups of 32.

    name: of file and tensor, for the UserError where its numbers are not finite.
    """
    readers = {"Q4_0": from_q4_0, "Q4_1": from_q4_1, "Q4_K": from_q4_k}
    return imported(*readers[kind](blocks), 4, name)


def from_q4_0(blocks: Tensor) -> Quantized:
    """Q4_0, uint8 [O, I/32 * 18]: d, then 16 bytes of codes; a weight is d * (code - 8)."""
    d, pairs = blocks.unflatten(1, (-1, 18)).split([2, 16], dim=-1)
    scale = _float16(d)
    return Quantized(_codes(pairs), scale, -8 * scale.float())


def from_q4_1(blocks: Tensor) -> Quantized:
    """Q4_1, uint8 [O, I/32 * 20]: d and m, then 16 bytes of codes; a weight is d * code + m."""
    d, m, pairs = blocks.unflatten(1, (-1, 20)).split([2, 2, 16], dim=-1)
    return Quantized(_codes(pairs), _float16(d), _float16(m).float())


def from_q4_k(blocks: Tensor) -> Quantized:
    """Q4_K, uint8 [O, I/256 * 144]: a head for eight groups, then 128 bytes of codes.

    The scales have up to 17 bits, so they stay in float32 where float16 does not hold them.
    """
    head, pairs = blocks.unflatten(1, (-1, 144)).split([HEAD, 128], dim=-1)
    scale, offset = scales_of_q4_k(head)
    return Quantized(_codes(pairs.unflatten(2, (4, 32))), scale, offset)


def scales_of_q4_k(head: Tensor) -> tuple[Tensor, Tensor]:
    """Scale d * s and offset -dmin * m, exact in float32 [O, G], of heads uint8 [O, I/256, 16].

    A head is d and dmin in float16, then eight s and eight m of 6 bits: the first four of each lie
    low in their bytes; the others have their low half in the last four bytes, and their two high
    bits above those of the first four.
    """
    d, dmin, first, second, third = head.split([2, 2, 4, 4, 4], dim=-1)
    s = torch.cat([first & 63, third & 15 | first >> 6 << 4], dim=-1)  # [O, I/256, 8]
    m = torch.cat([second & 63, third >> 4 | second >> 6 << 4], dim=-1)
    scale = _float16(d).float().unsqueeze(-1) * s
    offset = -_float16(dmin).float().unsqueeze(-1) * m
    return scale.flatten(1), offset.flatten(1)


def heads_of_q4_k(blocks: Tensor) -> Tensor:
    """The heads, uint8 [O, I/256, 16], of Q4_K blocks [O, I/256 * 144]."""
    return blocks.unflatten(1, (-1, 144))[..., :HEAD]


def _float16(pairs_of_bytes):  # [..., 2] uint8 -> [...]
    return pairs_of_bytes.contiguous().view(torch.float16).squeeze(-1)


def _codes(pairs):  # n bytes hold n codes in their low halves, the next n in their high halves
    return torch.stack([pairs & 15, pairs >> 4], dim=-2).flatten(1)


# ---- writing


def to_q4_0(layer: QuantLinear) -> Tensor:
    """The inverse of `from_q4_0`, for a layer whose offsets are still -8 d."""
    return torch.cat([_as_bytes(layer.scale, layer), _pairs(layer, 16)], dim=-1).flatten(1)


def to_q4_1(layer: QuantLinear) -> Tensor:
    """The Q4_1 blocks of a layer, uint8 [O, I/32 * 20]; a larger group repeats scale and offset."""
    d, m = _as_bytes(layer.scale, layer), _as_bytes(layer.offset, layer)
    return torch.cat([d, m, _pairs(layer, 16)], dim=-1).flatten(1)


def to_q4_k(layer: QuantLinear, head: Tensor) -> Tensor:
    """The inverse of `from_q4_k`, for a layer whose scales and offsets are still the head's."""
    pairs = _pairs(layer, 32).flatten(1).unflatten(1, (-1, 128))
    return torch.cat([head, pairs], dim=-1).flatten(1)


def is_unchanged(layer: QuantLinear, kind: str, head: Tensor | None) -> bool:
    """Whether a layer can be written as the kind of blocks that it came from, without rounding."""
    if kind == "Q4_K":
        scale, offset = scales_of_q4_k(head)
        return torch.equal(layer.scale.float(), scale) and torch.equal(layer.offset, offset)
    return kind == "Q4_1" or torch.equal(layer.offset, -8 * layer.scale.float())


def _as_bytes(values_OG, layer):  # float16, [O, I/32, 2]
    repeated = values_OG.half().repeat_interleave(layer.group_size // 32, dim=1)
    return repeated.unsqueeze(-1).view(torch.uint8)


def _pairs(layer, n):  # the inverse of `_codes`: [O, I / 2n, n]
    codes = unpack(layer.packed, layer.bits, layer.in_features)
    low, high = codes.unflatten(1, (-1, 2, n)).unbind(2)
    return low | high << 4


# ---- the order of rows


def rotary_heads(name: str, config: LlamaConfig) -> int | None:
    """How many heads a layer's rows are, if they go through the rotary embedding."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    return heads.get(name.removesuffix(".weight").rpartition(".")[2])


def in_file_order(rows: Tensor, heads: int | None) -> Tensor:
    """Rows [O, ...] as llama.cpp has them; heads: of a layer before the rotary embedding.

    Ours, like Hugging Face's, pairs channel i of a head with channel i + K/2; llama.cpp's pairs
    neighbours.
    """
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2) if heads else rows


def in_our_order(rows: Tensor, heads: int | None) -> Tensor:
    """The inverse of `in_file_order`."""
    return rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2) if heads else rows
