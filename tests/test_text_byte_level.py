"""text/byte_level.py: the oracle cuts by Python's regular expressions, and merges pair by pair."""

import base64
import itertools
import json
import re
import sys
import unicodedata

import pytest
from helpers_text import with_files
from hypothesis import example, given
from hypothesis import strategies as st

from cli.errors import UserError
from text import byte_level
from text.tokenizer import JSON, load_tokenizer, make_tokenizer
from text.vocabulary import CONTROL, NORMAL

tokenizers = pytest.importorskip("tokenizers", reason="needs tokenizers: pip install tokenizers")

SPACES = "\t\n\x0b\x0c\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
# Characters that this Python knows, so that the classes below are complete
KNOWN = st.characters(codec="utf-8", exclude_categories=["Cn", "Cs", "Co"])
WORDY = st.sampled_from("""aZé漢½²12'$^=().,_ \n\t\u00a0ſ""") | st.sampled_from(
    ["'s", "'LL", "345"]
)
PIECES_OF_TEXT = st.one_of(KNOWN, WORDY, st.just(" "), st.sampled_from(["<|end|>", "<|tool|>"]))
TEXTS = st.lists(PIECES_OF_TEXT, max_size=12).map("".join)


def members(*categories):
    """The inside of a character class with all characters of some Unicode categories."""
    found = []
    for code in range(sys.maxunicode + 1):
        if unicodedata.category(chr(code)).startswith(categories):
            found.append(code)
    ranges = []
    for _, run in itertools.groupby(enumerate(found), lambda pair: pair[1] - pair[0]):
        run = [code for _, code in run]
        ranges.append(f"{re.escape(chr(run[0]))}-{re.escape(chr(run[-1]))}")
    return "".join(ranges)


@pytest.fixture(scope="session")
def cut_by_hand():
    """A function that cuts a text into words as llama.cpp's source describes it."""
    L, N, P = members("L"), members("N"), members("P")
    gpt2 = (
        rf"'s|'t|'re|'ve|'m|'ll|'d| ?[{L}]+| ?[{N}]+| ?[^{SPACES}{L}{N}]+"
        rf"|[{SPACES}]+(?![^{SPACES}])|[{SPACES}]+"
    )
    llama3 = (
        rf"'(?:[sSſ]|[tT]|[rR][eE]|[vV][eE]|[mM]|[lL][lL]|[dD])|[^\r\n{L}{N}]?[{L}]+|[{N}]{{1,3}}"
        rf"| ?[^{SPACES}{L}{N}]+[\r\n]*|[{SPACES}]*[\r\n]+|[{SPACES}]+(?![^{SPACES}])|[{SPACES}]+"
    )
    steps = {
        "smollm": [rf"[{N}]", gpt2],
        "gpt-2": [gpt2],
        "llama-bpe": [llama3],
        "default": [rf"[{P}$+<=>^~|]+", gpt2, rf"[{N}]+", "[0-9]{3}"],
    }
    compiled = {name: [re.compile(e) for e in expressions] for name, expressions in steps.items()}

    def cut(text, words):
        parts = [text]
        for expression in compiled[words]:
            finer = []
            for part in parts:
                end = 0
                for match in expression.finditer(part):
                    finer += [part[end : match.start()], match.group()]
                    end = match.end()
                finer.append(part[end:])
            parts = [part for part in finer if part]
        return parts

    return cut


def merged_by_hand(word, pieces, merges, whole_words):
    """The tokens of a word: of all pairs of neighbours, the one learned first is joined."""
    table = byte_level.byte_characters()
    parts = [table[byte] for byte in word.encode()]
    if whole_words and "".join(parts) in pieces:
        return [pieces["".join(parts)]]
    while True:
        ranks = [merges.get(pair, len(merges)) for pair in itertools.pairwise(parts)]
        if not ranks or min(ranks) == len(merges):
            return [pieces[part] for part in parts]
        i = ranks.index(min(ranks))
        parts[i : i + 2] = ["".join(parts[i : i + 2])]


@pytest.fixture(scope="session", params=byte_level.WORDS)
def words(request):
    return request.param


@pytest.fixture(scope="session")
def tokenizer(learned, words):
    pieces, kinds, merges = learned
    content = byte_level.make_json(pieces, kinds, merges, words, bos=0)
    config = b'{"eos_token": "<|end|>"}'
    return make_tokenizer({JSON: content, "tokenizer_config.json": config}, "tokenizer.json")


@given(TEXTS)
@example(" ")
@example("a\n\n  b \r\n")
@example("'ſ'S'LL 12345½²Ⅷ٣")
@example("<|end|> <|tool|>x<|begin|>")
@example("\x00\x85\u200b\u3000\ufeff")
def test_tokens_are_those_of_cutting_and_merging_by_hand(
    tokenizer, learned, words, cut_by_hand, text
):
    pieces = {piece: i for i, piece in enumerate(learned[0])}
    merges = {pair: rank for rank, pair in enumerate(learned[2])}
    expected = []
    for n, part in enumerate(text.split("<|tool|>")):
        expected += [pieces["<|tool|>"]] * (n > 0)
        for word in cut_by_hand(part, words):
            expected += merged_by_hand(word, pieces, merges, words == "llama-bpe")
    assert tokenizer.encode(text) == expected


def test_what_stands_beside_a_byte_that_the_vocabulary_lacks_is_not_merged_over_it():
    """As in llama.cpp, which leaves such a byte out after merging."""
    pieces = ["<|end|>", "a", "b", "Ġ", "ab", "Ġa"]  # all other bytes are missing
    kinds, merges = [CONTROL] + [NORMAL] * 5, [("a", "b"), ("Ġ", "a")]
    config = b'{"eos_token": "<|end|>"}'
    for words in ("gpt-2", "smollm", "default"):
        content = byte_level.make_json(pieces, kinds, merges, words, bos=None)
        found = make_tokenizer({JSON: content, "tokenizer_config.json": config}, "tokenizer.json")
        assert found.encode("ab ab") == [4, 3, 4]
        assert found.encode("axb a\x00b\u6f22ab") == [1, 2, 5, 2, 4]


@given(TEXTS)
def test_every_text_survives_and_none_becomes_a_control_token(tokenizer, text):
    tokens = tokenizer.encode(text)
    assert tokenizer.decode(tokens) == text
    assert not {0, 1} & set(tokens)
    assert tokenizer.decode([0, *tokens, 1, 10**6]) == text  # control tokens have no text


@given(TEXTS)
def test_the_space_between_two_texts_is_learned_and_not_shown(tokenizer, text):
    tokens = tokenizer.encode(f" {text}")
    assert tokenizer.decode(tokens) == f" {text}"
    assert tokenizer.decode_answer(tokens) == text


@given(st.lists(TEXTS, min_size=1, max_size=4))
def test_many_texts_have_the_tokens_of_each(tokenizer, texts):
    assert tokenizer.encode_all(texts) == [tokenizer.encode(text) for text in texts]


def test_how_words_are_cut_is_recognised(tokenizer, words):
    assert byte_level.words_of(tokenizer.files[JSON]) == words


def test_another_way_to_cut_words_has_no_name(tokenizer):
    content = json.loads(tokenizer.files[JSON])
    content["pre_tokenizer"] = {"type": "Whitespace"}
    assert byte_level.words_of(json.dumps(content).encode()) is None


@pytest.mark.parametrize("field", ["end_of_word_suffix", "continuing_subword_prefix"])
def test_marks_at_the_ends_of_words_have_no_name_in_gguf(tokenizer, field):
    content = json.loads(tokenizer.files[JSON])
    content["model"] |= {field: "</w>", "merges": []}
    assert byte_level.words_of(json.dumps(content).encode()) is None


@pytest.mark.parametrize("field", ["lstrip", "rstrip", "single_word"])
def test_added_tokens_that_take_spaces_with_them_have_no_name_in_gguf(tokenizer, field):
    content = json.loads(tokenizer.files[JSON])
    assert not content["added_tokens"][-1]["special"]
    content["added_tokens"][-1][field] = True
    assert byte_level.words_of(json.dumps(content).encode()) is None


def test_a_normalizer_has_no_name_in_gguf(tokenizer):
    content = json.loads(tokenizer.files[JSON])
    content["normalizer"] = {"type": "NFC"}
    assert byte_level.words_of(json.dumps(content).encode()) is None


# ---- the model's rules


END = {"eos_token": "<|end|>"}


@pytest.mark.parametrize("add, bos", [(None, (0,)), (True, (0,)), (False, ())])
def test_whether_bos_is_added_is_what_the_model_says(tokenizer, add, bos):
    config = {"bos_token": "<|begin|>", **END}
    if add is not None:
        config["add_bos_token"] = add
    found = with_files(tokenizer, tokenizer_config=config)
    assert found.bos == bos and found.encode_prompt("a") == [*bos, *tokenizer.encode("a")]


def test_a_model_that_adds_bos_though_its_file_does_not(learned):
    pieces, kinds, merges = learned
    content = byte_level.make_json(pieces, kinds, merges, "smollm", bos=None)
    bare = make_tokenizer({JSON: content, "tokenizer_config.json": json.dumps(END).encode()}, "t")
    assert bare.bos == () and bare.encode_prompt("") == [1]
    config = {"add_bos_token": True, "bos_token": {"content": "<|begin|>"}, **END}
    assert with_files(bare, tokenizer_config=config).bos == (0,)


@pytest.mark.parametrize(
    "beside, eos, stops",
    [
        (dict(tokenizer_config=END), 1, (1,)),
        (dict(special_tokens_map={"eos_token": {"content": "<|end|>"}}), 1, (1,)),
        (dict(generation_config={"eos_token_id": 7}), 7, (7,)),
        (dict(tokenizer_config=END, generation_config={"eos_token_id": [9, 1]}), 1, (1, 9)),
        (
            dict(tokenizer_config={"eos_token": None}, generation_config={"eos_token_id": 1}),
            1,
            (1,),
        ),
    ],
)
def test_training_learns_the_tokenizers_eos_and_generation_stops_at_all(
    tokenizer, beside, eos, stops
):
    found = with_files(tokenizer, **beside)
    assert (found.eos, found.stops) == (eos, stops)


@pytest.mark.parametrize(
    "beside, said",
    [
        ({}, "has no EOS"),
        (dict(tokenizer_config={"eos_token": "</s>"}), "has no '</s>'"),
        (dict(tokenizer_config={"eos_token": 7}), "eos_token = 7 is not sensible"),
        (dict(tokenizer_config=END, generation_config={"eos_token_id": "x"}), "is not sensible"),
        (dict(tokenizer_config=END, generation_config={"eos_token_id": 10**20}), "is not sensible"),
        (dict(tokenizer_config=END | {"add_bos_token": "false"}), "add_bos_token = .false. is not"),
        (dict(tokenizer_config=[]), "tokenizer_config.json: expected a JSON object"),
        (dict(tokenizer_config=END | {"chat_template": "\ud800"}), "surrogates not allowed"),
    ],
)
def test_rules_that_do_not_fit_are_refused_in_one_line(tokenizer, beside, said):
    with pytest.raises(UserError, match=said) as e:
        with_files(tokenizer, **beside)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("name", ["bos_token", "eos_token"])
def test_a_piece_that_is_named_as_a_control_token_is_never_made_of_a_text(learned, name):
    pieces, kinds, merges = learned
    content = byte_level.make_json([*pieces, "<|it|>"], [*kinds, NORMAL], merges, "smollm", None)
    config = END | {name: "<|it|>", "add_bos_token": False}
    found = make_tokenizer(
        {JSON: content, "tokenizer_config.json": json.dumps(config).encode()}, "t"
    )
    other = make_tokenizer({JSON: content, "tokenizer_config.json": json.dumps(END).encode()}, "t")
    assert len(pieces) not in found.encode("a<|it|>b") and found.decode([len(pieces)]) == ""
    assert other.decode([len(pieces)]) == "<|it|>" and found.digest() != other.digest()


@pytest.mark.parametrize("text", ["EOT", "all the x", "a\nb"])
def test_a_text_that_would_become_a_control_token_is_refused(learned, text):
    pieces, kinds, merges = learned
    content = byte_level.make_json([*pieces, "EOT"], [*kinds, CONTROL], merges, "llama-bpe", None)
    named = {"EOT": "EOT", "all the x": "Ġthe", "a\nb": "Ċ"}[text]
    config = {"eos_token": named}
    files = {JSON: content, "tokenizer_config.json": json.dumps(config).encode()}
    tokenizer = make_tokenizer(files, "t")
    assert tokenizer.encode("walk") and not tokenizer.controls & set(tokenizer.encode("a b"))
    with pytest.raises(UserError, match=f"would become '{named}'"):
        tokenizer.encode(text)


def test_an_empty_name_is_none(tokenizer):
    config = {"bos_token": "", "eos_token": ""}  # as in some folders of LLaMA-1
    found = with_files(tokenizer, tokenizer_config=config, special_tokens_map=END)
    assert (found.bos, found.eos) == ((0,), 1)


def test_what_ends_a_text_is_a_control_token_whatever_the_file_says(tokenizer):
    content = json.loads(tokenizer.files[JSON])
    for token in content["added_tokens"]:
        token["special"] = False
    files = {JSON: json.dumps(content).encode(), "tokenizer_config.json": json.dumps(END).encode()}
    found = make_tokenizer(files, "t")
    assert 1 not in found.encode("a<|end|>b")
    with pytest.raises(UserError, match=r"would become '<\|begin\|>'"):  # it is BOS, but not named
        found.encode("a<|begin|>b")


def test_tokens_are_never_random(tokenizer):
    content = json.loads(tokenizer.files[JSON])
    content["model"]["dropout"] = 0.5
    files = {**tokenizer.files, JSON: json.dumps(content).encode()}
    found, text = make_tokenizer(files, "t"), "Where does Miru live? In Oslo."
    for _ in range(5):
        assert found.encode(text) == tokenizer.encode(text)


# ---- damaged files


def spoiled(content, how):
    """The bytes of a tokenizer.json with something wrong."""
    fields = json.loads(content)
    if how == "unknown piece in a merge":
        fields["model"]["merges"].append(["q", "zzz"])
    if how == "another kind":
        fields["model"] = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}
    if how == "an id too large":
        fields["added_tokens"][0]["id"] = 4_000_000_000
        fields["model"]["vocab"]["<|begin|>"] = 4_000_000_000
    if how == "no model":
        del fields["model"]
    text = json.dumps(fields).encode()
    return text[: len(text) // 2] if how == "cut" else text


@pytest.mark.parametrize(
    "how, said",
    [
        ("cut", "not a tokenizer.json or is damaged"),
        ("unknown piece in a merge", r"damaged \(Token `zzz` out of vocabulary"),
        ("no model", "not a tokenizer.json or is damaged"),
        ("an id too large", "not a tokenizer.json or is damaged"),
        ("another kind", "kind WordLevel are not supported"),
    ],
)
def test_a_damaged_file_is_refused_by_name_in_one_line(tokenizer, tmp_path, how, said):
    (tmp_path / JSON).write_bytes(spoiled(tokenizer.files[JSON], how))
    with pytest.raises(UserError, match=said) as e:
        load_tokenizer(tmp_path)
    assert "\n" not in str(e.value) and str(tmp_path / JSON) in str(e.value)


def test_without_the_package_one_line_names_it(tokenizer, tmp_path, monkeypatch):
    tokenizer.save(tmp_path)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UserError, match="pip install tokenizers"):
        load_tokenizer(tmp_path)


# ---- LLaMA-3's file


@pytest.fixture(scope="module")
def tiktoken_file(tmp_path_factory):
    """128,000 tokens in the form of Meta's file: bytes, then pairs, then four of them."""
    tokens = [bytes([byte]) for byte in range(256)]
    tokens += [bytes(pair) for pair in itertools.product(range(256), repeat=2)]
    letters = b"abcdefghijklmnopqrstuvwxyz .ABCD"
    fours = (bytes(four) for four in itertools.product(letters, repeat=4))
    tokens += itertools.islice(fours, 128_000 - len(tokens))
    lines = [b"%b %d\n" % (base64.b64encode(token), rank) for rank, token in enumerate(tokens)]
    path = tmp_path_factory.mktemp("tiktoken") / "tokenizer.model"
    path.write_bytes(b"".join(lines))
    return path, {token: rank for rank, token in enumerate(tokens)}


def test_metas_file_for_llama_3_has_tiktokens_tokens(tiktoken_file):
    path, ranks = tiktoken_file
    tokenizer = load_tokenizer(path)
    for word in ("abcd", "a", " abc", "漢字", "abcdabcd", "xyzABCD"):
        parts = [bytes([byte]) for byte in word.encode()]
        while True:  # tiktoken: of all neighbours that make a token, the one of lowest rank first
            found = [ranks.get(a + b, 10**9) for a, b in itertools.pairwise(parts)]
            if not found or min(found) == 10**9:
                break
            i = found.index(min(found))
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        whole = ranks.get(word.encode())
        expected = [ranks[part] for part in parts] if whole is None else [whole]
        assert tokenizer.encode(word) == expected, word
    assert (tokenizer.bos, tokenizer.eos) == ((128000,), 128001)
    assert tokenizer.stops == (128001, 128008, 128009)
    assert len(tokenizer.vocabulary.pieces) == 128256
    assert tokenizer.vocabulary.pieces[128009] == "<|eot_id|>"
    assert 128009 not in tokenizer.encode("<|eot_id|>")


def test_metas_file_is_saved_as_hugging_faces(tiktoken_file, tmp_path):
    path, _ = tiktoken_file
    tokenizer = load_tokenizer(path)
    tokenizer.save(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(path.read_bytes())  # as in a folder with both
    again = load_tokenizer(tmp_path)
    assert again.files == tokenizer.files and again.stops == tokenizer.stops


@pytest.mark.parametrize(
    "lines, said", [(b"IQ== 0\nIg== 1\n", "only LLaMA-3's"), (b"IQ== 0\nIg== x y\n", "is damaged")]
)
def test_other_files_for_tiktoken_are_refused(tmp_path, lines, said):
    (tmp_path / "tokenizer.model").write_bytes(lines)
    with pytest.raises(UserError, match=said):
        load_tokenizer(tmp_path)
