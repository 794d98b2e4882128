"""Compute type of this machine: what multiplies matrices fastest here, by trying it.

In: a device. Out: a torch dtype and the reason in words. Flags alone mislead on CPUs: some with AVX-512 bf16
instructions multiply bfloat16 at half the speed of float32 (benchmarks/RESULTS.md).
"""

from __future__ import annotations

import functools
import time

import torch

# A half-width type also halves memory, but rounds: it has to pay.
LEAST_GAIN = 1.2
# About a decoder layer of the bundled model with a short batch: 0.9 GFLOP, some milliseconds.
ROWS, INNER, COLUMNS = 512, 576, 1536


@functools.cache
def measured_gain() -> float:
    """How many times as fast as float32 this CPU multiplies bfloat16 matrices: the best of twelve each, in turns, since
    what else runs can only slow a trial down; about 0.2 s."""
    def timed(dtype: torch.dtype) -> float:
        left, right = torch.ones(ROWS, INNER, dtype=dtype), torch.ones(COLUMNS, INNER, dtype=dtype)
        started = time.perf_counter()
        torch.mm(left, right.t())
        return time.perf_counter() - started

    times = [(timed(torch.float32), timed(torch.bfloat16)) for _ in range(12)]
    return min(single for single, _ in times) / min(half for _, half in times)


def cpu_features() -> str:
    """The matrix instructions that torch sees, in words."""
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return f"{torch.backends.cpu.get_cpu_capability()} without bf16"
    return "AMX" if torch.cpu._is_amx_tile_supported() else f"{torch.backends.cpu.get_cpu_capability()} with bf16"


@functools.cache
def pick_cpu_dtype() -> tuple[torch.dtype, str]:
    """`(dtype, reason)` on this CPU; no trial where it has no bf16 instructions."""
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return torch.float32, f"CPU: {cpu_features()}"
    gain = measured_gain()
    return torch.bfloat16 if gain >= LEAST_GAIN else torch.float32, f"CPU: {cpu_features()}, bf16 products at {gain:.1f} times the speed of float32"


def pick_gpu_dtype() -> tuple[torch.dtype, str]:
    """`(dtype, reason)` on the CUDA GPU of this process."""
    if torch.cuda.is_bf16_supported(including_emulation=False):  # older cards emulate it, slower than float32
        return torch.bfloat16, "GPU with bf16"
    return torch.float16, "GPU without bf16"
