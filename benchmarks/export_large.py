"""Export of a model with Mistral-7B's real shapes and random weights: time, memory, and what llama.cpp makes of it.

The weights (bfloat16, 14.5 GB) are made shard by shard, then `emergency-kit export-gguf` runs as its users run it, in a
process of its own whose peak memory the kernel counts. Needs about 35 GB of disk under `--work`, which is emptied afterwards.
Run: `make bench-export-large`.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tests.export.tiny import build_sentencepiece_tokenizer

# mistralai/Mistral-7B-Instruct-v0.2's config.json
SHAPE = {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
         "max_position_embeddings": 32768, "sliding_window": None, "tie_word_embeddings": False, "rms_norm_eps": 1e-5,
         "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0}}


def save_model(folder: Path) -> int:
    """Write config, tokenizer and random weights, one layer a shard; returns the number of weights."""
    tokenizer = build_sentencepiece_tokenizer()
    config = AutoConfig.for_model("mistral", **SHAPE, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, dtype="bfloat16")
    config.architectures = ["MistralForCausalLM"]
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in AutoModelForCausalLM.from_config(config).state_dict().items()}
    groups: dict[str, list[str]] = {}
    for name in shapes:
        groups.setdefault(name.split(".")[2] if ".layers." in name else "top", []).append(name)
    torch.manual_seed(0)
    index: dict[str, str] = {}
    for number, names in enumerate(groups.values(), 1):
        file = f"model-{number:05}-of-{len(groups):05}.safetensors"
        tensors = {name: torch.ones(shapes[name], dtype=torch.bfloat16) if len(shapes[name]) == 1 else
                   torch.empty(shapes[name], dtype=torch.bfloat16).normal_(0, 0.02) for name in names}
        save_file(tensors, folder / file, {"format": "pt"})
        index |= dict.fromkeys(names, file)
    total = sum(shape.numel() for shape in shapes.values())
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": 2 * total}, "weight_map": index}))
    return total


def main() -> None:
    """Make the model where it is missing, export it, print what it took."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("outputs/bench/export-large"))
    parser.add_argument("-q", default="q8_0")
    parser.add_argument("--answer-tokens", type=int, default=60, help="one short record; 2,000 take hours on two cores")
    parser.add_argument("--keep", action="store_true")
    arguments = parser.parse_args()
    model = arguments.work / "mistral-7b-shape"
    if not (model / "model.safetensors.index.json").is_file():
        model.mkdir(parents=True, exist_ok=True)
        started = time.monotonic()
        total = save_model(model)
        print(f"{total / 1e9:.2f} billion random weights, {2 * total / 1e9:.1f} GB, written in {time.monotonic() - started:.0f} s", flush=True)
    started = time.monotonic()
    done = subprocess.run([
        sys.executable, "-m", "emergency_kit.cli", "export-gguf", "--profile", "embedded", "--set", f"model.name={model}", "--set", "dataset.name=tests/export/held_out", "--checkpoint", str(model),
        "--output", str(arguments.work / "gguf"), "-q", arguments.q, "--overwrite", "--allow-out-of-bounds", "--output-dir", str(arguments.work),
        "--set", f"export.certificate_answer_tokens={arguments.answer_tokens}", "--set", "export.certificate_prompts=1",
        "--set", "export.certificate_max_new_tokens=4"], env=os.environ | {"PYTHONPATH": os.getcwd()})
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6
    print(f"export-gguf -q {arguments.q}: exit code {done.returncode}, {time.monotonic() - started:.0f} s; largest resident memory of any process {peak:.2f} GB "
          "(llama.cpp's, which maps the whole file, among them)", flush=True)
    if not arguments.keep:
        shutil.rmtree(arguments.work)
    sys.exit(done.returncode)


if __name__ == "__main__":
    main()
