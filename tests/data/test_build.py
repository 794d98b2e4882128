"""The embedded dataset: sizes, splits that share nothing, hard cases in their shares, answers that keep to their cards, the same bytes each time."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from emergency_kit.artifacts import verify_folder
from emergency_kit.config import load_config
from emergency_kit.data import build, describe
from emergency_kit.data.answers import check_record
from emergency_kit.data.format import Record, parse_answer
from emergency_kit.data.load import load_split
from emergency_kit.knowledge.situations import load_situations
from emergency_kit.data.variation import load_additions
from emergency_kit.errors import DataError
from emergency_kit.knowledge.cards import SAFE_MINIMUM, load_cards
from emergency_kit.knowledge.retrieve import Retriever

CONFIG = load_config("embedded").config.dataset
CARDS = load_cards()
TEST_ONLY = {"carbon_monoxide", "earthquake", "vehicle_in_water", "chemical_burn", "snake_bite", "explosion", "choking_alone", "frostbite",
             "landslide", "volcanic_ash", "elevator_stuck", "bomb_threat"}


@pytest.fixture(scope="module")
def records() -> dict[str, list[Record]]:
    return build.build_records(CONFIG.build_seed, CONFIG.build_size, CONFIG.top_k)


def followed(record: Record) -> list[str]:
    """The cards that an answer was built from."""
    hazards = record.id.split("/")[0].split("+")
    return hazards if record.cards is None else [hazard for hazard in hazards if hazard in record.cards] or [SAFE_MINIMUM]


def test_sizes_and_ids(records: dict[str, list[Record]]) -> None:
    every = [record for items in records.values() for record in items]
    assert len(every) == CONFIG.build_size >= 3000
    assert len({record.id for record in every}) == len({(record.input, record.output) for record in every}) == len(every)
    assert len({record.input for record in every}) == len(every)
    assert max(Counter(record.output for record in every).values()) <= 0.02 * len(every)


def test_one_hazard_in_six_stands_in_the_test_split_only(records: dict[str, list[Record]]) -> None:
    hazards = {split: {hazard for record in items for hazard in record.id.split("/")[0].split("+")} for split, items in records.items()}
    assert hazards["test"] - hazards["train"] - hazards["validation"] == TEST_ONLY
    assert set(CARDS) == hazards["test"] and len(TEST_ONLY) >= 0.15 * len(CARDS)


def test_roles_and_compounds_that_training_never_sees(records: dict[str, list[Record]]) -> None:
    roles = {split: {record.role for record in items} for split, items in records.items()}
    assert {"child", "security guard", "hotel receptionist", "bus driver", "care worker", "lifeguard"} <= roles["test"] - roles["train"] - roles["validation"]
    pairs = {split: {record.id.split("/")[0] for record in items if "+" in record.id} for split, items in records.items()}
    assert len(pairs["test"]) >= 8 and len(pairs["train"]) >= 8 and not pairs["test"] & pairs["train"]


def test_nothing_crosses_from_train_into_another_split(records: dict[str, list[Record]]) -> None:
    assert describe.crossings(records) == []


def test_the_check_for_crossings_finds_a_shared_run_of_words_and_a_near_copy() -> None:
    told = "the oil in my frying pan just caught fire and the curtains are next to it"
    train = Record("1", told, "x", hazards=("a",))
    run = describe.crossings({"train": [train], "validation": [], "test": [replace(train, id="2", input="hello, " + told[:40])]})
    assert run and "2" in run[0]
    near = describe.crossings({"train": [train], "validation": [], "test": [replace(train, id="3", input=told.replace("frying", "big"))]})
    assert any("near-duplicates" in line for line in near)


def test_every_record_passes_its_own_cards_checks(records: dict[str, list[Record]]) -> None:
    for record in (record for items in records.values() for record in items):
        assert parse_answer(record.output).valid, record.id
        assert check_record(record, CARDS, followed(record)) == [], record.id


def test_the_check_finds_a_missing_action_a_broken_rule_and_a_number_of_its_own(records: dict[str, list[Record]]) -> None:
    record = next(item for item in records["train"] if followed(item) == ["thermal_burn"] and not item.lacks and not item.country)
    action = CARDS["thermal_burn"].critical_actions[1].text
    assert any("lacks the action" in problem for problem in check_record(replace(record, output=record.output.replace(action, "Wait.")), CARDS, ["thermal_burn"]))
    assert any("breaks" in problem for problem in check_record(replace(record, output=record.output + "\n20. Put ice on it."), CARDS, ["thermal_burn"]))
    assert any("number 45" in problem for problem in check_record(replace(record, output=record.output + "\n20. Cool it for 45 minutes."), CARDS, ["thermal_burn"]))


def test_hard_cases_have_their_shares(records: dict[str, list[Record]]) -> None:
    train = records["train"]
    share = {case: count / len(train) for case, count in describe.hard_cases(train).items()}
    assert 0.35 < share["the right card alone"] < 0.65 and 0.2 < share["the right card among others"] < 0.5, share
    assert 0.02 < share["a wrong card only: the answer must not follow it"] < 0.12 and 0.03 < share["no card: the safe minimum"] < 0.15, share
    assert share["two cards that both apply"] > 0.04 and share["somebody contradicts the card"] > 0.15 and share["an action is impossible"] > 0.08, share
    second = [record for record in train if len(record.hazards) == 1 and record.hazards[0] in record.cards[1:]]
    assert len(second) > 20  # the right card is not always the first


def test_a_wrong_card_is_not_followed_and_without_one_the_answer_says_so(records: dict[str, list[Record]]) -> None:
    odd = [record for record in records["train"] if followed(record) == [SAFE_MINIMUM]]
    assert any(record.cards for record in odd) and any(not record.cards for record in odd)
    for record in odd:
        assert record.hazards == (SAFE_MINIMUM,) and "No card fits this situation" in record.output
        guidance = parse_answer(record.output).answer.guidance
        for card_id in record.cards:
            assert not {action.text for action in CARDS[card_id].critical_actions} & set(guidance) - {action.text for action in CARDS[SAFE_MINIMUM].critical_actions}


def test_an_impossible_action_is_replaced_by_what_the_card_says_instead(records: dict[str, list[Record]]) -> None:
    changed = 0
    for record in records["train"]:
        for card_id in followed(record):
            for action in CARDS[card_id].critical_actions:
                if action.instead and action.needs in record.lacks and len(followed(record)) == 1:
                    changed += 1
                    assert action.instead in record.output and f"Without {action.needs}, step" in record.output, record.id
    assert changed > 100


def test_a_country_shows_its_own_number(records: dict[str, list[Record]]) -> None:
    from emergency_kit.knowledge.emergency_numbers import load_numbers

    abroad = [record for record in records["train"] if record.country and "a phone" not in record.lacks]
    assert len({record.country for record in abroad}) > 60
    for record in abroad[:200]:
        country = load_numbers()[record.country]
        assert any(number in record.output for numbers in (country.ambulance, country.fire, country.police) for number in numbers), record.id


def test_test_records_get_what_retrieval_finds_when_they_are_loaded(records: dict[str, list[Record]], tmp_path: Path) -> None:
    assert all(record.cards is None and record.hazards == tuple(record.id.split("/")[0].split("+")) for record in records["test"])
    (tmp_path / "test.jsonl").write_text("".join(record.to_json() + "\n" for record in records["test"][:60]))
    loaded = load_split(load_config("embedded", settings=[f"dataset.name={tmp_path}", "dataset.validation_split=test", f"training.output_dir={tmp_path}/out"]), "test")
    retriever = Retriever(CARDS, CONFIG.top_k)
    assert len(loaded) == 60
    for record in loaded:
        found = retriever.find(record.input)
        assert (record.cards, record.fits) == (found.ids, found.fits)


def test_same_seed_same_bytes_other_seed_other_bytes(tmp_path: Path) -> None:
    config = load_config("embedded", settings=["dataset.build_size=400"])
    folders = [build.build(config, tmp_path / "a"), build.build(config, tmp_path / "b"),
               build.build(load_config("embedded", settings=["dataset.build_size=400", "dataset.build_seed=8"]), tmp_path / "c")]
    texts = [(folder / "train.jsonl").read_bytes() for folder in folders]
    assert texts[0] == texts[1] != texts[2]
    assert {path.name for path in folders[0].iterdir()} == {"train.jsonl", "validation.jsonl", "test.jsonl", "manifest.json", "README.md"}
    assert not verify_folder(folders[0])
    assert json.loads(texts[0].splitlines()[0]).keys() == vars(Record("", "", "")).keys()
    assert sum(len((folders[0] / f"{split}.jsonl").read_text().splitlines()) for split in build.SPLITS) == 400


def test_a_small_size_still_holds_every_hazard_of_the_training_split() -> None:
    records = build.build_records(1, 400, 2)
    assert len({record.id.split("/")[0] for record in records["train"]}) >= 57


def test_more_than_the_material_gives_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "ROUNDS", 0)
    with pytest.raises(DataError, match="gives no 5000 distinct records; ask for fewer"):
        build.build_records(1, 5000, 2)


@pytest.mark.parametrize(("content", "words"), [
    ("kitchen_grease_fire:\n  misleading: []\n  situations:\n    - split: train\n      facts: [a]\n", "kitchen_grease_fire 1"),
    ("kitchen_grease_fire:\n  - split: train\n", "misleading and situations"),
    ("kitchen_grease_fire: [", "not valid YAML"),
    ("a:\n  misleading: []\n  situations:\n    - {split: tran, setting: home, facts: [a], unknown: [b], tellings: [{role: r, text: t}]}\n", "'tran'"),
])
def test_a_broken_scenario_file_is_named(tmp_path: Path, content: str, words: str) -> None:
    (tmp_path / "fire.yaml").write_text(content)
    with pytest.raises(DataError, match="fire.yaml") as caught:
        load_situations(tmp_path)
    assert words in str(caught.value)


def test_additions_are_told_apart_by_split_and_state_what_they_say() -> None:
    additions = load_additions()
    assert all({item.split for item in items} == {"train", "validation", "test"} for items in additions.values())
    assert all(item.lacks and item.fact for item in additions["additions"] if item.kind == "lack")
    assert all("{advice}" in item.text and "{advice}" in item.fact for item in additions["speakers"])


def test_the_dataset_card_in_the_docs_is_current(records: dict[str, list[Record]]) -> None:
    assert describe.describe(records, CONFIG.build_seed) == Path("docs/Dataset-Card.md").read_text(encoding="utf-8"), \
        "run: emergency-kit data build --overwrite, and copy outputs/data/embedded/README.md to docs/Dataset-Card.md"
