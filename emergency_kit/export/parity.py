"""Parity: does an exported model still say what the model in PyTorch says?

In: a model and its tokenizer, or a GGUF file. Out: numbers, or an ExportError. `measure_difference`
compares logits, `prove_gguf` runs a file in llama.cpp and compares token by token. Prompts are real
ones: knowledge cards and situations, rendered as in use.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Iterator

import torch

from emergency_kit.config import REPOSITORY, Resolved
from emergency_kit.data.format import build_messages, render_prompt
from emergency_kit.errors import ExportError
from emergency_kit.export.progress import report_while
from emergency_kit.export.quantize import Quantization
from emergency_kit.knowledge.cards import load_cards

NEW_TOKENS = 20
# Two tokens whose logits lie closer than this, in standard deviations of the logits at that position,
# count as a tie: llama.cpp rounds activations to the file's type, PyTorch here does not. Largest error
# measured on the bundled model's ten best tokens: 1.3e-5, 0.0065 and 0.04.
TIE = {"F32": 1e-4, "F16": 0.02, "BF16": 0.1}
TRICKY = "Dial 112 or 1-800-222-1222 :\n\n  “don’t move”, 10 cm cut — 37.5 °C 🔥\tHe’s 5, isn't   breathing…"


def build_messages_for_proof(resolved: Resolved) -> list[list[dict[str, str]]]:
    """Five conversations as in use: one card, two cards, none, and a situation with digits, quotes and emoji."""
    cards = list(load_cards().values())
    grounded = resolved.config.dataset.grounding == "cards"
    chosen = [[cards[0]], cards[len(cards) // 3:][:2], [], [cards[2 * len(cards) // 3]], [cards[-1]]]
    situations = [f"{cards[len(cards) * number // 5].signs[0]} What do I do?" for number in range(4)] + [TRICKY]
    return [build_messages(situation, shown if grounded else None) for situation, shown in zip(situations, chosen)]


def build_prompts(resolved: Resolved, tokenizer: Any) -> list[str]:
    """The five conversations as text, by the tokenizer's chat template."""
    return [render_prompt(tokenizer, messages) for messages in build_messages_for_proof(resolved)]


def tokenize(tokenizer: Any, prompt: str) -> list[int]:
    """Token ids of a rendered prompt; its template has written the special tokens already."""
    return tokenizer(prompt, add_special_tokens=False)["input_ids"]


def compute_logits(model: Any, tokenizer: Any, prompts: list[str]) -> list[torch.Tensor]:
    """Float32 logits, one [positions, vocabulary] tensor a prompt."""
    logits = []
    with torch.inference_mode():
        for prompt in prompts:
            ids = torch.tensor([tokenize(tokenizer, prompt)], device=model.device)
            logits.append(model(input_ids=ids, use_cache=False).logits[0].float().cpu())
    return logits


def measure_difference(expected: list[torch.Tensor], found: list[torch.Tensor]) -> float:
    """Largest absolute difference of two lists of logits; NaN where one is NaN, infinite where shapes differ."""
    if [logits.shape for logits in expected] != [logits.shape for logits in found]:
        return float("inf")
    return torch.stack([(one - other).abs().max() for one, other in zip(expected, found)]).max().item()


def prove_gguf(path: Path, quantization: Quantization, model: Any, tokenizer: Any, resolved: Resolved) -> dict[str, Any]:
    """Run a GGUF file in llama.cpp and compare it with the model it was made from.

    model: in float32. Greedy decoding, 20 tokens on five prompts. Each token that llama.cpp chose is
    compared with PyTorch's choice after the same tokens; if all agree, so do the two greedy texts. For f16
    and bf16 PyTorch computes in float32 with weights rounded as in the file. Where PyTorch's own two best
    tokens tie (TIE), either is right, and counted. Returns the counts. Raises ExportError when the file
    does not load, when text is split into other tokens, or, for f32, f16 and bf16, when a token differs.
    """
    conversations = build_messages_for_proof(resolved)
    prompts = [render_prompt(tokenizer, messages) for messages in conversations]
    ids = [tokenize(tokenizer, prompt) for prompt in prompts]
    reply = ask_llama({"model": str(path.resolve()), "context_tokens": max(map(len, ids)) + NEW_TOKENS + 8, "exact": quantization.exact,
                       "texts": prompts, "prompts": ids, "new_tokens": NEW_TOKENS, "messages": conversations}, path.stat().st_size)
    for prompt, expected, found in zip(prompts, ids, reply["tokens"]):
        if expected != found:
            raise ExportError(f"{quantization.name}: llama.cpp splits text into other tokens than the model was trained with "
                              f"({_first_difference(tokenizer, expected, found)}, in {prompt[-60:]!r}); the file was not kept. "
                              "Next: convert the merged folder with llama.cpp's own convert_hf_to_gguf.py, and report this tokenizer")
    with report_while("comparing with PyTorch"), _rounded_weights(model, quantization.tensor_type):
        counts = _compare_choices(model, ids, reply["generated"], TIE.get(quantization.tensor_type, 0.0))
    same = sum(rendered is not None and _same_prompt(rendered, prompt, tokenizer) for rendered, prompt in zip(reply["rendered"], prompts))
    result = {"prompts": len(prompts), **counts, "templates_equal": same}
    if quantization.exact and counts["different"]:
        raise ExportError(f"{quantization.name}: llama.cpp chose another token than PyTorch at {counts['different']} of {counts['tokens']} places; "
                          "the file was not kept. Report this model's architecture; meanwhile serve the merged folder with: make infer")
    return result


def ask_llama(request: dict[str, Any], file_bytes: int) -> dict[str, Any]:
    """Send one request to llama.cpp in a process of its own; see `llama_process` for its keys.

    Raises ExportError when llama.cpp cannot load the file, crashes, or takes longer than five minutes
    plus two a gigabyte.
    """
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limit = 300 + 120 * file_bytes // 1_000_000_000
    environment = os.environ | {"OMP_WAIT_POLICY": "passive",
                                "PYTHONPATH": os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])])}
    with report_while("llama.cpp is answering"):
        try:
            done = subprocess.run([sys.executable, "-m", "emergency_kit.export.llama_process"], input=json.dumps(request | {"threads": threads}),
                                  capture_output=True, encoding="utf-8", errors="replace", timeout=limit, env=environment)
        except subprocess.TimeoutExpired:
            raise ExportError(f"llama.cpp did not finish within {limit} s and was stopped; the file was not kept. "
                              "Close other programs that use the processor, then run the same command again") from None
    try:
        return json.loads(done.stdout)
    except ValueError:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        telling = [line for line in lines if "error" in line.lower() or "GGML_ASSERT" in line] or lines or [f"exit code {done.returncode}"]
        raise ExportError(f"llama.cpp cannot use the file ({telling[0][:200]}; {telling[-1][:200]}); it was not kept. "
                          "Report this model, or check the environment: make verify") from None


def _compare_choices(model: Any, prompts: list[list[int]], generated: list[list[int]], tie: float) -> dict[str, int]:
    """Counts over all generated tokens: tokens, equal, tied, different."""
    counts = {"tokens": 0, "equal": 0, "tied": 0, "different": 0}
    with torch.inference_mode():
        for prompt, new in zip(prompts, generated):
            ids = torch.tensor([prompt + new[:-1]], device=model.device)
            logits = model(input_ids=ids, use_cache=False, logits_to_keep=len(new)).logits[0].float().cpu()
            chosen = logits.gather(1, torch.tensor(new)[:, None])[:, 0]
            gap = (logits.max(dim=1).values - chosen) / logits.std(dim=1)
            counts["tokens"] += len(new)
            counts["equal"] += int((gap == 0).sum())
            counts["tied"] += int(((gap > 0) & (gap < tie)).sum())
    counts["different"] = counts["tokens"] - counts["equal"] - counts["tied"]
    return counts


@contextlib.contextmanager
def _rounded_weights(model: Any, tensor_type: str) -> Iterator[None]:
    """Within the block, matrices are rounded to float16 or bfloat16 when used; one layer at a time, to save memory."""
    dtype = {"F16": torch.float16, "BF16": torch.bfloat16}.get(tensor_type)
    kept: dict[Any, torch.Tensor] = {}

    def round_weight(module: Any, _: Any) -> None:
        kept[module] = module.weight.data
        module.weight.data = module.weight.data.to(dtype).float()

    def restore_weight(module: Any, *_: Any) -> None:
        module.weight.data = kept.pop(module)

    hooks = []
    for module in model.modules() if dtype else []:
        if isinstance(module, (torch.nn.Linear, torch.nn.Embedding)):
            hooks += [module.register_forward_pre_hook(round_weight), module.register_forward_hook(restore_weight, always_call=True)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _same_prompt(rendered: str, prompt: str, tokenizer: Any) -> bool:
    """llama.cpp leaves a leading BOS to its tokenizer."""
    return rendered == prompt or (tokenizer.bos_token or "") + rendered == prompt


def _first_difference(tokenizer: Any, expected: list[int], found: list[int]) -> str:
    place = next((number for number, (one, other) in enumerate(zip(expected, found)) if one != other), min(len(expected), len(found)))
    here = slice(max(0, place - 1), place + 3)
    return f"token {place}: {tokenizer.convert_ids_to_tokens(found[here])} for {tokenizer.convert_ids_to_tokens(expected[here])}"
