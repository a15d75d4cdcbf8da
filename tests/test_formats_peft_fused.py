"""Adapters that the authors' code trained over AutoGPTQ's fused attention: one for q, k and v."""

import pytest
import torch
from helpers import linears
from test_formats_peft import NAMES, assert_merged, factors, normal, quantized_model, save

import merge
from cli.errors import UserError
from formats import peft

ROWS = {"q_proj": 24, "k_proj": 8, "v_proj": 8}


def fused(layer, rank=3, size=8):
    """A and B of the attention of a layer, and each part's: the same A, B's rows in turn."""
    a, _ = factors(f"model.layers.{layer}.self_attn.q_proj", rank, size, seed=layer)
    b = normal(layer + 7, 40, rank).float()
    parts = zip(ROWS, b.split(list(ROWS.values())), strict=True)
    return (a.float(), b), {f"model.layers.{layer}.self_attn.{n}": (a.float(), p) for n, p in parts}


def test_fused_attention_is_q_k_and_v_with_one_a(tmp_path):
    model, parts = quantized_model(4, (4, 8))
    tensors, wanted = {}, {}
    for layer in range(2):
        both, own = fused(layer)
        tensors[f"model.layers.{layer}.self_attn.qkv_proj"] = both
        wanted |= own
    save(tmp_path, tensors, r=3, lora_alpha=16, target_modules=["qkv_proj"])
    merged = merge.merge(peft.load_adapter(model, tmp_path))
    assert len(wanted) == 6
    for name, layer in linears(merged).items():
        if name in wanted:
            assert_merged(layer, parts[name], *wanted[name], 8, 16 / 3, authors=True)
        else:
            assert torch.equal(layer.offset, parts[name].offset)
    assert set(wanted) < set(NAMES)


@pytest.mark.parametrize("rows, where", [(41, "layers.0"), (39, "layers.0"), (40, "layers.5")])
def test_a_fused_adapter_of_another_model_is_refused(tmp_path, rows, where):
    (a, _), _ = fused(0)
    name = f"model.{where}.self_attn.qkv_proj"
    save(tmp_path, {name: (a, torch.ones(rows, 3))}, r=3, lora_alpha=16)
    with pytest.raises(UserError, match=f"the base has no layer {name}; this is the adapter of an"):
        peft.load_adapter(quantized_model()[0], tmp_path)
