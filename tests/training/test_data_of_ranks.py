"""What data costs a rank: it reads its own rows alone, its memory does not grow with them; and a streamed run that is killed goes on as if it had not been."""

from __future__ import annotations

import multiprocessing
import os
import re
import shutil
import signal
from pathlib import Path
from typing import Any, Iterator

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from emergency_kit.config import load_config
from emergency_kit.data.tokenize import TokenRows, map_ids
from emergency_kit.errors import UsageError
from emergency_kit.model.process_memory import resident_bytes
from emergency_kit.training.batches import RankBatches, RowDataset, StepSampler, StreamBatches, collate
from emergency_kit.training.run import train
from tests.data.test_stream import write
from tests.training.test_fsdp import accelerate
from tests.training.test_ranks import MORE, PROCESSES, assert_alike, ranks_of, start, wait_for

# Bounds and prompt of a row in memory, its place in the shuffle, and its length.
BYTES_A_ROW = 48


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Two threads that wait for each other on a busy machine make a tiny model 20 times slower."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


TOKENS = 250


def read(path: Path, sizes: list[int], grown: Any) -> None:
    """What private memory grew by, at most, while one of four ranks read an epoch of so many rows; one size after the other."""
    for rows in sizes:
        before, most = resident_bytes("RssAnon"), 0
        data = TokenRows(map_ids(path)[:rows * TOKENS], np.arange(rows + 1, dtype=np.int64) * TOKENS, np.full(rows, 9, np.int32))
        dataset = RowDataset(data)
        for number, batch in enumerate(RankBatches(StepSampler(data.lengths, 64, 7), 4, 1, 4)):
            collate([dataset[row] for row in batch], 0)
            if number % 50 == 0:
                most = max(most, resident_bytes("RssAnon"))
        grown.put(most - before)


class Recorded(TokenRows):
    """Rows that remember which of them were read."""

    def __getitem__(self, index: int) -> dict[str, list[int]]:  # type: ignore[override]
        READ.add(index)
        return super().__getitem__(index)


READ: set[int] = set()


def test_a_rank_reads_its_own_rows_alone() -> None:
    rows = Recorded(np.arange(610, dtype=np.int32), np.arange(62, dtype=np.int64) * 10, np.full(61, 2, np.int32))
    parts = []
    for rank in range(4):
        READ.clear()
        batches = RankBatches(StepSampler(rows.lengths, 16, 7), 2, rank, 4)
        for _ in DataLoader(RowDataset(rows), batch_sampler=batches, collate_fn=lambda batch: collate(batch, 0)):
            pass
        parts.append(set(READ))
    assert sorted(row for part in parts for row in part) == list(range(61)) and max(map(len, parts)) - min(map(len, parts)) <= 1


def test_a_rank_of_a_stream_is_dealt_its_own_places() -> None:
    for world in (1, 2, 4):
        dealt = [list(StreamBatches(5, 8, 2, rank, world)) for rank in range(world)]
        assert [len(batches) for batches in dealt] == [len(StreamBatches(5, 8, 2, 0, world))] * world
        assert sorted(place for batches in dealt for batch in batches for place in batch) == list(range(40))
        for step in range(5):
            taken = [place for batches in dealt for batch in batches[step * 4 // world:(step + 1) * 4 // world] for place in batch]
            assert sorted(taken) == list(range(8 * step, 8 * step + 8)), "a step has the same rows on any number of ranks"


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads memory in /proc")
def test_memory_of_a_rank_does_not_grow_with_the_data(tmp_path: Path) -> None:
    small, large = 1_000, 20_000  # 1 and 20 MB of tokens
    np.zeros(large * TOKENS, np.int32).tofile(tmp_path / "ids.bin")
    context = multiprocessing.get_context("fork")
    grown = context.SimpleQueue()
    child = context.Process(target=read, args=(tmp_path / "ids.bin", [small, large], grown))
    child.start()
    child.join(120)
    assert child.exitcode == 0
    first, then = grown.get(), grown.get()
    assert then < large * BYTES_A_ROW + 2_000_000, (first, then)


def flags(tiny: Path, data: Path, out: Path, *more: str) -> list[str]:
    """Steps of 8 over 37 rows a epoch in windows of 5: neither is a multiple of the other."""
    return [f"model.name={tiny}", "model.dtype=float32", "training.int8_backward=false", f"dataset.name={data}", f"training.output_dir={out}", "dataset.streaming=true", "dataset.shuffle_window=5", "dataset.grounding=none",
            "dataset.max_samples=null", "training.per_device_train_batch_size=2", "training.gradient_accumulation_steps=4", "training.keep_effective_batch=true", "training.max_steps=11",
            "training.warmup_steps=1", "training.eval_steps=4", "training.save_steps=3", "training.save_total_limit=9", "training.logging_steps=1", "lora.dropout=0", "lora.r=4", *more]


@pytest.mark.parametrize("engine", ["fused", "modules"] if MORE else ["fused"])
def test_a_killed_stream_goes_on_to_the_same_losses(engine: str, tiny: Path, tmp_path: Path) -> None:
    settings = flags(tiny, write(tmp_path / "data", 17, 20), tmp_path / "out", f"training.engine={engine}")
    train(load_config("embedded", settings=settings))
    shutil.copytree(tmp_path / "out", tmp_path / "alone")
    for name in ("final", "checkpoint-9", "checkpoint-11"):  # what a kill between the steps 6 and 9 leaves
        shutil.rmtree(tmp_path / "out" / "checkpoints" / name)
    train(load_config("embedded", settings=settings))
    assert_alike(tmp_path / "alone", tmp_path / "out")
    with pytest.raises(UsageError, match="checkpoint-9 was made by another run; differences: training tokens: .*; dataset.shuffle_window: 5 -> 6"):
        train(load_config("embedded", settings=[*settings, "dataset.shuffle_window=6"]), resume_from=tmp_path / "out" / "checkpoints" / "checkpoint-9", overwrite=True)


@pytest.fixture(scope="module")
def dealt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """37 rows in four files as long, so that there are four lanes, which end one after the other."""
    return write(tmp_path_factory.mktemp("dealt"), 11, 8, 10, 8, even=True)


@pytest.fixture(scope="module")
def undisturbed(tiny: Path, dealt: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process."""
    out = tmp_path_factory.mktemp("undisturbed")
    train(load_config("embedded", settings=flags(tiny, dealt, out)))
    return out


def test_ranks_that_read_different_files_train_what_one_does(tiny: Path, dealt: Path, undisturbed: Path, tmp_path: Path) -> None:
    launcher = start(PROCESSES, *flags(tiny, dealt, tmp_path))
    wait_for(launcher, f"Stream: 4 files in 4 lanes; each of {PROCESSES} processes reads 1/{PROCESSES} of them")
    _, errors = launcher.communicate(timeout=180)
    assert launcher.returncode == 0, errors
    assert_alike(undisturbed, tmp_path)


@pytest.mark.skipif(not MORE, reason="in make prove-ranks")
@pytest.mark.parametrize("killed, numbers", [(True, (4, 2, 1)), (False, (2, 1, 4))])
def test_a_stream_ended_among_some_is_gone_on_with_by_others(killed: bool, numbers: tuple[int, int, int], tiny: Path, dealt: Path, undisturbed: Path, tmp_path: Path) -> None:
    settings = flags(tiny, dealt, tmp_path)
    for number, text in zip(numbers, ("Step 5/11", "Step 8/11", "Step 11/11")):
        launcher = start(number, *settings)
        wait_for(launcher, text)
        if killed and number == numbers[0]:
            os.kill(ranks_of(launcher)[2], signal.SIGKILL)
            launcher.communicate(timeout=60)
            assert launcher.returncode == 128 + 9 and not (tmp_path / "checkpoints" / "final").exists()
            continue
        if number != numbers[-1]:
            launcher.send_signal(signal.SIGTERM)
        _, errors = launcher.communicate(timeout=120)
        assert launcher.returncode == (0 if number == numbers[-1] else 130), errors
    assert_alike(undisturbed, tmp_path)


@pytest.mark.skipif(not MORE, reason="in make prove-ranks")
def test_a_rank_that_cannot_read_its_file_ends_all(tiny: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "data", 11, 8, 10, 8, even=True)
    size = (data / "train-01.jsonl").stat().st_size
    (data / "train-01.jsonl").write_bytes(b"\xff\xfe" * (size // 2) + b"\n" * (size % 2))
    launcher = start(2, *flags(tiny, data, tmp_path / "out"))
    _, errors = launcher.communicate(timeout=120)
    assert launcher.returncode == 3 and re.search(r"^error: rank 1 of 2: .*train-01.jsonl: UTF-16", errors, re.M) and "Traceback" not in errors, errors


@pytest.mark.skipif(not MORE, reason="in make prove-ranks")
def test_ranks_of_a_divided_model_read_different_files(tiny: Path, dealt: Path, undisturbed: Path, tmp_path: Path) -> None:
    launcher = accelerate(2, *flags(tiny, dealt, tmp_path))
    _, errors = launcher.communicate(timeout=180)
    assert launcher.returncode == 0, errors
    assert_alike(undisturbed, tmp_path)
