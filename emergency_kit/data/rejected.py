"""Rejected rows: counted by reason, said aloud, and listed in a file with their place and content.

In: a `Split` that is being read. Out: a JSONL file of `{place, reason, detail, row}`, there only where
rows were rejected.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Mapping

if TYPE_CHECKING:
    from emergency_kit.data.columns import Rejected
    from emergency_kit.data.formats import Row
    from emergency_kit.data.load import Split


class RejectedList:
    """While open, rows that a split rejects are listed in a file; at the end they are said aloud.

    An older list is replaced, or removed where nothing was rejected. shown_as: where the list will stand in
    the end; note: called with each row as well.
    """

    def __init__(self, split: Split, path: Path, shown_as: Path | None = None, note: Callable[[Row, Rejected], None] | None = None):
        self.split, self.path, self.shown_as, self.note = split, path, shown_as or path, note
        self._partial = path.with_name(f".{path.name}.partial")
        self._stream: Any = None

    def __enter__(self) -> "RejectedList":
        self.split.on_rejected = self._add
        return self

    def _add(self, row: Row, reason: Rejected) -> None:
        if self.note:
            self.note(row, reason)
        if self._stream is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # Half characters, which UTF-8 cannot hold, are written as escapes.
            self._stream = self._partial.open("w", encoding="utf-8", errors="backslashreplace")
        line = {"place": row.place, "reason": reason.reason, "detail": reason.detail, "row": row.value}
        self._stream.write(json.dumps(line, ensure_ascii=False, default=str) + "\n")

    def __exit__(self, error: object, *_: object) -> None:
        self.split.on_rejected = None
        if self._stream is None:
            self.path.unlink(missing_ok=True)
            return
        self._stream.close()
        os.replace(self._partial, self.path)
        if error is None:  # an error says itself what was rejected
            say_rejected(self.split.name, self.split.rejected, self.shown_as)


def say_rejected(name: str, rejected: Counter[str], listed: Path) -> None:
    """Print how many rows were rejected and why."""
    print(f"{name}: {rejected.total()} rows rejected ({describe_rejected(rejected)}); listed in {listed}", flush=True)


def describe_rejected(rejected: Mapping[str, int]) -> str:
    """`3 empty answer, 1 not UTF-8`, most frequent first."""
    return ", ".join(f"{count} {reason}" for reason, count in sorted(rejected.items(), key=lambda item: (-item[1], item[0])))
