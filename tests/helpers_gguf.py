"""GGUF files as others make them, and what a file says by the gguf package alone.

The oracles share no code with formats/: the package's reader and `dequantize`, and a LLaMA and a
tokenizer that know nothing but the file. llama.cpp itself reads such files in check_llamacpp.py.
"""

import dataclasses
import itertools

import numpy as np
import pytest
import sentencepiece
import torch
from fixtures_gguf import TEXTS
from helpers import reference_frequencies

import formats
from formats import fingerprint, load_model
from formats.adapter import save_adapter
from formats.gguf import gguf_name
from llama import LINEARS, Llama
from qalora import adapter_parameters, add_adapters
from text.tokenizer import load_tokenizer

gguf = pytest.importorskip("gguf", reason="needs gguf: pip install gguf")


Type = gguf.GGMLQuantizationType


TEMPLATE = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"


class FromFile:
    """What a GGUF file says, by the gguf package's reader and its `dequantize`."""

    def __init__(self, path):
        reader = gguf.GGUFReader(path)
        self.metadata = {name: field.contents() for name, field in reader.fields.items()}
        self.tensors = {t.name: t for t in reader.tensors}
        self.raw = {name: t.data.tobytes() for name, t in self.tensors.items()}

    def weight(self, name):
        tensor = self.tensors[f"{name}.weight"]
        return gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float64)

    def logits(self, tokens):
        """LLaMA as llama.cpp computes it (the rotary embedding turns neighbouring channels), in
        float64: [T, V]."""
        m = {key.removeprefix("llama."): value for key, value in self.metadata.items()}
        heads, eps = m["attention.head_count"], m["attention.layer_norm_rms_epsilon"]
        size, T = m.get("attention.key_length", m["embedding_length"] // heads), len(tokens)
        assert size == m["rope.dimension_count"] == m.get("attention.value_length", size)
        shared = heads // m["attention.head_count_kv"]
        frequencies = m["rope.freq_base"] ** (-np.arange(0, size, 2) / size)
        frequencies /= m.get("rope.scaling.factor", m.get("rope.scale_linear", 1))
        if "rope_freqs.weight" in self.tensors:
            frequencies /= self.weight("rope_freqs")
        angles = np.outer(np.arange(T), frequencies)
        turn = np.exp(1j * angles)[:, None]  # [T, 1, K/2]

        def norm(x, name):
            return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * self.weight(name)

        def rotated(x):
            z = (x[..., 0::2] + 1j * x[..., 1::2]) * turn
            return np.stack([z.real, z.imag], -1).reshape(x.shape)

        x = self.weight("token_embd")[tokens]
        for i in range(m["block_count"]):
            y = norm(x, f"blk.{i}.attn_norm")
            q, k, v = ((y @ self.weight(f"blk.{i}.attn_{n}").T).reshape(T, -1, size) for n in "qkv")
            k, v = rotated(k).repeat(shared, axis=1), v.repeat(shared, axis=1)
            scores = np.einsum("thk,shk->hts", rotated(q), k) / size**0.5 + np.triu(
                np.full((T, T), -np.inf), 1
            )
            p = np.exp(scores - scores.max(-1, keepdims=True))
            y = np.einsum("hts,shk->thk", p / p.sum(-1, keepdims=True), v).reshape(T, -1)
            x = x + y @ self.weight(f"blk.{i}.attn_output").T
            y = norm(x, f"blk.{i}.ffn_norm")
            gate, up = (y @ self.weight(f"blk.{i}.ffn_{n}").T for n in ("gate", "up"))
            x = x + (gate / (1 + np.exp(-gate)) * up) @ self.weight(f"blk.{i}.ffn_down").T
        return (
            norm(x, "output_norm")
            @ self.weight("output" if "output.weight" in self.tensors else "token_embd").T
        )

    def tokenize(self, text):
        """llama.cpp's tokenizer: of all neighbours that make a piece, the best pair is joined
        first."""
        ids = {piece: i for i, piece in enumerate(self.metadata["tokenizer.ggml.tokens"])}
        scores, kinds = (self.metadata[f"tokenizer.ggml.{key}"] for key in ("scores", "token_type"))
        parts = list(" " * self.metadata["tokenizer.ggml.add_space_prefix"] + text)
        parts = ["▁" if part == " " else part for part in parts]
        while True:
            pairs = [
                (-scores[ids[a + b]], i)
                for i, (a, b) in enumerate(itertools.pairwise(parts))
                if a + b in ids
            ]
            if not pairs:
                break
            i = min(pairs)[1]
            parts[i : i + 2] = ["".join(parts[i : i + 2])]
        found = [
            [ids[p]] if p in ids else [ids[f"<0x{byte:02X}>"] for byte in p.encode()] for p in parts
        ]
        for part, group in zip(parts, found, strict=True):
            kind = gguf.TokenType.NORMAL if part in ids else gguf.TokenType.BYTE
            assert all(kinds[i] == kind for i in group)
        return sum(found, [])


def run_of(base, run, seed=1, targets=LINEARS, std=0.05):
    """A finished run over the model folder `base`, which becomes its base, with an adapter that is
    not zero."""
    run.mkdir()
    (run / "run.json").write_text("{}")
    base.rename(run / "base")
    model = add_adapters(load_model(run / "base"), 2, 4.0, targets)
    generator = torch.Generator().manual_seed(seed)
    for p in adapter_parameters(model).values():
        p.data.normal_(0, std, generator=generator)
    save_adapter(model, run / "adapter", base=fingerprint(run / "base"))
    return run


def relative_error(found, expected):
    return np.abs(found - expected).max() / np.abs(expected).max()


def our_logits(folder, tokens):
    with torch.no_grad():
        return load_model(folder, torch.float32)(torch.tensor([tokens]))[0].double().numpy()


TOKENS = [1, 290, 5, 77, 123, 280, 4, 260, 261, 12]
MANY_TOKENS = 30 * TOKENS  # far enough for slow rotary frequencies to matter


def sentencepiece_file(path, **options):
    settings = (
        dict(
            vocab_size=290,
            byte_fallback=True,
            normalization_rule_name="identity",
            model_type="bpe",
            remove_extra_whitespaces=False,
            hard_vocab_limit=False,
            minloglevel=2,
        )
        | options
    )
    with path.open("wb") as f:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(TEXTS), model_writer=f, **settings
        )


def kind_of(processor, i):
    """GGUF's number for what kind of piece i is."""
    kinds = {"is_unknown": 2, "is_control": 3, "is_unused": 5, "is_byte": 6}
    return next((kind for name, kind in kinds.items() if getattr(processor, name)(i)), 1)


def rope_freqs(config, **changes):
    """The tensor of that name, float32 [K/2]; `changes` are of the rope scaling."""
    scaled = dataclasses.replace(config, rope_scaling=config.rope_scaling | changes)
    unscaled = dataclasses.replace(config, rope_scaling=None)
    with np.errstate(divide="ignore"):
        divisors = reference_frequencies(unscaled) / reference_frequencies(scaled)
    return divisors.astype(np.float32)


def quantize_file(path, config, tokenizer, head=Type.Q8_0, change=None, mixed=None):
    """A Q4_1 file as others make them, by the gguf package: its own quantizer, alignment, and
    metadata of its own.

    `change(metadata, tensors)` may spoil it: {key: (value, GGUFValueType)} and {name: (array,
    type)}. mixed: the types of tensors that have others, by the ends of their names.
    """
    V, U, F = gguf.GGUFValueType, gguf.GGUFValueType.UINT32, gguf.GGUFValueType.FLOAT32
    own = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.files["tokenizer.model"])
    size = own.vocab_size()
    pieces, scores, kinds = [], [], []
    for i in range(config.vocab_size):
        pieces.append(own.id_to_piece(i) if i < size else f"<more{i}>")
        scores.append(own.get_score(i) if i < size else -1000.0)
        kinds.append(kind_of(own, i) if i < size else 5)
    metadata = {
        "general.alignment": (64, U),
        "general.name": ("Ours, or theirs", V.STRING),
        "llama.block_count": (config.num_hidden_layers, U),
        "llama.context_length": (77, U),
        "llama.embedding_length": (config.hidden_size, U),
        "llama.feed_forward_length": (config.intermediate_size, U),
        "llama.attention.head_count": (config.num_attention_heads, U),
        "llama.attention.head_count_kv": (config.num_key_value_heads, U),
        "llama.attention.layer_norm_rms_epsilon": (config.rms_norm_eps, F),
        "llama.rope.freq_base": (config.rope_theta, F),
        "llama.rope.dimension_count": (config.head_dim, U),
        "tokenizer.ggml.model": ("llama", V.STRING),
        "tokenizer.ggml.tokens": (pieces, V.ARRAY),
        "tokenizer.ggml.scores": (scores, V.ARRAY),
        "tokenizer.ggml.token_type": (kinds, V.ARRAY),
        "tokenizer.ggml.bos_token_id": (1, U),
        "tokenizer.ggml.eos_token_id": (2, U),
        "tokenizer.chat_template": (TEMPLATE, V.STRING),
    }
    if config.head_dim * config.num_attention_heads != config.hidden_size:
        metadata |= {f"llama.attention.{k}_length": (config.head_dim, U) for k in ("key", "value")}
    rng, tensors = np.random.default_rng(3), {}
    scaling = config.rope_scaling or {"rope_type": None}
    if scaling["rope_type"] == "linear":
        metadata["llama.rope.scaling.type"] = "linear", V.STRING
        metadata["llama.rope.scaling.factor"] = scaling["factor"], F
    elif scaling["rope_type"] == "llama3":
        tensors["rope_freqs.weight"] = rope_freqs(config), Type.F32
    for name, p in Llama(config).named_parameters():
        name = gguf_name(name)
        w = (rng.normal(0, 0.2, p.shape) + (p.dim() == 1)).astype(np.float32)
        kind = head if name == "output.weight" else Type.Q4_1
        if p.dim() == 1:
            kind = Type.F32
        for end, other in (mixed or {}).items():
            kind = other if name.endswith(f"{end}.weight") else kind
        tensors[name] = blocks_of(w, kind, rng), kind
    if change:
        change(metadata, tensors)
    writer = gguf.GGUFWriter(path, metadata.pop("general.architecture", ("llama",))[0])
    writer.data_alignment = 64
    for key, (value, kind) in metadata.items():
        writer.add_key_value(key, value, kind)
    for name, (array, kind) in tensors.items():
        writer.add_tensor(name, array, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def blocks_of(w, kind, rng):
    """A matrix in a type; any bytes with small scales where the package only reads the type."""
    numbers = {Type.Q4_K: [0, 2], Type.Q5_K: [0, 2], Type.Q6_K: [208]}.get(kind)
    if numbers is None:
        return gguf.quantize(w, kind)
    size = gguf.GGML_QUANT_SIZES[kind][1]
    blocks = rng.integers(0, 256, (w.shape[0], w.shape[1] // 256, size), dtype=np.uint8)
    for at in numbers:
        small = rng.uniform(0.5, 1, blocks.shape[:2]) * (0.0004 if len(numbers) == 2 else 0.0001)
        small = small.astype(np.float16)[..., None].view(np.uint8)
        blocks[..., at : at + 2] = small
    return blocks.reshape(w.shape[0], -1)


def put_tensor(name, array, kind):
    return lambda metadata, tensors: tensors.update({name: (array, kind)})


def imported(file, tokenizer_file, folder):
    folder.mkdir()
    formats.check_tokenizer(file, load_tokenizer(tokenizer_file))
    formats.import_base(file, folder)
    (folder / "tokenizer.model").write_bytes(tokenizer_file.read_bytes())
    return folder


def assert_only_offsets_differ(before, after):
    """Of two GGUF files: in every block's linear layers the offsets, bytes 2 and 3 of 20, and
    nothing anywhere else."""
    assert after.metadata == before.metadata and after.raw.keys() == before.raw.keys()
    for name in before.tensors:
        if name.startswith("blk.") and "norm" not in name:
            old, new = (
                np.frombuffer(raw[name], np.uint8).reshape(-1, 20)
                for raw in (before.raw, after.raw)
            )
            assert np.array_equal(np.delete(old, [2, 3], 1), np.delete(new, [2, 3], 1)), name
            assert not np.array_equal(old, new), name
        else:
            assert after.raw[name] == before.raw[name], name
