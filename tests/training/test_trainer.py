"""Order of rows, collation, and real short runs of the whole stage on a two-layer model."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from emergency_kit.artifacts import verify_folder
from emergency_kit.config import Resolved, load_config
from emergency_kit.data.tokenize import IGNORE
from emergency_kit.errors import Interrupted, ModelError, UsageError
from emergency_kit.model import compute
from emergency_kit.training import checkpoint
from emergency_kit.training.batches import StepSampler, collate
from emergency_kit.training.run import train
from emergency_kit.training.stopping import Stop, StopRequested
from tests.tiny import save_tiny_model

FINAL = {"adapter_config.json", "adapter_model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json",
         "special_tokens_map.json", "training_state.json", "manifest.json", "chat_template.jinja"}
RESUMABLE = FINAL | {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"}


def settings_of(tiny: Path, out: Path, *settings: str) -> list[str]:
    return [
        f"model.name={tiny}", f"training.output_dir={out}", "model.dtype=float32", "dataset.build_size=200", "dataset.max_samples=24", "dataset.max_eval_samples=8",
        "training.max_steps=6", "training.num_epochs=2", "training.eval_steps=2", "training.save_steps=2", "lora.dropout=0.1", *settings]


def resolve(tiny: Path, out: Path, *settings: str) -> Resolved:
    return load_config("embedded", settings=settings_of(tiny, out, *settings))


@pytest.fixture(scope="module")
def run(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output folder of a finished run of 6 steps over two epochs, with dropout."""
    out = tmp_path_factory.mktemp("run")
    train(resolve(tiny, out))
    return out


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_the_output_tree_is_the_guide_s(run: Path) -> None:
    assert files(run / "checkpoints") == {"checkpoint-4", "checkpoint-6", "final"}  # save_total_limit 2
    assert files(run / "checkpoints" / "final") == FINAL
    assert files(run / "checkpoints" / "checkpoint-6") == RESUMABLE
    assert (run / "logs" / "training.log").is_file()
    assert all(not verify_folder(folder) for folder in (run / "checkpoints").iterdir())


def test_the_log_has_the_guide_s_lines(run: Path) -> None:
    text = (run / "logs" / "training.log").read_text()
    stamp = r"^\[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\] "
    for pattern in (r"Starting training\.\.\.$", r"Epoch 1/2$", r"Epoch 2/2$", r"Step 1/6, Loss: \d+\.\d{4}$", r"Step 6/6, Loss: \d+\.\d{4}$",
                    r"Training completed!$", r"Final checkpoint saved to: .*checkpoints/final$"):
        assert re.search(stamp + pattern, text, re.MULTILINE), pattern
    assert len(re.findall(r"Validation loss: ", text)) == 3


def test_the_state_tells_the_run(run: Path) -> None:
    state = json.loads((run / "checkpoints" / "final" / "training_state.json").read_text())
    assert state["step"] == 6 and state["epoch"] == 2.0
    assert [entry["step"] for entry in state["loss_history"]] == [1, 2, 3, 4, 5, 6]
    assert [entry["step"] for entry in state["validation_history"]] == [2, 4, 6]
    assert state["loss_history"][-1]["loss"] < state["loss_history"][0]["loss"]
    assert state["best_metric"] == min(entry["loss"] for entry in state["validation_history"])
    summary = state["summary"]
    assert summary["first_loss"] == state["loss_history"][0]["loss"] and summary["supervised_tokens"] < summary["tokens"]
    assert summary["peak_memory_bytes"] > 1e8 and summary["tokens_per_second"] > 0


def test_adapters_are_float32_and_moved(run: Path, tiny: Path) -> None:
    weights = load_file(run / "checkpoints" / "final" / "adapter_model.safetensors")
    assert len(weights) == 2 * 7 * 2 and {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert all(tensor.abs().max() > 0 for name, tensor in weights.items() if "lora_B" in name)


def test_a_resumed_run_ends_bit_identical(run: Path, tiny: Path, tmp_path: Path) -> None:
    config = resolve(tiny, tmp_path, "training.save_total_limit=3")
    train(config)
    second = resolve(tiny, tmp_path, "training.save_total_limit=3", "training.model_name=again")
    train(second, resume_from=tmp_path / "checkpoints" / "checkpoint-2")
    whole, resumed = (load_file(folder / "adapter_model.safetensors") for folder in
                      (run / "checkpoints" / "final", tmp_path / "checkpoints" / "again"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    losses = [[entry["loss"] for entry in checkpoint.load_training_state(folder)["loss_history"]] for folder in
              (run / "checkpoints" / "final", tmp_path / "checkpoints" / "again")]
    assert losses[0] == losses[1]


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() != "AVX512" or compute.measured_integer_gain() < compute.LEAST_INTEGER_GAIN,
                    reason="needs a CPU that multiplies integers at twice the speed of float32, and can be told not to")
def test_a_run_goes_on_with_the_products_that_it_began_with(tiny: Path, tmp_path: Path) -> None:
    """A process that sees a CPU without VNNI begins without integers, and one that has them goes on so, bit for bit; the other way round it is said."""
    def poorer(out: Path, *more: str) -> str:
        settings = [text for setting in settings_of(tiny, out) for text in ("--set", setting)]
        done = subprocess.run([sys.executable, "-m", "emergency_kit.cli", "train", "--profile", "embedded", *settings, *more], capture_output=True, text=True, check=True,
                              env={**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX512_CORE"})
        return done.stdout

    assert "int8" not in poorer(tmp_path)
    train(resolve(tiny, tmp_path, "training.model_name=again"), resume_from=tmp_path / "checkpoints" / "checkpoint-4")
    begun, gone_on = (checkpoint.load_training_state(tmp_path / "checkpoints" / name) for name in ("final", "again"))
    assert not begun["int8_backward"] and not gone_on["int8_backward"] and gone_on["step"] == 6
    train(resolve(tiny, tmp_path / "richer"))
    assert checkpoint.load_training_state(tmp_path / "richer" / "checkpoints" / "final")["int8_backward"]
    said = poorer(tmp_path / "richer", "--model-name", "again", "--resume-from", str(tmp_path / "richer" / "checkpoints" / "checkpoint-4"))
    assert "gradients went back in int8 before and do not here" in said


def test_a_stop_between_passes_carries_no_loss_of_theirs(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped in the third pass of step 2, where one step's loss waits to be logged; resumed, every logged loss is the undisturbed run's."""
    settings = ("training.engine=modules", "training.logging_steps=3", "training.eval_steps=6", "training.save_steps=6")
    train(resolve(tiny, tmp_path / "whole", *settings))
    asked = 0

    def check(stop: Stop) -> None:
        nonlocal asked
        asked += 1
        if asked == 7:  # four passes a step
            raise StopRequested

    with monkeypatch.context() as patched, pytest.raises(Interrupted, match="stopped at step 1/6"):
        patched.setattr(Stop, "check", check)
        train(resolve(tiny, tmp_path / "stopped", *settings))
    train(resolve(tiny, tmp_path / "stopped", *settings))
    histories = [checkpoint.load_training_state(tmp_path / name / "checkpoints" / "final")["loss_history"] for name in ("whole", "stopped")]
    assert histories[0] == histories[1] and len(histories[0]) == 3


def test_a_finished_model_is_not_overwritten_unasked(run: Path, tiny: Path) -> None:
    before = (run / "checkpoints" / "final" / "manifest.json").read_bytes()
    with pytest.raises(UsageError, match=r"--model-name.*--resume-from.*--overwrite"):
        train(resolve(tiny, run))
    assert (run / "checkpoints" / "final" / "manifest.json").read_bytes() == before


def test_another_model_name_stands_beside_the_first(run: Path, tiny: Path, tmp_path: Path) -> None:
    train(resolve(tiny, tmp_path, "training.max_steps=1"))
    train(resolve(tiny, tmp_path, "training.max_steps=1", "training.model_name=crisis_agent_v2"))
    assert files(tmp_path / "checkpoints") >= {"final", "crisis_agent_v2"}


@pytest.mark.parametrize("damage, message", [
    (lambda folder: (folder / "optimizer.pt").write_bytes(b"x"), "optimizer.pt differs"),
    (lambda folder: (folder / "adapter_model.safetensors").unlink(), "adapter_model.safetensors is missing"),
    (lambda folder: (folder / "manifest.json").unlink(), "manifest.json is missing"),
])
def test_a_damaged_checkpoint_is_refused(run: Path, tiny: Path, tmp_path: Path, damage: object, message: str) -> None:
    import shutil

    folder = tmp_path / "checkpoint-4"
    shutil.copytree(run / "checkpoints" / "checkpoint-4", folder)
    damage(folder)  # type: ignore[operator]
    with pytest.raises(ModelError, match=message):
        train(resolve(tiny, tmp_path / "out"), resume_from=folder)


def test_a_checkpoint_of_another_base_is_refused(run: Path, tmp_path: Path) -> None:
    other = save_tiny_model(tmp_path / "other", seed=1)
    with pytest.raises(ModelError, match="trained on base model"):
        train(resolve(other, tmp_path / "out"), resume_from=run / "checkpoints" / "checkpoint-4")


def test_a_finished_model_cannot_be_resumed(run: Path, tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="without optimizer state"):
        train(resolve(tiny, tmp_path), resume_from=run / "checkpoints" / "final")


def test_ctrl_c_saves_a_checkpoint_that_can_be_resumed(tiny: Path, tmp_path: Path) -> None:
    settings = [f"model.name={tiny}", "model.dtype=float32", "dataset.build_size=200", "dataset.max_samples=24", "dataset.max_eval_samples=4", "training.max_steps=400", "training.save_steps=400", "training.eval_steps=400"]
    command = [sys.executable, "-u", "scripts/train.py", "--output-dir", str(tmp_path), *(part for item in settings for part in ("--set", item))]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    for line in process.stdout:
        if "Step 3/400" in line or time.monotonic() > deadline:
            process.send_signal(signal.SIGINT)
            break
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    saved = re.search(r"--resume-from (\S+)", errors).group(1)
    assert not verify_folder(Path(saved)) and files(Path(saved)) == RESUMABLE
    assert not (tmp_path / "checkpoints" / "final").exists() and "Traceback" not in errors
    step = checkpoint.load_training_state(Path(saved))["step"]
    train(load_config("embedded", settings=[*settings, f"training.output_dir={tmp_path}", f"training.max_steps={step + 1}"]), accept_changes=True)
    assert checkpoint.load_training_state(tmp_path / "checkpoints" / "final")["step"] == step + 1


def test_rows_of_a_step_stay_together_and_epochs_differ() -> None:
    lengths = np.random.default_rng(0).integers(10, 500, 37)
    sampler = StepSampler(lengths, step_rows=8, seed=3)
    first = list(sampler)
    sampler.set_epoch(1)
    second = list(sampler)
    assert sorted(first) == sorted(second) == list(range(37)) and first != second
    plain = torch.randperm(37, generator=torch.Generator().manual_seed(3 * 100_003)).tolist()
    for start in range(0, 37, 8):
        block = first[start:start + 8]
        assert set(block) == set(plain[start:start + 8])
        assert [lengths[row] for row in block] == sorted((lengths[row] for row in block), reverse=True)


def test_collate_pads_on_the_right() -> None:
    batch = collate([{"input_ids": [5, 6, 7], "labels": [IGNORE, 6, 7]}, {"input_ids": [8], "labels": [8]}], pad_id=2)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 2, 2]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[IGNORE, 6, 7], [8, IGNORE, IGNORE]]
