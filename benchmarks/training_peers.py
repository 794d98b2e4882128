"""One contender of the training benchmark, in a process of its own, a step at a time.

In: a contender's name, a file of token rows, and on standard input one line per optimizer step. Out: one JSON line
per step (seconds, loss) and a closing one (peak memory, validation loss). All take the same rows in the same order:
batch 2, accumulation 4, LoRA of the guide (rank 16, alpha 32, dropout 0.05, seven modules), AdamW, rate 2e-4.
TRL is pinned to the newest release whose loss runs on a CPU (1.15 needs Triton). Run by `training_speed.py`, not by hand.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch.utils.data import SequentialSampler
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback, TrainingArguments

BASE = "models/SmolLM2-135M-Instruct"
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
BATCH, ACCUMULATION = 2, 4


class StepByStep(TrainerCallback):
    """Waits for a line before every optimizer step and answers with how long it took."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not sys.stdin.readline():
            control.should_training_stop = True
        self.started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.seconds = time.perf_counter() - self.started
        control.should_log = True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if logs and "loss" in logs:
            say(step=state.global_step, seconds=self.seconds, loss=float(logs["loss"]))


def say(**facts: Any) -> None:
    """One JSON line."""
    print(json.dumps(facts), flush=True)


def collate(rows: list[dict[str, Any]], pad: int) -> dict[str, torch.Tensor]:
    """Right-padded, as every collator does it. Not the kit's own: a peer's memory is measured without our package in it."""
    longest = max(len(row["input_ids"]) for row in rows)

    def padded(name: str, fill: int) -> torch.Tensor:
        return torch.tensor([list(row[name]) + [fill] * (longest - len(row[name])) for row in rows])

    mask = torch.tensor([[1] * len(row["input_ids"]) + [0] * (longest - len(row["input_ids"])) for row in rows])
    return {"input_ids": padded("input_ids", pad), "attention_mask": mask, "labels": padded("labels", -100)}


def adapter(dropout: float) -> LoraConfig:
    """The guide's LoRA settings."""
    return LoraConfig(r=16, lora_alpha=32, lora_dropout=dropout, bias="none", target_modules=MODULES, task_type="CAUSAL_LM")


def dataset(rows: list[dict[str, Any]], everything: bool = False) -> Dataset:
    """Token rows with labels on the answer, or on everything."""
    return Dataset.from_list([{"input_ids": row["ids"], "labels": row["ids"] if everything else [-100] * row["prompt"] + row["ids"][row["prompt"]:]}
                              for row in rows])


def arguments(kind: type, folder: Path, steps: int, **options: Any) -> Any:
    """Settings that all peers share."""
    return kind(output_dir=str(folder), max_steps=steps, per_device_train_batch_size=BATCH, gradient_accumulation_steps=ACCUMULATION,
                learning_rate=2e-4, warmup_steps=3, lr_scheduler_type="cosine", weight_decay=0.01, max_grad_norm=1.0, optim="adamw_torch",
                logging_steps=1, save_strategy="no", report_to="none", remove_unused_columns=False, disable_tqdm=True, seed=42, dataloader_pin_memory=False,
                **{"use_cpu": True, **options})


def original(rows: list[dict[str, Any]], folder: Path, steps: int, dropout: float) -> Trainer:
    """The original system's settings: float32, gradient checkpointing, loss on every token."""
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    model.enable_input_require_grads()
    torch.manual_seed(42)
    model = get_peft_model(model, adapter(dropout))
    return Trainer(model=model, args=arguments(TrainingArguments, folder, steps, bf16=False, gradient_checkpointing=True),
                   train_dataset=dataset(rows, everything=True), data_collator=lambda batch: collate(batch, 2))


def trl(rows: list[dict[str, Any]], folder: Path, steps: int, dropout: float, dtype: torch.dtype, checkpointing: bool, attention: str = "sdpa") -> Trainer:
    """TRL's SFTTrainer."""
    from trl import SFTConfig, SFTTrainer

    torch.manual_seed(42)
    args = arguments(SFTConfig, folder, steps, bf16=dtype == torch.bfloat16, gradient_checkpointing=checkpointing, max_length=None, loss_type="nll",
                     dataset_kwargs={"skip_prepare_dataset": True})
    return SFTTrainer(model=AutoModelForCausalLM.from_pretrained(BASE, dtype=dtype, attn_implementation=attention), args=args, train_dataset=dataset(rows),
                      processing_class=AutoTokenizer.from_pretrained(BASE), peft_config=adapter(dropout))


def kit(rows: list[dict[str, Any]], folder: Path, steps: int, dropout: float, *settings: str, profile: str = "embedded") -> Trainer:
    """This project's trainer, as `emergency-kit train` sets it up, with the peers' schedule."""
    import numpy as np

    from emergency_kit.config import load_config
    from emergency_kit.data.tokenize import TokenRows
    from emergency_kit.model.backend import load_for_training
    from emergency_kit.training import checkpoint, engine, workload
    from emergency_kit.training.batches import RowDataset
    from emergency_kit.training.first_try import try_longest
    from emergency_kit.training.schedule import pass_rows
    from emergency_kit.training.stopping import Stop
    from emergency_kit.training.trainer import KitTrainer

    resolved = load_config(profile, settings=[
        f"lora.dropout={dropout}", "training.learning_rate=2e-4", "training.warmup_steps=3", f"training.max_steps={steps}",
        f"training.per_device_train_batch_size={BATCH}", f"training.gradient_accumulation_steps={ACCUMULATION}", *settings])
    config = resolved.config
    loaded = load_for_training(config.model, config.lora, bool(config.training.gradient_checkpointing), 42)
    rows_a_pass = pass_rows(config.training)
    fused = engine.install_engine(loaded, config.training, rows_a_pass, config.model.max_seq_length)
    print("; ".join(loaded.notes), file=sys.stderr)
    lengths = [len(row["ids"]) for row in rows]
    flat = TokenRows(np.concatenate([np.array(row["ids"], np.int32) for row in rows]), np.cumsum([0, *lengths]).astype(np.int64),
                     np.array([row["prompt"] for row in rows], np.int32))
    facts = checkpoint.RunFacts(resolved=resolved, dataset_hash="", tokenizer=loaded.tokenizer, rows=len(rows), step_rows=BATCH * ACCUMULATION)
    args = engine.training_arguments(resolved, folder, config.model, fused is not None, steps, rows_a_pass)
    args.save_strategy = args.eval_strategy = "no"
    load = workload.measure({"train": flat, "validation": flat}, resolved, fused is not None, loaded.model.device.type == "cuda", fused.dtype.itemsize if fused else 0, steps)
    return KitTrainer(model=loaded.model, args=args, train_dataset=RowDataset(flat), eval_dataset=RowDataset(flat), facts=facts, pad_id=loaded.tokenizer.pad_token_id,
                      fused=fused, stop=Stop(), before_training=lambda trainer: try_longest(trainer, load))


CONTENDERS = {
    "original": original,
    "kit": kit,
    "kit-no-sharing": lambda *a: kit(*a, "training.prefix_sharing=false"),
    "kit-modules": lambda *a: kit(*a, "training.engine=modules"),
    "trl-bf16-checkpointing": lambda *a: trl(*a, torch.bfloat16, True),
    "trl-bf16": lambda *a: trl(*a, torch.bfloat16, False),
    "trl-float32-checkpointing": lambda *a: trl(*a, torch.float32, True),
    "trl-float32": lambda *a: trl(*a, torch.float32, False),
    "trl-float32-eager": lambda *a: trl(*a, torch.float32, False, "eager"),
}


class _Fixed(list):
    """An order of rows that no epoch changes."""

    def set_epoch(self, epoch: int) -> None:
        """The order stays."""


def validation_loss(model: Any, rows: list[dict[str, Any]]) -> float:
    """Mean cross-entropy over the answers of rows, one row at a time, in the model's own precision."""
    model.eval()
    total, count = 0.0, 0
    with torch.no_grad():
        for row in rows:
            logits = model(input_ids=torch.tensor([row["ids"]])).logits[0, row["prompt"] - 1:-1].float()
            total += float(F.cross_entropy(logits, torch.tensor(row["ids"][row["prompt"]:]), reduction="sum"))
            count += len(logits)
    return total / count


def main(name: str, file: str, folder: str, steps: int, dropout: float) -> None:
    """Train `steps` steps, each when a line comes in; then tell memory and validation loss."""
    rows = json.loads(Path(file).read_text())
    trainer = CONTENDERS[name](rows["train"], Path(folder), steps, dropout)
    step = BATCH * ACCUMULATION
    # The same rows in the same steps for all; within a step the kit puts the longest first, as it does by itself.
    order = [index for start in range(0, len(rows["train"]), step)
             for index in sorted(range(start, min(start + step, len(rows["train"]))), key=lambda row: -len(rows["train"][row]["ids"]))]
    ours = name.startswith("kit")
    trainer._get_train_sampler = lambda *_: _Fixed(order) if ours else SequentialSampler(trainer.train_dataset)
    if ours:
        trainer.sampler = _Fixed(order)
    trainer.add_callback(StepByStep())
    from transformers import PrinterCallback
    trainer.remove_callback(PrinterCallback)
    say(ready=True)
    trainer.train()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    done = trainer.facts.counters if ours else None
    extra = {"model_seconds": done.step_seconds, "tokens_computed": done.tokens_computed, "tokens": done.tokens_seen} if done else {}
    say(peak_bytes=peak, validation_loss=validation_loss(trainer.model, rows["validation"]) if rows["validation"] else None, **extra)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]), float(sys.argv[5]))
