"""Warm-up: while nobody asks, the beginnings of prompts are computed, so that the first answer about a hazard begins as soon as a later one.

In: an engine of llama.cpp, the cards, a country. Out: nothing; the engine remembers each card's beginning, which is the prompt up to the
situation. A thread of its own does it, a piece at a time, and leaves the processor to whoever asks. Limits: a model that takes longer than
SLOW_SECONDS a card is left alone, since it would compute for minutes; so is one in PyTorch, which remembers the system prompt alone.
"""

from __future__ import annotations

import os
import threading
import time
from typing import Iterator, Mapping

from emergency_kit.data.format import build_messages
from emergency_kit.errors import ModelError
from emergency_kit.inference.llama_engine import LlamaEngine
from emergency_kit.knowledge.cards import Card

# Nobody has asked for this long: whoever reads an answer is about to ask again.
IDLE_SECONDS = 2.0
POLL_SECONDS = 0.1
SLOW_SECONDS = 4.0


def start_warm_up(engine: object, cards: Mapping[str, Card], country: str = "") -> threading.Thread | None:
    """Begin in the background, and return the thread; None where the engine has nothing to remember with. It ends with the engine."""
    if not isinstance(engine, LlamaEngine):
        return None
    thread = threading.Thread(target=warm_up, args=(engine, cards, country), name="warm-up", daemon=True)
    thread.start()
    return thread


def warm_up(engine: LlamaEngine, cards: Mapping[str, Card], country: str = "") -> int:
    """Remember the beginning of every card's prompt, the engine idle; the number of those that were."""
    done = 0
    try:
        for prompt in card_beginnings(engine, cards, country):
            started = time.monotonic()
            while not engine.remember(prompt, lambda: engine.idle_seconds() == 0):
                if engine.closed:
                    return done
                while engine.idle_seconds() < IDLE_SECONDS and not engine.closed:
                    time.sleep(POLL_SECONDS)
                started = time.monotonic()
            done += 1
            if time.monotonic() - started > SLOW_SECONDS:
                break
    except (ModelError, OSError):  # closed on the way; what matters will be said to whoever asks
        pass
    return done


def card_beginnings(engine: LlamaEngine, cards: Mapping[str, Card], country: str = "") -> Iterator[list[int]]:
    """Token ids of each card's prompt as far as they do not depend on the situation."""
    for card in cards.values():
        yield list(os.path.commonprefix([engine.encode(build_messages(situation, [card], country=country)) for situation in ("a", "1", "\"I")]))
