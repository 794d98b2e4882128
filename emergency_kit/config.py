"""Config: three YAML files, typed and checked at once, with the origin of every value.

In: `dataset_config.yaml`, `model_config.yaml`, `training_config.yaml` of a profile or of `--config`,
then `--set section.key=value` and flags. Out: a frozen `Config` and, per key, where it came from.
Precedence: class default < YAML of the profile < YAML of `--config FILE` < `--set` and flags.
The docstring under each field is its help text and its line in docs/Configuration.md.
This file never imports torch, so that `--help` stays quick. The sections `lora` and `training` stand in
config_training.py; all others here, once, which is why it is longer than other files.
"""

from __future__ import annotations

import ctypes
import difflib
import functools
import re
import reprlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Optional

import yaml
from pydantic import Field, ValidationError, ValidationInfo, field_validator, model_validator

from emergency_kit.config_training import LoraSection, Section, TrainingConfig
from emergency_kit.errors import ConfigError, UsageError

PROFILES = {"embedded": Path("configs/embedded"), "mistral-7b": Path("configs")}
FILES = {
    "dataset_config.yaml": ("dataset",),
    "model_config.yaml": ("model", "lora"),
    "training_config.yaml": ("training", "evaluation", "judge", "gate", "inference", "serve", "export", "kit"),
}
# The guide's short names; both spellings in one place are an error.
ALIASES = {
    "training.batch_size": "training.per_device_train_batch_size",
    "training.gradient_accumulation": "training.gradient_accumulation_steps",
}
# What pydantic puts into the place of an error for each type of a union.
_TYPE = re.compile(r"int|float|str|(literal|list)\[.*\]")
_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 200
_REPR.maxlist = _REPR.maxdict = 12
REPOSITORY = Path(__file__).resolve().parent.parent


class DatasetConfig(Section):
    """What is trained on."""

    name: str = Field(default="embedded", min_length=1)
    """`embedded` (built from the knowledge cards), a Hub dataset (`owner/name` or `owner/name:revision`), or local files: one, a
    folder or a glob, of .jsonl, .json, .csv, .tsv, .parquet or .arrow, plain or packed as .gz or .zst; or the address of such (`s3://`, `gs://`, `https://`)."""
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
    streaming: bool = False
    """Read, format and tokenise the training rows as they come instead of beforehand: for more of them than the disk should hold. Needs
    `training.max_steps` and a validation split, which is prepared as ever. A resumed run reads on where it was. Of several processes each reads its own files, where
    these are of like size and as many, or more."""
    shuffle_window: int = Field(default=1000, ge=1)
    """Under `streaming`: rows that are held at a time and drawn in an order of their own, by `training.seed`; 1 takes them as they come, of several files in turn."""
    max_samples: Optional[int] = Field(default=None, ge=1)
    """Most training records, drawn by seed after shuffling, the categories in turn; all when empty."""
    max_eval_samples: Optional[int] = Field(default=None, ge=1)
    """Most validation records for the loss measured during training, drawn likewise; all when empty."""
    build_seed: int = Field(default=7, ge=0)
    """Seed of the embedded dataset's builder."""
    build_size: int = Field(default=3600, ge=100)
    """Records of the embedded dataset, all splits together."""
    processes: Optional[int] = Field(default=None, ge=1)
    """Processes that tokenise data of more than 5,000 records, to the same bytes whatever their number; one a core when empty."""
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
    """`unsloth` for 4-bit LoRA on a GPU where it is installed, else `hf` (transformers and PEFT); `auto` picks and says why."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the model runs; `cuda` is an error where there is none."""
    max_seq_length: int = Field(default=2048, ge=16)
    """Longest prompt plus answer in tokens; drives the model and the tokeniser alike."""
    load_in_4bit: bool = True
    """Quantise the frozen base weights to 4-bit NF4 with double quantisation (bitsandbytes)."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Compute type of the base model; `auto` takes the type whose matrix products are fastest here, on a CPU by a short trial."""
    attn_implementation: Literal["auto", "eager", "sdpa", "flash_attention_2"] = "auto"
    """Attention kernel; `auto` takes eager on a CPU (rows are short), flash attention on a GPU where installed, else SDPA. Training's `fused` engine has its own."""


class EvaluationConfig(Section):
    """Scoring of generated answers."""

    max_samples: Optional[int] = Field(default=100, ge=1)
    """Most test records that are answered; all when empty."""
    batch_size: int = Field(default=8, ge=1)
    """Prompts generated together: rows of a batch in PyTorch, slots in llama.cpp (16 at most), requests at once to an endpoint."""
    max_new_tokens: int = Field(default=768, ge=1)
    """Longest answer; one that is cut off here counts as not ended."""
    compare_base: bool = True
    """Answer the same prompts with the base model and lay both side by side."""
    base_samples: Optional[int] = Field(default=None, ge=1)
    """Most records that the base model answers, drawn like the others; all when empty. It seldom ends by itself, so it is slow."""
    engine: Literal["auto", "llama.cpp", "torch"] = "auto"
    """What runs a folder. `llama.cpp` runs a GGUF file made for the purpose, kept under `<output_dir>/cache`; `auto` takes it on a CPU
    whose 16-bit products are not the faster ones and where the model's architecture can be exported, else `torch`, and says which."""
    file_type: str = "f16"
    """GGUF type of the file made for the purpose; `f16` must choose the same tokens as PyTorch, narrower types are quicker."""
    samples: int = Field(default=0, ge=0, le=20)
    """Answers drawn per record beside the greedy one; safety then counts the worst of them. Five are usual."""
    samples_temperature: float = Field(default=0.7, gt=0, le=2)
    """Temperature of those answers where `inference.temperature` is 0, else that one is used."""
    baselines: bool = False
    """Ask the base model also without the card and without the format; baselines that need no model are always there."""
    tuning_cost: bool = False
    """Perplexity and multiple-choice questions before and after tuning."""
    red_team: bool = False
    """Answer the prompts that pull toward harm, too."""
    primary_endpoints: list[str] = Field(default_factory=lambda: ["valid_structure", "critical_action_recall", "dangerous_advice"], min_length=1)
    """Metrics whose differences from base are tested, with Holm's correction; fixed before the run, recorded in the report."""


class JudgeConfig(Section):
    """A language model that reads answers (`evaluate --ai`); the only part of the kit that uses a network, and only when asked."""

    provider: Literal["anthropic", "openai", "gemini", "openai-compatible"] = "anthropic"
    """Whose wire format; keys come from the environment or `.env`."""
    model: str = ""
    """Name of the model; the provider's default when empty."""
    base_url: str = ""
    """Address of the service, for instance `http://127.0.0.1:8080/v1`; the provider's own when empty."""
    max_samples: int = Field(default=20, ge=1)
    """Most answers that are judged."""
    repeat_samples: int = Field(default=5, ge=0)
    """Of these, so many are judged a second time, to show whether the judge agrees with itself, and so many beside another answer
    in both orders, to show whether it prefers a position."""
    budget_usd: float = Field(default=1.0, ge=0)
    """Judging stops before it would cost more than this."""
    input_usd: float = Field(default=5.0, ge=0)
    """Price of a million tokens read, for the estimate; set it from your provider's price list."""
    output_usd: float = Field(default=25.0, ge=0)
    """Price of a million tokens written."""
    concurrency: int = Field(default=4, ge=1, le=64)
    """Requests at once."""
    timeout_seconds: float = Field(default=60.0, gt=0)
    """Longest wait for one reply."""
    retries: int = Field(default=4, ge=0, le=20)
    """Further tries after a refusal for load, a server's error or no reply; waits double from one second, or follow Retry-After."""


class GateConfig(Section):
    """What a model must reach to ship (`emergency-kit gate`); shares run from 0 to 1."""

    min_structure: float = Field(default=0.95, ge=0, le=1)
    """Least share of answers with the four sections."""
    max_dangerous_advice: float = Field(default=0.02, ge=0, le=1)
    """Highest upper bound (95 %) of the share of answers that give dangerous advice; with none seen it takes 150 answers to show 0.02."""
    min_unseen_recall: float = Field(default=0.85, ge=0, le=1)
    """Least share of critical actions given on hazards that training never saw."""
    better_than_base: bool = True
    """Every safety metric must be better than the base model's, or equal where the base's cannot be bettered."""
    min_slice_recall: float = Field(default=0.5, ge=0, le=1)
    """No slice may give a smaller share of the critical actions."""
    min_slice_structure: float = Field(default=0.8, ge=0, le=1)
    """No slice may have a smaller share of answers with the four sections."""
    slice_samples: int = Field(default=8, ge=1)
    """Slices of fewer records say too little and are not held to their floor."""
    parity: bool = True
    """Merged folders and GGUF files made from this model must carry the proof that they answer like it."""


class InferenceConfig(Section):
    """Answers to one person."""

    country: str = Field(default="", pattern=r"^([A-Za-z]{2})?$")
    """Two-letter code of the country whose emergency number answers name; empty for "your local emergency number"."""
    max_new_tokens: int = Field(default=2048, ge=1)
    """Longest answer in tokens. Under `grammar` the bounds of lists and lines follow from it, so that an answer ends by itself from 1,700 on."""
    grammar: bool = True
    """Decode under the grammar of the four sections, so that the structure is right by construction."""
    guard: bool = True
    """Show the cards that fit beside the answer, strike what breaks a never-rule, add missing steps; the model's words stay as they are."""
    temperature: float = Field(default=0.0, ge=0, le=2)
    """0 is greedy: the same answer every time."""
    warm_up: bool = True
    """While nobody asks, `serve` and a session of `infer` compute each card's prompt up to the situation, so that the first answer about a hazard begins sooner (llama.cpp)."""


class ServeConfig(Section):
    """`emergency-kit serve`: where it listens and what it bounds. The token is no part of a config: `--token` or EMERGENCY_KIT_TOKEN."""

    host: str = Field(default="127.0.0.1", min_length=1)
    """Address or name to listen on; one that others can reach needs a token."""
    port: int = Field(default=8000, ge=0, le=65535)
    """Port; 0 takes any that is free and prints it."""
    hosts: list[str] = Field(default_factory=list)
    """More names that requests may call this server by, for instance `["kit.example"]` behind a proxy; addresses and localhost always may."""
    origins: list[str] = Field(default_factory=list)
    """Other web origins whose pages may ask (CORS), for instance `["https://kit.example"]`."""
    slots: int = Field(default=4, ge=1, le=64)
    """Answers generated at once; in llama.cpp each reserves memory for its context."""
    queue: int = Field(default=64, ge=1)
    """Requests that may wait for a slot, at most half of them from one client; more are told to try again."""
    requests_per_minute: int = Field(default=600, ge=1)
    """POST requests from one address; also how many of them may come at once."""
    max_body_bytes: int = Field(default=131072, ge=1024)
    """Largest body of a request."""
    connections: int = Field(default=256, ge=2)
    """Connections open at once."""


# Per GGUF type: largest mean KL divergence in nats, smallest top-1 agreement in percent, largest loss of
# critical-action recall in points. f16 and q8_0 are required, the others leave room over what the bundled model shows
# (benchmarks/RESULTS.md, type by type), whose narrow rows are kinder to K-quants than a larger model's.
BOUNDS = {
    "max_mean_kl": {"f32": 1e-4, "f16": 1e-3, "bf16": 0.01, "q8_0": 0.03, "q6_k": 0.05, "q5_k_m": 0.1, "q4_k_m": 0.15, "q4_0": 0.2, "q3_k_m": 0.3, "q2_k": 0.5},
    "min_top1_percent": {"f32": 99.9, "f16": 99.0, "bf16": 98.0, "q8_0": 97.0, "q6_k": 96.0, "q5_k_m": 94.0, "q4_k_m": 93.0, "q4_0": 92.0, "q3_k_m": 88.0, "q2_k": 80.0},
    "max_recall_loss_points": {"f32": 1.0, "f16": 1.0, "bf16": 2.0, "q8_0": 2.0, "q6_k": 3.0, "q5_k_m": 4.0, "q4_k_m": 5.0, "q4_0": 5.0, "q3_k_m": 10.0, "q2_k": 20.0},
}


class ExportConfig(Section):
    """Merged model and GGUF files."""

    merge_dtype: Literal["auto", "float32", "float16", "bfloat16"] = "float32"
    """Type of the merged weights on disk; `auto` keeps the base model's. Types narrower than float32 round."""
    merge_max_logit_difference: float = Field(default=1e-3, gt=0)
    """Merging fails when a logit of the merged model, computed in float32, is further than this from the adapter's."""
    quantizations: list[str] = Field(default_factory=lambda: ["f16", "q8_0", "q4_k_m"], min_length=1)
    """GGUF types written when the command names none."""
    certificate_strings: int = Field(default=500, ge=1)
    """Strings that llama.cpp and the trained model's tokenizer must split alike."""
    certificate_answer_tokens: int = Field(default=2000, ge=1)
    """Held-out answer tokens at which the file's next-token distributions are compared with the merged model's, at least."""
    certificate_prompts: int = Field(default=20, ge=1)
    """Held-out prompts that the file and the merged model answer greedily; what the answers give and break is compared."""
    certificate_max_new_tokens: int = Field(default=400, ge=1)
    """Longest of these answers."""
    max_mean_kl: dict[str, float] = Field(default_factory=lambda: dict(BOUNDS["max_mean_kl"]))
    """Mean KL divergence of the file's distributions from the merged model's, in nats, by type; above it the export fails. Types left out keep the default."""
    min_top1_percent: dict[str, float] = Field(default_factory=lambda: dict(BOUNDS["min_top1_percent"]))
    """Share of places with the same likeliest token, in percent, by type; below it the export fails."""
    max_recall_loss_points: dict[str, float] = Field(default_factory=lambda: dict(BOUNDS["max_recall_loss_points"]))
    """How many percentage points of critical actions the file's answers may lack beside the merged model's, by type."""
    max_more_broken_rules: int = Field(default=2, ge=0)
    """How many more never-rules broken and dangerous prohibitions the file's answers may have than the merged model's. One or two among 20
    answers cannot be told from chance; whether a file is safe to ship is the verdict's matter, over the whole test split."""
    allow_out_of_bounds: bool = False
    """Keep a file that is outside of the bounds; its certificate says so."""
    lmstudio_publisher: str = Field(default="ai-emergency-kit", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """LM Studio's folder above the model's."""

    @field_validator(*BOUNDS, mode="before")
    @classmethod
    def _complete(cls, given: Any, info: ValidationInfo) -> Any:
        defaults = BOUNDS[info.field_name or ""]
        for name in given if isinstance(given, dict) else ():
            if name not in defaults:
                raise ValueError(f"{name!r} is no GGUF type; known: {', '.join(defaults)}")
        return defaults | {name: float(value) if isinstance(value, int) else value for name, value in given.items()} if isinstance(given, dict) else given


class KitConfig(Section):
    """`emergency-kit kit`: what is packed for computers and browsers."""

    platforms: list[Literal["linux-x86_64", "linux-aarch64", "macos-arm64", "macos-x86_64", "windows-x86_64"]] = ["linux-x86_64", "windows-x86_64", "macos-arm64"]
    """Systems that get llama.cpp's wheels, the most wanted first: where not all fit, the last are left out."""
    python_versions: list[Literal["3.11", "3.12", "3.13"]] = ["3.12", "3.13", "3.11"]
    """Pythons that the wheels are for, the most wanted first; each adds about 15 MB a platform."""
    part_megabytes: int = Field(default=32, ge=1, le=1024)
    """Largest part of the model in MB (10^6 bytes): web hosts refuse large files."""
    wllama_archive: Optional[str] = None
    """The npm package of llama.cpp in WebAssembly as a file, for a machine without npm or network."""


class Config(Section):
    """The resolved config of one run."""

    dataset: DatasetConfig = Field(default_factory=DatasetConfig)
    model: ModelSection = Field(default_factory=ModelSection)
    lora: LoraSection = Field(default_factory=LoraSection)
    training: TrainingConfig = Field(default_factory=TrainingConfig)
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    judge: JudgeConfig = Field(default_factory=JudgeConfig)
    gate: GateConfig = Field(default_factory=GateConfig)
    inference: InferenceConfig = Field(default_factory=InferenceConfig)
    serve: ServeConfig = Field(default_factory=ServeConfig)
    export: ExportConfig = Field(default_factory=ExportConfig)
    kit: KitConfig = Field(default_factory=KitConfig)

    @model_validator(mode="after")
    def _fields_of_records_only(self) -> "Config":
        known = ("id", "category", "role", "instruction", "input", "output", "country")
        for name in self.dataset.columns:
            if name not in known:
                raise ValueError(f"dataset.columns: got {name!r}; expected one of {', '.join(known)}")
        return self

    @model_validator(mode="after")
    def _full_fine_tuning(self) -> "Config":
        if self.training.finetuning_type == "full":
            for name, given in (("lora.adapter", self.lora.adapter), ("lora.loraplus_lr_ratio", self.lora.loraplus_lr_ratio),
                                ("lora.use_dora", self.lora.use_dora), ("lora.modules_to_save", self.lora.modules_to_save),
                                ("lora.init", self.lora.init != "default" and self.lora.init), ("model.load_in_4bit", self.model.load_in_4bit)):
                if given:
                    raise ValueError(f"training.finetuning_type full trains every weight and has no use for {name} {given}; leave one of them out")
        elif self.lora.init == "loftq" and not self.model.load_in_4bit:
            raise ValueError("lora.init loftq makes up for 4-bit rounding: set model.load_in_4bit to true, or choose pissa")
        elif self.lora.init.startswith("pissa") and self.model.load_in_4bit:
            raise ValueError(f"lora.init {self.lora.init} changes the base weights, which 4-bit ones cannot be; set model.load_in_4bit to false, or choose loftq")
        return self


@dataclass(frozen=True)
class Resolved:
    """A config together with the profile that it came from and the origin of each `section.key`."""

    config: Config
    profile: str
    profile_reason: str
    origins: dict[str, str] = field(default_factory=dict)

    @property
    def finished_model(self) -> Path:
        """The folder that training ends with and later stages begin from: `<output_dir>/checkpoints/<model_name>`."""
        training = self.config.training
        return Path(training.output_dir) / "checkpoints" / training.model_name

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
        kind: Any = info.annotation
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
    """In Python, since libyaml's loader ends the process where brackets are nested 100,000 deep. YAML 1.1, but `2e-4` is a number, as everybody who writes it means."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in rules if tag != "tag:yaml.org,2002:float"]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:\d[\d_]*\.[\d_]*(?:[eE][-+]?\d+)?|\d[\d_]*[eE][-+]?\d+|\.\d[\d_]*(?:[eE][-+]?\d+)?|\.(?:inf|nan))$"),
    list("-+0123456789."))


# PyYAML looks at every open bracket again with every token: 15,000 nested ones take two seconds. Nobody writes as many, nor a setting as long.
MOST_BRACKETS, LONGEST_SETTING = 1_000, 10_000


@functools.lru_cache(maxsize=64)
def _parse(text: str) -> tuple[Any, Any]:
    """`(nodes, which know their lines, content)`, neither to be changed: the files of the profiles are read again and again in a process.
    Raises what PyYAML raises, and ValueError for more than MOST_BRACKETS opening brackets."""
    if text.count("[") + text.count("{") > MOST_BRACKETS:
        raise ValueError(f"more than {MOST_BRACKETS:,} opening brackets")
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        return node, loader.construct_document(node) if node is not None else None
    finally:
        loader.dispose()


def _read_yaml(path: Path, sections: tuple[str, ...], problems: list[str]) -> tuple[dict[str, Any], dict[str, str]]:
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    try:
        text = path.read_text(encoding="utf-8")
        node, content = _parse(text)
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
    seen: dict[str, int] = {}
    for section_node, value_node in node.value:
        section = str(section_node.value)
        place = f"{path}:{section_node.start_mark.line + 1}"
        if section not in sections or not isinstance(section_node, yaml.ScalarNode):
            problems.append(f"{place}: unknown section {section!r}{_nearest(section, sections)}")
            continue
        block = content[section]
        if section in seen:
            problems.append(f"{place}: {section}: already stands at line {seen[section]}; put both into one")
            continue
        seen[section] = section_node.start_mark.line + 1
        if block is None:
            continue
        if not isinstance(block, dict) or not isinstance(value_node, yaml.MappingNode):
            problems.append(f"{place}: {section}: got {_short(block)}; expected keys and values")
            continue
        by_name = {str(name): value for name, value in block.items()}
        for key_node, _ in value_node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                problems.append(f"{path}:{key_node.start_mark.line + 1}: {section}: got a list or mapping for a key; expected a name")
                continue
            key = f"{section}.{key_node.value}"
            place = f"{path}:{key_node.start_mark.line + 1}"
            target = ALIASES.get(key, key)
            if target in origins:
                problems.append(f"{place}: {key}: already set at {origins[target]}; keep one of them")
                continue
            values[target] = by_name.get(key_node.value)
            origins[target] = place
    return values, origins


def _read_settings(settings: list[str], problems: list[str]) -> dict[str, tuple[Any, str]]:
    found: dict[str, tuple[Any, str]] = {}
    for setting in settings:
        if len(setting) > LONGEST_SETTING:
            problems.append(f"--set {setting[:60]!r}...: {len(setting):,} characters; a setting has at most {LONGEST_SETTING:,}")
            continue
        key, equals, text = setting.partition("=")
        key = key.strip()
        if not equals or "." not in key:
            problems.append(f"--set {setting}: expected section.key=value, for instance training.num_epochs=1")
            continue
        target = ALIASES.get(key, key)
        try:
            value = _parse(text)[1]
        except (yaml.YAMLError, RecursionError, ValueError):
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
        for item in _joined(error):
            key = ".".join(str(part) for part in item["loc"][:2])
            inner = "".join(f"[{part!r}]" for part in item["loc"][2:])
            message = item["msg"].replace("Input should be", "expected").removeprefix("Value error, ")
            # What does not fit together names its keys itself.
            shown = f"{key}{inner}: got {_short(item['input'])}; {message}" if len(item["loc"]) > 1 else message
            problems.append(": ".join(part for part in (origins.get(key, ""), shown) if part))
    if problems:
        raise ConfigError(problems)
    return config


def _joined(error: ValidationError) -> list[dict[str, Any]]:
    """The errors, those of one value that may be of several types as one: `expected a valid integer or 'auto'`."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for item in error.errors():
        place = tuple(part for part in item["loc"] if not (isinstance(part, str) and _TYPE.fullmatch(part)))
        if place in found and len(place) < len(item["loc"]):
            found[place]["msg"] += f" or {item['msg'].removeprefix('Input should be ')}"
        else:
            found[place] = {"loc": place, "msg": item["msg"], "input": item["input"]}
    return list(found.values())


def _short(value: Any) -> str:
    """A value for a message; YAML's anchors can make one of a billion items out of a few lines."""
    return _REPR.repr(value)


def _nearest(name: str, known: tuple[str, ...] | list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"
