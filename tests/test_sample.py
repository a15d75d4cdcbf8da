"""sample.py: text arrives whole and at once, from every kind of folder."""

import dataclasses
import io
import json
import pathlib
import subprocess
import sys

import hypothesis.strategies as st
import pytest
import torch
from helpers import peaked_llama, run_in_process, save_tokenizer
from hypothesis import example, given

import formats
import sample
from cli.errors import UserError
from formats.adapter import save_adapter
from formats.huggingface import save_pretrained
from formats.run import save_merged
from kernels.int4 import Int4Linear
from llama import LlamaConfig, generate
from merge import merge
from qalora import adapter_parameters, add_adapters
from quant import quantize_model, save_quantized
from text.instructions import alpaca_prompt
from text.tokenizer import Tokenizer, load_tokenizer, train_tokenizer

TAUGHT = "Once upon a time there was a little girl named Lily. She loved to play in the park. " * 3
CONFIG = LlamaConfig(
    vocab_size=300,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    max_position_embeddings=160,
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_tokenizer([TAUGHT], tmp_path_factory.mktemp("tokenizer") / "tokenizer.model", 300)


# ---- a stream of tokens as text


def test_text_does_not_wait_in_a_buffer(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="utf-8"))
    sample.write_stdout("Once é")
    assert raw.getvalue() == "Once é".encode()


def streamed(tokenizer, tokens):
    """What a stream writes after each token, and at the end."""
    parts = []
    add = sample.text_stream(tokenizer.decode, parts.append)
    for token in tokens:
        add([token])
    add([], last=True)
    return parts


@given(ids=st.lists(st.one_of(st.integers(0, 299), st.integers(3, 258)), max_size=12))
@example(ids=[3 + byte for byte in "a€🙂".encode()])
@example(ids=[3 + 0xE2, 3 + 0xE2, 3 + 0x82, 3 + 0x61])
@example(ids=[3 + byte for byte in "\ufffd!\ufffd".encode()])
def test_any_tokens_streamed_one_by_one_make_the_text_of_all(tokenizer, ids):
    assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids)


@given(text=st.text(st.characters(exclude_characters="\ufffd▁", exclude_categories=["Cs"])))
@example(text=" two  spaces ")
@example(text="naïve 東京 🙂 park")
def test_no_write_holds_half_a_character(tokenizer, text):
    parts = streamed(tokenizer, tokenizer.encode(text))
    assert "".join(parts) == text
    assert "\ufffd" not in "".join(parts)


def test_a_token_is_written_as_soon_as_it_comes_with_the_space_before_it(tokenizer):
    pieces = [tokenizer.vocabulary.pieces[i] for i in tokenizer.encode("Once upon a park.")]
    assert len(pieces) > 3
    parts = streamed(tokenizer, tokenizer.encode("Once upon a park."))
    first, *others = pieces
    assert parts[:-1] == [first.removeprefix("▁"), *(piece.replace("▁", " ") for piece in others)]


def test_real_llama_tokens_stream_whole(material):
    llama_tokenizer = load_tokenizer(material("llama-tokenizer.model"))
    records = json.loads(material("self-instruct-seeds.json").read_text(encoding="utf-8"))
    for record in records:
        text = record["output"] + " 🙂 東京\n"
        parts = streamed(llama_tokenizer, llama_tokenizer.encode(text))
        assert "".join(parts) == text
        assert not any("\ufffd" in part for part in parts)


# ---- sampling


def sampled(model, tokenizer, prompt, **options):
    parts = []
    sample.sample(model, tokenizer, prompt, parts.append, **options)
    return "".join(parts)


def test_a_prompt_is_continued_by_what_generate_gives(tokenizer):
    model, prompt = peaked_llama(CONFIG), "Once upon a"
    tokens = [1, *tokenizer.encode(prompt)]
    whole = generate(model, torch.tensor([tokens]), 20)[0].tolist()
    assert 2 not in whole, "a test needs a text without EOS"
    echoed = sampled(model, tokenizer, prompt, echo=True, max_new_tokens=20)
    assert echoed == tokenizer.decode(whole)
    continuation = sampled(model, tokenizer, prompt, max_new_tokens=20)
    assert continuation == tokenizer.decode(whole[len(tokens) :])


def test_text_ends_at_eos(tokenizer):
    model, prompt = peaked_llama(CONFIG), "Once upon a"
    tokens = [1, *tokenizer.encode(prompt)]
    free = generate(model, torch.tensor([tokens]), 20)[0].tolist()[len(tokens) :]
    end = next(i for i in range(3, 20) if free[i] not in free[:i])  # a token that is new there
    head = model.lm_head.weight
    with torch.no_grad():
        head[[2, free[end]]] = head[[free[end], 2]]  # what was that token is EOS now
    assert sampled(model, tokenizer, prompt) == tokenizer.decode(free[:end])


def test_text_ends_where_the_context_is_full_and_a_prompt_that_fills_it_is_refused(
    tokenizer, monkeypatch
):
    seen = []
    monkeypatch.setattr(sample, "generate", lambda *rest: seen.append(generate(*rest)))
    prompt = "park " * 30
    assert 1 + len(tokenizer.encode(prompt)) < 160
    model = peaked_llama(CONFIG)
    torch.nn.init.zeros_(model.lm_head.weight)  # the likeliest token is 0, never EOS
    sampled(model, tokenizer, prompt, max_new_tokens=1000)
    assert seen[0].shape == (1, 160)
    message = "the prompt has .* tokens and fills the model's context of 160"
    with pytest.raises(UserError, match=message):
        sampled(model, tokenizer, "park " * 90)


@pytest.mark.parametrize("length", [160, 161])
def test_a_prompt_that_just_fills_the_context_is_refused(tokenizer, monkeypatch, length):
    monkeypatch.setattr(Tokenizer, "encode_prompt", lambda tokenizer, prompt: [1] * length)
    with pytest.raises(UserError, match=f"{length} tokens and fills the model's context of 160"):
        sampled(peaked_llama(CONFIG), tokenizer, "")


def test_the_seed_decides_what_is_drawn(tokenizer):
    model = peaked_llama(CONFIG)

    def draw(seed, top_p=0.95):
        options = {"max_new_tokens": 12, "temperature": 1.0, "top_p": top_p, "seed": seed}
        return sampled(model, tokenizer, "Once", **options)

    assert draw(1) == draw(1)
    assert len({draw(seed) for seed in range(4)}) > 1
    greedy = sampled(model, tokenizer, "Once", max_new_tokens=12)
    assert draw(5, top_p=1e-9) == greedy


# ---- the command


def make_folder(kind, path, tokenizer, config=CONFIG, group_size=8):
    """Makes a float or quantized model folder, or a run and perhaps a merged model; returns it."""
    model = peaked_llama(config)
    base = path / "base" if kind in ("run", "merged") else path
    base.mkdir(parents=True)
    save_tokenizer(tokenizer, base)
    if kind == "float":
        save_pretrained(model, base)
        return path
    save_quantized(quantize_model(model, 4, group_size), base)
    if kind == "quantized":
        return path
    add_adapters(model, rank=2, alpha=16)
    for name, p in adapter_parameters(model).items():
        if name.endswith("lora_B"):
            torch.nn.init.normal_(p, std=0.1)
    save_adapter(model, path / "adapter", base=formats.fingerprint(base))
    (path / "run.json").write_text("{}")
    if kind == "run":
        return path
    save_merged(merge(model), path, path / "merged")
    return path / "merged"


def test_every_kind_of_folder_is_sampled_from(tokenizer, tmp_path, monkeypatch, capsys):
    texts = {}
    for kind in ("float", "quantized", "run", "merged"):
        folder = make_folder(kind, tmp_path / kind, tokenizer)
        capsys.readouterr()
        words = [folder, "--prompt", "Once upon a", "--max-new-tokens", 30]
        status, out, error = run_in_process(monkeypatch, capsys, sample.main, *words)
        assert status == 0 and not error
        assert out.startswith("Once upon a") and out.endswith("\n")
        model, _ = sample.load(folder, "cpu")
        text = sampled(model, tokenizer, "Once upon a", echo=True, max_new_tokens=30)
        assert out == text + "\n"
        texts[kind] = out
    assert texts["run"] == texts["merged"] and len(set(texts.values())) == 3, texts


@pytest.mark.parametrize("kind", ["quantized", "run"])
def test_groups_of_32_are_decoded_by_the_int4_kernel_but_loaded_as_they_are(
    tokenizer, tmp_path, monkeypatch, capsys, kind
):
    config = dataclasses.replace(CONFIG, hidden_size=64, intermediate_size=64, head_dim=None)
    folder = make_folder(kind, tmp_path / "model", tokenizer, config, 32)
    called, forward = [], Int4Linear.forward

    def counted(self, x):
        called.append(x.shape)
        return forward(self, x)

    monkeypatch.setattr(Int4Linear, "forward", counted)
    model, _ = sample.load(folder, "cpu")
    model(torch.tensor([[1, 2]]))
    assert not called
    words = [folder, "--prompt", "Once", "--max-new-tokens", 3]
    status, *_ = run_in_process(monkeypatch, capsys, sample.main, *words)
    assert status == 0
    assert len(called) == 3 * 7 * CONFIG.num_hidden_layers


def test_an_instruction_goes_into_alpacas_template_and_only_the_response_is_shown(
    tokenizer, tmp_path, monkeypatch
):
    asked = []

    def ask(model, tokenizer, prompt, write, echo, **rest):
        asked.append((prompt, echo))

    monkeypatch.setattr(sample, "sample", ask)
    folder = make_folder("float", tmp_path / "model", tokenizer)
    for words in ("--instruction Play.", "--instruction Play. --input park", "--prompt Play."):
        monkeypatch.setattr(sys, "argv", ["sample.py", str(folder), *words.split()])
        sample.main()
    with_input = alpaca_prompt("Play.", "park")
    assert asked == [(alpaca_prompt("Play."), False), (with_input, False), ("Play.", True)]


def test_the_commands_options_reach_what_samples(tokenizer, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(sample, "sample", lambda *_, **options: asked.append(options))
    monkeypatch.setattr(sample, "prepare_inference", lambda model: asked.append("prepared"))
    folder = make_folder("float", tmp_path / "model", tokenizer)
    words = "--prompt Play. --max-new-tokens 7 --temperature 0.5 --top-p 0.9 --seed 3"
    monkeypatch.setattr(sys, "argv", ["sample.py", str(folder), *words.split()])
    sample.main()
    options = {"echo": True, "max_new_tokens": 7, "temperature": 0.5, "top_p": 0.9, "seed": 3}
    assert asked == ["prepared", options]


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        ([], "--prompt"),
        (["--prompt", "a", "--instruction", "b"], "not allowed with"),
        (["--prompt", "a", "--input", "b"], "--input belongs to --instruction"),
        (["--prompt", "a", "--temperature", "-1"], "--temperature at least 0"),
        (["--prompt", "a", "--temperature", "nan"], "--temperature at least 0"),
        (["--prompt", "a", "--temperature", "inf"], "--temperature"),
        (["--prompt", "a", "--seed", str(2**63)], "--seed"),
        (["--instruction", ""], "there is no nowhere"),
        (["--prompt", "a\udcff"], "not UTF-8"),
        (["--prompt", "a", "--top-p", "0"], "--top-p above 0"),
        (["--prompt", "a", "--top-p", "1.1"], "at most 1"),
        (["--prompt", "a", "--max-new-tokens", "0"], "--max-new-tokens must be at least 1"),
        (["--prompt", "a", "--seed", "-1"], "--seed -1"),
        (["--prompt", "a"], "there is no nowhere"),
    ],
)
def test_a_users_mistake_is_one_line_and_status_2(monkeypatch, capsys, arguments, complaint):
    words = ["nowhere", *arguments]
    status, out, error = run_in_process(monkeypatch, capsys, sample.main, *words)
    assert status == 2 and not out
    assert error.startswith("error: ") and error.count("\n") == 1 and complaint in error


def test_the_script_streams_to_a_reader_that_leaves_early(tokenizer, tmp_path):
    folder = make_folder("quantized", tmp_path / "model", tokenizer)
    script = pathlib.Path(sample.__file__)
    process = subprocess.Popen(
        [sys.executable, script, folder, "--prompt", "Once upon a"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout.read(11) == b"Once upon a"
    process.stdout.close()
    assert process.stderr.read() == b""
    process.wait()
