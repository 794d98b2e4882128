"""Memory of this process, against real allocations."""

from __future__ import annotations

import ctypes

import pytest

from emergency_kit.model import process_memory


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="glibc's alone")
def test_what_lies_free_between_what_is_used_is_given_back() -> None:
    blocks = [b"x" * (100_000 + number) for number in range(600)]
    kept = blocks[::100]
    del blocks
    before = process_memory.resident_bytes("RssAnon")
    process_memory.give_back()
    after = process_memory.resident_bytes("RssAnon")
    assert before and after and before - after > 40_000_000 and len(kept) == 6
