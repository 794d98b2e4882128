"""What only a GPU shows: flash attention and 4-bit weights in the fused step, beside transformers' modules. Skipped where there is none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import BitsAndBytesConfig, MistralConfig, MistralForCausalLM

from emergency_kit.training.fit import keep_layers
from emergency_kit.training.fused import elementwise
from emergency_kit.training.fused.layer import Buffers
from emergency_kit.training.fused.step import FusedStep, unsupported
from emergency_kit.training.fused.tree import Row
from tests.training.test_fused import EVERYTHING, make_rows, naive

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU is here")
SHAPE = {"vocab_size": 97, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64,
         "sliding_window": None, "max_position_embeddings": 2048}
ROWS = make_rows((23, 11, 0), (31, 20, 1), (9, 8, 1), (17, 4, 2), (400, 150, 0), (700, 300, 0))


def load(folder: Path, four_bit: bool, dtype: torch.dtype) -> Any:
    options: dict[str, Any] = {}
    if four_bit:
        options["quantization_config"] = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype)
    model = MistralForCausalLM.from_pretrained(folder, dtype=dtype, device_map={"": 0}, attn_implementation="sdpa", **options)
    torch.manual_seed(0)
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=EVERYTHING, task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.05)
    return model.train()


def on_gpu(rows: list[Row], model: Any) -> tuple[float, dict[str, torch.Tensor]]:
    """`naive`, whose rows are on a CPU, with the model's inputs moved."""
    forward = model.forward
    model.forward = lambda input_ids: forward(input_ids=input_ids.cuda())
    try:
        with torch.autocast("cuda", torch.bfloat16, enabled=model.dtype == torch.bfloat16):
            return naive(model, rows)
    finally:
        model.forward = forward


def distance(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Relative error over all gradients together."""
    off = sum(float((found[name].float() - value.float()).square().sum()) for name, value in expected.items())
    return (off / sum(float(value.float().square().sum()) for value in expected.values())) ** 0.5


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("four_bit", [False, True], ids=["bfloat16", "NF4"])
def test_flash_attention_stays_within_the_noise_of_bfloat16(tmp_path: Path, four_bit: bool, recompute: bool) -> None:
    MistralForCausalLM(MistralConfig(**SHAPE)).save_pretrained(tmp_path)
    reference = on_gpu(ROWS, load(tmp_path, four_bit, torch.float32))
    model = load(tmp_path, four_bit, torch.bfloat16)
    modules = on_gpu(ROWS, model)
    assert unsupported(model) is None
    step = FusedStep(model.get_base_model(), 2, recompute=recompute, row_tokens=1000)
    assert step.flash and not step.share
    loss = step(ROWS, None)
    loss.backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(step.last_plan.passes) == 1  # all rows fill the place of two of 1,000 tokens
    assert float(loss.detach()) == pytest.approx(reference[0], rel=2e-3)
    assert distance(found, reference[1]) < 1.5 * distance(modules[1], reference[1]) + 2e-3 < 0.2


@pytest.mark.parametrize("name", ["norm", "norm gradient", "rotate", "rotate back", "swiglu", "swiglu gradient", "mask", "add masked"])
@pytest.mark.parametrize("width", [96, 1500, 4096])
def test_kernels_equal_torch_s_own_operations(name: str, width: int) -> None:
    """Each over views with room beside them, poisoned, which must stay as it is."""
    from emergency_kit.training.fused import kernels

    def run(device: str) -> list[torch.Tensor]:
        generator, tokens = torch.Generator().manual_seed(3), 7

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator).to(device)

        scratch, out = Buffers(torch.float32, torch.device(device)), torch.full((tokens, 2 * width + 12), 77.0, device=device)
        x, w, r = draw(tokens, width + 12)[:, :width], draw(width), draw(tokens, 1).abs()
        one, two = out[:, :width], out[:, :2 * width]
        if name == "norm":
            elementwise.norm(x, w, 1e-5, r, one)
        elif name == "norm gradient":
            one.copy_(draw(tokens, width))
            elementwise.add_norm_gradient(draw(tokens, width), x, r, w, scratch, one)
        elif name.startswith("rotate"):
            half = width // 6 // 2
            heads = draw(tokens, 2 * half * 3 + 4)[:, :2 * half * 3].unflatten(1, (3, 1, 2 * half))
            out = torch.full((6, tokens, 2 * half), 77.0, device=device)
            cos, sin = draw(tokens, 1, 1, half), draw(tokens, 1, 1, half)
            elementwise.rotate(heads, cos, sin, out.unflatten(0, (3, 2)).permute(2, 0, 1, 3), name == "rotate back")
        elif name == "swiglu":
            elementwise.swiglu(draw(tokens, 2 * width), one, scratch)
        elif name == "swiglu gradient":
            dm, gate_up = draw(tokens, width + 8)[:, :width], draw(tokens, 2 * width)
            elementwise.swiglu_gradient(dm, gate_up, elementwise.swiglu(gate_up, torch.empty_like(one), scratch), two)
        elif name == "mask":
            elementwise.mask(x, draw(tokens, width), one)
        else:
            one.copy_(draw(tokens, width))
            elementwise.add_masked(one, x, draw(tokens, width))
        return [out.cpu(), r.cpu()]

    assert elementwise._kernels(torch.empty(1, device="cuda")) is kernels
    for found, expected in zip(run("cuda"), run("cpu")):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("nested", [True, False], ids=["scales in 8 bits", "scales in float32"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(7, 320), (33, 64 * 70), (96, 4096), (5, 96)], ids=str)
def test_4_bit_weights_are_spread_out_to_bitsandbytes_own_bits(shape: tuple[int, int], dtype: torch.dtype, nested: bool) -> None:
    """Into a view with room beside it, which must stay as it is; what the kernel does not take goes through bitsandbytes."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    torch.manual_seed(1)
    packed, state = quantize_4bit(torch.randn(shape, device="cuda", dtype=dtype), quant_type="nf4", compress_statistics=nested, blocksize=64)
    out = torch.full((shape[0], shape[1] + 16), 77.0, device="cuda", dtype=dtype)
    elementwise.spread(packed, state, out[:, :shape[1]])
    assert torch.equal(out[:, :shape[1]], dequantize_4bit(packed, state)) and bool((out[:, shape[1]:] == 77).all())


@pytest.mark.parametrize("max_gpu_memory_gb, expected", [(0.1, 0), (15.0, 3)])
def test_layers_are_kept_as_far_as_the_memory_given_goes(tmp_path: Path, max_gpu_memory_gb: float, expected: int) -> None:
    MistralForCausalLM(MistralConfig(**SHAPE)).save_pretrained(tmp_path)
    model = load(tmp_path, True, torch.bfloat16)
    step = FusedStep(model.get_base_model(), 2, recompute=True, row_tokens=1000)
    before = step.run(ROWS, None, backward=True)
    assert keep_layers(step, ROWS, max_gpu_memory_gb) == expected
    after = step.run(ROWS, None, backward=True)
    assert float(after[0]) == pytest.approx(float(before[0]), rel=1e-5)
    assert distance(dict(enumerate(after[1])), dict(enumerate(before[1]))) < 2e-3  # flash attention adds in an order of its own
