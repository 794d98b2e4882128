"""Rows of an optimizer step as a tree of tokens, so that what rows begin with in common is computed once.

In: rows of ids and labels. Out: `Plan`: passes of nodes, each a run of tokens whose keys are its own and
its ancestors'. The first pass holds the shared beginnings, the others whole remainders of rows. A shared
node never holds a position whose next token is a label, so that every loss belongs to one row.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Sequence

import numpy as np

from emergency_kit.data.tokenize import IGNORE

# A beginning shared by fewer tokens than this, counted once for every row that is spared it, costs more in small products than it saves.
LEAST_SAVED_TOKENS = 48


@dataclass(frozen=True)
class Row:
    """ids, labels: int64 (length,); labels IGNORE where unsupervised, not shifted."""

    ids: np.ndarray
    labels: np.ndarray

    @property
    def first_predicting(self) -> int:
        """First position that predicts a label; the row's length where there is none."""
        found = np.flatnonzero(self.labels[1:] != IGNORE)
        return int(found[0]) if len(found) else len(self.ids)


@dataclass
class Node:
    """A run of tokens. start, end: its place among the tokens of its pass; first: position of its first token in its row;
    ancestors: `(start, end)` in the shared pass, outermost first."""

    start: int
    end: int
    first: int
    ancestors: list[tuple[int, int]]

    @property
    def length(self) -> int:
        return self.end - self.start


@dataclass
class Pass:
    """Tokens that go through the model together. ids, positions, targets: int64 (tokens,); a target is the label of the
    position that follows, IGNORE where there is none. edges: see attention.py."""

    nodes: list[Node] = field(default_factory=list)
    ids: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    targets: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    edges: Any = None

    @property
    def tokens(self) -> int:
        return len(self.ids)

    @property
    def positions(self) -> np.ndarray:
        return np.concatenate([np.arange(node.first, node.first + node.length) for node in self.nodes])

    def add(self, ids: np.ndarray, labels: np.ndarray, first: int, ancestors: list[tuple[int, int]]) -> Node:
        """Append a run of tokens at position `first` of its row; labels as in the row, one longer where another token follows."""
        node = Node(self.tokens, self.tokens + len(ids), first, ancestors)
        self.nodes.append(node)
        targets = np.full(len(ids), IGNORE, np.int64)
        targets[:len(labels) - 1] = labels[1:]
        self.ids, self.targets = np.concatenate([self.ids, ids]), np.concatenate([self.targets, targets])
        return node


@dataclass
class Plan:
    """shared: the beginnings that rows have in common, possibly empty; passes: the rest of the rows."""

    shared: Pass
    passes: list[Pass]

    @property
    def tokens(self) -> int:
        """Tokens computed."""
        return self.shared.tokens + sum(part.tokens for part in self.passes)


def plan_step(rows: Sequence[Row], pass_rows: int | None, share: bool = True, pass_tokens: int | None = None) -> Plan:
    """Passes of at most `pass_rows` rows in the order given; rows without a label cost nothing and are left out.

    pass_rows: None where tokens alone count. pass_tokens: most tokens of a pass of more than one row.
    """
    rows = [row for row in rows if row.first_predicting < len(row.ids)]
    shared = Pass()
    begun: dict[int, tuple[int, list[tuple[int, int]]]] = {}
    if share and len(rows) > 1:
        order = sorted(range(len(rows)), key=lambda index: rows[index].ids.tolist())
        _share(rows, order, 0, [], shared, begun)
    passes: list[Pass] = []
    for index, row in enumerate(rows):
        first, ancestors = begun.get(index, (0, []))
        full = not passes or pass_rows and len(passes[-1].nodes) >= pass_rows
        if full or pass_tokens and passes[-1].tokens + len(row.ids) - first > pass_tokens:
            passes.append(Pass())
        passes[-1].add(row.ids[first:], row.labels[first:], first, ancestors)
    return Plan(shared, passes)


def _share(rows: Sequence[Row], group: list[int], first: int, ancestors: list[tuple[int, int]], shared: Pass,
           begun: dict[int, tuple[int, list[tuple[int, int]]]]) -> None:
    """Give the rows of a group, in sorted order and equal before `first`, their shared nodes."""
    common = _common(rows, group, first)
    if (common - first) * (len(group) - 1) >= LEAST_SAVED_TOKENS:
        node = shared.add(rows[group[0]].ids[first:common], np.full(1, IGNORE), first, ancestors)
        first, ancestors = common, [*ancestors, (node.start, node.end)]
        for index in group:
            begun[index] = (first, ancestors)
    # Rows that end their shareable part here go on alone; the others are divided by their next token.
    parts: dict[int, list[int]] = {}
    for index in group:
        if common < rows[index].first_predicting:
            parts.setdefault(int(rows[index].ids[common]), []).append(index)
    for part in parts.values():
        if len(part) > 1:
            _share(rows, part, first, ancestors, shared, begun)


def _common(rows: Sequence[Row], group: list[int], first: int) -> int:
    """First position at which the rows of a group, sorted, differ or one of them predicts a label."""
    end = min(rows[index].first_predicting for index in group)
    low, high = rows[group[0]].ids[first:end], rows[group[-1]].ids[first:end]
    different = np.flatnonzero(low != high)
    return first + (int(different[0]) if len(different) else len(low))
