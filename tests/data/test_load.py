"""Sources: folders, single files, mapped columns and a Hub dataset by one path; each bad input by its place."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from emergency_kit.config import Resolved, load_config
from emergency_kit.data.load import load_split
from emergency_kit.errors import DataError

ROW = {"id": "1", "input": "oil is burning in the pan", "output": "FACTS\n• Fire."}


def resolve(source: object, *settings: str, profile: str = "embedded") -> Resolved:
    return load_config(profile, settings=["model.device=cpu", f"dataset.name={source}", *settings])


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def test_a_folder_with_splits(tmp_path: Path) -> None:
    for split in ("train", "validation", "test"):
        write(tmp_path / f"{split}.jsonl", {**ROW, "id": split})
    for split in ("train", "validation", "test"):
        record, = load_split(resolve(tmp_path), split)
        assert record.id == split and record.cards == ("kitchen_grease_fire",)  # found by retrieval, since the row names none


def test_columns_of_the_guide_s_dataset(tmp_path: Path) -> None:
    path = write(tmp_path / "hub.jsonl", {"Instruction": "Advise.", "Input": "smoke", "Output": "FACTS\n• Smoke.", "category": "fire", "role": "parent"},
                 {"Instruction": "Advise.", "Input": "gas", "Output": "FACTS\n• Gas.", "category": "gas", "role": None})
    resolved = load_config("mistral-7b", settings=[f"dataset.name={path}"])
    records = load_split(resolved, "train") + load_split(resolved, "validation")
    assert {(record.instruction, record.input, record.category, record.role) for record in records} == {
        ("Advise.", "smoke", "fire", "parent"), ("Advise.", "gas", "gas", "")}
    assert all(record.cards == () for record in records)  # not grounded


def test_a_hub_dataset_loads_by_the_same_path(tmp_path: Path) -> None:
    """A dataset repository as the Hub serves it, here as a local one: the `datasets` library reads both."""
    from emergency_kit.data.load import _Hub, _records

    (tmp_path / "repository" / "data").mkdir(parents=True)
    write(tmp_path / "repository" / "data" / "train.jsonl", {"Instruction": "Advise.", "Input": "smoke", "Output": "FACTS\n• Smoke."})
    dataset = load_config("mistral-7b", settings=[f"dataset.name={tmp_path / 'repository'}"]).config.dataset
    dataset = dataset.model_copy(update={"columns": {"instruction": "Instruction", "input": "Input", "output": "Output"}})
    record, = _records(_Hub(dataset), "train", dataset)
    assert (record.instruction, record.input) == ("Advise.", "smoke")


def test_a_missing_validation_split_is_held_out_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "all.jsonl", *({**ROW, "id": str(number)} for number in range(30)))
    train, validation = (load_split(resolve(path), split) for split in ("train", "validation"))
    assert len(train) == 27 and len(validation) == 3 and not {r.id for r in train} & {r.id for r in validation}
    assert "3 of 30 training records are held out" in capsys.readouterr().out
    assert [r.id for r in load_split(resolve(path), "test")] == [r.id for r in validation]
    assert "the validation split stands in" in capsys.readouterr().out


@pytest.mark.parametrize("content, message", [
    (b"", "empty"), (b"\n \n", "empty"),
    (b'{"input": "a", "output": "b"}\n{"input": "a", "outp', r"bad.jsonl:2: not a whole JSON object"),
    (b'{"input": "caf\xe9", "output": "b"}\n', r"bad.jsonl:1: not UTF-8"),
    (b'["a"]\n', r"bad.jsonl:1: got list"),
    (b'{"input": "a"}\n', r"bad.jsonl:1: no column 'output'.*it has input.*dataset.columns"),
    (b'{"input": "a", "output": "  "}\n', r"bad.jsonl:1: record .*the answer \(output\) is empty"),
    (b'{"id": "x", "input": "", "output": "b"}\n', r"record x: both input and instruction are empty"),
    (b'{"input": {"a": 1}, "output": "b"}\n', r"column 'input' holds dict"),
    (b'{"input": "a", "output": "b", "cards": ["nope"]}\n{"input": "a", "output": "b"}\n', r"card 'nope' is not among"),
])
def test_bad_files_are_named_by_place(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        load_split(resolve(path), "train")


def test_missing_sources(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file or folder"):
        load_split(resolve(tmp_path / "none.jsonl"), "train")
    with pytest.raises(DataError, match="no such file; the folder has no JSONL files"):
        load_split(resolve(tmp_path, "dataset.validation_split=v"), "train")
    with pytest.raises(DataError, match="no column 'Question'"):
        load_split(resolve(write(tmp_path / "a.jsonl", ROW, ROW), "dataset.columns={input: Question}"), "train")


def test_a_hub_dataset_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="dataset nobody/nothing: cannot be loaded from the Hub .*HF_TOKEN"):
        load_split(resolve("nobody/nothing"), "train")
