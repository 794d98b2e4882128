"""The stage `plan`: what a run will take, before any weight is loaded. Also `train --dry-run`.

In: a config, and perhaps the memory of a GPU that is not here (`--gpu 16GB`). Out: steps, effective batch, tokens, time, peak memory and
disk, every term on its line, and what to change first where it does not fit; `--fit` makes these changes and prints them as flags.
What is printed here is made in prediction.py.
Limits: one device; time only for this machine. Run: `make plan`, `emergency-kit plan --gpu 16GB --fit`.
"""

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path
from typing import Any

from rich.console import Console

from emergency_kit.config import Resolved, find_cuda
from emergency_kit.errors import DataError, ModelError, UsageError
from emergency_kit.files import free_bytes
from emergency_kit.model.hub import cache_where_unreachable
from emergency_kit.model.shape import load_shape
from emergency_kit.training import memory
from emergency_kit.training.prediction import USABLE, Plan, fetched_bytes, make, predict_seconds
from emergency_kit.training.schedule import pass_rows, step_rows

ADVICE = {
    "training.per_device_train_batch_size": "half the rows of a pass and twice the passes; the effective batch stays",
    "training.per_device_eval_batch_size": "fewer rows when the validation loss is measured",
    "training.gradient_checkpointing": "activations are made again on the way back: about a third more time",
    "model.load_in_4bit": "the frozen weights in 4-bit NF4: a quarter of bfloat16",
    "model.max_seq_length": "shorter rows; those over it are an error unless dataset.overlength says otherwise",
    "lora.r": "a smaller rank: adapters, gradients and optimizer shrink alike",
}
# A larger pass is proposed only where it leaves this much of the device free, since no formula is that sure.
SPARE = 0.8
# --fit does not touch these: another model would come of it.
NOT_FITTED = ("model.max_seq_length", "lora.r")


def parse_gpu(text: str) -> float:
    """Bytes of a card's memory from `16GB`, `16` or `80 GiB`. Raises UsageError otherwise."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(g|gb|gib)?\s*", text, re.IGNORECASE)
    if not match or float(match[1]) <= 0:
        raise UsageError(f"--gpu: got {text!r}; expected its memory, for instance 16GB")
    return float(match[1]) * (2**30 if (match[2] or "").lower() == "gib" else 1e9)


def plan(resolved: Resolved, gpu: str | None = None, fit: bool = False, timed: bool = True, rows: dict[str, Any] | None = None) -> Plan:
    """Print what a run of this config takes. gpu: memory of a card to plan for instead of this machine. fit: change settings until it fits.
    rows: by split, where they are at hand. Raises UsageError, DataError and ModelError for what training would refuse, too.
    """
    from emergency_kit.training.health import foresee

    if resolved.config.training.method == "dpo":
        raise UsageError("training.method dpo: only sft can be planned; next: --set training.method=sft")
    console = Console(highlight=False, soft_wrap=True, markup=False)
    if gpu is None and resolved.config.model.device == "cuda" and not find_cuda():
        raise UsageError("model.device is cuda, and there is no CUDA GPU here; next: emergency-kit plan --gpu 16GB for a card of that size, or --profile embedded")
    room = parse_gpu(gpu) if gpu else None
    reason = ""
    with cache_where_unreachable(_asks_hub(resolved)):
        shape = load_shape(resolved.config.model)
        if rows is None:
            rows, reason = _read_rows(resolved, hub_may_fail=gpu is not None)
    made = make(resolved, shape, rows, room, reason)
    changes: dict[str, Any] = {}
    while fit and not made.fits and (better := _next_change(made, rows, room, NOT_FITTED)):
        changes |= better[1]
        made = better[0]
    if timed and room is None and rows and made.fits:
        made.seconds = predict_seconds(made, rows)
    report(made, rows, console)
    for warning in foresee(made.resolved.config.training, made.steps) if made.steps else ():
        console.print(f"Warning: {warning}")
    advise(made, rows, room, changes, fit, console)
    return made


def _asks_hub(resolved: Resolved) -> bool:
    model, dataset = resolved.config.model, resolved.config.dataset
    return not ((model.name == "bundled" or Path(model.name).is_dir()) and (dataset.name == "embedded" or Path(dataset.name).exists()))


def _read_rows(resolved: Resolved, hub_may_fail: bool) -> tuple[dict[str, Any], str]:
    """`(rows by split, why there are none)`."""
    from emergency_kit.data.cache import load_rows
    from emergency_kit.data.load import open_splits
    from emergency_kit.data.stream import check_streaming
    from emergency_kit.model.backend import load_tokenizer

    if resolved.config.dataset.streaming:
        check_streaming(resolved)
        return {}, "it is streamed"
    try:
        tokenizer = load_tokenizer(resolved.config.model)
        return {name: load_rows(split, tokenizer, resolved) for name, split in open_splits(resolved, "train", "validation").items()}, ""
    except (DataError, ModelError) as error:
        if not hub_may_fail or Path(resolved.config.dataset.name).exists() and Path(resolved.config.model.name).exists():
            raise
        return {}, " ".join(str(error).split()).partition("; ")[0]  # without the remedy: a plan goes on


def report(made: Plan, rows: dict[str, Any], console: Console) -> None:
    """Print a plan."""
    say, load, training = console.print, made.load, made.resolved.config.training
    say(f"Plan for {made.device}; base model {made.shape.source}, {made.shape.parameters / 1e6:,.0f}M parameters; "
        f"engine {'fused' if made.setting.fused else 'modules'}")
    batch = f"effective batch {made.effective_batch} ({pass_rows(training)} rows x {made.effective_batch // pass_rows(training)} passes)"
    if rows:
        say(f"  Steps    {made.steps:,} over {made.epochs:g} epochs of {len(rows['train']):,} records, {len(rows['validation']):,} for validation; {batch}")
        say(f"  Tokens   {load.tokens / made.steps:,.0f} a step, longest row {load.work.longest:,}; {load.tokens:,} in all, {load.supervised:,} of them supervised"
            + (f", {load.computed:,.0f} computed" if round(load.computed) != load.tokens else ""))
    else:
        say(f"  Steps    {f'{made.steps:,}' if made.steps else 'unknown'}; {batch}")
        say(f"  Tokens   unknown: the data is not at hand ({made.reason}), so every row is taken to be of {load.work.longest:,} tokens, all of them supervised; "
            "shorter rows take less")
    if made.seconds:
        total = made.seconds["training"] + made.seconds["evaluations"]
        say(f"  Time     {_duration(total)}: {made.seconds['step']:.2f} s a step, {load.tokens / max(made.seconds['training'], 1e-9):,.0f} tokens/s, evaluations "
            f"{_duration(made.seconds['evaluations'])}; by timed steps of models with few layers, loading and saving not counted")
    else:
        say("  Time     not predicted: it is timed on the machine that trains")
    phase, total = memory.peak(made.phases)
    say(f"  Memory   {total / 1e9:.2f} GB at most, while {phase}; {made.room_bytes / 1e9:.1f} GB are there")
    for term, size in sorted(made.phases[phase].items(), key=lambda item: -item[1]):
        if size >= 5e5:
            say(f"    {size / 1e9:8.3f} GB  {term}")
    if not made.setting.fused and made.setting.recompute and "logits" not in made.phases["training"]:
        say(f"    {memory.logits_bytes(made.shape, made.setting, load.work) / 1e9:8.3f} GB  logits: gone before that layer is made again, so only the larger of the two counts")
    if not made.setting.fused and not made.setting.on_gpu and "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        say("    More is held under glibc, whose heap keeps what modules free: twice as much in a measured run; MALLOC_MMAP_THRESHOLD_=1000000 before the command prevents it")
    if made.setting.fused and training.gradient_checkpointing == "auto":
        say(f"    activations of {made.setting.kept_layers} of {made.shape.layers} layers kept, the others' made again on the way back (training.max_gpu_memory_gb {training.max_gpu_memory_gb:g})")
    free = free_bytes(Path(training.output_dir))
    say(f"  Disk     {sum(made.disk.values()) / 1e6:,.0f} MB at most: " + ", ".join(f"{name} {size / 1e6:,.0f} MB" for name, size in made.disk.items() if size)
        + f"; {free / 1e9:,.1f} GB free")
    if fetched := fetched_bytes(made):
        say(f"  Fetch    {fetched / 1e9:.1f} GB at most, the base model, once, into the Hub's cache; {free_bytes(_hub_cache()) / 1e9:,.1f} GB free there")


def _hub_cache() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def _duration(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours} h {rest // 60} min" if hours else f"{rest // 60} min {rest % 60} s" if rest >= 60 else f"{seconds:.1f} s"


def advise(made: Plan, rows: dict[str, Any], room: float | None, changes: dict[str, Any], fit: bool, console: Console) -> None:
    """Say whether it fits, and what to change first where it does not."""
    if changes:
        console.print("Changed to make it fit, the effective batch stays:" if made.fits else "Changed, which is not enough:")
        for key, value in changes.items():
            console.print(f"  {_flags({key: value})}   ({ADVICE.get(key, 'the effective batch stays')})")
    if sum(made.disk.values()) > free_bytes(Path(made.resolved.config.training.output_dir)):
        console.print("It does not fit on the disk: lower training.save_total_limit, or choose another --output-dir")
    if fetched_bytes(made) > free_bytes(_hub_cache()):
        console.print(f"The base model does not fit on the disk of {_hub_cache()}: make room, or set HF_HOME to a folder that has it")
    usable = f"{USABLE * made.room_bytes / 1e9:.2f} GB ({USABLE:.0%}) can be used"
    if made.fits:
        console.print(f"It fits: {made.peak_bytes / 1e9:.2f} GB, where {usable}.")
        if larger := _larger(made, rows, room):
            kept = "fewer, larger passes" if "training.per_device_train_batch_size" in larger[1] else "activations kept instead of made again"
            console.print(f"There is room to spare: {_flags(larger[1])} ({kept}; the effective batch stays); then {larger[0].peak_bytes / 1e9:.2f} GB.")
        return
    console.print(f"It does not fit: {made.peak_bytes / 1e9:.2f} GB, where {usable}.")
    better = _next_change(made, rows, room, ())
    if better is None:
        console.print("No setting makes it fit; choose a smaller model, or a larger device.")
        return
    console.print(f"Change first: {_flags(better[1])} ({ADVICE[next(iter(better[1]))]}); then {better[0].peak_bytes / 1e9:.2f} GB.")
    if better[0].fits:
        return
    last, needed = better
    while not last.fits and (more := _next_change(last, rows, room, (), tuple(needed))):
        last, needed = more[0], needed | more[1]
    console.print(f"It fits with all of these: {_flags(needed)}; then {last.peak_bytes / 1e9:.2f} GB." if last.fits else
                  f"No settings make it fit: with all of {_flags(needed)} it takes {last.peak_bytes / 1e9:.2f} GB. Choose a smaller model, or a larger device.")
    if last.fits and not fit and not set(NOT_FITTED) & set(needed):
        console.print("--fit makes these changes.")
    elif last.fits:
        console.print(f"{' and '.join(key for key in NOT_FITTED if key in needed)} would give another model, so --fit leaves that to you.")


def _flags(change: dict[str, Any]) -> str:
    return " ".join(f"--set {key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in change.items())


def _larger(made: Plan, rows: dict[str, Any], room: float | None) -> tuple[Plan, dict[str, Any]] | None:
    """What a GPU with memory to spare can be asked for: activations kept instead of made again, else, where they are all made again or none is, the most rows in
    a pass; None where neither fits."""
    training = made.resolved.config.training
    if not made.setting.on_gpu or not isinstance(training.per_device_train_batch_size, int):
        return None
    if made.setting.fused and training.gradient_checkpointing == "auto":
        change: dict[str, Any] = {"training.max_gpu_memory_gb": int(SPARE * made.room_bytes / 1e9)}
        raised = change["training.max_gpu_memory_gb"] > training.max_gpu_memory_gb and made.setting.kept_layers < made.shape.layers
        return (make(changed(made.resolved, change), made.shape, rows, room, made.reason), change) if raised else None
    whole = step_rows(training)
    sizes = [size for size in range(whole, pass_rows(training), -1) if whole % size == 0]
    tried: list[dict[str, Any]] = [{"training.gradient_checkpointing": False}] if training.gradient_checkpointing is True else []
    tried += [{"training.per_device_train_batch_size": size, "training.gradient_accumulation_steps": whole // size} for size in sizes]
    for change in [tried[0] | other for other in tried[1:]] * (len(tried) > 1 and training.gradient_checkpointing is True) + tried:
        other = make(changed(made.resolved, change), made.shape, rows, room, made.reason)
        if other.peak_bytes <= SPARE * other.room_bytes:
            return other, change
    return None


def _next_change(made: Plan, rows: dict[str, Any], room: float | None, without: tuple[str, ...], later: tuple[str, ...] = ()) -> tuple[Plan, dict[str, Any]] | None:
    """The change to make first: the first in ADVICE's order that makes it fit, else the first that saves anything; None where none saves.
    later: settings that have been changed already, and are changed again only after the others."""
    first = None
    for key, change in sorted(_changes(made.resolved).items(), key=lambda item: item[0] in later):
        if key in without:
            continue
        process = next(iter(made.phases["training"].values()))
        other = make(changed(made.resolved, change), made.shape, rows, room, made.reason, None if made.setting.on_gpu else int(process))
        if other.fits:
            return other, change
        if first is None and other.peak_bytes < 0.99 * made.peak_bytes:
            first = other, change
    return first


def _changes(resolved: Resolved) -> dict[str, dict[str, Any]]:
    """One step of every setting that saves memory, the least harmful first."""
    training, model = resolved.config.training, resolved.config.model
    found: dict[str, dict[str, Any]] = {}
    if pass_rows(training) % 2 == 0:
        found["training.per_device_train_batch_size"] = {"training.per_device_train_batch_size": pass_rows(training) // 2,
                                                         "training.gradient_accumulation_steps": training.gradient_accumulation_steps * 2}
    if training.per_device_eval_batch_size > 1:
        found["training.per_device_eval_batch_size"] = {"training.per_device_eval_batch_size": training.per_device_eval_batch_size // 2}
    if not training.gradient_checkpointing:
        found["training.gradient_checkpointing"] = {"training.gradient_checkpointing": True}
    if not model.load_in_4bit and model.device != "cpu" and resolved.profile != "embedded":
        found["model.load_in_4bit"] = {"model.load_in_4bit": True}
    if model.max_seq_length > 256:
        found["model.max_seq_length"] = {"model.max_seq_length": model.max_seq_length // 2}
    if resolved.config.lora.r > 4:
        found["lora.r"] = {"lora.r": resolved.config.lora.r // 2}
    return found


def changed(resolved: Resolved, change: dict[str, Any]) -> Resolved:
    """The same config with some values changed."""
    config = resolved.config
    for key, value in change.items():
        section, _, name = key.partition(".")
        config = config.model_copy(update={section: getattr(config, section).model_copy(update={name: value})})
    return dataclasses.replace(resolved, config=config)
