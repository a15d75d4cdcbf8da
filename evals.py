"""Judging a model: perplexity, multiple choice, MMLU, and (for train.py) exact match and loss.

    python evals.py FOLDER --perplexity FILE.txt
    python evals.py FOLDER --multiple-choice FILE.jsonl
    python evals.py FOLDER --mmlu DIR --shots 5
    python evals.py FOLDER --mmlu FILE.jsonl

FOLDER is a model folder (float, quantized, merged) or a run of train.py. The files:

    --multiple-choice  lines of {"question": "...", "choices": ["...", "..."], "answer": 0}
    --mmlu DIR         the official folder: dev/*_dev.csv, test/*_test.csv
    --mmlu FILE.jsonl  lines of {"subject": "...", "input": "...", "output": "A"}

What is measured, and how:

* Perplexity: the text is one stream after BOS, cut into adjacent windows that overlap by one token.
  So every token is predicted exactly once, from what precedes it in its window. A sliding window
  would give each token more context, at many times the cost. Published figures for LLaMA come from
  adjacent windows too, of 2,048 tokens.
* Multiple choice: the likeliest choice after the question, by the sum of its tokens' log
  probabilities, and by that sum divided by the number of the choice's characters (acc and acc_norm
  of lm-evaluation-harness). Question and choice are tokenized separately and joined. LLaMA's
  tokenizer begins every text with a space, so these are the tokens of "question choice" encoded as
  one text, and a choice in a file needs no space before it.
* MMLU: the official prompt; the answer is the letter that is likeliest after "Answer:". Every
  question counts once in its category and in the average, as in the official script.
* Of equal scores the first wins. The standard error of an accuracy p over n questions is
  sqrt(p (1 - p) / n).
* A question that does not fit into the model's context loses its beginning, except BOS. Such
  questions are counted.

A question is read once, and its choices continue from its keys and values. Questions of equal
length are read together. So only choices are padded, on the right, where causal attention never
looks.
"""

import argparse
import itertools
import math
import pathlib
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from sentencepiece import SentencePieceProcessor
from torch import Tensor
from tqdm import tqdm

import formats
import llama
from cli import machine
from cli.errors import Parser, UserError, run_command
from llama import Cache, Llama
from text.batches import Example, collate
from text.instructions import Record, read_text
from text.questions import LETTERS, MMLU_CATEGORIES, check_choices, read_json_lines, read_mmlu
from text.tokenizer import decode, encode_prompt, load_tokenizer

# ---- measuring. `progress` is the title of a progress bar on stderr; without one there is no bar


@torch.inference_mode()
def token_log_probs(model: Llama, tokens_BT: Tensor, target_BT: Tensor) -> Tensor:
    """Natural-log probability, float32, of each of the N tokens where target_BT is True: [N]."""
    device = next(model.parameters()).device
    tokens_BT, target_BT = tokens_BT.to(device), target_BT.to(device)
    assert not target_BT[:, 0].any(), "the first token has nothing before it"
    logits_NV = model(tokens_BT[:, :-1], keep_BT=target_BT[:, 1:])
    return -F.cross_entropy(logits_NV.float(), tokens_BT[target_BT], reduction="none")


def perplexity(
    model: Llama,
    tokens: Sequence[int] | Tensor,
    window: int,
    progress: str | None = None,
    batch_size: int = 1,
) -> float:
    """exp of the mean negative log-likelihood of tokens[1:], each predicted once.

    tokens: one-dimensional, BOS first. window: inputs of a window, at most the model's context.
    """
    tokens = torch.as_tensor(tokens, dtype=torch.long)
    assert tokens.dim() == 1 and len(tokens) > 1 and window > 0, (tokens.shape, window)
    predicted = len(tokens) - 1
    starts = range(0, predicted, window)
    total = 0.0
    with tqdm(total=predicted, desc=progress, unit=" tokens", disable=progress is None) as bar:
        for first in range(0, len(starts), batch_size):
            rows = [tokens[i : i + window + 1] for i in starts[first : first + batch_size]]
            tokens_BT, length_B = pad(rows)
            time_T = torch.arange(tokens_BT.shape[1])
            target_BT = (time_T > 0) & (time_T < length_B[:, None])
            log_probs_N = token_log_probs(model, tokens_BT, target_BT)
            total -= log_probs_N.double().sum().item()
            bar.update(len(log_probs_N))
    mean = total / predicted
    return math.exp(mean) if mean < 700 else math.inf  # exp(710) is an OverflowError


def response_loss(
    model: Llama,
    examples: Sequence[Example],
    batch_size: int = 16,
    progress: str | None = None,
) -> float:
    """Mean negative log-likelihood of the examples' response tokens (EOS too), in nats a token."""
    ordered = sorted(examples, key=lambda example: len(example.tokens), reverse=True)
    total, count = 0.0, 0
    for first in tqdm(range(0, len(ordered), batch_size), progress, disable=progress is None):
        tokens_BT, target_BT = collate(ordered[first : first + batch_size])
        log_probs_N = token_log_probs(model, tokens_BT, target_BT)
        total -= log_probs_N.double().sum().item()
        count += len(log_probs_N)
    assert count, "no response tokens"
    return total / count


def pad(rows: Sequence) -> tuple[Tensor, Tensor]:
    """Rows of tokens -> tokens_BT, padded on the right, and the rows' lengths [B]."""
    rows = [torch.as_tensor(row, dtype=torch.long) for row in rows]
    lengths = torch.tensor([len(row) for row in rows])
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), lengths


def choice_scores(
    model: Llama,
    questions: Sequence[tuple[list[int], list[list[int]]]],
    batch_size: int = 16,
    progress: str | None = None,
) -> tuple[list[Tensor], int]:
    """Log-likelihood of every choice after its context, and how many contexts had to be cut.

    questions: pairs of a context (tokens, BOS first) and its choices (lists of tokens, none empty).
    batch_size: how many choices are read at a time. Returns a float64 tensor for each question, and
    how many contexts lost their beginning to fit. Raises UserError when a choice alone is longer
    than the model's context.
    """
    choices = [choices for _, choices in questions]
    contexts = fit_contexts(questions, model.config.max_position_embeddings)
    cut = 0
    for short, (context, _) in zip(contexts, questions, strict=True):
        cut += len(short) < len(context)
    scores = [None] * len(contexts)
    per_batch = max(1, batch_size // max(len(some) for some in choices))
    for batch in equal_length_batches(contexts, per_batch, progress):
        found = batch_choice_scores(
            model, [contexts[i] for i in batch], [choices[i] for i in batch]
        )
        for i, score in zip(batch, found, strict=True):
            scores[i] = score
    return scores, cut


def fit_contexts(
    questions: Sequence[tuple[list[int], list[list[int]]]], limit: int
) -> list[list[int]]:
    """The questions' contexts, without the tokens after BOS that leave no room for the choices."""
    contexts = []
    for number, (context, choices) in enumerate(questions, 1):
        room = (
            limit + 1 - max(len(choice) for choice in choices)
        )  # a choice's last token is no input
        if room < 1:
            raise UserError(
                f"question {number}: a choice exceeds the model's context of {limit} tokens; "
                "shorten it"
            )
        if len(context) > room:
            context = context[:1] + context[len(context) - room + 1 :]
        contexts.append(context)
    return contexts


def equal_length_batches(
    rows: Sequence[list[int]], batch_size: int, progress: str | None
) -> Iterator[list[int]]:
    """Batches of indices of rows of equal length.

    The longest come first: if memory runs out, then at once.
    """
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]), reverse=True)
    with tqdm(total=len(rows), desc=progress, unit=" questions", disable=progress is None) as bar:
        for _, group in itertools.groupby(order, key=lambda i: len(rows[i])):
            indices = list(group)
            for start in range(0, len(indices), batch_size):
                batch = indices[start : start + batch_size]
                yield batch
                bar.update(len(batch))


@torch.inference_mode()
def batch_choice_scores(
    model: Llama, contexts: list[list[int]], choices: list[list[list[int]]]
) -> Sequence[Tensor]:
    """Log-likelihoods of the choices of each of B contexts, a float64 tensor for each context.

    contexts: all of the same length T. All their choices together are N, of at most L tokens.
    """
    device = next(model.parameters()).device
    counts = [len(some) for some in choices]
    choice_NL, length_N = pad(list(itertools.chain.from_iterable(choices)))
    choice_NL, length_N = choice_NL.to(device), length_N.to(device)
    context_N = torch.repeat_interleave(torch.tensor(counts)).to(device)  # the one before a choice
    contexts_BT = torch.tensor(contexts, device=device)
    last_BT = torch.zeros_like(contexts_BT, dtype=torch.bool)
    last_BT[:, -1] = True
    L = choice_NL.shape[1]
    cache = new_cache(model, *contexts_BT.shape) if L > 1 else None
    log_probs_BV = model(contexts_BT, cache, keep_BT=last_BT).float().log_softmax(-1)
    score_N = log_probs_BV[context_N, choice_NL[:, 0]].double()
    if L > 1:
        later_NL = torch.arange(1, L, device=device) < length_N[:, None]  # [N, L - 1]
        wide = repeat_cache(model, cache, context_N, L - 1)
        logits_MV = model(choice_NL[:, :-1], wide, keep_BT=later_NL)  # M: all later tokens
        log_probs_M = -F.cross_entropy(
            logits_MV.float(), choice_NL[:, 1:][later_NL], reduction="none"
        )
        score_N.index_add_(0, later_NL.nonzero()[:, 0], log_probs_M.double())
    return score_N.cpu().split(counts)


def new_cache(model: Llama, rows: int, length: int) -> Cache:
    """An empty cache for `rows` texts of `length` tokens."""
    weight = model.model.embed_tokens.weight
    return Cache(model.config, rows, length, weight.dtype, weight.device)


def repeat_cache(model: Llama, cache: Cache, row_N: Tensor, room: int) -> Cache:
    """A cache whose text n begins as text row_N[n] of `cache`, with room for `room` more tokens."""
    T = cache.length
    wide = new_cache(model, len(row_N), T + room)
    wide.keys[:, :, :, :T] = cache.keys[:, row_N]
    wide.values[:, :, :, :T] = cache.values[:, row_N]
    wide.length = T
    return wide


def multiple_choice(
    model: Llama,
    tokenizer: SentencePieceProcessor,
    items: Sequence[tuple[str, list[str], int]],
    batch_size: int = 16,
    progress: str | None = None,
) -> dict:
    """How often the likeliest choice is the right one.

    items: (question, choices, index of the right choice). Returns questions, accuracy,
    accuracy_error (its standard error), normalized and normalized_error (the same by log-likelihood
    per character), truncated (how many questions lost their beginning).
    """
    encoded = []
    for question, choices, _ in items:
        encoded.append((encode_prompt(tokenizer, question), tokenizer.encode(choices)))
    scores, truncated = choice_scores(model, encoded, batch_size, progress)
    right, right_normalized = [], []
    for score, (_, choices, answer) in zip(scores, items, strict=True):
        characters = torch.tensor([len(choice) for choice in choices])
        right.append(score.argmax().item() == answer)
        right_normalized.append((score / characters).argmax().item() == answer)
    accuracy, accuracy_error = mean_and_error(right)
    normalized, normalized_error = mean_and_error(right_normalized)
    return {
        "questions": len(items),
        "accuracy": accuracy,
        "accuracy_error": accuracy_error,
        "normalized": normalized,
        "normalized_error": normalized_error,
        "truncated": truncated,
    }


def mean_and_error(right: Sequence[bool]) -> tuple[float, float]:
    """Accuracy and its standard error."""
    p = sum(right) / len(right)
    return p, math.sqrt(p * (1 - p) / len(right))


def mmlu(
    model: Llama,
    tokenizer: SentencePieceProcessor,
    questions: Sequence[tuple[str, str, int]],
    batch_size: int = 16,
    progress: str | None = None,
) -> tuple[list[tuple[str, int, float, float]], int]:
    """Accuracy by subject, by category and over all questions.

    questions: (subject, prompt, answer index). Returns rows of (name, questions, accuracy, standard
    error), and how many questions lost their beginning.
    """
    seam = len(tokenizer.encode("Answer:"))  # letters are encoded as in the solved examples
    letters = [tokenizer.encode(f"Answer: {letter}")[seam:] for letter in LETTERS]
    encoded = [(encode_prompt(tokenizer, prompt), letters) for _, prompt, _ in questions]
    choices_at_a_time = batch_size * len(LETTERS)  # a choice of one token takes no row of its own
    scores, truncated = choice_scores(model, encoded, choices_at_a_time, progress)
    right = {}  # subject -> list of bools
    for score, (subject, _, answer) in zip(scores, questions, strict=True):
        right.setdefault(subject, []).append(score.argmax().item() == answer)
    groups = {subject: right[subject] for subject in sorted(right)}
    for category, subjects in MMLU_CATEGORIES.items():
        groups[category] = sum((right.get(subject, []) for subject in subjects), [])
    groups["average"] = sum(right.values(), [])
    rows = [(name, len(some), *mean_and_error(some)) for name, some in groups.items() if some]
    return rows, truncated


def answers(
    model: Llama,
    tokenizer: SentencePieceProcessor,
    prompts: Sequence[str],
    max_new_tokens: int,
    batch_size: int = 64,
    progress: str | None = None,
) -> list[str]:
    """The greedy continuation of each prompt, up to EOS. Prompts of equal length go together."""
    encoded = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    texts = [""] * len(encoded)
    eos, device = tokenizer.eos_id(), next(model.parameters()).device
    for batch in equal_length_batches(encoded, batch_size, progress):
        tokens_BT = torch.tensor([encoded[i] for i in batch], device=device)
        rows = llama.generate(model, tokens_BT, max_new_tokens, eos_token_id=eos).tolist()
        for i, row in zip(batch, rows, strict=True):
            texts[i] = decode(tokenizer, row[len(encoded[i]) :])  # EOS decodes to nothing
    return texts


def exact_match(
    model: Llama,
    tokenizer: SentencePieceProcessor,
    records: Sequence[Record],
    max_new_tokens: int,
    batch_size: int = 64,
    progress: str | None = None,
) -> float:
    """The share of records whose greedy answer is the response, except for spaces at its ends."""
    prompts = [record.prompt for record in records]
    texts = answers(model, tokenizer, prompts, max_new_tokens, batch_size, progress)
    matches = 0
    for text, record in zip(texts, records, strict=True):
        matches += text.strip() == record.response.strip()
    return matches / len(records)


def load(folder: str | pathlib.Path, device: str) -> tuple[Llama, SentencePieceProcessor]:
    """The model and the tokenizer of a model folder or run, in the dtype that `device` computes in.

    (A CPU computes a hundred times slower in float16, as weights are often stored, than in
    float32.) Raises UserError when the device cannot be used, the model or the tokenizer is
    missing, or they do not belong together.
    """
    machine.check_device(device)
    model = formats.load_model(folder, device=device)
    tokenizer = load_tokenizer(folder)
    if tokenizer.vocab_size() > model.config.vocab_size:
        raise UserError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size()} pieces, the model's embedding "
            f"only {model.config.vocab_size}; copy the tokenizer.model that belongs to the model"
        )
    stored = model.model.embed_tokens.weight.dtype
    return model.to(machine.compute_dtype(stored, device)), tokenizer


# ---- the command


def judge_perplexity(model, tokenizer, path: str, text: str, window: int, batch_size: int):
    """Prints the perplexity of the text in file `path`."""
    tokens = encode_prompt(tokenizer, text)
    value = perplexity(model, tokens, window, f"perplexity of {path}", batch_size)
    print(f"{path}: perplexity {value:.4f} over {len(tokens) - 1} tokens, in windows of {window}")


def judge_multiple_choice(model, tokenizer, path: str, items: list, batch_size: int):
    """Prints the accuracy on the questions of file `path`."""
    result = multiple_choice(model, tokenizer, items, batch_size, f"multiple choice, {path}")
    accuracy = percent(result["accuracy"], result["accuracy_error"])
    normalized = percent(result["normalized"], result["normalized_error"])
    print(f"{path}: {result['questions']} questions, accuracy and standard error")
    print(f"  by log-likelihood               {accuracy}")
    print(f"  by log-likelihood per character {normalized}")
    print_truncated(result["truncated"], len(items))


def judge_mmlu(model, tokenizer, path: str, questions: list, shots: int, batch_size: int):
    """Prints the accuracy on MMLU, by subject, by category, and over all questions."""
    is_official = pathlib.Path(path).is_dir()
    title = f"MMLU, {shots}-shot" if is_official else "MMLU"  # JSON lines hold whole prompts
    rows, truncated = mmlu(model, tokenizer, questions, batch_size, title)
    print(f"{title}, {path}: questions, accuracy and standard error")
    for name, count, accuracy, error in rows:
        print(f"  {name:40} {count:6} {percent(accuracy, error)}")
    print_truncated(truncated, len(questions))


def percent(accuracy: float, error: float) -> str:
    """`25.00 ± 21.65 %`."""
    return f"{100 * accuracy:6.2f} ± {100 * error:.2f} %"


def print_truncated(truncated: int, questions: int):
    """Prints how many questions were cut, if any."""
    if truncated:
        print(
            f"{truncated} of {questions} questions were longer than the model's context and lost "
            "their beginning"
        )


def read_arguments() -> argparse.Namespace:
    """The command line; UserError for what does not go together."""
    parser = Parser(prog="evals.py", description=__doc__)
    add = parser.add_argument
    add("folder", help="a model folder or a run of train.py")
    add("--perplexity", metavar="FILE.txt", help="perplexity of a text file")
    add("--window", type=int, help="tokens in a window; default 2048, or the model's context")
    add("--multiple-choice", metavar="FILE.jsonl", help="accuracy on question, choices, answer")
    add("--mmlu", metavar="PATH", help="MMLU's official folder, or lines of subject, input, output")
    add("--shots", type=int, default=0, help="solved examples before each MMLU question; default 0")
    add("--batch-size", type=int, default=8, help="sequences at a time; default 8")
    add("--device", default=machine.default_device())
    args = parser.parse_args()
    if not (args.perplexity or args.multiple_choice or args.mmlu):
        parser.error("nothing to judge by; give --perplexity, --multiple-choice or --mmlu")
    if (args.shots and not args.mmlu) or (args.window is not None and not args.perplexity):
        parser.error("--shots belongs to --mmlu, --window to --perplexity")
    if args.batch_size < 1 or args.shots < 0 or (args.window is not None and args.window < 1):
        parser.error("--batch-size and --window must be at least 1, --shots at least 0")
    return args


def main():
    """Reads the files, then loads the model, then judges it."""
    args = read_arguments()
    text = read_text(args.perplexity) if args.perplexity else None
    if text is not None and not text.strip():
        raise UserError(f"{args.perplexity} is empty; give a file with text in it")
    items, questions = None, None
    if args.multiple_choice:
        items = read_json_lines(args.multiple_choice, check_choices)
    if args.mmlu:
        questions = read_mmlu(args.mmlu, args.shots)
    model, tokenizer = load(args.folder, args.device)
    context = model.config.max_position_embeddings
    window = args.window or min(2048, context)
    if window > context:
        raise UserError(
            f"--window {window} is more than the model's context of {context} tokens; lower it"
        )
    size = args.batch_size
    if text:
        judge_perplexity(model, tokenizer, args.perplexity, text, window, size)
    if items:
        judge_multiple_choice(model, tokenizer, args.multiple_choice, items, size)
    if questions:
        judge_mmlu(model, tokenizer, args.mmlu, questions, args.shots, size)


if __name__ == "__main__":
    run_command(main, "lower --batch-size")
