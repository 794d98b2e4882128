"""Backend: one way in to a base model, an adapter or a merged folder, whichever library loads it.

In: the `model` and `lora` sections of the config, or a folder. Out: `Loaded`, a model with its tokenizer. Two modules keep the
protocol `Backend`: `hf_backend` (transformers, PEFT and bitsandbytes) and `unsloth_backend`, the only file that imports Unsloth.
`choose` picks one before either is imported; what was picked, and why, is in `Loaded.notes` and printed by the caller.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import resource
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from emergency_kit.artifacts import hash_parent, load_manifest, save_json
from emergency_kit.config import LoraSection, ModelSection
from emergency_kit.errors import ModelError
from emergency_kit.model import bundled, hub, process_memory

if TYPE_CHECKING:
    import torch

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "tokenizer_config.json")
MODEL_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json")

# transformers, PEFT and accelerate import bitsandbytes where it is there, and on a CPU with bfloat16 instructions it then asks for a package whose kernel is
# not used here (see `hf_backend._keep_4bit`).
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


@dataclass
class Loaded:
    """A model ready for use. kind: `base`, `adapter`, `merged` or `full`; base: name or folder of the base model; first: the first values of
    adapters that do not begin at zero (see adapters.py); owns_loss: as the backend's."""

    model: Any
    tokenizer: Any
    kind: str
    base: str
    notes: list[str] = field(default_factory=list)
    first: "dict[str, torch.Tensor] | None" = None
    owns_loss: bool = False


class Backend(Protocol):
    """What training asks of a library that loads models.

    owns_loss: its own forward pass computes the loss where labels are given, as their sum divided by `num_items_in_batch`, and must stay as it is;
    else training installs its own (training/loss.py). Saving and memory are the same for all: `save_trained`, and `memory_bytes` below.
    """

    owns_loss: bool

    def load(self, model: ModelSection, device: str, gradient_checkpointing: bool, full: bool = False, sharded: bool = False, tokenizer: Any = None) -> Loaded:
        """The frozen base model, quantised where the config says so, in training mode; `full`: float32, every weight trained; `sharded`: about to be
        divided by FSDP, on the CPU but in 4-bit. tokenizer: the model's, where it is loaded already."""

    def attach(self, loaded: Loaded, model: ModelSection, lora: LoraSection, gradient_checkpointing: bool, seed: int,
               first: "dict[str, torch.Tensor] | None" = None) -> None:
        """Put float32 adapters on it: `loaded.model` is then PEFT's, with nothing else trained. first: see adapters.py."""


@dataclass(frozen=True)
class Choice:
    """A backend's name, `hf` or `unsloth`, its device, `cpu` or `cuda`, and why it was chosen."""

    name: str
    device: str
    reason: str


def base_name(model: ModelSection) -> str:
    """Hub id or folder of the base model that the config names."""
    return str(bundled.FOLDER) if model.name == "bundled" else model.name


def pick_device(model: ModelSection) -> str:
    """`cpu` or `cuda`; raises ModelError where `model.device: cuda` cannot be had."""
    import torch

    available = torch.cuda.is_available()
    if model.device == "cuda" and not available:
        raise ModelError(f"model.device is cuda, but torch {torch.__version__} sees no CUDA GPU; "
                         "next: --profile embedded for the small bundled model on a CPU, or install the GPU extra: pip install '.[gpu]'")
    return "cuda" if available and model.device != "cpu" else "cpu"


def pick_dtype(model: ModelSection, device: str) -> "torch.dtype":
    """Compute type: the config's, or the one that multiplies fastest here."""
    return explain_dtype(model, device)[0]


def explain_dtype(model: ModelSection, device: str) -> tuple["torch.dtype", str]:
    """`(compute type, why)`."""
    import torch

    from emergency_kit.model import compute

    if model.dtype != "auto":
        return getattr(torch, model.dtype), "by config"
    return compute.pick_gpu_dtype() if device == "cuda" else compute.pick_cpu_dtype()


def pick_attention(model: ModelSection, device: str) -> str:
    """Attention kernel by the config and the device."""
    if model.attn_implementation != "auto":
        return model.attn_implementation
    if device == "cpu":
        return "eager"
    import torch

    # The package's kernels begin with Ampere.
    return "flash_attention_2" if importlib.util.find_spec("flash_attn") and torch.cuda.get_device_capability() >= (8, 0) else "sdpa"


def choose(model: ModelSection, needs: str = "") -> Choice:
    """The backend for training, imported where it is Unsloth: it patches transformers and PEFT, so call this before they are imported.

    needs: what Unsloth is not asked for, in words. Raises ModelError where Unsloth or the GPU is named but cannot be used, or the package
    that 4-bit needs is missing.
    """
    device = pick_device(model)
    missing = "" if importlib.util.find_spec("unsloth") else "the package unsloth (pip install '.[gpu]')"
    if model.backend == "unsloth":
        problem = f"is not for {needs}" if needs else f"needs {missing or 'a CUDA GPU'}" if missing or device == "cpu" else ""
        if problem:
            raise ModelError(f"model.backend is unsloth, which {problem}; next: --set model.backend=hf")
        choice = Choice("unsloth", device, "by config")
    elif model.backend != "auto":
        choice = Choice(model.backend, device, "by config")
    elif device == "cpu" or not model.load_in_4bit:
        choice = Choice("hf", device, "device is cpu" if device == "cpu" else "no 4-bit weights")
    elif needs or missing:
        choice = Choice("hf", device, f"unsloth is not for {needs}" if needs else f"without {missing}")
    else:
        choice = Choice("unsloth", device, "installed, with a CUDA GPU")
    if model.load_in_4bit and importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError("model.load_in_4bit needs the package bitsandbytes; next: pip install '.[gpu]', or --set model.load_in_4bit=false")
    if choice.name == "unsloth":
        _import_backend("unsloth")
    return choice


def _import_backend(name: str) -> Backend:
    try:
        return importlib.import_module(f"emergency_kit.model.{name}_backend")
    except (ImportError, RuntimeError, AttributeError, OSError) as error:  # Unsloth looks at the GPU and at many packages while it is imported
        if name != "unsloth":
            raise
        raise ModelError(f"model.backend unsloth: it is installed but cannot be imported ({hub.first_line(error)}); next: --set model.backend=hf, "
                         "or install the tested versions anew (docs/Training.md, Backends)") from None


def load_for_training(model: ModelSection, lora: LoraSection, gradient_checkpointing: bool, seed: int, full: bool = False, needs: str = "",
                      first: "dict[str, torch.Tensor] | None" = None, sharded: bool = False, tokenizer: Any = None) -> Loaded:
    """The base model with float32 adapters on it, fresh or `lora.adapter`'s, in training mode; `full`: all its weights trained instead.

    needs: a reason to pass Unsloth by. sharded, tokenizer: as `Backend.load`. first: the adapters' first values where a run with `lora.init` is gone on with.
    """
    choice = choose(model, needs or beyond_unsloth(model, lora, full))
    require_base(model)
    if lora.adapter and check_checkpoint(Path(lora.adapter), model) != "adapter":
        raise ModelError(f"lora.adapter {lora.adapter}: a full model, not an adapter; name it as model.name instead")
    backend = _import_backend(choice.name)
    loaded = backend.load(model, choice.device, gradient_checkpointing, full, sharded, tokenizer)
    if not full:
        backend.attach(loaded, model, lora, gradient_checkpointing, seed, first)
    loaded.owns_loss = backend.owns_loss
    if choice.device == "cuda":
        import torch

        torch.cuda.empty_cache()  # the weights as they were before they became 4-bit
    loaded.notes.insert(0, f"backend {choice.name} ({choice.reason}) on {choice.device}; compute type: {explain_dtype(model, choice.device)[1]}")
    return loaded


def beyond_unsloth(model: ModelSection, lora: LoraSection, full: bool) -> str:
    """What is asked of a model that Unsloth is not used for, in words for the console; empty where nothing is."""
    wanted = {"full fine-tuning": full, "model.dtype float32": model.dtype == "float32", "DoRA": lora.use_dora, f"lora.init {lora.init}": lora.init != "default",
              "lora.adapter": lora.adapter, "lora.modules_to_save": lora.modules_to_save, "all-linear": lora.target_modules == "all-linear"}
    return next((name for name, there in wanted.items() if there), "")


def save_trained(loaded_model: Any, tokenizer: Any, folder: Path, first: "dict[str, torch.Tensor] | None" = None,
                 gathered: "dict[str, torch.Tensor] | None" = None) -> None:
    """Save adapters, or all weights where all are trained, with the base model's config and the tokenizer. first: as `Loaded.first`; gathered: the
    adapters by their names in the model, where it holds only a part of each itself."""
    loaded_model.save_pretrained(folder, state_dict=gathered)
    if first is not None:
        from emergency_kit.model import adapters

        adapters.save_difference(loaded_model, first, folder)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty model card
    loaded_model.config.save_pretrained(folder)
    save_tokenizer(tokenizer, folder)


def memory_bytes() -> int:
    """What this process holds now: where there is a GPU, in torch's allocator, else resident."""
    import torch

    return torch.cuda.memory_reserved() if torch.cuda.is_available() else process_memory.resident_bytes() or 0


def peak_memory_bytes() -> int:
    """The most that this process held: where there is a GPU, of video memory, else resident."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def load_base(model: ModelSection, dtype: "torch.dtype | None" = None) -> Loaded:
    """The base model for inference, in full precision (never 4-bit); dtype None picks by hardware."""
    from emergency_kit.model import hf_backend

    require_base(model)
    return hf_backend.load_model(base_name(model), model, dtype, kind="base")


def load_checkpoint(model: ModelSection, folder: Path, dtype: "torch.dtype | None" = None, fold: bool = False) -> Loaded:
    """An adapter on its base model, or a merged or base folder, for inference.

    fold: where it is a small model's adapter, add it into the weights, which decodes about 1.4 times as fast.
    Raises ModelError when the folder is missing, incomplete or was trained on another base model.
    """
    from emergency_kit.model import hf_backend

    kind = check_checkpoint(folder, model)
    if kind == "adapter":
        return hf_backend.load_adapter(base_name(model), folder, model, dtype, fold)
    manifest = load_manifest(folder)
    return hf_backend.load_model(str(folder), model, dtype, kind=kind_of(manifest))


def kind_of(manifest: dict[str, Any] | None) -> str:
    """Kind of a full model's folder by its manifest: `merged`, `full` (every weight trained), or `base`."""
    return {"merge": "merged", "train": "full"}.get((manifest or {}).get("stage", ""), "base")


def load_tokenizer(model: ModelSection) -> Any:
    """The base model's tokenizer alone."""
    from emergency_kit.model import hf_backend

    require_base(model)
    return hf_backend.load_tokenizer(base_name(model), None if Path(base_name(model)).is_dir() else model.revision)


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Tokenizer files with the chat template, and the `special_tokens_map.json` that transformers 5 no longer writes."""
    tokenizer.save_pretrained(folder)
    save_json(folder / "special_tokens_map.json", {name: str(token) for name, token in tokenizer.special_tokens_map.items()
                                                   if isinstance(token, str)})


def require_base(model: ModelSection) -> None:
    """Raise ModelError when the base model's folder is missing; a Hub id is left to the Hub's client."""
    if model.name == "bundled" and not (bundled.FOLDER / "config.json").is_file():
        raise ModelError(f"the bundled base model is not in {bundled.FOLDER}; next: make setup (from the project's folder)")
    if (model.name.startswith((".", "/", "~")) or Path(model.name).is_dir()) and not (Path(model.name) / "config.json").is_file():
        raise ModelError(f"model.name: {model.name} holds no config.json; name a model's folder or a Hub id")


def check_checkpoint(folder: Path, model: ModelSection) -> str:
    """`adapter` or `model`, after looking that the folder is whole and fits the config's base model."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ModelError(f"checkpoint {folder}: no such folder; next: make train, or ls {folder.parent} to see what is there")
    adapter = (folder / "adapter_config.json").is_file() or (folder / "adapter_model.safetensors").is_file()
    missing = [name for name in (ADAPTER_FILES if adapter else MODEL_FILES) if not (folder / name).is_file()]
    if not adapter and not any(folder.glob("*.safetensors")):
        missing.append("model.safetensors")
    manifest = load_manifest(folder)
    if manifest:
        missing += [name for name in manifest["files"] if name not in missing and not (folder / name).is_file()]
    if missing:
        raise ModelError(f"checkpoint {folder}: incomplete, {', '.join(missing)} missing; use another checkpoint or train again")
    if adapter:
        _check_base(folder, model, manifest)
    return "adapter" if adapter else "model"


def _check_base(folder: Path, model: ModelSection, manifest: dict[str, Any] | None) -> None:
    try:
        trained_on = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"checkpoint {folder}: adapter_config.json is not readable ({error}); use another checkpoint") from None
    base = base_name(model)
    if trained_on != base:
        raise ModelError(f"checkpoint {folder}: trained on base model {trained_on}, but model.name is {base}; "
                         f"next: the profile it was trained with, or --set model.name={trained_on}")
    recorded = {parent["path"]: parent["sha256"] for parent in (manifest or {}).get("parents", [])}.get(base)
    if recorded and Path(base).is_dir() and recorded != hash_parent(Path(base)):
        raise ModelError(f"checkpoint {folder}: the base model in {base} is not the one that it was trained on "
                         "(other file hashes); restore it, or train again")
