"""A matrix in Q4_1 blocks, and the vocabulary as GGUF keeps it."""

import numpy as np
import pytest
import torch
from fixtures_gguf import TEXTS
from helpers_gguf import FromFile, Type, gguf, sentencepiece_file
from hypothesis import given
from hypothesis import strategies as st

import export
from cli.errors import UserError
from formats.q4_1 import from_q4_1, offset_rounding, to_q4_1
from quant import Quantized, QuantLinear, dequantize, quantize_rtn
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


@given(st.integers(0, 2**32 - 1), st.integers(1, 3), st.sampled_from([None, 1, 2, 3]))
def test_blocks_that_are_read_are_written_as_they_were(seed, blocks, heads):
    rng = np.random.default_rng(seed)
    raw = rng.integers(0, 256, (12, blocks, 20), dtype=np.uint8)
    raw[..., :4] = (
        rng.normal(0, 1, (12, blocks, 2)).astype(np.float16).view(np.uint8).reshape(12, blocks, 4)
    )
    given = torch.from_numpy(raw.reshape(12, -1))
    layer = from_q4_1(given, heads)
    assert torch.equal(to_q4_1(layer, heads), given)
    if heads is None:
        assert np.array_equal(layer.dequantize().numpy(), gguf.dequantize(given.numpy(), Type.Q4_1))


def test_the_rounding_is_reported_in_quantization_steps():
    model = torch.nn.Module()
    codes = torch.zeros(1, 96, dtype=torch.uint8)
    scale = torch.tensor([[0.5, 0.25, 0.0]]).half()
    offset = torch.tensor(
        [[1 + 2**-12, 1.0, 1 + 2**-12]]
    )  # the last group's weights are all equal: no step
    model.q_proj = QuantLinear.from_quantized(Quantized(codes, scale, offset), 4)
    assert offset_rounding(model) == (2**-11, 2**-12)


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
