"""Metrics: from generated answers to one model's numbers.

In: records, answers and knowledge cards. Out: `Scored` answers and a dict of numbers. Percentages and
recalls run from 0 to 100, rounded to 2 places.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Mapping, Sequence

from emergency_kit.data.format import Record
from emergency_kit.evaluation.safety import ActionFinding, find_actions
from emergency_kit.evaluation.structure import Checks, check_answer
from emergency_kit.inference.engine import Generated
from emergency_kit.knowledge.cards import Card


@dataclass(frozen=True)
class Scored:
    """One record's answer and what was found in it. actions: those of all cards in `record.hazards`."""

    record: Record
    generated: Generated
    checks: Checks
    actions: tuple[ActionFinding, ...]

    @property
    def recall(self) -> float | None:
        """Share of the critical actions that the answer gives, 0 to 1; None for a record without hazards."""
        return sum(action.given for action in self.actions) / len(self.actions) if self.actions else None


@dataclass(frozen=True)
class Answered:
    """All answers of one model, in the records' order, and the seconds that generating them took."""

    scored: tuple[Scored, ...]
    seconds: float


def score(record: Record, generated: Generated, cards: Mapping[str, Card]) -> Scored:
    """One answer against the form and against the record's hazards."""
    actions = find_actions(generated.text, [cards[hazard] for hazard in record.hazards], record.country, record.lacks)
    return Scored(record, generated, check_answer(generated), tuple(actions))


def measure(answered: Answered, trained: frozenset[str]) -> dict[str, Any]:
    """The numbers of one model.

    trained: hazards of the training split; a record with any other counts under `test_only_hazards`.
    A recall is the mean over records of given / all critical actions of their hazards; over no record, None.
    """
    scored = answered.scored
    number, tokens = len(scored), sum(item.generated.tokens for item in scored)
    unseen = [bool(set(item.record.hazards) - trained) for item in scored]
    counts = {name: sum(getattr(item.checks, name) for item in scored)
              for name in ("valid_json", "valid_structured_text", "valid_structure", "ended")}
    numbers: dict[str, Any] = {"total_samples": number}
    for name, count in counts.items():
        numbers |= {name: count, f"{name}_percentage": round(100 * count / number, 2)}
    recalls = [item.recall for item in scored]
    return numbers | {
        "critical_action_recall": {
            "overall": _mean_percentage(recalls),
            "seen_hazards": _mean_percentage([value for value, new in zip(recalls, unseen) if not new]),
            "test_only_hazards": _mean_percentage([value for value, new in zip(recalls, unseen) if new]),
        },
        "mean_tokens": round(tokens / number, 2),
        "loops": sum(item.checks.loops for item in scored),
        "seconds": round(answered.seconds, 2),
        "tokens_per_second": round(tokens / answered.seconds, 2),
    }


def _mean_percentage(shares: Sequence[float | None]) -> float | None:
    known = [share for share in shares if share is not None]
    return round(100 * sum(known) / len(known), 2) if known else None
