"""What came from a GGUF file goes back as it was, but for its offsets; what cannot be a base is
refused."""

import numpy as np
import pytest
import torch
from fixtures_gguf import CONFIG, TIED
from helpers_gguf import (
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
    run_of,
)
from hypothesis import given
from hypothesis import strategies as st

import export
import formats
import merge
from cli.errors import UserError
from formats import load_model
from llama import LlamaConfig
from text.tokenizer import load_tokenizer

WIDE = LlamaConfig(300, 256, 64, 1, 4, 2, rms_norm_eps=1e-5)


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


def test_fine_tuning_a_gguf_file_changes_its_offsets_and_nothing_else(
    tmp_path, tokenizer_file, run
):
    quantize_file(tmp_path / "in.gguf", CONFIG, load_tokenizer(tokenizer_file))
    finished = run_of(
        imported(tmp_path / "in.gguf", tokenizer_file, tmp_path / "base"), tmp_path / "run"
    )
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


STRING, FLOAT = gguf.GGUFValueType.STRING, gguf.GGUFValueType.FLOAT32


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
        (
            put("llama.feed_forward_length", 172),
            "widths of 64, 172 and 64 are not all multiples of 32",
        ),
        (put("tokenizer.ggml.model", "gpt2", STRING), "its tokenizer is of kind gpt2"),
        (put("tokenizer.ggml.tokens", ["a", "b"], gguf.GGUFValueType.ARRAY), "has the shape"),
        (
            put("tokenizer.ggml.tokens", ["x"] * 300, gguf.GGUFValueType.ARRAY),
            "piece 0 of its vocabulary is 'x'",
        ),
        (put("tokenizer.ggml.eos_token_id", 7), "BOS and EOS are 1 and 7"),
        (drop("llama.embedding_length"), "hidden_size is missing"),
        (drop("llama.attention.layer_norm_rms_epsilon"), "rms_norm_eps is missing"),
        (drop("blk.0.ffn_up.weight"), "blk.0.ffn_up.weight is missing"),
        (
            lambda metadata, tensors: tensors.update(extra=(np.ones(4, np.float32), Type.F32)),
            "extra is unexpected",
        ),
        (
            other_type("blk.0.attn_q.weight", Type.Q4_0),
            "blk.0.attn_q.weight is Q4_0, and only Q4_1",
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
