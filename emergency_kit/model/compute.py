"""Compute type of this machine: what multiplies matrices fastest here, by trying it.

In: a device. Out: a torch dtype and the reason in words, and whether gradients are worth going back in integers. Flags alone mislead on CPUs: some
with AVX-512 bf16 instructions multiply bfloat16 at half the speed of float32 (benchmarks/RESULTS.md).
"""

from __future__ import annotations

import functools
import platform
import time
from typing import Callable

import torch

# A half-width type also halves memory, but rounds: it has to pay.
LEAST_GAIN = 1.2
# Integers round, and take a second copy of the weights.
LEAST_INTEGER_GAIN = 2.0
# About a decoder layer of the bundled model with a short batch: 0.9 GFLOP, some milliseconds.
ROWS, INNER, COLUMNS = 512, 576, 1536
TRIES = 12


@functools.cache
def measured_gain() -> float:
    """How many times as fast as float32 this CPU multiplies bfloat16 matrices; about 0.2 s."""
    def product(dtype: torch.dtype) -> Callable[[], torch.Tensor]:
        left, right = torch.ones(ROWS, INNER, dtype=dtype), torch.ones(COLUMNS, INNER, dtype=dtype)
        return lambda: torch.mm(left, right.t())

    return _gain(product(torch.float32), product(torch.bfloat16))


@functools.cache
def measured_integer_gain() -> float:
    """How many times as fast as float32 this CPU multiplies matrices of 8-bit integers; about 0.1 s. 0 where torch cannot, or where sums of large products
    come out wrong, as they may on CPUs without instructions that add them up in 32 bits."""
    left, right = torch.full((ROWS, INNER), 127, dtype=torch.int8), torch.full((INNER, COLUMNS), -127, dtype=torch.int8)
    single, other = torch.ones(ROWS, INNER), torch.ones(INNER, COLUMNS)
    try:
        exact = bool((torch._int_mm(left, right) == -127 * 127 * INNER).all())
    except RuntimeError:
        return 0.0
    return _gain(lambda: torch.mm(single, other), lambda: torch._int_mm(left, right)) if exact else 0.0


def _gain(one: Callable[[], torch.Tensor], other: Callable[[], torch.Tensor]) -> float:
    """Time of one to that of the other: the best of some tries each, in turns, since what else runs can only slow a try down."""
    def timed(product: Callable[[], torch.Tensor]) -> float:
        started = time.perf_counter()
        product()
        return time.perf_counter() - started

    times = [(timed(one), timed(other)) for _ in range(TRIES)]
    return min(first for first, _ in times) / min(second for _, second in times)


def has_bf16() -> bool:
    """Whether this CPU has bf16 instructions. oneDNN also takes bfloat16 where AVX-512 has none for it, several times slower than float32."""
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    return platform.machine().lower() not in ("x86_64", "amd64") or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def cpu_features() -> str:
    """The matrix instructions that torch sees, in words."""
    if not has_bf16():
        return f"{torch.backends.cpu.get_cpu_capability()} without bf16"
    return "AMX" if torch.cpu._is_amx_tile_supported() else f"{torch.backends.cpu.get_cpu_capability()} with bf16"


@functools.cache
def pick_cpu_dtype() -> tuple[torch.dtype, str]:
    """`(dtype, reason)` on this CPU; no trial where it has no bf16 instructions."""
    if not has_bf16():
        return torch.float32, f"CPU: {cpu_features()}"
    gain = measured_gain()
    return torch.bfloat16 if gain >= LEAST_GAIN else torch.float32, f"CPU: {cpu_features()}, bf16 products at {gain:.1f} times the speed of float32"


def pick_gpu_dtype() -> tuple[torch.dtype, str]:
    """`(dtype, reason)` on the CUDA GPU of this process."""
    if torch.cuda.is_bf16_supported(including_emulation=False):  # older cards emulate it, slower than float32
        return torch.bfloat16, "GPU with bf16"
    return torch.float16, "GPU without bf16"
