"""Going on: which checkpoint a run starts from, and whether it is still the same run.

In: what stands in the output folder, `--resume-from`, the config and data of now. Out: a checkpoint that verifies, or None for a
new run, and lines that say what was found and what is done. A damaged checkpoint is named and skipped. Where data, template,
base model or a setting that changes the mathematics differ from the checkpoint's, the run is refused with the list,
unless `--accept-changes`. A longer run is the same run: its learning rate goes on by the longer schedule, and that is said.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable

from emergency_kit.artifacts import hash_parent, hardware, load_manifest, package_versions, redact, verify_folder
from emergency_kit.config import Config, Resolved, flatten
from emergency_kit.data.tokenize import TokenRows
from emergency_kit.errors import ModelError, UsageError
from emergency_kit.model.backend import base_name, check_checkpoint
from emergency_kit.training import sharding
from emergency_kit.training.checkpoint import NAME, find_newest, list_checkpoints, load_training_state
from emergency_kit.training.schedule import learning_rate

LATEST = Path("latest")
# Settings of `model`, `lora` and `training` that leave the mathematics alone: where things go, how often something is looked at.
NEUTRAL = {"model.name", "model.device", "training.output_dir", "training.model_name", "training.logging_steps", "training.eval_steps", "training.save_steps",
           "training.save_total_limit", "training.save_retries", "training.save_retry_seconds", "training.report_to", "training.per_device_eval_batch_size",
           "training.eval_strategy", "training.save_strategy", "training.early_stopping_patience", "training.early_stopping_threshold",
           "training.load_best_model_at_end", "training.rank_timeout_seconds", "training.metric_for_best_model", "training.best_samples", "training.max_gpu_memory_gb"}
# These only change how sums are rounded: the run goes on, and it is said that bits will differ.
ROUNDING = {"model.attn_implementation", "model.backend", "training.engine", "training.prefix_sharing", "training.gradient_checkpointing", "training.int8_backward"}
# Compared by what they lead to: tokens, effective batch, number of steps.
DERIVED = {"model.max_seq_length", "model.revision", "training.per_device_train_batch_size", "training.gradient_accumulation_steps", "training.keep_effective_batch",
           "training.num_epochs", "training.max_steps", "lora.adapter"}


@dataclass
class Start:
    """Where a run begins. checkpoint: None for a new one; state: its training_state.json; stale: checkpoints of earlier runs that
    go once the new run has one."""

    checkpoint: Path | None = None
    state: dict[str, Any] = field(default_factory=dict)
    stale: list[Path] = field(default_factory=list)


def choose(resolved: Resolved, resume_from: Path | None, overwrite: bool, run_id: str | None, say: Callable[[str], None]) -> Start:
    """The start of a run; nothing is changed on the disk.

    run_id: of the run that the output folder belongs to; checkpoints of others are not gone on from unasked. Raises UsageError where
    a finished model, or another model's unfinished run, is in the way; ModelError for a named checkpoint that cannot be used.
    """
    training = resolved.config.training
    folder = Path(training.output_dir) / "checkpoints"
    final = folder / training.model_name
    if NAME.match(final.name) or final.name == LATEST.name:
        raise UsageError(f"--model-name {final.name}: reserved for mid-run checkpoints; choose another name")
    if final.exists() and not overwrite:
        raise UsageError(f"a finished model is already in {final}; name another with --model-name NAME, go on from a checkpoint with "
                         "--resume-from CKPT --model-name NAME, or replace it with --overwrite")
    earlier = list_checkpoints(folder)
    if resume_from is not None and resume_from != LATEST:
        return _named(resolved, resume_from)
    if resume_from is None and overwrite:
        return Start(stale=earlier)
    mine = [path for path in earlier if run_id is None or _run_of(path) in (run_id, None)]
    whole, damaged = find_newest(mine)
    for path, problems in damaged:
        say(f"Checkpoint {path} is damaged ({'; '.join(problems[:3])}) and is skipped")
    if resume_from == LATEST:
        if whole is None:
            raise UsageError(f"--resume-from latest: none of the {len(mine)} checkpoints in {folder} is whole; begin anew without --resume-from")
        say(f"The newest checkpoint that verifies is {whole}")
        return _named(resolved, whole)
    if whole is None:
        if damaged:
            say("No checkpoint is whole: the run begins anew; the damaged ones go once it has saved one")
        return Start(stale=earlier)
    state = load_training_state(whole)
    if (folder / str(state.get("model_name", "final"))).exists():
        return Start(stale=earlier)
    if state.get("model_name", "final") != training.model_name:
        raise UsageError(f"an unfinished run of model {state.get('model_name')} is in {folder}; go on with --resume-from {whole}, or begin anew with --overwrite "
                         "(its checkpoints go once the new run has saved one), or choose another --output-dir")
    say(f"Found an unfinished run of model {training.model_name}: going on from {whole} (step {state['step']} of {state.get('max_steps')}); "
        "--overwrite begins anew instead")
    return _named(resolved, whole)


def _named(resolved: Resolved, folder: Path) -> Start:
    return Start(folder, check_resumable(folder, resolved))


def _run_of(path: Path) -> str | None:
    """Id of the run that wrote a checkpoint; None where it does not say, or cannot be read (it will not verify)."""
    try:
        return load_training_state(path).get("run_id")
    except ModelError:
        return None


def check_resumable(folder: Path, resolved: Resolved) -> dict[str, Any]:
    """The training state of a checkpoint that a run can go on from; raises ModelError with the reason otherwise."""
    if not folder.is_dir():
        raise ModelError(f"--resume-from {folder}: no such folder; --resume-from latest takes the newest that is whole")
    problems = verify_folder(folder)
    if problems:
        whole, _ = find_newest([path for path in list_checkpoints(folder.parent) if path != folder])
        raise ModelError(f"--resume-from {folder}: damaged, {'; '.join(problems)}; use another checkpoint in {folder.parent}"
                         + (f", the newest whole one is {whole}" if whole else ""))
    full = resolved.config.training.finetuning_type == "full"
    manifest = load_manifest(folder) or {"files": {}, "stage": ""}
    if check_checkpoint(folder, resolved.config.model) != "adapter" and manifest["stage"] != "train":
        raise ModelError(f"--resume-from {folder}: a full model, not a training checkpoint; name a checkpoint-N folder")
    if full != ("adapter_config.json" not in manifest["files"]):
        raise ModelError(f"--resume-from {folder}: a checkpoint of {'LoRA' if full else 'full'} fine-tuning, but training.finetuning_type is "
                         f"{resolved.config.training.finetuning_type}; set it to {'lora' if full else 'full'}, or begin anew with --overwrite")
    if not {sharding.OPTIMIZER, f"{sharding.SHARDED_OPTIMIZER}/.metadata"} & set(manifest["files"]):
        raise ModelError(f"--resume-from {folder}: a finished model without optimizer state; name a checkpoint-N folder in {folder.parent}")
    return load_training_state(folder)


def build_identity(resolved: Resolved, rows: dict[str, TokenRows], tokenizer: Any, plan: dict[str, Any]) -> dict[str, Any]:
    """What a resumed run must share: hashes of tokens, template and base model, and the rows of a step."""
    return {"training tokens": rows["train"].digest(), "training rows": len(rows["train"]) if isinstance(rows["train"], TokenRows) else "streamed", "validation tokens": rows["validation"].digest(),
            "chat template": hashlib.sha256(str(tokenizer.chat_template).encode()).hexdigest()[:16],
            "base model": hash_parent(Path(base_name(resolved.config.model))), "effective batch": plan["effective_batch"],
            **({"first adapter": hash_parent(Path(resolved.config.lora.adapter))} if resolved.config.lora.adapter else {})}


def check_same(start: Start, resolved: Resolved, identity: dict[str, Any], steps: int, accept: bool, say: Callable[[str], None]) -> None:
    """Refuse to go on where the run is not the same any more; say what is different without harm.

    steps: of the whole run by now's config. Raises UsageError with every difference, unless `accept`.
    """
    folder, state = start.checkpoint, start.state
    manifest = load_manifest(folder) or {}
    if state["step"] > steps:
        raise UsageError(f"--resume-from {folder}: already at step {state['step']} of {steps}; raise --set training.num_epochs")
    changes = [f"{name}: {_short(old)} -> {_short(identity[name])}" for name, old in state.get("identity", {}).items() if name in identity and identity[name] != old]
    data_changed = bool(changes)
    rounding = []
    was, now = manifest.get("config", {}), redact(resolved.config.model_dump())
    defaults = flatten(Config())
    for section in ("dataset", "model", "lora", "training"):
        for key, value in now[section].items():
            # A checkpoint from before there was such a key was made with its default.
            name = f"{section}.{key}"
            old = was.get(section, {}).get(key, defaults[name])
            if old == value or name in NEUTRAL | DERIVED or (section == "dataset" and not data_changed):
                continue
            (rounding if name in ROUNDING else changes).append(f"{name}: {old} -> {value}")
    planned = state.get("max_steps") or steps
    if steps < planned:
        changes.append(f"steps of the run: {planned} -> {steps}, so the learning rate would fall faster")
    if changes and not accept:
        raise UsageError(f"{folder} was made by another run; differences: {'; '.join(changes)}. Undo them, begin anew with --overwrite, "
                         "or go on all the same with --accept-changes")
    for change in changes:
        say(f"Accepted change: {change}")
    if rounding:
        say(f"Going on with other rounding, not bit for bit: {'; '.join(rounding)}")
    if steps > planned:
        say(_longer(resolved, state["step"], planned, steps))
    _say_machine(manifest, say)


def _short(value: Any) -> str:
    return str(value)[:16]


def _longer(resolved: Resolved, step: int, planned: int, steps: int) -> str:
    before, after = (learning_rate(resolved.config.training, step, total) for total in (planned, steps))
    return (f"The run is longer than it was planned: {steps} steps instead of {planned}. From here the learning rate follows the "
            f"{resolved.config.training.lr_scheduler_type} schedule of the longer run: {after:.2e} at the next step, where the shorter one had {before:.2e}")


def _say_machine(manifest: dict[str, Any], say: Callable[[str], None]) -> None:
    """Another machine or version goes on, but not to the same bits."""
    versions, machine = manifest.get("packages", {}), manifest.get("hardware", {})
    now, here = package_versions(), hardware()
    other = [f"{name} {old} -> {now.get(name, 'missing')}" for name, old in versions.items() if now.get(name) != old]
    other += [f"{name}: {machine.get(name)} -> {here[name]}" for name in ("processor", "cores", "gpus") if name in machine and machine[name] != here[name]]
    if other:
        say(f"The checkpoint comes from another machine or other versions; the run goes on, not bit for bit: {'; '.join(other)}")
