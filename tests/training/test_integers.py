"""Gradients through frozen weights in 8-bit integers: what rounding may do, and that it is no more than bfloat16 does."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from emergency_kit.config import load_config
from emergency_kit.data.tokenize import IGNORE
from emergency_kit.errors import TrainingError
from emergency_kit.model import bundled, compute
from emergency_kit.training.engine import goes_back_in_integers
from emergency_kit.training.fused.integers import LARGEST, IntegerWeight
from emergency_kit.training.fused.layer import Buffers
from emergency_kit.training.fused.step import FusedStep
from emergency_kit.training.fused.tree import Row

pytestmark = pytest.mark.skipif(not compute.measured_integer_gain(), reason="this CPU has no exact products of 8-bit integers")


def product(weight: torch.Tensor, dy: torch.Tensor) -> torch.Tensor:
    return IntegerWeight(weight).product(dy, torch.empty(len(dy), weight.shape[1]), Buffers(torch.float32, torch.device("cpu")))


def draw(rows: int, columns: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=60, deadline=None)
@given(tokens=st.integers(1, 40), outputs=st.integers(1, 130), inputs=st.integers(1, 70), power=st.integers(-30, 25), outlier=st.floats(0, 1000), seed=st.integers(0, 2**31))
def test_it_is_off_by_no_more_than_half_a_step_of_each_factor(tokens: int, outputs: int, inputs: int, power: int, outlier: float, seed: int) -> None:
    weight, dy = draw(outputs, inputs, seed), draw(tokens, outputs, seed + 1) * 10.0 ** power
    dy[:, 0] *= outlier
    found = product(weight, dy).double()
    rotation = IntegerWeight(weight).rotation.double()

    def turned(x: torch.Tensor) -> torch.Tensor:
        return (x.double().reshape(-1, len(rotation)) @ rotation).reshape(x.shape)

    dy_turned, weight_turned = turned(dy), turned(weight.t().contiguous()).t()
    step, column_step = dy_turned.abs().amax(1, keepdim=True) / LARGEST, weight_turned.abs().amax(0, keepdim=True) / LARGEST
    bound = step / 2 * weight_turned.abs().sum(0, keepdim=True) + column_step / 2 * dy_turned.abs().sum(1, keepdim=True) + outputs * step * column_step / 4
    assert ((found - dy.double() @ weight.double()).abs() <= 1.001 * bound + 1e-36).all()


def test_a_token_is_rounded_by_itself_and_a_gradient_that_is_no_number_stays_none() -> None:
    weight, dy = draw(96, 48, 0), draw(7, 96, 1)
    whole = product(weight, dy)
    assert torch.equal(product(weight, dy[2:5]), whole[2:5])
    dy[3, 10], dy[5, 0], dy[6] = torch.nan, torch.inf, 0
    broken = product(weight, dy)
    assert not broken[3].isfinite().any() and not broken[5].isfinite().any()
    assert torch.equal(broken[[0, 1, 2, 4]], whole[[0, 1, 2, 4]]) and not broken[6].any()


def test_an_outlier_costs_less_than_without_the_rotation() -> None:
    weight, dy = draw(256, 64, 2), draw(50, 256, 3)
    dy[:, 17] *= 40
    exact = dy @ weight
    plain = (dy / (scale := dy.abs().amax(1, keepdim=True) / LARGEST)).round() * scale @ weight
    assert (product(weight, dy) - exact).norm() < 0.6 * (plain - exact).norm()


ANSWERS = ["Move everyone out of the smoke, stay low, close the doors behind you and call the fire service from outside. Do not go back in.",
           "Press hard on the wound with a clean cloth and do not lift it to look. If blood soaks through, add another cloth on top and keep pressing."]


def rows() -> list[Row]:
    tokenizer = AutoTokenizer.from_pretrained(bundled.FOLDER)
    found = []
    for question, answer in zip(["There is smoke in the corridor. What do we do?", "His leg is bleeding heavily. What do I do?"], ANSWERS):
        prompt = tokenizer("You answer emergencies with short, checked steps. Say first what must happen at once.\n" + question + "\n")["input_ids"]
        ids = np.array([*prompt, *tokenizer(answer)["input_ids"]], np.int64)
        labels = ids.copy()
        labels[:len(prompt)] = IGNORE
        found.append(Row(ids, labels))
    return found


def bundled_model(dtype: torch.dtype) -> Any:
    """The bundled model with float32 adapters, B not zero."""
    model = AutoModelForCausalLM.from_pretrained(bundled.FOLDER, dtype=dtype, attn_implementation="eager")
    adapted = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    generator = torch.Generator().manual_seed(4)
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            parameter.data = torch.empty(parameter.shape, dtype=torch.float32).normal_(0, 0.02 if "lora_A" in name else 0.005, generator=generator)
    return adapted.eval()


def through_transformers(model: Any, dtype: torch.dtype) -> torch.Tensor:
    """Every adapter's gradient in one vector, row by row through transformers' modules."""
    count = sum(int((row.labels[1:] != IGNORE).sum()) for row in rows())
    for row in rows():
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            logits = model(input_ids=torch.from_numpy(row.ids)[None]).logits[0, :-1]
        torch.nn.functional.cross_entropy(logits.float(), torch.from_numpy(row.labels)[1:], ignore_index=IGNORE, reduction="sum").div(count).backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.requires_grad])


def test_adapters_gradients_of_the_bundled_model_are_no_further_from_float32_than_bfloat16s() -> None:
    exact, half = (through_transformers(bundled_model(dtype), dtype) for dtype in (torch.float32, torch.bfloat16))
    step = FusedStep(bundled_model(torch.float32).get_base_model(), 2, row_tokens=1024)
    loss, gradients = step.run(rows(), None, backward=True)
    step.go_back_in_integers()
    in_integers, rounded = step.run(rows(), None, backward=True)
    assert torch.equal(in_integers, loss), "the loss is float32's, to the bit"
    assert all(torch.equal(one, other) for one, other in zip(rounded, step.run(rows(), None, backward=True)[1])), "a second run has the same bits"

    def distance(found: torch.Tensor) -> float:
        return float((found - exact).norm() / exact.norm())

    def joined(found: list[torch.Tensor]) -> torch.Tensor:
        return torch.cat([gradient.flatten() for gradient in found])

    assert distance(joined(gradients)) < 1e-4
    print(f"from float32's gradients: int8 {distance(joined(rounded)):.4f}, bfloat16 through transformers {distance(half):.4f}")
    assert 1e-3 < distance(joined(rounded)) <= distance(half)


def test_other_passes_over_the_rows_change_gradients_by_less_than_the_integers_do() -> None:
    """Sums in another order round a few numbers to the other step."""
    found = []
    for options in ({"pass_rows": 2}, {"pass_rows": 1, "share": False}):
        step = FusedStep(bundled_model(torch.float32).get_base_model(), row_tokens=1024, **options)
        exact = step.run(rows(), None, backward=True)[1]
        step.go_back_in_integers()
        found.append([torch.cat([gradient.flatten() for gradient in gradients]) for gradients in (exact, step.run(rows(), None, backward=True)[1])])
    (exact, together), (again, apart) = found
    length = exact.norm()
    print(f"other passes: {float((together - apart).norm() / length):.4f}, integers: {float((together - exact).norm() / length):.4f}")
    assert (exact - again).norm() < 1e-4 * length and (together - apart).norm() < (together - exact).norm()


@pytest.mark.parametrize(("device", "dtype", "four_bit", "named"), [("cuda", "float32", False, "a GPU"), ("cpu", "bfloat16", False, "compute type bfloat16"),
                                                                    ("cpu", "float32", True, "4-bit weights")])
def test_where_it_cannot_be_auto_goes_without_and_true_says_why(device: str, dtype: str, four_bit: bool, named: str) -> None:
    def training(value: str) -> Any:
        return load_config("embedded", settings=[f"training.int8_backward={value}"]).config.training

    assert not goes_back_in_integers(training("auto"), device, dtype, four_bit)
    with pytest.raises(TrainingError, match=f"int8_backward is true, which is not for {named}; next: --set training.int8_backward=auto"):
        goes_back_in_integers(training("true"), device, dtype, four_bit)


def test_auto_takes_it_where_it_is_twice_as_fast_and_false_never() -> None:
    chosen = {value: goes_back_in_integers(load_config("embedded", settings=[f"training.int8_backward={value}"]).config.training, "cpu", "float32", False)
              for value in ("auto", "true", "false")}
    assert chosen == {"auto": compute.measured_integer_gain() >= compute.LEAST_INTEGER_GAIN, "true": True, "false": False}
