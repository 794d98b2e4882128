"""Runs: what was trained, read from the manifests, and laid side by side.

In: folders. Out: tables on the console. A run is a folder whose manifest was written by the stage `train`: a finished model, or the newest
checkpoint of an unfinished one. Nothing is guessed: config, data, versions, machine and results are what the manifest and
`training_state.json` say. Run: `emergency-kit runs list`, `runs show RUN`, `runs compare RUN RUN`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from emergency_kit.artifacts import load_manifest
from emergency_kit.config import Config, flatten
from emergency_kit.errors import ModelError, UsageError
from emergency_kit.files import folder_bytes
from emergency_kit.training.checkpoint import NAME, load_training_state

# They name a run or where it is, and say nothing about how it was made.
NAMES = ("training.output_dir", "training.model_name")
STAGES = ("dataset", "model", "lora", "training")


@dataclass(frozen=True)
class Run:
    """A trained folder with its manifest and its training_state.json."""

    folder: Path
    manifest: dict[str, Any]
    state: dict[str, Any]

    @property
    def finished(self) -> bool:
        return not NAME.match(self.folder.name)

    @property
    def config(self) -> dict[str, Any]:
        """`{"section.key": value}` of the sections that shape training."""
        return {f"{section}.{key}": value for section in STAGES for key, value in self.manifest.get("config", {}).get(section, {}).items()}

    def results(self) -> dict[str, Any]:
        """What came of it, by name; None where it does not say."""
        state = self.state
        summary: dict[str, Any] = state.get("summary") or {}
        losses, validation = (list(state.get(key) or ()) for key in ("loss_history", "validation_history"))
        return {
            "steps": f"{state.get('step')}/{state.get('max_steps') or state.get('step')}", "epochs": _number(state.get("epoch"), ".2f"),
            "first loss": _number(losses[0]["loss"] if losses else None, ".4f"), "last loss": _number(losses[-1]["loss"] if losses else None, ".4f"),
            "last validation loss": _number(validation[-1]["loss"] if validation else None, ".4f"), "best validation loss": _number(state.get("best_metric"), ".4f"),
            "tokens": _number(state.get("tokens_seen"), ",.0f"), "tokens/s": _number(summary.get("tokens_per_second"), ",.0f"),
            "seconds": _number(state.get("wall_seconds"), ",.0f"), "peak memory, GB": _number((summary.get("peak_memory_bytes") or 0) / 1e9 or None, ".2f"),
            "compute type": state.get("compute_type") or "-", "batches in parts": state.get("pieces", 1), "resumed from": state.get("resumed_from") or "-"}


def _number(value: Any, form: str) -> str:
    return f"{value:{form}}" if isinstance(value, (int, float)) else "-"


def load_run(folder: Path) -> Run:
    """The run in a folder: a model, a checkpoint, or an output folder with one. Raises UsageError where there is none."""
    if not folder.is_dir():
        raise UsageError(f"run {folder}: no such folder; emergency-kit runs list shows those that are there")
    run = _read(folder)
    if run:
        return run
    below = find_runs([folder])
    if len(below) == 1:
        return below[0]
    raise UsageError(f"run {folder}: " + (f"holds {len(below)} runs; name one: {', '.join(str(one.folder) for one in below[:6])}" if below else
                                          "no training's manifest in it; emergency-kit runs list shows the runs that are there"))


def _read(folder: Path) -> Run | None:
    manifest = load_manifest(folder)
    if manifest is None or manifest.get("stage") != "train":
        return None
    try:
        return Run(folder, manifest, load_training_state(folder))
    except ModelError:
        return None


def find_runs(folders: list[Path]) -> list[Run]:
    """Runs below the folders, the newest first: finished models, and of unfinished runs the newest checkpoint."""
    found: list[Run] = []
    for parent in sorted({path.parent.parent for folder in folders for path in folder.rglob("manifest.json") if not path.parent.name.startswith(".")}):
        here = [run for path in sorted(parent.iterdir()) if path.is_dir() and not path.name.startswith(".") and (run := _read(path))]
        finished = [run for run in here if run.finished]
        owned = {run.state.get("run_id") for run in finished}
        unfinished = [run for run in here if not run.finished and run.state.get("run_id") not in owned]
        found += finished + sorted(unfinished, key=lambda run: run.state["step"])[-1:]
    return sorted(found, key=lambda run: str(run.manifest.get("created")), reverse=True)


def _console() -> Console:
    """A pipe has no width of its own: paths stay whole there."""
    console = Console(highlight=False, markup=False, soft_wrap=True)
    return console if console.is_terminal else Console(highlight=False, markup=False, soft_wrap=True, width=220)


def list_runs(folders: list[Path]) -> None:
    """Print every run below the folders with its results and what its config has that is not the default."""
    console = _console()
    found = find_runs(folders)
    if not found:
        console.print(f"No runs in {', '.join(map(str, folders))}; next: make train")
        return
    table = Table(Column("run", overflow="fold"), "made", "steps", "loss", "validation", "best", "tokens/s", "GB", "MB on disk")
    for run in found:
        got = run.results()
        table.add_row(str(run.folder) + ("" if run.finished else " (unfinished)"), str(run.manifest.get("created", "-"))[:16].replace("T", " "), got["steps"], got["last loss"],
                      got["last validation loss"], got["best validation loss"], got["tokens/s"], got["peak memory, GB"], f"{folder_bytes(run.folder) / 1e6:,.0f}")
    console.print(table)
    if len(found) > 1:
        console.print(f"Side by side: emergency-kit runs compare {found[0].folder} {found[1].folder}")


def show_run(folder: Path) -> None:
    """Print one run: results, what its config has that is not the default, data, machine, versions, parents."""
    console, run = _console(), load_run(folder)
    console.print(f"{run.folder}, {'finished' if run.finished else 'unfinished'}, made {run.manifest.get('created')} by commit {str(run.manifest.get('git_commit'))[:12]}, "
                  f"profile {run.manifest.get('profile')}")
    for name, value in run.results().items():
        console.print(f"  {name}: {value}")
    default = flatten(Config())
    console.print("Settings that are not the default:")
    for key, value in run.config.items():
        if default.get(key) != value:
            console.print(f"  {key} = {value}")
    for name, value in _surroundings(run).items():
        console.print(f"{name}: {value}")


def _surroundings(run: Run) -> dict[str, str]:
    machine = run.manifest.get("hardware", {})
    identity = run.state.get("identity") or {}
    return {"data": str(run.manifest.get("dataset_hash"))[:16], "training tokens": str(identity.get("training tokens", "-"))[:16],
            "base model": ", ".join(f"{parent['path']} {str(parent['sha256'])[:16]}" for parent in run.manifest.get("parents", [])) or "-",
            "code": str(run.manifest.get("git_commit"))[:20], "processor": str(machine.get("processor")), "cores": str(machine.get("cores")),
            "GPUs": ", ".join(machine.get("gpus") or []) or "none", "versions": ", ".join(f"{name} {version}" for name, version in run.manifest.get("packages", {}).items())}


def compare_runs(folders: list[Path]) -> None:
    """Print runs side by side: settings that differ, then data, code and machine where they differ, then results."""
    if len(folders) < 2:
        raise UsageError("runs compare: got one run; expected at least two folders")
    console, runs = _console(), [load_run(folder) for folder in folders]
    table = Table("", *(Column(str(run.folder), overflow="fold") for run in runs))
    configs = [run.config for run in runs]
    keys = [key for key in dict.fromkeys(key for config in configs for key in config) if key not in NAMES]
    different = [key for key in keys if len({json.dumps(config.get(key, "-"), sort_keys=True) for config in configs}) > 1]
    for key in different:
        table.add_row(key, *(_text(config.get(key, "-")) for config in configs))
    if not different:
        table.add_row("settings", *("the same" for _ in runs))
    table.add_section()
    around = [_surroundings(run) for run in runs]
    for key in around[0]:
        if len({one[key] for one in around}) > 1:
            table.add_row(key, *(one[key] for one in around))
    if all(len({one[key] for one in around}) == 1 for key in around[0]):
        table.add_row("data, code, machine", *("the same" for _ in runs))
    table.add_section()
    results = [run.results() for run in runs]
    for key in results[0]:
        table.add_row(key, *(str(one[key]) for one in results))
    console.print(table)


def _text(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
