"""The head: from a decoder's last hidden states to logits, with whatever a family does to them on the way.

In: a causal language model of transformers. Out: a function of hidden states. Most families multiply by the head and are done; Granite and
Cohere scale the logits, Gemma 2 bends them. Nothing here knows a family by name: the model's own forward is given hidden states in its decoder's place.
"""

from __future__ import annotations

from typing import Any, Callable

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPast


def find_head(causal_lm: Any) -> Callable[[Tensor], Tensor]:
    """What makes logits (..., vocabulary) of hidden states (..., width): the head itself where that is all there is. Draws no random number."""
    head, body, forward = causal_lm.get_output_embeddings(), causal_lm.get_decoder(), causal_lm.forward

    def whole(hidden: Tensor) -> Tensor:
        own = body.__dict__.get("forward")
        body.forward = lambda *_, **__: BaseModelOutputWithPast(last_hidden_state=hidden.reshape(1, -1, hidden.shape[-1]))
        try:
            logits = forward(input_ids=torch.zeros(1, 1, dtype=torch.long, device=hidden.device), use_cache=False).logits
        finally:
            del body.forward
            if own is not None:
                body.forward = own
        return logits.reshape(*hidden.shape[:-1], -1)

    with torch.no_grad():
        weight = next(head.parameters())
        # Large enough that what bends logits shows; a model that is read tensor by tensor has no place of its own.
        probe = torch.linspace(-30, 30, 2 * weight.shape[-1], dtype=weight.dtype, device="cpu" if weight.is_meta else weight.device).reshape(1, 2, -1)
        return head if torch.allclose(whole(probe), head(probe), rtol=1e-2, atol=1e-2) else whole
