"""Streams: one order for every rank, each row once an epoch, gone on with from any place; and what cannot be streamed is refused in one line."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from emergency_kit.config import Resolved
from emergency_kit.data.load import open_split
from emergency_kit.data.stream import StreamRows, check_streaming
from emergency_kit.data.tokenize import build_rows
from emergency_kit.errors import DataError, UsageError
from tests.data.files import resolve
from tests.tiny import BUNDLED


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(BUNDLED)


def write(folder: Path, *sizes: int, broken: int = -1) -> Path:
    """Files of so many rows, numbered through; `broken` is the number of one after which a line is no JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    number = 0
    for place, size in enumerate(sizes):
        lines = []
        for _ in range(size):
            lines += [json.dumps({"instruction": "What now?", "input": f"It burns {number}", "output": f"Leave {number}."}), *(["{"] if number == broken else [])]
            number += 1
        (folder / f"train-{place}.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    (folder / "dev.jsonl").write_text('{"instruction": "What now?", "input": "Smoke", "output": "Leave."}\n')
    return folder


def streamed(folder: Path, *settings: str) -> Resolved:
    return resolve(folder, "dataset.streaming=true", "training.max_steps=9", f"training.output_dir={folder}", *settings)


def open_rows(resolved: Resolved, tokenizer: Any, state: dict[str, Any] | None = None) -> StreamRows:
    return StreamRows(open_split(resolved, "train"), tokenizer, resolved, 10_000, state)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=4).filter(any), st.integers(1, 12), st.integers(0, 3), st.data())
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
def test_each_epoch_has_every_row_once_and_any_place_is_gone_on_from(tmp_path_factory: Any, tokenizer: Any, sizes: list[int], window: int, broken: int, data: Any) -> None:
    folder = write(tmp_path_factory.mktemp("rows"), *(size for size in sizes if size), broken=broken)
    resolved = streamed(folder, f"dataset.shuffle_window={window}")
    rows, total = sum(sizes), 3 * sum(sizes)
    whole = open_rows(resolved, tokenizer)
    order = [whole.record(place).input for place in range(total)]
    for epoch in range(3):
        assert Counter(order[epoch * rows:(epoch + 1) * rows]) == Counter(f"It burns {number}" for number in range(rows))
    stop = data.draw(st.integers(0, total - 1))
    ahead = data.draw(st.integers(stop, min(total - 1, stop + window)))  # what was read beyond the checkpoint's step
    world = data.draw(st.integers(1, 4))
    before = open_rows(resolved, tokenizer)
    for place in range(0, ahead + 1, world):
        before.record(place)
    state = json.loads(json.dumps(before.state_at(stop)))
    after = open_rows(resolved, tokenizer, state)
    assert [after.record(place).input for place in range(stop, total)] == order[stop:]
    assert after.record(0).input == order[0], "and from the beginning, where it must"


def test_rows_are_those_of_the_prepared_data_in_an_order_of_their_own(tmp_path: Path, tokenizer: Any, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write(tmp_path / "data", 7, 30, broken=2)
    resolved = streamed(folder, "dataset.shuffle_window=8")
    rows = open_rows(resolved, tokenizer)
    found = rows.__getitems__(range(37))
    assert "1 rows rejected (1 not a whole JSON object), first" in capsys.readouterr().out
    prepared = build_rows(open_split(resolve(folder, f"training.output_dir={tmp_path}"), "train"), tokenizer, resolved)
    assert found != list(prepared) and sorted(map(str, found)) == sorted(map(str, prepared))
    kept = open_rows(streamed(folder, "dataset.shuffle_window=1"), tokenizer)
    assert kept.__getitems__(range(37)) == list(prepared) and len({rows.digest(), kept.digest()}) == 2


def test_what_is_too_long_leaves_its_place_empty(tmp_path: Path, tokenizer: Any, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write(tmp_path, 4)
    with (folder / "train-0.jsonl").open("a") as file:
        file.write(json.dumps({"instruction": "What now?", "input": "so " * 2000, "output": "Leave."}) + "\n")
    rows = open_rows(streamed(folder, "dataset.overlength=drop"), tokenizer)
    assert [len(rows.__getitems__(range(start, start + 5))) for start in (0, 5)] == [4, 4]
    assert "1 records over model.max_seq_length dropped, first ['" in capsys.readouterr().out
    with pytest.raises(DataError, match="2\\d\\d\\d tokens .*model.max_seq_length is 1024"):
        open_rows(streamed(folder), tokenizer).__getitems__(range(5))


def test_what_cannot_be_streamed_is_refused_at_once(tmp_path: Path, tokenizer: Any) -> None:
    folder = write(tmp_path, 3)
    with pytest.raises(UsageError, match="^dataset.streaming: training.max_steps is not set, .*--max-steps 1000; dataset.max_samples .*; training.eval_strategy epoch: .* set it to steps$"):
        check_streaming(resolve(folder, "dataset.streaming=true", "dataset.max_samples=3", "training.eval_strategy=epoch"))
    check_streaming(streamed(folder))
    (folder / "dev.jsonl").unlink()
    with pytest.raises(DataError, match="has no validation split, and none can be held out of a stream; name another with dataset.validation_split"):
        open_split(streamed(folder), "train")
    (folder / "dev.jsonl").write_text("{}\n")
    for path in folder.glob("train*"):
        path.write_text("{\n[]\n")
    with pytest.raises(DataError, match="split 'train' has no records; all rows were rejected"):
        open_rows(streamed(folder), tokenizer).record(0)
