"""Records into examples, examples into batches, and plain text into windows.

Prompt and response are tokenized separately and joined, so the tokens of a response do not depend
on the prompt. A space stands between them: the model reads `### Response: Oslo.`, and answers
`### Response:` with a text that begins with that space.
"""

import functools
import itertools
import random
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from text.instructions import Record
from text.tokenizer import Tokenizer


class Example(NamedTuple):
    """The tokens of BOS if the model has one, prompt, response and EOS; the first have no loss."""

    tokens: np.ndarray  # int32
    prompt_length: int  # how many: BOS and prompt, at least one token


def encode(
    records: Sequence[Record], tokenizer: Tokenizer, max_length: int
) -> tuple[list[Example], int]:
    """Tokenizes records; returns the examples, and how many records exceed `max_length` tokens.

    A longer record loses its end. It is dropped if nothing of its response is left.
    """
    examples = []
    truncated = 0
    for start in range(0, len(records), 4096):  # a list of integers takes ten times an array's room
        chunk = records[start : start + 4096]
        prompts = tokenizer.encode_all([record.prompt for record in chunk])
        responses = tokenizer.encode_all(
            [tokenizer.after_space(r.response) if r.prompt else r.response for r in chunk]
        )
        for prompt, response in zip(prompts, responses, strict=True):
            before = tokenizer.framed(prompt)
            tokens = [*before, *response, tokenizer.eos]
            truncated += len(tokens) > max_length
            if len(before) < max_length:
                examples.append(Example(np.array(tokens[:max_length], np.int32), len(before)))
    return examples, truncated


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

    loss_BT is True where the token is one of the response, or EOS.
    """
    longest = max(len(example.tokens) for example in examples)
    tokens_BT = torch.full((len(examples), longest), pad_id)
    loss_BT = torch.zeros(len(examples), longest, dtype=torch.bool)
    for b, (tokens, prompt_length) in enumerate(examples):
        tokens_BT[b, : len(tokens)] = torch.from_numpy(tokens)
        loss_BT[b, prompt_length : len(tokens)] = True
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


def calibration_windows(texts: list[str], tokenizer: Tokenizer, context: int, count: int) -> Tensor:
    """About `count` tokens of the texts, in adjacent windows [N, T] for GPTQ.

    context: the model's; a window has at most 2,048 tokens.
    """
    tokens_N = token_stream(texts, tokenizer)[:count]
    length = min(len(tokens_N), 2048, context)
    whole = len(tokens_N) // length * length
    return tokens_N[:whole].view(-1, length)
