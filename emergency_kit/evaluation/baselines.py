"""Baselines: what a number means is seen beside what needs no training, or no model at all.

In: records and cards. Out: prompts for the base model without card or format, and answers written by rule. The card alone,
rendered as an answer, is the ceiling of what grounding can give with this retrieval; a call for help alone the floor; the
tuned model's own answers handed to other scenarios expose answers that would fit anything.
"""

from __future__ import annotations

from typing import Mapping, Sequence

from emergency_kit.data.format import SECTIONS, Answer, Record, render_answer, shown_cards
from emergency_kit.inference.engine import Generated, Messages
from emergency_kit.knowledge.cards import Card
from emergency_kit.knowledge.emergency_numbers import find_country, localise

FORMAT_PROMPT = ("You answer emergencies. Write exactly four sections, each a heading alone on its line, in this order: FACTS, UNCERTAINTIES, "
                 "ANALYSIS, GUIDANCE. Under the first three write bullets that begin with •; number the steps under GUIDANCE in the order to act. "
                 "Write nothing else.")
PLAIN_PROMPT = "You are a helpful assistant."
BARE, FORMATTED = "base, scenario alone", "base, format in its prompt"
CARD_ALONE, CALL_ALONE, SHUFFLED = "card alone as the answer", "call for help alone", "tuned, answers shuffled"


def bare_messages(record: Record) -> Messages:
    """The scenario and a system prompt that says nothing."""
    return [{"role": "system", "content": PLAIN_PROMPT}, {"role": "user", "content": _asked(record)}]


def formatted_messages(record: Record) -> Messages:
    """The scenario, and the format told in words."""
    return [{"role": "system", "content": FORMAT_PROMPT}, {"role": "user", "content": _asked(record)}]


def answer_card_alone(record: Record, cards: Mapping[str, Card]) -> Generated:
    """The cards that the prompt carries, as an answer."""
    where = find_country(record.country)
    shown = shown_cards((record.cards or ())[:record.fits], cards)
    guidance = [localise(action.text, where, card.service) for card in shown for action in card.critical_actions]
    guidance += [rule.text for card in shown for rule in card.never]
    return _written(Answer((record.input or record.instruction,), tuple(card.uncertainties[0] for card in shown),
                           tuple(danger for card in shown for danger in card.dangers), tuple(guidance)))


def answer_call_alone(record: Record) -> Generated:
    """One sentence: call for help."""
    return _written(Answer(("There is an emergency.",), ("What else is happening.",), ("Help is needed.",),
                           (localise("Call your local emergency number.", find_country(record.country), "any"),)))


def shuffle_answers(records: Sequence[Record], answers: Sequence[Generated]) -> list[Generated]:
    """Each scenario gets the next answer that was written for other hazards; its own where there is no other."""
    shuffled = []
    for index, record in enumerate(records):
        places = [(index + step) % len(records) for step in range(1, len(records))]
        other = next((place for place in places if not set(records[place].hazards) & set(record.hazards)), index)
        shuffled.append(answers[other])
    return shuffled


def _asked(record: Record) -> str:
    return "\n\n".join(part for part in (record.instruction.strip(), record.input.strip()) if part)


def _written(answer: Answer) -> Generated:
    """An answer written by rule: no tokens were generated, and it ends."""
    filled = Answer(*(tuple(getattr(answer, section)) or ("None.",) for section in SECTIONS))
    return Generated(render_answer(filled), 0, True)
