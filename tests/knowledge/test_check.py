"""`knowledge check` passes on the shipped cards, and finds each kind of fault when it is put there."""

from __future__ import annotations

import pytest

from emergency_kit.knowledge.cards import Card, load_cards, normalise
from emergency_kit.knowledge.check import MEANT, check_knowledge
from emergency_kit.knowledge.emergency_numbers import load_numbers
from emergency_kit.knowledge.rules import broken_rules

CARDS = load_cards()


def kinds(card_id: str, year: int = 2026, **changes: object) -> set[str]:
    """Kinds of problems once a card's fields are replaced, beside the card that forbids butter."""
    card = Card.model_validate(CARDS[card_id].model_dump() | changes)
    return {problem.kind for problem in check_knowledge({"thermal_burn": CARDS["thermal_burn"], card_id: card}, load_numbers(), year) if problem.card == card_id}


def test_a_safety_officer_could_sign() -> None:
    assert [f"{problem.kind}: {problem.card}: {problem.text}" for problem in check_knowledge(CARDS, load_numbers(), 2026)] == []


def test_every_exception_is_a_real_difference_with_a_reason() -> None:
    for advising, forbidding in MEANT:
        texts = [normalise(text) for action in CARDS[advising].critical_actions for text in (action.text, action.instead or "")]
        assert broken_rules(texts, CARDS[forbidding]), (advising, forbidding)
    assert all(reason.endswith(".") for reason in MEANT.values())


def action(text: str, *phrases: str) -> dict[str, object]:
    return {"text": text, "phrases": phrases}


@pytest.mark.parametrize(("card_id", "changes", "kind"), [
    ("stroke", {"critical_actions": [*CARDS["stroke"].model_dump()["critical_actions"], action("Rub butter on it, apply butter.", "apply butter", "rub butter", "put butter")]}, "contradiction"),
    ("stroke", {"sources": [CARDS["stroke"].sources[0].model_dump()] * 2}, "missing source"),
    ("stroke", {"sources": [source.model_dump() | {"year": 1999} for source in CARDS["stroke"].sources]}, "stale year"),
    ("stroke", {"never": [{"text": "Do not dance.", "broken_by": ["eat soup", "read a book"]}]}, "rule without a phrase"),
    ("stroke", {"critical_actions": [action("Wait for 7 minutes.", "wait for 7 minutes", "wait a bit", "wait there")]}, "number without a source"),
    ("stroke", {"critical_actions": [action("Wait there.", "wait there", "wait a bit", "stay put")]}, "no call for help"),
])
def test_each_fault_is_found(card_id: str, changes: dict[str, object], kind: str) -> None:
    assert kind in kinds(card_id, **changes)


def test_a_number_from_an_old_source_is_stale() -> None:
    numbers = [number.model_dump() | {"year": 2001} for number in CARDS["thermal_burn"].numbers]
    assert "stale year" in kinds("thermal_burn", numbers=numbers)


def test_what_replaces_an_action_must_not_count_as_the_action() -> None:
    actions = list(CARDS["stroke"].model_dump()["critical_actions"])
    actions.append({"text": "Fetch an inhaler.", "phrases": ["fetch an inhaler", "inhaler", "use the inhaler"], "needs": "the device", "instead": "Wait without an inhaler."})
    assert "phrase too wide" in kinds("stroke", critical_actions=actions)
