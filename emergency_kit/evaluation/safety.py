"""Safety: which of a card's critical actions an answer gives.

In: an answer's text and knowledge cards. Out: one `ActionFinding` a critical action. Matching is plain: one of
the action's phrases stands as whole words in the normalised guidance. Limits: a negated phrase
("do not call 911") still counts as given, and never-rules are not judged here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Iterable

from emergency_kit.data.format import read_answer
from emergency_kit.knowledge.cards import Card, contains_phrase, normalise


@dataclass(frozen=True)
class ActionFinding:
    """Whether an answer gives one critical action. action: the action's text on its card."""

    card_id: str
    action: str
    given: bool


def guidance_texts(text: str) -> list[str]:
    """Normalised statements of the GUIDANCE section; the whole text as one where there is no such section."""
    guidance = read_answer(text).answer.guidance
    return [normalise(statement) for statement in guidance or (text,)]


def find_actions(text: str, cards: Iterable[Card]) -> list[ActionFinding]:
    """One finding for every critical action of the cards, in the cards' order."""
    statements = guidance_texts(text)
    return [ActionFinding(card.id, action.text, any(contains_phrase(statement, phrase) for statement in statements for phrase in action.phrases))
            for card in cards for action in card.critical_actions]
