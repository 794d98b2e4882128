"""Several real processes under torchrun train what one does: same rows, same losses, stopped, killed, and gone on with by another number."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from emergency_kit.artifacts import verify_folder
from emergency_kit.config import load_config
from emergency_kit.errors import TrainingError
from emergency_kit.training.batches import RankBatches, StepSampler
from emergency_kit.training.run import train
from emergency_kit.training.schedule import check_schedule

MORE = os.environ.get("EMERGENCY_KIT_RANKS") == "full"  # make prove-ranks
PROCESSES = 4 if MORE else 2


@given(st.integers(1, 60), st.integers(1, 3), st.integers(1, 3), st.integers(1, 5), st.integers(0, 3))
@settings(max_examples=200, deadline=None)
def test_an_epoch_has_every_row_once_and_a_step_the_rows_of_one_process(rows: int, batch: int, passes: int, world: int, epoch: int) -> None:
    lengths = np.random.default_rng(rows).integers(5, 90, rows)
    step_rows = batch * passes * world
    sampler = StepSampler(lengths, step_rows, seed=7)
    shares = [RankBatches(sampler, batch, rank, world) for rank in range(world)]
    for share in shares:
        share.set_epoch(epoch)
    dealt = [list(share) for share in shares]
    assert {len(batches) for batches in dealt} == {len(shares[0])}, "ranks exchange gradients as often"
    assert sorted(row for batches in dealt for one in batches for row in one) == list(range(rows))
    order = list(sampler)
    for number, start in enumerate(range(0, rows, step_rows)):
        taken = [row for batches in dealt for one in batches[number * passes:(number + 1) * passes] for row in one]
        assert sorted(taken) == sorted(order[start:start + step_rows])


def flags(tiny: Path, out: Path, *more: str) -> list[str]:
    """21 rows in steps of 8, so that an epoch ends with 5, which ranks cannot share evenly; no dropout, which ranks draw for themselves."""
    return [f"model.name={tiny}", f"training.output_dir={out}", "model.dtype=float32", "training.int8_backward=false", "dataset.build_size=200", "dataset.max_samples=21", "dataset.max_eval_samples=5",
            "dataset.grounding=none", "training.per_device_train_batch_size=2", "training.gradient_accumulation_steps=4", "training.keep_effective_batch=true",
            "training.num_epochs=2", "training.warmup_steps=1", "training.eval_steps=2", "training.save_steps=4", "lora.dropout=0", "lora.r=4", *more]


@pytest.fixture(scope="module")
def alone(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process."""
    out = tmp_path_factory.mktemp("alone")
    train(load_config("embedded", settings=flags(tiny, out)))
    return out


def start(number: int, *settings: str) -> subprocess.Popen[str]:
    """What `make train NPROC=number` starts."""
    return subprocess.Popen([sys.executable, "-m", "emergency_kit.training.launch", str(number), "--profile", "embedded", *(part for item in settings for part in ("--set", item))],
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"})


def ranks_of(launcher: subprocess.Popen[str]) -> dict[int, int]:
    """`{rank: process id}` of a launcher's processes."""
    found = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                if f"PPid:\t{launcher.pid}\n" in (folder / "status").read_text() and (match := re.search(rb"\0RANK=(\d+)\0", b"\0" + (folder / "environ").read_bytes())):
                    found[int(match.group(1))] = int(folder.name)
            except OSError:  # ended meanwhile
                continue
    return found


def wait_for(launcher: subprocess.Popen[str], text: str) -> None:
    for line in launcher.stdout:
        if text in line:
            return
    pytest.fail(f"it ended without {text!r}: {launcher.stderr.read()}")


def outcome(out: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    final = out / "checkpoints" / "final"
    return json.loads((final / "training_state.json").read_text()), load_file(final / "adapter_model.safetensors")


def assert_alike(alone: Path, out: Path) -> None:
    """All that is counted is equal, losses to 1e-5; adapters to what rounding becomes under Adam, which divides by gradients' size."""
    (one, weights), (other, others) = outcome(alone), outcome(out)
    for key in ("step", "epoch", "tokens_seen", "supervised_tokens_seen"):
        assert one[key] == other[key], key
    for history in ("loss_history", "validation_history"):
        assert [entry["step"] for entry in one[history]] == [entry["step"] for entry in other[history]]
        for left, right in zip(one[history], other[history]):
            assert left["loss"] == pytest.approx(right["loss"], rel=1e-5)
    for name in weights:
        assert (weights[name] - others[name]).abs().max() < 1e-3 * weights[name].abs().max(), name
    assert verify_folder(out / "checkpoints" / "final") == []


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the ranks by /proc")
def test_stopped_on_one_rank_saved_on_all_and_gone_on_with_by_one_process(tiny: Path, alone: Path, tmp_path: Path) -> None:
    launcher = start(PROCESSES, *flags(tiny, tmp_path))
    wait_for(launcher, f"effective batch 8 (2 rows x {4 // PROCESSES} passes x {PROCESSES} processes), 6 steps over 2 epochs")
    wait_for(launcher, "Step 1/6")
    os.kill(ranks_of(launcher)[1], signal.SIGTERM)
    printed, errors = launcher.communicate(timeout=120)
    assert launcher.returncode == 130 and "Traceback" not in errors, errors
    stopped = re.fullmatch(r"error: stopped at step (\d)/6, saved to \S+; go on with the same command, or name it with --resume-from (\S+)\n", errors)
    assert stopped and verify_folder(Path(stopped.group(2))) == [], errors
    for number in ((1, 4, 2) if MORE else (1,)):
        if number == 1 and not MORE:
            train(load_config("embedded", settings=flags(tiny, tmp_path)))
            continue
        launcher = start(number, *flags(tiny, tmp_path))
        if number != 2:
            wait_for(launcher, f"Step {int(stopped.group(1)) + (1 if number == 1 else 2)}/6")
            launcher.send_signal(signal.SIGTERM)
        _, errors = launcher.communicate(timeout=180)
        assert launcher.returncode in (0, 130), errors
        if launcher.returncode == 0:
            break
    assert_alike(alone, tmp_path)


def kill_a_rank(launcher: "subprocess.Popen[str]") -> tuple[dict[int, int], str]:
    """SIGKILL to rank 1 after step 5; `(process ids by rank, what was said to standard error)` once all have ended, which takes less than half a minute."""
    wait_for(launcher, "Step 5/")
    ranks, killed = ranks_of(launcher), time.monotonic()
    os.kill(ranks[1], signal.SIGKILL)
    _, errors = launcher.communicate(timeout=60)
    assert time.monotonic() - killed < 30
    return ranks, errors


@pytest.mark.skipif(not MORE, reason="in make prove-ranks")
def test_a_killed_rank_ends_all_within_half_a_minute(tiny: Path, tmp_path: Path) -> None:
    launcher = start(PROCESSES, *flags(tiny, tmp_path, "training.num_epochs=200", "training.engine=modules"))
    ranks, errors = kill_a_rank(launcher)
    assert launcher.returncode == 128 + 9
    assert re.search(r"^error: the connection to the other ranks is lost .* the same command goes on from the last one$", errors, re.M), errors
    assert "Traceback" not in errors and not any(Path(f"/proc/{pid}").exists() for pid in ranks.values())
    assert verify_folder(tmp_path / "checkpoints" / "checkpoint-4") == []
    assert [path.name for path in (tmp_path / "checkpoints").iterdir() if path.name.startswith(".")] == []


@pytest.fixture
def two_hosts() -> Iterator[tuple[str, str]]:
    """Two network namespaces, `eka` at 10.77.0.1 and `ekb` at 10.77.0.2, with a link between them whose ends have their names."""
    if os.geteuid() != 0 or not shutil.which("ip") or subprocess.run(["ip", "netns", "add", "eka"], capture_output=True).returncode:
        pytest.skip("network namespaces need root and iproute2")
    try:
        for command in ("netns add ekb", "link add eka type veth peer name ekb", "link set eka netns eka", "link set ekb netns ekb"):
            subprocess.run(["ip", *command.split()], check=True)
        for number, name in enumerate(("eka", "ekb"), 1):
            for command in (f"addr add 10.77.0.{number}/24 dev {name}", f"link set {name} up", "link set lo up"):
                subprocess.run(["ip", "-n", name, *command.split()], check=True)
        yield "eka", "ekb"
    finally:
        for name in ("eka", "ekb"):
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


@pytest.mark.skipif(not MORE, reason="in make prove-ranks")
def test_two_hosts_whose_link_is_cut_end_in_time_and_go_on(two_hosts: tuple[str, str], tiny: Path, alone: Path, tmp_path: Path) -> None:
    def run(*more: str, cut_at: str = "") -> list[tuple[int, str]]:
        hosts = [subprocess.Popen(["ip", "netns", "exec", name, sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", "--node-rank", str(number),
                                   "--master-addr", "10.77.0.1", "--master-port", "29500", "scripts/train.py", "--profile", "embedded",
                                   *(part for item in flags(tiny, tmp_path, *more) for part in ("--set", item))],
                                  stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": name})
                 for number, name in enumerate(two_hosts)]
        if cut_at:
            wait_for(hosts[0], cut_at)
            subprocess.run(["ip", "-n", "eka", "link", "set", "eka", "down"], check=True)
        errors = [host.communicate(timeout=180)[1] for host in hosts]
        return [(host.returncode, text) for host, text in zip(hosts, errors)]

    began = time.monotonic()
    ends = run("training.rank_timeout_seconds=15", "training.save_steps=1", "training.save_total_limit=9", cut_at="Step 3/6")
    assert time.monotonic() - began < 150
    for code, text in ends:
        assert code == 1 and re.search(r"^error: (rank 1 of 2: )?the connection to the other ranks is lost .*Timed out", text, re.M), text
    subprocess.run(["ip", "-n", "eka", "link", "set", "eka", "up"], check=True)
    assert [code for code, _ in run("training.rank_timeout_seconds=15")] == [0, 0]
    assert_alike(alone, tmp_path)


def test_passes_that_ranks_cannot_share_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(TrainingError, match="3 processes cannot share 4 passes evenly"):
        check_schedule(load_config("embedded", settings=["training.keep_effective_batch=true"]).config, 10)


def test_a_number_of_processes_that_is_none() -> None:
    done = subprocess.run([sys.executable, "-m", "emergency_kit.training.launch", "two"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr == "error: NPROC: got 'two'; expected a number of processes, for instance make train NPROC=2\n"
