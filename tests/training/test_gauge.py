"""The gauge: what is said of readings, and silence where there is no GPU. NVML itself needs a GPU; nothing of it runs here."""

from __future__ import annotations

import importlib.util
import io
import logging
import types
from typing import Iterator

import pytest
import torch
from rich.console import Console

from emergency_kit.training import callbacks
from emergency_kit.training.callbacks import ConsoleCallback
from emergency_kit.training.gauge import Gauge, describe_gpu, find_card

GPU = {"gpu_utilisation_percent": 97.0, "gpu_memory_gb": 11.912, "gpu_temperature_celsius": 64.0, "gpu_power_watts": 214.6}
LOGS = {"loss": 0.8234, "learning_rate": 2e-4, "tokens_per_second": 1500.0, "memory_gb": 11.2}


@pytest.fixture
def said() -> Iterator[io.StringIO]:
    text = io.StringIO()
    handler = logging.StreamHandler(text)
    callbacks.LOG.addHandler(handler)
    callbacks.LOG.setLevel(logging.INFO)
    yield text
    callbacks.LOG.removeHandler(handler)


def test_readings_in_words() -> None:
    assert describe_gpu(LOGS | GPU) == "GPU: 97 % busy, 11.9 GB, 64 °C, 215 W"
    assert describe_gpu({"gpu_power_watts": 70.0}) == "GPU: 70 W"  # what the driver refuses is left out
    assert describe_gpu(LOGS) == "" == describe_gpu({})


def test_the_log_has_a_gpus_state_below_the_guides_line_and_else_that_line_alone(said: io.StringIO) -> None:
    callback, state = ConsoleCallback(Console(file=io.StringIO())), types.SimpleNamespace(global_step=100, max_steps=750)
    callback.on_log(None, state, None, LOGS)  # type: ignore[arg-type]
    assert said.getvalue() == "Step 100/750, Loss: 0.8234\n"
    callback.on_log(None, state, None, LOGS | GPU)  # type: ignore[arg-type]
    assert said.getvalue().splitlines()[1:] == ["Step 100/750, Loss: 0.8234", "GPU: 97 % busy, 11.9 GB, 64 °C, 215 W"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_without_a_gpu_nothing_is_read_and_nothing_said(capfd: pytest.CaptureFixture[str], said: io.StringIO) -> None:
    assert find_card("GPU-00000000-0000-0000-0000-000000000000") is None  # with nvidia-ml-py and without
    gauge = Gauge(0)
    assert gauge.card is None and set(gauge.read(100)) == {"tokens_per_second", "memory_gb"}
    assert capfd.readouterr() == ("", "") and said.getvalue() == ""


@pytest.mark.skipif(not torch.cuda.is_available() or importlib.util.find_spec("pynvml") is None, reason="needs a GPU and nvidia-ml-py")
def test_a_gpu_is_read() -> None:
    read = Gauge(0).read(100)
    assert set(GPU) <= set(read) and 0 <= read["gpu_utilisation_percent"] <= 100 and 0 < read["gpu_memory_gb"] < 1000
    assert 0 < read["gpu_temperature_celsius"] < 120 and 0 < read["gpu_power_watts"] < 2000
