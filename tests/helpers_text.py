"""What tests of questions and of conversations share."""

import csv
import json

from hypothesis import strategies as st

from text.instructions import Turn
from text.templates import MARK
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


# Words that mean something to one of the formats or tokenizers, among others
WORDS = ["<|im_end|>", "<|im_start|>assistant\n", "</s>", "<s>", "[/INST]", "<|eot_id|>", "{{ x }}"]
WORDS += ["<|end|>", "### Response:", "Oslo", "é漢", " ", "\n", "  x", MARK, MARK * 2, "{% for %}"]
TEXTS = st.lists(st.sampled_from(WORDS) | st.text("ab \n<|>", max_size=4), max_size=6).map("".join)
SOMETHING = TEXTS.filter(str.strip)


@st.composite
def conversations(draw, system=True):
    """A question and its answer, several times over, perhaps after a system message."""
    record = [Turn("system", draw(SOMETHING))] if system and draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        record += [Turn("user", draw(SOMETHING)), Turn("assistant", draw(SOMETHING))]
    return tuple(record)
