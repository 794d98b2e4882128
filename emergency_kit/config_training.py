"""The sections `lora` and `training` of the config: what is trained, and how.

In: values that `config.py` has read and merged. Out: frozen classes, checked; the docstring under each field is its help text
and its line in docs/Configuration.md. Import them from `emergency_kit.config`. No torch here either.
"""

from __future__ import annotations

import re
from typing import Any, Literal, Optional, Union

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Optimizer = Literal[
    "adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop",
    "adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit", "paged_adamw_32bit", "ademamix", "ademamix_8bit", "paged_ademamix_32bit", "paged_ademamix_8bit",
    "lion_32bit", "lion_8bit", "paged_lion_32bit", "paged_lion_8bit", "rmsprop_bnb", "rmsprop_bnb_8bit", "rmsprop_bnb_32bit"]
# All others need bitsandbytes.
OPTIMIZERS_OF_TORCH = ("adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop")
Schedule = Literal["linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt", "reduce_lr_on_plateau",
                   "cosine_with_min_lr", "cosine_warmup_with_min_lr", "warmup_stable_decay"]


class Section(BaseModel):
    """Base of the config sections: frozen, strict about types and names."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True,
                              protected_namespaces=(), allow_inf_nan=False)


class LoraSection(Section):
    """The low-rank adapters (Hu et al. 2021)."""

    r: int = Field(default=16, ge=1)
    """Rank of the adapters."""
    alpha: int = Field(default=32, ge=1)
    """Scale of the adapters: their product is multiplied by alpha / r."""
    dropout: float = Field(default=0.05, ge=0, lt=1)
    """Dropout on the adapters' input in training."""
    target_modules: Union[list[str], Literal["all-linear"]] = Field(
        default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        min_length=1)
    """Linear modules that get an adapter, or `all-linear`: every one but the head."""
    modules_to_save: list[str] = Field(default_factory=list)
    """Modules trained in full beside the adapters and saved with them, for instance `[lm_head]`."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(r) instead of alpha / r (rsLoRA, Kalajdzievski 2023): high ranks learn as fast as low ones."""
    use_dora: bool = False
    """Train a magnitude for every output beside the direction (DoRA, Liu et al. 2024): slower, often better at a low rank."""
    init: str = "default"
    """First values of the adapters: `default` (B is zero), `pissa` (the largest singular directions of the weights, Meng et al. 2024),
    `pissa_niter_N` (the same, by N rounds of a quick SVD), or `loftq` (what 4-bit rounding lost, Li et al. 2023; needs `model.load_in_4bit`).
    Checkpoints hold the difference to the first values, an ordinary adapter of twice the rank."""
    loraplus_lr_ratio: Optional[float] = Field(default=None, ge=1)
    """Learning rate of B over that of A (LoRA+, Hayou et al. 2024), 16 for instance; both the same when empty."""
    adapter: str = ""
    """Folder of a trained adapter that training begins from instead of fresh ones; rank, alpha and modules are its own and must agree."""

    @field_validator("init")
    @classmethod
    def _known_init(cls, given: str) -> str:
        if given not in ("default", "pissa", "loftq") and not re.fullmatch(r"pissa_niter_[1-9]\d*", given):
            raise ValueError("expected default, pissa, pissa_niter_N (pissa_niter_16 for instance) or loftq")
        return given

    @model_validator(mode="after")
    def _fit_together(self) -> "LoraSection":
        if self.init != "default" and (self.use_dora or self.adapter or self.modules_to_save):
            other = "use_dora" if self.use_dora else "adapter" if self.adapter else "modules_to_save"
            raise ValueError(f"lora.init {self.init} does not go with lora.{other}; leave one of them out")
        return self


class TrainingConfig(Section):
    """The training run."""

    output_dir: str = Field(default="outputs", min_length=1)
    """Folder that gets `checkpoints/`, `logs/` and what the later stages write."""
    model_name: str = Field(default="final", pattern=r"^[A-Za-z0-9][A-Za-z0-9._ -]*$")
    """Name of the finished model: `<output_dir>/checkpoints/<model_name>/`."""
    method: Literal["sft", "dpo"] = "sft"
    """`sft` learns the answers (supervised fine-tuning). `dpo` learns to prefer them to unsafe ones that are made from the same cards (Rafailov
    et al. 2023); best begun from an adapter that `sft` has trained (`lora.adapter`)."""
    dpo_beta: float = Field(default=0.1, gt=0)
    """Under `dpo`: how tightly the model is held to where it began; smaller lets it go further."""
    dpo_compare: Literal["whole", "changed"] = "whole"
    """Under `dpo`: what is compared of a safe and an unsafe answer: all of them, as in the paper, or the tokens in which they differ."""
    dpo_sft_weight: float = Field(default=0.0, ge=0)
    """Under `dpo`: weight of the safe answer's own cross-entropy in the loss, which keeps its wording likely."""
    finetuning_type: Literal["lora", "full"] = "lora"
    """`lora` trains adapters; `full` trains every weight, for a small model: 16 to 20 bytes a weight of memory, and a learning rate tenfold lower."""
    num_epochs: float = Field(default=3, gt=0)
    """Passes over the training records."""
    max_steps: Optional[int] = Field(default=None, ge=1)
    """Stop after this many optimizer steps; overrides `num_epochs`."""
    learning_rate: float = Field(default=2e-4, gt=0, lt=1)
    """Peak learning rate."""
    per_device_train_batch_size: Union[int, Literal["auto"]] = Field(default=2)
    """Rows in one forward pass on one device; the `fused` engine fills the place of so many longest rows with as many as it holds, which changes
    no gradient. `auto` takes the most that fit into memory, tried on the longest rows; a step then has as many rows as with 2. Alias: `batch_size`."""
    gradient_accumulation_steps: int = Field(default=4, ge=1)
    """Forward passes in one optimizer step. Alias: `gradient_accumulation`."""
    keep_effective_batch: bool = False
    """With several processes: divide the accumulation by their number, so that an optimizer step takes as many rows as with one; a run may
    then be gone on with on another number of them. Off, each process adds its own rows to a step."""
    rank_timeout_seconds: float = Field(default=1800, gt=0)
    """With several processes: how long one waits for another, to begin, to prepare data or to exchange gradients, before the run ends."""
    per_device_eval_batch_size: int = Field(default=4, ge=1)
    """Rows in one forward pass when the validation loss is measured."""
    warmup_steps: int = Field(default=100, ge=0)
    """Optimizer steps over which the learning rate rises."""
    warmup_ratio: Optional[float] = Field(default=None, ge=0, lt=1)
    """Share of the run's steps over which it rises; overrides `warmup_steps`."""
    lr_scheduler_type: Schedule = "cosine"
    """Course of the learning rate after the warm-up, by its name in Transformers."""
    lr_scheduler_kwargs: dict[str, Union[float, int, str]] = Field(default_factory=dict)
    """What that schedule takes beside, for instance `{min_lr_rate: 0.1}` for `cosine_with_min_lr`, `{num_decay_steps: 100}` for `warmup_stable_decay`."""
    weight_decay: float = Field(default=0.01, ge=0)
    """Weight decay of the optimizer; biases and norms have none."""
    max_grad_norm: float = Field(default=1.0, ge=0)
    """Gradients are clipped to this norm; 0 leaves them as they are."""
    optim: Optimizer = "adamw_torch"
    """Optimizer, by its name in Transformers; all but the first six need bitsandbytes."""
    label_smoothing_factor: float = Field(default=0.0, ge=0, lt=1)
    """Share of the target's probability spread over the vocabulary in training; the validation loss is measured without, so it can be compared."""
    gradient_checkpointing: Union[bool, Literal["auto"]] = "auto"
    """Recompute activations in the backward pass: less memory, more time. `auto`, under `fused`: those of as many layers as fit into `max_gpu_memory_gb`,
    or into a computer's free memory, are kept; where that is not `fused`, as `true`."""
    max_gpu_memory_gb: float = Field(default=15.0, gt=0)
    """What `gradient_checkpointing: auto` fills of a GPU at most, in GB; 15 leaves a rest on a card of 16. Layers that do not fit are recomputed."""
    engine: Literal["auto", "fused", "modules"] = "auto"
    """`fused` computes forward and backward of a step by hand (Llama, Mistral and Qwen2 families with plain LoRA or rsLoRA), `modules` goes
    through transformers' own modules and autograd; `auto` takes `fused` where it can (not in float16, nor on Unsloth), and says so."""
    prefix_sharing: bool = True
    """Under `fused`: tokens that rows of a step begin with in common, such as the system prompt, are computed once."""
    int8_backward: Union[bool, Literal["auto"]] = "auto"
    """Under `fused`, in float32 on a CPU: gradients go back through the frozen weights in 8-bit integers, which rounds adapters' gradients about as bfloat16
    does; the loss stays float32's. `auto`: where this CPU multiplies integers at least twice as fast as float32."""
    neftune_noise_alpha: float = Field(default=0.0, ge=0)
    """Noise on the embeddings in training (NEFTune, Jain et al. 2023), 5 for instance; 0 is none. Nothing is shared then."""
    logging_steps: int = Field(default=10, ge=1)
    """A loss line every so many steps."""
    eval_strategy: Literal["steps", "epoch", "no"] = "steps"
    """When the validation loss is measured: every `eval_steps`, after every epoch, or at the end alone."""
    eval_steps: Union[int, float] = Field(default=100, gt=0)
    """Validation loss every so many steps, and at the end; below 1, a share of the run's steps."""
    save_strategy: Literal["steps", "epoch", "no"] = "steps"
    """When a checkpoint is saved: every `save_steps`, after every epoch, or none but the finished model."""
    save_steps: Union[int, float] = Field(default=500, gt=0)
    """A checkpoint every so many steps; below 1, a share of the run's steps."""
    early_stopping_patience: Optional[int] = Field(default=None, ge=1)
    """End the run after so many evaluations in a row without a better one; never when empty."""
    early_stopping_threshold: float = Field(default=0.0, ge=0)
    """Least difference that counts as better."""
    load_best_model_at_end: bool = False
    """The finished model has the weights of the best evaluation, not of the last; the best so far is saved when it is measured."""
    metric_for_best_model: Literal["loss", "valid_structure", "critical_action_recall", "dangerous_advice"] = "loss"
    """What best means: the lowest validation loss, or a metric of answers generated at every evaluation (`best_samples` of them)."""
    best_samples: int = Field(default=16, ge=1)
    """Validation records answered for a metric of generated answers."""
    save_total_limit: int = Field(default=2, ge=1)
    """Mid-run checkpoints kept; older ones go once a newer one verifies, the one of the lowest validation loss stays."""
    save_retries: int = Field(default=5, ge=0)
    """How often a save that the disk refuses (full, gone, read-only, broken) is tried again before the run ends."""
    save_retry_seconds: float = Field(default=30, ge=0)
    """Pause before it is tried again."""
    seed: int = Field(default=42, ge=0)
    """Seed of shuffling, dropout and adapter initialisation."""
    report_to: list[Literal["wandb", "tensorboard", "mlflow", "trackio"]] = Field(default_factory=list)
    """Experiment trackers, for instance `["wandb"]`."""

    @field_validator("per_device_train_batch_size")
    @classmethod
    def _positive(cls, given: Union[int, str]) -> Union[int, str]:
        if isinstance(given, int) and given < 1:
            raise ValueError("expected 1 or more, or auto")
        return given

    @field_validator("eval_strategy", "save_strategy", mode="before")
    @classmethod
    def _no_is_a_word(cls, given: Any) -> Any:
        return "no" if given is False else given  # YAML 1.1 reads an unquoted no as false

    @field_validator("eval_steps", "save_steps")
    @classmethod
    def _whole_or_share(cls, given: Union[int, float]) -> Union[int, float]:
        if given >= 1 and given != int(given):
            raise ValueError("expected whole steps, or a share of the run below 1")
        return int(given) if given >= 1 else given

    @model_validator(mode="after")
    def _fit_together(self) -> "TrainingConfig":
        if self.eval_strategy == "no":
            for name in ("early_stopping_patience", "load_best_model_at_end"):
                if getattr(self, name):
                    raise ValueError(f"training.{name} needs evaluations: set training.eval_strategy to steps or epoch")
            if self.lr_scheduler_type == "reduce_lr_on_plateau":
                raise ValueError("training.lr_scheduler_type reduce_lr_on_plateau follows the validation loss: set training.eval_strategy to steps or epoch")
        if self.metric_for_best_model != "loss" and not (self.load_best_model_at_end or self.early_stopping_patience):
            raise ValueError("training.metric_for_best_model is used by load_best_model_at_end or early_stopping_patience only: set one of them")
        return self
