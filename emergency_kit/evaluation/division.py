"""Division: which prompts each of several ranks answers, and their answers brought together.

In: prompts, the same on every rank. Out: this rank's batches; every rank's answers, on every rank. Whole batches are dealt in turn, those that one
process would make: an answer does not depend on the number of ranks, not even by the rounding of a batch of other rows. Limits: a rank may
get none; every rank holds the whole model (a run under FSDP refuses to be judged by answers, `training/sharding.py`).
"""

from __future__ import annotations

from typing import Any, Sequence, TypeVar

from emergency_kit.inference.engine import Messages
from emergency_kit.training import ranks

T = TypeVar("T")


def deal(prompts: Sequence[Messages], wanted: Sequence[int], size: int) -> list[list[int]]:
    """This rank's batches of at most `size` places of `wanted`, of similar length, the shortest first."""
    order = sorted(wanted, key=lambda index: sum(len(part["content"]) for part in prompts[index]))
    return [order[start:start + size] for start in range(0, len(order), size)][ranks.rank()::ranks.world()]


def bring_together(mine: dict[Any, T]) -> dict[Any, T]:
    """Every rank's entries, on every rank."""
    return ranks.shared({key: value for entries in ranks.gathered(mine) for key, value in entries.items()})
