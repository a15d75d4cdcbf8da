"""A GGUF file's vocabulary, as a tokenizer and back: `tokenizer.ggml.*` in its metadata.

Two kinds (`tokenizer.ggml.model`): "llama" is sentencepiece's BPE, with pieces, scores and kinds;
"gpt2" is byte-level BPE, with pieces, kinds and merges, and a name for how a text is cut into words
(`pre`). What ends a text besides EOS is not in the file: llama.cpp knows it by its name.
"""

import json
import pathlib
import struct
from typing import Any

from cli.errors import UserError
from text import byte_level, sentencepieces
from text.tokenizer import JSON, MODEL, Tokenizer, make_tokenizer
from text.vocabulary import CONTROL, NORMAL, UNKNOWN, UNUSED, padding_name

PREFIX = "tokenizer.ggml."
TEMPLATE = "tokenizer.chat_template"
# Some of the tokens that end a text or a turn for llama.cpp, whatever a file says of their kind
# (llama-vocab.cpp)
ENDS = (
    "</s>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end|>",
    "<end_of_turn>",
)


# ---- from a file


def tokenizer_of(metadata: dict[str, Any], path: pathlib.Path) -> Tokenizer:
    """The tokenizer in a GGUF file's metadata; UserError, naming the file, for one of other kinds.

    Its files are what Hugging Face's folders hold.
    """
    found = {key.removeprefix(PREFIX): value for key, value in metadata.items()}
    kind, pieces = found.get("model"), found.get("tokens")
    if kind not in ("llama", "gpt2"):
        raise UserError(
            f"{path}: its tokenizer is of the kind {kind}; only llama and gpt2 are supported"
        )
    if not isinstance(pieces, list) or not all(isinstance(piece, str) for piece in pieces):
        raise UserError(f"{path}: its vocabulary has no pieces; fetch it again")
    kinds = numbers(found, "token_type", pieces, path)
    if not all(k in range(1, 7) for k in kinds):
        raise UserError(f"{path}: {PREFIX}token_type has other numbers than 1 to 6; fetch it again")
    kinds = [int(k) for k in kinds]
    special = special_ids(found, pieces, path)
    for i, piece in enumerate(pieces):
        if piece in ENDS:
            kinds[i] = CONTROL
    if kind == "llama":
        scores = [float(score) for score in numbers(found, "scores", pieces, path)]
    else:
        byte_level.tokenizers_package()  # where it is missing the file is not at fault
    try:
        if kind == "llama":
            if UNKNOWN not in kinds:
                kinds[special["unknown"]] = UNKNOWN
            adds_space = bool(found.get("add_space_prefix", True))
            files = {MODEL: sentencepieces.make_model(pieces, scores, kinds, adds_space)}
        else:
            files = {JSON: byte_level_json(found, pieces, kinds)}
    except UserError as e:
        raise UserError(f"{path}: {e}; its vocabulary is damaged or of another kind") from None
    return make_tokenizer(files | rules(found, pieces, special), path)


def byte_level_json(found: dict, pieces: list[str], kinds: list[int]) -> bytes:
    """The content of a tokenizer.json."""
    words = found.get("pre", "default")
    if not isinstance(words, str) or words not in byte_level.WORDS:
        raise UserError(
            f"texts are cut into words as {PREFIX}pre = {words} says, and only "
            f"{', '.join(byte_level.WORDS)} are supported"
        )
    merges = found.get("merges")
    merges = merges if isinstance(merges, list) else []
    merges = [tuple(str(merge).split(" ")) for merge in merges]
    if not merges or any(len(merge) != 2 for merge in merges):
        raise UserError(f"{PREFIX}merges is missing or not a list of pairs of pieces")
    return byte_level.make_json(pieces, kinds, merges, words, None)


def special_ids(found: dict, pieces: list[str], path: pathlib.Path) -> dict[str, int | None]:
    """{name: id} of the tokens that a file names, None for others; llama's have 0, 1 and 2."""
    ids = {"unknown": 0, "bos": 1, "eos": 2} if found["model"] == "llama" else {}
    for name in ("unknown", "bos", "eos", "eot", "eom"):
        i = ids[name] = found.get(f"{name}_token_id", ids.get(name))
        if i is not None and not (type(i) is int and 0 <= i < len(pieces)):
            raise UserError(
                f"{path}: {PREFIX}{name}_token_id = {i} is none of its {len(pieces)} "
                "pieces; fetch it again"
            )
    if ids["eos"] is None:
        raise UserError(f"{path}: {PREFIX}eos_token_id is missing; fetch it again")
    return ids


def rules(found: dict, pieces: list[str], special: dict[str, int | None]) -> dict[str, bytes]:
    """Hugging Face's files of the rules around a text."""
    stops = {special[name]: None for name in ("eos", "eot", "eom") if special[name] is not None}
    stops |= {i: None for i, piece in enumerate(pieces) if piece in ENDS}
    config = {"eos_token": pieces[special["eos"]]}
    if special["bos"] is not None:
        config["bos_token"] = pieces[special["bos"]]
    adds_bos = found["model"] == "llama" or found.get("pre") == "llama-bpe"  # by default
    config["add_bos_token"] = bool(found.get("add_bos_token", adds_bos))
    if TEMPLATE in found:
        config["chat_template"] = found[TEMPLATE]
    return {
        "tokenizer_config.json": json.dumps(config, indent=1).encode(),
        "generation_config.json": json.dumps({"eos_token_id": list(stops)}, indent=1).encode(),
    }


def numbers(found: dict, name: str, pieces: list[str], path: pathlib.Path) -> list:
    """A number for each piece; where token_type is missing, NORMAL for all."""
    values = found.get(name)
    if values is None and name == "token_type":
        values = [NORMAL] * len(pieces)
    are_numbers = isinstance(values, list) and all(  # below 1e38, as float32 keeps them
        type(v) in (int, float) and abs(v) < 1e38 for v in values
    )
    if not are_numbers or len(values) != len(pieces):
        raise UserError(
            f"{path}: {PREFIX}{name} does not have a number for each of its {len(pieces)} pieces; "
            "fetch it again"
        )
    return values


# ---- into a file


def write_vocabulary(writer: Any, tokenizer: Tokenizer, size: int) -> None:
    """Adds a tokenizer to a GGUFWriter, filled up to `size` pieces.

    Raises UserError for a tokenizer that is larger than `size`, or that does what llama.cpp does
    not.
    """
    pieces, kinds = tokenizer.vocabulary.pieces, tokenizer.vocabulary.kinds
    tokenizer.check_fits(size, "the model")
    padding = range(len(pieces), size)
    pieces = [*pieces, *(padding_name(i) for i in padding)][:size]
    kinds = [*kinds, *(UNUSED for _ in padding)][:size]
    if MODEL in tokenizer.files:
        write_pieces(writer, tokenizer, scores_in_model(tokenizer.files[MODEL]), size)
    elif byte_level.falls_back_to_bytes(tokenizer.files[JSON]):
        write_pieces(writer, tokenizer, scores_of_merges(tokenizer), size)
    else:
        write_byte_level(writer, tokenizer)
    writer.add_token_list(pieces)
    writer.add_token_types(kinds)
    writer.add_add_bos_token(bool(tokenizer.bos))
    writer.add_add_eos_token(False)
    writer.add_eos_token_id(tokenizer.eos)
    stops = [i for i in tokenizer.stops if i < size]
    others = [i for i in stops if i != tokenizer.eos and pieces[i] not in ENDS]
    if len(others) > 2:
        raise UserError(
            f"GGUF has room for three tokens that end a text, and this tokenizer has {len(stops)}; "
            "take some out of eos_token_id in its generation_config.json"
        )
    for add, i in zip((writer.add_eot_token_id, writer.add_eom_token_id), others, strict=False):
        add(i)
    if tokenizer.bos:
        writer.add_bos_token_id(*tokenizer.bos)
    if UNKNOWN in kinds:
        writer.add_unk_token_id(kinds.index(UNKNOWN))
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def with_format(header: bytes, reader: Any, tokenizer: Tokenizer) -> bytes:
    """A GGUF file's header (all before the tensors' data) with the tokenizer's chat template.

    And with the end of its turn, where llama.cpp would not know it. reader: a GGUFReader of a file
    that begins with `header`, which stays as it is where all that is there already.
    """
    found = {key: field.contents() for key, field in reader.fields.items()}
    changes, template = {}, tokenizer.chat_template
    if template is not None and found.get(TEMPLATE) != template:
        text = template.encode()
        changes[TEMPLATE] = struct.pack("<IQ", 8, len(text)) + text  # 8: a string
    known = {found.get(f"{PREFIX}{name}_token_id") for name in ("eos", "eot", "eom")}
    for i in tokenizer.stops:
        if i not in known and tokenizer.vocabulary.pieces[i] not in ENDS:
            changes[f"{PREFIX}eot_token_id"] = struct.pack("<II", 4, i)  # 4: an unsigned integer
    return with_metadata(header, reader, changes) if changes else header


def with_metadata(header: bytes, reader: Any, changes: dict[str, bytes]) -> bytes:
    """The header with other metadata: {key: type and value in bytes}."""
    last = reader.tensors[-1].field
    changed, added = header[: last.offset + sum(part.nbytes for part in last.parts)], 0
    places = {}
    for key in changes:
        field = reader.fields.get(key)
        added += field is None
        place = reader.tensors[0].field if field is None else field
        size = 0 if field is None else sum(part.nbytes for part in field.parts)
        places[key] = int(place.offset), size
    for key, (start, size) in sorted(places.items(), key=lambda item: -item[1][0]):
        name = key.encode()
        entry = struct.pack("<Q", len(name)) + name + changes[key]
        changed = changed[:start] + entry + changed[start + size :]
    (count,) = struct.unpack_from("<Q", header, 16)  # after magic, version and number of tensors
    changed = changed[:16] + struct.pack("<Q", count + added) + changed[24:]
    return changed + bytes(-len(changed) % int(reader.alignment))


def write_pieces(writer: Any, tokenizer: Tokenizer, scores: list[float], size: int) -> None:
    """Adds what only sentencepiece's kind has; a piece without a score is never merged."""
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_scores((scores + [-10000.0] * (size - len(scores)))[:size])
    writer.add_add_space_prefix(tokenizer.vocabulary.adds_space)


def scores_in_model(content: bytes) -> list[float]:
    """The score of every piece of a tokenizer.model; UserError as `check_like_llama` does."""
    fields = list(sentencepieces.fields(content))
    check_like_llama(fields)
    scores = []
    for number, piece in fields:
        if number == 1:
            score = dict(sentencepieces.fields(piece)).get(2, bytes(4))
            scores.append(struct.unpack("<f", score)[0])
    return scores


def scores_of_merges(tokenizer: Tokenizer) -> list[float]:
    """Scores for a tokenizer.json made of a sentencepiece model: the earlier a merge, the higher.

    llama.cpp then merges in the same order. Raises UserError for one that changes characters.
    """
    content = tokenizer.files[JSON]
    if byte_level.changes_characters(content):
        raise UserError(
            "llama.cpp would tokenize otherwise than this tokenizer.json: it changes characters; "
            "only tokenizers like LLaMA's can be exported"
        )
    merges, first = byte_level.merges_in(content), {}
    for rank, (left, right) in enumerate(merges):
        first.setdefault(left + right, rank)
    return [-float(first.get(piece, len(merges))) for piece in tokenizer.vocabulary.pieces]


def check_like_llama(fields: list[tuple[int, bytes]]) -> None:
    """Raises UserError where llama.cpp would tokenize otherwise than a sentencepiece model.

    It merges pieces by score (sentencepiece's BPE) and normalizes nothing but spaces. `fields` are
    those of sentencepiece_model.proto's ModelProto.
    """
    trainer = dict(sentencepieces.fields(dict(fields).get(2, b"")))
    normalizer = dict(sentencepieces.fields(dict(fields).get(3, b"")))
    differs = {
        "it is not a BPE model": trainer.get(3, 1) != 2,
        "it has no pieces for bytes": not trainer.get(35, 0),
        "it puts spaces after words": trainer.get(24, 0),
        "it changes characters": normalizer.get(2),
        "it removes spaces": normalizer.get(4, 1),
        "it does not escape spaces": not normalizer.get(5, 1),
    }
    for what, does in differs.items():
        if does:
            raise UserError(
                f"llama.cpp would tokenize otherwise than this sentencepiece model: {what}; "
                "only tokenizers like LLaMA's can be exported"
            )


def write_byte_level(writer: Any, tokenizer: Tokenizer) -> None:
    """Adds what only byte-level BPE has; UserError where llama.cpp would tokenize otherwise."""
    content = tokenizer.files[JSON]
    words = byte_level.words_of(content)
    if words is None:
        raise UserError(
            "this tokenizer.json cuts texts into words in a way that GGUF has no name for here; "
            f"only {', '.join(byte_level.WORDS)} can be exported"
        )
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(words)
    writer.add_token_merges([" ".join(merge) for merge in byte_level.merges_in(content)])
