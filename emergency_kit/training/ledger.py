"""The ledger: what the processes that read different lanes of a stream tell each other of a window (`data/stream.py`, `Exchange`).

In: a torch.distributed Store. Out: how many records the window's longest lane has, and for the process that saves, where each lane stood at its beginning. It is a store and
no collective, since rows are read ahead of the step and processes come to a window at different moments; it is asked again and again, not waited in, so that a
signal is heard. Keys of a window go once all processes have read them, so that the store does not grow. Limits: what a process waits for it waits for
`training.rank_timeout_seconds` at most, and says whose word is missing.

That nobody waits for ever: a process tells of its own lanes before it waits for others'. Those wait for it in no window before, since all windows come in one
order and the first that somebody waits in has all before it behind it. And they do come to this window within the same batch, before any exchange
of gradients that a waiting process is needed for: if a place p at or after the window's beginning s is in a batch of all processes, then so is the group of
`shares` places around p, which begins at a multiple of `shares`, as batches and s do; so it lies at or after s whole, and has one place of each share.
"""

from __future__ import annotations

import itertools
import json
import time
from typing import Any

from emergency_kit.errors import TrainingError
from emergency_kit.training import ranks

_opened = itertools.count()


class Ledger:
    """An `Exchange` of one process of several. store: one that all of them reach."""

    def __init__(self, store: Any, rank: int, world: int, timeout_seconds: float):
        self.store, self.rank, self.world, self.timeout_seconds = store, rank, world, timeout_seconds

    def __call__(self, window: str, share: int, shares: int, longest: int, states: list[Any]) -> tuple[int, list[list[Any]]]:
        """See `Exchange`. Raises TrainingError with the ranks of which one should have spoken."""
        counts, places, read = [f"{window}/{number}/longest" for number in range(shares)], [f"{window}/{number}/states" for number in range(shares)], f"{window}/read"
        # In this order: where there is a count, there are states.
        self.store.set(places[share], json.dumps(states))
        self.store.set(counts[share], str(longest))
        self._wait(counts)
        most = max(int(count) for count in self.store.multi_get(counts))
        told = [json.loads(place) for place in self.store.multi_get(places)] if self.rank == 0 else []
        if self.store.add(read, 1) == self.world:
            for key in (*counts, *places, read):
                self.store.delete_key(key)
        return most, told

    def _wait(self, counts: list[str]) -> None:
        deadline, pause = time.monotonic() + self.timeout_seconds, 0.001
        while not self.store.check(counts):
            if time.monotonic() > deadline:
                silent = [str(rank) for share, key in enumerate(counts) if not self.store.check([key]) for rank in range(share, self.world, len(counts))]
                raise TrainingError(f"ranks: the stream waits for what ranks {', '.join(silent[:20])} should have read; each rank's own message says why it ended; "
                                    f"training.rank_timeout_seconds is {self.timeout_seconds:g}")
            time.sleep(pause)
            pause = min(0.2, 1.5 * pause)


def open_ledger(timeout_seconds: float) -> Ledger:
    """The ledger of this run's processes, each time another one; all of them must come. Raises TrainingError where rank 0 is not reached."""
    from torch.distributed import PrefixStore

    return Ledger(PrefixStore(f"stream {next(_opened)}", ranks.open_store(timeout_seconds)), ranks.rank(), ranks.world(), timeout_seconds)
