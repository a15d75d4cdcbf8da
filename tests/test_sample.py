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
from text.batches import encode_asking
from text.instructions import Turn
from text.templates import alpaca_prompt
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
CHAT = dataclasses.replace(CONFIG, max_position_embeddings=600)


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
    """What follows a prompt."""
    parts = []
    sample.continue_text(model, tokenizer, prompt, parts.append, **options)
    text = "".join(parts)
    assert text.startswith(prompt)
    return text[len(prompt) :]


def test_a_prompt_is_continued_by_what_generate_gives(tokenizer):
    model, prompt = peaked_llama(CONFIG), "Once upon a"
    tokens = [1, *tokenizer.encode(prompt)]
    whole = generate(model, torch.tensor([tokens]), 20)[0].tolist()
    assert 2 not in whole, "a test needs a text without EOS"
    continuation = sampled(model, tokenizer, prompt, max_new_tokens=20)
    assert prompt + continuation == tokenizer.decode(whole)


def test_text_ends_at_eos(tokenizer):
    model, prompt = peaked_llama(CONFIG), "Once upon a"
    tokens = [1, *tokenizer.encode(prompt)]
    free = generate(model, torch.tensor([tokens]), 20)[0].tolist()[len(tokens) :]
    end = next(i for i in range(3, 20) if free[i] not in free[:i])  # a token that is new there
    head = model.lm_head.weight
    with torch.no_grad():
        head[[2, free[end]]] = head[[free[end], 2]]  # what was that token is EOS now
    assert prompt + sampled(model, tokenizer, prompt) == tokenizer.decode(tokens + free[:end])


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
        text = sampled(model, tokenizer, "Once upon a", max_new_tokens=30)
        assert out == f"Once upon a{text}\n"
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


def test_an_instruction_is_asked_in_the_models_format_and_only_the_answer_is_shown(
    tokenizer, tmp_path, monkeypatch, capsys
):
    folder = make_folder("float", tmp_path / "model", tokenizer, CHAT)
    model, _ = sample.load(folder, "cpu")

    def expected(prompt):
        whole = generate(model, torch.tensor([prompt]), 9, eos_token_ids=(2,))[0].tolist()
        return tokenizer.decode(whole[len(prompt) :]) + "\n"

    words = [folder, "--max-new-tokens", 9, "--instruction", "Play."]
    for more, prompt in (
        ([], [1, *tokenizer.encode(alpaca_prompt("Play."))]),
        (["--input", "park"], [1, *tokenizer.encode(alpaca_prompt("Play.", "park"))]),
    ):
        status, out, _ = run_in_process(monkeypatch, capsys, sample.main, *words, *more)
        assert status == 0 and out == expected(prompt)
    source = "{% for m in messages %}{{ m.role + m.content + eos_token }}{% endfor %}"
    source += "{% if add_generation_prompt %}assistant{% endif %}"
    (folder / "chat_template.jinja").write_text(source)
    status, out, _ = run_in_process(monkeypatch, capsys, sample.main, *words)
    prompt = [*tokenizer.encode("userPlay."), 2, *tokenizer.encode("assistant")]
    assert status == 0 and out == expected(prompt)


def test_the_commands_options_reach_what_samples(tokenizer, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(sample, "sample", lambda *_, **options: asked.append(options))
    monkeypatch.setattr(sample, "prepare_inference", lambda model: asked.append("prepared"))
    monkeypatch.setattr(sys, "stdin", io.StringIO("What?"))
    folder = make_folder("float", tmp_path / "model", tokenizer, CHAT)
    options = {"max_new_tokens": 7, "temperature": 0.5, "top_p": 0.9, "seed": 3}
    words = "--max-new-tokens 7 --temperature 0.5 --top-p 0.9 --seed 3"
    for what in ("--prompt Play.", "--instruction Play.", "--chat"):
        monkeypatch.setattr(sys, "argv", ["sample.py", str(folder), *f"{what} {words}".split()])
        sample.main()
        assert asked == ["prepared", options]
        asked.clear()


# ---- a chat


def chatted(model, tokenizer, questions, **options):
    """What a chat writes, and the conversation before each answer."""
    parts, seen = [], []

    def asking(turns, tokenizer):
        seen.append([turn.text for turn in turns])
        return encode_asking(turns, tokenizer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample, "encode_asking", asking)
        sample.chat(model, tokenizer, questions, parts.append, **options)
    return "".join(parts), seen


def test_every_answer_of_a_chat_follows_all_that_was_said_before(tokenizer):
    model, questions = peaked_llama(CHAT), ["Once?", "Upon?", "A time?"]
    text, seen = chatted(model, tokenizer, questions, max_new_tokens=5)
    turns, expected = [], []
    for question in questions:
        turns.append(Turn("user", question))
        prompt = encode_asking(turns, tokenizer)
        whole = generate(model, torch.tensor([prompt]), 5, eos_token_ids=(2,))[0].tolist()
        answer = tokenizer.decode(whole[len(prompt) :])
        turns.append(Turn("assistant", answer))
        expected.append(answer + "\n")
    assert text == "".join(expected) and len(set(expected)) > 1
    assert seen[-1] == [turn.text for turn in turns[:-1]]


def test_a_chat_that_outgrows_the_context_forgets_its_first_turns_but_never_the_last_question(
    tokenizer,
):
    questions = [f"Once {'upon ' * i}?" for i in range(14)]
    _, seen = chatted(peaked_llama(CHAT), tokenizer, questions, max_new_tokens=20)
    room, forgotten = 600 - 20, 0
    for turns, after in zip(seen, [*seen[1:], None], strict=True):
        said = [Turn(("user", "assistant")[i % 2], text) for i, text in enumerate(turns)]
        fits = len(encode_asking(said, tokenizer)) <= room
        begin = questions.index(turns[0])  # the oldest that is left; all after it are there
        assert turns[0::2] == questions[begin : begin + len(turns[0::2])]
        if not fits:  # it is not answered, but its first question and answer are left out
            forgotten += 1
            assert after == turns[2:]
    assert forgotten > 2 and seen[-1][-1] == questions[-1] and len(seen[-1]) > 3


def test_a_system_message_stays_when_the_first_turns_are_forgotten(tokenizer):
    system = [Turn("system", "Be brief.")]
    questions = [f"Once {'upon ' * i}?" for i in range(20)]
    _, seen = chatted(peaked_llama(CHAT), tokenizer, questions, system=system, max_new_tokens=20)
    assert {turns[0] for turns in seen} == {"Be brief."} and {turns[1] for turns in seen} > {
        questions[0],
        questions[1],
    }
    assert seen[-1][-1] == questions[-1]


def test_the_command_puts_a_system_message_before_the_question(
    tokenizer, tmp_path, monkeypatch, capsys
):
    folder = make_folder("float", tmp_path / "model", tokenizer, CHAT)
    said = []
    for how in (["--instruction", "Play."], ["--chat"]):
        for system in ([], ["--system", "Once upon a park."]):
            monkeypatch.setattr(sys, "stdin", io.StringIO("Play."))
            words = [folder, *how, *system, "--max-new-tokens", 9]
            said.append(run_in_process(monkeypatch, capsys, sample.main, *words)[1])
    assert said[0] == said[2] != said[1] == said[3]


def test_a_question_that_fills_the_context_alone_is_said_to_and_the_chat_goes_on(tokenizer, capsys):
    questions = ["Once?", "upon " * 800, "A time?"]
    text, seen = chatted(peaked_llama(CHAT), tokenizer, questions, max_new_tokens=5)
    assert text.count("\n") >= 2 and seen[-1] == ["A time?"]
    assert "tokens and fills the model's context of 600; shorten it" in capsys.readouterr().err


@pytest.mark.parametrize("typed", [b"\xff\n", "\udcff\n"])
def test_what_is_typed_and_is_not_utf8_is_refused(monkeypatch, typed):
    """Python's C locale lets such bytes through, as halves of surrogate pairs."""
    is_text = isinstance(typed, str)
    stdin = io.StringIO(typed) if is_text else io.TextIOWrapper(io.BytesIO(typed), "utf-8")
    monkeypatch.setattr(sys, "stdin", stdin)
    with pytest.raises(UserError, match="not UTF-8"):
        next(sample.typed_questions())


def test_a_chat_reads_lines_until_its_input_ends_and_passes_over_empty_ones(
    tokenizer, tmp_path, monkeypatch, capsys
):
    folder = make_folder("float", tmp_path / "model", tokenizer, CHAT)
    monkeypatch.setattr(sys, "stdin", io.StringIO("Once?\n\n  \nA time?"))
    words = [folder, "--chat", "--max-new-tokens", 4]
    status, out, error = run_in_process(monkeypatch, capsys, sample.main, *words)
    model, _ = sample.load(folder, "cpu")
    assert status == 0 and not error
    assert out == chatted(model, tokenizer, ["Once?", "A time?"], max_new_tokens=4)[0]


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        ([], "--prompt"),
        (["--prompt", "a", "--instruction", "b"], "not allowed with"),
        (["--prompt", "a", "--input", "b"], "--input belongs to --instruction"),
        (["--prompt", "a", "--system", "b"], "--system belongs to"),
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
