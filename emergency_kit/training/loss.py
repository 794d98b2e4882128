"""Loss: cross-entropy over supervised tokens, with logits only where there is a label.

In: hidden states of the decoder and labels. Out: the sum over supervised tokens divided by the
supervised tokens of the whole optimizer step. `install` replaces the forward of the causal LM inside
the adapters' wrapper, so that DDP, FSDP and accelerate's autocast still see one forward call.
A vocabulary of 49,152 makes this the largest activation of a small model; most labels are IGNORE.
"""

from __future__ import annotations

import types
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from emergency_kit.data.tokenize import IGNORE


def supervised_loss(hidden: Tensor, labels: Tensor, head: torch.nn.Module, divisor: Tensor | int | None = None) -> Tensor:
    """Cross-entropy of next-token prediction over supervised positions, as a float32 scalar.

    hidden: (batch, length, width); labels: (batch, length), IGNORE where unsupervised. The hidden state
    at position t predicts label t + 1. divisor: supervised tokens of the whole step; None takes those
    of this batch. A batch with no supervised token gives 0 with a gradient of 0.
    """
    targets = labels[:, 1:]
    wanted = targets != IGNORE
    chosen = hidden[:, :-1][wanted]
    if chosen.shape[0] == 0:
        return hidden.float().sum() * 0.0
    total = F.cross_entropy(head(chosen).float(), targets[wanted], reduction="sum")
    return total / (chosen.shape[0] if divisor is None else divisor)


def install(causal_lm: torch.nn.Module) -> None:
    """Give a transformers causal LM a forward that returns `{"loss"}` when labels are passed."""
    original = causal_lm.forward
    head = causal_lm.get_output_embeddings()

    def forward(self: torch.nn.Module, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
                labels: Tensor | None = None, num_items_in_batch: Tensor | int | None = None, **options: Any) -> Any:
        if labels is None:
            return original(input_ids=input_ids, attention_mask=attention_mask, **options)
        options.pop("return_dict", None)
        decoder = self.get_decoder()
        hidden = decoder(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
        return {"loss": supervised_loss(hidden, labels, head, num_items_in_batch)}

    causal_lm.forward = types.MethodType(forward, causal_lm)
