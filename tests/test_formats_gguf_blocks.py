"""A matrix in blocks of GGUF, and the vocabulary as GGUF keeps it."""

import numpy as np
import pytest
import torch
from fixtures_gguf import TEXTS
from helpers import codes_of
from helpers_gguf import FromFile, Type, gguf, sentencepiece_file
from hypothesis import given
from hypothesis import strategies as st

import export
from cli.errors import UserError
from formats.gguf_blocks import (
    from_blocks,
    heads_of_q4_k,
    in_file_order,
    in_our_order,
    is_unchanged,
    to_q4_0,
    to_q4_1,
    to_q4_k,
)
from quant import QuantLinear, dequantize, quantize_rtn
from text.tokenizer import load_tokenizer

matrices = st.tuples(
    st.integers(1, 5),
    st.integers(1, 3),
    st.sampled_from([32, 64, 96]),
    st.sampled_from([2, 3, 4]),
    st.integers(0, 2**32 - 1),
    st.floats(-12, 8),
    st.floats(-4, 4),
)


def matrix(rows, groups, group_size, bits, seed, magnitude, shift):
    """A quantized matrix; its offsets may be far larger or smaller than its scales."""
    rng = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, groups * group_size, generator=rng) * 2.0**magnitude
    quantized = quantize_rtn(w, bits, group_size)
    return quantized._replace(offset=quantized.offset * 2.0**shift)


@given(matrices)
def test_weights_change_by_half_an_ulp_of_m_and_two_roundings(case):
    quantized = matrix(*case)
    blocks = to_q4_1(QuantLinear.from_quantized(quantized, case[3])).numpy()
    theirs = gguf.dequantize(blocks, Type.Q4_1)
    ours = dequantize(quantized).numpy()
    m = np.repeat(quantized.offset.numpy().astype(np.float16), case[2], axis=1)
    bound = (
        np.spacing(np.abs(m)).astype(np.float64) / 2
        + (
            np.spacing(np.abs(theirs)).astype(np.float64)
            + np.spacing(np.abs(ours)).astype(np.float64)
        )
        / 2
    )
    assert (np.abs(theirs.astype(np.float64) - ours) <= bound).all()


@given(matrices)
def test_codes_and_scales_are_copied_not_computed(case):
    quantized = matrix(*case)
    blocks = to_q4_1(QuantLinear.from_quantized(quantized, case[3])).view(case[0], -1, 20).numpy()
    for o in range(blocks.shape[0]):
        for b in range(blocks.shape[1]):
            codes = quantized.codes[o, 32 * b : 32 * b + 32].tolist()
            assert blocks[o, b, 4:].tolist() == [codes[j] | codes[j + 16] << 4 for j in range(16)]
            assert (
                blocks[o, b, :2].tobytes()
                == quantized.scale[o, 32 * b // case[2]].numpy().tobytes()
            )


def any_blocks(kind, seed, rows, blocks):
    """Blocks of any bytes, uint8 [rows, blocks * size], whose float16 numbers are finite."""
    size, numbers = {"Q4_0": (18, 1), "Q4_1": (20, 2), "Q4_K": (144, 2)}[kind]
    rng = np.random.default_rng(seed)
    raw = rng.integers(0, 256, (rows, blocks, size), dtype=np.uint8)
    finite = rng.normal(0, 1, (rows, blocks, numbers)).astype(np.float16)
    raw[..., : 2 * numbers] = finite.view(np.uint8).reshape(rows, blocks, 2 * numbers)
    return torch.from_numpy(raw.reshape(rows, -1))


any_kind = st.sampled_from(["Q4_0", "Q4_1", "Q4_K"])
seeds = st.integers(0, 2**32 - 1)


@given(any_kind, seeds, st.integers(1, 5), st.integers(1, 3))
def test_a_layer_read_from_blocks_is_what_the_package_reads(kind, seed, rows, blocks):
    """To the bit: both compute scale * code in float32, where ours rounds nothing more."""
    raw = any_blocks(kind, seed, rows, blocks)
    layer = from_blocks(raw, kind, "f: t")
    assert (layer.bits, layer.group_size) == (4, 32)
    theirs = gguf.dequantize(raw.numpy(), Type[kind])
    if kind == "Q4_0":  # the package subtracts 8 first, so its weights are rounded once, ours never
        exact = layer.scale.double().repeat_interleave(32, 1) * (codes_of(layer) - 8.0)
        assert np.array_equal(theirs, exact.float().numpy())
        assert torch.equal(layer.offset.double(), -8 * layer.scale.double())
    else:
        assert np.array_equal(layer.dequantize().numpy(), theirs)


@given(any_kind, seeds, st.integers(1, 3))
def test_blocks_that_are_read_are_written_as_they_were(kind, seed, blocks):
    raw = any_blocks(kind, seed, 12, blocks)
    layer = from_blocks(raw, kind, "f: t")
    head = heads_of_q4_k(raw) if kind == "Q4_K" else None
    assert is_unchanged(layer, kind, head)
    write = {"Q4_0": to_q4_0, "Q4_1": to_q4_1, "Q4_K": to_q4_k}[kind]
    assert torch.equal(write(layer, head) if kind == "Q4_K" else write(layer), raw)


@given(any_kind, seeds, st.integers(0, 11))
def test_a_layer_that_was_tuned_keeps_its_codes_as_q4_1(kind, seed, row):
    raw = any_blocks(kind, seed, 12, 2)
    layer = from_blocks(raw, kind, "f: t")
    layer.offset[row, 1] += 1.5
    head = heads_of_q4_k(raw) if kind == "Q4_K" else None
    assert is_unchanged(layer, kind, head) == (kind == "Q4_1")
    written = from_blocks(to_q4_1(layer), "Q4_1", "f: t")
    assert torch.equal(codes_of(written), codes_of(layer))
    assert torch.equal(written.scale, layer.scale.half())
    assert torch.equal(written.offset, layer.offset.half().float())


@given(any_kind, seeds)
def test_a_scale_that_changed_is_noticed_too(kind, seed):
    raw = any_blocks("Q4_K", seed, 2, 1)
    layer = from_blocks(raw, "Q4_K", "f: t")
    layer.scale = layer.scale.float().clone()
    layer.scale[1, 7] += 1
    assert not is_unchanged(layer, "Q4_K", heads_of_q4_k(raw))


@given(seeds, st.sampled_from([1, 2, 3]))
def test_rows_go_to_the_order_of_the_file_and_back(seed, heads):
    """llama.cpp turns the neighbours 2i and 2i + 1 where we turn i and i + K/2."""
    rows = torch.from_numpy(np.random.default_rng(seed).integers(0, 99, (12, 3)))
    theirs = in_file_order(rows, heads)
    size = 12 // heads
    for i in range(12):
        head, channel = divmod(i, size)
        neighbour = 2 * (channel % (size // 2)) + channel // (size // 2)
        assert torch.equal(theirs[head * size + neighbour], rows[i])
    assert torch.equal(in_our_order(theirs, heads), rows)
    assert in_file_order(rows, None) is rows and in_our_order(rows, None) is rows


def test_the_file_alone_tokenizes_like_sentencepiece(folder_of, tmp_path, tokenizer_file):
    export.export(folder_of(), tmp_path / "m.gguf")
    file, ours = FromFile(tmp_path / "m.gguf"), load_tokenizer(tokenizer_file)
    for text in [*TEXTS, " two  spaces ", "Ünïcode 漢字\n\tand tabs", "", "###Response: yes"]:
        if text:
            assert file.tokenize(text) == ours.encode(text), text


def test_the_space_before_a_text_is_put_there_only_if_the_tokenizer_does(folder_of, tmp_path):
    folder = folder_of()
    sentencepiece_file(folder / "tokenizer.model", add_dummy_prefix=False)
    export.export(folder, tmp_path / "m.gguf")
    file, ours = FromFile(tmp_path / "m.gguf"), load_tokenizer(folder)
    assert file.metadata["tokenizer.ggml.add_space_prefix"] is False
    assert file.tokenize(TEXTS[0]) == ours.encode(TEXTS[0])


def test_pieces_defined_by_the_user_are_marked(folder_of, tmp_path):
    folder = folder_of()
    sentencepiece_file(folder / "tokenizer.model", user_defined_symbols=["<chat>"])
    export.export(folder, tmp_path / "m.gguf")
    metadata = FromFile(tmp_path / "m.gguf").metadata
    i = metadata["tokenizer.ggml.tokens"].index("<chat>")
    assert metadata["tokenizer.ggml.token_type"][i] == gguf.TokenType.USER_DEFINED


@pytest.mark.parametrize(
    "options, reason",
    [
        (dict(model_type="unigram"), "not a BPE model"),
        (dict(normalization_rule_name="nmt_nfkc"), "changes characters"),
        (dict(remove_extra_whitespaces=True), "removes spaces"),
        (dict(vocab_size=310), "has 300 rows"),
        (dict(byte_fallback=False), "no pieces for bytes"),
        (dict(treat_whitespace_as_suffix=True), "spaces after words"),
    ],
)
def test_a_tokenizer_that_llama_cpp_cannot_follow_is_refused(folder_of, tmp_path, options, reason):
    folder = folder_of()
    sentencepiece_file(folder / "tokenizer.model", **options)
    with pytest.raises(UserError, match=reason):
        export.export(folder, tmp_path / "m.gguf")
    assert not list(tmp_path.glob("*gguf*"))
