"""DeepSpeed, ZeRO stage 1 or 2: the optimizer's moments, in stage 2 the gradients too, divided among the ranks by accelerate and DeepSpeed.

In: what `accelerate launch --config_file configs/accelerate/deepspeed.yaml` sets in the environment. Out: refusals before anything is loaded, the
settings of DeepSpeed that are the kit's to choose, and the moments as one process has them, so that a checkpoint can be gone on with by any number
of ranks, with DeepSpeed or without. Limits: LoRA on transformers' modules, with torch's AdamW. DeepSpeed takes the optimizer's step within the last
backward pass: a loss that exploded is seen after it (a gradient that is not a number DeepSpeed leaves out by itself); no checkpoint has that step.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Iterator

from emergency_kit.config import Config
from emergency_kit.errors import TrainingError
from emergency_kit.training.ranks import uses_deepspeed, world

if TYPE_CHECKING:
    import torch

# Settings of DeepSpeed that the kit has of its own; the Trainer fills in the first four, the others are the Trainer's objects.
FILLED_IN = {"train_batch_size": "per_device_train_batch_size", "train_micro_batch_size_per_gpu": "per_device_train_batch_size",
             "gradient_accumulation_steps": "gradient_accumulation_steps", "gradient_clipping": "max_grad_norm"}
MADE = {"optimizer": "optim", "scheduler": "lr_scheduler_type"}
FLOAT16 = "model.dtype float16, which needs the loss scaled"


def check(config: Config) -> None:
    """Raise TrainingError for what does not go with DeepSpeed, or where it is not installed."""
    if not uses_deepspeed():
        return
    if world() == 1:
        raise TrainingError("ranks: DeepSpeed divides among several processes, and this is one; next: --num_processes 2 or more, or the same command without accelerate launch")
    training, model, given = config.training, config.model, _settings()
    zero, ddp, fsdp = given["zero_optimization"], "accelerate launch --config_file configs/accelerate/ddp.yaml", "accelerate launch --config_file configs/accelerate/fsdp.yaml"
    for name, instead, there in (
            ("zero_stage 3, which divides the weights", fsdp, zero["stage"] == 3),
            (f"zero_stage {zero['stage']}", "zero_stage: 2 in accelerate's file", zero["stage"] not in (1, 2, 3)),
            ("offload of the optimizer or of weights to the host", "offload_optimizer_device: none and offload_param_device: none in accelerate's file",
             any((zero.get(part) or {}).get("device", "none") != "none" for part in ("offload_optimizer", "offload_param"))),
            ("mixed_precision, which would cast the float32 adapters", "mixed_precision: 'no' in accelerate's file, and --set model.dtype=bfloat16",
             os.environ.get("ACCELERATE_MIXED_PRECISION", "no") != "no" or any((given.get(name) or {}).get("enabled") is True for name in ("fp16", "bf16", "torch_autocast"))),
            *((f"{name} from DeepSpeed's settings", f"leave it out there, training.{ours} is the kit's", given.get(name, "auto") != "auto") for name, ours in {**FILLED_IN, **MADE}.items()),
            (FLOAT16, "--set model.dtype=bfloat16", model.dtype == "float16"),
            ("training.engine fused, which gathers gradients past the modules", "--set training.engine=auto", training.engine == "fused"),
            ("model.backend unsloth", "--set model.backend=hf", model.backend == "unsloth"),
            ("training.method dpo", ddp, training.method == "dpo"),
            ("training.finetuning_type full", ddp, training.finetuning_type == "full"),
            (f"training.optim {training.optim}", "--set training.optim=adamw_torch", training.optim != "adamw_torch"),
            (f"lora.init {config.lora.init}", "--set lora.init=default", config.lora.init != "default"),
            ("training.lr_scheduler_type reduce_lr_on_plateau", "--set training.lr_scheduler_type=cosine", training.lr_scheduler_type == "reduce_lr_on_plateau"),
            ("lora.loraplus_lr_ratio", ddp, config.lora.loraplus_lr_ratio is not None),
            (f"training.metric_for_best_model {training.metric_for_best_model}, for which answers are generated", "--set training.metric_for_best_model=loss",
             training.metric_for_best_model != "loss")):
        if there:
            raise TrainingError(f"ranks: DeepSpeed does not take {name}; next: {instead}")
    if importlib.util.find_spec("deepspeed") is None:
        raise TrainingError("ranks: DeepSpeed is not installed; next: pip install '.[deepspeed]', or accelerate launch --config_file configs/accelerate/ddp.yaml")


def _settings() -> dict[str, Any]:
    """DeepSpeed's settings as accelerate's launcher hands them on: its own few, or a whole file of DeepSpeed's."""
    file = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if file == "none":
        return {"zero_optimization": {"stage": int(os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")),
                                      **{part: {"device": os.environ.get(f"ACCELERATE_DEEPSPEED_{part.upper()}_DEVICE", "none")} for part in ("offload_optimizer", "offload_param")}},
                "gradient_accumulation_steps": os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "auto"),
                "gradient_clipping": os.environ.get("ACCELERATE_GRADIENT_CLIPPING", "auto")}
    from accelerate.utils.deepspeed import HfDeepSpeedConfig

    try:
        read = HfDeepSpeedConfig(file).config
        return {**read, "zero_optimization": {"stage": 0, **read.get("zero_optimization", {})}}
    except (ValueError, OSError, AttributeError, TypeError) as error:
        raise TrainingError(f"ranks: deepspeed_config_file {file} is no config of DeepSpeed ({str(error).splitlines()[0]}); next: zero_stage: 2 in accelerate's file instead") from None


def configure(settings: dict[str, Any], dtype: "torch.dtype", device: str) -> None:
    """Put into DeepSpeed's settings what is the kit's to say: adapters, their gradients and what is exchanged stay in float32, dtype is of the computation alone.
    Raises TrainingError for float16, which `model.dtype: auto` takes on older cards."""
    name = str(dtype).removeprefix("torch.")
    if name == "float16":
        raise TrainingError(f"ranks: DeepSpeed does not take {FLOAT16}; next: accelerate launch --config_file configs/accelerate/ddp.yaml")
    if device == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        import deepspeed

        # It would compile an exchange of its own, which takes minutes; there is gloo. Its own module says that edits of this table count.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    settings.update(dict.fromkeys(FILLED_IN, "auto"))
    # By itself a buffer of 2 GB on every GPU, however few numbers are trained; this way one of the hidden size squared.
    settings["zero_optimization"].setdefault("reduce_bucket_size", "auto")
    if name != "float32":
        settings["torch_autocast"] = {"enabled": True, "dtype": name, "lower_precision_safe_modules": []}


def limit_waiting(engine: Any, seconds: float) -> None:
    """Let DeepSpeed's own process group wait as long as the kit's does; it is made with torch's default."""
    from torch.distributed.distributed_c10d import _set_pg_timeout

    _set_pg_timeout(timedelta(seconds=seconds), engine.data_parallel_group)


@contextlib.contextmanager
def without_step(accelerator: Any) -> Iterator[None]:
    """Gradients of the passes within are gathered, and the optimizer does not move."""
    state = accelerator.gradient_state
    before = state.sync_gradients
    state._set_sync_gradients(False)
    try:
        yield
    finally:
        state._set_sync_gradients(before)


def gathered(optimizer: Any, groups: list[dict[str, Any]], keep: bool) -> dict[str, Any] | None:
    """The divided optimizer's state as the undivided one has it, on the CPU; None unless `keep`. All ranks call it together.

    optimizer: DeepSpeed's, around torch's; groups: the parameter groups of torch's, before DeepSpeed laid the parameters of each end to end.
    """
    from deepspeed.utils import safe_get_full_optimizer_state

    inner, state, number = optimizer.optimizer, {}, 0
    options = iter(inner.param_groups)
    rates = {key: inner.param_groups[0][key] for key in ("lr", "initial_lr")}
    wanted = []
    for group in groups:
        parameters, now = group["params"], next(options) if group["params"] else {**group, **rates}  # DeepSpeed leaves out a group without parameters
        wanted.append({**{key: value for key, value in now.items() if key != "params"}, "params": list(range(number, number + len(parameters)))})
        for parameter in parameters:
            flat = now["params"][0]
            values = {key: safe_get_full_optimizer_state(parameter, key).cpu() if value.shape == flat.shape else value.clone() for key, value in inner.state[flat].items()}
            if keep:
                state[number] = values
            number += 1
    return {"state": state, "param_groups": wanted} if keep else None


def with_empty_groups(schedule: dict[str, Any], groups: list[dict[str, Any]]) -> dict[str, Any]:
    """A learning rate schedule's state, whose lists have an entry a group, as one process has it; groups: as for `gathered`."""
    def fill(values: list[Any]) -> list[Any]:
        rest = iter(values)
        return [next(rest) if group["params"] else values[0] for group in groups]

    return {key: fill(value) if isinstance(value, list) else value for key, value in schedule.items()}


def without_empty_groups(schedule: dict[str, Any], groups: list[dict[str, Any]]) -> dict[str, Any]:
    """The way back of `with_empty_groups`."""
    return {key: [one for one, group in zip(value, groups, strict=True) if group["params"]] if isinstance(value, list) else value for key, value in schedule.items()}


def load_optimizer(optimizer: Any, groups: list[dict[str, Any]], saved: dict[str, Any]) -> None:
    """Put an optimizer's state, whole and with parameters by number, into DeepSpeed's divided one; the arguments are those of `gathered`."""
    import torch
    from deepspeed.utils import lazy_init_hp_params_optimizer_state, safe_set_full_optimizer_state

    inner, number = optimizer.optimizer, 0
    options = iter(inner.param_groups)
    for group, found in zip(groups, saved["param_groups"], strict=True):
        parameters = group["params"]
        if not parameters:
            continue
        now = next(options)
        now.update({key: value for key, value in found.items() if key != "params"})
        flat, shape = now["params"][0], parameters[0].shape
        inner.state[flat] = {key: torch.zeros_like(flat) if value.shape == shape else value.clone() for key, value in saved["state"][number].items()}
        lazy_init_hp_params_optimizer_state(parameters, flat, inner.state)
        for parameter in parameters:
            for key, value in saved["state"][number].items():
                if value.shape == parameter.shape:
                    safe_set_full_optimizer_state(parameter, value.to(parameter.device), key)
            number += 1
