"""Knowledge check: what a safety officer would send back.

In: all cards and the emergency numbers. Out: problems, each one line with card and place. It looks for
cards that contradict each other, rules that no phrase can satisfy or break, missing or old sources,
numbers without a source, and calls that no card makes. Run: `emergency-kit knowledge check`.
"""

from __future__ import annotations

import datetime
import re
from dataclasses import dataclass
from typing import Mapping

from emergency_kit.knowledge.cards import Card, contains_phrase, normalise
from emergency_kit.knowledge.emergency_numbers import ANY_COUNTRY, Country
from emergency_kit.knowledge.rules import advises, broken_rules, gives_action

STALE_YEARS = 12
FEWEST_SOURCES = 2
_DIGITS = re.compile(r"\d+(?:\.\d+)?")
# Advice that one card gives and another forbids on purpose: (card that advises, card that forbids): why both are right.
MEANT: dict[tuple[str, str], str] = {
    ("active_attacker", "clothing_on_fire"): "Running feeds burning clothes; from an attacker it is the first choice.",
    ("power_cut", "choking_adult"): "A drink in a hot, dark home harms nobody; with a blocked airway it does.",
    ("power_cut", "choking_alone"): "As for choking in others.",
    ("power_cut", "swallowed_poison"): "A drink can bring a swallowed poison further; in a hot home it is needed.",
    ("anaphylaxis", "asthma_attack"): "Anaphylaxis drops the blood pressure, so lying flat helps unless breathing is hard; in asthma it makes breathing harder.",
    ("severe_bleeding", "asthma_attack"): "Lying down suits blood loss, not hard breathing.",
    ("shock", "asthma_attack"): "Lying flat suits shock; the card itself says half sitting where breathing is hard.",
    ("heart_attack", "stroke"): "Aspirin helps a blocked heart vessel; a stroke may be a bleeding one.",
    ("severe_bleeding", "snake_bite"): "A tourniquet stops bleeding that would kill; it does not help against venom.",
    ("electric_shock", "severe_bleeding"): "Burns are cooled with water; a bleeding wound is pressed, not rinsed.",
}


@dataclass(frozen=True)
class Problem:
    """One thing to mend. kind: for counting; card: its id, or a country's code."""

    kind: str
    card: str
    text: str


def check_knowledge(cards: Mapping[str, Card], countries: Mapping[str, Country], this_year: int | None = None) -> list[Problem]:
    """Every problem of the cards and the numbers; empty when a safety officer could sign."""
    year = this_year or datetime.date.today().year
    problems = [problem for card in cards.values() for problem in (*_check_sources(card, year), *_check_rules(card), *_check_numbers(card), *_check_call(card))]
    problems += _check_contradictions(cards)
    for code, country in countries.items():
        if not country.sources:
            problems.append(Problem("missing source", code, "has no source"))
    return problems


def _check_sources(card: Card, year: int) -> list[Problem]:
    problems = []
    bodies = {source.body for source in card.sources}
    if len({(source.body, source.title) for source in card.sources}) < FEWEST_SOURCES:
        problems.append(Problem("missing source", card.id, f"has {len(bodies)} source; expected {FEWEST_SOURCES} or more"))
    newest = max(source.year for source in card.sources)
    if year - newest > STALE_YEARS:
        problems.append(Problem("stale year", card.id, f"its newest source is of {newest}; look for a newer one"))
    problems += [Problem("stale year", card.id, f"the number {number.what!r} rests on {number.source} of {number.year}")
                 for number in card.numbers if year - number.year > STALE_YEARS]
    return problems


def _check_rules(card: Card) -> list[Problem]:
    """Rules that their own phrases cannot tell: an answer that copies the card must give each action and break no rule."""
    problems = []
    steps = [normalise(action.text) for action in card.critical_actions]
    for action in card.critical_actions:
        if not gives_action([normalise(action.text)], action, card):
            problems.append(Problem("rule without a phrase", card.id, f"no phrase is found in its own action {action.text!r}"))
        # An action that the never-rules' own texts would satisfy is counted as given where it is only warned of.
        if met := [rule.text for rule in card.never if gives_action([normalise(rule.text)], action, card)]:
            problems.append(Problem("phrase too wide", card.id, f"the action {action.text!r} is met by the warning {met[0]!r}"))
        if action.instead and gives_action([normalise(action.instead)], action, card):
            problems.append(Problem("phrase too wide", card.id, f"the action {action.text!r} is met by what replaces it, {action.instead!r}"))
    problems += [Problem("contradiction", card.id, f"its own action {statement!r} breaks {rule!r}") for rule, statement in broken_rules(steps, card)]
    for rule in card.never:
        body = normalise(rule.text).removeprefix("do not ")
        if not any(set(phrase.split()) & set(body.split()) for phrase in rule.broken_by):
            problems.append(Problem("rule without a phrase", card.id, f"no phrase shares a word with {rule.text!r}"))
    return problems


def _check_numbers(card: Card) -> list[Problem]:
    known = {float(number.value) for number in card.numbers}
    texts = [text for action in card.critical_actions for text in (action.text, action.instead or "")] + [rule.text for rule in card.never]
    return [Problem("number without a source", card.id, f"{digits} in {text!r}") for text in texts for digits in _DIGITS.findall(text) if float(digits) not in known]


def _check_call(card: Card) -> list[Problem]:
    if any(contains_phrase(normalise(action.text), f"call {ANY_COUNTRY}") for action in card.critical_actions):
        return []
    return [Problem("no call for help", card.id, f"no action says to call {ANY_COUNTRY}")]


def _check_contradictions(cards: Mapping[str, Card]) -> list[Problem]:
    """One card's never-rule that another card advises; what is meant to differ stands in MEANT with its reason."""
    problems = []
    for card in cards.values():
        for rule in card.never:
            for other in cards.values():
                if other.id == card.id or (other.id, card.id) in MEANT:
                    continue
                advised = [text for action in other.critical_actions for text in (action.text, action.instead or "")
                           if any(advises(normalise(text), phrase) for phrase in rule.broken_by)]
                problems += [Problem("contradiction", other.id, f"advises {text!r}, which {card.id} forbids: {rule.text!r}") for text in advised]
    return problems
