"""The compute type of a CPU, in processes that see other instructions of it."""

import os
import subprocess
import sys

import pytest
import torch

from emergency_kit.model import compute

PROBE = "from emergency_kit.model import compute; dtype, reason = compute.pick_cpu_dtype(); print(dtype, '|', reason)"


def probe(**environment: str) -> tuple[str, str]:
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, env={**os.environ, **environment}, check=True)
    dtype, reason = done.stdout.strip().split(" | ")
    return dtype, reason


@pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="this CPU has no bf16 instructions")
def test_a_cpu_with_bf16_is_tried_and_the_faster_type_taken() -> None:
    dtype, reason = compute.pick_cpu_dtype()
    gain = compute.measured_gain()
    assert f"{gain:.1f} times" in reason and compute.cpu_features() in reason
    assert dtype == (torch.bfloat16 if gain >= compute.LEAST_GAIN else torch.float32)


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() not in ("AVX512", "AVX2"), reason="needs an x86 CPU with AVX2")
def test_a_cpu_without_bf16_gets_float32_and_no_trial() -> None:
    dtype, reason = probe(ONEDNN_MAX_CPU_ISA="AVX2", ATEN_CPU_CAPABILITY="avx2")
    assert dtype == "torch.float32" and "without bf16" in reason and "times" not in reason
