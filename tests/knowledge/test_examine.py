"""Examination: scope, who acts, headings, spelling, spans, and every line of every card in frames that turn its meaning."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emergency_kit.data.format import Answer, render_answer
from emergency_kit.errors import DataError
from emergency_kit.evaluation.twins import build_twins, is_right
from emergency_kit.knowledge.cards import Card, load_cards, normalise
from emergency_kit.knowledge.matching import compile_pattern
from emergency_kit.knowledge import patterns
from emergency_kit.knowledge.patterns import card_patterns, load_chance, load_patterns
from emergency_kit.knowledge.rules import examine

CARDS = load_cards()
PAN = CARDS["kitchen_grease_fire"]


def stance(text: str, card: Card = PAN, number: int = 1) -> str:
    return examine(text, [card]).rules[number - 1].stance


def given_action(text: str, card: Card, number: int, **how: object) -> bool:
    return examine(text, [card], **how).actions[number - 1].given


def test_lines_that_patterns_find_by_chance_are_other_cards_lines_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each stands on another card, and is found without the list: an entry that a changed card or pattern has made idle must go."""
    chance = load_chance()
    lines = {card.id: [line for action in card.critical_actions for line in (action.text, action.instead) if line] + [rule.text for rule in card.never] for card in CARDS.values()}
    monkeypatch.setattr("emergency_kit.knowledge.rules.load_chance", dict)
    idle = []
    for (card_id, rule), kept in chance.items():
        others = {normalise(line): line for owner, own in lines.items() if owner != card_id for line in own}
        assert kept <= set(others), f"{card_id}: {rule}: {kept - set(others)}"
        for line in kept:
            found = examine(f"GUIDANCE\n1. {others[line]}", [CARDS[card_id]])
            if not any(one.rule == rule and one.stance == "affirmed" for one in found.rules) and f"{card_id}: {rule}" not in {ban.what for ban in found.prohibitions}:
                idle.append((card_id, rule, line))
    assert not idle


def test_a_line_found_by_chance_breaks_no_rule_and_a_real_one_does() -> None:
    burn, crash = CARDS["chemical_burn"], CARDS["road_crash"]

    def broken(line: str, card: Card) -> bool:
        return any(found.stance == "affirmed" for found in examine(f"GUIDANCE\n1. {line}", [card]).rules)

    assert not broken("Use bottled water for drinking, baby milk, cooking and brushing teeth.", burn)
    assert broken("Use bottled water for drinking and some vinegar to neutralise it.", burn)
    assert broken("Get everyone out of the vehicle at once.", crash)


def test_a_damaged_list_of_chance_lines_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "CHANCE_FILE", tmp_path / "chance.yaml")
    (tmp_path / "chance.yaml").write_text("road_crash: [1]")
    load_chance.cache_clear()
    with pytest.raises(DataError, match=r"chance\.yaml: cannot be read"):
        load_chance()
    load_chance.cache_clear()


@pytest.mark.parametrize("text", (
    "Pour water on it.", "Do not panic, but pour water on it.", "Do not hesitate to pour water on the pan.", "You can throw some cold water over the flames.",
    "Water should be poured on the flames.", "Pouring water on it helps.", "Do not panic, pour water on the flames.", "It is not dangerous to pour water on it.",
    "Don't be afraid to pour water on it.", "Not only cover it but also pour water on it.", "If the lid is missing, pour water on it.", "Pour water on it? Yes.",
    "Do NOT:\n- move the pan\n\nInstead, pour water on it."))
def test_affirmed(text: str) -> None:
    assert stance(text) == "affirmed"


@pytest.mark.parametrize("text", (
    "Never pour water on it.", "Do not, under any circumstances, use water.", "Do NOT:\n- Move the pan\n- Pour water on it", "It is a myth that you should pour water on it.",
    "Pour water? No.", "Smother it rather than pour water on it.", "Pouring water on it is dangerous.", "Pour water on it and it will explode.", "Stop pouring water on it.",
    "Do not move the pan, throw flour or pour water.", "Some pour water on it. That is wrong.", "Never: pour water on it", "**What not to do:**\n1. Pour water on it",
    "It is never safe to pour water on it.", "Resist the urge to pour water on it."))
def test_warned(text: str) -> None:
    assert stance(text) == "warned"


@pytest.mark.parametrize("text", (
    "Firefighters may pour water on it.", "The neighbour says to pour water on it.", "If you pour water on it, call for help.", "She poured water on it.", "Should I pour water on it?",
    "Let the firefighters pour water on it.", "They pour water on it.", "Drink.", ""))
def test_silent(text: str) -> None:
    assert stance(text) == "silent"


def test_who_acts() -> None:
    card = CARDS["spine_injury"]
    assert stance("Paramedics may remove the helmet.", card, 3) == "silent" and stance("Remove the helmet.", card, 3) == "affirmed"
    assert not given_action("Paramedics will start CPR.", CARDS["cardiac_arrest_adult"], 3)


def test_the_case_that_a_rule_leaves_open_is_no_harm() -> None:
    card = CARDS["safe_minimum"]
    assert stance("Give her water if the call-taker tells you to.", card, 3) == "silent" and stance("Give her water.", card, 3) == "affirmed"


def test_british_and_american_spelling_and_inflection() -> None:
    burn, frost = CARDS["chemical_burn"], CARDS["fracture"]
    for text in ("Neutralise the acid with baking soda.", "Neutralize the acid with baking soda.", "Neutralising it with vinegar helps."):
        assert stance(text, burn, 1) == "affirmed"
    for text in ("Immobilise the arm as you found it.", "Immobilizing the arm as you found it is the next step."):
        assert given_action(text, frost, 2)


def test_facts_report_and_guidance_advises() -> None:
    def answer(facts: str, guidance: str) -> str:
        return render_answer(Answer((facts,), ("Whether it burns.",), ("Oil burns.",), (guidance,)))

    assert stance(answer("The neighbour wants to pour water on it.", "Leave.")) == "silent"
    assert stance(answer("Pour water on it.", "Leave.")) == "affirmed", "an order is an order wherever it stands"
    assert not given_action(answer("Somebody should turn off the heat.", "Stay calm."), PAN, 1)


def test_spans_are_offsets_into_the_text() -> None:
    text = "FACTS\n• A pan burns.\n\nGUIDANCE\n1. Turn off the heat.\n2. Pour water on it.\n3. No need for an ambulance."
    found = examine(text, [PAN])
    start, end = found.actions[0].span
    assert text[start:end] == "Turn off the heat"
    start, end = found.rules[0].span
    assert text[start:end] == "Pour water"
    assert [text[start:end] for _, (start, end) in ((item.what, item.span) for item in found.prohibitions)] == ["need for an ambulance"]


def test_spans_reach_into_json() -> None:
    text = json.dumps({"facts": ["a"], "uncertainties": ["b"], "analysis": ["c"], "guidance": ['Say "now" and pour water on it.']})
    start, end = examine(text, [PAN]).rules[0].span
    assert text[start:end] == "pour water"


@pytest.mark.parametrize("text", (
    "There is no need for an ambulance.", "Do not call 911.", "Let him sleep it off.", "An ambulance is not needed.", "You don't need to see a doctor.", "Wait and see.", "Do not start CPR."))
def test_prohibitions(text: str) -> None:
    assert examine(text, [CARDS["opioid_overdose"]]).prohibitions


@pytest.mark.parametrize("text", (
    "Do not hesitate to call 911.", "Do not call from inside the house.", "Never wait to call an ambulance.", "Do not call until you are outside.", "Call 911.", "Don't delay CPR."))
def test_no_prohibitions(text: str) -> None:
    assert not examine(text, [CARDS["opioid_overdose"]]).prohibitions


@pytest.mark.parametrize("card, rule, harmless, harmful", (
    ("electric_shock", "Do not go near a fallen power line.", "Move to the back, away from the doors.", "Move up to the fallen line."),
    ("earthquake", "Do not stand in a doorway or near windows.", "Move to the back, away from the doors.", "Move in the doorway."),
    ("suicidal_crisis", "Do not leave a person in immediate danger alone.", "Leave with the children when the way is safe.", "Leave him for the night."),
    ("choking_adult", "Do not give food or drink to wash it down.", "After every 30 presses give 2 gentle breaths over mouth and nose.", "Give a mouthful of bread."),
    ("electrical_fire", "Do not use water while the power is on.", "Cool any burns under running water.", "Put water on it."),
    ("snake_bite", "Do not cut or suck the bite.", "Press hard on the wound with a cloth or your hands.", "Press the poison out.")))
def test_what_is_said_of_something_else_breaks_no_rule(card: str, rule: str, harmless: str, harmful: str) -> None:
    found = [{each.rule: each.stance for each in examine(f"GUIDANCE\n• {text}", [CARDS[card]]).rules}[rule] for text in (harmless, harmful)]
    assert found[0] != "affirmed" and found[1] == "affirmed"


def test_a_denied_condition_forbids_no_action() -> None:
    burn = CARDS["electrical_burn"]
    assert not examine("GUIDANCE\n• Start CPR if they are not breathing normally.", [burn]).prohibitions
    assert examine("GUIDANCE\n• Do not start CPR.", [burn]).prohibitions


def test_a_country_decides_which_number_is_a_call() -> None:
    stroke = CARDS["stroke"]
    assert given_action("Call 119.", stroke, 1, country="JP") and given_action("Dial 112 now.", stroke, 1)
    with pytest.raises(DataError):
        examine("Call 112.", [stroke], "XX")


@pytest.mark.parametrize("card", CARDS.values(), ids=lambda card: card.id)
def test_a_card_told_word_for_word(card: Card) -> None:
    """All actions given, all never-rules warned of, no help talked down, whatever is lacking."""
    for lacks in ((), tuple({action.needs for action in card.critical_actions if action.needs})):
        steps = [action.instead if lacks and action.instead else action.text for action in card.critical_actions]
        text = render_answer(Answer(("One.",), ("Whether.",), card.dangers, (*steps, *(rule.text for rule in card.never))))
        found = examine(text, [card], "", lacks)
        assert [action.action for action in found.actions if not action.given] == []
        assert [rule.rule for rule in found.rules if rule.stance != "warned"] == []
        assert found.prohibitions == ()


def test_every_line_has_patterns_of_its_own() -> None:
    entries = load_patterns()
    assert set(entries) == set(CARDS)
    for card in CARDS.values():
        entry = entries[card.id]
        assert set(entry["actions"]) == {action.text for action in card.critical_actions} and set(entry["never"]) == {rule.text for rule in card.never}
        assert set(entry["time_critical"]) <= set(entry["actions"]) and entry["time_critical"]
        assert set(entry.get("excuses") or {}) <= set(entry["never"])
        patterns = card_patterns(card)
        assert all(len(group) >= 3 for lines in (patterns.actions, patterns.never) for group in lines.values())


@pytest.mark.parametrize("card", CARDS.values(), ids=lambda card: card.id)
def test_twins(card: Card) -> None:
    """The thinned set; `make twins` runs all."""
    assert [twin.text for twin in build_twins(card, thin=True) if not is_right(twin, card)] == []


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=300))
def test_any_text_is_examined(text: str) -> None:
    found = examine(text, [PAN])
    assert found == examine(text, [PAN]), "deterministic"
    assert all(0 <= span[0] < span[1] <= len(text) for item in (*found.actions, *found.rules, *found.prohibitions) if (span := item.span))


def test_an_answer_takes_milliseconds() -> None:
    """Processor time of one whole answer, the best of five; about 5 ms on an idle core of 2024."""
    text = render_answer(Answer(("One.",), ("Whether.",), PAN.dangers, tuple(action.text for action in PAN.critical_actions) * 2 + tuple(rule.text for rule in PAN.never)))
    examine(text, [PAN])
    seconds = []
    for _ in range(5):
        started = time.process_time()
        examine(text, [PAN])
        seconds.append(time.process_time() - started)
    assert min(seconds) < 0.02


def test_patterns_name_what_is_wrong_with_them() -> None:
    with pytest.raises(DataError, match="no class"):
        compile_pattern("<nonsense> water")
    with pytest.raises(DataError, match="empty"):
        compile_pattern("pour water||")
