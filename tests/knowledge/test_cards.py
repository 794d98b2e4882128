"""Knowledge cards: the shipped ones hold to their own rules, and a broken file says where it is broken."""

from __future__ import annotations

import copy
import re

import pytest
import yaml

from emergency_kit.errors import DataError
from emergency_kit.knowledge.cards import CARD_FOLDER, card_digest, contains_phrase, load_cards, normalise

CARDS = load_cards()
# What the project promises to cover.
HAZARDS = """kitchen_grease_fire house_fire_smoke smoke_escape clothing_on_fire electrical_fire vehicle_fire wildfire gas_leak carbon_monoxide explosion
chemical_spill radiation cardiac_arrest_adult cardiac_arrest_child cardiac_arrest_infant choking_adult choking_infant choking_alone asthma_attack
anaphylaxis drowning opioid_overdose swallowed_poison suicidal_crisis panic_attack psychological_first_aid severe_bleeding thermal_burn chemical_burn
electrical_burn head_injury spine_injury fracture shock electric_shock heat_stroke hypothermia frostbite snake_bite flood earthquake tornado hurricane
tsunami lightning blizzard landslide volcanic_ash heat_wave power_cut water_contamination food_safety generator_use road_crash vehicle_in_water
elevator_stuck building_collapse crowd_crush active_attacker bomb_threat home_intrusion domestic_violence missing_child stroke heart_attack seizure
low_blood_sugar high_blood_sugar childbirth safe_minimum""".split()
# The words that a prompt may spend on a card: two cards, a situation and an answer stay within 1024 tokens.
PROMPT_WORDS = 150
BASE = yaml.safe_load((CARD_FOLDER / "mind.yaml").read_text(encoding="utf-8"))


def save_folder(folder, document, name="mind.yaml"):
    (folder / name).write_text(yaml.safe_dump(document, sort_keys=False), encoding="utf-8")
    return folder


def altered(**changes):
    """The shipped file with fields of its card replaced; None takes a field away."""
    document = copy.deepcopy(BASE)
    for field, value in changes.items():
        document["cards"][0][field] = value
        if value is None:
            del document["cards"][0][field]
    return document


def prompt_texts(card):
    rules = [text for action in card.critical_actions for text in (action.text, action.instead or "")] + [rule.text for rule in card.never]
    return [card.name, *card.dangers, *rules, *card.uncertainties, *card.escalate_when]


def test_every_promised_hazard_has_a_card():
    assert set(CARDS) == set(HAZARDS) and len(HAZARDS) > 60
    assert len({card.category for card in CARDS.values()}) >= 12


@pytest.mark.parametrize("card", CARDS.values(), ids=CARDS.keys())
def test_a_card_is_short_and_plain(card):
    assert 4 <= len(card.critical_actions) <= 6 and 2 <= len(card.never) <= 4
    assert 2 <= len(card.uncertainties) <= 3 and len(card.dangers) <= 2
    assert sum(len(text.split()) for text in prompt_texts(card)) <= PROMPT_WORDS
    for text in [action.text for action in card.critical_actions] + [rule.text for rule in card.never]:
        assert len(text.split()) <= 14 and text.endswith(".") and not re.search(r'[();"]', text), text


@pytest.mark.parametrize("card", CARDS.values(), ids=CARDS.keys())
def test_a_card_calls_the_local_number_and_no_countrys(card):
    actions = [action.text for action in card.critical_actions]
    assert any("Call your local emergency number" in text for text in actions)
    for text in prompt_texts(card):
        assert not re.search(r"\b(911|999|112|000|988)\b", text), text


@pytest.mark.parametrize("card", CARDS.values(), ids=CARDS.keys())
def test_every_digit_in_a_text_has_a_sourced_number(card):
    texts = [action.text for action in card.critical_actions] + [rule.text for rule in card.never]
    stated = {float(number) for text in texts for number in re.findall(r"\d+(?:\.\d+)?", text)}
    assert stated <= {float(number.value) for number in card.numbers}


def test_phrases_are_not_listed_twice():
    for card in CARDS.values():
        for phrases in [a.phrases for a in card.critical_actions] + [n.broken_by for n in card.never]:
            assert len(set(phrases)) == len(phrases), (card.id, phrases)


ACTION = {"text": "Stay with them.", "phrases": ["stay with them", "stay near", "keep them company"]}
NEVER = {"text": "Do not go.", "broken_by": ["go away", "leave them"]}
SOURCE = {"body": "WHO", "title": "A guide", "year": 2021}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sauces": []}, ["sauces", "Extra inputs"]),
        ({"sources": None}, ["sources", "Field required"]),
        ({"sources": [SOURCE]}, ["sources", "at least 2"]),
        ({"sources": [SOURCE, SOURCE | {"year": 1066}]}, ["sources.1.year", "1066"]),
        ({"sources": [SOURCE, SOURCE | {"year": 2999}]}, ["sources.1.year", "2999"]),
        ({"critical_actions": [ACTION | {"phrases": ["stay with them", "stay near"]}]}, ["critical_actions.0.phrases", "at least 3"]),
        ({"critical_actions": [ACTION | {"phrases": ["stay near", "stay with them", "stay by"]}]}, ["critical_actions.0", "stay near"]),
        ({"critical_actions": [ACTION | {"phrases": ["stay with them", "Stay near", "stay by"]}]}, ["phrases.1", "Stay near"]),
        ({"never": [NEVER | {"broken_by": ["go away"]}]}, ["never.0.broken_by", "at least 2"]),
        ({"never": [NEVER | {"text": "Never go."}]}, ["never.0.text", "Never go."]),
        ({"dangers": ["two\nlines"]}, ["dangers.0", "one line"]),
        ({"dangers": ["a\ttab"]}, ["dangers.0", "one line"]),
        ({"name": "  "}, ["name", "one line"]),
        ({"name": True}, ["name", "True"]),
        ({"signs": []}, ["signs", "at least 1"]),
        ({"signs": "one text"}, ["signs", "one text"]),
        ({"numbers": [{"what": "x", "value": float("nan"), "unit": "m", "tolerance": [1, 2], "source": "WHO", "year": 2021}]}, ["numbers.0.value"]),
        ({"numbers": [{"what": "x", "value": 5, "unit": "m", "tolerance": [1, 2], "source": "WHO", "year": 2021}]}, ["numbers.0", "tolerance"]),
        ({"numbers": [{"what": "x", "value": 5, "unit": "furlongs", "tolerance": [5, 5], "source": "WHO", "year": 2021}]}, ["numbers.0.unit", "furlongs"]),
        ({"critical_actions": [ACTION | {"needs": "a phone"}]}, ["critical_actions.0", "instead"]),
        ({"critical_actions": [ACTION | {"needs": "a horse", "instead": "Walk."}]}, ["critical_actions.0.needs", "a horse"]),
        ({"service": "navy"}, ["service", "navy"]),
        ({"category": "mind"}, ["category", "head of the file"]),
    ],
)
def test_a_broken_card_is_named(tmp_path, changes, words):
    with pytest.raises(DataError) as caught:
        load_cards(save_folder(tmp_path, altered(**changes)))
    message = str(caught.value)
    assert "\n" not in message
    for word in ["mind.yaml", "suicidal_crisis", *words]:
        assert word in message, message


@pytest.mark.parametrize(
    "text",
    ["category: mind\ncards: [", "just text", "", "category: mind\n", "category: mind\ncards: 3\n", "category: other\ncards: []\n",
     "category: mind\ncards: [7]\n", "category: mind\ncards: [2001-13-45]\n", "category: mind\ncategory: mind\ncards: []\n", "category: mind\ncards: []\nextra: 1\n",
     "category: mind\ncards: []\n? [a]\n: b\n", "category: !!python/object:os.system mind\ncards: []\n", "\x00"],
)
def test_a_malformed_file_is_named(tmp_path, text):
    (tmp_path / "mind.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match="mind.yaml") as caught:
        load_cards(tmp_path)
    assert "\n" not in str(caught.value)


def test_bytes_that_are_no_text_are_named(tmp_path):
    (tmp_path / "mind.yaml").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(DataError, match="mind.yaml"):
        load_cards(tmp_path)


def test_a_duplicate_id_is_named(tmp_path):
    save_folder(tmp_path, BASE)
    save_folder(tmp_path, BASE | {"category": "other"}, "other.yaml")
    with pytest.raises(DataError, match="other.yaml.*suicidal_crisis.*twice.*mind"):
        load_cards(tmp_path)


def test_an_empty_or_absent_folder_is_named(tmp_path):
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(DataError, match="no .yaml file"):
            load_cards(folder)


def test_cards_cannot_be_changed_and_the_caller_owns_the_dict():
    card = CARDS["stroke"]
    with pytest.raises(ValueError):
        card.name = "x"
    hash(card)
    load_cards().clear()
    assert load_cards() == CARDS


def test_digest_follows_content_not_order(tmp_path):
    digest = card_digest(CARDS)
    assert re.fullmatch(r"[0-9a-f]{64}", digest)
    assert card_digest(dict(reversed(CARDS.items()))) == digest == card_digest(load_cards(CARD_FOLDER))
    changed = load_cards(save_folder(tmp_path, altered(name="Another name")))
    assert card_digest(CARDS | changed) != digest


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Don’t pour WATER on it!", "don't pour water on it"),
        ("  Re-enter,\tthe “house”\n", "re enter the house"),
        ("2.5 cm... and 1,000 'times'", "2.5 cm and 1 000 times"),
        ("Stop. 5 blows. End", "stop 5 blows end"),
        ("ﬁre_ﬁghter", "fire fighter"),
        ("", ""),
    ],
)
def test_normalise(text, expected):
    assert normalise(text) == expected
    assert normalise(normalise(text)) == normalise(text)


def test_phrases_match_whole_words():
    assert contains_phrase("do cpr now", "cpr") and not contains_phrase("scpr", "cpr") and not contains_phrase("", "cpr")
