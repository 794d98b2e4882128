"""Streams: training rows read, formatted and tokenised as they come, in one order that a resumed run goes on in.

In: a `Split`, the tokenizer, the rows of a step, which of how many processes this is, and where a checkpoint says that the run was. Out: `StreamRows`: the
record at each place of the one global order, which is the same for any number of processes, so that any number goes on with what any other began, no row twice
or lost.

The order. The files are dealt into lanes (`lanes.py`) by what they are, not by who reads them; of one lane all below is the plain order of the files. Places come in windows: each lane
reads its next `dataset.shuffle_window` / lanes records and shuffles them by seed; the place p of a window that begins at s is record (p - s) // lanes of lane
(p - s) % lanes. A window is as long as the longest lane has records; where a lane ended earlier, and where a record is dropped for its length, a place stays empty.
An epoch ends where no lane has a record.

Who reads. Steps begin at multiples of the number of processes, windows at multiples of the lanes, so the places of process r lie in lanes that leave r's remainder by
the two numbers' common factor, and it opens no other. What it cannot know is how many records the other lanes had; that the processes tell each other by `exchange`.

`split_dataset_by_node` would tie the order to the number of processes, and the buffer of `datasets`' own shuffling is forgotten by its state. Limits: memory for two windows of
a process's lanes, and their files open at a time; a resumed run reads the files that it was in from their beginning up to where it was.
"""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING, Any, Iterator, Protocol, Sequence

import numpy as np

from emergency_kit.artifacts import hash_json
from emergency_kit.config import Resolved
from emergency_kit.data.cache import cache_key
from emergency_kit.data.columns import Rejected
from emergency_kit.data.format import Record
from emergency_kit.data.formats import Row
from emergency_kit.data.grounding import grounding
from emergency_kit.data.lanes import Lanes
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


class Exchange(Protocol):
    """How processes that read different lanes tell each other of a window; `training/ledger.py` has one."""

    def __call__(self, window: str, share: int, shares: int, longest: int, states: list[Any]) -> tuple[int, list[list[Any]]]:
        """Tell what this process's share of the lanes has of a window, wait for the other shares; `(most records of any lane, all shares' states)`, the latter for
        the process that saves alone."""


class _Lane:
    """One lane of an epoch, from its beginning or from a state of before."""

    def __init__(self, split: "Split", lanes: Lanes, number: int, state: Any = None):
        self.source, self.begun = split.source.stream(split.source_split, lanes, number), state
        if state is not None:
            self.source.load_state_dict(state)
        self.records = split.records(self._rows())

    def _rows(self) -> Iterator[Row]:
        for item in self.source:
            self.begun = None
            yield Row(item["place"], item["value"], item["problem"])

    def take(self, most: int) -> list[Record]:
        """The next records."""
        return list(islice(self.records, most))

    def state(self) -> Any:
        """Where it stands, JSON. Until a row was read the source would say that it stands at its beginning."""
        return self.begun if self.begun is not None else self.source.state_dict()


class StreamRows:
    """The training rows of a run, `training.max_steps` steps of them in the global order, to be asked for in rising order.

    step_rows: rows of an optimizer step over all processes, and the most lanes there are, so that no step is without rows. state: of a checkpoint (`state_at`).
    exchange: to be set before the first row is asked for where `shares` is more than one. Raises DataError for rows of no known form, UsageError
    for a state of other lanes.
    """

    def __init__(self, split: "Split", tokenizer: Any, resolved: Resolved, step_rows: int, state: dict[str, Any] | None = None, process: int = 0, processes: int = 1):
        self.split, self.tokenizer, self.resolved = split, tokenizer, resolved
        self.rows, self.processes = (resolved.config.training.max_steps or 0) * step_rows, processes
        self.lanes = split.source.lanes(split.source_split, step_rows)
        self.shares = self.lanes.shares(processes)
        self.share = process % self.shares
        self.mine = range(self.share, len(self.lanes), self.shares)
        self.window, self.seed = resolved.config.dataset.shuffle_window, resolved.config.training.seed
        self.lane_window = -(-self.window // len(self.lanes))
        self.ground = grounding(resolved.config.dataset)
        self.beginning: dict[str, Any] = {"position": 0, "epoch": 0, "lanes": len(self.lanes), "states": None}
        self.begun, self.asked, self.passes = self._known(state) if state else self.beginning, 0, 0
        self.exchange: Exchange | None = None
        self.marks: list[dict[str, Any]] = []
        self.held: dict[int, list[Record]] = {}
        self.dropped: list[str] = []
        self.first_rejected = ""
        self.said = {"rejected": 0, "dropped": 0}
        if self.share == 0:
            split.look(_Lane(split, self.lanes, 0)._rows())
        split.on_rejected = self._note
        self._begin(self.begun)

    def __len__(self) -> int:
        return self.rows

    def __getitems__(self, positions: Sequence[int]) -> list[dict[str, list[int]]]:
        """The rows at these places, those left out that are empty or were dropped for their length."""
        self.asked = min(positions)
        records = (record for position in positions if (record := self.record(position)) is not None)
        rows = list(encode(map(self.ground, records), self.tokenizer, self.resolved))
        self.dropped += [row.record.id for row in rows if not row.ids]
        self._say("dropped", len(self.dropped), f"records over model.max_seq_length dropped, first {self.dropped[:1]}")
        return [{"input_ids": row.ids, "labels": [IGNORE] * row.prompt + row.ids[row.prompt:]} for row in rows if row.ids]

    def describe(self) -> str:
        """One line: how many files in how many lanes, and what share of them a process reads."""
        return self.lanes.describe(self.processes)

    def state_at(self, position: int) -> dict[str, Any]:
        """What a checkpoint keeps, JSON: the last window that begins at or before a place. Of several processes the one that saves knows it."""
        return next((mark for mark in reversed(self.marks) if mark["position"] <= position), self.begun)

    def digest(self) -> str:
        """Hash of all that decides which tokens stand at which place."""
        dealt = [self.lanes.parts] if len(self.lanes) > 1 else []
        return hash_json([cache_key(self.split.digest(), self.tokenizer, self.resolved), self.window, self.seed, *dealt])

    def _known(self, state: dict[str, Any]) -> dict[str, Any]:
        """A checkpoint's state; one from before there were lanes is of one."""
        if "source" in state:
            state = {"position": state["position"], "epoch": state["epoch"], "lanes": 1, "states": None if state["source"] is None else [state["source"]]}
        if state["lanes"] != len(self.lanes):
            raise UsageError(f"dataset {self.split.source.name}: the checkpoint's stream was read in lanes of another number ({state['lanes']}, now {len(self.lanes)}), so that its place is not to be found: "
                             "the files or the effective batch are others, or the checkpoint is of an older version. Go on with those of before, or begin anew with --overwrite")
        return state

    def _begin(self, mark: dict[str, Any]) -> None:
        self.marks, self.held, self.passes = [], {}, self.passes + 1
        self.epoch, self.next = mark["epoch"], mark["position"]
        self._open(mark["states"])

    def _open(self, states: list[Any] | None) -> None:
        self.readers = [_Lane(self.split, self.lanes, lane, states[lane] if states else None) for lane in self.mine]
        self.started = states is not None

    def record(self, position: int) -> Record | None:
        """The record at a place, without its cards; None where the place is empty. Raises AssertionError for a place of another process's lanes."""
        if self.marks and position < self.marks[-1]["position"] or not self.marks and position < self.next:
            # Behind what is held: from the run's own mark, or from the beginning of all.
            self._begin(self.begun if position >= self.begun["position"] else self.beginning)
        while position >= self.next:
            self._read_window()
        turn, lane = divmod(position - self.marks[-1]["position"], len(self.lanes))
        assert lane in self.held, f"place {position} is in lane {lane} of {len(self.lanes)}, which another process reads"
        return self.held[lane][turn] if turn < len(self.held[lane]) else None

    def _read_window(self) -> None:
        """The next window of this process's lanes, shuffled; where the source ends, the next epoch begins."""
        states = [reader.state() for reader in self.readers] if self.started else []
        held = {lane: reader.take(self.lane_window) for lane, reader in zip(self.mine, self.readers)}
        longest, told = max(map(len, held.values())), [states]
        if self.shares > 1:
            assert self.exchange is not None
            longest, told = self.exchange(f"{self.passes}/{self.epoch}/{self.next}", self.share, self.shares, longest, states)
        if not longest:
            if not self.started:
                raise DataError(f"dataset {self.split.source.name}: split {self.split.source_split!r} has no records"
                                + (f"; all rows were rejected ({describe_rejected(self.split.rejected)})" if self.split.rejected else ""))
            self.epoch += 1
            self._open(None)
            return
        # A share's states are those of every shares-th lane.
        mark = {"position": self.next, "epoch": self.epoch, "lanes": len(self.lanes), "states": [state for turn in zip(*told) for state in turn] if self.started else None}
        for lane, records in held.items():
            chance = np.random.default_rng([self.seed, self.epoch, self.next, *([lane] if len(self.lanes) > 1 else [])])
            self.held[lane] = [records[place] for place in chance.permutation(len(records))]
        self.started, self.next = True, self.next + longest * len(self.lanes)
        # What was asked for last is the last that a checkpoint may ask for.
        behind = [before for before in self.marks if before["position"] <= self.asked]
        self.marks = [*behind[-1:], *(before for before in self.marks if before["position"] > self.asked), mark]
        self._say("rejected", self.split.rejected.total(), f"rows rejected ({describe_rejected(self.split.rejected)}), first {self.first_rejected}")

    def _note(self, row: Row, reason: Rejected) -> None:
        self.first_rejected = self.first_rejected or row.place

    def _say(self, kind: str, count: int, what: str) -> None:
        """Once for the first, then whenever they have doubled."""
        if count >= max(1, 2 * self.said[kind]):
            self.said[kind] = count
            print(f"{self.split.name}: {count} {what}, so far", flush=True)
