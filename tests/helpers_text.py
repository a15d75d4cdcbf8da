"""What tests of questions share."""

import csv
import json

from text.tokenizer import JSON, MODEL, make_tokenizer


def write_mmlu(path, rows):
    """Writes {"dev/anatomy_dev.csv": rows, ...} as the official CSV files; returns the folder."""
    for name, content in rows.items():
        (path / name).parent.mkdir(exist_ok=True)
        with (path / name).open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(content)
    return path


def with_files(tokenizer, **beside):
    """A tokenizer with other files beside its own: names without .json, and what they hold."""
    name = MODEL if MODEL in tokenizer.files else JSON
    files = {name: tokenizer.files[name]}
    for other, content in beside.items():
        files[f"{other}.json"] = json.dumps(content).encode()
    return make_tokenizer(files, name)


def harness_pair(encode, context, continuation):
    """(context, continuation) in tokens by lm-evaluation-harness's rule, `_encode_pair`."""
    spaces = len(context) - len(context.rstrip())
    if spaces:
        context, continuation = context[:-spaces], context[-spaces:] + continuation
    before = encode(context)
    return before, encode(context + continuation)[len(before) :]
