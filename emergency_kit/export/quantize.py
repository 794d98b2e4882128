"""Which GGUF types there are, which tensor gets which, and how rows are encoded.

In: a type's name, a tensor's name and row width. Out: the tensor's type and its bytes. The choice
follows llama.cpp's `llama-quant.cpp` for dense models (no mixture of experts, no importance
matrix), so that a file equals what `llama-quantize` writes. Rows are encoded by libgguf, which
compiles ggml's own encoders. torch is never imported, and gguf and libgguf only to encode:
`emergency-kit export-gguf --list-quantizations` answers at once.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from emergency_kit.errors import ExportError

if TYPE_CHECKING:
    import numpy


@dataclass(frozen=True)
class Quantization:
    """A type of GGUF file.

    file_type: llama.cpp's number for it. tensor_type: what most weights get. bits_per_weight: of
    Mistral-7B by this policy; models with rows that are no multiple of 256 come out larger.
    """

    name: str
    file_type: int
    tensor_type: str
    bits_per_weight: float
    advice: str

    @property
    def exact(self) -> bool:
        """Whether weights are stored as floats, so that answers must equal the source model's."""
        return self.tensor_type in FLOATS


FLOATS = ("F32", "F16", "BF16")
QUANTIZATIONS = {item.name: item for item in (
    Quantization("f32", 0, "F32", 32.0, "for checking; twice the size of f16 for no better answers"),
    Quantization("f16", 1, "F16", 16.0, "the reference: answers equal the merged model's"),
    Quantization("bf16", 32, "BF16", 16.0, "for weights too large for f16; slow on old processors"),
    Quantization("q8_0", 7, "Q8_0", 8.5, "nearly lossless; best for models under one billion weights"),
    Quantization("q6_k", 18, "Q6_K", 6.56, "very close to q8_0, a quarter smaller"),
    Quantization("q5_k_m", 17, "Q5_K", 5.67, "good answers where q4_k_m is not quite enough"),
    Quantization("q4_k_m", 15, "Q4_K", 4.82, "the usual choice for 7B models on a laptop"),
    Quantization("q4_0", 2, "Q4_0", 4.54, "older 4-bit type; fast on ARM, less accurate than q4_k_m"),
    Quantization("q3_k_m", 12, "Q3_K", 3.89, "for little memory; evaluate before you ship it"),
    Quantization("q2_k", 10, "Q2_K", 3.00, "smallest; answers suffer visibly, not for emergencies"),
)}
# Weights in one block of a tensor type; a row must be a multiple of it.
BLOCK_WEIGHTS = {"F32": 1, "F16": 1, "BF16": 1, "Q4_0": 32, "Q5_0": 32, "Q5_1": 32, "Q8_0": 32,
                 "Q2_K": 256, "Q3_K": 256, "Q4_K": 256, "Q5_K": 256, "Q6_K": 256}
FALLBACKS = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}


@dataclass(frozen=True)
class ModelShape:
    """What the policy asks of a model: number of layers, attention heads, key/value heads, tied embeddings."""

    layers: int
    heads: int
    kv_heads: int
    tied: bool


def pick_quantizations(names: list[str]) -> list[Quantization]:
    """The types by name, each once, in the order given; raises ExportError for an unknown name."""
    picked: dict[str, Quantization] = {}
    for given in names:
        name = given.strip().lower().replace("-", "_")
        if name not in QUANTIZATIONS:
            close = difflib.get_close_matches(name, QUANTIZATIONS, n=1, cutoff=0.4)
            hint = f"; did you mean {close[0]!r}?" if close else ";"
            raise ExportError(f"quantization {given!r} is unknown{hint} valid are {', '.join(QUANTIZATIONS)}. "
                              "Next: emergency-kit export-gguf --list-quantizations")
        picked[name] = QUANTIZATIONS[name]
    return list(picked.values())


def list_quantizations() -> None:
    """Print the table of types: name, bits per weight, advice."""
    print(f"{'name':<8} {'bits/weight':>11}  advice")
    for item in QUANTIZATIONS.values():
        print(f"{item.name:<8} {item.bits_per_weight:>11.2f}  {item.advice}")
    print("Bits per weight are Mistral-7B's. The bundled 135M model has rows of 576 weights, which the _k types\n"
          "cannot pack; they fall back to wider types, so its files are larger (q4_k_m: about 6 bits per weight).")


def choose_type(quantization: Quantization, tensor: str, dimensions: int, row_weights: int, shape: ModelShape) -> tuple[str, bool]:
    """`(tensor type, fell back)` of one tensor.

    tensor: its GGUF name; row_weights: its last dimension. Fell back says that rows of this width do
    not fit the type that the policy wants, as llama.cpp counts it.
    """
    if dimensions < 2:
        return "F32", False
    if quantization.exact:
        return quantization.tensor_type, False
    wanted = _wanted_type(quantization, tensor, row_weights, shape)
    if row_weights % BLOCK_WEIGHTS[wanted] == 0:
        return wanted, False
    narrower = FALLBACKS.get(wanted, wanted)
    return (narrower if row_weights % BLOCK_WEIGHTS[narrower] == 0 else "F16"), True


def _wanted_type(quantization: Quantization, tensor: str, row_weights: int, shape: ModelShape) -> str:
    """llama_tensor_get_type_impl of llama-quant.cpp, for the types of QUANTIZATIONS."""
    name, default = quantization.name, quantization.tensor_type
    if tensor == "output.weight" or (shape.tied and tensor == "token_embd.weight"):
        if row_weights % BLOCK_WEIGHTS[default]:
            return "Q8_0"
        return default if default == "Q8_0" else "Q6_K"
    if not tensor.startswith("blk."):
        return default
    layer, part = int(tensor.split(".")[1]), tensor.split(".")[2]
    more_bits = layer < shape.layers // 8 or layer >= 7 * shape.layers // 8 or (layer - shape.layers // 8) % 3 == 2
    wanted = default
    if part == "attn_v":
        wanted = {"q2_k": "Q4_K" if shape.heads // shape.kv_heads >= 4 else "Q3_K",
                  "q3_k_m": "Q5_K" if layer < 2 else "Q4_K"}.get(name, default)
        if name in ("q4_k_m", "q5_k_m") and more_bits:
            wanted = "Q6_K"
        if shape.layers == 80 and shape.heads != shape.kv_heads and wanted in ("Q3_K", "Q4_K"):  # 70B: small and shared by 8 heads
            wanted = "Q5_K"
    elif part == "ffn_down":
        wanted = {"q2_k": "Q3_K", "q3_k_m": "Q5_K" if layer < shape.layers // 16 else "Q4_K"}.get(name, default)
        if name in ("q4_k_m", "q5_k_m") and more_bits:
            wanted = "Q6_K"
    elif part == "attn_output":
        wanted = {"q2_k": "Q3_K", "q3_k_m": "Q4_K"}.get(name, default)
    return wanted


def count_bytes(tensor_type: str, weights: int) -> int:
    """Bytes of a tensor of that many weights in whole blocks."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[tensor_type]]
    return weights // block * size


def encode_rows(rows: "numpy.ndarray", tensor_type: str, tensor: str) -> "numpy.ndarray":
    """Encode a float32 array [..., row weights] as bytes of a tensor type; floats keep their shape.

    Raises ExportError where a value is NaN, infinite or, for F16, over 65504.
    """
    import numpy

    rows = numpy.ascontiguousarray(rows, dtype=numpy.float32)
    if not numpy.isfinite(rows).all():
        raise ExportError(f"tensor {tensor} holds NaN or infinite weights; train again, or use an earlier checkpoint")
    if tensor_type == "F32":
        return rows
    if tensor_type == "F16":
        with numpy.errstate(over="ignore"):
            halves = rows.astype(numpy.float16)
        if not numpy.isfinite(halves).all():
            raise ExportError(f"tensor {tensor} holds a weight of {numpy.abs(rows).max():.3g}, too large for f16 (65504); use -q bf16")
        return halves
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize

    if tensor_type == "BF16":
        return quantize(rows, GGMLQuantizationType.BF16)
    import libgguf

    return libgguf.quantize_rows(rows.reshape(-1, rows.shape[-1]), int(GGMLQuantizationType[tensor_type]))
