"""A frozen weight in 8-bit integers, for the gradient that goes back through it: dh = dy W on a CPU that multiplies integers faster than floats.

Only the way back takes it: the loss, and so what the adapters learn to lower, is that of the float32 weights. A gradient's outliers would
waste its 256 steps, and so would a weight's; a product of both with an orthogonal matrix, which leaves dy W as it is, spreads them over
their neighbours first (Ashkboos et al. 2024, "QuaRot"). Then each token of dy and each column of W has a scale of its own. What
rounding does to the adapters' gradients is no more than bfloat16 would do (benchmarks/RESULTS.md, a test). Integer sums are exact, so runs repeat to
the bit. Not for the head: probabilities of a whole vocabulary lie below one step of the largest.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

LARGEST = 127
# Neighbours that a rotation spreads over: 16, 32 and 64 leave the same error, 16 costs no more than one pass over the numbers.
SPREAD = 16


class IntegerWeight:
    """values: int8 (outputs, inputs), rotated along the outputs; scale: (inputs,) of its columns."""

    def __init__(self, weight: Tensor):
        outputs, inputs = weight.shape
        self.rotation = _rotation(min(SPREAD, outputs & -outputs))
        turned = torch.mm(weight.t().reshape(-1, len(self.rotation)), self.rotation).view(inputs, outputs)
        self.scale = _scale(turned)[:, 0]
        # A copy, since of a single output's `contiguous()` keeps strides that torch's product leaves its result unwritten for.
        self.values = torch.empty(outputs, inputs, dtype=torch.int8).copy_(turned.div_(self.scale[:, None]).round_().t())

    def product(self, dy: Tensor, out: Tensor, scratch: Any) -> Tensor:
        """dy W into out (tokens, inputs), float32. dy: (tokens, outputs) float32; a token whose gradient is no finite number comes out as none."""
        tokens, outputs = dy.shape
        turned = scratch("turned", tokens, outputs)
        torch.mm(dy.reshape(-1, len(self.rotation)), self.rotation, out=turned.view(-1, len(self.rotation)))
        scale = _scale(turned)
        turned.mul_(scale.reciprocal()).round_()
        values = scratch("turned values", tokens, outputs, dtype=torch.int8).copy_(turned)
        sums = torch._int_mm(values, self.values, out=scratch("sums", tokens, len(self.scale), dtype=torch.int32))
        return torch.mul(sums, scale, out=out).mul_(self.scale)


def _scale(x: Tensor) -> Tensor:
    """What one step is worth in each row, (rows, 1)."""
    return torch.maximum(x.amax(1, keepdim=True), x.amin(1, keepdim=True).neg_()).div_(LARGEST).clamp_(min=torch.finfo(x.dtype).tiny * LARGEST)


@functools.cache
def _rotation(width: int) -> Tensor:
    """The orthogonal Hadamard matrix of a power of two."""
    found = torch.ones(1, 1)
    while len(found) < width:
        found = torch.cat([torch.cat([found, found], 1), torch.cat([found, -found], 1)])
    return found / width ** 0.5
