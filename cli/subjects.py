"""What compare.py compares the methods on: worlds of invented people, or a real language model.

A subject is a class whose values hold its settings and fit into JSON. It has

    prepare(seed)               does what all jobs of a seed share; a second call finds it done
    material(seed, choosing)    what one job works with
    folder(seed)                where what is made of a seed's base is kept
    describe()                  what tells one subject from another

`choosing` means that a learning rate is chosen: what is tuned on and judged by is then apart from
the test.
"""

import copy
import dataclasses
import functools
import hashlib
import pathlib
import sys
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

import evals
import formats
from baselines import NF4Linear, frozen_linear
from cli.errors import UserError
from cli.machine import compute_dtype
from cli.toy import pretrain, toy_calibration
from llama import Llama, LlamaConfig, load_pretrained
from quant import QuantLinear
from text.batches import Example, calibration_windows, encode, token_stream
from text.instructions import Record, read_records
from text.questions import check_choices, read_json_lines
from text.records import read_text
from text.tokenizer import Tokenizer, load_tokenizer
from text.toy import ATTRIBUTES, World, make_world

BASES = pathlib.Path("runs/compare-bases")
VERSION = 1  # one more when jobs give other numbers, by this file or by GPTQ: then none is reused
MAX_LENGTH = 512  # tokens of an example
CALIBRATION_TOKENS = 2**14


class Material(NamedTuple):
    """What one job works with."""

    model: Llama  # in float
    examples: list[Example]  # to fine-tune on
    calibration: Tensor  # [N, T] tokens for GPTQ
    judge: Callable[[Llama], dict]  # metrics of a deployed model; when choosing only its loss


# ---- worlds of invented people


@dataclasses.dataclass(frozen=True)
class Toy:
    """A world, a tokenizer and a pretrained base for every seed."""

    model: dict  # of the bases: fields of LlamaConfig
    people: int  # in a world
    pretraining: dict  # steps, lr, batch_size, length, warmup: see cli.toy.pretrain

    def describe(self) -> dict:
        """What tells one from another."""
        return {**dataclasses.asdict(self), "version": VERSION}

    def folder(self, seed: int) -> pathlib.Path:
        """Where the base of a seed is kept."""
        made = (VERSION, *self.model.values(), self.people, *self.pretraining.values(), seed)
        return BASES / "-".join(str(number) for number in made)

    def prepare(self, seed: int) -> None:
        """Pretrains the base of a seed."""
        folder = self.folder(seed)
        if not (folder / "config.json").exists():
            world = make_world(seed, self.people)
            pretrain(world, folder, LlamaConfig(**self.model), seed=seed, **self.pretraining)

    def material(self, seed: int, choosing: bool) -> Material:
        """The same examples whether choosing or not: the last quarter of the people chooses."""
        folder, world = self.folder(seed), make_world(seed, self.people)
        tokenizer, model = load_tokenizer(folder), load_pretrained(folder)
        records = split(world)[0]
        shown = toy_calibration(world._replace(train=records))
        context = model.config.max_position_embeddings
        return Material(
            model,
            encode(records, tokenizer, MAX_LENGTH)[0],
            calibration_windows(shown, tokenizer, context, CALIBRATION_TOKENS),
            functools.partial(judge_toy, tokenizer, world, choosing),
        )


def split(world: World) -> tuple[list[Record], list[Record]]:
    """(records to fine-tune on, records to choose by): the last quarter of the people is apart."""
    people = len(world.train) // len(ATTRIBUTES)
    border = (people - people // 4) * len(ATTRIBUTES)
    return world.train[:border], world.train[border:]


def judge_toy(tokenizer: Tokenizer, world: World, choosing: bool, model: Llama) -> dict:
    """The metrics of a deployed model: on the validation people when choosing, else on the test."""
    if choosing:
        examples = encode(split(world)[1], tokenizer, MAX_LENGTH)[0]
        return {"loss": evals.response_loss(model, examples, 64)}
    stream = token_stream(world.heldout, tokenizer)
    choices = evals.multiple_choice(model, tokenizer, world.choices, 256)
    return {
        "exact_match": evals.exact_match(model, tokenizer, world.test, 8),
        "multiple_choice": choices["accuracy"],
        "perplexity": evals.perplexity(model, stream, 64, None, 64),
    }


# ---- a real language model

HELD_OUT = 100  # records of the test, and as many to choose by
PERPLEXITY_TOKENS = 2**15
WINDOW = 2048
# Questions that begin so have many right answers
OPEN = ("Create", "Define", "Describe", "Generate", "Give", "Name", "Provide", "Rewrite")


@dataclasses.dataclass(frozen=True)
class Real:
    """A language model, instructions to fine-tune it on, and a text and questions beside them.

    The last 100 records are the test; when choosing, the 100 before them stand in for it.
    """

    files: dict[str, str]  # weights, data, text, choices: where they are
    digests: dict[str, str]  # of each, and of the tokenizer with its chat template
    arithmetic: str  # bfloat16 where the processor has it, else float32

    def folder(self, seed: int) -> pathlib.Path:
        """Where what is made of the model is kept; the same for every seed."""
        made_of = [self.digests[what][:12] for what in ("weights", "tokenizer", "data")]
        return BASES / "-".join((str(VERSION), *made_of, self.arithmetic))

    def prepare(self, seed: int) -> None:
        """Nothing: the model is there."""

    def material(self, seed: int, choosing: bool) -> Material:
        """While choosing, 100 examples fewer; GPTQ is calibrated on those of both.

        Raises UserError when a file has changed: a comparison takes hours, and every job reads.
        """
        self.check_unchanged()
        tuning, validation, test = cut(read_records(self.files["data"]).records)
        tokenizer, model = formats.load_tokenizer(self.files["weights"]), self.float_model()
        context = model.config.max_position_embeddings
        calibration = calibration_windows(tuning, tokenizer, context, CALIBRATION_TOKENS)
        length = min(MAX_LENGTH, context)
        if choosing:
            judge = functools.partial(judge_choice, encode(validation, tokenizer, length)[0])
        else:
            judge, tuning = self.judge_of(tokenizer, test, context), tuning + validation
        return Material(model, encode(tuning, tokenizer, length)[0], calibration, judge)

    def check_unchanged(self) -> None:
        """Raises UserError when a file is not what it was at the start."""
        for what, digest in digests_of(self.files).items():
            if digest != self.digests[what]:
                path = self.files.get(what, self.files["weights"])  # the tokenizer comes with them
                raise UserError(f"{path} has changed since the comparison began; begin it again")

    def float_model(self) -> Llama:
        """The model with weights of 16 bits, in the dtype of `arithmetic`."""
        model = in_float(formats.load_model(self.files["weights"]).float()).bfloat16()
        return model.to(getattr(torch, self.arithmetic))

    def judge_of(self, tokenizer: Tokenizer, records: list[Record], context: int) -> Callable:
        """The function that judges a job's deployed models; all files are read here, once."""
        length = min(MAX_LENGTH, context)
        examples = encode(records, tokenizer, length)[0]
        with_one_answer = comparable(records, tokenizer, length)
        tokens = tokenizer.encode_prompt(read_text(self.files["text"]))[: PERPLEXITY_TOKENS + 1]
        choices = read_json_lines(self.files["choices"], check_choices)

        def judge(model):
            model = in_float(copy.deepcopy(model))
            matches = evals.greedy_matches(model, with_one_answer)
            chosen = evals.multiple_choice(model, tokenizer, choices, 64)
            return {
                "loss": evals.response_loss(model, examples),
                "exact_match": sum(matches) / len(matches),
                "perplexity": evals.perplexity(model, tokens, min(WINDOW, context)),
                "multiple_choice": chosen["normalized"],
            }

        return judge

    def describe(self) -> dict:
        """What tells one from another, wherever its files are."""
        names = {what: pathlib.Path(path).name for what, path in self.files.items()}
        facts = {"digests": self.digests, "arithmetic": self.arithmetic, "version": VERSION}
        return {"files": names, **facts}


def real(weights: str, data: str, text: str, choices: str) -> Real:
    """The subject in these files; prints what of them is cut. UserError where one cannot serve."""
    found = read_records(data)
    if found.form == "text" or len(found.records) < 3 * HELD_OUT:
        have = f"is {found.form}" if found.form == "text" else f"has {len(found.records)} records"
        raise UserError(f"{data} {have}; give {3 * HELD_OUT} or more questions with answers")
    if found.left_out:
        first = found.first_left_out
        print(f"{data}: {found.left_out} records without an answer left out (the first: {first})")
    formats.check(weights)
    config, tokenizer = formats.read_config(weights), formats.load_tokenizer(weights)
    tokenizer.check_fits(config.vocab_size, weights)
    context = config.max_position_embeddings
    check_examples(data, found.records, tokenizer, min(MAX_LENGTH, context))
    check_text(text, tokenizer)
    check_questions(choices, tokenizer, context)
    files = {"weights": weights, "data": data, "text": text, "choices": choices}
    dtype = compute_dtype(torch.bfloat16, "cpu")
    return Real(files, digests_of(files), str(dtype).removeprefix("torch."))


def check_examples(path: str, records: list[Record], tokenizer: Tokenizer, length: int) -> None:
    """Prints how many records are cut; UserError where too few have an answer within `length`."""
    purposes = ("to tune on", "to choose learning rates by", "of the test")
    for purpose, part in zip(purposes, cut(records), strict=True):
        examples, truncated = encode(part, tokenizer, length)
        of_them = f"{len(part)} records {purpose}"
        if 2 * len(examples) < len(part):
            raise UserError(
                f"{path}: only {len(examples)} of the {of_them} have an answer within {length} "
                "tokens; give shorter ones"
            )
        if truncated:
            too_long = f"{truncated} are longer than {length} tokens and cut"
            print(f"{path}: of the {of_them}, {too_long}, {len(part) - len(examples)} left out")
    if not comparable(cut(records)[2], tokenizer, length):
        raise UserError(
            f"{path}: of its last {HELD_OUT} questions, exact match is taken of those that fit "
            f"into {length} tokens and do not begin with {', '.join(OPEN)}; there are none"
        )


def check_text(path: str, tokenizer: Tokenizer) -> None:
    """Says where a text is short; UserError where there is none."""
    text = read_text(path)
    count = len(tokenizer.encode_prompt(text)) - 1
    if not text.strip() or count < 1:
        raise UserError(f"{path} is empty; give a file with text in it")
    if count < PERPLEXITY_TOKENS:
        print(f"{path} is short: the perplexity is that of {count:,} tokens")


def check_questions(path: str, tokenizer: Tokenizer, context: int) -> None:
    """Raises UserError for a file that holds no questions, or choices longer than the context."""
    items = read_json_lines(path, check_choices)
    for number, (question, choices, _) in enumerate(items, 1):
        encoded = evals.encode_choices(tokenizer, question, choices)
        try:
            evals.fit(number, *encoded, context, len(tokenizer.bos))
        except UserError as e:
            raise UserError(f"{path}, {e}") from None


def digests_of(files: dict[str, str]) -> dict[str, str]:
    """What tells each file's content from another, and that of the tokenizer and its template."""
    tokenizer = formats.load_tokenizer(files["weights"])
    says = tokenizer.digest() + tokenizer.template.source
    digests = {"weights": formats.fingerprint(files["weights"]), "tokenizer": sha256(says.encode())}
    for what in ("data", "text", "choices"):
        digests[what] = sha256(pathlib.Path(files[what]).read_bytes())
    return digests


def sha256(content: bytes) -> str:
    """In hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()


def cut(records: list[Record]) -> tuple[list[Record], list[Record], list[Record]]:
    """(records to fine-tune on, to choose by, of the test)."""
    return records[: -2 * HELD_OUT], records[-2 * HELD_OUT : -HELD_OUT], records[-HELD_OUT:]


def closed(records: list[Record]) -> list[Record]:
    """Those that may be compared word by word: their questions do not begin as open ones do."""
    return [record for record in records if not record[-2].text.startswith(OPEN)]


def comparable(records: list[Record], tokenizer: Tokenizer, length: int) -> list[Example]:
    """The examples of closed questions, without those that are longer than `length` tokens."""
    examples, _ = encode(closed(records), tokenizer, sys.maxsize)
    return [example for example in examples if len(example.tokens) <= length]


def judge_choice(examples: list[Example], model: Llama) -> dict:
    """The loss on the examples to choose by."""
    return {"loss": evals.response_loss(in_float(copy.deepcopy(model)), examples)}


def in_float(model: Llama) -> Llama:
    """Replaces packed linear layers by dense ones that compute the same, in place."""
    packed, dtype = (QuantLinear, NF4Linear), model.model.embed_tokens.weight.dtype
    for name, layer in [(n, m) for n, m in model.named_modules() if isinstance(m, packed)]:
        model.set_submodule(name, frozen_linear(layer.dequantize().to(dtype)))
    return model
