"""Sweeps and the range test: what is run, how it is ranked, and that it goes on where it was stopped."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from emergency_kit.config import Resolved, load_config
from emergency_kit.errors import ConfigError, UsageError
from emergency_kit.training.sweep import split_settings, start
from tests.tiny import save_tiny_model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


def base(tiny: Path, out: Path) -> list[str]:
    return [f"model.name={tiny}", f"training.output_dir={out}", "model.dtype=float32", "dataset.grounding=none", "dataset.build_size=200", "dataset.max_samples=4",
            "dataset.max_eval_samples=2", "training.gradient_accumulation_steps=1", "training.warmup_steps=0", "training.max_steps=2"]


def resolve(settings: list[str]) -> Resolved:
    return load_config("embedded", settings=settings)


def test_commas_outside_of_brackets_part_the_values() -> None:
    assert split_settings(["training.learning_rate=1e-4,3e-4", "lora.target_modules=[q_proj,v_proj],all-linear", "training.seed=3"]) == (
        ["training.seed=3"], {"training.learning_rate": ["1e-4", "3e-4"], "lora.target_modules": ["[q_proj,v_proj]", "all-linear"]})
    assert split_settings(["lora.target_modules=[q_proj,v_proj]", "nonsense"]) == (["lora.target_modules=[q_proj,v_proj]", "nonsense"], {})
    with pytest.raises(UsageError, match="given twice"):
        split_settings(["a.b=1,2", "a.b=3,4"])


def test_runs_are_ranked_by_validation_loss_and_taken_as_they_stand_the_second_time(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = [*base(tiny, tmp_path), "training.learning_rate=1e-6,5e-2"]
    folder = start(resolve, settings, None, None, False)
    found = json.loads((folder / "sweep.json").read_text())
    assert folder == tmp_path / "sweep" and [item["settings"] for item in found] == [{"training.learning_rate": "5e-2"}, {"training.learning_rate": "1e-6"}]
    assert found[0]["validation_loss"] < found[1]["validation_loss"] and found[0]["summary"]["last_validation_loss"] == found[0]["validation_loss"]
    lines = (folder / "sweep.md").read_text().splitlines()
    assert lines[2].startswith("| rank | learning_rate | validation loss |") and lines[4].startswith("| 1 | 5e-2 |") and "Best: --set training.learning_rate=5e-2" in lines
    before = [(path, path.stat().st_mtime_ns) for path in sorted(folder.glob("*/checkpoints/final/*"))]
    capsys.readouterr()
    start(resolve, settings, None, None, False)
    assert [(path, path.stat().st_mtime_ns) for path in sorted(folder.glob("*/checkpoints/final/*"))] == before
    assert "already trained with these settings" in capsys.readouterr().out


def test_every_combination_is_checked_before_the_first_is_trained(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="training.learning_rate: got 'fast'"):
        start(resolve, [*base(tiny, tmp_path), "training.learning_rate=1e-4,fast"], None, None, False)
    with pytest.raises(UsageError, match="no setting has several values"):
        start(resolve, base(tiny, tmp_path), None, None, False)
    assert not (tmp_path / "sweep").exists()


def test_a_range_test_raises_the_rate_and_ranks_its_pieces(tiny: Path, tmp_path: Path) -> None:
    place = start(resolve, [*base(tiny, tmp_path)[:-1], "training.max_steps=9"], None, "1e-6:1e-1", False)
    found = json.loads((place / "range.json").read_text())
    assert place == tmp_path / "sweep" and not (place / "range" / "checkpoints").exists()
    assert [piece["change"] for piece in found] == sorted(piece["change"] for piece in found) and len(found) == 8
    assert found[0]["learning_rate"] > 1e-4  # so tiny a rate does nothing in a step
    assert "fell fastest near" in (place / "range.md").read_text()
    for wrong in ("1e-3", "1e-2:1e-3", "a:b"):
        with pytest.raises(UsageError, match="expected LOW:HIGH"):
            start(resolve, base(tiny, tmp_path), None, wrong, False)
