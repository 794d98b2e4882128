"""Merge: fold a LoRA adapter into its base model, and prove that no answer changed.

In: an adapter checkpoint and the base model that it was trained on, or a model that was trained in full, which is written out as it
is (in `export.merge_dtype`). Out: a full model's folder,
`<output_dir>/merged/<checkpoint name>/`, whole or not at all, that transformers loads without PEFT.
The proof: logits of real prompts from the folder as it stands on the disk, against base plus adapter.
Works on the CPU in float32: 4 bytes a weight in memory. Run: `emergency-kit merge`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from emergency_kit.artifacts import load_manifest, save_manifest
from emergency_kit.config import ModelSection, Resolved
from emergency_kit.errors import ExportError, ModelError
from emergency_kit.export import parity
from emergency_kit.export.progress import report_while
from emergency_kit.files import check_writable, staged_folder
from emergency_kit.model import backend, hf_backend

SLACK_BYTES = 64_000_000
# A disk with FAT takes such a file, and several are hashed side by side.
SHARD = "4GB"


@dataclass
class Merged:
    """A merged model in float32 on the CPU.

    logits: what base plus adapter said, one [positions, vocabulary] tensor a prompt.
    difference: largest distance of a logit of `model` from them.
    """

    model: Any
    tokenizer: Any
    prompts: list[str]
    logits: list[torch.Tensor]
    difference: float


def merge(resolved: Resolved, checkpoint: Path | None = None, out: Path | None = None, overwrite: bool = False) -> Path:
    """Merge an adapter into its base model and return the folder of the merged model.

    checkpoint: adapter folder, by default the finished model of the config. out: by default
    `<output_dir>/merged/<checkpoint name>`. Raises ExportError when the checkpoint is no adapter, when
    `out` exists and `overwrite` is not set, when a weight is not finite, or when a logit moved by
    `export.merge_max_logit_difference` or more; ModelError when the checkpoint or the base is broken.
    """
    training, section = resolved.config.training, on_cpu(resolved.config.model)
    checkpoint = Path(checkpoint or resolved.finished_model)
    out = Path(out or Path(training.output_dir) / "merged" / checkpoint.resolve().name)
    full = backend.check_checkpoint(checkpoint, section) != "adapter"
    if full and backend.kind_of(load_manifest(checkpoint)) != "full":
        raise ExportError(f"checkpoint {checkpoint}: already a full model; nothing to merge. "
                          f"Next: make export-gguf ARGS=\"--checkpoint {checkpoint}\"")
    _check_out(out, checkpoint, overwrite)
    base = backend.base_name(section)
    if not full:
        backend.require_base(section)
    skeleton = load_skeleton(str(checkpoint) if full else base, section)
    dtype = _pick_dtype(resolved.config.export.merge_dtype, skeleton.config)
    weights = sum(parameter.numel() for parameter in skeleton.parameters())
    check_writable(out.parent, weights * dtype.itemsize + SLACK_BYTES, remedy="choose another with --output")
    what = f"{checkpoint} is a full model, so there is nothing to merge; it is written out" if full else f"Merging {checkpoint} into {base}"
    print(f"{what}: {weights / 1e6:.1f} million weights, float32 on the CPU, saved as {_name(dtype)}", flush=True)

    merged = load_merged(resolved, checkpoint)
    with staged_folder(out) as folder:
        _save(merged, folder, dtype, base)
        merged.model = None
        difference = _prove_saved(merged, folder, section, resolved, dtype)
        positions = sum(len(logits) for logits in merged.logits)
        measured = {"max_abs_logit_difference": difference, "prompts": len(merged.prompts), "positions": positions, "dtype": _name(dtype)}
        save_manifest(folder, "merge", resolved, parents=[checkpoint, Path(base)], extra={"merge": measured})
    print(f"Proved on {len(merged.prompts)} prompts, {positions} positions: largest logit difference {difference:.1e} "
          f"(limit {resolved.config.export.merge_max_logit_difference:g})")
    print(f"Merged model: {out}")
    print("Next: make export-gguf", flush=True)
    return out


def load_merged(resolved: Resolved, checkpoint: Path) -> Merged:
    """Base plus adapter, merged in memory and compared with the two apart.

    Raises ExportError when a weight is NaN or infinite, or when merging moved a logit by
    `export.merge_max_logit_difference` or more.
    """
    _check_finite(checkpoint)
    with report_while(f"loading {checkpoint}"):
        loaded = backend.load_checkpoint(on_cpu(resolved.config.model), checkpoint, dtype=torch.float32)
    prompts = parity.build_prompts(resolved, loaded.tokenizer)
    with report_while(f"asking {'base plus adapter' if loaded.kind == 'adapter' else 'the model'}"):
        logits = parity.compute_logits(loaded.model, loaded.tokenizer, prompts)
    if loaded.kind != "adapter":
        return Merged(loaded.model, loaded.tokenizer, prompts, logits, 0.0)
    with report_while("merging"):
        try:
            model = loaded.model.merge_and_unload(safe_merge=True)
        except ValueError as error:
            raise ExportError(f"checkpoint {checkpoint}: cannot be merged ({error}); use another checkpoint or train again") from None
        difference = parity.measure_difference(logits, parity.compute_logits(model, loaded.tokenizer, prompts))
    _check_difference(difference, resolved, "merging in memory", "train again, or report this with --debug")
    return Merged(model, loaded.tokenizer, prompts, logits, difference)


def on_cpu(section: ModelSection) -> ModelSection:
    """The same base model, loaded on the CPU: a merged 7B model in float32 is too large for most GPUs."""
    return section.model_copy(update={"device": "cpu", "attn_implementation": "auto", "load_in_4bit": False})


def load_skeleton(name: str, section: ModelSection) -> Any:
    """A model without weights (all on torch's meta device), to know names, shapes and sizes beforehand."""
    from transformers import AutoConfig, AutoModelForCausalLM

    revision = None if Path(name).is_dir() else section.revision
    try:
        config = AutoConfig.from_pretrained(name, revision=revision)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise ModelError(f"model {name}: its config.json cannot be used ({reason}); check model.name, the folder or the network") from None


def _check_out(out: Path, checkpoint: Path, overwrite: bool) -> None:
    there, source = out.resolve(), checkpoint.resolve()
    if there == source or there in source.parents:
        raise ExportError(f"output {out}: holds the checkpoint that is merged; choose another with --output")
    if out.is_file():
        raise ExportError(f"output {out}: is a file; choose a folder with --output")
    if not out.is_dir() or not any(out.iterdir()):
        return
    if not overwrite:
        raise ExportError(f"output {out}: already there; replace it with --overwrite, or choose another with --output")
    manifest = load_manifest(out)
    if manifest is None or manifest.get("stage") != "merge":
        raise ExportError(f"output {out}: --overwrite replaces a merged model only, and this folder was not written by merge; "
                          "choose another with --output, or remove it yourself")


def _pick_dtype(wanted: str, config: Any) -> torch.dtype:
    """The config's type, or for `auto` the one that the base model's files record."""
    if wanted != "auto":
        return getattr(torch, wanted)
    return config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32


def _check_finite(checkpoint: Path) -> None:
    """Raise ExportError on NaN or infinity in what was trained, ModelError where a file is no safetensors file."""
    from safetensors import SafetensorError, safe_open

    for path in sorted(checkpoint.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as tensors:
                for name in tensors.keys():
                    values = tensors.get_tensor(name)
                    bad = int((~torch.isfinite(values)).sum())
                    if bad:
                        raise ExportError(f"checkpoint {checkpoint}: {bad} of {values.numel()} weights of {name} are NaN or infinite; "
                                          "the training run diverged or the file is damaged. Use an earlier checkpoint or train again")
        except (SafetensorError, OSError) as error:
            raise ModelError(f"checkpoint {checkpoint}: {path.name} is not readable ({error}); use another checkpoint or train again") from None


def _save(merged: Merged, folder: Path, dtype: torch.dtype, base: str) -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()
    with report_while("saving"):
        merged.model.config._name_or_path = Path(base).name if Path(base).is_dir() else base
        merged.model.to(dtype).save_pretrained(folder, max_shard_size=SHARD)
        backend.save_tokenizer(merged.tokenizer, folder)
    logging.enable_progress_bar()


def _prove_saved(merged: Merged, folder: Path, section: ModelSection, resolved: Resolved, dtype: torch.dtype) -> float:
    """Load what was written, in float32, and measure it against base plus adapter."""
    with report_while("reading the merged model back"):
        saved = hf_backend.load_model(str(folder), section, torch.float32, kind="merged")
        for prompt in merged.prompts:
            if parity.tokenize(saved.tokenizer, prompt) != parity.tokenize(merged.tokenizer, prompt):
                raise ExportError(f"the merged model's tokenizer, read back from the disk, splits a prompt differently ({prompt[:80]!r}); "
                                  "nothing was kept. Report it: the installed transformers does not save this tokenizer faithfully")
        difference = parity.measure_difference(merged.logits, parity.compute_logits(saved.model, saved.tokenizer, merged.prompts))
    remedy = "train again, or report this with --debug"
    if dtype != torch.float32:
        remedy = (f"{_name(dtype)} rounds the weights: --set export.merge_dtype=float32, "
                  f"or allow it with --set export.merge_max_logit_difference={difference * 1.5:.1g}")
    _check_difference(difference, resolved, f"saving as {_name(dtype)}", remedy)
    return difference


def _check_difference(difference: float, resolved: Resolved, where: str, remedy: str) -> None:
    limit = resolved.config.export.merge_max_logit_difference
    if not difference < limit:  # also true for NaN
        raise ExportError(f"{where} moved a logit by {difference:.3g}; the limit export.merge_max_logit_difference is {limit:g}; "
                          f"nothing was kept. Next: {remedy}")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
