"""A toy world of invented people, in which a tiny model can be pretrained and fine-tuned.

Pretraining documents tell facts about all people. Fine-tuning teaches the form of questions and
answers, with questions about two thirds of them. The test asks about the others: so what was
learned from fine-tuning is the form, and the facts come from pretraining.
"""

import functools
import math
import random
from collections.abc import Callable
from typing import NamedTuple

from text.instructions import Record, alpaca_prompt


class Question(NamedTuple):
    """A prompt, the possible responses, and the index of the true one."""

    prompt: str
    choices: list[str]
    answer: int


class World(NamedTuple):
    """The texts of a toy world; `make_world` says what each is for."""

    documents: Callable[[random.Random], list[str]]
    train: list[Record]
    test: list[Record]
    choices: list[Question]
    heldout: list[str]


# A question, three ways to tell the answer, sixteen values. The words are short and few, as the
# toy's tokenizer has only 512 pieces.
ATTRIBUTES = (
    (
        "Where does {} live?",
        ("{} lives in {}.", "The home of {} is in {}.", "The town of {} is {}."),
        "Oslo Rome Lima Bern Bonn Cork Kobe Linz Lyon Metz Nice Pisa Riga Paris Delhi Turin",
    ),
    (
        "What job does {} have?",
        ("{} works as a {}.", "The job of {} is {}.", "{} is a {}."),
        "baker miner farmer singer potter tanner driver dancer writer weaver barber waiter tailor "
        "sailor cook nurse",
    ),
    (
        "What pet does {} have?",
        ("{} has a {}.", "The pet of {} is a {}.", "At home {} has a {}."),
        "cat dog fox hen goat pony duck frog crab newt toad mouse snake bear hare mole",
    ),
    (
        "What food does {} like?",
        ("{} likes to eat {}.", "The food of {} is {}.", "{} eats {}."),
        "rice soup bread pasta beans tofu pizza honey toast figs corn eggs lamb pie nuts salad",
    ),
    (
        "What colour does {} like?",
        ("{} likes the colour {}.", "The colour of {} is {}.", "{} paints in {}."),
        "red blue green pink grey black white brown gold teal lime rust plum navy cream tan",
    ),
    (
        "What does {} play?",
        ("{} plays the {}.", "The sound of {} is the {}.", "At home {} plays the {}."),
        "piano flute harp drum oboe lute cello horn viola banjo organ bugle gong bell pipe tuba",
    ),
)
FIRST_SYLLABLES = ("Mi", "Ta", "Ko", "Lu", "Ne", "Sa", "Ri", "Do", "Be", "Fu", "Pa", "Vi")
LAST_SYLLABLES = ("ru", "lo", "na", "ki", "mo", "ta", "li", "su")


def make_world(
    seed: int = 0, people: int = 128, attributes: int = len(ATTRIBUTES), values: int = 16
) -> World:
    """A world of `people` invented people with one of `values` values for each attribute.

    documents(rng): texts that tell all facts, one text a person, worded and ordered anew by each
    random.Random. train, test: Records that ask, in Alpaca's template, about two thirds of the
    people and about the others. choices: the test's questions as multiple choice. heldout:
    documents in a wording of their own, for perplexity.
    """
    side = math.ceil((2 * people) ** 0.5)  # half of all pairs of a first and a last name exist
    words = _pairs(FIRST_SYLLABLES, LAST_SYLLABLES, "")
    possible = attributes <= len(ATTRIBUTES) and values <= 16 and 2 * side <= len(words)
    assert possible, (people, attributes, values)
    rng = random.Random(seed)
    words = rng.sample(words, 2 * side)
    names = rng.sample(_pairs(words[:side], words[side:], " "), people)
    options = [text.split()[:values] for _, _, text in ATTRIBUTES[:attributes]]
    facts = {name: [rng.randrange(values) for _ in options] for name in names}
    border = 2 * people // 3
    train = _questions(names[:border], facts, options)
    test = _questions(names[border:], facts, options)
    told = {}
    for name, indices in facts.items():
        told[name] = [words[i] for words, i in zip(options, indices, strict=True)]
    documents = functools.partial(_documents, told)
    heldout = documents(random.Random(f"held out {seed}"))
    return World(documents, _records(train), _records(test), test, heldout)


def _pairs(firsts, lasts, between):
    pairs = []
    for first in firsts:
        pairs += [f"{first}{between}{last}" for last in lasts]
    return pairs


def _questions(names, facts, options):
    questions = []
    for name in names:
        for attribute, answer in enumerate(facts[name]):
            prompt = alpaca_prompt(ATTRIBUTES[attribute][0].format(name))
            choices = [f"{value}." for value in options[attribute]]
            questions.append(Question(prompt, choices, answer))
    return questions


def _records(questions):
    return [Record(question.prompt, question.choices[question.answer]) for question in questions]


def _documents(facts, rng):
    """A document a person: the facts {name: values} in random order, a quarter as question and answer."""
    documents = []
    for name, values in facts.items():
        sentences = []
        for (question, templates, _), value in zip(ATTRIBUTES, values, strict=False):
            if rng.random() < 0.25:
                sentences.append(f"Q: {question.format(name)} A: {value}.")
            else:
                sentences.append(rng.choice(templates).format(name, value))
        documents.append(" ".join(rng.sample(sentences, len(sentences))))
    return rng.sample(documents, len(documents))
