"""Backend: one way in to a base model, an adapter or a merged folder, whichever library loads it.

In: the `model` and `lora` sections of the config, or a folder. Out: `Loaded`, a model in evaluation mode with
its tokenizer. `hf_backend` uses transformers, PEFT and bitsandbytes; `unsloth_backend` is the only
file that imports Unsloth. What was picked, and why, is in `Loaded.notes` and printed by the caller.
"""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emergency_kit.artifacts import hash_parent, load_manifest, save_json
from emergency_kit.config import LoraSection, ModelSection
from emergency_kit.errors import ModelError
from emergency_kit.model import bundled

if TYPE_CHECKING:
    import torch

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "tokenizer_config.json")
MODEL_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json")


@dataclass
class Loaded:
    """A model ready for use. kind: `base`, `adapter`, `merged` or `full`; base: name or folder of the base model; first: the first values of
    adapters that do not begin at zero (see adapters.py)."""

    model: Any
    tokenizer: Any
    kind: str
    base: str
    notes: list[str] = field(default_factory=list)
    first: "dict[str, torch.Tensor] | None" = None


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
    return "flash_attention_2" if importlib.util.find_spec("flash_attn") else "sdpa"


def pick_backend(model: ModelSection, device: str, needs: str = "") -> tuple[str, str]:
    """`(backend, reason)`; raises ModelError when Unsloth is named but cannot be used. needs: what Unsloth is not asked for."""
    installed = importlib.util.find_spec("unsloth") is not None
    if model.backend == "unsloth" and (needs or not (installed and device == "cuda")):
        missing = "a CUDA GPU" if installed else "the package unsloth (pip install '.[gpu]')"
        raise ModelError(f"model.backend is unsloth, which {f'is not for {needs}' if needs else f'needs {missing}'}; next: --set model.backend=hf")
    if model.backend == "auto" and device == "cuda" and model.load_in_4bit:
        if needs:
            return "hf", f"unsloth is not for {needs}"
        return ("unsloth", "installed, with a CUDA GPU") if installed else ("hf", "unsloth is not installed")
    return model.backend if model.backend != "auto" else "hf", "by config" if model.backend != "auto" else f"device is {device}"


def load_for_training(model: ModelSection, lora: LoraSection, gradient_checkpointing: bool, seed: int, full: bool = False, needs: str = "",
                      first: "dict[str, torch.Tensor] | None" = None) -> Loaded:
    """The base model with float32 adapters on it, fresh or `lora.adapter`'s, in training mode; `full`: all its weights trained instead.

    needs: a reason to pass Unsloth by. first: the adapters' first values where a run with `lora.init` is gone on with.
    """
    device = pick_device(model)
    needs = needs or _beyond_plain(lora, full)
    backend, reason = pick_backend(model, device, needs)
    require_base(model)
    if lora.adapter and check_checkpoint(Path(lora.adapter), model) != "adapter":
        raise ModelError(f"lora.adapter {lora.adapter}: a full model, not an adapter; name it as model.name instead")
    if backend == "unsloth":
        from emergency_kit.model import unsloth_backend

        loaded = unsloth_backend.load_for_training(model, lora, device, gradient_checkpointing, seed)
    else:
        from emergency_kit.model import hf_backend

        loaded = hf_backend.load_for_training(model, lora, device, gradient_checkpointing, seed, full, first)
    loaded.notes.insert(0, f"backend {backend} ({reason}) on {device}; compute type: {explain_dtype(model, device)[1]}")
    return loaded


def _beyond_plain(lora: LoraSection, full: bool) -> str:
    """What is asked beyond plain LoRA, in words for the console; empty where nothing is."""
    wanted = {"full fine-tuning": full, "DoRA": lora.use_dora, f"lora.init {lora.init}": lora.init != "default", "lora.adapter": lora.adapter,
              "lora.modules_to_save": lora.modules_to_save, "all-linear": lora.target_modules == "all-linear"}
    return next((name for name, there in wanted.items() if there), "")


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
