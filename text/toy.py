"""A toy world of invented people, in which a tiny model can be pretrained and fine-tuned.

Pretraining documents state facts about all people. Fine-tuning asks about two thirds of them, the
test about the others. So a right answer in the test needs both: the facts from pretraining, and the
form of an answer from fine-tuning.
"""

import functools
import itertools
import math
import random
from collections.abc import Callable
from typing import NamedTuple

from text.instructions import Record, Turn
from text.templates import alpaca_prompt


class Question(NamedTuple):
    """A question, the possible answers, and the index of the true one."""

    asked: str
    choices: list[str]
    answer: int


class World(NamedTuple):
    """The texts of a toy world; `make_world` says what each is for."""

    documents: Callable[[random.Random], list[str]]
    train: list[Record]
    test: list[Record]
    choices: list[Question]  # asked in Alpaca's form
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
    """A world of invented people, each with one of `values` values for every attribute.

    documents(rng): texts that state all facts, one text a person; each random.Random words and
    orders them differently. train, test: Records that ask about two thirds of the people and about
    the others. choices: the test's questions as multiple choice, among all
    values. heldout: documents in a wording of their own.
    """
    assert attributes <= len(ATTRIBUTES) and values <= 16, (attributes, values)
    rng = random.Random(seed)
    names = _names(people, rng)
    options = [words.split()[:values] for _, _, words in ATTRIBUTES[:attributes]]
    facts = {name: [rng.randrange(values) for _ in options] for name in names}
    train = _questions(names[: 2 * people // 3], facts, options)
    test = _questions(names[2 * people // 3 :], facts, options)
    told = {name: _chosen(options, indices) for name, indices in facts.items()}
    return World(
        documents=functools.partial(_documents, told),
        train=_records(train),
        test=_records(test),
        choices=[q._replace(asked=alpaca_prompt(q.asked)) for q in test],
        heldout=_documents(told, random.Random(f"held out {seed}")),
    )


def _names(people, rng):
    """Names of `people` people, drawn from all pairs of some first and some last names."""
    side = math.ceil((2 * people) ** 0.5)  # so many first and as many last names: 2 pairs a person
    words = []
    for first in FIRST_SYLLABLES:
        words += [first + last for last in LAST_SYLLABLES]
    assert 2 * side <= len(words), (people, len(words))
    words = rng.sample(words, 2 * side)
    pairs = itertools.product(words[:side], words[side:])
    return rng.sample([f"{first} {last}" for first, last in pairs], people)


def _questions(names, facts, options):
    questions = []
    for name in names:
        for attribute, answer in enumerate(facts[name]):
            asked = ATTRIBUTES[attribute][0].format(name)
            choices = [f"{value}." for value in options[attribute]]
            questions.append(Question(asked, choices, answer))
    return questions


def _chosen(options, indices):
    return [values[index] for values, index in zip(options, indices, strict=True)]


def _records(questions):
    records = []
    for q in questions:
        records.append((Turn("user", q.asked), Turn("assistant", q.choices[q.answer])))
    return records


def _documents(facts, rng):
    """One document a person, from facts {name: values}; a quarter of these as question and answer.

    Sentences and documents come in random order.
    """
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
