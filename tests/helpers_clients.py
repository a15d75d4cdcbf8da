"""Texts and models that the checks with real clients compare on; they need ../shared/data."""

import dataclasses
import json
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import torch  # noqa: E402

from llama import Llama, load_pretrained  # noqa: E402
from text.instructions import read_records  # noqa: E402
from text.sentencepieces import make_model  # noqa: E402
from text.templates import alpaca_prompt  # noqa: E402

MATERIAL = pathlib.Path(__file__).resolve().parent.parent.parent / "shared" / "data"
STARTS = ["", "Once upon a time", "Lily and Tom", "The big dog", "One day, a little boy"]


def stories():
    """stories260K, its feed-forward width of 172 filled up with zeros to 192: the same function."""
    source = load_pretrained(MATERIAL / "stories260K", torch.float32)
    model = Llama(dataclasses.replace(source.config, intermediate_size=192))
    for p, old in zip(model.parameters(), source.parameters(), strict=True):
        p.data.zero_()[tuple(slice(n) for n in old.shape)] = old.data
    return model


def stories_tokenizer():
    """A sentencepiece BPE model: unk, BOS, EOS, 256 bytes, then pieces in their merges' order."""
    pieces = json.loads((MATERIAL / "stories260K" / "vocab.json").read_text())
    texts = ["<unk>", "<s>", "</s>", *pieces[3:259]]
    texts += [piece.replace(" ", "▁") for piece in pieces[259:]]
    scores = [float(min(0, 259 - i)) for i in range(len(pieces))]
    kinds = [2, 3, 3] + [6] * 256 + [1] * (len(pieces) - 259)
    return make_model(texts, scores, kinds, adds_space=True)


def seed_texts():
    return texts_of(read_records(MATERIAL / "self-instruct-seeds.json").records)


def texts_of(records):
    """Prompts and responses."""
    texts = []
    for asked, answer in records:
        texts += [alpaca_prompt(asked.text, asked.input), answer.text]
    return texts
