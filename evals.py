"""Judging a model: perplexity, multiple choice by log-likelihood, MMLU, exact match and loss.

    python evals.py FOLDER --perplexity FILE.txt
    python evals.py FOLDER --multiple-choice FILE.jsonl   {"question", "choices", "answer"} a line
    python evals.py FOLDER --mmlu DIR --shots 5           the official folder: dev/ and test/
    python evals.py FOLDER --mmlu FILE.jsonl              {"subject", "input", "output"} a line
    python evals.py FOLDER --instructions FILE.json       as for train.py --data
    python -m pytest tests/test_evals.py

FOLDER is a model folder (float, quantized, merged), a run of train.py, or a .gguf file. How it
is judged:

* Perplexity: the text is one stream after BOS, cut into adjacent windows that overlap by one token,
  so every token is predicted exactly once, from what precedes it in its window. A sliding window
  would give each token more context, at many times the cost. Published figures for LLaMA come from
  adjacent windows too, of 2,048.
* Multiple choice: the likeliest choice after the question, by the sum of its tokens'
  log-probabilities, and by that sum divided by the choice's characters (acc and acc_norm of
  lm-evaluation-harness). Question and choice are tokenized as one text with a space between them,
  so the files need none; the choice's tokens are those after the question's, as in the harness.
* MMLU: the official prompt; the answer is the letter that is likeliest after "Answer:". Every
  question counts once in its category and in the average, as in the official script.
* Instructions: written in the model's chat format, as for sample.py. The mean negative
  log-likelihood of all answers, with the token that ends each, in nats a token; and how often the
  greedy answer to a conversation's last question is the last answer, but for spaces at both ends.
* Of equal scores the first wins. Beside an accuracy p of n questions stands its standard error,
  sqrt(p (1 - p) / n).
* A question that does not fit the model's context loses its beginning (BOS stays), a response its
  end; they are counted.

A question is read once, and its choices continue from its keys and values. Questions of equal
length are read together, so the only padding comes after a choice, where causal attention never
looks.
"""

import argparse
import itertools
import math
import pathlib
from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import formats
from cli.errors import Parser, UserError, run_command
from cli.machine import check_device, compute_dtype, default_device
from kernels.int4 import prepare_inference
from llama import Cache, Llama, generate
from text.batches import Example, collate, encode, encode_asking
from text.instructions import Record, read_records
from text.questions import LETTERS, MMLU_CATEGORIES, check_choices, read_json_lines, read_mmlu
from text.records import read_text
from text.tokenizer import Tokenizer

# Below, `progress` is the title of a progress bar on stderr; None means no bar

# ---- the probability of tokens


@torch.inference_mode()
def token_log_probs(model: Llama, tokens_BT: Tensor, target_BT: Tensor) -> Tensor:
    """Natural-log probability [N] (float32) of each token where target_BT is True, row by row."""
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
    """exp of the mean negative log-likelihood of tokens[1:].

    Each is predicted once, within a window of at most `window` inputs. tokens: one-dimensional,
    beginning with BOS if the model has one. window: at most the model's context.
    """
    tokens = torch.as_tensor(tokens, dtype=torch.long)
    assert tokens.dim() == 1 and len(tokens) > 1 and window > 0, (tokens.shape, window)
    predicted = len(tokens) - 1
    starts = range(0, predicted, window)
    total = 0.0
    with tqdm(total=predicted, desc=progress, unit=" tokens", disable=progress is None) as bar:
        for first in range(0, len(starts), batch_size):
            rows = [tokens[i : i + window + 1] for i in starts[first : first + batch_size]]
            tokens_BT, lengths_B = pad(rows)
            time_T = torch.arange(tokens_BT.shape[1])
            target_BT = (time_T > 0) & (time_T < lengths_B[:, None])
            log_probs = token_log_probs(model, tokens_BT, target_BT)
            total -= log_probs.double().sum().item()
            bar.update(len(log_probs))
    mean = total / predicted
    return math.exp(mean) if mean < 700 else math.inf  # exp(710) is an OverflowError


def response_loss(
    model: Llama, examples: Sequence[Example], batch_size: int = 16, progress: str | None = None
) -> float:
    """Mean negative log-likelihood of the examples' responses, EOS included, in nats a token."""
    ordered = sorted(examples, key=lambda e: len(e.tokens), reverse=True)
    total, count = 0.0, 0
    for first in tqdm(range(0, len(ordered), batch_size), desc=progress, disable=progress is None):
        tokens_BT, target_BT = collate(ordered[first : first + batch_size])
        log_probs = token_log_probs(model, tokens_BT, target_BT)
        total -= log_probs.double().sum().item()
        count += len(log_probs)
    assert count, "no response tokens"
    return total / count


def pad(rows: Sequence) -> tuple[Tensor, Tensor]:
    """Lists of tokens -> (tokens_BT, padded on the right; their lengths_B)."""
    rows = [torch.as_tensor(row, dtype=torch.long) for row in rows]
    lengths_B = torch.tensor([len(row) for row in rows])
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), lengths_B


# ---- multiple choice


def choice_scores(
    model: Llama,
    questions: Sequence[tuple[list[int], list[list[int]]]],
    batch_size: int = 16,
    progress: str | None = None,
    kept: int = 1,
) -> tuple[list[Tensor], int]:
    """The log-likelihood of every choice after its context, and how many contexts were cut.

    questions: pairs of a context (tokens) and its choices (lists of tokens, none empty).
    batch_size counts choices. kept: how many tokens (BOS) stay where a context loses its beginning.
    Returns a float64 tensor for each question, and how many questions lost their beginning. Raises
    UserError when a choice alone is longer than the model's context.
    """
    limit = model.config.max_position_embeddings
    fitted = [fit(i, *question, limit, kept) for i, question in enumerate(questions, 1)]
    truncated = 0
    for short, (context, _) in zip(fitted, questions, strict=True):
        truncated += len(short) < len(context)
    scores = [None] * len(fitted)
    per_batch = max(1, batch_size // max(len(choices) for _, choices in questions))
    for batch in equal_length_batches(fitted, per_batch, progress):
        contexts, choices = [fitted[i] for i in batch], [questions[i][1] for i in batch]
        found = batch_choice_scores(model, contexts, choices)
        for i, score in zip(batch, found, strict=True):
            scores[i] = score
    return scores, truncated


def fit(
    number: int, context: list[int], choices: list[list[int]], limit: int, kept: int
) -> list[int]:
    """The context; where it and a choice exceed `limit`, without what follows `kept` tokens."""
    room = limit + 1 - max(len(choice) for choice in choices)  # a choice's last token is no input
    if room < max(kept, 1):
        raise UserError(
            f"question {number}: a choice exceeds the model's context of {limit} tokens; shorten it"
        )
    if len(context) <= room:
        return context
    return context[:kept] + context[len(context) - room + kept :]


def equal_length_batches(
    rows: Sequence[Sequence], batch_size: int, progress: str | None
) -> Iterator[list[int]]:
    """Batches of indices of rows of equal length; the longest first, as they may exceed memory."""
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
    """The log-likelihoods of each context's choices, a float64 tensor each.

    The contexts are of equal length T. All N choices, of at most L tokens, continue from the keys
    and values of their context.
    """
    weight = model.model.embed_tokens.weight
    dtype, device = weight.dtype, weight.device
    contexts_BT = torch.tensor(contexts, device=device)
    B, T = contexts_BT.shape
    counts = [len(c) for c in choices]
    choice_NL, length_N = pad(list(itertools.chain.from_iterable(choices)))
    N, L = choice_NL.shape
    rest_NL = (torch.arange(1, L) < length_N[:, None]).to(device)  # the L - 1 after the first
    choice_NL = choice_NL.to(device)
    context_N = torch.repeat_interleave(torch.tensor(counts)).to(device)  # whose choice it is
    last_BT = torch.zeros_like(contexts_BT, dtype=torch.bool)
    last_BT[:, -1] = True
    cache = Cache(model.config, B, T, dtype, device) if L > 1 else None
    log_probs_BV = model(contexts_BT, cache, keep_BT=last_BT).float().log_softmax(-1)
    score_N = log_probs_BV[context_N, choice_NL[:, 0]].double()
    if L > 1:
        wide = Cache(model.config, N, T + L - 1, dtype, device)
        wide.keys[:, :, :, :T] = cache.keys[:, context_N]
        wide.values[:, :, :, :T] = cache.values[:, context_N]
        wide.length = T
        logits = model(choice_NL[:, :-1], wide, keep_BT=rest_NL)
        log_probs = -F.cross_entropy(logits.float(), choice_NL[:, 1:][rest_NL], reduction="none")
        score_N.index_add_(0, rest_NL.nonzero()[:, 0], log_probs.double())
    return score_N.cpu().split(counts)


def multiple_choice(
    model: Llama,
    tokenizer: Tokenizer,
    items: Sequence[tuple],
    batch_size: int = 16,
    progress: str | None = None,
) -> dict:
    """How often the likeliest choice is the right one.

    items: (question, choices, index of the right choice). Returns questions, accuracy,
    accuracy_error (the standard error), normalized, normalized_error (the same by log-likelihood
    per character), truncated (questions that lost their beginning).
    """
    encoded = []
    for question, choices, _ in items:
        encoded.append(encode_choices(tokenizer, question, choices))
    kept = len(tokenizer.bos)
    scores, truncated = choice_scores(model, encoded, batch_size, progress, kept)
    right, right_normalized = [], []
    for score, (_, choices, answer) in zip(scores, items, strict=True):
        characters = torch.tensor([len(choice) for choice in choices])
        right.append(score.argmax().item() == answer)
        right_normalized.append((score / characters).argmax().item() == answer)
    accuracy, error = mean_and_error(right)
    normalized, normalized_error = mean_and_error(right_normalized)
    return {
        "questions": len(items),
        "accuracy": accuracy,
        "accuracy_error": error,
        "normalized": normalized,
        "normalized_error": normalized_error,
        "truncated": truncated,
    }


def encode_choices(
    tokenizer: Tokenizer, question: str, choices: Sequence[str]
) -> tuple[list[int], list[list[int]]]:
    """(the question's tokens, those of each choice), as lm-evaluation-harness cuts them.

    A choice's tokens are those that "question choice" has more than the question alone; spaces at a
    question's end belong to the choices. An empty question is BOS, or EOS where texts have no BOS;
    the harness takes BOS even there, if the tokenizer names one.
    """
    stem = question.rstrip()
    gap = f"{question[len(stem) :]} "
    context, *whole = tokenizer.encode_all([stem, *(f"{stem}{gap}{choice}" for choice in choices)])
    return tokenizer.framed(context), [tokens[len(context) :] for tokens in whole]


def mean_and_error(right: list[bool]) -> tuple[float, float]:
    """Accuracy and its standard error."""
    p = sum(right) / len(right)
    return p, standard_error(p, len(right))


def standard_error(p: float, count: int) -> float:
    """That of an accuracy p of `count` questions."""
    return math.sqrt(p * (1 - p) / count)


def mmlu(
    model: Llama,
    tokenizer: Tokenizer,
    questions: Sequence[tuple[str, str, int]],
    batch_size: int = 16,
    progress: str | None = None,
) -> tuple[list[tuple], int]:
    """Accuracy on (subject, prompt, answer index), by subject, by category and over all questions.

    Returns rows of (name, questions, accuracy, standard error), and how many questions lost their
    beginning.
    """
    seam = len(tokenizer.encode("Answer:"))
    letters = []  # tokenized as in the solved examples
    for letter in LETTERS:
        letters.append(tokenizer.encode(f"Answer: {letter}")[seam:])
    encoded = [(tokenizer.encode_prompt(prompt), letters) for _, prompt, _ in questions]
    per_letter = batch_size * len(LETTERS)  # a choice of one token needs no row of its own
    kept = len(tokenizer.bos)
    scores, truncated = choice_scores(model, encoded, per_letter, progress, kept)
    right = {}  # subject -> list of bools
    for score, (subject, _, answer) in zip(scores, questions, strict=True):
        right.setdefault(subject, []).append(score.argmax().item() == answer)
    groups = {subject: right[subject] for subject in sorted(right)}
    for category, subjects in MMLU_CATEGORIES.items():
        groups[category] = joined(right.get(subject, []) for subject in subjects)
    groups["average"] = joined(right.values())
    rows = [(name, len(rs), *mean_and_error(rs)) for name, rs in groups.items() if rs]
    return rows, truncated


def joined(lists: Iterable[list]) -> list:
    """All elements of some lists."""
    return list(itertools.chain.from_iterable(lists))


# ---- generated answers


def answers(
    model: Llama,
    tokenizer: Tokenizer,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    batch_size: int = 64,
    progress: str | None = None,
) -> list[str]:
    """The greedy answer to each prompt (tokens). Prompts of equal length go together."""
    texts, device = [None] * len(prompts), next(model.parameters()).device
    for batch in equal_length_batches(prompts, batch_size, progress):
        tokens_BT = torch.tensor([prompts[i] for i in batch], device=device)
        room = model.config.max_position_embeddings - tokens_BT.shape[1]
        most = min(max_new_tokens, room)
        rows = generate(model, tokens_BT, most, eos_token_ids=tokenizer.answer_ends).tolist()
        for i, row in zip(batch, rows, strict=True):
            texts[i] = tokenizer.decode_answer(row[len(prompts[i]) :])  # EOS has no text
    return texts


def exact_match(
    model: Llama,
    tokenizer: Tokenizer,
    records: Sequence[Record],
    max_new_tokens: int,
    batch_size: int = 64,
    progress: str | None = None,
) -> float:
    """The share of records whose last answer is the greedy one, but for spaces at both ends."""
    prompts = [encode_asking(record[:-1], tokenizer) for record in records]
    texts = answers(model, tokenizer, prompts, max_new_tokens, batch_size, progress)
    right = 0
    for text, record in zip(texts, records, strict=True):
        right += text.strip() == record[-1].text.strip()
    return right / len(records)


@torch.inference_mode()
def greedy_matches(model: Llama, examples: Sequence[Example], batch_size: int = 16) -> list[bool]:
    """Whether each example's response, its end included, is the model's greedy answer.

    It is where every token of it is the likeliest after those before: one pass, no generating.
    """
    device, matches = next(model.parameters()).device, []
    for first in range(0, len(examples), batch_size):
        tokens_BT, learned_BT = (
            t.to(device) for t in collate(examples[first : first + batch_size])
        )
        likeliest_N = model(tokens_BT[:, :-1], keep_BT=learned_BT[:, 1:]).argmax(-1)
        wrong_BT = learned_BT.clone()
        wrong_BT[learned_BT] = likeliest_N != tokens_BT[learned_BT]
        matches += (~wrong_BT.any(dim=1)).tolist()
    return matches


# ---- the command


def load(path: str | pathlib.Path, device: str) -> tuple[Llama, Tokenizer]:
    """(model, tokenizer) of any model or run, in the dtype that `device` computes in.

    Raises UserError when the device cannot be used, there is no model or no tokenizer, or they do
    not belong together.
    """
    check_device(device)
    model, tokenizer = formats.load_model(path, device=device), formats.load_tokenizer(path)
    tokenizer.check_fits(model.config.vocab_size, path)
    stored = model.model.embed_tokens.weight.dtype
    return model.to(compute_dtype(stored, device)), tokenizer


def report_truncated(truncated: int, of: str, part: str = "beginning") -> None:
    """Prints how many of them, such as "500 questions", lost a part."""
    if truncated:
        print(f"{truncated} of {of} were longer than the model's context and lost their {part}")


def judge_perplexity(
    model: Llama,
    tokenizer: Tokenizer,
    path: str,
    text: str,
    window: int,
    batch_size: int,
) -> None:
    """Prints the perplexity of a text."""
    tokens = tokenizer.encode_prompt(text)
    if len(tokens) < 2:
        raise UserError(f"{path} is one token long, with nothing before it; give a longer text")
    value = perplexity(model, tokens, window, f"perplexity of {path}", batch_size)
    print(f"{path}: perplexity {value:.4f} over {len(tokens) - 1} tokens, in windows of {window}")


def judge_multiple_choice(
    model: Llama, tokenizer: Tokenizer, path: str, items: list, batch_size: int
) -> None:
    """Prints the accuracy on a file of questions."""
    result = multiple_choice(model, tokenizer, items, batch_size, f"multiple choice, {path}")
    plain = percent(result["accuracy"], result["accuracy_error"])
    normalized = percent(result["normalized"], result["normalized_error"])
    print(f"{path}: {result['questions']} questions, accuracy and standard error")
    print(f"  by log-likelihood               {plain}")
    print(f"  by log-likelihood per character {normalized}")
    report_truncated(result["truncated"], f"{len(items)} questions")


def judge_mmlu(
    model: Llama,
    tokenizer: Tokenizer,
    path: str,
    questions: list,
    shots: int,
    batch_size: int,
) -> None:
    """Prints the accuracy on MMLU by subject and category."""
    official = pathlib.Path(path).is_dir()  # JSON lines hold whole prompts
    what = f"MMLU, {shots}-shot" if official else "MMLU"
    rows, truncated = mmlu(model, tokenizer, questions, batch_size, what)
    print(f"{what}, {path}: questions, accuracy and standard error")
    for name, count, accuracy, error in rows:
        print(f"  {name:40} {count:6} {percent(accuracy, error)}")
    report_truncated(truncated, f"{len(questions)} questions")


def judge_instructions(
    model: Llama, tokenizer: Tokenizer, path: str, records: list[Record], batch_size: int
) -> None:
    """Prints the loss on a file's responses, and how many of them the model gives itself.

    It comes last: for the answers, `model` is repacked as sample.py does it.
    """
    limit = model.config.max_position_embeddings
    examples, truncated = encode(records, tokenizer, limit)
    prompts = [encode_asking(record[:-1], tokenizer) for record in records]
    too_long = sum(len(prompt) >= limit for prompt in prompts)
    if too_long:
        raise UserError(
            f"{path}: {too_long} prompts fill the model's context of {limit} tokens; shorten or "
            "remove them"
        )
    loss = response_loss(model, examples, batch_size, f"response loss, {path}")
    prepare_inference(model)
    answers = (len(e.tokens) - len(p) for e, p in zip(examples, prompts, strict=True))
    longest = max(answers)
    matches = exact_match(model, tokenizer, records, longest, batch_size, f"exact match, {path}")
    error = standard_error(matches, len(records))
    print(f"{path}: {len(records)} instructions")
    print(f"  loss a token of the response    {loss:.4f}")
    print(f"  answers equal to the response   {percent(matches, error)}")
    report_truncated(truncated, str(len(records)), "end")


def percent(accuracy: float, error: float) -> str:
    """An accuracy and its standard error in percent."""
    return f"{100 * accuracy:6.2f} ± {100 * error:.2f} %"


def read_options() -> argparse.Namespace:
    """The options of the command, checked."""
    parser = Parser(prog="evals.py", description=__doc__)
    add = parser.add_argument
    add("folder", help="a model folder, a run of train.py or a .gguf file")
    add("--perplexity", metavar="FILE.txt", help="perplexity of a text file")
    add("--window", type=int, help="tokens in a window of --perplexity (2048, or the context)")
    add("--multiple-choice", metavar="FILE.jsonl", help="lines of question, choices, answer")
    add("--mmlu", metavar="PATH", help="the official folder, or JSONL of subject, input, output")
    add("--instructions", metavar="FILE", help="instructions with responses, as train.py's --data")
    add("--shots", type=int, default=0, help="worked examples before each MMLU question (0)")
    add("--batch-size", type=int, default=8, help="sequences at a time (8)")
    add("--device", default=default_device())
    args = parser.parse_args()
    if not (args.perplexity or args.multiple_choice or args.mmlu or args.instructions):
        parser.error(
            "nothing to judge by; give --perplexity, --multiple-choice, --mmlu or --instructions"
        )
    if (args.shots and not args.mmlu) or (args.window is not None and not args.perplexity):
        parser.error("--shots belongs to --mmlu, --window to --perplexity")
    if args.batch_size < 1 or args.shots < 0 or (args.window is not None and args.window < 1):
        parser.error("--batch-size and --window must be at least 1, --shots at least 0")
    return args


def main() -> None:
    """Reads all files, then the model, then judges it."""
    args = read_options()
    text = read_text(args.perplexity) if args.perplexity else None
    if text is not None and not text.strip():
        raise UserError(f"{args.perplexity} is empty; give a file with text in it")
    items = read_json_lines(args.multiple_choice, check_choices) if args.multiple_choice else None
    questions = read_mmlu(args.mmlu, args.shots) if args.mmlu else None
    records = read_records(args.instructions).records if args.instructions else None
    model, tokenizer = load(args.folder, args.device)
    limit = model.config.max_position_embeddings
    if args.window and args.window > limit:
        raise UserError(
            f"--window {args.window} is more than the model's context of {limit} tokens; lower it"
        )
    size = args.batch_size
    if text:
        window = args.window or min(2048, limit)
        judge_perplexity(model, tokenizer, args.perplexity, text, window, size)
    if items:
        judge_multiple_choice(model, tokenizer, args.multiple_choice, items, size)
    if questions:
        judge_mmlu(model, tokenizer, args.mmlu, questions, args.shots, size)
    if records:
        judge_instructions(model, tokenizer, args.instructions, records, size)


if __name__ == "__main__":
    run_command(main, "lower --batch-size")
