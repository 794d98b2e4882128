"""The backend on Unsloth: 4-bit training on one NVIDIA GPU. The only file that imports Unsloth.

Its import patches transformers, so it stands inside the function and runs only when this backend is
picked. Not run by the tests, which have no GPU.
"""

from __future__ import annotations

from emergency_kit.config import LoraSection, ModelSection
from emergency_kit.errors import ModelError
from emergency_kit.model.backend import Loaded, base_name, pick_dtype


def load_for_training(model: ModelSection, lora: LoraSection, device: str, gradient_checkpointing: bool, seed: int) -> Loaded:
    """Base model in 4-bit plus new LoRA adapters through Unsloth's kernels."""
    from unsloth import FastLanguageModel

    name = base_name(model)
    try:
        base, tokenizer = FastLanguageModel.from_pretrained(
            model_name=name, revision=model.revision, max_seq_length=model.max_seq_length,
            dtype=pick_dtype(model, device), load_in_4bit=model.load_in_4bit)
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(f"model {name}: Unsloth cannot load it ({str(error).splitlines()[0][:200]}); "
                         "check model.name and the network, or --set model.backend=hf") from None
    adapted = FastLanguageModel.get_peft_model(
        base, r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, use_rslora=lora.use_rslora, target_modules=list(lora.target_modules), bias="none",
        use_gradient_checkpointing="unsloth" if gradient_checkpointing else False, random_state=seed)
    return Loaded(adapted, tokenizer, "base", name, ["Unsloth kernels"])
