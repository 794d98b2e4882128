"""What one sees of a run: live lines, log, curves, readings in the history, a tracker's own files, the longest rows tried first, warnings."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import logging
import math
import os
import re
import shutil
import types
from pathlib import Path
from typing import Any, Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies
from safetensors.torch import load_file, save_file

from emergency_kit.config import Resolved, load_config
from emergency_kit.data.tokenize import TokenRows
from emergency_kit.errors import TrainingError
from emergency_kit.model.shape import load_shape
from emergency_kit.training import callbacks, curves, first_try, prediction, workload
from emergency_kit.training.batches import StepSampler
from emergency_kit.training.health import HealthCallback, foresee
from emergency_kit.training.run import train
from emergency_kit.training.trainer import KitTrainer
from tests.training.trackers import losses_of, read_tensorboard

TENSORBOARD = importlib.util.find_spec("tensorboard") is not None


def resolve(tiny: Path, out: Path, *settings: str) -> Resolved:
    return load_config("embedded", settings=[
        f"model.name={tiny}", f"training.output_dir={out}", "model.dtype=float32", "dataset.build_size=200", "dataset.max_samples=24", "dataset.max_eval_samples=4",
        "training.max_steps=4", "training.eval_steps=2", "training.save_steps=4", "lora.dropout=0.1", *settings])


@pytest.fixture(scope="module")
def run(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """`(output folder, what a terminal was sent)` of a run of four steps."""
    out, shown = tmp_path_factory.mktemp("watched"), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(shown):
        patch.setenv("TTY_COMPATIBLE", "1")
        patch.setenv("COLUMNS", "140")
        patch.setattr(first_try, "PLENTY", math.inf)
        train(resolve(tiny, out, *(["training.report_to=[tensorboard]"] if TENSORBOARD else [])))
    return out, shown.getvalue()


def beside(run: tuple[Path, str], out: Path) -> Path:
    """An output folder that has the dataset and tokens of that run, which take longer than training."""
    for name in ("data", "cache"):
        shutil.copytree(run[0] / name, out / name)
    return out


def history(out: Path) -> list[dict[str, float]]:
    return json.loads((out / "checkpoints" / "checkpoint-4" / "trainer_state.json").read_text())["log_history"]


def test_a_terminal_shows_the_run_live(run: tuple[Path, str]) -> None:
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", run[1])
    assert re.search(r"Step\s+4/4", shown) and "left" in shown
    assert re.search(r"loss \d+\.\d{4}  smoothed \d+\.\d{4}  lr \d\.\d\de-\d\d  grad \d+\.\d{3}  tokens/s [\d,]+  GB \d\.\d\d", shown)
    assert re.search(r"Step 4/4, Loss: \d+\.\d{4}", shown)


def test_every_logged_loss_carries_throughput_and_memory(run: tuple[Path, str]) -> None:
    entries = [entry for entry in history(run[0]) if "loss" in entry]
    assert len(entries) == 4 and all(entry["tokens_per_second"] > 0 and 0.05 < entry["memory_gb"] < 50 for entry in entries)


def test_curves_are_there_whole_and_show_every_series(run: tuple[Path, str]) -> None:
    page, picture = (run[0] / "logs" / name for name in ("training.html", "training.png"))
    text = page.read_text(encoding="utf-8")
    for title in ("Loss", "Learning rate", "Gradient norm", "Throughput, tokens/s", "Memory held, GB", "validation", "smoothed", "Step 4 of 4, ended"):
        assert title in text, title
    assert "http" not in text.replace('http-equiv', "") and "refresh" not in text
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.read_bytes().rstrip().endswith(b"IEND\xaeB`\x82")
    assert not [path for path in (run[0] / "logs").iterdir() if path.name.startswith(".")]


@pytest.mark.skipif(not TENSORBOARD, reason="tensorboard is not installed; make prove-trackers installs it")
def test_tensorboard_reads_back_what_was_trained(run: tuple[Path, str]) -> None:
    found = read_tensorboard(run[0] / "logs")
    trained = [entry["loss"] for entry in history(run[0]) if "loss" in entry]
    assert losses_of(found) == pytest.approx(trained, abs=1e-4)
    assert {"train/tokens_per_second", "train/memory_gb", "train/learning_rate", "eval/loss"} <= set(found)
    assert "TENSORBOARD_LOGGING_DIR" not in os.environ


def test_the_page_in_a_real_browser(run: tuple[Path, str], browser: Any) -> None:
    page, asked = browser.new_page(viewport={"width": 390, "height": 844}), []
    page.on("request", lambda request: asked.append(request.url))
    page.goto((run[0] / "logs" / "training.html").as_uri())
    assert page.locator("figure svg").count() == 5 and page.locator("polyline").count() == 7
    assert page.evaluate("document.documentElement.scrollWidth") == 390 and len(asked) == 1
    # Every point lies inside of its figure.
    assert page.evaluate("[...document.querySelectorAll('polyline')].every(line => { const own = line.getBBox(); return own.x >= 0 && own.y >= 0 && own.x + own.width <= 640 && own.y + own.height <= 240 })")
    page.close()


def test_trying_the_longest_rows_changes_no_bit_and_is_spared_where_memory_is_plenty(run: tuple[Path, str], tiny: Path, tmp_path: Path) -> None:
    assert re.search(r"The longest rows fit: [\d,]+ tokens in training, [\d,]+ in evaluation", (run[0] / "logs" / "training.log").read_text())
    train(resolve(tiny, beside(run, tmp_path)))
    log = (tmp_path / "logs" / "training.log").read_text()
    assert re.search(r"Memory: \d\.\d\d GB foreseen, [\d.]+ GB are free; the longest rows need no trial", log) and "The longest rows fit" not in log
    tried, untried = (load_file(out / "checkpoints" / "final" / "adapter_model.safetensors") for out in (run[0], tmp_path))
    assert all(torch.equal(tried[name], untried[name]) for name in tried)
    tried, untried = (json.loads((out / "checkpoints" / "final" / "training_state.json").read_text()) for out in (run[0], tmp_path))
    assert all(tried[key] == untried[key] for key in ("loss_history", "validation_history", "tokens_seen", "tokens_computed", "supervised_tokens_seen"))


def test_a_machine_whose_memory_is_scarce_tries_them(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice what is foreseen must be free; several processes of one machine share it."""
    resolved = resolve(tiny, tmp_path)
    load = workload.assumed(resolved, True, False, 4)
    peak, _ = prediction.foresee_memory(resolved, load_shape(resolved.config.model), load.work)
    monkeypatch.setattr(prediction, "_available_bytes", lambda: 2.2 * peak)
    assert first_try.is_plenty(resolved, load, 1) and not first_try.is_plenty(resolved, load, 2)
    monkeypatch.setattr(prediction, "_available_bytes", lambda: 1.9 * peak)
    assert not first_try.is_plenty(resolved, load, 1)
    assert not first_try.is_plenty(resolve(tiny, tmp_path, "training.engine=modules"), load, 1)


def test_layers_kept_as_memory_allows_change_no_bit(run: tuple[Path, str], tiny: Path, tmp_path: Path) -> None:
    train(resolve(tiny, beside(run, tmp_path), "training.gradient_checkpointing=auto"))
    assert "Activations of 2 of 2 layers are kept" in (tmp_path / "logs" / "training.log").read_text()
    found, expected = (load_file(out / "checkpoints" / "final" / "adapter_model.safetensors") for out in (tmp_path, run[0]))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_memory_that_runs_out_later_ends_the_keeping_first(run: tuple[Path, str], tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = KitTrainer._step_in_pieces

    def tight(self: KitTrainer, model: object, inputs: dict[str, torch.Tensor], number: object) -> torch.Tensor:
        if self.state.global_step == 2 and self.fused.kept_layers:
            raise torch.OutOfMemoryError("planted")
        return real(self, model, inputs, number)

    monkeypatch.setattr(KitTrainer, "_step_in_pieces", tight)
    train(resolve(tiny, beside(run, tmp_path), "training.gradient_checkpointing=auto"))
    assert "Out of memory at step 3: no layer's activations are kept from here on" in (tmp_path / "logs" / "training.log").read_text()
    found, expected = (load_file(out / "checkpoints" / "final" / "adapter_model.safetensors") for out in (tmp_path, run[0]))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert json.loads((tmp_path / "checkpoints" / "final" / "training_state.json").read_text())["pieces"] == 1


def test_memory_that_does_not_suffice_shows_before_step_one(run: tuple[Path, str], tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(first_try, "PLENTY", math.inf)
    real = KitTrainer._step_in_pieces

    def tight(self: KitTrainer, model: object, inputs: dict[str, torch.Tensor], number: object) -> torch.Tensor:
        if self.facts.pieces == 1:
            raise torch.OutOfMemoryError("planted")
        return real(self, model, inputs, number)

    monkeypatch.setattr(KitTrainer, "_step_in_pieces", tight)
    train(resolve(tiny, beside(run, tmp_path), "training.max_steps=1"))
    log = (tmp_path / "logs" / "training.log").read_text()
    assert log.index("Out of memory with the longest rows, tried first: every batch is taken in 2 parts") < log.index("Step 1/1")
    assert json.loads((tmp_path / "checkpoints" / "final" / "training_state.json").read_text())["pieces"] == 2


def test_a_loss_that_is_not_a_number_stops_with_its_rows(run: tuple[Path, str], tiny: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(tiny, broken)
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"] * math.nan
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(TrainingError, match=r"loss is not a number at step 1/4; rows in it: \d+ \(\d+ tokens: 'FACTS.*learning_rate \(now 0.*--resume-from"):
        train(resolve(broken, beside(run, tmp_path / "out")))
    assert not (tmp_path / "out" / "checkpoints" / "final").exists() and "Error: training stopped: the loss" in (tmp_path / "out" / "logs" / "training.log").read_text()


def test_what_would_never_happen_is_said_before(tiny: Path, tmp_path: Path) -> None:
    training = resolve(tiny, tmp_path, "training.warmup_steps=100", "training.save_steps=500", "training.eval_steps=100").config.training
    said = foresee(training, 37)
    assert len(said) == 3 and "warmup_steps is 100, the run has 37 steps: the learning rate never gets past its warm-up (7.4e-04 of 2.0e-03" in said[0]
    assert "save_steps is 500" in said[1] and "eval_steps is 100" in said[2]
    assert foresee(training, 500) == [] and len(foresee(training.model_copy(update={"lr_scheduler_type": "constant"}), 100)) == 1


def health(losses: list[float], warmup: int = 2, vocabulary: int = 100) -> None:
    """Feed losses to the callback as the Trainer would, with rows of one token each."""
    rows = TokenRows(np.ones(64, np.int32), np.arange(65), np.zeros(64, np.int32))
    sampler = StepSampler(rows.lengths, 8, 42)
    trainer = types.SimpleNamespace(unit=1, step_loss=torch.zeros(()), sampler=sampler, args=types.SimpleNamespace(seed=42), train_dataset=types.SimpleNamespace(rows=rows),
                                    facts=types.SimpleNamespace(step_rows=8, tokenizer=types.SimpleNamespace(decode=lambda ids: "FACTS")), last_loss=0.0)
    callback = HealthCallback(vocabulary)
    callback.trainer = trainer  # type: ignore[assignment]
    for step, loss in enumerate(losses):
        trainer.step_loss = torch.tensor(loss)
        callback.on_pre_optimizer_step(types.SimpleNamespace(warmup_steps=warmup, learning_rate=0.1), types.SimpleNamespace(global_step=step, max_steps=99), None)  # type: ignore[arg-type]


def test_a_loss_that_explodes_stops_and_one_that_is_rough_does_not() -> None:
    rough = [2.0, 1.5, 2.5, 1.0, 3.9, 1.2, 2.2]
    health(rough)
    with pytest.raises(TrainingError, match=r"exploded to 20\.00, 10 times the median of the steps before at step 8/99; rows in it: ") as error:
        health([*rough, 20.0])
    sampler = StepSampler(np.ones(64), 8, 42)
    named = [int(row) for row in re.findall(r"(\d+) \(1 tokens", str(error.value))]
    assert named == list(sampler)[56:64]
    with pytest.raises(TrainingError, match="is infinite at step 1/99"):
        health([math.inf])


class Said(logging.Handler):
    """Records of the training's log."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


@pytest.fixture
def log() -> Iterator[list[logging.LogRecord]]:
    handler = Said()
    callbacks.LOG.addHandler(handler)
    yield handler.records
    callbacks.LOG.removeHandler(handler)


def test_a_loss_that_does_not_fall_is_said_once(log: list[logging.LogRecord]) -> None:
    health([2.0 - 0.02 * step for step in range(40)])
    assert not log
    health([2.0 + 0.1 * (step % 3) for step in range(40)])
    said, = log
    assert "The loss is not falling" in said.getMessage() and "at step 22/99" in said.getMessage()


def test_a_validation_loss_that_turns_up_is_said_once(log: list[logging.LogRecord]) -> None:
    callback, measured = HealthCallback(100), []
    for step, loss in enumerate([0.9, 0.5, 0.505, 0.52, 0.53, 0.56], 1):
        measured.append({"step": 10 * step, "eval_loss": loss})
        callback.on_evaluate(None, types.SimpleNamespace(log_history=measured), None)  # type: ignore[arg-type]
    said, = log
    assert "has turned up: 0.5000 at step 20, 0.5050, 0.5200, 0.5300 since" in said.getMessage()


def test_curves_of_odd_histories() -> None:
    """Nothing logged, one point, constant values, values that are no number, and more points than are drawn."""
    assert "No loss has been logged yet" in curves.render_page([], "t", "s", True)
    assert curves.draw_png([], "t").startswith(b"\x89PNG")
    one = [{"step": 1, "loss": 2.0, "learning_rate": 0.0}]
    assert curves.draw_svg(curves.build_charts(one)[0]).count("<circle") == 2  # loss and its smoothed course
    many = [{"step": step, "loss": 1.0 if step % 7 else math.nan, "grad_norm": math.inf} for step in range(1, 20_001)]
    chart, = curves.build_charts(many)
    assert len(chart.lines["loss"]) <= curves.POINTS + 1 and chart.lines["loss"][-1][0] == 20_000 and "nan" not in curves.draw_svg(chart)
    smoothed = curves.Smoothed()
    assert [smoothed.add(value) for value in (3.0, 3.0, 3.0)] == pytest.approx([3.0, 3.0, 3.0])


@settings(max_examples=300, deadline=None)
@given(strategies.lists(strategies.floats(-1e29, 1e29), min_size=1, max_size=4), strategies.sampled_from([0.0, 1e-16, 1e-12, 1e-3]))
def test_curves_of_any_values_stay_within_their_figure(values: list[float], apart: float) -> None:
    """Also of values that differ by rounding alone, as the first loss and its smoothed course may."""
    history = [{"step": step, "loss": value, "eval_loss": value * (1 + apart)} for step, value in enumerate(values, 1)]
    chart, = curves.build_charts(history)
    for x, y in (chart.place(point) for line in chart.lines.values() for point in line):
        assert curves.LEFT - 1 <= x <= curves.WIDTH - curves.RIGHT + 1 and curves.TOP - 1 <= y <= curves.HEIGHT - curves.BOTTOM + 1
    assert "nan" not in curves.draw_svg(chart)
