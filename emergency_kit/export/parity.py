"""Parity: what a model says in PyTorch, what a file says in llama.cpp.

In: a model and its tokenizer, or a GGUF file. Out: logits, counts, answers. `merge` compares logits of
`build_prompts`; `certificate` compares a file, by `ask_llama`, with the merged model. Prompts are real
ones: knowledge cards and situations, rendered as in use.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import torch

from emergency_kit.config import REPOSITORY, Resolved
from emergency_kit.data.format import build_messages
from emergency_kit.data.template import SETTINGS, render_prompt
from emergency_kit.errors import ExportError
from emergency_kit.export.progress import report_while
from emergency_kit.knowledge.cards import load_cards
from emergency_kit.model.process_memory import cores

TRICKY = "Dial 112 or 1-800-222-1222 :\n\n  “don’t move”, 10 cm cut — 37.5 °C 🔥\tHe’s 5, isn't   breathing…"
NOTHING: dict[str, Any] = {"template_settings": SETTINGS, "texts": [], "messages": [], "prompts": [], "sequences": [], "new_tokens": 1, "lora": "", "logits_file": ""}


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


def ask_llama(request: dict[str, Any], file_bytes: int) -> dict[str, Any]:
    """Send one request to llama.cpp in a process of its own; see `llama_process` for its keys, all but `model` may be left out.

    Raises ExportError when llama.cpp cannot load the file, crashes, or takes longer than a minute for each 100
    tokens and gigabyte, twenty minutes at least.
    """
    request = NOTHING | request
    tokens = sum(len(ids) for ids, _ in request["sequences"]) + sum(len(prompt) + 10 * request["new_tokens"] for prompt in request["prompts"])
    limit = 1200 + 60 * tokens * file_bytes // 100_000_000_000
    environment = os.environ | {"OMP_WAIT_POLICY": "passive",
                                "PYTHONPATH": os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])])}
    with report_while("llama.cpp is answering"):
        try:
            done = subprocess.run([sys.executable, "-m", "emergency_kit.export.llama_process"], input=json.dumps(request | {"threads": cores()}),
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
