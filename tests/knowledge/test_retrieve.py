"""Retrieval: measured on scenarios whose words were chosen without the cards at hand, and on texts about no emergency."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import yaml

from emergency_kit.knowledge.cards import load_cards
from emergency_kit.knowledge.retrieve import SAFE_MINIMUM, SCORE_FLOOR, SECOND_CARD_SHARE, Retriever, stem

CASES = yaml.safe_load((Path(__file__).parent / "retrieval_cases.yaml").read_text(encoding="utf-8"))
CARDS = load_cards()
RETRIEVER = Retriever(CARDS)


def hit_rate(group: str) -> tuple[float, list[str]]:
    """Share of scenarios whose first hit is the right card, and those where it is not."""
    pairs = [(card_id, text) for card_id, texts in CASES[group].items() for text in texts]
    misses = [f"{card_id}: {text}" for card_id, text in pairs if [hit.card_id for hit in RETRIEVER.find(text)][:1] != [card_id]]
    return 1 - len(misses) / len(pairs), misses


@pytest.mark.parametrize(("group", "per_card"), [("hazards", 3), ("held_out", 1)])
def test_the_right_card_comes_first(group, per_card):
    hazards = set(CARDS) - {SAFE_MINIMUM}
    assert set(CASES[group]) == hazards
    assert all(len(texts) >= per_card for texts in CASES[group].values())
    rate, misses = hit_rate(group)
    assert rate >= 0.85, misses


@pytest.mark.parametrize("group", ["nothing", "held_out_nothing"])
def test_texts_about_no_emergency_find_nothing(group):
    assert len(CASES[group]) >= 12
    found = [text for text in CASES[group] if RETRIEVER.find(text)]
    assert len(found) <= 0.2 * len(CASES[group]), found


def test_no_scenario_stands_in_a_card():
    words = " ".join(card.model_dump_json() for card in CARDS.values()).lower()
    texts = [text for group in ("hazards", "held_out") for texts in CASES[group].values() for text in texts]
    assert [text for text in texts if text.lower() in words] == []


@pytest.mark.parametrize("text", ["", "   ", "!?", "\n\t", "the of and", "zzzz qqqq", "日本語", "é" * 5000])
def test_text_without_known_words_finds_nothing(text):
    assert RETRIEVER.find(text) == []


def test_safe_minimum_is_never_found():
    card = CARDS[SAFE_MINIMUM]
    for text in (card.name, "safe minimum", *card.also_called, *card.signs):
        assert SAFE_MINIMUM not in [hit.card_id for hit in RETRIEVER.find(text)]


def test_hits_are_ordered_above_the_floor_and_near_the_first():
    for texts in CASES["hazards"].values():
        for text in texts:
            hits = Retriever(CARDS, top_k=5).find(text)
            scores = [hit.score for hit in hits]
            assert scores == sorted(scores, reverse=True)
            assert all(score >= max(SCORE_FLOOR, SECOND_CARD_SHARE * scores[0]) for score in scores)
            assert all(hit.words for hit in hits)
            assert RETRIEVER.find(text) == hits[:2]


def test_two_emergencies_at_once_give_two_cards():
    hits = RETRIEVER.find("car crash on the highway, the driver has a deep cut and blood is spurting")
    assert {hit.card_id for hit in hits} == {"road_crash", "severe_bleeding"}


def test_a_new_index_gives_the_same_hits_whatever_the_order_of_cards():
    turned = Retriever(dict(reversed(CARDS.items())))
    for texts in CASES["hazards"].values():
        for text in texts:
            again = turned.find(text)
            assert [hit.card_id for hit in again] == [hit.card_id for hit in RETRIEVER.find(text)]


def test_no_cards_find_nothing():
    assert Retriever({}).find("fire") == []


def test_quiet_and_quick(capfd):
    retriever = Retriever(CARDS)
    start = time.perf_counter()
    for _ in range(20):
        retriever.find(CASES["hazards"]["stroke"][0])
    assert (time.perf_counter() - start) / 20 < 0.02
    assert capfd.readouterr() == ("", "")


def test_stem_joins_the_forms_of_a_word():
    assert stem("burning") == stem("burned") == stem("burns") == "burn"
    assert stem("stopped") == stem("stops") == "stop"
    assert stem("bees") == stem("bee") and stem("gas") == "gas"
