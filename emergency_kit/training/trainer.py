"""The Transformers Trainer, subclassed once.

What it changes: rows of like length share a forward pass, the validation loss is a mean over tokens,
and a checkpoint is written whole or not at all and pruned only after the new one verifies.
Everything else, callbacks, trackers, resume, accelerate, is the Trainer's own.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Iterator

import torch
from torch.utils.data import Dataset, Sampler
from transformers import Trainer, TrainerCallback

from emergency_kit.data.tokenize import IGNORE, TokenRows
from emergency_kit.training import checkpoint


class RowDataset(Dataset):
    """TokenRows as a torch Dataset of `{"input_ids", "labels"}` lists."""

    def __init__(self, rows: TokenRows):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return self.rows[index]


class StepSampler(Sampler[int]):
    """Shuffled by seed and epoch, then sorted by length within each optimizer step.

    The rows of a step stay the same, so its gradient does too; only the padding between its forward
    passes goes away. step_rows: rows of one optimizer step over accumulation and ranks.
    """

    def __init__(self, lengths: Any, step_rows: int, seed: int):
        self.lengths, self.step_rows, self.seed, self.epoch = lengths, step_rows, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the shuffle of an epoch, counted from 0."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(self.seed * 100_003 + self.epoch)).tolist()
        for start in range(0, len(order), self.step_rows):
            yield from sorted(order[start:start + self.step_rows], key=lambda row: (-int(self.lengths[row]), row))


def collate(rows: list[dict[str, list[int]]], pad_id: int) -> dict[str, torch.Tensor]:
    """Right-padded tensors of shape (rows, longest): input_ids, attention_mask, labels."""
    longest = max(len(row["input_ids"]) for row in rows)

    def padded(lists: list[list[int]], fill: int) -> torch.Tensor:
        return torch.tensor([values + [fill] * (longest - len(values)) for values in lists])

    return {"input_ids": padded([row["input_ids"] for row in rows], pad_id),
            "attention_mask": padded([[1] * len(row["input_ids"]) for row in rows], 0),
            "labels": padded([row["labels"] for row in rows], IGNORE)}


class KitTrainer(Trainer):
    """See the file's opening. `facts` goes into every checkpoint's training_state.json and manifest."""

    def __init__(self, *args: Any, facts: "checkpoint.RunFacts", pad_id: int, **options: Any):
        super().__init__(*args, data_collator=lambda rows: collate(rows, pad_id), **options)
        self.facts = facts
        self.model_accepts_loss_kwargs = True
        # The first label of a row belongs to the prompt and is IGNORE, so both ways of counting agree.
        self._loss_shifts_labels = True
        self.add_callback(_EpochCallback(self))

    def _get_train_sampler(self, train_dataset: Any = None) -> StepSampler:
        dataset = train_dataset if train_dataset is not None else self.train_dataset
        step_rows = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        self.sampler = StepSampler(dataset.rows.lengths, step_rows, self.args.seed)
        return self.sampler

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        started = time.perf_counter()
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.facts.tokens_seen += int(inputs["attention_mask"].sum())
        self.facts.supervised_tokens_seen += int((inputs["labels"] != IGNORE).sum())
        self.facts.step_seconds += time.perf_counter() - started
        return loss

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Validation loss: cross-entropy summed over all supervised tokens, divided by their number."""
        total, count = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
        training = self.model.training
        self.model.eval()
        for inputs in self.get_eval_dataloader(eval_dataset):
            inputs = self._prepare_inputs(inputs)
            supervised = int((inputs["labels"][:, 1:] != IGNORE).sum())
            with torch.no_grad(), self.compute_loss_context_manager():
                total += float(self.model(**inputs)["loss"]) * supervised
            count += supervised
        self.model.train(training)
        total, count = (self.accelerator.reduce(value.to(self.args.device), "sum") for value in (total, count))
        metrics = {f"{metric_key_prefix}_loss": float(total / count)}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self.store_flos()
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        with checkpoint.writing(self, folder) as temporary:
            self._save_optimizer_and_scheduler(str(temporary))
            self._save_scaler(str(temporary))
            self._save_rng_state(str(temporary))
            self.state.save_to_json(str(temporary / "trainer_state.json"))
        checkpoint.prune(Path(self.args.output_dir), self.facts, newest=folder)


class _EpochCallback(TrainerCallback):
    """Tells the sampler its epoch whatever dataloader wraps it (accelerate's skipping one does not)."""

    def __init__(self, trainer: KitTrainer):
        self.trainer = trainer

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trainer.sampler.set_epoch(int(state.epoch or 0))
