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


def test_answers_are_the_same_with_and_without(engine, gguf):
    prompts = [build_messages("please help", [card]) for card in CARDS.values()]
    plain = engine.generate(prompts, 12)
    warm = LlamaEngine(gguf, slots=2, threads=1)
    warm_up.warm_up(warm, CARDS)
    assert warm.generate(prompts, 12) == plain
    warm.close()


def test_it_gives_way_to_whoever_asks_and_goes_on_afterwards(engine, monkeypatch):
    monkeypatch.setattr(warm_up, "IDLE_SECONDS", 0.3)
    stream = engine.stream(build_messages("my house is on fire", None), 400)
    next(stream)
    thread = warm_up.start_warm_up(engine, CARDS, "GB")
    time.sleep(0.5)
    assert engine.idle_seconds() == 0 and not engine.remember(engine.encode(build_messages("fire", None)), lambda: engine.idle_seconds() == 0)
    assert thread.is_alive()
    stream.close()
    thread.join(60)
    last = list(CARDS.values())[-1]
    assert not thread.is_alive() and ask(engine, last).cached_tokens > 150


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
