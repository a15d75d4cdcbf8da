"""A matrix in GGUF's Q4_1 blocks."""

import torch
from torch import Tensor, nn

from cli.errors import UserError
from llama import LlamaConfig, linears
from quant import Quantized, QuantLinear, unpack


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
