"""The stage `train`: config -> `<output_dir>/checkpoints/<model_name>/`.

Order: check everything that can be checked without loading, load data, load model, train, save.
An existing finished model or an unfinished run is never overwritten unasked. Ctrl-C saves a
checkpoint and says how to go on. Run: `make train`, `python scripts/train.py --help`.
"""

from __future__ import annotations

import contextlib
import math
import os
import resource
import sys
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from emergency_kit.artifacts import check_writable, hash_json, load_manifest
from emergency_kit.config import Resolved
from emergency_kit.data.load import Split, open_splits
from emergency_kit.errors import Interrupted, TrainingError, UsageError
from emergency_kit.model.backend import base_name, pick_device, require_base

if TYPE_CHECKING:
    from emergency_kit.data.tokenize import TokenRows

# An adapter of rank 16 on 135M parameters with its optimizer state is 60 MB; two or three stand at a time.
SPACE_BYTES = 300_000_000


def train(resolved: Resolved, resume_from: Path | None = None, overwrite: bool = False, dry_run: bool = False) -> Path:
    """Train adapters and return the finished model's folder.

    Raises UsageError for an output that is in the way or not writable, DataError, ModelError,
    TrainingError, and Interrupted after a stop that saved a checkpoint.
    """
    console = Console(highlight=False, soft_wrap=True, markup=False)
    training = resolved.config.training
    folder = Path(training.output_dir) / "checkpoints"
    final = folder / training.model_name
    console.print(f"Device: {pick_device(resolved.config.model)}; base model: {base_name(resolved.config.model)}")
    require_base(resolved.config.model)
    if not dry_run:
        stale = _check_output(folder, final, resume_from, overwrite)
        check_writable(folder, SPACE_BYTES)
    splits = open_splits(resolved, "train", "validation")
    rows = _load_rows(resolved, splits)
    plan = plan_steps(resolved, len(rows["train"]))
    console.print(f"Plan: {len(rows['train'])} training and {len(rows['validation'])} validation records, "
                  f"effective batch {plan['effective_batch']}, {plan['steps']} steps over {plan['epochs']:g} epochs")
    if dry_run:
        console.print("Dry run: no model was loaded, and nothing written beyond the dataset and its tokens.")
        return final
    return _run(resolved, rows, _data_hash(splits), plan, console, final, resume_from, stale)


def _load_rows(resolved: Resolved, splits: dict[str, Split]) -> dict[str, TokenRows]:
    from emergency_kit.data.cache import load_rows
    from emergency_kit.model.backend import load_tokenizer

    tokenizer = load_tokenizer(resolved.config.model)
    return {name: load_rows(split, tokenizer, resolved) for name, split in splits.items()}


def _data_hash(splits: dict[str, Split]) -> str:
    return hash_json([split.digest() for split in splits.values()])


def _check_output(folder: Path, final: Path, resume_from: Path | None, overwrite: bool) -> list[Path]:
    """Refuse to overwrite unasked; return mid-run checkpoints of earlier runs that may go."""
    from emergency_kit.training.checkpoint import NAME, list_checkpoints

    if NAME.match(final.name):
        raise UsageError(f"--model-name {final.name}: reserved for mid-run checkpoints; choose another name")
    if final.exists() and not overwrite:
        raise UsageError(f"a finished model is already in {final}; name another with --model-name NAME, go on from a checkpoint with "
                         "--resume-from CKPT --model-name NAME, or replace it with --overwrite")
    if resume_from:
        return []
    earlier = list_checkpoints(folder)
    unfinished = [path for path in earlier if _is_unfinished(path)]
    if unfinished and not overwrite:
        raise UsageError(f"an unfinished run is in {folder}; go on with --resume-from {unfinished[-1]}, or begin anew with --overwrite "
                         "(its checkpoints go once the new run has saved one), or choose another --output-dir")
    return earlier


def _is_unfinished(path: Path) -> bool:
    """Whether the run that wrote a checkpoint left no finished model; a damaged folder counts as finished."""
    from emergency_kit.errors import ModelError
    from emergency_kit.training.checkpoint import load_training_state

    try:
        state = load_training_state(path)
    except ModelError:
        return False
    return not (path.parent / state.get("model_name", "final")).exists()


def plan_steps(resolved: Resolved, rows: int) -> dict[str, Any]:
    """Effective batch, optimizer steps and epochs of a run, as the Trainer will count them."""
    training = resolved.config.training
    world = int(os.environ.get("WORLD_SIZE", "1"))
    micro_batches = math.ceil(math.ceil(rows / world) / training.per_device_train_batch_size)
    steps_per_epoch = max(1, math.ceil(micro_batches / training.gradient_accumulation_steps))
    steps = training.max_steps or math.ceil(training.num_epochs * steps_per_epoch)
    return {"effective_batch": training.per_device_train_batch_size * training.gradient_accumulation_steps * world,
            "steps_per_epoch": steps_per_epoch, "steps": steps, "epochs": steps / steps_per_epoch}


def _run(resolved: Resolved, rows: dict[str, TokenRows], data_hash: str, plan: dict[str, Any], console: Console, final: Path,
         resume_from: Path | None, stale: list[Path]) -> Path:
    from emergency_kit.training import callbacks

    callbacks.open_log(Path(resolved.config.training.output_dir) / "logs", console)
    try:
        with callbacks.StopCallback() as stop:
            callbacks.LOG.info("Starting training...")
            return _train(resolved, rows, data_hash, plan, console, final, resume_from, stale, stop)
    except BaseException as error:
        callbacks.LOG.error("Training stopped: %s", str(error) or type(error).__name__) if not isinstance(error, Interrupted) else None
        raise
    finally:
        callbacks.close_log()


def _train(resolved: Resolved, rows: dict[str, TokenRows], data_hash: str, plan: dict[str, Any], console: Console, final: Path,
           resume_from: Path | None, stale: list[Path], stop: Any) -> Path:
    from emergency_kit.model.backend import load_for_training
    from emergency_kit.training import callbacks, checkpoint, loss
    from emergency_kit.training.trainer import KitTrainer, RowDataset

    config, training = resolved.config, resolved.config.training
    state = checkpoint.check_resumable(resume_from, config.model) if resume_from else None
    if state and state["step"] >= plan["steps"]:
        raise UsageError(f"--resume-from {resume_from}: already at step {state['step']} of {plan['steps']}; raise --set training.num_epochs")
    loaded = load_for_training(config.model, config.lora, training.gradient_checkpointing, training.seed)
    loss.install(loaded.model.get_base_model())
    facts = checkpoint.RunFacts(
        resolved=resolved, dataset_hash=data_hash, tokenizer=loaded.tokenizer,
        rows=len(rows["train"]), step_rows=plan["effective_batch"], resumed_from=resume_from, stale=stale)
    if state:
        facts.tokens_seen, facts.supervised_tokens_seen = state["tokens_seen"], state["supervised_tokens_seen"]
        facts.step_seconds, facts.earlier_seconds = state["step_seconds"], state["wall_seconds"]
    for note in loaded.notes:
        callbacks.LOG.info("Model: %s", note)
    callbacks.LOG.info("Training %s tokens an epoch, %s of them supervised", f"{len(rows['train'].ids):,}", f"{rows['train'].supervised:,}")
    screen = callbacks.ConsoleCallback(console)
    try:
        trainer = KitTrainer(
            model=loaded.model, args=_arguments(resolved, final.parent), train_dataset=RowDataset(rows["train"]),
            eval_dataset=RowDataset(rows["validation"]), facts=facts, pad_id=loaded.tokenizer.pad_token_id, callbacks=[screen, stop])
        _silence(trainer)
        trainer.train(resume_from_checkpoint=str(resume_from) if resume_from else None)
    finally:
        screen.close()
    if stop.requested and trainer.state.global_step < trainer.state.max_steps:
        reached = final.parent / f"checkpoint-{trainer.state.global_step}"
        raise Interrupted(f"stopped at step {trainer.state.global_step}/{trainer.state.max_steps}, saved to {reached}; "
                          f"go on with the same command and --resume-from {reached}")
    return _finish(trainer, final)


def _arguments(resolved: Resolved, folder: Path) -> Any:
    import torch
    from transformers import TrainingArguments

    from emergency_kit.model.backend import pick_device, pick_dtype

    training = resolved.config.training
    device = pick_device(resolved.config.model)
    dtype = pick_dtype(resolved.config.model, device)
    try:
        return TrainingArguments(
            output_dir=str(folder), num_train_epochs=training.num_epochs, max_steps=training.max_steps or -1,
            learning_rate=training.learning_rate, per_device_train_batch_size=training.per_device_train_batch_size,
            per_device_eval_batch_size=training.per_device_eval_batch_size, gradient_accumulation_steps=training.gradient_accumulation_steps,
            warmup_steps=training.warmup_steps, lr_scheduler_type=training.lr_scheduler_type, weight_decay=training.weight_decay,
            max_grad_norm=training.max_grad_norm, optim=training.optim, logging_steps=training.logging_steps, logging_strategy="steps",
            logging_first_step=True, logging_nan_inf_filter=False, eval_strategy="steps", eval_steps=training.eval_steps,
            save_strategy="steps", save_steps=training.save_steps, save_total_limit=training.save_total_limit, seed=training.seed,
            bf16=dtype == torch.bfloat16, fp16=dtype == torch.float16, use_cpu=device == "cpu", report_to=list(training.report_to) or "none",
            run_name=training.model_name, remove_unused_columns=False, disable_tqdm=True, dataloader_pin_memory=device == "cuda",
            # Checkpointing is switched on by the backend, on the model itself.
            gradient_checkpointing=False)
    except (ValueError, ImportError) as error:
        raise TrainingError(f"training settings: {str(error).splitlines()[0]}") from None


def _silence(trainer: Any) -> None:
    """Leave the console to our own lines."""
    from transformers import PrinterCallback
    from transformers.utils import logging

    trainer.remove_callback(PrinterCallback)
    logging.set_verbosity_error()
    warnings.filterwarnings("ignore", module=r"torch\.|transformers\.|peft\.|accelerate\.")


def _finish(trainer: Any, final: Path) -> Path:
    from emergency_kit.training import callbacks, checkpoint

    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    if not losses or not math.isfinite(losses[-1]):
        raise TrainingError(f"the loss is {losses[-1] if losses else 'missing'} after {trainer.state.global_step} steps; lower training.learning_rate "
                            "and look at the data; no final model was written")
    if not any(entry.get("step") == trainer.state.global_step and "eval_loss" in entry for entry in trainer.state.log_history):
        trainer.evaluate()
    facts = trainer.facts
    validation = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    summary = {
        "wall_seconds": round(facts.wall_seconds, 1), "tokens_per_second": round(facts.tokens_seen / facts.step_seconds, 1),
        "tokens": facts.tokens_seen, "supervised_tokens": facts.supervised_tokens_seen,
        "first_loss": losses[0], "last_loss": losses[-1], "first_validation_loss": validation[0], "last_validation_loss": validation[-1],
        "peak_memory_bytes": peak_memory_bytes()}
    with checkpoint.writing(trainer, final, summary):
        pass
    say = callbacks.LOG.info
    say("Training completed!")
    say(f"Time {time.strftime('%H:%M:%S', time.gmtime(summary['wall_seconds']))}, {summary['tokens_per_second']:.0f} tokens/s, "
        f"{summary['supervised_tokens']:,} supervised tokens, peak memory {summary['peak_memory_bytes'] / 1e9:.2f} GB")
    say(f"Loss {losses[0]:.4f} -> {losses[-1]:.4f}, validation loss {validation[0]:.4f} -> {validation[-1]:.4f}")
    say(f"Final checkpoint saved to: {final}")
    return final


def peak_memory_bytes() -> int:
    """Most memory this process held: video memory on a GPU, else resident memory."""
    with contextlib.suppress(ImportError):
        import torch

        if torch.cuda.is_available():
            return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def is_trained_as(resolved: Resolved, folder: Path) -> bool:
    """Whether a finished model was trained with this config on this data (settings of later stages aside)."""
    manifest = load_manifest(folder)
    if manifest is None or manifest.get("stage") != "train":
        return False
    splits = open_splits(resolved, "train", "validation")
    wanted = resolved.config.model_dump()
    return manifest["dataset_hash"] == _data_hash(splits) and all(
        manifest["config"].get(section) == wanted[section] for section in ("dataset", "model", "lora", "training"))
