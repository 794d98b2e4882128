"""The embedded dataset: sizes, splits that share nothing, hard cases in their shares, the same bytes each time."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import pytest

from emergency_kit.artifacts import verify_folder
from emergency_kit.config import load_config
from emergency_kit.data import build
from emergency_kit.data.format import Record, parse_answer
from emergency_kit.errors import DataError
from emergency_kit.evaluation.safety import find_actions
from emergency_kit.knowledge.cards import load_cards, normalise


@pytest.fixture(scope="module")
def records() -> dict[str, list[Record]]:
    config = load_config("embedded").config.dataset
    return build.build_records(config.build_seed, config.top_k)


def grams(text: str, size: int) -> set[tuple[str, ...]]:
    words = normalise(text).split()
    return {tuple(words[start:start + size]) for start in range(len(words) - size + 1)}


def test_sizes_and_ids(records: dict[str, list[Record]]) -> None:
    assert len(records["train"]) >= 240 and len(records["validation"]) >= 40 and len(records["test"]) >= 40
    ids = [record.id for split in records.values() for record in split]
    assert len(ids) == len(set(ids))


def test_at_least_three_hazards_stand_in_the_test_split_only(records: dict[str, list[Record]]) -> None:
    hazards = {split: {record.id.split("/")[0] for record in items} for split, items in records.items()}
    held_out = hazards["test"] - hazards["train"] - hazards["validation"]
    assert held_out == {"carbon_monoxide", "earthquake", "vehicle_in_water", "chemical_burn", "snake_bite"}
    assert len(held_out) >= 0.15 * (len(load_cards()) - 1)


def test_no_scenario_or_near_copy_stands_in_two_splits() -> None:
    """No shared sentence, and word 5-grams overlap by less than a fifth (Jaccard) between any two splits' tellings."""
    tellings = list(build.iterate_tellings())
    seen: dict[str, str] = {}
    for split, text in tellings:
        for sentence in re.split(r"(?<=[.!?])\s+", text):
            key = normalise(sentence)
            if len(key.split()) >= 4:
                assert seen.setdefault(key, split) == split, sentence
    sets = [(split, text, grams(text, 5), set(normalise(text).split())) for split, text in tellings]
    for index, (split, text, five, words) in enumerate(sets):
        for other_split, other_text, other_five, other_words in sets[index + 1:]:
            if split != other_split:
                assert len(five & other_five) <= 0.2 * max(1, len(five | other_five)), (text, other_text)
                assert len(words & other_words) <= 0.6 * len(words | other_words), (text, other_text)


def test_the_near_copy_check_can_fail() -> None:
    first, second = "the oil in my frying pan just caught fire", "the oil in my frying pan just caught fire help"
    assert len(grams(first, 5) & grams(second, 5)) > 0.2 * len(grams(first, 5) | grams(second, 5))


def test_every_answer_has_four_sections_and_all_actions_of_its_card(records: dict[str, list[Record]]) -> None:
    cards = load_cards()
    for record in records["train"]:
        assert parse_answer(record.output).valid, record.id
        assert all(finding.given for finding in find_actions(record.output, [cards[hazard] for hazard in record.hazards])), record.id
        assert all(rule.text in record.output for hazard in record.hazards for rule in cards[hazard].never)


def test_hard_cases_have_their_shares(records: dict[str, list[Record]]) -> None:
    train = records["train"]
    hazard_of = [record.id.split("/")[0] for record in train]
    share = {
        "right card alone": sum(record.cards == (hazard,) for record, hazard in zip(train, hazard_of)),
        "right card among others": sum(len(record.cards) > 1 and hazard in record.cards for record, hazard in zip(train, hazard_of)),
        "wrong card only": sum(bool(record.cards) and hazard not in record.cards for record, hazard in zip(train, hazard_of)),
        "no card": sum(not record.cards for record in train),
        "bystander contradicts": sum("Do not follow the advice" in record.output for record in train),
    }
    share = {name: count / len(train) for name, count in share.items()}
    assert 0.35 < share["right card alone"] < 0.65 and 0.25 < share["right card among others"] < 0.5, share
    assert 0.03 < share["wrong card only"] < 0.15 and 0.03 < share["no card"] < 0.15 and share["bystander contradicts"] > 0.15, share
    first = Counter(record.cards.index(hazard) for record, hazard in zip(train, hazard_of) if len(record.cards) > 1 and hazard in record.cards)
    assert min(first[0], first[1]) > 10  # the right card is not always the first


def test_where_no_card_fits_the_answer_says_so(records: dict[str, list[Record]]) -> None:
    odd = [record for record in records["train"] if record.id.split("/")[0] not in record.cards]
    assert odd
    for record in odd:
        assert record.hazards == ("safe_minimum",) and "No card fits this situation" in record.output
        assert "Call your local emergency number." in record.output


def test_test_prompts_carry_what_retrieval_finds(records: dict[str, list[Record]]) -> None:
    from emergency_kit.knowledge.retrieve import Retriever

    retriever = Retriever(load_cards(), load_config("embedded").config.dataset.top_k)
    assert all(record.cards == tuple(hit.card_id for hit in retriever.find(record.input)) for record in records["test"])


def test_same_seed_same_bytes_other_seed_other_bytes(tmp_path: Path) -> None:
    config = load_config("embedded")
    folders = [build.build(config, tmp_path / "a"), build.build(config, tmp_path / "b"),
               build.build(load_config("embedded", settings=["dataset.build_seed=8"]), tmp_path / "c")]
    texts = [(folder / "train.jsonl").read_bytes() for folder in folders]
    assert texts[0] == texts[1] != texts[2]
    assert {path.name for path in folders[0].iterdir()} == {"train.jsonl", "validation.jsonl", "test.jsonl", "manifest.json"}
    assert not verify_folder(folders[0])
    assert json.loads(texts[0].splitlines()[0]).keys() == vars(Record("", "", "")).keys()


def test_a_broken_scenario_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "fire.yaml").write_text("kitchen_grease_fire:\n  - split: train\n    facts: [a]\n")
    with pytest.raises(DataError, match="fire.yaml: kitchen_grease_fire 1: lacks 'unknown'"):
        build.load_situations(tmp_path)
