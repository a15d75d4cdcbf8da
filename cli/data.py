"""A run's examples: in its format, parted into training and validation, and recognised again."""

import hashlib
import random
from collections.abc import Sequence

from cli import machine
from cli.errors import UserError
from text.batches import Example, encode
from text.instructions import Data
from text.records import read_text
from text.templates import alpaca_template
from text.tokenizer import Tokenizer


def in_format(tokenizer: Tokenizer, template: str | None) -> Tokenizer:
    """The tokenizer with the chat template of a run: of --template, else its own or Alpaca's.

    template: "alpaca" or a file in Jinja. Raises UserError for a file that cannot be read.
    """
    if template is None:
        return tokenizer.with_template(tokenizer.template.source)
    if template == "alpaca":
        return tokenizer.with_template(alpaca_template(bool(tokenizer.bos)))
    return tokenizer.with_template(read_text(template))


def make_examples(
    data: Data, tokenizer: Tokenizer, max_length: int, seed: int
) -> tuple[list[Example], list[Example]]:
    """(training examples, examples held out for validation: a twentieth, at most 200)."""
    records = data.records
    examples, truncated = encode(records, tokenizer, max_length)
    dropped = len(records) - len(examples)
    if machine.RANK == 0:
        without = ""
        if data.left_out:
            without = f", {data.left_out} without an answer left out, first {data.first_left_out}"
        left_out = f", {dropped} of these left out, as no response was left" if dropped else ""
        cut = f"{truncated} longer than {max_length} tokens and cut"
        print(f"data: {len(records)} records in {data.form} form{without}, {cut}{left_out}")
        if data.form != "text":
            alpaca = tokenizer.template.source == alpaca_template(bool(tokenizer.bos))
            print(f"format: {'Alpaca' if alpaca else 'a chat template'}, as sample.py will ask")
    random.Random(seed).shuffle(examples)
    count = min(200, len(examples) // 20)
    if len(examples) <= count:
        raise UserError(
            f"none of the {len(records)} records has room for a response; raise --max-length"
        )
    return examples[count:], examples[:count]


def digest(examples: Sequence[Example]) -> str:
    """A few hexadecimal digits that tell whether these are the same examples in the same order."""
    sha = hashlib.sha256()
    for tokens, learned in examples:
        sha.update(b"%d %b%b" % (len(tokens), tokens.tobytes(), learned.tobytes()))
    return sha.hexdigest()[:12]
