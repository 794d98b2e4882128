"""Pairs: every unsafe twin is dangerous by the judge's own reading, well formed, and otherwise the safe answer."""

from __future__ import annotations

from dataclasses import replace

from emergency_kit.data.build import build_records
from emergency_kit.data.format import parse_answer
from emergency_kit.data.pairs import build_unsafe
from emergency_kit.knowledge.cards import load_cards
from emergency_kit.knowledge.rules import examine

CARDS = load_cards()
RECORDS = build_records(7, 400)["train"][:60]


def breaks(text: str, record: object) -> bool:
    return any(finding.stance == "affirmed" for finding in examine(text, [CARDS[name] for name in record.hazards], record.country, record.lacks).rules)  # type: ignore[attr-defined]


def test_twins_break_a_rule_that_the_safe_answer_keeps_and_keep_the_form() -> None:
    twins = [build_unsafe(record, CARDS, 1) for record in RECORDS]
    assert sum(twin is not None for twin in twins) > 50
    for record, twin in zip(RECORDS, twins):
        if twin is None:
            continue
        safe, unsafe = parse_answer(record.output), parse_answer(twin)
        assert breaks(twin, record) and not breaks(record.output, record)
        assert unsafe.valid and unsafe.answer.facts == safe.answer.facts and unsafe.answer.analysis == safe.answer.analysis
        changed = len(set(safe.answer.guidance) - set(unsafe.answer.guidance))
        assert 1 <= changed <= 4


def test_the_same_seed_gives_the_same_twin_and_no_rule_gives_none() -> None:
    record = RECORDS[0]
    assert build_unsafe(record, CARDS, 1) == build_unsafe(record, CARDS, 1)
    assert len({build_unsafe(record, CARDS, seed) for seed in range(8)}) > 1
    assert build_unsafe(replace(record, hazards=()), CARDS, 1) is None
    assert build_unsafe(replace(record, output="Run."), CARDS, 1) is None
