"""The cache of keys and values of decoding on a CPU, preallocated, and attention that copies nothing of it.

In: queries, keys and values of transformers' modules. Out: the same numbers as its own eager attention and `DynamicCache`, which copy the whole
cache at every token, and once more for every query head that shares a key head. Lengths grow by ROOM, since oneDNN compiles and keeps a program for every shape of a
16-bit product, and a product over part of a buffer copies it (benchmarks/RESULTS.md). Limits: full attention; models that slide keep transformers' cache.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, Cache, DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.masking_utils import eager_mask

NAME = "emergency_kit_grouped"
# Tokens of the room that is added when it is full.
ROOM = 64
# Queries of one product.
BLOCK = 128
# Tokens of prompts that are read together: scores of more are larger than any cache of a processor.
PROMPT_TOKENS = 2048


class PreallocatedLayer(DynamicLayer):
    """keys, values: (rows, key heads, room, width), of which `length` tokens are filled and the others zero."""

    keys: Tensor
    values: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.length = 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take the new tokens; returns all so far and the room behind them, which the mask hides."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end = self.length + key_states.shape[-2]
        if self.length == 0 or end > self.keys.shape[-2]:
            self.keys, self.values = (self._with_room(held, new, end) for held, new in ((self.keys, key_states), (self.values, value_states)))
        self.keys[:, :, self.length:end], self.values[:, :, self.length:end] = key_states, value_states
        self.length = end
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """Tokens so far."""
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """`(keys, offset)` of the mask for so many new tokens."""
        return max(_whole(self.length + query_length), self.keys.shape[2] if self.length else 0), 0

    def _with_room(self, held: Tensor, new: Tensor, end: int) -> Tensor:
        larger = new.new_zeros(*new.shape[:2], _whole(end), new.shape[-1])
        if self.length:
            larger[:, :, :self.length] = held[:, :, :self.length]
        return larger


def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float, dropout: float = 0.0, **_: Any) -> tuple[Tensor, None]:
    """Attention for transformers' interface: query (rows, heads, new, width), key and value (rows, key heads, seen, width); out (rows, new, heads, width)."""
    rows, heads, new, width = query.shape
    groups, room = key.shape[1:3]
    query, key, out = query * scaling, key.transpose(2, 3), query.new_empty(rows, new, heads, width)
    seen = room
    if new > BLOCK and attention_mask is not None:  # a block of queries looks at no key that lies behind all of them
        seen = int((attention_mask[:, 0, -1] == 0).nonzero()[:, 1].max()) + 1
    for start in range(0, new, BLOCK):
        end = min(new, start + BLOCK)
        keys = min(room, _whole(seen - new + end))
        weights = torch.matmul(query[:, :, start:end].reshape(rows, groups, -1, width), key[..., :keys]).view(rows, heads, end - start, keys)
        if attention_mask is not None:
            weights += attention_mask[:, :, start:end, :keys]
        # In 16 bits, too, it is summed in float32.
        weights = torch.softmax(weights, -1).view(rows, groups, -1, keys)
        out[:, start:end] = torch.matmul(weights, value[:, :, :keys]).view(rows, heads, end - start, width).transpose(1, 2)
    return out, None


def use(model: Any) -> bool:
    """Let a model that answers on a CPU attend so; whether it does. A model that is being trained keeps its own attention, and thereby its bits."""
    if model.device.type != "cpu" or model.config._attn_implementation not in ("eager", NAME) or not all(type(layer) is DynamicLayer for layer in _cache(model).layers):
        return False
    model.config._attn_implementation = NAME
    return True


def new_cache(model: Any, preallocated: bool) -> Cache:
    """An empty cache for a batch."""
    cache = _cache(model)
    if preallocated:
        cache.layers = [PreallocatedLayer() for _ in cache.layers]
    return cache


def join(caches: list[Cache]) -> Cache:
    """One cache of the rows of several, whose layers are preallocated and of the same length; the others are spent."""
    first, *others = caches
    for number, layer in enumerate(first.layers if others else ()):
        parts = [cache.layers[number] for cache in caches]
        layer.keys, layer.values = torch.cat([part.keys for part in parts]), torch.cat([part.values for part in parts])
        for part in parts[1:]:
            part.keys = part.values = None
    return first


def _cache(model: Any) -> DynamicCache:
    return DynamicCache(config=model.config.get_text_config())


def _whole(tokens: int) -> int:
    return -(-tokens // ROOM) * ROOM


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, eager_mask)
