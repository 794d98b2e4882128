"""Slices: the same metrics over parts of the scenarios, so that a good mean cannot hide a bad corner.

In: scored answers, the hazards of the training split. Out: for each dimension its parts with number and metrics.
Dimensions: hazard, category, role, length of the report, quality of its language, hazard seen in training or not, and what
the prompt was grounded on (right card, extra card, wrong card, no card, off). Limits: a slice of five says little; the
intervals show it.
"""

from __future__ import annotations

from typing import Any, Callable, Sequence

from emergency_kit.data.format import Record
from emergency_kit.evaluation.metrics import Scored, describe, is_unseen

SHORT_WORDS, LONG_WORDS = 15, 45
SHOWN = ("valid_structure", "critical_action_recall", "dangerous_advice", "dangerous_omission", "wrong_order", "dangerous_prohibition", "ended")


def dimensions_of(record: Record, trained: frozenset[str], grounding: str) -> dict[str, tuple[str, ...]]:
    """The part that a record belongs to in each dimension; several where it tells of several hazards."""
    return {
        "hazard": record.hazards or ("none",),
        "category": (record.category or "none",),
        "role": (record.role or "none",),
        "length": (_length(record),),
        "language": (_language(record.input or record.instruction),),
        "training": ("never seen" if is_unseen(record, trained) else "seen",) if record.hazards else ("no hazard",),
        "grounding": (grounding_of(record, grounding),),
    }


def grounding_of(record: Record, grounding: str) -> str:
    """What the cards in the prompt were to the record's true hazards."""
    if grounding != "cards":
        return "off"
    shown, true = record.cards or (), set(record.hazards)
    if not shown:
        return "no card" if true else "no card, rightly"
    if not true & set(shown):
        return "wrong card"
    if true - set(shown):
        return "some cards missing"
    if set(shown) - true:
        return "right card first, an extra one" if shown[0] in true else "extra card first"
    return "right card"


def slice_answers(scored: Sequence[Scored], trained: frozenset[str], grounding: str) -> dict[str, dict[str, Any]]:
    """`{dimension: {part: {n, metric: {value, low, high, n}}}}`, the parts by size, then by name."""
    parts: dict[str, dict[str, list[Scored]]] = {}
    for item in scored:
        for dimension, names in dimensions_of(item.record, trained, grounding).items():
            for name in names:
                parts.setdefault(dimension, {}).setdefault(name, []).append(item)
    by_size: Callable[[tuple[str, list[Scored]]], Any] = lambda part: (-len(part[1]), part[0])
    return {dimension: {name: {"n": len(items), **describe(items, SHOWN)} for name, items in sorted(groups.items(), key=by_size)}
            for dimension, groups in parts.items()}


def _length(record: Record) -> str:
    words = len((record.input or record.instruction).split())
    return f"under {SHORT_WORDS} words" if words < SHORT_WORDS else f"over {LONG_WORDS} words" if words > LONG_WORDS else f"{SHORT_WORDS} to {LONG_WORDS} words"


def _language(text: str) -> str:
    """How carefully a report is typed: by capitals at its beginning and its sentence's end, and by shouting."""
    letters = [letter for letter in text if letter.isalpha()]
    if letters and sum(map(str.isupper, letters)) > 0.7 * len(letters):
        return "shouted"
    return "careful" if text[:1].isupper() and text.rstrip()[-1:] in ".!?" else "hurried"
