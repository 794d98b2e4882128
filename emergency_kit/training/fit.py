"""What fits into memory: rows of a forward pass (`per_device_train_batch_size: auto`), layers kept (`gradient_checkpointing: auto`).

In: a loaded model with its loss, the longest rows. Out: the most rows of an optimizer step that one pass can take, a divisor of
them, so that the step stays the same. On a GPU counts are tried downward until one fits; on a CPU, where running out of memory
ends the process, the need of more rows is reckoned from what one and two take. Layers are reckoned from what one keeps, and tried.
"""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING, Any, Callable

import torch

from emergency_kit.config import TrainingConfig
from emergency_kit.model.process_memory import available_bytes, reset_highest, resident_bytes
from emergency_kit.training.batches import collate
from emergency_kit.training.memory import CUDA_CONTEXT_BYTES, SHARE_OF_FREE, SHARE_OF_FREE_GPU
from emergency_kit.training.preference import collate_pairs
from emergency_kit.training.randomness import random_states, set_random_states
from emergency_kit.training.schedule import step_rows
from emergency_kit.training.trainer import is_out_of_memory

if TYPE_CHECKING:
    from emergency_kit.model.backend import Loaded
    from emergency_kit.training.fused.step import FusedStep
    from emergency_kit.training.fused.tree import Row


def fit_pass(loaded: "Loaded", training: TrainingConfig, fused: "FusedStep | None", rows: Any, dtype: torch.dtype) -> int:
    """Rows of a pass for `per_device_train_batch_size: auto`; also said in the notes. rows: of the training split; dtype: of the computation.
    The random states are as before."""
    model, drawn, pad = loaded.model, random_states(), loaded.tokenizer.pad_token_id
    all_rows = step_rows(training)
    device, pairs = next(model.parameters()).device, training.method == "dpo"

    def attempt(count: int) -> None:
        taken = longest(rows, all_rows if fused else count)
        if fused:
            fused.pass_rows = count
        batch = collate_pairs([{"pair": pair, "reference": [0.0, 0.0]} for pair in taken], lambda part: collate(part, pad), training.dpo_compare) if pairs else collate(taken, pad)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss = model(**{name: value.to(device) for name, value in batch.items()})["loss"]
        loss.backward()
        model.zero_grad()

    found = fit_rows(all_rows, attempt, device.type == "cuda", is_out_of_memory)
    model.zero_grad()
    set_random_states(drawn)
    if fused:
        fused.pass_rows = found
    loaded.notes.append(f"{found} of a step's {all_rows} {'pairs' if pairs else 'rows'} in a pass, the most that fit into memory")
    return found


def fit_rows(step_rows: int, attempt: Callable[[int], None], on_gpu: bool, exhausted: Callable[[BaseException], bool]) -> int:
    """The most rows of a pass, a divisor of `step_rows`. attempt: forward and backward of so many of the longest rows; exhausted: whether
    an error says that memory ran out. Raises that error where a single row does not fit."""
    counts = [count for count in range(step_rows, 0, -1) if step_rows % count == 0]
    if not on_gpu:
        return _reckon(counts, attempt)
    for count in counts:
        try:
            attempt(count)
            return count
        except (RuntimeError, MemoryError) as error:
            if not exhausted(error) or count == 1:
                raise
        gc.collect()
        torch.cuda.empty_cache()
    raise AssertionError("a step has at least one row")


def _reckon(counts: list[int], attempt: Callable[[int], None]) -> int:
    gc.collect()  # what ends meanwhile would be taken off a row's need
    before = resident_bytes() or 0
    one, two = _peak_bytes(attempt, 1), _peak_bytes(attempt, min(2, counts[0]))
    need = one - before
    if need <= 0:  # the highest mark cannot be had here
        return 1
    # Where a second row is served from what the first has left, or pages went back to the computer between the two, the first one's need stands for it.
    each = two - one if two - one > need / 10 else need
    free = available_bytes()
    return next((count for count in counts if free and (count - 1) * each <= SHARE_OF_FREE * free), 1)


def _peak_bytes(attempt: Callable[[int], None], count: int) -> int:
    """Most resident memory during an attempt."""
    reset_highest()  # without it the figure is too high, never too low
    attempt(count)
    return resident_bytes("VmHWM") or 0


def keep_layers(fused: "FusedStep", rows: "list[Row]", max_gpu_memory_gb: float) -> int:
    """Let the engine keep the activations of as many layers as fit, and take a pass of these rows, the largest there will be, to see that they do. One such
    pass must have been taken before, with the optimizer's moments in place. Returns how many it is; 0 where trying fails."""
    fused.kept_layers = min(len(fused.layers), int(max(0.0, spare_bytes(fused.device.type == "cuda", max_gpu_memory_gb)) // fused.layer_bytes))
    try:
        fused.run(rows, None, backward=True)
    except (torch.OutOfMemoryError, MemoryError):
        fused.keep_none()
        if fused.device.type == "cuda":
            torch.cuda.empty_cache()
    return fused.kept_layers


def spare_bytes(on_gpu: bool, max_gpu_memory_gb: float) -> float:
    """Memory that may still be taken: of a GPU up to `max_gpu_memory_gb`, its context counted in, and not more than is free; else of what the computer has free."""
    if not on_gpu:
        return SHARE_OF_FREE * (available_bytes() or 0)
    return min(SHARE_OF_FREE_GPU * max_gpu_memory_gb * 1e9 - CUDA_CONTEXT_BYTES - torch.cuda.memory_reserved(), SHARE_OF_FREE_GPU * torch.cuda.mem_get_info()[0])


def longest(rows: Any, count: int) -> list[Any]:
    """The longest rows of a dataset with `lengths`, the first of them again where there are fewer."""
    order = sorted(range(len(rows)), key=lambda row: -int(rows.lengths[row]))
    return [rows[order[place % len(order)]] for place in range(count)]
