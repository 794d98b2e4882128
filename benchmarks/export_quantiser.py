"""Every GGUF type, tensor by tensor and byte by byte, against llama.cpp's own quantiser.

Small random models whose rows are multiples of 256 (so that K-quants are K-quants), in several families, tied and untied, and
the bundled model, whose rows are not. Each is written as f32 and, by the kit, in every type; llama.cpp's `llama_model_quantize`,
out of the prebuilt package cyllama in an environment of its own, makes the same types from the f32 file. Exits with 1 on any difference.
Run: `make bench-quantiser`.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from gguf import GGUFReader
from transformers import AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from emergency_kit.export import architecture
from emergency_kit.export.gguf_file import build_plan, write_gguf
from emergency_kit.export.merge import load_skeleton, on_cpu
from emergency_kit.export.quantize import QUANTIZATIONS
from emergency_kit.export.vocabulary import build_vocabulary
from emergency_kit.export.weights import load_weights
from tests.export import tiny

PACKAGE = "cyllama==0.2.18"
FOLDER = Path("outputs/bench/quantiser")
QUANTISE = """
import sys
import cyllama.llama.llama_cpp as llama
source, target, file_type = sys.argv[1:]
settings = llama.LlamaModelQuantizeParams()
settings.ftype, settings.nthread = int(file_type), 2
llama.model_quantize(source, target, settings)
"""
MODELS: dict[str, dict] = {
    "llama 256 wide, 2 layers, tied": {},
    "llama 512 wide, 16 layers, untied, 8 heads a key head": {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 16, "num_attention_heads": 8,
                                                             "num_key_value_heads": 1, "tie_word_embeddings": False},
    "mistral 512 wide, 8 layers, untied": {"kind": "mistral", "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8,
                                           "num_attention_heads": 8, "num_key_value_heads": 4, "tie_word_embeddings": False, "sliding_window": None},
    "qwen2 256 wide, 4 layers, biases": {"kind": "qwen2", "num_hidden_layers": 4, "vocab_size": 49280},
    "qwen3 512 wide, 4 layers": {"kind": "qwen3", "hidden_size": 512, "head_dim": 64, "num_hidden_layers": 4},
    "llama 320 wide (rows of 320 fall back)": {"hidden_size": 320, "intermediate_size": 640, "num_attention_heads": 5, "num_key_value_heads": 1},
}


def install() -> Path:
    """The Python of an environment that holds llama.cpp's quantiser."""
    python = FOLDER / "venv/bin/python"
    if not python.is_file():
        subprocess.run([sys.executable, "-m", "venv", str(FOLDER / "venv")], check=True)
        subprocess.run([str(python), "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-deps", PACKAGE], check=True)
    return python


def compare(name: str, folder: Path, python: Path, scratch: Path) -> int:
    """Print one line a type; returns the number of tensors that differ."""
    section = on_cpu(tiny.resolve(folder, scratch).config.model)
    skeleton, weights = load_skeleton(str(folder), section), load_weights(str(folder))
    family = architecture.pick_family(skeleton.config, name)
    vocabulary = build_vocabulary(AutoTokenizer.from_pretrained(folder), skeleton.config.vocab_size, name)
    exact, ours, theirs, wrong = scratch / "f32.gguf", scratch / "ours.gguf", scratch / "theirs.gguf", 0
    write_gguf(exact, build_plan(skeleton, QUANTIZATIONS["f32"], name), skeleton.config, weights, vocabulary, family, "m")
    for quantization in QUANTIZATIONS.values():
        plan = build_plan(skeleton, quantization, name)
        write_gguf(ours, plan, skeleton.config, weights, vocabulary, family, "m")
        done = subprocess.run([str(python), "-c", QUANTISE, str(exact), str(theirs), str(quantization.file_type)], capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{name}: {quantization.name}: llama.cpp's quantiser failed: {done.stderr[-400:]}")
        found, expected = ({tensor.name: tensor for tensor in GGUFReader(path).tensors} for path in (ours, theirs))
        types = [key for key in expected if key not in found or found[key].tensor_type != expected[key].tensor_type]
        bytes_ = [key for key in expected if key not in types and found[key].data.tobytes() != expected[key].data.tobytes()]
        wrong += len(types) + len(bytes_) + len(found.keys() - expected.keys())
        notes = [f"{key} is {found[key].tensor_type.name}, not {expected[key].tensor_type.name}" for key in types[:3]] + [f"{key} differs" for key in bytes_[:3]]
        print(f"{name:<56} {quantization.name:<7} {len(expected) - len(types) - len(bytes_):>4} of {len(expected):>4} tensors equal"
              f"{', ' + str(sum(plan.fallbacks.values())) + ' fell back' if plan.fallbacks else ''}{'; ' + ', '.join(notes) if notes else ''}", flush=True)
    return wrong


def main() -> None:
    """Compare all models; exit with 1 where a tensor differs."""
    python, wrong = install(), 0
    with tempfile.TemporaryDirectory(dir=FOLDER) as temporary:
        scratch = Path(temporary)
        for name, settings in MODELS.items():
            wrong += compare(name, tiny.save_model(scratch / "model", **settings), python, scratch)
            shutil.rmtree(scratch / "model")
        wrong += compare("bundled, 576 wide, 30 layers", tiny.BUNDLED, python, scratch)
    print(f"{PACKAGE}: {'every tensor of every type equal' if not wrong else f'{wrong} tensors differ'}")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
