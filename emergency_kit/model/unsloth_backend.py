"""The backend on Unsloth: 4-bit LoRA on one NVIDIA GPU. The only file that imports Unsloth.

Importing it patches transformers, PEFT and the Trainer, so this file is imported only where Unsloth was chosen, and before those are
(`backend.choose`). Read against the source of unsloth 2026.10.9, on which the contract tests (tests/model/test_backend.py) pass on a GPU; no whole run
of training was made on it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

# A count of users, fetched from the Hub with every load. No download is meant to happen unseen.
os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")

import unsloth
from unsloth import FastLanguageModel

from emergency_kit.config import LoraSection, ModelSection
from emergency_kit.errors import ModelError
from emergency_kit.model import hf_backend, hub
from emergency_kit.model.backend import Loaded, base_name, pick_dtype

# Fused with the head, in chunks of the vocabulary, over `num_items_in_batch` as ours; its attention knows no rows laid end to end.
owns_loss = True


def load(model: ModelSection, device: str, gradient_checkpointing: bool, full: bool = False, sharded: bool = False, tokenizer: Any = None) -> Loaded:
    """See `Backend.load`; never `full` nor `sharded`. Weights are quantised from the named model itself, not taken from Unsloth's copy in 4-bit: the
    adapters then name the model of the config, which `merge` reads in full precision. The tokenizer is the one that the rows were made with."""
    assert not full and not sharded, "backend.choose passes Unsloth by for full fine-tuning and FSDP"
    name, dtype = base_name(model), pick_dtype(model, device)
    if Path(name).is_dir():
        hub.require_whole(Path(name))
    with hub.cache_where_unreachable(not Path(name).is_dir()):
        try:
            base, _ = FastLanguageModel.from_pretrained(
                model_name=name, revision=model.revision, max_seq_length=model.max_seq_length, dtype=dtype, load_in_4bit=model.load_in_4bit,
                load_in_16bit=not model.load_in_4bit, use_exact_model_name=True, use_gradient_checkpointing=_checkpointing(gradient_checkpointing))
        except (OSError, ValueError, RuntimeError, ImportError, AssertionError) as error:
            raise ModelError(hub.explain(error, f"model {name}", name, model.revision, otherwise="or --set model.backend=hf")) from None
    return Loaded(base, tokenizer or hf_backend.load_tokenizer(name, model.revision), "base", name, [f"Unsloth {unsloth.__version__}, base weights {'NF4' if model.load_in_4bit else dtype}, compute {dtype}"])


def attach(loaded: Loaded, model: ModelSection, lora: LoraSection, gradient_checkpointing: bool, seed: int, first: None = None) -> None:
    """See `Backend.attach`; plain LoRA and rsLoRA alone."""
    loaded.model = FastLanguageModel.get_peft_model(
        loaded.model, r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, use_rslora=lora.use_rslora, target_modules=list(lora.target_modules), bias="none",
        use_gradient_checkpointing=_checkpointing(gradient_checkpointing), random_state=seed)
    loaded.model.train()
    loaded.notes.append(f"adapters torch.float32{', rsLoRA' if lora.use_rslora else ''}; the loss is Unsloth's own")


def _checkpointing(wanted: bool) -> str | bool:
    """Unsloth's own keeps the layers' inputs in the computer's memory."""
    return "unsloth" if wanted else False
