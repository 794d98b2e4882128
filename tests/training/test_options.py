"""Options of a run: each changes what it should, a resumed run ends with the same bits, and a changed one is refused."""

from __future__ import annotations

import importlib.util
import json
import typing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, get_scheduler
from transformers.training_args import OptimizerNames
from transformers.trainer_utils import SchedulerType

from emergency_kit.artifacts import load_manifest
from emergency_kit.config import Resolved, load_config
from emergency_kit.config_training import OPTIMIZERS_OF_TORCH, Optimizer, Schedule
from emergency_kit.errors import ConfigError, TrainingError, UsageError
from emergency_kit.evaluation.contestant import open_contestant
from emergency_kit.evaluation.during_training import build_scorer
from emergency_kit.export.gguf import pick_source
from emergency_kit.export.merge import merge
from emergency_kit.model import backend
from emergency_kit.training import best, checkpoint, engine, fit, preference
from emergency_kit.training.batches import collate
from emergency_kit.training.loss import supervised_loss
from emergency_kit.training.preference import collate_pairs, differing, preference_loss, token_log_probs
from emergency_kit.training.run import plan_steps, train
from emergency_kit.training.schedule import check_schedule, learning_rate, warmup_steps


def resolve(tiny: Path, out: Path, *settings: str) -> Resolved:
    return load_config("embedded", settings=[
        f"model.name={tiny}", f"training.output_dir={out}", "model.dtype=float32", "dataset.grounding=none", "dataset.build_size=200", "dataset.max_samples=6",
        "dataset.max_eval_samples=2", "lora.r=4", "training.per_device_train_batch_size=2", "training.gradient_accumulation_steps=1", "training.max_steps=2",
        "training.warmup_steps=0", "training.eval_steps=1", "training.save_steps=1", "training.save_total_limit=3", *settings])


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for path in sorted(folder.glob("*.safetensors")) for name, value in load_file(path).items()}


def same(first: Path, second: Path) -> bool:
    one, other = weights(first), weights(second)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# Few runs that each hold several options: every one of them must survive being killed and gone on with.
MIXES = {
    "dora": ("lora.use_dora=true", "lora.loraplus_lr_ratio=8", "training.label_smoothing_factor=0.1", "training.lr_scheduler_type=polynomial", "lora.dropout=0.1"),
    "pissa": ("lora.init=pissa_niter_4", "lora.use_rslora=true", "training.optim=adafactor", "training.lr_scheduler_type=reduce_lr_on_plateau",
              "training.lr_scheduler_kwargs={patience: 0, factor: 0.5}"),
    "full": ("training.finetuning_type=full", "training.optim=sgd", "training.learning_rate=1e-3", "training.warmup_ratio=0.5"),
    "dpo": ("training.method=dpo", "training.neftune_noise_alpha=5", "training.dpo_sft_weight=0.2", "training.per_device_train_batch_size=auto", "lora.target_modules=all-linear"),
    "saved": ("lora.modules_to_save=[lm_head]", "training.optim=rmsprop", "training.max_grad_norm=0", "training.learning_rate=1e-4"),
}


@pytest.fixture(scope="module")
def runs(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Output folders of a finished run of each mix."""
    found = {}
    for name, settings in MIXES.items():
        found[name] = tmp_path_factory.mktemp(name)
        train(resolve(tiny, found[name], *settings))
    return found


@pytest.mark.parametrize("name", MIXES)
def test_a_resumed_run_ends_bit_identical_under_every_option(tiny: Path, runs: dict[str, Path], name: str) -> None:
    folder = runs[name] / "checkpoints"
    train(resolve(tiny, runs[name], *MIXES[name], "training.model_name=again"), resume_from=folder / "checkpoint-1")
    assert same(folder / "final", folder / "again")
    one, other = (checkpoint.load_training_state(folder / last) for last in ("final", "again"))
    assert one["loss_history"] == other["loss_history"] and one["validation_history"] == other["validation_history"]
    assert not same(folder / "final", folder / "checkpoint-1")


@pytest.mark.parametrize("name, change", [
    ("dora", "lora.loraplus_lr_ratio=4"), ("dora", "lora.use_dora=false"), ("dora", "training.label_smoothing_factor=0.2"), ("dora", "training.lr_scheduler_type=linear"),
    ("pissa", "lora.init=pissa"), ("pissa", "lora.use_rslora=false"), ("pissa", "training.optim=sgd"), ("pissa", "training.lr_scheduler_kwargs={patience: 1}"),
    ("full", "training.warmup_ratio=0.9"), ("dpo", "training.dpo_beta=0.5"), ("dpo", "training.dpo_compare=changed"), ("dpo", "training.dpo_sft_weight=0"), ("saved", "lora.modules_to_save=[]"), ("saved", "training.max_grad_norm=1")])
def test_a_change_of_the_mathematics_is_refused_on_resume(tiny: Path, runs: dict[str, Path], name: str, change: str) -> None:
    key = change.partition("=")[0]
    with pytest.raises(UsageError, match=f"made by another run; differences: {key}: "):
        train(resolve(tiny, runs[name], *MIXES[name], change, "training.model_name=changed"), resume_from=runs[name] / "checkpoints" / "checkpoint-1", dry_run=True)


def test_full_and_lora_checkpoints_are_not_mistaken_for_each_other(tiny: Path, runs: dict[str, Path]) -> None:
    with pytest.raises(Exception, match="training.finetuning_type is lora; set it to full"):
        train(resolve(tiny, runs["full"], "training.model_name=x"), resume_from=runs["full"] / "checkpoints" / "checkpoint-1", dry_run=True)


def test_a_full_fine_tuning_s_folder_is_a_whole_model(tiny: Path, runs: dict[str, Path]) -> None:
    final = runs["full"] / "checkpoints" / "final"
    assert (final / "model.safetensors").is_file() and not (final / "adapter_config.json").exists()
    before, after = weights(tiny), weights(final)
    assert before.keys() == after.keys() and all(not torch.equal(before[name].float(), after[name]) for name in before)
    resolved = resolve(tiny, runs["full"], *MIXES["full"])
    assert backend.load_checkpoint(resolved.config.model, final).kind == open_contestant(resolved, str(final)).kind == "full"
    merged = merge(resolved)
    written = weights(merged)
    assert merged == runs["full"] / "merged" / "final" and written.keys() == after.keys() and all(torch.equal(written[name], after[name]) for name in after)
    assert load_manifest(merged)["merge"]["max_abs_logit_difference"] < 1e-5
    assert pick_source(resolved, None).folder == merged and pick_source(resolved, final).kind == "model"


def test_dpo_counts_the_pairs_that_it_tells_apart_and_remembers_its_division(runs: dict[str, Path]) -> None:
    state = checkpoint.load_training_state(runs["dpo"] / "checkpoints" / "final")
    assert set(state["validation_history"][0]) == {"step", "loss", "preferred"}
    assert state["pass_rows"] in (1, 2)


def test_in_bfloat16_a_pair_s_reference_is_what_training_begins_with_and_answers_are_scored(tiny: Path, tmp_path: Path) -> None:
    """Outside a step, too, base weights in bfloat16 meet adapters in float32."""
    folder = train(resolve(tiny, tmp_path, "model.dtype=bfloat16", "training.method=dpo", "training.max_steps=1"))
    first = checkpoint.load_training_state(folder)["loss_history"][0]["loss"]
    assert first == pytest.approx(0.6931, abs=0.03), "no margin yet: the logarithm of 2"
    scored = train(resolve(tiny, tmp_path, "model.dtype=bfloat16", "training.engine=modules", "training.max_steps=1", "training.model_name=scored", "training.load_best_model_at_end=true",
                           "training.metric_for_best_model=critical_action_recall", "training.best_samples=2", "evaluation.max_new_tokens=4"), scorer=build_scorer)
    assert all(entry["critical_action_recall"] == 0 for entry in checkpoint.load_training_state(scored)["validation_history"])


def test_evaluations_and_checkpoints_by_epoch_and_by_share(tiny: Path, tmp_path: Path) -> None:
    train(resolve(tiny, tmp_path, "training.max_steps=4", "training.eval_strategy=epoch", "training.save_steps=0.5", "training.logging_steps=2"))
    state = checkpoint.load_training_state(tmp_path / "checkpoints" / "final")
    assert [entry["step"] for entry in state["validation_history"]] == [3, 4]  # six rows by two, and the end
    assert [checkpoint.step_of(path) for path in checkpoint.list_checkpoints(tmp_path / "checkpoints")] == [2, 4]
    # The same run, looked at in other places, ends with the same bits.
    train(resolve(tiny, tmp_path, "training.max_steps=4", "training.eval_strategy=no", "training.save_strategy=no", "training.model_name=unseen"), overwrite=True)
    assert same(tmp_path / "checkpoints" / "final", tmp_path / "checkpoints" / "unseen")
    assert len(checkpoint.load_training_state(tmp_path / "checkpoints" / "unseen")["validation_history"]) == 1


def test_the_best_evaluation_s_weights_are_the_finished_model_s_and_patience_ends_the_run(tiny: Path, tmp_path: Path) -> None:
    settings = ("training.max_steps=5", "training.load_best_model_at_end=true", "training.early_stopping_patience=2", "training.metric_for_best_model=critical_action_recall",
                "training.save_steps=3")
    shares = iter([0.9, 0.5, 0.7])  # what the answers are worth, evaluation by evaluation

    def scorer(resolved: Resolved, tokenizer: Any) -> Any:
        return lambda model, check: {"critical_action_recall": next(shares)}

    final = train(resolve(tiny, tmp_path, *settings), scorer=scorer)
    state, folder = checkpoint.load_training_state(final), tmp_path / "checkpoints"
    assert [entry["critical_action_recall"] for entry in state["validation_history"]] == [0.9, 0.5, 0.7]
    assert state["step"] == 3 and state["summary"]["weights_of_step"] == 1
    assert [checkpoint.step_of(path) for path in checkpoint.list_checkpoints(folder)] == [1, 3]  # the best is saved when it is measured
    assert same(final, folder / "checkpoint-1") and not same(final, folder / "checkpoint-3")
    # Gone on with where patience was out, nothing more is trained and nothing more asked.
    again = train(resolve(tiny, tmp_path, *settings, "training.model_name=again"), resume_from=folder / "checkpoint-3", scorer=scorer)
    assert checkpoint.load_training_state(again)["step"] == 3 and same(again, final)


def test_auto_keeps_the_step_and_changes_its_division_alone(tiny: Path) -> None:
    plans = [plan_steps(resolve(tiny, Path("x"), *settings, "training.max_steps=null"), 37) for settings in
             (("training.gradient_accumulation_steps=4",), ("training.gradient_accumulation_steps=4", "training.per_device_train_batch_size=auto"))]
    assert plans[0] == plans[1] and plans[0]["effective_batch"] == 8


@pytest.mark.parametrize("most, wanted", [(100, 12), (5, 4)])
def test_on_a_gpu_the_most_rows_that_fit_are_taken(most: int, wanted: int) -> None:
    tried: list[int] = []

    def attempt(count: int) -> None:
        tried.append(count)
        if count > most:
            raise torch.OutOfMemoryError("CUDA out of memory")

    assert fit.fit_rows(12, attempt, on_gpu=True, exhausted=lambda error: isinstance(error, torch.OutOfMemoryError)) == wanted
    assert tried == [count for count in (12, 6, 4, 3, 2, 1) if count >= wanted]
    with pytest.raises(torch.OutOfMemoryError):
        fit.fit_rows(12, lambda count: attempt(most + 1), on_gpu=True, exhausted=lambda error: isinstance(error, torch.OutOfMemoryError))


def test_on_a_cpu_the_need_of_more_rows_is_reckoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row takes 60 MB; nothing that would not fit is ever tried."""
    held = []

    def attempt(count: int) -> None:
        assert count <= 2
        held.append(np.ones((count * 60_000_000,), np.uint8))
        held.clear()

    free = fit.available_bytes()
    assert free > 0 and fit.resident_bytes("VmRSS") > 0
    assert fit.fit_rows(64, attempt, False, lambda error: False) in (32, 64)
    monkeypatch.setattr(fit, "available_bytes", lambda: 150_000_000)
    assert fit.fit_rows(64, attempt, False, lambda error: False) <= 2
    # Where the highest mark does not move, as on a system that has none, one row at a time is sure to fit; where other pages went meanwhile, a row takes what the first one took.
    monkeypatch.setattr(fit, "available_bytes", lambda: free)
    now = fit.resident_bytes()
    monkeypatch.setattr(fit, "resident_bytes", lambda field="VmRSS": None if field == "VmHWM" else now)
    assert fit.fit_rows(64, attempt, False, lambda error: False) == 1
    monkeypatch.setattr(fit, "available_bytes", lambda: 150_000_000)
    monkeypatch.setattr(fit, "resident_bytes", lambda field="VmRSS": now + 60_000_000 * (field == "VmHWM"))
    assert fit.fit_rows(64, attempt, False, lambda error: False) == 2


def test_optimizers_and_schedules_have_their_names_in_transformers() -> None:
    assert set(typing.get_args(Optimizer)) <= {item.value for item in OptimizerNames}
    assert set(typing.get_args(Schedule)) == {item.value for item in SchedulerType} - {"greedy"}
    with pytest.raises(ConfigError, match="expected 'adamw_torch', .*'rmsprop_bnb_32bit'"):
        load_config("embedded", settings=["training.optim=adam"])
    with pytest.raises(ConfigError, match="expected 'linear', .*'warmup_stable_decay'"):
        load_config("embedded", settings=["training.lr_scheduler_type=sine"])


KWARGS: dict[str, dict[str, Any]] = {"cosine_with_min_lr": {"min_lr_rate": 0.1}, "cosine_warmup_with_min_lr": {"min_lr": 1e-4}, "warmup_stable_decay": {"num_decay_steps": 5}}


@pytest.mark.parametrize("name", sorted(set(typing.get_args(Schedule)) - {"reduce_lr_on_plateau"}))
def test_every_schedule_is_transformers_own(tiny: Path, name: str) -> None:
    training = resolve(tiny, Path("x"), f"training.lr_scheduler_type={name}", f"training.lr_scheduler_kwargs={json.dumps(KWARGS.get(name, {}))}", "training.warmup_ratio=0.1",
                       "training.warmup_steps=7").config.training
    assert warmup_steps(training, 30) == 3
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=training.learning_rate)
    schedule = get_scheduler(name, optimizer, num_warmup_steps=3, num_training_steps=30, scheduler_specific_kwargs=KWARGS.get(name, {}))
    for step in range(30):
        assert learning_rate(training, step, 30) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
        optimizer.step()
        schedule.step()


@pytest.mark.parametrize("settings, message", [
    (("training.lr_scheduler_type=cosine_with_min_lr",), "cosine_with_min_lr with lr_scheduler_kwargs {} cannot be made"),
    (("training.lr_scheduler_kwargs={peak: 3}",), "unexpected keyword argument 'peak'"), (("training.optim=lion_8bit",), "lion_8bit needs the package bitsandbytes")])
def test_what_cannot_be_scheduled_or_optimised_is_said_before_anything_loads(tiny: Path, settings: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None if name == "bitsandbytes" else find(name, *rest))
    with pytest.raises(TrainingError, match=message):
        check_schedule(resolve(tiny, Path("x"), *settings).config, 10)


@pytest.mark.parametrize("name", OPTIMIZERS_OF_TORCH)
def test_every_optimizer_of_torch_can_be_had(name: str) -> None:
    from transformers import Trainer, TrainingArguments

    kind, options = Trainer.get_optimizer_cls_and_kwargs(TrainingArguments(output_dir="x", optim=name, use_cpu=True, report_to="none"), torch.nn.Linear(2, 2))
    assert kind([{"params": [torch.nn.Parameter(torch.zeros(2, 2))]}], **options).param_groups[0]["lr"] == 5e-5


def test_label_smoothing_equals_the_naive_reference() -> None:
    torch.manual_seed(0)
    head, hidden = torch.nn.Linear(8, 30), torch.randn(2, 6, 8)
    labels = torch.randint(0, 30, (2, 6))
    labels[:, :3] = -100
    logs = head(hidden[:, 2:-1]).log_softmax(-1)
    target = torch.nn.functional.one_hot(labels[:, 3:], 30) * 0.9 + 0.1 / 30
    assert supervised_loss(hidden, labels, head, smoothing=0.1).item() == pytest.approx(-(target * logs).sum(-1).mean().item(), rel=1e-5)


def test_the_preference_loss_equals_the_naive_reference() -> None:
    torch.manual_seed(0)
    head, hidden = torch.nn.Linear(8, 30), torch.randn(4, 6, 8)
    labels = torch.randint(0, 30, (4, 6))
    labels[:, :2] = -100
    labels[1, 4:] = -100
    found = token_log_probs(hidden, labels, head).sum(1)
    for row in range(4):
        naive = sum(head(hidden[row, place - 1]).log_softmax(-1)[labels[row, place]].item() for place in range(1, 6) if labels[row, place] != -100)
        assert found[row].item() == pytest.approx(naive, rel=1e-5)
    reference = torch.tensor([-20.0, -11.0, -13.0, -12.0])
    losses, margin = preference_loss(found, reference, 0.3)
    for pair in range(2):
        safe, unsafe = (found[2 * pair + side] - reference[2 * pair + side] for side in (0, 1))
        wanted = -np.log(1 / (1 + np.exp(-0.3 * (safe - unsafe).item())))
        assert losses[pair].item() == pytest.approx(wanted, rel=1e-5) and margin[pair].item() == pytest.approx((safe - unsafe).item(), rel=1e-5)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=12), st.lists(st.integers(0, 3), min_size=1, max_size=12))
def test_what_two_rows_differ_in_equals_a_naive_reading(safe: list[int], unsafe: list[int]) -> None:
    one, other = differing(safe, unsafe)
    assert safe[:one.start] == unsafe[:other.start] and safe[one.stop:] == unsafe[other.stop:], "what is left out is common"
    start = next((place for place, (a, b) in enumerate(zip(safe, unsafe)) if a != b), min(len(safe), len(unsafe)))
    most = next((end for end, (a, b) in enumerate(zip(safe[:start:-1], unsafe[:start:-1])) if a != b), max(0, min(len(safe), len(unsafe)) - start - 1))
    assert one == slice(start, len(safe) - most) and other == slice(start, len(unsafe) - most)


def test_dpo_leaves_alone_what_both_answers_say() -> None:
    """Only what differs is in the margin, the end of the turn never; the weight of the safe answer's likelihood is of all of it."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=30, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1)).eval()
    prompt, end = [4, 5, 6], 2
    pair = tuple({"input_ids": prompt + answer, "labels": [-100] * 3 + answer} for answer in ([7, 8, 9, 10, end], [7, 11, 12, 9, 10, end]))
    batch = collate_pairs([{"pair": pair, "reference": [-1.0, -2.0]}], lambda rows: collate(rows, 0), "changed")
    assert batch["compared"][0].tolist() == [-100] * 4 + [8] + [-100] * 4 and batch["compared"][1].tolist() == [-100] * 4 + [11, 12] + [-100] * 3
    whole = collate_pairs([{"pair": pair, "reference": [-1.0, -2.0]}], lambda rows: collate(rows, 0), "whole")
    assert torch.equal(whole["compared"], whole["labels"])
    logs = [model(torch.tensor([row["input_ids"]])).logits[0].log_softmax(-1) for row in pair]

    def said(row: int, places: list[int]) -> float:
        return sum(logs[row][place - 1, pair[row]["input_ids"][place]].item() for place in places)

    preference.install(model, 0.3, 0.5)
    changed, everything = said(0, [4]) + 1 - said(1, [4, 5]) - 2, said(0, [3, 4, 5, 6, 7]) + 1 - said(1, [3, 4, 5, 6, 7, 8]) - 2
    for asked, margin in ((batch, changed), (whole, everything)):
        wanted = -np.log(1 / (1 + np.exp(-0.3 * margin))) - 0.5 * said(0, [3, 4, 5, 6, 7]) / 5
        assert model(**asked)["loss"].item() == pytest.approx(wanted, rel=1e-4)


@given(st.lists(st.floats(0, 10), max_size=12), st.floats(0, 1), st.integers(1, 4))
def test_patience_counts_like_a_naive_reading(losses: list[float], threshold: float, patience: int) -> None:
    history = [{"step": step, "loss": loss} for step, loss in enumerate(losses)]
    wanted = 0
    for last in range(len(losses), 0, -1):
        earlier: list[float] = []
        for loss in losses[:last - 1]:  # each new best must beat the one before by the threshold
            if not earlier or loss < earlier[-1] - threshold:
                earlier.append(loss)
        if not earlier or losses[last - 1] < earlier[-1] - threshold:
            break
        wanted += 1
    assert best.evaluations_without_progress(history, "loss", threshold) == wanted


def test_the_best_is_the_highest_share_or_the_lowest_danger() -> None:
    history = [{"step": 1, "loss": 1.0, "critical_action_recall": 0.5, "dangerous_advice": 0.1}, {"step": 2, "loss": 2.0, "critical_action_recall": 0.9, "dangerous_advice": 0.1},
               {"step": 3, "loss": 3.0, "critical_action_recall": 0.9, "dangerous_advice": 0.0}, {"step": 4, "loss": 4.0}]
    found = {metric: best.best_evaluation(history, metric)["step"] for metric in ("loss", "critical_action_recall", "dangerous_advice")}
    assert found == {"loss": 1, "critical_action_recall": 2, "dangerous_advice": 3} and best.best_evaluation([], "loss") is None


def test_of_several_gpus_a_process_takes_one(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else transformers' DataParallel would take rows for every GPU that it counts, and the step would be another one."""
    from transformers import TrainingArguments

    setup = TrainingArguments._setup_devices.func

    def counts_two(self: TrainingArguments) -> torch.device:
        device = setup(self)
        self._n_gpu = 2
        return device

    monkeypatch.setattr(TrainingArguments, "_setup_devices", property(counts_two))
    resolved = load_config("embedded", settings=[f"model.name={tiny}", "model.dtype=float32"])
    assert TrainingArguments(output_dir=str(tmp_path)).n_gpu == 2
    made = engine.training_arguments(resolved, tmp_path, resolved.config.model, fused=False, steps=4, pass_rows=2)
    assert made.n_gpu == 1 and made.train_batch_size == 2 and made.parallel_mode.value == "not_parallel"
