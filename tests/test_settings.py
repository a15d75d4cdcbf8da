"""Mistakes cost nothing: they are found before the first slow stage; defaults are the paper's."""

import dataclasses
import json
import resource
import shutil
import subprocess
import sys

import pytest
import torch
from helpers_runs import CONFIG, ENVIRONMENT, adapter, command, options, refusal, run, save_random

import llama
import quant
from cli.settings import default_out, read_settings
from formats.files import write_config
from formats.quantized import save_quantized


@pytest.mark.parametrize("quantization", [3, {}, {"bits": 4}, {"bits": [], "group_size": 32}])
def test_weights_quantized_in_a_way_that_is_none_are_refused(
    world, tmp_path, monkeypatch, quantization
):
    shutil.copytree(world / "weights", tmp_path / "odd")
    write_config(CONFIG, tmp_path / "odd", {"quantization": quantization})
    message = refusal(monkeypatch, *options(world, tmp_path / "run", weights=tmp_path / "odd"))
    assert (
        f"{tmp_path / 'odd'}/config.json: quantization" in message
        and not (tmp_path / "run").exists()
    )


@pytest.mark.parametrize("option, value", [("bits", 2), ("group_size", 16), ("quantizer", "rtn")])
def test_a_baseline_that_has_no_use_for_an_option_refuses_it(
    world, tmp_path, monkeypatch, option, value
):
    words = options(
        world, tmp_path / "run", **{"method": "qlora", "quantizer": None, option: value}
    )
    assert f"--{option.replace('_', '-')} has no effect with --method qlora" in refusal(
        monkeypatch, *words
    )


@pytest.mark.parametrize("model, lr", [("7b", 2e-5), ("13b", 2e-5), ("33b", 1e-5), ("65b", 1e-5)])
def test_the_default_for_real_sizes_is_the_papers_recipe(world, tmp_path, monkeypatch, model, lr):
    write_config(llama.CONFIGS[model], tmp_path)
    shutil.copy(world / "weights" / "tokenizer.model", tmp_path)
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**12, 0, 10**12)
    )
    for words in (["--weights", tmp_path], ["--weights", tmp_path, "--model", model]):
        words += ["--data", world / "records.json", "--out", tmp_path / "out"]
        monkeypatch.setattr(sys, "argv", ["train.py", *map(str, words)])
        found = dataclasses.asdict(read_settings(""))
        recipe = dict(
            method="qalora",
            bits=4,
            group_size=32,
            quantizer="gptq",
            rank=64,
            alpha=16,
            lr=lr,
            clip=0.3,
            batch_size=16,
            steps=10_000,
            targets=",".join(llama.LINEARS),
            checkpointing=1,
        )
        assert {name: found[name] for name in recipe} == recipe


def read(monkeypatch, *words):
    """The settings of a command line."""
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, words)])
    return dataclasses.asdict(read_settings(""))


def test_what_is_not_said_is_as_the_help_says(world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_config(llama.CONFIGS["7b"], tmp_path / "llama.7b")
    shutil.copy(world / "weights" / "tokenizer.model", tmp_path / "llama.7b")
    words = ["--weights", tmp_path / "llama.7b", "--data", world / "records.json"]
    expected = dict(
        max_length=512, micro_batch_size=4, save_every=100, calibration_tokens=128 * 2048, seed=0
    )
    found = read(monkeypatch, *words)
    assert {name: found[name] for name in expected} == expected
    assert read(monkeypatch, *words, "--model", "7b")["out"] == "runs/7b"


def test_records_are_cut_to_the_context_of_a_model_that_has_less_than_512_tokens(
    world, tmp_path, monkeypatch
):
    assert (
        read(monkeypatch, *options(world, tmp_path / "run", max_length=None))["max_length"] == 256
    )


def test_weights_that_are_quantized_tell_their_bits_and_group_size(world, tmp_path, monkeypatch):
    weights = shutil.copytree(world / "weights", tmp_path / "merged")
    save_quantized(quant.quantize_model(llama.load_pretrained(weights), 3, 16), weights)
    words = options(world, tmp_path / "run", weights=weights, quantizer=None)
    found = read(monkeypatch, *words)
    assert (found["bits"], found["group_size"]) == (3, 16)
    for wrong in ("--bits 4", "--group-size 32", "--method lora"):
        message = refusal(monkeypatch, *words, *wrong.split())
        assert "is quantized already, to 3 bits in groups of 16" in message
    calibration = f"--calibration {world / 'records.json'}"
    for useless in ("--quantizer rtn", calibration, "--calibration-tokens 4096"):
        message = refusal(monkeypatch, *words, *useless.split())
        assert f"{useless.split()[0]} has no effect: {weights} is quantized; leave it" in message


def test_targets_that_all_stayed_float_are_refused_at_once(world, tmp_path, monkeypatch):
    weights = shutil.copytree(world / "weights", tmp_path / "merged")
    model = quant.quantize_model(llama.load_pretrained(weights), 4, 32)
    for block in model.model.layers:
        block.mlp.up_proj = torch.nn.Linear(64, 96, bias=False)
    model.model.layers[0].mlp.gate_proj = torch.nn.Linear(64, 96, bias=False)
    save_quantized(model, weights)
    for targets, fits in (("up_proj", False), ("up_proj,gate_proj", True), ("gate_proj", True)):
        changed = dict(weights=weights, targets=targets, quantizer=None)
        words = options(world, tmp_path / "run", **changed)
        if fits:
            assert read(monkeypatch, *words)["targets"] == targets
        else:
            says = "--targets up_proj: none of them is quantized in groups in"
            assert says in refusal(monkeypatch, *words)


@pytest.mark.parametrize(
    "changed",
    [
        dict(hidden_size=8192),
        dict(num_hidden_layers=31),
        dict(intermediate_size=11040),
        dict(num_attention_heads=64),
        dict(num_key_value_heads=8),
        dict(head_dim=64),
    ],
)
def test_every_size_that_contradicts_the_files_is_refused(world, tmp_path, monkeypatch, changed):
    ((name, value),) = changed.items()
    write_config(dataclasses.replace(llama.CONFIGS["7b"], **changed), tmp_path)
    message = refusal(monkeypatch, *options(world, tmp_path / "run", weights=tmp_path, model="7b"))
    assert (
        f"--model 7b has {name} {getattr(llama.CONFIGS['7b'], name)}" in message
        and f"has {value};" in message
    )


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_the_baselines_take_widths_that_no_group_divides(world, tmp_path, method):
    save_random(tmp_path / "weights", config=dataclasses.replace(CONFIG, intermediate_size=88))
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
        ),
    )


def test_without_weights_it_is_said_where_they_are_to_be_had(tmp_path):
    _, message = command("train.py", "--model", "7b", status=2, cwd=tmp_path)
    assert "weights/7b" in message and "huggingface.co/meta-llama" in message
    assert "python train.py --model 7b --weights FOLDER" in message and 2 < message.count("\n") < 8
    last = message.splitlines()[-1]
    assert (
        last.startswith("error: ") and "cannot be reached" in last and "huggyllama/llama-7b" in last
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "option, value",
    [
        ("--targets", "w_proj"),
        ("--seed", -1),
        ("--device", "cuda:99"),
        ("--data", "no.json"),
        ("--calibration", "no.txt"),
        ("--tokenizer", "no.model"),
    ],
)
def test_a_wrong_option_is_found_before_the_weights_are_fetched(
    tmp_path, monkeypatch, option, value
):
    monkeypatch.chdir(tmp_path)
    message = refusal(monkeypatch, "--model", "7b", option, value)
    assert "cannot be reached" not in message and str(value) in message


def test_full_rank_is_for_qalora_and_has_no_alpha(monkeypatch):
    for words, said in (
        ("--method qlora", "--rank full is for --method qalora; give a number"),
        ("--method lora", "--rank full is for --method qalora; give a number"),
        ("--alpha 16", "--alpha has no effect with --rank full; leave it out"),
    ):
        assert said in refusal(monkeypatch, "--model", "7b", "--rank", "full", *words.split())
    assert "invalid int above zero or full value: 'ful'" in refusal(monkeypatch, "--rank", "ful")


def test_an_option_for_another_method_is_found_before_the_weights_are_fetched(monkeypatch):
    message = refusal(monkeypatch, "--model", "7b", "--method", "lora", "--bits", 2)
    assert "--bits has no effect with --method lora" in message


def test_a_run_of_weights_from_hugging_face_is_named_after_them():
    assert default_out({"weights": "org/Tiny-1.7B"}) == "runs/Tiny-1.7B"
    assert default_out({"weights": "org/name:tiny.Q4_1.gguf"}) == "runs/tiny.Q4_1"
    assert default_out({"weights": "org/name", "model": "7b"}) == "runs/7b"


@pytest.mark.parametrize("option", ["--weights", "--data"])
def test_with_resume_only_what_is_typed_is_fetched(whole, tmp_path, monkeypatch, option):
    out = shutil.copytree(whole, tmp_path / "run")
    assert read(monkeypatch, "--resume", "--out", out)["out"] == str(out)
    message = refusal(monkeypatch, "--resume", "--out", out, option, "org/name")
    assert "there is no org/name here" in message


def test_a_size_that_contradicts_the_files_shows_both(world, tmp_path, monkeypatch):
    message = refusal(monkeypatch, *options(world, tmp_path / "run", model="7b"))
    assert "--model 7b has hidden_size 4096" in message and f"{world / 'weights'} has 64" in message


@pytest.mark.parametrize(
    "changed, expected",
    [
        (dict(bits=5), "--bits"),
        (dict(model="8b"), "unknown --model 8b"),
        (dict(targets="q_proj,w_proj"), "'w_proj'"),
        (dict(lr="nan"), "--lr"),
        (dict(steps=0), "--steps"),
        (dict(seed=2**70), "--seed"),
        (dict(data="missing.json"), "missing.json: there is no such file"),
        (dict(data=None), "there is no yahma/alpaca-cleaned:alpaca_data_cleaned.json here"),
        (dict(data="org/data"), "there is no org/data here"),
        (dict(weights="org/tiny"), "there is no org/tiny here"),
        (dict(device="cuda:99"), "--device cuda:99"),
        (dict(device="meta"), "--device meta"),
        (dict(max_length=257), "--max-length 257 is more than the model's context of 256 tokens"),
        (dict(group_size=7), "model.layers.0.self_attn.q_proj"),
        (dict(tokenizer="none.model"), "none.model does not exist"),
        (dict(max_length=4), "raise --max-length"),
        (dict(weights="nowhere"), "there are no weights in nowhere"),
        (dict(weights="no.gguf"), "--weights no.gguf: there is no such file"),
        (dict(weights="NO.GGUF"), "--weights NO.GGUF: there is no such file"),
    ],
)
def test_a_wrong_option_is_refused_and_leaves_nothing(
    world, tmp_path, monkeypatch, changed, expected
):
    assert expected in refusal(monkeypatch, *options(world, tmp_path / "run", **changed))
    assert not (tmp_path / "run" / "base").exists() and not (tmp_path / "run" / "run.json").exists()


@pytest.mark.parametrize("option", ["data", "calibration"])
def test_a_bad_record_is_found_before_anything_is_quantized(world, tmp_path, monkeypatch, option):
    (tmp_path / "bad.jsonl").write_text(
        '{"instruction": "a", "output": "b"}\n{"instruction": "a", "output": [7]}\n'
    )
    bad = {option: tmp_path / "bad.jsonl"}
    message = refusal(monkeypatch, *options(world, tmp_path / "run", quantizer="gptq", **bad))
    assert "bad.jsonl, line 2" in message and not (tmp_path / "run" / "base").exists()


def test_an_out_that_cannot_be_written_is_refused(world, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    assert "cannot be written" in refusal(monkeypatch, *options(world, tmp_path / "file" / "run"))


def test_a_tokenizer_larger_than_the_embedding_is_refused_by_name(world, tmp_path, monkeypatch):
    save_random(tmp_path / "weights", config=dataclasses.replace(CONFIG, vocab_size=500))
    message = refusal(
        monkeypatch,
        *options(
            world,
            tmp_path / "run",
            weights=tmp_path / "weights",
            tokenizer=world / "weights" / "tokenizer.model",
        ),
    )
    assert all(
        part in message
        for part in (
            "the tokenizer has 512 pieces",
            f"{tmp_path}/weights",
            "model.embed_tokens.weight",
            "500",
        )
    )


def test_paging_where_there_is_nothing_to_page_says_so(world, whole, tmp_path):
    text = run(tmp_path / "log", options(world, tmp_path / "run", paged_optimizer=1, device="cpu"))
    assert "--paged-optimizer: on --device cpu there is nothing to page" in text
    assert adapter(tmp_path / "run") == adapter(whole)


def test_running_out_of_memory_says_what_to_lower(world, whole, tmp_path):
    code = "import train; print(open('/proc/self/status').read().split('VmData:')[1].split()[0])"
    imported = subprocess.run(
        [sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, check=True
    ).stdout
    limit = int(imported) * 1024 + 200 * 2**20
    _, text = command(
        "train.py",
        *options(world, tmp_path / "run", rank=100_000),
        status=2,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit, limit)),
    )
    assert (
        "\nerror: out of memory; lower --micro-batch-size" in text and text.count("error") == 1
    ), text


def test_a_plot_without_matplotlib_is_refused_at_once(world, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install matplotlib" in refusal(
        monkeypatch, *options(world, tmp_path / "run"), "--plot"
    )
    assert not (tmp_path / "run" / "base").exists()


@pytest.mark.parametrize("name", ["calibration", "weights", "lr"])
def test_a_run_json_that_lacks_a_setting_is_damaged(whole, tmp_path, monkeypatch, name):
    out = shutil.copytree(whole, tmp_path / "run")
    kept = json.loads((out / "run.json").read_text())
    del kept[name]
    (out / "run.json").write_text(json.dumps(kept))
    message = refusal(monkeypatch, "--resume", "--out", out)
    assert f"run.json is damaged (it lacks {name})" in message


@pytest.mark.parametrize("name", ["run\ncaf\u00e9", "run\udce9"])
def test_a_name_that_cannot_be_printed_is_refused_before_anything_is_made(
    world, tmp_path, monkeypatch, name
):
    message = refusal(monkeypatch, *options(world, tmp_path / name))
    assert message.startswith("--out") and "cannot be printed" in message
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "name", ["a b", "\u65b0\u3057\u3044\u3000\u7d19", "\U0001f468\u200d\U0001f467"]
)
def test_spaces_and_letters_of_any_writing_may_stand_in_names(world, tmp_path, name):
    run(tmp_path / "log", options(world, tmp_path / name, steps=1))
    assert (tmp_path / name / "adapter").exists()
