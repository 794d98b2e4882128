"""The grammar without a model: random walks over what it allows, and every taught answer through it."""

import random

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from emergency_kit.data.format import SECTIONS, Answer, read_answer, render_answer
from emergency_kit.errors import ModelError
from emergency_kit.inference.grammar import ITEMS, Constraint, bound_line, build_grammar, build_tokenizer, check_grammar
from emergency_kit.knowledge.cards import load_cards
from tests.tiny import BUNDLED

NEW = 2048


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(BUNDLED)


@pytest.fixture(scope="module")
def vocabulary(tokenizer):
    return build_tokenizer(tokenizer, len(tokenizer), {tokenizer.eos_token_id})


def constrain(tokenizer, vocabulary, grammar):
    return Constraint(vocabulary, grammar, tokenizer.decode, {tokenizer.eos_token_id})


def walk(tokenizer, vocabulary, grammar, choose):
    """Ids of one walk: `choose` picks among the allowed tokens until the end token, or a limit far above every bound."""
    constraint, ids = constrain(tokenizer, vocabulary, grammar), []
    logits = torch.zeros(len(tokenizer))
    while len(ids) < 20_000:
        token = choose(numpy.flatnonzero(constraint.mask(logits).numpy() == 0), len(ids))
        if token == tokenizer.eos_token_id:
            return ids
        ids.append(int(token))
        constraint.take(int(token))
        if constraint.stopped:
            return ids
    raise AssertionError("no end")


@pytest.mark.parametrize("seed", range(6))
def test_any_walk_is_a_valid_answer(tokenizer, vocabulary, seed):
    draw = random.Random(seed)
    text = tokenizer.decode(walk(tokenizer, vocabulary, build_grammar(NEW), lambda allowed, _: draw.choice(allowed)))
    parsed = read_answer(text)
    assert parsed.valid, (parsed.problems, text[-200:])
    assert render_answer(parsed.answer) == text


def test_the_longest_walk_ends_within_the_limit_and_is_valid(tokenizer, vocabulary):
    """A model that never wants to end: it always takes a letter where one is allowed, and never the end token."""
    letters = [tokenizer.encode(letter)[0] for letter in "abcdefghijklmnopqrstuvwxyz"]

    def choose(allowed, step):
        letter = random.Random(step).choice(letters)
        going_on = allowed[allowed != tokenizer.eos_token_id]
        return letter if letter in allowed else going_on[0] if len(going_on) else allowed[0]

    ids = walk(tokenizer, vocabulary, build_grammar(NEW), choose)
    parsed = read_answer(tokenizer.decode(ids))
    assert parsed.valid and len(ids) <= NEW
    assert {section: len(getattr(parsed.answer, section)) for section in SECTIONS} == ITEMS


@settings(max_examples=40, deadline=None)
@given(card=st.sampled_from([card for card in load_cards().values()]), said=st.text("ab \"'\\{}[]•0123456789.%°é-,", min_size=1, max_size=20).filter(lambda text: text == text.strip() and text))
def test_what_cards_and_people_say_is_never_forbidden(tokenizer, vocabulary, card, said):
    """Numbers, doses, quotes, brackets: the grammar lets every taught line through, token by token."""
    steps = tuple(dict.fromkeys([*(action.text for action in card.critical_actions), *(rule.text for rule in card.never), f"Take {said} now, 10.5 mg at 112 °C."]))
    answer = Answer((f"They said: {said}",), card.uncertainties, card.dangers, steps)
    text = render_answer(answer)
    constraint = constrain(tokenizer, vocabulary, build_grammar(NEW))
    for token in [*tokenizer.encode(text), tokenizer.eos_token_id]:
        assert constraint.allows(token) or constraint.stopped, (tokenizer.decode([token]), text)
        constraint.take(token)


def test_no_taught_line_reaches_the_bound(tokenizer):
    lines = [line for card in load_cards().values() for line in (*(action.text for action in card.critical_actions), *(action.instead for action in card.critical_actions if action.instead),
                                                                 *(rule.text for rule in card.never), *card.dangers, *card.uncertainties)]
    assert max(len(tokenizer.encode(line)) for line in lines) <= 30 < bound_line(NEW)


def test_a_grammar_that_cannot_be_read_is_an_error():
    with pytest.raises(ModelError, match="grammar: .*nowhere"):
        check_grammar("start: nowhere")
    check_grammar(build_grammar(300))
