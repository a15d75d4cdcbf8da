"""text/toy.py: documents, questions and answers agree, and depend on the seed alone."""

import collections
import random

import pytest
import torch

from text.batches import token_stream
from text.instructions import Turn
from text.templates import alpaca_prompt
from text.toy import make_world


def name_of(record):
    """The person an instruction is about: its capitalised words after the first."""
    return " ".join(word for word in record[0].text.split()[1:] if word[0].isupper())


def test_the_world_has_the_promised_size(toy_world):
    train, test = ({name_of(r) for r in part} for part in (toy_world.train, toy_world.test))
    assert len(train) == 85 and len(test) == 43 and not train & test
    sizes = len(toy_world.train), len(toy_world.test), len(toy_world.choices)
    assert sizes == (85 * 6, 43 * 6, 43 * 6)
    assert {len(question.choices) for question in toy_world.choices} == {16}
    choices = set().union(*(question.choices for question in toy_world.choices))
    assert len(choices) == 96  # so no value belongs to two attributes
    assert all(len(name.split()) == 2 for name in train | test)


def test_choices_ask_what_the_test_asks_and_the_answer_is_among_them(toy_world):
    for record, question in zip(toy_world.test, toy_world.choices, strict=True):
        right = question.choices[question.answer]
        assert question.asked == alpaca_prompt(record[0].text)
        assert record[1:] == (Turn("assistant", right),)


@pytest.mark.parametrize("documents", ["fresh", "heldout"])
def test_every_document_tells_all_about_one_person_and_agrees_with_the_answers(
    toy_world, documents
):
    fresh = toy_world.documents(random.Random(5))
    documents = toy_world.heldout if documents == "heldout" else fresh
    known = collections.defaultdict(set)
    for record in toy_world.train + toy_world.test:
        known[name_of(record)].add(record[1].text.rstrip("."))
    choices = set().union(*(question.choices for question in toy_world.choices))
    values = {choice.rstrip(".") for choice in choices}
    assert len(documents) == len(known) == 128
    for document in documents:
        about = [name for name in known if name in document]
        told = set(document.replace(".", "").split()) & values
        assert len(about) == 1 and told == known.pop(about[0]), document


def test_a_quarter_of_the_facts_are_told_as_question_and_answer(toy_world):
    text = " ".join(" ".join(toy_world.documents(random.Random(seed))) for seed in range(10))
    share = text.count("Q: ") / (10 * 128 * 6)
    assert abs(share - 0.25) < 0.02  # three standard deviations


def test_the_world_depends_on_its_seed_and_on_nothing_else():
    state = random.getstate(), torch.random.get_rng_state()
    one, again, other = make_world(1), make_world(1), make_world(2)
    assert random.getstate() == state[0]
    assert torch.equal(torch.random.get_rng_state(), state[1])
    assert one[1:] == again[1:]
    assert one.documents(random.Random(0)) == again.documents(random.Random(0))
    assert one.test != other.test
    assert one.heldout != one.documents(random.Random(0))


def test_a_world_can_be_larger_and_have_fewer_attributes_and_values():
    world = make_world(0, people=512, attributes=2, values=4)
    assert (len(world.heldout), len(world.train), len(world.test)) == (512, 341 * 2, 171 * 2)
    assert {len(question.choices) for question in world.choices} == {4}


def test_names_are_two_tokens_and_a_document_is_short(toy_world, toy_tokenizer):
    words = set()
    for record in toy_world.train + toy_world.test:
        words |= set(name_of(record).split())
    single = [word for word in words if len(toy_tokenizer.encode(word)) == 1]
    assert len(single) >= 0.9 * len(words), sorted(words - set(single))
    assert len(token_stream(toy_world.heldout, toy_tokenizer)) < 80 * len(toy_world.heldout)
