"""A small byte-level vocabulary as a fixture."""

import json

import pytest

from text import byte_level
from text.vocabulary import CONTROL, NORMAL, USER_DEFINED


@pytest.fixture(scope="session")
def learned(toy_world):
    """(pieces, kinds, merges) of a small vocabulary, with two control tokens and one that a user
    defined."""
    tokenizers = pytest.importorskip("tokenizers", reason="needs tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = byte_level.cutter("gpt-2")
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600,
        show_progress=False,
        initial_alphabet=byte_level.byte_characters(),
        special_tokens=["<|begin|>", "<|end|>"],
    )
    texts = [*toy_world.heldout, "é漢字 12345 I'll (say) = it's $5\n\n  well", "  \r\n" * 9] * 5
    tokenizer.train_from_iterator(texts, trainer)
    content = json.loads(tokenizer.to_str())["model"]
    pieces = sorted(content["vocab"], key=content["vocab"].get)
    pieces.append("<|tool|>")
    kinds = [CONTROL] * 2 + [NORMAL] * (len(pieces) - 3) + [USER_DEFINED]
    return pieces, kinds, [tuple(merge) for merge in content["merges"]]
