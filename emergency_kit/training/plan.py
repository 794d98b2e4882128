"""The stage `plan`: what a run will take, before any weight is loaded. Also `train --dry-run`.

In: a config, and perhaps the memory of a GPU that is not here (`--gpu 16GB`). Out: steps, effective batch, tokens, time, peak memory and
disk, with the largest terms, and what to change first where it does not fit; `--fit` makes these changes and prints them as flags.
Memory comes from formulas (memory.py), time from a few timed steps of a one- and a two-layer model of random weights (speed.py).
Limits: one device; time only for this machine. Run: `make plan`, `emergency-kit plan --gpu 16GB --fit`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import re
import socket
import urllib.parse
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Iterator

from rich.console import Console

from emergency_kit.config import Resolved, find_cuda
from emergency_kit.errors import DataError, ModelError, UsageError
from emergency_kit.files import free_bytes
from emergency_kit.model.process_memory import available_bytes, resident_bytes
from emergency_kit.model.shape import Shape, load_shape
from emergency_kit.training import memory
from emergency_kit.training.schedule import interval, pass_rows, step_rows
from emergency_kit.training.memory import Setting

# A device is not filled to the brim: the desktop, the driver and what was not foreseen need some.
USABLE = 0.95
FAMILIES = ("llama", "mistral", "qwen2")  # of the fused engine
TOKENIZER_BYTES = 5_000_000
ADVICE = {
    "training.per_device_train_batch_size": "half the rows of a pass and twice the passes; the effective batch stays",
    "training.per_device_eval_batch_size": "fewer rows when the validation loss is measured",
    "training.gradient_checkpointing": "activations are made again on the way back: about a third more time",
    "model.load_in_4bit": "the frozen weights in 4-bit NF4: a quarter of bfloat16",
    "model.max_seq_length": "shorter rows; those over it are an error unless dataset.overlength says otherwise",
    "lora.r": "a smaller rank: adapters, gradients and optimizer shrink alike",
}
# --fit does not touch these: another model would come of it.
NOT_FITTED = ("model.max_seq_length", "lora.r")


@dataclass
class Plan:
    """What is known of a run beforehand. Bytes and seconds; seconds None where they cannot be known. reason: why the data is not."""

    resolved: Resolved
    shape: Shape
    setting: Setting
    load: Any
    steps: int | None
    epochs: float
    effective_batch: int
    phases: dict[str, dict[str, float]]
    device: str
    room_bytes: float
    disk: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] | None = None
    reason: str = ""

    @property
    def peak_bytes(self) -> float:
        return memory.peak(self.phases)[1]

    @property
    def fits(self) -> bool:
        return self.peak_bytes <= USABLE * self.room_bytes


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
    with _cache_alone_without_hub(resolved):
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


@contextlib.contextmanager
def _cache_alone_without_hub(resolved: Resolved) -> Iterator[None]:
    """Where the Hub is needed and out of reach, its client takes what it has, instead of a minute of tries."""
    model, dataset = resolved.config.model, resolved.config.dataset
    here = (model.name == "bundled" or Path(model.name).is_dir()) and (dataset.name == "embedded" or Path(dataset.name).exists())
    from huggingface_hub import constants

    was = constants.HF_HUB_OFFLINE
    if not here and not was:
        address = urllib.parse.urlsplit(os.environ.get("HF_ENDPOINT") or constants.ENDPOINT)
        try:
            socket.create_connection((address.hostname or "", address.port or (80 if address.scheme == "http" else 443)), timeout=3).close()
        except OSError:
            constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = was


def _read_rows(resolved: Resolved, hub_may_fail: bool) -> tuple[dict[str, Any], str]:
    """`(rows by split, why there are none)`."""
    from emergency_kit.data.cache import load_rows
    from emergency_kit.data.load import open_splits
    from emergency_kit.model.backend import load_tokenizer

    try:
        tokenizer = load_tokenizer(resolved.config.model)
        return {name: load_rows(split, tokenizer, resolved) for name, split in open_splits(resolved, "train", "validation").items()}, ""
    except (DataError, ModelError) as error:
        if not hub_may_fail or Path(resolved.config.dataset.name).exists() and Path(resolved.config.model.name).exists():
            raise
        return {}, " ".join(str(error).split())


def setting_of(resolved: Resolved, shape: Shape, on_gpu: bool) -> Setting:
    """How this config will be computed; the choices are those of model/backend.py and training/engine.py, without loading."""
    from emergency_kit.model.backend import pick_attention, pick_device, pick_dtype

    model, training, lora = resolved.config.model, resolved.config.training, resolved.config.lora
    device = "cuda" if on_gpu else pick_device(model)
    dtype = "bfloat16" if on_gpu and model.dtype == "auto" else str(pick_dtype(model, device)).removeprefix("torch.")
    plain = training.finetuning_type == "lora" and not (training.label_smoothing_factor or lora.use_dora or lora.modules_to_save)
    fused = plain and training.engine != "modules" and dtype != "float16" and shape.family in FAMILIES and not shape.slides
    return Setting(compute_bytes=4 if dtype == "float32" else 2, fused=fused, on_gpu=device == "cuda", four_bit=model.load_in_4bit,
                   eager=pick_attention(model, device) == "eager", recompute=training.gradient_checkpointing, dropout=resolved.config.lora.dropout > 0)


def make(resolved: Resolved, shape: Shape, rows: dict[str, Any], room: float | None, reason: str = "", process_bytes: int | None = None) -> Plan:
    """The plan of a config over rows that are at hand, or of the longest rows where there are none. room: bytes of a named card."""
    from emergency_kit.training import workload
    from emergency_kit.training.run import plan_steps

    training = resolved.config.training
    setting = setting_of(resolved, shape, on_gpu=room is not None)
    counted = plan_steps(resolved, len(rows["train"])) if rows else {"steps": training.max_steps, "epochs": training.num_epochs, "effective_batch":
                                                                   step_rows(training)}
    load = workload.measure(rows, resolved, setting.fused, setting.on_gpu, counted["steps"]) if rows else workload.assumed(resolved)
    phases = memory.estimate(shape, resolved, setting, load.work, process_bytes if process_bytes is not None else _process_bytes())
    device, here = _device(setting) if room is None else (f"a GPU of {room / 1e9:g} GB", room)
    made = Plan(resolved, shape, setting, load, counted["steps"], counted["epochs"], counted["effective_batch"], phases, device, here, reason=reason)
    made.disk = disk_terms(made)
    return made


def _process_bytes() -> int:
    """What this process holds now, with everything imported that training imports."""
    import peft  # noqa: F401

    from emergency_kit.training import trainer  # noqa: F401

    return resident_bytes() or 600_000_000  # where the system does not tell; Linux, torch 2.13: 500 to 650 MB


def _device(setting: Setting) -> tuple[str, float]:
    if setting.on_gpu:
        import torch

        free, total = torch.cuda.mem_get_info()
        return f"{torch.cuda.get_device_name()}, {total / 1e9:.1f} GB", float(free)
    available = _available_bytes()
    return f"this machine's CPU, {available / 1e9:.1f} GB of memory free", available


def _available_bytes() -> float:
    """Memory that programs can still have: of the machine, or of the container's limit where that is less."""
    found = [float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))]
    if available := available_bytes():
        found.append(float(available))
    with contextlib.suppress(OSError, ValueError):  # "max" is no number: no limit
        group = Path("/sys/fs/cgroup")
        found.append(float((group / "memory.max").read_text()) - float((group / "memory.current").read_text()))
    return min(found)


def disk_terms(made: Plan) -> dict[str, float]:
    """Bytes on disk by term: checkpoints kept and the one being written, the finished model, tokens."""
    training = made.resolved.config.training
    full = training.finetuning_type == "full"
    trained = (made.shape.parameters if full else memory.adapter_parameters(made.shape, made.resolved.config.lora)) * memory.FLOAT
    saves = _times(training.save_strategy, training.save_steps, made) if made.steps else training.save_total_limit + 1
    kept = min(saves, training.save_total_limit + 2)  # the best one beside the last ones, and the one being written
    return {f"{kept} checkpoints ({'weights' if full else 'adapter'}, optimizer, tokenizer)": kept * (3.0 * trained + TOKENIZER_BYTES), "finished model": trained + TOKENIZER_BYTES,
            "tokens": 4.0 * made.load.tokens / max(1.0, made.epochs)}


def _times(strategy: str, every: float, made: Plan) -> int:
    """How often something happens in a run, the end included."""
    steps = made.steps or 0
    return 1 if strategy == "no" else math.ceil(made.epochs) if strategy == "epoch" else -(-steps // interval(every, steps))


def predict_seconds(made: Plan, rows: dict[str, Any]) -> dict[str, float]:
    """Seconds by part: training passes, and evaluations. Timed on this machine now."""
    from emergency_kit.model.backend import load_tokenizer
    from emergency_kit.training.speed import time_step

    both, forward = time_step(made.resolved, rows["train"], made.load.typical, load_tokenizer(made.resolved.config.model), made.shape.layers, made.setting.fused)
    training, steps = made.resolved.config.training, made.steps or 0
    evaluations = _times(training.eval_strategy, training.eval_steps, made)
    return {"training": both * made.load.computed / made.load.typical_computed,
            "evaluations": forward * evaluations * made.load.eval_computed / made.load.typical_computed, "step": both}


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
        say(f"  Steps    {f'{made.steps:,}' if made.steps else 'unknown'}; {batch}. The data is not at hand ({made.reason}), so every row is taken to be of "
            f"{load.work.longest:,} tokens, all of them supervised")
    if made.seconds:
        total = made.seconds["training"] + made.seconds["evaluations"]
        say(f"  Time     {_duration(total)}: {made.seconds['step']:.2f} s a step, {load.tokens / max(made.seconds['training'], 1e-9):,.0f} tokens/s, evaluations "
            f"{_duration(made.seconds['evaluations'])}; by timed steps of a one- and a two-layer model, loading and saving not counted")
    else:
        say("  Time     not predicted: it is timed on the machine that trains")
    phase, total = memory.peak(made.phases)
    say(f"  Memory   {total / 1e9:.2f} GB at most, while {phase}; {made.room_bytes / 1e9:.1f} GB are there")
    for term, size in sorted(made.phases[phase].items(), key=lambda item: -item[1]):
        if size >= 5e5:
            say(f"    {size / 1e9:8.3f} GB  {term}")
    if not made.setting.fused and not made.setting.on_gpu and "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        say("    More is held under glibc, whose heap keeps what modules free: twice as much in a measured run; MALLOC_MMAP_THRESHOLD_=1000000 before the command prevents it")
    free = free_bytes(Path(training.output_dir))
    say(f"  Disk     {sum(made.disk.values()) / 1e6:,.0f} MB at most: " + ", ".join(f"{name} {size / 1e6:,.0f} MB" for name, size in made.disk.items() if size)
        + f"; {free / 1e9:,.1f} GB free")


def _duration(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours} h {rest // 60} min" if hours else f"{rest // 60} min {rest % 60} s" if rest >= 60 else f"{seconds:.1f} s"


def advise(made: Plan, rows: dict[str, Any], room: float | None, changes: dict[str, Any], fit: bool, console: Console) -> None:
    """Say whether it fits, and what to change first where it does not."""
    if changes:
        console.print("Changed to make it fit, the effective batch stays:" if made.fits else "Changed, which is not enough:")
        for key, value in changes.items():
            console.print(f"  --set {key}={str(value).lower() if isinstance(value, bool) else value}   ({ADVICE.get(key, 'the effective batch stays')})")
    if sum(made.disk.values()) > free_bytes(Path(made.resolved.config.training.output_dir)):
        console.print("It does not fit on the disk: lower training.save_total_limit, or choose another --output-dir")
    if made.fits:
        console.print("It fits.")
        return
    better = _next_change(made, rows, room, ())
    console.print(f"It does not fit: {made.peak_bytes / 1e9:.2f} GB, where {USABLE * made.room_bytes / 1e9:.2f} GB ({USABLE:.0%}) can be used.")
    if better is None:
        console.print("No setting makes it fit; choose a smaller model, or a larger device.")
        return
    settings = " ".join(f"--set {key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in better[1].items())
    console.print(f"Change first: {settings} ({ADVICE[next(iter(better[1]))]}); then {better[0].peak_bytes / 1e9:.2f} GB."
                  + ("" if fit else " --fit finds all that is needed, as far as the same model comes of it."))


def _next_change(made: Plan, rows: dict[str, Any], room: float | None, without: tuple[str, ...]) -> tuple[Plan, dict[str, Any]] | None:
    """The change to make first: the first in ADVICE's order that makes it fit, else the one that saves the most; None where none saves."""
    tried = []
    for key, change in _changes(made.resolved).items():
        if key not in without:
            process = next(iter(made.phases["training"].values()))
            other = make(changed(made.resolved, change), made.shape, rows, room, made.reason, None if made.setting.on_gpu else int(process))
            if other.fits:
                return other, change
            tried.append((other.peak_bytes, other, change))
    best = min(tried, key=lambda item: item[0], default=None)
    return (best[1], best[2]) if best and best[0] < 0.99 * made.peak_bytes else None


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
