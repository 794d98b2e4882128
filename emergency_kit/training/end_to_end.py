"""Rows of a batch laid end to end through transformers' modules, with no padding and no mask.

In: a causal LM of a family that hands keywords to its attention. Out: an attention function of transformers' own
registry that takes every row by itself, so that SDPA runs its flash kernel on each. One mask over all rows would
instead be a square of all their tokens, and slower than padding (benchmarks/RESULTS.md). For what `fused` does not take on a GPU.
"""

from __future__ import annotations

import contextlib
from typing import Any, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface

from emergency_kit.training.fused.step import slides

NAME = "rows_end_to_end"
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


def attend(module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float | None = None,
           dropout: float = 0.0, row_lengths: list[int] | None = None, **_: Any) -> tuple[Tensor, None]:
    """Causal attention within each row. query: (1, heads, tokens, width); key, value: (1, key heads, tokens, width)."""
    assert row_lengths is not None, "the trained model is called by its loss alone"
    rows = zip(*(part.split(row_lengths, 2) for part in (query, key, value)))
    found = [F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True, scale=scaling, enable_gqa=q.shape[1] != k.shape[1])
             for q, k, v in rows]
    return torch.cat(found, 2).transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, attend)


def install(causal_lm: Any) -> bool:
    """Make a model's layers attend within rows; False, and nothing changed, where its family or its attention's pattern does not allow it."""
    config = causal_lm.config
    if config.model_type not in FAMILIES or slides(config):
        return False
    causal_lm.set_attn_implementation(NAME)
    return True


@contextlib.contextmanager
def set_aside(causal_lm: Any) -> Iterator[None]:
    """Give a model back its usual attention for a while, to generate with."""
    installed = causal_lm.config._attn_implementation == NAME
    if installed:
        causal_lm.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        if installed:
            causal_lm.set_attn_implementation(NAME)


def lay(input_ids: Tensor, labels: Tensor, attention_mask: Tensor, ignore: int) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """`(ids, labels, keywords of the decoder)` of a right-padded batch as one row, (1, tokens).

    Nothing predicts the first token of a row, above all not the row before it, so its label is `ignore`.
    """
    real, labels = attention_mask.bool(), labels.clone()
    labels[:, 0] = ignore
    positions = (attention_mask.cumsum(1) - 1)[real][None]
    return input_ids[real][None], labels[real][None], {"position_ids": positions, "row_lengths": attention_mask.sum(1).tolist()}
