"""Peak memory of a block of code: how far the process's resident memory rose above where it stood.

Linux only, by the kernel's own high-water mark, which is reset first; elsewhere nothing is measured.
"""

from __future__ import annotations

import contextlib
import gc
from dataclasses import dataclass
from typing import Iterator

from emergency_kit.model.process_memory import reset_highest, resident_bytes


@dataclass
class Peak:
    """added_bytes: None until the block ends, and where the system does not tell."""

    added_bytes: int | None = None


@contextlib.contextmanager
def measure_peak() -> Iterator[Peak]:
    """Measure the block."""
    peak = Peak()
    gc.collect()
    before = resident_bytes()
    if not reset_highest():
        before = None
    yield peak
    highest = resident_bytes("VmHWM")
    if before is not None and highest is not None:
        peak.added_bytes = max(0, highest - before)
