"""Checkpoints: what stands in one, how it is written whole, pruned and read.

In: a running Trainer, or a folder. Out: the guide's seven files (adapter, configs, tokenizer,
`training_state.json`), in a mid-run checkpoint also optimizer, scheduler, RNG and trainer state, and
`manifest.json`, written last. A folder without a manifest that verifies is no checkpoint. A save that the disk refuses is
tried again, then ends the run with the checkpoints of before as they were. Going on from one: `resume.py`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import re
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Iterator

from emergency_kit.artifacts import save_json, save_manifest, verify_folder
from emergency_kit.config import Resolved
from emergency_kit.data.stream import StreamRows
from emergency_kit.errors import Interrupted, KitError, ModelError, TrainingError
from emergency_kit.files import folder_bytes, free_bytes, staged_folder, temporary_sibling
from emergency_kit.model.backend import base_name, save_trained
from emergency_kit.training import ranks, sharding
from emergency_kit.training.best import best_evaluation, validation_history

if TYPE_CHECKING:
    from emergency_kit.training.trainer import KitTrainer

NAME = re.compile(r"^checkpoint-(\d+)$")
# Until the first one is written: an adapter of rank 16 on 135M parameters with its optimizer state is 60 MB.
FIRST_BYTES = 100_000_000


@dataclass
class Counters:
    """What a run has done so far, over all its parts. step_seconds: within forward and backward passes."""

    tokens_seen: int = 0
    supervised_tokens_seen: int = 0
    tokens_computed: int = 0
    step_seconds: float = 0.0


@dataclass
class RunFacts:
    """What a run knows of itself beyond the Trainer's state.

    identity: hashes of all that a resumed run must share. pieces: parts that every batch is divided into since memory ran out.
    started: time.monotonic() of this process's part; earlier_seconds: wall time of the parts before a resume. stale: checkpoints
    of an earlier run, which go once one of this run verifies. pass_rows: rows of a forward pass. first: the adapters' first values
    where they do not begin at zero (model/adapters.py). place: device and inode of the checkpoints' folder.
    """

    resolved: Resolved
    dataset_hash: str
    tokenizer: Any
    rows: int
    step_rows: int
    run_id: str = ""
    identity: dict[str, Any] = field(default_factory=dict)
    resumed_from: Path | None = None
    started: float = field(default_factory=time.monotonic)
    earlier_seconds: float = 0.0
    counters: Counters = field(default_factory=Counters)
    compute_type: str = ""
    int8_backward: bool = False
    pieces: int = 1
    pass_rows: int = 1
    first: dict[str, Any] | None = None
    stale: list[Path] = field(default_factory=list)
    checkpoint_bytes: int = 0
    place: tuple[int, int] | None = None

    @property
    def wall_seconds(self) -> float:
        """Seconds spent over all parts of the run."""
        return self.earlier_seconds + time.monotonic() - self.started


def save(trainer: "KitTrainer", folder: Path, fill: Callable[[Path], None] = lambda folder: None, summary: dict[str, Any] | None = None,
         write_parts: Callable[[Path], None] | None = None) -> None:
    """Write a checkpoint whole, on rank 0; `fill` adds its own files. What the disk refuses is tried again `training.save_retries` times.

    write_parts: what all ranks write together into a folder beside, which rank 0 takes in as the checkpoint's `optimizer`. Raises TrainingError, or
    Interrupted where a stop was asked for meanwhile; the checkpoints of before are as they were.
    """
    gathered = sharding.adapters(trainer.model) if ranks.is_sharded() else None
    parts = ranks.shared(temporary_sibling(folder.parent)) if write_parts else None
    for attempt in range(trainer.config.save_retries + 1):
        done, failure = True, None
        try:
            if write_parts:
                write_parts(parts)
            if ranks.is_first():
                _save(trainer, folder, fill, summary, gathered, parts)
        except OSError as error:
            done, failure = False, _refused(trainer, folder, error, attempt) if ranks.is_first() else None
            if parts and ranks.is_first():
                shutil.rmtree(parts, ignore_errors=True)
        done, failure = ranks.shared((done, failure))
        if done:
            return
        if failure:
            raise failure


def _save(trainer: "KitTrainer", folder: Path, fill: Callable[[Path], None], summary: dict[str, Any] | None, gathered: dict[str, Any] | None, parts: Path | None) -> None:
    _check_place(trainer.facts, folder.parent)
    _check_space(trainer.facts, folder.parent)
    with writing(trainer, folder, summary, gathered) as temporary:
        fill(temporary)
        if parts:
            os.replace(parts, temporary / sharding.SHARDED_OPTIMIZER)
    trainer.facts.checkpoint_bytes = max(trainer.facts.checkpoint_bytes, folder_bytes(folder))


def _refused(trainer: "KitTrainer", folder: Path, error: OSError, attempt: int) -> KitError | None:
    """What ends the run after the disk refused a save; None, some seconds later, where it is to be tried again."""
    from emergency_kit.training.callbacks import LOG

    training = trainer.config
    kept, _ = find_newest(list_checkpoints(folder.parent))
    needed = trainer.facts.checkpoint_bytes or FIRST_BYTES
    reason = f"{folder} could not be saved ({error.strerror or error}); {needed / 1e6:.0f} MB are needed, {_free(folder.parent)} are free"
    before = f"the last good checkpoint is {kept}; when there is room again: the same command with --resume-from {kept}" if kept else "there is no earlier checkpoint"
    if attempt == training.save_retries:
        return TrainingError(f"{reason}; tried {attempt + 1} times; {before}")
    LOG.warning("%s; trying again in %g s (%d of %d)", reason, training.save_retry_seconds, attempt + 1, training.save_retries)
    if not trainer.stop.wait(training.save_retry_seconds):
        return Interrupted(f"stopped at step {trainer.state.global_step}/{trainer.state.max_steps}; {reason}; {before}")
    return None


def _check_place(facts: RunFacts, folder: Path) -> None:
    """The folder must be the one that the run began in: a disk that went away would leave a same-named folder on another disk."""
    if facts.place is not None and place_of(folder) != facts.place:
        raise OSError(errno.ESTALE, "the folder that the run began in is no longer there", str(folder))


def place_of(folder: Path) -> tuple[int, int]:
    """Device and inode of a folder."""
    status = folder.stat()
    return status.st_dev, status.st_ino


def _check_space(facts: RunFacts, folder: Path) -> None:
    needed = facts.checkpoint_bytes
    if needed and free_bytes(folder) < needed:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))


def _free(folder: Path) -> str:
    try:
        return f"{free_bytes(folder) / 1e6:.0f} MB"
    except OSError:
        return "an unknown number"


@contextlib.contextmanager
def writing(trainer: "KitTrainer", folder: Path, summary: dict[str, Any] | None = None, gathered: dict[str, Any] | None = None) -> Iterator[Path]:
    """Fill a temporary folder with the guide's files; the caller may add more; the manifest closes it. gathered: the adapters of a divided model."""
    facts = trainer.facts
    with staged_folder(folder) as temporary:
        model = trainer.accelerator.unwrap_model(trainer.model)
        save_trained(model, facts.tokenizer, temporary, facts.first, gathered)
        save_json(temporary / "training_state.json", training_state(trainer, summary))
        yield temporary
        save_manifest(temporary, "train", facts.resolved, dataset_hash=facts.dataset_hash,
                      parents=[Path(parent) for parent in (base_name(facts.resolved.config.model), facts.resolved.config.lora.adapter) if parent])


def training_state(trainer: "KitTrainer", summary: dict[str, Any] | None) -> dict[str, Any]:
    """The content of `training_state.json`."""
    state, facts = trainer.state, trainer.facts
    losses = [entry for entry in state.log_history if "loss" in entry]
    validation = validation_history(state)
    return {
        "step": state.global_step, "max_steps": state.max_steps, "epoch": state.epoch,
        "model_name": facts.resolved.config.training.model_name,
        "seeds": {"training": facts.resolved.config.training.seed, "dataset": facts.resolved.config.dataset.build_seed},
        "data_order": {"epoch": int(state.epoch or 0), "rows": facts.rows, "step_rows": facts.step_rows,
                       "rows_seen": state.global_step * facts.step_rows},
        **dataclasses.asdict(facts.counters), "compute_type": facts.compute_type, "int8_backward": facts.int8_backward, "pieces": facts.pieces, "pass_rows": facts.pass_rows, "wall_seconds": facts.wall_seconds,
        "stream": trainer.train_dataset.state_at(state.global_step * facts.step_rows) if isinstance(trainer.train_dataset, StreamRows) else None,
        "run_id": facts.run_id, "identity": facts.identity, "processes": ranks.world(), "loss_carry": trainer.loss_carry(), "evaluation_due": trainer.evaluation_due,
        "best_metric": min((entry["loss"] for entry in validation), default=None),
        "loss_history": [{key: entry.get(key) for key in ("step", "loss", "learning_rate", "grad_norm")} for entry in losses],
        "validation_history": validation,
        "resumed_from": str(facts.resumed_from) if facts.resumed_from else None,
        "summary": summary,
    }


def load_training_state(folder: Path) -> dict[str, Any]:
    """`training_state.json` of a checkpoint; raises ModelError where it cannot be read."""
    try:
        state = json.loads((folder / "training_state.json").read_text(encoding="utf-8"))
        return {**state, "step": int(state["step"])}
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise ModelError(f"checkpoint {folder}: training_state.json is missing or not readable ({error}); use another checkpoint") from None


def list_checkpoints(folder: Path) -> list[Path]:
    """Mid-run checkpoint folders, lowest step first, whole or not."""
    found = [path for path in folder.glob("checkpoint-*") if path.is_dir() and NAME.match(path.name)]
    return sorted(found, key=step_of)


def step_of(folder: Path) -> int:
    """The step in a mid-run checkpoint's name."""
    return int(folder.name.split("-")[1])


def find_newest(checkpoints: list[Path]) -> tuple[Path | None, list[tuple[Path, list[str]]]]:
    """`(the last that verifies, those after it with their problems)`; checkpoints: lowest step first."""
    damaged: list[tuple[Path, list[str]]] = []
    for path in reversed(checkpoints):
        problems = verify_folder(path) or _state_problem(path)
        if not problems:
            return path, damaged
        damaged.append((path, problems))
    return None, damaged


def _state_problem(path: Path) -> list[str]:
    """What the manifest cannot know: another step's folder under this one's name."""
    try:
        step = load_training_state(path)["step"]
    except ModelError as error:
        return [str(error)]
    return [] if step == step_of(path) else [f"holds step {step}"]


def best_of(folder: Path, validation: list[dict[str, Any]], metric: str = "loss") -> Path | None:
    """The checkpoint with the best metric among those taken at a step that was evaluated."""
    saved = {step_of(path): path for path in list_checkpoints(folder)}
    best = best_evaluation([entry for entry in validation if entry["step"] in saved], metric)
    return saved[best["step"]] if best else None


def load_weights(model: Any, folder: Path, first: dict[str, Any] | None) -> None:
    """Put a checkpoint's weights into the model that made it: its adapters, to the same bits, or all of them."""
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    from emergency_kit.model import adapters

    if first is not None:
        set_peft_model_state_dict(model, adapters.load_difference(folder)[0])
    elif ranks.is_sharded():
        sharding.load_adapters(model, load_file(folder / "adapter_model.safetensors"))
    elif (folder / "adapter_model.safetensors").is_file():
        set_peft_model_state_dict(model, load_file(folder / "adapter_model.safetensors"))
    else:
        for path in sorted(folder.glob("*.safetensors")):
            model.load_state_dict(load_file(path), strict=False)  # a tied head stands in the file once


def prune(folder: Path, facts: RunFacts, newest: Path, validation: list[dict[str, Any]]) -> None:
    """Keep the last `save_total_limit` checkpoints, once the newest verifies; never the best, nor the one being resumed from."""
    if verify_folder(newest):
        return
    for path in facts.stale:
        if path != newest:
            shutil.rmtree(path, ignore_errors=True)
    facts.stale.clear()
    resumed_from = facts.resumed_from.resolve() if facts.resumed_from else None
    best = best_of(folder, validation, facts.resolved.config.training.metric_for_best_model)
    for path in list_checkpoints(folder)[:-facts.resolved.config.training.save_total_limit]:
        if path not in (newest, best) and path.resolve() != resumed_from:
            shutil.rmtree(path, ignore_errors=True)
