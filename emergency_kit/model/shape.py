"""Shape of a model without its weights: what a plan of memory and time needs to know.

In: `model` of the config. Out: `Shape`, from the folder's config.json and its safetensors headers, from what the Hub's client has
in its cache, from the table below, or from the Hub (config.json alone, a kilobyte). Limits: decoders of the Llama kind (gated MLP,
rotary attention, one embedding and one head); others raise ModelError. No torch, no weights.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emergency_kit.config import ModelSection
from emergency_kit.errors import ModelError
from emergency_kit.model import bundled, hub

# NF4 with double quantisation, bytes a weight (Dettmers et al. 2023, "QLoRA", section 3).
NF4_BYTES = (4 + 8 / 64 + 32 / (64 * 256)) / 8

_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
# config.json of models that a plan is made for where the Hub cannot be reached; from the models' own pages.
_MISTRAL = {"model_type": "mistral", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
            "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 32000, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "sliding_window": None}
KNOWN = {"mistral-7b-instruct-v0.2": _MISTRAL, "mistral-7b-instruct-v0.3": _MISTRAL | {"vocab_size": 32768}}


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder. key_heads: heads of keys and values; width: of a head; file_bytes, file_type_bytes: of its weights on disk."""

    family: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_heads: int
    width: int
    vocabulary: int
    tied: bool
    slides: bool
    file_bytes: int
    file_type_bytes: int
    source: str

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """`{name: (inputs, outputs)}` of the linear modules of one layer."""
        queries, keys = self.heads * self.width, self.key_heads * self.width
        return {"q_proj": (self.hidden, queries), "k_proj": (self.hidden, keys), "v_proj": (self.hidden, keys), "o_proj": (queries, self.hidden),
                "gate_proj": (self.hidden, self.intermediate), "up_proj": (self.hidden, self.intermediate), "down_proj": (self.intermediate, self.hidden)}

    @property
    def linear_parameters(self) -> int:
        """Weights of the linear modules of all layers."""
        return self.layers * sum(inputs * outputs for inputs, outputs in self.linears.values())

    @property
    def other_parameters(self) -> int:
        """Embedding, head where it is not the embedding, and norms."""
        return self.vocabulary * self.hidden * (1 if self.tied else 2) + (2 * self.layers + 1) * self.hidden

    @property
    def parameters(self) -> int:
        return self.linear_parameters + self.other_parameters

    def weight_bytes(self, four_bit: bool, compute_bytes: int = 2) -> float:
        """Of the frozen base as training loads it. compute_bytes: of a weight in the compute type, which embedding, head and norms keep in 4-bit, too."""
        return self.linear_parameters * NF4_BYTES + self.other_parameters * compute_bytes if four_bit else float(self.parameters * compute_bytes)


def load_shape(model: ModelSection) -> Shape:
    """The shape of the config's base model. Raises ModelError where nothing tells it, or the model is of another kind."""
    name = str(bundled.FOLDER) if model.name == "bundled" else model.name
    folder = Path(name)
    if folder.is_dir():
        sizes = [_header_bytes(file) for file in sorted(folder.glob("*.safetensors"))]
        found = [size for size in sizes if size[0]]
        return _read(_json(folder / "config.json"), name, sum(size for size, _ in found), max((width for _, width in found), default=0))
    return _read(*_of_hub(name, model.revision), 0, 0)


def _of_hub(name: str, revision: str | None) -> tuple[dict[str, Any], str]:
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError

    cached = try_to_load_from_cache(name, "config.json", revision=revision)
    if isinstance(cached, str):
        return _json(Path(cached)), f"{name} (cached)"
    known = KNOWN.get(name.rpartition("/")[2].lower())
    if known:
        return known, f"{name} (known shape)"
    with hub.cache_where_unreachable(True):
        try:
            return _json(Path(hf_hub_download(name, "config.json", revision=revision))), name
        except (OSError, ValueError, EntryNotFoundError) as error:
            raise ModelError(hub.explain(error, f"config.json of {name}", name, revision, otherwise=f"or one of {', '.join(KNOWN)}")) from None


def _read(config: dict[str, Any], source: str, file_bytes: int, type_bytes: int) -> Shape:
    try:
        heads, hidden = int(config["num_attention_heads"]), int(config["hidden_size"])
        shape = Shape(
            family=str(config["model_type"]), hidden=hidden, intermediate=int(config["intermediate_size"]), layers=int(config["num_hidden_layers"]),
            heads=heads, key_heads=int(config.get("num_key_value_heads") or heads), width=int(config.get("head_dim") or hidden // heads),
            vocabulary=int(config["vocab_size"]), tied=bool(config.get("tie_word_embeddings", False)),
            slides=bool(config.get("sliding_window") and config.get("use_sliding_window", True)), file_bytes=file_bytes, file_type_bytes=type_bytes, source=source)
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"model {source}: config.json does not tell the shape of a Llama-like decoder ({error}); a plan can be made for those alone") from None
    if file_bytes:
        return shape
    type_bytes = 4 if str(config.get("dtype") or config.get("torch_dtype")) == "float32" else 2
    return Shape(**{**shape.__dict__, "file_bytes": shape.parameters * type_bytes, "file_type_bytes": type_bytes})


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read ({error}); name a model's folder or a Hub id") from None


def _header_bytes(file: Path) -> tuple[int, int]:
    """`(bytes of all tensors, widest type in bytes)` by a safetensors file's header: 8 bytes of length, then JSON."""
    try:
        with file.open("rb") as stream:
            length = struct.unpack("<Q", stream.read(8))[0]
            if length > min(file.stat().st_size, 100_000_000):
                raise ValueError("its header is longer than the file")
            tensors = [entry for name, entry in json.loads(stream.read(length)).items() if name != "__metadata__"]
        return (sum(entry["data_offsets"][1] - entry["data_offsets"][0] for entry in tensors), max((_BYTES.get(entry["dtype"], 1) for entry in tensors), default=0))
    except (OSError, ValueError, KeyError, TypeError, struct.error) as error:
        raise ModelError(f"{file}: not a safetensors file ({error}); restore it") from None
