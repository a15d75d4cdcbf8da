"""sentencepiece's vocabularies, LLaMA's kind: a file tokenizer.model, a protocol buffer.

The file is sentencepiece_model.proto's ModelProto: field 1 a piece (1 its text, 2 its score, 3 its
kind), field 2 how it was trained, field 3 how it normalizes a text. Fields may stand in any order
and repeated ones add up, so a piece is added by appending its bytes.
"""

import io
import pathlib
import struct
from collections.abc import Iterable, Iterator

import sentencepiece

from cli.errors import UserError
from text.vocabulary import (
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    Vocabulary,
    padding_name,
)


def open_model(
    content: bytes, added: dict[int, tuple[str, bool]], controls: set, where: str | pathlib.Path
) -> Vocabulary:
    """The vocabulary in the bytes of a sentencepiece model, and `added` tokens after its pieces.

    added: {id: (text, whether it is a control token)}, as Hugging Face keeps them beside the model.
    controls: texts of pieces, and ids of user-defined ones, that are control tokens even where the
    model says no. `where` is for errors. Raises UserError for what is no sentencepiece model.
    """
    processor, more = open_processor(content, where), []
    try:
        known = {processor.id_to_piece(i) for i in range(processor.vocab_size())}
    except UnicodeDecodeError:
        raise UserError(f"{where}: a piece of it is not UTF-8; fetch the model's again") from None
    for i in range(processor.vocab_size(), max(added, default=0) + 1):
        text, _ = added.get(i, ("", True))
        kind = USER_DEFINED
        if not text or text in known:
            text, kind = padding_name(i), UNUSED
        known.add(text)
        more.append(piece_field(text, 0.0, kind))
    ids = {i for i, (_, is_control) in added.items() if is_control}
    try:
        ruled = with_controls(content + b"".join(more), controls | ids)
    except (TypeError, KeyError, AttributeError):  # fields of other types, which it passes over
        raise UserError(f"{where} is a damaged sentencepiece model; fetch it again") from None
    if ruled != content:
        content, processor = ruled, open_processor(ruled, where)
    bos, eos = processor.bos_id(), processor.eos_id()
    return Vocabulary(
        pieces=[processor.id_to_piece(i) for i in range(processor.vocab_size())],
        kinds=kinds_in(content),
        bos=None if bos < 0 else bos,
        eos=None if eos < 0 else eos,
        adds_space=processor.encode("a", out_type=str)[0].startswith("▁"),
        encode_all=processor.encode,
        decode=processor.decode,
    )


def open_processor(
    content: bytes, where: str | pathlib.Path
) -> sentencepiece.SentencePieceProcessor:
    """sentencepiece's own object; UserError where it refuses the file."""
    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.load_from_serialized_proto(content)
        return processor
    except RuntimeError:
        raise UserError(
            f"{where} has no sentencepiece model, or a damaged one; fetch the model's again"
        ) from None


def kinds_in(content: bytes) -> list[int]:
    """The kind of every piece of a model."""
    return [dict(fields(value)).get(3, NORMAL) for number, value in fields(content) if number == 1]


def with_controls(content: bytes, controls: set) -> bytes:
    """The model with pieces as control tokens where `open_model` is told so."""
    changed, i = [], 0
    for number, value in fields(content):
        if not isinstance(value, bytes):
            raise TypeError(f"field {number} is no message")
        if number == 1:
            piece = dict(fields(value))
            text, kind = piece[1].decode(errors="replace"), piece.get(3, NORMAL)
            named = text in controls and kind in (NORMAL, USER_DEFINED)
            if named or (i in controls and kind == USER_DEFINED):
                value += _field(3, CONTROL)  # of a field that stands twice the last one counts
            i += 1
        changed.append(_field(number, value))
    return b"".join(changed)


def train_model(texts: Iterable[str], vocab_size: int) -> bytes:
    """A BPE model trained on texts: the content of a tokenizer.model.

    Numbered like LLaMA's: unk 0, BOS 1, EOS 2, then the 256 bytes. The bytes make encode and decode
    exact for every text, except for U+2581, which is how sentencepiece writes a space. Line breaks
    are always bytes: no piece contains one. The same texts give the same bytes.

    Raises UserError if `vocab_size` is more than the texts can fill, or too small for their
    characters.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_lines(texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            max_sentence_length=2**30,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as e:
        reason = str(e).split("] ")[-1] or "it is empty"
        raise UserError(
            f"no tokenizer of {vocab_size} pieces can be trained on this text: {reason}"
        ) from None
    return model.getvalue()


def _lines(texts):
    for text in texts:
        yield from text.split("\n")


# ---- the file


def make_model(pieces: list[str], scores: list[float], kinds: list[int], adds_space: bool) -> bytes:
    """The content of a tokenizer.model like LLaMA's: BPE, bytes for what no piece has, no changes.

    Raises UserError unless just one piece is of the kind UNKNOWN, as sentencepiece demands.
    """
    if kinds.count(UNKNOWN) != 1:
        raise UserError(f"{kinds.count(UNKNOWN)} pieces are of the kind unknown; one must be")
    model = b""
    for piece in zip(pieces, scores, kinds, strict=True):
        model += piece_field(*piece)
    trainer = _field(3, 2) + _field(35, 1)  # BPE, byte_fallback
    # the name of the rule, add_dummy_prefix, remove_extra_whitespaces
    normalizer = _field(1, b"identity") + _field(3, int(adds_space)) + _field(4, 0)
    return model + _field(2, trainer) + _field(3, normalizer)


def piece_field(text: str, score: float, kind: int) -> bytes:
    """A piece as a part of a model's bytes."""
    return _field(1, _field(1, text.encode()) + _field(2, score) + _field(3, kind))


def fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yields (number, value) of each field of a protocol buffer: an int for a varint, or bytes."""
    stream = io.BytesIO(message)

    def varint():
        value = shift = 0
        while True:
            byte = stream.read(1)[0]
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    fixed = {1: 8, 5: 4}  # bytes of a double and a float; others come with their length
    while stream.tell() < len(message):
        key = varint()
        number, kind = key >> 3, key & 7
        yield number, varint() if kind == 0 else stream.read(fixed.get(kind) or varint())


def _field(number, value):
    if isinstance(value, bytes):
        return _varint(number << 3 | 2) + _varint(len(value)) + value
    if isinstance(value, float):
        return _varint(number << 3 | 5) + struct.pack("<f", value)
    return _varint(number << 3) + _varint(value)


def _varint(n):
    return bytes([n]) if n < 128 else bytes([n & 127 | 128]) + _varint(n >> 7)
