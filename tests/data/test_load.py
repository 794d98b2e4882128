"""Splits: what is said, what is rejected and listed, what is held out and what is sampled."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emergency_kit.config import load_config
from emergency_kit.data.load import load_split, open_split, open_splits
from emergency_kit.errors import DataError
from tests.data.files import resolve, write

ROW = {"id": "1", "input": "oil is burning in the pan", "output": "FACTS\n• Fire."}
PLACES = "attic barn cellar dairy embassy factory garage hotel igloo jetty kiosk library mill nursery office palace quarry ranch stable tower".split()


def numbered(count: int, **more: Any) -> list[dict[str, Any]]:
    """Rows that do not resemble one another."""
    return [{**ROW, "id": str(n), "input": " ".join(f"{place}{n}" for place in PLACES), **more} for n in range(count)]


def test_a_folder_with_splits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for split in ("train", "validation", "test"):
        write(tmp_path / f"{split}.jsonl", {**ROW, "id": split})
    for split in ("train", "validation", "test"):
        record, = load_split(resolve(tmp_path), split)
        assert record.id == split and record.cards is None
        assert capsys.readouterr().out == f"{split}: {tmp_path / split}.jsonl read as input/output (input, output, id)\n"


def test_cards_are_found_for_records_that_name_none(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", ROW, {**ROW, "cards": ["stroke"]}, {**ROW, "cards": []})
    write(tmp_path / "validation.jsonl", ROW)
    found, named, none = load_split(resolve(tmp_path, "dataset.grounding=cards"), "train")
    assert "kitchen_grease_fire" in found.cards and found.fits >= 1 and named.cards == ("stroke",) and none.cards == ()


def test_columns_of_the_guide_s_dataset(tmp_path: Path) -> None:
    path = write(tmp_path / "hub.jsonl", {"Instruction": "Advise.", "Input": "smoke", "Output": "FACTS\n• Smoke.", "category": "fire", "role": "parent"},
                 {"Instruction": "Advise.", "Input": "gas", "Output": "FACTS\n• Gas.", "category": "gas", "role": None})
    resolved = load_config("mistral-7b", settings=[f"dataset.name={path}"])
    records = load_split(resolved, "train") + load_split(resolved, "validation")
    assert {(record.instruction, record.input, record.category, record.role) for record in records} == {
        ("Advise.", "smoke", "fire", "parent"), ("Advise.", "gas", "gas", "")}


def test_the_form_is_said_once_and_again_where_it_changes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "a.jsonl", {"instruction": "Say", "input": "smoke", "output": "A", "score": 3}, {"instruction": "smoke", "output": "A"}, {"instruction": "gas", "output": "A"})
    write(tmp_path / "b.jsonl", {"messages": [{"role": "user", "content": "smoke"}, {"role": "assistant", "content": "A"}]})
    split = open_split(resolve(tmp_path, "dataset.validation_split=train"), "train")
    assert [len(list(split)), len(list(split))] == [4, 4]
    assert capsys.readouterr().out.splitlines() == [
        f"train: 2 files of {tmp_path} read as Alpaca (instruction, input, output); columns not read: score, messages",
        f"train: from {tmp_path}/a.jsonl:2 on also read as instruction/output (instruction, output)",
        f"train: from {tmp_path}/b.jsonl:1 on also read as messages (messages)"]


def test_rejected_rows_are_counted_by_reason_and_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.jsonl"
    write(path, ROW, {**ROW, "output": ""}, {"foo": 1}, {**ROW, "output": " "}, {**ROW, "input": "half \\ud83d"})
    path.write_text(path.read_text().replace("\\\\ud83d", "\\ud83d") + '{"input": "cut sh')
    resolved = resolve(path, f"training.output_dir={tmp_path / 'out'}", "dataset.validation_split=train")
    assert [record.id for record in load_split(resolved, "train")] == ["1"]
    listed = tmp_path / "out" / "data" / "rejected-train.jsonl"
    assert f"train: 5 rows rejected (2 empty answer, 1 columns of no known form, 1 half a character (a lone surrogate), 1 not a whole JSON object); listed in {listed}" \
        in capsys.readouterr().out
    lines = [json.loads(line) for line in listed.read_text().splitlines()]
    assert [(line["place"].split(":")[-1], line["reason"]) for line in lines] == [
        ("2", "empty answer"), ("3", "columns of no known form"), ("4", "empty answer"), ("5", "half a character (a lone surrogate)"), ("6", "not a whole JSON object")]
    assert lines[1]["row"] == {"foo": 1} and lines[4]["row"] == {"line": '{"input": "cut sh'}
    with pytest.raises(DataError, match=r"a.jsonl:2: empty answer; mend or remove it \(dataset.strict"):
        load_split(resolve(path, f"training.output_dir={tmp_path / 'out'}", "dataset.validation_split=train", "dataset.strict=true"), "train")
    write(path, ROW)
    load_split(resolved, "train")
    assert not listed.exists() and list(listed.parent.iterdir()) == []


def test_rows_with_unknown_cards_or_countries_are_rejected(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "a.jsonl", ROW, {**ROW, "cards": ["nope"]}, {**ROW, "country": "ZZ"}, {**ROW, "cards": ["stroke"], "country": "de"})
    more = ("dataset.validation_split=train", f"training.output_dir={tmp_path}")
    assert len(load_split(resolve(path, "dataset.grounding=cards", *more), "train")) == 2
    assert "1 unknown card, 1 unknown country code" in capsys.readouterr().out
    assert len(load_split(resolve(path, *more), "train")) == 4  # without cards in the prompt they say nothing


@pytest.mark.parametrize("rows, settings_, message", [
    ([{"input": "a"}], (), r"a.jsonl:1: columns input are no known form .*Next: map them, for instance --set 'dataset.columns"),
    ([{"text": "a"}] * 200, (), "are no known form"),
    ([ROW], ("dataset.columns={input: Question}",), r"a.jsonl:1: no column 'Question', which dataset.columns names for input; it has id, input, output"),
    ([{**ROW, "output": ""}] * 3, (), r"split 'train' has no records; all 3 rows were rejected \(3 empty answer\). Next: emergency-kit data inspect"),
    ([ROW], (), "1 records that say the same cannot be split into training and validation"),
    ([ROW, ROW, {**ROW, "input": ROW["input"].upper() + "!"}], (), "3 records that say the same"),
    ([ROW], ("dataset.train_split=teach", "dataset.validation_split=a"), "no split 'teach'; it has a. Next: name its splits"),
])
def test_bad_data_is_one_error_with_its_place(tmp_path: Path, rows: list[Any], settings_: tuple[str, ...], message: str) -> None:
    path = write(tmp_path / "a.jsonl", *rows)
    with pytest.raises(DataError, match=message) as error:
        load_split(resolve(path, f"training.output_dir={tmp_path / 'out'}", *settings_), "train")
    assert "\n" not in str(error.value) and str(path) in str(error.value)


def test_an_odd_first_row_does_not_decide_for_the_others(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"note": "made in May"}, *numbered(5))
    assert len(load_split(resolve(path, f"training.output_dir={tmp_path}", "dataset.validation_split=train"), "train")) == 5


def test_a_missing_validation_split_is_held_out_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "all.jsonl", *numbered(60))
    splits = {name: {r.id for r in split} for name, split in open_splits(resolve(path), "train", "validation", "test").items()}
    assert len(splits["train"]) == 54 and len(splits["validation"]) == 6 and not splits["train"] & splits["validation"] and splits["test"] == splits["validation"]
    said = capsys.readouterr().out
    assert f"{path} has no validation split: a tenth of its train records is held out, near-duplicates together (seed 42)" in said
    assert f"{path} has no test split: the validation split stands in for it" in said
    assert {r.id for r in open_split(resolve(path), "validation")} == splits["validation"]
    assert {r.id for r in open_split(resolve(path, "training.seed=1"), "validation")} != splits["validation"]


WORDS = st.lists(st.sampled_from(PLACES), min_size=12, max_size=40)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(texts=st.lists(WORDS, min_size=2, max_size=25, unique_by=tuple), seed=st.integers(0, 5), data=st.data())
def test_splits_made_from_one_file_never_share_a_near_duplicate(tmp_path_factory: pytest.TempPathFactory, texts: list[list[str]], seed: int, data: Any) -> None:
    rows = []
    for number, words in enumerate(texts):
        rows.append({"id": f"{number}", "input": " ".join(words), "output": "A"})
        for copy in range(data.draw(st.integers(0, 2))):
            near = list(words)
            if len(near) > 30:  # one word of 30 leaves at least 0.8 of the triples
                near[data.draw(st.integers(0, len(near) - 1))] = "elsewhere"
            rows.append({"id": f"{number}", "input": " ".join(near).upper() + "!" * copy, "output": "A"})
    path = write(tmp_path_factory.mktemp("split") / "all.jsonl", *rows)
    try:
        train, validation = ([r.id for r in split] for split in open_splits(resolve(path, f"training.seed={seed}"), "train", "validation").values())
    except DataError as error:
        assert "say the same" in str(error)  # all of them in one chain
        return
    assert not set(train) & set(validation) and train and validation
    assert Counter(train + validation) == Counter(row["id"] for row in rows)


def test_max_samples_are_drawn_after_shuffling_and_balanced_by_category(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "train.jsonl", *numbered(80, category="fire"), *({**row, "id": f"g{row['id']}"} for row in numbered(15, category="gas")), *numbered(5, category="flood"))
    write(tmp_path / "validation.jsonl", *numbered(30))
    def draw(*more: str) -> list[Any]:
        return load_split(resolve(tmp_path, f"training.output_dir={tmp_path / 'out'}", *more), "train")

    thirty = draw("dataset.max_samples=30")
    assert Counter(r.category for r in thirty) == {"fire": 13, "gas": 12, "flood": 5} or Counter(r.category for r in thirty) == {"fire": 12, "gas": 13, "flood": 5}
    assert [r.id for r in thirty if r.category == "fire"] != [str(n) for n in range(12)]  # not simply the first
    assert "train: 30 of 100 records drawn, the categories in turn (seed 42)" in capsys.readouterr().out
    assert draw("dataset.max_samples=30") == thirty != draw("dataset.max_samples=30", "training.seed=1")
    assert len(draw("dataset.max_samples=1000")) == 100 == len(draw())
    assert len(load_split(resolve(tmp_path, f"training.output_dir={tmp_path / 'out'}", "dataset.max_eval_samples=7"), "validation")) == 7


def test_sampling_and_holding_out_together(tmp_path: Path) -> None:
    path = write(tmp_path / "all.jsonl", *numbered(100, category="a"))
    splits = {name: {r.id for r in split} for name, split in open_splits(resolve(path, "dataset.max_samples=20", "dataset.max_eval_samples=5"), "train", "validation").items()}
    assert len(splits["train"]) == 20 and len(splits["validation"]) == 5 and not splits["train"] & splits["validation"]


def test_a_file_that_changes_between_two_readings_is_noticed(tmp_path: Path) -> None:
    path = write(tmp_path / "all.jsonl", *numbered(50))
    split = open_split(resolve(path, "dataset.max_samples=20"), "train")
    reading = iter(split)
    next(reading)
    assert split._kept is not None
    write(path, *numbered(60))
    with pytest.raises(DataError, match="changed while it was read; run again"):
        list(split)
