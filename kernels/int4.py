"""Decoding on a CPU: layers repacked for PyTorch's own int4 kernel, 4x faster than a dense layer.

Only for using a model, a token at a time; training, merging and every claim about equal bits stay
with quant.py. Used by `sample.py` and measured by `bench.py`.
"""

import functools
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from tqdm import tqdm

import kernels.matmul
from quant import QuantLinear, unpack

FEW_TOKENS = 128  # the kernel's time grows with each token; above, unpacking once is faster


def prepare_inference(model: nn.Module) -> nn.Module:
    """Repacks a model's QuantLinears for PyTorch's int4 kernel, in place; returns the model.

    The model is then for use only, not for saving; adapters must have been merged before. The
    kernel is for CPUs and groups of 32, 64, 128 or 256; a layer that it does not take stays as it
    is. Codes of 2 and 3 bits take 4 there.
    """
    names = []
    for name, layer in model.named_modules():
        if isinstance(layer, QuantLinear) and Int4Linear.takes(layer):
            names.append(name)
    for name in tqdm(names, "repacking for decoding", unit="layer", delay=2):
        model.set_submodule(name, Int4Linear(model.get_submodule(name)))
    return model


class Int4Linear(nn.Module):
    """A QuantLinear, its codes repacked for PyTorch's int4 kernel.

    The kernel reads 16-bit floats, so a result is about as exact as bfloat16 (relative error
    0.0035), never the same bits as a QuantLinear's. It subtracts 8 from a code and adds a zero; so
    codes of 2 and 3 bits are raised until 8 is their middle, and the zero is the group's middle
    weight: small, and rounded by some thousandths of a quantization step.
    Buffers: int4 [O / w, I, w/2] uint8, whose byte j holds the codes of rows j and j + w/2 of w
    neighbouring ones; scale_zero [G, O, 2] bfloat16.
    """

    def __init__(self, layer: QuantLinear):
        super().__init__()
        self.group_size, half = layer.group_size, int4_interleaving() // 2
        middle = 2 ** (layer.bits - 1)
        codes = unpack(layer.packed, layer.bits, layer.in_features) + (8 - middle)
        repacked = torch._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
        self.register_buffer("int4", repacked.view(-1, layer.in_features, half))
        scale = layer.scale.float()
        scale_zero_OG2 = torch.stack((scale, layer.offset + middle * scale), dim=-1)
        scale_zero = scale_zero_OG2.transpose(0, 1).bfloat16().contiguous()
        self.register_buffer("scale_zero", scale_zero)

    @staticmethod
    def takes(layer: QuantLinear) -> bool:
        """Whether the kernel can multiply by this layer."""
        rows = int4_interleaving()
        fits = layer.group_size in (32, 64, 128, 256) and layer.packed.device.type == "cpu"
        return bool(fits and rows and layer.out_features % rows == 0)

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] -> [..., O]."""
        x_NI, out_features = x.reshape(-1, x.shape[-1]), self.scale_zero.shape[1]
        if len(x_NI) <= FEW_TOKENS:
            int4_OI = self.int4.view(out_features, -1)
            y_NO = torch._weight_int4pack_mm_for_cpu(
                x_NI.bfloat16(), int4_OI, self.group_size, self.scale_zero
            )
        else:
            y_NO = x_NI.new_empty(len(x_NI), out_features)
            for rows, w_IR in self.dense_columns(x.dtype):
                torch.mm(x_NI, w_IR, out=y_NO[:, rows])
        return y_NO.to(x.dtype).view(*x.shape[:-1], out_features)

    def dense_columns(self, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """Yields (rows, w [I, rows]): the weight transposed, as the kernel's order is."""
        (blocks, inputs, half), groups = self.int4.shape, self.scale_zero.shape[0]
        scale, zero = self.scale_zero.float().unbind(-1)  # [G, O]
        offset = zero - 8 * scale
        scale = scale.view(groups, blocks, 1, 2 * half).transpose(0, 1)
        offset = offset.view(groups, blocks, 1, 2 * half).transpose(0, 1)
        at_a_time = max(1, kernels.matmul.IN_CACHE // (2 * half * inputs))
        for first in range(0, blocks, at_a_time):
            part = slice(first, first + at_a_time)
            int4 = self.int4[part]
            w = torch.empty(*int4.shape[:2], 2, half)  # [n, I, 2, w/2]
            w[:, :, 0], w[:, :, 1] = int4 & 15, int4 >> 4
            w = w.view(len(int4), groups, -1, 2 * half).mul_(scale[part]).add_(offset[part])
            w = w.view(len(int4), inputs, -1).to(dtype)
            start = 2 * half * first
            yield slice(start, start + 2 * half * len(int4)), w.transpose(0, 1).flatten(1)


@functools.cache
def int4_interleaving() -> int | None:
    """How many rows PyTorch's int4 format interleaves here: 64 with AVX-512, 32 with AVX2.

    None where it is another format. PyTorch does not document it, so it is found by trying.
    """
    draw = torch.Generator().manual_seed(0)
    codes = torch.randint(16, (64, 32), dtype=torch.uint8, generator=draw)
    repacked = torch._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
    for rows in (64, 32):
        blocks = repacked.view(-1, 32, rows // 2)  # [64 / rows, inputs, rows / 2]
        found = torch.cat((blocks & 15, blocks >> 4), dim=-1).transpose(1, 2)
        if torch.equal(found.reshape(64, 32), codes):
            return rows
    return None
