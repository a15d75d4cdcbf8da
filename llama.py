"""The LLaMA model: its forward pass, its key-value cache, generation, and reading its weights from disk.

The model is plain PyTorch in float and knows nothing of quantization. Parameters bear the names of Hugging Face
checkpoints, so loading is a lookup. Left out on purpose: rope scaling, biases, sliding windows and all else that
LLaMA-1 and LLaMA-2 lack. A checkpoint that asks for one of these is refused by name, never read as if it did not.

Weights are read lazily: `open_weights` checks the names and shapes of a whole checkpoint and returns one function per
tensor, which reads it through the memory map of its file. So a model larger than memory can be quantized block by
block; the price is a record per tensor where `load_state_dict` would do for small models.

Dimension key: B batch, T time, S all positions so far, D width, H heads, K head size, F feed-forward, V vocabulary.

    python sample.py MODEL_FOLDER --prompt "Once upon a time"        text from the weights read here
    python -m pytest tests/test_llama.py                             what this file promises
"""

import dataclasses
import functools
import json
import math
import pathlib
import zipfile
from typing import Callable, NamedTuple

import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from cli import UserError, written_whole


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """A model's dimensions, named as in a Hugging Face LLaMA `config.json`."""

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
    bos_token_id: int = 1
    eos_token_id: int = 2

    @property
    def head_dim(self):
        return self.hidden_size // self.num_attention_heads


_V2 = dict(max_position_embeddings=4096, rms_norm_eps=1e-5)
CONFIGS = {  # vocabulary, width, feed-forward width, layers, heads, key-value heads
    "tiny": LlamaConfig(512, 64, 192, 5, 2, 2, max_position_embeddings=512, rms_norm_eps=1e-5),
    "7b": LlamaConfig(32000, 4096, 11008, 32, 32, 32),
    "13b": LlamaConfig(32000, 5120, 13824, 40, 40, 40),
    "33b": LlamaConfig(32000, 6656, 17920, 60, 52, 52),
    "65b": LlamaConfig(32000, 8192, 22016, 80, 64, 64, rms_norm_eps=1e-5),
    "llama2-7b": LlamaConfig(32000, 4096, 11008, 32, 32, 32, **_V2),
    "llama2-13b": LlamaConfig(32000, 5120, 13824, 40, 40, 40, **_V2),
    "llama2-70b": LlamaConfig(32000, 8192, 28672, 80, 64, 8, **_V2),
}
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


# ---------------------------------------------------------------------------------------------------- the model

def rotary_table(config, positions_T):
    """(cos, sin), each [T, K/2] in float32: position times one frequency per pair of channels (RoFormer, eq. 15).

    Computed anew in every forward pass: it is cheap, and a stored table would be cast by `model.to(bfloat16)`.
    """
    exponents = torch.arange(0, config.head_dim, 2, device=positions_T.device).float() / config.head_dim
    angles = torch.outer(positions_T.float(), config.rope_theta ** -exponents)
    return angles.cos(), angles.sin()


def rotate(x_BHTK, rotary):
    """Turns each pair of channels by its position's angle; Hugging Face checkpoints pair channel i with i + K/2."""
    cos, sin = rotary
    a, b = x_BHTK.chunk(2, dim=-1)  # [B, H, T, K/2] each
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x_BHTK.dtype)


class RMSNorm(nn.Module):
    """x / rms(x) * weight, with the statistics in float32 whatever the dtype of x."""

    def __init__(self, width, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x):
        exact = x.to(torch.promote_types(x.dtype, torch.float32))
        normed = exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + self.eps)
        return normed.to(x.dtype) * self.weight


class Attention(nn.Module):
    """Causal attention; several query heads share one key-value head where the config says so."""

    def __init__(self, config):
        super().__init__()
        D, K = config.hidden_size, config.head_dim
        self.head_dim = K
        self.q_proj = nn.Linear(D, config.num_attention_heads * K, bias=False)
        self.k_proj = nn.Linear(D, config.num_key_value_heads * K, bias=False)
        self.v_proj = nn.Linear(D, config.num_key_value_heads * K, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * K, D, bias=False)

    def forward(self, x, rotary, remember=None):
        split = lambda y: y.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # [B, T, H*K] -> [B, H, T, K]
        q, k, v = split(self.q_proj(x)), split(self.k_proj(x)), split(self.v_proj(x))
        q, k = rotate(q, rotary), rotate(k, rotary)
        if remember:
            k, v = remember(k, v)  # [B, H, S, K]: those of all positions so far
        T, S = q.shape[2], k.shape[2]
        mask = None
        if 1 < T < S:  # several new tokens after older ones: token t sees the S - T old ones and t + 1 new ones
            mask = torch.ones(T, S, dtype=torch.bool, device=x.device).tril(S - T)
        grouped = q.shape[1] != k.shape[1]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=T == S, enable_gqa=grouped)
        return self.o_proj(y.transpose(1, 2).flatten(2))  # [B, H, T, K] -> [B, T, H*K] -> [B, T, D]


class MLP(nn.Module):
    """SwiGLU: a gated feed-forward layer."""

    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """One layer: attention and feed-forward, each normed before and added back."""

    def __init__(self, config):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, rotary, remember=None):
        x = x + self.self_attn(self.input_layernorm(x), rotary, remember)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Embedding, blocks, last norm. With `checkpointing` the backward pass recomputes each block, to save memory."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        table_VD = torch.empty(config.vocab_size, config.hidden_size)  # nn.Embedding would draw one: see Llama
        self.embed_tokens = nn.Embedding.from_pretrained(table_VD, freeze=False)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.checkpointing = False

    def forward(self, tokens_BT, cache=None):
        start, T = cache.length if cache else 0, tokens_BT.shape[1]
        rotary = rotary_table(self.config, torch.arange(start, start + T, device=tokens_BT.device))
        x = self.embed_tokens(tokens_BT)  # [B, T, D]
        for i, block in enumerate(self.layers):
            if self.checkpointing and torch.is_grad_enabled():
                assert cache is None, "a cache cannot be filled twice: no checkpointing with it"
                # nothing is drawn at random in a block: keeping the generators' states would be for nothing
                x = checkpoint(block, x, rotary, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, rotary, functools.partial(cache.append, i) if cache else None)
        if cache:
            cache.length += T
        return self.norm(x)


class Llama(nn.Module):
    """A LLaMA with random weights; parameter names as in Hugging Face checkpoints."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        for p in self.parameters():
            if p.dim() == 2 and not p.is_meta:  # there, normal_ imports all of torch._dynamo: seconds, and 75 MB
                nn.init.normal_(p, std=0.02)

    def forward(self, tokens_BT, cache=None, keep_BT=None):
        """Logits [B, T, V] in the model's dtype; with the mask `keep_BT` only the kept positions' [n, V].

        Padding belongs on the right, where causality hides it. With a `Cache`, `tokens_BT` continue what is in it.
        """
        x = self.model(tokens_BT, cache)  # [B, T, D]
        return self.lm_head(x if keep_BT is None else x[keep_BT])


def linears(module, names=LINEARS):
    """[(path, layer)] of the linear layers in a model or a block; a list, so that they can be replaced on the way."""
    return [(path, layer) for path, layer in module.named_modules() if path.rpartition(".")[2] in names]


class Cache:
    """Keys and values of the tokens so far, in memory allocated once; `length` counts the tokens."""

    def __init__(self, config, batch, length, dtype, device):
        shape = (config.num_hidden_layers, batch, config.num_key_value_heads, length, config.head_dim)
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty(shape, dtype=dtype, device=device)
        self.length = 0

    def append(self, layer, k_BHTK, v_BHTK):
        """Stores one layer's new keys and values; returns all of that layer's, [B, H, S, K] each."""
        end = self.length + k_BHTK.shape[2]
        assert end <= self.keys.shape[3], f"{end} tokens in a cache for {self.keys.shape[3]}"
        self.keys[layer, :, :, self.length:end] = k_BHTK
        self.values[layer, :, :, self.length:end] = v_BHTK
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]


@torch.inference_mode()
def generate(model, tokens_BT, max_new_tokens, temperature=0.0, top_p=1.0, generator=None, eos_token_id=None,
             on_token=None):
    """Continues every row of `tokens_BT`: prompt and continuation, [B, T + n] with n <= `max_new_tokens`.

    Greedy at temperature 0. Stops once every row has produced `eos_token_id`; a row that ended is filled with it.
    `on_token(tokens_B)` is called with each new column.
    """
    B, T = tokens_BT.shape
    assert T > 0 and temperature >= 0 and 0 < top_p <= 1, f"{T=} {temperature=} {top_p=}"
    cache = Cache(model.config, B, T + max_new_tokens, model.model.embed_tokens.weight.dtype, tokens_BT.device)
    ended = torch.zeros(B, dtype=torch.bool, device=tokens_BT.device)
    new = tokens_BT
    for _ in range(max_new_tokens):
        last = torch.zeros_like(new, dtype=torch.bool)
        last[:, -1] = True
        token = choose(model(new, cache, keep_BT=last), temperature, top_p, generator)  # [B]
        if eos_token_id is not None:
            token = token.masked_fill(ended, eos_token_id)
            ended |= token == eos_token_id
        new = token[:, None]
        tokens_BT = torch.cat((tokens_BT, new), dim=1)
        if on_token:
            on_token(token)
        if ended.all():
            break
    return tokens_BT


def choose(logits_BV, temperature, top_p, generator=None):
    """The next token of each row, [B]: the likeliest at temperature 0, else drawn from the smallest set of likeliest
    tokens whose probabilities reach `top_p` (nucleus sampling, Holtzman et al. 2019)."""
    if temperature == 0:
        return logits_BV.argmax(-1)
    logits = logits_BV.float()
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature  # at most 0: a low temperature overflows nothing
    p, order = logits.softmax(-1).sort(descending=True)  # [B, V]
    p = p.masked_fill(p.cumsum(-1) - p >= top_p, 0)  # the likeliest one stays: nothing comes before it
    return order.gather(-1, torch.multinomial(p, 1, generator=generator)).squeeze(-1)


# ---------------------------------------------------------------------------------------------------- the config

# Fields that change the arithmetic of a LLaMA but not the names and shapes of its tensors, which are checked in full;
# the first value is the one that is computed here, the others mean the same.
PLAIN = {"model_type": ["llama"], "architectures": [["LlamaForCausalLM"], ["LLaMAForCausalLM"], None],
         "hidden_act": ["silu"], "attention_bias": [False, None], "mlp_bias": [False, None], "sliding_window": [None],
         "partial_rotary_factor": [1, None], "auto_map": [None], "quantization_config": [None]}
META_NAMES = {"dim": "hidden_size", "n_layers": "num_hidden_layers", "n_heads": "num_attention_heads",
              "n_kv_heads": "num_key_value_heads", "norm_eps": "rms_norm_eps", "rope_theta": "rope_theta",
              "max_seq_len": "max_position_embeddings", "vocab_size": "vocab_size"}


def read_config(folder):
    """The LlamaConfig of a model folder, from Hugging Face's `config.json` or Meta's `params.json`.

    Raises UserError for a file that is missing or broken and for any field that asks for what this model does not
    compute. The `quantization` entry of this project's own folders is left to `quant.py`.
    """
    folder = pathlib.Path(folder)
    if (folder / "config.json").exists():
        return _hf_config(folder / "config.json")
    if (folder / "params.json").exists():
        return _meta_config(folder / "params.json", _open_meta_shards(folder))
    raise UserError(f"{folder}: found neither config.json (Hugging Face) nor params.json (Meta); "
                    "name a folder with LLaMA weights")


def read_json(path):
    """The dictionary in a JSON file; UserError if it holds anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path}: not valid JSON ({e}); fetch the file again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object, found {json.dumps(content)[:40]}")
    return content


def _hf_config(path):
    fields = read_json(path)
    for name, allowed in PLAIN.items():
        value = fields.get(name, None if name == "model_type" else allowed[0])
        if value not in allowed:
            raise UserError(f"{path}: {name} = {json.dumps(value)} is not supported, "
                            f"only {json.dumps(allowed[0])} is")
    for entry in ("rope_scaling", "rope_parameters"):  # newer configs keep the rotary base in the second
        rope = fields.get(entry) or {}
        plain = {"rope_type": "default", "type": "default", "partial_rotary_factor": 1,
                 "rope_theta": fields.get("rope_theta", rope.get("rope_theta") if isinstance(rope, dict) else None)}
        if not isinstance(rope, dict) or any(value != plain.get(name) for name, value in rope.items()):
            raise UserError(f"{path}: {entry} = {json.dumps(rope)} is not supported; rotary embeddings are only "
                            "computed unscaled, with one rope_theta")
        if "rope_theta" in rope:
            fields["rope_theta"] = rope["rope_theta"]
    if fields.get("num_key_value_heads") is None:  # LLaMA-1's configs are older than grouped-query attention
        fields["num_key_value_heads"] = fields.get("num_attention_heads")
    return checked_config(path, fields)


def _meta_config(path, shards):
    """Meta's file leaves out the vocabulary (-1) and the feed-forward width; the tensors know them."""
    fields = {name: value for name, value in read_json(path).items() if value is not None}
    for name, value in fields.items():
        if name not in META_NAMES and name not in ("multiple_of", "ffn_dim_multiplier", "max_batch_size"):
            raise UserError(f"{path}: {name} = {json.dumps(value)} is not supported; LLaMA-1 and 2 lack it")
    values = {"rms_norm_eps": 1e-5, "num_key_value_heads": fields.get("n_heads")}  # the defaults of Meta's own code
    values |= {META_NAMES[name]: value for name, value in fields.items() if name in META_NAMES}
    sizes = lambda name, dim: [dict(enumerate(p.shape)).get(dim, 0) for p in _pieces(shards, name)]
    if values.get("vocab_size", -1) == -1:
        values["vocab_size"] = sizes("tok_embeddings.weight", 0)[0]
    values["intermediate_size"] = sum(sizes("layers.0.feed_forward.w1.weight", 0))
    config, width = checked_config(path, values), sum(sizes("tok_embeddings.weight", 1))
    if width != config.hidden_size:  # said here, before the feed-forward width of too few shards is believed
        raise UserError(f"{shards[-1][0]}: tensor tok_embeddings.weight is {width} wide up to this last shard, but "
                        f"{path.name} asks for {config.hidden_size}; is a shard missing, or one of another model?")
    for known in CONFIGS.values():  # LLaMA-2's file does not say that its context is twice as long
        if config == dataclasses.replace(known, max_position_embeddings=config.max_position_embeddings):
            return known
    return config


def checked_config(path, fields):
    """A LlamaConfig of the fields that bear its names; UserError for what is missing or makes no sense."""
    values = {}
    for field in dataclasses.fields(LlamaConfig):
        value = values[field.name] = fields.get(field.name, field.default)
        if value is dataclasses.MISSING or value is None:
            raise UserError(f"{path}: {field.name} is missing")
        smallest = 0 if field.name.endswith("token_id") else 1
        good = {int: type(value) is int and smallest <= value < 2 ** 24, bool: type(value) is bool,
                float: type(value) in (int, float) and 0 < value < math.inf}
        if not good[field.type]:
            raise UserError(f"{path}: {field.name} = {json.dumps(value)} is not a sensible {field.type.__name__}")
    config = LlamaConfig(**values)
    D, H, KV = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
    if D % (2 * H) or H % KV:
        raise UserError(f"{path}: width {D}, {H} heads and {KV} key-value heads do not divide into even-sized heads")
    if fields.get("head_dim", config.head_dim) not in (None, config.head_dim):
        raise UserError(f"{path}: head_dim = {json.dumps(fields['head_dim'])} contradicts width {D} and {H} heads")
    return config


# ---------------------------------------------------------------------------------------------------- the weights

class Stored(NamedTuple):
    """One tensor in one file: where it is, its shape, and a function that reads it."""

    file: pathlib.Path
    name: str
    shape: tuple
    read: Callable


def open_file(path):
    """The tensors of one file by name, as `Stored`: safetensors, or a pickle with nothing but tensors in it.

    Both are memory-mapped, but for pickles older than PyTorch 1.6. Raises UserError if the file cannot be read.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; the download is incomplete")
    try:
        if path.suffix == ".safetensors":
            file = safetensors.safe_open(path, framework="pt")
            found = {name: Stored(path, name, tuple(file.get_slice(name).get_shape()),
                                  functools.partial(file.get_tensor, name)) for name in file.keys()}
        else:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
            if not all(isinstance(t, torch.Tensor) and t.layout == torch.strided for t in content.values()):
                raise ValueError("not only tensors")
            found = {name: Stored(path, name, tuple(t.shape), t.detach) for name, t in content.items()}
        if not found:
            raise ValueError("no tensors")
    except Exception as e:  # a broken file can raise anything: the parsers are not ours
        raise UserError(f"{path}: not a file of weights, or truncated or corrupt ({type(e).__name__}); "
                        "fetch it again, or save it anew as safetensors") from None
    return found


def all_finite(tensor):
    """Whether none of the values is NaN or infinite; unlike isfinite, without a copy (but of float8)."""
    if not tensor.numel():
        return True
    wide = tensor.float() if tensor.itemsize == 1 else tensor  # float8 has no aminmax
    return all(extreme.isfinite() for extreme in wide.aminmax())  # NaN gets through aminmax


def weight_files(folder):
    """The files in `folder` that may hold weights, by name."""
    return sorted(f for f in folder.iterdir()
                  if f.suffix in (".safetensors", ".bin", ".pth") and f.is_file() and not f.name.startswith("."))


def _open_hf_files(folder):
    """(path, tensors by name) of a Hugging Face checkpoint: its one file, or its index and all files listed there."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{name}.index.json"
        if (folder / name).exists():
            return folder / name, open_file(folder / name)
        if index.exists():
            break
    else:
        raise UserError(f"{folder}: found no model.safetensors or pytorch_model.bin, nor an index of several files")
    listed = read_json(index).get("weight_map")
    if not isinstance(listed, dict) or not all(isinstance(file, str) and "/" not in file for file in listed.values()):
        raise UserError(f"{index}: weight_map does not say which file of this folder holds which tensor")
    found = {}
    for file in sorted(set(listed.values())):
        for name, stored in open_file(folder / file).items():
            if name in found:
                raise UserError(f"{stored.file}: tensor {name} is also in {found[name].file.name}")
            found[name] = stored
    for name, file in listed.items():
        if name not in found or found[name].file.name != file:
            raise UserError(f"{folder / file}: tensor {name} is missing, though {index.name} says it is here")
    return index, found


# Meta's name of each module, and the dimension its model-parallel shards are split along (None: all hold the same).
META_TENSORS = {
    "model.embed_tokens": ("tok_embeddings", 1), "model.norm": ("norm", None), "lm_head": ("output", 0),
    "input_layernorm": ("attention_norm", None), "post_attention_layernorm": ("ffn_norm", None),
    "self_attn.q_proj": ("attention.wq", 0), "self_attn.k_proj": ("attention.wk", 0),
    "self_attn.v_proj": ("attention.wv", 0), "self_attn.o_proj": ("attention.wo", 1),
    "mlp.gate_proj": ("feed_forward.w1", 0), "mlp.down_proj": ("feed_forward.w2", 1),
    "mlp.up_proj": ("feed_forward.w3", 0),
}


def _meta_name(name):
    """Meta's name of a parameter that Hugging Face calls `name`, and the dimension its shards are split along."""
    module = name.removesuffix(".weight")
    if module.startswith("model.layers."):
        _, _, layer, module = module.split(".", 3)
        meta, dim = META_TENSORS[module]
        return f"layers.{layer}.{meta}.weight", dim
    meta, dim = META_TENSORS[module]
    return f"{meta}.weight", dim


def _open_meta_shards(folder):
    """(path, tensors by name) of each of Meta's model-parallel shards, in order."""
    count = max(1, len(list(folder.glob("consolidated.[0-9][0-9].pth"))))
    paths = [folder / f"consolidated.{i:02d}.pth" for i in range(count)]  # a gap in the numbers is a missing file
    return [(path, open_file(path)) for path in paths]


def _pieces(shards, name):
    """The tensor `name` of every shard."""
    for path, tensors in shards:
        if name not in tensors:
            raise UserError(f"{path}: tensor {name} is missing")
    return [tensors[name] for _, tensors in shards]


def open_weights(folder):
    """(config, weights): a LlamaConfig, and for each Hugging Face parameter name a function that reads that tensor.

    Names and shapes are checked here, for the whole checkpoint; that a tensor holds finite floats, when it is read.
    UserError names file and tensor. Layouts: Hugging Face's safetensors and pytorch_model.bin, one or several files
    with an index; Meta's consolidated.NN.pth, whose shards are joined, and the rotary order changed, on reading.
    """
    folder = pathlib.Path(folder)
    config = read_config(folder)
    meta = not (folder / "config.json").exists()
    if not meta and read_json(folder / "config.json").get("quantization"):
        raise UserError(f"{folder}: this model is quantized; a float model is needed here")
    shards = _open_meta_shards(folder) if meta else [_open_hf_files(folder)]
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in Llama(config).named_parameters()}
    weights, known = {}, set()
    for name, shape in shapes.items():
        stored_name, dim = _meta_name(name) if meta else (name, None)
        pieces = _pieces(shards, stored_name)
        _check_shapes(pieces, shape, dim)
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        weights[name] = functools.partial(_read, pieces, dim, heads if meta else None)
        known.add(stored_name)
    _check_the_rest(shards, known, config.tie_word_embeddings)
    return config, weights


def _check_shapes(pieces, shape, dim):
    """UserError unless the pieces, split along `dim`, make a tensor of `shape`."""
    expected = tuple(n / len(pieces) if i == dim else n for i, n in enumerate(shape))
    for piece in pieces:
        if piece.shape != expected:
            split = "" if dim is None else f" in {len(pieces)} shards split along dimension {dim}; is one missing?"
            raise UserError(f"{piece.file}: tensor {piece.name} has the shape {list(piece.shape)}, "
                            f"but the config asks for {list(shape)}{split}")


def _check_the_rest(shards, known, tied):
    """UserError for a tensor that no parameter takes, unless the others imply it."""
    for path, tensors in shards:
        for name, stored in tensors.items():
            if name in known or name.endswith("rotary_emb.inv_freq") or name == "rope.freqs":
                continue
            if not (tied and name == "lm_head.weight"):
                raise UserError(f"{stored.file}: tensor {name} is unexpected; LLaMA has no such weight")
            if not torch.equal(stored.read(), tensors["model.embed_tokens.weight"].read()):
                raise UserError(f"{stored.file}: tensor {name} is not the embedding, though config.json ties the two")


def _read(pieces, dim, meta_heads):
    """One parameter from its pieces, in Hugging Face's order; mapped, not copied, where one piece is all of it."""
    tensors = []
    for piece in pieces:
        tensor = piece.read()
        if tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            raise UserError(f"{piece.file}: tensor {piece.name} holds {tensor.dtype}, not floating-point numbers")
        if not all_finite(tensor):
            raise UserError(f"{piece.file}: tensor {piece.name} has NaN or infinite values")
        tensors.append(tensor)
    tensor = tensors[0] if dim is None or len(tensors) == 1 else torch.cat(tensors, dim)
    if meta_heads:  # Meta pairs neighbouring rows for the rotary embedding, Hugging Face the two halves of a head
        tensor = tensor.unflatten(0, (meta_heads, -1, 2)).transpose(1, 2).flatten(0, 2)  # [H, K/2, 2, D] -> [H*K, D]
    return tensor


def fill(module, weights, prefix="", dtype=None, device="cpu"):
    """Gives a module that was built on the meta device its parameters, each from `weights[prefix + name]()`.

    Without a change of dtype or device nothing is copied: memory-mapped weights stay mapped. Shared parameters
    stay shared. Returns the module.
    """
    made = {}
    for name, old in list(module.named_parameters(remove_duplicate=False)):
        if id(old) not in made:
            made[id(old)] = nn.Parameter(weights[prefix + name]().to(device=device, dtype=dtype))
        owner, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(owner), leaf, made[id(old)])
    return module


def load_pretrained(folder, dtype=None, device="cpu"):
    """The float model in `folder`; `dtype` None keeps the checkpoint's own (its embedding's, where they differ)."""
    config, weights = open_weights(folder)
    with torch.device("meta"):
        model = Llama(config)
    fill(model, weights, dtype=dtype, device=device)
    return model.to(model.model.embed_tokens.weight.dtype)


def save_pretrained(model, folder):
    """Writes a float model as a Hugging Face folder; other files in it, such as the tokenizer, stay."""
    folder = pathlib.Path(folder)
    with written_whole(folder / "model.safetensors") as path:
        tensors = {name: p.detach().contiguous() for name, p in model.named_parameters()}
        safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
    write_config(model.config, folder)


def write_config(config, folder, extra={}):
    """Writes `config.json` with Hugging Face's fields and the `extra` ones."""
    fields = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
              **dataclasses.asdict(config), **extra}
    with written_whole(pathlib.Path(folder) / "config.json") as path:
        path.write_text(json.dumps(fields, indent=1) + "\n", encoding="utf-8")


def compute_dtype(stored, device):
    """The dtype to compute in where the weights are `stored`: bfloat16 only where `device` multiplies it natively.

    Elsewhere float32: a CPU without bfloat16 instructions takes five times as long to multiply in bfloat16, and
    float16 cannot be trained in without rescaling the loss.
    """
    if torch.device(device).type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if native and stored.itemsize == 2 else torch.promote_types(stored, torch.float32)


def check_device(device):
    """Raises UserError when PyTorch cannot compute on `device` here."""
    try:
        torch.zeros(1, device=device).item()  # meta allocates, but holds no numbers
    except (RuntimeError, AssertionError) as e:
        raise UserError(f"--device {device} cannot be used here: {str(e).splitlines()[0]}; try --device cpu") from None
