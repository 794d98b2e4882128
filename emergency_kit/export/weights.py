"""Weights: a model's tensors from the disk, a block of rows at a time, an adapter added on the way.

In: a folder of safetensors files (or a Hub id), and perhaps a LoRA adapter's folder. Out: float32 rows. Nothing
is kept: a file is opened for one block and closed, so that what the process holds is the block alone,
however large the model is. Limits: plain LoRA (no DoRA, no trained biases or embeddings); other
adapters are merged by PEFT first (`emergency-kit merge`).
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from emergency_kit.errors import ExportError, ModelError
from emergency_kit.model import hub

if TYPE_CHECKING:
    import numpy
    import torch

# Weights in one block: 4 MB in float32. Larger blocks are no faster to encode, and each thread that writes a file holds one.
BLOCK_WEIGHTS = 1_048_576
_FACTOR = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")


@dataclass(frozen=True)
class Weights:
    """Where every tensor of a model lies. files: tensor name to file; adapter: added to the weights, or None."""

    source: str
    files: dict[str, Path]
    adapter: "Adapter | None" = None

    def read(self, name: str, start: int = 0, stop: int | None = None) -> "torch.Tensor":
        """Rows `start` to `stop` of a tensor in float32; raises ModelError where it is missing or not of a float type."""
        import torch
        from safetensors import SafetensorError, safe_open

        self._require(name)
        try:
            with safe_open(self.files[name], framework="pt") as file:
                rows = file.get_slice(name)[start:stop]
        except (SafetensorError, OSError) as error:
            raise ModelError(f"model {self.source}: {self.files[name].name} is not readable ({error}); restore the file") from None
        if rows.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise ModelError(f"model {self.source}: tensor {name} is stored as {rows.dtype}; name the full-precision model, not a quantised one")
        rows = rows.to(torch.float32)
        return self.adapter.add(name, rows, start) if self.adapter else rows

    def check(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """Raise ModelError where a tensor is missing or has another shape than the config gives it."""
        from safetensors import safe_open

        for name in shapes:
            self._require(name)
        for path in sorted(set(self.files.values())):
            with safe_open(path, framework="pt") as file:
                for name in set(file.keys()) & shapes.keys():
                    found = tuple(file.get_slice(name).get_shape())
                    if found != shapes[name]:
                        raise ModelError(f"model {self.source}: tensor {name} has shape {found} in {path.name}, but config.json makes it "
                                         f"{shapes[name]}; they do not belong together")

    def _require(self, name: str) -> None:
        if name not in self.files:
            raise ModelError(f"model {self.source}: tensor {name} is in none of its safetensors files; the folder is incomplete")

    def block(self, name: str, rows: range) -> "numpy.ndarray":
        """Some rows of a tensor as a float32 array."""
        return self.read(name, rows.start, rows.stop).numpy()


def cut_rows(shape: tuple[int, ...], together: int = 1) -> list[range]:
    """A tensor's rows in blocks of about BLOCK_WEIGHTS, in order; `together` rows are never parted."""
    rows = together * max(1, BLOCK_WEIGHTS // max(1, together * math.prod(shape[1:])))
    return [range(start, min(start + rows, shape[0])) for start in range(0, shape[0], rows)]


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter. factors: name of the base's tensor to (A [rank, in], B [out, rank]), float32; scale: what their product is multiplied by."""

    folder: Path
    factors: dict[str, tuple["torch.Tensor", "torch.Tensor"]]
    scale: float
    rank: int

    def add(self, name: str, rows: "torch.Tensor", start: int) -> "torch.Tensor":
        """`rows` of a tensor, the first of them its row `start`, plus the adapter's part of them."""
        if name not in self.factors:
            return rows
        down, up = self.factors[name]
        return rows.addmm(up[start:start + len(rows)], down, alpha=self.scale)


def load_weights(name: str, revision: str | None = None, adapter: Path | None = None) -> Weights:
    """Find the tensors of a folder or Hub id; raises ModelError where there are no safetensors files."""
    folder = Path(name)
    if not folder.is_dir():
        folder = _download(name, revision)
    files: dict[str, Path] = {}
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        except (ValueError, KeyError) as error:
            raise ModelError(f"model {name}: {index.name} is not readable ({error}); restore the file") from None
        files = {tensor: folder / file for tensor, file in listed.items()}
    else:
        from safetensors import SafetensorError, safe_open

        for path in sorted(folder.glob("*.safetensors")):
            try:
                with safe_open(path, framework="pt") as file:
                    files |= {tensor: path for tensor in file.keys()}
            except (SafetensorError, OSError) as error:
                raise ModelError(f"model {name}: {path.name} is not readable ({error}); restore the file") from None
    if not files:
        raise ModelError(f"model {name}: no safetensors files; save it with transformers' save_pretrained first")
    weights = Weights(name, files, load_adapter(adapter) if adapter else None)
    for tensor in weights.adapter.factors if weights.adapter else ():
        if tensor not in files:
            raise ExportError(f"checkpoint {adapter}: its adapter changes {tensor}, which the base model {name} does not have; "
                              "they do not belong together")
    return weights


def load_adapter(folder: Path) -> Adapter:
    """Read a plain LoRA adapter; raises ExportError for one that is more than that, ModelError for a broken one."""
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        tensors = load_file(folder / "adapter_model.safetensors")
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(f"checkpoint {folder}: its adapter is not readable ({error}); use another checkpoint or train again") from None
    more = [key for key in ("use_dora", "modules_to_save", "rank_pattern", "alpha_pattern", "fan_in_fan_out", "trainable_token_indices",
                            "target_parameters", "layer_replication") if config.get(key)]
    more += ["bias"] if config.get("bias", "none") != "none" else []
    more += [name for name in tensors if not _FACTOR.fullmatch(name)][:1]
    if config.get("peft_type") != "LORA" or more:
        raise ExportError(f"checkpoint {folder}: not a plain LoRA adapter ({', '.join(more) or config.get('peft_type')}); "
                          "next: make merge, then export the merged folder")
    found: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        module, factor = _FACTOR.fullmatch(name).groups()  # type: ignore[union-attr]
        if not torch.isfinite(tensor).all():
            raise ExportError(f"checkpoint {folder}: {name} holds NaN or infinite weights; the training run diverged or the file is damaged. "
                              "Use an earlier checkpoint or train again")
        found.setdefault(f"{module}.weight", {})[factor] = tensor.float()
    lonely = next((name for name, pair in found.items() if set(pair) != {"A", "B"}), None)
    if lonely or not found:
        raise ModelError(f"checkpoint {folder}: its adapter {f'holds one factor of {lonely} only' if lonely else 'is empty'}; train again")
    rank, alpha = config["r"], config["lora_alpha"]
    scale = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    return Adapter(folder, {name: (pair["A"], pair["B"]) for name, pair in found.items()}, scale, rank)


def _download(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    with hub.cache_where_unreachable(True):
        try:
            folder = Path(snapshot_download(name, revision=revision, allow_patterns=["*.safetensors", "*.json"]))
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
            raise ModelError(hub.explain(error, f"model {name}", name, revision)) from None
    hub.require_whole(folder)
    return folder
