"""Random and exact layers, and GPTQ's inputs and error."""

import numpy as np
import torch
from hypothesis import strategies as st

from llama import LINEARS, Llama, LlamaConfig
from quant import (
    Quantized,
)

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


BITS = st.sampled_from([2, 3, 4])


SEEDS = st.integers(0, 2**32 - 1)


ROWS, GROUPS, GROUP_SIZES = (
    st.integers(1, 5),
    st.integers(1, 4),
    st.integers(1, 40),
)  # rows of 1 to 160 weights


SMALL = LlamaConfig(
    vocab_size=40,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=3,
    num_attention_heads=2,
    num_key_value_heads=1,
    max_position_embeddings=64,
)


EVERY_SCALE = (
    np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float64)
)  # float16, 0 to 65504, ascending


def integers(seed, low, high, *shape, dtype=torch.float32):
    """Integers from low to high, both included."""
    return torch.randint(low, high + 1, shape, generator=torch.Generator().manual_seed(seed)).to(
        dtype
    )


def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_quantized(seed, rows, groups, group_size, bits):
    """Any codes, scales 0 to 4 in quarters, offsets -4 to 4 in quarters: exact in every dtype."""
    return Quantized(
        integers(seed, 0, 2**bits - 1, rows, groups * group_size, dtype=torch.uint8),
        integers(seed + 1, 0, 16, rows, groups, dtype=torch.float16) / 4,
        integers(seed + 2, -16, 16, rows, groups) / 4,
    )


def dense(quantized):
    """scale * code + offset, weight by weight, in float64."""
    group_size = quantized.codes.shape[1] // quantized.scale.shape[1]

    def spread_out(per_group):
        return per_group.double().repeat_interleave(group_size, dim=1)  # [O, G] -> [O, I]

    return spread_out(quantized.scale) * quantized.codes.double() + spread_out(quantized.offset)


def pool(x, groups):
    """The sum of x [..., I] over each group of inputs: [..., G]."""
    return torch.stack([part.sum(-1) for part in x.chunk(groups, dim=-1)], dim=-1)


def same(a, b):
    return all(torch.equal(x, y) and x.dtype == y.dtype for x, y in zip(a, b, strict=True))


def correlated_hessian(seed, width, spread=0.8):
    """What inputs z M D give, z white, M a random mixing and D a random scaling of each input;
    float64 [I, I]."""
    mixing = torch.eye(width, dtype=torch.float64) + 0.7 * normal(seed, width, width) / width**0.5
    mixing += 2 * torch.outer(normal(seed + 1, width), normal(seed + 2, width)) / width
    inputs = mixing * torch.exp(spread * normal(seed + 3, width))
    return inputs.t() @ inputs


def output_error(w, quantized, hessian):
    """The relative error of the layer's outputs, sqrt(E |(W - Ŵ) x|² / E |W x|²)."""

    def square(m):
        return ((m @ hessian) * m).sum()

    return (square(w - dense(quantized)) / square(w)).sqrt().item()


def exact_case(seed, rows, groups, group_size, bits, lead):
    """(x, quantized): the sums of their products fit every dtype's fraction: x has up to 16 entries
    of -1 or 1."""
    quantized = random_quantized(seed, rows, groups, group_size, bits)
    quantized = quantized._replace(
        scale=quantized.scale.clamp(max=1).ceil(), offset=quantized.offset.round()
    )
    width = groups * group_size
    x = integers(seed + 3, -1, 1, *lead, width, dtype=torch.float64)
    order = normal(seed + 4, *lead, width).argsort(-1)
    return x * (order < 16), quantized


LEADS = st.lists(st.integers(0, 3), max_size=2).map(tuple)


def random_llama(seed=0, scale=1, **changes):
    """A small Llama; with a larger `scale`, blocks whose outputs depend visibly on how they are
    quantized."""
    torch.manual_seed(seed)
    model = Llama(LlamaConfig(**{**vars(SMALL), **changes}))
    for name, p in model.named_parameters():
        p.data.mul_(scale if "_proj" in name else 1)
    return model.requires_grad_(False)


def linears(model):
    return {name: m for name, m in model.named_modules() if name.rpartition(".")[2] in LINEARS}


TOKENS = integers(0, 0, 39, 6, 16, dtype=torch.long)
