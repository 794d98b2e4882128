import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emergency_kit.data.format import Answer, render_answer
from emergency_kit.errors import DataError
from emergency_kit.inference.guard import guard, guard_found
from emergency_kit.knowledge.cards import SAFE_MINIMUM, load_cards
from emergency_kit.knowledge.emergency_numbers import find_country, localise
from emergency_kit.knowledge.retrieve import Retriever
from emergency_kit.knowledge.rules import examine

CARDS = load_cards()
BLEEDING = CARDS["severe_bleeding"]


def answer(*guidance, analysis=("It is bleeding.",)):
    return render_answer(Answer(("A man bleeds.",), ("Where from.",), analysis, guidance))


def steps_of(card, country=""):
    return [localise(action.text, find_country(country), card.service) for action in card.critical_actions]


@pytest.mark.parametrize("card", CARDS.values(), ids=lambda card: card.id)
def test_a_cards_own_answer_passes_unchanged(card):
    """What the dataset teaches as right: nothing struck, nothing added, nothing taken for a slip."""
    text = answer(*steps_of(card), *(rule.text for rule in card.never))
    checked = guard(text, [card])
    assert not checked.struck and not checked.added and not any(line.card_line or line.numbers for line in checked.lines)
    assert [text[line.start:line.end] for line in checked.lines] == [line.text for line in checked.lines]


@pytest.mark.parametrize("card", CARDS.values(), ids=lambda card: card.id)
def test_an_empty_answer_gets_every_step_in_order(card):
    checked = guard("", [card], "GB")
    assert [step.text for step in checked.added] == steps_of(card, "GB")
    assert checked.cards[0].sources and checked.cards[0].number == find_country("GB").number(card.service) == checked.number


def test_a_line_against_a_never_rule_is_struck_and_named_wherever_it_stands_and_however_often():
    text = answer("Press hard on the wound with a cloth or your hands.", "Loosen the tourniquet every ten minutes.", "Pull out the knife.",
                  "Loosen the tourniquet again.", analysis=("Loosen the tourniquet to let blood through.",))
    checked = guard(text, [BLEEDING])
    assert [(line.section, line.text, line.breaks) for line in checked.struck] == [
        ("analysis", "Loosen the tourniquet to let blood through.", "Do not loosen a tourniquet once it is on."),
        ("guidance", "Loosen the tourniquet every ten minutes.", "Do not loosen a tourniquet once it is on."),
        ("guidance", "Pull out the knife.", "Do not pull out an object stuck in the wound."),
        ("guidance", "Loosen the tourniquet again.", "Do not loosen a tourniquet once it is on.")]
    assert checked.text == text, "the model's words are never rewritten"
    assert not [rule for rule in examine(checked.shown_text, [BLEEDING]).rules if rule.stance == "affirmed"]


def test_a_step_that_stands_only_in_a_struck_line_is_added():
    line = "Press hard on the wound and pull out the knife."
    checked = guard(answer(line), [BLEEDING])
    assert checked.struck[0].text == line
    assert "Press hard on the wound with a cloth or your hands." in [step.text for step in checked.added]


def test_a_slip_is_shown_from_the_card_and_counts_as_given():
    card_line = "Put a tourniquet above a limb wound that keeps bleeding, noting the time."
    for slip in ("Put an Arternithinneal tourniquet above a limb wound that keeps bleeding, noting the time.",
                 "Put a tourniquit above a limb wound that keep bleeding, noting time.", "Put a tourniquet above a limb wound that keeps bleeding, noting the lime."):
        checked = guard(answer(slip), [BLEEDING])
        line = checked.lines[-1]
        assert line.text == slip and line.card_line == card_line and card_line not in [step.text for step in checked.added], slip
    assert not guard(answer("Keep calm and wait for the police."), [BLEEDING]).lines[-1].card_line


def test_a_slip_that_turns_a_rule_around_is_struck():
    checked = guard(answer("Do pull out an object stuck in the wound."), [BLEEDING])
    assert checked.struck and not checked.lines[-1].card_line


def test_a_slip_in_a_number_is_shown_from_the_card():
    card = next(card for card in CARDS.values() if any(char.isdigit() for action in card.critical_actions for char in action.text))
    step = next(text for text in steps_of(card) if any(char.isdigit() for char in text))
    wrong = "".join(str((int(char) + 3) % 10) if char.isdigit() else char for char in step)
    line = guard(answer(wrong), [card]).lines[-1]
    assert line.card_line == step and line.text == wrong and line.numbers


def test_numbers_that_no_card_states_are_named_and_those_of_the_situation_and_country_are_not():
    checked = guard(answer("Give 500 mg of aspirin.", "Call 999.", "Carry all 3 of them."), [BLEEDING], "GB", scenario="3 people are hurt")
    assert [line.numbers for line in checked.lines[-3:]] == [("500",), (), ()]


def test_when_unsure_a_choice_is_offered_and_near_cards_rules_hold_too():
    retriever = Retriever(CARDS, 2)
    scenario = "my dad fell off a ladder, his leg is bleeding a lot and we have no phone signal"
    found = retriever.find(scenario)
    assert found.unsure, "pick another scenario"
    checked = guard_found(answer("Straighten the bent limb."), found, CARDS, "US", scenario)
    assert len(checked.choices) == 3 and checked.choices[0] == (found.ranked[0].card_id, CARDS[found.ranked[0].card_id].name)
    assert checked.struck and checked.struck[0].card_id == "fracture"
    sure = guard_found("", retriever.find("the oil in my pan is on fire"), CARDS)
    assert not sure.choices and not sure.unsure


def test_no_card_means_the_safe_minimum():
    found = Retriever(CARDS, 2).find("what is the capital of France")
    checked = guard_found("", found, CARDS)
    assert [card.id for card in checked.cards] == [SAFE_MINIMUM] and checked.added


def test_a_json_answer_is_read_as_its_text_twin():
    import json

    twin = Answer(("A man bleeds.",), ("Where from.",), ("Bad.",), ("Loosen the tourniquet.",))
    assert guard(json.dumps(twin.to_dict()), [BLEEDING]) == guard(render_answer(twin), [BLEEDING])


def test_an_unknown_country_is_one_clear_error():
    with pytest.raises(DataError, match="country 'XX'"):
        guard("", [BLEEDING], "XX")


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=300), st.sampled_from(sorted(CARDS)))
def test_any_text_is_kept_byte_for_byte(text, card_id):
    checked = guard(text if not text.lstrip().startswith("{") else "x" + text, [CARDS[card_id]])
    assert all(checked.text[line.start:line.end] == line.text and line.text.strip() for line in checked.lines)
    assert checked.to_dict()["lines"] is not None


def test_calling_for_help_is_never_talked_down_except_in_a_cards_own_words():
    checked = guard(answer("Do not call for help unless told to do so.", "Never phone the police.", "Do not call out their name."), [BLEEDING])
    assert [line.text for line in checked.struck] == ["Do not call for help unless told to do so.", "Never phone the police."]
    car = CARDS["vehicle_in_water"]
    assert not guard(answer(*(rule.text for rule in car.never)), [car]).struck


def test_when_unsure_a_step_must_keep_the_rules_of_what_it_may_be_instead():
    aspirin = "Offer aspirin to chew if awake, not allergic and not bleeding."
    cards = [CARDS["heart_attack"], CARDS["stroke"]]
    assert aspirin in steps_of(cards[0])
    sure = guard(answer(aspirin), cards[:1])
    assert not sure.struck and sure.lines[-1].on_card
    unsure = guard(answer(aspirin), cards, unsure=True, choices=cards)
    assert [line.text for line in unsure.struck] == [aspirin] and aspirin not in [step.text for step in unsure.added]
    assert aspirin in [step.text for step in unsure.cards[0].steps], "the card itself is shown whole"


@pytest.mark.parametrize("forbidding, other, action, rule", [
    ("stroke", "heart_attack", "Offer aspirin to chew if awake, not allergic and not bleeding.", "Do not give aspirin."),
    ("lightning", "wildfire", "If caught outside, lie face down on bare or burned ground.", "Do not lie flat on the ground."),
    ("volcanic_ash", "wildfire", "Drive away from the fire with windows closed and headlights on.", "Do not drive in heavy ash."),
    ("snake_bite", "severe_bleeding", "Put a tourniquet above a limb wound that keeps bleeding, noting the time.", "Do not use a tourniquet or ice.")])
def test_what_one_of_two_fitting_cards_forbids_is_struck_and_not_added(forbidding, other, action, rule):
    text = answer(action)
    for cards in ([CARDS[forbidding], CARDS[other]], [CARDS[other], CARDS[forbidding]]):  # which of them fits better is a guess
        checked = guard(text, cards, fits=2)
        assert [(line.text, line.breaks, line.card_id) for line in checked.struck] == [(action, rule, forbidding)]
        assert action not in [step.text for step in checked.added] and set(steps_of(CARDS[forbidding])) <= {step.text for step in checked.added}
        assert not guard(answer(*steps_of(CARDS[forbidding])), cards, fits=2).struck
    assert not guard(text, [CARDS[other]]).struck, "alone it is right"


@given(st.sampled_from(sorted(CARDS)), st.sampled_from(sorted(CARDS)))
@settings(deadline=None, max_examples=40)
def test_nothing_shown_of_two_fitting_cards_breaks_a_rule_of_the_other(first, second):
    cards = [CARDS[first], CARDS[second]] if first != second else [CARDS[first]]
    shown = guard(answer(*(step for card in cards for step in steps_of(card))), cards, fits=len(cards)).shown_text
    guidance = shown[shown.index("GUIDANCE"):].splitlines()[1:]
    for card, other in zip(cards, reversed(cards)):
        lines = [line for line in guidance if line[2:] in steps_of(card)]
        assert not [rule for line in lines if other is not card for rule in examine(f"GUIDANCE\n{line}", [other]).rules if rule.stance == "affirmed"]
