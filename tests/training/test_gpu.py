"""What only a GPU shows: flash attention and 4-bit weights in the fused step, beside transformers' modules. Skipped where there is none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import BitsAndBytesConfig, MistralConfig, MistralForCausalLM

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
    step = FusedStep(model.get_base_model(), 2, recompute=recompute, row_tokens=800)
    assert step.flash and not step.share
    loss = step(ROWS, None)
    loss.backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(step.last_plan.passes) == 1  # all rows fill the place of two of 800 tokens
    assert float(loss.detach()) == pytest.approx(reference[0], rel=2e-3)
    assert distance(found, reference[1]) < 1.5 * distance(modules[1], reference[1]) + 2e-3 < 0.2
