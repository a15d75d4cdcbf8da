"""Conversations into examples, examples into batches, and plain text into windows.

What asks for an answer and the answer are tokenized separately and joined: so an answer is learned
in the very tokens that are there when it is asked for.
"""

import functools
import itertools
import random
import re
import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from cli import machine
from text.instructions import Record, Turn
from text.templates import Part
from text.tokenizer import Tokenizer


class Example(NamedTuple):
    """The tokens of a conversation or a text, and which of them the model learns to say."""

    tokens: np.ndarray  # int32
    learned: np.ndarray  # bool; never the first


def encode(
    records: Sequence[Record], tokenizer: Tokenizer, max_length: int
) -> tuple[list[Example], int]:
    """Tokenizes records; returns the examples, and how many records exceed `max_length` tokens.

    A longer record loses its end. It is dropped if nothing that is learned is left. Raises
    UserError as `Template.parts` does.
    """
    examples, truncated = [], 0
    hidden = machine.RANK > 0
    with tqdm(total=len(records), desc="tokenizing", delay=2, disable=hidden) as bar:
        for start in range(0, len(records), 4096):  # lists of integers take ten times the room
            chunk = [parts_of(r, tokenizer) for r in records[start : start + 4096]]
            for parts, encoded in zip(chunk, encode_parts(chunk, tokenizer), strict=True):
                example = example_of(parts, encoded)
                truncated += len(example.tokens) > max_length
                if example.learned[:max_length].any():
                    tokens, learned = example
                    examples.append(Example(tokens[:max_length], learned[:max_length]))
            bar.update(len(chunk))
    return examples, truncated


def parts_of(record: Record, tokenizer: Tokenizer) -> list[Part]:
    """A conversation's parts as its template has them; a plain text stands between BOS and EOS.

    Raises UserError as `Template.parts` does.
    """
    if record[0].role != "text":
        return tokenizer.template.parts(record)
    pieces = tokenizer.vocabulary.pieces
    begin = [Part(pieces[i], i, False, False) for i in tokenizer.framed([])]
    end = Part(pieces[tokenizer.eos], tokenizer.eos, False, True)
    return [*begin, Part(record[0].text, None, False, True), end]


def example_of(parts: Sequence[Part], encoded: Sequence[list[int]]) -> Example:
    """The example that some parts with their tokens make."""
    tokens, learned = [], []
    for part, its_tokens in zip(parts, encoded, strict=True):
        tokens += its_tokens
        learned += [part.learned] * len(its_tokens)
    learned[:1] = [False] * len(learned[:1])  # nothing comes before it, so it cannot be predicted
    return Example(np.array(tokens, np.int32), np.array(learned, bool))


def encode_asking(turns: Sequence[Turn], tokenizer: Tokenizer) -> list[int]:
    """The tokens that ask for an answer to a conversation so far; EOS if there would be none.

    Raises UserError where the chat template refuses the conversation.
    """
    if not turns:  # a plain text begins
        return tokenizer.framed([])
    (encoded,) = encode_parts([tokenizer.template.asking(turns)], tokenizer)
    return list(itertools.chain.from_iterable(encoded)) or [tokenizer.eos]


def encode_parts(
    conversations: Sequence[Sequence[Part]], tokenizer: Tokenizer
) -> Iterator[list[list[int]]]:
    """Yields the tokens of each part, for every conversation."""
    texts = []
    for part in itertools.chain.from_iterable(conversations):
        if part.control is None:
            texts.append(text_to_encode(part, tokenizer))
    encoded = iter(tokenizer.encode_all(texts))
    for parts in conversations:
        found = []
        for part in parts:
            is_text = part.control is None
            found.append(own_tokens(part, next(encoded), tokenizer) if is_text else [part.control])
        yield found


def text_to_encode(part: Part, tokenizer: Tokenizer) -> str:
    """A part's text, or what has its tokens where the tokenizer puts a space before every text.

    There a text that follows another one loses its own first space, or is encoded after a line
    break.
    """
    if not (part.follows_text and tokenizer.vocabulary.adds_space):
        return part.text
    return part.text[1:] if re.match(r" [^\n]", part.text) else f"\n{part.text}"


def own_tokens(part: Part, tokens: list[int], tokenizer: Tokenizer) -> list[int]:
    """Of the tokens of `text_to_encode` the part's own, without those of a line break before it."""
    if len(text_to_encode(part, tokenizer)) <= len(part.text):
        return tokens
    line_break = tokenizer.encode("\n")
    if tokens[: len(line_break)] == line_break:
        return tokens[len(line_break) :]
    return tokenizer.encode(part.text)  # some vocabularies have pieces that begin with a line break


def batch_order(lengths: Sequence[int], batch_size: int, step: int, seed: int) -> list[int]:
    """The indices of the examples in the batch of `step`.

    lengths: the number of tokens of each example; a tuple is fastest.

    A pure function, so a resumed run needs to know only the step. Examples of similar length share
    a batch. An epoch contains every example once; if its last batch is not full, some examples
    come a second time. Epochs are cached, so a call is cheap.
    """
    assert len(lengths) > 0 and batch_size > 0, (len(lengths), batch_size)
    per_epoch = -(-len(lengths) // batch_size)
    return _epoch(tuple(lengths), batch_size, step // per_epoch, seed)[step % per_epoch]


@functools.lru_cache(maxsize=2)
def _epoch(lengths, batch_size, epoch, seed):
    """All batches of an epoch."""
    rng = random.Random(f"{seed} {epoch}")
    order = rng.sample(range(len(lengths)), len(lengths))
    full = -(-len(order) // batch_size) * batch_size
    order = list(itertools.islice(itertools.cycle(order), full))
    batches = []
    span = 64 * batch_size  # sorting 64 batches at a time is enough, and stays close to random
    for start in range(0, len(order), span):
        window = sorted(order[start : start + span], key=lengths.__getitem__)
        batches += [window[i : i + batch_size] for i in range(0, len(window), batch_size)]
    rng.shuffle(batches)
    return batches


def collate(examples: Sequence[Example], pad_id: int = 0) -> tuple[Tensor, Tensor]:
    """Examples -> tokens_BT (int64), padded on the right, and loss_BT (bool).

    loss_BT is True where the token is learned.
    """
    longest = max(len(example.tokens) for example in examples)
    tokens_BT = torch.full((len(examples), longest), pad_id)
    loss_BT = torch.zeros(len(examples), longest, dtype=torch.bool)
    for b, (tokens, learned) in enumerate(examples):
        tokens_BT[b, : len(tokens)] = torch.from_numpy(tokens)
        loss_BT[b, : len(tokens)] = torch.from_numpy(learned)
    return tokens_BT, loss_BT


def token_stream(texts: list[str], tokenizer: Tokenizer) -> Tensor:
    """All texts in one int64 tensor [N], each between BOS and EOS; for pretraining, perplexity."""
    stream = []
    for tokens in tokenizer.encode_all(texts):
        stream += [*tokenizer.bos, *tokens, tokenizer.eos]
    return torch.tensor(stream)


def windows(tokens_N: Tensor, batch_size: int, length: int, generator: torch.Generator) -> Tensor:
    """`batch_size` windows of `length` tokens, [B, T], from random places of a token stream."""
    assert length <= len(tokens_N), (length, len(tokens_N))
    starts = len(tokens_N) - length + 1
    start_B = torch.randint(starts, (batch_size,), generator=generator)
    return tokens_N[start_B[:, None] + torch.arange(length)]  # [B, T]


def calibration_windows(
    records: Sequence[Record], tokenizer: Tokenizer, context: int, count: int
) -> Tensor:
    """About `count` tokens of the records, in adjacent windows [N, T] for GPTQ.

    context: the model's; a window has at most 2,048 tokens.
    """
    stream, found = [], 0
    for start in range(0, len(records), 256):
        if found >= count:
            break
        examples, _ = encode(records[start : start + 256], tokenizer, sys.maxsize)
        stream += [torch.from_numpy(example.tokens) for example in examples]
        found += sum(len(example.tokens) for example in examples)
    tokens_N = torch.cat(stream).long()[:count]
    length = min(len(tokens_N), 2048, context)
    whole = len(tokens_N) // length * length
    return tokens_N[:whole].view(-1, length)
