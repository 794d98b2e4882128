"""A disk that refuses, and checkpoints that are damaged: nothing lost, nothing believed that is not whole.

Faults are planted below every writer (Python, safetensors, tokenizers, torch) by faults.c: once, or from an operation on.
`make storm` plants every errno once at every operation of a save, and at every tenth from there on; `make test` a sample.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import shutil
import subprocess
import threading
import time
from pathlib import Path

import pytest

from emergency_kit.config import load_config
from emergency_kit.errors import KitError
from emergency_kit.training import resume
from tests.storm.storm import BRIEF, FULL, Nursery, assert_nothing_half, assert_same, read_count, result, settings, share_data

ERRORS = {"ENOSPC": errno.ENOSPC, "EIO": errno.EIO, "EROFS": errno.EROFS, "EACCES": errno.EACCES, "short": "short"}
TRIED = {"survived": 0, "stopped, then finished": 0}


@pytest.fixture(scope="module")
def operations(faulty: Nursery, tiny: Path, brief: Path, brief_before: Path, place: Path) -> int:
    """File operations of the rest of the run."""
    counts, out = place / "fault.count", place / "fault-counted"
    shutil.copytree(brief_before, out)
    life = faulty.live("train", *settings(tiny, out, *BRIEF), env={"FAULT_UNDER": str(out / "checkpoints"), "FAULT_COUNT": str(counts)})
    assert life.status == 0, life.text
    assert_same(result(brief), result(out))
    return read_count(counts)


@pytest.mark.parametrize("stays", [False, True], ids=["once", "stays"])
@pytest.mark.parametrize("kind", ERRORS)
def test_a_fault_at_the_kth_operation(faulty: Nursery, tiny: Path, brief: Path, brief_before: Path, operations: int, place: Path, kind: str, stays: bool) -> None:
    if stays and kind == "short" or not FULL and kind in ("EROFS", "EACCES"):
        pytest.skip("short writes that stay are only slow" if stays and kind == "short" else "in make storm")
    counts = place / "fault.count"
    step = 10 if stays and FULL else 1
    chosen = range(1, operations + 1, step) if FULL else random.Random(f"{kind}{stays}").sample(range(1, operations), 1)
    for at in chosen:
        out = place / f"fault-{kind}-{at}"
        shutil.copytree(brief_before, out)
        counts.unlink(missing_ok=True)
        life = faulty.live("train", *settings(tiny, out, *BRIEF), env={
            "FAULT_UNDER": str(out / "checkpoints"), "FAULT_AT": str(at), "FAULT_KIND": str(ERRORS[kind]), "FAULT_STAYS": "1" if stays else "0", "FAULT_COUNT": str(counts)})
        assert life.status in (0, 2, 5), (at, life.text)
        assert_nothing_half(out)
        if life.status:
            assert life.text.count("error: ") == 1, life.text
            assert faulty.live("train", *settings(tiny, out, *BRIEF)).status == 0, at
        TRIED["stopped, then finished" if life.status else "survived"] += 1
        assert_same(result(brief), result(out), f"{kind} at {at}")
        shutil.rmtree(out)


@pytest.mark.skipif(os.geteuid() != 0, reason="a small tmpfs needs root")
def test_a_really_full_disk(nursery: Nursery, tiny: Path, undisturbed: Path, place: Path) -> None:
    """Another program fills the disk while the run trains: the run says what it needs and stops; with room again it ends as if undisturbed."""
    out = share_data(undisturbed, place / "full-disk")
    (out / "checkpoints").mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400m", "tmpfs", str(out / "checkpoints")], capture_output=True).returncode:
        pytest.skip("no tmpfs can be mounted here")
    filler, log = out / "checkpoints" / "filler", out / "logs" / "training.log"

    def take_all_but(room: int) -> None:
        with filler.open("ab") as file:  # reserved, not written: at once, before the run can save again
            os.posix_fallocate(file.fileno(), 0, filler.stat().st_size + shutil.disk_usage(filler.parent).free - room)

    def fill() -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not (log.exists() and "Step 1/" in log.read_text()):
            time.sleep(0.001)
        while not ended.is_set():  # what the run removes meanwhile is taken too
            if shutil.disk_usage(filler.parent).free > 1_500_000:
                with contextlib.suppress(OSError):
                    take_all_but(1_400_000)
            time.sleep(0.01)

    ended = threading.Event()
    try:
        other = threading.Thread(target=fill)
        other.start()
        try:
            life = nursery.live("train", *settings(tiny, out))
        finally:
            ended.set()
            other.join()
        assert life.status == 5 and "No space left on device" in life.text and "MB are needed" in life.text, life.text
        assert life.text.count("trying again") == 2
        assert_nothing_half(out)
        assert {path.name for path in (out / "checkpoints").iterdir()} <= {"filler", "checkpoint-3", "checkpoint-6"}  # the first saves may be quicker than the other program
        filler.unlink()
        life = nursery.live("train", *settings(tiny, out))
        assert life.status == 0, life.text
        assert_same(result(undisturbed), result(out))
        take_all_but(1_500_000)
        life = nursery.live("train", *settings(tiny, out), "--overwrite")
        assert life.status == 2 and "MB needed" in life.text and "--output-dir" in life.text, life.text  # before a step is taken
        assert (out / "checkpoints" / "final").is_dir()
    finally:
        subprocess.run(["umount", str(out / "checkpoints")], check=True)


def test_a_disk_that_goes_away(nursery: Nursery, tiny: Path, undisturbed: Path, place: Path) -> None:
    """The folder vanishes and comes back while the run tries again; nothing is written to the place where it was."""
    out = share_data(undisturbed, place / "gone")
    log = out / "logs" / "training.log"

    def away() -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not (log.exists() and "Step 1/" in log.read_text()):
            time.sleep(0.01)
        (out / "checkpoints").rename(out / "away")
        while time.monotonic() < deadline and "trying again" not in log.read_text():
            time.sleep(0.01)
        assert not (out / "checkpoints").exists()
        (out / "away").rename(out / "checkpoints")

    other = threading.Thread(target=away)
    other.start()
    life = nursery.live("train", *settings(tiny, out, "training.save_retry_seconds=2"))
    other.join()
    assert life.status == 0, life.text
    assert_same(result(undisturbed), result(out))


def damage_truncate(path: Path, other: Path) -> None:
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])


def damage_flip(path: Path, other: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def damage_empty(path: Path, other: Path) -> None:
    path.write_bytes(b"")


def damage_delete(path: Path, other: Path) -> None:
    path.unlink()


def damage_swap(path: Path, other: Path) -> None:
    shutil.copy(other / path.name, path)


@pytest.mark.parametrize("damage", [damage_truncate, damage_flip, damage_empty, damage_delete, damage_swap], ids=lambda item: item.__name__)
def test_every_damaged_file_is_seen_before_a_step(tiny: Path, undisturbed: Path, before: Path, tmp_path: Path, damage: object) -> None:
    """Named: refused. Latest: skipped, and the one before is taken. Every file of the checkpoint in turn."""
    run_id = (undisturbed / ".training.json").read_text().partition('"run_id": "')[2][:32]
    older, newer = tmp_path / "checkpoints" / "checkpoint-6", tmp_path / "checkpoints" / "checkpoint-9"
    shutil.copytree(before / "checkpoints" / "checkpoint-6", older)
    # Another run's files: of the finished model where it has them, else of the other step.
    another = undisturbed / "checkpoints" / "checkpoint-9"
    names = sorted(path.name for path in older.iterdir())
    resolved = load_config("embedded", settings=[f"model.name={tiny}", f"training.output_dir={tmp_path}"])
    for name in names:
        shutil.rmtree(newer, ignore_errors=True)
        shutil.copytree(another, newer)
        original = (newer / name).read_bytes()
        damage(newer / name, older)  # type: ignore[operator]
        if (newer / name).exists() and (newer / name).read_bytes() == original:
            continue  # the same in both checkpoints: nothing was damaged
        with pytest.raises(KitError):
            resume.check_resumable(newer, resolved)
        said: list[str] = []
        assert resume.choose(resolved, None, False, run_id, said.append).checkpoint == older, name
        assert str(newer) in said[0] and "skipped" in said[0], said


def test_a_folder_of_another_step_is_seen(tiny: Path, undisturbed: Path, tmp_path: Path) -> None:
    shutil.copytree(undisturbed / "checkpoints" / "checkpoint-6", tmp_path / "checkpoints" / "checkpoint-8")
    said: list[str] = []
    resolved = load_config("embedded", settings=[f"model.name={tiny}", f"training.output_dir={tmp_path}"])
    assert resume.choose(resolved, None, False, None, said.append).checkpoint is None and "holds step 6" in said[0]


def test_the_count(capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        print(f"\nFaults of the file layer {sum(TRIED.values())}: {TRIED}; lost 0")
