"""What the storm's tests share: lives, faults, a tiny run to disturb, and what must be equal at its end."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from emergency_kit.artifacts import hash_file, verify_folder

FULL = os.environ.get("EMERGENCY_KIT_STORM") == "full"
SOURCE = Path(__file__).with_name("faults.c")


def build_faults(folder: Path) -> Path | None:
    """The library of faults, or None where there is no C compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if not compiler:
        return None
    library = folder / "faults.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", str(library), str(SOURCE), "-ldl"], check=True)
    return library


@dataclass
class Life:
    """How a life ended. status: exit code, or minus a signal's number; text: all that it printed, what went to standard error last."""

    status: int
    seconds: float
    out: str
    errors: str

    @property
    def text(self) -> str:
        return self.out + self.errors


class Nursery:
    """A process that forks lives; with `faults` the library is loaded into all of them."""

    def __init__(self, folder: Path, faults: Path | None = None):
        self.folder = folder
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": "."}
        if faults:
            environment["LD_PRELOAD"] = str(faults)
        self.process = subprocess.Popen([sys.executable, "-m", "tests.storm.nursery"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                                        env=environment, stderr=(folder / "nursery.log").open("w"))
        assert self.process.stdout.readline() == "ready\n", (folder / "nursery.log").read_text()
        self.lives = 0

    def live(self, *argv: object, **request: Any) -> Life:
        """One life of `emergency-kit argv`, to its end."""
        self.lives += 1
        files = {name: str(self.folder / f"life-{self.lives}-{name}.txt") for name in ("out", "errors")}
        self.process.stdin.write(json.dumps({"argv": [str(part) for part in argv], **files, **request}) + "\n")
        self.process.stdin.flush()
        reply = json.loads(self.process.stdout.readline())
        life = Life(reply["status"], reply["seconds"], *(Path(name).read_text(errors="replace") if Path(name).exists() else "" for name in files.values()))
        assert request.get("may_show_traceback") or "Traceback" not in life.text and "unexpected" not in life.text, life.text  # whatever befell it
        return life

    def close(self) -> None:
        """End the process."""
        self.process.stdin.close()
        self.process.wait(timeout=30)


def settings(model: Path, out: Path, *more: str) -> list[str]:
    """Flags of a short run with everything that can go wrong in it: dropout, two epochs, an uneven last batch, losses logged every
    second step, evaluations and saves at different steps."""
    values = [f"model.name={model}", "model.dtype=float32", "dataset.max_samples=20", "dataset.max_eval_samples=4", "dataset.grounding=none",
              "training.num_epochs=2", "training.per_device_train_batch_size=2", "training.gradient_accumulation_steps=2", "training.warmup_steps=2",
              "training.logging_steps=2", "training.eval_steps=4", "training.save_steps=3", "lora.dropout=0.1", "lora.r=4",
              "training.save_retries=2", "training.save_retry_seconds=0", *more]
    return ["--profile", "embedded", "--output-dir", str(out), *(part for value in values for part in ("--set", value))]


# What a run says that was killed between its finished model and its own end.
FINISHED = "a finished model is already in"
# A run of two steps, a save after each.
BRIEF = ("dataset.max_samples=4", "dataset.max_eval_samples=2", "training.num_epochs=2", "training.save_steps=1", "training.eval_steps=2", "training.warmup_steps=1")


def share_data(finished: Path, out: Path) -> Path:
    """A fresh output folder with the dataset and tokens of another, so that a life is about training."""
    out.mkdir(parents=True)
    for name in ("data", "cache"):
        shutil.copytree(finished / name, out / name)
    return out


def result(out: Path) -> dict[str, Any]:
    """All that must be bit-identical at the end: adapter, optimizer, scheduler, random states, losses."""
    final, last = out / "checkpoints" / "final", max((out / "checkpoints").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    state = json.loads((final / "training_state.json").read_text())
    return {"adapter": load_file(final / "adapter_model.safetensors"), "optimizer": torch.load(last / "optimizer.pt", weights_only=True)["state"],
            "scheduler": torch.load(last / "scheduler.pt", weights_only=True), "last": last.name,
            **{key: state[key] for key in ("loss_history", "validation_history", "step", "epoch", "tokens_seen", "supervised_tokens_seen", "pieces")}}


def assert_same(one: Any, other: Any, place: str = "") -> None:
    """Equal to the last bit, and say where not."""
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), place
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), place
        for key in one:
            assert_same(one[key], other[key], f"{place}/{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), place
        for index, (left, right) in enumerate(zip(one, other)):
            assert_same(left, right, f"{place}/{index}")
    else:
        assert one == other, f"{place}: {one} != {other}"


def assert_nothing_half(out: Path) -> None:
    """Every artifact under its own name is whole; what a killed life left is hidden and marked as partial."""
    for parent in ("checkpoints", "merged"):
        for folder in (out / parent).glob("*"):
            if folder.is_dir() and not folder.name.startswith("."):
                assert verify_folder(folder) == [], folder
    if (out / "evaluation_report.json").exists():
        json.loads((out / "evaluation_report.json").read_text())


def hashes(folder: Path) -> dict[str, str]:
    """sha256 of every file that holds a result (manifests hold the time)."""
    return {str(path.relative_to(folder)): hash_file(path) for path in sorted(folder.rglob("*"))
            if path.is_file() and path.name not in ("manifest.json", "about.json", ".lock") and ".partial" not in str(path)}


def read_count(path: Path) -> int:
    """File operations that a life with faults has counted."""
    return struct.unpack("l", path.read_bytes())[0]
