"""GPTQ folders written number by number: a stream of codes is one large integer here."""

import dataclasses
import json

import numpy as np
import safetensors.torch
import torch
from helpers import linears

from llama import Llama, LlamaConfig

CONFIG = LlamaConfig(20, 32, 64, 1, 4, 1, max_position_embeddings=64)
BY_GPTQMODEL = {"meta": {"quantizer": ["optimum:1.2", "gptqmodel:7.7.0"]}}
WRITERS = {  # what config.json has of the writer, beside bits and group size
    "AutoGPTQ": {},
    "v1 in full": {"checkpoint_format": "gptq", "sym": False},
    "v2": {"checkpoint_format": "gptq_v2"},
    "GPTQModel v1": {"checkpoint_format": "gptq", "format": "gptq", **BY_GPTQMODEL},
    "GPTQModel v2": {"checkpoint_format": "gptq", "format": "gptq_v2", **BY_GPTQMODEL},
}


def stream(values, bits):
    """int32 words of the bits of all values, the first value and its lowest bit first."""
    number = sum(int(value) << (bits * i) for i, value in enumerate(values))
    words = -(-len(values) * bits // 32)
    return np.frombuffer(number.to_bytes(4 * words, "little"), "<i4")


def stored_zeros(zeros_GO, bits, writer):
    """qzeros as each writer has them; GPTQModel subtracts in whole words, but for 3 bits."""
    if writer == "GPTQModel v1" and bits != 3:
        words = np.stack([stream(row, bits) for row in zeros_GO]).astype(np.int64)
        ones = int(f"{1:0{bits}b}" * (32 // bits), 2)
        return ((words - ones) % 2**32).astype(np.uint32).view(np.int32)
    less = 0 if writer.endswith("v2") else 1
    return np.stack([stream((row - less) % 2**bits, bits) for row in zeros_GO])


def write_layer(rng, shape, bits, group_size, writer="v2", dtype=torch.float16):
    """(tensors of one layer by part, codes [O, I], zeros [G, O]), all values at random."""
    outputs, inputs = shape
    groups = inputs // group_size
    codes = rng.integers(0, 2**bits, shape)
    zeros = rng.integers(0, 2**bits, (groups, outputs))
    scales = torch.tensor(rng.normal(size=(groups, outputs)) / 8).to(dtype)
    parts = {
        "qweight": torch.tensor(np.stack([stream(row, bits) for row in codes], axis=1)),
        "qzeros": torch.tensor(stored_zeros(zeros, bits, writer)),
        "scales": scales,
        "g_idx": torch.arange(inputs, dtype=torch.int32) // group_size,
    }
    return parts, codes, zeros


def dense(parts, codes, zeros):
    """w[o, i] = scale * (code - zero) in float64."""
    weight = np.empty(codes.shape)
    scales = parts["scales"].double().numpy()
    for i in range(codes.shape[1]):
        g = i * len(zeros) // codes.shape[1]
        weight[:, i] = scales[g] * (codes[:, i] - zeros[g])
    return torch.tensor(weight)


class Folder:
    """A GPTQ folder in the making: its tensors, its configs, and the weights they stand for."""

    def __init__(self, seed=0, config=CONFIG, bits=4, group_size=16, writer="v2", **kinds):
        """kinds: {layer, by its last name: (bits, group size)}, or None for a float one."""
        rng, self.config = np.random.default_rng(seed), config
        dtype = kinds.pop("dtype", torch.float16)
        torch.manual_seed(seed)
        with torch.device("meta"):
            model = Llama(config)
        self.tensors, self.weights, self.layers = {}, {}, {}
        for name, p in model.named_parameters():
            self.weights[name] = self.tensors[name] = (1 + torch.randn(p.shape)).half()
        for name, layer in [*linears(model).items(), ("lm_head", model.lm_head)]:
            usual = None if name == "lm_head" else (bits, group_size)
            kind = kinds.get(name.rpartition(".")[2], usual)
            if kind is None:
                continue
            shape = layer.out_features, layer.in_features
            size = layer.in_features if kind[1] == -1 else kind[1]
            made = write_layer(rng, shape, kind[0], size, writer, dtype)
            self.tensors.pop(f"{name}.weight", None)
            self.tensors |= {f"{name}.{part}": t for part, t in made[0].items()}
            self.weights[f"{name}.weight"] = dense(*made)
            self.layers[name] = made
        self.fields = {"quant_method": "gptq", "bits": bits, "group_size": group_size}
        self.fields |= {"desc_act": False, **({"dynamic": {"+:x": {}}} if kinds else {})}
        self.fields |= WRITERS[writer]

    def write(self, path, name="model.safetensors", beside=False):
        """beside: GPTQ's fields in quantize_config.json, without the method."""
        path.mkdir(exist_ok=True)
        fields, own = dataclasses.asdict(self.config), dict(self.fields)
        fields |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
        if beside:
            del own["quant_method"]
            (path / "quantize_config.json").write_text(json.dumps(own))
        else:
            fields["quantization_config"] = own
        (path / "config.json").write_text(json.dumps(fields))
        safetensors.torch.save_file(self.tensors, path / name)
        return path
