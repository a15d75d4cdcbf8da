"""text/tokenizer.py: every text survives, and a file that is no tokenizer is refused by name."""

import hashlib
import itertools

import pytest
import sentencepiece
from helpers import TEXTS, save_tokenizer
from helpers_text import with_files
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from cli.errors import UserError
from text.instructions import read_records
from text.sentencepieces import piece_field
from text.tokenizer import MODEL, load_tokenizer, make_tokenizer, train_tokenizer
from text.vocabulary import CONTROL, UNKNOWN, UNUSED, USER_DEFINED


@given(TEXTS)
@example(" ")
@example("  two spaces, a tab\t, \r\n and \0 ")
@example("<s>a</s><0x0A><unk>")
@example("\ufeff\u2028\u00a0😀")
def test_any_text_survives_encode_and_decode(toy_tokenizer, text):
    assert toy_tokenizer.decode(toy_tokenizer.encode(text)) == text


@given(TEXTS)
def test_tokens_that_only_the_embedding_has_decode_to_nothing(toy_tokenizer, text):
    above = [len(toy_tokenizer.vocabulary.pieces), 2**31 - 1]
    tokens = []
    for pair in itertools.zip_longest(toy_tokenizer.encode(text), above):
        tokens += [token for token in pair if token is not None]
    assert toy_tokenizer.decode(tokens) == text


def test_a_prompt_begins_with_bos(toy_tokenizer):
    assert toy_tokenizer.encode_prompt("Oslo.") == [1, *toy_tokenizer.encode("Oslo.")]


def test_all_self_instruct_records_survive_a_round_trip(any_tokenizer, material):
    for record in read_records(material("self-instruct-seeds.json")).records:
        texts = [turn.text for turn in record]
        assert [any_tokenizer.decode(any_tokenizer.encode(text)) for text in texts] == texts


@settings(max_examples=20)
@given(taught=st.lists(TEXTS, min_size=1), text=TEXTS)
def test_a_tokenizer_trained_on_any_text_keeps_every_other_text(tmp_path_factory, taught, text):
    assume(any(t.strip() for t in taught))
    path = tmp_path_factory.mktemp("any") / "tokenizer.model"
    characters = set("▁" + "".join(taught).replace("\n", ""))
    try:
        tokenizer = train_tokenizer(taught, path, 259 + len(characters))
    except UserError:  # as spaces fold and lines are cut, this few pieces may be one too many
        assert not path.exists()
        return
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_tokenizer_numbers_its_special_pieces_like_llama(any_tokenizer):
    assert (any_tokenizer.bos, any_tokenizer.eos, any_tokenizer.stops) == ((1,), 2, (2,))
    assert any_tokenizer.vocabulary.kinds[:3] == [UNKNOWN, CONTROL, CONTROL]
    pieces = [any_tokenizer.vocabulary.pieces[3 + byte] for byte in (0, 10, 255)]
    assert pieces == ["<0x00>", "<0x0A>", "<0xFF>"]


def test_no_piece_of_a_trained_tokenizer_crosses_a_line_break(tmp_path):
    tokenizer = train_tokenizer(["one\ntwo\n\nthree " * 50], tmp_path / "t.model", 275)
    assert not any("\n" in tokenizer.vocabulary.pieces[i] for i in range(275))
    assert tokenizer.encode("\n\n")[-2:] == [13, 13]


def test_the_same_texts_train_the_same_tokenizer(toy_world, tmp_path):
    files = []
    for name in "ab":
        train_tokenizer(toy_world.heldout, tmp_path / name, 400)
        files.append((tmp_path / name).read_bytes())
    assert files[0] == files[1]


def test_a_tokenizer_is_found_in_a_model_folder_and_in_a_run_folder(toy_tokenizer, tmp_path):
    model, run = tmp_path / "model", tmp_path / "run"
    for folder in (model, run / "base"):
        folder.mkdir(parents=True)
        save_tokenizer(toy_tokenizer, folder)
    proto = toy_tokenizer.files["tokenizer.model"]
    for path in (model, run, run / "base" / "tokenizer.model"):
        assert load_tokenizer(path).files == {"tokenizer.model": proto}


@pytest.mark.parametrize("content", [None, b"", b"no model", "cut"])
def test_a_missing_or_damaged_tokenizer_is_refused_by_name(toy_tokenizer, tmp_path, content):
    if content == "cut":
        content = toy_tokenizer.files["tokenizer.model"][:3000]
    if content is not None:
        (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(UserError, match="tokenizer.model"):
        load_tokenizer(tmp_path)


def renamed(tokenizer, old, new):
    """The content of a tokenizer.model with one piece under another name of equal length."""
    content, field = tokenizer.files["tokenizer.model"], b"\x0a%c" % len(old)
    assert content.count(field + old) == 1
    return content.replace(field + old, field + new)


@pytest.mark.parametrize(
    "beside",
    [
        dict(tokenizer_config={"eos_token": "<|im_end|>"}),
        dict(tokenizer_config={"bos_token": "<|im_end|>"}),
        dict(generation_config={"eos_token_id": [2, 512]}),
        dict(special_tokens_map={"additional_special_tokens": ["<|im_end|>"]}),
        dict(tokenizer_config={"additional_special_tokens": [{"content": "<|im_end|>"}]}),
        dict(tokenizer_config={"added_tokens_decoder": {"512": {"content": "<|im_end|>"}}}),
    ],
)
def test_a_piece_that_the_rules_call_a_control_token_is_one_whatever_the_model_says(
    toy_tokenizer, beside
):
    content = toy_tokenizer.files[MODEL] + piece_field("<|im_end|>", 0.0, USER_DEFINED)
    itself = make_tokenizer({MODEL: content}, "t")
    assert 512 in itself.encode("a<|im_end|>b") and itself.vocabulary.kinds[512] == USER_DEFINED
    ruled = with_files(itself, **beside)
    assert 512 not in ruled.encode("a<|im_end|>b") and ruled.decode([512]) == ""
    assert ruled.decode(ruled.encode("a<|im_end|>b")) == "a<|im_end|>b"
    assert ruled.files[MODEL] == content and ruled.digest() != itself.digest()


@pytest.mark.parametrize("end, text", [("<0x0A>", "a\nb"), ("▁is", "he is")])
def test_a_text_that_would_become_the_end_is_refused(toy_tokenizer, end, text):
    ruled = with_files(toy_tokenizer, tokenizer_config={"eos_token": end})
    if end in ruled.vocabulary.pieces and ruled.vocabulary.kinds[ruled.eos] == CONTROL:
        assert ruled.eos not in ruled.encode(text)  # it is spelled from smaller pieces
    else:
        with pytest.raises(UserError, match=f"would become '{end}'"):
            ruled.encode(text)


@pytest.mark.parametrize("more", [b"\x08\x01", b"\x10\x01", b"\x18\x01", b"\x0a\x02\x08\x05"])
def test_fields_of_other_types_are_a_damaged_model(toy_tokenizer, more):
    with pytest.raises(UserError, match="damaged"):
        make_tokenizer({MODEL: toy_tokenizer.files[MODEL] + more}, "t")


@pytest.mark.parametrize("content", [b"", b"[]", b"null", b"\xef\xbb\xbf{}"])
def test_a_tokenizer_json_that_is_none_is_called_so(tmp_path, content):
    pytest.importorskip("tokenizers", reason="needs tokenizers")
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(UserError, match="is not a tokenizer.json or is damaged"):
        load_tokenizer(tmp_path)


def test_a_digest_tells_which_pieces_the_rules_made_control_tokens(toy_tokenizer):
    more = piece_field("<a>", 0.0, USER_DEFINED) + piece_field("<b>", 0.0, USER_DEFINED)
    itself = make_tokenizer({MODEL: toy_tokenizer.files[MODEL] + more}, "t")
    digests = {itself.digest()}
    for i, text in ((512, "<a>"), (513, "<b>")):
        config = {"added_tokens_decoder": {str(i): {"content": text, "special": True}}}
        digests.add(with_files(itself, tokenizer_config=config).digest())
    assert len(digests) == 3


def test_an_end_that_the_vocabulary_lacks_ends_nothing(toy_tokenizer):
    ruled = with_files(toy_tokenizer, generation_config={"eos_token_id": [2, 32007]})
    assert ruled.stops == (2,)


def test_a_tokenizer_without_eos_is_refused(toy_tokenizer, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(renamed(toy_tokenizer, b"</s>", b"</b>"))
    with pytest.raises(UserError, match="no EOS"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_without_bos_puts_none_before_a_text(toy_tokenizer, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(renamed(toy_tokenizer, b"<s>", b"<b>"))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.bos == () and tokenizer.encode_prompt("Oslo.") == tokenizer.encode("Oslo.")
    (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": true}')
    with pytest.raises(UserError, match="no BOS"):
        load_tokenizer(tmp_path)


def test_bos_may_be_the_first_piece_of_a_tokenizer(tmp_path):
    with (tmp_path / "tokenizer.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["a tale"]),
            model_writer=file,
            bos_id=0,
            eos_id=1,
            unk_id=2,
            vocab_size=12,
            hard_vocab_limit=False,
            minloglevel=2,
        )
    assert load_tokenizer(tmp_path).bos == (0,)


@pytest.mark.parametrize(
    "taught, vocab_size, why",
    [
        ([], 512, "it is empty"),
        ([""], 512, "it is empty"),
        (["abc"], 512, "too high"),
        (["abc"], 200, "is smaller"),
    ],
)
def test_text_that_cannot_give_so_many_pieces_is_refused_and_nothing_is_written(
    tmp_path, taught, vocab_size, why
):
    with pytest.raises(UserError, match=f"no tokenizer of {vocab_size} pieces.*{why}"):
        train_tokenizer(taught, tmp_path / "tokenizer.model", vocab_size)
    assert not list(tmp_path.iterdir())


# ---- added tokens


@given(TEXTS, TEXTS)
def test_an_added_control_token_is_never_made_of_a_text_and_a_users_always_is(
    toy_tokenizer, before, after
):
    size = len(toy_tokenizer.vocabulary.pieces)
    decoder = {
        f"{size}": {"content": "<|im_end|>", "special": True},
        f"{size + 1}": {"content": "<tool>", "special": False},
    }
    tokenizer = with_files(
        toy_tokenizer,
        tokenizer_config={"added_tokens_decoder": decoder, "eos_token": "<|im_end|>"},
    )
    assert (tokenizer.eos, tokenizer.bos) == (size, (1,))
    text = f"{before}<|im_end|>{after}"
    assert tokenizer.encode(text) == toy_tokenizer.encode(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assume("<tool>" not in before + after)
    text = f"{before}<tool>{after}"
    assert tokenizer.encode(text).count(size + 1) == 1
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_added_tokens_keep_their_numbers_where_some_are_missing(toy_tokenizer):
    size = len(toy_tokenizer.vocabulary.pieces)
    added = {"[PAD]": size + 2, "<s>": 1}
    tokenizer = with_files(toy_tokenizer, added_tokens=added)
    assert tokenizer.vocabulary.pieces[size:] == [f"[PAD{size}]", f"[PAD{size + 1}]", "[PAD]"]
    assert tokenizer.vocabulary.kinds[size:] == [UNUSED, UNUSED, CONTROL]
    assert tokenizer.largest_id() == size - 1  # an embedding need not have what no text becomes
    with_eos = with_files(
        toy_tokenizer, added_tokens=added, special_tokens_map={"eos_token": "[PAD]"}
    )
    assert with_eos.largest_id() == size + 2


@pytest.mark.parametrize(
    "beside",
    [
        dict(added_tokens={"x": "one"}),
        dict(tokenizer_config={"added_tokens_decoder": {"400": "x"}}),
        dict(tokenizer_config={"added_tokens_decoder": ["x"]}),
        dict(added_tokens={"x": 10**9}),
        dict(added_tokens={"x": -1}),
        dict(added_tokens={"x": float("inf")}),
        dict(added_tokens={"\ud800": 600}),
    ],
)
def test_damaged_added_tokens_are_refused_in_one_line(toy_tokenizer, beside):
    with pytest.raises(
        UserError, match="added tokens beside it are damaged|surrogates not allowed"
    ):
        with_files(toy_tokenizer, **beside)


def test_what_ends_a_text_is_a_control_token_whatever_the_file_says(toy_tokenizer):
    size = len(toy_tokenizer.vocabulary.pieces)
    decoder = {f"{size}": {"content": "<|im_end|>", "special": False}}
    config = {"added_tokens_decoder": decoder, "eos_token": "<|im_end|>"}
    tokenizer = with_files(toy_tokenizer, tokenizer_config=config)
    assert tokenizer.eos == size and size not in tokenizer.encode("a<|im_end|>b")


def test_a_piece_that_is_no_text_is_refused(toy_tokenizer, tmp_path):
    content = toy_tokenizer.files["tokenizer.model"]
    spoiled = content.replace("▁w".encode(), b"\xff\xfe\xfdw", 1)
    assert spoiled != content
    (tmp_path / "tokenizer.model").write_bytes(spoiled)
    with pytest.raises(UserError, match="a piece of it is not UTF-8"):
        load_tokenizer(tmp_path)


def test_the_digest_is_that_of_the_file_until_other_files_change_the_tokens(toy_tokenizer):
    """So a run of an earlier version is recognised, and a chat template changes nothing."""
    own = hashlib.sha256(toy_tokenizer.files["tokenizer.model"]).hexdigest()
    size = len(toy_tokenizer.vocabulary.pieces)
    plain = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": "x", "add_bos_token": True}
    same = with_files(
        toy_tokenizer, tokenizer_config=plain, generation_config={"eos_token_id": 2, "top_p": 0.9}
    )
    assert toy_tokenizer.digest() == same.digest() == own
    digests = {own}
    for beside in (
        dict(tokenizer_config={"add_bos_token": False}),
        dict(generation_config={"eos_token_id": [2, 5]}),
        dict(added_tokens={"<x>": size}),
        dict(tokenizer_config={"added_tokens_decoder": {size: {"content": "y", "special": False}}}),
    ):
        digests.add(with_files(toy_tokenizer, **beside).digest())
    assert len(digests) == 5


def test_what_stands_beside_a_tokenizer_is_kept_with_it(toy_tokenizer, tmp_path):
    save_tokenizer(toy_tokenizer, tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 5]}')
    tokenizer = load_tokenizer(tmp_path)
    (tmp_path / "copy").mkdir()
    tokenizer.save(tmp_path / "copy")
    again = load_tokenizer(tmp_path / "copy")
    assert again.stops == tokenizer.stops == (2, 5)
    assert again.digest() == tokenizer.digest() != toy_tokenizer.digest()
