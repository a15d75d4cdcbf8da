"""What the two kinds of tokenizers have in common: pieces, and what kind each of them is."""

from collections.abc import Callable
from typing import NamedTuple

# Kinds of pieces: sentencepiece's numbers, which are GGUF's too. A CONTROL piece is never made of a
# text that spells it; a USER_DEFINED one always is
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
MOST = 2**20  # pieces; a damaged number must not ask for billions


class Vocabulary(NamedTuple):
    """A vocabulary, and how texts become its tokens."""

    pieces: list[str]  # by id
    kinds: list[int]  # by id
    bos: int | None  # the BOS that the file itself names or puts before a text
    eos: int | None
    adds_space: bool  # whether a text is tokenized with a space before it
    encode_all: Callable[[list[str]], list[list[int]]]  # without BOS and EOS
    decode: Callable[[list[int]], str]  # control pieces have no text


def padding_name(i: int) -> str:
    """The name of a piece that fills up a vocabulary."""
    return f"[PAD{i}]"
