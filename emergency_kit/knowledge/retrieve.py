"""Find the knowledge cards that fit a scenario, offline, in milliseconds.

In: cards and a scenario in plain words. Out: ranked cards with the words that speak for each, which of them
fit, and whether it is unsure. Scores come from `index.py`. Limits: English; it knows the words of cards, cues
and training situations, and words spelled nearly like them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Mapping

import numpy as np

from emergency_kit.knowledge.cards import Card, normalise
from emergency_kit.knowledge.index import load_index

# Chosen on the development half of tests/knowledge/labelled_scenarios.yaml, measured on the other (benchmarks/RESULTS.md).
# A long report is also read in overlapping windows, so that what does not matter cannot drown what does.
WINDOW_WORDS, WINDOW_SHARE = 24, 0.5
APPLIES = 0.85
UNSURE_MARGIN, UNSURE_APPLIES = 0.1, 0.2
SECOND_SCORE = 0.35


@dataclass(frozen=True)
class Hit:
    """A card, its score, and the words of the scenario that speak for it, strongest first."""

    card_id: str
    score: float
    words: tuple[str, ...]


@dataclass(frozen=True)
class Found:
    """What fits a scenario. ids: cards to show, best first; fits: how many of them, from the first, are trusted to fit.

    ranked: every card by score. unsure: whether the first card, or that none fits, is close to a guess.
    """

    ids: tuple[str, ...] = ()
    fits: int = 0
    unsure: bool = False
    ranked: tuple[Hit, ...] = ()

    def describe(self, cards: Mapping[str, Card]) -> str:
        """One line for a person: which cards, and how sure."""
        unsure = "unsure: " if self.unsure else ""
        if not self.ids:
            near = f" (nearest: {cards[self.ranked[0].card_id].name})" if self.unsure and self.ranked else ""
            return f"{unsure}none fits, so the answer is the safe minimum{near}"
        names = [cards[card_id].name for card_id in self.ids]
        others = f" (near: {', '.join(names[self.fits:])})" if names[self.fits:] else ""
        return unsure + " and ".join(names[:self.fits]) + others


class Retriever:
    """Finds the cards for scenarios; `safe_minimum` is never found, since it stands for "no card"."""

    def __init__(self, cards: Mapping[str, Card], top_k: int = 2):
        self.top_k = top_k
        self._categories = {card_id: card.category for card_id, card in cards.items()}
        self._index = load_index(cards)

    def find(self, scenario: str) -> Found:
        """The cards that fit a scenario, at most `top_k`, and every card by score."""
        words = normalise(scenario).split()
        scores = self._score(words)
        order = np.argsort(-scores[:-2], kind="stable")
        if not len(order) or not scores.any():
            return Found()
        ids = self._index.card_ids
        ranked = tuple(Hit(ids[place], float(scores[place]), self._index.speaking(words, place) if rank < self.top_k else ()) for rank, place in enumerate(order))
        applies = float(scores[-1]) + ranked[0].score
        if applies < APPLIES:
            return Found((), 0, applies > APPLIES - UNSURE_APPLIES, ranked)
        second = ranked[1] if len(ranked) > 1 else None
        # Two emergencies at once: a second card from another field that is nearly as well supported.
        both = second is not None and second.score > SECOND_SCORE and self._differ(ranked[0], second)
        near = second is not None and ranked[0].score - second.score < UNSURE_MARGIN
        shown = self.top_k if near or both else 1
        fits = 2 if both and self.top_k > 1 else 1
        return Found(tuple(hit.card_id for hit in ranked[:shown]), fits, (near and not both) or applies < APPLIES + UNSURE_APPLIES, ranked)

    def _score(self, words: list[str]) -> np.ndarray:
        whole = self._index.score(words)
        if len(words) <= WINDOW_WORDS:
            return whole
        starts = range(0, len(words) - WINDOW_WORDS // 2, WINDOW_WORDS // 2)
        windows = np.max([self._index.score(words[start:start + WINDOW_WORDS]) for start in starts], axis=0)
        return (1 - WINDOW_SHARE) * whole + WINDOW_SHARE * windows

    def _differ(self, first: Hit, second: Hit) -> bool:
        return self._categories[first.card_id] != self._categories[second.card_id]
