"""Stopping politely: SIGINT or SIGTERM ends a run after the forward and backward pass under way, with a checkpoint.

In: signals. Out: `StopRequested`, raised where the trainer asks (`Stop.check`): between passes, and between batches of an
evaluation. Before the first step it raises KeyboardInterrupt. A second signal ends the process on the spot, which loses
nothing that was saved: a checkpoint is there whole or not at all.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from types import FrameType
from typing import Any

from emergency_kit.errors import Interrupted
from emergency_kit.training import ranks


# torchrun passes on to its processes what the terminal has already sent them.
ECHO_SECONDS = 2.0


class StopRequested(Exception):
    """The run is to end here; the trainer is between two passes."""


class Stop:
    """Signal handlers for the time of a run. running: set once steps are being trained."""

    def __init__(self) -> None:
        self.requested: signal.Signals | None = None
        self.running = False
        self.signals, self.first = 0, 0.0
        self.previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "Stop":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self.previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self.signals and ranks.world() > 1 and time.monotonic() - self.first < ECHO_SECONDS:
            return
        self.signals += 1
        if self.signals > 1:
            # An exception could be caught on its way, or come too late within a long computation.
            os.write(2, b"\nStopped at once; the checkpoints saved so far are whole, the same command goes on from the last one.\n")
            os._exit(Interrupted.exit_code)
        self.first = time.monotonic()
        if not self.running:
            raise KeyboardInterrupt
        self.requested = signal.Signals(number)
        if ranks.is_first():
            sys.stderr.write("\nStopping: the pass under way is finished, then the run is saved; once more stops at once.\n")

    def check(self) -> None:
        """Raise StopRequested where a stop was asked for and this process is alone; ranks stop together (KitTrainer.stops)."""
        if self.requested and ranks.world() == 1:
            raise StopRequested

    def wait(self, seconds: float) -> bool:
        """Wait so long, or until a stop is asked for; whether the run may go on."""
        until = time.monotonic() + seconds
        while not self.requested and time.monotonic() < until:
            time.sleep(min(0.2, max(0.0, until - time.monotonic())))
        return self.requested is None
