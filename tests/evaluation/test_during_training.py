"""Scores during training: measured on the model as it stands, kept in the history, and of no influence on the run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from emergency_kit.config import Resolved, load_config
from emergency_kit.errors import DataError, TrainingError
from emergency_kit.evaluation.during_training import MEASURED, build_scorer
from emergency_kit.model import backend
from emergency_kit.training import checkpoint
from emergency_kit.training.run import train
from emergency_kit.training.stopping import StopRequested
from tests.tiny import save_tiny_model


def resolve(tiny: Path, out: Path, *settings: str) -> Resolved:
    return load_config("embedded", settings=[
        f"model.name={tiny}", f"training.output_dir={out}", "model.dtype=float32", "dataset.grounding=none", "dataset.build_size=200", "dataset.max_samples=4",
        "dataset.max_eval_samples=2", "training.gradient_accumulation_steps=1", "training.warmup_steps=0", "training.max_steps=2", "training.eval_steps=1",
        "lora.dropout=0.1", "evaluation.max_new_tokens=6", "training.best_samples=2", *settings])


def test_answers_are_scored_at_every_evaluation_and_change_nothing_else(tmp_path: Path) -> None:
    tiny = save_tiny_model(tmp_path / "tiny")
    wanted = ("training.load_best_model_at_end=true", "training.metric_for_best_model=dangerous_advice")
    plain = train(resolve(tiny, tmp_path / "plain"))
    scored = train(resolve(tiny, tmp_path / "scored", *wanted), scorer=build_scorer)
    histories = [checkpoint.load_training_state(folder)["validation_history"] for folder in (plain, scored)]
    assert [entry["loss"] for entry in histories[0]] == [entry["loss"] for entry in histories[1]]
    assert all(set(entry) == {"step", "loss", *MEASURED} and all(0 <= entry[name] <= 1 for name in MEASURED) for entry in histories[1])
    # Nothing that a random model writes is dangerous, so the lower loss decides.
    best = min(histories[1], key=lambda entry: (entry["dangerous_advice"], entry["loss"]))["step"]
    assert checkpoint.load_training_state(scored)["summary"]["weights_of_step"] == best
    if best == 2:
        one, other = (load_file(folder / "adapter_model.safetensors") for folder in (plain, scored))
        assert all(torch.equal(one[name], other[name]) for name in one)
    with pytest.raises(TrainingError, match="was given no scorer"):
        train(resolve(tiny, tmp_path / "none", *wanted))


def test_a_stop_is_heard_while_it_answers_and_records_without_cards_are_refused(tmp_path: Path) -> None:
    tiny = save_tiny_model(tmp_path / "tiny")
    resolved = resolve(tiny, tmp_path, "training.early_stopping_patience=1", "training.metric_for_best_model=critical_action_recall")
    loaded = backend.load_base(resolved.config.model)

    def stop() -> None:
        raise StopRequested

    with pytest.raises(StopRequested):
        build_scorer(resolved, loaded.tokenizer)(loaded.model, stop)
    data = tmp_path / "own.jsonl"
    data.write_text("".join(f'{{"instruction": "What now {number}?", "input": "It burns {number}.", "output": "Leave."}}\n' for number in range(30)), encoding="utf-8")
    with pytest.raises(DataError, match="name no knowledge card"):
        build_scorer(resolve(tiny, tmp_path, f"dataset.name={data}", "training.early_stopping_patience=1", "training.metric_for_best_model=dangerous_advice"), loaded.tokenizer)
