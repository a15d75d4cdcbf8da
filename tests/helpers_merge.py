"""Small quantized models, trained for some steps."""

import torch
from torch.nn import functional as F

from llama import Llama, LlamaConfig
from qalora import adapter_parameters
from quant import quantize_model

SMALL = LlamaConfig(
    vocab_size=40,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)


def tokens(seed, *shape):
    return torch.randint(40, shape, generator=torch.Generator().manual_seed(seed))


def quantized_llama(bits=3, group_size=8, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return quantize_model(Llama(SMALL), bits, group_size).to(dtype)


def trained(model, steps=3):
    """`model` after some steps of AdamW on random tokens."""
    optimizer = torch.optim.AdamW(adapter_parameters(model).values(), lr=0.02)
    for step in range(steps):
        batch = tokens(step, 4, 12)
        logits = model(batch[:, :-1]).float().flatten(0, 1)
        F.cross_entropy(logits, batch[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model
