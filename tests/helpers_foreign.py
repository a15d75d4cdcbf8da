"""Models as others make them, for the commands of docs/deploy.md; needs the gguf package."""

import json
import pathlib

import torch
from helpers_gguf import Type, quantize_file
from helpers_gptq import Folder
from helpers_runs import CONFIG
from safetensors.torch import save_file

LINEARS = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")


def write(tokenizer):
    """model.Q4_0.gguf, GPTQ_DIR and an adapter over it, PEFT_DIR, as others make them."""
    types = dict.fromkeys(LINEARS, Type.Q4_0)
    quantize_file("model.Q4_0.gguf", CONFIG, tokenizer, Type.F16, mixed=types)
    Folder(config=CONFIG, group_size=32).write(pathlib.Path("GPTQ_DIR"))
    tokenizer.save("GPTQ_DIR")
    pathlib.Path("PEFT_DIR").mkdir()
    fields = {"peft_type": "LORA", "use_qalora": True, "qalora_group_size": 32}
    fields |= {"r": 2, "lora_alpha": 16, "target_modules": ["v_proj"]}
    pathlib.Path("PEFT_DIR/adapter_config.json").write_text(json.dumps(fields))
    tensors = {}
    for i in range(CONFIG.num_hidden_layers):
        layer = f"base_model.model.model.layers.{i}.self_attn.v_proj"
        tensors[f"{layer}.lora_A.weight"] = torch.ones(2, 2)
        tensors[f"{layer}.lora_B.weight"] = torch.full((32, 2), 1e-3)
    save_file(tensors, "PEFT_DIR/adapter_model.safetensors")
