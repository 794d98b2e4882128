"""Lanes: the files of a stream dealt into parts of like size, of which a process reads some and leaves the others alone.

In: the sizes of the files in their order, bytes. Out: `Lanes`: a power of two of them, which files each has, or one lane and why it is one. Limits: what is
even by bytes is nearly so by rows, and not more; hence a lane may end before another, and its places in the order stay empty.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from math import gcd
from typing import Sequence

MOST = 64
# Of the heaviest lane's bytes, what the lightest must have.
EVEN = 0.9


@dataclass(frozen=True)
class Lanes:
    """parts: of each lane, the places of its files among the source's. why_one: where there is one lane, the reason."""

    parts: tuple[tuple[int, ...], ...]
    why_one: str = ""

    def __len__(self) -> int:
        return len(self.parts)

    def shares(self, processes: int) -> int:
        """In how many shares so many processes read: process r reads the lanes that leave r's remainder. One: each reads all."""
        return gcd(processes, len(self))

    def describe(self, processes: int) -> str:
        """One line for people: what lies in how many lanes, and how much of it each process reads."""
        files = sum(map(len, self.parts))
        what = f"Stream: {files} {'file' if files == 1 else 'files'} in {len(self)} {'lane' if len(self) == 1 else 'lanes'}"
        if processes == 1:
            return what
        if (shares := self.shares(processes)) > 1:
            return f"{what}; each of {processes} processes reads 1/{shares} of them"
        if len(self) > 1:
            return f"{what}; each of {processes} processes reads all of them, since {processes} and {len(self)} have no common factor. To read less: an even number of processes, best 2, 4, 8 or more"
        return f"{what}; each of {processes} processes reads all of it, since {self.why_one}. To read less: files of like size, as many as processes or a multiple"


def deal(sizes_bytes: Sequence[int | None], most: int) -> Lanes:
    """The largest power of two of lanes, of `most` and MOST at most, into which files of these sizes go evenly: the largest file first, each to the lightest lane.
    None: a size that is not known."""
    if len(sizes_bytes) == 1:
        return _one(1, "it is one file")
    sizes = [size for size in sizes_bytes if size is not None]
    if len(sizes) < len(sizes_bytes):
        return _one(len(sizes_bytes), "the size of a file is not known")
    lanes = _power(min(most, MOST, len(sizes)))
    while lanes > 1:
        held: list[list[int]] = [[] for _ in range(lanes)]
        loads = [(0, lane) for lane in range(lanes)]
        for file in sorted(range(len(sizes)), key=lambda file: (-sizes[file], file)):
            load, lane = loads[0]
            heapq.heapreplace(loads, (load + sizes[file], lane))
            held[lane].append(file)
        if 0 < max(loads)[0] * EVEN <= loads[0][0]:
            return Lanes(tuple(tuple(sorted(files)) for files in held))
        lanes //= 2
    return _one(len(sizes), "their sizes are too unlike for two even lanes")


def deal_shards(shards: int, most: int) -> Lanes:
    """The same of shards whose sizes are not known: the largest power of two that divides their number, each lane every so-many-th."""
    lanes = _power(min(most, MOST))
    while shards % lanes:
        lanes //= 2
    if lanes == 1:
        return _one(shards, "it is one file" if shards == 1 else f"{shards} is no even number")
    return Lanes(tuple(tuple(range(lane, shards, lanes)) for lane in range(lanes)))


def _one(files: int, why: str) -> Lanes:
    return Lanes((tuple(range(files)),), why)


def _power(most: int) -> int:
    """The largest power of two up to a number."""
    return 1 << max(1, most).bit_length() - 1
