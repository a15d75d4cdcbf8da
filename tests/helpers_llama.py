"""A LLaMA's formulas in float64, random models, and checkpoints as others write them."""

import dataclasses
import json

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import strategies as st

from llama import Llama, LlamaConfig

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Matmuls this small gain nothing from a second thread, and wait long for it on a busy
    machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


QKV = ("q_proj", "k_proj", "v_proj")


def reference_logits(weights, config, tokens, interleaved=False):
    """LLaMA straight from its formulas in float64: [T, V]. Rotary numbers are complex, attention is
    a loop.

    `weights` in Hugging Face's names; `interleaved` pairs neighbouring channels, as Meta's own
    weights have it.
    """
    w = {name: tensor.double().numpy() for name, tensor in weights.items()}
    H, KV = config.num_attention_heads, config.num_key_value_heads
    K = config.hidden_size // H
    frequency = config.rope_theta ** (-2 * np.arange(K // 2) / K)

    def norm(x, weight):
        return x / np.sqrt(np.mean(x * x) + config.rms_norm_eps) * weight

    def turn(x, position):
        first, second = (x[0::2], x[1::2]) if interleaved else (x[: K // 2], x[K // 2 :])
        z = (first + 1j * second) * np.exp(1j * position * frequency)
        return np.concatenate([z.real, z.imag])  # q and k in the same order, whichever it is

    stream = [w["model.embed_tokens.weight"][t] for t in tokens]
    for i in range(config.num_hidden_layers):
        layer = {}
        for name, tensor in w.items():
            if name.startswith(f"model.layers.{i}."):
                layer[name.split(".")[-2]] = tensor
        normed = [norm(x, layer["input_layernorm"]) for x in stream]
        q, k, v = ([(layer[n] @ x).reshape(-1, K) for x in normed] for n in QKV)
        q, k = ([[turn(head, t) for head in hs] for t, hs in enumerate(y)] for y in (q, k))
        for t in range(len(tokens)):
            attended = []
            for h in range(H):
                g = h // (H // KV)  # the key-value head that query head h shares
                score = np.array([q[t][h] @ k[s][g] / np.sqrt(K) for s in range(t + 1)])
                p = np.exp(score - score.max())
                attended.append(sum(p[s] / p.sum() * v[s][g] for s in range(t + 1)))
            x = stream[t] + layer["o_proj"] @ np.concatenate(attended)
            y = norm(x, layer["post_attention_layernorm"])
            gate = layer["gate_proj"] @ y
            stream[t] = x + layer["down_proj"] @ (
                gate / (1 + np.exp(-gate)) * (layer["up_proj"] @ y)
            )
    head = w["model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"]
    return np.stack([head @ norm(x, w["model.norm.weight"]) for x in stream])


def close(actual, expected, tolerance=1e-5):
    """Whether two arrays differ by at most `tolerance` of the larger one's greatest magnitude."""
    actual, expected = torch.as_tensor(actual).double(), torch.as_tensor(expected).double()
    return (
        actual.shape == expected.shape
        and (actual - expected).abs().max() <= tolerance * expected.abs().max()
    )


@st.composite
def configs(draw, kv_heads=None, tied=None):
    kv = draw(st.sampled_from([1, 2, 3]) if kv_heads is None else st.just(kv_heads))
    heads = kv * draw(st.sampled_from([1, 2, 3]))
    return LlamaConfig(
        vocab_size=draw(st.integers(3, 10)) * 4,
        hidden_size=heads * draw(st.sampled_from([2, 4, 8])),
        intermediate_size=draw(st.integers(1, 6)) * 4,
        num_hidden_layers=draw(st.integers(1, 3)),
        num_attention_heads=heads,
        num_key_value_heads=kv,
        max_position_embeddings=64,
        rms_norm_eps=draw(st.sampled_from([1e-6, 1e-5, 1e-2])),
        rope_theta=draw(st.sampled_from([100.0, 1e4, 1e6])),
        tie_word_embeddings=draw(st.booleans() if tied is None else tied),
    )


seeds = st.integers(0, 2**31)


def random_model(config, seed=0):
    """A model whose weights are large enough for attention, gates and norms to matter."""
    torch.manual_seed(seed)
    model = Llama(config)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(
                torch.randn(p.shape) / p.shape[1] ** 0.5
                if p.dim() == 2
                else 1 + 0.3 * torch.randn(p.shape)
            )
    return model


def exact_model(config, seed):
    """In float64: rounding, which narrow random models can amplify a thousandfold, decides no
    comparison."""
    return random_model(config, seed).double()


def random_tokens(config, batch, length, seed=0):
    return torch.randint(
        config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed)
    )


SMALL = LlamaConfig(24, 16, 12, 2, 4, 2, max_position_embeddings=64)


META = {
    "model.embed_tokens": "tok_embeddings",
    "model.norm": "norm",
    "lm_head": "output",
    "model.layers": "layers",
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
}


HF_LAYOUTS = ["one.safetensors", "many.safetensors", "one.bin", "many.bin"]


LAYOUTS = HF_LAYOUTS + ["meta1", "meta2", "meta4"]


def write_hf(folder, tensors, config, layout="one.safetensors", **fields):
    """A Hugging Face folder; `fields` override those of config.json, None removes one."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        **dataclasses.asdict(config),
        **fields,
    }
    (folder / "config.json").write_text(
        json.dumps({k: v for k, v in content.items() if v is not ...})
    )
    suffix = layout.split(".")[1]
    save = safetensors.torch.save_file if suffix == "safetensors" else torch.save
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    if layout.startswith("one"):
        save(tensors, folder / f"{stem}.{suffix}")
        return
    files = {name: f"{stem}-0000{1 + i % 3}-of-00003.{suffix}" for i, name in enumerate(tensors)}
    for file in set(files.values()):
        save({name: t.clone() for name, t in tensors.items() if files[name] == file}, folder / file)
    index = {"metadata": {}, "weight_map": files}
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))


def write_meta(folder, tensors, config, shards, **fields):
    """A folder like Meta's of tensors that have Hugging Face's names but Meta's order of rows."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "dim": config.hidden_size,
        "multiple_of": 256,
        "n_heads": config.num_attention_heads,
        "n_layers": config.num_hidden_layers,
        "norm_eps": config.rms_norm_eps,
        "vocab_size": -1,
        "n_kv_heads": config.num_key_value_heads,
        "rope_theta": config.rope_theta,
        **fields,
    }
    (folder / "params.json").write_text(
        json.dumps({k: v for k, v in content.items() if v is not ...})
    )
    for shard in range(shards):
        held = {"rope.freqs": torch.ones(config.head_dim // 2)}
        for name, tensor in tensors.items():
            columns = any(part in name for part in ("embed_tokens", "o_proj", "down_proj"))
            split = (
                tensor
                if tensor.dim() == 1
                else tensor.chunk(shards, dim=1 if columns else 0)[shard]
            )
            for hf, meta in META.items():
                name = name.replace(hf, meta) if hf + "." in name else name
            held[name] = split.clone()
        torch.save(held, folder / f"consolidated.{shard:02d}.pth")


def meta_rows(tensors, config):
    """The same model with each head's rotary rows as Meta orders them: channel i beside channel i +
    K/2."""
    K, ordered = config.head_dim, dict(tensors)
    for name, tensor in tensors.items():
        if "q_proj" in name or "k_proj" in name:
            heads = range(0, len(tensor), K)
            ordered[name] = tensor[
                [head + half + i for head in heads for i in range(K // 2) for half in (0, K // 2)]
            ]
    return ordered


def write_checkpoint(folder, model, layout, **fields):
    tensors = {name: p.detach().clone() for name, p in model.named_parameters()}
    if layout.startswith("meta"):
        write_meta(
            folder, meta_rows(tensors, model.config), model.config, int(layout[4:]), **fields
        )
    else:
        write_hf(folder, tensors, model.config, layout, **fields)


def change(tensors, name, what):
    if what == "missing":
        del tensors[name]
    elif what == "unexpected":
        tensors[name.replace("weight", "bias")] = torch.zeros(3)
    elif what == "misshapen":
        tensors[name] = torch.cat((tensors[name], tensors[name]))
    elif what == "of no dimension":
        tensors[name] = torch.tensor(1.0)
    elif what == "integer":
        tensors[name] = tensors[name].to(torch.int8)
    else:
        tensors[name].view(-1)[-1] = float(what)


def rewrite(path, edit):
    """Reads a file of weights, lets `edit` change its tensors, and writes it again."""
    if path.suffix == ".safetensors":
        tensors = safetensors.torch.load_file(path)
        edit(tensors)
        safetensors.torch.save_file(tensors, path)
    else:
        tensors = torch.load(path, weights_only=True)
        edit(tensors)
        torch.save(tensors, path)
