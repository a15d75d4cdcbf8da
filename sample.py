"""Text from a model, shown as it is generated.

    python sample.py FOLDER --prompt "Once upon a time"
    python sample.py FOLDER --instruction "Name three primary colours." --temperature 0.7 --top-p 0.9 --seed 1
    python sample.py FOLDER --instruction "Translate into French." --input "The cat sleeps."
    python -m pytest tests/test_sample.py

FOLDER is a model folder (float, quantized, merged) or a run of train.py. `--prompt` is shown and continued as it is;
`--instruction` and `--input` go into Alpaca's template, as in fine-tuning, and only the response is shown. Greedy, so
the same every time, unless --temperature is set. Ends at EOS, after --max-new-tokens, or when the context is full.
"""

import math
import sys

import torch

from cli import Parser, UserError, run_command
from data import alpaca_prompt, decode
from evals import encode_prompt, load
from int4 import prepare_inference
from llama import generate


def text_stream(tokenizer, write):
    """A function that takes new tokens, time and again, and gives `write` the text they add, as far as it is certain.

    A token has no text of its own: the space before a text's first word is dropped, and a character that is not in
    the vocabulary comes byte by byte. So all tokens are decoded anew each time; the broken characters that half a
    character decodes to are held back until it is whole, or until `last=True` says that nothing more comes.
    """
    tokens, written = [], ""

    def add(new, last=False):
        nonlocal written
        tokens.extend(new)
        text = decode(tokenizer, tokens)
        text = text if last else text.rstrip("\ufffd")
        write(text[len(written):])
        written = text
    return add


def sample(model, tokenizer, prompt, write, echo=False, max_new_tokens=256, temperature=0.0, top_p=1.0, seed=0):
    """Gives `write` the continuation of the text `prompt` bit by bit, after the prompt itself if `echo`.

    Raises UserError when the prompt leaves no room in the model's context; stops where the context is full.
    """
    tokens, limit = encode_prompt(tokenizer, prompt), model.config.max_position_embeddings
    if len(tokens) >= limit:
        raise UserError(f"the prompt has {len(tokens)} tokens and fills the model's context of {limit}; shorten it")
    device = model.model.embed_tokens.weight.device
    add = text_stream(tokenizer, write)
    add(tokens if echo else [])
    generate(model, torch.tensor([tokens], device=device), min(max_new_tokens, limit - len(tokens)), temperature,
             top_p, torch.Generator(device).manual_seed(seed), tokenizer.eos_id(), lambda new_B: add(new_B.tolist()))
    add([], last=True)


def write(text):
    sys.stdout.write(text)
    sys.stdout.flush()


def main():
    parser = Parser(prog="sample.py", description=__doc__)
    parser.add_argument("folder", help="a model folder or a run of train.py")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", help="text to continue")
    what.add_argument("--instruction", help="what the model is told to do, in Alpaca's template")
    parser.add_argument("--input", default="", help="what --instruction is about")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="default 256")
    parser.add_argument("--temperature", type=float, default=0.0, help="0, the default: always the likeliest token")
    parser.add_argument("--top-p", type=float, default=1.0, help="draw from the likeliest tokens of this joint share")
    parser.add_argument("--seed", type=int, default=0, help="the same seed draws the same text; default 0")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    if args.input and args.instruction is None:
        parser.error("--input belongs to --instruction")
    if args.max_new_tokens < 1 or not 0 <= args.temperature < math.inf or not 0 < args.top_p <= 1:
        parser.error("--max-new-tokens must be at least 1, --temperature at least 0, --top-p above 0 and at most 1")
    if not 0 <= args.seed < 2 ** 63:
        parser.error(f"--seed {args.seed} is not between 0 and 2**63")
    prompt = args.prompt if args.instruction is None else alpaca_prompt(args.instruction, args.input)
    if any("\ud800" <= c <= "\udfff" for c in prompt):  # how Python passes on bytes that are no UTF-8
        parser.error("the prompt is not UTF-8")
    model, tokenizer = load(args.folder, args.device)
    prepare_inference(model)  # takes half a minute for a 7b, and each token then takes a quarter of a dense model's time
    sample(model, tokenizer, prompt, write, echo=args.instruction is None, max_new_tokens=args.max_new_tokens,
           temperature=args.temperature, top_p=args.top_p, seed=args.seed)
    print()


if __name__ == "__main__":
    run_command(main, "lower --max-new-tokens, or choose a smaller model")
