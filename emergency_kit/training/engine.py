"""What a step is computed with: the engine, its compute type, and the Trainer's arguments that go with them.

In: a loaded model and the config. Out: the model with its loss installed, the `FusedStep` where it can be had, and
`TrainingArguments`. Limits: `fused` is not for float16; `auto` then takes `modules` and says so. A backend that owns its loss
(Unsloth) keeps its forward pass as it is.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emergency_kit.config import ModelSection, Resolved, TrainingConfig
from emergency_kit.errors import TrainingError
from emergency_kit.model.backend import pick_device
from emergency_kit.training import zero
from emergency_kit.training.ranks import is_sharded, uses_deepspeed, world
from emergency_kit.training.schedule import step_rows, warmup_steps

# Under which trackers file the runs.
PROJECT = "ai-emergency-kit"

if TYPE_CHECKING:
    import torch
    from transformers import TrainingArguments

    from emergency_kit.model.backend import Loaded
    from emergency_kit.training.fused.step import FusedStep


def install_engine(loaded: "Loaded", training: TrainingConfig, pass_rows: int, row_tokens: int) -> "FusedStep | None":
    """Give the model its loss, and the engine of its step; what was chosen, and why, goes into `loaded.notes`. pass_rows: rows of a pass;
    row_tokens: of the longest row that may come."""
    import torch

    from emergency_kit.training import end_to_end, loss, preference
    from emergency_kit.training.fused.step import FusedStep

    causal_lm, reason = causal_lm_of(loaded.model), "a backend with a loss of its own" if loaded.owns_loss else _not_fused(loaded.model, training)
    if training.engine == "fused" and reason:
        raise TrainingError(f"training.engine is fused, which does not take {reason}; next: --set training.engine=auto")
    fused = None
    if training.engine == "modules" or reason:
        loaded.notes.append(f"engine modules ({'by config' if training.engine == 'modules' else f'fused is not for {reason}'})")
    else:
        fused = FusedStep(causal_lm, pass_rows, training.prefix_sharing, bool(training.gradient_checkpointing), training.neftune_noise_alpha, row_tokens)
        if integers := goes_back_in_integers(training, causal_lm.device.type, str(fused.dtype).removeprefix("torch."), fused.four_bit):
            fused.go_back_in_integers()
        loaded.notes.append(f"engine fused{', flash attention' if fused.flash else ', shared beginnings computed once' if fused.share else ''}"
                            f"{', gradients back through frozen weights in int8' if integers else ''}")
    if loaded.owns_loss:
        return None
    # Weights that FSDP divides are on the CPU until then.
    modules_on_gpu = fused is None and (causal_lm.device.type == "cuda" or is_sharded() and torch.cuda.is_available())
    if modules_on_gpu and has_liger():
        loaded.notes.append("Liger kernels")
    if training.method == "dpo":
        preference.install(causal_lm, training.dpo_beta, training.dpo_sft_weight, training.neftune_noise_alpha)
        return None
    unpadded = modules_on_gpu and end_to_end.install(causal_lm)
    if unpadded:
        loaded.notes.append("rows end to end, without padding")
    loss.install(causal_lm, fused, training.neftune_noise_alpha, unpadded, training.label_smoothing_factor)
    return fused


def goes_back_in_integers(training: TrainingConfig, device: str, dtype: str, four_bit: bool) -> bool:
    """Whether `fused` multiplies gradients by frozen weights in 8-bit integers, here and now. Raises TrainingError where the config asks for it and it cannot be."""
    from emergency_kit.model import compute

    if training.int8_backward is False:
        return False
    reason = "a GPU" if device != "cpu" else f"compute type {dtype}" if dtype != "float32" \
        else "4-bit weights" if four_bit else "a CPU whose sums of 8-bit products are not exact" if not compute.measured_integer_gain() else ""
    if reason and training.int8_backward is True:
        raise TrainingError(f"training.int8_backward is true, which is not for {reason}; next: --set training.int8_backward=auto")
    return not reason and (training.int8_backward is True or compute.measured_integer_gain() >= compute.LEAST_INTEGER_GAIN)


def beyond_plain_loss(training: TrainingConfig) -> str:
    """What a run asks of the model's forward pass beyond its loss, in words: a backend that owns its loss is not used for these. Empty where nothing is."""
    wanted = {"training.method dpo": training.method == "dpo", "training.neftune_noise_alpha": training.neftune_noise_alpha,
              "training.label_smoothing_factor": training.label_smoothing_factor, "training.engine fused": training.engine == "fused",
              f"training.metric_for_best_model {training.metric_for_best_model}, whose answers are generated in training": training.metric_for_best_model != "loss",
              "FSDP": is_sharded(), "DeepSpeed": uses_deepspeed()}
    return next((name for name, there in wanted.items() if there), "")


def causal_lm_of(model: Any) -> Any:
    """The causal language model itself, inside of PEFT's wrapper where it has one."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _not_fused(model: Any, training: TrainingConfig) -> str | None:
    """Why the fused engine cannot compute this run; None where it can."""
    import torch

    from emergency_kit.training.fused.step import unsupported

    if is_sharded():
        return "FSDP, which gathers a layer's weights around transformers' modules"
    if uses_deepspeed():
        return "DeepSpeed, which takes gradients as transformers' modules make them"
    if training.method == "dpo":
        return "training.method dpo"
    if training.finetuning_type == "full":
        return "full fine-tuning"
    if training.label_smoothing_factor:
        return "label smoothing"
    return unsupported(model) or ("float16, whose gradients need the Trainer's scaling" if causal_lm_of(model).dtype == torch.float16 else None)


def has_liger() -> bool:
    """Whether Liger's fused GPU kernels (of the GPU extra) are installed."""
    return importlib.util.find_spec("liger_kernel") is not None


def compute_type(model: ModelSection) -> "torch.dtype":
    """The type that this run computes in, here and now."""
    from emergency_kit.model.backend import pick_dtype

    return pick_dtype(model, pick_device(model))


def training_arguments(resolved: Resolved, folder: Path, model: ModelSection, fused: bool, steps: int, pass_rows: int, owns_loss: bool = False) -> "TrainingArguments":
    """The Trainer's arguments. folder: of the checkpoints; model: the config's, its compute type perhaps pinned by a resume; steps: of the run;
    pass_rows: rows of a pass; owns_loss: as the backend's, whose kernels are its own, too. Raises TrainingError for settings that transformers does not take together."""
    import torch
    from transformers import TrainingArguments

    training = resolved.config.training
    device, dtype = pick_device(model), compute_type(model)
    # Fused, the rows of a whole step are one batch, divided into passes within.
    rows = step_rows(training)
    batch, accumulation = (rows, 1) if fused else (pass_rows, rows // pass_rows)
    try:
        arguments = TrainingArguments(
            output_dir=str(folder), num_train_epochs=training.num_epochs, max_steps=training.max_steps or -1,
            learning_rate=training.learning_rate, per_device_train_batch_size=batch,
            per_device_eval_batch_size=training.per_device_eval_batch_size, gradient_accumulation_steps=accumulation,
            warmup_steps=warmup_steps(training, steps), lr_scheduler_type=training.lr_scheduler_type, lr_scheduler_kwargs=dict(training.lr_scheduler_kwargs),
            weight_decay=training.weight_decay,
            max_grad_norm=training.max_grad_norm, optim=training.optim, logging_steps=training.logging_steps, logging_strategy="steps",
            logging_first_step=True, logging_nan_inf_filter=False, eval_strategy=training.eval_strategy, eval_steps=training.eval_steps,
            save_strategy=training.save_strategy, save_steps=training.save_steps, save_total_limit=training.save_total_limit, seed=training.seed,
            # Under DeepSpeed this would cast the adapters; it gets the compute type from zero.configure.
            bf16=dtype == torch.bfloat16 and not uses_deepspeed(), fp16=dtype == torch.float16, use_cpu=device == "cpu", report_to=list(training.report_to) or "none",
            run_name=training.model_name, project=PROJECT, remove_unused_columns=False, disable_tqdm=True, dataloader_pin_memory=device == "cuda",
            # Norms, rotation and SwiGLU; the loss is ours, with logits only where there is a label.
            use_liger_kernel=not fused and not owns_loss and device == "cuda" and has_liger(),
            liger_kernel_config={"rope": True, "rms_norm": True, "swiglu": True, "cross_entropy": False, "fused_linear_cross_entropy": False},
            # Checkpointing is switched on by the backend, on the model itself.
            gradient_checkpointing=False, ddp_timeout=int(training.rank_timeout_seconds), ddp_find_unused_parameters=False if world() > 1 else None,
            accelerator_config={"use_configured_state": world() > 1})
    except (ValueError, ImportError) as error:
        raise TrainingError(f"training settings: {str(error).splitlines()[0]}") from None
    if uses_deepspeed():
        zero.configure(arguments.deepspeed_plugin.deepspeed_config, dtype, device)
    # Of several GPUs a process takes one: transformers would wrap the model in DataParallel, whose step is another one, so more GPUs are more processes.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments
