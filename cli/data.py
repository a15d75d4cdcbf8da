"""A run's examples: in its format, parted into training and validation, and recognised again."""

import hashlib
import random
from collections.abc import Sequence

from cli import machine
from cli.errors import UserError
from text.batches import Example, encode
from text.instructions import Data, read_records
from text.records import read_text
from text.tokenizer import Tokenizer
from text.toy import World, make_world


def data_of(path: str | None, template: str | None) -> tuple[World | None, Data]:
    """(the toy world or None, the data of a run): the world's, without a path.

    Raises UserError as `read_records` does, and for a template that the data have no use for.
    """
    if path is None:
        world = make_world()
        return world, Data(world.train, "toy world", 0, "")
    data = read_records(path)
    if data.form == "text" and template:
        raise UserError(
            "--template is for conversations, and the data are plain text; leave it out"
        )
    return None, data


def in_format(tokenizer: Tokenizer, template: str | None) -> Tokenizer:
    """The tokenizer with the chat template of a run: of --template, else its own or Alpaca's.

    template: "alpaca" or a file in Jinja. Raises UserError for a file that cannot be read, and for
    a template that does not work.
    """
    source = tokenizer.template.source
    if template == "alpaca":
        source = tokenizer.alpaca_template
    elif template:
        source = read_text(template)
    return tokenizer.with_template(source)


def make_examples(
    data: Data, tokenizer: Tokenizer, max_length: int, seed: int
) -> tuple[list[Example], list[Example]]:
    """(training examples, examples held out for validation: a twentieth, at most 200).

    Raises UserError where no answer has room, and as `encode` does.
    """
    examples, truncated = encode(data.records, tokenizer, max_length)
    if machine.RANK == 0:
        too_long = len(data.records) - len(examples)
        report_data(data, tokenizer, f"{truncated} longer than {max_length} tokens", too_long)
    if not examples:
        raise UserError(
            f"none of the {len(data.records)} records has room for a response; raise --max-length"
        )
    random.Random(seed).shuffle(examples)
    count = min(200, len(examples) // 20)
    return examples[count:], examples[:count]


def report_data(data: Data, tokenizer: Tokenizer, cut: str, too_long: int) -> None:
    """Prints what was read, what was left out of it, and in which format it is learned."""
    unanswered = ""
    if data.left_out:
        unanswered = f", {data.left_out} without an answer left out (the first: "
        unanswered += f"{data.first_left_out})"
    left_out = f", {too_long} of these left out, as no response was left" if too_long else ""
    found = f"{len(data.records)} records in {data.form} form{unanswered}"
    print(f"data: {found}, {cut} and cut{left_out}")
    if data.form != "text":
        is_alpaca = tokenizer.template.source == tokenizer.alpaca_template
        print(f"format: {'Alpaca' if is_alpaca else 'a chat template'}, as sample.py will ask")


def digest(examples: Sequence[Example]) -> str:
    """A few hexadecimal digits that tell whether these are the same examples in the same order."""
    sha = hashlib.sha256()
    for tokens, learned in examples:
        sha.update(b"%d %b%b" % (len(tokens), tokens.tobytes(), learned.tobytes()))
    return sha.hexdigest()[:12]
