"""Streams: one order for any number of ranks, each row once an epoch, each file read by those whose it is, gone on with from any place; and what cannot be
streamed is refused in one line. Ranks are threads here, over a store of torch's; real ones are in training/test_data_of_ranks.py."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Callable, Iterator

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch.distributed import HashStore
from transformers import AutoTokenizer

from emergency_kit.config import Resolved
from emergency_kit.data.lanes import EVEN, deal, deal_shards
from emergency_kit.data.load import open_split
from emergency_kit.data.stream import StreamRows, check_streaming
from emergency_kit.data.tokenize import build_rows
from emergency_kit.errors import DataError, TrainingError, UsageError
from emergency_kit.training.ledger import Ledger
from tests.data.files import resolve
from tests.tiny import BUNDLED


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(BUNDLED)


def write(folder: Path, *sizes: int, broken: int = -1, even: bool = False) -> Path:
    """Files of so many rows, numbered through; `broken` is the number of one after which a line is no JSON. even: empty lines make all as long."""
    folder.mkdir(parents=True, exist_ok=True)
    number, texts = 0, []
    for size in sizes:
        lines = []
        for _ in range(size):
            lines += [json.dumps({"instruction": "What now?", "input": f"It burns {number}", "output": f"Leave {number}."}), *(["{"] if number == broken else [])]
            number += 1
        texts.append("".join(f"{line}\n" for line in lines))
    for place, text in enumerate(texts):
        (folder / f"train-{place:02}.jsonl").write_text(text.ljust(max(map(len, texts)), "\n") if even else text, encoding="utf-8")
    (folder / "dev.jsonl").write_text('{"instruction": "What now?", "input": "Smoke", "output": "Leave."}\n')
    return folder


def streamed(folder: object, *settings: str) -> Resolved:
    return resolve(folder, "dataset.streaming=true", "training.max_steps=9", "training.output_dir=/nowhere", *settings)


def open_rows(resolved: Resolved, tokenizer: Any, state: dict[str, Any] | None = None, process: int = 0, processes: int = 1, step_rows: int = 10_000) -> StreamRows:
    return StreamRows(open_split(resolved, "train"), tokenizer, resolved, step_rows, state, process, processes)


def told(record: Any) -> str | None:
    return record and record.input


def read_by(processes: int, places: range, make: Callable[[int], StreamRows]) -> tuple[list[str | None], list[StreamRows], HashStore]:
    """What so many threads find at these places, each at those of its rank; all come as far, as in a step."""
    store, found, all_here = HashStore(), {}, threading.Barrier(processes)

    def read(rank: int) -> StreamRows:
        all_here.wait(20)  # a thread each
        rows = make(rank)
        rows.exchange = Ledger(store, rank, processes, 20)
        for place in range(places.start, -(-places.stop // processes) * processes):
            if place % processes == rank:
                found[place] = told(rows.record(place))
        return rows

    with ThreadPoolExecutor(processes) as pool:
        ranks = list(pool.map(read, range(processes)))
    return [found[place] for place in places], ranks, store


@given(st.lists(st.integers(0, 9), min_size=1, max_size=9).filter(any), st.booleans(), st.integers(1, 12), st.integers(0, 40), st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True,
          phases=[Phase.explicit, Phase.generate])  # to make an example smaller would wait for ranks again and again
def test_each_epoch_has_every_row_once_and_any_place_is_gone_on_from(tmp_path_factory: Any, tokenizer: Any, sizes: list[int], even: bool, window: int, broken: int, data: Any) -> None:
    folder = write(tmp_path_factory.mktemp("rows"), *(size for size in sizes if size), broken=broken, even=even)
    resolved = streamed(folder, f"dataset.shuffle_window={window}", f"training.seed={data.draw(st.integers(0, 9))}")
    step_rows, rows = data.draw(st.integers(1, 9)), sum(sizes)
    whole, order, records = open_rows(resolved, tokenizer, step_rows=step_rows), [], []
    while len(records) < 3 * rows:
        order.append(told(whole.record(len(order))))
        records += order[-1:] if order[-1] else []
        assert len(order) < step_rows or any(order[-step_rows:]), "no step is without rows"
    for epoch in range(3):
        assert Counter(records[epoch * rows:(epoch + 1) * rows]) == Counter(f"It burns {number}" for number in range(rows))
    assert records == order or len(whole.lanes) > 1, "one lane has no empty places"
    total = len(order)
    stop = data.draw(st.integers(0, total - 1))
    ahead = data.draw(st.integers(stop, min(total - 1, stop + window)))  # what was read beyond the checkpoint's step
    first, then = data.draw(st.integers(1, 4)), data.draw(st.sampled_from([1, 2, 3, 4, 6]))
    found, before, store = read_by(first, range(ahead + 1), lambda rank: open_rows(resolved, tokenizer, None, rank, first, step_rows))
    assert found == order[:ahead + 1]
    state = json.loads(json.dumps(before[0].state_at(stop)))
    assert read_by(then, range(stop, total), lambda rank: open_rows(resolved, tokenizer, state, rank, then, step_rows))[0] == order[stop:]
    after = open_rows(resolved, tokenizer, state, step_rows=step_rows)
    again = json.loads(json.dumps((after.record(stop), after.state_at(stop))[1]))
    rest = open_rows(resolved, tokenizer, again, step_rows=step_rows)
    assert [told(rest.record(place)) for place in range(stop, total)] == order[stop:], "one that is stopped again at once goes on likewise"
    assert told(after.record(0)) == order[0], "and from the beginning, where it must"


def test_each_lane_goes_on_from_where_it_was(tmp_path: Path, tokenizer: Any) -> None:
    """Lines that are rejected move some lanes further than others."""
    folder = write(tmp_path, *[12] * 4)
    for place in range(4):
        path = folder / f"train-{place:02}.jsonl"
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join([*lines[:3], *["{\n"] * place, *lines[3:]]).ljust(1500, "\n"))
    resolved = streamed(folder, "dataset.shuffle_window=16")
    whole = open_rows(resolved, tokenizer)
    order = [told(whole.record(place)) for place in range(48)]
    _, ranks, _ = read_by(2, range(20), lambda rank: open_rows(resolved, tokenizer, None, rank, 2))
    state = ranks[0].state_at(20)
    assert [lane["examples_iterable"]["shard_example_idx"] for lane in state["states"]] == [4, 5, 6, 7] and state["position"] == 16
    assert read_by(4, range(20, 48), lambda rank: open_rows(resolved, tokenizer, state, rank, 4))[0] == order[20:]


def test_a_step_of_many_windows_is_gone_on_from_where_it_begins(tmp_path: Path, tokenizer: Any) -> None:
    rows = open_rows(streamed(write(tmp_path, 7, 30), "dataset.shuffle_window=2"), tokenizer)
    for start in (0, 8, 16):  # the last is read ahead of the step that is saved
        rows.__getitems__(range(start, start + 8))
    assert [rows.state_at(position)["position"] for position in (16, 17, 20)] == [16, 16, 20] and len(rows.marks) <= 5


class Counted(MemoryFileSystem):
    """Files in memory that know which thread opened them."""

    protocol, store, pseudo_dirs, opened = "counted", {}, [""], defaultdict(set)

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        return super()._strip_protocol(str(path).replace("counted://", "memory://"))

    def _open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        if mode == "rb":
            self.opened[threading.get_ident()].add(Path(path).name)
        return super()._open(path, mode, **options)


@pytest.fixture
def counted(tmp_path: Path) -> Iterator[str]:
    """Eight files alike, of 5 rows each."""
    fsspec.register_implementation("counted", Counted, clobber=True)
    files = fsspec.filesystem("counted")
    for path in write(tmp_path, *[5] * 8, even=True).glob("*.jsonl"):
        files.pipe(f"/bucket/{path.name}", path.read_bytes())
    Counted.opened.clear()
    yield "counted://bucket"
    Counted.store.clear()


@pytest.mark.parametrize("processes, share", [(1, 8), (2, 4), (4, 2), (8, 1), (6, 4), (3, 8), (16, 1)])
def test_a_rank_opens_its_own_files_alone(counted: str, tokenizer: Any, processes: int, share: int) -> None:
    resolved, opened = streamed(counted, "dataset.shuffle_window=16"), {}

    def make(rank: int) -> StreamRows:
        opened[rank] = Counted.opened[threading.get_ident()]
        return open_rows(resolved, tokenizer, None, rank, processes)

    found, ranks, store = read_by(processes, range(80), make)
    assert Counter(found) == Counter({f"It burns {number}": 2 for number in range(40)})
    assert {rank: len(names) for rank, names in opened.items()} == dict.fromkeys(range(processes), share), "but for rank 0, which looks at its own first"
    assert set().union(*opened.values()) == {f"train-{place:02}.jsonl" for place in range(8)}
    assert max(sum(map(len, rows.held.values())) for rows in ranks) <= 16 * share // 8
    assert store.num_keys() <= 5 * 8, "the store keeps the last window alone"


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=150), st.integers(1, 100))
@settings(max_examples=100, deadline=None)
def test_lanes_hold_nearly_as_much(sizes: list[int], most: int) -> None:
    for dealt in (deal(sizes, most), deal([7] * len(sizes), most), deal_shards(len(sizes), most)):
        assert sorted(place for part in dealt.parts for place in part) == list(range(len(sizes))) and all(list(part) == sorted(part) for part in dealt.parts)
        assert len(dealt) <= min(64, most, len(sizes)) and len(dealt).bit_count() == 1 and bool(dealt.why_one) == (len(dealt) == 1)
    held = [sum(sizes[place] for place in part) for part in deal(sizes, most).parts]
    assert min(held) >= EVEN * max(held)


def test_it_says_how_much_each_process_reads(tmp_path: Path, tokenizer: Any) -> None:
    assert deal([5] * 64, 512).describe(8) == "Stream: 64 files in 64 lanes; each of 8 processes reads 1/8 of them"
    assert deal([5] * 64, 512).describe(1) == "Stream: 64 files in 64 lanes" and deal([5], 8).describe(1) == "Stream: 1 file in 1 lane"
    assert [len(deal([5] * files, 512)) for files in (2, 3, 9, 100, 1000)] == [2, 1, 1, 8, 64]
    assert [len(deal_shards(shards, 512)) for shards in (2, 3, 12, 100, 1024)] == [2, 1, 4, 4, 64]
    assert "of 3 processes reads all of them, since 3 and 64 have no common factor. To read less: an even number" in deal([5] * 64, 512).describe(3)
    assert "each of 2 processes reads all of it, since the size of a file is not known." in deal([5, None], 8).describe(2)
    uneven = open_rows(streamed(write(tmp_path, 7, 30)), tokenizer, processes=2)
    assert uneven.describe() == ("Stream: 2 files in 1 lane; each of 2 processes reads all of it, since their sizes are too unlike for two even lanes. "
                                 "To read less: files of like size, as many as processes or a multiple")


def test_a_checkpoint_from_before_there_were_lanes(tmp_path: Path, tokenizer: Any) -> None:
    one, two = streamed(write(tmp_path / "one", 7, 30), "dataset.shuffle_window=8"), streamed(write(tmp_path / "two", 20, 20), "dataset.shuffle_window=8")
    rows = open_rows(one, tokenizer)
    order = [told(rows.record(place)) for place in range(37)]
    state = {"position": 8, "epoch": 0, "source": {"examples_iterable": {"shard_idx": 1, "shard_example_idx": 1, "type": "ExamplesIterable"}, "epoch": 0}}
    assert [told(open_rows(one, tokenizer, state).record(place)) for place in range(8, 37)] == order[8:]
    with pytest.raises(UsageError, match=r"two: the checkpoint's stream was read in lanes of another number \(1, now 2\), .* begin anew with --overwrite"):
        open_rows(two, tokenizer, state)


def test_a_stream_is_another_one_where_its_files_or_lanes_are(tmp_path: Path, tokenizer: Any) -> None:
    resolved = streamed(write(tmp_path, 20, 20))
    before = open_rows(resolved, tokenizer).digest()
    assert before == open_rows(resolved, tokenizer, processes=2).digest() != open_rows(resolved, tokenizer, step_rows=1).digest()
    content = (tmp_path / "train-00.jsonl").read_bytes()
    time.sleep(0.02)
    (tmp_path / "train-00.jsonl").write_bytes(content.replace(b"burns 7", b"burns 8"))
    assert open_rows(resolved, tokenizer).digest() != before


def test_who_waits_for_a_rank_that_is_gone_says_so_in_time() -> None:
    started = time.monotonic()
    with pytest.raises(TrainingError, match=r"^ranks: the stream waits for what ranks 1, 3 should have read; .* training.rank_timeout_seconds is 0.3$"):
        Ledger(HashStore(), 2, 4, 0.3)("1/0/0", 0, 2, 5, [])
    assert time.monotonic() - started < 3


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
