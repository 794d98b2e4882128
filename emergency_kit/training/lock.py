"""One run at a time in an output folder, and which run it is.

In: the output folder. Out: a lock that the system frees with the process, and `.training.json` beside it: who holds it
(process id, host, since when) and the id of the run whose checkpoints count. A second run is refused with the first one's id
and host; the lock of a process that has ended is taken over, and said.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import uuid
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Callable, Iterator

from filelock import FileLock, Timeout

from emergency_kit.artifacts import save_json
from emergency_kit.errors import UsageError

RECORD = ".training.json"
# A process that was killed while it started another (`uname`, say) leaves its lock to that one until it has begun.
LAST_BREATH_SECONDS = 10


class RunRecord:
    """Who trains in a folder, and the id of the run that the folder belongs to."""

    def __init__(self, folder: Path, known: dict[str, Any]):
        self.folder, self.known = folder, known

    @property
    def run_id(self) -> str | None:
        """The run whose checkpoints count; None where none has begun."""
        return self.known.get("run_id")

    def begin(self, run_id: str | None = None) -> str:
        """Make the folder a run's own: a new one's, or that of a checkpoint's `run_id`."""
        self.known["run_id"] = run_id or uuid.uuid4().hex
        save_json(self.folder / RECORD, self.known)
        return self.known["run_id"]


@contextlib.contextmanager
def hold(folder: Path, say: Callable[[str], None]) -> Iterator[RunRecord]:
    """Hold the folder for one run. Raises UsageError where another process trains into it."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".training.lock")
    try:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            if not _has_ended(_read(folder)):
                raise
            lock.acquire(timeout=LAST_BREATH_SECONDS)
    except Timeout:
        holder = _read(folder)
        raise UsageError(f"output folder {folder}: another run is training into it (process {holder.get('pid', 'unknown')} on host {holder.get('host', 'unknown')}, "
                         f"since {holder.get('since', 'unknown')}); wait for it, stop it, or choose another with --output-dir") from None
    try:
        earlier = _read(folder)
        if earlier and not earlier.get("ended", True):
            say(f"The lock of process {earlier.get('pid')} on host {earlier.get('host')} (since {earlier.get('since')}) is taken over: it ended without saying so")
        record = RunRecord(folder, {"pid": os.getpid(), "host": socket.gethostname(), "since": datetime.now(timezone.utc).isoformat(timespec="seconds"),
                                    "ended": False, "run_id": earlier.get("run_id")})
        save_json(folder / RECORD, record.known)
        try:
            yield record
        finally:
            # A disk that has gone meanwhile must not hide why the run ended; the lock itself is freed below.
            with contextlib.suppress(OSError):
                save_json(folder / RECORD, record.known | {"ended": True})
    finally:
        lock.release()


def _has_ended(holder: dict[str, Any]) -> bool:
    """Whether the process in a record was one of this machine and is no more."""
    if holder.get("host") != socket.gethostname() or not isinstance(holder.get("pid"), int):
        return False
    try:
        os.kill(holder["pid"], 0)
    except (ProcessLookupError, OverflowError):
        return True
    except PermissionError:  # another user's
        return False
    return False


def known_run(folder: str | Path) -> str | None:
    """Id of the run that an output folder belongs to, without holding it."""
    return _read(Path(folder)).get("run_id")


def _read(folder: Path) -> dict[str, Any]:
    try:
        known = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return known if isinstance(known, dict) else {}
