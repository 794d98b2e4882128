"""Adapters: fresh ones in each of their kinds, or those of an earlier run, put on a base model.

In: a base model and the `lora` section. Out: a PEFT model and, for PiSSA and LoftQ, the adapters' first values. Those two do not
begin at zero: PiSSA moves the largest singular directions out of the weights into the adapter, LoftQ makes up for what 4-bit
rounding lost. What a checkpoint holds is the difference to the first values, B A - B0 A0, as an ordinary adapter of twice the
rank on the unchanged base model, so that every later stage takes it; its first half is the adapter itself, exactly.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from emergency_kit.artifacts import save_json
from emergency_kit.config import LoraSection
from emergency_kit.errors import ModelError
from emergency_kit.model import hub

# First values of every adapter by the name that the checkpoint gives them: ("….lora_A.weight", tensor), float32.
First = dict[str, torch.Tensor]
ADAPTER = "default"


def add_adapters(base: Any, lora: LoraSection, weights: Path, first: First | None = None) -> tuple[PeftModel, First | None]:
    """`(model, first values)` with fresh adapters; first values are None where the adapters begin at zero.

    weights: folder of the base model's safetensors files, for LoftQ. first: those of an earlier part of this run, which are taken instead
    of made again. Draws from torch's generator. Raises ModelError for modules that are not there.
    """
    made_here = first is None and lora.init.startswith("pissa")
    tied = [name for name in lora.modules_to_save if name in ("lm_head", "embed_tokens")] if base.config.tie_word_embeddings else []
    if tied:
        raise ModelError(f"lora.modules_to_save: {weights} ties lm_head to embed_tokens, so {tied[0]} cannot be trained alone; leave it out, "
                         "or train every weight with training.finetuning_type full")
    try:
        model = get_peft_model(base, LoraConfig(
            r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, bias="none", task_type="CAUSAL_LM", use_rslora=lora.use_rslora, use_dora=lora.use_dora,
            target_modules=lora.target_modules if isinstance(lora.target_modules, str) else list(lora.target_modules),
            modules_to_save=list(lora.modules_to_save) or None, init_lora_weights=lora.init if made_here else True))
    except ValueError as error:
        raise ModelError(f"lora.target_modules: {error}") from None
    missing = [name for name in lora.modules_to_save if not any(f".{name}.modules_to_save." in parameter for parameter, _ in model.named_parameters())]
    if missing:
        raise ModelError(f"lora.modules_to_save: {missing[0]!r} is no module of {weights}; print(model) of transformers shows their names")
    if lora.init == "default":
        return model, None
    if first is None and lora.init == "loftq":
        _init_loftq(model, weights)
    elif first is not None:
        set_peft_model_state_dict(model, first)
        if lora.init.startswith("pissa"):
            _take_out(model)
    return model, {name: value.detach().float().cpu().clone() for name, value in get_peft_model_state_dict(model).items()}


def continue_adapters(base: Any, folder: Path, lora: LoraSection) -> tuple[PeftModel, list[str]]:
    """`(model, notes)` with a trained adapter's weights, to be trained further. Its rank, alpha, modules and kind are its own; the dropout
    is the config's. Raises ModelError where it does not fit the base model."""
    try:
        config = LoraConfig.from_pretrained(str(folder))
        own = {"r": config.r, "alpha": config.lora_alpha, "use_rslora": config.use_rslora, "use_dora": config.use_dora}
        config.lora_dropout, config.inference_mode, config.init_lora_weights = lora.dropout, False, True
        model = PeftModel.from_pretrained(base, str(folder), config=config, is_trainable=True)
    except (SafetensorError, ValueError, RuntimeError, TypeError, OSError) as error:
        raise ModelError(f"lora.adapter {folder}: cannot be loaded on the base model ({hub.first_line(error)}); name another adapter") from None
    other = [f"lora.{name} {value} (config: {getattr(lora, name)})" for name, value in own.items() if value != getattr(lora, name)]
    return model, [f"begins from {folder}" + (f", with its own {', '.join(other)}" if other else "")]


def save_difference(model: PeftModel, first: First, folder: Path) -> None:
    """Replace the adapter that PEFT has saved in a folder by its difference to the first values, on the unchanged base model."""
    current, path = get_peft_model_state_dict(model), folder / "adapter_config.json"
    saved = {name: torch.cat([value.detach().cpu(), first[name] if ".lora_A." in name else -first[name]], 0 if ".lora_A." in name else 1).contiguous()
             for name, value in current.items()}
    save_file(saved, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = json.loads(path.read_text(encoding="utf-8"))
    # The scale stays: alpha / r, or alpha / sqrt(r) under rsLoRA.
    config["lora_alpha"] *= math.sqrt(2) if config["use_rslora"] else 2
    save_json(path, config | {"r": 2 * config["r"], "init_lora_weights": True})


def load_difference(folder: Path) -> tuple[First, First]:
    """`(current, first)` values of the adapters out of a checkpoint that `save_difference` has written, to the same bits."""
    current, first = {}, {}
    for name, value in load_file(folder / "adapter_model.safetensors").items():
        here, begun = value.chunk(2, 0 if ".lora_A." in name else 1)
        current[name], first[name] = here.contiguous(), (begun if ".lora_A." in name else -begun).contiguous()
    return current, first


@torch.no_grad()
def _take_out(model: PeftModel) -> None:
    """Take the adapters' product out of the weights that they stand on, as PEFT does where it makes them."""
    for module in model.modules():
        if isinstance(module, LoraLayer):
            weight, scale = module.get_base_layer().weight, module.scaling[ADAPTER]
            a, b = module.lora_A[ADAPTER].weight.data, module.lora_B[ADAPTER].weight.data
            weight.data = (weight.data.float() - scale * b @ a).to(weight.dtype)


@torch.no_grad()
def _init_loftq(model: PeftModel, weights: Path) -> None:
    """First values whose product is nearest to what 4-bit rounding took from each weight: its largest singular directions."""
    import bitsandbytes

    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        quantised = module.get_base_layer().weight
        exact = _read(weights, f"{name.removeprefix('base_model.model.')}.weight").to(quantised.device, torch.float32)
        lost = exact - bitsandbytes.functional.dequantize_4bit(quantised.data, quantised.quant_state).float()
        u, s, v = torch.linalg.svd(lost, full_matrices=False)
        root = (s[:module.r[ADAPTER]] / module.scaling[ADAPTER]).sqrt()
        module.lora_A[ADAPTER].weight.data = (root[:, None] * v[:len(root)]).contiguous()
        module.lora_B[ADAPTER].weight.data = (u[:, :len(root)] * root).contiguous()


def _read(folder: Path, name: str) -> torch.Tensor:
    """A tensor of a model's safetensors files."""
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            if name in file.keys():
                return file.get_tensor(name)
    raise ModelError(f"lora.init loftq: {folder} holds no full-precision {name}; name an unquantised base model")
