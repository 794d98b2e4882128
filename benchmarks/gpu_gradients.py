"""Whose gradient is nearer to float32's: one optimizer step's gradients through `fused`, through transformers' modules, and in float32.

In: the base model's folder, a file of token rows, and how many of them make the step. Out: one JSON line: for each way of computing, the
distance of all adapters' gradients from the float32 ones over their length (0 is equal, 1 as far as no gradient at all), and the cosine
between the two. The reference has the same 4-bit weights, spread out to float32, no autocast, and products without TF32. B of each adapter
is drawn at random, since with B = 0 half of the gradients are 0. On a CPU the base is bfloat16. Run by `gpu.py`, not by hand.
"""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

import torch

ON_GPU = torch.cuda.is_available()


def gradients(model: Any, rows: list[dict[str, Any]], autocast: bool) -> tuple[float, torch.Tensor]:
    """Loss of the rows and all gradients of adapters end to end, float32 on the CPU; a row at a time, as mean over the step's labels."""
    from emergency_kit.data.tokenize import IGNORE

    model.zero_grad()
    divisor, total = sum(len(row["ids"]) - row["prompt"] for row in rows), 0.0
    device = next(model.parameters()).device
    for row in rows:
        ids = torch.tensor([row["ids"]], device=device)
        labels = ids.clone()
        labels[:, :row["prompt"]] = IGNORE
        with torch.autocast(device.type, torch.bfloat16) if autocast else contextlib.nullcontext():
            loss = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels, num_items_in_batch=divisor)["loss"]
        loss.backward()
        total += float(loss)
    return total, torch.cat([parameter.grad.float().flatten().cpu() for parameter in model.parameters() if parameter.requires_grad])


def spread_out(model: Any) -> None:
    """Every base weight in float32, 4-bit ones as what they stand for."""
    for _, module in list(model.named_modules()):
        for child_name, child in list(module.named_children()):
            state = getattr(getattr(child, "weight", None), "quant_state", None)
            if state is not None and not hasattr(child, "base_layer"):
                from bitsandbytes.functional import dequantize_4bit

                wide = torch.nn.Linear(child.in_features, child.out_features, bias=False, device="meta")
                wide.weight = torch.nn.Parameter(dequantize_4bit(child.weight.data, state).float(), requires_grad=False)
                setattr(module, child_name, wide)
    model.float()


def main(folder: str, file: str, count: int) -> None:
    """Print the distances of the step's gradients."""
    from emergency_kit.config import load_config
    from emergency_kit.model.backend import load_for_training
    from emergency_kit.training import engine

    rows = json.loads(Path(file).read_text())[:count]
    here = [] if ON_GPU else ["model.device=cpu", "model.load_in_4bit=false"]
    found: dict[str, Any] = {}
    for name, setting in (("modules", "training.engine=modules"), ("fused", "training.engine=fused")):
        config = load_config("mistral-7b", settings=[f"model.name={folder}", "model.dtype=bfloat16", "model.backend=hf", "lora.dropout=0", *here, setting]).config
        loaded = load_for_training(config.model, config.lora, False, 42)
        generator = torch.Generator().manual_seed(1)
        for key, parameter in loaded.model.named_parameters():
            if "lora_B" in key:
                parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 1e-3)
        engine.install_engine(loaded, config.training, 8, config.model.max_seq_length)
        found[name] = gradients(loaded.model, rows, autocast=name == "modules")
        if name == "modules":
            spread_out(loaded.model)
            torch.backends.cuda.matmul.allow_tf32 = False
            found["float32"] = gradients(loaded.model, rows, autocast=False)
        del loaded
    loss, true = found.pop("float32")
    length = true.double().norm()
    print(json.dumps({"float32_loss": loss, **{name: {"loss": mine, "distance": float((one.double() - true.double()).norm() / length), "cosine": float(torch.dot(
        one.double(), true.double()) / length / one.double().norm())} for name, (mine, one) in found.items()}}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
