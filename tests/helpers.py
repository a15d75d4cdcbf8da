"""What several test files share: small models and layers with known numbers, and the oracles."""

import dataclasses
import json
import sys

import numpy as np
import pytest
import torch
from hypothesis import strategies as st

from cli.errors import run_command
from llama import LINEARS, Llama, LlamaConfig
from quant import Quantized, quantize_model, unpack
from text.instructions import Turn

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SMALL = LlamaConfig(24, 16, 12, 2, 4, 2, max_position_embeddings=64)
SEEDS = st.integers(0, 2**31)
BITS = st.sampled_from([2, 3, 4])


def same(a, b):
    """Whether two rows of tensors are equal in dtype and in every bit."""
    return all(torch.equal(x, y) and x.dtype == y.dtype for x, y in zip(a, b, strict=True))


def close(actual, expected, tolerance=1e-5):
    """Whether two arrays differ by at most `tolerance` of the expected one's largest magnitude."""
    actual, expected = torch.as_tensor(actual).double(), torch.as_tensor(expected).double()
    if actual.shape != expected.shape:
        return False
    return (actual - expected).abs().max() <= tolerance * expected.abs().max()


def integers(seed, low, high, *shape, dtype=torch.float32):
    """Integers from low to high, both included."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high + 1, shape, generator=generator).to(dtype)


def normal(seed, *shape):
    """Standard normal numbers in float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def ending(capsys, main, *more):
    """(exit status, what stderr got) of a command in this process."""
    with pytest.raises(SystemExit) as stop:
        run_command(main, *more)
    return stop.value.code, capsys.readouterr().err


# ---- LLaMA


def scalings():
    """Every type of rope scaling; with these contexts a small head has frequencies of all kinds."""
    linear = st.fixed_dictionaries(
        {"rope_type": st.just("linear"), "factor": st.sampled_from([1, 2.0, 7.5])}
    )
    llama3 = st.fixed_dictionaries(
        {
            "rope_type": st.just("llama3"),
            "factor": st.sampled_from([1.5, 8, 32.0]),
            "low_freq_factor": st.sampled_from([0.5, 1]),
            "high_freq_factor": st.sampled_from([2.0, 4]),
            "original_max_position_embeddings": st.sampled_from([4, 16, 8192]),
        }
    )
    return st.none() | linear | llama3


@st.composite
def configs(draw, kv_heads=None, tied=st.booleans(), old=False):  # noqa: B008, immutable
    """Any small LLaMA; `old`: of LLaMA-1 or 2, without what came later."""
    kv = draw(st.sampled_from([1, 2, 3]) if kv_heads is None else st.just(kv_heads))
    heads = kv * draw(st.sampled_from([1, 2, 3]))
    # Of two channels both can be near 0; then a norm makes rotary's float32 errors 100 times larger
    widths = [2, 4, 8] if heads > 1 else [4, 8]
    return LlamaConfig(
        vocab_size=draw(st.integers(3, 10)) * 4,
        hidden_size=heads * draw(st.sampled_from(widths)),
        intermediate_size=draw(st.integers(1, 6)) * 4,
        num_hidden_layers=draw(st.integers(1, 3)),
        num_attention_heads=heads,
        num_key_value_heads=kv,
        max_position_embeddings=64,
        rms_norm_eps=draw(st.sampled_from([1e-6, 1e-5, 1e-2])),
        rope_theta=draw(st.sampled_from([100.0, 1e4, 1e6])),
        tie_word_embeddings=draw(tied),
        head_dim=None if old else draw(st.sampled_from([None, 2, 6])),
        rope_scaling=None if old else draw(scalings()),
    )


def random_model(config, seed=0):
    """A model whose weights are large enough for attention, gates and norms to matter."""
    torch.manual_seed(seed)
    model = Llama(config)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:
                p.copy_(torch.randn(p.shape) / p.shape[1] ** 0.5)
            else:
                p.copy_(1 + 0.3 * torch.randn(p.shape))
    return model


def exact_model(config, seed):
    """In float64, as narrow random models can make rounding errors a thousand times larger."""
    return random_model(config, seed).double()


def random_tokens(config, batch, length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(config.vocab_size, (batch, length), generator=generator)


def reference_frequencies(config):
    """Every pair's rotary frequency in float64, from wavelengths, as Meta's code has them."""
    scaling, found = config.rope_scaling or {"rope_type": None}, []
    for i in range(config.head_dim // 2):
        frequency = config.rope_theta ** (-2 * i / config.head_dim)
        if scaling["rope_type"] == "linear":
            frequency = frequency / scaling["factor"]
        elif scaling["rope_type"] == "llama3":
            low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
            original = scaling["original_max_position_embeddings"]
            wavelength, divided = 2 * np.pi / frequency, frequency / scaling["factor"]
            if wavelength > original / low:
                frequency = divided
            elif wavelength >= original / high:
                smooth = (original / wavelength - low) / (high - low)
                frequency = (1 - smooth) * divided + smooth * frequency
        found.append(frequency)
    return np.array(found)


def reference_logits(weights, config, tokens, interleaved=False):
    """LLaMA from its formulas in float64, [T, V]: rotary numbers are complex, attention is a loop.

    `weights` have Hugging Face's names; `interleaved` pairs neighbouring channels, as Meta's do.
    """
    w = {name: tensor.double().numpy() for name, tensor in weights.items()}
    H, KV = config.num_attention_heads, config.num_key_value_heads
    K, frequency = config.head_dim, reference_frequencies(config)

    def layer(i, name):
        return w[f"model.layers.{i}.{name}.weight"]

    def norm(x, weight):
        return x / np.sqrt(np.mean(x * x) + config.rms_norm_eps) * weight

    def turn(x, position):
        first, second = (x[0::2], x[1::2]) if interleaved else (x[: K // 2], x[K // 2 :])
        z = (first + 1j * second) * np.exp(1j * position * frequency)
        return np.concatenate([z.real, z.imag])  # the same order in q and k: products are the same

    stream = [w["model.embed_tokens.weight"][t] for t in tokens]
    for i in range(config.num_hidden_layers):
        normed = [norm(x, layer(i, "input_layernorm")) for x in stream]
        q, k, v = [], [], []  # [T][H][K]
        for position, x in enumerate(normed):
            heads = [(layer(i, f"self_attn.{n}_proj") @ x).reshape(-1, K) for n in "qkv"]
            q.append([turn(head, position) for head in heads[0]])
            k.append([turn(head, position) for head in heads[1]])
            v.append(heads[2])
        for t in range(len(tokens)):
            attended = []
            for h in range(H):
                g = h // (H // KV)  # the key-value head that query head h shares
                score = np.array([q[t][h] @ k[s][g] / np.sqrt(K) for s in range(t + 1)])
                p = np.exp(score - score.max())
                attended.append(sum(p[s] / p.sum() * v[s][g] for s in range(t + 1)))
            x = stream[t] + layer(i, "self_attn.o_proj") @ np.concatenate(attended)
            y = norm(x, layer(i, "post_attention_layernorm"))
            gate = layer(i, "mlp.gate_proj") @ y
            gated = gate / (1 + np.exp(-gate)) * (layer(i, "mlp.up_proj") @ y)
            stream[t] = x + layer(i, "mlp.down_proj") @ gated
    head = w["model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"]
    return np.stack([head @ norm(x, w["model.norm.weight"]) for x in stream])


# ---- quantized matrices and models


def random_quantized(seed, rows, groups, group_size, bits):
    """Any codes, scales 0 to 4 in quarters, offsets -4 to 4 in quarters: exact in every dtype."""
    codes = integers(seed, 0, 2**bits - 1, rows, groups * group_size, dtype=torch.uint8)
    scale = integers(seed + 1, 0, 16, rows, groups, dtype=torch.float16) / 4
    return Quantized(codes, scale, integers(seed + 2, -16, 16, rows, groups) / 4)


def codes_of(layer):
    """The codes [O, I] of a QuantLinear."""
    return unpack(layer.packed, layer.bits, layer.in_features)


def dense(quantized):
    """scale * code + offset, weight by weight, in float64."""
    group_size = quantized.codes.shape[1] // quantized.scale.shape[1]

    def spread_out(per_group):  # [O, G] -> [O, I]
        return per_group.double().repeat_interleave(group_size, dim=1)

    codes = quantized.codes.double()
    return spread_out(quantized.scale) * codes + spread_out(quantized.offset)


def pool(x, groups):
    """The sum of x [..., I] over each group of inputs: [..., G]."""
    return torch.stack([part.sum(-1) for part in x.chunk(groups, dim=-1)], dim=-1)


def exact_case(seed, rows, groups, group_size, bits, lead):
    """(x, quantized) whose products' sums every dtype holds: x has up to 16 entries of -1 or 1."""
    quantized = random_quantized(seed, rows, groups, group_size, bits)
    scale, offset = quantized.scale.clamp(max=1).ceil(), quantized.offset.round()
    width = groups * group_size
    x = integers(seed + 3, -1, 1, *lead, width, dtype=torch.float64)
    order = normal(seed + 4, *lead, width).argsort(-1)
    return x * (order < 16), quantized._replace(scale=scale, offset=offset)


def correlated_hessian(seed, width, spread=0.8):
    """What inputs z M D give, in float64 [I, I]: z white, M a mixing, D a scaling of each input."""
    mixing = torch.eye(width, dtype=torch.float64) + 0.7 * normal(seed, width, width) / width**0.5
    mixing += 2 * torch.outer(normal(seed + 1, width), normal(seed + 2, width)) / width
    inputs = mixing * torch.exp(spread * normal(seed + 3, width))
    return inputs.t() @ inputs


TOKENS = integers(0, 0, 39, 6, 16, dtype=torch.long)
THREE_LAYERS = LlamaConfig(
    vocab_size=40,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=3,
    num_attention_heads=2,
    num_key_value_heads=1,
    max_position_embeddings=64,
)
TWO_LAYERS = dataclasses.replace(THREE_LAYERS, num_hidden_layers=2)


def random_llama(seed=0, scale=1, **changes):
    """A small Llama; with a larger `scale`, its outputs depend visibly on how it is quantized."""
    torch.manual_seed(seed)
    model = Llama(LlamaConfig(**{**vars(THREE_LAYERS), **changes}))
    for name, p in model.named_parameters():
        p.data.mul_(scale if "_proj" in name else 1)
    return model.requires_grad_(False)


def linears(model):
    """{path: layer} of the seven linear layers of every block."""
    return {name: m for name, m in model.named_modules() if name.rpartition(".")[2] in LINEARS}


# ---- text and commands


def exchange(asked, answer):
    """A record: a question and its answer."""
    return Turn("user", asked), Turn("assistant", answer)


# Any text that a file can hold, but for U+2581, the one character that sentencepiece cannot keep
TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\u2581"), max_size=30)
ANSWERS = TEXTS.filter(bool)  # an empty one is left out of the data


def peaked_llama(config, seed=0):
    """A model whose predictions are far from uniform."""
    torch.manual_seed(seed)
    model = Llama(config)
    for p in model.parameters():
        if p.dim() == 2:
            torch.nn.init.normal_(p, std=0.4)
    return model


def save_tokenizer(tokenizer, folder):
    """Writes tokenizer.model into a model folder."""
    (folder / "tokenizer.model").write_bytes(tokenizer.files["tokenizer.model"])


def run_in_process(monkeypatch, capsys, main, *arguments):
    """Runs a command in this process: (exit status, standard output, standard error)."""
    monkeypatch.setattr(sys, "argv", ["command.py", *map(str, arguments)])
    status = 0
    try:
        run_command(main)
    except SystemExit as e:
        status = e.code
    return status, *capsys.readouterr()


def quantized_llama(seed=0, bits=3, group_size=8):
    """Two layers, rounded to nearest."""
    torch.manual_seed(seed)
    return quantize_model(Llama(TWO_LAYERS), bits, group_size)


def contents(folder):
    """{path inside the folder: bytes} of every file in it."""
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def forget_rest(folder):
    """Makes a base of a foreign file one of our own, of which no such file can be written back."""
    file = folder / "config.json"
    fields = json.loads(file.read_text())
    (folder / fields["quantization"].pop("rest")).unlink()
    file.write_text(json.dumps(fields))
