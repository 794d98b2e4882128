"""Callbacks: the guide's console lines, the rotating log, the progress bar, and trackers that may fail.

In: the Trainer's events. Out: `[2026-01-28 10:05:00] Step 100/750, Loss: 0.8234` on the console and
in `logs/training.log`; on a terminal step, time left, loss, smoothed loss, learning rate, gradient norm, tokens/s and memory live under the lines. A log file that cannot be written, or a tracker that
fails (no network, a bad key), is said once and never stops training.
"""

from __future__ import annotations

import functools
import logging
import logging.handlers
import time
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from emergency_kit.artifacts import redact
from emergency_kit.config import TrainingConfig
from emergency_kit.training import ranks
from emergency_kit.training.best import best_evaluation, is_exhausted, validation_history
from emergency_kit.training.curves import Smoothed
from emergency_kit.training.gauge import describe_gpu

LOG = logging.getLogger("emergency_kit.training")
EVENTS = [name for name in dir(TrainerCallback) if name.startswith("on_")]


class _Line(logging.Formatter):
    """Lines without secrets: a library's error can quote an address or a key."""

    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))


LINE = _Line("[%(asctime)s] %(message)s", datefmt="%Y-%m-%d %H:%M:%S")
QUIET_SECONDS = 15


def open_log(folder: Path, console: Console) -> None:
    """Send LOG to the console and to `folder/training.log` (5 files of 2 MB at most); on other ranks than the first, nowhere."""
    close_log()
    LOG.setLevel(logging.INFO)
    LOG.propagate = False
    if not ranks.is_first():
        LOG.addHandler(logging.NullHandler())
        return
    folder.mkdir(parents=True, exist_ok=True)
    file = _LogFile(folder / "training.log", maxBytes=2_000_000, backupCount=4, encoding="utf-8")
    screen = _ConsoleHandler(console)
    for handler in (file, screen):
        handler.setFormatter(LINE)
        LOG.addHandler(handler)


def close_log() -> None:
    """Close the log's files; a later run opens its own."""
    for handler in list(LOG.handlers):
        LOG.removeHandler(handler)
        handler.close()


class _LogFile(logging.handlers.RotatingFileHandler):
    """A file that may be full or gone: the line is on the console all the same."""

    said = False

    def handleError(self, record: logging.LogRecord) -> None:
        if not self.said:
            self.said = True
            LOG.warning("%s cannot be written; lines appear on the console alone", self.baseFilename)


class _ConsoleHandler(logging.Handler):
    """Prints through rich, so that lines stand above a live progress bar."""

    def __init__(self, console: Console):
        super().__init__()
        self.console = console

    def emit(self, record: logging.LogRecord) -> None:
        self.console.print(self.format(record), markup=False, highlight=False, soft_wrap=True)
        self.console.file.flush()


class ConsoleCallback(TrainerCallback):
    """Loss lines, epoch lines, validation lines, and a sign of life between them; on a terminal two live lines below.

    trainer: given by the run once there is one.
    """

    def __init__(self, console: Console):
        self.console = console
        self.trainer: Any = None
        self.progress: Progress | None = None
        self.live: Live | None = None
        self.smoothed = Smoothed()
        self.logs: dict[str, float] = {}
        self.last_line = time.monotonic()
        self.passes = 0

    def say(self, message: str) -> None:
        """One line on the console and in the log."""
        LOG.info(message)
        self.last_line = time.monotonic()

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        for entry in state.log_history:
            if "loss" in entry:
                self.smoothed.add(entry["loss"])
        if self.console.is_terminal and state.is_world_process_zero:
            self.progress = Progress(TextColumn("Step"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.percentage:>3.0f} %"), TimeElapsedColumn(), TextColumn("left"),
                                     TimeRemainingColumn())
            self.task = self.progress.add_task("", total=state.max_steps, completed=state.global_step)
            self.live = Live(get_renderable=self._render, console=self.console, refresh_per_second=2, transient=True)
            self.live.start()

    def _render(self) -> Group:
        assert self.progress is not None, "shown only while there is a bar"
        loss = self.trainer.last_loss if self.trainer else float("nan")
        shown = {"loss": f"{loss:.4f}", "smoothed": f"{self.smoothed.value:.4f}" if self.smoothed.count else "-"}
        for name, key, form in READINGS:
            if key in self.logs:
                shown[name] = f"{self.logs[key]:{form}}"
        return Group(self.progress, "  ".join(f"{name} {value}" for name, value in shown.items()))

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.say(f"Epoch {int(state.epoch or 0) + 1}/{state.num_train_epochs}")

    def on_substep_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.passes += 1
        if not self.progress and time.monotonic() - self.last_line > QUIET_SECONDS:
            self.say(f"Step {state.global_step + 1}/{state.max_steps}, pass {self.passes} done")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.passes = 0
        if self.progress:
            self.progress.update(self.task, completed=state.global_step)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, float] | None = None, **_: Any) -> None:
        if logs and "loss" in logs:
            self.logs = dict(logs)
            self.smoothed.add(float(logs["loss"]))
            self.say(f"Step {state.global_step}/{state.max_steps}, Loss: {float(logs['loss']):.4f}")
            if gpu := describe_gpu(logs):
                self.say(gpu)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: dict[str, float] | None = None, **_: Any) -> None:
        if metrics and "eval_loss" in metrics:
            self.logs["eval_loss"] = metrics["eval_loss"]
            more = "".join(f", {name.removeprefix('eval_').replace('_', ' ')}: {value:.4f}" for name, value in metrics.items()
                           if name.startswith("eval_") and name != "eval_loss")
            self.say(f"Step {state.global_step}/{state.max_steps}, Validation loss: {metrics['eval_loss']:.4f}{more}")

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.close()

    def close(self) -> None:
        """Take the live lines off the terminal."""
        if self.live:
            self.live.stop()
        self.live = self.progress = None


READINGS = (("lr", "learning_rate", ".2e"), ("grad", "grad_norm", ".3f"), ("tokens/s", "tokens_per_second", ",.0f"), ("GB", "memory_gb", ".2f"), ("validation", "eval_loss", ".4f"),
            ("GPU %", "gpu_utilisation_percent", ".0f"), ("GPU GB", "gpu_memory_gb", ".1f"), ("°C", "gpu_temperature_celsius", ".0f"), ("W", "gpu_power_watts", ".0f"))


class BestCallback(TrainerCallback):
    """After each evaluation: save where it is the best so far and will be wanted at the end; stop where patience is out."""

    def __init__(self, training: TrainingConfig):
        self.training = training

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        history = validation_history(state)
        best = best_evaluation(history, self.training.metric_for_best_model)
        if self.training.load_best_model_at_end and best is not None and best["step"] == state.global_step:
            control.should_save = True
        if best is not None and is_exhausted(history, self.training) and state.global_step < state.max_steps:
            LOG.info(f"Early stopping at step {state.global_step}: no better {self.training.metric_for_best_model} in "
                     f"{self.training.early_stopping_patience} evaluations, the best was {best[self.training.metric_for_best_model]:.4f} at step {best['step']}")
            control.should_training_stop = True


class TrackerGuard(TrainerCallback):
    """An experiment tracker behind a wall: its first error is said and it is left out; training goes on.

    The one place besides the command line that catches whatever comes: trackers raise errors of many libraries, and
    none of them is a reason to lose a run.
    """

    def __init__(self, tracker: TrainerCallback):
        self.tracker = tracker
        self.failed = False

    def pass_on(self, event: str, *args: Any, **options: Any) -> None:
        """Hand an event to the tracker unless it has failed."""
        if self.failed:
            return
        try:
            getattr(self.tracker, event)(*args, **options)
        except Exception as error:
            self.failed = True
            LOG.warning("Tracker %s failed (%s: %s); training goes on without it", type(self.tracker).__name__.removesuffix("Callback"),
                        type(error).__name__, " ".join(str(error).split())[:300])


for _event in EVENTS:
    setattr(TrackerGuard, _event, functools.partialmethod(TrackerGuard.pass_on, _event))


def guard_trackers(trainer: Any) -> None:
    """Put every tracker that the Trainer made for `report_to` behind a TrackerGuard."""
    handler = trainer.callback_handler
    handler.callbacks = [TrackerGuard(one) if type(one).__module__.startswith("transformers.integrations") else one for one in handler.callbacks]
