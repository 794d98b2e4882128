"""Optimizer and learning rate: what they need, how parameters are grouped, and the rate at any step.

In: the `training` and `lora` sections, a model. Out: parameter groups (LoRA+ gives B a rate of its own), a rate by Transformers' own
schedules, or the reason why a setting cannot be used, before anything is loaded.
"""

from __future__ import annotations

import importlib.util
import math
from typing import Any

from emergency_kit.config import Config, TrainingConfig
from emergency_kit.config_training import OPTIMIZERS_OF_TORCH
from emergency_kit.errors import TrainingError
from emergency_kit.training import ranks


def pass_rows(training: TrainingConfig) -> int:
    """Rows of a pass by the config; under `auto` the 2 that a step is reckoned with."""
    return 2 if training.per_device_train_batch_size == "auto" else training.per_device_train_batch_size


def step_rows(training: TrainingConfig) -> int:
    """Rows of an optimizer step on one device; `auto` divides another way what 2 rows a pass would make."""
    return pass_rows(training) * passes(training)


def passes(training: TrainingConfig) -> int:
    """Forward passes of an optimizer step on one device."""
    return training.gradient_accumulation_steps // (ranks.world() if training.keep_effective_batch else 1)


def interval(given: float, steps: int) -> int:
    """Steps of an interval that may be a share of the run."""
    return int(given) if given >= 1 else math.ceil(given * steps)


def warmup_steps(training: TrainingConfig, steps: int) -> int:
    """Optimizer steps of warm-up in a run of so many."""
    return training.warmup_steps if training.warmup_ratio is None else math.ceil(training.warmup_ratio * steps)


def check_schedule(config: Config, steps: int) -> None:
    """Raise TrainingError for an optimizer whose package is missing, a schedule that does not take its settings, or `auto` among several ranks."""
    training = config.training
    if training.keep_effective_batch and training.gradient_accumulation_steps % ranks.world():
        raise TrainingError(f"training.keep_effective_batch: {ranks.world()} processes cannot share {training.gradient_accumulation_steps} passes evenly; "
                            f"set training.gradient_accumulation_steps to a multiple of {ranks.world()}, or start another number of processes")
    if training.per_device_train_batch_size == "auto" and ranks.world() > 1:
        raise TrainingError("training.per_device_train_batch_size: auto is for one process, since ranks must divide a step alike; set a number")
    if training.optim not in OPTIMIZERS_OF_TORCH and importlib.util.find_spec("bitsandbytes") is None:
        raise TrainingError(f"training.optim: {training.optim} needs the package bitsandbytes; next: pip install '.[gpu]', or one of {', '.join(OPTIMIZERS_OF_TORCH)}")
    try:
        learning_rate(training, 0, steps)
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise TrainingError(f"training.lr_scheduler_type: {training.lr_scheduler_type} with lr_scheduler_kwargs {dict(training.lr_scheduler_kwargs)} cannot be made "
                            f"({str(error).splitlines()[0]}); see Transformers' page on schedules for what it takes") from None


def learning_rate(training: TrainingConfig, step: int, steps: int) -> float:
    """Learning rate at a step (counted from 0) of a run of so many steps, by Transformers' own schedule; the peak where it follows the losses."""
    import torch
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.zeros(1)], lr=training.learning_rate)
    schedule = get_scheduler(training.lr_scheduler_type, optimizer, num_warmup_steps=warmup_steps(training, steps), num_training_steps=steps,
                             scheduler_specific_kwargs=dict(training.lr_scheduler_kwargs))
    return training.learning_rate * schedule.lr_lambdas[0](step) if hasattr(schedule, "lr_lambdas") else training.learning_rate


def group_parameters(model: Any, decaying: list[str], training: TrainingConfig, ratio: float) -> list[dict[str, Any]]:
    """Parameter groups of LoRA+ (Hayou et al. 2024): all but B with decay, without, and B at `ratio` times the rate."""
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    fast = {name for name, _ in named if ".lora_B." in name}
    return [{"params": [parameter for name, parameter in named if name in decaying and name not in fast], "weight_decay": training.weight_decay, "lr": training.learning_rate},
            {"params": [parameter for name, parameter in named if name not in decaying and name not in fast], "weight_decay": 0.0, "lr": training.learning_rate},
            {"params": [parameter for name, parameter in named if name in fast], "weight_decay": training.weight_decay, "lr": training.learning_rate * ratio}]


def follow_config(optimizer: Any, schedule: Any, training: TrainingConfig, ratio: float | None) -> None:
    """Put a resumed run's learning rate and weight decay on this run's config and length; the checkpoint brought its own."""
    import torch

    schedule = getattr(schedule, "scheduler", schedule)
    if not isinstance(schedule, torch.optim.lr_scheduler.LambdaLR):
        return
    groups = optimizer.param_groups
    rates = [training.learning_rate * (ratio if ratio and index == 2 else 1) for index in range(len(groups))]
    schedule.base_lrs = rates
    for group, rate, factor in zip(groups, rates, schedule.lr_lambdas):
        group["initial_lr"], group["lr"] = rate, rate * factor(schedule.last_epoch)
    schedule._last_lr = [group["lr"] for group in groups]
    for index in (0, 2):  # the second group, biases and norms, has none
        if index < len(groups):
            groups[index]["weight_decay"] = training.weight_decay
