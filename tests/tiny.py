"""A tiny random Llama with the bundled tokenizer, saved as a real model folder."""

from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from emergency_kit.config import Resolved, load_config

BUNDLED = Path("models/SmolLM2-135M-Instruct")


def save_tiny_model(folder: Path, seed: int = 0, context_tokens: int = 16384, tied: bool = False) -> Path:
    """Two layers, hidden size 64; wide initial weights, so that greedy answers vary instead of repeating one token."""
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED)
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=context_tokens, initializer_range=0.5, tie_word_embeddings=tied, bos_token_id=1, eos_token_id=2, pad_token_id=2))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def resolve(model: Path, **settings: object) -> Resolved:
    """The embedded profile with a tiny float32 model; `a__b=1` stands for `--set a.b=1`."""
    values = {"model.name": model, "model.dtype": "float32"} | {key.replace("__", "."): value for key, value in settings.items()}
    return load_config("embedded", settings=[f"{key}={value}" for key, value in values.items()])
