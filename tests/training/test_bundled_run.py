"""The bundled model, trained for a few real steps: losses fall, the adapter loads again and changes the answer."""

from __future__ import annotations

from pathlib import Path

import torch

from emergency_kit.config import load_config
from emergency_kit.data.format import build_messages
from emergency_kit.data.tokenize import encode_prompt
from emergency_kit.model import backend
from emergency_kit.training.checkpoint import load_training_state
from emergency_kit.training.run import train


def test_a_few_steps_on_the_bundled_model(tmp_path: Path) -> None:
    resolved = load_config("embedded", settings=[
        f"training.output_dir={tmp_path}", "dataset.build_size=200", "dataset.max_samples=2", "dataset.max_eval_samples=1", "dataset.grounding=none", "training.num_epochs=4",
        "training.per_device_train_batch_size=1", "training.gradient_accumulation_steps=2", "training.warmup_steps=0",
        "training.eval_steps=2", "training.lr_scheduler_type=constant"])
    final = train(resolved)
    state = load_training_state(final)
    losses = [entry["loss"] for entry in state["loss_history"]]
    assert len(losses) == 4 and losses[3] < 0.8 * losses[0]  # every step takes the same two rows
    assert state["validation_history"][-1]["loss"] < state["validation_history"][0]["loss"]
    adapted, base = backend.load_checkpoint(resolved.config.model, final, torch.float32), backend.load_base(resolved.config.model, torch.float32)
    assert adapted.kind == "adapter" and adapted.base == str(Path("models/SmolLM2-135M-Instruct"))
    ids = torch.tensor([encode_prompt(adapted.tokenizer, build_messages("the oil in my pan is on fire", []))])
    with torch.no_grad():
        difference = (adapted.model(ids).logits - base.model(ids).logits).abs().max()
    assert difference > 0.1
