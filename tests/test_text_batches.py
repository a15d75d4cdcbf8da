"""text/batches.py: no token goes astray on the way into a batch."""

import collections
import random

import numpy as np
import pytest
import torch
from helpers import ANSWERS, TEXTS, exchange
from hypothesis import assume, given
from hypothesis import strategies as st

from text import batches
from text.batches import (
    Example,
    batch_order,
    calibration_windows,
    collate,
    encode,
    example_of,
    token_stream,
    windows,
)
from text.instructions import Turn
from text.templates import Part, alpaca_prompt


@given(st.lists(st.tuples(TEXTS, ANSWERS), max_size=6), st.integers(40, 120))
def test_an_example_is_bos_prompt_response_eos_cut_at_the_end(toy_tokenizer, pairs, max_length):
    expected, too_long = [], 0
    for asked, response in pairs:
        prompt, response = map(toy_tokenizer.encode, (alpaca_prompt(asked), response))
        whole = [1] + prompt + response + [2]
        too_long += len(whole) > max_length
        learned = [False] * (1 + len(prompt)) + [True] * (len(response) + 1)
        if any(learned[:max_length]):
            expected.append((whole[:max_length], learned[:max_length]))
    examples, truncated = encode([exchange(*pair) for pair in pairs], toy_tokenizer, max_length)
    assert [(e.tokens.tolist(), e.learned.tolist()) for e in examples] == expected
    assert truncated == too_long
    assert all(e.tokens.dtype == np.int32 for e in examples)


@given(st.lists(TEXTS, max_size=6), st.integers(2, 60))
def test_of_a_plain_text_all_but_bos_is_learned(toy_tokenizer, texts, max_length):
    expected = []
    for text in texts:
        tokens = [1, *toy_tokenizer.encode(text), 2][:max_length]
        expected.append((tokens, [False] + [True] * (len(tokens) - 1)))
    records = [(Turn("text", text),) for text in texts]
    examples, _ = encode(records, toy_tokenizer, max_length)
    assert [(e.tokens.tolist(), e.learned.tolist()) for e in examples] == expected


def test_the_first_token_is_never_learned_as_nothing_comes_before_it():
    for encoded, learned in (([[5, 6]], [False, True]), ([[], [5]], [False]), ([[]], [])):
        parts = [Part("", None, False, True)] * len(encoded)
        assert example_of(parts, encoded).learned.tolist() == learned


def test_many_records_keep_their_order(toy_tokenizer):
    records = [(Turn("text", str(i)),) for i in range(10_000)]  # more than encode takes at a time
    examples, truncated = encode(records, toy_tokenizer, 20)
    decoded = [toy_tokenizer.decode(e.tokens.tolist()) for e in examples]
    assert decoded == [turn.text for (turn,) in records]
    assert truncated == 0


def test_a_decoded_example_reads_as_prompt_space_response(any_tokenizer, toy_world):
    counting = Turn("user", "Count.", "from 1\nto 3"), Turn("assistant", "1\n2\n3")
    records = [*toy_world.test[:20], counting]
    examples, _ = encode(records, any_tokenizer, 1000)
    for (asked, answer), (tokens, learned) in zip(records, examples, strict=True):
        prompt = alpaca_prompt(asked.text, asked.input)
        assert any_tokenizer.decode(tokens.tolist()) == f"{prompt} {answer.text}"
        assert any_tokenizer.decode(tokens[~learned].tolist()) == prompt
        assert any_tokenizer.decode(tokens[learned].tolist()) == answer.text


@given(
    st.lists(st.integers(1, 500), min_size=1, max_size=400), st.integers(1, 20), st.integers(0, 5)
)
def test_an_epoch_has_full_batches_and_sees_every_example_equally_often_give_or_take_one(
    lengths, batch_size, seed
):
    per_epoch = -(-len(lengths) // batch_size)
    for epoch in range(2):
        steps = range(epoch * per_epoch, (epoch + 1) * per_epoch)
        drawn = [batch_order(lengths, batch_size, step, seed) for step in steps]
        assert {len(batch) for batch in drawn} == {batch_size}
        times = collections.Counter(sum(drawn, []))
        assert set(times) == set(range(len(lengths)))
        assert max(times.values()) - min(times.values()) <= 1


def test_a_batch_depends_on_the_step_alone_not_on_what_was_asked_before():
    lengths = tuple(random.Random(0).choices(range(1, 300), k=1000))
    in_order = [batch_order(lengths, 8, step, 3) for step in range(400)]
    for step in random.Random(1).sample(range(400), 20):
        batches._epoch.cache_clear()
        assert batch_order(list(lengths), 8, step, 3) == in_order[step]
    assert in_order[0] != batch_order(lengths, 8, 0, 4)


def test_every_epoch_groups_the_examples_anew():
    epochs = []
    for epoch in range(2):
        steps = range(125 * epoch, 125 * (epoch + 1))
        epochs.append({frozenset(batch_order((5,) * 1000, 8, step, 0)) for step in steps})
    assert not epochs[0] & epochs[1]


def test_batches_of_near_equal_lengths_leave_little_padding_and_come_in_mixed_order():
    lengths = tuple(random.Random(0).choices(range(1, 1000), k=5000))
    drawn = []
    for step in range(312):
        drawn.append([lengths[i] for i in batch_order(lengths, 16, step, 0)])
    padding = sum(16 * max(batch) - sum(batch) for batch in drawn) / sum(map(sum, drawn))
    assert padding < 0.05, (
        padding
    )  # in random order 0.88: the longest of 16 is nearly twice the mean
    longest = [max(batch) for batch in drawn]
    assert abs(np.corrcoef(longest[:-1], longest[1:])[0, 1]) < 0.2


@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=5),
    st.integers(0, 3),
)
def test_collate_pads_on_the_right_and_marks_response_and_eos(sizes, pad_id):
    examples = []
    for p, r in sizes:
        tokens = np.arange(5, 5 + p + r, dtype=np.int32)
        examples.append(Example(tokens, np.arange(p + r) >= p))
    tokens_BT, loss_BT = collate(examples, pad_id)
    longest = max(p + r for p, r in sizes)
    assert tokens_BT.dtype == torch.int64 and loss_BT.dtype == torch.bool
    tokens, learned = [], []
    for p, r in sizes:
        padding = longest - p - r
        tokens.append([*range(5, 5 + p + r)] + [pad_id] * padding)
        learned.append([False] * p + [True] * r + [False] * padding)
    assert tokens_BT.tolist() == tokens
    assert loss_BT.tolist() == learned


def test_a_token_stream_puts_every_text_between_bos_and_eos(toy_tokenizer):
    oslo, rome = toy_tokenizer.encode("Oslo."), toy_tokenizer.encode("Rome.")
    stream = token_stream(["Oslo.", "", "Rome."], toy_tokenizer)
    assert stream.tolist() == [1, *oslo, 2, 1, 2, 1, *rome, 2]


@given(st.integers(1, 50), st.integers(1, 50), st.integers(1, 8))
def test_windows_are_runs_of_the_stream_drawn_by_the_generator(size, length, batch_size):
    assume(length <= size)
    drawn = []
    for _ in range(2):
        generator = torch.Generator().manual_seed(0)
        drawn.append(windows(torch.arange(size) * 3, batch_size, length, generator))
    tokens_BT, again = drawn
    assert tokens_BT.shape == (batch_size, length)
    assert tokens_BT.min() >= 0 and tokens_BT.max() <= 3 * (size - 1)
    assert (tokens_BT.diff() == 3).all() and torch.equal(tokens_BT, again)


def test_windows_reach_every_place_of_the_stream():
    drawn = windows(torch.arange(10), 1000, 4, torch.Generator().manual_seed(0))
    assert drawn[:, 0].unique().tolist() == [0, 1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    "context, count, shape",
    [(512, 100, (1, 100)), (40, 100, (2, 40)), (5000, 4500, (2, 2048)), (5000, 10**9, (3, 2048))],
)
def test_calibration_takes_as_many_tokens_as_asked_in_windows_of_2048_or_the_context(
    toy_tokenizer, context, count, shape
):
    texts = ["Oslo."] * 900
    stream = token_stream(texts, toy_tokenizer)
    assert len(stream) == 7 * 900
    records = [(Turn("text", text),) for text in texts]
    found = calibration_windows(records, toy_tokenizer, context, count)
    assert found.shape == shape
    assert torch.equal(found.flatten(), stream[: found.numel()])
