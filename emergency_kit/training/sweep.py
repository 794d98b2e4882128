"""Sweep: one training run for every combination of settings, ranked by validation loss; and the learning-rate range test.

In: settings of which some list several values (`--set training.learning_rate=1e-4,3e-4`). Out: a run each under
`<output_dir>/sweep/`, one table on the console, in `sweep.md` and in `sweep.json`. Every combination is checked before the first run; a run
that is finished is taken as it stands, one that was stopped is gone on with, one that diverges is a line of the table. With `--workers N` up to N runs
go side by side, each in a process of its own (workers.py), and what each says goes to its own `logs/console.log`; the results are the same bits
as one at a time, given the same threads (OMP_NUM_THREADS sets them; a CPU's sums depend on their number).
Where `training.seed` is among them, a second table ranks the other settings by the mean over seeds, and the best is of that.
Limits: losses compare where the validation tokens are the same, and it is said where they are not; one at a time, on a CPU, the peak
memory is the process's highest so far, so that a later run's is never below an earlier one's.
Run: `emergency-kit sweep`.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import os
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable

from emergency_kit.artifacts import hardware, save_json, save_text
from emergency_kit.config import Resolved
from emergency_kit.errors import Interrupted, ModelError, TrainingError, UsageError
from emergency_kit.files import check_writable
from emergency_kit.model.backend import pick_device
from emergency_kit.model.process_memory import cores
from emergency_kit.model.shape import load_shape
from emergency_kit.training import lock
from emergency_kit.training.checkpoint import load_training_state
from emergency_kit.training.prediction import USABLE, make
from emergency_kit.training.run import Scorer, is_trained_as, train
from emergency_kit.training.schedule import check_schedule
from emergency_kit.training.workers import Killed, Workers

# Steps of a range test, and the pieces that it is divided into: at each end the validation loss is measured.
RANGE_STEPS, RANGE_PIECES = 32, 8
# Resident in a process that has imported what training imports (Linux, torch 2.13: 500 to 650 MB).
PROCESS_BYTES = 600_000_000
SEED = "training.seed"


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
          scorer: Scorer | None = None, workers: int = 1) -> Path:
    """The verb: a sweep, or with `lr_range` ("LOW:HIGH") a range test. resolve: makes a config of settings with one value each."""
    if lr_range is not None and workers > 1:
        raise UsageError(f"--lr-range: a single run, so --workers {workers} has nothing to share out; leave out one of the two")
    if output_dir is not None:
        settings = [*settings, f"training.output_dir={output_dir}"]
    if lr_range is None:
        return sweep(settings, resolve, overwrite, scorer, workers)
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


def sweep(settings: list[str], resolve: Callable[[list[str]], Resolved], overwrite: bool = False, scorer: Scorer | None = None, workers: int = 1) -> Path:
    """Train every combination and return the folder of the sweep.

    settings: `section.key=value[,value...]`. resolve: makes a config of such settings with one value each. workers: runs side by side; more than one
    need a scorer that can be pickled. Raises UsageError where nothing is varied, or another sweep is at work in the folder, ConfigError and TrainingError
    for a combination that cannot be, before any is trained; Interrupted after a stop; TrainingError at the end where a run's process was killed.
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
    check_writable(folder)
    with lock.hold(folder, print):
        if workers > 1:
            _side_by_side(folder, planned, list(varied), overwrite, scorer, min(workers, len(planned)))
            return folder
        outcomes = []
        for number, (outcome, resolved) in enumerate(planned, 1):
            print(f"Sweep {number}/{len(planned)}: {_shown(outcome.settings)}", flush=True)
            outcomes.append(_read(outcome, resolved) if _is_finished(outcome, resolved, overwrite) else _train_one(outcome, resolved, overwrite, scorer))
            _report(folder, outcomes, list(varied), done=number == len(planned))
    return folder


def _is_finished(outcome: Outcome, resolved: Resolved, overwrite: bool) -> bool:
    final = resolved.finished_model
    if overwrite or not final.exists() or not is_trained_as(resolved, final):
        return False
    print(f"  {final} is already trained with these settings on this data", flush=True)
    return True


def _train_one(outcome: Outcome, resolved: Resolved, overwrite: bool, scorer: Scorer | None) -> Outcome:
    try:
        train(resolved, overwrite=overwrite or resolved.finished_model.exists(), scorer=scorer)
    except TrainingError as error:
        outcome.failure = str(error)
        print(f"  failed: {error}", flush=True)
        return outcome
    return _read(outcome, resolved)


def _read(outcome: Outcome, resolved: Resolved) -> Outcome:
    state = load_training_state(resolved.finished_model)
    outcome.summary, outcome.validation = state["summary"], state["identity"]["validation tokens"]
    losses = {entry["step"]: entry["loss"] for entry in state["validation_history"]}
    outcome.loss = losses[outcome.summary["weights_of_step"]]
    return outcome


def _train_apart(outcome: Outcome, resolved: Resolved, overwrite: bool, scorer: Scorer | None) -> Outcome:
    """`_train_one` in a worker's process, whose log says first with how many threads."""
    import torch

    print(f"Worker: process {os.getpid()}, threads {torch.get_num_threads()}, CUDA_VISIBLE_DEVICES {os.environ.get('CUDA_VISIBLE_DEVICES', 'as it was')}", flush=True)
    return _train_one(outcome, resolved, overwrite, scorer)


def _side_by_side(folder: Path, planned: list[tuple[Outcome, Resolved]], keys: list[str], overwrite: bool, scorer: Scorer | None, workers: int) -> None:
    devices = _devices()
    pool = Workers(workers, max(1, cores() // workers), devices)
    print(f"Sweep: {len(planned)} runs, {workers} side by side, threads of each: {os.environ.get('OMP_NUM_THREADS', pool.threads)}"
          + (f"; on GPUs {', '.join(devices)}" if devices else ""), flush=True)
    ended = {number: _read(*one) for number, one in enumerate(planned) if _is_finished(*one, overwrite)}
    left = [number for number in range(len(planned)) if number not in ended]
    _warn_of_memory([planned[number][1] for number in left], workers, len(devices))
    logs = [planned[number][0].folder / "logs" / "console.log" for number in left]
    lacking: list[str] = []
    with contextlib.closing(pool.run([functools.partial(_train_apart, *planned[number], overwrite, scorer) for number in left], logs)) as events:
        for place, answer in events:
            number, outcome = left[place], planned[left[place]][0]
            name = f"Sweep {number + 1}/{len(planned)}: {_shown(outcome.settings)}"
            if answer is None:
                print(f"{name} begins; what it says goes to {logs[place]}", flush=True)
            elif isinstance(answer, Outcome):
                ended[number] = answer
                print(f"{name}: failed: {answer.failure}" if answer.loss is None else
                      f"{name}: validation loss {answer.loss:.4f} after {answer.summary['wall_seconds'] / 60:.1f} minutes", flush=True)
            elif isinstance(answer, (Interrupted, Killed)):
                lacking.append(_shown(outcome.settings))
                print(f"{name}: {str(answer).partition(';')[0]}", flush=True)
                if isinstance(answer, Killed):
                    ended[number] = Outcome(outcome.settings, outcome.folder, failure=str(answer))
            else:
                raise answer  # as one at a time: what is wrong with the data, the model or the folder is wrong for the others, too
            if number in ended:
                _report(folder, _in_order(ended), keys, done=False)
    _report(folder, _in_order(ended), keys, done=len(ended) == len(planned))
    if len(ended) < len(planned):
        raise Interrupted(f"sweep stopped with {len(planned) - len(lacking)} of {len(planned)} runs done; go on with the same command")
    if lacking:
        raise TrainingError(f"sweep: {len(lacking)} of {len(planned)} runs ended before they were done ({'; '.join(lacking)}); the same command goes on with them alone, "
                            f"with fewer --workers than {workers} where memory ran out")


def _in_order(ended: dict[int, Outcome]) -> list[Outcome]:
    """In the order of the plan, whichever ended first: runs of equal loss stand in the table as they do one at a time."""
    return [ended[number] for number in sorted(ended)]


def _devices() -> list[str]:
    """Names of this machine's GPUs as CUDA_VISIBLE_DEVICES has them, where there are several to share out."""
    import torch

    count, visible = torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES")
    return (visible.split(",") if visible else [str(number) for number in range(count)])[:count] if count > 1 else []


def _warn_of_memory(runs: list[Resolved], workers: int, devices: int) -> None:
    """Say where the largest runs that may meet need more memory than there is, every row taken to be of `model.max_seq_length` tokens: most runs need less."""
    # By nvidia-smi: to ask through torch would hold half a gigabyte of the first GPU for as long as the sweep lasts.
    rooms = [float(line.rsplit(",", 1)[1].split()[0]) * 2**20 for line in hardware()["gpus"]] if runs and pick_device(runs[0].config.model) == "cuda" else []
    try:
        plans = [make(one, load_shape(one.config.model), {}, min(rooms, default=None), process_bytes=PROCESS_BYTES)
                 for one in runs if one.config.training.method == "sft"]
    except ModelError:  # no formula for such a model, or it is not there; the runs say what is wrong
        return
    meeting = math.ceil(workers / max(1, devices))  # on one GPU, or in this computer's memory
    needed = sum(sorted((plan.peak_bytes for plan in plans), reverse=True)[:meeting])
    if plans and needed > USABLE * plans[0].room_bytes:
        print(f"Warning: {meeting} runs side by side can need {needed / 1e9:.1f} GB, and {plans[0].room_bytes / 1e9:.1f} GB are there; "
              "where memory runs out, the system ends a run: fewer --workers, or a smaller training.per_device_train_batch_size", flush=True)


def _shown(settings: dict[str, str]) -> str:
    return ", ".join(f"{key}={value}" for key, value in settings.items())


def _report(folder: Path, outcomes: list[Outcome], keys: list[str], done: bool) -> None:
    """Write what is known so far, and print the table at the end."""
    ranked = sorted(outcomes, key=lambda one: (one.loss is None or not math.isfinite(one.loss), one.loss or 0.0))
    heads = ["rank", *(key.partition(".")[2] for key in keys), "validation loss", "training loss", "steps' tokens/s", "minutes", "peak GB"]
    rows = [[str(rank), *one.settings.values(), *_figures(one)] for rank, one in enumerate(ranked, 1)]
    means = _over_seeds(outcomes, keys)
    notes, measured = [], {(one.settings.get(SEED) if means else None, one.validation) for one in outcomes if one.validation}
    if len(measured) > len({seed for seed, _ in measured}):
        notes.append("The runs were measured on different validation tokens, so their losses do not compare.")
    elif len({tokens for _, tokens in measured}) > 1:
        notes.append("Each seed draws validation records of its own: losses compare within a seed, and so do the means.")
    best = means[0].settings if means else next((one.settings for one in ranked[:1] if one.loss is not None), None)
    if best:
        notes.append(f"Best: {' '.join(f'--set {key}={value}' for key, value in best.items())}")
    tables = [[heads, *rows]]
    if means:
        tables.append([["rank", *(key.partition(".")[2] for key in means[0].settings), "mean over seeds", "lowest", "highest"],
                       *([str(rank), *one.settings.values(), *(f"{value:.4f}" for value in one.losses)] for rank, one in enumerate(means, 1))])
    lines = [line for table in tables for line in (*_markdown(table), "")]
    save_text(folder / "sweep.md", "\n".join(["# Sweep, ranked by validation loss", "", *lines, *notes, ""]))
    save_json(folder / "sweep.json", [{"settings": one.settings, "folder": str(one.folder), "validation_loss": one.loss, "failure": one.failure,
                                       "summary": one.summary} for one in ranked])
    if done:
        print("\n".join([line for table in tables for line in ("", *_aligned(table))] + ["", *notes, f"Table: {folder / 'sweep.md'}"]), flush=True)


@dataclass
class Mean:
    """Runs that differ by their seed alone. losses: mean, lowest and highest."""

    settings: dict[str, str]
    losses: tuple[float, float, float]


def _over_seeds(outcomes: list[Outcome], keys: list[str]) -> list[Mean]:
    """The lowest mean first, of settings that every seed so far has a finite loss for; empty where not several seeds and something else are varied."""
    groups: dict[tuple[str, ...], list[float | None]] = {}
    if SEED not in keys or len(keys) < 2:
        return []
    others = [key for key in keys if key != SEED]
    for one in outcomes:
        groups.setdefault(tuple(one.settings[key] for key in others), []).append(one.loss)
    seeds = len({one.settings[SEED] for one in outcomes})
    finite = {values: [loss for loss in losses if loss is not None and math.isfinite(loss)] for values, losses in groups.items()}
    means = [Mean(dict(zip(others, values)), (sum(losses) / seeds, min(losses), max(losses))) for values, losses in finite.items() if len(losses) == seeds > 1]
    return sorted(means, key=lambda mean: mean.losses[0])


def _figures(one: Outcome) -> list[str]:
    if one.loss is None:
        return ["failed", one.failure.split(";")[0], "", "", ""]
    found = one.summary
    return [f"{one.loss:.4f}", f"{found['last_loss']:.4f}", f"{found['tokens_per_second']:.0f}", f"{found['wall_seconds'] / 60:.1f}", f"{found['peak_memory_bytes'] / 1e9:.2f}"]


def _markdown(rows: list[list[str]]) -> list[str]:
    """Lines of a table whose first row is its head."""
    return ["| " + " | ".join(row) + " |" for row in (rows[0], ["---"] * len(rows[0]), *rows[1:])]


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
    state = load_training_state(resolved.finished_model)
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
                                             *_markdown([heads, *rows]), "", note, ""]))
    save_json(place / "range.json", ranked)
    print("\n".join(["", *_aligned([heads, *rows]), "", note, f"Table: {place / 'range.md'}"]), flush=True)
    return place
