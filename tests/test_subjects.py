"""cli/subjects.py: what a real language model is tuned on, chosen by and judged by, and how."""

import argparse
import dataclasses
import json
import pathlib
import shutil

import pytest
import torch
from helpers import exchange, quantized_llama, random_llama
from hypothesis import given
from hypothesis import strategies as st

import compare
import evals
import formats
from baselines import NF4Linear, quantize_model_nf4
from cli import settings, subjects
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


def long(which):
    """320 records, some with a question of more than 512 tokens."""
    rows = records(320)
    for i in which:
        rows[i]["instruction"] += " and so on" * 300
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
    assert chosen.judge(chosen.model) == {"loss": 1.0}
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
            "do not begin with Create, .* there are none",
        ),
        (1, json.dumps(long(range(120))), "0 of the 120 records to tune on have an answer"),
        (1, json.dumps(long(range(120, 175))), "45 of the 100 records to choose learning rates by"),
        (1, json.dumps(long(range(222, 320, 3))), "of its last 100 questions, exact match"),
        (2, "", "is empty"),
        (3, '{"question": "x"}', "line 1"),
        (3, json.dumps({"question": "x", "choices": ["a", "b " * 600], "answer": 0}), "question 1"),
    ],
)
def test_a_file_that_cannot_serve_is_the_users_mistake(files, which, content, said):
    if content.startswith("Some text"):
        files[1] = files[1].replace(".json", ".txt")
    pathlib.Path(files[which]).write_text(content)
    with pytest.raises(UserError, match=said) as refused:
        subjects.real(*files)
    assert files[which] in str(refused.value), "the file is named"


@pytest.mark.parametrize("which", range(5))
def test_a_file_that_changes_while_jobs_run_ends_the_comparison(files, toy_tokenizer, which):
    subject, file = subjects.real(*files), pathlib.Path(files[which % 4])
    subject.material(0, choosing=True)
    if which == 0:
        torch.manual_seed(2)
        save_pretrained(Llama(CONFIGS["tiny"]), file)
    elif which == 4:
        source = toy_tokenizer.alpaca_template.replace("### Response", "### Answer")
        toy_tokenizer.with_template(source).save(pathlib.Path(files[0]))
    else:
        file.write_text(file.read_text() + "\n")
    named = pathlib.Path(files[which % 4]).name
    with pytest.raises(UserError, match=f"{named} has changed since the comparison began"):
        subject.material(0, choosing=True)


def test_what_is_cut_left_out_or_short_is_told(files, capsys):
    rows = records(320)
    rows[0]["output"] = "so on " * 600  # tokens beyond the 512th are cut
    rows[130]["instruction"] += " and so on" * 300  # no answer is left
    rows[300]["output"] = "so on " * 600  # a test question whose answer would be cut
    rows.insert(7, {"instruction": "Nothing", "output": ""})
    pathlib.Path(files[1]).write_text(json.dumps(rows))
    subject = subjects.real(*files)
    cut = f"{files[1]}: of the {{}}, 1 are longer than 512 tokens and cut, {{}} left out"
    tokens = len(formats.load_tokenizer(files[0]).encode("Nelo Saru lives in a city. " * 40))
    assert capsys.readouterr().out.splitlines() == [
        f"{files[1]}: 1 records without an answer left out (the first: line 1)",
        cut.format("120 records to tune on", 0),
        cut.format("100 records to choose learning rates by", 1),
        cut.format("100 records of the test", 0),
        f"{files[2]} is short: the perplexity is that of {tokens} tokens",
    ]
    tokenizer = formats.load_tokenizer(files[0])
    test = subjects.cut(subjects.read_records(files[1]).records)[2]
    compared = asked_in(subjects.comparable(test, tokenizer, 512), tokenizer)
    assert compared == [i for i in range(220, 320) if i % 3 == 0 and i != 300]
    assert len(subject.material(0, True).examples) == 120


def test_examples_are_no_longer_than_the_models_context(files):
    config = dataclasses.replace(CONFIGS["tiny"], max_position_embeddings=200)
    save_pretrained(Llama(config), pathlib.Path(files[0]))
    rows = records(320)
    rows[0]["output"] = "so on " * 200
    pathlib.Path(files[1]).write_text(json.dumps(rows))
    subject = subjects.real(*files)
    for choosing in (True, False):
        lengths = [len(e.tokens) for e in subject.material(0, choosing).examples]
        assert max(lengths) == lengths[0] == 200


def study_of(files):
    """The study of the command line with these files."""
    named = dict(zip(compare.REAL_FILES, files, strict=True))
    return compare.study_of(argparse.Namespace(quick=False, **named))


@pytest.mark.parametrize("width, fits", [(64, "32 and 64"), (96, "32"), (48, "neither")])
def test_groups_that_do_not_divide_the_layers_are_left_out_or_refused(files, capsys, width, fits):
    sizes = dict(hidden_size=width, intermediate_size=width, num_attention_heads=2)
    config = dataclasses.replace(CONFIGS["tiny"], num_key_value_heads=2, **sizes)
    save_pretrained(Llama(config), pathlib.Path(files[0]))
    if fits == "neither":
        with pytest.raises(UserError, match="groups of 32, .* do not divide all of its layers"):
            study_of(files)
        return
    study, whole = study_of(files), compare.REAL["ablations"]
    said = "not all groups of the ablations divide its layers" in capsys.readouterr().out
    assert said == (fits == "32")
    assert study.ablations == (whole if fits == "32 and 64" else whole[1:])


def test_weights_and_data_may_be_named_as_repositories(files, monkeypatch):
    local = {"org/model": files[0], "org/data": files[1]}
    for fetch in ("fetch_weights", "fetch_data"):
        monkeypatch.setattr(settings, fetch, local.__getitem__)
    named = study_of(["org/model", "org/data", *files[2:]])
    assert named == study_of(files)


def test_a_damaged_base_is_refused_with_what_to_do(files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    study = study_of(files)
    job = compare.Job(0, "QA-LoRA", 1e-3, 3, 32)
    compare.prepare_base(study, job)
    (folder,) = study.subject.folder(0).iterdir()
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=f"or remove {folder}, and it is made again"):
        compare.quantized_base(study, job)
    shutil.rmtree(folder)
    assert len(linears(compare.quantized_base(study, job))) == 7 * CONFIGS["tiny"].num_hidden_layers
