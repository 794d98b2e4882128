"""Checkpoints: what stands in one, how it is written whole, pruned, verified and resumed from.

In: a running Trainer, or a folder. Out: the guide's seven files (adapter, configs, tokenizer,
`training_state.json`), in a mid-run checkpoint also optimizer, scheduler, RNG and trainer state, and
`manifest.json`, written last. A folder without a manifest that verifies is no checkpoint.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Iterator

from emergency_kit.artifacts import load_manifest, save_json, save_manifest, staged_folder, verify_folder
from emergency_kit.config import ModelSection, Resolved
from emergency_kit.errors import ModelError
from emergency_kit.model.backend import base_name, check_checkpoint, save_tokenizer

if TYPE_CHECKING:
    from emergency_kit.training.trainer import KitTrainer

NAME = re.compile(r"^checkpoint-(\d+)$")


@dataclass
class RunFacts:
    """What a run knows of itself beyond the Trainer's state.

    started: time.monotonic() of this process's part; earlier_seconds: wall time of the parts before a resume.
    """

    resolved: Resolved
    dataset_hash: str
    tokenizer: Any
    rows: int
    step_rows: int
    resumed_from: Path | None = None
    started: float = field(default_factory=time.monotonic)
    earlier_seconds: float = 0.0
    tokens_seen: int = 0
    supervised_tokens_seen: int = 0
    step_seconds: float = 0.0
    stale: list[Path] = field(default_factory=list)

    @property
    def wall_seconds(self) -> float:
        """Seconds spent over all parts of the run."""
        return self.earlier_seconds + time.monotonic() - self.started


@contextlib.contextmanager
def writing(trainer: "KitTrainer", folder: Path, summary: dict[str, Any] | None = None) -> Iterator[Path]:
    """Fill a temporary folder with the guide's files; the caller may add more; the manifest closes it."""
    facts = trainer.facts
    with staged_folder(folder) as temporary:
        model = trainer.accelerator.unwrap_model(trainer.model)
        model.save_pretrained(temporary)
        (temporary / "README.md").unlink(missing_ok=True)  # PEFT's empty model card
        model.config.save_pretrained(temporary)
        save_tokenizer(facts.tokenizer, temporary)
        save_json(temporary / "training_state.json", training_state(trainer, summary))
        yield temporary
        save_manifest(temporary, "train", facts.resolved, dataset_hash=facts.dataset_hash,
                      parents=[Path(base_name(facts.resolved.config.model))])


def training_state(trainer: "KitTrainer", summary: dict[str, Any] | None) -> dict[str, Any]:
    """The content of `training_state.json`."""
    state, facts = trainer.state, trainer.facts
    losses = [entry for entry in state.log_history if "loss" in entry]
    validation = [{"step": entry["step"], "loss": entry["eval_loss"]} for entry in state.log_history if "eval_loss" in entry]
    return {
        "step": state.global_step, "max_steps": state.max_steps, "epoch": state.epoch,
        "model_name": facts.resolved.config.training.model_name,
        "seeds": {"training": facts.resolved.config.training.seed, "dataset": facts.resolved.config.dataset.build_seed},
        "data_order": {"epoch": int(state.epoch or 0), "rows": facts.rows, "step_rows": facts.step_rows,
                       "rows_seen": state.global_step * facts.step_rows},
        "tokens_seen": facts.tokens_seen, "supervised_tokens_seen": facts.supervised_tokens_seen,
        "step_seconds": facts.step_seconds, "wall_seconds": facts.wall_seconds,
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
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"checkpoint {folder}: training_state.json is missing or not readable ({error}); use another checkpoint") from None


def list_checkpoints(folder: Path) -> list[Path]:
    """Mid-run checkpoint folders, lowest step first, whole or not."""
    found = [path for path in folder.glob("checkpoint-*") if path.is_dir() and NAME.match(path.name)]
    return sorted(found, key=lambda path: int(path.name.split("-")[1]))


def prune(folder: Path, facts: RunFacts, newest: Path) -> None:
    """Keep `save_total_limit` checkpoints, once the newest verifies; never the one being resumed from."""
    if verify_folder(newest):
        return
    for path in facts.stale:
        if path != newest:
            shutil.rmtree(path, ignore_errors=True)
    facts.stale.clear()
    keep = facts.resolved.config.training.save_total_limit
    resumed_from = facts.resumed_from.resolve() if facts.resumed_from else None
    for path in list_checkpoints(folder)[:-keep]:
        if path != newest and path.resolve() != resumed_from:
            shutil.rmtree(path, ignore_errors=True)


def check_resumable(folder: Path, model: ModelSection) -> dict[str, Any]:
    """The training state of a checkpoint that a run can go on from; raises ModelError with the reason otherwise."""
    if check_checkpoint(folder, model) != "adapter":
        raise ModelError(f"--resume-from {folder}: a full model, not a training checkpoint; name a checkpoint-N folder")
    problems = verify_folder(folder)
    if problems:
        raise ModelError(f"--resume-from {folder}: damaged, {'; '.join(problems)}; use another checkpoint in {folder.parent}")
    if "optimizer.pt" not in (load_manifest(folder) or {"files": {}})["files"]:
        raise ModelError(f"--resume-from {folder}: a finished model without optimizer state; name a checkpoint-N folder in {folder.parent}")
    return load_training_state(folder)
