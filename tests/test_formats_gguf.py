"""What came from a GGUF file goes back as it was, but for its offsets; what cannot be a base is
refused."""

import dataclasses
import types

import numpy as np
import pytest
import torch
from fixtures_gguf import CONFIG, LINEAR, LLAMA3, TIED, WIDE_HEADS
from helpers_gguf import (
    MANY_TOKENS,
    TOKENS,
    FromFile,
    Type,
    assert_only_offsets_differ,
    gguf,
    imported,
    our_logits,
    put_tensor,
    quantize_file,
    relative_error,
    rope_freqs,
    run_of,
)
from hypothesis import assume, given
from hypothesis import strategies as st

import export
import formats
import merge
from cli.errors import UserError
from formats import gguf_rope, load_model
from formats.files import write_config
from llama import LLAMA3_SCALING, LlamaConfig
from text.tokenizer import load_tokenizer

WIDE = LlamaConfig(300, 256, 64, 1, 4, 2, rms_norm_eps=1e-5)
STRING, FLOAT = gguf.GGUFValueType.STRING, gguf.GGUFValueType.FLOAT32


def put(name, value, kind=gguf.GGUFValueType.UINT32):
    return lambda metadata, tensors: metadata.update({name: (value, kind)})


@pytest.mark.parametrize(
    "config, head", [(CONFIG, Type.Q8_0), (CONFIG, Type.F16), (TIED, None), (WIDE, Type.Q6_K)]
)
def test_a_q4_1_file_computes_here_what_it_says_and_comes_back_byte_for_byte(
    tmp_path, tokenizer_file, config, head
):
    quantize_file(tmp_path / "in.gguf", config, load_tokenizer(tokenizer_file), head)
    folder = imported(tmp_path / "in.gguf", tokenizer_file, tmp_path / "base")
    from_file = FromFile(tmp_path / "in.gguf").logits(TOKENS)
    assert (
        relative_error(our_logits(folder, TOKENS), from_file) < 3e-3
    )  # norms and embedding round to float16
    export.export(folder, tmp_path / "out.gguf")
    assert (tmp_path / "out.gguf").read_bytes() == (tmp_path / "in.gguf").read_bytes()


@pytest.mark.parametrize("config", [WIDE_HEADS, LINEAR, LLAMA3])
def test_a_newer_llama_computes_here_what_its_file_says_and_comes_back_byte_for_byte(
    tmp_path, tokenizer_file, config
):
    quantize_file(tmp_path / "in.gguf", config, load_tokenizer(tokenizer_file))
    folder = imported(tmp_path / "in.gguf", tokenizer_file, tmp_path / "base")
    from_file = FromFile(tmp_path / "in.gguf").logits(MANY_TOKENS)
    assert relative_error(our_logits(folder, MANY_TOKENS), from_file) < 5e-3
    for read in (formats.read_config(tmp_path / "in.gguf"), formats.read_config(folder)):
        assert (read.head_dim, read.rope_scaling) == (config.head_dim, config.rope_scaling)
    unscaled = dataclasses.replace(config, rope_scaling=None)
    if config.rope_scaling:
        text = (folder / "config.json").read_text()
        quantization = {"bits": 4, "group_size": 32, "rest": "gguf.safetensors"}
        write_config(unscaled, folder, {"quantization": quantization})
        assert relative_error(our_logits(folder, MANY_TOKENS), from_file) > 5e-2
        with pytest.raises(UserError, match="gguf.safetensors is missing, damaged, or of another"):
            export.export(folder, tmp_path / "out.gguf")
        (folder / "config.json").write_text(text)
    export.export(folder, tmp_path / "out.gguf")
    assert (tmp_path / "out.gguf").read_bytes() == (tmp_path / "in.gguf").read_bytes()


@pytest.mark.parametrize(
    "keys, factor",
    [
        ({"scaling.type": "linear", "scaling.factor": 4.0}, 4),
        ({"scaling.factor": 4.0}, 4),
        ({"scale_linear": 4.0}, 4),
        ({"scale_linear": 8.0, "scaling.factor": 4.0}, 4),
        ({"scaling.type": "none", "scaling.factor": 4.0}, None),
        ({"scale_linear": 1.0}, None),
        ({"scaling.type": "none"}, None),
    ],
)
def test_linear_scaling_is_read_under_new_and_old_names(tmp_path, tokenizer_file, keys, factor):
    def change(metadata, tensors):
        for key, value in keys.items():
            metadata[f"llama.rope.{key}"] = value, STRING if key.endswith("type") else FLOAT

    quantize_file(tmp_path / "in.gguf", CONFIG, load_tokenizer(tokenizer_file), change=change)
    scaling = formats.read_config(tmp_path / "in.gguf").rope_scaling
    assert scaling == ({"rope_type": "linear", "factor": factor} if factor else None)


@given(factor=st.floats(1, 128, width=32), size=st.integers(1, 64), theta=st.floats(1e3, 1e7))
def test_llama3_scaling_is_found_again_in_its_divisors(factor, size, theta):
    """Computed in float32, as llama.cpp's converter does."""
    scaling = {**LLAMA3_SCALING, "factor": factor}
    config = dataclasses.replace(
        CONFIG, head_dim=2 * size, rope_theta=theta, rope_scaling=LLAMA3_SCALING
    )
    divisors = rope_freqs(config, factor=factor)
    found = gguf_rope.divisors(config, scaling).numpy()
    assert np.allclose(found, divisors, rtol=1e-6)
    noise = np.random.default_rng(0).uniform(-1, 1, size) * 3e-7 * divisors
    tensor = types.SimpleNamespace(
        tensor_type=Type.F32, shape=np.array([size]), data=(divisors + noise).astype(np.float32)
    )
    assume(divisors[-1] == np.float32(factor))  # else no pair is slow enough to tell it
    unscaled = dataclasses.replace(config, rope_scaling=None)
    read = gguf_rope.llama3_scaling("f", tensor, unscaled)
    assert read == {**LLAMA3_SCALING, "factor": pytest.approx(factor, rel=1e-6)}


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda d: rope_freqs(LLAMA3, original_max_position_embeddings=4096), "only the numbers"),
        (lambda d: rope_freqs(LLAMA3, high_freq_factor=3.0), "only the numbers"),
        (lambda d: rope_freqs(LLAMA3, low_freq_factor=2.0), "only the numbers"),
        (lambda d: np.where(d == 1, 1.001, d), "only the numbers"),
        (lambda d: np.where(d == 1, np.nan, d), "only the numbers"),
        (lambda d: np.where(d == 1, d, np.inf), "only the numbers"),
        (lambda d: rope_freqs(LLAMA3, factor=1e999), "only the numbers"),  # some are infinite
        (lambda d: d / 2, "only the numbers"),
        (lambda d: d * 0, "only the numbers"),
        (lambda d: d[:8], r"F32 of shape \[8\], not F32 of \[12\]"),
        (lambda d: d.astype(np.float16), r"F16 of shape \[12\], not F32"),
    ],
)
def test_a_rope_freqs_tensor_of_other_numbers_is_refused(tmp_path, tokenizer_file, change, reason):
    def spoil(metadata, tensors):
        divisors = change(tensors["rope_freqs.weight"][0])
        kind = Type.F16 if divisors.dtype == np.float16 else Type.F32
        divisors = divisors.astype(np.float16 if kind == Type.F16 else np.float32)
        tensors["rope_freqs.weight"] = divisors, kind

    quantize_file(tmp_path / "in.gguf", LLAMA3, load_tokenizer(tokenizer_file), change=spoil)
    with pytest.raises(UserError, match=f"in.gguf: rope_freqs.weight is .*{reason}") as e:
        formats.read_config(tmp_path / "in.gguf")
    assert "\n" not in str(e.value)


def test_rope_freqs_beside_linear_scaling_is_refused(tmp_path, tokenizer_file):
    change = put("llama.rope.scaling.factor", 4.0, FLOAT)
    quantize_file(tmp_path / "in.gguf", LLAMA3, load_tokenizer(tokenizer_file), change=change)
    with pytest.raises(UserError, match="rope_freqs.weight beside llama.rope.scaling"):
        formats.read_config(tmp_path / "in.gguf")


@pytest.mark.parametrize(
    "kind, dtype",
    [
        (Type.F32, torch.float32),
        (Type.BF16, torch.bfloat16),
        (Type.F16, torch.float16),
        (Type.Q8_0, torch.float16),
    ],
)
def test_an_imported_base_keeps_its_embedding_in_as_many_bits_as_the_file(
    tmp_path, tokenizer_file, kind, dtype
):
    """So that a GPU, or a CPU with such instructions, computes in bfloat16 beside it."""
    values = (
        np.random.default_rng(0)
        .normal(0, 0.2, (CONFIG.vocab_size, CONFIG.hidden_size))
        .astype(np.float32)
    )
    change = put_tensor("token_embd.weight", gguf.quantize(values, kind), kind)
    quantize_file(tmp_path / "in.gguf", CONFIG, load_tokenizer(tokenizer_file), Type.F16, change)
    folder = imported(tmp_path / "in.gguf", tokenizer_file, tmp_path / "base")
    error = relative_error(
        our_logits(folder, TOKENS), FromFile(tmp_path / "in.gguf").logits(TOKENS)
    )
    assert error < {torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 5e-2}[dtype]
    model = load_model(folder)
    assert {p.dtype for p in model.parameters()} == {dtype}
    expected = torch.from_numpy(gguf.dequantize(gguf.quantize(values, kind), kind)).to(dtype)
    assert torch.equal(model.model.embed_tokens.weight, expected)


def test_a_number_that_float16_cannot_hold_is_refused(tmp_path, tokenizer_file):
    quantize_file(
        tmp_path / "in.gguf",
        CONFIG,
        load_tokenizer(tokenizer_file),
        Type.F16,
        put_tensor("output_norm.weight", np.full(CONFIG.hidden_size, 1e6, np.float32), Type.F32),
    )
    with pytest.raises(
        UserError, match="output_norm.weight has .* such as torch.float16 cannot hold"
    ):
        imported(tmp_path / "in.gguf", tokenizer_file, tmp_path / "base")


@pytest.mark.parametrize("config", [CONFIG, LLAMA3])
def test_fine_tuning_a_gguf_file_changes_its_offsets_and_nothing_else(
    tmp_path, tokenizer_file, run, config
):
    quantize_file(tmp_path / "in.gguf", config, load_tokenizer(tokenizer_file))
    finished = run_of(
        imported(tmp_path / "in.gguf", tokenizer_file, tmp_path / "base"), tmp_path / "run"
    )
    run(merge, finished, "--out", tmp_path / "merged")
    run(export, tmp_path / "merged", "--out", tmp_path / "out.gguf")
    before, after = FromFile(tmp_path / "in.gguf"), FromFile(tmp_path / "out.gguf")
    assert_only_offsets_differ(before, after)
    assert relative_error(after.logits(TOKENS), our_logits(finished, TOKENS)) < 5e-3
    assert relative_error(before.logits(TOKENS), our_logits(finished, TOKENS)) > 5e-2


def heads_of(size):
    keys = ("attention.key_length", "attention.value_length", "rope.dimension_count")
    sizes = {f"llama.{key}": (size, gguf.GGUFValueType.UINT32) for key in keys}
    return lambda metadata, tensors: metadata.update(sizes)


def drop(name):
    return lambda metadata, tensors: metadata.pop(name) if name in metadata else tensors.pop(name)


def rename(i, piece):
    def change(metadata, tensors):
        metadata["tokenizer.ggml.tokens"][0][i] = piece

    return change


def not_a_number(metadata, tensors):
    tensors["blk.1.ffn_up.weight"][0][5, :2] = np.array([np.nan], np.float16).view(np.uint8)


@pytest.mark.parametrize(
    "change, reason",
    [
        (put("general.architecture", "gemma"), "architecture llama are supported, not gemma"),
        (
            put("llama.rope.scaling.type", "yarn", STRING),
            "llama.rope.scaling.type = yarn is not supported",
        ),
        (put("llama.rope.scaling.type", "linear", STRING), "llama.rope.scaling.factor is missing"),
        (put("llama.rope.scaling.factor", "8", STRING), 'llama.rope.scaling.factor = "8"'),
        (put("llama.rope.scaling.factor", 0.0, FLOAT), "llama.rope.scaling.factor = 0.0 is not"),
        (put("llama.rope.scale_linear", float("nan"), FLOAT), "rope.scaling.factor = NaN is not"),
        (put("llama.expert_count", 8), "llama.expert_count = 8 is not supported"),
        (put("llama.attention.key_length", 32), "llama.rope.dimension_count = 16 is not supported"),
        (put("llama.attention.value_length", 8), "llama.attention.value_length = 8 is not"),
        (put("llama.rope.dimension_count", 8), "llama.rope.dimension_count = 8 is not supported"),
        (put("llama.block_count", 2**23), "no tensors for the last of 8388608 layers"),
        (
            put("llama.feed_forward_length", 2**63, gguf.GGUFValueType.UINT64),
            "intermediate_size = 9223372036854775808",
        ),
        (put("llama.attention.head_count", 3), "do not divide into even-sized heads"),
        (put("llama.feed_forward_length", 128), "has the shape"),
        (put("llama.feed_forward_length", 172), "has the shape"),
        (heads_of(12), "has the shape"),
        (put("tokenizer.ggml.model", "bert", STRING), "its tokenizer is of the kind bert"),
        (put("tokenizer.ggml.tokens", ["a", "b"], gguf.GGUFValueType.ARRAY), "has the shape"),
        (rename(270, "x"), "piece 270 of its vocabulary is 'x'"),
        (rename(270, "<unk>"), "has no sentencepiece model, or a damaged one"),  # a second one
        (drop("tokenizer.ggml.scores"), "scores does not have a number for each of its 300"),
        (put("tokenizer.ggml.bos_token_id", 300), "bos_token_id = 300 is none of its 300 pieces"),
        (put("tokenizer.ggml.eos_token_id", 7), r"BOS and EOS are \(1,\) and 7"),
        (drop("llama.embedding_length"), "hidden_size is missing"),
        (drop("llama.attention.layer_norm_rms_epsilon"), "rms_norm_eps is missing"),
        (drop("blk.0.ffn_up.weight"), "blk.0.ffn_up.weight is missing"),
        (
            lambda metadata, tensors: tensors.update(extra=(np.ones(4, np.float32), Type.F32)),
            "extra is unexpected",
        ),
        (not_a_number, "blk.1.ffn_up.weight has NaN"),
    ],
)
def test_a_gguf_file_that_cannot_be_a_base_is_refused_with_the_reason(
    tmp_path, tokenizer_file, change, reason
):
    quantize_file(tmp_path / "in.gguf", CONFIG, load_tokenizer(tokenizer_file), change=change)
    with pytest.raises(UserError, match=reason) as e:
        imported(tmp_path / "in.gguf", tokenizer_file, tmp_path / "base")
    assert "\n" not in str(e.value) and str(tmp_path / "in.gguf") in str(e.value)
    assert not list((tmp_path / "base").iterdir())


def test_norms_may_have_any_type_too(tmp_path, tokenizer_file):
    change = put_tensor(
        "output_norm.weight", gguf.quantize(np.ones(64, np.float32), Type.Q8_0), Type.Q8_0
    )
    quantize_file(tmp_path / "in.gguf", CONFIG, load_tokenizer(tokenizer_file), change=change)
    export.export(
        imported(tmp_path / "in.gguf", tokenizer_file, tmp_path / "base"), tmp_path / "out.gguf"
    )
    assert (tmp_path / "out.gguf").read_bytes() == (tmp_path / "in.gguf").read_bytes()


def test_a_file_with_two_tensors_in_one_place_is_refused(tmp_path, tokenizer_file):
    quantize_file(tmp_path / "in.gguf", CONFIG, load_tokenizer(tokenizer_file))
    raw, name = bytearray((tmp_path / "in.gguf").read_bytes()), b"blk.0.ffn_gate.weight"
    offset = (
        raw.index(name) + len(name) + 4 + 2 * 8 + 4
    )  # after the number of dimensions, both of them, and the type
    raw[offset : offset + 8] = bytes(8)
    (tmp_path / "in.gguf").write_bytes(raw)
    with pytest.raises(
        UserError, match="blk.0.ffn_gate.weight does not begin where token_embd.weight ends"
    ):
        imported(tmp_path / "in.gguf", tokenizer_file, tmp_path / "base")


def test_a_file_with_a_tensor_shorter_than_its_place_is_refused(tmp_path, tokenizer_file):
    quantize_file(tmp_path / "in.gguf", CONFIG, load_tokenizer(tokenizer_file))
    raw, name = bytearray((tmp_path / "in.gguf").read_bytes()), b"blk.1.ffn_norm.weight"
    raw[raw.index(name) + len(name) + 4 + 8] = Type.Q4_0  # it was F32
    (tmp_path / "in.gguf").write_bytes(raw)
    with pytest.raises(UserError, match="does not begin where blk.1.ffn_norm.weight ends"):
        imported(tmp_path / "in.gguf", tokenizer_file, tmp_path / "base")


@given(st.data())
def test_a_damaged_file_ends_in_one_line_or_is_read(tmp_path_factory, tokenizer_file, draw_from):
    path = tmp_path_factory.getbasetemp() / "damaged.gguf"
    quantize_file(path, CONFIG, load_tokenizer(tokenizer_file))
    raw = bytearray(path.read_bytes())
    draw = draw_from.draw
    if draw(st.booleans(), "truncate"):
        raw = raw[: draw(st.integers(0, len(raw) - 65), "length")]
        expected = [UserError]
    else:
        for _ in range(draw(st.integers(1, 3), "bytes")):
            raw[draw(st.integers(0, 9000), "place")] = draw(st.integers(0, 255), "byte")
        expected = [UserError, None]
    path.write_bytes(raw)
    try:
        outcome = None
        formats.check_tokenizer(path, load_tokenizer(tokenizer_file))
    except UserError:
        outcome = UserError
    assert outcome in expected
