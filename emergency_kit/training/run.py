"""The stage `train`: config -> `<output_dir>/checkpoints/<model_name>/`.

Order: check everything that can be checked without loading, load data, load model, train, save.
A finished model is never overwritten unasked, and an unfinished run is gone on with. Ctrl-C saves a
checkpoint and says how to go on. Run: `make train`, `python scripts/train.py --help`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.util
import math
import os
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Iterator

from rich.console import Console

from emergency_kit.artifacts import hash_json, load_manifest, redact, verify_folder
from emergency_kit.config import Resolved
from emergency_kit.data.load import Split, open_splits
from emergency_kit.errors import Interrupted, TrainingError, UsageError
from emergency_kit.files import check_writable, folder_bytes, remove_leftovers
from emergency_kit.model.backend import base_name, beyond_unsloth, choose, load_tokenizer, peak_memory_bytes, pick_device, require_base
from emergency_kit.model.imports import import_transformers
from emergency_kit.training import checkpoint, lock, ranks, resume, sharding, zero
from emergency_kit.training.best import best_evaluation, validation_history
from emergency_kit.training.engine import PROJECT, beyond_plain_loss, causal_lm_of
from emergency_kit.training.plan import plan as say_plan
from emergency_kit.training.schedule import check_schedule, pass_rows, passes, step_rows
from emergency_kit.training.stopping import Stop, StopRequested

Scorer = Callable[[Resolved, Any], Callable[[Any, Callable[[], None]], dict[str, float]]]
# Two or three checkpoints stand at a time.
SPACE_BYTES = 3 * checkpoint.FIRST_BYTES


def train(resolved: Resolved, resume_from: Path | None = None, overwrite: bool = False, dry_run: bool = False, accept_changes: bool = False,
          scorer: Scorer | None = None, rising_from: float | None = None) -> Path:
    """Train adapters and return the finished model's folder.

    resume_from: a checkpoint's folder, or `latest`. Without it an unfinished run of the same model is gone on with, unless
    `overwrite`. accept_changes: go on though data or settings differ from the checkpoint's. scorer: makes, of config and tokenizer, what measures a model for
    `training.metric_for_best_model` (`evaluation.during_training.build_scorer`). rising_from: the learning rate rises from
    here to the config's over the whole run, evenly in its logarithm (a range test). Raises UsageError for an output that is in
    the way, in use or not writable, DataError, ModelError, TrainingError, and Interrupted after a stop that saved a checkpoint.
    """
    console = Console(highlight=False, soft_wrap=True, markup=False, quiet=not ranks.is_first())
    config = resolved.config
    sharding.check(config)
    zero.check(config)
    # Before anything imports transformers, which Unsloth patches.
    choice = choose(config.model, beyond_plain_loss(config.training) or beyond_unsloth(config.model, config.lora, config.training.finetuning_type == "full"))
    console.print(f"Device: {choice.device}; backend: {choice.name} ({choice.reason}); base model: {base_name(config.model)}")
    if choice.device == "cuda" and ranks.world() == 1:
        import torch

        if (number := torch.cuda.device_count()) > 1:
            console.print(f"{number} GPUs are here and one process takes one of them; all of them: make train NPROC={number}")
    require_base(config.model)
    require_trackers(list(resolved.config.training.report_to))
    output = Path(resolved.config.training.output_dir)
    if dry_run:
        run = _prepare(resolved, resume_from, overwrite, accept_changes, None, console)
        if resolved.config.training.method == "sft":
            say_plan(resolved, rows=None if config.dataset.streaming else run.rows)
        console.print("Dry run: no model was loaded, and nothing written beyond the dataset and its tokens.")
        return resolved.finished_model
    if ranks.is_first():
        check_writable(output / "checkpoints")
    ranks.join(pick_device(config.model), config.training.rank_timeout_seconds)
    with lock.hold(output, console.print) if ranks.is_first() else contextlib.nullcontext() as record:
        if ranks.is_first():
            remove_leftovers(output / "checkpoints")
        run = ranks.first_then_others(lambda: _prepare(resolved, resume_from, overwrite, accept_changes, record, console), "preparing data",
                                      config.training.rank_timeout_seconds)
        run.scorer, run.rising_from = scorer, rising_from
        final = _run(run)
        ranks.wait("the end", config.training.rank_timeout_seconds)
        return final


@dataclass
class _Run:
    """What a run is made of, before a model is loaded. record: None in a dry run, and on other ranks than the first."""

    resolved: Resolved
    rows: dict[str, Any]
    tokenizer: Any
    data_hash: str
    plan: dict[str, Any]
    start: resume.Start
    identity: dict[str, Any]
    record: lock.RunRecord | None
    console: Console
    scorer: Scorer | None = None
    rising_from: float | None = None

    @property
    def final(self) -> Path:
        return self.resolved.finished_model


def _prepare(resolved: Resolved, resume_from: Path | None, overwrite: bool, accept_changes: bool, record: lock.RunRecord | None, console: Console) -> _Run:
    import_transformers()
    from emergency_kit.data.cache import load_rows
    from emergency_kit.data.pairs import load_pairs
    from emergency_kit.data.stream import StreamRows, check_streaming
    from emergency_kit.training.health import foresee

    streaming = resolved.config.dataset.streaming
    if streaming:
        check_streaming(resolved)
    start = resume.choose(resolved, resume_from, overwrite, record.run_id if record else lock.known_run(resolved.config.training.output_dir), console.print)
    if record:
        # A save stands beside the one before it; a resumed run knows how large they are.
        check_writable(Path(resolved.config.training.output_dir) / "checkpoints", 2 * folder_bytes(start.checkpoint) if start.checkpoint else SPACE_BYTES)
    splits = open_splits(resolved, "train", "validation")
    tokenizer = load_tokenizer(resolved.config.model)
    rows = {name: load_pairs(split, tokenizer, resolved, name) if resolved.config.training.method == "dpo" else load_rows(split, tokenizer, resolved)
            for name, split in splits.items() if not streaming or name != "train"}
    if streaming:
        rows["train"] = StreamRows(splits["train"], tokenizer, resolved, step_rows(resolved.config.training) * ranks.world(), start.state.get("stream"), ranks.rank(), ranks.world())
        console.print(rows["train"].describe())
    plan = plan_steps(resolved, len(rows["train"]))
    check_schedule(resolved.config, plan["steps"])
    config, kind = resolved.config.training, "pairs" if resolved.config.training.method == "dpo" else "records"
    console.print(f"Plan: {'a stream of' if streaming else len(rows['train'])} training and {len(rows['validation'])} validation {kind}, "
                  f"effective batch {plan['effective_batch']} ({pass_rows(config)} rows x {passes(config)} passes x {ranks.world()} {'process' if ranks.world() == 1 else 'processes'}), "
                  f"{plan['steps']} steps" + ("" if streaming else f" over {plan['epochs']:g} epochs"))
    for warning in foresee(resolved.config.training, plan["steps"]) if record else ():  # a dry run's plan says them, too
        console.print(f"Warning: {warning}")
    # The first alone compares and writes it, and asks for the size and time of every file of a stream.
    identity = resume.build_identity(resolved, rows, tokenizer, plan) if ranks.is_first() else {}
    if start.checkpoint:
        resume.check_same(start, resolved, identity, plan["steps"], accept_changes, console.print)
    return _Run(resolved, rows, tokenizer, _data_hash(splits) if ranks.is_first() else "", plan, start, identity, record, console)


def _data_hash(splits: dict[str, Split]) -> str:
    return hash_json([split.digest() for split in splits.values()])


def require_trackers(report_to: list[str]) -> None:
    """Raise TrainingError for a tracker whose package is missing, or cannot be imported."""
    missing = [name for name in report_to if importlib.util.find_spec(name) is None]
    if missing:
        raise TrainingError(f"training.report_to: {', '.join(missing)} not installed; next: pip install '.[track]', or leave it out")
    for name in report_to:
        try:
            importlib.import_module(name)
        except (ImportError, TypeError) as error:  # protobuf says with a TypeError that a package is too old for it
            raise TrainingError(f"training.report_to: {name} is installed but cannot be imported ({error}); next: pip install '.[track]' anew, or leave it out") from None


@contextlib.contextmanager
def placed_trackers(logs: Path) -> Iterator[None]:
    """Trackers write beside the log, under the kit's name, unless the environment says otherwise; it is as before afterwards."""
    folder = logs.absolute()
    wanted = {"TENSORBOARD_LOGGING_DIR": folder / "tensorboard", "WANDB_DIR": folder, "WANDB_PROJECT": PROJECT, "MLFLOW_TRACKING_URI": f"sqlite:///{folder / 'mlflow.db'}",
              "MLFLOW_EXPERIMENT_NAME": PROJECT, "TRACKIO_DIR": folder / "trackio"}
    mine = {name: str(value) for name, value in wanted.items() if name not in os.environ}
    os.environ.update(mine)
    try:
        yield
    finally:
        for name in mine:
            os.environ.pop(name, None)


def plan_steps(resolved: Resolved, rows: int) -> dict[str, Any]:
    """Effective batch, optimizer steps and epochs of a run, as the Trainer will count them."""
    training = resolved.config.training
    world = ranks.world()
    steps_per_epoch = max(1, math.ceil(rows / (step_rows(training) * world)))
    steps = training.max_steps or math.ceil(training.num_epochs * steps_per_epoch)
    return {"effective_batch": step_rows(training) * world, "steps_per_epoch": steps_per_epoch, "steps": steps, "epochs": steps / steps_per_epoch}


def _run(run: _Run) -> Path:
    from emergency_kit.training import callbacks

    logs = Path(run.resolved.config.training.output_dir) / "logs"
    callbacks.open_log(logs, run.console)
    try:
        with Stop() as stop, placed_trackers(logs):
            callbacks.LOG.info("Starting training...")
            return _train(run, stop)
    except BaseException as error:
        gone = ranks.lost(error)
        if not isinstance(error, Interrupted):
            callbacks.LOG.error("Error: training stopped: %s", gone or str(error) or type(error).__name__)
        if gone:
            raise TrainingError(gone) from error
        raise
    finally:
        callbacks.close_log()


def _train(run: _Run, stop: Stop) -> Path:
    from emergency_kit.model.backend import load_for_training
    from emergency_kit.training import callbacks, engine, fit, workload
    from emergency_kit.training.batches import RowDataset
    from emergency_kit.training.curves import CurvesCallback
    from emergency_kit.training.first_try import is_plenty, try_longest
    from emergency_kit.training.health import HealthCallback
    from emergency_kit.training.ledger import open_ledger
    from emergency_kit.training.preference import PairDataset
    from emergency_kit.training.resumed import RunEnded
    from emergency_kit.training.trainer import KitTrainer

    config, training, state = run.resolved.config, run.resolved.config.training, run.start.state
    model, rows = config.model, run.rows
    if state.get("compute_type") and model.dtype == "auto":
        model = model.model_copy(update={"dtype": state["compute_type"]})
    if state and training.int8_backward == "auto" and not state.get("int8_backward"):
        training = training.model_copy(update={"int8_backward": False})
    resumed_first = _first_values(run.start.checkpoint) if config.lora.init != "default" else None
    loaded = load_for_training(model, config.lora, bool(training.gradient_checkpointing), training.seed, training.finetuning_type == "full",
                               needs=engine.beyond_plain_loss(training), first=resumed_first, sharded=ranks.is_sharded(), tokenizer=run.tokenizer)
    pass_rows = int(state.get("pass_rows") or 1) if training.per_device_train_batch_size == "auto" else training.per_device_train_batch_size
    # `auto` tries the longest rows there are, so that these are what a pass is measured in.
    row_tokens = int(rows["train"].lengths.max()) if training.per_device_train_batch_size == "auto" and training.method == "sft" else model.max_seq_length
    fused = engine.install_engine(loaded, training, pass_rows, row_tokens)
    if state.get("int8_backward") and not (fused and fused.in_integers):
        loaded.notes.append("gradients went back in int8 before and do not here: the run goes on, not bit for bit")
    if training.per_device_train_batch_size == "auto" and not state.get("pass_rows"):
        pass_rows = fit.fit_pass(loaded, training, fused, rows["train"], engine.compute_type(model))
    facts = checkpoint.RunFacts(
        resolved=run.resolved, dataset_hash=run.data_hash, tokenizer=loaded.tokenizer, identity=run.identity, run_id=run.record.begin(state.get("run_id")) if run.record else "",
        compute_type=str(engine.compute_type(model)).removeprefix("torch."), rows=len(rows["train"]), step_rows=run.plan["effective_batch"],
        int8_backward=bool(fused and fused.in_integers), resumed_from=run.start.checkpoint, stale=run.start.stale, place=checkpoint.place_of(run.final.parent), pieces=int(state.get("pieces", 1)),
        pass_rows=pass_rows, first=loaded.first)
    if state:
        facts.counters = checkpoint.Counters(**{field.name: state.get(field.name, field.default) for field in dataclasses.fields(checkpoint.Counters)})
        facts.earlier_seconds, facts.checkpoint_bytes = state["wall_seconds"], folder_bytes(run.start.checkpoint)
    for note in loaded.notes:
        callbacks.LOG.info("Model: %s", note)
    if not config.dataset.streaming:
        callbacks.LOG.info("Training %s tokens an epoch, %s of them supervised", f"{len(rows['train'].ids):,}", f"{rows['train'].supervised:,}")
    score = None
    if training.metric_for_best_model != "loss":
        if run.scorer is None:
            raise TrainingError(f"training.metric_for_best_model {training.metric_for_best_model}: train() was given no scorer; use emergency-kit train, or loss")
        score = run.scorer(run.resolved, loaded.tokenizer)
    load = None if training.method == "dpo" or config.dataset.streaming else workload.measure(
        rows, run.resolved, fused is not None, pick_device(model) == "cuda", fused.dtype.itemsize if fused else 0, run.plan["steps"], pass_rows)
    curves = CurvesCallback(run.final.parent.parent / "logs", run.final.name)
    screen, health = callbacks.ConsoleCallback(run.console), HealthCallback(causal_lm_of(loaded.model).config.vocab_size)
    dataset = PairDataset if training.method == "dpo" else RowDataset
    train_dataset = rows["train"] if config.dataset.streaming else dataset(rows["train"])
    if config.dataset.streaming and rows["train"].shares > 1:
        rows["train"].exchange = open_ledger(training.rank_timeout_seconds)
    try:
        trainer = KitTrainer(
            model=loaded.model, args=engine.training_arguments(run.resolved, run.final.parent, model, fused is not None, run.plan["steps"], pass_rows,
                                                                         loaded.owns_loss),
            train_dataset=train_dataset, eval_dataset=dataset(rows["validation"]), facts=facts, pad_id=loaded.tokenizer.pad_token_id, fused=fused,
            stop=stop, resumed=state, score=score, rising_from=run.rising_from, before_training=lambda trainer: load and (is_plenty(run.resolved, load, ranks.world()) or try_longest(trainer, load)),
            callbacks=[screen, health, curves])
        screen.trainer = health.trainer = trainer
        _silence(trainer)
        callbacks.guard_trackers(trainer)
        stop.running = True
        if training.method == "dpo":
            callbacks.LOG.info("Reference: what the model makes of every pair before it is trained")
            trainer.refer(trainer.train_dataset)
            trainer.refer(trainer.eval_dataset)
        with contextlib.suppress(RunEnded):
            trainer.train(resume_from_checkpoint=str(run.start.checkpoint) if run.start.checkpoint else None)
        return _finish(trainer, run.final)
    except StopRequested:
        raise _stopped(trainer) from None
    finally:
        screen.close()
        if curves.written:
            curves.write(trainer.state, running=False)


def _first_values(folder: Path | None) -> dict[str, Any] | None:
    from emergency_kit.model.adapters import load_difference

    if folder is None:
        return None
    if (load_manifest(folder) or {})["config"]["lora"].get("init", "default") == "default":
        raise UsageError(f"--resume-from {folder}: its adapters began at zero; lora.init cannot be changed on the way. Begin anew with --overwrite")
    return load_difference(folder)[1]


def _stopped(trainer: Any) -> Interrupted:
    """Save the last whole step and say how to go on."""
    reached, state = trainer.save_stopped(), trainer.state
    if reached is None:
        return Interrupted(f"stopped before the first {f'of {state.max_steps} steps' if state.max_steps else 'step'} was done; nothing to save, begin again with the same command")
    return Interrupted(f"stopped at step {state.global_step}/{state.max_steps}, saved to {reached}; go on with the same command, or name it with "
                       f"--resume-from {reached}")


def _silence(trainer: Any) -> None:
    """Leave the console to our own lines."""
    from transformers import PrinterCallback
    from transformers.utils import logging

    trainer.remove_callback(PrinterCallback)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module=r"torch\.|transformers\.|peft\.|accelerate\.")


def _finish(trainer: Any, final: Path) -> Path:
    from emergency_kit.training import callbacks

    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    if not losses or not math.isfinite(losses[-1]):
        raise TrainingError(f"the loss is {losses[-1] if losses else 'missing'} after {trainer.state.global_step} steps; lower training.learning_rate "
                            "and look at the data; no final model was written")
    if not any(entry.get("step") == trainer.state.global_step and "eval_loss" in entry for entry in trainer.state.log_history):
        trainer.evaluate()
    facts, counters = trainer.facts, trainer.facts.counters
    validation = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    weights_of = _take_best(trainer, final.parent)
    summary = {
        "wall_seconds": round(facts.wall_seconds, 1), "tokens_per_second": round(counters.tokens_seen / counters.step_seconds, 1),
        "tokens": counters.tokens_seen, "tokens_computed": counters.tokens_computed, "supervised_tokens": counters.supervised_tokens_seen,
        "first_loss": losses[0], "last_loss": losses[-1], "first_validation_loss": validation[0], "last_validation_loss": validation[-1],
        "weights_of_step": weights_of, "peak_memory_bytes": peak_memory_bytes()}
    checkpoint.save(trainer, final, summary=summary)
    say = callbacks.LOG.info
    say("Training completed!")
    say(f"Time {time.strftime('%H:%M:%S', time.gmtime(summary['wall_seconds']))}, {summary['tokens_per_second']:.0f} tokens/s, "
        f"{summary['supervised_tokens']:,} supervised tokens, peak memory {summary['peak_memory_bytes'] / 1e9:.2f} GB")
    say(f"Loss {losses[0]:.4f} -> {losses[-1]:.4f}, validation loss {validation[0]:.4f} -> {validation[-1]:.4f}")
    say(f"Final checkpoint saved to: {final}")
    return final


def _take_best(trainer: Any, folder: Path) -> int:
    """Under `load_best_model_at_end`, give the model the weights of the best evaluation; the step that its weights are of."""
    from emergency_kit.training import callbacks

    training, step = trainer.config, trainer.state.global_step
    entry = best_evaluation(validation_history(trainer.state), training.metric_for_best_model)
    if not training.load_best_model_at_end or entry is None or entry["step"] == step:
        return step
    saved = folder / f"checkpoint-{entry['step']}"
    if verify_folder(saved):
        callbacks.LOG.warning("The best evaluation was at step %d, but %s is not whole: the finished model has the last step's weights", entry["step"], saved)
        return step
    checkpoint.load_weights(trainer.accelerator.unwrap_model(trainer.model), saved, trainer.facts.first)
    callbacks.LOG.info("The finished model has the weights of step %d, of the best %s (%.4f)", entry["step"], training.metric_for_best_model,
                       entry[training.metric_for_best_model])
    return entry["step"]


def is_trained_as(resolved: Resolved, folder: Path) -> bool:
    """Whether a finished model was trained with this config on this data (settings of later stages aside)."""
    manifest = load_manifest(folder)
    if manifest is None or manifest.get("stage") != "train":
        return False
    splits = open_splits(resolved, "train", "validation")
    wanted = resolved.config.model_dump()
    return manifest["dataset_hash"] == _data_hash(splits) and all(
        manifest["config"].get(section) == redact(wanted[section]) for section in ("dataset", "model", "lora", "training"))
