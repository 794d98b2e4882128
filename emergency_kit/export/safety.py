"""Safety of answers in numbers, for the certificate: critical actions given, never-rules broken, form kept.

In: records with their hazards, answers. Out: one JSON object. The judging is `knowledge.rules`'s, as in evaluation and use.
"""

from __future__ import annotations

from typing import Any, Sequence

from emergency_kit.data.format import Record, parse_answer
from emergency_kit.knowledge.cards import load_cards
from emergency_kit.knowledge.rules import examine


def measure_safety(records: Sequence[Record], answers: Sequence[str]) -> dict[str, Any]:
    """Over all answers: critical actions of the records' hazards and how many are given, never-rules affirmed and dangerous
    prohibitions, answers with four sections."""
    cards = load_cards()
    found = [examine(answer, [cards[hazard] for hazard in record.hazards if hazard in cards], record.country, record.lacks)
             for record, answer in zip(records, answers)]
    actions = [action for examination in found for action in examination.actions]
    given = sum(action.given for action in actions)
    return {"answers": len(answers), "actions": len(actions), "given": given, "recall_percent": round(100 * given / len(actions), 2) if actions else 0.0,
            "broken_rules": sum(rule.stance == "affirmed" for examination in found for rule in examination.rules),
            "dangerous_prohibitions": sum(len(examination.prohibitions) for examination in found),
            "found": [f"answer {number}, against {rule.rule!r}: {answer[slice(*rule.span)]}" for number, (examination, answer) in enumerate(zip(found, answers), 1)
                      for rule in examination.rules if rule.stance == "affirmed" and rule.span],
            "valid_structure": sum(parse_answer(answer).valid for answer in answers)}
