"""Adapted layers and models with numbers that are exact."""

import torch
from hypothesis import strategies as st

from llama import Llama, LlamaConfig
from qalora import QALoRALinear, adapter_parameters
from quant import Quantized, QuantLinear, quantize_model

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


BITS, SEEDS, RANKS = st.sampled_from([2, 3, 4]), st.integers(0, 2**32 - 1), st.integers(1, 5)


ROWS, GROUPS, GROUP_SIZES = st.integers(1, 5), st.integers(1, 4), st.integers(1, 20)


SMALL = LlamaConfig(
    vocab_size=40,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    max_position_embeddings=64,
)


def integers(seed, low, high, *shape, dtype=torch.float32):
    """Integers from low to high, both included."""
    return torch.randint(low, high + 1, shape, generator=torch.Generator().manual_seed(seed)).to(
        dtype
    )


def quant_layer(seed, rows, groups, group_size, bits):
    """A QuantLinear with scales 0 to 2, offsets -4 to 4, and its dense weight in float64."""
    codes = integers(seed, 0, 2**bits - 1, rows, groups * group_size, dtype=torch.uint8)
    scale, offset = (
        integers(seed + 1, 0, 2, rows, groups).half(),
        integers(seed + 2, -4, 4, rows, groups),
    )

    def spread_out(per_group):
        return per_group.double().repeat_interleave(group_size, dim=1)

    layer = QuantLinear.from_quantized(Quantized(codes, scale, offset), bits)
    return layer, spread_out(scale) * codes.double() + spread_out(offset)


def adapted_layer(seed, rows, groups, group_size, bits, rank, alpha):
    """A QALoRALinear with integers in its adapter, and its base's dense weight."""
    base, w = quant_layer(seed, rows, groups, group_size, bits)
    layer = QALoRALinear(base, rank, alpha)
    layer.lora_A.data = integers(seed + 3, -2, 2, rank, groups)
    layer.lora_B.data = integers(seed + 4, -2, 2, rows, rank)
    return layer, w


def quantized_llama(seed=0, bits=3, group_size=8):
    torch.manual_seed(seed)
    return quantize_model(Llama(SMALL), bits, group_size)


def same(a, b):
    return all(torch.equal(x, y) and x.dtype == y.dtype for x, y in zip(a, b, strict=True))


def randomized(model):
    """The adapters' parameters drawn anew, B too."""
    torch.manual_seed(1)
    for p in adapter_parameters(model).values():
        p.data = torch.randn_like(p)
    return model
