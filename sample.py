"""Text from a model, shown as it is generated.

    python sample.py FOLDER --prompt "Once upon a time"
    python sample.py FOLDER --instruction "Name three primary colours." --temperature 0.7 --seed 1
    python sample.py FOLDER --instruction "Translate into French." --input "The cat sleeps."
    python -m pytest tests/test_sample.py

FOLDER is a model folder (float, quantized, merged), a run of train.py, or a Q4_1 .gguf file.
`--prompt` is shown and continued as it is; `--instruction` and `--input` go into Alpaca's template,
as in fine-tuning, and only the response is shown. Greedy, so the same every time, unless
--temperature is set. Ends at EOS, after --max-new-tokens, or when the context is full.
"""

import argparse
import math
import sys
from collections.abc import Callable, Iterable

import torch

from cli.errors import Parser, UserError, run_command
from cli.machine import default_device
from evals import load
from kernels.int4 import prepare_inference
from llama import Llama, generate
from text.instructions import alpaca_prompt
from text.tokenizer import Tokenizer


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
    tokenizer: Tokenizer,
    prompt: str,
    write: Callable[[str], None],
    echo: bool = False,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> None:
    """Gives `write` the continuation of `prompt` bit by bit, after the prompt itself if `echo`.

    Raises UserError when the prompt leaves no room in the model's context; stops where it is full.
    """
    tokens, limit = tokenizer.encode_prompt(prompt), model.config.max_position_embeddings
    if len(tokens) >= limit:
        raise UserError(
            f"the prompt has {len(tokens)} tokens and fills the model's context of {limit}; "
            "shorten it"
        )
    device = model.model.embed_tokens.weight.device
    add = text_stream(tokenizer.decode if echo else tokenizer.decode_after_space, write)
    add(tokens if echo else [])
    generate(
        model,
        torch.tensor([tokens], device=device),
        min(max_new_tokens, limit - len(tokens)),
        temperature,
        top_p,
        torch.Generator(device).manual_seed(seed),
        tokenizer.stops,
        lambda new_B: add(new_B.tolist()),
    )
    add([], last=True)


def write_stdout(text: str) -> None:
    """Prints a text at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


def read_options() -> argparse.Namespace:
    """The options of the command, checked."""
    parser = Parser(prog="sample.py", description=__doc__)
    add = parser.add_argument
    add("folder", help="a model folder, a run of train.py or a Q4_1 .gguf file")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", help="text to continue")
    what.add_argument("--instruction", help="what to do, put into Alpaca's template")
    add("--input", default="", help="what --instruction is about")
    add("--max-new-tokens", type=int, default=256, help="default 256")
    add("--temperature", type=float, default=0.0, help="0, the default: the likeliest token")
    add("--top-p", type=float, default=1.0, help="draw from the likeliest tokens of this share")
    add("--seed", type=int, default=0, help="the same seed draws the same text; default 0")
    add("--device", default=default_device())
    args = parser.parse_args()
    if args.input and args.instruction is None:
        parser.error("--input belongs to --instruction")
    if args.max_new_tokens < 1 or not 0 <= args.temperature < math.inf or not 0 < args.top_p <= 1:
        parser.error(
            "--max-new-tokens must be at least 1, --temperature at least 0, --top-p above 0 and at "
            "most 1"
        )
    if not 0 <= args.seed < 2**63:
        parser.error(f"--seed {args.seed} is not between 0 and 2**63")
    args.echo = args.instruction is None
    if not args.echo:
        args.prompt = alpaca_prompt(args.instruction, args.input)
    if any("\ud800" <= c <= "\udfff" for c in args.prompt):  # Python's form of invalid UTF-8
        parser.error("the prompt is not UTF-8")
    return args


def main() -> None:
    """Loads a model and prints what it says."""
    args = read_options()
    model, tokenizer = load(args.folder, args.device)
    prepare_inference(model)  # half a minute for a 7b; then a token is 4x faster than dense
    sample(
        model,
        tokenizer,
        args.prompt,
        write_stdout,
        echo=args.echo,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        seed=args.seed,
    )
    print()


if __name__ == "__main__":
    run_command(main, "lower --max-new-tokens, or choose a smaller model")
