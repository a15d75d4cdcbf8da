"""The tokenizer: a sentencepiece model like LLaMA's, loaded from a folder or trained on text."""

import io
import pathlib
from collections.abc import Iterable, Sequence

import sentencepiece

from cli.errors import UserError
from cli.files import written_whole


def load_tokenizer(path: str | pathlib.Path) -> sentencepiece.SentencePieceProcessor:
    """Reads a sentencepiece file, or the tokenizer.model of a model folder or of a run's base/.

    Raises UserError if there is none, if it is damaged, or if it has no BOS or EOS piece.
    """
    path = pathlib.Path(path)
    candidates = [path]
    if path.is_dir():
        candidates = [path / "tokenizer.model", path / "base" / "tokenizer.model"]
    file = next((candidate for candidate in candidates if candidate.is_file()), None)
    if file is None:
        raise UserError(
            f"no tokenizer: {candidates[0]} does not exist; copy the model's tokenizer.model there"
        )
    try:
        tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(file))
    except RuntimeError:
        raise UserError(
            f"{file} is not a sentencepiece model or is damaged; "
            "copy the model's tokenizer.model again"
        ) from None
    if min(tokenizer.bos_id(), tokenizer.eos_id()) < 0:
        raise UserError(
            f"{file} has no BOS or no EOS piece; use the tokenizer.model that belongs to the model"
        )
    return tokenizer


def encode_prompt(tokenizer: sentencepiece.SentencePieceProcessor, prompt: str) -> list[int]:
    """The tokens of a prompt, after BOS."""
    return [tokenizer.bos_id(), *tokenizer.encode(prompt)]


def decode(tokenizer: sentencepiece.SentencePieceProcessor, tokens: Sequence[int]) -> str:
    """The text of tokens.

    An embedding may have more rows than the tokenizer has pieces, padded to a round number. Tokens
    of such rows have no text.
    """
    return tokenizer.decode([token for token in tokens if token < tokenizer.vocab_size()])


def train_tokenizer(
    texts: Iterable[str], path: str | pathlib.Path, vocab_size: int
) -> sentencepiece.SentencePieceProcessor:
    """Trains a BPE tokenizer on `texts`, writes it to the file `path` and returns it.

    Numbered like LLaMA's: unk 0, BOS 1, EOS 2, then the 256 bytes. The bytes make encode and decode
    exact for every text, except for U+2581, which is how sentencepiece writes a space. Line breaks
    are always bytes: no piece contains one. The same texts give the same file.

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
    with written_whole(path) as beside:
        beside.write_bytes(model.getvalue())
    return load_tokenizer(path)


def _lines(texts):
    for text in texts:
        yield from text.split("\n")
