"""What train.py promises: the loop, and the whole way from float weights to a merged model."""

import dataclasses
import json
import re
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from helpers import exchange
from helpers_runs import (
    CONFIG,
    ENVIRONMENT,
    NOUNS,
    RECORDS,
    ROOT,
    adapter,
    close,
    command,
    metrics,
    options,
    refusal,
    run,
    save_random,
    wait_for,
)

import evals
import formats
import llama
import merge
import qalora
import train
from cli import base
from cli.settings import Settings
from formats import load_model
from formats.adapter import load_adapter
from formats.files import open_file
from formats.quantized import load_quantized
from text.batches import Example, batch_order, encode
from text.instructions import Data, Turn, read_records
from text.templates import alpaca_prompt
from text.tokenizer import load_tokenizer, train_tokenizer


def test_a_real_llama_from_float_to_merged_int4_killed_on_the_way(material, tmp_path):
    weights, seeds = material("stories260K"), material("self-instruct-seeds.json")
    texts = []
    for record in json.loads(seeds.read_text()):
        texts += [record["instruction"], record["output"]]
    train_tokenizer(texts, tmp_path / "tokenizer.model", 512)
    common = [
        "--weights",
        weights,
        "--tokenizer",
        tmp_path / "tokenizer.model",
        "--data",
        seeds,
        "--steps",
        6,
        "--rank",
        4,
        "--batch-size",
        4,
        "--micro-batch-size",
        2,
        "--max-length",
        128,
        "--lr",
        1e-3,
        "--save-every",
        2,
        "--calibration-tokens",
        2048,
        "--out",
    ]

    _, message = command("train.py", *common, tmp_path / "refused", status=2)
    assert (
        message.count("\n") == 1
        and message.startswith("error: model.layers.0.mlp.down_proj: group size 32")
        and "172" in message
        and not (tmp_path / "refused").exists()
    ), message

    printed, _ = command("train.py", *common, tmp_path / "whole", "--group-size", 4)
    assert "175 records in Alpaca form" in printed and "bit identical: True" in printed, printed
    results = json.loads((tmp_path / "whole" / "results.json").read_text())
    assert results["validation_loss_adapted"] < results["validation_loss_base"]

    out = tmp_path / "killed"
    killed = subprocess.Popen(
        [sys.executable, ROOT / "train.py", *map(str, common), out, "--group-size", "4"],
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    wait_for(
        lambda: list(out.glob(".step-4.*.unfinished")) or (out / "step-6").exists(), killed.pid
    )
    killed.kill()
    assert killed.wait() == -signal.SIGKILL and not (out / "adapter").exists()
    printed, _ = command("train.py", "--resume", "--out", out)
    assert f"{out}/base is already made" in printed
    assert adapter(out) == adapter(tmp_path / "whole") and metrics(out) == metrics(
        tmp_path / "whole"
    )
    assert not list(out.glob(".*"))

    merged = tmp_path / "merged"
    command("merge.py", out, "--out", merged)
    (tmp_path / "text.txt").write_text(
        "Once upon a time there was a little girl. She loved to play outside."
    )
    (tmp_path / "choices.jsonl").write_text(
        "\n".join(material("hellaswag-500.jsonl").read_text().split("\n")[:4])
    )
    judged = [
        command(
            "evals.py",
            folder,
            "--perplexity",
            tmp_path / "text.txt",
            "--multiple-choice",
            tmp_path / "choices.jsonl",
        )[0]
        for folder in (merged, out)
    ]
    assert judged[0] == judged[1] and "perplexity" in judged[0] and "4 questions" in judged[0]
    text, _ = command("sample.py", merged, "--instruction", "Name a colour.", "--max-new-tokens", 8)
    assert text.strip()


def test_a_merged_model_can_be_fine_tuned_again(world, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["merge.py", str(whole), "--out", str(tmp_path / "merged")])
    merge.main()
    again = options(world, tmp_path / "again", weights=tmp_path / "merged", steps=2, quantizer=None)
    printed = run(tmp_path / "log", again)
    assert "bit identical: True" in printed
    first, second = (
        load_model(folder) for folder in (tmp_path / "merged", tmp_path / "again" / "base")
    )
    assert all(
        torch.equal(a, b)
        for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )
    assert "is quantized already, to 4 bits in groups of 32" in refusal(
        monkeypatch, *again, "--bits", 3
    )


def test_an_adapter_is_not_merged_into_another_base(world, whole, tmp_path, monkeypatch):
    run(
        tmp_path / "log",
        options(world, tmp_path / "other", weights=world / "other-weights", steps=2),
    )
    shutil.copytree(whole, tmp_path / "mixed")
    shutil.rmtree(tmp_path / "mixed" / "base")
    shutil.copytree(tmp_path / "other" / "base", tmp_path / "mixed" / "base")
    _, message = command("merge.py", tmp_path / "mixed", "--out", tmp_path / "merged", status=2)
    assert "was trained over the base" in message and not (tmp_path / "merged").exists()


def test_accumulation_and_checkpointing_do_not_change_the_losses(world, whole, tmp_path):
    for i, changed in enumerate(
        (dict(micro_batch_size=4), dict(micro_batch_size=1), dict(checkpointing=0))
    ):
        run(tmp_path / "log", options(world, tmp_path / str(i), **changed))
        close(metrics(tmp_path / str(i)), metrics(whole))
    assert json.loads((whole / "run.json").read_text())["checkpointing"] == 1, (
        "nothing was compared"
    )


def test_checkpointing_recomputes_each_block_and_can_be_left_out(world, tmp_path, monkeypatch):
    honest = llama.checkpoint

    def checkpoint(*arguments, **more):
        print("recomputed later")
        return honest(*arguments, **more)

    monkeypatch.setattr(llama, "checkpoint", checkpoint)
    for wanted in (1, 0):
        text = run(
            tmp_path / "log", options(world, tmp_path / str(wanted), steps=2, checkpointing=wanted)
        )
        assert (
            text.count("recomputed later") == wanted * 2 * 2 * CONFIG.num_hidden_layers
        )  # steps, micro-batches


def test_the_loss_is_the_mean_over_the_batchs_response_tokens(world, whole):
    now = Settings(**json.loads((whole / "run.json").read_text()))
    examples, _ = train.make_examples(
        read_records(now.data), load_tokenizer(whole), now.max_length, now.seed
    )
    batch = [examples[i] for i in batch_order(tuple(len(e.tokens) for e in examples), 4, 0, 0)]
    model, total, count = load_quantized(whole / "base", torch.float32), 0.0, 0
    for tokens, learned in batch:  # one by one and without padding
        log_probs = model(torch.tensor(tokens[None], dtype=torch.long))[0].log_softmax(-1)
        places = learned.nonzero()[0]
        total -= sum(log_probs[t - 1, tokens[t]].item() for t in places)
        count += len(places)
    assert metrics(whole, "loss")[0][0] == pytest.approx(total / count, rel=1e-5)


def test_training_is_adamw_at_a_constant_rate_on_gradients_cut_to_clip(world, tmp_path):
    run(
        tmp_path / "log",
        options(world, tmp_path / "run", lr=0.004, clip=0.05, checkpointing=0, seed=2),
    )
    now = Settings(**json.loads((tmp_path / "run" / "run.json").read_text()))
    data, tokenizer = read_records(now.data), load_tokenizer(tmp_path / "run")
    examples, other = (
        train.make_examples(data, tokenizer, now.max_length, seed)[0] for seed in (2, 3)
    )
    assert [e.tokens.tolist() for e in examples] != [e.tokens.tolist() for e in other]
    torch.manual_seed(now.seed)
    model = qalora.add_adapters(load_quantized(tmp_path / "run" / "base", torch.float32), 4, 16.0)
    parameters = list(qalora.adapter_parameters(model).values())
    moments, expected = [(torch.zeros_like(p), torch.zeros_like(p)) for p in parameters], []
    for step in range(6):
        batch = [
            examples[i]
            for i in batch_order(tuple(len(e.tokens) for e in examples), 4, step, now.seed)
        ]
        losses = []
        for tokens, learned in batch:
            log_probs = model(torch.tensor(tokens[None], dtype=torch.long))[0].log_softmax(-1)
            losses += [-log_probs[t - 1, tokens[t]] for t in learned.nonzero()[0]]
        loss = sum(losses) / len(losses)
        gradients = torch.autograd.grad(loss, parameters)
        norm = sum(g.square().sum() for g in gradients).sqrt()
        expected.append((step + 1, loss.item(), norm.item()))
        for p, g, (m, v) in zip(
            parameters, gradients, moments, strict=True
        ):  # Kingma and Ba (2015), algorithm 1
            g = g * min(1, 0.05 / norm)
            m.mul_(0.9).add_(0.1 * g)
            v.mul_(0.999).add_(0.001 * g * g)
            unbiased = m / (1 - 0.9 ** (step + 1)), v / (1 - 0.999 ** (step + 1))
            p.data -= 0.004 * unbiased[0] / (unbiased[1].sqrt() + 1e-8)
    norms = [norm for *_, norm in expected]
    assert min(norms) > 0.05 and max(norms) > 2 * min(norms), (
        "all gradients are cut, and each by another factor"
    )
    close(metrics(tmp_path / "run"), expected)


def test_validation_examples_are_held_out_and_what_is_cut_or_left_out_is_counted(world, capsys):
    tokenizer = load_tokenizer(world / "weights")
    asked = len(tokenizer.encode(alpaca_prompt("a")))
    records = [exchange("a", word * n) for n, word in enumerate((NOUNS * 2)[:30], 1)]
    records.append(exchange("a" * 400, "b"))
    data, most = Data(records, "LongForm", 2, "line 7"), asked + 40
    train_examples, held_out = train.make_examples(data, tokenizer, most, seed=3)
    printed = capsys.readouterr().out.splitlines()
    cut = 0
    for question, answer in records:
        prompt, response = alpaca_prompt(question.text), answer.text
        cut += 2 + len(tokenizer.encode(prompt)) + len(tokenizer.encode(response)) > most
    left_out = "1 of these left out, as no response was left"
    without = "2 without an answer left out (the first: line 7)"
    said = f"{without}, {cut} longer than {most} tokens and cut, {left_out}"
    assert printed[0] == f"data: 31 records in LongForm form, {said}" and 1 < cut < 31
    assert len(held_out) == 30 // 20

    def all_tokens(examples):
        return sorted(e.tokens.tolist() for e in examples)

    assert all_tokens(train_examples + held_out) == all_tokens(encode(records, tokenizer, most)[0])


@pytest.mark.parametrize("method, bits", [("lora", 32), ("qlora", 4.2)])
def test_the_baselines_go_the_whole_way(world, tmp_path, monkeypatch, method, bits):
    out = tmp_path / "run"
    text = run(tmp_path / "log", options(world, out, method=method, quantizer=None, save_every=3))
    found = float(re.search(r"beside (\d+\.\d+) bits a weight", text)[1])
    assert found == pytest.approx(bits, abs=0.1)
    results = json.loads((out / "results.json").read_text())
    assert results["validation_loss_adapted"] < results["validation_loss_base"]
    before = adapter(out)
    run(tmp_path / "log", ["--resume", "--out", str(out), "--steps", "8"])
    assert len(metrics(out)) == 8 and adapter(out) != before
    monkeypatch.setattr(sys, "argv", ["merge.py", str(out), "--out", str(tmp_path / "merged")])
    merge.main()
    assert formats.quantization_of(tmp_path / "merged") is None
    adapted = load_model(out / "base")
    load_adapter(adapted, out / "adapter")
    tokens = torch.arange(60).view(2, 30)
    torch.testing.assert_close(
        llama.load_pretrained(tmp_path / "merged")(tokens), adapted(tokens), rtol=0, atol=1e-3
    )
    run(tmp_path / "log", options(world, tmp_path / "again", weights=tmp_path / "merged", steps=1))


def test_only_the_targets_are_trained(world, whole, tmp_path):
    run(tmp_path / "log", options(world, tmp_path / "run", targets="q_proj,v_proj"))
    found = json.loads((tmp_path / "run" / "adapter" / "adapter.json").read_text())
    assert found["targets"] == ["q_proj", "v_proj"]
    base, merged = load_quantized(tmp_path / "run" / "base"), load_model(tmp_path / "run")
    changed = {
        name
        for name, t in base.state_dict().items()
        if not torch.equal(t, merged.state_dict()[name])
    }
    layers = ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    queries, values = ([f"{layer}.{n}_proj.offset" for layer in layers] for n in "qv")
    assert changed == {*queries, *values}
    merged = load_model(whole)  # all seven
    changed = {
        name
        for name, t in base.state_dict().items()
        if not torch.equal(t, merged.state_dict()[name])
    }
    assert len(changed) == 14 and all(name.endswith(".offset") for name in changed)


def test_each_line_of_metrics_and_the_validation_loss(world, whole):
    assert [step for (step,) in metrics(whole, "step")] == [1, 2, 3, 4, 5, 6]
    assert [loss is not None for (loss,) in metrics(whole, "validation_loss")] == [False, True] * 3
    results = json.loads((whole / "results.json").read_text())
    assert results["bit_identical"] is True
    assert results["validation_loss_adapted"] == metrics(whole, "validation_loss")[-1][0]
    assert results["validation_loss_adapted"] < results["validation_loss_base"]
    assert all(speed > 0 for (speed,) in metrics(whole, "tokens_per_second"))
    bars = (world / "whole-log").read_text().split("fine-tuning:")
    assert re.search(
        r"6/6 \[\d\d:\d\d<\d\d:\d\d, .*step/s, GB=\d+\.\d, loss=\d+\.\d+, tokens_per_s=\d+\]",
        bars[-1],
    )


def test_in_bfloat16_the_adapters_and_their_optimizer_stay_in_float32(world, tmp_path, monkeypatch):
    for module in (base, evals):
        monkeypatch.setattr(module, "compute_dtype", lambda stored, device: torch.bfloat16)
    text = run(tmp_path / "log", options(world, tmp_path / "run", checkpointing=1))
    assert "bit identical: True" in text
    stored = open_file(tmp_path / "run" / "adapter" / "adapter.safetensors")
    assert {t.read().dtype for t in stored.values()} == {torch.float32}
    state = torch.load(tmp_path / "run" / "step-6" / "optimizer.pt", weights_only=True)[
        "optimizer"
    ]["state"]
    for moments in state.values():
        assert {t.dtype for t in moments.values()} == {torch.float32}


@pytest.mark.parametrize("method", ["qalora", "qlora", "lora"])
def test_a_model_of_tied_embeddings_goes_the_whole_way(world, tmp_path, method):
    save_random(tmp_path / "weights", config=dataclasses.replace(CONFIG, tie_word_embeddings=True))
    shutil.copy(world / "weights" / "tokenizer.model", tmp_path / "weights")
    run(
        tmp_path / "log",
        options(
            world,
            tmp_path / "run",
            weights=tmp_path / "weights",
            method=method,
            quantizer=None,
            steps=1,
            calibration_tokens=512,
        ),
    )
    model = load_model(tmp_path / "run")
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_ten_records_are_enough_though_none_is_held_out(world, tmp_path):
    (tmp_path / "ten.json").write_text(json.dumps(RECORDS[:10]))
    run(tmp_path / "log", options(world, tmp_path / "run", data=tmp_path / "ten.json"))
    assert json.loads((tmp_path / "run" / "results.json").read_text())["validation_examples"] == 0
    assert metrics(tmp_path / "run", "validation_loss") == [(None,)] * 6


def test_the_loss_of_16_bit_logits_is_computed_in_float32():
    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            logits = torch.randn(5, 300, generator=torch.Generator().manual_seed(0))
            self.logits = torch.nn.Parameter(logits.bfloat16())

        def forward(self, tokens_BT, keep_BT):
            return self.logits

    network, tokens = Network(), torch.arange(3, 10).numpy()
    loss = train.accumulate_gradients(network, [Example(tokens, tokens > 4)], 1)
    expected = torch.nn.functional.cross_entropy(network.logits.float(), torch.arange(5, 10))
    assert loss == pytest.approx(expected.item(), rel=1e-6)


def test_at_most_200_examples_are_held_out(world):
    tokenizer = load_tokenizer(world / "weights")
    data = Data([(Turn("text", "house"),)] * 4100, "text", 0, "")
    found = train.make_examples(data, tokenizer, 40, seed=0)
    assert [len(examples) for examples in found] == [3900, 200]
