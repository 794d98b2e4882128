"""Triton's twins of elementwise.py: the same functions over the same views, each one launch. Imported on a GPU alone.

A program takes one row where a sum over it is needed, else a block of one; arithmetic is float32 within. tests/training/test_gpu.py holds
them against torch's own operations.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024
# Heads that a program rotates, and blocks of 64 weights that one spreads out.
HEADS, GROUPS = 8, 32


@triton.jit
def _norm(x, weight, r, out, x_stride, out_stride, width, epsilon, SIZE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, SIZE)
    inside = at < width
    values = tl.load(x + row * x_stride + at, mask=inside, other=0.0).to(tl.float32)
    inverse = 1.0 / tl.sqrt(tl.sum(values * values, 0) / width + epsilon)
    tl.store(r + row, inverse)
    scale = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * out_stride + at, values * inverse * scale, mask=inside)


def norm(x: Tensor, weight: Tensor, epsilon: float, r: Tensor, out: Tensor) -> None:
    _norm[(len(x),)](x, weight, r, out, x.stride(0), out.stride(0), x.shape[1], epsilon, SIZE=triton.next_power_of_2(x.shape[1]), num_warps=8)


@triton.jit
def _add_norm_gradient(dh, x, r, weight, dx, dh_stride, x_stride, dx_stride, width, SIZE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, SIZE)
    inside = at < width
    gradient = tl.load(dh + row * dh_stride + at, mask=inside, other=0.0).to(tl.float32) * tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    values = tl.load(x + row * x_stride + at, mask=inside, other=0.0).to(tl.float32)
    inverse = tl.load(r + row)
    along = tl.sum(gradient * values, 0) * inverse * inverse * inverse / width
    before = tl.load(dx + row * dx_stride + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(dx + row * dx_stride + at, before + gradient * inverse - values * along, mask=inside)


def add_norm_gradient(dh: Tensor, x: Tensor, r: Tensor, weight: Tensor, dx: Tensor) -> None:
    _add_norm_gradient[(len(x),)](dh, x, r, weight, dx, dh.stride(0), x.stride(0), dx.stride(0), x.shape[1], SIZE=triton.next_power_of_2(x.shape[1]), num_warps=8)


@triton.jit
def _rotate(x, cos, sin, out, x0, x1, x2, out0, out1, out2, cos_stride, heads, copies, half, sign, HEADS: tl.constexpr, SIZE: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    head, at = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None], tl.arange(0, SIZE)
    inside = (head < heads) & (at < half)[None, :]
    first, second = head // copies, head % copies
    source, target = x + token * x0 + first * x1 + second * x2 + at[None, :], out + token * out0 + first * out1 + second * out2 + at[None, :]
    low, high = tl.load(source, mask=inside, other=0.0).to(tl.float32), tl.load(source + half, mask=inside, other=0.0).to(tl.float32)
    c = tl.load(cos + token * cos_stride + at, mask=at < half, other=0.0).to(tl.float32)[None, :]
    s = tl.load(sin + token * cos_stride + at, mask=at < half, other=0.0).to(tl.float32)[None, :] * sign
    tl.store(target, low * c - high * s, mask=inside)
    tl.store(target + half, high * c + low * s, mask=inside)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor, back: bool) -> None:
    tokens, heads, copies, width = out.shape
    assert cos.stride(0) == sin.stride(0)
    _rotate[(tokens, triton.cdiv(heads * copies, HEADS))](x, cos, sin, out, *x.stride()[:3], *out.stride()[:3], cos.stride(0), heads * copies, copies, width // 2,
                                                          -1.0 if back else 1.0, HEADS=HEADS, SIZE=triton.next_power_of_2(width // 2), num_warps=4)


@triton.jit
def _swiglu(gate_up, out, in_stride, out_stride, width, SIZE: tl.constexpr):
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    inside = at < width
    gate = tl.load(gate_up + row * in_stride + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * in_stride + width + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * out_stride + at, gate * tl.sigmoid(gate) * up, mask=inside)


def swiglu(gate_up: Tensor, out: Tensor) -> None:
    width = out.shape[1]
    _swiglu[(len(out), triton.cdiv(width, BLOCK))](gate_up, out, gate_up.stride(0), out.stride(0), width, SIZE=BLOCK)


@triton.jit
def _swiglu_gradient(dm, gate_up, out, dm_stride, in_stride, out_stride, width, SIZE: tl.constexpr):
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    inside = at < width
    gradient = tl.load(dm + row * dm_stride + at, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_up + row * in_stride + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * in_stride + width + at, mask=inside, other=0.0).to(tl.float32)
    open = tl.sigmoid(gate)
    tl.store(out + row * out_stride + at, gradient * up * open * (1.0 + gate * (1.0 - open)), mask=inside)
    tl.store(out + row * out_stride + width + at, gradient * gate * open, mask=inside)


def swiglu_gradient(dm: Tensor, gate_up: Tensor, out: Tensor) -> None:
    width = dm.shape[1]
    _swiglu_gradient[(len(dm), triton.cdiv(width, BLOCK))](dm, gate_up, out, dm.stride(0), gate_up.stride(0), out.stride(0), width, SIZE=BLOCK)


@triton.jit
def _multiply(x, kept, out, x_stride, kept_stride, out_stride, width, ADD: tl.constexpr, SIZE: tl.constexpr):
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    inside = at < width
    found = tl.load(x + row * x_stride + at, mask=inside, other=0.0).to(tl.float32) * tl.load(kept + row * kept_stride + at, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        found += tl.load(out + row * out_stride + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * out_stride + at, found, mask=inside)


def multiply(x: Tensor, kept: Tensor, out: Tensor, add: bool) -> None:
    _multiply[(len(x), triton.cdiv(x.shape[1], BLOCK))](x, kept, out, x.stride(0), kept.stride(0), out.stride(0), x.shape[1], ADD=add, SIZE=BLOCK)


@triton.jit
def _spread(packed, scales, code, outer_scales, outer_code, offset, out, out_stride, groups, GROUPS: tl.constexpr):
    row, group = tl.program_id(0).to(tl.int64), tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    inside, block = group < groups, row * groups + group
    scale = tl.load(outer_code + tl.load(scales + block, mask=inside, other=0).to(tl.int32)) * tl.load(outer_scales + block // 256, mask=inside, other=0.0) + tl.load(offset)
    pairs = tl.load(packed + (block * 32)[:, None] + tl.arange(0, 32)[None, :], mask=inside[:, None], other=0).to(tl.int32)
    values = tl.interleave(tl.load(code + (pairs >> 4)) * scale[:, None], tl.load(code + (pairs & 15)) * scale[:, None])
    tl.store(out + row * out_stride + (group * 64)[:, None] + tl.arange(0, 64)[None, :], values, mask=inside[:, None])


def spread(packed: Tensor, state: Any, out: Tensor) -> None:
    rows, width = out.shape
    outer = state.state2
    # Without fused multiply-add the values are bitsandbytes' own to the last bit.
    _spread[(rows, triton.cdiv(width // 64, GROUPS))](packed, state.absmax, state.code, outer.absmax, outer.code, state.offset, out, out.stride(0), width // 64,
                                                      GROUPS=GROUPS, num_warps=4, enable_fp_fusion=False)
