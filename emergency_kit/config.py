"""Config: three YAML files, typed and checked at once, with the origin of every value.

In: `dataset_config.yaml`, `model_config.yaml`, `training_config.yaml` of a profile or of `--config`,
then `--set section.key=value` and flags. Out: a frozen `Config` and, per key, where it came from.
Precedence: class default < YAML of the profile < YAML of `--config FILE` < `--set` and flags.
The docstring under each field is its help text and its line in docs/Configuration.md.
This file never imports torch, so that `--help` stays quick. It is longer than others because every
option of the product stands in it, once.
"""

from __future__ import annotations

import ctypes
import difflib
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Optional

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from emergency_kit.errors import ConfigError, UsageError

PROFILES = {"embedded": Path("configs/embedded"), "mistral-7b": Path("configs")}
FILES = {
    "dataset_config.yaml": ("dataset",),
    "model_config.yaml": ("model", "lora"),
    "training_config.yaml": ("training", "evaluation", "inference", "export"),
}
# The guide's short names; both spellings in one place are an error.
ALIASES = {
    "training.batch_size": "training.per_device_train_batch_size",
    "training.gradient_accumulation": "training.gradient_accumulation_steps",
}
REPOSITORY = Path(__file__).resolve().parent.parent


class Section(BaseModel):
    """Base of the config sections: frozen, strict about types and names."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True,
                              protected_namespaces=(), allow_inf_nan=False)


class DatasetConfig(Section):
    """What is trained on."""

    name: str = Field(default="embedded", min_length=1)
    """`embedded` (built from the knowledge cards), a Hub dataset (`owner/name` or `owner/name:revision`), or local files: one, a
    folder or a glob, of .jsonl, .json, .csv, .tsv, .parquet or .arrow, plain or packed as .gz or .zst."""
    config_name: Optional[str] = None
    """Configuration (subset) of a Hub dataset."""
    revision: Optional[str] = None
    """Branch, tag or commit of a Hub dataset."""
    train_split: str = "train"
    """Name of the training split."""
    validation_split: str = "validation"
    """Name of the validation split; where it is missing, a tenth of the training split is held out, near-duplicates together."""
    test_split: str = "test"
    """Name of the test split; where it is missing, evaluation uses the validation split and says so."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Column of the source for a field of a record, for instance `{input: Input, output: Output}`."""
    grounding: Literal["cards", "none"] = "none"
    """`cards` puts the knowledge cards that fit a scenario into its prompt; `none` leaves the prompt as it is."""
    top_k: int = Field(default=2, ge=1, le=5)
    """Most knowledge cards in one prompt."""
    max_samples: Optional[int] = Field(default=None, ge=1)
    """Most training records, drawn by seed after shuffling, the categories in turn; all when empty."""
    max_eval_samples: Optional[int] = Field(default=None, ge=1)
    """Most validation records for the loss measured during training, drawn likewise; all when empty."""
    build_seed: int = Field(default=7, ge=0)
    """Seed of the embedded dataset's builder."""
    build_size: int = Field(default=3600, ge=100)
    """Records of the embedded dataset, all splits together."""
    overlength: Literal["error", "drop", "truncate_prompt"] = "error"
    """What happens to a record over `model.max_seq_length` tokens. An answer is never cut."""
    strict: bool = False
    """Make anything that degrades (a rejected row, a dropped or truncated record) fatal."""


class ModelSection(Section):
    """Which base model, and how it is loaded."""

    name: str = Field(default="unsloth/Mistral-7B-Instruct-v0.2", min_length=1)
    """Hub id or folder of the base model; `bundled` is SmolLM2-135M-Instruct in `models/`."""
    revision: Optional[str] = None
    """Branch, tag or commit of a Hub model."""
    backend: Literal["auto", "hf", "unsloth"] = "auto"
    """`unsloth` on a GPU where it is installed, else `hf` (transformers and PEFT); `auto` picks and says why."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the model runs; `cuda` is an error where there is none."""
    max_seq_length: int = Field(default=2048, ge=16)
    """Longest prompt plus answer in tokens; drives the model and the tokeniser alike."""
    load_in_4bit: bool = True
    """Quantise the frozen base weights to 4-bit NF4 (bitsandbytes)."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Compute type of the base model; `auto` takes bfloat16 where the hardware has it."""
    attn_implementation: Literal["auto", "eager", "sdpa", "flash_attention_2"] = "auto"
    """Attention kernel; `auto` takes eager on a CPU (rows are short), flash attention on a GPU where installed, else SDPA."""


class LoraSection(Section):
    """The low-rank adapters (Hu et al. 2021)."""

    r: int = Field(default=16, ge=1)
    """Rank of the adapters."""
    alpha: int = Field(default=32, ge=1)
    """Scale of the adapters: their product is multiplied by alpha / r."""
    dropout: float = Field(default=0.05, ge=0, lt=1)
    """Dropout on the adapters' input in training."""
    target_modules: list[str] = Field(
        default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        min_length=1)
    """Linear modules that get an adapter."""


class TrainingConfig(Section):
    """The training run."""

    output_dir: str = Field(default="outputs", min_length=1)
    """Folder that gets `checkpoints/`, `logs/` and what the later stages write."""
    model_name: str = Field(default="final", pattern=r"^[A-Za-z0-9][A-Za-z0-9._ -]*$")
    """Name of the finished model: `<output_dir>/checkpoints/<model_name>/`."""
    num_epochs: float = Field(default=3, gt=0)
    """Passes over the training records."""
    max_steps: Optional[int] = Field(default=None, ge=1)
    """Stop after this many optimizer steps; overrides `num_epochs`."""
    learning_rate: float = Field(default=2e-4, gt=0, lt=1)
    """Peak learning rate."""
    per_device_train_batch_size: int = Field(default=2, ge=1)
    """Rows in one forward pass on one device. Alias: `batch_size`."""
    gradient_accumulation_steps: int = Field(default=4, ge=1)
    """Forward passes in one optimizer step. Alias: `gradient_accumulation`."""
    per_device_eval_batch_size: int = Field(default=4, ge=1)
    """Rows in one forward pass when the validation loss is measured."""
    warmup_steps: int = Field(default=100, ge=0)
    """Optimizer steps over which the learning rate rises."""
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "cosine"
    """Course of the learning rate after the warm-up."""
    weight_decay: float = Field(default=0.01, ge=0)
    """Weight decay of AdamW."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients are clipped to this norm."""
    optim: Literal["adamw_torch", "adamw_torch_fused", "adamw_8bit", "paged_adamw_8bit"] = "adamw_torch"
    """Optimizer; the 8-bit ones need bitsandbytes."""
    gradient_checkpointing: bool = True
    """Recompute activations in the backward pass: less memory, more time."""
    logging_steps: int = Field(default=10, ge=1)
    """A loss line every so many steps."""
    eval_steps: int = Field(default=100, ge=1)
    """Validation loss every so many steps, and at the end."""
    save_steps: int = Field(default=500, ge=1)
    """A checkpoint every so many steps."""
    save_total_limit: int = Field(default=2, ge=1)
    """Mid-run checkpoints kept; older ones go once a newer one verifies."""
    seed: int = Field(default=42, ge=0)
    """Seed of shuffling, dropout and adapter initialisation."""
    report_to: list[Literal["wandb", "tensorboard", "mlflow", "trackio"]] = Field(default_factory=list)
    """Experiment trackers, for instance `["wandb"]`."""


class EvaluationConfig(Section):
    """Scoring of generated answers."""

    max_samples: Optional[int] = Field(default=100, ge=1)
    """Most test records that are answered; all when empty."""
    batch_size: int = Field(default=8, ge=1)
    """Prompts generated together."""
    max_new_tokens: int = Field(default=768, ge=1)
    """Longest answer; one that is cut off here counts as not ended."""
    compare_base: bool = True
    """Answer the same prompts with the base model and print both."""


class InferenceConfig(Section):
    """Answers to one person."""

    country: str = Field(default="", pattern=r"^([A-Za-z]{2})?$")
    """Two-letter code of the country whose emergency number answers name; empty for "your local emergency number"."""
    max_new_tokens: int = Field(default=768, ge=1)
    """Longest answer."""
    temperature: float = Field(default=0.0, ge=0, le=2)
    """0 is greedy: the same answer every time."""


class ExportConfig(Section):
    """Merged model and GGUF files."""

    merge_dtype: Literal["auto", "float32", "float16", "bfloat16"] = "float32"
    """Type of the merged weights on disk; `auto` keeps the base model's. Types narrower than float32 round."""
    merge_max_logit_difference: float = Field(default=1e-3, gt=0)
    """Merging fails when a logit of the merged model, computed in float32, is further than this from the adapter's."""
    quantizations: list[str] = Field(default_factory=lambda: ["f16", "q8_0", "q4_k_m"], min_length=1)
    """GGUF types written when the command names none."""


class Config(Section):
    """The resolved config of one run."""

    dataset: DatasetConfig = Field(default_factory=DatasetConfig)
    model: ModelSection = Field(default_factory=ModelSection)
    lora: LoraSection = Field(default_factory=LoraSection)
    training: TrainingConfig = Field(default_factory=TrainingConfig)
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    inference: InferenceConfig = Field(default_factory=InferenceConfig)
    export: ExportConfig = Field(default_factory=ExportConfig)

    @model_validator(mode="after")
    def _fields_of_records_only(self) -> "Config":
        known = ("id", "category", "role", "instruction", "input", "output", "country")
        for name in self.dataset.columns:
            if name not in known:
                raise ValueError(f"dataset.columns: got {name!r}; expected one of {', '.join(known)}")
        return self


@dataclass(frozen=True)
class Resolved:
    """A config together with the profile that it came from and the origin of each `section.key`."""

    config: Config
    profile: str
    profile_reason: str
    origins: dict[str, str] = field(default_factory=dict)

    def differences(self) -> list[tuple[str, Any, str]]:
        """`(section.key, value, origin)` of every value that is not the class default, in file order."""
        default = flatten(Config())
        return [(key, value, self.origins.get(key, "default"))
                for key, value in flatten(self.config).items() if value != default[key]]


def flatten(config: Config) -> dict[str, Any]:
    """`{"section.key": value}` over all sections, in the order of the classes."""
    return {f"{section}.{key}": value
            for section, values in config.model_dump().items() for key, value in values.items()}


def reference() -> str:
    """Markdown tables of every key with its type, class default and meaning, from the docstrings above."""
    lines: list[str] = []
    for section, info in Config.model_fields.items():
        kind = info.annotation
        lines += [f"### `{section}`", "", (kind.__doc__ or "").strip(), "", "| key | type | default | meaning |", "|---|---|---|---|"]
        for name, option in kind.model_fields.items():
            default = option.get_default(call_default_factory=True)
            text = str(option.annotation).replace("typing.", "")
            shown = option.annotation.__name__ if isinstance(option.annotation, type) and "[" not in text else text
            lines.append(f"| `{name}` | {shown.replace('|', chr(92) + '|')} | `{default}` | {' '.join((option.description or '').split())} |")
        lines.append("")
    return chr(10).join(lines)


def find_cuda() -> bool:
    """Whether the NVIDIA driver shows at least one GPU to this process; asks the driver, not torch."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    count = ctypes.c_int(0)
    return driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0


def pick_profile(profile: str = "auto") -> tuple[str, str]:
    """`(name, reason)` of the profile; raises UsageError for an unknown name."""
    if profile == "auto":
        return ("mistral-7b", "a CUDA GPU is there") if find_cuda() else ("embedded", "no CUDA GPU was found")
    if profile not in PROFILES:
        raise UsageError(f"--profile: got {profile!r}; expected auto, {', '.join(PROFILES)}")
    return profile, "named by --profile"


def load_config(profile: str = "auto", config: str | Path | None = None,
                settings: list[str] | None = None, flags: dict[str, Any] | None = None) -> Resolved:
    """Read, merge and check a config.

    profile: `auto` or a name of PROFILES. config: a folder holding the three files (instead of the
    profile's), or one YAML file laid over the profile's. settings: `section.key=value` strings.
    flags: `{"section.key": value}` from command-line flags, None meaning not given.
    Raises ConfigError with every problem found.
    """
    name, reason = pick_profile(profile)
    problems: list[str] = []
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for path, sections in _files_of(name, config):
        layer, places = _read_yaml(path, sections, problems)
        values.update(layer)
        origins.update(places)
    command_line = _read_settings(settings or [], problems)
    for key, value in (flags or {}).items():
        if value is not None:
            command_line[key] = (value, "command line")
    for key, (value, origin) in command_line.items():
        values[key], origins[key] = value, origin
    resolved = _build(values, origins, problems)
    return Resolved(resolved, name, reason, origins)


def _files_of(profile: str, config: str | Path | None) -> list[tuple[Path, tuple[str, ...]]]:
    folder = PROFILES[profile]
    if not folder.is_dir():
        folder = REPOSITORY / folder
    everything = tuple(section for sections in FILES.values() for section in sections)
    overlay: list[tuple[Path, tuple[str, ...]]] = []
    if config is not None:
        config = Path(config)
        if config.is_dir():
            folder = config
        elif config.exists():
            overlay = [(config, everything)]
        else:
            raise ConfigError([f"{config}: no such config file or folder; see configs/ for the ones that come with the kit"])
    return [(folder / file, sections) for file, sections in FILES.items()] + overlay


class _Loader(yaml.SafeLoader):
    """YAML 1.1, but `2e-4` is a number, as everybody who writes it means."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in rules if tag != "tag:yaml.org,2002:float"]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:\d[\d_]*\.[\d_]*(?:[eE][-+]?\d+)?|\d[\d_]*[eE][-+]?\d+|\.\d[\d_]*(?:[eE][-+]?\d+)?|\.(?:inf|nan))$"),
    list("-+0123456789."))


def _read_yaml(path: Path, sections: tuple[str, ...], problems: list[str]) -> tuple[dict[str, Any], dict[str, str]]:
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    try:
        text = path.read_text(encoding="utf-8")
        node = yaml.compose(text, Loader=_Loader)
        content = yaml.load(text, Loader=_Loader)
    except FileNotFoundError:
        problems.append(f"{path}: missing; a config folder holds {', '.join(FILES)}")
        return values, origins
    except UnicodeDecodeError as error:
        problems.append(f"{path}: not UTF-8 at byte {error.start}; save it as UTF-8")
        return values, origins
    except OSError as error:
        problems.append(f"{path}: cannot be read ({error.strerror})")
        return values, origins
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        problems.append(f"{where}: not valid YAML ({getattr(error, 'problem', None) or error})")
        return values, origins
    if content is None:
        return values, origins
    if not isinstance(content, dict):
        problems.append(f"{path}: got {type(content).__name__}; expected sections {', '.join(sections)}")
        return values, origins
    for section_node, value_node in node.value:
        section = str(section_node.value)
        place = f"{path}:{section_node.start_mark.line + 1}"
        if section not in sections:
            problems.append(f"{place}: unknown section {section!r}{_nearest(section, sections)}")
            continue
        block = content[section]
        if block is None:
            continue
        if not isinstance(block, dict):
            problems.append(f"{place}: {section}: got {block!r}; expected keys and values")
            continue
        for key_node, _ in value_node.value:
            key = f"{section}.{key_node.value}"
            place = f"{path}:{key_node.start_mark.line + 1}"
            target = ALIASES.get(key, key)
            if target in origins:
                problems.append(f"{place}: {key}: already set at {origins[target]}; keep one of them")
                continue
            values[target] = block.get(key_node.value, block.get(yaml.safe_load(key_node.value)))
            origins[target] = place
    return values, origins


def _read_settings(settings: list[str], problems: list[str]) -> dict[str, tuple[Any, str]]:
    found: dict[str, tuple[Any, str]] = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        key = key.strip()
        if not equals or "." not in key:
            problems.append(f"--set {setting}: expected section.key=value, for instance training.num_epochs=1")
            continue
        target = ALIASES.get(key, key)
        try:
            value = yaml.load(text, Loader=_Loader)
        except yaml.YAMLError:
            value = text
        if target in found and found[target][1] != f"--set {key}":
            problems.append(f"--set {key}: already set by {found[target][1]}; keep one of them")
            continue
        found[target] = (value, f"--set {key}")
    return found


def _build(values: dict[str, Any], origins: dict[str, str], problems: list[str]) -> Config:
    known = list(flatten(Config())) + list(ALIASES)
    tree: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        section, _, name = key.partition(".")
        if key not in known:
            problems.append(f"{origins[key]}: unknown key {key!r}{_nearest(key, known)}")
            continue
        tree.setdefault(section, {})[name] = value
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        for item in error.errors():
            key = ".".join(str(part) for part in item["loc"][:2])
            inner = "".join(f"[{part!r}]" for part in item["loc"][2:])
            got = f" got {item['input']!r};" if key else ""
            message = item["msg"].replace("Input should be", "expected").removeprefix("Value error, ")
            problems.append(": ".join(part for part in (origins.get(key, ""), f"{key}{inner}:{got} {message}" if key else message) if part))
    if problems:
        raise ConfigError(problems)
    return config


def _nearest(name: str, known: tuple[str, ...] | list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"
