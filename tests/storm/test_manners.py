"""Signals, closed terminals, stuck readers, a second run, changed settings, memory that runs out: the run is polite and exact."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from emergency_kit.artifacts import verify_folder
from tests.storm.storm import FINISHED, FULL, Nursery, assert_nothing_half, assert_same, result, settings, share_data


def start(out: Path, tiny: Path, *more: str, **options: Any) -> subprocess.Popen[bytes]:
    """The script itself, as a person starts it."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **options.pop("env", {})}
    return subprocess.Popen([sys.executable, "scripts/train.py", *settings(tiny, out), *more], env=environment, **options)


def wait_for(out: Path, text: str, seconds: float = 120) -> None:
    log, until = out / "logs" / "training.log", time.monotonic() + seconds
    while not (log.exists() and text in log.read_text()):
        assert time.monotonic() < until, text
        time.sleep(0.01)


@pytest.mark.parametrize("engine", ["fused", "modules"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_at_any_moment_and_the_end_is_the_same(nursery: Nursery, tiny: Path, undisturbed: Path, place: Path, number: int, engine: str) -> None:
    """Signals at many moments: within a step's accumulation, in evaluations, in saves. Each leaves with 130 and says how to go on."""
    if (engine == "modules" or number == signal.SIGINT) and not FULL:
        pytest.skip("in make storm")
    whole = share_data(undisturbed, place / f"whole-{number}-{engine}")
    timed = nursery.live("train", *settings(tiny, whole, f"training.engine={engine}"))
    out = share_data(undisturbed, place / f"signalled-{number}-{engine}")
    argv, stops = ["train", *settings(tiny, out, f"training.engine={engine}")], 0
    for part in range(1, 25 if FULL else 4):
        life = nursery.live(*argv, signals=[[timed.seconds * (0.3 + 0.6 * part / (25 if FULL else 4)), int(number)]])
        assert life.status in (0, 130), life.text
        assert_nothing_half(out)
        if life.status == 0:
            break
        stops += 1
        assert re.search(r"error: (stopped at step \d+/10, saved to .*--resume-from|stopped before the first|interrupted)", life.text), life.text
    else:
        life = nursery.live(*argv)
        assert life.status == 0, life.text
    assert stops and not verify_folder(out / "checkpoints" / "final")
    assert_same(result(whole), result(out))


def test_two_signals_stop_at_once(tiny: Path, undisturbed: Path, place: Path) -> None:
    out = share_data(undisturbed, place / "twice")
    process = start(out, tiny, "--set", "training.num_epochs=40", stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
    wait_for(out, "Step 4/")
    process.send_signal(signal.SIGTERM)
    time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130 and errors.strip().splitlines()[-1].startswith((b"Stopped at once", b"error: stopped at step")), errors
    assert_nothing_half(out)
    assert (out / "checkpoints" / "checkpoint-3").is_dir()


def test_a_closed_terminal_and_a_hang_up_do_not_end_it(tiny: Path, undisturbed: Path, place: Path) -> None:
    import pty

    out = share_data(undisturbed, place / "hung-up")
    ours, theirs = pty.openpty()
    process = start(out, tiny, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True, preexec_fn=lambda: _own_terminal(theirs))
    os.close(theirs)
    wait_for(out, "Epoch 1/")
    os.close(ours)  # the window is closed: the kernel sends SIGHUP, and every write fails from here on
    assert process.wait(timeout=120) == 0
    assert_same(result(undisturbed), result(out))


def _own_terminal(descriptor: int) -> None:
    import fcntl
    import termios

    fcntl.ioctl(descriptor, termios.TIOCSCTTY, 0)


@pytest.mark.parametrize("reader", ["stopped", "gone"])
def test_a_reader_that_stops_does_not_hold_it_up(tiny: Path, undisturbed: Path, place: Path, reader: str) -> None:
    if reader == "gone" and not FULL:
        pytest.skip("in make storm")
    out = share_data(undisturbed, place / f"pipe-{reader}")
    reading, writing = os.pipe()
    import fcntl

    fcntl.fcntl(writing, 1031, 4096)  # F_SETPIPE_SZ: one page is full after a few lines
    process = start(out, tiny, stdout=writing, stderr=writing)
    os.close(writing)
    if reader == "gone":
        wait_for(out, "Starting")
        os.close(reading)
    assert process.wait(timeout=120) == 0
    if reader == "stopped":
        os.close(reading)
    assert "Training completed" in (out / "logs" / "training.log").read_text()
    assert_same(result(undisturbed), result(out))


def test_a_second_run_is_refused_and_a_stale_lock_is_not(nursery: Nursery, tiny: Path, undisturbed: Path, place: Path) -> None:
    out = share_data(undisturbed, place / "locked")
    process = start(out, tiny, "--set", "training.num_epochs=400", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(out, "Step 4/")
    (place / "other-name").symlink_to(out)
    for folder in (out, place / "other-name"):
        second = nursery.live("train", *settings(tiny, folder))
        assert second.status == 2 and f"process {process.pid}" in second.text and os.uname().nodename in second.text, second.text
    process.kill()
    process.wait()
    life = nursery.live("train", *settings(tiny, out), "--overwrite")
    assert life.status == 0 and f"The lock of process {process.pid}" in life.text and "taken over" in life.text, life.text
    assert_same(result(undisturbed), result(out))
    assert "taken over" not in nursery.live("train", *settings(tiny, out), "--overwrite").text


def test_a_killed_run_is_found_and_the_overwritten_one_is_not(nursery: Nursery, tiny: Path, undisturbed: Path, before: Path, place: Path) -> None:
    """Begun anew over an unfinished run and killed before its first save: the old run's checkpoints are not taken for the new one's."""
    out = place / "anew"
    shutil.copytree(before, out)
    assert "Found an unfinished run" in nursery.live("train", *settings(tiny, out), "--dry-run").text
    process = start(out, tiny, "--overwrite", "--set", "training.save_steps=1000", "--set", "training.num_epochs=400", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(out, "Step 2/")
    process.kill()
    process.wait()
    life = nursery.live("train", *settings(tiny, out))
    assert life.status == 0 and "going on from" not in life.text
    assert_same(result(undisturbed), result(out))


def test_latest_and_longer_and_changed(nursery: Nursery, tiny: Path, undisturbed: Path, before: Path, place: Path) -> None:
    out = place / "latest"
    shutil.copytree(before, out)
    life = nursery.live("train", *settings(tiny, out, "training.learning_rate=1e-3", "training.seed=3"), "--resume-from", "latest")
    assert life.status == 2 and "training.learning_rate: 0.002 -> 0.001" in life.text and "training.seed: 42 -> 3" in life.text and "--accept-changes" in life.text, life.text
    life = nursery.live("train", *settings(tiny, out, "dataset.max_samples=19"))
    assert life.status == 2 and "dataset.max_samples: 20 -> 19" in life.text and "training tokens" in life.text, life.text
    life = nursery.live("train", *settings(tiny, out, "training.num_epochs=3"), "--dry-run", "--resume-from", "latest")
    assert "15 steps instead of 10" in life.text and "cosine schedule of the longer run" in life.text, life.text
    rate = float(re.search(r"longer run: (\S+) at the next step", life.text)[1])
    longer = nursery.live("train", *settings(tiny, out, "training.num_epochs=3", "training.logging_steps=1"), "--resume-from", "latest")
    assert longer.status == 0, longer.text
    state = json.loads((out / "checkpoints" / "final" / "training_state.json").read_text())
    rates = {entry["step"]: entry["learning_rate"] for entry in state["loss_history"]}
    assert state["step"] == 15 and rates[7] == pytest.approx(rate, rel=0.01)
    shutil.rmtree(out / "checkpoints" / "final")
    life = nursery.live("train", *settings(tiny, out, "training.num_epochs=3", "lora.dropout=0.2"), "--resume-from", out / "checkpoints" / "checkpoint-12", "--accept-changes")
    assert life.status == 0 and "Accepted change: lora.dropout: 0.1 -> 0.2" in life.text, life.text
    shutil.rmtree(out / "checkpoints" / "final")
    life = nursery.live("train", *settings(tiny, out, "training.num_epochs=3", "training.learning_rate=1e-5", "training.logging_steps=1"), "--resume-from",
                        out / "checkpoints" / "checkpoint-12", "--accept-changes")
    rates = [entry["learning_rate"] for entry in json.loads((out / "checkpoints" / "final" / "training_state.json").read_text())["loss_history"]]
    assert life.status == 0 and rates[-1] < 1e-5 < rates[-4], rates  # an accepted change takes effect


@pytest.mark.parametrize("engine", ["fused", "modules"])
def test_memory_that_runs_out_halves_the_batch_and_a_resume_keeps_it(nursery: Nursery, tiny: Path, undisturbed: Path, place: Path, engine: str) -> None:
    """Equal gradients but for rounding, the same effective batch, and a resumed run that is bit-identical to the one with the same shortage."""
    if engine == "modules" and not FULL:
        pytest.skip("in make storm")
    flags = [f"training.engine={engine}", "lora.dropout=0"]
    easy, whole, out = (share_data(undisturbed, place / f"{name}-{engine}") for name in ("easy", "short", "short-killed"))
    assert nursery.live("train", *settings(tiny, easy, *flags)).status == 0
    life = nursery.live("train", *settings(tiny, whole, *flags), out_of_memory_at=5)
    assert life.status == 0 and "Out of memory at step 5: every batch is taken in 2 parts" in life.text, life.text
    losses, halved = (json.loads((folder / "checkpoints" / "final" / "training_state.json").read_text()) for folder in (easy, whole))
    assert halved["pieces"] == 2
    for one, other in zip(losses["loss_history"], halved["loss_history"]):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
    flags[1] = "lora.dropout=0.1"
    shutil.rmtree(whole / "checkpoints")
    assert nursery.live("train", *settings(tiny, whole, *flags), out_of_memory_at=5).status == 0
    for number in range(8):
        life = nursery.live("train", *settings(tiny, out, *flags), out_of_memory_at=5, kill_after=life.seconds * (0.5 + number / 20))
        if life.status != -9:
            break
    else:
        life = nursery.live("train", *settings(tiny, out, *flags), out_of_memory_at=5)
    assert life.status == 0 or FINISHED in life.text, life.text
    assert_same(result(whole), result(out))
