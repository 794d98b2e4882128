"""The rows of a step: their order, which of them a rank takes, and the tensors that they become.

In: rows of tokens, their lengths, a seed. Out: batches, of several ranks each one's share, with the rows of a step the same whatever the number
of ranks and passes. Limits: a stream comes in its own order, and its rows are shared by their place.
"""

from __future__ import annotations

import itertools
from typing import Any, Iterator

import torch
from torch.utils.data import Dataset, Sampler

from emergency_kit.data.tokenize import IGNORE, TokenRows


class RowDataset(Dataset):
    """TokenRows as a torch Dataset of `{"input_ids", "labels"}` lists."""

    def __init__(self, rows: TokenRows):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return self.rows[index]


class StepSampler(Sampler[int]):
    """Shuffled by seed and epoch, then sorted by length within each optimizer step.

    The rows of a step stay the same, so its gradient does too; only the padding between its forward
    passes goes away. step_rows: rows of one optimizer step over accumulation and ranks.
    """

    def __init__(self, lengths: Any, step_rows: int, seed: int):
        self.lengths, self.step_rows, self.seed, self.epoch = lengths, step_rows, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the shuffle of an epoch, counted from 0."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        # A tensor: a list of Python's numbers would take 40 bytes a row on every rank.
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(self.seed * 100_003 + self.epoch))
        for start in range(0, len(order), self.step_rows):
            yield from sorted(order[start:start + self.step_rows].tolist(), key=lambda row: (-int(self.lengths[row]), row))


class StreamBatches:
    """RankBatches of a stream: places in its order as it is, `steps` steps long, none held."""

    def __init__(self, steps: int, step_rows: int, rows: int, rank: int, world: int):
        self.steps, self.step_rows, self.rows, self.rank, self.world = steps, step_rows, rows, rank, world

    def set_epoch(self, epoch: int) -> None:
        """A stream's epochs are its own."""

    def __len__(self) -> int:
        return self.steps * (self.step_rows // (self.rows * self.world))

    def __iter__(self) -> Iterator[list[int]]:
        together = self.rows * self.world
        for first in range(0, self.steps * self.step_rows, together):
            yield list(range(first + self.rank, first + together, self.world))


class RankBatches:
    """Of each step's rows (`StepSampler`'s), the batches of one rank; each rank has as many, so that they exchange gradients as often.

    rows: of a batch. Where a last step has fewer rows than there are ranks, some get a batch without any (`collate` makes one of it that
    counts nothing): no row is taken twice or left out in an epoch, and a step's rows are the same whatever the number of ranks.
    """

    def __init__(self, sampler: StepSampler, rows: int, rank: int, world: int):
        self.sampler, self.rows, self.rank, self.world = sampler, rows, rank, world

    def set_epoch(self, epoch: int) -> None:
        """Choose the shuffle of an epoch, counted from 0."""
        self.sampler.set_epoch(epoch)

    def __len__(self) -> int:
        whole, rest = divmod(len(self.sampler), self.sampler.step_rows)
        together = self.rows * self.world
        return whole * (self.sampler.step_rows // together) + -(-rest // together)

    def __iter__(self) -> Iterator[list[int]]:
        order, together = iter(self.sampler), self.rows * self.world
        while step := list(itertools.islice(order, self.sampler.step_rows)):
            for first in range(0, len(step), together):
                yield step[first:first + together][self.rank::self.world]


def collate(rows: list[dict[str, list[int]]], pad_id: int) -> dict[str, torch.Tensor]:
    """Right-padded tensors of shape (rows, longest): input_ids, attention_mask, labels. Of no rows, one of a single token without a label."""
    rows = rows or [{"input_ids": [pad_id], "labels": [IGNORE]}]
    longest = max(len(row["input_ids"]) for row in rows)

    def padded(lists: list[list[int]], fill: int) -> torch.Tensor:
        return torch.tensor([values + [fill] * (longest - len(values)) for values in lists])

    return {"input_ids": padded([row["input_ids"] for row in rows], pad_id),
            "attention_mask": padded([[1] * len(row["input_ids"]) for row in rows], 0),
            "labels": padded([row["labels"] for row in rows], IGNORE)}
