"""A tiny random Llama with a cut of the bundled tokenizer, saved as a real model folder."""

import json
import shutil
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from emergency_kit.config import Resolved, load_config

BUNDLED = Path("models/SmolLM2-135M-Instruct")
WHOLE, TOKENS = 49152, 8192  # with all of them the head is nearly all of what a tiny model computes


def cut_tokenizer(source: Path, out: Path, size: int) -> None:
    """A byte-level BPE tokenizer with its first `size` tokens: merges make tokens in order, so that it stays one."""
    out.mkdir(parents=True, exist_ok=True)
    content = json.loads((source / "tokenizer.json").read_text())
    content["model"]["vocab"] = {token: number for token, number in content["model"]["vocab"].items() if number < size}
    there = content["model"]["vocab"]
    content["model"]["merges"] = [merge for merge in content["model"]["merges"] if "".join(merge if isinstance(merge, list) else merge.split(" ")) in there]
    (out / "tokenizer.json").write_text(json.dumps(content))
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(source / name, out / name)


def save_tiny_model(folder: Path, seed: int = 0, context_tokens: int = 16384, tied: bool = False, tokens: int = TOKENS) -> Path:
    """Two layers, hidden size 64; wide initial weights, so that greedy answers vary instead of repeating one token."""
    cut_tokenizer(BUNDLED, folder, tokens)
    tokenizer = AutoTokenizer.from_pretrained(folder)
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
