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


@pytest.mark.skipif(not compute.has_bf16(), reason="this CPU has no bf16 instructions")
def test_a_cpu_with_bf16_is_tried_and_the_faster_type_taken() -> None:
    dtype, reason = compute.pick_cpu_dtype()
    gain = compute.measured_gain()
    assert f"{gain:.1f} times" in reason and compute.cpu_features() in reason
    assert dtype == (torch.bfloat16 if gain >= compute.LEAST_GAIN else torch.float32)


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() not in ("AVX512", "AVX2"), reason="needs an x86 CPU with AVX2")
def test_a_cpu_without_bf16_gets_float32_and_no_trial() -> None:
    dtype, reason = probe(ONEDNN_MAX_CPU_ISA="AVX2", ATEN_CPU_CAPABILITY="avx2")
    assert dtype == "torch.float32" and "without bf16" in reason and "times" not in reason


@pytest.mark.skipif(not os.path.exists("/proc/cpuinfo"), reason="Linux tells a CPU's instructions in /proc/cpuinfo")
def test_a_cpu_has_bf16_where_its_flags_say_so() -> None:
    flags = open("/proc/cpuinfo").read().split("flags", 1)[-1].split("\n", 1)[0].split()
    if not flags or torch.backends.cpu.get_cpu_capability() not in ("AVX512", "AVX2"):
        pytest.skip("not an x86 CPU")
    assert compute.has_bf16() == bool({"avx512_bf16", "amx_bf16"} & set(flags))


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() != "AVX512", reason="needs an x86 CPU with AVX-512")
def test_integers_are_not_for_a_cpu_whose_sums_of_them_are_wrong() -> None:
    """Without VNNI their products are added up in 16 bits."""
    code = "from emergency_kit.model import compute; print(compute.measured_integer_gain())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX512_CORE"}, check=True)
    assert float(done.stdout) == 0
