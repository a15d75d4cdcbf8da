"""Text from a model, shown as it is generated.

    python sample.py FOLDER --prompt "Once upon a time"
    python sample.py FOLDER --instruction "Name three primary colours." --temperature 0.7 --seed 1
    python sample.py FOLDER --instruction "Translate into French." --input "The cat sleeps."
    python sample.py FOLDER --chat --system "Be brief."   one turn after another, until Ctrl-D
    python -m pytest tests/test_sample.py

FOLDER is a model folder (float, quantized, merged), a run of train.py, or a .gguf file.
`--prompt` is shown and continued as it is. `--instruction` and `--chat` ask in the format that the
model was fine-tuned in, or else in its own chat template, or in Alpaca's; only the answer is shown.
A chat that outgrows the model's context loses its first turns. Greedy, so the same every time,
unless --temperature is set. Ends at EOS or an answer's end, after --max-new-tokens, or when the
context is full.
"""

import argparse
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch

from cli.errors import Parser, UserError, run_command
from cli.machine import default_device
from evals import load
from kernels.int4 import prepare_inference
from llama import Llama, generate
from text.batches import encode_asking
from text.instructions import Turn
from text.tokenizer import Tokenizer

NOT_UTF8 = "the prompt is not UTF-8; type it in a terminal that is set to UTF-8"


def text_stream(decode: Callable[[list[int]], str], write: Callable[[str], None]) -> Callable:
    """A function that takes new tokens and gives `write` the text they add, once it is certain.

    A token has no text of its own: the space before a text's first word is dropped, and a character
    that is not in the vocabulary comes byte by byte. So all tokens are decoded every time. Half a
    character is held back until it is whole, or until `last=True` says that nothing more comes.
    """
    tokens, written = [], ""

    def add(new: Iterable[int], last: bool = False):
        nonlocal written
        tokens.extend(new)
        text = decode(tokens)
        if not last:
            text = text.rstrip("\ufffd")
        write(text[len(written) :])
        written = text

    return add


def sample(
    model: Llama,
    tokens: Sequence[int],
    add: Callable,
    ends: Sequence[int],
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> None:
    """Gives `add`, of `text_stream`, each token that follows `tokens`, up to one of `ends`.

    Raises UserError when `tokens` leave no room in the model's context; stops where it is full.
    """
    limit = model.config.max_position_embeddings
    if len(tokens) >= limit:
        raise UserError(
            f"the prompt has {len(tokens)} tokens and fills the model's context of {limit}; "
            "shorten it"
        )
    device = model.model.embed_tokens.weight.device
    generate(
        model,
        torch.tensor([list(tokens)], device=device),
        min(max_new_tokens, limit - len(tokens)),
        temperature,
        top_p,
        torch.Generator(device).manual_seed(seed),
        ends,
        lambda new_B: add(new_B.tolist()),
    )
    add([], last=True)


def continue_text(
    model: Llama, tokenizer: Tokenizer, prompt: str, write: Callable[[str], None], **options
) -> None:
    """Gives `write` the prompt and what follows it; `options` are those of `sample`."""
    tokens = tokenizer.encode_prompt(prompt)
    add = text_stream(tokenizer.decode, write)
    add(tokens)
    sample(model, tokens, add, tokenizer.stops, **options)


def answer(
    model: Llama,
    tokenizer: Tokenizer,
    turns: Sequence[Turn],
    write: Callable[[str], None],
    **options,
) -> str:
    """Gives `write` the answer to a conversation so far, and returns it."""
    said = []

    def both(text):
        said.append(text)
        write(text)

    tokens = encode_asking(turns, tokenizer)
    add = text_stream(tokenizer.decode_answer, both)
    sample(model, tokens, add, tokenizer.answer_ends, **options)
    return "".join(said)


def chat(
    model: Llama,
    tokenizer: Tokenizer,
    questions: Iterable[str],
    write: Callable[[str], None],
    system: Sequence[Turn] = (),
    max_new_tokens: int = 256,
    **options,
) -> None:
    """Answers one question after another, each with all that was said before it.

    system: what comes before the first question, one turn or none.
    When less than half the context (or than `max_new_tokens`, if that is less) would be left for an
    answer, the first question and its answer are forgotten. Of a question that fills the context
    alone only the error is printed.
    """
    turns, limit = [], model.config.max_position_embeddings
    for question in questions:
        turns.append(Turn("user", question))
        room = limit - min(max_new_tokens, limit // 2)
        while len(turns) > 1 and len(encode_asking([*system, *turns], tokenizer)) > room:
            del turns[:2]
        so_far = [*system, *turns]
        try:
            said = answer(model, tokenizer, so_far, write, max_new_tokens=max_new_tokens, **options)
        except UserError as e:  # the question alone is too long
            print(f"error: {e}", file=sys.stderr)
            turns.clear()
            continue
        turns.append(Turn("assistant", said))
        write("\n")


def typed_questions() -> Iterator[str]:
    """What the user types, line by line, until the input ends; empty lines are no questions."""
    while True:
        try:
            question = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        except UnicodeDecodeError:
            raise UserError(NOT_UTF8) from None
        check_utf8(question)
        if question.strip():
            yield question


def check_utf8(text: str) -> None:
    """Raises UserError for a text that came from bytes that are not UTF-8."""
    if any("\ud800" <= c <= "\udfff" for c in text):  # Python's form of them
        raise UserError(NOT_UTF8)


def write_stdout(text: str) -> None:
    """Prints a text at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


def read_options() -> argparse.Namespace:
    """The options of the command, checked."""
    parser = Parser(prog="sample.py", description=__doc__)
    add = parser.add_argument
    add("folder", help="a model folder, a run of train.py or a .gguf file")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", help="text to continue")
    what.add_argument("--instruction", help="what to do, asked as the model was trained")
    what.add_argument("--chat", action="store_true", help="answer what is typed, turn by turn")
    add("--input", default="", help="what --instruction is about")
    add("--system", help="a system message, before --instruction or --chat")
    add("--max-new-tokens", type=int, default=256, help="default 256")
    add("--temperature", type=float, default=0.0, help="0, the default: the likeliest token")
    add("--top-p", type=float, default=1.0, help="draw from the likeliest tokens of this share")
    add("--seed", type=int, default=0, help="the same seed draws the same text; default 0")
    add("--device", default=default_device())
    args = parser.parse_args()
    if args.input and args.instruction is None:
        parser.error("--input belongs to --instruction")
    if args.system and args.prompt is not None:
        parser.error("--system belongs to --instruction and --chat")
    if args.max_new_tokens < 1 or not 0 <= args.temperature < math.inf or not 0 < args.top_p <= 1:
        parser.error(
            "--max-new-tokens must be at least 1, --temperature at least 0, --top-p above 0 and at "
            "most 1"
        )
    if not 0 <= args.seed < 2**63:
        parser.error(f"--seed {args.seed} is not between 0 and 2**63")
    check_utf8(f"{args.prompt or ''}{args.instruction or ''}{args.input}{args.system or ''}")
    return args


def main() -> None:
    """Loads a model and prints what it says."""
    args = read_options()
    model, tokenizer = load(args.folder, args.device)
    prepare_inference(model)  # half a minute for a 7b; then a token is 4x faster than dense
    options = {
        "max_new_tokens": args.max_new_tokens,
        "temperature": args.temperature,
        "top_p": args.top_p,
        "seed": args.seed,
    }
    system = [Turn("system", args.system)] if args.system else []
    if args.chat:
        chat(model, tokenizer, typed_questions(), write_stdout, system, **options)
        return
    if args.prompt is not None:
        continue_text(model, tokenizer, args.prompt, write_stdout, **options)
    else:
        turns = [*system, Turn("user", args.instruction, args.input)]
        answer(model, tokenizer, turns, write_stdout, **options)
    print()


if __name__ == "__main__":
    run_command(main, "lower --max-new-tokens, or choose a smaller model")
