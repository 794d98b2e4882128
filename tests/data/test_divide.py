"""Preparation by several processes: the same bytes as by one, errors in their place, and a process that dies is said."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

from emergency_kit.data import divide as module
from emergency_kit.data.cache import load_rows
from emergency_kit.data.divide import divide
from emergency_kit.data.load import open_split
from emergency_kit.errors import DataError
from emergency_kit.model.backend import load_tokenizer
from tests.data.files import resolve
from tests.tiny import BUNDLED


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ALONE", 1)


def test_the_cache_has_the_same_bytes_for_any_number_of_processes(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "train.jsonl").write_text("".join(json.dumps({"instruction": "What now?", "input": f"It burns {number}, " + "smoke " * (number % 90), "output": "Leave."}) + "\n" for number in range(1500)))
    (data / "dev.jsonl").write_text('{"instruction": "What now?", "input": "Smoke", "output": "Leave."}\n')
    found = []
    for number in (1, 2, 3):
        resolved = resolve(data, f"training.output_dir={tmp_path / str(number)}", f"model.name={BUNDLED}", "dataset.overlength=drop", "model.max_seq_length=150", f"dataset.processes={number}")
        load_rows(open_split(resolved, "train"), load_tokenizer(resolved.config.model), resolved)
        entry, = (tmp_path / str(number) / "cache").glob("tokens-*")
        found.append({path.name: path.read_bytes() for path in entry.iterdir() if path.name != "about.json"} | {"": entry.name.encode()})
    assert found[0] == found[1] == found[2] and 100 < len(json.loads(found[0]["overlength.json"])["dropped"]) < 1400


def test_results_come_in_order_and_an_error_in_its_place() -> None:
    def work(number: int) -> int:
        time.sleep(0.02 * (number % 3))
        if number == 14:
            raise DataError("record 14")
        return number if number == 0 else os.getpid() * 100 + number

    with pytest.raises(DataError, match="^record 14$"):
        given = []
        for result in divide(work, iter(range(30)), 3):
            given.append(result)
    assert [result % 100 for result in given] == list(range(14)) and 1 < len({result // 100 for result in given[1:]}) <= 3 and os.getpid() not in {result // 100 for result in given}


def test_a_process_that_dies_is_said() -> None:
    with pytest.raises(DataError, match="dataset.processes: one of 2 processes that tokenise was ended, .*; next: --set dataset.processes=1"):
        list(divide(lambda number: os.kill(os.getpid(), signal.SIGKILL) if number == 9 else number, iter(range(30)), 2))
