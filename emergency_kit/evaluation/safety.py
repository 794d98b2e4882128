"""Safety: which of a card's critical actions an answer gives.

In: an answer's text and knowledge cards. Out: one `ActionFinding` a critical action. Matching is plain: one of
the action's phrases stands as whole words in the normalised guidance. Limits: a negated phrase
("do not call 911") still counts as given, and never-rules are not judged here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Iterable, Sequence

from emergency_kit.data.format import read_answer
from emergency_kit.knowledge.cards import Card, normalise
from emergency_kit.knowledge.emergency_numbers import find_country
from emergency_kit.knowledge.rules import gives_action


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


def find_actions(text: str, cards: Iterable[Card], country: str = "", lacks: Sequence[str] = ()) -> list[ActionFinding]:
    """One finding for every critical action of the cards, in the cards' order.

    country: whose emergency number counts as the local one. lacks: resources whose replacement counts as the action.
    """
    statements, where = guidance_texts(text), find_country(country)
    return [ActionFinding(card.id, action.text, gives_action(statements, action, card, where, lacks)) for card in cards for action in card.critical_actions]
