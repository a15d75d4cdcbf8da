"""cli/subjects.py: what a real language model is tuned on, chosen by and judged by, and how."""

import json
import pathlib
import shutil

import pytest
import torch
from helpers import exchange, quantized_llama, random_llama
from hypothesis import given
from hypothesis import strategies as st

import evals
import formats
from baselines import NF4Linear, quantize_model_nf4
from cli import subjects
from cli.errors import UserError
from formats.huggingface import save_pretrained
from llama import CONFIGS, Llama, generate, linears
from merge import merge
from qalora import add_adapters
from quant import QuantLinear, quantize_model, save_quantized
from text.batches import encode, encode_asking


def records(count):
    rows = []
    for i in range(count):
        first = "Describe" if i % 3 else "What is"
        rows.append({"instruction": f"{first} number {i}", "input": "", "output": f"It is {i}."})
    return rows


@pytest.fixture
def files(tmp_path, toy_tokenizer):
    """The four files of a real subject, with a toy's model."""
    torch.manual_seed(0)
    model = Llama(CONFIGS["tiny"])
    save_pretrained(model, tmp_path / "model")
    toy_tokenizer.save(tmp_path / "model")
    (tmp_path / "records.json").write_text(json.dumps(records(320)))
    (tmp_path / "text.txt").write_text("Nelo Saru lives in a city. " * 40)
    question = {"question": "Nelo likes", "choices": ["tofu", "a green hat"], "answer": 1}
    (tmp_path / "choices.jsonl").write_text(json.dumps(question) + "\n")
    names = ("model", "records.json", "text.txt", "choices.jsonl")
    return [str(tmp_path / name) for name in names]


def asked_in(examples, tokenizer):
    """The numbers that examples ask about."""
    return [
        int(tokenizer.decode(e.tokens.tolist()).split("number ")[1].split()[0]) for e in examples
    ]


def test_tuning_choosing_and_the_test_are_apart_and_choosing_leaves_the_test_alone(
    files, monkeypatch
):
    judged = []
    monkeypatch.setattr(
        evals, "response_loss", lambda model, examples, *a: judged.append(examples) or 1.0
    )
    subject = subjects.real(*files)
    tokenizer = formats.load_tokenizer(files[0])
    chosen, reported = (subject.material(0, choosing) for choosing in (True, False))
    assert asked_in(chosen.examples, tokenizer) == list(range(120))
    assert asked_in(reported.examples, tokenizer) == list(range(220))
    assert torch.equal(chosen.calibration, reported.calibration), "they share quantized bases"
    assert chosen.judge(chosen.model) == {"loss": 1.0, "merit": [-1.0]}
    reported.judge(reported.model)
    assert [asked_in(examples, tokenizer) for examples in judged] == [
        list(range(120, 220)),
        list(range(220, 320)),
    ]


def in_bfloat16(model, subject):
    """A float model as the comparison rounds it."""
    return model.bfloat16().to(getattr(torch, subject.arithmetic))


def test_a_real_model_is_judged_by_what_evals_says_of_it(files):
    """Against evals.py's own functions on the files, as its command calls them.

    Half of the closed questions have the model's own answers.
    """
    subject, rows = subjects.real(*files), records(320)
    tokenizer = formats.load_tokenizer(files[0])
    model = in_bfloat16(formats.load_model(files[0]), subject)
    prompts = [
        encode_asking([exchange(row["instruction"], "")[0]], tokenizer) for row in rows[220:]
    ]
    for i, answer in enumerate(evals.answers(model, tokenizer, prompts, 3)):
        if i % 2 and answer.strip() == answer != "":
            rows[220 + i]["output"] = answer
    pathlib.Path(files[1]).write_text(json.dumps(rows))
    subject = subjects.real(*files)
    found = subject.material(1, False)
    scores = found.judge(found.model)
    asked = [exchange(row["instruction"], row["output"]) for row in rows[220:]]
    closed = [record for record in asked if record[0].text.startswith("What is")]
    ends = evals.greedy_matches(model, encode(closed, tokenizer, 512)[0])
    tokens = tokenizer.encode_prompt("Nelo Saru lives in a city. " * 40)
    items = [("Nelo likes", ["tofu", "a green hat"], 1)]
    assert 20 < len(closed) < 50 and scores == {
        "loss": pytest.approx(evals.response_loss(model, encode(asked, tokenizer, 512)[0])),
        "exact_match": sum(ends) / len(closed),
        "perplexity": pytest.approx(evals.perplexity(model, tokens, 512)),
        "multiple_choice": evals.multiple_choice(model, tokenizer, items)["normalized"],
    }


@given(st.integers(0, 2**31), st.integers(1, 5))
def test_a_response_is_the_greedy_answer_where_generating_gives_it(seed, batch_size):
    """Some responses are what the model generates, others are changed at one place."""
    torch.manual_seed(seed)
    model, examples, expected = random_llama(seed, scale=4), [], []
    for i in range(6):
        prompt = torch.randint(24, (1, int(torch.randint(1, 6, ()))))
        tokens = generate(model, prompt, int(torch.randint(1, 6, ())))[0]
        changed = tokens.clone()
        if i % 2:
            changed[int(torch.randint(prompt.shape[1], len(tokens), ()))] += 1
            changed %= 24
        learned = torch.arange(len(tokens)) >= prompt.shape[1]
        examples.append(evals.Example(changed.int().numpy(), learned.numpy()))
        expected.append(i % 2 == 0)
    assert evals.greedy_matches(model, examples, batch_size) == expected


@pytest.mark.parametrize("kind", ["groups", "NF4", "an adapter over NF4"])
def test_a_packed_model_in_float_computes_the_same(kind):
    model = quantized_llama() if kind == "groups" else quantize_model_nf4(random_llama())
    if kind == "an adapter over NF4":
        add_adapters(model, 2, 4)
        for name, p in model.named_parameters():
            if name.endswith("lora_B"):
                torch.nn.init.normal_(p)
    tokens = torch.randint(24, (2, 9))
    before = model(tokens).detach()
    packed = [m for m in model.modules() if isinstance(m, (QuantLinear, NF4Linear))]
    assert len(packed) == len(linears(model))
    subjects.in_float(model)
    assert not any(isinstance(m, (QuantLinear, NF4Linear)) for m in model.modules())
    # the same float32 weights; matrix products may add up in another order
    assert torch.allclose(model(tokens), before, rtol=1e-4, atol=1e-5)
    if kind == "an adapter over NF4":
        assert torch.allclose(merge(model)(tokens), before, rtol=1e-3, atol=1e-4)


def test_a_quantized_model_serves_as_the_float_one_it_dequantizes_to(
    files, toy_tokenizer, tmp_path
):
    folder = tmp_path / "quantized"
    torch.manual_seed(1)
    model = quantize_model(Llama(CONFIGS["tiny"]), 3, 32)
    save_quantized(model, folder)
    toy_tokenizer.save(folder)
    subject = subjects.real(str(folder), *files[1:])
    found = subject.float_model()
    for (name, layer), (_, packed) in zip(linears(found), linears(model), strict=True):
        wanted = packed.dequantize().bfloat16().to(layer.weight.dtype)
        assert torch.equal(layer.weight, wanted), name


@pytest.mark.parametrize("which", range(4))
def test_a_subject_is_another_when_a_file_changes_but_not_when_it_moves(files, tmp_path, which):
    described = subjects.real(*files).describe()
    (tmp_path / "moved").mkdir()
    moved = [shutil.move(file, tmp_path / "moved") for file in files]
    assert subjects.real(*moved).describe() == described
    assert str(tmp_path) not in json.dumps(described)
    file = pathlib.Path(moved[which])
    if which == 0:
        torch.manual_seed(2)
        save_pretrained(Llama(CONFIGS["tiny"]), file)
    else:
        file.write_text(
            file.read_text().replace("e", "i", 1) if which != 3 else file.read_text() * 2
        )
    if which == 1:
        file.write_text(json.dumps(records(321)))
    assert subjects.real(*moved).describe() != described


def test_a_subject_is_another_with_another_chat_template(files, toy_tokenizer):
    before = subjects.real(*files)
    source = toy_tokenizer.alpaca_template.replace("### Response", "### Answer")
    assert source != toy_tokenizer.alpaca_template
    toy_tokenizer.with_template(source).save(pathlib.Path(files[0]))
    after = subjects.real(*files)
    assert after.describe() != before.describe() and after.folder(0) != before.folder(0)


@pytest.mark.parametrize(
    "which, content, said",
    [
        (1, json.dumps(records(299)), "has 299 records; give 300 or more"),
        (1, "\n\n".join(["Some text."] * 400), "is text; give 300 or more questions"),
        (
            1,
            json.dumps([{"instruction": "Name it.", "output": "It."}] * 300),
            "none of its last 100",
        ),
        (2, "", "is empty"),
        (3, '{"question": "x"}', "line 1"),
    ],
)
def test_a_file_that_cannot_serve_is_the_users_mistake(files, which, content, said):
    if content.startswith("Some text"):
        files[1] = files[1].replace(".json", ".txt")
    pathlib.Path(files[which]).write_text(content)
    with pytest.raises(UserError, match=said):
        subjects.real(*files)
