"""What every backend keeps (model/backend.py, `Backend`), checked on a tiny random model with the config's own numbers.

Run by test_backend.py; Unsloth, whose import patches transformers, in a process of its own: `python -m tests.model.contract unsloth FOLDER true`.
"""

from __future__ import annotations

import importlib
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from emergency_kit.model.backend import Loaded


def check(name: str, tiny: Path, four_bit: bool, *settings: str) -> "Loaded":
    """Load, attach, take a step, save and read back. Returns what was loaded, trained a little."""
    from emergency_kit.config import load_config

    config = load_config("embedded", settings=[f"model.name={tiny}", f"model.load_in_4bit={four_bit}".lower(), f"model.backend={name}", "lora.r=4", "lora.dropout=0", *settings]).config
    module = importlib.import_module(f"emergency_kit.model.{name}_backend")

    import torch

    from emergency_kit.model import backend
    from emergency_kit.training.engine import install_engine

    device = "cuda" if torch.cuda.is_available() else "cpu"
    loaded = module.load(config.model, device, False)
    base = {key: value.clone() for key, value in loaded.model.state_dict().items()}
    module.attach(loaded, config.model, config.lora, False, 0)
    loaded.owns_loss = module.owns_loss

    # float32 adapters are trained and nothing else.
    trained = {key: parameter for key, parameter in loaded.model.named_parameters() if parameter.requires_grad}
    assert len(trained) == 2 * 7 * 2 and all(".lora_" in key and parameter.dtype == torch.float32 for key, parameter in trained.items())
    assert loaded.model.training and loaded.tokenizer.chat_template and str(tiny) == loaded.base

    # The loss is the sum over supervised tokens by the number that is given, as a plain reference has it.
    install_engine(loaded, config.training, 2, 64)
    ids = torch.arange(40, 100, device=device).reshape(2, 30)
    labels, mask = ids.clone(), torch.ones_like(ids)
    labels[:, :10] = -100
    labels[1, 25:], mask[1, 25:] = -100, 0

    def autocast() -> torch.autocast:  # as training has it
        return torch.autocast(device, torch.bfloat16, enabled=backend.pick_dtype(config.model, device) != torch.float32)

    with torch.no_grad(), autocast():
        logits = loaded.model.eval()(input_ids=ids, attention_mask=mask).logits.float()
    wanted = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum").item() / 50
    first = step(loaded, ids, labels, mask, backend.pick_dtype(config.model, device), None)
    assert abs(first - wanted) < 0.02 * wanted, (first, wanted)

    # Steps lower it, and the base model stays as it was.
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
    losses = [step(loaded, ids, labels, mask, backend.pick_dtype(config.model, device), optimizer) for _ in range(6)]
    assert losses[-1] < 0.9 * losses[0], losses
    assert all(parameter.detach().abs().sum() > 0 for key, parameter in trained.items() if ".lora_B." in key)
    after = {key.removeprefix("base_model.model.").replace(".base_layer.", "."): value for key, value in loaded.model.state_dict().items() if ".lora_" not in key}
    assert after.keys() == base.keys() and all(torch.equal(after[key], value) for key, value in base.items())

    # What is saved says the same on a base model that is loaded anew.
    with tempfile.TemporaryDirectory() as folder, torch.no_grad(), autocast():
        backend.save_trained(loaded.model, loaded.tokenizer, Path(folder))
        assert backend.check_checkpoint(Path(folder), config.model) == "adapter"
        again = module.load(config.model, device, False)
        module.attach(again, config.model, config.lora, False, 1)
        from emergency_kit.training.checkpoint import load_weights

        load_weights(again.model, Path(folder), None)
        found, kept = (one.model.eval()(input_ids=ids).logits for one in (again, loaded))
        assert torch.equal(found, kept)
    assert 1e6 < backend.memory_bytes() < 1e12 and backend.peak_memory_bytes() > 1e6
    return loaded


def step(loaded: "Loaded", ids: Any, labels: Any, mask: Any, dtype: Any, optimizer: Any) -> float:
    """The loss of a batch with 50 as its divisor; with an optimizer, a step is taken."""
    import torch

    loaded.model.train()
    with torch.set_grad_enabled(optimizer is not None), torch.autocast(ids.device.type, dtype, enabled=dtype != torch.float32):
        loss = loaded.model(input_ids=ids, attention_mask=mask, labels=labels, num_items_in_batch=torch.tensor(50, device=ids.device))["loss"]
    if optimizer is not None:
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return float(loss.detach())


if __name__ == "__main__":
    print(f"kept: {'; '.join(check(sys.argv[1], Path(sys.argv[2]), sys.argv[3] == 'true').notes)}")
