"""Byte-level BPE, LLaMA-3's and SmolLM2's kind: a file tokenizer.json, read by `tokenizers`.

A text's bytes are written as 256 printable characters (GPT-2's table), cut into words by a regular
expression, and merged within a word in the order of a list of merges. Vocabularies that come in
other files, GGUF's and Meta's for tiktoken, are made into such a file.

The `tokenizers` package (pip install tokenizers) is imported only where it is needed.
"""

import base64
import json
import pathlib
import re
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from cli.errors import UserError
from text.vocabulary import (
    BYTE,
    CONTROL,
    MOST,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    Vocabulary,
    padding_name,
)

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
# How a text is cut into words, by the name that GGUF has for it (`tokenizer.ggml.pre`): one
# expression after another. They are llama.cpp's (src/llama-vocab.cpp) and, where a model's own
# tokenizer.json is cut so, the same as there
WORDS = {
    "smollm": [r"\p{N}", GPT2],
    "llama-bpe": [LLAMA3],
    "gpt-2": [GPT2],
    "default": [r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"],
}
WHOLE_WORDS = ("llama-bpe",)  # a word that is a piece is not merged from its bytes
# Cut differently by each of them
PROBE = "I'LL say we'll 12345 ½³ (x+=y)\r\n\n  \t é漢字\u00a0a$b^c~~ \n z   "


def tokenizers_package() -> ModuleType:
    """The `tokenizers` module; UserError where it is not installed."""
    try:
        import tokenizers
    except ImportError:
        raise UserError(
            "this model's tokenizer is byte-level BPE, which needs the tokenizers package; run: "
            "pip install tokenizers"
        ) from None
    return tokenizers


def open_json(content: bytes, controls: set, where: str | pathlib.Path) -> Vocabulary:
    """The vocabulary in the bytes of a tokenizer.json; `where` is for errors.

    controls: texts of pieces, and ids of added tokens, that are control tokens even where the file
    says no. Other pieces stay what they are, even if they end an answer, as a line break may.

    A byte that the vocabulary lacks is left out of a text: SmolLM2's lacks 21 of 256, of which six
    are control characters and the others rare planes or no part of UTF-8. Raises UserError for what
    `tokenizers` cannot read, or is no BPE.
    """
    package = tokenizers_package()
    try:
        fields = json.loads(content)
        kind = fields["model"]["type"]
        fields["model"]["dropout"] = None  # with it, tokens would be random
        added = fields["added_tokens"] = fields.get("added_tokens") or []
        for token in added:
            token["special"] |= token["content"] in controls or token["id"] in controls
        known = {token["id"] for token in added}
        for piece, i in fields["model"]["vocab"].items() if kind == "BPE" else ():
            if i not in known and piece in controls:
                added.append(added_token(piece, i))
        tokenizer = package.Tokenizer.from_str(json.dumps(fields))
        plain, framed = tokenizer.encode("a", add_special_tokens=False), tokenizer.encode("a")
        if max(tokenizer.get_vocab().values(), default=0) >= MOST:
            raise ValueError("an id is too large")
    except BaseException as e:  # the package raises Exception itself, and panics
        if isinstance(e, KeyboardInterrupt):
            raise
        reason = " ".join(str(e).split())[:100]
        raise UserError(
            f"{where} is not a tokenizer.json or is damaged ({reason}); copy the model's again"
        ) from None
    if kind != "BPE":
        raise UserError(f"{where}: tokenizers of the kind {kind} are not supported, only BPE is")
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True  # text that spells a control token is ordinary text
    pieces, kinds = pieces_of(tokenizer)

    def encode_all(texts):
        return [e.ids for e in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    bos = framed.ids[0] if framed.ids[:1] != plain.ids[:1] else None
    adds_space = plain.tokens[:1] != [] and plain.tokens[0][0] in "▁Ġ"
    return Vocabulary(pieces, kinds, bos, None, adds_space, encode_all, tokenizer.decode)


def added_token(piece: str, i: int) -> dict:
    """A control token as a tokenizer.json has it."""
    no = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": i, "content": piece, "special": True, **no}


def pieces_of(tokenizer: Any) -> tuple[list[str], list[int]]:
    """(pieces, kinds) of every id of a `tokenizers.Tokenizer`."""
    added, model = tokenizer.get_added_tokens_decoder(), tokenizer.model
    ids = tokenizer.get_vocab(with_added_tokens=True)
    pieces = [padding_name(i) for i in range(max(ids.values(), default=-1) + 1)]
    kinds = [UNUSED] * len(pieces)
    for piece, i in ids.items():
        pieces[i], kinds[i] = piece, NORMAL
        if i in added:
            kinds[i] = CONTROL if added[i].special else USER_DEFINED
        if model.byte_fallback and re.fullmatch("<0x[0-9A-F]{2}>", piece):
            kinds[i] = BYTE
        if piece == model.unk_token:
            kinds[i] = UNKNOWN
    return pieces, kinds


def byte_characters() -> list[str]:
    """The character that stands for each byte: itself where it is printable (GPT-2's table)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    characters = {byte: chr(byte) for byte in printable}
    characters |= {byte: chr(256 + n) for n, byte in enumerate(others)}
    return [characters[byte] for byte in range(256)]


# ---- made from other files


def make_json(
    pieces: list[str], kinds: list[int], merges: list[tuple[str, str]], words: str, bos: int | None
) -> bytes:
    """The content of a tokenizer.json with these pieces and merges.

    words: a name in WORDS. bos: the piece that is put before a text. Raises UserError for merges of
    what are no pieces.
    """
    package = tokenizers_package()
    ids = {piece: i for i, piece in enumerate(pieces)}
    if len(ids) < len(pieces):
        raise UserError("a piece is there twice")
    try:
        model = package.models.BPE(ids, merges, ignore_merges=words in WHOLE_WORDS)
    except Exception as e:  # the package raises Exception itself
        raise UserError(f"a merge names an unknown piece ({' '.join(str(e).split())})") from None
    tokenizer = package.Tokenizer(model)
    tokenizer.pre_tokenizer = cutter(words, [c for c in byte_characters() if c not in ids])
    tokenizer.decoder = package.decoders.ByteLevel()
    for kind, add in (
        (CONTROL, tokenizer.add_special_tokens),
        (USER_DEFINED, tokenizer.add_tokens),
    ):
        its_pieces = [piece for piece, k in zip(pieces, kinds, strict=True) if k == kind]
        add([package.AddedToken(piece, normalized=False) for piece in its_pieces])
    if bos is not None:
        tokenizer.post_processor = package.processors.TemplateProcessing(
            single=f"{pieces[bos]} $A", special_tokens=[(pieces[bos], bos)]
        )
    return tokenizer.to_str(pretty=True).encode()


def cutter(words: str, missing: Sequence[str] = ()) -> Any:
    """The pre-tokenizer that cuts a text into words as WORDS[words] says.

    missing: characters of bytes that the vocabulary lacks. They are left out, and what stands on
    either side of one is not merged, as in llama.cpp; by itself the package would merge it.
    """
    package = tokenizers_package()
    steps = []
    for expression in WORDS[words]:
        steps.append(package.pre_tokenizers.Split(package.Regex(expression), "isolated"))
    steps.append(package.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    if missing:
        pattern = "|".join(map(re.escape, missing))
        steps.append(package.pre_tokenizers.Split(package.Regex(pattern), "removed"))
    return package.pre_tokenizers.Sequence(steps)


def words_of(content: bytes) -> str | None:
    """The name in WORDS of how a tokenizer.json cuts a text into words; None if it has none."""
    tokenizer = tokenizers_package().Tokenizer.from_str(content.decode())
    model = tokenizer.model
    if model.end_of_word_suffix or model.continuing_subword_prefix:
        return None
    for token in tokenizer.get_added_tokens_decoder().values():
        if not token.special and (token.lstrip or token.rstrip or token.single_word):
            return None
    if tokenizer.normalizer is not None or tokenizer.pre_tokenizer is None:
        return None
    found = tokenizer.pre_tokenizer.pre_tokenize_str(PROBE)
    for name in WORDS:
        same = found == cutter(name).pre_tokenize_str(PROBE)
        if same and model.ignore_merges == (name in WHOLE_WORDS):
            return name
    return None


def merges_in(content: bytes) -> list[list[str]]:
    """The merges of a tokenizer.json, pairs of pieces; older files have "left right"."""
    merges = json.loads(content)["model"]["merges"]
    return [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]


def falls_back_to_bytes(content: bytes) -> bool:
    """Whether a tokenizer.json was made of a sentencepiece model: its bytes are pieces (<0x0A>)."""
    return bool(json.loads(content)["model"].get("byte_fallback"))


def changes_characters(content: bytes) -> bool:
    """Whether a tokenizer.json made of a sentencepiece model changes more than spaces to U+2581."""
    fields = json.loads(content)
    normalizer, words = fields.get("normalizer") or {}, fields.get("pre_tokenizer") or {}
    steps = normalizer.get("normalizers", [normalizer] if normalizer else [])
    plain = (
        {"type": "Prepend", "prepend": "▁"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
    )
    for step in steps:
        if not any(known.items() <= step.items() for known in plain):
            return True
    return words.get("type") is not None and words.get("replacement") != "▁"


# ---- Meta's file of LLaMA-3


# What follows the 128,000 tokens of the file, in this order; reserved ones fill up to 256
LLAMA3_CONTROLS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>",
    "<|reserved_special_token_2|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
)


def is_tiktoken(content: bytes) -> bool:
    """Whether a tokenizer.model is Meta's for tiktoken: lines of a token in base64 and its rank."""
    return re.match(rb"[A-Za-z0-9+/]+={0,2} \d+\n", content[:200]) is not None


def from_tiktoken(content: bytes, where: str | pathlib.Path) -> dict[str, bytes]:
    """Hugging Face's files of what is in LLaMA-3's tokenizer.model; UserError for another model's.

    tiktoken merges two tokens if their bytes together are a token, the one of lowest rank first. So
    every way to cut a token into two is a merge, in the order of the tokens.
    """
    try:
        lines = [line.split() for line in content.splitlines()]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
    except ValueError:
        raise UserError(f"{where} is damaged; copy the model's tokenizer.model again") from None
    if list(ranks.values()) != list(range(128_000)):
        raise UserError(
            f"{where}: of tiktoken's files only LLaMA-3's, with 128,000 tokens, is supported; "
            "put the model's tokenizer.json there instead"
        )
    characters = byte_characters()
    written = {token: "".join(characters[byte] for byte in token) for token in ranks}
    merges = []
    for token in ranks:
        cuts = [(token[:i], token[i:]) for i in range(1, len(token))]
        cuts = [(a, b) for a, b in cuts if a in ranks and b in ranks]
        for a, b in sorted(cuts, key=lambda cut: (ranks[cut[0]], ranks[cut[1]])):
            merges.append((written[a], written[b]))
    controls = list(LLAMA3_CONTROLS)
    controls += [f"<|reserved_special_token_{i - 8}|>" for i in range(len(controls), 256)]
    pieces = [*written.values(), *controls]
    kinds = [NORMAL] * len(ranks) + [CONTROL] * len(controls)
    begin, end, *_ = range(len(ranks), len(pieces))
    stops = [end, pieces.index("<|eom_id|>"), pieces.index("<|eot_id|>")]
    config = {"bos_token": pieces[begin], "eos_token": pieces[end]}
    return {
        "tokenizer.json": make_json(pieces, kinds, merges, "llama-bpe", begin),
        "tokenizer_config.json": json.dumps(config, indent=1).encode(),
        "generation_config.json": json.dumps({"eos_token_id": stops}, indent=1).encode(),
    }
