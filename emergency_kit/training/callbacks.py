"""Callbacks: the guide's console lines, the rotating log, the progress bar, and a polite stop.

In: the Trainer's events. Out: `[2026-01-28 10:05:00] Step 100/750, Loss: 0.8234` on the console and
in `logs/training.log`; on a terminal a progress bar under the lines. SIGINT or SIGTERM ends the run
after the step under way, with a checkpoint.
"""

from __future__ import annotations

import logging
import logging.handlers
import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

LOG = logging.getLogger("emergency_kit.training")
LINE = logging.Formatter("[%(asctime)s] %(message)s", datefmt="%Y-%m-%d %H:%M:%S")
QUIET_SECONDS = 15


def open_log(folder: Path, console: Console) -> None:
    """Send LOG to the console and to `folder/training.log` (5 files of 2 MB at most)."""
    folder.mkdir(parents=True, exist_ok=True)
    close_log()
    file = logging.handlers.RotatingFileHandler(folder / "training.log", maxBytes=2_000_000, backupCount=4, encoding="utf-8")
    screen = _ConsoleHandler(console)
    for handler in (file, screen):
        handler.setFormatter(LINE)
        LOG.addHandler(handler)
    LOG.setLevel(logging.INFO)
    LOG.propagate = False


def close_log() -> None:
    """Close the log's files; a later run opens its own."""
    for handler in list(LOG.handlers):
        LOG.removeHandler(handler)
        handler.close()


class _ConsoleHandler(logging.Handler):
    """Prints through rich, so that lines stand above a live progress bar."""

    def __init__(self, console: Console):
        super().__init__()
        self.console = console

    def emit(self, record: logging.LogRecord) -> None:
        self.console.print(self.format(record), markup=False, highlight=False, soft_wrap=True)
        self.console.file.flush()


class ConsoleCallback(TrainerCallback):
    """Loss lines, epoch lines, validation lines, and a sign of life between them."""

    def __init__(self, console: Console):
        self.console = console
        self.progress: Progress | None = None
        self.last_line = time.monotonic()
        self.passes = 0

    def say(self, message: str) -> None:
        """One line on the console and in the log."""
        LOG.info(message)
        self.last_line = time.monotonic()

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.console.is_terminal and state.is_world_process_zero:
            self.progress = Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
                                     console=self.console, transient=True)
            self.task = self.progress.add_task("Training", total=state.max_steps, completed=state.global_step)
            self.progress.start()

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.say(f"Epoch {int(state.epoch or 0) + 1}/{state.num_train_epochs}")

    def on_substep_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.passes += 1
        if not self.progress and time.monotonic() - self.last_line > QUIET_SECONDS:
            self.say(f"Step {state.global_step + 1}/{state.max_steps}, pass {self.passes} of {args.gradient_accumulation_steps}")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.passes = 0
        if self.progress:
            self.progress.update(self.task, completed=state.global_step)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, float] | None = None, **_: Any) -> None:
        if logs and "loss" in logs:
            self.say(f"Step {state.global_step}/{state.max_steps}, Loss: {float(logs['loss']):.4f}")

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: dict[str, float] | None = None, **_: Any) -> None:
        if metrics and "eval_loss" in metrics:
            self.say(f"Step {state.global_step}/{state.max_steps}, Validation loss: {metrics['eval_loss']:.4f}")

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.close()

    def close(self) -> None:
        """Take the progress bar off the terminal."""
        if self.progress:
            self.progress.stop()
            self.progress = None


class StopCallback(TrainerCallback):
    """Turns the first SIGINT or SIGTERM into a checkpoint and an orderly end; the second stops at once."""

    def __init__(self) -> None:
        self.requested: signal.Signals | None = None
        self.previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopCallback":
        for number in (signal.SIGINT, signal.SIGTERM):
            self.previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = signal.Signals(number)
        sys.stderr.write("\nStopping: the step under way is finished and saved first; once more stops at once.\n")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> TrainerControl:
        if self.requested and state.global_step < state.max_steps:
            control.should_save = True
            control.should_training_stop = True
            control.should_evaluate = False
        return control
