"""Several real processes under torchrun answer what one does: complete, in order, to the same report; one killed ends all, and what was answered is kept."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emergency_kit.config import Resolved, load_config
from emergency_kit.data.format import Record
from emergency_kit.evaluation.kept_answers import Answers
from emergency_kit.evaluation.division import deal
from emergency_kit.evaluation.during_training import MEASURED, build_scorer
from emergency_kit.evaluation.run import evaluate
from emergency_kit.inference.engine import Generated
from emergency_kit.training import checkpoint
from emergency_kit.training.run import train
from tests.training.test_ranks import MORE, PROCESSES, ranks_of, wait_for

TIMES = {"created", "seconds", "tokens_per_second", "kept_answers", "engine", "last_run"}


@given(st.lists(st.integers(0, 40), max_size=40), st.integers(1, 5), st.integers(1, 6))
@settings(max_examples=200, deadline=None)
def test_ranks_are_dealt_the_batches_of_one_process(lengths: list[int], size: int, world: int) -> None:
    prompts = [[{"role": "user", "content": "a" * length}] for length in lengths]
    wanted = range(0, len(prompts), 2)
    with pytest.MonkeyPatch.context() as patch:
        whole = deal(prompts, wanted, size)
        dealt = []
        for rank in range(world):
            patch.setenv("RANK", str(rank))
            patch.setenv("WORLD_SIZE", str(world))
            dealt.append(deal(prompts, wanted, size))
    assert sorted(batch for batches in dealt for batch in batches) == sorted(whole) and sorted(place for batch in whole for place in batch) == list(wanted)
    assert max(map(len, dealt)) - min(map(len, dealt)) <= 1


def test_each_rank_keeps_its_answers_apart_and_all_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        Answers(tmp_path, "a" * 64).put(f"key {rank}", Generated(f"• {rank}", rank, True))
    assert len(list(tmp_path.iterdir())) == 3
    monkeypatch.delenv("RANK")
    assert [Answers(tmp_path, "a" * 64).get(f"key {rank}") for rank in range(3)] == [Generated(f"• {rank}", rank, True) for rank in range(3)]


def write(folder: Path, records: int) -> Path:
    folder.mkdir()
    for split, number in (("train", 2), ("test", records)):
        made = [Record(f"{split}{place}", f"The pan burns {'and burns ' * place}{place}.", "FACTS\n• a", category="fire", hazards=(("kitchen_grease_fire", "house_fire_smoke")[place % 2],))
                for place in range(number)]
        (folder / f"{split}.jsonl").write_text("".join(f"{record.to_json()}\n" for record in made), encoding="utf-8")
    return folder


def flags(tiny: Path, data: Path, out: Path, *more: str) -> list[str]:
    return [f"model.name={tiny}", "model.dtype=float32", f"dataset.name={data}", f"training.output_dir={out}", "evaluation.engine=torch", "evaluation.batch_size=2",
            "evaluation.max_new_tokens=8", "evaluation.samples=1", *more]


def start(number: int, *settings: str, verb: str = "evaluate") -> subprocess.Popen[str]:
    """What `make evaluate NPROC=number` starts."""
    return subprocess.Popen([sys.executable, "-m", "emergency_kit.training.launch", str(number), verb, "--profile", "embedded",
                             *(["--checkpoint", "base"] if verb == "evaluate" else []), *(part for item in settings for part in ("--set", item))],
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"})


def found(out: Path) -> Any:
    """The report without what a clock says, or what was kept."""
    def strip(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: strip(part) for key, part in value.items() if key not in TIMES}
        return [strip(part) for part in value] if isinstance(value, list) else value
    return strip(json.loads((out / "evaluation_report.json").read_text(encoding="utf-8")))


def alone(settings: list[str]) -> Resolved:
    return load_config("embedded", settings=settings)


@pytest.mark.parametrize("records", [7, 1] if MORE else [5])
def test_the_report_is_that_of_one_process_and_is_gone_on_with_by_another_number(records: int, tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    settings = flags(tiny, write(tmp_path / "data", records), out)
    evaluate(alone(settings), checkpoint="base")
    wanted = found(out)
    assert len(wanted["samples"]) == records and len({sample["answer"] for sample in wanted["samples"]}) == records, "answers that can be told apart"
    out.rename(tmp_path / "alone")
    launcher = start(PROCESSES, *settings)
    printed, errors = launcher.communicate(timeout=180)
    assert launcher.returncode == 0, errors
    assert found(out) == wanted
    assert printed.count("Report: ") == 1 and printed.count("base: PyTorch") == 1, "rank 0 alone prints"
    kept = sorted((out / "cache" / "answers").iterdir())
    assert len(kept) == min(PROCESSES, records), "a file of each rank that had something to answer"
    if MORE:
        kept[-1].unlink()
        evaluate(alone(settings), checkpoint="base")
        assert found(out) == wanted


@pytest.mark.skipif(not MORE, reason="in make prove-ranks")
@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_rank_ends_all_and_what_was_answered_is_kept(killed: int, tiny: Path, tmp_path: Path) -> None:
    settings = flags(tiny, write(tmp_path / "data", 9), tmp_path / "out", "evaluation.max_new_tokens=600", "evaluation.batch_size=1", "evaluation.samples=0")
    launcher = start(PROCESSES, *settings)
    wait_for(launcher, "Answering 9 of 9")
    kept = tmp_path / "out" / "cache" / "answers"
    while len(list(kept.glob("*.jsonl"))) < PROCESSES:  # each has answered one, so that some wait for the slowest soon
        assert launcher.poll() is None
        time.sleep(0.1)
    ranks, began = ranks_of(launcher), time.monotonic()
    os.kill(ranks[killed], signal.SIGKILL)
    _, errors = launcher.communicate(timeout=60)
    assert time.monotonic() - began < 30 and launcher.returncode == 128 + 9
    assert errors.splitlines()[-1] == f"error: rank {killed} of {PROCESSES} was ended by SIGKILL" and errors.count("error:") <= 2 and "Traceback" not in errors, errors
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks.values()) and not (tmp_path / "out" / "evaluation_report.json").exists()
    before = sum(len(file.read_text().split()) > 0 for file in kept.iterdir())
    launcher = start(2, *settings)
    printed, errors = launcher.communicate(timeout=300)
    assert launcher.returncode == 0 and before >= PROCESSES and "of 9 answers kept from an earlier run" in printed, errors
    after = found(tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / "divided")
    evaluate(alone(settings), checkpoint="base")
    assert found(tmp_path / "out") == after


@pytest.mark.skipif(not MORE, reason="in make prove-ranks")
def test_scores_in_training_are_those_of_one_process(tiny: Path, tmp_path: Path) -> None:
    settings = [f"model.name={tiny}", "model.dtype=float32", "dataset.build_size=200", "dataset.max_samples=16", "dataset.max_eval_samples=5", "dataset.grounding=none",
                "training.per_device_train_batch_size=1", "training.gradient_accumulation_steps=4", "training.keep_effective_batch=true", "training.max_steps=2",
                "training.warmup_steps=0", "training.eval_steps=1", "lora.dropout=0", "evaluation.max_new_tokens=6", "evaluation.batch_size=2", "training.best_samples=5",
                "training.early_stopping_patience=9", "training.metric_for_best_model=critical_action_recall"]
    final = train(load_config("embedded", settings=[*settings, f"training.output_dir={tmp_path / 'alone'}"]), scorer=build_scorer)
    launcher = start(PROCESSES, *settings, f"training.output_dir={tmp_path / 'ranks'}", verb="train")
    _, errors = launcher.communicate(timeout=300)
    assert launcher.returncode == 0, errors
    histories = [checkpoint.load_training_state(folder)["validation_history"] for folder in (final, tmp_path / "ranks" / "checkpoints" / "final")]
    assert [[entry[name] for name in MEASURED] for entry in histories[0]] == [[entry[name] for name in MEASURED] for entry in histories[1]]
