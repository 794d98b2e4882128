"""Division: which prompts each of several ranks answers, and their answers brought together.

In: prompts, the same on every rank. Out: this rank's batches; every rank's answers, on every rank. Whole batches are dealt in turn, those that one
process would make: an answer does not depend on the number of ranks, not even by the rounding of a batch of other rows. Limits: a rank may
get none; under a model that is itself divided among ranks (FSDP, ZeRO 3) every pass needs all of them, so that each answers everything.
"""

from __future__ import annotations

from typing import Any, Sequence, TypeVar

from emergency_kit.inference.engines import Messages
from emergency_kit.training import ranks

T = TypeVar("T")


def deal(prompts: Sequence[Messages], wanted: Sequence[int], size: int, divided: bool = True) -> list[list[int]]:
    """This rank's batches of at most `size` places of `wanted`, of similar length, the shortest first. divided: False deals all of them to every rank."""
    order = sorted(wanted, key=lambda index: sum(len(part["content"]) for part in prompts[index]))
    batches = [order[start:start + size] for start in range(0, len(order), size)]
    return batches[ranks.rank()::ranks.world()] if divided else batches


def bring_together(mine: dict[Any, T]) -> dict[Any, T]:
    """Every rank's entries, on every rank."""
    return ranks.shared({key: value for entries in ranks.gathered(mine) for key, value in entries.items()})


def is_sharded(model: Any) -> bool:
    """Whether a model's weights are spread over ranks: FSDP2's are DTensors, ZeRO 3's carry a `ds_id`."""
    from torch.distributed.tensor import DTensor

    return any(isinstance(parameter, DTensor) or hasattr(parameter, "ds_id") for parameter in model.parameters())
