"""The model of many GPUs: its sums against naive ones, against the plan for one GPU, and its tables in the docs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import scaling
from emergency_kit.config import load_config
from emergency_kit.training import prediction


def test_shapes_are_the_models_own() -> None:
    """Parameters as the models' pages have them."""
    found = {name: scaling.rank(name, "DDP, bf16").made.shape.parameters for name in scaling.MODELS}
    assert found == {"7B": 7_241_732_096, "13B": 13_015_864_320, "70B": 70_553_706_496}


def ring_all_reduce(values: list[list[float]]) -> int:
    """All ranks get the sum, chunk by chunk around the ring, in place; how many numbers each has sent."""
    ranks, sent = len(values), 0
    size = len(values[0]) // ranks
    for add, turns in ((True, ranks - 1), (False, ranks - 1)):
        for turn in range(turns):
            handed = [(one, (one - turn + (0 if add else 1)) % ranks) for one in range(ranks)]
            pieces = [values[one][chunk * size:(chunk + 1) * size] for one, chunk in handed]
            for (one, chunk), piece in zip(handed, pieces):
                into, place = values[(one + 1) % ranks], slice(chunk * size, (chunk + 1) * size)
                into[place] = [a + b for a, b in zip(into[place], piece)] if add else piece
            sent += size
    return sent


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_bytes_of_an_all_reduce_are_a_ring_s(ranks: int) -> None:
    values = [[float(one * 100 + place) for place in range(8)] for one in range(ranks)]
    wanted = [sum(column) for column in zip(*values)]
    sent = ring_all_reduce(values)
    assert all(one == wanted for one in values)
    rank = scaling.rank("7B", "DDP, NF4")
    assert scaling.sent_bytes(rank, ranks) == pytest.approx(sent / 8 * rank.gradient_bytes)
    # Within a host nothing but NVLink carries it.
    seconds = scaling.sent_bytes(rank, ranks) / (scaling.LINK_SHARE * scaling.NVLINK) + 2 * (ranks - 1) * scaling.INSIDE_SECONDS
    assert scaling.exchange_seconds(rank, ranks) == pytest.approx(seconds)


def test_one_gpu_is_the_plan_s() -> None:
    settings = ["training.gradient_checkpointing=true", "training.per_device_eval_batch_size=2"]
    made = prediction.predict(load_config("mistral-7b", settings=settings), scaling.H100)
    rank = scaling.rank("7B", "DDP, NF4")
    assert scaling.gpu_bytes(rank, 1) == pytest.approx(made.peak_bytes) and rank.seconds == pytest.approx(made.step_seconds)
    assert rank.rows == 8 and scaling.efficiency(rank, 1) == 1 and scaling.sent_bytes(rank, 1) == 0


def test_it_moves_as_it_should() -> None:
    ddp, fsdp = scaling.rank("13B", "DDP, bf16"), scaling.rank("13B", "FSDP, bf16")
    for rank in (ddp, fsdp):
        shares = [scaling.efficiency(rank, gpus) for gpus in scaling.GPUS]
        assert shares == sorted(shares, reverse=True) and scaling.efficiency(rank, 16, scaling.ETHERNET) < scaling.efficiency(rank, 16)
        # The price of an hour is a factor, and what is left of the number of GPUs is efficiency.
        assert scaling.cost(rank, 64, 3.0) == pytest.approx(3 * scaling.cost(rank, 1) / scaling.efficiency(rank, 64))
    held = [scaling.gpu_bytes(fsdp, gpus) for gpus in scaling.GPUS]
    assert held == sorted(held, reverse=True) and scaling.gpu_bytes(ddp, 2) == scaling.gpu_bytes(ddp, 1024)
    assert scaling.sent_bytes(fsdp, 8) > 100 * scaling.sent_bytes(ddp, 8)
    assert not scaling.fits(scaling.rank("70B", "DDP, bf16"), 1024) and scaling.fits(scaling.rank("70B", "FSDP, bf16"), 8)


def test_the_tables_in_the_docs_are_current() -> None:
    """To renew them after a change: make bench-scaling ARGS=--write."""
    text = scaling.DOCS.read_text(encoding="utf-8")
    assert scaling.written(text) == text


def test_an_all_reduce_is_timed_among_real_processes(tmp_path: Path) -> None:
    """The part of --measure that needs no training."""
    scaling._torchrun(2, ["-m", "benchmarks.scaling", "--probe", "4096", str(tmp_path / "probe.json")])
    assert 0 < json.loads((tmp_path / "probe.json").read_text()) < 5
    refused = subprocess.run([sys.executable, "-m", "benchmarks.scaling", "--measure", "2"], capture_output=True, text=True)
    assert refused.returncode == 2 and "the first number must be 1" in refused.stderr
