"""Architectures: how a transformers model is laid out in a GGUF file.

In: a model of the Llama, Mistral, Qwen2 or Qwen3 family (or its skeleton without weights). Out: tensors
under llama.cpp's names in llama.cpp's order of rows, and the metadata that describes them. Dense
models only. Anything that llama.cpp would compute differently is an ExportError, never a guess.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from emergency_kit.errors import ExportError
from emergency_kit.export.quantize import ModelShape

if TYPE_CHECKING:
    import numpy
    from gguf import GGUFWriter


@dataclass(frozen=True)
class Family:
    """llama.cpp's name of an architecture, and whether its rotary embedding wants Q and K rows interleaved."""

    name: str
    permuted: bool


FAMILIES = {"llama": Family("llama", True), "mistral": Family("llama", True),
            "qwen2": Family("qwen2", False), "qwen3": Family("qwen3", False)}
_TOP = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight", "lm_head.weight": "output.weight"}
_LAYER = {"input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
          "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
          "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
_LAYER_NAME = re.compile(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)")


def pick_family(config: Any, source: str) -> Family:
    """The family of a transformers config; raises ExportError for one that the exporter does not know."""
    kind = config.model_type
    if kind not in FAMILIES:
        raise ExportError(f"model {source}: architecture {kind!r} is not one that the GGUF exporter knows ({', '.join(FAMILIES)}). "
                          "Next: convert the merged folder with llama.cpp's own convert_hf_to_gguf.py")
    if config.hidden_act != "silu":
        raise ExportError(f"model {source}: hidden_act is {config.hidden_act!r}; llama.cpp's {kind} computes silu only")
    if getattr(config, "use_sliding_window", False):
        raise ExportError(f"model {source}: use_sliding_window is on, which llama.cpp's {kind} does not compute; export another model")
    kind_of_rope = rope_of(config).get("rope_type", "default")
    if kind_of_rope not in ("default", "linear", "llama3"):
        raise ExportError(f"model {source}: rotary embedding {kind_of_rope!r} is not supported (default, linear, llama3). "
                          "Next: convert the merged folder with llama.cpp's own convert_hf_to_gguf.py")
    return FAMILIES[kind]


def rope_of(config: Any) -> dict[str, Any]:
    """Settings of the rotary embedding: rope_theta, rope_type and what that type needs."""
    return dict(config.rope_parameters)


def shape_of(config: Any) -> ModelShape:
    """What the quantisation policy asks of a model."""
    return ModelShape(config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads, bool(config.tie_word_embeddings))


def head_weights(config: Any) -> int:
    """Width of one attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


@dataclass(frozen=True)
class Place:
    """A tensor's GGUF name, its name in transformers, and its shape as both have it."""

    gguf: str
    name: str
    shape: tuple[int, ...]

    @property
    def weights(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)


def list_tensors(model: Any, source: str) -> list[Place]:
    """Every tensor in the order of the file; tied output weights once. model: may be a skeleton.

    Raises ExportError for a tensor that has no place in a GGUF file of this family.
    """
    places = []
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        gguf = gguf_name(name)
        if gguf is None:
            raise ExportError(f"model {source}: tensor {name} has no place in a GGUF file of {model.config.model_type}; "
                              "convert the merged folder with llama.cpp's own convert_hf_to_gguf.py")
        places.append(Place(gguf, name, tuple(tensor.shape)))
    return places


def gguf_name(name: str) -> str | None:
    """llama.cpp's name of a transformers tensor, None where it has none."""
    match = _LAYER_NAME.fullmatch(name)
    if match and match.group(2) in _LAYER:
        return f"blk.{match.group(1)}.{_LAYER[match.group(2)]}.{match.group(3)}"
    return _TOP.get(name)


def is_reordered(gguf: str, family: Family) -> bool:
    """Whether the rows of a tensor stand in another order in the file; gguf: its name there."""
    return family.permuted and gguf.startswith("blk.") and gguf.split(".")[2] in ("attn_q", "attn_k")


def reorder_rows(name: str, rows: "numpy.ndarray", config: Any, family: Family) -> "numpy.ndarray":
    """Whole heads' rows of Q and K from transformers' rotary order (halves) to llama.cpp's (pairs); others unchanged."""
    if not is_reordered(name, family):
        return rows
    halves = rows.reshape(-1, 2, head_weights(config) // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def build_rope_factors(config: Any) -> "numpy.ndarray | None":
    """Llama 3's frequency factors, float32 [head width / 2], or None.

    By Meta's `apply_scaling`: low frequencies are stretched by `factor`, high ones left, between them a ramp.
    """
    rope = rope_of(config)
    if rope.get("rope_type") != "llama3":
        return None
    import numpy

    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    original = rope["original_max_position_embeddings"]
    width = head_weights(config)
    waves = 2 * math.pi * rope["rope_theta"] ** (numpy.arange(0, width, 2, dtype=numpy.float64) / width)
    ramp = numpy.clip((original / waves - low) / (high - low), 0, 1)
    return (1 / ((1 - ramp) / rope["factor"] + ramp)).astype(numpy.float32)


def add_metadata(writer: "GGUFWriter", config: Any, family: Family, name: str, license_id: str | None) -> int:
    """Describe the model in a GGUF file; returns the context length in tokens."""
    rope, width = rope_of(config), head_weights(config)
    context = config.max_position_embeddings
    if getattr(config, "sliding_window", None) and config.model_type == "mistral":
        context = min(context, config.sliding_window)  # beyond it transformers forgets and llama.cpp does not
    writer.add_type("model")
    writer.add_name(name)
    if license_id:
        writer.add_license(license_id)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(context)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_rope_dimension_count(width)
    if width * config.num_attention_heads != config.hidden_size or family.name == "qwen3":
        writer.add_key_length(width)
        writer.add_value_length(width)
    if rope.get("rope_type") == "linear":
        from gguf import RopeScalingType

        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    return context
