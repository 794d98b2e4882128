"""The GGUF file that llama.cpp runs when a folder is evaluated on a CPU: made for the purpose, proved in short, kept.

In: an adapter, merged or base folder. Out: `<output_dir>/cache/evaluation/<hash>-<type>.gguf`. Proof: llama.cpp splits five real prompts
into the trained tokenizer's tokens, and after the same tokens PyTorch in float32 chooses what the file chose. Limits: 100 tokens; a
file that leaves the house has a certificate (`export/certificate.py`), this one never does.
"""

from __future__ import annotations

from pathlib import Path

from emergency_kit.config import Resolved
from emergency_kit.errors import ExportError

# Files that are kept; the least lately used go.
KEPT_FILES = 4
NEW_TOKENS = 20
# Least share of the 100 tokens that PyTorch chooses, too. Measured on the bundled model: f16 100, q8_0 98 to 99, q4_k_m 91 to 92 of 100.
LEAST_EQUAL = {"f32": 0.95, "f16": 0.95, "bf16": 0.9, "q8_0": 0.9}
LEAST_EQUAL_OTHERS = 0.7


def make_file(resolved: Resolved, source: Path, file: Path, file_type: str) -> Path:
    """Write and prove the file unless it is there; raises ExportError where it does not answer like its source."""
    if file.is_file():
        file.touch()
        return file
    from emergency_kit.export.gguf import Source, open_source
    from emergency_kit.export.gguf_file import build_plan, write_gguf
    from emergency_kit.export.quantize import pick_quantizations
    from emergency_kit.files import staged_file
    from emergency_kit.model import backend

    kind = backend.check_checkpoint(source, resolved.config.model)
    opened = open_source(resolved, Source(source, kind, source.resolve().name))
    print(f"Writing {file_type} of {source} for llama.cpp ...", flush=True)
    with staged_file(file) as temporary:
        write_gguf(temporary, build_plan(opened.skeleton, pick_quantizations([file_type])[0], str(source)), opened.skeleton.config, opened.weights,
                   opened.vocabulary, opened.family, opened.source.name, opened.license_id)
        equal, tokens = prove(resolved, source, temporary)
        if equal < LEAST_EQUAL.get(file_type, LEAST_EQUAL_OTHERS) * tokens:
            raise ExportError(f"{source}: as {file_type}, llama.cpp chooses {equal} of {tokens} tokens as PyTorch does; it would not be this model that is evaluated. "
                              "Next: --engine torch")
    print(f"  {equal} of {tokens} greedy tokens as in PyTorch; kept as {file}", flush=True)
    for old in sorted(file.parent.glob("*.gguf"), key=lambda path: path.stat().st_mtime)[:-KEPT_FILES]:
        old.unlink()
    return file


def prove(resolved: Resolved, source: Path, file: Path) -> tuple[int, int]:
    """`(equal, all)` tokens that the file chose on five prompts; raises ExportError where text is split into other tokens."""
    import torch

    from emergency_kit.export import parity
    from emergency_kit.export.merge import on_cpu
    from emergency_kit.model import backend

    loaded = backend.load_checkpoint(on_cpu(resolved.config.model), source, dtype=torch.float32, fold=True)
    prompts = parity.build_prompts(resolved, loaded.tokenizer)
    ids = [parity.tokenize(loaded.tokenizer, prompt) for prompt in prompts]
    reply = parity.ask_llama({"model": str(file.resolve()), "texts": prompts, "prompts": ids, "new_tokens": NEW_TOKENS}, file.stat().st_size)
    if reply["tokens"] != ids:
        raise ExportError(f"{source}: llama.cpp splits text into other tokens than the model was trained with. Next: --engine torch")
    equal = tokens = 0
    with torch.inference_mode():
        for prompt, new in zip(ids, reply["generated"]):
            logits = loaded.model(input_ids=torch.tensor([prompt + new[:-1]]), use_cache=False, logits_to_keep=len(new)).logits[0]
            equal += int((logits.argmax(-1) == torch.tensor(new)).sum())
            tokens += len(new)
    return equal, tokens
