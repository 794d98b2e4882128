"""A prediction of a run as data: peak memory by term, time and disk, before any weight is loaded.

In: a config, a model's shape, rows where they are at hand, and a device: this one, a card of so many bytes (`make`), or a `Card` with its
speed (`predict`, which a benchmark lays beside what it measures). Memory comes from formulas (memory.py); time on this machine from a few
timed steps of models with few layers (speed.py), on a card that is not here from arithmetic and traffic over the card's own rates.
Limits: one device. The shares of those rates that a run reaches are fitted to one H200 (benchmarks/RESULTS.md); other cards are extrapolated.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from emergency_kit.config import Resolved
from emergency_kit.model.backend import base_name
from emergency_kit.model.process_memory import available_bytes, resident_bytes
from emergency_kit.model.shape import NF4_BYTES, Shape, load_shape
from emergency_kit.training import memory
from emergency_kit.training.memory import SHARE_OF_FREE, SHARE_OF_FREE_GPU, Setting
from emergency_kit.training.fused.step import FAMILIES, pass_limits
from emergency_kit.training.schedule import interval, pass_rows, step_rows

# A device is not filled to the brim: the desktop, the driver and what was not foreseen need some.
USABLE = 0.95
TOKENIZER_BYTES = 5_000_000
# What matrix products reach of a card's peak and everything else of its bandwidth, and seconds of the processor to start a layer's work forward and
# back, under which no pass gets: fitted to the fused engine's steps on an H200 (benchmarks/RESULTS.md, Mistral-7B on a GPU); other cards were not measured.
PEAK_SHARE, BANDWIDTH_SHARE, LAUNCH_SECONDS = 0.7, 0.9, 0.0095


@dataclass
class Plan:
    """What is known of a run beforehand. Bytes and seconds; seconds None where they cannot be known. reason: why the data is not."""

    resolved: Resolved
    shape: Shape
    setting: Setting
    load: Any
    steps: int | None
    epochs: float
    effective_batch: int
    phases: dict[str, dict[str, float]]
    device: str
    room_bytes: float
    disk: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] | None = None
    reason: str = ""

    @property
    def peak_bytes(self) -> float:
        return memory.peak(self.phases)[1]

    @property
    def fits(self) -> bool:
        return self.peak_bytes <= USABLE * self.room_bytes


def setting_of(resolved: Resolved, shape: Shape, on_gpu: bool) -> Setting:
    """How this config will be computed; the choices are those of model/backend.py and training/engine.py, without loading."""
    from emergency_kit.model.backend import pick_attention, pick_device, pick_dtype
    from emergency_kit.training.engine import goes_back_in_integers

    model, training, lora = resolved.config.model, resolved.config.training, resolved.config.lora
    device = "cuda" if on_gpu else pick_device(model)
    dtype = "bfloat16" if on_gpu and model.dtype == "auto" else str(pick_dtype(model, device)).removeprefix("torch.")
    plain = training.finetuning_type == "lora" and not (training.label_smoothing_factor or lora.use_dora or lora.modules_to_save)
    fused = plain and training.engine != "modules" and dtype != "float16" and shape.family in FAMILIES and not shape.slides
    integers = fused and goes_back_in_integers(training, device, dtype, model.load_in_4bit)
    return Setting(compute_bytes=4 if dtype == "float32" else 2, fused=fused, on_gpu=device == "cuda", four_bit=model.load_in_4bit,
                   eager=pick_attention(model, device) == "eager", recompute=bool(training.gradient_checkpointing), dropout=resolved.config.lora.dropout > 0, integers=integers)


def make(resolved: Resolved, shape: Shape, rows: dict[str, Any], room: float | None, reason: str = "", process_bytes: int | None = None) -> Plan:
    """The plan of a config over rows that are at hand, or of the longest rows where there are none. room: bytes of a named card."""
    from emergency_kit.training import workload
    from emergency_kit.training.run import plan_steps

    training = resolved.config.training
    setting = setting_of(resolved, shape, on_gpu=room is not None)
    counted: dict[str, Any] = plan_steps(resolved, len(rows["train"])) if rows else {"steps": training.max_steps, "epochs": training.num_epochs, "effective_batch":
                                                                   step_rows(training)}
    load = workload.measure(rows, resolved, setting.fused, setting.on_gpu, setting.compute_bytes, counted["steps"]) if rows \
        else workload.assumed(resolved, setting.fused, setting.on_gpu, setting.compute_bytes)
    device, here = _device(setting) if room is None else (f"a GPU of {room / 1e9:g} GB", room)
    process_bytes = process_bytes if process_bytes is not None else _process_bytes()
    phases = memory.estimate(shape, resolved, setting, load.work, process_bytes)
    if training.gradient_checkpointing == "auto" and setting.fused:
        most = min(SHARE_OF_FREE_GPU * training.max_gpu_memory_gb * 1e9, USABLE * here) if setting.on_gpu else SHARE_OF_FREE * here
        one = sum(memory.estimate(shape, resolved, dataclasses.replace(setting, kept_layers=1), load.work, process_bytes)["training"].values()) \
            - sum(phases["training"].values())
        setting = dataclasses.replace(setting, kept_layers=min(shape.layers, int(max(0.0, most - memory.peak(phases)[1]) // one)))
        phases = memory.estimate(shape, resolved, setting, load.work, process_bytes)
    made = Plan(resolved, shape, setting, load, counted["steps"], counted["epochs"], counted["effective_batch"], phases, device, here, reason=reason)
    made.disk = disk_terms(made)
    return made


def foresee_memory(resolved: Resolved, shape: Shape, work: memory.Workload) -> tuple[float, float]:
    """`(most bytes that a run on this CPU takes, bytes that are there for it)`; what the process holds already counts to both, so that a loaded model counts twice."""
    phases = memory.estimate(shape, resolved, setting_of(resolved, shape, on_gpu=False), work, _process_bytes())
    return memory.peak(phases)[1], _available_bytes()


def _process_bytes() -> int:
    """What this process holds now, with everything imported that training imports."""
    import peft  # noqa: F401

    from emergency_kit.training import trainer  # noqa: F401

    return resident_bytes() or 600_000_000  # where the system does not tell; Linux, torch 2.13: 500 to 650 MB


def _device(setting: Setting) -> tuple[str, float]:
    if setting.on_gpu:
        import torch

        free, total = torch.cuda.mem_get_info()
        return f"{torch.cuda.get_device_name()}, {total / 1e9:.1f} GB", float(free)
    available = _available_bytes()
    return f"this machine's CPU, {available / 1e9:.1f} GB of memory free", available


def _available_bytes() -> float:
    """Memory that programs can still have: of the machine, or of the container's limit where that is less."""
    found = [float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))]
    if available := available_bytes():
        found.append(float(available))
    with contextlib.suppress(OSError, ValueError):  # "max" is no number: no limit
        group = Path("/sys/fs/cgroup")
        found.append(float((group / "memory.max").read_text()) - float((group / "memory.current").read_text()))
    return min(found)


def disk_terms(made: Plan) -> dict[str, float]:
    """Bytes on disk by term: checkpoints kept and the one being written, the finished model, tokens."""
    training = made.resolved.config.training
    full = training.finetuning_type == "full"
    trained = (made.shape.parameters if full else memory.adapter_parameters(made.shape, made.resolved.config.lora)) * memory.FLOAT
    saves = _times(training.save_strategy, training.save_steps, made) if made.steps else training.save_total_limit + 1
    kept = min(saves, training.save_total_limit + 2)  # the best one beside the last ones, and the one being written
    tokenizer = sum(path.stat().st_size for path in Path(base_name(made.resolved.config.model)).glob("tokenizer*")) or TOKENIZER_BYTES
    return {f"{kept} checkpoints ({'weights' if full else 'adapter'}, optimizer, tokenizer)": kept * (3.0 * trained + tokenizer), "finished model": trained + tokenizer,
            "tokens": 4.0 * made.load.tokens / max(1.0, made.epochs)}


def fetched_bytes(made: Plan) -> float:
    """What the Hub's client will fetch of the base model, once: 0 for a folder and for what its cache holds. Its file type is taken to be that of the
    config; a 4-bit file that Unsloth fetches instead is smaller."""
    from huggingface_hub import try_to_load_from_cache

    model = made.resolved.config.model
    if model.name == "bundled" or Path(model.name).is_dir():
        return 0.0
    held = (try_to_load_from_cache(model.name, name, revision=model.revision) for name in ("model.safetensors", "model.safetensors.index.json"))
    return 0.0 if any(isinstance(path, str) for path in held) else float(made.shape.file_bytes)


def _times(strategy: str, every: float, made: Plan) -> int:
    """How often something happens in a run, the end included."""
    steps = made.steps or 0
    return 1 if strategy == "no" else math.ceil(made.epochs) if strategy == "epoch" else -(-steps // interval(every, steps))


def predict_seconds(made: Plan, rows: dict[str, Any]) -> dict[str, float]:
    """Seconds by part: training passes, and evaluations. Timed on this machine now."""
    from emergency_kit.model.backend import load_tokenizer
    from emergency_kit.training.speed import time_step

    both, forward = time_step(made.resolved, rows["train"], made.load.typical, load_tokenizer(made.resolved.config.model), made.shape.layers, made.setting.fused,
                              made.setting.kept_layers)
    training = made.resolved.config.training
    evaluations = _times(training.eval_strategy, training.eval_steps, made)
    return {"training": both * made.load.computed / made.load.typical_computed,
            "evaluations": forward * evaluations * made.load.eval_computed / made.load.typical_computed, "step": both}


@dataclass(frozen=True)
class Card:
    """A GPU by its data sheet. memory_bytes: free for the run; flops: dense bf16 (fp16 on older ones) operations a second; bandwidth: bytes a second."""

    name: str
    memory_bytes: float
    flops: float
    bandwidth: float


@dataclass(frozen=True)
class Prediction:
    """peak_bytes: most that is held, in `phase`; terms: of that, in bytes; step_seconds: of an optimizer step, its data loading and logging not
    counted; seconds: of all training steps, None where their number is unknown."""

    peak_bytes: float
    phase: str
    terms: dict[str, float]
    step_seconds: float
    seconds: float | None


def predict(resolved: Resolved, card: Card, rows: dict[str, Any] | None = None) -> Prediction:
    """What a run of this config takes on a card. rows: by split; without them every row is taken to be as long as the config allows, all of it
    supervised. Raises ModelError where the model's shape is not known."""
    made = make(resolved, load_shape(resolved.config.model), rows or {}, card.memory_bytes)
    phase, total = memory.peak(made.phases)
    tokens = made.load.typical_computed or made.effective_batch * made.load.work.longest
    most_rows, most_tokens = pass_limits(pass_rows(resolved.config.training), resolved.config.model.max_seq_length, on_gpu=True, item_bytes=made.setting.compute_bytes)
    passes = -(-tokens // most_tokens) if made.setting.fused else made.effective_batch // pass_rows(resolved.config.training)
    supervised = tokens * made.load.work.supervised // max(1, made.load.work.tokens)
    step = step_seconds(made, card, tokens, supervised, max(1, passes))
    return Prediction(total, phase, made.phases[phase], step, step * made.steps if made.steps else None)


def step_seconds(made: Plan, card: Card, tokens: int, supervised: int, passes: int) -> float:
    """Seconds of an optimizer step. Multiplications: 2 a weight and token forward, as many backward for inputs, as many again for the weights that
    are trained, and forward once more where activations are made again (Korthikanti et al. 2022). Traffic: 4-bit weights are read, written wide
    and read again for each product (Dettmers et al. 2023); what autograd keeps is written and read once in each direction. Short rows
    wait for the processor, which starts each layer's kernels."""
    shape, setting, training = made.shape, made.setting, made.resolved.config.training
    full = training.finetuning_type == "full"
    again = 1 - min(shape.layers, setting.kept_layers) / shape.layers if setting.recompute else 0
    adapters = 0 if full else memory.adapter_parameters(shape, made.resolved.config.lora)
    # `fused` does not make a layer's last product again, and spreads its weights out once for all of the way back.
    spared = again * shape.layers * shape.hidden * shape.intermediate if setting.fused else 0
    layers = 2.0 * tokens * (shape.linear_parameters * (2 + again + full) - spared) + 2.0 * tokens * adapters * (3 + again)
    head = 2.0 * supervised * shape.vocabulary * shape.hidden * (2 + full)
    # Queries with keys, probabilities with values, the causal half of both; backward makes one of them again.
    attention = 2.0 * tokens * made.load.work.longest * shape.heads * shape.width * shape.layers * (1 + again + 2.5)
    wide = shape.linear_parameters * (NF4_BYTES + 4.0 if setting.four_bit else float(setting.compute_bytes)) * passes * (2 if setting.fused else 2 + again)
    kept = shape.layers * memory.layer_bytes(shape, made.resolved.config.lora, setting, made.load.work) * tokens / max(1, made.load.work.tokens)
    work = (layers + head + attention) / (PEAK_SHARE * card.flops) + (wide + kept * 2 * (2 + again)) / (BANDWIDTH_SHARE * card.bandwidth)
    return max(work, LAUNCH_SECONDS * shape.layers * passes)
