"""What sample.py promises: text that arrives whole and at once, from every kind of folder."""

import dataclasses
import io
import json
import pathlib
import subprocess
import sys

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import example, given

import data
import int4
import llama
import merge
import qalora
import quant
import sample
from cli import UserError, run_command

WORDS = "Once upon a time there was a little girl named Lily. She loved to play outside in the park. " * 3
CONFIG = llama.LlamaConfig(vocab_size=300, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
                           num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=160)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return data.train_tokenizer([WORDS], tmp_path_factory.mktemp("tokenizer") / "tokenizer.model", 300)


def random_llama(config=CONFIG):
    torch.manual_seed(0)
    model = llama.Llama(config)
    for p in model.parameters():
        if p.dim() == 2:
            torch.nn.init.normal_(p, std=0.4)
    return model


def test_text_does_not_wait_in_a_buffer(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="utf-8"))
    sample.write("Once é")
    assert raw.getvalue() == "Once é".encode()


def streamed(tokenizer, tokens):
    """What a stream writes after each token, and at the end."""
    parts = []
    add = sample.text_stream(tokenizer, parts.append)
    for token in tokens:
        add([token])
    add([], last=True)
    return parts


@given(ids=st.lists(st.one_of(st.integers(0, 299), st.integers(3, 258)), max_size=12))
@example(ids=[3 + byte for byte in "a€🙂".encode()])
@example(ids=[3 + 0xe2, 3 + 0xe2, 3 + 0x82, 3 + 0x61])
@example(ids=[3 + byte for byte in "\ufffd!\ufffd".encode()])
def test_any_tokens_streamed_one_by_one_make_the_text_of_all(tokenizer, ids):
    assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids)


@given(text=st.text(st.characters(exclude_characters="\ufffd▁", exclude_categories=["Cs"])))
@example(text=" two  spaces ")
@example(text="naïve 東京 🙂 park")
def test_no_write_holds_half_a_character(tokenizer, text):
    parts = streamed(tokenizer, tokenizer.encode(text))
    assert "".join(parts) == text and "\ufffd" not in "".join(parts)


def test_a_token_is_written_as_soon_as_it_comes_with_the_space_before_it(tokenizer):
    pieces = tokenizer.encode("Once upon a park.", out_type=str)
    assert len(pieces) > 3
    parts = streamed(tokenizer, tokenizer.encode("Once upon a park."))
    assert parts[:-1] == [pieces[0].removeprefix("▁"), *(piece.replace("▁", " ") for piece in pieces[1:])]


def test_real_llama_tokens_stream_whole(material):
    llama_tokenizer = data.load_tokenizer(material("llama-tokenizer.model"))
    for record in json.loads(material("self-instruct-seeds.json").read_text(encoding="utf-8")):
        text = record["output"] + " 🙂 東京\n"
        parts = streamed(llama_tokenizer, llama_tokenizer.encode(text))
        assert "".join(parts) == text and not any("\ufffd" in part for part in parts)


def sampled(model, tokenizer, prompt, **options):
    parts = []
    sample.sample(model, tokenizer, prompt, parts.append, **options)
    return "".join(parts)


def test_a_prompt_is_continued_by_what_generate_gives(tokenizer):
    model, prompt = random_llama(), "Once upon a"
    tokens = [1, *tokenizer.encode(prompt)]
    whole = llama.generate(model, torch.tensor([tokens]), 20)[0].tolist()
    assert 2 not in whole, "a test needs a text without EOS"
    assert sampled(model, tokenizer, prompt, echo=True, max_new_tokens=20) == tokenizer.decode(whole)
    assert sampled(model, tokenizer, prompt, max_new_tokens=20) == tokenizer.decode(whole[len(tokens):])


def test_text_ends_at_eos(tokenizer):
    model, prompt = random_llama(), "Once upon a"
    tokens = [1, *tokenizer.encode(prompt)]
    free = llama.generate(model, torch.tensor([tokens]), 20)[0].tolist()[len(tokens):]
    end = next(i for i in range(3, 20) if free[i] not in free[:i])  # the first token there that has not come before
    with torch.no_grad():
        model.lm_head.weight[[2, free[end]]] = model.lm_head.weight[[free[end], 2]]  # what was that token is EOS now
    assert sampled(model, tokenizer, prompt) == tokenizer.decode(free[:end])


def test_text_ends_where_the_context_is_full_and_a_prompt_that_fills_it_is_refused(tokenizer, monkeypatch):
    seen = []
    generate = llama.generate
    monkeypatch.setattr(sample, "generate", lambda *rest: seen.append(generate(*rest)))
    prompt = "park " * 30
    length = 1 + len(tokenizer.encode(prompt))
    assert length < 160
    model = random_llama()
    torch.nn.init.zeros_(model.lm_head.weight)  # the likeliest token is 0, never EOS
    sampled(model, tokenizer, prompt, max_new_tokens=1000)
    assert seen[0].shape == (1, 160)
    with pytest.raises(UserError, match="the prompt has .* tokens and fills the model's context of 160"):
        sampled(model, tokenizer, "park " * 90)


def test_the_seed_decides_what_is_drawn(tokenizer):
    model = random_llama()
    draw = lambda seed: sampled(model, tokenizer, "Once", max_new_tokens=12, temperature=1.0, top_p=0.95, seed=seed)
    assert draw(1) == draw(1) and len({draw(seed) for seed in range(4)}) > 1
    greedy = sampled(model, tokenizer, "Once", max_new_tokens=12)
    assert sampled(model, tokenizer, "Once", max_new_tokens=12, temperature=1.0, top_p=1e-9, seed=5) == greedy


def command(monkeypatch, capsys, *arguments):
    """Runs sample.py in this process: (exit status, standard output, standard error)."""
    monkeypatch.setattr(sys, "argv", ["sample.py", *map(str, arguments)])
    try:
        run_command(sample.main)
        status = 0
    except SystemExit as e:
        status = e.code
    return status, *capsys.readouterr()


def make_folder(kind, path, tokenizer, config=CONFIG, group_size=8):
    """A float, quantized or merged model folder, or a run, at `path`."""
    model, home = random_llama(config), path / "base" if kind in ("run", "merged") else path
    home.mkdir(parents=True)
    (home / "tokenizer.model").write_bytes(tokenizer.serialized_model_proto())
    if kind == "float":
        return llama.save_pretrained(model, home)
    quant.save_quantized(quant.quantize_model(model, 4, group_size), home)
    if kind == "quantized":
        return
    qalora.add_adapters(model, rank=2, alpha=16)
    for name, p in qalora.adapter_parameters(model).items():
        if name.endswith("lora_B"):
            torch.nn.init.normal_(p, std=0.1)
    qalora.save_adapter(model, path / "adapter", base=merge.fingerprint(home))
    (path / "run.json").write_text("{}")
    if kind == "merged":
        merge.save_merged(merge.merge(model), path, path / "merged")


def test_every_kind_of_folder_is_sampled_from(tokenizer, tmp_path, monkeypatch, capsys):
    texts = {}
    for kind in ("float", "quantized", "run", "merged"):
        make_folder(kind, tmp_path / kind, tokenizer)
        folder = tmp_path / kind / ("merged" if kind == "merged" else "")
        capsys.readouterr()
        status, out, error = command(monkeypatch, capsys, folder, "--prompt", "Once upon a", "--max-new-tokens", 30)
        assert status == 0 and not error and out.startswith("Once upon a") and out.endswith("\n")
        model, _ = sample.load(folder, "cpu")
        assert out == sampled(model, tokenizer, "Once upon a", echo=True, max_new_tokens=30) + "\n"
        texts[kind] = out
    assert texts["run"] == texts["merged"] and len(set(texts.values())) == 3, texts


@pytest.mark.parametrize("kind", ["quantized", "run"])
def test_groups_of_32_are_decoded_by_the_int4_kernel_but_loaded_as_they_are(tokenizer, tmp_path, monkeypatch, capsys, kind):
    folder, config = tmp_path / "model", dataclasses.replace(CONFIG, hidden_size=64, intermediate_size=64)
    make_folder(kind, folder, tokenizer, config, 32)
    called, forward = [], int4.Int4Linear.forward
    monkeypatch.setattr(int4.Int4Linear, "forward", lambda self, x: called.append(x.shape) or forward(self, x))
    model, _ = sample.load(folder, "cpu")
    model(torch.tensor([[1, 2]]))
    assert not called
    status, *_ = command(monkeypatch, capsys, folder, "--prompt", "Once", "--max-new-tokens", 3)
    assert status == 0 and len(called) == 3 * 7 * CONFIG.num_hidden_layers


def test_an_instruction_goes_into_alpacas_template_and_only_the_response_is_shown(tokenizer, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(sample, "sample", lambda m, t, prompt, write, echo, **rest: asked.append((prompt, echo)))
    make_folder("float", tmp_path / "model", tokenizer)
    for arguments in ("--instruction Play.", "--instruction Play. --input park", "--prompt Play."):
        monkeypatch.setattr(sys, "argv", ["sample.py", str(tmp_path / "model"), *arguments.split()])
        sample.main()
    assert asked == [(data.alpaca_prompt("Play."), False), (data.alpaca_prompt("Play.", "park"), False),
                     ("Play.", True)]


@pytest.mark.parametrize("arguments, complaint", [
    ([], "--prompt"), (["--prompt", "a", "--instruction", "b"], "not allowed with"),
    (["--prompt", "a", "--input", "b"], "--input belongs to --instruction"),
    (["--prompt", "a", "--temperature", "-1"], "--temperature at least 0"),
    (["--prompt", "a", "--temperature", "nan"], "--temperature at least 0"),
    (["--prompt", "a", "--temperature", "inf"], "--temperature"), (["--prompt", "a", "--seed", str(2 ** 63)], "--seed"),
    (["--instruction", ""], "is no folder"),
    (["--prompt", "a\udcff"], "not UTF-8"),
    (["--prompt", "a", "--top-p", "0"], "--top-p above 0"), (["--prompt", "a", "--top-p", "1.1"], "at most 1"),
    (["--prompt", "a", "--max-new-tokens", "0"], "--max-new-tokens must be at least 1"),
    (["--prompt", "a", "--seed", "-1"], "--seed -1"), (["--prompt", "a"], "is no folder")])
def test_a_users_mistake_is_one_line_and_status_2(monkeypatch, capsys, arguments, complaint):
    status, out, error = command(monkeypatch, capsys, "nowhere", *arguments)
    assert status == 2 and not out and error.startswith("error: ") and error.count("\n") == 1 and complaint in error


def test_the_script_streams_to_a_reader_that_leaves_early(tokenizer, tmp_path):
    make_folder("quantized", tmp_path / "model", tokenizer)
    script = pathlib.Path(sample.__file__)
    process = subprocess.Popen([sys.executable, script, tmp_path / "model", "--prompt", "Once upon a"],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.read(11) == b"Once upon a"
    process.stdout.close()
    assert process.stderr.read() == b""
    process.wait()


def test_the_commands_options_reach_what_samples(tokenizer, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(sample, "sample", lambda *_, **options: asked.append(options))
    monkeypatch.setattr(sample, "prepare_inference", lambda model: asked.append("prepared"))
    make_folder("float", tmp_path / "model", tokenizer)
    words = "--prompt Play. --max-new-tokens 7 --temperature 0.5 --top-p 0.9 --seed 3".split()
    monkeypatch.setattr(sys, "argv", ["sample.py", str(tmp_path / "model"), *words])
    sample.main()
    assert asked == ["prepared", dict(echo=True, max_new_tokens=7, temperature=0.5, top_p=0.9, seed=3)]


@pytest.mark.parametrize("length", [160, 161])
def test_a_prompt_that_just_fills_the_context_is_refused(tokenizer, monkeypatch, length):
    monkeypatch.setattr(sample, "encode_prompt", lambda tokenizer, prompt: [1] * length)
    with pytest.raises(UserError, match=f"{length} tokens and fills the model's context of 160"):
        sampled(random_llama(), tokenizer, "")
