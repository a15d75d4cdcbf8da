"""evals.py: the oracle for every score asks the model for one token at a time, in float64."""

import dataclasses
import json
import math
import pathlib
import re
import statistics
import subprocess
import sys

import hypothesis.strategies as st
import numpy as np
import pytest
import sentencepiece
import torch
from helpers import exchange, peaked_llama, run_in_process, save_tokenizer
from helpers_text import harness_pair, write_mmlu
from hypothesis import example, given, settings

import evals
from cli.errors import UserError
from formats.huggingface import save_pretrained
from llama import LlamaConfig, generate
from text import byte_level
from text.batches import Example
from text.questions import read_mmlu
from text.templates import alpaca_prompt
from text.tokenizer import load_tokenizer, make_tokenizer, train_tokenizer
from text.vocabulary import CONTROL, NORMAL

ROOT = pathlib.Path(evals.__file__).parent
TAUGHT = [
    "The following are multiple choice questions (with answers) about  anatomy.\n\n"
    "What is it?\nA. one\nB. two",
    "Answer: A\n\nAnswer: B\n\nAnswer: C\n\nAnswer: D\n\n"
    "he is using wrap to wrap a pair of skis. naïve 東京",
]


def random_llama(dtype=torch.float32, context=64, vocab=97):
    """A small LLaMA, grouped-query attention included, whose predictions are far from uniform."""
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=context,
    )
    return peaked_llama(config).to(dtype)


EXACT, FLOAT = random_llama(torch.float64), random_llama()


def log_likelihood(model, context, choice):
    """One token at a time, without cache, mask or padding."""
    total, tokens = 0.0, list(context)
    for token in choice:
        with torch.no_grad():
            logits_V = model(torch.tensor([tokens]))[0, -1]
        total += logits_V.double().log_softmax(-1)[token].item()
        tokens.append(token)
    return total


def continuation(model, context, count):
    """`count` tokens, greedily, even after EOS."""
    return generate(model, torch.tensor([context]), count)[0].tolist()[len(context) :]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_tokenizer(TAUGHT, tmp_path_factory.mktemp("tokenizer") / "tokenizer.model", 330)


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    """A model folder with a tokenizer, stored in float16."""
    path = tmp_path_factory.mktemp("model")
    save_pretrained(random_llama(vocab=330).half(), path)
    save_tokenizer(tokenizer, path)
    return path


def tokens(low, high):
    return st.lists(st.integers(3, 96), min_size=low, max_size=high)


CONTEXTS = tokens(0, 12).map(lambda t: [1, *t])
CHOICES = st.lists(tokens(1, 4), min_size=2, max_size=4)
QUESTIONS = st.lists(st.tuples(CONTEXTS, CHOICES), min_size=1, max_size=5)


# ---- log-likelihoods


@given(QUESTIONS, st.integers(1, 20))
@settings(max_examples=20)
def test_a_choice_scores_what_asking_for_one_token_at_a_time_gives(asked, batch_size):
    scores, truncated = evals.choice_scores(EXACT, asked, batch_size)
    assert truncated == 0
    for (context, choices), score in zip(asked, scores, strict=True):
        expected = [log_likelihood(EXACT, context, choice) for choice in choices]
        expected = torch.tensor(expected, dtype=torch.float64)
        torch.testing.assert_close(score, expected, rtol=1e-5, atol=1e-5)


@given(QUESTIONS, st.integers(1, 20), st.randoms(use_true_random=False))
@settings(max_examples=25)
def test_batching_padding_and_company_change_scores_only_within_float_tolerance(
    asked, batch_size, rng
):
    together, _ = evals.choice_scores(FLOAT, asked, batch_size)
    order = rng.sample(range(len(asked)), len(asked))
    shuffled, _ = evals.choice_scores(FLOAT, [asked[i] for i in order], 1)
    for position, i in enumerate(order):
        alone, _ = evals.choice_scores(FLOAT, [asked[i]])
        torch.testing.assert_close(together[i], shuffled[position], rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(together[i], alone[0], rtol=1e-5, atol=1e-4)


@given(tokens(1, 20), st.lists(tokens(1, 5), min_size=2, max_size=3), st.integers(6, 12))
@settings(max_examples=20)
def test_a_question_too_long_loses_its_beginning_but_not_bos_and_is_counted(text, choices, limit):
    model = random_llama(torch.float64, context=limit)
    scores, truncated = evals.choice_scores(model, [([1, *text], choices), ([1, 5], [[7], [8]])])
    longest = max(map(len, choices))
    kept = limit - (longest - 1) - 1  # inputs: BOS, the kept text, a choice but for its last token
    context = [1, *text[max(0, len(text) - kept) :]]
    expected = [log_likelihood(model, context, choice) for choice in choices]
    expected = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(scores[0], expected, rtol=1e-5, atol=1e-5)
    assert truncated == (len(text) > kept)


def test_a_choice_longer_than_the_context_is_the_users_mistake():
    model = random_llama(context=8)
    evals.choice_scores(model, [([1, 3], [[5] * 8, [6]])])
    with pytest.raises(UserError, match="question 2: a choice exceeds the model's context of 8"):
        evals.choice_scores(model, [([1, 3], [[5], [6]]), ([1, 3], [[5] * 9, [6]])])


@given(tokens(1, 25), st.integers(1, 12), st.integers(1, 4))
@settings(max_examples=20)
def test_perplexity_predicts_every_token_once_from_what_precedes_it_in_its_window(
    text, window, batch_size
):
    stream = [1, *text]
    losses = []
    for i in range(1, len(stream)):
        start = (i - 1) // window * window
        losses.append(-log_likelihood(EXACT, stream[start:i], [stream[i]]))
    found = evals.perplexity(EXACT, torch.tensor(stream), window, batch_size=batch_size)
    assert found == pytest.approx(math.exp(statistics.fmean(losses)), rel=1e-5)


def test_a_model_that_knows_nothing_is_as_perplexed_as_its_vocabulary_is_large():
    model = random_llama()
    torch.nn.init.zeros_(model.lm_head.weight)
    assert evals.perplexity(model, torch.arange(50), 7) == pytest.approx(97, rel=1e-6)


@given(st.lists(st.tuples(tokens(0, 6), tokens(1, 6)), min_size=1, max_size=5), st.integers(1, 4))
@settings(max_examples=20)
def test_response_loss_is_the_mean_over_all_response_tokens_however_they_are_batched(
    pairs, batch_size
):
    examples, total, count = [], 0.0, 0
    for prompt, response in pairs:
        tokens = np.array([1, *prompt, *response], np.int32)
        examples.append(Example(tokens, np.arange(len(tokens)) > len(prompt)))
        total -= log_likelihood(EXACT, [1, *prompt], response)
        count += len(response)
    found = evals.response_loss(EXACT, examples, batch_size)
    assert found == pytest.approx(total / count, rel=1e-5)


# ---- accuracies


@given(st.lists(st.booleans(), min_size=1, max_size=50))
def test_the_standard_error_is_the_deviation_of_single_answers_over_the_root_of_their_number(right):
    accuracy, error = evals.mean_and_error(right)
    assert accuracy == pytest.approx(statistics.fmean(right))
    expected = statistics.pstdev(map(float, right)) / len(right) ** 0.5
    assert error == pytest.approx(expected, abs=1e-12)


def test_sum_and_length_normalised_choices_differ_where_they_should(tokenizer, monkeypatch):
    given = [torch.tensor([-10.0, -12.0, -90.0])] * 4  # per character: -5, -3, -9
    monkeypatch.setattr(evals, "choice_scores", lambda *rest: (given, 3))
    items = [("question", ["ab", "abcd", "abcdefghij"], answer) for answer in (0, 0, 1, 2)]
    assert evals.multiple_choice(FLOAT, tokenizer, items) == {
        "questions": 4,
        "accuracy": 0.5,
        "accuracy_error": 0.25,
        "normalized": 0.25,
        "normalized_error": math.sqrt(3) / 8,
        "truncated": 3,
    }


def test_multiple_choice_takes_the_likeliest_choice(tokenizer):
    model = random_llama(torch.float64, vocab=330)
    choices = ["one", "two skis", "wrap it", "naïve"]
    items = [(f"What is {n}?", choices, n % 4) for n in range(12)]
    right, right_per_character = 0, 0
    for question, _, answer in items:
        context = [1, *tokenizer.encode(question)]
        scores = [log_likelihood(model, context, tokenizer.encode(choice)) for choice in choices]
        per_character = [scores[i] / len(choices[i]) for i in range(4)]
        right += scores.index(max(scores)) == answer
        right_per_character += per_character.index(max(per_character)) == answer
    found = evals.multiple_choice(model, tokenizer, items, 9)
    counts = found["accuracy"] * 12, found["normalized"] * 12
    assert counts == pytest.approx((right, right_per_character))


@pytest.fixture(scope="module", params=["sentencepiece", "byte-level"])
def kind(request, tokenizer):
    """(a tokenizer, a text's tokens by the package itself, after BOS if there is one)."""
    if request.param == "byte-level":
        package = pytest.importorskip("tokenizers", reason="needs tokenizers")
        small = byte_level_tokenizer(["he", " is", "wrap", "?\n", "\n\n"])
        itself = package.Tokenizer.from_str(small.files["tokenizer.json"].decode())
        return small, lambda text: itself.encode(text).ids
    proto = tokenizer.files["tokenizer.model"]
    itself = sentencepiece.SentencePieceProcessor(model_proto=proto)
    return tokenizer, lambda text: itself.encode(text, add_bos=True)


def byte_level_tokenizer(words):
    """Without BOS; its pieces are the bytes and the beginnings of words."""
    characters = byte_level.byte_characters()
    pieces, merges = list(characters), []
    for word in words:
        written = "".join(characters[byte] for byte in word.encode())
        for i in range(1, len(written)):
            merges.append((written[:i], written[i]))
            pieces.append(written[: i + 1])
    kinds = [NORMAL] * len(pieces) + [CONTROL]
    content = byte_level.make_json([*pieces, "<end>"], kinds, merges, "llama-bpe", None)
    rules = json.dumps({"eos_token": "<end>"}).encode()
    files = {"tokenizer.json": content, "tokenizer_config.json": rules}
    return make_tokenizer(files, "tokenizer.json")


PARTS = ["he is", "wrap", "a", "?", "naïve 東京", " ", "\n", "\t", "\u00a0"]
TEXTS = st.lists(st.sampled_from(PARTS), max_size=6).map("".join)


@given(TEXTS, st.lists(TEXTS.filter(str.strip), min_size=1, max_size=3))
@example("What is it?", ["he is", " wrap"])
@example("What is it?\n", ["he is"])  # byte-level: "?" and the line break become one token
@example("", ["he is"])
def test_a_choice_has_the_tokens_that_lm_evaluation_harness_scores(kind, question, choices):
    tokenizer, encode = kind
    context, found = evals.encode_choices(tokenizer, question, choices)
    for choice, tokens in zip(choices, found, strict=True):
        before, own = harness_pair(encode, question, f" {choice}")
        assert context == (before or [tokenizer.eos])
        assert tokens == own
        whole = encode(f"{question} {choice}")
        if whole[: len(before)] == before:  # nothing merged where they meet
            assert before + tokens == whole


def test_a_choice_begins_with_the_space_before_it(kind):
    tokenizer, _ = kind
    _, found = evals.encode_choices(tokenizer, "What is it?", ["he is", "wrap"])
    pieces = tokenizer.vocabulary.pieces
    texts = ["".join(pieces[token] for token in tokens) for tokens in found]
    assert [re.sub("[▁Ġ]", " ", text) for text in texts] == [" he is", " wrap"]


def test_mmlus_letters_are_the_tokens_that_follow_the_real_prompts(material, monkeypatch):
    llama_tokenizer = load_tokenizer(material("llama-tokenizer.model"))
    seen = []

    def remember(model, encoded, *rest):
        seen.extend(encoded)
        return [torch.zeros(4)] * len(encoded), 0

    monkeypatch.setattr(evals, "choice_scores", remember)
    asked = read_mmlu(material("mmlu-val-6-subjects.jsonl"), 0)
    evals.mmlu(None, llama_tokenizer, asked)
    assert len(seen) == 97
    for (_, prompt, _), (context, letters) in zip(asked, seen, strict=True):
        assert all(len(letter) == 1 for letter in letters)
        whole = [[1, *llama_tokenizer.encode(f"{prompt} {letter}")] for letter in "ABCD"]
        assert [context + letter for letter in letters] == whole


def test_mmlu_counts_every_question_once_in_its_subject_its_category_and_the_average(tokenizer):
    model = random_llama(torch.float64, vocab=330, context=512)
    subjects = ["virology"] * 3 + ["anatomy"] * 5 + ["astronomy"] * 4
    question = "What is {}?\nA. one\nB. two\nC. it\nD. he\nAnswer:"
    asked = [(subject, question.format(n), n % 4) for n, subject in enumerate(subjects)]
    right = []
    for _, prompt, answer in asked:
        stem = tokenizer.encode(prompt)
        scores = []
        for letter in "ABCD":
            added = tokenizer.encode(f"{prompt} {letter}")[len(stem) :]
            scores.append(log_likelihood(model, [1, *stem], added))
        right.append(scores.index(max(scores)) == answer)
    assert 0 < sum(right) < 12, "a test needs both"
    expected = [
        ("anatomy", right[3:8]),
        ("astronomy", right[8:]),
        ("virology", right[:3]),
        ("STEM", right[8:]),
        ("other", right[:8]),
        ("average", right),
    ]
    rows, truncated = evals.mmlu(model, tokenizer, asked, 2)
    assert rows == [(name, len(some), *evals.mean_and_error(some)) for name, some in expected]
    assert truncated == 0


# ---- generated answers


PROMPTS = st.sampled_from(["", "What", "What is it?", "he is", "A. one\nB. two", "skis 東京"])


@given(st.lists(PROMPTS, min_size=1, max_size=6), st.integers(1, 4))
@settings(max_examples=10)
def test_answers_do_not_depend_on_who_is_asked_beside(tokenizer, prompts, batch_size):
    model = random_llama(torch.float64, vocab=330)
    alone = []
    for prompt in prompts:
        whole = continuation(model, [1, *tokenizer.encode(prompt)], 6)
        until_eos = whole[: whole.index(2)] if 2 in whole else whole
        alone.append(tokenizer.decode(until_eos))
    encoded = [tokenizer.encode_prompt(prompt) for prompt in prompts]
    assert evals.answers(model, tokenizer, encoded, 6, batch_size) == alone


def test_only_an_answer_whose_prompt_nearly_fills_the_context_is_cut_short(tokenizer):
    model = random_llama(vocab=330)
    long, short = map(tokenizer.encode_prompt, ("?" * 40, "?"))
    room = 64 - len(long)
    assert 0 < room < 30
    found = evals.answers(model, tokenizer, [long, short], 30)
    assert found[:1] == evals.answers(model, tokenizer, [long], room)
    assert found[1:] == evals.answers(model, tokenizer, [short], 30)
    assert found[1:] != evals.answers(model, tokenizer, [short], room), "cut short as well"


def test_an_answer_ends_at_eos(tokenizer):
    model, prompt = random_llama(torch.float64, vocab=330), tokenizer.encode_prompt("What is it?")
    free = continuation(model, prompt, 6)
    end = next(i for i in range(1, 6) if free[i] not in free[:i])  # a token that is new there
    head = model.lm_head.weight
    with torch.no_grad():
        head[[2, free[end]]] = head[[free[end], 2]]  # what was that token is EOS now
    assert evals.answers(model, tokenizer, [prompt], 6) == [tokenizer.decode(free[:end])]


def test_an_exact_match_is_the_response_but_for_spaces_at_its_ends(tokenizer, monkeypatch):
    said = {"a": " yes", "b": "no", "c": "maybe", "d": "of course"}
    said = {(1, *tokenizer.encode(alpaca_prompt(asked))): it for asked, it in said.items()}

    def answers(model, tokenizer, prompts, *rest):
        return [said[tuple(prompt)] for prompt in prompts]

    monkeypatch.setattr(evals, "answers", answers)
    pairs = [("d", "ofcourse"), ("c", "maybe\n"), ("b", "no!"), ("a", "yes")]
    records = [exchange(*pair) for pair in pairs]
    assert evals.exact_match(None, tokenizer, records, 5) == 0.5


# ---- the command


def test_a_folder_in_float16_is_loaded_in_a_dtype_that_the_device_computes_in(folder):
    model, loaded = evals.load(folder, "cpu")
    assert model.lm_head.weight.dtype in (torch.float32, torch.bfloat16)
    assert loaded.largest_id() == 329


def test_an_answer_ends_at_any_of_the_tokenizers_stops(tokenizer):
    model, prompt = random_llama(vocab=330), tokenizer.encode_prompt("he is")
    said = continuation(model, prompt, 6)
    several = dataclasses.replace(tokenizer, stops=(2, said[3]))
    expected = said[: min(said.index(t) for t in (2, said[3]) if t in said) + 1]
    (answer,) = evals.answers(model, several, [prompt], 6)
    assert answer == tokenizer.decode(expected)


def test_a_tokenizer_larger_than_the_embedding_is_refused(folder, tmp_path):
    save_pretrained(random_llama(vocab=329), tmp_path)
    (tmp_path / "tokenizer.model").write_bytes((folder / "tokenizer.model").read_bytes())
    with pytest.raises(UserError, match="330 pieces.* 329"):
        evals.load(tmp_path, "cpu")


def test_the_command_prints_every_kind_of_score(folder, tmp_path):
    text, questions = tmp_path / "text.txt", tmp_path / "questions.jsonl"
    text.write_text("he is using wrap")
    short = {"question": "q", "choices": ["a", "b"], "answer": 1}
    long = short | {"question": "he is using wrap " * 20}
    questions.write_text("".join(json.dumps(item) + "\n" for item in (short, long, short)))
    rows = [["What?", "one", "two", "it", "he", letter] for letter in "ABCDA"]
    write_mmlu(tmp_path, {"dev/anatomy_dev.csv": rows, "test/anatomy_test.csv": rows[:4]})
    words = ["--perplexity", text, "--window", "7", "--mmlu", tmp_path, "--shots", "5"]
    words += ["--multiple-choice", questions]
    command = [sys.executable, ROOT / "evals.py", folder, *words]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    count = len(load_tokenizer(folder).encode("he is using wrap"))
    perplexity = rf"text.txt: perplexity \d+\.\d{{4}} over {count} tokens, in windows of 7"
    assert re.search(perplexity, done.stdout)
    multiple_choice = (
        r"questions.jsonl: 3 questions.*\n.*by log-likelihood +\d+.\d\d ± \d+.\d\d %\n"
        r".*per character.*\n1 of 3 questions were longer than the model's context"
    )
    assert re.search(multiple_choice, done.stdout)
    mmlu = r"MMLU, 5-shot.*\n +anatomy +4 +25.00 ± 21.65 %\n +other .*\n +average +4 "
    assert re.search(mmlu, done.stdout)
    assert "4 of 4 questions were longer than the model's context" in done.stdout
    assert "100%" in done.stderr and "100%" not in done.stdout, "progress bars belong on stderr"


def test_instructions_are_judged_by_loss_and_equal_answers(
    tokenizer, tmp_path, monkeypatch, capsys
):
    save_pretrained(random_llama(vocab=330, context=512), tmp_path)
    save_tokenizer(tokenizer, tmp_path)
    file, total, count = tmp_path / "records.jsonl", 0.0, 0
    model = evals.load(tmp_path, "cpu")[0]
    lines = []
    for asked, answer in (("he is", "wrapping"), ("a pair", "skis")):
        lines.append(json.dumps({"instruction": asked, "output": answer}))
        response = [*tokenizer.encode(answer), 2]
        context = tokenizer.encode_prompt(alpaca_prompt(asked))
        total += log_likelihood(model, context, response)
        count += len(response)
    file.write_text("\n".join(lines))
    words = [tmp_path, "--instructions", file]
    status, out, error = run_in_process(monkeypatch, capsys, evals.main, *words)
    assert status == 0 and "records.jsonl: 2 instructions" in out, error
    loss = re.search(r"loss a token of the response +(\d+\.\d+)", out).group(1)
    assert float(loss) == pytest.approx(-total / count, rel=1e-4)  # printed with four digits
    assert "answers equal to the response     0.00 ± 0.00 %" in out
    file.write_text(json.dumps({"instruction": "he is using wrap " * 90, "output": "x"}))
    status, _, error = run_in_process(monkeypatch, capsys, evals.main, *words)
    assert status == 2 and "1 prompts fill the model's context of 512 tokens" in error
    file.write_text(json.dumps({"instruction": "he is", "output": "wrap " * 600}))
    status, out, error = run_in_process(monkeypatch, capsys, evals.main, *words)
    assert status == 0 and "1 of 1 were longer than the model's context and lost their end" in out


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        ([], "nothing to judge by"),
        (["--perplexity", "nix.txt"], "cannot read nix.txt"),
        (["--mmlu", "nix"], "cannot read nix"),
        (["--multiple-choice", "nix.jsonl"], "cannot read nix.jsonl"),
        (["--perplexity", "FILE", "--window", "65"], "64 tokens"),
        (["--mmlu", "nix", "--window", "6"], "--perplexity"),
        (["--perplexity", "FILE", "--batch-size", "0"], "at least 1"),
        (["--mmlu", "nix", "--shots", "-1"], "at least 0"),
        (["--perplexity", "FILE", "--shots", "5"], "--mmlu"),
        (["--perplexity", "FILE", "--device", "abacus"], "abacus"),
        (["--perplexity", "EMPTY"], "is empty"),
    ],
)
def test_a_users_mistake_is_one_line_and_status_2(
    folder, tmp_path, monkeypatch, capsys, arguments, complaint
):
    (tmp_path / "FILE").write_text("he is")
    (tmp_path / "EMPTY").write_text("")
    monkeypatch.chdir(tmp_path)
    status, out, error = run_in_process(monkeypatch, capsys, evals.main, folder, *arguments)
    assert status == 2 and not out
    assert error.startswith("error: ") and error.count("\n") == 1 and complaint in error
    words = [tmp_path / "nowhere", "--perplexity", "FILE"]
    status, out, error = run_in_process(monkeypatch, capsys, evals.main, *words)
    assert status == 2 and "there is no " in error and "nowhere" in error


def test_hellaswag_is_read_and_scored_by_a_real_model(
    material, folder, monkeypatch, capsys, tmp_path
):
    lines = material("hellaswag-500.jsonl").read_text(encoding="utf-8").splitlines()[:20]
    questions = tmp_path / "hellaswag.jsonl"
    questions.write_text("\n".join(lines), encoding="utf-8")
    for file in ("config.json", "model.safetensors"):
        (tmp_path / file).write_bytes((material("stories260K") / file).read_bytes())
    (tmp_path / "tokenizer.model").write_bytes((folder / "tokenizer.model").read_bytes())
    words = [tmp_path, "--multiple-choice", questions]
    status, out, _ = run_in_process(monkeypatch, capsys, evals.main, *words)
    assert status == 0 and "20 questions" in out
    assert json.loads(lines[0])["answer"] == 3
