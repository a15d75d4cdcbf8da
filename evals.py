"""Judging a model: perplexity, multiple choice by log-likelihood, MMLU, and (for train.py) exact match and loss.

    python evals.py FOLDER --perplexity FILE.txt
    python evals.py FOLDER --multiple-choice FILE.jsonl  lines of {"question": "...", "choices": ["..."], "answer": 0}
    python evals.py FOLDER --mmlu DIR --shots 5          DIR is the official one: dev/*_dev.csv, test/*_test.csv
    python evals.py FOLDER --mmlu FILE.jsonl             lines of {"subject": "...", "input": "...", "output": "A"}
    python -m pytest tests/test_evals.py

FOLDER is a model folder (float, quantized, merged) or a run of train.py. What is measured, and how:

* Perplexity: the text is one stream after BOS, cut into adjacent windows that overlap by one token, so every token of
  the text is predicted exactly once, from what precedes it in its window. A sliding window would give each token more
  context, at many times the cost; published figures for LLaMA come from adjacent windows too, of 2,048.
* Multiple choice: the likeliest choice after the question, by the sum of its tokens' log-probabilities, and by
  that sum divided by the choice's characters (acc and acc_norm of lm-evaluation-harness). Question and choice are
  tokenized apart and joined, as data.py joins prompt and response. LLaMA's tokenizer begins every text with a space,
  so these are the tokens of "question choice" encoded whole, and the files need no space at the seam.
* MMLU: the official prompt; the answer is the letter that is likeliest after "Answer:". Every question counts once in
  its category and in the average, as in the official script.
* Of equal scores the first wins. Beside an accuracy p of n questions stands its standard error, sqrt(p (1 - p) / n).
* A question that does not fit the model's context loses its beginning (BOS stays); such questions are counted.

A question is read once, and its choices continue from its keys and values; questions of equal length are read
together. So the only padding comes after a choice, where causal attention never looks.
"""

import csv
import io
import itertools
import json
import math
import pathlib

import torch
import torch.nn.functional as F
from tqdm import tqdm

from text.batches import collate
from text.instructions import read_text
from text.tokenizer import decode, load_tokenizer
from cli import machine
import llama
from cli.errors import Parser, UserError, run_command
from formats import load_model

LETTERS = "ABCD"
MMLU_CATEGORIES = {  # Hendrycks et al. 2021, https://github.com/hendrycks/test, categories.py
    "STEM": """abstract_algebra astronomy college_biology college_chemistry college_computer_science
        college_mathematics college_physics computer_security conceptual_physics electrical_engineering
        elementary_mathematics high_school_biology high_school_chemistry high_school_computer_science
        high_school_mathematics high_school_physics high_school_statistics machine_learning""".split(),
    "humanities": """formal_logic high_school_european_history high_school_us_history high_school_world_history
        international_law jurisprudence logical_fallacies moral_disputes moral_scenarios philosophy prehistory
        professional_law world_religions""".split(),
    "social sciences": """econometrics high_school_geography high_school_government_and_politics
        high_school_macroeconomics high_school_microeconomics high_school_psychology human_sexuality
        professional_psychology public_relations security_studies sociology us_foreign_policy""".split(),
    "other": """anatomy business_ethics clinical_knowledge college_medicine global_facts human_aging management
        marketing medical_genetics miscellaneous nutrition professional_accounting professional_medicine
        virology""".split(),
}


# Measuring: models and tokens in, numbers out. `progress` is the title of a progress bar on stderr; None shows none.

@torch.inference_mode()
def token_log_probs(model, tokens_BT, target_BT):
    """Natural-log probability [N] (float32) of each token where target_BT is True, row by row."""
    device = next(model.parameters()).device
    tokens_BT, target_BT = tokens_BT.to(device), target_BT.to(device)
    assert not target_BT[:, 0].any(), "the first token has nothing before it"
    logits_NV = model(tokens_BT[:, :-1], keep_BT=target_BT[:, 1:])
    return -F.cross_entropy(logits_NV.float(), tokens_BT[target_BT], reduction="none")


def perplexity(model, tokens, window, progress=None, batch_size=1):
    """exp of the mean negative log-likelihood of tokens[1:], each predicted once within a window of `window` inputs.

    tokens: one-dimensional, beginning with BOS; window: at most the model's context.
    """
    tokens = torch.as_tensor(tokens, dtype=torch.long)
    assert tokens.dim() == 1 and len(tokens) > 1 and window > 0, (tokens.shape, window)
    starts = range(0, len(tokens) - 1, window)
    total = 0.0
    with tqdm(total=len(tokens) - 1, desc=progress, unit=" tokens", disable=progress is None) as bar:
        for first in range(0, len(starts), batch_size):
            rows = [tokens[i:i + window + 1] for i in starts[first:first + batch_size]]
            tokens_BT, lengths_B = pad(rows)
            time_T = torch.arange(tokens_BT.shape[1])
            log_probs = token_log_probs(model, tokens_BT, (time_T > 0) & (time_T < lengths_B[:, None]))
            total -= log_probs.double().sum().item()
            bar.update(len(log_probs))
    mean = total / (len(tokens) - 1)
    return math.exp(mean) if mean < 700 else math.inf  # exp(710) is an OverflowError


def response_loss(model, examples, batch_size=16, progress=None):
    """Mean negative log-likelihood, in nats a token, of the responses (EOS included) of data.py's examples."""
    ordered = sorted(examples, key=lambda e: len(e.tokens), reverse=True)
    total, count = 0.0, 0
    for first in tqdm(range(0, len(ordered), batch_size), desc=progress, disable=progress is None):
        tokens_BT, target_BT = collate(ordered[first:first + batch_size])
        log_probs = token_log_probs(model, tokens_BT, target_BT)
        total, count = total - log_probs.double().sum().item(), count + len(log_probs)
    assert count, "no response tokens"
    return total / count


def pad(rows):
    """Lists of tokens -> tokens_BT (padded on the right, where causal attention never looks) and their lengths_B."""
    rows = [torch.as_tensor(row, dtype=torch.long) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), torch.tensor([len(row) for row in rows])


def choice_scores(model, questions, batch_size=16, progress=None):
    """Log-likelihood of every choice after its context, and how many questions had to lose their beginning.

    questions: pairs of a context (token ids, BOS first) and its choices (lists of token ids, none empty); batch_size
    counts choices. Returns a float64 tensor a question, and the count. Raises UserError when a choice alone is longer
    than the model's context.
    """
    limit, fitted = model.config.max_position_embeddings, []
    for number, (context, choices) in enumerate(questions, 1):
        room = limit + 1 - max(len(choice) for choice in choices)  # a choice's last token is no input
        if room < 1:
            raise UserError(f"question {number}: a choice exceeds the model's context of {limit} tokens; shorten it")
        fitted.append(context if len(context) <= room else context[:1] + context[len(context) - room + 1:])
    truncated = sum(len(short) < len(context) for short, (context, _) in zip(fitted, questions))
    scores = [None] * len(fitted)
    per_batch = max(1, batch_size // max(len(choices) for _, choices in questions))
    for batch in equal_length_batches(fitted, per_batch, progress):
        found = batch_choice_scores(model, [fitted[i] for i in batch], [questions[i][1] for i in batch])
        for i, score in zip(batch, found):
            scores[i] = score
    return scores, truncated


def equal_length_batches(rows, batch_size, progress):
    """Batches of indices of rows of equal length, the longest first: if memory runs out, then at once."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]), reverse=True)
    with tqdm(total=len(rows), desc=progress, unit=" questions", disable=progress is None) as bar:
        for _, group in itertools.groupby(order, key=lambda i: len(rows[i])):
            while batch := list(itertools.islice(group, batch_size)):
                yield batch
                bar.update(len(batch))


@torch.inference_mode()
def batch_choice_scores(model, contexts, choices):
    """Log-likelihoods of each context's choices, a float64 tensor each; the contexts are of equal length T."""
    weight = model.model.embed_tokens.weight
    new_cache = lambda rows, length: llama.Cache(model.config, rows, length, weight.dtype, weight.device)
    contexts_BT, counts = torch.tensor(contexts, device=weight.device), [len(c) for c in choices]
    B, T = contexts_BT.shape
    choice_NL, length_N = pad([choice for c in choices for choice in c])  # all N choices, of at most L tokens
    N, L = choice_NL.shape
    rest_NL = (torch.arange(1, L) < length_N[:, None]).to(weight.device)  # [N, L - 1]: the tokens after the first
    choice_NL = choice_NL.to(weight.device)
    context_N = torch.repeat_interleave(torch.tensor(counts)).to(weight.device)  # which context a choice continues
    last_BT = torch.zeros_like(contexts_BT, dtype=torch.bool)
    last_BT[:, -1] = True
    cache = new_cache(B, T) if L > 1 else None
    log_probs_BV = model(contexts_BT, cache, keep_BT=last_BT).float().log_softmax(-1)
    score_N = log_probs_BV[context_N, choice_NL[:, 0]].double()
    if L > 1:
        wide = new_cache(N, T + L - 1)
        wide.keys[:, :, :, :T], wide.values[:, :, :, :T] = cache.keys[:, context_N], cache.values[:, context_N]
        wide.length = T
        logits = model(choice_NL[:, :-1], wide, keep_BT=rest_NL)
        log_probs = -F.cross_entropy(logits.float(), choice_NL[:, 1:][rest_NL], reduction="none")
        score_N.index_add_(0, rest_NL.nonzero()[:, 0], log_probs.double())
    return score_N.cpu().split(counts)


def multiple_choice(model, tokenizer, items, batch_size=16, progress=None):
    """How often the likeliest choice is the right one; items: (question, choices, index of the right choice).

    Returns a dict: questions, accuracy, accuracy_error (the standard error), normalized, normalized_error (the same
    for log-likelihood per character), truncated (questions that lost their beginning).
    """
    encoded = [(encode_prompt(tokenizer, question), tokenizer.encode(choices)) for question, choices, _ in items]
    scores, truncated = choice_scores(model, encoded, batch_size, progress)
    right, right_normalized = [], []
    for score, (_, choices, answer) in zip(scores, items):
        characters = torch.tensor([len(choice) for choice in choices])
        right.append(score.argmax().item() == answer)
        right_normalized.append((score / characters).argmax().item() == answer)
    (accuracy, error), (normalized, normalized_error) = mean_and_error(right), mean_and_error(right_normalized)
    return dict(questions=len(items), accuracy=accuracy, accuracy_error=error, normalized=normalized,
                normalized_error=normalized_error, truncated=truncated)


def encode_prompt(tokenizer, prompt):
    return [tokenizer.bos_id(), *tokenizer.encode(prompt)]


def mean_and_error(right):
    """Accuracy and its standard error, from a list of bools."""
    p = sum(right) / len(right)
    return p, math.sqrt(p * (1 - p) / len(right))


def mmlu(model, tokenizer, questions, batch_size=16, progress=None):
    """Accuracy on (subject, prompt, answer index) triples, by subject, by category and over all questions.

    Returns rows of (name, questions, accuracy, standard error), and how many questions lost their beginning.
    """
    seam = len(tokenizer.encode("Answer:"))
    letters = [tokenizer.encode(f"Answer: {letter}")[seam:] for letter in LETTERS]  # as the solved examples have them
    encoded = [(encode_prompt(tokenizer, prompt), letters) for _, prompt, _ in questions]
    per_letter = batch_size * len(LETTERS)  # choices of one token need no row of their own
    scores, truncated = choice_scores(model, encoded, per_letter, progress)
    right = {}  # subject -> list of bools
    for score, (subject, _, answer) in zip(scores, questions):
        right.setdefault(subject, []).append(score.argmax().item() == answer)
    groups = {subject: right[subject] for subject in sorted(right)}
    for category, subjects in MMLU_CATEGORIES.items():
        groups[category] = [r for subject in subjects for r in right.get(subject, [])]
    groups["average"] = [r for subject in right for r in right[subject]]
    return [(name, len(rs), *mean_and_error(rs)) for name, rs in groups.items() if rs], truncated


def answers(model, tokenizer, prompts, max_new_tokens, batch_size=64, progress=None):
    """The greedy continuation of each prompt, up to EOS, as text. Prompts of equal length go together: no padding."""
    encoded = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    texts, eos, device = [None] * len(encoded), tokenizer.eos_id(), next(model.parameters()).device
    for batch in equal_length_batches(encoded, batch_size, progress):
        tokens_BT = torch.tensor([encoded[i] for i in batch], device=device)
        for i, row in zip(batch, llama.generate(model, tokens_BT, max_new_tokens, eos_token_id=eos).tolist()):
            texts[i] = decode(tokenizer, row[len(encoded[i]):])  # EOS, which fills rows that ended, has no text
    return texts


def exact_match(model, tokenizer, records, max_new_tokens, batch_size=64, progress=None):
    """The share of records whose greedy answer is the response, but for spaces at both ends."""
    records = list(records)
    texts = answers(model, tokenizer, [record.prompt for record in records], max_new_tokens, batch_size, progress)
    return sum(text.strip() == record.response.strip() for text, record in zip(texts, records)) / len(records)


def load(folder, device):
    """(model, tokenizer) of any model folder or run, in the dtype that `device` computes in.

    (On a CPU, float16 weights as they are stored would be a hundred times slower than float32.) Raises UserError when
    the device cannot be used, there is no model or no tokenizer, or they do not belong together.
    """
    machine.check_device(device)
    model, tokenizer = load_model(folder, device=device), load_tokenizer(folder)
    if tokenizer.vocab_size() > model.config.vocab_size:
        raise UserError(f"{folder}: the tokenizer has {tokenizer.vocab_size()} pieces, the model's embedding only "
                        f"{model.config.vocab_size}; copy the tokenizer.model that belongs to the model")
    return model.to(machine.compute_dtype(model.model.embed_tokens.weight.dtype, device)), tokenizer


# Reading: every file is checked before the model is loaded, and an error names the file and the line.

def read_json_lines(path, check):
    """[check(record)] for the JSON object of every line; `check` raises ValueError where something is wrong."""
    items = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            try:
                record = json.loads(line)
                if not isinstance(record, dict):
                    raise ValueError("no JSON object in braces")
                json.dumps(record, ensure_ascii=False).encode()  # half a surrogate pair raises a kind of ValueError
                items.append(check(record))
            except (ValueError, RecursionError) as e:
                raise UserError(f"{path}, line {number}: {getattr(e, 'msg', e)}; correct or remove this line") from None
    if not items:
        raise UserError(f"{path} holds no questions; give one JSON object a line")
    return items


def check_choices(record):
    """The (question, choices, answer index) of one line of --multiple-choice."""
    question, choices, answer = (record.get(key) for key in ("question", "choices", "answer"))
    if not isinstance(question, str):
        raise ValueError('"question" must be a string')
    texts = choices if isinstance(choices, list) else []
    if len(texts) < 2 or not all(isinstance(choice, str) and choice.strip() for choice in texts):
        raise ValueError('"choices" must be a list of two or more strings, none of them empty')
    if type(answer) is not int or not 0 <= answer < len(choices):
        raise ValueError(f'"answer" must be the index of the right choice, 0 to {len(choices) - 1}, not {answer!r}')
    return question, choices, answer


def check_mmlu(record):
    """The (subject, prompt, answer index) of one line of MMLU as JSONL."""
    subject, prompt, letter = (record.get(key) for key in ("subject", "input", "output"))
    check_subject(subject)
    if not isinstance(prompt, str) or not prompt.endswith("Answer:"):
        raise ValueError('"input" must be a prompt that ends in "Answer:"')
    return subject, prompt, letter_index(letter)


def check_subject(subject):
    if not any(subject in subjects for subjects in MMLU_CATEGORIES.values()):
        raise ValueError(f"{subject!r} is none of MMLU's 57 subjects")


def letter_index(letter):
    if letter not in list(LETTERS):
        raise ValueError(f"the answer must be A, B, C or D, not {letter!r}")
    return LETTERS.index(letter)


def read_mmlu(path, shots):
    """(subject, prompt, answer index) triples of the official folder (test/, for shots dev/ too) or a JSONL file."""
    path = pathlib.Path(path)
    if not path.is_dir():
        if shots:
            raise UserError(f"{path} is no folder, and only the official folder has examples for --shots {shots}")
        return read_json_lines(path, check_mmlu)
    files = sorted(path.glob("test/*_test.csv"))
    if not files:
        raise UserError(f"{path} has no test/*_test.csv; give the official folder (dev/ and test/) or a JSONL file")
    questions = []
    for file in files:
        subject = file.name.removesuffix("_test.csv")
        try:
            check_subject(subject)
        except ValueError as e:
            raise UserError(f"{file}: {e}; rename or remove this file") from None
        header = f"The following are multiple choice questions (with answers) about  {subject.replace('_', ' ')}.\n\n"
        examples = read_mmlu_csv(path / "dev" / f"{subject}_dev.csv") if shots else []
        if len(examples) < shots:
            raise UserError(f"{path / 'dev' / subject}_dev.csv has {len(examples)} examples; lower --shots {shots}")
        header += "".join(f"{prompt} {LETTERS[answer]}\n\n" for prompt, answer in examples[:shots])
        questions += [(subject, header + prompt, answer) for prompt, answer in read_mmlu_csv(file)]
    return questions


def read_mmlu_csv(path):
    """(question, its choices and "Answer:" as one text; answer index) of each row: question, A, B, C, D, letter."""
    rows, questions = csv.reader(io.StringIO(read_text(path), newline=""), strict=True), []
    try:
        for row in filter(None, rows):
            if len(row) != 6:
                raise ValueError(f"{len(row)} fields, not the six of question, four choices and answer")
            choices = "".join(f"\n{letter}. {choice}" for letter, choice in zip(LETTERS, row[1:5]))
            questions.append((f"{row[0]}{choices}\nAnswer:", letter_index(row[5])))
    except (ValueError, csv.Error) as e:
        raise UserError(f"{path}, line {rows.line_num}: {e}; correct or remove this row") from None
    if not questions:
        raise UserError(f"{path} holds no questions")
    return questions


# The command line.

def report_truncated(truncated, questions):
    if truncated:
        print(f"{truncated} of {questions} questions were longer than the model's context and lost their beginning")


def judge_perplexity(model, tokenizer, path, text, window, batch_size):
    tokens = encode_prompt(tokenizer, text)
    value = perplexity(model, tokens, window, f"perplexity of {path}", batch_size)
    print(f"{path}: perplexity {value:.4f} over {len(tokens) - 1} tokens, in windows of {window}")


def judge_multiple_choice(model, tokenizer, path, items, batch_size):
    result = multiple_choice(model, tokenizer, items, batch_size, f"multiple choice, {path}")
    print(f"{path}: {result['questions']} questions, accuracy and standard error")
    print(f"  by log-likelihood               {percent(result['accuracy'], result['accuracy_error'])}")
    print(f"  by log-likelihood per character {percent(result['normalized'], result['normalized_error'])}")
    report_truncated(result["truncated"], len(items))


def judge_mmlu(model, tokenizer, path, questions, shots, batch_size):
    what = f"MMLU, {shots}-shot" if pathlib.Path(path).is_dir() else "MMLU"  # a JSONL file holds whole prompts
    rows, truncated = mmlu(model, tokenizer, questions, batch_size, what)
    print(f"{what}, {path}: questions, accuracy and standard error")
    for name, count, accuracy, error in rows:
        print(f"  {name:40} {count:6} {percent(accuracy, error)}")
    report_truncated(truncated, len(questions))


def percent(accuracy, error):
    return f"{100 * accuracy:6.2f} ± {100 * error:.2f} %"


def main():
    parser = Parser(prog="evals.py", description=__doc__)
    parser.add_argument("folder", help="a model folder or a run of train.py")
    parser.add_argument("--perplexity", metavar="FILE.txt", help="perplexity of a text file")
    parser.add_argument("--window", type=int, help="tokens in a window of --perplexity; default 2048, or the context")
    parser.add_argument("--multiple-choice", metavar="FILE.jsonl", help="accuracy on question, choices, answer")
    parser.add_argument("--mmlu", metavar="PATH", help="MMLU's official folder, or JSONL of subject, input, output")
    parser.add_argument("--shots", type=int, default=0, help="worked examples before each MMLU question; default 0")
    parser.add_argument("--batch-size", type=int, default=8, help="sequences at a time; default 8")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    if not (args.perplexity or args.multiple_choice or args.mmlu):
        parser.error("nothing to judge by; give --perplexity, --multiple-choice or --mmlu")
    if (args.shots and not args.mmlu) or (args.window is not None and not args.perplexity):
        parser.error("--shots belongs to --mmlu, --window to --perplexity")
    if args.batch_size < 1 or args.shots < 0 or (args.window is not None and args.window < 1):
        parser.error("--batch-size and --window must be at least 1, --shots at least 0")
    text = read_text(args.perplexity) if args.perplexity else None
    if text is not None and not text.strip():
        raise UserError(f"{args.perplexity} is empty; give a file with text in it")
    items = read_json_lines(args.multiple_choice, check_choices) if args.multiple_choice else None
    questions = read_mmlu(args.mmlu, args.shots) if args.mmlu else None
    model, tokenizer = load(args.folder, args.device)
    limit = model.config.max_position_embeddings
    if args.window and args.window > limit:
        raise UserError(f"--window {args.window} is more than the model's context of {limit} tokens; lower it")
    if text:
        judge_perplexity(model, tokenizer, args.perplexity, text, args.window or min(2048, limit), args.batch_size)
    if items:
        judge_multiple_choice(model, tokenizer, args.multiple_choice, items, args.batch_size)
    if questions:
        judge_mmlu(model, tokenizer, args.mmlu, questions, args.shots, args.batch_size)


if __name__ == "__main__":
    run_command(main, "lower --batch-size")
