"""Answers: what a situation deserves under the cards that fit, and the check of every record against its cards.

In: a situation, what was added to its telling, cards. Out: an `Answer`; its guidance is the cards' own
actions in their order, with what stands in where a resource is lacking. `check_record` holds any record
of the built dataset to its cards: all critical actions, no never-rule broken, no number of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Mapping, Sequence

from emergency_kit.data.format import Answer, Record, read_answer
from emergency_kit.knowledge.situations import Situation
from emergency_kit.knowledge.cards import SAFE_MINIMUM, Action, Card, normalise
from emergency_kit.knowledge.emergency_numbers import Country, find_country, localise
from emergency_kit.knowledge.rules import broken_rules, foreign_numbers, gives_action

# Open questions of a second card that an answer repeats: the first card's come first.
SECOND_QUESTIONS = 1


@dataclass(frozen=True)
class Telling:
    """One telling with all that was added to it. facts: what the additions state."""

    role: str
    text: str
    facts: tuple[str, ...] = ()
    lacks: tuple[str, ...] = ()
    wrong_advice: str = ""


def build_answer(situation: Situation, telling: Telling, followed: Sequence[Card], country: Country | None = None) -> Answer:
    """The answer under the cards that it follows; `followed` is the safe minimum alone where none fits."""
    fits = followed[0].id != SAFE_MINIMUM
    names = " and ".join(card.name for card in followed)
    kept = [(card, action) for card, action in _actions(followed)]
    steps = [localise(action.instead if action.needs in telling.lacks and action.instead else action.text, country, card.service) for card, action in kept]
    if not fits:
        analysis = ["No card fits this situation, so this is only the safe minimum."]
    else:
        analysis = [f"The {'cards that fit are' if len(followed) > 1 else 'card that fits is'}: {names}."]
    analysis += () if fits else situation.analysis
    analysis += [danger for card in followed for danger in card.dangers[:2 if len(followed) == 1 else 1]]
    if fits:
        analysis.append(f"First: {steps[0]}")
    analysis += [f"Without {action.needs}, step {number} changes." for number, (_, action) in enumerate(kept, 1) if action.instead and action.needs in telling.lacks]
    if telling.wrong_advice:
        analysis.append(f"Do not follow the advice to {telling.wrong_advice}; {'follow the card' if fits else 'no card supports it'}.")
    rules = dict.fromkeys(rule.text for card in followed for rule in card.never)
    return Answer(facts=(*situation.facts, *telling.facts), uncertainties=_open_questions(situation, followed, fits),
                  analysis=tuple(analysis), guidance=(*steps, *rules))


def _actions(followed: Sequence[Card]) -> list[tuple[Card, Action]]:
    """Actions of all cards in order; what a later card repeats word for word stands once, where it first came."""
    seen: dict[str, tuple[Card, Action]] = {}
    for card in followed:
        for action in card.critical_actions:
            seen.setdefault(action.text, (card, action))
    return list(seen.values())


def _open_questions(situation: Situation, followed: Sequence[Card], fits: bool) -> tuple[str, ...]:
    if not fits:
        return tuple(dict.fromkeys((*situation.unknown, *followed[0].uncertainties)))
    asked = [question for number, question in enumerate(followed[0].uncertainties, 1) if number not in situation.settled]
    for card in followed[1:]:
        asked += card.uncertainties[:SECOND_QUESTIONS]
    # Taught to name an open question of its own beside a card's checked ones, a small model invents them;
    # where the telling answers all of the card's, the situation's own is what is left.
    return tuple(dict.fromkeys(asked)) or situation.unknown[:1]


def check_record(record: Record, cards: Mapping[str, Card], followed: Sequence[str]) -> list[str]:
    """Every way in which a record's answer fails the cards that it follows; empty when it keeps to them."""
    parsed = read_answer(record.output)
    problems = list(parsed.problems)
    country = find_country(record.country)
    statements = [normalise(statement) for statement in parsed.answer.guidance]
    own = [cards[card_id] for card_id in followed]
    # An action that two cards share stands once, with what the first card puts in its place.
    given = {action.text for card in own for action in card.critical_actions if gives_action(statements, action, card, country, record.lacks)}
    for card in own:
        problems += [f"{card.id}: lacks the action {action.text!r}" for action in card.critical_actions if action.text not in given]
        problems += [f"{card.id}: breaks {rule!r} with {statement!r}" for rule, statement in broken_rules(statements, card)]
    problems += [f"states the number {number}, which no card has" for number in foreign_numbers(statements, own, [country] if country else [])]
    return problems
