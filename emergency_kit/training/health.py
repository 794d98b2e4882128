"""Health of a run: what would never happen is said before it begins, what goes wrong is said when it does.

In: the config and the number of steps; then the loss of each step and each validation. Out: lines of warning, and a TrainingError that names
the step, its rows and what to change when the loss is not a number or explodes. It is raised before the optimizer moves, so the
checkpoints of before are as good as they were.
"""

from __future__ import annotations

import math
import statistics
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from emergency_kit.config import TrainingConfig
from emergency_kit.data.stream import StreamRows
from emergency_kit.errors import TrainingError
from emergency_kit.training.callbacks import LOG

if TYPE_CHECKING:
    from emergency_kit.training.trainer import KitTrainer

# A loss over this multiple of the median of the last ones, and over that of guessing evenly among the vocabulary, has exploded.
EXPLODED = 4.0
REMEMBERED = 20
# Means of so many steps at the beginning and at the end are compared once so many steps are past the warm-up.
BEGINNING, AFTER_WARMUP = 5, 20
FALLEN = 0.98
TURNED = 1.01


def foresee(training: TrainingConfig, steps: int) -> list[str]:
    """What a run of so many steps will never come to, by its config."""
    said = []
    if training.lr_scheduler_type != "constant" and training.warmup_ratio is None and training.warmup_steps >= steps:
        share = steps / training.warmup_steps
        said.append(f"training.warmup_steps is {training.warmup_steps}, the run has {steps} steps: the learning rate never gets past its warm-up "
                    f"({share * training.learning_rate:.1e} of {training.learning_rate:.1e} at the end); lower it, to {max(1, steps // 10)} for instance")
    for key, verb in (("save_steps", "no checkpoint is saved"), ("eval_steps", "the validation loss is not measured"), ("logging_steps", "no loss is logged after the first step's")):
        if getattr(training, key) > steps and getattr(training, key.replace("steps", "strategy"), "steps") == "steps":
            said.append(f"training.{key} is {getattr(training, key)}, the run has {steps} steps: {verb} before the last step; lower it, to {max(1, steps // 4)} for instance")
    return said


class HealthCallback(TrainerCallback):
    """Looks at every step's loss before the optimizer uses its gradients. vocabulary: tokens that the model chooses from."""

    def __init__(self, vocabulary: int):
        self.trainer: "KitTrainer | None" = None
        self.even_guess = math.log(max(2, vocabulary))
        self.losses: list[float] = []
        self.beginning: list[float] = []
        self.judged = False
        self.turned_at: int | None = None

    def on_pre_optimizer_step(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        assert self.trainer is not None, "the run gives its trainer"
        loss, self.trainer.step_loss = float(self.trainer.step_loss), torch.zeros_like(self.trainer.step_loss)
        self.trainer.last_loss = loss
        step = state.global_step + 1
        usual = statistics.median(self.losses) if len(self.losses) >= BEGINNING else math.inf
        if not math.isfinite(loss) or loss > max(EXPLODED * usual, self.even_guess):
            what = "is not a number" if math.isnan(loss) else "is infinite" if math.isinf(loss) else f"exploded to {loss:.2f}, {loss / usual:.0f} times the median of the steps before"
            raise TrainingError(f"the loss {what} at step {step}/{state.max_steps}; rows in it: {self._rows(step)}; the step was not applied. Next: lower "
                                f"training.learning_rate (now {args.learning_rate:g}), look at these rows (emergency-kit data preview), and go on from a checkpoint before "
                                "with --resume-from CKPT --accept-changes, or begin anew with --overwrite")
        if len(self.beginning) < BEGINNING:
            self.beginning.append(loss)
        self.losses = [*self.losses[1 - REMEMBERED:], loss]
        if not self.judged and step >= args.warmup_steps + AFTER_WARMUP:
            self._judge(step, state.max_steps)

    def _judge(self, step: int, steps: int) -> None:
        self.judged = True
        if len(self.beginning) < BEGINNING or len(self.losses) < 2 * BEGINNING:
            return
        first, now = statistics.mean(self.beginning), statistics.mean(self.losses[-2 * BEGINNING:])
        if now > FALLEN * first:
            LOG.warning("The loss is not falling: %.4f over the first %d steps, %.4f over the last %d, at step %d/%d and past the warm-up; "
                        "change training.learning_rate (a tenth, or ten times as much), or look at the data (emergency-kit data inspect)",
                        first, BEGINNING, now, 2 * BEGINNING, step, steps)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        measured = [(entry["step"], entry["eval_loss"]) for entry in state.log_history if "eval_loss" in entry]
        if not measured or not math.isfinite(measured[-1][1]):
            return
        best_step, best = min(measured, key=lambda item: item[1])
        since = [loss for step, loss in measured if step > best_step]
        if len(since) >= 2 and all(loss > TURNED * best for loss in since[-2:]) and self.turned_at != best_step:
            self.turned_at = best_step
            LOG.warning("The validation loss has turned up: %.4f at step %d, %s since; the model begins to learn its rows by heart. The checkpoint nearest to "
                        "that step is kept; fewer training.num_epochs or a lower training.learning_rate end nearer to it", best, best_step, ", ".join(f"{loss:.4f}" for loss in since))

    def _rows(self, step: int) -> str:
        """The rows of a step, with the beginning of their answers."""
        trainer = self.trainer
        assert trainer is not None
        if isinstance(trainer.train_dataset, StreamRows):
            size = trainer.facts.step_rows
            return f"records {(step - 1) * size} to {step * size - 1} of the stream"
        size, rows = trainer.facts.step_rows, trainer.train_dataset.rows
        each = -(-len(rows) // size)
        sampler = type(trainer.sampler)(rows.lengths, size, trainer.args.seed)
        sampler.set_epoch((step - 1) // each)
        start = (step - 1) % each * size
        named, pairs = [], trainer.unit == 2
        for row in list(sampler)[start:start + size]:
            if pairs:
                named.append(str(row))
                continue
            answer = rows[row]["input_ids"][int(rows.prompts[row]):][:24]
            named.append(f"{row} ({int(rows.lengths[row])} tokens: {' '.join(trainer.facts.tokenizer.decode(answer).split())[:50]!r})")
        return ", ".join(named)
