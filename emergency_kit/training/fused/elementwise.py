"""What a layer does to numbers one by one: norm, rotation, SwiGLU, dropout, 4-bit weights spread out; each in one launch on a GPU.

In and out: views whose last dimension is contiguous, results written in place. On CUDA tensors Triton's twins of these functions
(kernels.py) run where Triton is installed, as it is with every CUDA build of torch on Linux; elsewhere torch's own operations do.
A step is half matrix products at best, so that a pass over memory saved is time saved (benchmarks/RESULTS.md).
"""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import torch
from torch import Tensor


def norm(x: Tensor, weight: Tensor, epsilon: float, r: Tensor, out: Tensor) -> None:
    """out = x r w with r = 1 / sqrt(mean x² + ε), which is put into r, float32 (tokens, 1). x, out: (tokens, width)."""
    if kernels := _kernels(x):
        return kernels.norm(x, weight, epsilon, r, out)
    torch.mul(x, inverse_norm(x, epsilon, out=r), out=out)
    out *= weight


def norm_again(x: Tensor, weight: Tensor, epsilon: float, r: Tensor, out: Tensor) -> None:
    """The same with an r that is known."""
    if kernels := _kernels(x):
        return kernels.norm(x, weight, epsilon, r, out)
    torch.mul(x, r, out=out)
    out *= weight


def inverse_norm(x: Tensor, epsilon: float, out: Tensor | None = None) -> Tensor:
    """r of each token, (tokens, 1), in float32."""
    return torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.float32, out=out).square_().div_(x.shape[1]).add_(epsilon).rsqrt_()


def add_norm_gradient(dh: Tensor, x: Tensor, r: Tensor, weight: Tensor, scratch: Any, dx: Tensor) -> None:
    """Add to dx the gradient of x through h = x r w; dh (tokens, width) is overwritten."""
    if kernels := _kernels(x):
        return kernels.add_norm_gradient(dh, x, r, weight, dx)
    dh *= weight
    product = torch.mul(dh, x, out=scratch("product", *x.shape))
    along = torch.mv(product, scratch("ones", x.shape[1]).fill_(1))[:, None]
    dh *= r
    dx += dh
    dx.addcmul_(x, (along * r.pow(3) / x.shape[1]).to(x.dtype), value=-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor, back: bool = False) -> None:
    """out = x cos + rotate_half(x) sin over the last dimension, whose halves are rotated against each other; back: by the angle's opposite.

    x: (tokens, key heads, 1 or copies, width); out: (tokens, key heads, copies, width); cos, sin: (tokens, 1, 1, half width).
    """
    if kernels := _kernels(x):
        return kernels.rotate(x.expand(out.shape), cos, sin, out, back)
    sign = -1 if back else 1
    low, high = x.expand(out.shape).chunk(2, -1)
    out_low, out_high = out.chunk(2, -1)
    torch.mul(low, cos, out=out_low).addcmul_(high, sin, value=-sign)
    torch.mul(high, cos, out=out_high).addcmul_(low, sin, value=sign)


def swiglu(gate_up: Tensor, out: Tensor, scratch: Any) -> Tensor | None:
    """out = silu(gate) up, (tokens, width). gate_up: (tokens, 2 width). Returns silu(gate) in scratch memory, where it was made on its own."""
    if kernels := _kernels(gate_up):
        return kernels.swiglu(gate_up, out)
    gate, up = gate_up.chunk(2, 1)
    silu = torch.ops.aten.silu.out(gate, out=scratch("silu", *gate.shape))
    torch.mul(silu, up, out=out)
    return silu


def swiglu_gradient(dm: Tensor, gate_up: Tensor, silu: Tensor | None, out: Tensor) -> None:
    """Gradients of gate and up into out, (tokens, 2 width); dm, (tokens, width), is overwritten. silu: what `swiglu` of the same numbers returned."""
    if kernels := _kernels(gate_up):
        return kernels.swiglu_gradient(dm, gate_up, out)
    (gate, up), (dgate, dup) = gate_up.chunk(2, 1), out.chunk(2, 1)
    torch.mul(dm, silu, out=dup)
    dm *= up
    torch.ops.aten.silu_backward.grad_input(dm, gate, grad_input=dgate)


def mask(x: Tensor, kept: Tensor, out: Tensor) -> Tensor:
    """out = x kept, (tokens, width)."""
    if kernels := _kernels(x):
        kernels.multiply(x, kept, out, add=False)
        return out
    return torch.mul(x, kept, out=out)


def add_masked(total: Tensor, x: Tensor, kept: Tensor) -> None:
    """total += x kept, (tokens, width)."""
    if kernels := _kernels(x):
        return kernels.multiply(x, kept, total, add=True)
    total.addcmul_(x, kept)


def spread(packed: Tensor, state: Any, out: Tensor) -> None:
    """4-bit weights into out, (outputs, inputs), whose rows may be apart. packed, state: bitsandbytes' bytes and what they mean. Its own kernel writes
    a tensor that would then have to be copied to its place: that copy took twice as long as the spreading (benchmarks/RESULTS.md)."""
    ours = state.nested and state.blocksize == 64 and state.state2.blocksize == 256 and out.shape[1] % 64 == 0 and packed.dtype == torch.uint8
    if ours and (kernels := _kernels(out)):
        return kernels.spread(packed, state, out)
    from bitsandbytes.functional import dequantize_4bit

    out.copy_(dequantize_4bit(packed, state))


def _kernels(x: Tensor) -> Any:
    return _load() if x.is_cuda else None


@functools.cache
def _load() -> Any:
    if importlib.util.find_spec("triton") is None:
        return None
    from emergency_kit.training.fused import kernels

    return kernels
