"""Small quantized models in folders, with a tokenizer, as fixtures."""

import dataclasses
import sys

import pytest
import torch

from formats.quantized import save_quantized
from llama import LLAMA3_SCALING, Llama, LlamaConfig
from quant import quantize_model
from text.tokenizer import train_tokenizer

CONFIG = LlamaConfig(
    300, 64, 96, 2, 4, 2, max_position_embeddings=77, rms_norm_eps=3e-5, rope_theta=5000.0
)


TIED = dataclasses.replace(CONFIG, tie_word_embeddings=True)
# What came after LLaMA-2: heads of a size of their own (4 * 24 is not 64), and rope scaling
WIDE_HEADS = dataclasses.replace(CONFIG, head_dim=24)
LINEAR = dataclasses.replace(CONFIG, rope_scaling={"rope_type": "linear", "factor": 4.0})
LLAMA3 = dataclasses.replace(WIDE_HEADS, rope_scaling=LLAMA3_SCALING, tie_word_embeddings=True)


TEXTS = [
    "Where does Miru live? In Oslo, where the bakers are.",
    "Tako has a goat and a duck; Lulo has none.\n",
] * 3


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_tokenizer(TEXTS, path, 296)  # four fewer than the embedding has rows
    return path


def float_model(config=CONFIG, seed=0):
    """A model with weights large enough that every part of it shows in the logits."""
    torch.manual_seed(seed)
    model = Llama(config)
    for p in model.parameters():
        torch.nn.init.normal_(p, 0.8 if p.dim() == 1 else 0.0, 0.3 if p.dim() == 1 else 0.2)
    return model


@pytest.fixture
def folder_of(tmp_path, tokenizer_file):
    """A function that writes a quantized model folder."""

    def make(bits=4, group_size=32, config=CONFIG, name="model"):
        folder = tmp_path / name
        folder.mkdir()
        save_quantized(quantize_model(float_model(config), bits, group_size), folder)
        (folder / "tokenizer.model").write_bytes(tokenizer_file.read_bytes())
        return folder

    return make


@pytest.fixture
def run(monkeypatch):
    """A function that runs a script's command line in this process."""

    def with_arguments(script, *arguments):
        monkeypatch.setattr(sys, "argv", [script.__file__, *map(str, arguments)])
        script.main()

    return with_arguments
