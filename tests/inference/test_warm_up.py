"""Warm-up with a real two-layer GGUF file in llama.cpp: what it remembers, and that it gives way."""

from __future__ import annotations

import threading
import time

import pytest

from emergency_kit.data.format import build_messages
from emergency_kit.inference import warm_up
from emergency_kit.inference.llama_engine import LlamaEngine
from emergency_kit.knowledge.cards import load_cards

CARDS = dict(list(load_cards().items())[:8])


@pytest.fixture
def engine(gguf):
    engine = LlamaEngine(gguf, slots=2, threads=1)
    yield engine
    engine.close()


def ask(engine, card, tokens=2, country="GB"):
    stream = engine.stream(build_messages(f"please help, {card.also_called[0]}", [card], country=country), tokens)
    list(stream)
    return stream


def test_a_beginning_is_all_of_a_prompt_before_the_situation(engine):
    for card, beginning in zip(CARDS.values(), warm_up.card_beginnings(engine, CARDS, "GB")):
        prompt = engine.encode(build_messages(f"please help, {card.also_called[0]}", [card], country="GB"))
        assert prompt[:len(beginning)] == beginning
        assert len(engine.encode(build_messages("", [card], country="GB"))) - len(beginning) < 12


def test_after_it_the_first_answer_about_every_hazard_computes_its_situation_alone(engine, gguf):
    beginnings = list(warm_up.card_beginnings(engine, CARDS, "GB"))
    cold = {card.id: ask(engine, card).cached_tokens for card in CARDS.values()}
    warm = LlamaEngine(gguf, slots=2, threads=1)
    assert warm_up.warm_up(warm, CARDS, "GB") == len(CARDS)
    for card, beginning in zip(CARDS.values(), beginnings):
        assert ask(warm, card).cached_tokens >= len(beginning) > cold[card.id]
    # Another country's number stands in the card: what comes before it is still not computed again.
    assert all(ask(warm, card, country="FR").cached_tokens > cold[card.id] for card in CARDS.values())
    warm.close()


def test_answers_are_the_same_with_and_without(gguf):
    """One at a time, since answers beside each other round otherwise."""
    prompts = [build_messages("please help", [card]) for card in CARDS.values()]
    answers = []
    for warm in (False, True):
        engine = LlamaEngine(gguf, slots=1, threads=1)
        if warm:
            assert warm_up.warm_up(engine, CARDS) == len(CARDS)
        answers.append(engine.generate(prompts, 12))
        engine.close()
    assert answers[0] == answers[1]


def test_it_gives_way_to_whoever_asks_and_goes_on_afterwards(engine):
    """Whoever asks one question after another is never two seconds idle."""
    card, last = list(CARDS.values())[0], list(CARDS.values())[-1]
    stream = engine.stream(build_messages("my house is on fire", None), 100)
    next(stream)
    thread = warm_up.start_warm_up(engine, CARDS, "GB")
    list(stream)
    until = time.monotonic() + 3
    while time.monotonic() < until:
        list(engine.stream(build_messages("my house is on fire", None), 20))
    assert thread.is_alive()
    thread.join(60)
    assert not thread.is_alive() and ask(engine, last).cached_tokens > 150 and ask(engine, card).cached_tokens > 150


def test_what_is_stopped_on_the_way_is_not_remembered(engine):
    prompt = next(warm_up.card_beginnings(engine, CARDS, "GB"))
    assert not engine.remember(prompt, lambda: True) and engine.remember(prompt, lambda: False)
    engine.close()
    assert not engine.remember(prompt, lambda: False)


def test_closing_the_engine_ends_it(gguf):
    engine = LlamaEngine(gguf, slots=1, threads=1)
    thread = warm_up.start_warm_up(engine, load_cards())
    time.sleep(0.2)
    engine.close()
    thread.join(10)
    assert not thread.is_alive() and not [other for other in threading.enumerate() if other.name == "warm-up"]


def test_a_slow_model_is_left_alone_after_its_first_card(engine, monkeypatch):
    monkeypatch.setattr(warm_up, "SLOW_SECONDS", 0.0)
    assert warm_up.warm_up(engine, CARDS) == 1


def test_an_engine_in_pytorch_has_nothing_to_warm_up():
    assert warm_up.start_warm_up(object(), CARDS) is None
