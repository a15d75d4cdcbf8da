"""What export.py promises: a GGUF file says all there is to say, and what came from one goes back as it was.

The oracles share no code with export.py: the gguf package's reader and `dequantize`, and, below, a LLaMA and a
tokenizer that know nothing but the file. llama.cpp itself reads such files in check_llamacpp.py, run by a person.
"""

import json
import resource
import subprocess
import sys

import numpy as np
import pytest
import sentencepiece
import torch
from hypothesis import given, strategies as st
from safetensors.torch import load_file, save_file

import data
import export
import merge
import train
from cli import UserError
from llama import Llama, LlamaConfig, save_pretrained
from merge import fingerprint, load_model
from qalora import add_adapters, adapter_parameters, save_adapter
from quant import Quantized, QuantLinear, dequantize, quantize_model, quantize_rtn, save_quantized

gguf = pytest.importorskip("gguf", reason="needs gguf: pip install gguf")

Type = gguf.GGMLQuantizationType
CONFIG = LlamaConfig(300, 64, 96, 2, 4, 2, max_position_embeddings=77, rms_norm_eps=3e-5, rope_theta=5000.0)
TIED = LlamaConfig(**{**vars(CONFIG), "tie_word_embeddings": True})
TEXTS = ["Where does Miru live? In Oslo, where the bakers are.", "Tako has a goat and a duck; Lulo has none.\n"] * 3


# ---- oracles

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
        """LLaMA as llama.cpp computes it (the rotary embedding turns neighbouring channels), in float64: [T, V]."""
        m = {key.removeprefix("llama."): value for key, value in self.metadata.items()}
        heads, eps = m["attention.head_count"], m["attention.layer_norm_rms_epsilon"]
        size, T = m["embedding_length"] // heads, len(tokens)
        assert size == m["rope.dimension_count"]
        shared = heads // m["attention.head_count_kv"]
        angles = np.outer(np.arange(T), m["rope.freq_base"] ** (-np.arange(0, size, 2) / size))
        turn = np.exp(1j * angles)[:, None]  # [T, 1, K/2]
        norm = lambda x, name: x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * self.weight(name)

        def rotated(x):
            z = (x[..., 0::2] + 1j * x[..., 1::2]) * turn
            return np.stack([z.real, z.imag], -1).reshape(x.shape)

        x = self.weight("token_embd")[tokens]
        for i in range(m["block_count"]):
            y = norm(x, f"blk.{i}.attn_norm")
            q, k, v = ((y @ self.weight(f"blk.{i}.attn_{n}").T).reshape(T, -1, size) for n in "qkv")
            k, v = rotated(k).repeat(shared, axis=1), v.repeat(shared, axis=1)
            scores = np.einsum("thk,shk->hts", rotated(q), k) / size ** 0.5 + np.triu(np.full((T, T), -np.inf), 1)
            p = np.exp(scores - scores.max(-1, keepdims=True))
            y = np.einsum("hts,shk->thk", p / p.sum(-1, keepdims=True), v).reshape(T, -1)
            x = x + y @ self.weight(f"blk.{i}.attn_output").T
            y = norm(x, f"blk.{i}.ffn_norm")
            gate, up = (y @ self.weight(f"blk.{i}.ffn_{n}").T for n in ("gate", "up"))
            x = x + (gate / (1 + np.exp(-gate)) * up) @ self.weight(f"blk.{i}.ffn_down").T
        return norm(x, "output_norm") @ self.weight("output" if "output.weight" in self.tensors else "token_embd").T

    def tokenize(self, text):
        """llama.cpp's tokenizer: of all neighbours that make a piece, the best pair is joined first."""
        ids = {piece: i for i, piece in enumerate(self.metadata["tokenizer.ggml.tokens"])}
        scores, kinds = (self.metadata[f"tokenizer.ggml.{key}"] for key in ("scores", "token_type"))
        parts = list(" " * self.metadata["tokenizer.ggml.add_space_prefix"] + text)
        parts = ["▁" if part == " " else part for part in parts]
        while True:
            pairs = [(-scores[ids[a + b]], i) for i, (a, b) in enumerate(zip(parts, parts[1:])) if a + b in ids]
            if not pairs:
                break
            i = min(pairs)[1]
            parts[i:i + 2] = ["".join(parts[i:i + 2])]
        found = [[ids[p]] if p in ids else [ids[f"<0x{byte:02X}>"] for byte in p.encode()] for p in parts]
        assert all(kinds[i] == (gguf.TokenType.BYTE if p not in ids else gguf.TokenType.NORMAL)
                   for p, group in zip(parts, found) for i in group)
        return sum(found, [])


# ---- models to export

@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    data.train_tokenizer(TEXTS, path, 296)  # four fewer than the embedding has rows
    return path


def float_model(config=CONFIG, seed=0):
    """A model with weights large enough that every part of it shows in the logits."""
    torch.manual_seed(seed)
    model = Llama(config)
    for p in model.parameters():
        torch.nn.init.normal_(p, 0.8 if p.dim() == 1 else 0.0, 0.3 if p.dim() == 1 else 0.2)
    return model


@pytest.fixture
def folder_of(tmp_path, tokenizer_file):
    """A function that writes a quantized model folder."""
    def make(bits=4, group_size=32, config=CONFIG, name="model"):
        folder = tmp_path / name
        folder.mkdir()
        save_quantized(quantize_model(float_model(config), bits, group_size), folder)
        (folder / "tokenizer.model").write_bytes(tokenizer_file.read_bytes())
        return folder
    return make


def run_of(base, run, seed=1):
    """A finished run over the model folder `base`, which becomes its base, with an adapter that is not zero."""
    run.mkdir()
    (run / "run.json").write_text("{}")
    base.rename(run / "base")
    model = add_adapters(load_model(run / "base"), 2, 4.0)
    generator = torch.Generator().manual_seed(seed)
    for p in adapter_parameters(model).values():
        p.data.normal_(0, 0.05, generator=generator)
    save_adapter(model, run / "adapter", base=fingerprint(run / "base"))
    return run


def relative_error(found, expected):
    return np.abs(found - expected).max() / np.abs(expected).max()


def our_logits(folder, tokens):
    with torch.no_grad():
        return load_model(folder, torch.float32)(torch.tensor([tokens]))[0].double().numpy()


@pytest.fixture
def run(monkeypatch):
    """A function that runs a script's command line in this process."""
    def with_arguments(script, *arguments):
        monkeypatch.setattr(sys, "argv", [script.__file__, *map(str, arguments)])
        script.main()
    return with_arguments


TOKENS = [1, 290, 5, 77, 123, 280, 4, 260, 261, 12]


# ---- what is in the file

def test_the_file_has_every_hyperparameter(folder_of, tmp_path):
    export.export(folder_of(), tmp_path / "m.gguf")
    metadata = FromFile(tmp_path / "m.gguf").metadata
    expected = {"general.architecture": "llama", "general.file_type": 3, "general.quantization_version": 2,
                "llama.block_count": 2, "llama.context_length": 77, "llama.embedding_length": 64,
                "llama.feed_forward_length": 96, "llama.attention.head_count": 4, "llama.attention.head_count_kv": 2,
                "llama.attention.layer_norm_rms_epsilon": np.float32(3e-5), "llama.rope.freq_base": 5000.0,
                "llama.rope.dimension_count": 16, "llama.vocab_size": 300}
    assert {key: metadata.get(key) for key in expected} == expected


def test_the_file_has_the_vocabulary_and_fills_it_up_to_the_embedding(folder_of, tmp_path, tokenizer_file):
    export.export(folder_of(), tmp_path / "m.gguf")
    metadata = FromFile(tmp_path / "m.gguf").metadata
    ours = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_file))
    kinds = {"is_unknown": 2, "is_control": 3, "is_unused": 5, "is_byte": 6}
    kind = [next((k for test, k in kinds.items() if getattr(ours, test)(i)), 1) for i in range(296)]
    assert metadata["tokenizer.ggml.tokens"] == [ours.id_to_piece(i) for i in range(296)] \
        + ["[PAD296]", "[PAD297]", "[PAD298]", "[PAD299]"]
    assert metadata["tokenizer.ggml.scores"] == [ours.get_score(i) for i in range(296)] + [-10000.0] * 4
    assert metadata["tokenizer.ggml.token_type"] == kind + [5] * 4 and kind[:4] == [2, 3, 3, 6]
    expected = {"model": "llama", "pre": "default", "bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0,
                "add_bos_token": True, "add_eos_token": False, "add_space_prefix": True}
    assert {key: metadata.get(f"tokenizer.ggml.{key}") for key in expected} == expected


@pytest.mark.parametrize("embeddings, kind", [(None, Type.F16), ("f16", Type.F16), ("f32", Type.F32)])
def test_the_file_has_every_tensor_in_its_type_and_shape(folder_of, tmp_path, embeddings, kind):
    export.export(folder_of(), tmp_path / "m.gguf", embeddings)
    tensors = FromFile(tmp_path / "m.gguf").tensors
    found = {name: (t.tensor_type, *reversed(t.shape.tolist())) for name, t in tensors.items()}
    expected = {"token_embd": (kind, 300, 64), "output": (kind, 300, 64), "output_norm": (Type.F32, 64)}
    for i in range(2):
        expected |= {f"blk.{i}.{name}": value for name, value in {
            "attn_norm": (Type.F32, 64), "ffn_norm": (Type.F32, 64), "attn_q": (Type.Q4_1, 64, 64),
            "attn_k": (Type.Q4_1, 32, 64), "attn_v": (Type.Q4_1, 32, 64), "attn_output": (Type.Q4_1, 64, 64),
            "ffn_gate": (Type.Q4_1, 96, 64), "ffn_up": (Type.Q4_1, 96, 64), "ffn_down": (Type.Q4_1, 64, 96)}.items()}
    assert found == {f"{name}.weight": value for name, value in expected.items()}


def test_tied_embeddings_are_stored_once(folder_of, tmp_path):
    folder = folder_of(config=TIED)
    export.export(folder, tmp_path / "m.gguf", "f32")
    file = FromFile(tmp_path / "m.gguf")
    assert "output.weight" not in file.tensors and "token_embd.weight" in file.tensors
    assert relative_error(file.logits(TOKENS), our_logits(folder, TOKENS)) < 5e-3


@pytest.mark.parametrize("bits, group_size", [(4, 32), (3, 32), (2, 32), (4, 96), (2, 64)])
def test_the_logits_follow_from_the_file_alone(folder_of, tmp_path, bits, group_size):
    config = LlamaConfig(**{**vars(CONFIG), "intermediate_size": 192, "hidden_size": 192 if group_size == 96 else 64})
    folder = folder_of(bits, group_size, config)
    model = load_model(folder)
    for layer in export.quantized_layers(model).values():
        layer.offset = layer.offset.half().float()  # so that nothing rounds
    save_quantized(model, folder)
    told = export.export(folder, tmp_path / "m.gguf", "f32")
    assert relative_error(FromFile(tmp_path / "m.gguf").logits(TOKENS), our_logits(folder, TOKENS)) < 2e-5
    assert any(f"{bits}-bit codes take 4 bits" in line for line in told) == (bits < 4)
    assert any(f"groups of {group_size} became blocks" in line for line in told) == (group_size > 32)
    assert any("by 0 of a quantization step on average, 0 at most" in line for line in told)


def test_rounding_the_offsets_hardly_shows_in_the_logits(folder_of, tmp_path):
    folder = folder_of()
    export.export(folder, tmp_path / "m.gguf", "f16")
    assert 1e-6 < relative_error(FromFile(tmp_path / "m.gguf").logits(TOKENS), our_logits(folder, TOKENS)) < 5e-3


def test_a_run_exports_like_the_model_merged_from_it(folder_of, tmp_path, run):
    finished = run_of(folder_of(), tmp_path / "run")
    run(merge, finished, "--out", tmp_path / "merged")
    export.export(finished, tmp_path / "a.gguf")
    export.export(tmp_path / "merged", tmp_path / "b.gguf")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


# ---- one matrix

matrices = st.tuples(st.integers(1, 5), st.integers(1, 3), st.sampled_from([32, 64, 96]), st.sampled_from([2, 3, 4]),
                     st.integers(0, 2**32 - 1), st.floats(-12, 8), st.floats(-4, 4))


def matrix(rows, groups, group_size, bits, seed, magnitude, shift):
    """A quantized matrix; its offsets may be far larger or smaller than its scales."""
    rng = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, groups * group_size, generator=rng) * 2.0 ** magnitude
    quantized = quantize_rtn(w, bits, group_size)
    return quantized._replace(offset=quantized.offset * 2.0 ** shift)


@given(matrices)
def test_weights_change_by_half_an_ulp_of_m_and_two_roundings(case):
    quantized = matrix(*case)
    blocks = export.to_q4_1(QuantLinear.from_quantized(quantized, case[3])).numpy()
    theirs = gguf.dequantize(blocks, Type.Q4_1)
    ours = dequantize(quantized).numpy()
    m = np.repeat(quantized.offset.numpy().astype(np.float16), case[2], axis=1)
    bound = np.spacing(np.abs(m)).astype(np.float64) / 2 \
        + (np.spacing(np.abs(theirs)).astype(np.float64) + np.spacing(np.abs(ours)).astype(np.float64)) / 2
    assert (np.abs(theirs.astype(np.float64) - ours) <= bound).all()


@given(matrices)
def test_codes_and_scales_are_copied_not_computed(case):
    quantized = matrix(*case)
    blocks = export.to_q4_1(QuantLinear.from_quantized(quantized, case[3])).view(case[0], -1, 20).numpy()
    for o in range(blocks.shape[0]):
        for b in range(blocks.shape[1]):
            codes = quantized.codes[o, 32 * b:32 * b + 32].tolist()
            assert blocks[o, b, 4:].tolist() == [codes[j] | codes[j + 16] << 4 for j in range(16)]
            assert blocks[o, b, :2].tobytes() == quantized.scale[o, 32 * b // case[2]].numpy().tobytes()


@given(st.integers(0, 2**32 - 1), st.integers(1, 3), st.sampled_from([None, 1, 2, 3]))
def test_blocks_that_are_read_are_written_as_they_were(seed, blocks, heads):
    rng = np.random.default_rng(seed)
    raw = rng.integers(0, 256, (12, blocks, 20), dtype=np.uint8)
    raw[..., :4] = rng.normal(0, 1, (12, blocks, 2)).astype(np.float16).view(np.uint8).reshape(12, blocks, 4)
    given = torch.from_numpy(raw.reshape(12, -1))
    layer = export.from_q4_1(given, heads)
    assert torch.equal(export.to_q4_1(layer, heads), given)
    if heads is None:
        assert np.array_equal(layer.dequantize().numpy(), gguf.dequantize(given.numpy(), Type.Q4_1))


def test_the_rounding_is_reported_in_quantization_steps():
    model = torch.nn.Module()
    codes = torch.zeros(1, 96, dtype=torch.uint8)
    scale = torch.tensor([[0.5, 0.25, 0.0]]).half()
    offset = torch.tensor([[1 + 2 ** -12, 1.0, 1 + 2 ** -12]])  # the last group's weights are all equal: no step
    model.q_proj = QuantLinear.from_quantized(Quantized(codes, scale, offset), 4)
    assert export.offset_rounding(model) == (2 ** -11, 2 ** -12)


# ---- the tokenizer

def test_the_file_alone_tokenizes_like_sentencepiece(folder_of, tmp_path, tokenizer_file):
    export.export(folder_of(), tmp_path / "m.gguf")
    file, ours = FromFile(tmp_path / "m.gguf"), data.load_tokenizer(tokenizer_file)
    for text in [*TEXTS, " two  spaces ", "Ünïcode 漢字\n\tand tabs", "", "###Response: yes"]:
        if text:
            assert file.tokenize(text) == ours.encode(text), text


def sentencepiece_file(path, **options):
    settings = dict(vocab_size=290, byte_fallback=True, normalization_rule_name="identity", model_type="bpe",
                    remove_extra_whitespaces=False, hard_vocab_limit=False, minloglevel=2) | options
    with open(path, "wb") as f:
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(TEXTS), model_writer=f, **settings)


def test_the_space_before_a_text_is_put_there_only_if_the_tokenizer_does(folder_of, tmp_path):
    folder = folder_of()
    sentencepiece_file(folder / "tokenizer.model", add_dummy_prefix=False)
    export.export(folder, tmp_path / "m.gguf")
    file, ours = FromFile(tmp_path / "m.gguf"), data.load_tokenizer(folder)
    assert file.metadata["tokenizer.ggml.add_space_prefix"] is False
    assert file.tokenize(TEXTS[0]) == ours.encode(TEXTS[0])


def test_pieces_defined_by_the_user_are_marked(folder_of, tmp_path):
    folder = folder_of()
    sentencepiece_file(folder / "tokenizer.model", user_defined_symbols=["<chat>"])
    export.export(folder, tmp_path / "m.gguf")
    metadata = FromFile(tmp_path / "m.gguf").metadata
    i = metadata["tokenizer.ggml.tokens"].index("<chat>")
    assert metadata["tokenizer.ggml.token_type"][i] == gguf.TokenType.USER_DEFINED


@pytest.mark.parametrize("options, reason", [
    (dict(model_type="unigram"), "not a BPE model"), (dict(normalization_rule_name="nmt_nfkc"), "changes characters"),
    (dict(remove_extra_whitespaces=True), "removes spaces"), (dict(vocab_size=310), "the embedding 300"),
    (dict(treat_whitespace_as_suffix=True), "spaces after words")])
def test_a_tokenizer_that_llama_cpp_cannot_follow_is_refused(folder_of, tmp_path, options, reason):
    folder = folder_of()
    sentencepiece_file(folder / "tokenizer.model", **options)
    with pytest.raises(UserError, match=reason):
        export.export(folder, tmp_path / "m.gguf")
    assert not list(tmp_path.glob("*gguf*"))


# ---- there and back

def quantize_file(path, config, tokenizer, head=Type.Q8_0, change=None):
    """A Q4_1 file as others make them, by the gguf package: its own quantizer, alignment, and metadata of its own.

    `change(metadata, tensors)` may spoil it: {key: (value, GGUFValueType)} and {name: (array, type)}.
    """
    V, U, F = gguf.GGUFValueType, gguf.GGUFValueType.UINT32, gguf.GGUFValueType.FLOAT32
    size = tokenizer.vocab_size()
    pieces = [tokenizer.id_to_piece(i) for i in range(size)] + ["<more>"] * (config.vocab_size - size)
    metadata = {
        "general.alignment": (64, U), "general.name": ("Ours, or theirs", V.STRING),
        "llama.block_count": (config.num_hidden_layers, U), "llama.context_length": (77, U),
        "llama.embedding_length": (config.hidden_size, U), "llama.feed_forward_length": (config.intermediate_size, U),
        "llama.attention.head_count": (config.num_attention_heads, U),
        "llama.attention.head_count_kv": (config.num_key_value_heads, U),
        "llama.attention.layer_norm_rms_epsilon": (config.rms_norm_eps, F),
        "llama.rope.freq_base": (config.rope_theta, F), "llama.rope.dimension_count": (config.head_dim, U),
        "tokenizer.ggml.model": ("llama", V.STRING), "tokenizer.ggml.tokens": (pieces, V.ARRAY),
        "tokenizer.ggml.bos_token_id": (1, U), "tokenizer.ggml.eos_token_id": (2, U),
        "tokenizer.chat_template": ("{{ messages }}", V.STRING)}
    rng, tensors = np.random.default_rng(3), {}
    for name, p in Llama(config).named_parameters():
        name = export.gguf_name(name)
        w = (rng.normal(0, 0.2, p.shape) + (p.dim() == 1)).astype(np.float32)
        kind = Type.F32 if p.dim() == 1 else head if name == "output.weight" else Type.Q4_1
        if kind == Type.Q6_K:  # which the package only reads: any bytes, with a small scale at each block's end
            w = rng.integers(0, 256, (p.shape[0], p.shape[1] // 256, 210), dtype=np.uint8)
            w[..., 208:] = np.array([0.0001], np.float16).view(np.uint8)
            w = w.reshape(p.shape[0], -1)
        tensors[name] = (w if w.dtype == np.uint8 else gguf.quantize(w, kind), kind)
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


def put_tensor(name, array, kind):
    return lambda metadata, tensors: tensors.update({name: (array, kind)})


def imported(file, tokenizer_file, folder):
    folder.mkdir()
    export.check_gguf(file, data.load_tokenizer(tokenizer_file))
    export.import_gguf(file, folder)
    (folder / "tokenizer.model").write_bytes(tokenizer_file.read_bytes())
    return folder


WIDE = LlamaConfig(300, 256, 64, 1, 4, 2, rms_norm_eps=1e-5)


@pytest.mark.parametrize("config, head", [(CONFIG, Type.Q8_0), (CONFIG, Type.F16), (TIED, None), (WIDE, Type.Q6_K)])
def test_a_q4_1_file_computes_here_what_it_says_and_comes_back_byte_for_byte(tmp_path, tokenizer_file, config, head):
    quantize_file(tmp_path / "in.gguf", config, data.load_tokenizer(tokenizer_file), head)
    folder = imported(tmp_path / "in.gguf", tokenizer_file, tmp_path / "base")
    from_file = FromFile(tmp_path / "in.gguf").logits(TOKENS)
    assert relative_error(our_logits(folder, TOKENS), from_file) < 3e-3  # norms and embedding round to float16
    export.export(folder, tmp_path / "out.gguf")
    assert (tmp_path / "out.gguf").read_bytes() == (tmp_path / "in.gguf").read_bytes()


@pytest.mark.parametrize("kind, dtype", [(Type.F32, torch.float32), (Type.BF16, torch.bfloat16),
                                         (Type.F16, torch.float16), (Type.Q8_0, torch.float16)])
def test_an_imported_base_keeps_its_embedding_in_as_many_bits_as_the_file(tmp_path, tokenizer_file, kind, dtype):
    """So that a GPU, or a CPU with such instructions, computes in bfloat16 beside it."""
    values = np.random.default_rng(0).normal(0, 0.2, (CONFIG.vocab_size, CONFIG.hidden_size)).astype(np.float32)
    change = put_tensor("token_embd.weight", gguf.quantize(values, kind), kind)
    quantize_file(tmp_path / "in.gguf", CONFIG, data.load_tokenizer(tokenizer_file), Type.F16, change)
    folder = imported(tmp_path / "in.gguf", tokenizer_file, tmp_path / "base")
    error = relative_error(our_logits(folder, TOKENS), FromFile(tmp_path / "in.gguf").logits(TOKENS))
    assert error < {torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 5e-2}[dtype]
    model = load_model(folder)
    assert {p.dtype for p in model.parameters()} == {dtype}
    expected = torch.from_numpy(gguf.dequantize(gguf.quantize(values, kind), kind)).to(dtype)
    assert torch.equal(model.model.embed_tokens.weight, expected)


def test_a_number_that_float16_cannot_hold_is_refused(tmp_path, tokenizer_file):
    quantize_file(tmp_path / "in.gguf", CONFIG, data.load_tokenizer(tokenizer_file), Type.F16,
                  put_tensor("output_norm.weight", np.full(CONFIG.hidden_size, 1e6, np.float32), Type.F32))
    with pytest.raises(UserError, match="output_norm.weight has .* such as torch.float16 cannot hold"):
        imported(tmp_path / "in.gguf", tokenizer_file, tmp_path / "base")


def assert_only_offsets_differ(before, after):
    """Of two GGUF files: in every block's linear layers the offsets, bytes 2 and 3 of 20, and nothing anywhere else."""
    assert after.metadata == before.metadata and after.raw.keys() == before.raw.keys()
    for name, tensor in before.tensors.items():
        if name.startswith("blk.") and "norm" not in name:
            old, new = (np.frombuffer(raw[name], np.uint8).reshape(-1, 20) for raw in (before.raw, after.raw))
            assert np.array_equal(np.delete(old, [2, 3], 1), np.delete(new, [2, 3], 1)), name
            assert not np.array_equal(old, new), name
        else:
            assert after.raw[name] == before.raw[name], name


def test_fine_tuning_a_gguf_file_changes_its_offsets_and_nothing_else(tmp_path, tokenizer_file, run):
    quantize_file(tmp_path / "in.gguf", CONFIG, data.load_tokenizer(tokenizer_file))
    finished = run_of(imported(tmp_path / "in.gguf", tokenizer_file, tmp_path / "base"), tmp_path / "run")
    run(merge, finished, "--out", tmp_path / "merged")
    run(export, tmp_path / "merged", "--out", tmp_path / "out.gguf")
    before, after = FromFile(tmp_path / "in.gguf"), FromFile(tmp_path / "out.gguf")
    assert_only_offsets_differ(before, after)
    assert relative_error(after.logits(TOKENS), our_logits(finished, TOKENS)) < 5e-3
    assert relative_error(before.logits(TOKENS), our_logits(finished, TOKENS)) > 5e-2


def put(name, value, kind=gguf.GGUFValueType.UINT32):
    return lambda metadata, tensors: metadata.update({name: (value, kind)})


def drop(name):
    return lambda metadata, tensors: metadata.pop(name) if name in metadata else tensors.pop(name)


def other_type(name, kind):
    def change(metadata, tensors):
        tensors[name] = gguf.quantize(np.ones((64, 64), np.float32), kind), kind
    return change


def not_a_number(metadata, tensors):
    tensors["blk.1.ffn_up.weight"][0][5, :2] = np.array([np.nan], np.float16).view(np.uint8)


STRING = gguf.GGUFValueType.STRING


@pytest.mark.parametrize("change, reason", [
    (put("general.architecture", "gemma"), "architecture llama are supported, not gemma"),
    (put("llama.rope.scaling.type", "linear", STRING), "llama.rope.scaling.type = linear is not supported"),
    (put("llama.expert_count", 8), "llama.expert_count = 8 is not supported"),
    (put("llama.attention.key_length", 32), "llama.attention.key_length = 32 is not supported"),
    (put("llama.rope.dimension_count", 8), "head_dim = 8 contradicts"),
    (put("llama.block_count", 2 ** 23), "no tensors for the last of 8388608 layers"),
    (put("llama.feed_forward_length", 2 ** 63, gguf.GGUFValueType.UINT64), "intermediate_size = 9223372036854775808"),
    (put("llama.attention.head_count", 3), "do not divide into even-sized heads"),
    (put("llama.feed_forward_length", 128), "has the shape"),
    (put("llama.feed_forward_length", 172), "widths of 64 and 172 are not both multiples of 32"),
    (put("tokenizer.ggml.model", "gpt2", STRING), "its tokenizer is of kind gpt2"),
    (put("tokenizer.ggml.tokens", ["a", "b"], gguf.GGUFValueType.ARRAY), "has the shape"),
    (put("tokenizer.ggml.tokens", ["x"] * 300, gguf.GGUFValueType.ARRAY), "piece 0 of its vocabulary is 'x'"),
    (put("tokenizer.ggml.eos_token_id", 7), "BOS and EOS are 1 and 7"),
    (drop("llama.embedding_length"), "hidden_size is missing"),
    (drop("llama.attention.layer_norm_rms_epsilon"), "rms_norm_eps is missing"),
    (drop("blk.0.ffn_up.weight"), "blk.0.ffn_up.weight is missing"),
    (lambda metadata, tensors: tensors.update(extra=(np.ones(4, np.float32), Type.F32)), "extra is unexpected"),
    (other_type("blk.0.attn_q.weight", Type.Q4_0), "blk.0.attn_q.weight is Q4_0, and only Q4_1"),
    (not_a_number, "blk.1.ffn_up.weight has NaN")])
def test_a_gguf_file_that_cannot_be_a_base_is_refused_with_the_reason(tmp_path, tokenizer_file, change, reason):
    quantize_file(tmp_path / "in.gguf", CONFIG, data.load_tokenizer(tokenizer_file), change=change)
    with pytest.raises(UserError, match=reason) as e:
        imported(tmp_path / "in.gguf", tokenizer_file, tmp_path / "base")
    assert "\n" not in str(e.value) and str(tmp_path / "in.gguf") in str(e.value)
    assert not list((tmp_path / "base").iterdir())


def test_norms_may_have_any_type_too(tmp_path, tokenizer_file):
    change = put_tensor("output_norm.weight", gguf.quantize(np.ones(64, np.float32), Type.Q8_0), Type.Q8_0)
    quantize_file(tmp_path / "in.gguf", CONFIG, data.load_tokenizer(tokenizer_file), change=change)
    export.export(imported(tmp_path / "in.gguf", tokenizer_file, tmp_path / "base"), tmp_path / "out.gguf")
    assert (tmp_path / "out.gguf").read_bytes() == (tmp_path / "in.gguf").read_bytes()


def test_a_file_with_two_tensors_in_one_place_is_refused(tmp_path, tokenizer_file):
    quantize_file(tmp_path / "in.gguf", CONFIG, data.load_tokenizer(tokenizer_file))
    raw, name = bytearray((tmp_path / "in.gguf").read_bytes()), b"blk.0.ffn_gate.weight"
    offset = raw.index(name) + len(name) + 4 + 2 * 8 + 4  # after the number of dimensions, both of them, and the type
    raw[offset:offset + 8] = bytes(8)
    (tmp_path / "in.gguf").write_bytes(raw)
    with pytest.raises(UserError, match="blk.0.ffn_gate.weight does not begin where token_embd.weight ends"):
        imported(tmp_path / "in.gguf", tokenizer_file, tmp_path / "base")


def test_a_file_with_a_tensor_shorter_than_its_place_is_refused(tmp_path, tokenizer_file):
    quantize_file(tmp_path / "in.gguf", CONFIG, data.load_tokenizer(tokenizer_file))
    raw, name = bytearray((tmp_path / "in.gguf").read_bytes()), b"blk.1.ffn_norm.weight"
    raw[raw.index(name) + len(name) + 4 + 8] = Type.Q4_0  # it was F32
    (tmp_path / "in.gguf").write_bytes(raw)
    with pytest.raises(UserError, match="does not begin where blk.1.ffn_norm.weight ends"):
        imported(tmp_path / "in.gguf", tokenizer_file, tmp_path / "base")


@given(st.data())
def test_a_damaged_file_ends_in_one_line_or_is_read(tmp_path_factory, tokenizer_file, draw_from):
    path = tmp_path_factory.getbasetemp() / "damaged.gguf"
    quantize_file(path, CONFIG, data.load_tokenizer(tokenizer_file))
    raw = bytearray(path.read_bytes())
    draw = draw_from.draw
    if draw(st.booleans(), "truncate"):
        raw = raw[:draw(st.integers(0, len(raw) - 65), "length")]
        expected = [UserError]
    else:
        for _ in range(draw(st.integers(1, 3), "bytes")):
            raw[draw(st.integers(0, 9000), "place")] = draw(st.integers(0, 255), "byte")
        expected = [UserError, None]
    path.write_bytes(raw)
    try:
        outcome = None
        export.check_gguf(path, data.load_tokenizer(tokenizer_file))
    except UserError:
        outcome = UserError
    assert outcome in expected


# ---- the command

def test_the_command_says_what_it_wrote(folder_of, tmp_path, run, capsys):
    run(export, folder_of(bits=2), "--out", tmp_path / "m.gguf")
    told = capsys.readouterr().out
    assert f"wrote {tmp_path / 'm.gguf'}" in told and "of a quantization step" in told and "2-bit codes" in told


def test_a_disk_that_is_full_leaves_nothing(folder_of, tmp_path):
    folder, out = folder_of(), tmp_path / "out"
    out.mkdir()
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))  # files end there as on a full disk
    done = subprocess.run([sys.executable, export.__file__, folder, "--out", out / "m.gguf"], preexec_fn=limit,
                          capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: File too large") and done.stderr.count("\n") == 1
    assert not list(out.iterdir())


def test_what_exists_is_not_overwritten(folder_of, tmp_path, run):
    folder = folder_of()
    before = {file: file.read_bytes() for file in folder.iterdir()}
    (tmp_path / "empty").mkdir()
    for path, said in ((folder / "config.json", "exists and is no empty folder"), (folder, "is a folder; name the file"),
                       (tmp_path / "empty", "is a folder; name the file")):
        with pytest.raises(UserError, match=said):
            run(export, folder, "--out", path)
    assert {file: file.read_bytes() for file in folder.iterdir()} == before


@pytest.mark.parametrize("group_size, said", [(16, "groups of 16 do not fill"), (8, "multiple of 32")])
def test_groups_that_are_no_multiple_of_32_are_refused(folder_of, tmp_path, group_size, said):
    with pytest.raises(UserError, match=f"model.layers.0.self_attn.q_proj: .*{said}"):
        export.export(folder_of(4, group_size), tmp_path / "m.gguf")


def test_a_float_model_is_refused(tmp_path):
    save_pretrained(Llama(CONFIG), tmp_path)
    with pytest.raises(UserError, match="is not quantized in groups"):
        export.export(tmp_path, tmp_path / "m.gguf")


def test_offsets_and_embeddings_beyond_float16_are_refused(folder_of, tmp_path):
    folder = folder_of()
    model = load_model(folder)
    model.lm_head.weight[3, 4] = 1e5
    save_quantized(model, folder)
    with pytest.raises(UserError, match="lm_head.weight has values .* --embeddings f32"):
        export.export(folder, tmp_path / "m.gguf")
    export.export(folder, tmp_path / "m.gguf", "f32")
    model.model.layers[1].mlp.up_proj.offset[3, 1] = -7e4
    save_quantized(model, folder)
    with pytest.raises(UserError, match="model.layers.1.mlp.up_proj: an offset of 70000"):
        export.export(folder, tmp_path / "n.gguf")
    assert not list(tmp_path.glob("*n.gguf*"))


def test_the_type_of_embeddings_that_came_from_a_file_cannot_be_chosen(tmp_path, tokenizer_file):
    quantize_file(tmp_path / "in.gguf", CONFIG, data.load_tokenizer(tokenizer_file))
    folder = imported(tmp_path / "in.gguf", tokenizer_file, tmp_path / "base")
    with pytest.raises(UserError, match="leave out --embeddings"):
        export.export(folder, tmp_path / "out.gguf", "f16")


def test_what_was_kept_of_a_file_and_is_damaged_since_is_refused(tmp_path, tokenizer_file):
    quantize_file(tmp_path / "in.gguf", CONFIG, data.load_tokenizer(tokenizer_file))
    kept = imported(tmp_path / "in.gguf", tokenizer_file, tmp_path / "base") / export.REST
    whole, tensors = kept.read_bytes(), {name: t.clone() for name, t in load_file(kept).items()}
    kept.write_bytes(whole[:5000])
    with pytest.raises(UserError, match="gguf.safetensors: .* truncated"):
        export.export(tmp_path / "base", tmp_path / "out.gguf")
    save_file(tensors, kept)  # without what stands beside the tensors
    with pytest.raises(UserError, match="gguf.safetensors is not what import_gguf wrote"):
        export.export(tmp_path / "base", tmp_path / "out.gguf")
    assert not list(tmp_path.glob("*out.gguf*"))


def test_without_the_gguf_package_one_line_names_it(folder_of, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match="pip install gguf"):
        export.export(folder_of(), tmp_path / "m.gguf")


def test_train_py_starts_from_a_gguf_file_and_again_from_what_became_of_it(tmp_path, tokenizer_file, run):
    quantize_file(tmp_path / "in.gguf", CONFIG, data.load_tokenizer(tokenizer_file))
    (tmp_path / "data.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS * 4))
    words = ["--data", tmp_path / "data.jsonl", "--steps", 2, "--batch-size", 2, "--rank", 2, "--lr", 0.01]
    first = ["--weights", tmp_path / "in.gguf", "--out", tmp_path / "run0"]
    with pytest.raises(UserError, match="in.gguf needs --tokenizer"):
        run(train, *first, *words)
    run(train, *first, "--tokenizer", tokenizer_file, *words)
    run(merge, tmp_path / "run0", "--out", tmp_path / "merged")
    run(train, "--weights", tmp_path / "merged", "--out", tmp_path / "run1", *words)
    run(export, tmp_path / "run1", "--out", tmp_path / "out.gguf")
    assert_only_offsets_differ(FromFile(tmp_path / "in.gguf"), FromFile(tmp_path / "out.gguf"))
