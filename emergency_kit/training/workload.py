"""Workload of a run: which rows meet in its passes, and how many tokens that is, before anything is computed.

In: tokenised rows and the config. Out: `Load`: the largest pass for the plan of memory, tokens for that of time, and the rows that
need the most memory, which a run tries first. The order of rows is the trainer's own (`StepSampler`), the shared beginnings
are those of `plan_step`. Of a long run 400 steps are looked at, besides those with its longest rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from emergency_kit.config import Resolved
from emergency_kit.training import schedule
from emergency_kit.training.fused.attention import tile_of, whole
from emergency_kit.training.fused.step import pass_limits
from emergency_kit.training.fused.tree import Plan, Row, plan_step
from emergency_kit.training.memory import Workload

if TYPE_CHECKING:
    from emergency_kit.data.tokenize import TokenRows

LOOKED_AT = 400
LONGEST_STEPS = 40


@dataclass(frozen=True)
class Load:
    """work: the largest pass. tokens, supervised, computed: over the whole run, padding in computed alone. typical: rows of a step of about the
    mean size, typical_computed: its tokens; worst: rows of the step that needs the most memory; eval_computed: of one evaluation."""

    work: Workload
    tokens: int
    supervised: int
    computed: float
    eval_computed: float
    typical_computed: int = 0
    typical: list[int] = field(default_factory=list)
    worst: list[int] = field(default_factory=list)
    worst_eval: list[int] = field(default_factory=list)


def assumed(resolved: Resolved, fused: bool, on_gpu: bool, item_bytes: int) -> Load:
    """The load of rows as long as `model.max_seq_length` allows, each token of them supervised: what is known without the data."""
    training, limit = resolved.config.training, resolved.config.model.max_seq_length
    batch, evaluated = schedule.pass_rows(training), training.per_device_eval_batch_size
    most_rows, most_tokens = pass_limits(batch, limit, on_gpu, item_bytes) if fused else (None, None)
    rows = min(most_rows or math.inf, max(1, most_tokens // limit) if most_tokens else math.inf)
    batch, evaluated = int(min(batch, rows)), int(min(evaluated, rows))
    return Load(Workload(batch * limit, limit, batch * limit, 0, evaluated * limit, limit, evaluated * limit), 0, 0, 0, 0)


def measure(rows: dict[str, "TokenRows"], resolved: Resolved, fused: bool, on_gpu: bool, item_bytes: int, steps: int, batch: int = 0) -> Load:
    """The load of a run of so many steps over these rows. fused: the engine; item_bytes: of a value that it computes with; batch: rows of a pass, where they are not the config's."""
    training = resolved.config.training
    batch = batch or schedule.pass_rows(training)
    share = training.prefix_sharing and not training.neftune_noise_alpha and not on_gpu
    limits = pass_limits(batch, resolved.config.model.max_seq_length, on_gpu, item_bytes) if fused else None
    tile = tile_of(on_gpu, item_bytes)
    look = _Look(rows["train"], batch, limits, share, tile)
    every = list(_steps(rows["train"], schedule.step_rows(training), training.seed, steps))
    lengths = rows["train"].lengths
    # Where tokens alone fill a pass, it is all of a step's that count.
    largest = np.sum if limits and limits[0] is None else np.max
    longest = sorted(range(len(every)), key=lambda step: -int(largest(lengths[every[step]])))[:LONGEST_STEPS]
    evenly = range(0, len(every), max(1, len(every) // LOOKED_AT))
    seen = {step: look(every[step]) for step in sorted({*longest, *evenly})}
    sampled = [seen[step].computed for step in evenly]
    mean = sum(sampled) / len(sampled)
    typical = min(evenly, key=lambda step: abs(seen[step].computed - mean))
    worst = max(seen, key=lambda step: seen[step].weight)
    evaluated = _Look(rows["validation"], training.per_device_eval_batch_size, limits, share, tile)
    size = training.per_device_eval_batch_size
    batches = [list(range(start, min(start + size, len(rows["validation"])))) for start in range(0, len(rows["validation"]), size)]
    evals = [evaluated(batch) for batch in batches]
    worst_eval = max(range(len(batches)), key=lambda batch: evals[batch].weight)
    work = Workload(*(max(getattr(one, name) for one in seen.values()) for name in ("tokens", "longest", "supervised", "shared")),
                    *(max(getattr(one, name) for one in evals) for name in ("tokens", "longest", "supervised")))
    tokens = [int(lengths[step].sum()) for step in every]
    return Load(work, sum(tokens), sum(int((lengths[step] - rows["train"].prompts[step]).sum()) for step in every), mean * len(every),
                sum(one.computed for one in evals), seen[typical].computed, every[typical], every[worst], batches[worst_eval])


def _steps(rows: "TokenRows", size: int, seed: int, steps: int) -> Any:
    """Rows of every step as the trainer takes them."""
    from emergency_kit.training.batches import StepSampler

    sampler, epoch, taken = StepSampler(rows.lengths, size, seed), 0, 0
    while taken < steps:
        sampler.set_epoch(epoch)
        order = list(sampler)
        for start in range(0, len(order), size):
            if taken < steps:
                yield order[start:start + size]
                taken += 1
        epoch += 1


@dataclass
class _Step:
    tokens: int
    longest: int
    supervised: int
    shared: int
    computed: int

    @property
    def weight(self) -> int:
        """Grows with the memory that the step needs."""
        return self.tokens + self.shared


class _Look:
    """What a step's passes come to, of whole tiles where they are."""

    def __init__(self, rows: "TokenRows", batch: int, limits: tuple[int | None, int | None] | None, share: bool, tile: int):
        self.rows, self.batch, self.limits, self.share, self.tile = rows, batch, limits, share, tile

    def __call__(self, step: list[int]) -> _Step:
        lengths, prompts = self.rows.lengths[step], self.rows.prompts[step]
        if self.limits:
            plan = plan_of(self.rows, step, self.limits, self.share)
            return _Step(max((whole(part.tokens, self.tile) for part in plan.passes), default=0), int(lengths.max()), max((int((part.targets >= 0).sum()) for part in plan.passes), default=0),
                         plan.shared.tokens, plan.tokens)
        parts = [slice(start, start + self.batch) for start in range(0, len(step), self.batch)]
        filled = [int(lengths[part].max()) * len(lengths[part]) for part in parts]
        return _Step(max(filled), int(lengths.max()), max(int((lengths[part] - prompts[part]).sum()) for part in parts), 0, sum(filled))


def plan_of(rows: "TokenRows", step: list[int], limits: tuple[int | None, int | None], share: bool) -> Plan:
    """The fused engine's plan of a step. limits: see `pass_limits`."""
    taken = [rows[index] for index in step]
    return plan_step([Row(np.array(row["input_ids"], np.int64), np.array(row["labels"], np.int64)) for row in taken], limits[0], share, limits[1])
