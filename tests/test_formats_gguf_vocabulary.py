"""A GGUF file's vocabulary becomes a tokenizer and comes back; other programs' files are read."""

import dataclasses
import json
import pathlib
import sys

import pytest
from fixtures_gguf import CONFIG, TEXTS, float_model
from helpers import TEXTS as ANY_TEXTS
from helpers_gguf import TEMPLATE, FromFile, gguf, quantize_file
from hypothesis import given

import evals
import export
import formats
import merge
import sample
import train
from cli.errors import UserError
from formats.gguf_vocabulary import tokenizer_of
from formats.quantized import save_quantized
from quant import quantize_model
from text import byte_level
from text.tokenizer import JSON, load_tokenizer, make_tokenizer

V = gguf.GGUFValueType
BYTE_LEVEL = dataclasses.replace(CONFIG, vocab_size=608)


def byte_level_metadata(learned, **changed):
    """What turns `quantize_file` into one with a byte-level vocabulary; None removes a key."""
    pieces, kinds, merges = learned
    more = range(len(pieces), BYTE_LEVEL.vocab_size)
    values = {
        "model": ("gpt2", V.STRING),
        "pre": ("smollm", V.STRING),
        "tokens": ([*pieces, *(f"<more{i}>" for i in more)], V.ARRAY),
        "token_type": ([*kinds, *(5 for _ in more)], V.ARRAY),
        "merges": ([" ".join(pair) for pair in merges], V.ARRAY),
        "scores": None,
        "bos_token_id": (0, V.UINT32),
        "eos_token_id": (1, V.UINT32),
    }

    def change(metadata, tensors):
        for name, value in (values | changed).items():
            metadata.pop(f"tokenizer.ggml.{name}", None)
            if value is not None:
                metadata[f"tokenizer.ggml.{name}"] = value

    return change


@pytest.fixture
def byte_level_file(tmp_path, tokenizer_file, learned):
    """A function that writes a GGUF file with a byte-level vocabulary."""

    def write(**changed):
        path = tmp_path / "in.gguf"
        change = byte_level_metadata(learned, **changed)
        quantize_file(path, BYTE_LEVEL, load_tokenizer(tokenizer_file), change=change)
        return path

    return write


@pytest.mark.parametrize("words", byte_level.WORDS)
def test_a_byte_level_vocabulary_is_read_from_the_file(byte_level_file, learned, words):
    pieces, kinds, merges = learned
    tokenizer = formats.load_tokenizer(byte_level_file(pre=(words, V.STRING)))
    expected = make_tokenizer(
        {
            JSON: byte_level.make_json(pieces, kinds, merges, words, None),
            "tokenizer_config.json": b'{"eos_token": "<|end|>"}',
        },
        "t",
    )
    for text in (*TEXTS, "I'LL say  12345 (x+=1)\n\n  <|end|>", ""):
        assert tokenizer.encode(text) == expected.encode(text)
    assert (tokenizer.eos, tokenizer.stops) == (1, (1,))  # <|end|> is one of llama.cpp's names
    assert tokenizer.bos == ((0,) if words == "llama-bpe" else ())


@pytest.mark.parametrize(
    "changed, bos, stops",
    [
        (dict(add_bos_token=(True, V.BOOL)), (0,), (1,)),
        (dict(add_bos_token=(False, V.BOOL), pre=("llama-bpe", V.STRING)), (), (1,)),
        (dict(bos_token_id=None), (), (1,)),
        (dict(eot_token_id=(9, V.UINT32), eom_token_id=(8, V.UINT32)), (), (1, 9, 8)),
        (dict(eos_token_id=(300, V.UINT32)), (), (300, 1)),
    ],
)
def test_the_rules_around_a_text_are_the_files(byte_level_file, changed, bos, stops):
    tokenizer = formats.load_tokenizer(byte_level_file(**changed))
    assert (tokenizer.bos, tokenizer.eos, tokenizer.stops) == (bos, stops[0], stops)


@pytest.mark.parametrize(
    "changed, said",
    [
        (dict(pre=("qwen2", V.STRING)), "pre = qwen2 .* only smollm, llama-bpe, gpt-2, default"),
        (dict(model=("bert", V.STRING)), "of the kind bert"),
        (dict(merges=None), "merges is missing"),
        (dict(merges=(["a b", "abc"], V.ARRAY)), "merges is missing or not a list of pairs"),
        (dict(merges=(["a zzz"], V.ARRAY)), "a merge names an unknown piece"),
        (dict(eos_token_id=None), "eos_token_id is missing"),
        (dict(eos_token_id=(608, V.UINT32)), "eos_token_id = 608 is none of its 608 pieces"),
        (dict(token_type=([1, 1], V.ARRAY)), "token_type does not have a number for each"),
        (dict(token_type=(["x"] * 608, V.ARRAY)), "token_type does not have a number for each"),
        (dict(bos_token_id=("x", V.STRING)), 'bos_token_id = "x" is not a sensible'),
        (dict(merges=([1, 2], V.ARRAY)), "merges is missing or not a list of pairs"),
        (dict(merges=(5, V.UINT32)), "merges is missing or not a list of pairs"),
        (dict(pre=(["x"], V.ARRAY)), "only smollm, llama-bpe, gpt-2, default are supported"),
        (dict(token_type=([7] * 608, V.ARRAY)), "token_type has other numbers than 1 to 6"),
        (dict(tokens=(["a"] * 608, V.ARRAY)), "a piece is there twice"),
        (dict(tokens=None), "vocab_size is missing"),
    ],
)
def test_a_vocabulary_that_is_damaged_or_of_another_kind_is_refused_in_one_line(
    byte_level_file, changed, said
):
    path = byte_level_file(**changed)
    with pytest.raises(UserError, match=said) as e:
        formats.load_tokenizer(path)
    assert "\n" not in str(e.value) and str(path) in str(e.value)


def test_llamas_kind_has_bos_before_a_text_whatever_it_is_called(tmp_path, tokenizer_file):
    def change(metadata, tensors):
        metadata["tokenizer.ggml.tokens"][0][1] = "<|begin|>"

    quantize_file(tmp_path / "in.gguf", CONFIG, load_tokenizer(tokenizer_file), change=change)
    assert formats.load_tokenizer(tmp_path / "in.gguf").bos == (1,)


def test_ends_that_llama_cpp_does_not_know_by_name_are_in_the_file(folder_of, tmp_path):
    folder = folder_of()
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 5, 7]}')
    export.export(folder, tmp_path / "m.gguf")
    assert set(formats.load_tokenizer(tmp_path / "m.gguf").stops) == {2, 5, 7}
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 5, 7, 32007]}')
    export.export(folder, tmp_path / "m.gguf")  # the vocabulary has no 32007
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 5, 7, 9]}')
    with pytest.raises(UserError, match="has room for three tokens .* this tokenizer has 4"):
        export.export(folder, tmp_path / "n.gguf")
    assert not (tmp_path / "n.gguf").exists()


@pytest.mark.parametrize("name, kind", [("eos", 1), ("eos", 4), ("bos", 1), ("eot", 4), ("eom", 4)])
def test_what_a_file_calls_the_end_or_the_beginning_is_never_made_of_a_text(
    byte_level_file, learned, name, kind
):
    pieces, kinds, _ = learned
    more = range(len(pieces), BYTE_LEVEL.vocab_size)
    names = ["<|it|>", *(f"<more{i}>" for i in more[1:])]
    path = byte_level_file(
        tokens=([*pieces, *names], V.ARRAY),
        token_type=([*kinds, kind, *(5 for _ in names[1:])], V.ARRAY),
        **{f"{name}_token_id": (len(pieces), V.UINT32)},
    )
    tokenizer = formats.load_tokenizer(path)
    assert len(pieces) not in tokenizer.encode("a<|it|>b") and tokenizer.decode([len(pieces)]) == ""


def test_without_the_tokenizers_package_the_file_is_not_called_damaged(
    byte_level_file, monkeypatch
):
    path = byte_level_file()
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UserError, match="run: pip install tokenizers$"):
        formats.load_tokenizer(path)


def test_kinds_may_be_written_as_floats(tmp_path, tokenizer_file):
    def change(metadata, tensors):
        kinds, array = metadata["tokenizer.ggml.token_type"]
        metadata["tokenizer.ggml.token_type"] = [float(kind) for kind in kinds], array

    own = load_tokenizer(tokenizer_file)
    quantize_file(tmp_path / "in.gguf", CONFIG, own, change=change)
    found = formats.load_tokenizer(tmp_path / "in.gguf")
    assert found.encode(TEXTS[0]) == own.encode(TEXTS[0])


@pytest.mark.parametrize("score", [1e39, float("nan"), float("inf")])
def test_scores_beyond_float32_are_refused(score):
    metadata = {"model": "llama", "tokens": ["<unk>", "<s>", "</s>"], "scores": [0.0, 0.0, score]}
    metadata = {f"tokenizer.ggml.{name}": value for name, value in metadata.items()}
    with pytest.raises(UserError, match="^a.gguf: tokenizer.ggml.scores does not have a number"):
        tokenizer_of(metadata, pathlib.Path("a.gguf"))


def test_without_kinds_all_pieces_but_known_ends_are_ordinary(byte_level_file, learned):
    tokenizer = formats.load_tokenizer(byte_level_file(token_type=None))
    assert tokenizer.encode("<|begin|>") != tokenizer.encode("<|end|>")
    assert 1 not in tokenizer.encode("a<|end|>b")
    without = byte_level_file(token_type=None, eos_token_id=(0, V.UINT32))
    assert formats.load_tokenizer(without).decode([1]) == "", "a control token has no text"


@given(ANY_TEXTS)
def test_a_sentencepiece_vocabulary_is_the_same_after_a_file(gguf_and_tokenizer, text):
    from_file, own = gguf_and_tokenizer
    assert from_file.encode(text) == own.encode(text)
    assert from_file.decode(own.encode(text)) == text
    assert (from_file.bos, from_file.eos, from_file.stops) == (own.bos, own.eos, own.stops)


@pytest.fixture(scope="module", params=[True, False])
def gguf_and_tokenizer(request, tmp_path_factory, tokenizer_file):
    """The tokenizer in a GGUF file of ours or of another program, and the one it was made of."""
    folder, own = tmp_path_factory.mktemp("vocabulary"), load_tokenizer(tokenizer_file)
    if request.param:
        save_quantized(quantize_model(float_model(), 4, 32), folder)
        own.save(folder)
        export.export(folder, folder / "m.gguf")
    else:
        quantize_file(folder / "m.gguf", CONFIG, own)
    return formats.load_tokenizer(folder / "m.gguf"), own


# ---- from a folder of Hugging Face's into a file


@pytest.fixture(scope="module", params=byte_level.WORDS)
def byte_level_folder(request, tmp_path_factory, learned):
    """A quantized model folder with a tokenizer.json."""
    folder = tmp_path_factory.mktemp("byte-level")
    save_quantized(quantize_model(float_model(BYTE_LEVEL), 4, 32), folder)
    (folder / JSON).write_bytes(byte_level.make_json(*learned, request.param, bos=0))
    config = {"eos_token": "<|end|>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder, request.param


def test_a_byte_level_vocabulary_goes_into_a_file_and_comes_back(
    byte_level_folder, learned, tmp_path
):
    folder, words = byte_level_folder
    export.export(folder, tmp_path / "m.gguf")
    metadata = FromFile(tmp_path / "m.gguf").metadata
    pieces, kinds, merges = learned
    padding = range(len(pieces), 608)
    expected = {
        "model": "gpt2",
        "pre": words,
        "tokens": [*pieces, *(f"[PAD{i}]" for i in padding)],
        "token_type": [*kinds, *(5 for _ in padding)],
        "merges": [" ".join(pair) for pair in merges],
        "bos_token_id": 0,
        "eos_token_id": 1,
        "add_bos_token": True,
        "add_eos_token": False,
    }
    assert {key: metadata.get(f"tokenizer.ggml.{key}") for key in expected} == expected
    assert metadata["tokenizer.chat_template"] == TEMPLATE
    own, again = load_tokenizer(folder), formats.load_tokenizer(tmp_path / "m.gguf")
    for text in (*TEXTS, "I'LL say  12345 <|tool|> (x+=1)\n\n  <|end|>"):
        assert again.encode_prompt(text) == own.encode_prompt(text)


def test_a_tokenizer_json_that_llama_cpp_would_read_otherwise_is_refused(
    byte_level_folder, tmp_path
):
    folder, _ = byte_level_folder
    tokenizer = load_tokenizer(folder)
    content = json.loads(tokenizer.files[JSON])
    content["normalizer"] = {"type": "NFC"}
    files = {**tokenizer.files, JSON: json.dumps(content).encode()}
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    with pytest.raises(UserError, match="GGUF has no name for"):
        formats.gguf.write_vocabulary(writer, make_tokenizer(files, "t"), 608)


# ---- a tokenizer.json that was made of a sentencepiece model


@pytest.fixture
def converted(tokenizer_file):
    """LLaMA's kind of vocabulary as `tokenizers` has it: merges, bytes as pieces, U+2581."""
    tokenizers = pytest.importorskip("tokenizers", reason="needs tokenizers")
    own = load_tokenizer(tokenizer_file)
    ids = {piece: i for i, piece in enumerate(own.vocabulary.pieces)}
    merges = []
    for piece, i in ids.items():  # sentencepiece numbers pieces in the order of their scores
        if i >= 259:
            cuts = [(piece[:n], piece[n:]) for n in range(1, len(piece))]
            merges += [cut for cut in cuts if cut[0] in ids and cut[1] in ids]
    made = tokenizers.Tokenizer(
        tokenizers.models.BPE(ids, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    )
    normalizers, decoders = tokenizers.normalizers, tokenizers.decoders
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    made.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return own, made.to_str()


def test_such_a_vocabulary_has_sentencepieces_tokens_here_and_in_a_file(
    converted, folder_of, tmp_path
):
    own, content = converted
    folder = folder_of()
    (folder / "tokenizer.model").unlink()
    (folder / JSON).write_text(content)
    (folder / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    export.export(folder, tmp_path / "m.gguf")
    assert FromFile(tmp_path / "m.gguf").metadata["tokenizer.ggml.model"] == "llama"
    here, there = load_tokenizer(folder), formats.load_tokenizer(tmp_path / "m.gguf")
    for text in (*TEXTS, "  two  spaces", "é漢字\n\t 12", "</s> and <0x0A>", ""):
        assert here.encode_prompt(text) == own.encode_prompt(text), text
        assert there.encode_prompt(text) == own.encode_prompt(text), text
        assert here.decode(own.encode(text)) == text


def test_such_a_vocabulary_that_changes_characters_is_not_exported(converted, folder_of, tmp_path):
    _, content = converted
    folder, fields = folder_of(), json.loads(content)
    fields["normalizer"]["normalizers"].insert(0, {"type": "NFKC"})
    (folder / "tokenizer.model").unlink()
    (folder / JSON).write_text(json.dumps(fields))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    with pytest.raises(UserError, match="it changes characters"):
        export.export(folder, tmp_path / "m.gguf")
    assert not (tmp_path / "m.gguf").exists()


# ---- the whole way


def test_a_file_with_a_byte_level_vocabulary_needs_no_tokenizer_anywhere(
    byte_level_file, tmp_path, run, capsys
):
    path = byte_level_file()
    (tmp_path / "data.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in TEXTS * 4))
    words = [
        "--steps",
        "2",
        "--batch-size",
        "2",
        "--rank",
        "2",
        "--lr",
        "0.01",
        "--max-length",
        "64",
    ]
    run(
        train, "--weights", path, "--data", tmp_path / "data.jsonl", "--out", tmp_path / "r", *words
    )
    run(merge, tmp_path / "r", "--out", tmp_path / "merged")
    run(export, tmp_path / "merged", "--out", tmp_path / "out.gguf")
    before, after = FromFile(path), FromFile(tmp_path / "out.gguf")
    assert after.metadata == before.metadata
    assert any(after.raw[name] != before.raw[name] for name in before.raw)
    capsys.readouterr()
    said = []
    for model in (tmp_path / "r", tmp_path / "merged", tmp_path / "out.gguf"):
        run(sample, model, "--prompt", "Where does Miru", "--max-new-tokens", 8)
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] and said[0].startswith("Where does Miru")
    (tmp_path / "text.txt").write_text(TEXTS[0])
    run(evals, tmp_path / "out.gguf", "--perplexity", tmp_path / "text.txt")
    assert "perplexity" in capsys.readouterr().out
