"""Decoding on a CPU: 4-bit layers repacked for PyTorch's own int4 kernel, which takes a tenth of a dense layer's time.

Only for using a model, a token at a time; training, merging and every claim about equal bits stay with quant.py. Used by
`sample.py` and measured by `bench.py`.
"""

import functools

import torch
from torch import nn

import quant
from quant import FEW_TOKENS, QuantLinear, add_product, centred, pool, unpack


def prepare_inference(model):
    """Repacks a model's 4-bit layers for PyTorch's int4 kernel, in place; returns the model, to be used only, not saved.

    The kernel is for CPUs and groups of 32, 64, 128 or 256; a layer it does not take stays as it is.
    """
    for name, layer in list(model.named_modules()):
        if isinstance(layer, QuantLinear) and Int4Linear.takes(layer):
            model.set_submodule(name, Int4Linear(layer))
    return model


class Int4Linear(nn.Module):
    """A 4-bit QuantLinear, its codes repacked for PyTorch's int4 kernel, which takes a tenth of a dense layer's time.

    The kernel reads 16-bit floats, so a result is about as exact as bfloat16 (relative error 0.003), never the same bits
    as a QuantLinear's. The offsets stay float32: the kernel is given none, and their pooled term is added here.
    Buffers: int4 [O / w, I, w/2] uint8, whose byte j holds the codes of rows j and j + w/2 of w neighbouring ones;
    scale_zero [G, O, 2] bfloat16; centred [G, O] float32, offset + 8 * scale.
    """

    def __init__(self, layer):
        super().__init__()
        self.group_size, half = layer.group_size, int4_interleaving() // 2
        codes = unpack(layer.packed, 4, layer.in_features)
        repacked = torch._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
        self.register_buffer("int4", repacked.view(-1, layer.in_features, half))
        scale_GO = layer.scale.t().bfloat16()
        self.register_buffer("scale_zero", torch.stack((scale_GO, torch.zeros_like(scale_GO)), dim=-1))
        self.register_buffer("centred", centred(layer.offset, layer.scale, 4, torch.float32).t().contiguous())

    @staticmethod
    def takes(layer):
        fits = layer.bits == 4 and layer.group_size in (32, 64, 128, 256) and layer.packed.device.type == "cpu"
        return fits and int4_interleaving() and layer.out_features % int4_interleaving() == 0

    def forward(self, x):  # [..., I] -> [..., O]
        x_NI = x.reshape(-1, x.shape[-1])
        y_NO = pool(x_NI, len(self.centred), torch.float32) @ self.centred
        if len(x_NI) <= FEW_TOKENS:
            int4_OI = self.int4.view(self.centred.shape[1], -1)
            y_NO += torch._weight_int4pack_mm_for_cpu(x_NI.bfloat16(), int4_OI, self.group_size, self.scale_zero)
        else:
            for rows, w_IR in self.dense_columns(x.dtype):
                add_product(y_NO[:, rows], x_NI, w_IR)
        return y_NO.to(x.dtype).view(*x.shape[:-1], -1)

    def dense_columns(self, dtype):
        """Yields (rows, w [I, rows]) like `dense_rows`, but transposed, as the kernel's order is."""
        _, inputs, half = self.int4.shape
        start = 0
        for int4 in self.int4.split(max(1, quant.DENSE_AT_A_TIME // (2 * half * inputs))):  # [n, I, w/2]
            codes = torch.stack((int4 & 15, int4 >> 4)).sub_(8).view(torch.int8)  # [2, n, I, w/2]
            w = codes.permute(2, 1, 0, 3).to(torch.float32, memory_format=torch.contiguous_format)  # [I, n, 2, w/2]
            rows = slice(start, start := start + w[0].numel())
            scale_GO = self.scale_zero[:, rows, 0].float()
            w_IR = w.view(len(scale_GO), -1, w[0].numel()).mul_(scale_GO.unsqueeze(1)).view(inputs, -1)  # over [G, g, R]
            yield rows, w_IR.to(dtype)


@functools.cache
def int4_interleaving():
    """How many rows PyTorch's int4 format interleaves here: 64 with AVX-512, 32 with AVX2. None where it is another.

    PyTorch does not document it, so it is found by trying.
    """
    codes = torch.randint(16, (64, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    repacked = torch._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
    for rows in (64, 32):
        blocks = repacked.view(-1, 32, rows // 2)  # [64 / rows, inputs, rows / 2]
        if torch.equal(torch.cat((blocks & 15, blocks >> 4), dim=-1).transpose(1, 2).reshape(64, 32), codes):
            return rows
    return None
