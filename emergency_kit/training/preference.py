"""Preference: the loss of DPO (Rafailov et al. 2023), and the rows that it is measured on.

In: pairs of a safe and an unsafe answer to the same prompt, one row after the other. Out: -log sigmoid(beta x margin), where the margin
is how much more the model has come to prefer the safe answer than it did where the run began. What the model said there is computed
once, before the first step, so it needs no second model: the start may be the base model, an adapter or a fully trained one.
The margin is of whole answers, or of the tokens in which they differ (`training.dpo_compare`). What both say after those, the end of the turn among it, becomes
less likely after the unsafe words, and at a high rate everywhere (benchmarks/RESULTS.md).
"""

from __future__ import annotations

import types
from dataclasses import dataclass
from typing import Any, Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from emergency_kit.data.pairs import PairRows
from emergency_kit.data.tokenize import IGNORE
from emergency_kit.model.head import find_head
from emergency_kit.training.loss import neftune_noise


@dataclass
class PairDataset(Dataset):
    """Pairs as a torch Dataset of (safe row, unsafe row, their log-probabilities under the model that the run began from)."""

    rows: PairRows
    reference: np.ndarray | None = None  # (pairs, 2), float32

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        reference = [0.0, 0.0] if self.reference is None else self.reference[index].tolist()
        return {"pair": self.rows[index], "reference": reference}


def token_log_probs(hidden: Tensor, labels: Tensor, head: Callable[[Tensor], Tensor]) -> Tensor:
    """Log-probability of each supervised token from a row's second on, 0 for the others, (rows, length - 1) in float32. hidden: (rows, length, width);
    labels: (rows, length)."""
    targets = labels[:, 1:]
    wanted = targets != IGNORE
    found = -F.cross_entropy(head(hidden[:, :-1][wanted]).float(), targets[wanted], reduction="none")
    return torch.zeros(targets.shape, dtype=torch.float32, device=found.device).masked_scatter(wanted, found)


def differing(safe: list[int], unsafe: list[int]) -> tuple[slice, slice]:
    """The places of two rows of tokens between what they begin and what they end with in common; one token of each at least, where both go on."""
    one, other = np.asarray(safe), np.asarray(unsafe)
    shorter = min(len(one), len(other))
    apart = np.flatnonzero(one[:shorter] != other[:shorter])
    start = int(apart[0]) if len(apart) else shorter
    room = max(0, shorter - start - 1)
    apart = np.flatnonzero(one[len(one) - room:] != other[len(other) - room:])
    ending = room - 1 - int(apart[-1]) if len(apart) else room
    return slice(start, len(one) - ending), slice(start, len(other) - ending)


def preference_loss(log_probs: Tensor, reference: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """`(loss of each pair, its margin)`, (pairs,) each. log_probs, reference: (2 x pairs,), safe and unsafe rows in turn."""
    moved = log_probs - reference
    margin = moved[0::2] - moved[1::2]
    return -F.logsigmoid(beta * margin), margin


def install(causal_lm: torch.nn.Module, beta: float, sft_weight: float, neftune_alpha: float = 0.0) -> None:
    """Give a causal LM a forward that returns `{"loss", "right"}` of a batch of pairs, or `{"log_probs"}` of its rows without `reference`.

    compared: the labels that the margin is of. sft_weight: of the safe answer's cross-entropy a token, all of it, added to the loss. right: how many
    pairs have a margin over 0. Divided by `num_items_in_batch`, the pairs of the whole step.
    """
    original = causal_lm.forward
    head = find_head(causal_lm)

    def forward(self: torch.nn.Module, input_ids: Tensor | None = None, attention_mask: Any = None, labels: Tensor | None = None,
                compared: Any = None, reference: Tensor | None = None, num_items_in_batch: Tensor | int | None = None, **options: Any) -> Any:
        if labels is None:
            return original(input_ids=input_ids, attention_mask=attention_mask, **options)
        embedded = self.get_input_embeddings()(input_ids)
        if neftune_alpha and self.training:
            embedded = embedded + neftune_noise(embedded, attention_mask.sum(1), neftune_alpha)
        hidden = self.get_decoder()(inputs_embeds=embedded, attention_mask=attention_mask, use_cache=False).last_hidden_state
        weighed = sft_weight and reference is not None
        tokens = token_log_probs(hidden, labels if weighed else compared, head)
        log_probs = torch.where(compared[:, 1:] != IGNORE, tokens, 0).sum(1)
        if reference is None:
            return {"log_probs": log_probs}
        losses, margin = preference_loss(log_probs, reference, beta)
        if weighed:
            losses = losses - sft_weight * tokens[0::2].sum(1) / (labels[0::2, 1:] != IGNORE).sum(1)
        return {"loss": losses.sum() / (len(losses) if num_items_in_batch is None else num_items_in_batch), "right": (margin > 0).sum()}

    causal_lm.forward = types.MethodType(forward, causal_lm)


def collate_pairs(items: list[dict[str, Any]], collate: Any, compare: str) -> dict[str, Tensor]:
    """Tensors of pairs, the safe and the unsafe row in turn: input_ids, attention_mask, labels, compared (2 x pairs, longest), reference (2 x pairs,).
    compare: `changed`, whose compared labels are those in which the rows differ, or `whole`."""
    batch = collate([row for item in items for row in item["pair"]])
    compared = batch["labels"] if compare == "whole" else torch.full_like(batch["labels"], IGNORE)
    if compare == "changed":
        for number, item in enumerate(items):
            for row, places in enumerate(differing(*(row["input_ids"] for row in item["pair"])), 2 * number):
                compared[row, places] = batch["labels"][row, places]
    return {**batch, "compared": compared, "reference": torch.tensor([value for item in items for value in item["reference"]], dtype=torch.float32)}
