"""Loss: cross-entropy over supervised tokens, with logits only where there is a label.

In: hidden states of the decoder and labels. Out: the sum over supervised tokens divided by the
supervised tokens of the whole optimizer step. `install` replaces the forward of the causal LM inside
the adapters' wrapper, so that DDP, FSDP and accelerate's autocast still see one forward call; the model is either
taken whole by `fused`, or goes through its own modules, on a GPU with the rows of a batch laid end to end.
A vocabulary of 49,152 makes this the largest activation of a small model; most labels are IGNORE.
"""

from __future__ import annotations

import types
from typing import TYPE_CHECKING, Any, Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from emergency_kit.data.tokenize import IGNORE
from emergency_kit.model.head import find_head
from emergency_kit.training import end_to_end
from emergency_kit.training.fused.tree import Row

if TYPE_CHECKING:
    from emergency_kit.training.fused.step import FusedStep


def supervised_loss(hidden: Tensor, labels: Tensor, head: Callable[[Tensor], Tensor], divisor: Tensor | int | None = None, smoothing: float = 0.0) -> Tensor:
    """Cross-entropy of next-token prediction over supervised positions, as a float32 scalar.

    hidden: (batch, length, width); labels: (batch, length), IGNORE where unsupervised. The hidden state
    at position t predicts label t + 1. head: makes logits of hidden states. divisor: supervised tokens of the whole step; None takes those
    of this batch. smoothing: share of the target's probability spread over the vocabulary (Szegedy et al. 2016). A batch with no
    supervised token gives 0 with a gradient of 0.
    """
    targets = labels[:, 1:]
    wanted = targets != IGNORE
    chosen = hidden[:, :-1][wanted]
    if chosen.shape[0] == 0:
        return head(hidden[:, :1]).float().sum() * 0.0  # through the head, too: where FSDP divides it, all ranks gather it together
    total = F.cross_entropy(head(chosen).float(), targets[wanted], reduction="sum", label_smoothing=smoothing)
    return total / (chosen.shape[0] if divisor is None else divisor)


def install(causal_lm: torch.nn.Module, fused: FusedStep | None = None, neftune_alpha: float = 0.0, rows_end_to_end: bool = False, smoothing: float = 0.0) -> None:
    """Give a transformers causal LM a forward that returns `{"loss"}` when labels are passed.

    neftune_alpha: noise on the embeddings in training; `fused` has its own setting. rows_end_to_end: no padding (see end_to_end).
    smoothing: of the labels, in training alone.
    """
    original = causal_lm.forward
    head = find_head(causal_lm)

    def forward(self: torch.nn.Module, input_ids: Tensor | None = None, attention_mask: Any = None,
                labels: Tensor | None = None, num_items_in_batch: Tensor | int | None = None, **options: Any) -> Any:
        if labels is None:
            return original(input_ids=input_ids, attention_mask=attention_mask, **options)
        if fused is not None:
            return {"loss": fused(unpadded(input_ids, labels, attention_mask), num_items_in_batch)}
        lengths, inputs = attention_mask.sum(1), {"attention_mask": attention_mask}
        if rows_end_to_end:
            input_ids, labels, inputs = end_to_end.lay(input_ids, labels, attention_mask, IGNORE)
        embedded = self.get_input_embeddings()(input_ids)
        if neftune_alpha and self.training:
            embedded = embedded + neftune_noise(embedded, lengths, neftune_alpha)
        hidden = self.get_decoder()(inputs_embeds=embedded, use_cache=False, **inputs).last_hidden_state
        return {"loss": supervised_loss(hidden, labels, head, num_items_in_batch, smoothing if self.training else 0.0)}

    causal_lm.forward = types.MethodType(forward, causal_lm)


def unpadded(input_ids: Tensor, labels: Tensor, attention_mask: Tensor) -> list[Row]:
    """Rows of a right-padded batch, (rows, longest) each, without their padding."""
    lengths = attention_mask.sum(1).tolist()
    ids, wanted = input_ids.cpu().numpy(), labels.cpu().numpy()
    return [Row(ids[row, :length], wanted[row, :length]) for row, length in enumerate(lengths)]


def neftune_noise(embedded: Tensor, lengths: Tensor, alpha: float) -> Tensor:
    """Uniform noise of alpha / sqrt(length x width) (Jain et al. 2023, "NEFTune"), by each row's own length.

    embedded: (rows, longest, width), or (1, tokens, width) with the rows end to end.
    """
    scale = alpha / (lengths * embedded.shape[-1]).float().sqrt()
    one_row = len(embedded) == 1 and embedded.shape[1] == int(lengths.sum())
    scale = torch.repeat_interleave(scale, lengths)[None, :, None] if one_row else scale[:, None, None]
    return (torch.empty_like(embedded).uniform_(-1, 1) * scale).to(embedded.dtype)
