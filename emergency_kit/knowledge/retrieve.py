"""Find the knowledge cards that fit a scenario, offline, with BM25 over the cards' own words.

In: cards and a scenario in plain words. Out: at most `top_k` hits, best first; none when nothing
fits. Deterministic, a few milliseconds a query. Limits: it matches words, not meaning; a scenario
told in words that no card knows finds nothing, and the answer then rests on the safe minimum.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Mapping

import bm25s

from emergency_kit.knowledge.cards import Card, normalise

SAFE_MINIMUM = "safe_minimum"
ADVICE_WEIGHT = 0.3
LONGEST_NAME = 5
SCORE_FLOOR = 2.5
SECOND_CARD_SHARE = 0.6
STOPWORDS = frozenset(
    """a about after again all also am an and any are as at be because been before being best but by can cannot
    come coming could did didn't do does doesn't doing don't down feel feels for from further get good got had
    has have having he help her here him his how i i'm if in into is it it's its just keep keeps know let long
    make makes me my need needs no nor now of off on once one only open or other our out over own plan s said
    says she should so some somebody someone something take takes than that the their them then there there's
    they think this those through time to told too two under until up use very want was way we went were what
    when where which while who why will with without won't work working works would you your""".split()
)


@dataclass(frozen=True)
class Hit:
    """A card that fits: its id, its BM25 score, and the words of the scenario that it shares."""

    card_id: str
    score: float
    words: tuple[str, ...]


def stem(word: str) -> str:
    """A word without a plural, -ing or -ed ending, so that "burning", "burned" and "burns" meet."""
    word = word.removesuffix("'s")
    if word.endswith(("ies", "ied")) and len(word) > 4:
        return word[:-3]
    for ending in ("ing", "ed", "es", "s", "e", "y"):
        if word.endswith(ending) and len(word) - len(ending) >= 3 and not word.endswith("ss"):
            word = word.removesuffix(ending)
            break
    return word[:-1] if len(word) > 3 and word[-1] == word[-2] and word[-1] not in "lse" else word


class Retriever:
    """An index over cards; `safe_minimum` is left out, since it fits where no card does."""

    def __init__(self, cards: Mapping[str, Card], top_k: int = 2):
        self.top_k = top_k
        self._ids = [card_id for card_id in cards if card_id != SAFE_MINIMUM]
        # Two indexes: a word in many cards' advice ("fire", "kill") must not count as common among their names.
        self._indexes = [
            (weight, _Index([fields(cards[card_id]) for card_id in self._ids]))
            for weight, fields in ((1.0, _names_and_signs), (ADVICE_WEIGHT, _dangers_and_actions))
        ]

    def find(self, scenario: str) -> list[Hit]:
        """The cards that fit a scenario, best first, at most `top_k`; empty when nothing fits."""
        words = _content_words(scenario)
        terms = set(_terms(words)) | _runs(scenario)
        totals = [0.0] * len(self._ids)
        for weight, index in self._indexes:
            totals = [total + weight * score for total, score in zip(totals, index.score(terms))]
        ranked = sorted(range(len(totals)), key=lambda place: (-totals[place], self._ids[place]))[: self.top_k]
        floor = max(SCORE_FLOOR, SECOND_CARD_SHARE * totals[ranked[0]]) if ranked else SCORE_FLOOR
        return [Hit(self._ids[place], totals[place], self._shared(words, place)) for place in ranked if totals[place] >= floor]

    def _shared(self, words: list[str], place: int) -> tuple[str, ...]:
        return tuple(dict.fromkeys(word for word in words if any(stem(word) in index.documents[place] for _, index in self._indexes)))


class _Index:
    """BM25 over one part of every card."""

    def __init__(self, documents: list[list[str]]):
        self.documents = [frozenset(document) for document in documents]
        self._known = frozenset().union(*self.documents)
        # Cards are about equally long by design, so length says little about how well they fit: b is low.
        self._bm25 = bm25s.BM25(k1=1.5, b=0.3)
        if self._known:
            self._bm25.index(documents, show_progress=False)

    def score(self, terms: set[str]) -> list[float]:
        known = sorted(terms & self._known)
        return self._bm25.get_scores(known).tolist() if known else [0.0] * len(self.documents)


def _content_words(text: str) -> list[str]:
    return [word for word in normalise(text).split() if word not in STOPWORDS]


def _terms(words: list[str]) -> list[str]:
    """Stems, and pairs of neighbouring stems: "chest pain" says more than "chest" and "pain"."""
    stems = [stem(word) for word in words]
    return stems + [f"{first} {second}" for first, second in zip(stems, stems[1:])]


def _runs(scenario: str) -> set[str]:
    """Every run of words that could be a whole name, marked so that only a whole name meets it."""
    stems = [stem(word) for word in normalise(scenario).split()]
    return {"=" + " ".join(stems[start:start + length]) for length in range(1, LONGEST_NAME + 1) for start in range(len(stems) - length + 1)}


def _names_and_signs(card: Card) -> list[str]:
    """Names count threefold, and as a whole, stopwords included ("too hot" is not "hot"); signs twofold."""
    names = (card.name, *card.also_called)
    terms = [term for name in names for term in _terms(_content_words(name)) * 3]
    terms += ["=" + " ".join(stem(word) for word in normalise(name).split()) for name in names for _ in range(3)]
    return terms + [term for sign in card.signs for term in _terms(_content_words(sign)) * 2]


def _dangers_and_actions(card: Card) -> list[str]:
    return [term for text in (*card.dangers, *(action.text for action in card.critical_actions)) for term in _terms(_content_words(text))]
