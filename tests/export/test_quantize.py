"""quantize: names, llama.cpp's choice of types, and encoded rows that decode to what went in."""

from __future__ import annotations

import subprocess
import sys

import numpy
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from hypothesis import given, settings
from hypothesis import strategies as st

from emergency_kit.errors import ExportError
from emergency_kit.export.quantize import (BLOCK_WEIGHTS, QUANTIZATIONS, ModelShape, choose_type, count_bytes, encode_rows,
                                           list_quantizations, pick_quantizations)

MISTRAL = ModelShape(layers=32, heads=32, kv_heads=8, tied=False)
SMOLLM = ModelShape(layers=30, heads=9, kv_heads=3, tied=True)
# Largest error of a weight, as a part of the largest weight of its block (32 or 256 weights).
LARGEST_ERROR = {"F16": 0.0005, "BF16": 0.004, "Q8_0": 0.0045, "Q6_K": 0.02, "Q5_K": 0.06, "Q5_0": 0.0635, "Q5_1": 0.035,
                 "Q4_K": 0.1, "Q4_0": 0.127, "Q3_K": 0.25, "Q2_K": 0.45}


def list_shapes(layers: int, hidden: int, inner: int, kv: int, vocabulary: int, tied: bool) -> dict[str, tuple[int, int]]:
    shapes = {"token_embd.weight": (vocabulary, hidden)} | ({} if tied else {"output.weight": (vocabulary, hidden)})
    for layer in range(layers):
        parts = {"attn_q": (hidden, hidden), "attn_k": (kv, hidden), "attn_v": (kv, hidden), "attn_output": (hidden, hidden),
                 "ffn_gate": (inner, hidden), "ffn_up": (inner, hidden), "ffn_down": (hidden, inner)}
        shapes |= {f"blk.{layer}.{part}.weight": shape for part, shape in parts.items()}
    return shapes


def test_unknown_name_lists_the_valid_ones_and_the_nearest() -> None:
    with pytest.raises(ExportError) as error:
        pick_quantizations(["f16", "q4km"])
    assert "'q4km' is unknown; did you mean 'q4_k_m'?" in str(error.value)
    assert all(name in str(error.value) for name in QUANTIZATIONS)
    with pytest.raises(ExportError, match="'zzz' is unknown; valid are f32"):
        pick_quantizations(["zzz"])


def test_names_are_read_in_any_case_and_once() -> None:
    assert [item.name for item in pick_quantizations(["Q4_K_M", "f16", "q4-k-m"])] == ["q4_k_m", "f16"]


def test_table_lists_all_types_without_torch(capsys: pytest.CaptureFixture[str]) -> None:
    list_quantizations()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:1 + len(QUANTIZATIONS)]] == list(QUANTIZATIONS)
    code = ("import sys; from emergency_kit.export.quantize import list_quantizations; list_quantizations(); "
            "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'gguf', 'libgguf')))")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60).returncode == 0


@pytest.mark.parametrize("quantization", QUANTIZATIONS.values(), ids=lambda item: item.name)
def test_bits_per_weight_are_mistrals(quantization) -> None:
    shapes = list_shapes(32, 4096, 14336, 1024, 32000, tied=False)
    size = sum(count_bytes(choose_type(quantization, name, 2, shape[1], MISTRAL)[0], shape[0] * shape[1]) for name, shape in shapes.items())
    assert size * 8 / sum(rows * width for rows, width in shapes.values()) == pytest.approx(quantization.bits_per_weight, abs=0.01)


@pytest.mark.parametrize(("name", "tensor", "wanted"), [
    ("q4_k_m", "output.weight", "Q6_K"), ("q4_k_m", "token_embd.weight", "Q4_K"), ("q4_k_m", "blk.0.attn_q.weight", "Q4_K"),
    ("q4_k_m", "blk.0.attn_v.weight", "Q6_K"), ("q4_k_m", "blk.3.ffn_down.weight", "Q6_K"), ("q4_k_m", "blk.4.ffn_down.weight", "Q4_K"),
    ("q4_k_m", "blk.6.ffn_down.weight", "Q6_K"), ("q4_k_m", "blk.27.attn_v.weight", "Q6_K"),
    ("q4_k_m", "blk.28.attn_v.weight", "Q6_K"), ("q5_k_m", "blk.0.ffn_down.weight", "Q6_K"), ("q5_k_m", "blk.5.ffn_down.weight", "Q5_K"),
    ("q3_k_m", "blk.0.attn_v.weight", "Q5_K"), ("q3_k_m", "blk.2.attn_v.weight", "Q4_K"), ("q3_k_m", "blk.1.ffn_down.weight", "Q5_K"),
    ("q3_k_m", "blk.2.ffn_down.weight", "Q4_K"), ("q3_k_m", "blk.9.attn_output.weight", "Q4_K"), ("q3_k_m", "blk.9.ffn_up.weight", "Q3_K"),
    ("q2_k", "blk.9.attn_v.weight", "Q4_K"), ("q2_k", "blk.9.attn_output.weight", "Q3_K"), ("q2_k", "blk.9.ffn_down.weight", "Q3_K"),
    ("q4_0", "output.weight", "Q6_K"), ("q4_0", "token_embd.weight", "Q4_0"), ("q8_0", "output.weight", "Q8_0"),
    ("q6_k", "token_embd.weight", "Q6_K"), ("f16", "output.weight", "F16"), ("bf16", "blk.0.ffn_up.weight", "BF16")])
def test_policy_is_llama_cpps(name: str, tensor: str, wanted: str) -> None:
    assert choose_type(QUANTIZATIONS[name], tensor, 2, 4096, MISTRAL) == (wanted, False)


def test_norms_and_biases_stay_float32() -> None:
    assert choose_type(QUANTIZATIONS["q2_k"], "blk.0.attn_norm.weight", 1, 4096, MISTRAL) == ("F32", False)
    assert choose_type(QUANTIZATIONS["f16"], "blk.0.attn_q.bias", 1, 4096, MISTRAL) == ("F32", False)


def test_rows_of_576_fall_back_and_are_counted() -> None:
    shapes = list_shapes(30, 576, 1536, 192, 49152, tied=True)
    chosen = {name: choose_type(QUANTIZATIONS["q4_k_m"], name, 2, shape[1], SMOLLM) for name, shape in shapes.items()}
    assert sum(fell_back for _, fell_back in chosen.values()) == 180  # as llama-quantize counts on this model
    assert chosen["token_embd.weight"] == ("Q8_0", False)
    assert chosen["blk.5.attn_q.weight"] == ("Q5_0", True)
    assert chosen["blk.0.attn_v.weight"] == ("Q8_0", True)
    assert chosen["blk.0.ffn_down.weight"] == ("Q6_K", False)
    assert choose_type(QUANTIZATIONS["q4_0"], "blk.0.attn_q.weight", 2, 40, SMOLLM) == ("F16", True)
    assert choose_type(QUANTIZATIONS["q5_k_m"], "blk.9.attn_q.weight", 2, 576, SMOLLM) == ("Q5_1", True)
    assert choose_type(QUANTIZATIONS["q3_k_m"], "blk.9.attn_q.weight", 2, 576, SMOLLM) == ("Q4_0", True)


@pytest.mark.parametrize("tensor_type", LARGEST_ERROR)
@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**16), scale=st.sampled_from([0.02, 1.0]))
def test_encoded_rows_decode_close_to_the_original(tensor_type: str, seed: int, scale: float) -> None:
    rows = (numpy.random.default_rng(seed).standard_normal((4, 512)) * scale).astype(numpy.float32)
    encoded = encode_rows(rows, tensor_type, "blk.0.test.weight")
    assert encoded.nbytes == count_bytes(tensor_type, rows.size)
    decoded = dequantize(encoded, GGMLQuantizationType[tensor_type]).reshape(rows.shape)
    blocks = numpy.abs(rows).reshape(-1, min(256, max(32, BLOCK_WEIGHTS[tensor_type]))).max(axis=1)
    errors = numpy.abs(decoded - rows).reshape(len(blocks), -1).max(axis=1)
    assert (errors <= LARGEST_ERROR[tensor_type] * blocks + 1e-7).all(), (errors / blocks).max()


def test_float32_is_kept_exactly_and_bad_values_are_refused() -> None:
    rows = numpy.linspace(-1, 1, 256, dtype=numpy.float32).reshape(1, 256)
    assert (encode_rows(rows, "F32", "t") == rows).all()
    with pytest.raises(ExportError, match=r"tensor blk.1.attn_q.weight holds NaN"):
        encode_rows(numpy.where(rows > 0.9, numpy.nan, rows), "Q4_K", "blk.1.attn_q.weight")
    with pytest.raises(ExportError, match=r"7e\+04, too large for f16 \(65504\); use -q bf16"):
        encode_rows(rows * 7e4, "F16", "t")
