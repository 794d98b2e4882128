"""Streams: training rows read, formatted and tokenised as they come, in one order that a resumed run goes on in.

In: a `Split`, the tokenizer, and where a checkpoint says that the run was. Out: `StreamRows`: the record at each place of the one global order, epochs of the
source one after the other, each cut into windows (`dataset.shuffle_window` records) that are shuffled by seed. The order depends on nothing else: every
rank reads it whole and makes tokens of its own places alone, so that any number of ranks goes on with what any other began, no row twice or
lost. That is why the source's shards are not dealt among ranks (`split_dataset_by_node`), and why the shuffling is not `datasets`' own, whose buffer its
state forgets. A record that is dropped for its length leaves its place empty. Memory: two windows of records.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Iterator, Sequence

import numpy as np

from emergency_kit.artifacts import hash_json
from emergency_kit.config import Resolved
from emergency_kit.data.cache import cache_key
from emergency_kit.data.columns import Rejected
from emergency_kit.data.format import Record
from emergency_kit.data.formats import Row
from emergency_kit.data.grounding import grounding
from emergency_kit.data.rejected import describe_rejected
from emergency_kit.data.tokenize import IGNORE, encode
from emergency_kit.errors import DataError, UsageError

if TYPE_CHECKING:
    from emergency_kit.data.load import Split


def check_streaming(resolved: Resolved) -> None:
    """Raise UsageError with all that does not go with `dataset.streaming`."""
    config = resolved.config
    training, problems = config.training, []
    if training.max_steps is None:
        problems.append("training.max_steps is not set, and a stream has no end: say how many steps, for instance --max-steps 1000")
    if config.dataset.name == "embedded":
        problems.append("dataset.name is embedded, which is built and prepared here; leave streaming out")
    if config.dataset.max_samples is not None:
        problems.append("dataset.max_samples draws among all rows, which are not known; leave it empty (training.max_steps bounds the run)")
    if training.method == "dpo":
        problems.append("training.method dpo needs what the model makes of every pair beforehand")
    if training.per_device_train_batch_size == "auto":
        problems.append("training.per_device_train_batch_size auto tries the longest rows, which are not known; set a number")
    problems += [f"training.{name} epoch: a stream has no epochs of known length; set it to steps" for name in ("eval_strategy", "save_strategy") if getattr(training, name) == "epoch"]
    if problems:
        raise UsageError(f"dataset.streaming: {'; '.join(problems)}")


class StreamRows:
    """The training rows of a run, `rows` of them in the global order, to be asked for in rising order. state: of a checkpoint (`state_at`)."""

    def __init__(self, split: "Split", tokenizer: Any, resolved: Resolved, rows: int, state: dict[str, Any] | None = None):
        self.split, self.tokenizer, self.resolved, self.rows = split, tokenizer, resolved, rows
        self.window, self.seed = resolved.config.dataset.shuffle_window, resolved.config.training.seed
        self.ground = grounding(resolved.config.dataset)
        self.begun = state or {"position": 0, "epoch": 0, "source": None}
        self.marks: list[dict[str, Any]] = []
        self.records: list[Record] = []
        self.dropped: list[str] = []
        self.first_rejected = ""
        self.said = {"rejected": 0, "dropped": 0}
        split.look()
        split.on_rejected = self._note
        self._begin(self.begun)

    def __len__(self) -> int:
        return self.rows

    def __getitems__(self, positions: Sequence[int]) -> list[dict[str, list[int]]]:
        """The rows at these places, those left out that were dropped for their length."""
        rows = list(encode((self.ground(self.record(position)) for position in positions), self.tokenizer, self.resolved))
        self.dropped += [row.record.id for row in rows if not row.ids]
        self._say("dropped", len(self.dropped), f"records over model.max_seq_length dropped, first {self.dropped[:1]}")
        return [{"input_ids": row.ids, "labels": [IGNORE] * row.prompt + row.ids[row.prompt:]} for row in rows if row.ids]

    def state_at(self, position: int) -> dict[str, Any]:
        """What a checkpoint keeps, JSON: the last window that begins at or before a place."""
        return next((mark for mark in reversed(self.marks) if mark["position"] <= position), self.begun)

    def digest(self) -> str:
        """Hash of all that decides which tokens stand at which place."""
        return hash_json([cache_key(self.split.digest(), self.tokenizer, self.resolved), self.window, self.seed])

    def _begin(self, mark: dict[str, Any]) -> None:
        self.marks, self.records = [], []
        self.epoch, self.next = mark["epoch"], mark["position"]
        self._open(mark["source"])

    def _open(self, state: dict[str, Any] | None) -> None:
        self.source = self.split.source.stream(self.split.source_split)
        if state is not None:
            self.source.load_state_dict(state)
        self.started = state is not None
        self.reading = self.split.records(self._rows())

    def _rows(self) -> Iterator[Row]:
        for item in self.source:
            yield Row(item["place"], item["value"], item["problem"])

    def record(self, position: int) -> Record:
        """The record at a place, without its cards."""
        if self.marks and position < self.marks[-1]["position"] or not self.marks and position < self.next:
            # Behind what is held: from the run's own mark, or from the beginning of all.
            self._begin(self.begun if position >= self.begun["position"] else {"position": 0, "epoch": 0, "source": None})
        while position >= self.next:
            self._read_window()
        return self.records[position - self.marks[-1]["position"]]

    def _read_window(self) -> None:
        """The next window, shuffled; where the source ends, the next epoch begins."""
        mark = {"position": self.next, "epoch": self.epoch, "source": self.source.state_dict() if self.started else None}
        held: list[Record] = []
        for record in self.reading:
            held.append(record)
            if len(held) == self.window:
                break
        if not held:
            if not self.started:
                raise DataError(f"dataset {self.split.source.name}: split {self.split.source_split!r} has no records"
                                + (f"; all rows were rejected ({describe_rejected(self.split.rejected)})" if self.split.rejected else ""))
            self.epoch += 1
            self._open(None)
            return
        self.started = True
        order = np.random.default_rng([self.seed, self.epoch, self.next]).permutation(len(held))
        self.records, self.next = [held[place] for place in order], self.next + len(held)
        self.marks = [*self.marks[-1:], mark]
        self._say("rejected", self.split.rejected.total(), f"rows rejected ({describe_rejected(self.split.rejected)}), first {self.first_rejected}")

    def _note(self, row: Row, reason: Rejected) -> None:
        self.first_rejected = self.first_rejected or row.place

    def _say(self, kind: str, count: int, what: str) -> None:
        """Once for the first, then whenever they have doubled."""
        if count >= max(1, 2 * self.said[kind]):
            self.said[kind] = count
            print(f"{self.split.name}: {count} {what}, so far", flush=True)
