"""Rules: advice is told from warning, replacements count only where something is lacking, numbers must be somebody's."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from emergency_kit.knowledge.cards import load_cards, normalise
from emergency_kit.knowledge.emergency_numbers import load_numbers
from emergency_kit.knowledge.rules import advises, broken_rules, foreign_numbers, gives_action

CARDS = load_cards()
BURN = CARDS["thermal_burn"]
words = st.lists(st.sampled_from("put some ice on the burn now and then call for help at once".split()), max_size=6).map(" ".join)


def test_advice_and_warning() -> None:
    assert advises("put ice on it", "put ice")
    for warning in ("do not put ice on it", "never put ice on it", "cool it rather than put ice on it", "avoid ice and do not put ice"):
        assert not advises(warning, "put ice")
    assert broken_rules(["put ice on the burn"], BURN) and not broken_rules(["do not put ice on the burn"], BURN)


@given(words, words)
def test_a_warning_before_the_phrase_is_never_advice(before: str, after: str) -> None:
    statement = normalise(f"do not {before} apply butter {after}")
    assert not advises(statement, "apply butter")


def test_a_forbidden_action_is_not_given() -> None:
    call = next(action for action in BURN.critical_actions if "emergency number" in action.text)
    assert gives_action([normalise(call.text)], call, BURN)
    assert not gives_action(["do not call your local emergency number"], call, BURN)


def test_a_countrys_number_counts_only_in_that_country() -> None:
    card = CARDS["stroke"]
    call = next(action for action in card.critical_actions if "emergency number" in action.text)
    japan = load_numbers()["JP"]
    assert gives_action([normalise(call.text.replace("your local emergency number", "119"))], call, card, japan)
    assert not gives_action(["call 119"], call, card) and not gives_action(["call 1190"], call, card, japan) and not gives_action(["call"], call, card, japan)


def test_a_replacement_counts_only_where_the_resource_is_lacking() -> None:
    card, action = next((card, action) for card in CARDS.values() for action in card.critical_actions if action.instead)
    said = [normalise(action.instead)]
    assert gives_action(said, action, card, lacks=(action.needs,)) and not gives_action(said, action, card)


def test_numbers_must_be_the_cards_or_the_countrys() -> None:
    assert foreign_numbers(["cool it for 20 minutes"], [BURN]) == []
    assert foreign_numbers(["cool it for 45 minutes"], [BURN]) == ["45"]
    assert foreign_numbers(["call 119"], [BURN], [load_numbers()["JP"]]) == [] and foreign_numbers(["call 119"], [BURN]) == ["119"]
