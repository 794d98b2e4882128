"""FSDP2: the base model and the adapters divided among the ranks, by accelerate.

In: what `accelerate launch --config_file configs/accelerate/fsdp.yaml` sets in the environment. Out: refusals before anything is loaded, and the
adapters and optimizer's moments of a divided model as one process has them, so that a checkpoint can be gone on with by any number of ranks,
divided or not. Limits: LoRA on transformers' modules; the adapters of all ranks are gathered on each (hundreds of megabytes at 70B).
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from emergency_kit.config import Config
from emergency_kit.errors import TrainingError
from emergency_kit.files import as_os_error
from emergency_kit.training.ranks import is_sharded

OPTIMIZER, SHARDED_OPTIMIZER = "optimizer.pt", "optimizer"


def check(config: Config) -> None:
    """Raise TrainingError for what does not go with a divided model."""
    if not is_sharded():
        return
    training, model = config.training, config.model
    version, checkpointing = os.environ.get("FSDP_VERSION", "1"), os.environ.get("FSDP_ACTIVATION_CHECKPOINTING", "false").lower()
    ddp = "accelerate launch --config_file configs/accelerate/ddp.yaml"
    for name, instead, there in (
            (f"fsdp_version {version}, which flattens frozen and trained weights into one", "fsdp_version: 2 in accelerate's file", version != "2"),
            ("fsdp_activation_checkpointing", "--set training.gradient_checkpointing=true", checkpointing == "true"),
            ("training.engine fused, which reads a layer's weights past the modules that gather them", "--set training.engine=auto", training.engine == "fused"),
            ("model.backend unsloth", "--set model.backend=hf", model.backend == "unsloth"),
            ("training.method dpo", ddp, training.method == "dpo"),
            ("training.finetuning_type full", ddp, training.finetuning_type == "full"),
            (f"training.optim {training.optim}", "--set training.optim=adamw_torch", training.optim != "adamw_torch"),
            (f"lora.init {config.lora.init}", "--set lora.init=default", config.lora.init != "default"),
            ("training.per_device_train_batch_size auto", "--set training.per_device_train_batch_size=1", training.per_device_train_batch_size == "auto"),
            (f"training.metric_for_best_model {training.metric_for_best_model}, for which answers are generated", "--set training.metric_for_best_model=loss",
             training.metric_for_best_model != "loss")):
        if there:
            raise TrainingError(f"ranks: FSDP does not take {name}; next: {instead}")


def writes_shards() -> bool:
    """Whether each rank writes its own part of the optimizer (`fsdp_state_dict_type: SHARDED_STATE_DICT`), or rank 0 all of it."""
    return is_sharded() and os.environ.get("FSDP_STATE_DICT_TYPE", "FULL_STATE_DICT") == "SHARDED_STATE_DICT"


def whole(value: Any) -> Any:
    """The same nest of dicts and lists with divided tensors gathered, on the CPU. All ranks call it together."""
    from torch.distributed.tensor import DTensor
    from torch.utils._pytree import tree_map_only

    return tree_map_only(DTensor, lambda tensor: tensor.full_tensor().cpu(), value)


def adapters(model: Any) -> dict[str, Any]:
    """The adapters by their names in the model, gathered on rank 0's CPU. All ranks call it together."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True))


def load_adapters(model: Any, saved: dict[str, Any]) -> None:
    """Put the adapters of a file into a divided model. All ranks call it together."""
    from peft import get_peft_model_state_dict

    for name, tensor in get_peft_model_state_dict(model).items():  # views of the parameters' own storage
        tensor.copy_(_divided(saved[name], tensor))


def save_parts(model: Any, optimizer: Any, folder: Path) -> None:
    """Every rank's part of the optimizer's state, by torch.distributed.checkpoint, with parameters by name. All ranks call it together; what one rank's
    disk refuses is raised on all, as OSError."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    try:
        dcp.save(get_optimizer_state_dict(model, optimizer), checkpoint_id=folder)
    except dcp.CheckpointException as error:
        number, (reason, _) = next(iter(error.failures.items()))
        raise as_os_error(reason, folder.parent) or RuntimeError(f"rank {number}: {reason}") from None


def read_optimizer(folder: Path) -> dict[str, Any]:
    """A checkpoint's optimizer state, written whole or in parts by whatever number of ranks, on the CPU and with parameters by number."""
    import torch
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    with tempfile.TemporaryDirectory() as scratch:
        file = folder / OPTIMIZER
        if not file.is_file():
            file = Path(scratch, OPTIMIZER)
            dcp_to_torch_save(folder / SHARDED_OPTIMIZER, file)
        return numbered(torch.load(file, map_location="cpu", weights_only=True))


def load_optimizer(optimizer: Any, folder: Path) -> None:
    """Put a checkpoint's optimizer state into this run's optimizer, divided or not."""
    saved = read_optimizer(folder)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, state in saved["state"].items():
        for name, value in state.items():
            if value.shape == parameters[number].shape:  # moments, not the counted steps
                state[name] = _divided(value, parameters[number])
    optimizer.load_state_dict(saved)


def numbered(state: dict[str, Any]) -> dict[str, Any]:
    """An optimizer's state with its parameters by number, as torch's own `state_dict` has them, where they are by name."""
    order = {name: number for number, name in enumerate(name for group in state["param_groups"] for name in group["params"])}
    return {"state": {order[name]: values for name, values in state["state"].items()},
            "param_groups": [{**group, "params": [order[name] for name in group["params"]]} for group in state["param_groups"]]}


def local(tensor: Any) -> Any:
    """This rank's part of a divided tensor; any other as it is."""
    from torch.distributed.tensor import DTensor

    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _divided(tensor: Any, like: Any) -> Any:
    """A whole tensor cut as another is; itself where that is not divided."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor.to(like.device, like.dtype), like.device_mesh, like.placements)
