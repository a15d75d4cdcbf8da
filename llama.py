"""The LLaMA model: its forward pass, its key-value cache, and generation. Plain PyTorch, in float.

Nothing here knows of quantization, adapters or files. Parameters have the names of Hugging Face
checkpoints, so loading one is a lookup (`formats/` does it). LLaMA-1 to LLaMA-3.2 and all that
have their shape: TinyLlama, SmolLM2, Mistral. Left out: biases, sliding windows, rope scaling other
than `linear` and `llama3`; a checkpoint that needs one is refused by name.

Dimension key: B batch, T time, S all positions so far, D model width, H heads, K head size,
F feed-forward width, V vocabulary.

    python sample.py MODEL_FOLDER --prompt "Once upon a time"
    python -m pytest tests/test_llama.py
"""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """A model's dimensions, named as in a Hugging Face LLaMA `config.json`.

    head_dim: None becomes hidden_size / num_attention_heads, once; dataclasses.replace keeps it.
    rope_scaling: what `scale_frequencies` takes. eos_token_id: LLaMA-3's chat models have several.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    tie_word_embeddings: bool = False
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    head_dim: int | None = None
    rope_scaling: dict | None = None

    def __post_init__(self):
        if self.head_dim is None:  # a frozen dataclass takes no plain assignment
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        assert self.head_dim % 2 == 0, f"{self.head_dim=}: channels are rotated in pairs"


_TINY = dict(max_position_embeddings=512, rms_norm_eps=1e-5)
_V2 = dict(max_position_embeddings=4096, rms_norm_eps=1e-5)
_8K = dict(max_position_embeddings=8192, rms_norm_eps=1e-5)
_V3 = dict(_8K, rope_theta=5e5, bos_token_id=128000, eos_token_id=128001)
LLAMA3_SCALING = dict(  # LLaMA-3.2's; LLaMA-3.1's factor is 8
    rope_type="llama3",
    factor=32.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=8192,
)
_V3_2 = dict(
    _V3, max_position_embeddings=131072, tie_word_embeddings=True, rope_scaling=LLAMA3_SCALING
)
_SMOL = dict(_8K, rope_theta=1e5, tie_word_embeddings=True, bos_token_id=0, eos_token_id=0)
CONFIGS = {  # vocabulary, width, feed-forward width, layers, heads, key-value heads
    "tiny": LlamaConfig(512, 64, 192, 5, 2, 2, **_TINY),
    "7b": LlamaConfig(32000, 4096, 11008, 32, 32, 32),
    "13b": LlamaConfig(32000, 5120, 13824, 40, 40, 40),
    "33b": LlamaConfig(32000, 6656, 17920, 60, 52, 52),
    "65b": LlamaConfig(32000, 8192, 22016, 80, 64, 64, rms_norm_eps=1e-5),
    "llama2-7b": LlamaConfig(32000, 4096, 11008, 32, 32, 32, **_V2),
    "llama2-13b": LlamaConfig(32000, 5120, 13824, 40, 40, 40, **_V2),
    "llama2-70b": LlamaConfig(32000, 8192, 28672, 80, 64, 8, **_V2),
    "llama3-8b": LlamaConfig(128256, 4096, 14336, 32, 32, 8, **_V3),
    "llama3.2-1b": LlamaConfig(128256, 2048, 8192, 16, 32, 8, **_V3_2),
    "llama3.2-3b": LlamaConfig(128256, 3072, 8192, 28, 24, 8, **_V3_2),
    "tinyllama-1.1b": LlamaConfig(32000, 2048, 5632, 22, 32, 4, rms_norm_eps=1e-5),
    "smollm2-135m": LlamaConfig(49152, 576, 1536, 30, 9, 3, **_SMOL),
    "smollm2-360m": LlamaConfig(49152, 960, 2560, 32, 15, 5, **_SMOL),
    "smollm2-1.7b": LlamaConfig(49152, 2048, 8192, 24, 32, 32, **dict(_SMOL, rope_theta=1.3e5)),
}
# All of these are quantized; `targets` of qalora.add_adapters says which are adapted
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


# ---- the model


def rotary_table(config: LlamaConfig, positions_T: Tensor) -> tuple[Tensor, Tensor]:
    """(cos, sin), each [T, K/2] in float32: position times one frequency for each pair of channels.

    RoFormer (Su et al., 2021), equation 15. Computed again in every forward pass, which is cheap; a
    stored table would be rounded by `model.to(bfloat16)`.
    """
    pairs = torch.arange(0, config.head_dim, 2, device=positions_T.device)
    frequencies = config.rope_theta ** -(pairs.float() / config.head_dim)  # [K/2]
    frequencies = scale_frequencies(frequencies, config.rope_scaling)
    angles = torch.outer(positions_T.float(), frequencies)  # [T, K/2]
    return angles.cos(), angles.sin()


def scale_frequencies(frequencies: Tensor, scaling: dict | None) -> Tensor:
    """Rotary frequencies [K/2], lowered for a longer context as `scaling` says; None: as they are.

    linear: divided by `factor`, so that positions are interpolated (Chen et al., 2023). llama3:
    kept where they make `high_freq_factor` turns or more within the original context, divided where
    they make `low_freq_factor` or fewer, as the model has not seen a whole turn of those; between,
    a mean of both.
    """
    if scaling is None:
        return frequencies
    if scaling["rope_type"] == "linear":
        return frequencies / scaling["factor"]
    assert scaling["rope_type"] == "llama3", scaling
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (kept + (1 - kept) / scaling["factor"])


def rotate(x_BHTK: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Turns channels i and i + K/2 of every head by the angle of their position."""
    cos, sin = rotary
    a, b = x_BHTK.chunk(2, dim=-1)  # [B, H, T, K/2] each
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x_BHTK.dtype)


class RMSNorm(nn.Module):
    """x / rms(x) * weight; the mean square is taken in float32 whatever the dtype of x."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        exact = x.to(torch.promote_types(x.dtype, torch.float32))
        normed = exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + self.eps)
        return normed.to(x.dtype) * self.weight


class Attention(nn.Module):
    """Causal attention. Several query heads share one key-value head where the config says so."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        D, K = config.hidden_size, config.head_dim
        H, KV = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = K
        self.q_proj = nn.Linear(D, H * K, bias=False)
        self.k_proj = nn.Linear(D, KV * K, bias=False)
        self.v_proj = nn.Linear(D, KV * K, bias=False)
        self.o_proj = nn.Linear(H * K, D, bias=False)

    def forward(self, x: Tensor, rotary: tuple, remember: Callable | None = None) -> Tensor:
        """[B, T, D] -> [B, T, D]. `remember` takes new keys and values and returns all so far."""
        q = rotate(self.split_heads(self.q_proj(x)), rotary)  # [B, H, T, K]
        k = rotate(self.split_heads(self.k_proj(x)), rotary)
        v = self.split_heads(self.v_proj(x))
        if remember:
            k, v = remember(k, v)  # [B, H, S, K]
        T, S = q.shape[2], k.shape[2]
        mask = None
        if 1 < T < S:  # new token t sees the S - T older ones and the first t + 1 new ones
            mask = torch.ones(T, S, dtype=torch.bool, device=x.device).tril(S - T)
        grouped = q.shape[1] != k.shape[1]
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=T == S, enable_gqa=grouped
        )
        return self.o_proj(y.transpose(1, 2).flatten(2))  # [B, H, T, K] -> [B, T, H*K] -> [B, T, D]

    def split_heads(self, y: Tensor) -> Tensor:
        """[B, T, H*K] -> [B, H, T, K]."""
        return y.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


class MLP(nn.Module):
    """SwiGLU: a gated feed-forward layer."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """One layer: attention and feed-forward, each normed before and added back."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, rotary: tuple, remember: Callable | None = None) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        x = x + self.self_attn(self.input_layernorm(x), rotary, remember)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Embedding, blocks, last norm. `checkpointing`: the backward pass recomputes each block."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        table_VD = torch.empty(config.vocab_size, config.hidden_size)  # Llama draws its numbers
        self.embed_tokens = nn.Embedding.from_pretrained(table_VD, freeze=False)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.checkpointing = False

    def forward(self, tokens_BT: Tensor, cache: "Cache | None" = None) -> Tensor:
        """[B, T] -> [B, T, D]."""
        start, T = cache.length if cache else 0, tokens_BT.shape[1]
        positions_T = torch.arange(start, start + T, device=tokens_BT.device)
        rotary = rotary_table(self.config, positions_T)
        x = self.embed_tokens(tokens_BT)  # [B, T, D]
        for i, block in enumerate(self.layers):
            if self.checkpointing and torch.is_grad_enabled():
                assert cache is None, "recomputing a block would fill the cache twice"
                # preserve_rng_state=False, as a block draws nothing at random
                x = checkpoint(block, x, rotary, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, rotary, functools.partial(cache.append, i) if cache else None)
        if cache:
            cache.length += T
        return self.norm(x)


class Llama(nn.Module):
    """A LLaMA with random weights; parameter names as in Hugging Face checkpoints."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        for p in self.parameters():
            if p.dim() == 2 and not p.is_meta:  # where normal_ takes seconds
                nn.init.normal_(p, std=0.02)

    def forward(
        self, tokens_BT: Tensor, cache: "Cache | None" = None, keep_BT: Tensor | None = None
    ) -> Tensor:
        """Logits [B, T, V] in the model's dtype; with a mask `keep_BT` only its true ones: [n, V].

        Padding belongs on the right, where causality hides it. With a `Cache`, `tokens_BT` continue
        what is in it.
        """
        x = self.model(tokens_BT, cache)  # [B, T, D]
        return self.lm_head(x if keep_BT is None else x[keep_BT])


def linears(module: nn.Module, names: Iterable[str] = LINEARS) -> list[tuple[str, nn.Module]]:
    """[(path, layer)] of a model's or block's linear layers; a list, so they can be replaced."""
    return [(p, layer) for p, layer in module.named_modules() if p.rpartition(".")[2] in names]


# ---- generation


class Cache:
    """Keys and values of the `length` tokens so far, in memory that is allocated once."""

    def __init__(
        self, config: LlamaConfig, batch: int, length: int, dtype: torch.dtype, device: str
    ):
        heads = config.num_key_value_heads
        shape = (config.num_hidden_layers, batch, heads, length, config.head_dim)
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty(shape, dtype=dtype, device=device)
        self.length = 0

    def append(self, layer: int, k_BHTK: Tensor, v_BHTK: Tensor) -> tuple[Tensor, Tensor]:
        """Stores a layer's new keys and values; returns all of that layer's, [B, H, S, K] each."""
        end = self.length + k_BHTK.shape[2]
        assert end <= self.keys.shape[3], f"{end} tokens in a cache for {self.keys.shape[3]}"
        self.keys[layer, :, :, self.length : end] = k_BHTK
        self.values[layer, :, :, self.length : end] = v_BHTK
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]


@torch.inference_mode()
def generate(
    model: Llama,
    tokens_BT: Tensor,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
    eos_token_ids: Sequence[int] = (),
    on_token: Callable | None = None,
) -> Tensor:
    """Continues every row of `tokens_BT`: returns prompt and continuation, [B, T + n].

    n is at most `max_new_tokens`. Greedy at temperature 0. Stops once every row has produced one of
    `eos_token_ids`; a row that ended repeats it. `on_token(tokens_B)` gets each new column.
    """
    B, T = tokens_BT.shape
    assert T > 0 and temperature >= 0 and 0 < top_p <= 1, f"{T=} {temperature=} {top_p=}"
    dtype, device = model.model.embed_tokens.weight.dtype, tokens_BT.device
    cache = Cache(model.config, B, T + max_new_tokens, dtype, device)
    stop = torch.tensor(eos_token_ids, dtype=torch.long, device=device)
    ended = torch.zeros(B, dtype=torch.bool, device=device)
    new = tokens_BT
    for _ in range(max_new_tokens):
        last = torch.zeros_like(new, dtype=torch.bool)
        last[:, -1] = True
        token = choose(model(new, cache, keep_BT=last), temperature, top_p, generator)  # [B]
        token = torch.where(ended, tokens_BT[:, -1], token)
        ended |= torch.isin(token, stop)
        new = token[:, None]
        tokens_BT = torch.cat((tokens_BT, new), dim=1)
        if on_token:
            on_token(token)
        if ended.all():
            break
    return tokens_BT


def choose(
    logits_BV: Tensor, temperature: float, top_p: float, generator: torch.Generator | None = None
) -> Tensor:
    """The next token of each row, [B]: the likeliest at temperature 0, else drawn.

    It is drawn from the smallest set of likeliest tokens whose probabilities reach `top_p` (nucleus
    sampling, Holtzman et al., 2019).
    """
    if temperature == 0:
        return logits_BV.argmax(-1)
    logits = logits_BV.float()
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature  # at most 0: no overflow
    p, order = logits.softmax(-1).sort(descending=True)  # [B, V]
    p = p.masked_fill(p.cumsum(-1) - p >= top_p, 0)  # keeps the likeliest: nothing precedes it
    return order.gather(-1, torch.multinomial(p, 1, generator=generator)).squeeze(-1)


def load_pretrained(
    path: str | pathlib.Path, dtype: torch.dtype | None = None, device: str = "cpu"
) -> Llama:
    """The float model in a folder of Hugging Face or Meta; `formats/` says what is read and how."""
    from formats import load_pretrained as load  # here, because formats/ imports this module

    return load(path, dtype, device)
