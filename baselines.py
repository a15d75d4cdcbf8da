"""What QA-LoRA is compared with: LoRA beside a float model, and QLoRA, which is LoRA beside NF4.

NF4 (Dettmers et al., "QLoRA", 2023) cuts a matrix, row after row, into blocks of 64 weights. Each
block is divided by its largest magnitude, and every weight is rounded to the nearest of 16 values,
which lie at quantiles of a normal distribution. The magnitudes are quantized in their turn (double
quantization): less their mean, in blocks of 256, as 8-bit floats. That makes 4 + 8/64 + 32/(64*256)
= 4.127 bits a weight. The values are not evenly spaced and a block has no offset, so there is
nothing that an adapter could be folded into: a merged QLoRA layer is a float layer.

    python train.py --method lora
    python train.py --method qlora
    python -m pytest tests/test_baselines.py
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

import kernels.matmul
from llama import Llama, linears
from quant import QuantLinear

# ---- LoRA


class LoRALinear(nn.Module):
    """LoRA (Hu et al., 2021): y = base(x) + s * x @ A^T @ B^T with lora_A [R, I], lora_B [O, R].

    base: an nn.Linear without bias; or an NF4Linear, which makes it QLoRA.
    """

    def __init__(self, base: nn.Module, rank: int, alpha: float):
        super().__init__()
        self.base, self.rank, self.alpha, self.scaling = base, rank, alpha, alpha / rank
        device = next(iter(base.state_dict().values())).device  # an NF4Linear has no parameter
        self.lora_A, self.lora_B = factors(base.out_features, base.in_features, rank, device)

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] -> [..., O]."""
        low_rank = x.to(self.lora_A.dtype) @ self.lora_A.t() @ self.lora_B.t()
        return self.base(x) + (self.scaling * low_rank).to(x.dtype)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """An nn.Linear with the weight W + s * B @ A, in float32 where W was NF4."""
        weight = self.base.weight
        merged = weight + self.scaling * self.lora_B @ self.lora_A
        return frozen_linear(merged.to(weight.dtype))


def frozen_linear(w_OI: Tensor) -> nn.Linear:
    """A layer without bias that holds the weight, which does not learn."""
    with torch.device("meta"):
        layer = nn.Linear(w_OI.shape[1], w_OI.shape[0], bias=False)
    layer.weight = nn.Parameter(w_OI, requires_grad=False)
    return layer


def factors(
    rows: int, columns: int, rank: int, device: torch.device
) -> tuple[nn.Parameter, nn.Parameter]:
    """A [R, columns], random, and B [rows, R], zero: so B A = 0 at first. Both are float32."""
    a = torch.empty(rank, columns, dtype=torch.float32)
    nn.init.kaiming_uniform_(a, a=math.sqrt(5))  # on the CPU: a seed means the same everywhere
    b = torch.zeros(rows, rank, dtype=torch.float32)
    return nn.Parameter(a.to(device)), nn.Parameter(b.to(device))


# ---- NF4

BLOCK = 64  # weights that share a scale
SCALE_BLOCK = 256  # scales that share a scale of their own
VALUES = torch.tensor(  # as published; tests/test_baselines.py derives them
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ]
)


class NF4(NamedTuple):
    """A matrix of n weights in b = n / 64 blocks, rounded up; w = VALUES[code] * scale."""

    packed: Tensor  # [32 * b] uint8: codes 2j (low half) and 2j + 1 (high half) in byte j
    scale: Tensor  # [b] float8_e4m3fn: (scale of the block - scale_mean) / scale_of_scale
    scale_of_scale: Tensor  # [b / 256] float32, rounded up
    scale_mean: Tensor  # [1] float32


def quantize_nf4(w_OI: Tensor) -> NF4:
    """NF4 codes and scales of a matrix of any shape and dtype; its last block may be short."""
    assert w_OI.isfinite().all(), "the weights have NaN or infinite entries"
    blocks = in_blocks(w_OI.float().flatten(), BLOCK)
    largest = blocks.abs().amax(dim=1)  # [b]
    midpoints = ((VALUES[1:] + VALUES[:-1]) / 2).to(blocks.device)
    normed = blocks / torch.where(largest == 0, 1, largest).unsqueeze(1)
    codes = torch.bucketize(normed, midpoints, out_int32=True)
    packed = (codes[:, 0::2] | codes[:, 1::2] << 4).to(torch.uint8).flatten()
    mean = largest.mean().view(1)
    centred = in_blocks(largest - mean, SCALE_BLOCK)
    scale_of_scale = centred.abs().amax(dim=1) / torch.finfo(torch.float8_e4m3fn).max
    divisor = torch.where(scale_of_scale == 0, 1, scale_of_scale).unsqueeze(1)
    scale = (centred / divisor).to(torch.float8_e4m3fn).flatten()[: len(largest)]
    return NF4(packed, scale, scale_of_scale, mean)


def in_blocks(values: Tensor, size: int) -> Tensor:
    """[n] -> [n / size, size], rounded up; filled with zeros."""
    return nn.functional.pad(values, (0, -len(values) % size)).view(-1, size)


def dequantize_nf4(quantized: NF4, shape: torch.Size, dtype: torch.dtype = torch.float32) -> Tensor:
    """The matrix of that shape, computed in float32, then rounded; a cacheful at a time."""
    packed, scale, scale_of_scale, mean = quantized
    pairs = torch.cartesian_prod(VALUES, VALUES).flip(1).to(packed.device)  # [256, 2]
    scale = scale.float() * scale_of_scale.repeat_interleave(SCALE_BLOCK)[: len(scale)] + mean
    w = torch.empty(len(scale), BLOCK, dtype=dtype, device=packed.device)
    on_cpu = packed.device.type == "cpu"
    at_a_time = kernels.matmul.IN_CACHE // BLOCK if on_cpu else len(scale)
    codes = packed.view(-1, BLOCK // 2)
    for start in range(0, len(scale), at_a_time):
        rows = slice(start, start + at_a_time)
        # [., 32, 2]; embedding is 1.7x faster than indexing (one CPU thread)
        values = nn.functional.embedding(codes[rows].int(), pairs)
        w[rows] = values.flatten(1).mul_(scale[rows].unsqueeze(1))
    return w.view(-1)[: shape.numel()].view(shape)


class NF4Linear(nn.Module):
    """A linear layer without bias whose weight [O, I] is kept in NF4; not trainable."""

    bits, group_size = 4, BLOCK

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        blocks = -(-in_features * out_features // BLOCK)
        self.register_buffer("packed", torch.empty(blocks * BLOCK // 2, dtype=torch.uint8))
        self.register_buffer("scale", torch.empty(blocks, dtype=torch.float8_e4m3fn))
        self.register_buffer("scale_of_scale", torch.empty(-(-blocks // SCALE_BLOCK)))
        self.register_buffer("scale_mean", torch.empty(1))

    @classmethod
    def from_weight(cls, w_OI: Tensor) -> "NF4Linear":
        """A layer that holds `w_OI` quantized."""
        with torch.device("meta"):
            layer = cls(w_OI.shape[1], w_OI.shape[0])
        for name, tensor in quantize_nf4(w_OI)._asdict().items():
            setattr(layer, name, tensor)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] -> [..., O]."""
        return NF4Matmul.apply(x, self)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [O, I]."""
        quantized = NF4(self.packed, self.scale, self.scale_of_scale, self.scale_mean)
        return dequantize_nf4(quantized, torch.Size((self.out_features, self.in_features)), dtype)

    weight = property(dequantize)  # what a merge adds to
    _apply = QuantLinear._apply  # .to(dtype) is for activations here too

    def extra_repr(self) -> str:
        """What `print(layer)` shows."""
        return f"{self.in_features}, {self.out_features}"


class NF4Matmul(torch.autograd.Function):
    """x @ W^T in x's dtype. The backward pass dequantizes W again instead of keeping it."""

    @staticmethod
    def forward(ctx, x, layer):
        """[..., I] -> [..., O]."""
        ctx.layer = layer
        return x @ layer.dequantize(x.dtype).t()

    @staticmethod
    def backward(ctx, grad_y):
        """[..., O] -> the gradient of x [..., I]."""
        return grad_y @ ctx.layer.dequantize(grad_y.dtype), None


def quantize_model_nf4(model: Llama, load_block: Callable | None = None) -> Llama:
    """Replaces the seven linear layers of every block by NF4Linears, in place; returns the model.

    load_block: as in `quantize_model`. Kept by `save_quantized(model, folder, quantizer="nf4")`.
    """
    for i, block in enumerate(tqdm(model.model.layers, "quantizing to NF4", unit="block")):
        if load_block:
            load_block(block, i)
        for path, layer in linears(block):
            block.set_submodule(path, NF4Linear.from_weight(layer.weight.detach()))
    return model
