"""Sweep: one training run for every combination of settings, ranked by validation loss; and the learning-rate range test.

In: settings of which some list several values (`--set training.learning_rate=1e-4,3e-4`). Out: a run each under
`<output_dir>/sweep/`, one table on the console, in `sweep.md` and in `sweep.json`. Every combination is checked before the first run; a run
that is finished is taken as it stands, one that was stopped is gone on with, one that diverges is a line of the table.
Limits: one run at a time; losses compare where the validation tokens are the same, and it is said where they are not; on a CPU the peak
memory is the process's highest so far, so that a later run's is never below an earlier one's.
Run: `emergency-kit sweep`.
"""

from __future__ import annotations

import itertools
import json
import math
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable

from emergency_kit.artifacts import save_json, save_text
from emergency_kit.config import Resolved
from emergency_kit.errors import TrainingError, UsageError
from emergency_kit.training.checkpoint import load_training_state
from emergency_kit.training.run import Scorer, is_trained_as, train
from emergency_kit.training.schedule import check_schedule

# Steps of a range test, and the pieces that it is divided into: at each end the validation loss is measured.
RANGE_STEPS, RANGE_PIECES = 32, 8


@dataclass
class Outcome:
    """A run of the sweep. settings: what it varies; loss: of its finished weights on the validation split, None where it failed."""

    settings: dict[str, str]
    folder: Path
    loss: float | None = None
    summary: dict[str, Any] = field(default_factory=dict)
    failure: str = ""
    validation: str = ""


def split_settings(settings: list[str]) -> tuple[list[str], dict[str, list[str]]]:
    """`(fixed settings, {key: values})`; values are parted by commas outside of brackets and quotes. Raises UsageError for a key given twice."""
    fixed, varied = [], {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        values = [value.strip() for value in re.findall(r"""(?:\[[^\]]*\]|\{[^}]*\}|"[^"]*"|'[^']*'|[^,])+""", text)] if equals else []
        if len(values) < 2:
            fixed.append(setting)
        elif key in varied or any(other.partition("=")[0] == key for other in fixed):
            raise UsageError(f"--set {key}: given twice; list its values in one, parted by commas")
        else:
            varied[key.strip()] = values
    return fixed, varied


def start(resolve: Callable[[list[str]], Resolved], settings: list[str], output_dir: str | None, lr_range: str | None, overwrite: bool,
          scorer: Scorer | None = None) -> Path:
    """The verb: a sweep, or with `lr_range` ("LOW:HIGH") a range test. resolve: makes a config of settings with one value each."""
    if output_dir is not None:
        settings = [*settings, f"training.output_dir={output_dir}"]
    if lr_range is None:
        return sweep(settings, resolve, overwrite, scorer)
    low, _, high = lr_range.partition(":")
    try:
        rates = float(low), float(high)
    except ValueError:
        rates = 0.0, 0.0
    if not 0 < rates[0] < rates[1] < 1:
        raise UsageError(f"--lr-range: got {lr_range!r}; expected LOW:HIGH with 0 < LOW < HIGH < 1, for instance 1e-5:1e-2")
    fixed, varied = split_settings(settings)
    if varied:
        raise UsageError(f"--lr-range: takes one value for {next(iter(varied))}; sweep over it without --lr-range")
    given = resolve(fixed).config.training
    steps = given.max_steps or RANGE_STEPS
    return range_test(resolve([
        *(setting for setting in fixed if setting.partition("=")[0] not in ("training.output_dir", "training.learning_rate")), f"training.learning_rate={rates[1]}",
        f"training.output_dir={Path(given.output_dir) / 'sweep' / 'range'}", "training.model_name=range", f"training.max_steps={steps}",
        f"training.eval_steps={max(1, steps // RANGE_PIECES)}", "training.eval_strategy=steps", "training.save_strategy='no'"]), *rates)


def sweep(settings: list[str], resolve: Callable[[list[str]], Resolved], overwrite: bool = False, scorer: Scorer | None = None) -> Path:
    """Train every combination and return the folder of the sweep.

    settings: `section.key=value[,value...]`. resolve: makes a config of such settings with one value each. Raises UsageError where nothing is
    varied, ConfigError and TrainingError for a combination that cannot be, before any is trained.
    """
    fixed, varied = split_settings(settings)
    output_dir = resolve(fixed).config.training.output_dir
    fixed = [setting for setting in fixed if not setting.startswith("training.output_dir=")]
    if not varied:
        raise UsageError("sweep: no setting has several values; for instance --set training.learning_rate=1e-4,3e-4")
    folder = Path(output_dir) / "sweep"
    planned: list[tuple[Outcome, Resolved]] = []
    for values in itertools.product(*varied.values()):
        chosen = dict(zip(varied, values))
        place = folder / "_".join(f"{key.partition('.')[2]}-{re.sub(r'[^A-Za-z0-9.+-]+', '-', value).strip('-')}" for key, value in chosen.items())
        resolved = resolve([*fixed, *(f"{key}={value}" for key, value in chosen.items()), f"training.output_dir={place}"])
        check_schedule(resolved.config, resolved.config.training.max_steps or 1000)
        planned.append((Outcome(chosen, place), resolved))
    if len({outcome.folder for outcome, _ in planned}) < len(planned):
        raise UsageError("sweep: two combinations would share a folder; give each value once")
    outcomes = []
    for number, (outcome, resolved) in enumerate(planned, 1):
        print(f"Sweep {number}/{len(planned)}: {_shown(outcome.settings)}", flush=True)
        outcomes.append(_train_one(outcome, resolved, overwrite, scorer))
        _report(folder, outcomes, list(varied), done=number == len(planned))
    return folder


def _train_one(outcome: Outcome, resolved: Resolved, overwrite: bool, scorer: Scorer | None) -> Outcome:
    final = outcome.folder / "checkpoints" / resolved.config.training.model_name
    try:
        if final.exists() and not overwrite and is_trained_as(resolved, final):
            print(f"  {final} is already trained with these settings on this data", flush=True)
        else:
            train(resolved, overwrite=overwrite or final.exists(), scorer=scorer)
    except TrainingError as error:
        outcome.failure = str(error)
        print(f"  failed: {error}", flush=True)
        return outcome
    state = load_training_state(final)
    outcome.summary, outcome.validation = state["summary"], state["identity"]["validation tokens"]
    losses = {entry["step"]: entry["loss"] for entry in state["validation_history"]}
    outcome.loss = losses[outcome.summary["weights_of_step"]]
    return outcome


def _shown(settings: dict[str, str]) -> str:
    return ", ".join(f"{key}={value}" for key, value in settings.items())


def _report(folder: Path, outcomes: list[Outcome], keys: list[str], done: bool) -> None:
    """Write what is known so far, and print the table at the end."""
    ranked = sorted(outcomes, key=lambda one: (one.loss is None or not math.isfinite(one.loss), one.loss or 0.0))
    heads = ["rank", *(key.partition(".")[2] for key in keys), "validation loss", "training loss", "steps' tokens/s", "minutes", "peak GB"]
    rows = [[str(rank), *one.settings.values(), *_figures(one)] for rank, one in enumerate(ranked, 1)]
    lines = ["| " + " | ".join(row) + " |" for row in (heads, ["---"] * len(heads), *rows)]
    notes = []
    if len({one.validation for one in outcomes if one.validation}) > 1:
        notes.append("The runs were measured on different validation tokens, so their losses do not compare.")
    best = ranked[0]
    if best.loss is not None:
        notes.append(f"Best: {' '.join(f'--set {key}={value}' for key, value in best.settings.items())}")
    save_text(folder / "sweep.md", "\n".join(["# Sweep, ranked by validation loss", "", *lines, "", *notes, ""]))
    save_json(folder / "sweep.json", [{"settings": one.settings, "folder": str(one.folder), "validation_loss": one.loss, "failure": one.failure,
                                       "summary": one.summary} for one in ranked])
    if done:
        print("\n".join(["", *_aligned([heads, *rows]), "", *notes, f"Table: {folder / 'sweep.md'}"]), flush=True)


def _figures(one: Outcome) -> list[str]:
    if one.loss is None:
        return ["failed", one.failure.split(";")[0], "", "", ""]
    found = one.summary
    return [f"{one.loss:.4f}", f"{found['last_loss']:.4f}", f"{found['tokens_per_second']:.0f}", f"{found['wall_seconds'] / 60:.1f}", f"{found['peak_memory_bytes'] / 1e9:.2f}"]


def _aligned(rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]


def range_test(resolved: Resolved, low: float, high: float) -> Path:
    """The learning-rate range test (Smith 2017): one run whose rate rises from `low` to `high`, evenly in its logarithm; return its folder.

    The table ranks pieces of the run by how far the validation loss fell in them. resolved: its learning rate is `high`, its schedule left
    aside. Writes `sweep/range.md` and `range.json`; the weights are not kept.
    """
    training = resolved.config.training
    folder = Path(training.output_dir)
    train(resolved, overwrite=True, rising_from=low)
    state = json.loads((folder / "checkpoints" / training.model_name / "training_state.json").read_text(encoding="utf-8"))
    losses = [(entry["step"], entry["loss"]) for entry in state["validation_history"]]
    shutil.rmtree(folder / "checkpoints")
    last = max(state["step"] - 1, 1)
    pieces = []
    for (before, was), (after, now) in zip(losses, losses[1:]):
        rate = low * (high / low) ** ((before + after - 1) / 2 / last)  # in the middle of the piece
        pieces.append({"steps": f"{before + 1}-{after}", "learning_rate": rate, "validation_loss": now, "change": now - was})
    ranked = sorted(pieces, key=lambda piece: (not math.isfinite(piece["change"]), piece["change"]))
    heads = ["rank", "learning rate", "steps", "validation loss", "change"]
    rows = [[str(rank), f"{piece['learning_rate']:.1e}", piece["steps"], f"{piece['validation_loss']:.4f}", f"{piece['change']:+.4f}"]
            for rank, piece in enumerate(ranked, 1)]
    note = f"The validation loss fell fastest near {ranked[0]['learning_rate']:.1e}; try that as training.learning_rate, and a sweep around it." \
        if ranked and ranked[0]["change"] < 0 else "The validation loss fell nowhere; try lower rates, or more steps."
    place = folder.parent
    save_text(place / "range.md", "\n".join(["# Learning-rate range test, ranked by the fall of the validation loss", "",
                                             *("| " + " | ".join(row) + " |" for row in (heads, ["---"] * len(heads), *rows)), "", note, ""]))
    save_json(place / "range.json", ranked)
    print("\n".join(["", *_aligned([heads, *rows]), "", note, f"Table: {place / 'range.md'}"]), flush=True)
    return place
