"""A world of random weights and records, and one finished run in it, for all files that need
them."""

import json
import shutil

import pytest
from helpers_runs import ENGLISH, NOUNS, RECORDS, options, run, save_random

from text.templates import alpaca_prompt
from text.tokenizer import train_tokenizer


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A folder with weights/, other-weights/, records.json and fewer.json."""
    folder = tmp_path_factory.mktemp("world")
    for seed, name in enumerate(("weights", "other-weights")):
        save_random(folder / name, seed)
    prompts = [alpaca_prompt(r["instruction"]) + r["output"] for r in RECORDS]
    train_tokenizer(
        prompts + [" ".join(NOUNS) * 20, ENGLISH], folder / "weights" / "tokenizer.model", 512
    )
    shutil.copy(folder / "weights" / "tokenizer.model", folder / "other-weights")
    (folder / "records.json").write_text(json.dumps(RECORDS))
    (folder / "fewer.json").write_text(json.dumps(RECORDS[:30]))
    return folder


@pytest.fixture(scope="session")
def whole(world):
    """An uninterrupted run."""
    run(world / "whole-log", options(world, world / "whole"))
    return world / "whole"
