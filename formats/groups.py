"""Layers in groups on their way from and to other formats: streams of codes, and what rounds."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from cli.errors import UserError
from formats.files import all_finite
from llama import LINEARS, linears
from quant import Quantized, QuantLinear, dequantize

BLOCK = 32  # weights with one scale and offset: GGUF's, and the smallest of MLX's


def is_linear(name: str) -> bool:
    """Whether a module, or the weight of a module, is one of a block's linear layers."""
    return name.removesuffix(".weight").rpartition(".")[2] in LINEARS


def layers_in_groups(model: nn.Module) -> dict[str, QuantLinear]:
    """A model's layers in groups, by name; UserError where there is none, or one does not fit."""
    layers = {name: m for name, m in linears(model) if isinstance(m, QuantLinear)}
    if not layers:
        raise UserError(
            "no layer is quantized in groups; only what --method qalora trains can be exported"
        )
    for name, layer in layers.items():
        if layer.group_size % BLOCK:
            raise UserError(
                f"{name}: groups of {layer.group_size} do not fill blocks of {BLOCK} weights with "
                "one scale and offset, as GGUF and MLX have them; quantize with a --group-size "
                f"that is a multiple of {BLOCK}"
            )
    return layers


# ---- codes


def to_stream(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes [O, I], below 2^bits, as uint32 [O, I * bits / 32]; 32 divides I * bits.

    A row is one stream of bits: code k takes the bits k * bits and up of its bytes, the lowest
    first.
    """
    codes = codes.unflatten(1, (-1, 8))  # eight codes are `bits` bytes
    stream = codes.new_zeros(*codes.shape[:2], bits)
    for k in range(8):
        byte, shift = divmod(k * bits, 8)
        stream[..., byte] |= codes[..., k] << shift
        if shift + bits > 8:  # a code's high bits are the next byte's low ones
            stream[..., byte + 1] |= codes[..., k] >> (8 - shift)
    return stream.flatten(1).view(torch.uint32)  # x86 and ARM are little-endian


def from_stream(words: Tensor, bits: int, count: int | None = None) -> Tensor:
    """The inverse: codes uint8 [O, count] of words [O, n] of 32 bits; count None: all of them."""
    count = 32 * words.shape[1] // bits if count is None else count
    stream = words.contiguous().view(torch.uint8)
    stream = nn.functional.pad(stream, (0, -stream.shape[1] % bits)).unflatten(1, (-1, bits))
    codes = stream.new_empty(*stream.shape[:2], 8)
    for k in range(8):
        byte, shift = divmod(k * bits, 8)
        code = stream[..., byte] >> shift
        if shift + bits > 8:
            code = code | stream[..., byte + 1] << (8 - shift)
        codes[..., k] = code & (2**bits - 1)
    return codes.flatten(1)[:, :count].contiguous()


# ---- scales and offsets


def holds(dtype: torch.dtype, values: Tensor) -> bool:
    """Whether `dtype` has just these values."""
    return torch.equal(values.to(dtype).double(), values.double())


def imported(codes: Tensor, scale: Tensor, offset: Tensor, bits: int, name: str) -> QuantLinear:
    """A layer of another's file: its scales in float16 where that holds them all, else in float32.

    name: of file and tensor, for the UserError where scales or offsets are not finite numbers.
    """
    scale = scale.to(torch.float16 if holds(torch.float16, scale) else torch.float32)
    layer = QuantLinear.from_quantized(Quantized(codes, scale, offset.float()), bits)
    if not (all_finite(layer.scale) and all_finite(layer.offset)):
        raise UserError(f"{name} has NaN or infinite values, or such as float32 cannot hold")
    return layer


def dense(read: Callable[[], Quantized], name: str) -> Tensor:
    """The matrix of what `read` returns, in the dtype of its scales, as the formats' own programs
    have it; UserError as above.
    """
    quantized = read()
    weight = dequantize(quantized, quantized.scale.dtype)
    if not all_finite(weight):
        raise UserError(f"{name} has NaN or infinite values, or such as {weight.dtype} cannot hold")
    return weight


def rounding(
    layers: dict[str, QuantLinear], dtypes: dict[str, tuple[torch.dtype, torch.dtype]]
) -> str:
    """How much writing scales and offsets in these dtypes moves weights, as a line to print.

    In quantization steps: the scale of a weight's group; of a group, that of the weight that moves
    most counts. Groups with scale 0, whose weights are all equal, have no step and do not count.
    Raises UserError, naming the layer, for what a dtype cannot hold.
    """
    largest, total, count = 0.0, 0.0, 0
    for name, layer in layers.items():
        moved = []
        for values, dtype in zip((layer.scale, layer.offset), dtypes[name], strict=True):
            if not all_finite(values.to(dtype)):
                raise UserError(
                    f"{name}: {values.abs().max().item():g} is beyond {dtype}; where training has "
                    "diverged train again with a smaller --lr, else write an MLX folder with "
                    "--scales f32"
                )
            moved.append(values.to(dtype).float() - values.float())
        ends = torch.stack([moved[1], moved[1] + (2**layer.bits - 1) * moved[0]]).abs()
        steps = (ends.amax(dim=0) / layer.scale.float().abs())[layer.scale != 0]
        if len(steps):
            largest = max(largest, steps.max().item())
        total += steps.sum(dtype=torch.float64).item()
        count += len(steps)
    kinds = sorted({str(dtype).removeprefix("torch.") for dtype in sum(dtypes.values(), ())})
    written = f"its scales and offsets are {' and '.join(kinds)}"
    if not largest:
        return f"{written}, and none is rounded"
    return (
        f"{written}, whose rounding moves weights by {total / count:.2g} of a quantization step on "
        f"average, {largest:.2g} at most"
    )
