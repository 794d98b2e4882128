"""DeepSpeed (ZeRO stage 1 and 2) among real processes trains what one does; its checkpoints are gone on with by any number, with DeepSpeed or without.

Where the package deepspeed is missing, only what is refused is tested: `make prove-deepspeed` installs it beside .venv and runs all.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from emergency_kit.artifacts import verify_folder
from emergency_kit.config import load_config
from emergency_kit.errors import TrainingError
from emergency_kit.training import zero
from emergency_kit.training.run import train
from tests.data.test_stream import write
from tests.training.test_data_of_ranks import flags as stream_flags
from tests.training.test_fsdp import accelerate, stop_on_one_rank
from tests.training.test_ranks import alone, assert_alike, flags, kill_a_rank, outcome, wait_for

__all__ = ["alone"]  # a fixture
with_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed; make prove-deepspeed")
finds_ranks = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the ranks by /proc")


def deepspeed(number: int, *settings: str, stage: int = 2) -> subprocess.Popen[str]:
    return accelerate(number, *settings, file="deepspeed", launcher=("--zero_stage", str(stage)))


def ended(launcher: subprocess.Popen[str]) -> str:
    """What a run printed that ended well."""
    printed, errors = launcher.communicate(timeout=400)
    assert launcher.returncode == 0, errors
    return printed


def optimizer_of(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "optimizer.pt", weights_only=True)


@with_deepspeed
@pytest.mark.parametrize("stage", [1, 2])
def test_gradients_are_those_of_one_process(stage: int, tiny: Path, tmp_path: Path) -> None:
    """After one step the first moment is a tenth of the gradient, clipped as it was."""
    step = ("training.engine=modules", "training.max_steps=1", "training.save_steps=1")
    train(load_config("embedded", settings=flags(tiny, tmp_path / "one", *step)))
    ended(deepspeed(2, *flags(tiny, tmp_path / "two", *step), stage=stage))
    one, two = (optimizer_of(tmp_path / name / "checkpoints/checkpoint-1") for name in ("one", "two"))
    assert one["param_groups"] == two["param_groups"] and one["state"].keys() == two["state"].keys()
    largest = max(float(values["exp_avg"].abs().max()) for values in one["state"].values())
    assert largest > 0
    for number, values in one["state"].items():
        other = two["state"][number]
        assert values.keys() == other.keys() and values["step"] == other["step"] and values["step"].shape == other["step"].shape
        assert (values["exp_avg"] - other["exp_avg"]).abs().max() < 1e-5 * largest
        assert (values["exp_avg_sq"] - other["exp_avg_sq"]).abs().max() < 2e-5 * largest ** 2
    (state, _), (other, _) = outcome(tmp_path / "one"), outcome(tmp_path / "two")
    assert other["loss_history"][0]["grad_norm"] == pytest.approx(state["loss_history"][0]["grad_norm"], rel=1e-5)


@with_deepspeed
@finds_ranks
def test_stopped_on_one_rank_saved_on_all_and_gone_on_with(tiny: Path, alone: Path, tmp_path: Path) -> None:
    launcher = deepspeed(2, *flags(tiny, tmp_path))
    wait_for(launcher, "effective batch 8 (2 rows x 2 passes x 2 processes), 6 steps over 2 epochs")
    wait_for(launcher, "engine modules (fused is not for DeepSpeed")
    saved = stop_on_one_rank(launcher, "Step 1/6")
    assert {path.name for path in saved.iterdir()} == {path.name for path in (alone / "checkpoints/checkpoint-6").iterdir()} - {"rng_state.pth"} | {"rng_state_0.pth", "rng_state_1.pth"}
    ended(deepspeed(2, *flags(tiny, tmp_path)))
    assert_alike(alone, tmp_path)
    one, two = (folder / "checkpoints/final" for folder in (alone, tmp_path))
    assert {path.name for path in one.iterdir()} == {path.name for path in two.iterdir()}
    configs = [json.loads((folder / "adapter_config.json").read_text()) for folder in (one, two)]
    assert [{**config, "target_modules": sorted(config["target_modules"])} for config in configs] == [{**configs[0], "target_modules": sorted(configs[0]["target_modules"])}] * 2  # PEFT's order is a set's
    weights = load_file(two / "adapter_model.safetensors")
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in load_file(one / "adapter_model.safetensors").items()} == {name: (tensor.shape, tensor.dtype) for name, tensor in weights.items()}


@with_deepspeed
@finds_ranks
def test_with_deepspeed_and_without_by_turns(tiny: Path, alone: Path, tmp_path: Path) -> None:
    """Two divide the optimizer, two FSDP ranks write it in parts, four under DeepSpeed go on from those, one goes on from theirs."""
    settings, checkpoints = flags(tiny, tmp_path, "training.save_steps=1", "training.save_total_limit=9"), tmp_path / "checkpoints"
    stop_on_one_rank(deepspeed(2, *settings), "Step 1/6")
    stop_on_one_rank(accelerate(2, *settings), "Step ")  # FSDP2, its optimizer in parts
    ended(deepspeed(4, *settings, stage=1))
    assert_alike(alone, tmp_path)
    for last in ("final", "checkpoint-6"):
        shutil.rmtree(checkpoints / last)
    assert json.loads((checkpoints / "checkpoint-5/training_state.json").read_text())["processes"] == 4
    train(load_config("embedded", settings=settings))
    assert_alike(alone, tmp_path)


@with_deepspeed
@finds_ranks
def test_a_killed_rank_ends_all_and_leaves_no_half_checkpoint(tiny: Path, tmp_path: Path) -> None:
    ranks, errors = kill_a_rank(deepspeed(2, *flags(tiny, tmp_path, "training.num_epochs=200", "training.save_steps=1")))
    assert re.search(r"^error: (rank \d of \d: )?the connection to the other ranks is lost .* the same command goes on from the last one$", errors, re.M), errors
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks.values())
    checkpoints = [path for path in (tmp_path / "checkpoints").iterdir() if not path.name.startswith(".")]
    assert checkpoints and all(verify_folder(path) == [] for path in checkpoints)


@with_deepspeed
@pytest.mark.parametrize(("weights_in", "apart"), [("model.load_in_4bit=true", 1e-5), ("model.dtype=bfloat16", 1e-3)])
def test_weights_of_other_types(weights_in: str, apart: float, tiny: Path, tmp_path: Path) -> None:
    more = (weights_in, "training.engine=modules", "training.gradient_checkpointing=true")
    train(load_config("embedded", settings=flags(tiny, tmp_path / "one", *more)))
    ended(deepspeed(2, *flags(tiny, tmp_path / "two", *more)))
    (one, weights), (two, others) = outcome(tmp_path / "one"), outcome(tmp_path / "two")
    for history in ("loss_history", "validation_history"):
        assert [entry["loss"] for entry in two[history]] == pytest.approx([entry["loss"] for entry in one[history]], rel=apart)
    assert {tensor.dtype for tensor in others.values()} == {tensor.dtype for tensor in weights.values()} == {torch.float32}


@with_deepspeed
def test_the_best_evaluation_s_adapters_are_the_finished_ones(tiny: Path, tmp_path: Path) -> None:
    """Decay beyond reason makes the first evaluation the best."""
    ended(deepspeed(2, *flags(tiny, tmp_path, "training.load_best_model_at_end=true", "training.learning_rate=0.1", "training.weight_decay=25", "training.save_steps=2",
                              "training.lr_scheduler_type=constant", "training.max_steps=4")))
    state, weights = outcome(tmp_path)
    best = load_file(tmp_path / "checkpoints/checkpoint-2/adapter_model.safetensors")
    assert state["summary"]["weights_of_step"] == 2 and all(torch.equal(best[name], weights[name]) for name in best)


@with_deepspeed
def test_ranks_of_a_stream_read_different_files(tiny: Path, tmp_path: Path) -> None:
    settings = lambda name: stream_flags(tiny, data, tmp_path / name, "training.engine=modules")
    data = write(tmp_path / "data", 11, 8, 10, 8, even=True)
    train(load_config("embedded", settings=settings("one")))
    assert "Stream: 4 files in 4 lanes; each of 2 processes reads 1/2 of them" in ended(deepspeed(2, *settings("two")))
    assert_alike(tmp_path / "one", tmp_path / "two")


def started_by_accelerate(monkeypatch: pytest.MonkeyPatch, **environment: str) -> None:
    for name, value in ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2", "ACCELERATE_MIXED_PRECISION": "no", "WORLD_SIZE": "2"} | environment).items():
        monkeypatch.setenv(name, value)


REFUSED = {("training.engine=fused",): "training.engine fused, which .*; next: --set training.engine=auto",
           ("training.method=dpo",): "training.method dpo; next: accelerate launch --config_file configs/accelerate/ddp.yaml",
           ("training.finetuning_type=full",): "training.finetuning_type full; next: accelerate launch --config_file configs/accelerate/ddp.yaml",
           ("lora.init=pissa",): "lora.init pissa; next: --set lora.init=default",
           ("lora.loraplus_lr_ratio=16",): "lora.loraplus_lr_ratio; next: accelerate launch --config_file configs/accelerate/ddp.yaml",
           ("training.optim=adafactor",): "training.optim adafactor; next: --set training.optim=adamw_torch",
           ("training.lr_scheduler_type=reduce_lr_on_plateau",): "training.lr_scheduler_type reduce_lr_on_plateau; next: --set training.lr_scheduler_type=cosine",
           ("model.dtype=float16",): "model.dtype float16, which .*; next: --set model.dtype=bfloat16",
           ("training.metric_for_best_model=valid_structure", "training.load_best_model_at_end=true"):
               "training.metric_for_best_model valid_structure, for which .*; next: --set training.metric_for_best_model=loss",
           ("model.backend=unsloth",): "model.backend unsloth; next: --set model.backend=hf"}


@pytest.mark.parametrize("settings", REFUSED, ids=lambda settings: settings[0])
def test_settings_that_do_not_go_with_it_are_refused(settings: tuple[str, ...], tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started_by_accelerate(monkeypatch)
    with pytest.raises(TrainingError, match=f"^ranks: DeepSpeed does not take {REFUSED[settings]}$"):
        train(load_config("embedded", settings=flags(tiny, tmp_path, *settings)))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("environment", "file", "said"), [
    ({"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, None, "does not take zero_stage 3, which divides the weights; next: accelerate launch --config_file configs/accelerate/fsdp.yaml"),
    ({"ACCELERATE_DEEPSPEED_ZERO_STAGE": "0"}, None, "does not take zero_stage 0; next: zero_stage: 2 in accelerate's file"),
    ({"ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"}, None, "does not take offload of .*; next: offload_optimizer_device: none"),
    ({"ACCELERATE_MIXED_PRECISION": "bf16"}, None, "does not take mixed_precision, which would cast .*; next: mixed_precision: 'no'"),
    ({"ACCELERATE_GRADIENT_CLIPPING": "1.0"}, None, "does not take gradient_clipping from DeepSpeed's settings; next: leave it out there, training.max_grad_norm is the kit's"),
    ({"WORLD_SIZE": "1"}, None, "divides among several processes, and this is one; next: --num_processes 2"),
    ({}, '{"zero_optimization": {"stage": 2}, "optimizer": {"type": "AdamW"}}', "does not take optimizer from DeepSpeed's settings; next: .*training.optim is the kit's"),
    ({}, '{"zero_optimization": {"stage": 2}, "bf16": {"enabled": true}}', "does not take mixed_precision"),
    ({}, '{"train_batch_size": "auto"}', "does not take zero_stage 0"),
    ({}, "no json", "deepspeed_config_file .* is no config of DeepSpeed")])
def test_settings_of_deepspeed_that_are_not_the_kit_s_are_refused(environment: dict[str, str], file: str | None, said: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started_by_accelerate(monkeypatch, **environment)
    if file is not None:
        (tmp_path / "deepspeed.json").write_text(file)
        monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(tmp_path / "deepspeed.json"))
    with pytest.raises(TrainingError, match=rf"ranks: (DeepSpeed )?{said}"):
        train(load_config("embedded", settings=flags(tiny, tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_float16_of_an_older_card_is_refused() -> None:
    with pytest.raises(TrainingError, match="does not take model.dtype float16, which .*; next: accelerate launch --config_file configs/accelerate/ddp.yaml"):
        zero.configure({"zero_optimization": {"stage": 2}}, torch.float16, "cuda")


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is not None, reason="deepspeed is installed")
def test_a_missing_package_is_named(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started_by_accelerate(monkeypatch)
    with pytest.raises(TrainingError, match=r"ranks: DeepSpeed is not installed; next: pip install '\.\[deepspeed\]', or accelerate launch --config_file configs/accelerate/ddp\.yaml"):
        zero.check(load_config("embedded", settings=flags(tiny, tmp_path)).config)
