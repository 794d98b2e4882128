"""A sign of life: a line every 15 seconds while something long runs."""

from __future__ import annotations

import contextlib
import threading
import time
from typing import Iterator

INTERVAL_SECONDS = 15


@contextlib.contextmanager
def report_while(what: str) -> Iterator[None]:
    """Print `what` with the seconds that have passed, every 15 seconds until the block ends."""
    started = time.monotonic()
    done = threading.Event()

    def report() -> None:
        while not done.wait(INTERVAL_SECONDS):
            print(f"  ... {what}, {time.monotonic() - started:.0f} s so far", flush=True)

    thread = threading.Thread(target=report, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
