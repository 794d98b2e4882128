"""A resumed run put where it was left: what the Trainer itself does not restore.

In: a trainer that is ready for its first step, with what `training_state.json` of its checkpoint holds. Out: losses not logged yet, the evaluation
that was due, this run's own intervals and rates; or `RunEnded`, where there is nothing left to train.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

from emergency_kit.training import best, schedule

if TYPE_CHECKING:
    from emergency_kit.training.trainer import KitTrainer


class RunEnded(Exception):
    """A resumed run whose patience was out where it was left: nothing more is trained."""


class RunCallback(TrainerCallback):
    """Tells the sampler its epoch whatever dataloader wraps it (accelerate's skipping one does not), and puts a resumed run where
    it was: losses not logged yet, an evaluation that was due, and this run's own intervals instead of the checkpoint's."""

    def __init__(self, trainer: "KitTrainer"):
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        trainer, carry = self.trainer, self.trainer.resumed.get("loss_carry")
        state.compute_steps(args, state.max_steps)
        if carry:
            trainer._tr_loss += carry["sum"]
            trainer._total_loss_scalar, trainer._globalstep_last_logged = carry["total"], int(carry["logged_step"])
        if trainer.resumed:
            schedule.follow_config(trainer.optimizer, trainer.lr_scheduler, trainer.config, trainer.facts.resolved.config.lora.loraplus_lr_ratio)
        trainer.mark()
        if trainer.is_fsdp_enabled and torch.cuda.is_available():
            torch.cuda.empty_cache()  # the whole weights that were divided
        trainer.before_training(trainer)
        if trainer.resumed.get("evaluation_due"):
            trainer._evaluate(None, None)
        if trainer.resumed and best.is_exhausted(best.validation_history(state), trainer.config):
            raise RunEnded

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trainer.sampler.set_epoch(int(state.epoch or 0))
