"""A run's examples: made of records, parted into training and validation, and recognised again."""

import hashlib
import random
from collections.abc import Sequence

from cli import machine
from cli.errors import UserError
from text.batches import Example, encode
from text.instructions import Record
from text.tokenizer import Tokenizer


def make_examples(
    records: list[Record], form: str, tokenizer: Tokenizer, max_length: int, seed: int
) -> tuple[list[Example], list[Example]]:
    """(training examples, examples held out for validation: a twentieth, at most 200)."""
    examples, truncated = encode(records, tokenizer, max_length)
    dropped = len(records) - len(examples)
    if machine.RANK == 0:
        left_out = f", {dropped} of these left out, as no response was left" if dropped else ""
        cut = f"{truncated} longer than {max_length} tokens and cut"
        print(f"data: {len(records)} records in {form} form, {cut}{left_out}")
    random.Random(seed).shuffle(examples)
    count = min(200, len(examples) // 20)
    if len(examples) <= count:
        raise UserError(
            f"none of the {len(records)} records has room for a response; raise --max-length"
        )
    return examples[count:], examples[:count]


def digest(examples: Sequence[Example]) -> str:
    """A few hexadecimal digits that tell whether these are the same examples in the same order."""
    parts = [b"%d %b" % (e.prompt_length, e.tokens.tobytes()) for e in examples]
    return hashlib.sha256(b"".join(parts)).hexdigest()[:12]
