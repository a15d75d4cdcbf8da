"""Meta's own folders of LLaMA-1 to 3.2: params.json and model-parallel shards, consolidated.NN.pth.

Shards are joined, and the rotary order of the query and key rows is changed, on reading.
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable

import torch
from torch import Tensor

from cli.errors import UserError
from cli.files import read_json
from formats.files import Stored, checked_config, open_file, weight_files
from formats.huggingface import load_float, parameter_shapes, read_float
from llama import CONFIGS, LLAMA3_SCALING, Llama, LlamaConfig

FIELDS = {
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "norm_eps": "rms_norm_eps",
    "rope_theta": "rope_theta",
    "max_seq_len": "max_position_embeddings",
    "vocab_size": "vocab_size",
}
IGNORED = ("multiple_of", "ffn_dim_multiplier", "max_batch_size")  # the shapes tell
# What use_scaled_rope means in Meta's code, and the context of the models that have it
SCALED = {"rope_scaling": {**LLAMA3_SCALING, "factor": 8.0}, "max_position_embeddings": 131072}
LLAMA3_TOKENS = {"bos_token_id": 128000, "eos_token_id": 128001}
TENSORS = {  # Meta's name, and the dimension that shards are split along; None: each has all of it
    "model.embed_tokens": ("tok_embeddings", 1),  # LLaMA-3's along 0: see `embedding_split`
    "model.norm": ("norm", None),
    "lm_head": ("output", 0),
    "input_layernorm": ("attention_norm", None),
    "post_attention_layernorm": ("ffn_norm", None),
    "self_attn.q_proj": ("attention.wq", 0),
    "self_attn.k_proj": ("attention.wk", 0),
    "self_attn.v_proj": ("attention.wv", 0),
    "self_attn.o_proj": ("attention.wo", 1),
    "mlp.gate_proj": ("feed_forward.w1", 0),
    "mlp.down_proj": ("feed_forward.w2", 1),
    "mlp.up_proj": ("feed_forward.w3", 0),
}


def matches(path: pathlib.Path) -> bool:
    """Whether `path` is a folder with a params.json."""
    return (path / "params.json").exists()


def files(path: pathlib.Path) -> list[pathlib.Path]:
    """params.json and the files of weights."""
    return sorted([path / "params.json", *weight_files(path)])


def quantization_of(path: pathlib.Path) -> None:
    """None: a float model."""
    return None


def read_config(path: pathlib.Path) -> LlamaConfig:
    """The LlamaConfig in params.json, and in the tensors: it leaves some dimensions to them.

    Raises UserError for a broken file and for any field that asks for what is not computed here.
    """
    file, shards = path / "params.json", open_shards(path)
    values = told_values(file)
    split = embedding_split(shards, values.get("hidden_size"))
    rows, widths = (sizes(shards, "tok_embeddings.weight", dim) for dim in (0, 1))
    if values.get("vocab_size", -1) == -1:
        values["vocab_size"] = rows[0] if split == 1 else sum(rows)
    if values["vocab_size"] == 128256:
        values = {"max_position_embeddings": 8192, **values, **LLAMA3_TOKENS}
    values["intermediate_size"] = sum(sizes(shards, "layers.0.feed_forward.w1.weight", 0))
    values["tie_word_embeddings"] = is_tied(shards, values["vocab_size"])
    config = checked_config(file, values)
    width = sum(widths) if split == 1 else widths[0]
    if width != config.hidden_size:  # now, before the feed-forward width of too few shards counts
        raise UserError(
            f"{shards[-1][0]}: tensor tok_embeddings.weight is {width} wide up to this last shard, "
            f"but {file.name} asks for {config.hidden_size}; is a shard missing, or one of another "
            "model?"
        )
    return known_config(config) or config


def told_values(file: pathlib.Path) -> dict:
    """A LlamaConfig's fields that params.json tells; UserError for what is not computed here."""
    fields = {name: value for name, value in read_json(file).items() if value is not None}
    is_scaled = fields.pop("use_scaled_rope", False)
    if type(is_scaled) is not bool:
        raise UserError(f"{file}: use_scaled_rope = {json.dumps(is_scaled)} is not true or false")
    values = {"rms_norm_eps": 1e-5, "num_key_value_heads": fields.get("n_heads")}  # Meta's defaults
    if is_scaled:
        values |= SCALED
    for name, value in fields.items():
        if name in FIELDS:
            values[FIELDS[name]] = value
        elif name not in IGNORED:
            raise UserError(
                f"{file}: {name} = {json.dumps(value)} is not supported; LLaMA-1, 2 and 3 lack it"
            )
    return values


def known_config(config: LlamaConfig) -> LlamaConfig | None:
    """The one of CONFIGS that is `config` but for what params.json does not tell.

    That is the context of LLaMA-2, and the factor of LLaMA-3.2's rope scaling: Meta's code has 8,
    its own Hugging Face folders of the same weights 32.
    """
    for known in CONFIGS.values():
        untold = {"max_position_embeddings": config.max_position_embeddings}
        if known.rope_scaling and config.rope_scaling:
            untold["rope_scaling"] = config.rope_scaling
        if config == dataclasses.replace(known, **untold):
            return known
    return None


def embedding_split(shards: list, width: int) -> int:
    """The dimension that the embedding is split along: since LLaMA-3 its rows, before its width."""
    whole_rows = all(size == width for size in sizes(shards, "tok_embeddings.weight", 1))
    return 0 if whole_rows and len(shards) > 1 else 1


def is_tied(shards: list, vocab_size: int) -> bool:
    """Whether the output head is the embedding: left out, or stored again as LLaMA-3.2's is.

    LLaMA-1 and 2, of 32,000 pieces, have a head of their own; one that lacks it is incomplete.
    """
    heads = [tensors.get("output.weight") for _, tensors in shards]
    if not any(heads):
        return vocab_size != 32000
    tables = pieces_of(shards, "tok_embeddings.weight")
    for head, table in zip(heads, tables, strict=True):
        if head is None or head.shape != table.shape:
            return False
        a, b = head.read(), table.read()
        if a.dtype != b.dtype or not torch.equal(a, b):
            return False
    return True


def sizes(shards: list, name: str, dim: int) -> list[int]:
    """The size of a tensor along `dim` in every shard, 0 where it has no such dimension."""
    return [dict(enumerate(piece.shape)).get(dim, 0) for piece in pieces_of(shards, name)]


def open_shards(folder: pathlib.Path) -> list[tuple[pathlib.Path, dict[str, Stored]]]:
    """(path, tensors by name) of every shard, in order. A gap in the numbers is a missing file."""
    count = max(1, len(list(folder.glob("consolidated.[0-9][0-9].pth"))))
    paths = [folder / f"consolidated.{i:02d}.pth" for i in range(count)]
    return [(path, open_file(path)) for path in paths]


def pieces_of(shards: list, name: str) -> list[Stored]:
    """The tensor `name` of every shard; UserError where one lacks it."""
    for path, tensors in shards:
        if name not in tensors:
            raise UserError(f"{path}: tensor {name} is missing")
    return [tensors[name] for _, tensors in shards]


def meta_name(name: str) -> tuple[str, int | None]:
    """Meta's name of a parameter that Hugging Face calls `name`, and what it is split along."""
    module, prefix = name.removesuffix(".weight"), ""
    if module.startswith("model.layers."):
        _, _, layer, module = module.split(".", 3)
        prefix = f"layers.{layer}."
    meta, dim = TENSORS[module]
    return f"{prefix}{meta}.weight", dim


def open_weights(path: pathlib.Path) -> tuple[LlamaConfig, dict[str, Callable[[], Tensor]]]:
    """(config, {parameter name: a function that reads the tensor}); as in `huggingface`."""
    config, shards = read_config(path), open_shards(path)
    rotary_heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    weights, known = {}, set()
    for name, shape in parameter_shapes(config).items():
        stored_name, dim = meta_name(name)
        if stored_name == "tok_embeddings.weight":
            dim = embedding_split(shards, config.hidden_size)
        pieces = pieces_of(shards, stored_name)
        check_shapes(pieces, shape, dim)
        heads = rotary_heads.get(name.split(".")[-2])
        weights[name] = functools.partial(read_joined, pieces, dim, heads)
        known.add(stored_name)
    if config.tie_word_embeddings:
        known.add("output.weight")
    for _, tensors in shards:
        for name, stored in tensors.items():
            if name not in known and name != "rope.freqs":
                raise UserError(
                    f"{stored.file}: tensor {name} is unexpected; LLaMA has no such weight"
                )
    return config, weights


def check_shapes(pieces: list[Stored], shape: tuple, dim: int | None) -> None:
    """Raises UserError unless the pieces, split along `dim`, make a tensor of `shape`."""
    expected = tuple(n / len(pieces) if i == dim else n for i, n in enumerate(shape))
    for piece in pieces:
        if piece.shape != expected:
            split = f" in {len(pieces)} shards split along dimension {dim}; is one missing?"
            raise UserError(
                f"{piece.file}: tensor {piece.name} has the shape {list(piece.shape)}, but the "
                f"config asks for {list(shape)}{'' if dim is None else split}"
            )


def read_joined(pieces: list[Stored], dim: int | None, rotary_heads: int | None) -> Tensor:
    """A parameter in Hugging Face's order; mapped, not copied, where one piece is all of it."""
    tensors = [read_float(piece) for piece in pieces]
    whole = dim is None or len(tensors) == 1
    tensor = tensors[0] if whole else torch.cat(tensors, dim)
    if rotary_heads:  # Meta pairs neighbouring rows of a head, Hugging Face its two halves
        tensor = tensor.unflatten(0, (rotary_heads, -1, 2))  # [H, K/2, 2, D]
        tensor = tensor.transpose(1, 2).flatten(0, 2)  # [H*K, D]
    return tensor


def check(path: pathlib.Path) -> None:
    """Raises UserError for a tensor that is missing or of another shape; reads headers only."""
    open_weights(path)


def load_model(path: pathlib.Path, dtype: torch.dtype | None = None, device: str = "cpu") -> Llama:
    """The model; dtype None keeps the checkpoint's own."""
    return load_float(open_weights(path), dtype, device)
