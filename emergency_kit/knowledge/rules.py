"""Rules: whether statements of guidance give a card's actions, keep its never-rules and state its numbers.

In: normalised statements and a card. Out: findings. Matching is plain: a phrase as whole words; a phrase
behind "do not", "never" or the like in the same statement is a warning, not advice, and a statement that
opens with one gives no action, except one that is itself worded so.
Limits: wording that no phrase foresees is not found; the phrases are the card's.
"""

from __future__ import annotations

import re
from typing import Iterable, Sequence

from emergency_kit.knowledge.cards import Action, Card, contains_phrase, normalise
from emergency_kit.knowledge.emergency_numbers import ANY_COUNTRY, Country, localise

_WARNING = re.compile(r"\b(?:do not|don't|dont|never|avoid|without|instead of|rather than|not to|no)\b")
_FORBIDS = re.compile(r"^(?:do not|don't|dont|never|avoid) ")
_NUMBER = re.compile(r"\d+(?:\.\d+)?")


def advises(statement: str, phrase: str) -> bool:
    """Whether a normalised statement advises a phrase rather than warns of it."""
    before, found, _ = f" {statement} ".partition(f" {phrase} ")
    return bool(found) and not _WARNING.search(before)


def gives_action(statements: Iterable[str], action: Action, card: Card, country: Country | None = None, lacks: Sequence[str] = ()) -> bool:
    """Whether any statement gives an action, or what stands in for it where a resource is lacking."""
    phrases = set(action.phrases)
    if country:
        phrases |= {normalise(localise(phrase, country, card.service)) for phrase in action.phrases if ANY_COUNTRY in phrase}
    if action.instead and action.needs in lacks:
        phrases.add(normalise(action.instead))
    return any(contains_phrase(statement, phrase) for statement in statements for phrase in phrases
               if not _FORBIDS.match(statement) or _FORBIDS.match(phrase))


def broken_rules(statements: Sequence[str], card: Card) -> list[tuple[str, str]]:
    """`(never-rule, statement)` of every rule that a statement breaks."""
    return [(rule.text, statement) for rule in card.never for statement in statements if any(advises(statement, phrase) for phrase in rule.broken_by)]


def foreign_numbers(statements: Iterable[str], cards: Sequence[Card], countries: Sequence[Country] = ()) -> list[str]:
    """Numbers in statements that neither the cards nor a country's list of emergency numbers state."""
    known = {float(number.value) for card in cards for number in card.numbers}
    known |= {float(value) for country in countries for service in (country.ambulance, country.fire, country.police) for value in service}
    return [number for statement in statements for number in _NUMBER.findall(statement) if float(number) not in known]
