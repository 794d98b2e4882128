"""Runs read from manifests: found, shown, laid side by side."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from emergency_kit.config import load_config
from emergency_kit.errors import UsageError
from emergency_kit.training import runs
from emergency_kit.training.run import train
from tests.tiny import save_tiny_model


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two finished runs of other learning rates and ranks, and a copy of a checkpoint as an unfinished one."""
    place = tmp_path_factory.mktemp("runs")
    tiny = save_tiny_model(place / "tiny")
    for name, rate, rank in (("one", 1e-3, 8), ("two", 2e-3, 4)):
        if name == "two":
            shutil.copytree(place / "one" / "data", place / name / "data")  # the dataset is built once
        train(load_config("embedded", settings=[f"model.name={tiny}", "model.dtype=float32", f"training.output_dir={place / name}", "dataset.max_samples=16",
                                                "dataset.max_eval_samples=4", "training.max_steps=2", f"training.learning_rate={rate}", f"lora.r={rank}"]))
    shutil.copytree(place / "one" / "checkpoints" / "checkpoint-2", place / "three" / "checkpoints" / "checkpoint-2")
    return place


def test_runs_are_found_newest_first(outputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = runs.find_runs([outputs])
    assert {run.folder.relative_to(outputs).as_posix() for run in found} == {"one/checkpoints/final", "two/checkpoints/final", "three/checkpoints/checkpoint-2"}
    assert [run.finished for run in found].count(False) == 1
    created = [run.manifest["created"] for run in found]
    assert created == sorted(created, reverse=True)
    runs.list_runs([outputs])
    said = capsys.readouterr().out
    assert "two/checkpoints/final" in said and "(unfinished)" in said and "2/2" in said and "runs compare" in said
    runs.list_runs([outputs / "tiny"])
    assert "No runs in" in capsys.readouterr().out


def test_a_run_is_shown_with_its_settings(outputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs.show_run(outputs / "two")
    said = capsys.readouterr().out
    assert "lora.r = 4" in said and "training.learning_rate = 0.002" in said and "last validation loss:" in said and "processor:" in said


def test_differences_of_the_config_come_first(outputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs.compare_runs([outputs / "one", outputs / "two" / "checkpoints" / "final"])
    lines = capsys.readouterr().out.splitlines()
    place = {word: next(number for number, line in enumerate(lines) if word in line) for word in ("lora.r", "training.learning_rate", "last loss", "seconds")}
    assert max(place["lora.r"], place["training.learning_rate"]) < min(place["last loss"], place["seconds"])
    assert "8" in lines[place["lora.r"]] and "4" in lines[place["lora.r"]] and "0.002" in lines[place["training.learning_rate"]]
    assert not any("training.output_dir" in line or "training.seed" in line for line in lines)
    runs.compare_runs([outputs / "one", outputs / "three"])
    assert "the same" in capsys.readouterr().out


def test_what_is_no_run_is_named(outputs: Path) -> None:
    with pytest.raises(UsageError, match="no such folder"):
        runs.load_run(outputs / "four")
    with pytest.raises(UsageError, match="no training's manifest"):
        runs.load_run(outputs / "tiny")
    with pytest.raises(UsageError, match="holds 3 runs; name one"):
        runs.load_run(outputs)
    with pytest.raises(UsageError, match="at least two"):
        runs.compare_runs([outputs / "one"])
