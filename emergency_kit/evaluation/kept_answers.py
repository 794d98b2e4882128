"""Answers kept on disk, so that an evaluation goes on where it was and a second one costs nothing.

In: a model's hash, a prompt and the settings of generation. Out: the answer that this very model gave before, or
None. One append-only file a model and rank under `<output_dir>/cache/answers/`, one JSON object a line with a checksum: a
line that a crash cut short, or that was changed, is left out and answered again. Two processes may append at once, but not
two hosts on a network's disk, so that each rank has a file of its own; all are read.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from emergency_kit.artifacts import hash_json
from emergency_kit.inference.engine import Generated, Messages
from emergency_kit.training import ranks

CHECK_LETTERS = 16


def answer_key(messages: Messages, max_new_tokens: int, temperature: float, seed: int) -> str:
    """Hex sha256 of all that decides an answer, given the model. A greedy answer has no seed."""
    return hash_json([messages, max_new_tokens, temperature, seed if temperature else 0])


class Answers:
    """The answers of one model; `fingerprint` is the hash of its files and of the engine that runs it."""

    def __init__(self, folder: Path, fingerprint: str):
        self.path = folder / (f"{fingerprint[:32]}.jsonl" if ranks.is_first() else f"{fingerprint[:32]}-{ranks.rank()}.jsonl")
        self.damaged = 0
        self.known: dict[str, Generated] = {}
        for path in sorted(folder.glob(f"{fingerprint[:32]}*.jsonl")):
            for line in path.read_bytes().split(b"\n"):
                if line.strip():
                    self._read(line)

    def get(self, key: str) -> Generated | None:
        """The answer kept under a key, or None."""
        return self.known.get(key)

    def take(self, answers: dict[str, Generated]) -> None:
        """Know answers that other ranks have kept."""
        self.known |= answers

    def put(self, key: str, answer: Generated) -> None:
        """Keep an answer: on the disk when this returns."""
        self.known[key] = answer
        value = {"key": key, "text": answer.text, "tokens": answer.tokens, "ended": answer.ended}
        line = json.dumps(value | {"check": hash_json(value)[:CHECK_LETTERS]}, ensure_ascii=True).encode()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # A newline before the line too: whatever a crash left at the end then spoils itself alone.
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, b"\n" + line + b"\n")
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def __len__(self) -> int:
        return len(self.known)

    def _read(self, line: bytes) -> None:
        try:
            value: Any = json.loads(line)
            check = value.pop("check")
            if check == hash_json(value)[:CHECK_LETTERS]:
                self.known[value["key"]] = Generated(value["text"], value["tokens"], value["ended"])
                return
        except (ValueError, KeyError, TypeError, AttributeError):
            pass
        self.damaged += 1
