"""Known questions: three reports whose prompts and first words are recorded when a kit is packed, and asked again where it runs.

In: an engine and a retriever. Out: self_test.json; what differs from it. The prompt must be the same byte for byte; of an answer the first
letters are compared, since another processor may round differently later on.
"""

from __future__ import annotations

import hashlib
from typing import Any, Mapping

from emergency_kit.data.format import build_messages, shown_cards
from emergency_kit.data.template import render_prompt
from emergency_kit.inference.grammar import build_grammar
from emergency_kit.inference.llama_engine import LlamaEngine
from emergency_kit.knowledge.cards import Card
from emergency_kit.knowledge.retrieve import Retriever

QUESTIONS = (("the oil in my pan is on fire", "GB"), ("he is not breathing and does not answer", "US"), ("a snake bit my foot", ""))
ANSWER_TOKENS, SAME_LETTERS = 20, 32


def prompt_text(engine: LlamaEngine, messages: list[dict[str, str]]) -> str:
    """The prompt as text that llama.cpp splits into the very tokens of `engine.encode`: without the BOS where llama.cpp writes it."""
    text = render_prompt(engine.tokenizer, messages)
    if engine.tokenizer(text).input_ids == engine.encode(messages):
        return text
    bos = engine.tokenizer.bos_token
    assert text.startswith(bos) and engine.tokenizer(text.removeprefix(bos)).input_ids == engine.encode(messages), text[:80]
    return text.removeprefix(bos)


def record(engine: LlamaEngine, cards: Mapping[str, Card], top_k: int, grounded: bool) -> dict[str, Any]:
    """What this model says to the known questions."""
    return {"tokens": ANSWER_TOKENS, "same_letters": SAME_LETTERS, "questions": [_ask(engine, Retriever(cards, top_k), cards, grounded, *question) for question in QUESTIONS]}


def compare(engine: LlamaEngine, cards: Mapping[str, Card], top_k: int, grounded: bool, recorded: Mapping[str, Any]) -> list[str]:
    """Differences from what was recorded, one line a question; empty when all is as it was."""
    problems, retriever = [], Retriever(cards, top_k)
    for old in recorded["questions"]:
        new = _ask(engine, retriever, cards, grounded, old["situation"], old["country"])
        if new["cards"] != old["cards"] or new["prompt_sha256"] != old["prompt_sha256"]:
            problems.append(f"{old['situation']!r}: another prompt (cards {', '.join(new['cards'])}; recorded {', '.join(old['cards'])})")
        elif new["answer"][:recorded["same_letters"]] != old["answer"][:recorded["same_letters"]]:
            problems.append(f"{old['situation']!r}: the answer begins {new['answer'][:60]!r}; recorded {old['answer'][:60]!r}")
    return problems


def _ask(engine: LlamaEngine, retriever: Retriever, cards: Mapping[str, Card], grounded: bool, situation: str, country: str) -> dict[str, Any]:
    found = retriever.find(situation)
    messages = build_messages(situation, shown_cards(found.ids, cards) if grounded else None, "", country, found.fits)
    stream = engine.stream(messages, ANSWER_TOKENS, grammar=build_grammar(2048))
    answer = "".join(stream)
    return {"situation": situation, "country": country, "cards": list(found.ids), "prompt_sha256": hashlib.sha256(prompt_text(engine, messages).encode()).hexdigest(),
            "prompt_tokens": len(engine.encode(messages)), "answer": answer}
