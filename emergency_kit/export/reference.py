"""Reference: the merged model in PyTorch, float32, on the CPU, which every exported file is held against.

In: a source's `Weights` or its folder. Out: final hidden states at chosen places, log-probabilities, greedy answers. A
model that fits into the free memory is loaded whole, by transformers and PEFT, and not by the exporter's own reading.
A larger one runs with one tensor in memory at a time; it can be compared place by place, but not answer at length.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Callable, Sequence

import torch

from emergency_kit.config import Resolved
from emergency_kit.export.merge import load_merged, on_cpu
from emergency_kit.export.progress import report_while
from emergency_kit.export.weights import Weights
from emergency_kit.inference.engine import Generated, Messages
from emergency_kit.inference.torch_engine import Engine
from emergency_kit.model import backend
from emergency_kit.model.head import find_head
from emergency_kit.model.process_memory import available_bytes
from emergency_kit.model.backend import Loaded

# Share of the free memory that the weights may take; the rest is for activations and for llama.cpp.
MEMORY_SHARE = 0.6


@dataclass
class Reference:
    """A causal language model. whole: all weights are in memory; merge_difference: see `merge.Merged`, None without an adapter."""

    model: Any
    tokenizer: Any
    whole: bool
    merge_difference: float | None = None

    @cached_property
    def head(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """From final hidden states to logits."""
        return find_head(self.model)

    @torch.inference_mode()
    def hidden(self, sequences: Sequence[tuple[list[int], int]]) -> torch.Tensor:
        """Final hidden states [places, width] of each sequence's tokens from its second element on."""
        return torch.cat([self.model.model(input_ids=torch.tensor([ids]), use_cache=False).last_hidden_state[0, start:] for ids, start in sequences])

    @torch.inference_mode()
    def log_probabilities(self, hidden: torch.Tensor) -> torch.Tensor:
        """Log-probabilities [places, vocabulary] of the next token."""
        return self.head(hidden).log_softmax(-1)

    def answer(self, prompts: Sequence[Messages], max_new_tokens: int) -> list[Generated]:
        """Greedy answers of a whole model."""
        assert self.whole
        return Engine(Loaded(self.model, self.tokenizer, "merged", "")).generate(prompts, max_new_tokens, batch_size=len(prompts))


def load_reference(resolved: Resolved, folder: Path, kind: str, weights: Weights, config: Any, tokenizer: Any, total_weights: int) -> Reference:
    """The source as a reference; an adapter is merged, which is proved on the way (see `merge.load_merged`)."""
    if 4 * total_weights > MEMORY_SHARE * free_memory():
        print(f"  {4 * total_weights / 1e9:.0f} GB in float32 do not fit into the free memory: compared one tensor at a time, without answers of its own", flush=True)
        return Reference(_stream(config, weights), tokenizer, whole=False)
    if kind == "adapter":
        merged = load_merged(resolved, folder)
        print(f"  merged with {backend.base_name(resolved.config.model)} in memory: largest logit difference {merged.difference:.1e} "
              f"(limit {resolved.config.export.merge_max_logit_difference:g})", flush=True)
        return Reference(merged.model.eval(), merged.tokenizer, True, merged.difference)
    with report_while(f"loading {folder}"):
        loaded = backend.load_checkpoint(on_cpu(resolved.config.model), folder, dtype=torch.float32)
    return Reference(loaded.model, loaded.tokenizer, True)


def free_memory() -> int:
    """Bytes that a new process could take without swapping."""
    return available_bytes() or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _stream(config: Any, weights: Weights) -> Any:
    """A model whose parameters are read when their module runs and let go afterwards."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
    tied = {"lm_head.weight": "model.embed_tokens.weight"} if config.tie_word_embeddings else {}
    for path, module in model.named_modules():
        names = {name: f"{path}.{name}" for name, _ in module.named_parameters(recurse=False)}
        if names:
            _read_when_run(module, {name: tied.get(full, full) for name, full in names.items()}, weights)
    return model.eval()


def _read_when_run(module: torch.nn.Module, names: dict[str, str], weights: Weights) -> None:
    empty = {name: module._parameters[name] for name in names}

    def read(*_: Any) -> None:
        for name, full in names.items():
            module._parameters[name] = torch.nn.Parameter(weights.read(full), requires_grad=False)

    def let_go(*_: Any) -> None:
        module._parameters.update(empty)

    module.register_forward_pre_hook(read)
    module.register_forward_hook(let_go, always_call=True)
