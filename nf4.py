"""NF4, the 4-bit format of QLoRA (Dettmers et al., 2023): the base of the baseline, no part of QA-LoRA.

A matrix is cut, row after row, into blocks of 64 weights. Each block is divided by its largest magnitude and every
weight rounded to the nearest of 16 values, which lie at quantiles of a normal distribution. The magnitudes are
quantized in their turn (double quantization): less their mean, in blocks of 256, as 8-bit floats. That makes
4 + 8/64 + 32/(64*256) = 4.127 bits a weight. The values are not evenly spaced and a block has no offset, so there is
nothing that an adapter could be folded into: a merged QLoRA layer is a float layer.

    python train.py --method qlora
    python -m pytest tests/test_nf4.py
"""

import pathlib
from typing import NamedTuple

import torch
from torch import nn
from tqdm import tqdm

import quant
from llama import Llama, fill, linears, read_config
from quant import QuantLinear, load_tensors

BLOCK, SCALE_BLOCK = 64, 256  # weights that share a scale; scales that share one of their own
VALUES = torch.tensor([  # as published; tests/test_nf4.py derives them
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0])


class NF4(NamedTuple):
    """A quantized matrix of n weights in b = n / 64 blocks, rounded up: w = VALUES[code] * scale of its block."""
    packed: torch.Tensor        # [32 * b] uint8: codes 2j (low half) and 2j + 1 (high half) in byte j
    scale: torch.Tensor         # [b] float8_e4m3fn: (scale of the block - scale_mean) / scale_of_scale
    scale_of_scale: torch.Tensor  # [b / 256] float32, rounded up
    scale_mean: torch.Tensor    # [1] float32


def quantize_nf4(w_OI):
    """NF4 codes and scales of a matrix of any shape and floating dtype; its last block may be short."""
    assert w_OI.isfinite().all(), "the weights have NaN or infinite entries"
    blocks = nn.functional.pad(w_OI.float().flatten(), (0, -w_OI.numel() % BLOCK)).view(-1, BLOCK)
    largest = blocks.abs().amax(dim=1)  # [b]
    midpoints = ((VALUES[1:] + VALUES[:-1]) / 2).to(blocks.device)
    codes = torch.bucketize(blocks / torch.where(largest == 0, 1, largest).unsqueeze(1), midpoints, out_int32=True)
    packed = (codes[:, 0::2] | codes[:, 1::2] << 4).to(torch.uint8).flatten()
    mean = largest.mean().view(1)
    centred = nn.functional.pad(largest - mean, (0, -len(largest) % SCALE_BLOCK)).view(-1, SCALE_BLOCK)
    scale_of_scale = centred.abs().amax(dim=1) / torch.finfo(torch.float8_e4m3fn).max
    scale = (centred / torch.where(scale_of_scale == 0, 1, scale_of_scale).unsqueeze(1)).to(torch.float8_e4m3fn)
    return NF4(packed, scale.flatten()[:len(largest)], scale_of_scale, mean)


def dequantize_nf4(quantized, shape, dtype=torch.float32):
    """The matrix of that shape, computed in float32 and then cast; as many weights at a time as a CPU's cache holds."""
    packed, scale, scale_of_scale, mean = quantized
    pairs = torch.cartesian_prod(VALUES, VALUES).flip(1).to(packed.device)  # [256, 2]: the two values of each byte
    scale = scale.float() * scale_of_scale.repeat_interleave(SCALE_BLOCK)[:len(scale)] + mean
    w = torch.empty(len(scale), BLOCK, dtype=dtype, device=packed.device)
    at_a_time = quant.IN_CACHE // BLOCK if packed.device.type == "cpu" else len(scale)
    for blocks, codes, s in zip(w.split(at_a_time), packed.view(-1, BLOCK // 2).split(at_a_time), scale.split(at_a_time)):
        values = nn.functional.embedding(codes.int(), pairs)  # [blocks, 32, 2], in half the time that pairs[...] takes
        blocks.copy_(values.flatten(1).mul_(s.unsqueeze(1)))
    return w.view(-1)[:shape.numel()].view(shape)


class NF4Linear(nn.Module):
    """A linear layer without bias whose weight [O, I] is kept in NF4. Not trainable; `LoRALinear` adds what is."""

    bits, group_size = 4, BLOCK

    def __init__(self, in_features, out_features):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        blocks = -(-in_features * out_features // BLOCK)
        self.register_buffer("packed", torch.empty(blocks * BLOCK // 2, dtype=torch.uint8))
        self.register_buffer("scale", torch.empty(blocks, dtype=torch.float8_e4m3fn))
        self.register_buffer("scale_of_scale", torch.empty(-(-blocks // SCALE_BLOCK)))
        self.register_buffer("scale_mean", torch.empty(1))

    @classmethod
    def from_weight(cls, w_OI):
        """A layer that holds `w_OI` quantized."""
        with torch.device("meta"):
            layer = cls(w_OI.shape[1], w_OI.shape[0])
        for name, tensor in quantize_nf4(w_OI)._asdict().items():
            setattr(layer, name, tensor)
        return layer

    def forward(self, x):  # [..., I] -> [..., O]
        return NF4Matmul.apply(x, self)

    def dequantize(self, dtype=torch.float32):
        """The weight [O, I]."""
        quantized = NF4(self.packed, self.scale, self.scale_of_scale, self.scale_mean)
        return dequantize_nf4(quantized, torch.Size((self.out_features, self.in_features)), dtype)

    weight = property(dequantize)  # what a merge adds to
    _apply = QuantLinear._apply  # .to(dtype) is for activations here too

    def extra_repr(self):
        return f"{self.in_features}, {self.out_features}"


class NF4Matmul(torch.autograd.Function):
    """x @ Wᵀ in x's dtype; the backward pass dequantizes W again rather than keep it."""

    @staticmethod
    def forward(ctx, x, layer):
        ctx.layer = layer
        return x @ layer.dequantize(x.dtype).t()

    @staticmethod
    def backward(ctx, grad_y):
        return grad_y @ ctx.layer.dequantize(grad_y.dtype), None


def quantize_model_nf4(model, weights=None):
    """Replaces the seven linear layers of every block by NF4Linears, in place; returns the model.

    `weights` as in `quantize_model`. To be kept by `save_quantized(model, folder, quantizer="nf4")`.
    """
    embedding = model.model.embed_tokens.weight
    for i, block in enumerate(tqdm(model.model.layers, "quantizing to NF4", unit="block")):
        if weights is not None:
            fill(block, weights, f"model.layers.{i}.", embedding.dtype, embedding.device)
        for path, layer in linears(block):
            block.set_submodule(path, NF4Linear.from_weight(layer.weight.detach()))
        quant.trim_heap()
    return model


def load_nf4(folder, dtype=None, device="cpu"):
    """The Llama in a folder whose config.json says quantizer "nf4"; arguments and errors as for `load_quantized`."""
    folder = pathlib.Path(folder)
    with torch.device("meta"):
        model = Llama(read_config(folder))
        for path, layer in linears(model):
            model.set_submodule(path, NF4Linear(layer.in_features, layer.out_features))
    return load_tensors(model, folder / "model.safetensors", dtype, device)
