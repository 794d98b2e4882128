"""Gauge: how fast a run goes and what it holds, read when a loss is logged.

In: tokens seen so far. Out: `tokens_per_second` since the last reading, `memory_gb` of this process (on a GPU what torch holds there),
and through NVML (nvidia-ml-py, of the GPU extra) `gpu_utilisation_percent`, `gpu_memory_gb`, `gpu_temperature_celsius` and `gpu_power_watts`.
Limits: the first GPU that CUDA shows this process; a reading that the driver refuses is left out, and without a GPU, the package or its
driver there is none and nothing is said.
"""

from __future__ import annotations

import contextlib
import time
from typing import Any, Mapping

import torch

from emergency_kit.model.backend import memory_bytes

_FORMS = (("gpu_utilisation_percent", "{:.0f} % busy"), ("gpu_memory_gb", "{:.1f} GB"), ("gpu_temperature_celsius", "{:.0f} °C"), ("gpu_power_watts", "{:.0f} W"))


class Gauge:
    """tokens: seen before this process."""

    def __init__(self, tokens: int):
        self.tokens, self.at = tokens, time.monotonic()
        self.last: dict[str, float] = {}
        self.card = _open_card()

    def read(self, tokens: int) -> dict[str, float]:
        """Readings by name; the throughput is since the reading before."""
        now = time.monotonic()
        self.last = {"tokens_per_second": round((tokens - self.tokens) / max(1e-9, now - self.at), 1), "memory_gb": round(memory_bytes() / 1e9, 3)} | _read_card(self.card)
        self.tokens, self.at = tokens, now
        return self.last


def _open_card() -> tuple[Any, Any] | None:
    """`(pynvml, handle)` of the GPU that CUDA shows; None where there is none or the package is missing."""
    if not torch.cuda.is_available():
        return None
    identity = str(getattr(torch.cuda.get_device_properties(torch.cuda.current_device()), "uuid", ""))
    return find_card(identity if identity.startswith(("GPU-", "MIG-")) else f"GPU-{identity}")


def find_card(identity: str) -> tuple[Any, Any] | None:
    """`(pynvml, handle)` of the GPU with this UUID; None where the package, the driver's library or the GPU is missing."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        return pynvml, pynvml.nvmlDeviceGetHandleByUUID(identity)
    except (pynvml.NVMLError, OSError):
        return None


def describe_gpu(readings: Mapping[str, float]) -> str:
    """`GPU: 97 % busy, 11.9 GB, 64 °C, 215 W` of whatever was read; empty where nothing of a GPU was."""
    parts = [form.format(readings[name]) for name, form in _FORMS if name in readings]
    return f"GPU: {', '.join(parts)}" if parts else ""


def _read_card(card: tuple[Any, Any] | None) -> dict[str, float]:
    if card is None:
        return {}
    nvml, handle = card
    readings = {"gpu_utilisation_percent": lambda: nvml.nvmlDeviceGetUtilizationRates(handle).gpu, "gpu_memory_gb": lambda: nvml.nvmlDeviceGetMemoryInfo(handle).used / 1e9,
                "gpu_temperature_celsius": lambda: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU), "gpu_power_watts": lambda: nvml.nvmlDeviceGetPowerUsage(handle) / 1e3}
    found: dict[str, float] = {}
    for name, read in readings.items():
        with contextlib.suppress(nvml.NVMLError):
            found[name] = round(float(read()), 3)
    return found
