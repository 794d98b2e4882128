"""The longest rows first: whether training, evaluation and saving fit into memory is known before step 1.

In: a trainer that is ready for its first step, and the rows that need the most memory. Out: nothing but, where memory ran out, batches
in more parts (`facts.pieces`), as it happens in a run, and, where it is there in plenty, layers kept. Gradients, random states and counters are put back, so that the
run's bits do not change. Cost: one pass and one validation batch, since of a `fused` step only the largest pass is computed; on a CPU whose memory
is more than twice what the plan foresees, nothing is tried.
"""

from __future__ import annotations

import copy
import dataclasses
import os
from typing import TYPE_CHECKING, Any

import torch

from emergency_kit.config import Resolved
from emergency_kit.data.tokenize import IGNORE
from emergency_kit.model.backend import memory_bytes, pick_device
from emergency_kit.training import ranks, sharding
from emergency_kit.training.callbacks import LOG
from emergency_kit.training.fit import keep_layers
from emergency_kit.training.loss import unpadded

if TYPE_CHECKING:
    from emergency_kit.training.trainer import KitTrainer
    from emergency_kit.training.workload import Load


# A CPU with so many times the memory that the plan foresees does without the trial: the plan is within a tenth of what a run takes (benchmarks/RESULTS.md).
PLENTY = 2.0


def is_plenty(resolved: Resolved, load: "Load", world: int) -> bool:
    """Whether the longest rows fit beyond doubt, so that the seconds of trying them are spared: the `fused` engine on a CPU, its processes on this machine."""
    from emergency_kit.model.shape import load_shape
    from emergency_kit.training.prediction import foresee_memory, setting_of

    shape = load_shape(resolved.config.model)
    if pick_device(resolved.config.model) != "cpu" or resolved.config.training.gradient_checkpointing == "auto" or not setting_of(resolved, shape, on_gpu=False).fused:
        return False
    peak, room = foresee_memory(resolved, shape, load.work)
    # All of one mind, since trying is done together.
    plenty = not ranks.most(int(PLENTY * peak * world >= room))
    if plenty:
        LOG.info("Memory: %.2f GB foreseen, %.1f GB are free; the longest rows need no trial", peak / 1e9, room / 1e9)
    return plenty


def try_longest(trainer: "KitTrainer", load: "Load") -> None:
    """Train on, evaluate and serialise the heaviest rows. Raises TrainingError when a single row does not fit."""
    from emergency_kit.training.randomness import random_states, set_random_states

    counters, drawn = dataclasses.replace(trainer.facts.counters), random_states()
    kept, trainer.trying = copy.copy(trainer.step_loss), True
    try:
        batch = _batch(trainer, trainer.train_dataset, _heaviest(trainer, load.worst))
        supervised = (batch["labels"] != IGNORE).sum()
        if trainer.fused is not None:
            trainer.fused.largest_pass_only = True
        trainer.training_step(trainer.model_wrapped, batch, supervised)
        standing = _moments(trainer)
        trainer.model.eval()
        trainer._eval_batch(_batch(trainer, trainer.eval_dataset, load.worst_eval))
        trainer.model.train()
        with open(os.devnull, "wb") as nowhere:
            torch.save([sharding.local(tensor.detach()) for tensor in (*(one for one in trainer.model.parameters() if one.requires_grad), *standing)], nowhere)
        if trainer.fused is not None and trainer.config.gradient_checkpointing == "auto" and trainer.facts.pieces == 1:
            rows = unpadded(batch["input_ids"], batch["labels"], batch["attention_mask"])
            number = trainer.fused.kept_layers = -ranks.most(-keep_layers(trainer.fused, rows, trainer.config.max_gpu_memory_gb))
            LOG.info("Activations of %d of %d layers are kept, those of the others made again on the way back", number, len(trainer.fused.layers))
        trainer.facts.pieces = ranks.most(trainer.facts.pieces)
    finally:
        if trainer.fused is not None:
            trainer.fused.largest_pass_only = False
        trainer.model.zero_grad()
        trainer.facts.counters, trainer.step_loss, trainer.trying = counters, kept, False
        set_random_states(drawn)
    LOG.info("The longest rows fit: %s tokens in training, %s in evaluation, saved once for nothing; %.2f GB of memory held", f"{load.work.tokens + load.work.shared:,}",
             f"{load.work.eval_tokens:,}", memory_bytes() / 1e9)


def _heaviest(trainer: "KitTrainer", step: list[int]) -> list[int]:
    """Of a step's rows, longest first, those that one device takes at once."""
    world = trainer.args.world_size
    return step[:trainer.args.train_batch_size] if trainer.fused is None or world == 1 else step[::world]


def _batch(trainer: "KitTrainer", dataset: Any, rows: list[int]) -> dict[str, Any]:
    return trainer._prepare_inputs(trainer.data_collator([dataset[row] for row in rows]))


def _moments(trainer: "KitTrainer") -> list[torch.Tensor]:
    """As much as the optimizer will keep, until it does: it allocates with its first step."""
    if trainer.optimizer is not None and trainer.optimizer.state_dict().get("state"):  # DeepSpeed's has none of its own
        return []
    return [torch.full_like(parameter, 1.0) for parameter in trainer.model.parameters() if parameter.requires_grad for _ in range(2)]
