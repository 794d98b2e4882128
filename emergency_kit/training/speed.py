"""Time of a step on this machine, from models of the same shape with one and with a few layers of random weights.

In: a model's folder (its config.json alone is read), the config, and the rows of a typical step. Out: seconds of that step, and of its
forward pass, for all layers: a layer is the difference of the two, what is left is embedding, head and loss. The engine, compute type
and rows are the run's own, so no efficiency is guessed. The models take turns and the median of each counts: a run meets the machine as it mostly is, not
at its best (the best of a few was 10 to 20 % short of a whole run on two shared cores). Limits: the
optimizer's own step, saving and loading are not in it (1 to 2 % of a run); not for a device that is not here, and always through
transformers, where Unsloth would train, too.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from emergency_kit.config import Resolved
from emergency_kit.model.backend import base_name, load_for_training, pick_device, pick_dtype
from emergency_kit.training.batches import collate
from emergency_kit.training.engine import causal_lm_of, install_engine
from emergency_kit.training.schedule import pass_rows

if TYPE_CHECKING:
    from emergency_kit.data.tokenize import TokenRows

# By kind of device: tries, and layers of the larger model; a GPU's layer is short beside what a launch varies.
TRIES, MORE_LAYERS = {"cpu": 3, "cuda": 4}, {"cpu": 4, "cuda": 4}


def time_step(resolved: Resolved, rows: "TokenRows", step: list[int], tokenizer: Any, layers: int, fused: bool, kept_layers: int = 0) -> tuple[float, float]:
    """`(seconds of forward and backward of the step, of its forward alone)` for a model of so many layers; kept_layers: of how many the activations are
    kept where the others' are made again."""
    training = resolved.config.training
    size = len(step) if fused else pass_rows(training)
    batches = [collate([rows[row] for row in step[start:start + size]], 0) for start in range(0, len(step), size)]
    more = MORE_LAYERS[pick_device(resolved.config.model)]

    models = [_build(resolved, tokenizer, count) for count in (1, more)]

    def layer_seconds(keep: bool) -> tuple[tuple[float, float], list[float]]:
        one, some = _time_models(models, batches, keep)
        return one, [max(0.0, second - first) / (more - 1) for first, second in zip(one, some)]

    one, again = layer_seconds(keep=False)
    kept = layer_seconds(keep=True)[1] if kept_layers else again
    number = min(kept_layers, layers - 1)
    return tuple(first + number * mine + (layers - 1 - number) * made for first, mine, made in zip(one, kept, again))  # type: ignore[return-value]


def _time_models(models: list[tuple[Any, Any]], batches: list[dict[str, Any]], keep: bool) -> list[tuple[float, float]]:
    """`(forward and backward, forward alone)` of each model in seconds."""
    device = causal_lm_of(models[0][0]).device

    def taken(model: Any, backward: bool) -> float:
        causal_lm = causal_lm_of(model)
        model.train(backward)
        started = time.perf_counter()
        for batch in batches:
            with torch.set_grad_enabled(backward), torch.autocast(device.type, dtype=torch.bfloat16, enabled=causal_lm.dtype == torch.bfloat16):
                loss = model(**{name: value.to(device) for name, value in batch.items()})["loss"]
            if backward:
                loss.backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    for model, fused in models:
        if fused is not None and keep:
            fused.kept_layers = len(fused.layers)
        taken(model, True)  # warms up: buffers, threads, kernels
    rounds = [[(taken(model, True), taken(model, False)) for model, _ in models] for _ in range(TRIES[device.type])]
    return [tuple(map(statistics.median, zip(*tries))) for tries in zip(*rounds)]


def _build(resolved: Resolved, tokenizer: Any, layers: int) -> tuple[Any, Any]:
    """`(model, fused engine or None)` of the same shape with fewer layers and random weights, loaded as training loads its own, from a folder that goes at once."""
    model, training, drawn = resolved.config.model, resolved.config.training, torch.get_rng_state()
    config = AutoConfig.from_pretrained(base_name(model))
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]
    with tempfile.TemporaryDirectory() as folder:
        with torch.device(pick_device(model)):  # random numbers by the billion are a GPU's work
            AutoModelForCausalLM.from_config(config, dtype=pick_dtype(model, pick_device(model))).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        named = model.model_copy(update={"name": folder, "revision": None, "backend": "hf"})  # Unsloth patches what this process has imported by now
        lora = resolved.config.lora.model_copy(update={"init": "default", "adapter": ""})  # where adapters begin costs no time in a step
        loaded = load_for_training(named, lora, bool(training.gradient_checkpointing), training.seed, training.finetuning_type == "full")
        fused = install_engine(loaded, training, pass_rows(training), model.max_seq_length)
        torch.set_rng_state(drawn)
    return loaded.model, fused
