"""The Transformers Trainer, subclassed once.

What it changes: rows of like length share a forward pass (or the whole optimizer step is one batch, where `fused` computes
it), the validation loss is a mean over tokens, a batch that does not fit into memory is divided, and a checkpoint is written whole
or not at all and pruned only after the new one verifies. A run that is stopped between two passes, or between two batches of
an evaluation, saves the state of its last whole step, so that the resumed run ends with the same bits.
Everything else, callbacks, trackers, resume, accelerate, is the Trainer's own.
"""

from __future__ import annotations

import contextlib
import copy
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable

import numpy as np
import torch
from torch.utils.data import DataLoader
from transformers import Trainer

from emergency_kit.artifacts import verify_folder
from emergency_kit.data.stream import StreamRows
from emergency_kit.data.tokenize import IGNORE
from emergency_kit.errors import TrainingError
from emergency_kit.training import best, checkpoint, end_to_end, preference, ranks, schedule, sharding, zero
from emergency_kit.training.batches import RankBatches, StepSampler, StreamBatches, collate
from emergency_kit.training.callbacks import LOG, BestCallback
from emergency_kit.training.engine import causal_lm_of
from emergency_kit.training.gauge import Gauge
from emergency_kit.training.randomness import random_states, set_random_states
from emergency_kit.training.resumed import RunCallback
from emergency_kit.training.stopping import StopRequested

if TYPE_CHECKING:
    from emergency_kit.training.fused.step import FusedStep
    from emergency_kit.training.stopping import Stop


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a GPU's or the computer's memory did not suffice."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))


class KitTrainer(Trainer):
    """See the file's opening. `facts` goes into every checkpoint's training_state.json and manifest; `stop` says when to end.

    resumed: training_state.json of the checkpoint that the run goes on from, empty for a new run. score: metrics of answers that the model
    generates, measured with every validation loss. rising_from: see `create_scheduler`. before_training: called once all is ready for the first
    step. evaluation_due: the last step is trained, its validation loss not yet measured. step_loss: of the step under way, as far as its
    passes are done; last_loss: of the last whole one. trying: rows are only tried for their memory. stops: how many ranks were asked to stop by the last
    batch; carried: the losses not logged yet, as a mean over ranks. groups: the optimizer's parameter groups, as they are before DeepSpeed divides them.
    """

    def __init__(self, *args: Any, facts: "checkpoint.RunFacts", stop: "Stop", pad_id: int, fused: "FusedStep | None" = None,
                 resumed: dict[str, Any] | None = None, score: Callable[[Any, Callable[[], None]], dict[str, float]] | None = None,
                 rising_from: float | None = None, before_training: "Callable[[KitTrainer], None]" = lambda trainer: None, **options: Any):
        def plain(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
            return collate(rows, pad_id)

        # Set before the Trainer's own beginning, which may already ask for what depends on it.
        self.facts, self.config, self.rising_from = facts, facts.resolved.config.training, rising_from
        self.unit = 2 if self.config.method == "dpo" else 1  # rows that stay together
        super().__init__(*args, data_collator=plain if self.unit == 1 else lambda pairs: preference.collate_pairs(pairs, plain, self.config.dpo_compare), **options)
        if self.is_fsdp_enabled:
            # Its policy would add up gradients, and round the loss, in bfloat16; autocast leaves both alone, as without FSDP.
            self.accelerator.state.fsdp_plugin.mixed_precision_policy = None
        self.stop, self.fused, self.resumed = stop, fused, resumed or {}
        self.before_training, self.trying, self.stops, self.carried = before_training, False, 0, 0.0
        self.evaluation_due, self.score = False, score
        self.step_loss, self.last_loss = torch.zeros((), device=self.args.device), float("nan")
        if fused is not None:
            # The whole step is one batch, which `fused` divides into passes: they pass for the Trainer's accumulation.
            fused.on_pass = self._on_pass
        self.gauge = Gauge(self.facts.counters.tokens_seen)
        self.model_accepts_loss_kwargs = True
        # The first label of a row belongs to the prompt and is IGNORE, so both ways of counting agree.
        self._loss_shifts_labels = True
        self.add_callback(BestCallback(self.config))
        self.add_callback(RunCallback(self))

    @property
    def exchanging(self) -> bool:
        """Whether something of the run is divided among the ranks (FSDP2, DeepSpeed), which exchange in every pass then, a tried one too."""
        return self.is_fsdp_enabled or self.is_deepspeed_enabled

    def _on_pass(self, done: int) -> None:
        if self.model.training:
            if done and not self.trying:
                self.callback_handler.on_substep_end(self.args, self.state, self.control)
            self.stop.check()

    def _get_train_sampler(self, train_dataset: Any = None) -> StepSampler:
        dataset = train_dataset if train_dataset is not None else self.train_dataset
        step_rows = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        self.sampler = StepSampler(dataset.rows.lengths, step_rows, self.args.seed)
        return self.sampler

    def get_train_dataloader(self) -> DataLoader:
        """The Trainer's own; of several ranks, this one's share of every step, which accelerate would fill up with rows taken twice; of a stream likewise."""
        if isinstance(self.train_dataset, StreamRows):
            world, rows = self.args.world_size, self.args.train_batch_size
            self.sampler = StreamBatches(self.args.max_steps, rows * self.args.gradient_accumulation_steps * world, rows, self.args.process_index, world)
            return DataLoader(self.train_dataset, batch_sampler=self.sampler, collate_fn=self.data_collator)
        if self.args.world_size == 1:
            return super().get_train_dataloader()
        batches = RankBatches(self._get_train_sampler(), self.args.train_batch_size, self.args.process_index, self.args.world_size)
        return DataLoader(self.train_dataset, batch_sampler=batches, collate_fn=self.data_collator)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """The Trainer's own; of several ranks, this one's share of every batch, as many as the others have (one may be without rows)."""
        if self.args.world_size == 1:
            return super().get_eval_dataloader(eval_dataset)
        size, world = self.args.eval_batch_size, self.args.world_size
        together = [range(len(self.eval_dataset))[start:start + size * world] for start in range(0, len(self.eval_dataset), size * world)]
        return DataLoader(self.eval_dataset, batch_sampler=[list(rows[self.args.process_index::world]) for rows in together], collate_fn=self.data_collator)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The Trainer's own, but in LoRA+'s groups where `lora.loraplus_lr_ratio` is set."""
        ratio = self.facts.resolved.config.lora.loraplus_lr_ratio
        if self.optimizer is not None:
            return super().create_optimizer(model)
        if ratio is None:
            super().create_optimizer(model)
        else:
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            self.optimizer = kind(schedule.group_parameters(self.model, self.get_decay_parameter_names(self.model), self.config, ratio), **options)
        self.groups = [dict(group) for group in self.optimizer.param_groups]
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The Trainer's own, or in a range test a rate that rises to the config's by the same factor at every step."""
        if self.rising_from is None or self.lr_scheduler is not None:
            return super().create_scheduler(num_training_steps, optimizer)
        ratio, last = self.rising_from / self.args.learning_rate, max(1, num_training_steps - 1)
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.optimizer, lambda step: ratio ** (1 - step / last))
        return self.lr_scheduler

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True) -> Any:
        """The compute type of a divided model, which accelerate does not give to its forward pass, and that under DeepSpeed, which it leaves to DeepSpeed."""
        if self.is_deepspeed_enabled:
            dtype = getattr(torch, self.facts.compute_type)
            return torch.autocast(self.args.device.type, dtype, enabled=dtype != torch.float32)
        return self.accelerator.autocast() if self.is_fsdp_enabled else super().autocast_smart_context_manager(cache_enabled)

    def _prepare_for_training(self, max_steps: int, train_dataloader: DataLoader, resume_from_checkpoint: str | None) -> tuple[Any, DataLoader]:
        """The Trainer's own; under DeepSpeed it goes on from DeepSpeed's checkpoints alone, so that the kit's is loaded around it."""
        if not self.is_deepspeed_enabled:
            return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        if resume_from_checkpoint is not None:
            self._load_from_checkpoint(resume_from_checkpoint)
        self.accelerator.gradient_accumulation_steps = self.args.gradient_accumulation_steps  # which accelerate does itself, with a warning
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        zero.limit_waiting(self.model_wrapped, self.config.rank_timeout_seconds)
        self._load_optimizer_and_scheduler(resume_from_checkpoint)
        return prepared

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self.facts.first is None and not self.exchanging:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            checkpoint.load_weights(self.model, Path(resume_from_checkpoint), self.facts.first)

    def _load_optimizer_and_scheduler(self, folder: str | None) -> None:
        if folder is None or (not self.exchanging and Path(folder, sharding.OPTIMIZER).is_file()):
            super()._load_optimizer_and_scheduler(folder)
        else:
            scheduler = torch.load(Path(folder, "scheduler.pt"), weights_only=True)
            if self.is_deepspeed_enabled:
                zero.load_optimizer(self.optimizer.optimizer, self.groups, sharding.read_optimizer(Path(folder)))
                scheduler = zero.without_empty_groups(scheduler, self.groups)
            else:
                sharding.load_optimizer(self.optimizer, Path(folder))
            self.lr_scheduler.load_state_dict(scheduler)

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        """Supervised tokens of a step over its passes and ranks; under DPO, pairs. One where a stream's rows were all dropped, for nothing to be divided by."""
        if self.unit == 1:
            return super()._get_num_items_in_batch(batch_samples, device).clamp(min=1)
        pairs = torch.tensor(sum(len(batch["input_ids"]) // 2 for batch in batch_samples), device=device)
        return self.accelerator.gather(pairs).sum()

    def refer(self, dataset: "preference.PairDataset") -> None:
        """Put into a dataset what the model, as it is now, makes of both answers of each pair. Draws no random number."""
        found, training, started = [], self.model.training, time.monotonic()
        self.model.eval()
        for index in range(len(dataset)):
            self.stop.check()
            batch = self._prepare_inputs(self.data_collator([dataset[index]]))
            del batch["reference"]
            with torch.no_grad(), self.accelerator.autocast():  # before training nothing has given the model's forward its own
                found.append(self.model(**batch)["log_probs"].cpu().numpy())
            if time.monotonic() - started > 15:
                started = time.monotonic()
                LOG.info("Reference: %d of %d pairs", index + 1, len(dataset))
        self.model.train(training)
        dataset.reference = np.stack(found)

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """Forward and backward of a batch, in `facts.pieces` parts. Where memory runs out, they are doubled and the batch is taken
        again from the same gradients and random states. Raises TrainingError when a single row does not fit."""
        self.stop.check()
        if self.stops:
            raise StopRequested
        if self.trying and self.is_deepspeed_enabled:
            num_items_in_batch = torch.tensor(float("inf"), device=self.args.device)  # it keeps gradients out of reach; these are all nought
        gradients, drawn = self._gradients(), random_states()
        computed = self.facts.counters.tokens_computed
        while True:
            started = time.perf_counter()
            try:
                loss = self._step_in_pieces(model, inputs, num_items_in_batch)
                break
            except (RuntimeError, MemoryError) as error:
                self._divide(error, inputs)
            # Outside of the handler, so that the failed pass's tensors are gone.
            self._put_back(gradients)
            set_random_states(drawn)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        counters = self.facts.counters
        supervised = int((inputs["labels"] != IGNORE).sum())
        seen = int(inputs["attention_mask"].sum()) if inputs["labels"].shape[1] > 1 else 0  # one of a single token stands for no row
        if self.trying:
            counters.tokens_seen, counters.supervised_tokens_seen = counters.tokens_seen + seen, counters.supervised_tokens_seen + supervised
        else:
            seen, supervised, computed_now, self.stops = map(int, ranks.total(seen, supervised, counters.tokens_computed - computed, self.stop.requested is not None))
            counters.tokens_seen += seen
            counters.supervised_tokens_seen += supervised
            counters.tokens_computed = computed + computed_now
        counters.step_seconds += time.perf_counter() - started
        self.step_loss = self.step_loss + loss.detach()
        return loss

    def _step_in_pieces(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any) -> torch.Tensor:
        parts, total = self._parts(inputs), None
        for number, part in enumerate(parts, 1):
            # Ranks exchange gradients once, with the last part; none when rows are only tried (but divided, when they would be kept within FSDP).
            if number == len(parts) and (not self.trying or self.is_fsdp_enabled):
                exchange = contextlib.nullcontext()
            else:
                exchange = zero.without_step(self.accelerator) if self.is_deepspeed_enabled else self.accelerator.no_sync(model)
            with exchange:
                loss = super().training_step(model, part, num_items_in_batch)
            if self.fused is not None:
                self.facts.counters.tokens_computed += self.fused.last_plan.tokens
            total = loss if total is None else total + loss
        return total

    def _gradients(self) -> list[torch.Tensor | None]:
        """Copies of the gradients gathered in this step so far: a few ten megabytes of adapters, 4 bytes a weight in full fine-tuning; none before
        the first pass."""
        return [parameter.grad.clone() if parameter.grad is not None else None for parameter in self.model.parameters() if parameter.requires_grad]

    def _put_back(self, gradients: list[torch.Tensor | None]) -> None:
        for parameter, gradient in zip((one for one in self.model.parameters() if one.requires_grad), gradients):
            parameter.grad = gradient.clone() if gradient is not None else None

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Validation loss: cross-entropy summed over all supervised tokens, divided by their number. Draws no random number."""
        self.evaluation_due = True
        self.mark()
        sums = torch.zeros(3, dtype=torch.float64)  # loss, what it is a mean over, pairs told apart
        training = self.model.training
        self.model.eval()
        for inputs in self.get_eval_dataloader(eval_dataset):
            self.stop.check()
            sums += torch.tensor(self._eval_batch(self._prepare_inputs(inputs)), dtype=torch.float64)
        scores = self._scores()
        self.model.train(training)
        set_random_states(self.boundary["random"])
        total, count, right = ranks.total(*sums.tolist())
        metrics = {f"{metric_key_prefix}_loss": total / count, **{f"{metric_key_prefix}_{name}": value for name, value in scores.items()}}
        if self.unit == 2:
            metrics[f"{metric_key_prefix}_preferred"] = right / count
        self.evaluation_due = False
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _scores(self) -> dict[str, float]:
        if self.score is None:
            return {}
        model = self.accelerator.unwrap_model(self.model)
        with end_to_end.set_aside(causal_lm_of(model)), self.compute_loss_context_manager():
            return self.score(model, self.stop.check)

    def _eval_batch(self, inputs: dict[str, Any]) -> tuple[float, int, int]:
        """`(summed loss, supervised tokens or pairs, pairs told apart)` of a batch, in more parts where memory runs out."""
        while True:
            total, count, right = 0.0, 0, 0
            try:
                for part in self._parts(inputs):
                    items = int((part["labels"][:, 1:] != IGNORE).sum()) if self.unit == 1 else len(part["labels"]) // 2
                    with torch.no_grad(), self.compute_loss_context_manager():
                        found = self.model(**part)
                    total += float(found["loss"]) * items
                    count += items
                    right += int(found.get("right", 0))
                return total, count, right
            except (RuntimeError, MemoryError) as error:
                self._divide(error, inputs)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def _parts(self, inputs: dict[str, Any]) -> list[dict[str, Any]]:
        rows = len(inputs["input_ids"])
        size = self.unit * -(-rows // self.unit // self.facts.pieces)
        return [{name: value[start:start + size] for name, value in inputs.items()} for start in range(0, rows, size)]

    def _divide(self, error: BaseException, inputs: dict[str, Any]) -> None:
        """Double the parts of a batch after memory ran out; any other error goes on its way."""
        if not is_out_of_memory(error):
            raise error
        rows, step = len(inputs["input_ids"]) // self.unit, self.state.global_step + 1
        if self.fused is not None and self.config.gradient_checkpointing == "auto" and self.fused.kept_layers:
            self.fused.keep_none()
            LOG.warning("Out of memory at step %d: no layer's activations are kept from here on", step)
            return
        if self.args.world_size > 1 and (not self.trying or self.exchanging):
            raise TrainingError(f"out of memory at step {step} on rank {self.args.process_index} of {self.args.world_size}, which cannot take a step again alone; lower "
                                "training.per_device_train_batch_size (and raise gradient_accumulation_steps as much); the same command goes on from the last checkpoint") from None
        if self.facts.pieces >= rows:
            raise TrainingError(f"out of memory at step {step} with a single row of up to {inputs['input_ids'].shape[1]} tokens; "
                                "lower model.max_seq_length, or switch on training.gradient_checkpointing") from None
        self.facts.pieces = min(rows, 2 * self.facts.pieces)
        LOG.warning("Out of memory %s: every batch is taken in %d parts from here on, the effective batch stays",
                    "with the longest rows, tried first" if self.trying else f"at step {step}", self.facts.pieces)

    def _maybe_log_save_evaluate(self, *args: Any, **options: Any) -> None:
        super()._maybe_log_save_evaluate(*args, **options)
        self.mark()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add throughput, memory and the GPU's state to what is logged, so that trackers and curves have them."""
        if "loss" in logs:
            logs |= self.gauge.read(self.facts.counters.tokens_seen)
        super().log(logs, start_time)

    def mark(self) -> None:
        """Remember this moment: no gradient is gathered, and a run stopped later is saved as it is now."""
        self.boundary = {"random": random_states(), "counters": copy.copy(self.facts.counters), "flos": self.current_flos,
                         "losses": (self._tr_loss.clone(), self._total_loss_scalar, self._globalstep_last_logged)}

    def loss_carry(self) -> dict[str, float]:
        """Losses since the last logged one, which the next one is a mean of."""
        return {"sum": float(self._tr_loss) if self.args.world_size == 1 else self.carried, "total": self._total_loss_scalar, "logged_step": self._globalstep_last_logged}

    def save_stopped(self) -> Path | None:
        """Save the last whole step, unless a checkpoint of it stands there; None before the first step."""
        if not self.state.global_step:
            return None
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        if ranks.shared(folder in self.facts.stale or not folder.exists() or bool(verify_folder(folder))):
            self.model.zero_grad()
            set_random_states(self.boundary["random"])
            self.facts.counters, self.current_flos = self.boundary["counters"], self.boundary["flos"]
            self._tr_loss, self._total_loss_scalar, self._globalstep_last_logged = self.boundary["losses"]
            self._save_checkpoint(self.model, None)
        return folder

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self.store_flos()
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        states = ranks.gathered(self._random_file()) if self.args.world_size > 1 else []
        self.carried = ranks.total(float(self._tr_loss))[0] / ranks.world()
        in_parts = sharding.writes_shards()
        gathered = zero.gathered(self.optimizer.optimizer, self.groups, keep=ranks.is_first()) if self.is_deepspeed_enabled else None
        if self.is_fsdp_enabled and not in_parts:
            gathered = sharding.whole(self.optimizer.state_dict())

        def fill(temporary: Path) -> None:
            if not self.exchanging:
                self._save_optimizer_and_scheduler(str(temporary))
            else:
                scheduler = self.lr_scheduler.state_dict()
                torch.save(zero.with_empty_groups(scheduler, self.groups) if self.is_deepspeed_enabled else scheduler, temporary / "scheduler.pt")
                if gathered is not None:
                    torch.save(gathered, temporary / sharding.OPTIMIZER)
            self._save_scaler(str(temporary))
            if self.args.world_size == 1:
                self._save_rng_state(str(temporary))
            for name, content in states:
                (temporary / name).write_bytes(content)
            self.state.save_to_json(str(temporary / "trainer_state.json"))

        checkpoint.save(self, folder, fill, write_parts=(lambda parts: sharding.save_parts(self.model, self.optimizer, parts)) if in_parts else None)
        if ranks.is_first():
            checkpoint.prune(Path(self.args.output_dir), self.facts, folder, best.validation_history(self.state))

    def _random_file(self) -> tuple[str, bytes]:
        """`(name, content)` of the file with this rank's random states, as the Trainer writes and reads it."""
        with tempfile.TemporaryDirectory() as folder:
            self._save_rng_state(folder)
            file = next(Path(folder).iterdir())
            return file.name, file.read_bytes()
