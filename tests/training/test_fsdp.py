"""A base model divided among real processes (FSDP2) trains what one process does, and its checkpoints are gone on with by any other division."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from emergency_kit.artifacts import verify_folder
from emergency_kit.config import load_config
from emergency_kit.errors import TrainingError
from emergency_kit.model import backend
from emergency_kit.training import sharding
from emergency_kit.training.run import train
from tests.tiny import resolve
from tests.training.test_ranks import MORE, PROCESSES, alone, assert_alike, flags, kill_a_rank, outcome, ranks_of, wait_for

__all__ = ["alone"]  # a fixture


def accelerate(number: int, *settings: str, file: str = "fsdp", launcher: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    """`accelerate launch --config_file configs/accelerate/FILE.yaml`, with so many processes."""
    return subprocess.Popen([sys.executable, "-m", "accelerate.commands.launch", "--config_file", f"configs/accelerate/{file}.yaml", "--num_processes", str(number), *launcher,
                             "scripts/train.py", "--profile", "embedded", *(part for item in settings for part in ("--set", item))],
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"})


def stop_on_one_rank(launcher: subprocess.Popen[str], at: str) -> Path:
    """SIGTERM to rank 1 after a line; the checkpoint that all have saved."""
    wait_for(launcher, at)
    os.kill(ranks_of(launcher)[1], signal.SIGTERM)
    _, errors = launcher.communicate(timeout=400)
    stopped = re.search(r"^error: stopped at step \d/6, saved to \S+; go on with the same command, or name it with --resume-from (\S+)$", errors, re.M)
    assert launcher.returncode == 1 and stopped, errors  # accelerate's own code
    saved = Path(stopped.group(1))
    assert verify_folder(saved) == [] and [path.name for path in saved.parent.iterdir() if path.name.startswith(".")] == []
    return saved


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the ranks by /proc")
def test_stopped_on_one_rank_saved_by_all_in_parts_and_gone_on_with_by_one_process(tiny: Path, alone: Path, tmp_path: Path) -> None:
    launcher = accelerate(PROCESSES, *flags(tiny, tmp_path))
    wait_for(launcher, "engine modules (fused is not for FSDP, which gathers a layer's weights around transformers' modules)")
    saved = stop_on_one_rank(launcher, "Step 1/6")
    parts = {path.name for path in (saved / "optimizer").iterdir()}
    assert parts == {".metadata", *(f"__{rank}_0.distcp" for rank in range(PROCESSES))} and not (saved / "optimizer.pt").exists()
    train(load_config("embedded", settings=flags(tiny, tmp_path)))
    assert_alike(alone, tmp_path)
    # Torch's own tool makes one file of the parts, as the form of one process but for the parameters' names.
    dcp_to_torch_save(saved / "optimizer", tmp_path / "whole.pt")
    made, whole = sharding.numbered(torch.load(tmp_path / "whole.pt")), torch.load(alone / "checkpoints/checkpoint-6/optimizer.pt")
    assert made["state"].keys() == whole["state"].keys() and made["param_groups"][0]["params"] == whole["param_groups"][0]["params"]
    assert all(made["state"][number]["exp_avg"].shape == whole["state"][number]["exp_avg"].shape for number in whole["state"])


@pytest.mark.skipif(not MORE, reason="in make prove-ranks")
def test_divided_and_whole_by_turns(tiny: Path, alone: Path, tmp_path: Path) -> None:
    settings, final = flags(tiny, tmp_path, "training.save_steps=1", "training.save_total_limit=9"), tmp_path / "checkpoints/final"
    full = ("--fsdp_state_dict_type", "FULL_STATE_DICT")
    stop_on_one_rank(accelerate(2, *settings, file="ddp"), "Step 1/6")
    stop_on_one_rank(accelerate(4, *settings), "Step ")
    for launcher in (lambda: accelerate(2, *settings, launcher=full), lambda: accelerate(2, *settings, file="ddp"), lambda: accelerate(4, *settings, launcher=full)):
        if final.exists():
            shutil.rmtree(final)
            shutil.rmtree(tmp_path / "checkpoints/checkpoint-6")
        running = launcher()
        _, errors = running.communicate(timeout=400)
        assert running.returncode == 0, errors
        assert_alike(alone, tmp_path)
    assert (tmp_path / "checkpoints/checkpoint-6/optimizer.pt").is_file()


@pytest.mark.skipif(not MORE, reason="in make prove-ranks")
@pytest.mark.parametrize(("weights_in", "apart"), [("model.load_in_4bit=true", 1e-5), ("model.dtype=bfloat16", 1e-3)])
def test_weights_of_other_types(weights_in: str, apart: float, tiny: Path, tmp_path: Path) -> None:
    more = (weights_in, "training.engine=modules", "training.gradient_checkpointing=true")
    train(load_config("embedded", settings=flags(tiny, tmp_path / "one", *more)))
    launcher = accelerate(2, *flags(tiny, tmp_path / "two", *more))
    _, errors = launcher.communicate(timeout=400)
    assert launcher.returncode == 0, errors
    assert "Excluding from FSDP2 sharding" not in errors, "accelerate leaves weights whole where they lie in bytes, and says so"
    for history in ("loss_history", "validation_history"):
        one, two = ([entry["loss"] for entry in outcome(tmp_path / name)[0][history]] for name in ("one", "two"))
        assert two == pytest.approx(one, rel=apart)


@pytest.mark.skipif(not MORE, reason="in make prove-ranks")
def test_the_best_evaluation_s_adapters_go_back_into_the_divided_model(tiny: Path, tmp_path: Path) -> None:
    """Decay beyond reason makes the first evaluation the best."""
    launcher = accelerate(2, *flags(tiny, tmp_path, "model.load_in_4bit=true", "training.load_best_model_at_end=true", "training.learning_rate=0.1", "training.weight_decay=25",
                                    "training.save_steps=2", "training.lr_scheduler_type=constant", "training.max_steps=4"))
    _, errors = launcher.communicate(timeout=400)
    assert launcher.returncode == 0, errors
    state, weights = outcome(tmp_path)
    best = load_file(tmp_path / "checkpoints/checkpoint-2/adapter_model.safetensors")
    assert state["summary"]["weights_of_step"] == 2 and all(torch.equal(best[name], weights[name]) for name in best)


@pytest.mark.skipif(not MORE, reason="in make prove-ranks")
def test_a_killed_rank_ends_all_and_leaves_no_half_checkpoint(tiny: Path, tmp_path: Path) -> None:
    launcher = accelerate(PROCESSES, *flags(tiny, tmp_path, "training.num_epochs=200", "training.save_steps=1"))
    ranks, errors = kill_a_rank(launcher)
    assert launcher.returncode == 1
    assert re.search(r"^error: (rank \d of \d: )?the connection to the other ranks is lost .* the same command goes on from the last one$", errors, re.M), errors
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks.values())
    checkpoints = [path for path in (tmp_path / "checkpoints").iterdir() if not path.name.startswith(".")]
    assert checkpoints and all(verify_folder(path) == [] for path in checkpoints)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")
@pytest.mark.parametrize("weights_in", ["model.load_in_4bit=true", "model.load_in_4bit=false"])
@pytest.mark.parametrize("file", ["ddp", "fsdp"])
def test_two_gpus_train_what_one_does(file: str, weights_in: str, tiny: Path, tmp_path: Path) -> None:
    more = ("model.device=cuda", "model.dtype=bfloat16", "model.backend=hf", "training.engine=modules", weights_in)
    train(load_config("embedded", settings=flags(tiny, tmp_path / "one", *more)))
    launcher = accelerate(2, *flags(tiny, tmp_path / "two", *more), file=file)
    _, errors = launcher.communicate(timeout=300)
    assert launcher.returncode == 0, errors
    (one, _), (two, _) = outcome(tmp_path / "one"), outcome(tmp_path / "two")
    assert [entry["loss"] for entry in two["loss_history"]] == pytest.approx([entry["loss"] for entry in one["loss_history"]], rel=1e-2)


def test_four_bit_weights_lie_in_bytes_of_the_compute_type(tiny: Path) -> None:
    config = resolve(tiny, model__load_in_4bit=True).config
    whole, divided = (backend.load_for_training(config.model, config.lora, False, 0, sharded=sharded).model for sharded in (False, True))
    for one, other in zip(whole.parameters(), divided.parameters()):
        assert other.dtype == torch.float32 and (one.dtype in (torch.float32, torch.uint8)) and one.nbytes == other.nbytes
        assert torch.equal(one.detach().view(torch.uint8).flatten(), other.detach().view(torch.uint8).flatten()) or one.requires_grad
    assert any(parameter.dtype == torch.uint8 for parameter in whole.parameters())


REFUSED = {("training.engine=fused",): "training.engine fused, which reads .*; next: --set training.engine=auto",
           ("training.method=dpo",): "training.method dpo; next: accelerate launch --config_file configs/accelerate/ddp.yaml",
           ("training.finetuning_type=full",): "training.finetuning_type full; next: accelerate launch --config_file configs/accelerate/ddp.yaml",
           ("lora.init=pissa",): "lora.init pissa; next: --set lora.init=default",
           ("training.optim=adafactor",): "training.optim adafactor; next: --set training.optim=adamw_torch",
           ("training.per_device_train_batch_size=auto",): "training.per_device_train_batch_size auto; next: --set training.per_device_train_batch_size=1",
           ("training.metric_for_best_model=valid_structure", "training.load_best_model_at_end=true"):
               "training.metric_for_best_model valid_structure, for which .*; next: --set training.metric_for_best_model=loss",
           ("model.backend=unsloth",): "model.backend unsloth; next: --set model.backend=hf"}


@pytest.mark.parametrize("settings", REFUSED, ids=lambda settings: settings[0])
def test_what_does_not_go_with_a_divided_model_is_refused(settings: tuple[str, ...], tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("ACCELERATE_USE_FSDP", "true"), ("FSDP_VERSION", "2"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    with pytest.raises(TrainingError, match=f"^ranks: FSDP does not take {REFUSED[settings]}$"):
        train(load_config("embedded", settings=flags(tiny, tmp_path, *settings)))
    assert list(tmp_path.iterdir()) == []


def test_other_ways_of_dividing_are_refused(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    resolved = load_config("embedded", settings=flags(tiny, tmp_path))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(TrainingError, match="fsdp_version 1, which flattens .*; next: fsdp_version: 2 in accelerate's file"):
        train(resolved)
    monkeypatch.setenv("FSDP_VERSION", "2")
    monkeypatch.setenv("FSDP_ACTIVATION_CHECKPOINTING", "true")
    with pytest.raises(TrainingError, match="fsdp_activation_checkpointing; next: --set training.gradient_checkpointing=true"):
        train(resolved)
