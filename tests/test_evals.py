"""What evals.py promises. The oracle for every score asks the model for one next token at a time, in float64."""

import csv
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
import torch
from hypothesis import given, settings

import data
import evals
import llama
from cli import UserError, run_command

ROOT = pathlib.Path(evals.__file__).parent
TEXTS = ["The following are multiple choice questions (with answers) about  anatomy.\n\nWhat is it?\nA. one\nB. two",
         "Answer: A\n\nAnswer: B\n\nAnswer: C\n\nAnswer: D\n\nhe is using wrap to wrap a pair of skis. naïve 東京"]


def random_llama(seed=0, dtype=torch.float32, context=64, vocab=97):
    """A small LLaMA, grouped-query attention included, whose predictions are far from uniform."""
    torch.manual_seed(seed)
    config = llama.LlamaConfig(vocab_size=vocab, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                               num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=context)
    model = llama.Llama(config)
    for p in model.parameters():
        if p.dim() == 2:
            torch.nn.init.normal_(p, std=0.4)
    return model.to(dtype)


EXACT, FLOAT = random_llama(dtype=torch.float64), random_llama()


def log_likelihood(model, context, choice):
    """One token at a time, without cache, mask or padding."""
    total, tokens = 0.0, list(context)
    for token in choice:
        with torch.no_grad():
            total += model(torch.tensor([tokens]))[0, -1].double().log_softmax(-1)[token].item()
        tokens.append(token)
    return total


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return data.train_tokenizer(TEXTS, tmp_path_factory.mktemp("tokenizer") / "tokenizer.model", 330)


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    """A model folder with a tokenizer, stored in float16."""
    path = tmp_path_factory.mktemp("model")
    llama.save_pretrained(random_llama(vocab=330).half(), path)
    (path / "tokenizer.model").write_bytes(tokenizer.serialized_model_proto())
    return path


def tokens(low, high):
    return st.lists(st.integers(3, 96), min_size=low, max_size=high)


questions = st.lists(st.tuples(tokens(0, 12).map(lambda t: [1, *t]), st.lists(tokens(1, 4), min_size=2, max_size=4)),
                     min_size=1, max_size=5)


@given(questions, st.integers(1, 20))
@settings(max_examples=20)
def test_a_choice_scores_what_asking_for_one_token_at_a_time_gives(asked, batch_size):
    scores, truncated = evals.choice_scores(EXACT, asked, batch_size)
    assert truncated == 0
    for (context, choices), score in zip(asked, scores, strict=True):
        expected = [log_likelihood(EXACT, context, choice) for choice in choices]
        torch.testing.assert_close(score, torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-5)


@given(questions, st.integers(1, 20), st.randoms(use_true_random=False))
@settings(max_examples=25)
def test_batching_padding_and_company_change_scores_only_within_float_tolerance(asked, batch_size, rng):
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
    model = random_llama(dtype=torch.float64, context=limit)
    scores, truncated = evals.choice_scores(model, [([1, *text], choices), ([1, 5], [[7], [8]])])
    longest = max(map(len, choices))
    kept = limit - (longest - 1) - 1  # inputs: BOS, the kept end of the text, a choice but for its last token
    expected = [log_likelihood(model, [1, *text[max(0, len(text) - kept):]], choice) for choice in choices]
    torch.testing.assert_close(scores[0], torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-5)
    assert truncated == (len(text) > kept)


def test_a_choice_longer_than_the_context_is_the_users_mistake():
    model = random_llama(context=8)
    evals.choice_scores(model, [([1, 3], [[5] * 8, [6]])])
    with pytest.raises(UserError, match="question 2: a choice exceeds the model's context of 8"):
        evals.choice_scores(model, [([1, 3], [[5], [6]]), ([1, 3], [[5] * 9, [6]])])


@given(tokens(1, 25), st.integers(1, 12), st.integers(1, 4))
@settings(max_examples=20)
def test_perplexity_predicts_every_token_once_from_what_precedes_it_in_its_window(text, window, batch_size):
    stream = [1, *text]
    nll = [-log_likelihood(EXACT, stream[(i - 1) // window * window:i], [stream[i]]) for i in range(1, len(stream))]
    found = evals.perplexity(EXACT, torch.tensor(stream), window, batch_size=batch_size)
    assert found == pytest.approx(math.exp(statistics.fmean(nll)), rel=1e-5)


def test_a_model_that_knows_nothing_is_as_perplexed_as_its_vocabulary_is_large():
    model = random_llama()
    torch.nn.init.zeros_(model.lm_head.weight)
    assert evals.perplexity(model, torch.arange(50), 7) == pytest.approx(97, rel=1e-6)


@given(st.lists(st.tuples(tokens(0, 6), tokens(1, 6)), min_size=1, max_size=5), st.integers(1, 4))
@settings(max_examples=20)
def test_response_loss_is_the_mean_over_all_response_tokens_however_they_are_batched(pairs, batch_size):
    examples = [data.Example(np.array([1, *prompt, *response], np.int32), 1 + len(prompt))
                for prompt, response in pairs]
    total = sum(-log_likelihood(EXACT, [1, *prompt], response) for prompt, response in pairs)
    expected = total / sum(len(response) for _, response in pairs)
    assert evals.response_loss(EXACT, examples, batch_size) == pytest.approx(expected, rel=1e-5)


@given(st.lists(st.booleans(), min_size=1, max_size=50))
def test_the_standard_error_is_the_deviation_of_single_answers_over_the_root_of_their_number(right):
    accuracy, error = evals.mean_and_error(right)
    assert accuracy == pytest.approx(statistics.fmean(right))
    assert error == pytest.approx(statistics.pstdev(map(float, right)) / len(right) ** 0.5, abs=1e-12)


def test_sum_and_length_normalised_choices_differ_where_they_should(tokenizer, monkeypatch):
    given = [torch.tensor([-10.0, -12.0, -90.0])] * 4  # per character: -5, -3, -9
    monkeypatch.setattr(evals, "choice_scores", lambda *rest: (given, 3))
    items = [("question", ["ab", "abcd", "abcdefghij"], answer) for answer in (0, 0, 1, 2)]
    expected = {"questions": 4, "accuracy": 0.5, "accuracy_error": 0.25, "normalized": 0.25,
                "normalized_error": math.sqrt(3) / 8, "truncated": 3}
    assert evals.multiple_choice(FLOAT, tokenizer, items) == expected


def test_multiple_choice_takes_the_likeliest_choice(tokenizer):
    model = random_llama(dtype=torch.float64, vocab=330)
    items = [(f"What is {n}?", ["one", "two skis", "wrap it", "naïve"], n % 4) for n in range(12)]
    right, right_per_character = 0, 0
    for question, choices, answer in items:
        context = [1, *tokenizer.encode(question)]
        scores = [log_likelihood(model, context, tokenizer.encode(choice)) for choice in choices]
        right += max(range(4), key=scores.__getitem__) == answer
        right_per_character += max(range(4), key=lambda i: scores[i] / len(choices[i])) == answer
    found = evals.multiple_choice(model, tokenizer, items, 9)
    assert (found["accuracy"] * 12, found["normalized"] * 12) == pytest.approx((right, right_per_character))


def test_joined_question_and_choice_are_the_tokens_of_the_whole_text(material):
    llama_tokenizer = data.load_tokenizer(material("llama-tokenizer.model"))
    items = evals.read_json_lines(material("hellaswag-500.jsonl"), evals.check_choices)
    assert len(items) == 500
    for question, choices, _ in items:
        for choice in choices:
            joined = llama_tokenizer.encode(question) + llama_tokenizer.encode(choice)
            assert joined == llama_tokenizer.encode(f"{question} {choice}")


def test_mmlus_letters_are_the_tokens_that_follow_the_real_prompts(material, monkeypatch):
    llama_tokenizer = data.load_tokenizer(material("llama-tokenizer.model"))
    seen = []
    def remember(model, encoded, *rest):
        seen.extend(encoded)
        return [torch.zeros(4)] * len(encoded), 0

    monkeypatch.setattr(evals, "choice_scores", remember)
    asked = evals.read_mmlu(material("mmlu-val-6-subjects.jsonl"), 0)
    evals.mmlu(None, llama_tokenizer, asked)
    assert len(seen) == 97
    for (_, prompt, _), (context, letters) in zip(asked, seen):
        assert all(len(letter) == 1 for letter in letters)
        assert [context + letter for letter in letters] == [[1, *llama_tokenizer.encode(f"{prompt} {letter}")]
                                                            for letter in "ABCD"]


def test_mmlu_has_57_subjects_in_four_categories():
    sizes = {category: len(subjects) for category, subjects in evals.MMLU_CATEGORIES.items()}
    assert sizes == {"STEM": 18, "humanities": 13, "social sciences": 12, "other": 14}
    assert len(set().union(*evals.MMLU_CATEGORIES.values())) == 57


def mmlu_folder(path, rows):
    """Writes {"dev/anatomy_dev.csv": rows, ...} as the official CSV files."""
    for name, content in rows.items():
        (path / name).parent.mkdir(exist_ok=True)
        with open(path / name, "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(content)
    return path


def test_a_few_shot_prompt_is_the_official_one_to_the_letter(tmp_path):
    mmlu_folder(tmp_path, {
        "dev/us_foreign_policy_dev.csv": [["Who?", "he", "she", "they", "1,5", "C"],
                                          ["Why?", "a", "b", "c", "d", "A"]],
        "test/us_foreign_policy_test.csv": [['A "quoted"\nquestion, with commas:', "", "NA", "é", "1.50", "D"]]})
    start = "The following are multiple choice questions (with answers) about  us foreign policy.\n\n"
    end = 'A "quoted"\nquestion, with commas:\nA. \nB. NA\nC. é\nD. 1.50\nAnswer:'
    solved = ["Who?\nA. he\nB. she\nC. they\nD. 1,5\nAnswer: C\n\n", "Why?\nA. a\nB. b\nC. c\nD. d\nAnswer: A\n\n"]
    for shots in range(3):
        expected = start + "".join(solved[:shots]) + end
        assert evals.read_mmlu(tmp_path, shots) == [("us_foreign_policy", expected, 3)]
    with pytest.raises(UserError, match="us_foreign_policy_dev.csv has 2 examples; lower --shots 3"):
        evals.read_mmlu(tmp_path, 3)


def test_real_prompts_taken_apart_into_csv_files_come_back_as_they_were(material, tmp_path):
    published = evals.read_mmlu(material("mmlu-val-6-subjects.jsonl"), 0)
    rows = {}
    for subject, prompt, answer in published:
        parts = re.fullmatch(r".*?\n\n(.*)\nA\. (.*)\nB\. (.*)\nC\. (.*)\nD\. (.*)\nAnswer:", prompt, re.DOTALL)
        rows.setdefault(f"test/{subject}_test.csv", []).append([*parts.groups(), "ABCD"[answer]])
    assert evals.read_mmlu(mmlu_folder(tmp_path, rows), 0) == sorted(published, key=lambda question: question[0])


def test_mmlu_counts_every_question_once_in_its_subject_its_category_and_the_average(tokenizer):
    model = random_llama(dtype=torch.float64, vocab=330, context=512)
    subjects = ["virology"] * 3 + ["anatomy"] * 5 + ["astronomy"] * 4
    question = "What is {}?\nA. one\nB. two\nC. it\nD. he\nAnswer:"
    asked = [(subject, question.format(n), n % 4) for n, subject in enumerate(subjects)]
    right = []
    for _, prompt, answer in asked:
        stem, whole = tokenizer.encode(prompt), [tokenizer.encode(f"{prompt} {letter}") for letter in "ABCD"]
        scores = [log_likelihood(model, [1, *stem], tokens[len(stem):]) for tokens in whole]
        right.append(scores.index(max(scores)) == answer)
    assert 0 < sum(right) < 12, "a test needs both"
    expected = [("anatomy", right[3:8]), ("astronomy", right[8:]), ("virology", right[:3]), ("STEM", right[8:]),
                ("other", right[:8]), ("average", right)]
    rows, truncated = evals.mmlu(model, tokenizer, asked, 2)
    assert rows == [(name, len(some), *evals.mean_and_error(some)) for name, some in expected] and truncated == 0


@given(st.lists(st.sampled_from(["", "What", "What is it?", "he is", "A. one\nB. two", "skis 東京"]), min_size=1,
                max_size=6), st.integers(1, 4))
@settings(max_examples=10)
def test_answers_do_not_depend_on_who_is_asked_beside(tokenizer, prompts, batch_size):
    model = random_llama(vocab=330, dtype=torch.float64)
    alone = []
    for prompt in prompts:
        context = [1, *tokenizer.encode(prompt)]
        whole = llama.generate(model, torch.tensor([context]), 6)[0].tolist()[len(context):]
        alone.append(tokenizer.decode(whole[:whole.index(2)] if 2 in whole else whole))
    assert evals.answers(model, tokenizer, prompts, 6, batch_size) == alone


def test_an_answer_ends_at_eos(tokenizer):
    model, prompt = random_llama(vocab=330, dtype=torch.float64), "What is it?"
    context = [1, *tokenizer.encode(prompt)]
    free = llama.generate(model, torch.tensor([context]), 6)[0].tolist()[len(context):]
    end = next(i for i in range(1, 6) if free[i] not in free[:i])  # the first token there that has not come before
    with torch.no_grad():
        model.lm_head.weight[[2, free[end]]] = model.lm_head.weight[[free[end], 2]]  # what was that token is EOS now
    assert evals.answers(model, tokenizer, [prompt], 6) == [tokenizer.decode(free[:end])]


def test_an_exact_match_is_the_response_but_for_spaces_at_its_ends(monkeypatch):
    said = {"a": " yes", "b": "no", "c": "maybe", "d": "of course"}
    monkeypatch.setattr(evals, "answers", lambda model, tokenizer, prompts, *rest: [said[p] for p in prompts])
    records = [data.Record(*pair) for pair in (("d", "ofcourse"), ("c", "maybe\n"), ("b", "no!"), ("a", "yes"))]
    assert evals.exact_match(None, None, records, 5) == 0.5


GOOD = '{"question": "q", "choices": ["a", "b"], "answer": 1}'
GOOD_MMLU = '{"subject": "anatomy", "input": "q\\nAnswer:", "output": "A"}'


@pytest.mark.parametrize("line, complaint", [
    ("{", "Expecting property name"), ("[]", "no JSON object"),
    ('{"choices": ["a", "b"], "answer": 1}', '"question"'),
    ('{"question": "q", "choices": ["a"], "answer": 0}', '"choices"'),
    ('{"question": "q", "choices": ["a", " "], "answer": 0}', '"choices"'),
    ('{"question": "q", "choices": "ab", "answer": 0}', '"choices"'),
    ('{"question": "q", "choices": ["a", "b"], "answer": 2}', "0 to 1, not 2"),
    ('{"question": "q", "choices": ["a", "b"], "answer": -1}', "0 to 1, not -1"),
    ('{"question": "q", "choices": ["a", "b"], "answer": true}', "not True"),
    ('{"question": "q", "choices": ["a", "b"], "answer": "1"}', "not '1'"),
    ('{"question": "\\ud83d", "choices": ["a", "b"], "answer": 1}', "surrogates"),
    ("[" * 100000, "recursion"), ("\udcff", "0xff is not UTF-8")])
def test_a_bad_line_of_questions_is_named(tmp_path, line, complaint):
    file = tmp_path / "questions.jsonl"
    file.write_text(f"{GOOD}\n\n{line}\n{GOOD}\n", errors="surrogateescape", encoding="utf-8")
    with pytest.raises(UserError, match=re.escape(f"{file}, line 3: ") + ".*" + re.escape(complaint)):
        evals.read_json_lines(file, evals.check_choices)
    file.write_text(f"{GOOD}\r\n\r\n{GOOD}")
    assert evals.read_json_lines(file, evals.check_choices) == [("q", ["a", "b"], 1)] * 2


@pytest.mark.parametrize("line, complaint", [
    ('{"subject": "astrology", "input": "q\\nAnswer:", "output": "A"}', "'astrology' is none of MMLU's 57"),
    ('{"subject": "anatomy", "input": "q", "output": "A"}', '"input"'),
    ('{"subject": "anatomy", "input": "q\\nAnswer:", "output": "E"}', "not 'E'"),
    ('{"subject": "anatomy", "input": "q\\nAnswer:", "output": "AB"}', "not 'AB'"),
    ('{"subject": ["anatomy"], "input": "q\\nAnswer:", "output": "A"}', "is none of MMLU's 57")])
def test_a_bad_line_of_mmlu_is_named(tmp_path, line, complaint):
    file = tmp_path / "mmlu.jsonl"
    file.write_text(f"{GOOD_MMLU}\n{line}\n")
    with pytest.raises(UserError, match=re.escape(f"{file}, line 2: ") + ".*" + re.escape(complaint)):
        evals.read_mmlu(file, 0)
    file.write_text(GOOD_MMLU)
    with pytest.raises(UserError, match="--shots 5"):
        evals.read_mmlu(file, 5)


@pytest.mark.parametrize("content, complaint", [
    ("q,a,b,c,d,A\nq,a,b,c,A\n", "line 2: 5 fields"), ('q,a,b,c,d,A\n\n"q\nq",a,b,c,d,a\n', "line 4: .*not 'a'"),
    ('q,a,b,c,d,A\n"q,a,b,c,d,A\n', "line 2: "), ("\n", "holds no questions")])
def test_a_bad_row_of_mmlu_is_named(tmp_path, content, complaint):
    mmlu_folder(tmp_path, {"test/anatomy_test.csv": []})
    (tmp_path / "test" / "anatomy_test.csv").write_text(content)
    with pytest.raises(UserError, match="anatomy_test.csv.*" + complaint):
        evals.read_mmlu(tmp_path, 0)


def test_folders_that_are_not_mmlu_are_refused_by_name(tmp_path):
    with pytest.raises(UserError, match="has no test/"):
        evals.read_mmlu(tmp_path, 0)
    mmlu_folder(tmp_path, {"test/anatomy_test.csv": [["q", "a", "b", "c", "d", "A"]]})
    with pytest.raises(UserError, match="cannot read .*anatomy_dev.csv"):
        evals.read_mmlu(tmp_path, 5)
    mmlu_folder(tmp_path, {"test/astrology_test.csv": [["q", "a", "b", "c", "d", "A"]]})
    with pytest.raises(UserError, match="astrology_test.csv: 'astrology' is none"):
        evals.read_mmlu(tmp_path, 0)


def test_a_folder_in_float16_is_loaded_in_a_dtype_that_the_device_computes_in(folder):
    model, loaded = evals.load(folder, "cpu")
    assert model.lm_head.weight.dtype in (torch.float32, torch.bfloat16) and loaded.vocab_size() == 330


def test_a_tokenizer_larger_than_the_embedding_is_refused(folder, tmp_path):
    llama.save_pretrained(random_llama(vocab=329), tmp_path)
    (tmp_path / "tokenizer.model").write_bytes((folder / "tokenizer.model").read_bytes())
    with pytest.raises(UserError, match="330 pieces.* 329"):
        evals.load(tmp_path, "cpu")


def command(monkeypatch, capsys, *arguments):
    """Runs evals.py in this process: (exit status, standard output, standard error)."""
    monkeypatch.setattr(sys, "argv", ["evals.py", *map(str, arguments)])
    try:
        run_command(evals.main)
        status = 0
    except SystemExit as e:
        status = e.code
    return status, *capsys.readouterr()


def test_the_command_prints_every_kind_of_score(folder, tmp_path):
    (tmp_path / "text.txt").write_text("he is using wrap")
    long = json.dumps({**json.loads(GOOD), "question": "he is using wrap " * 20})
    (tmp_path / "questions.jsonl").write_text(f"{GOOD}\n{long}\n{GOOD}\n")
    rows = [["What?", "one", "two", "it", "he", letter] for letter in "ABCDA"]
    mmlu_folder(tmp_path, {"dev/anatomy_dev.csv": rows, "test/anatomy_test.csv": rows[:4]})
    done = subprocess.run([sys.executable, ROOT / "evals.py", folder, "--perplexity", tmp_path / "text.txt",
                           "--window", "7", "--mmlu", tmp_path, "--shots", "5", "--multiple-choice",
                           tmp_path / "questions.jsonl"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    count = len(data.load_tokenizer(folder).encode("he is using wrap"))
    assert re.search(rf"text.txt: perplexity \d+\.\d{{4}} over {count} tokens, in windows of 7", done.stdout)
    assert re.search(r"questions.jsonl: 3 questions.*\n.*by log-likelihood +\d+.\d\d ± \d+.\d\d %\n.*per character.*\n"
                     r"1 of 3 questions were longer than the model's context", done.stdout)
    assert re.search(r"MMLU, 5-shot.*\n +anatomy +4 +25.00 ± 21.65 %\n +other .*\n +average +4 ", done.stdout)
    assert "4 of 4 questions were longer than the model's context" in done.stdout
    assert "100%" in done.stderr and "100%" not in done.stdout, "progress bars belong on stderr"


@pytest.mark.parametrize("arguments, complaint", [
    ([], "nothing to judge by"), (["--perplexity", "nix.txt"], "cannot read nix.txt"),
    (["--mmlu", "nix"], "cannot read nix"), (["--multiple-choice", "nix.jsonl"], "cannot read nix.jsonl"),
    (["--perplexity", "FILE", "--window", "65"], "64 tokens"), (["--mmlu", "nix", "--window", "6"], "--perplexity"),
    (["--perplexity", "FILE", "--batch-size", "0"], "at least 1"), (["--mmlu", "nix", "--shots", "-1"], "at least 0"),
    (["--perplexity", "FILE", "--shots", "5"], "--mmlu"), (["--perplexity", "FILE", "--device", "abacus"], "abacus"),
    (["--perplexity", "EMPTY"], "is empty")])
def test_a_users_mistake_is_one_line_and_status_2(folder, tmp_path, monkeypatch, capsys, arguments, complaint):
    (tmp_path / "FILE").write_text("he is")
    (tmp_path / "EMPTY").write_text("")
    monkeypatch.chdir(tmp_path)
    status, out, error = command(monkeypatch, capsys, folder, *arguments)
    assert status == 2 and not out and error.startswith("error: ") and error.count("\n") == 1 and complaint in error
    status, out, error = command(monkeypatch, capsys, tmp_path / "nowhere", "--perplexity", "FILE")
    assert status == 2 and "nowhere is no folder" in error


def test_hellaswag_is_read_and_scored_by_a_real_model(material, folder, monkeypatch, capsys, tmp_path):
    lines = material("hellaswag-500.jsonl").read_text(encoding="utf-8").splitlines()[:20]
    (tmp_path / "hellaswag.jsonl").write_text("\n".join(lines), encoding="utf-8")
    for file in ("config.json", "model.safetensors"):
        (tmp_path / file).write_bytes((material("stories260K") / file).read_bytes())
    (tmp_path / "tokenizer.model").write_bytes((folder / "tokenizer.model").read_bytes())
    status, out, _ = command(monkeypatch, capsys, tmp_path, "--multiple-choice", tmp_path / "hellaswag.jsonl")
    assert status == 0 and "20 questions" in out and json.loads(lines[0])["answer"] == 3


OFFICIAL = {  # records as the datasets' authors publish them
    "HellaSwag": dict(ind=24, activity_label="Roof shingle removal", ctx="A man is sitting on a roof. he",
                      endings=["is using wrap.", "is ripping tiles.", "is holding a cube.", "starts pulling up roofing."],
                      source_id="activitynet~v_-JhWjGDPHMY", split="val", label=3),
    "PIQA": dict(goal="When boiling butter, when it's ready, you can", sol1="Pour it onto a plate", sol2="Pour it into a jar"),
    "ARC": dict(id="Mercury_7", question=dict(stem="What is hot?", choices=[dict(text=t, label=n) for t, n in zip(
        ("ice", "snow", "frost", "fire"), "ABCD")]), answerKey="D"),
    "OpenBookQA": dict(id="7-980", question=dict(stem="The sun is responsible for", choices=[dict(
        text=t, label=n) for t, n in zip(("puppies", "children", "flowers", "plants sprouting"), "ABCD")]), answerKey="D"),
    "WinoGrande": dict(qID="3", sentence="Sarah was a better surgeon than Maria so _ always got the easier cases.",
                       option1="Sarah", option2="Maria", answer="2"),
    "BoolQ": dict(question="does ethanol take more energy", title="Ethanol fuel", answer=False, passage="All biomass goes."),
}
CONVERTED = {
    "HellaSwag": ("Roof shingle removal: A man is sitting on a roof. he", OFFICIAL["HellaSwag"]["endings"], 3),
    "PIQA": ("Question: When boiling butter, when it's ready, you can\nAnswer:",
             ["Pour it onto a plate", "Pour it into a jar"], 1),
    "ARC": ("Question: What is hot?\nAnswer:", ["ice", "snow", "frost", "fire"], 3),
    "OpenBookQA": ("The sun is responsible for", ["puppies", "children", "flowers", "plants sprouting"], 3),
    "WinoGrande": ("Sarah was a better surgeon than Maria so", ["Sarah always got the easier cases.",
                                                                "Maria always got the easier cases."], 1),
    "BoolQ": ("All biomass goes.\nQuestion: does ethanol take more energy?\nAnswer:", ["no", "yes"], 0),
}


@pytest.mark.parametrize("name", OFFICIAL)
def test_the_readmes_lines_convert_official_records(name):
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    codes = {n: next(line.split("`")[1::2] for line in lines if line.startswith(f"| {n} |")) for n in OFFICIAL}
    code = codes[name][0] if name != "OpenBookQA" else re.sub(r'"question": .*?, "choices"', codes[name][0] + ', "choices"',
                                                              codes["ARC"][0])
    r = OFFICIAL[name]
    record = eval(code, {"r": r, "q": r.get("question"), "label": "1"})  # PIQA's labels are a file of their own
    assert evals.check_choices(record) == CONVERTED[name]
