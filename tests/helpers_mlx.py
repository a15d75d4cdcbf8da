"""MLX's folders as mlx makes them, damaged ones, and what one says, in float64 and numpy.

The last is an oracle that shares no code with formats/. Bits are read one by one, in the order that
MLX documents: codes from the lowest bit up.
"""

import json

import numpy as np
import pytest
import torch
from fixtures_gguf import CONFIG
from safetensors.torch import load_file, save_file

from formats.huggingface import parameter_shapes
from qalora import adapter_parameters, add_adapters

mx = pytest.importorskip("mlx.core", reason='needs mlx: pip install "mlx[cpu]"')

BLOCKS = "model.layers"
TOKENS = [1, 290, 5, 77, 123, 280, 4, 260, 261, 12]


def codes_of(words, bits):
    """uint32 words [O, W] -> codes [O, W * 32 / bits], each the sum of its bits."""
    stream = np.ascontiguousarray(words).astype("<u4").view(np.uint8)
    stream = np.unpackbits(stream, axis=1, bitorder="little").astype(np.int64)
    return stream.reshape(len(words), -1, bits) @ (1 << np.arange(bits))


class FromFolder:
    """A folder's tensors and config, and the logits that follow from them."""

    def __init__(self, folder):
        self.config = json.loads((folder / "config.json").read_text())
        self.tensors = {}
        for file in sorted(folder.glob("model*.safetensors")):
            self.tensors |= load_file(file)

    def weight(self, name):
        """A weight in float64, dequantized where it is quantized."""
        stored = self.tensors[f"{name}.weight"]
        if f"{name}.scales" not in self.tensors:
            return stored.double().numpy()
        scales, biases = (
            self.tensors[f"{name}.{part}"].double().numpy() for part in ("scales", "biases")
        )
        bits = self.entry(name)["bits"]
        codes = codes_of(stored.numpy(), bits).reshape(*scales.shape, -1)
        return (scales[..., None] * codes + biases[..., None]).reshape(len(scales), -1)

    def entry(self, name):
        """What config.json says of a quantized module."""
        quantization = self.config["quantization"]
        said = quantization.get(name)
        return said if isinstance(said, dict) else quantization

    def logits(self, tokens):
        """LLaMA in float64, with the rotary embedding of Hugging Face's checkpoints: [T, V]."""
        c, T = self.config, len(tokens)
        heads, eps = c["num_attention_heads"], c["rms_norm_eps"]
        size = c.get("head_dim") or c["hidden_size"] // heads
        shared = heads // c["num_key_value_heads"]
        frequencies = c.get("rope_theta", 1e4) ** (-np.arange(0, size, 2) / size)
        turn = np.exp(1j * np.outer(np.arange(T), frequencies))[:, None]  # [T, 1, K/2]

        def norm(x, name):
            return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * self.weight(name)

        def rotated(x):
            z = (x[..., : size // 2] + 1j * x[..., size // 2 :]) * turn
            return np.concatenate([z.real, z.imag], -1)

        x = self.weight("model.embed_tokens")[tokens]
        for i in range(c["num_hidden_layers"]):
            name = f"{BLOCKS}.{i}"
            y = norm(x, f"{name}.input_layernorm")
            q, k, v = (
                (y @ self.weight(f"{name}.self_attn.{n}_proj").T).reshape(T, -1, size)
                for n in "qkv"
            )
            k, v = rotated(k).repeat(shared, axis=1), v.repeat(shared, axis=1)
            scores = np.einsum("thk,shk->hts", rotated(q), k) / size**0.5
            scores += np.triu(np.full((T, T), -np.inf), 1)
            p = np.exp(scores - scores.max(-1, keepdims=True))
            y = np.einsum("hts,shk->thk", p / p.sum(-1, keepdims=True), v).reshape(T, -1)
            x = x + y @ self.weight(f"{name}.self_attn.o_proj").T
            y = norm(x, f"{name}.post_attention_layernorm")
            gate, up = (y @ self.weight(f"{name}.mlp.{n}_proj").T for n in ("gate", "up"))
            x = x + (gate / (1 + np.exp(-gate)) * up) @ self.weight(f"{name}.mlp.down_proj").T
        tied = c.get("tie_word_embeddings", True)
        return norm(x, "model.norm") @ self.weight("model.embed_tokens" if tied else "lm_head").T


def relative(found, expected):
    """The norm of the difference by the norm of what is expected."""
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


def as_bytes(tensor):
    return tensor.dtype, tensor.shape, tensor.contiguous().view(torch.uint8).numpy().tobytes()


def our_logits(model):
    with torch.no_grad():
        return model.float()(torch.tensor([TOKENS]))[0].double().numpy()


def tune(model, targets, steps=3):
    """A random adapter, and a few steps of training; returns the adapted model's logits."""
    torch.manual_seed(0)
    add_adapters(model, 2, 4.0, targets)
    parameters = adapter_parameters(model).values()
    for p in parameters:
        p.data.normal_(0, 0.05)
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    tokens = torch.tensor([TOKENS])
    for _ in range(steps):
        loss = torch.nn.functional.cross_entropy(model(tokens[:, :-1])[0], tokens[0, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


# ---- folders


DTYPES = {"float16": mx.float16, "bfloat16": mx.bfloat16, "float32": mx.float32}
Q, V, DOWN = (
    "model.layers.0.self_attn.q_proj",
    "model.layers.1.self_attn.v_proj",
    "model.layers.1.mlp.down_proj",
)
MIXED = {  # bits and group size, or None: float; the others have 4 bits in groups of 32
    Q: (3, 64),
    V: (2, 32),
    DOWN: (8, 32),
    "model.layers.0.mlp.up_proj": (5, 32),
    "model.layers.0.mlp.gate_proj": (6, 64),
    "model.layers.1.self_attn.o_proj": None,
    "model.embed_tokens": (6, 64),
    "lm_head": (8, 32),
}


def mlx_folder(folder, kinds=(), config=CONFIG, dtype=mx.bfloat16, **fields):
    """A folder as mlx_lm.convert makes it, quantized by mlx; `fields` go into config.json."""
    rng, tensors = np.random.default_rng(0), {}
    quantization = {"group_size": 32, "bits": 4, "mode": "affine"}
    for name, shape in parameter_shapes(config).items():
        module = name.removesuffix(".weight")
        w = rng.normal(float(len(shape) == 1), 0.2, shape)
        w = mx.array(w.astype(np.float32)).astype(dtype)
        kind = dict(kinds).get(module, (4, 32)) if len(shape) == 2 else None
        if module in dict(kinds):
            quantization[module] = kind and {"bits": kind[0], "group_size": kind[1]} or False
        if kind is None:
            tensors[name] = w
            continue
        parts = mx.quantize(w, kind[1], kind[0])
        for part, array in zip(("weight", "scales", "biases"), parts, strict=True):
            tensors[f"{module}.{part}"] = array
    folder.mkdir()
    mx.save_safetensors(str(folder / "model.safetensors"), tensors, metadata={"format": "mlx"})
    said = dict(vars(config), model_type="llama", architectures=["LlamaForCausalLM"], unknown="x")
    said |= dict(quantization=quantization, quantization_config=quantization) | fields
    (folder / "config.json").write_text(json.dumps(said))
    return folder


def change_tensors(folder, name, change):
    """Replaces a tensor of a folder by `change(tensor)`; None takes it away."""
    tensors = load_file(folder / "model.safetensors")
    changed = change(tensors.pop(name, None))
    if changed is not None:
        tensors[name] = changed
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors")


def put(name, value, change=None):
    """A change of one tensor to `value`, or by `change`."""

    def to_value(tensor):
        tensor = tensor.clone()
        tensor.view(-1)[3] = value
        return tensor

    return lambda folder: change_tensors(folder, name, change or to_value)


def gone(name):
    return put(name, None, lambda tensor: None)


def says(**changed):
    """A change of fields of config.json; `quantization` is changed, not replaced."""

    def change(folder):
        fields = json.loads((folder / "config.json").read_text())
        entry = changed.get("quantization")
        if isinstance(entry, dict):
            fields["quantization"] |= entry
        fields |= {name: value for name, value in changed.items() if name != "quantization"}
        (folder / "config.json").write_text(json.dumps(fields))

    return change


def truncated(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


W = "model.safetensors: tensor "
BAD = {  # name: (a change of a folder that has the layers of MIXED, what is said of it)
    "truncated": (truncated, "model.safetensors: .* truncated"),
    "scales missing": (gone(f"{Q}.scales"), f"{W}{Q}.weight .* there is no {Q}.scales"),
    "biases missing": (gone(f"{Q}.biases"), f"{W}{Q}.biases is missing"),
    "weight missing": (gone(f"{Q}.weight"), f"{Q}.weight is missing"),
    "NaN scale": (put(f"{Q}.scales", np.nan), f"{W}{Q}.scales has NaN"),
    "overflow": (put("model.embed_tokens.scales", 3e38), "model.embed_tokens.weight has NaN"),
    "infinite bias": (put(f"{V}.biases", np.inf), f"{W}{V}.biases has NaN or inf"),
    "NaN embedding": (put("model.embed_tokens.scales", np.nan), "embed_tokens.scales has NaN"),
    "NaN norm": (put("model.norm.weight", np.nan), f"{W}model.norm.weight has NaN"),
    "no whole codes": (put(f"{Q}.weight", 0, lambda t: t[:, :-1]), f"{Q}.weight.*cannot hold"),
    "rows": (put(f"{Q}.weight", 0, lambda t: t[:-1]), f"{Q}.weight.*cannot hold 64 rows"),
    "groups of 16": (
        put(f"{V}.scales", 0, lambda t: t.repeat(1, 2)),
        f"{V}.scales.*cannot hold",
    ),
    "signed codes": (
        put(f"{Q}.weight", 0, lambda t: t.view(torch.int32)),
        f"{W}{Q}.weight holds torch.int32, not uint32",
    ),
    "8-bit scales": (
        put(f"{Q}.scales", 0, lambda t: t.to(torch.uint8)),
        f"{W}{Q}.scales holds torch.uint8",
    ),
    "64-bit scales": (put(f"{Q}.scales", 0, lambda t: t.double()), "holds torch.float64"),
    "whole norm": (put("model.norm.weight", 0, lambda t: t.int()), "holds torch.int32, not float"),
    "adapter": (
        put(f"{Q}.lora_a", 0, lambda t: torch.ones(64, 8)),
        f"{W}{Q}.lora_a is unexpected",
    ),
    "bias": (put(f"{Q}.bias", 0, lambda t: torch.ones(64)), f"{W}{Q}.bias is unexpected"),
    "norm scales": (
        put("model.norm.scales", 0, lambda t: torch.ones(1)),
        f"{W}model.norm.scales is unexpected",
    ),
    "usual bits": (
        says(quantization={"bits": 3}),
        "config.json: model.* has 3 bits in groups of 32 by .*have 4 bits in groups of 32",
    ),
    "bits of one": (
        says(quantization={Q: {"bits": 4, "group_size": 64}}),
        f"config.json: {Q} has 4 bits in groups of 64 by .*, but .* 3 bits in groups of 64",
    ),
    "said to be float": (says(quantization={Q: False}), f"{Q} has floats by .* have 3 bits"),
    "said to be usual": (says(quantization={Q: True}), f"{Q} has 4 bits in groups of 32 by"),
    "said of a float one": (
        says(quantization={"model.layers.1.self_attn.o_proj": {"bits": 4, "group_size": 32}}),
        "o_proj has 4 bits in groups of 32 by .* have floats",
    ),
    "entry of text": (says(quantization={Q: "4"}), f'config.json: quantization.{Q} = "4" has no'),
    "entry of half": (says(quantization={Q: {"bits": 3}}), f"quantization.{Q} = .* has no"),
    "bits as text": (says(quantization={"bits": "4"}), "config.json: quantization = .* has no"),
    "7 bits": (says(quantization={"bits": 7}), "config.json: quantization = .* has no"),
    "groups as a float": (says(quantization={"group_size": 32.0}), "quantization = .* has no"),
    "groups of 256": (says(quantization={"group_size": 256}), "quantization = .* has no"),
    "mxfp4": (says(quantization={"mode": "mxfp4"}), 'config.json: .*mode "mxfp4" is not supp'),
    "nvfp4 in one": (
        says(quantization={Q: {"bits": 4, "group_size": 16, "mode": "nvfp4"}}),
        f'quantization.{Q}: mode "nvfp4"',
    ),
    "rotation": (says(rope_traditional=True), "config.json: rope_traditional = true"),
    "own code": (says(model_file="x.py"), "config.json: model_file"),
    "biases in config": (says(attention_bias=True), "config.json: attention_bias = true"),
}
