"""Memory and cores of this process and this computer, as the kernel tells it; of memory None where the system does not say.

In: nothing but the kernel. Out: bytes, a count. No torch here: memory on a GPU is the allocator's to tell.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from pathlib import Path


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def resident_bytes(field: str = "VmRSS") -> int | None:
    """Resident memory of this process: now (VmRSS), at its highest (VmHWM), or of now what no file backs (RssAnon)."""
    return _field(Path("/proc/self/status"), field)


def available_bytes() -> int | None:
    """What programs could still take without swapping, of the whole computer."""
    return _field(Path("/proc/meminfo"), "MemAvailable")


def give_back() -> None:
    """Hand pages that lie free in the heap back to the system; where the C library is not glibc, nothing happens."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def reset_highest() -> bool:
    """Let the highest mark begin anew; whether the kernel did."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
        return True
    return False


def _field(path: Path, name: str) -> int | None:
    with contextlib.suppress(OSError):
        for line in path.read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    return None
