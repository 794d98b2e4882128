"""Sweeps and the range test: what is run, how it is ranked, and that it goes on where it was stopped."""

from __future__ import annotations

import functools
import json
import os
import re
import signal
import threading
import time
from pathlib import Path
from typing import Any, Callable, Iterator

import pytest
import torch

from emergency_kit.artifacts import hash_file
from emergency_kit.config import Resolved, load_config
from emergency_kit.data.build import build
from emergency_kit.errors import ConfigError, Interrupted, TrainingError, UsageError
from emergency_kit.files import check_writable
from emergency_kit.training import lock
from emergency_kit.training.sweep import Outcome, _over_seeds, _warn_of_memory, split_settings, start
from emergency_kit.model.process_memory import cores
from emergency_kit.training.workers import Killed, Workers
from tests.tiny import save_tiny_model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model, and beside it a dataset that every run reads instead of building its own."""
    place = tmp_path_factory.mktemp("models")
    build(load_config("embedded", settings=["dataset.build_size=200"]), place / "data")
    return save_tiny_model(place / "tiny")


def base(tiny: Path, out: Path) -> list[str]:
    return [f"model.name={tiny}", f"training.output_dir={out}", "model.dtype=float32", f"dataset.name={tiny.parent / 'data'}", "dataset.grounding=none", "dataset.max_samples=4",
            "dataset.max_eval_samples=2", "training.gradient_accumulation_steps=1", "training.warmup_steps=0", "training.max_steps=2"]


def resolve(settings: list[str]) -> Resolved:
    return load_config("embedded", settings=settings)


def test_commas_outside_of_brackets_part_the_values() -> None:
    assert split_settings(["training.learning_rate=1e-4,3e-4", "lora.target_modules=[q_proj,v_proj],all-linear", "training.seed=3"]) == (
        ["training.seed=3"], {"training.learning_rate": ["1e-4", "3e-4"], "lora.target_modules": ["[q_proj,v_proj]", "all-linear"]})
    assert split_settings(["lora.target_modules=[q_proj,v_proj]", "nonsense"]) == (["lora.target_modules=[q_proj,v_proj]", "nonsense"], {})
    with pytest.raises(UsageError, match="given twice"):
        split_settings(["a.b=1,2", "a.b=3,4"])


def test_runs_are_ranked_by_validation_loss_and_taken_as_they_stand_the_second_time(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = [*base(tiny, tmp_path), "training.learning_rate=1e-6,5e-2"]
    folder = start(resolve, settings, None, None, False)
    found = json.loads((folder / "sweep.json").read_text())
    assert folder == tmp_path / "sweep" and [item["settings"] for item in found] == [{"training.learning_rate": "5e-2"}, {"training.learning_rate": "1e-6"}]
    assert found[0]["validation_loss"] < found[1]["validation_loss"] and found[0]["summary"]["last_validation_loss"] == found[0]["validation_loss"]
    lines = (folder / "sweep.md").read_text().splitlines()
    assert lines[2].startswith("| rank | learning_rate | validation loss |") and lines[4].startswith("| 1 | 5e-2 |") and "Best: --set training.learning_rate=5e-2" in lines
    before = [(path, path.stat().st_mtime_ns) for path in sorted(folder.glob("*/checkpoints/final/*"))]
    capsys.readouterr()
    start(resolve, settings, None, None, False)
    assert [(path, path.stat().st_mtime_ns) for path in sorted(folder.glob("*/checkpoints/final/*"))] == before
    assert "already trained with these settings" in capsys.readouterr().out


def test_over_several_seeds_the_best_is_that_of_the_mean(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = start(resolve, [*base(tiny, tmp_path), "training.learning_rate=1e-6,5e-2", "training.seed=1,2"], None, None, False)
    found = json.loads((folder / "sweep.json").read_text())
    losses = {rate: [one["validation_loss"] for one in found if one["settings"]["training.learning_rate"] == rate] for rate in ("1e-6", "5e-2")}
    lines = (folder / "sweep.md").read_text().splitlines()
    place = lines.index("| rank | learning_rate | mean over seeds | lowest | highest |")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[place + 2:place + 4]]
    ranked = sorted(losses, key=lambda rate: sum(losses[rate]))
    assert rows == [[str(rank), rate, f"{sum(losses[rate]) / 2:.4f}", f"{min(losses[rate]):.4f}", f"{max(losses[rate]):.4f}"] for rank, rate in enumerate(ranked, 1)]
    assert f"Best: --set training.learning_rate={ranked[0]}" in lines and any(line.startswith("Each seed draws validation records of its own") for line in lines)
    assert "mean over seeds" in capsys.readouterr().out


def test_means_leave_out_settings_that_failed_for_a_seed() -> None:
    runs = [Outcome({"training.learning_rate": rate, "training.seed": seed}, Path(rate + seed), loss=loss)
            for rate, seed, loss in (("1", "a", 3.0), ("1", "b", 1.0), ("2", "a", 0.5), ("2", "b", None), ("3", "a", 1.0), ("3", "b", float("nan")), ("4", "a", 1.5), ("4", "b", 1.0))]
    assert [(mean.settings, mean.losses) for mean in _over_seeds(runs, ["training.learning_rate", "training.seed"])] == [
        ({"training.learning_rate": "4"}, (1.25, 1.0, 1.5)), ({"training.learning_rate": "1"}, (2.0, 1.0, 3.0))]
    assert _over_seeds(runs[:1], ["training.learning_rate", "training.seed"]) == _over_seeds(runs, ["training.learning_rate"]) == []


def test_every_combination_is_checked_before_the_first_is_trained(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="training.learning_rate: got 'fast'"):
        start(resolve, [*base(tiny, tmp_path), "training.learning_rate=1e-4,fast"], None, None, False)
    with pytest.raises(UsageError, match="no setting has several values"):
        start(resolve, base(tiny, tmp_path), None, None, False)
    assert not (tmp_path / "sweep").exists()


def test_a_range_test_raises_the_rate_and_ranks_its_pieces(tiny: Path, tmp_path: Path) -> None:
    place = start(resolve, [*base(tiny, tmp_path)[:-1], "training.max_steps=9"], None, "1e-6:1e-1", False)
    found = json.loads((place / "range.json").read_text())
    assert place == tmp_path / "sweep" and not (place / "range" / "checkpoints").exists()
    assert [piece["change"] for piece in found] == sorted(piece["change"] for piece in found) and len(found) == 8
    assert found[0]["learning_rate"] > 1e-4  # so tiny a rate does nothing in a step
    assert "fell fastest near" in (place / "range.md").read_text()
    for wrong in ("1e-3", "1e-2:1e-3", "a:b"):
        with pytest.raises(UsageError, match="expected LOW:HIGH"):
            start(resolve, base(tiny, tmp_path), None, wrong, False)


@pytest.fixture
def share_of_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """This process computes with the threads that each of two workers will have."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before, share = torch.get_num_threads(), max(1, cores() // 2)
    torch.set_num_threads(share)
    yield share
    torch.set_num_threads(before)


def saved_step(run: Path) -> int:
    return max((int(path.name.split("-")[1]) for path in (run / "checkpoints").glob("checkpoint-*")), default=0)


def once(ready: Callable[[], bool], act: Callable[[], Any]) -> None:
    """Do something to a sweep under way, from a thread: the sweep has the main one, as signals want it."""
    def watch() -> None:
        until = time.monotonic() + 120
        while not ready():
            if time.monotonic() > until:  # never into a later test
                return
            time.sleep(0.01)
        act()

    threading.Thread(target=watch, daemon=True).start()


def outcome(place: Path) -> Any:
    """The table without what takes time, and the trained weights."""
    rows = [(one["settings"], one["validation_loss"], one["summary"]["last_loss"]) for one in json.loads((place / "sweep.json").read_text())]
    ranks = [line.split("|")[1:5] for line in (place / "sweep.md").read_text().splitlines() if line.startswith("| ")]
    return rows, ranks, {path.parts[-4]: hash_file(path) for path in place.glob("*/checkpoints/final/adapter_model.safetensors")}


@pytest.mark.skipif(os.environ.get("EMERGENCY_KIT_RANKS") != "full", reason="in make prove-ranks")
def test_two_workers_a_killed_one_and_ctrl_c_end_with_the_bits_of_one_worker(
        tiny: Path, tmp_path: Path, share_of_threads: int, capsys: pytest.CaptureFixture[str]) -> None:
    """A run of two steps that nothing disturbs, beside one of ten that is killed, gone on with, stopped, and gone on with again."""
    more = ["training.save_steps=1", "training.save_total_limit=2", "training.eval_steps=10", "training.max_steps=2,10"]
    start(resolve, [*base(tiny, tmp_path / "one")[:-1], *more], None, None, False)
    settings, place = [*base(tiny, tmp_path / "two")[:-1], *more], tmp_path / "two" / "sweep"
    short, long = place / "max_steps-2", place / "max_steps-10"
    capsys.readouterr()

    def kill() -> None:
        os.kill(int(re.findall(r"Worker: process (\d+)", (long / "logs" / "console.log").read_text())[-1]), signal.SIGKILL)

    once(lambda: saved_step(long) > 0, kill)
    with pytest.raises(TrainingError, match="1 of 2 runs ended before they were done .training.max_steps=10.; the same command goes on"):
        start(resolve, settings, None, None, False, workers=2)
    found = json.loads((place / "sweep.json").read_text())
    assert [(one["settings"]["training.max_steps"], "SIGKILL" in one["failure"]) for one in found] == [("2", False), ("10", True)]
    said = capsys.readouterr().out
    assert f"threads of each: {share_of_threads}" in said and "Loss:" not in said and "Sweep 1/2: training.max_steps=2: validation loss" in said
    for run in (short, long):
        assert f", threads {share_of_threads}," in (run / "logs" / "console.log").read_text()

    reached = saved_step(long)
    once(lambda: saved_step(long) > reached, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(Interrupted, match="1 of 2 runs done; go on with the same command"):
        start(resolve, settings, None, None, False, workers=2)
    said = capsys.readouterr().out
    assert "max_steps-2/checkpoints/final is already trained" in said and re.search(r"max_steps=10: stopped at step \d+/10, saved to", said)
    assert "going on from" in (long / "logs" / "console.log").read_text() and not (long / "checkpoints" / "final").exists()

    start(resolve, settings, None, None, False)
    assert outcome(place) == outcome(tmp_path / "one" / "sweep")


def test_a_call_has_a_process_threads_and_a_gpu_of_its_own_and_a_killed_one_costs_itself_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    calls = [functools.partial(signal.raise_signal, signal.SIGKILL), os.getpid, functools.partial(os.getenv, "OMP_NUM_THREADS"),
             functools.partial(os.getenv, "CUDA_VISIBLE_DEVICES"), functools.partial(check_writable, Path("/proc/none")), functools.partial(print, "a line")]
    ends = {number: answer for number, answer in Workers(2, 3, ["5", "7"]).run(calls, [tmp_path / f"{number}.log" for number in range(len(calls))])}
    assert isinstance(ends[0], Killed) and "SIGKILL" in str(ends[0]) and ends[1] != os.getpid() and ends[2] == "3" and ends[3] in ("5", "7")
    assert isinstance(ends[4], UsageError) and "not writable" in str(ends[4]) and (tmp_path / "5.log").read_text() == "a line\n"
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    assert list(Workers(1, 3, []).run([functools.partial(os.getenv, "OMP_NUM_THREADS")], [tmp_path / "log"])) == [(0, None), (0, "4")]


def test_a_signal_stops_every_process_and_begins_no_other(tmp_path: Path) -> None:
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    begun, ends = [], {}
    signals = threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGTERM))
    for number, answer in Workers(2, 1, []).run([functools.partial(time.sleep, 60)] * 3, [tmp_path / "log"] * 3):
        if answer is None:
            begun.append(number)
            if len(begun) == 2:
                signals.start()
        else:
            ends[number] = answer
    assert sorted(begun) == [0, 1] and sorted(ends) == [0, 1, 2] and all(isinstance(answer, Interrupted) for answer in ends.values())
    assert handlers == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))


def test_what_a_sweep_of_several_workers_refuses_and_warns_of(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = [*base(tiny, tmp_path), "training.learning_rate=1e-4,3e-4"]
    with pytest.raises(UsageError, match="--workers 2 has nothing to share out"):
        start(resolve, settings, None, "1e-5:1e-2", False, workers=2)
    with lock.hold(tmp_path / "sweep", print), pytest.raises(UsageError, match="another run is training into it"):
        start(resolve, settings, None, None, False, workers=2)
    _warn_of_memory([resolve(base(tiny, tmp_path))] * 2, 2, 0)
    assert "Warning" not in capsys.readouterr().out
    _warn_of_memory([resolve([*base(tiny, tmp_path), "training.engine=modules", "training.per_device_train_batch_size=4096"])] * 2, 2, 0)
    assert "Warning: 2 runs side by side can need" in capsys.readouterr().out
