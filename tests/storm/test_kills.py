"""SIGKILL at any moment, then the same command again: the end is the one of the run that nobody disturbed.

`make test` kills a few times; `make storm` (EMERGENCY_KIT_STORM=full) at least 200 times and prints the count.
"""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest

from tests.storm.storm import BRIEF, FINISHED, FULL, Nursery, assert_nothing_half, assert_same, hashes, read_count, result, settings, share_data

LIFE_ROUNDS = 6 if FULL else 1
KILLS = {"train": 0, "save": 0, "evaluate": 0, "merge": 0, "export": 0, "cache": 0}


def storm(nursery: Nursery, kind: str, out: Path, argv: list[str], seconds: float, draw: random.Random, most: int) -> None:
    """Kill the command at random moments of its life until it gets through, `most` kills at most; look at the folder after each."""
    for _ in range(most):
        life = nursery.live(*argv, kill_after=draw.uniform(0, seconds))
        assert life.status in (0, -9) or FINISHED in life.text, life.text
        assert_nothing_half(out)
        if life.status != -9:
            return
        KILLS[kind] += 1
    life = nursery.live(*argv)
    assert life.status == 0 or FINISHED in life.text, life.text


@pytest.mark.parametrize("engine", ["fused", "modules"])
@pytest.mark.parametrize("seed", range(LIFE_ROUNDS))
def test_training_ends_bit_identical(nursery: Nursery, tiny: Path, undisturbed: Path, place: Path, engine: str, seed: int) -> None:
    if engine == "modules" and not FULL:
        pytest.skip("in make storm")
    whole = undisturbed
    if engine == "modules":
        whole = place / "undisturbed-modules"
        if not whole.exists():
            assert nursery.live("train", *settings(tiny, share_data(undisturbed, whole), "training.engine=modules")).status == 0
    out = share_data(undisturbed, place / f"killed-{engine}-{seed}")
    argv = ["train", *settings(tiny, out, f"training.engine={engine}")]
    timed = nursery.live("train", *settings(tiny, share_data(undisturbed, place / f"timed-{engine}-{seed}"), f"training.engine={engine}"))
    storm(nursery, "train", out, argv, timed.seconds * 0.9, random.Random(seed), most=8 if FULL else 2)
    assert_same(result(whole), result(out))
    for folder in (out, place / f"timed-{engine}-{seed}"):
        shutil.rmtree(folder)


def test_killed_at_every_file_operation_of_a_save(faulty: Nursery, tiny: Path, brief: Path, brief_before: Path, place: Path) -> None:
    """From the checkpoint of step 1 to the end: the save at step 2, its pruning, and the finished model."""
    counts = place / "save.count"
    plain = place / "plain-save"
    shutil.copytree(brief_before, plain)
    faulty.live("train", *settings(tiny, plain, *BRIEF), env={"FAULT_UNDER": str(plain / "checkpoints"), "FAULT_COUNT": str(counts)})
    operations = read_count(counts)
    assert operations > 50
    assert_same(result(brief), result(plain))
    for at in range(1, operations + 1) if FULL else random.Random(5).sample(range(1, operations), 3):
        out = place / f"at-{at}"
        shutil.copytree(brief_before, out)
        argv = ["train", *settings(tiny, out, *BRIEF)]
        counts.unlink(missing_ok=True)
        killed = faulty.live(*argv, env={"FAULT_UNDER": str(out / "checkpoints"), "FAULT_AT": str(at), "FAULT_KIND": "kill", "FAULT_COUNT": str(counts)})
        assert killed.status == -9, (at, killed.text)
        KILLS["save"] += 1
        assert_nothing_half(out)
        again = faulty.live(*argv)
        assert again.status == 0 or FINISHED in again.text, (at, again.text)
        assert_same(result(brief), result(out))
        assert not [path for path in (out / "checkpoints").iterdir() if path.name.startswith(".")], at
        shutil.rmtree(out)


@pytest.mark.parametrize("verb", ["evaluate", "merge", "export", "cache"])
def test_other_stages_end_as_if_undisturbed(nursery: Nursery, tiny: Path, undisturbed: Path, place: Path, verb: str) -> None:
    if verb != "merge" and not FULL:
        pytest.skip("in make storm")
    out = place / f"stage-{verb}"
    shutil.copytree(undisturbed, out)
    quick = ["--set", "evaluation.max_new_tokens=16", "--set", "evaluation.max_samples=4"]
    if verb == "cache":
        argv = ["train", "--dry-run", "--overwrite", *settings(tiny, out)]  # tokenises, and loads no model
    else:
        argv = [{"export": "export-gguf"}.get(verb, verb), *settings(tiny, out), *(quick if verb == "evaluate" else []), *([] if verb == "evaluate" else ["--overwrite"]),
                *(["-q", "q8_0", "--allow-out-of-bounds"] if verb == "export" else [])]  # a random model's answers are near ties
    made = {"evaluate": "evaluation_report.json", "merge": "merged", "export": "gguf", "cache": "cache"}[verb]
    assert nursery.live(*argv).status == 0
    wanted, draw, killed, seconds = _result(out / made), random.Random(verb), KILLS[verb], None
    for _ in range(5 if FULL else 2):
        target = out / made
        shutil.rmtree(target) if target.is_dir() else target.unlink()
        shutil.rmtree(out / "cache" / "answers", ignore_errors=True)
        if seconds is None:  # the first life built what later ones find
            seconds = nursery.live(*argv).seconds
            continue
        storm(nursery, verb, out, argv, seconds, draw, most=5 if FULL else 2)
        assert _result(out / made) == wanted
    assert KILLS[verb] > killed


def _result(path: Path) -> object:
    if path.is_dir():  # near ties of a random model fall either way in llama.cpp's answers, which a certificate holds
        return {name: value for name, value in hashes(path).items() if ".certificate." not in name}
    report = json.loads(path.read_text())
    return [sample["answer"] for sample in report["samples"]]


def test_the_count(capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing was lost: every storm above compared its end. How many kills there were is printed."""
    with capsys.disabled():
        print(f"\nSIGKILLs {sum(KILLS.values())}: {', '.join(f'{kind} {number}' for kind, number in KILLS.items())}; lost 0")
    assert sum(KILLS.values()) >= (200 if FULL else 3)
