"""One contender of the GPU benchmark, in a process of its own, a step at a time: Mistral-7B in 4-bit with the guide's LoRA settings.

In: a contender's name, the base model's folder, a file of token rows, and on standard input one line per optimizer step (`reset` before a
step forgets the memory's peak). Out: one JSON line per step (seconds, loss, peak bytes). All take the same rows in the same order, batch
2 x accumulation 4 unless the name says otherwise. Run by `gpu.py`, not by hand.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

NAME = sys.argv[1] if __name__ == "__main__" else ""
if NAME.startswith("unsloth") or NAME == "kit-unsloth":
    import unsloth  # noqa: F401  before transformers, which it patches

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PrinterCallback, Trainer, TrainingArguments
from torch.utils.data import SequentialSampler

from benchmarks.training_peers import MODULES, StepByStep, _Fixed, adapter, arguments, collate, dataset, kit, say

ON_GPU = torch.cuda.is_available()
STEP = 8


class Gauged(StepByStep):
    """Times the device's work, not its queue, and says the memory's peak."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        line = sys.stdin.readline()
        if not line:
            control.should_training_stop = True
        if ON_GPU:
            torch.cuda.synchronize()
            if line.strip() == "reset":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
        self.started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if ON_GPU:
            torch.cuda.synchronize()
        super().on_step_end(args, state, control)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if logs and "loss" in logs:
            say(step=state.global_step, seconds=self.seconds, loss=float(logs["loss"]), peak_bytes=torch.cuda.max_memory_allocated() if ON_GPU else 0)


def load(folder: str, dtype: torch.dtype = torch.bfloat16) -> Any:
    """The base model as a peer's users load it: NF4 with double quantisation, bf16 computing; on a CPU in bf16."""
    if not ON_GPU:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, quantization_config=nf4, device_map={"": 0})


def options(**more: Any) -> dict[str, Any]:
    return {"bf16": True, "use_cpu": not ON_GPU, **more}


def original(rows: list[dict[str, Any]], folder: str, out: Path, steps: int, dropout: float) -> Trainer:
    """The original system's settings in the plain Trainer: gradient checkpointing, padding, loss on every token."""
    from peft import get_peft_model, prepare_model_for_kbit_training

    model = prepare_model_for_kbit_training(load(folder)) if ON_GPU else load(folder)
    model.enable_input_require_grads()
    torch.manual_seed(42)
    args = arguments(TrainingArguments, out, steps, **options(gradient_checkpointing=True))
    return Trainer(model=get_peft_model(model, adapter(dropout)), args=args, train_dataset=dataset(rows, everything=True), data_collator=lambda batch: collate(batch, 2))


def trl(rows: list[dict[str, Any]], folder: str, out: Path, steps: int, dropout: float, dtype: torch.dtype = torch.bfloat16) -> Trainer:
    """TRL's SFTTrainer, its defaults: gradient checkpointing."""
    from trl import SFTConfig, SFTTrainer

    torch.manual_seed(42)
    args = arguments(SFTConfig, out, steps, **options(bf16=dtype == torch.bfloat16, gradient_checkpointing=True, max_length=None, loss_type="nll",
                                                      dataset_kwargs={"skip_prepare_dataset": True}))
    return SFTTrainer(model=load(folder, dtype), args=args, train_dataset=dataset(rows), processing_class=AutoTokenizer.from_pretrained(folder), peft_config=adapter(dropout))


def with_unsloth(rows: list[dict[str, Any]], folder: str, out: Path, steps: int, dropout: float) -> Trainer:
    """Unsloth as its own notebooks use it, with TRL's trainer."""
    from trl import SFTConfig, SFTTrainer
    from unsloth import FastLanguageModel

    model, tokenizer = FastLanguageModel.from_pretrained(model_name=folder, max_seq_length=2048, dtype=torch.bfloat16, load_in_4bit=True)
    model = FastLanguageModel.get_peft_model(model, r=16, lora_alpha=32, lora_dropout=dropout, target_modules=MODULES, bias="none",
                                             use_gradient_checkpointing="unsloth", random_state=42)
    args = arguments(SFTConfig, out, steps, **options(max_length=2048, dataset_kwargs={"skip_prepare_dataset": True}))
    return SFTTrainer(model=model, args=args, train_dataset=dataset(rows), processing_class=tokenizer, data_collator=lambda batch: collate(batch, 2))


def ours(*settings: str) -> Any:
    """This project's trainer with the guide's profile; on a CPU without 4-bit."""
    def build(rows: list[dict[str, Any]], folder: str, out: Path, steps: int, dropout: float) -> Trainer:
        here = [] if ON_GPU else ["model.device=cpu", "model.load_in_4bit=false"]
        return kit(rows, out, steps, dropout, f"model.name={folder}", "model.dtype=bfloat16", *here, *settings, profile="mistral-7b")
    return build


CONTENDERS = {
    "original": original,
    "trl": trl,
    "trl-float32": lambda *given: trl(*given, dtype=torch.float32),  # what the others' losses are held against
    "unsloth": with_unsloth,
    "kit": ours("model.backend=hf"),
    "kit-again": ours("model.backend=hf", "training.gradient_checkpointing=true"),
    "kit-unsloth": ours("model.backend=unsloth"),
    "kit-modules": ours("model.backend=hf", "training.engine=modules"),
    "kit-kept": ours("model.backend=hf", "training.gradient_checkpointing=false"),
}


def main(name: str, folder: str, file: str, out: str, steps: int, dropout: float) -> None:
    """Train `steps` steps, each when a line comes in."""
    rows = json.loads(Path(file).read_text())
    started = time.perf_counter()
    trainer = CONTENDERS[name](rows, folder, Path(out), steps, dropout)
    is_ours = name.startswith("kit")
    trainer._get_train_sampler = lambda *_: _Fixed(range(len(rows))) if is_ours else SequentialSampler(trainer.train_dataset)
    if is_ours:
        trainer.sampler = _Fixed(range(len(rows)))
    trainer.add_callback(Gauged())
    trainer.remove_callback(PrinterCallback)
    say(ready=True, seconds_to_load=time.perf_counter() - started, loaded_bytes=torch.cuda.memory_allocated() if ON_GPU else 0,
        trained=sum(parameter.numel() for parameter in trainer.model.parameters() if parameter.requires_grad))
    trainer.train()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4], int(sys.argv[5]), float(sys.argv[6]))
