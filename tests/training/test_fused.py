"""The step by hand against a naive float32 reference: loss and every adapter's gradient, to 1e-5."""

from __future__ import annotations

import copy
import multiprocessing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM

from emergency_kit.data.tokenize import IGNORE
from emergency_kit.model.process_memory import resident_bytes
from emergency_kit.training import loss
from emergency_kit.training.batches import collate
from emergency_kit.training.fused import attention
from emergency_kit.training.fused.step import FusedStep, unsupported
from emergency_kit.training.fused.tree import Row

VOCABULARY = 97
SHAPE = {"vocab_size": VOCABULARY, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 6,
         "num_key_value_heads": 2, "attn_implementation": "eager", "max_position_embeddings": 1024}
FAMILIES = {"llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE)),
            "llama3 rope, no sharing of keys": lambda: LlamaForCausalLM(LlamaConfig(**{**SHAPE, "num_attention_heads": 8, "num_key_value_heads": 8, "rope_parameters": {
                "rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64}})),
            "mistral": lambda: MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=None, head_dim=16)),
            "qwen2, biased": lambda: Qwen2ForCausalLM(Qwen2Config(**SHAPE))}
EVERYTHING = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def adapt(base: Any, modules: list[str] | None = None, dropout: float = 0.0, **options: Any) -> Any:
    """The base model with LoRA whose B is not zero, biases not zero either, so that no gradient hides."""
    torch.manual_seed(0)
    adapted = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, lora_dropout=dropout, target_modules=modules or EVERYTHING, task_type="CAUSAL_LM", **options))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name or name.endswith(".bias"):
            torch.nn.init.normal_(parameter, std=0.2)
    return adapted.train()


def make_rows(*shapes: tuple[int, int, int], seed: int = 1) -> list[Row]:
    """Rows of a shared beginning of 60 tokens, for group g > 0 its 50 more, then `length` of their own, the first `prompt` unsupervised."""
    generator = np.random.default_rng(seed)
    start, groups = generator.integers(2, VOCABULARY, 60), generator.integers(2, VOCABULARY, (4, 50))
    rows = []
    for length, prompt, group in shapes:
        ids = np.concatenate([start, groups[group] if group else [], generator.integers(2, VOCABULARY, length)]).astype(np.int64)
        labels = ids.copy()
        labels[:len(ids) - length + prompt] = IGNORE
        rows.append(Row(ids, labels))
    return rows


# Two rows of one group, one of another, one short, one with a single label, one longer than a block of queries.
ROWS = make_rows((23, 11, 0), (31, 20, 1), (9, 8, 1), (17, 4, 2), (400, 150, 0))


def naive(model: Any, rows: list[Row]) -> tuple[float, dict[str, torch.Tensor]]:
    """Every row alone through transformers' modules, all logits, the mean over all labels."""
    total, count = torch.zeros(()), 0
    model.zero_grad()
    for row in rows:
        logits = model(input_ids=torch.from_numpy(row.ids)[None]).logits[0].log_softmax(-1)
        for position in np.flatnonzero(row.labels[1:] != IGNORE):
            total = total - logits[position, row.labels[position + 1]]
            count += 1
    (total / max(count, 1)).backward()
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.requires_grad}
    model.zero_grad()
    return float(total.detach() / max(count, 1)), found


def by_hand(model: Any, rows: list[Row], tile: int = 0, **options: Any) -> tuple[float, dict[str, torch.Tensor], FusedStep]:
    """The same through the fused step, in passes of two rows unless told otherwise. tile: other than the compute type's."""
    step = FusedStep(model.get_base_model(), **{"pass_rows": 2, **options})
    step.tile = tile or step.tile
    model.zero_grad()
    value = step(rows, None)
    value.backward()
    return float(value.detach()), {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.requires_grad}, step


def assert_equal(found: tuple[float, dict[str, torch.Tensor]], expected: tuple[float, dict[str, torch.Tensor]]) -> None:
    assert found[0] == pytest.approx(expected[0], abs=1e-5)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        assert gradient.abs().max() > 1e-7, name
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-5, atol=1e-5 * float(gradient.abs().max()), msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_equals_the_reference(family: str) -> None:
    model = adapt(FAMILIES[family]())
    assert unsupported(model) is None
    expected = naive(model, ROWS)
    *found, step = by_hand(model, ROWS)
    assert_equal(tuple(found), expected)
    # The beginning of all and the group's own are computed once.
    assert step.last_plan.tokens == sum(len(row.ids) for row in ROWS) - 4 * 60 - 50


@pytest.mark.parametrize("options", [{}, {"recompute": True}, {"share": False, "pass_rows": 1}], ids=["kept", "recomputed", "row by row"])
def test_weights_in_4_bit_equal_the_reference(tmp_path: Path, options: dict[str, Any]) -> None:
    """bitsandbytes' own modules are the reference; what they hold stays as it was."""
    FAMILIES["mistral"]().save_pretrained(tmp_path)
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.float32)
    model = adapt(MistralForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, quantization_config=nf4, attn_implementation="eager"))
    packed = {name: parameter.detach().clone() for name, parameter in model.named_parameters() if parameter.dtype == torch.uint8}
    assert len(packed) == 3 * 7 and unsupported(model) is None
    expected = naive(model, ROWS)
    for _ in range(2):  # the second step must not read what the first spread out with other adapters
        assert_equal(by_hand(model, ROWS, **options)[:2], expected)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.mul_(0.5)
        expected = naive(model, ROWS)
    assert all(torch.equal(parameter, packed[name]) for name, parameter in model.named_parameters() if name in packed)


@pytest.mark.parametrize("options", [{"share": False}, {"recompute": True}, {"recompute": True, "share": False}, {"pass_rows": 1}, {"pass_rows": 8}],
                         ids=str)
def test_passes_sharing_and_recomputing_change_nothing(options: dict[str, Any]) -> None:
    model = adapt(FAMILIES["llama"]())
    expected = naive(model, ROWS)
    assert_equal(by_hand(model, ROWS, **options)[:2], expected)


@pytest.mark.parametrize("options", [{}, {"share": False}, {"recompute": True}, {"pass_rows": 1}], ids=str)
def test_whole_tiles_change_nothing(options: dict[str, Any]) -> None:
    """As on a CPU's 16-bit matrix units: what fills a pass up gives nothing, whatever the buffers held before."""
    model = adapt(FAMILIES["llama"]())
    expected = naive(model, ROWS)
    *found, step = by_hand(model, ROWS, tile=32, **options)
    assert_equal(tuple(found), expected)
    for buffers in (step.kept, step.shared_kept, step.scratch):
        for held in buffers.memory.values():
            held.fill_(float("nan"))
    gradients = step.run(ROWS, None, backward=True)[1]
    assert all(bool(gradient.isfinite().all()) for gradient in gradients)
    for gradient, parameter in zip(gradients, step.parameters):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-5, atol=1e-6)


def test_products_with_the_head_have_few_shapes() -> None:
    """oneDNN compiles and keeps one for every shape: labels of a pass come in any number, whole tiles do not."""
    model = adapt(FAMILIES["llama"]())
    vocabulary, sides = model.config.vocab_size, []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, operation: Any, types: Any, arguments: tuple[Any, ...] = (), options: dict[str, Any] | None = None) -> Any:
            if operation.overloadpacket is torch.ops.aten.mm and vocabulary in (*arguments[0].shape, *arguments[1].shape):
                sides.append(arguments[0].shape[0])
            return operation(*arguments, **(options or {}))

    with Watch():
        by_hand(model, ROWS, tile=32)
    assert len(sides) >= 4 and all(side % 32 == 0 for side in sides)


@pytest.mark.parametrize("on_gpu, item_bytes, tile", [(False, 4, 1), (False, 2, 32), (True, 2, 1)])
def test_tiles_are_of_a_cpu_s_16_bit_units_alone(on_gpu: bool, item_bytes: int, tile: int) -> None:
    assert attention.tile_of(on_gpu, item_bytes) == tile
    for tokens in (1, 33, 640, 1280):
        filled = attention.whole(tokens, tile)
        assert filled % tile == 0 and tokens <= filled < tokens + tile


@pytest.mark.parametrize("kept", [1, 2, 3])
def test_layers_kept_change_no_bit_and_take_what_was_said(kept: int) -> None:
    model = adapt(FAMILIES["llama"]())
    one, other = (by_hand(model, ROWS, recompute=recompute) for recompute in (True, False))
    step = one[2]
    held, each = sum(tensor.nbytes for tensor in step.kept.memory.values()), step.layer_bytes
    step.kept_layers = kept
    loss, gradients = step.run(ROWS, None, backward=True)
    assert float(loss) == one[0] == other[0]
    for found, parameter, again in zip(gradients, step.parameters, one[1].values()):
        assert torch.equal(found, again) and found.shape == parameter.shape
    assert sum(tensor.nbytes for tensor in step.kept.memory.values()) - held == kept * each > 0


@pytest.mark.parametrize("modules", [["q_proj", "v_proj"], ["k_proj"], ["down_proj"], ["o_proj", "up_proj"]], ids=str)
def test_any_set_of_modules_equals_the_reference(modules: list[str]) -> None:
    model = adapt(FAMILIES["llama"](), modules)
    expected = naive(model, ROWS)
    assert_equal(by_hand(model, ROWS)[:2], expected)


def test_adapters_in_upper_layers_alone_equal_the_reference_and_nothing_below_is_computed_back() -> None:
    model = adapt(FAMILIES["llama"](), layers_to_transform=[1, 2], use_rslora=True)
    expected = naive(model, ROWS)
    *found, step = by_hand(model, ROWS)
    assert step.lowest == 1
    assert_equal(tuple(found), expected)


def test_the_order_of_rows_does_not_matter() -> None:
    model = adapt(FAMILIES["llama"]())
    expected = naive(model, ROWS)
    assert_equal(by_hand(model, [ROWS[index] for index in (3, 0, 4, 2, 1)])[:2], expected)


def test_through_the_installed_forward_padding_changes_nothing() -> None:
    model = adapt(FAMILIES["llama"]())
    expected = naive(model, ROWS)
    loss.install(model.get_base_model(), FusedStep(model.get_base_model(), 2))
    batch = collate([{"input_ids": row.ids.tolist(), "labels": row.labels.tolist()} for row in ROWS], pad_id=0)
    for extra in (0, 30):  # columns of padding beyond the longest row
        padded = {name: torch.nn.functional.pad(value, (0, extra), value=IGNORE if name == "labels" else 0) for name, value in batch.items()}
        model.zero_grad()
        value = model(**padded)["loss"]
        value.backward()
        assert_equal((float(value.detach()), {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}), expected)


def test_one_pass_of_eight_equals_eight_of_one_added_up() -> None:
    model, rows = adapt(FAMILIES["llama"]()), ROWS + make_rows((40, 20, 3), (55, 3, 3), (12, 6, 0), seed=2)
    labels = sum(int((row.labels[1:] != IGNORE).sum()) for row in rows)
    whole = by_hand(model, rows, pass_rows=8)[:2]
    step, total = FusedStep(model.get_base_model(), 1), 0.0
    model.zero_grad()
    for row in rows:
        value = step([row], labels)
        value.backward()
        total += float(value.detach())
    assert_equal((total, {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}), whole)


def test_attention_never_crosses_rows() -> None:
    """Other tokens in the row beside it leave a row's last hidden states as they were, bit for bit; in its own beginning they do not."""
    model = adapt(FAMILIES["llama"]())
    step = FusedStep(model.get_base_model(), 4)
    mine, other = ROWS[3], make_rows((37, 12, 0), seed=9)[0]
    changed = Row(np.concatenate([other.ids[:61], (other.ids[61:] + 1) % VOCABULARY]), other.labels)
    seen: list[torch.Tensor] = []
    original = step._loss
    step._loss = lambda part, x, divisor, backward: (seen.append(x[:part.nodes[0].length].clone()), original(part, x, divisor, backward))[1]
    with torch.no_grad():
        for rows in ([mine, other], [mine, changed], [Row(np.concatenate([[5], mine.ids[1:]]), mine.labels), other]):
            step(rows, 1)
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0], seen[2][-len(seen[0]):])


def test_rows_without_a_label_give_nothing_and_a_step_of_them_gives_zeros() -> None:
    model = adapt(FAMILIES["llama"]())
    masked = [Row(row.ids, np.full_like(row.labels, IGNORE)) for row in ROWS[:2]]
    expected = naive(model, ROWS)
    assert_equal(by_hand(model, [masked[0], *ROWS, masked[1]])[:2], expected)
    value, gradients, step = by_hand(model, masked)
    assert value == 0.0 and step.last_plan.tokens == 0 and all(not gradient.any() for gradient in gradients.values())


def test_a_row_of_exactly_the_longest_length_equals_the_reference() -> None:
    model = adapt(FAMILIES["llama"]())
    rows = make_rows((1024 - 60, 700, 0), (5, 2, 0))
    assert len(rows[0].ids) == SHAPE["max_position_embeddings"]
    expected = naive(model, rows)
    assert_equal(by_hand(model, rows)[:2], expected)


def test_labels_anywhere_in_a_row_equal_the_reference() -> None:
    model = adapt(FAMILIES["llama"]())
    rows = make_rows((50, 5, 1), (60, 5, 1))
    rows[0].labels[70:90] = IGNORE  # inside
    rows[1].labels[20:25] = rows[1].ids[20:25]  # within what both begin with: nothing after position 19 may be shared
    expected = naive(model, rows)
    *found, step = by_hand(model, rows)
    assert_equal(tuple(found), expected)
    assert step.last_plan.shared.tokens <= 19


def test_bfloat16_stays_within_its_noise_of_the_float32_reference() -> None:
    model = adapt(FAMILIES["llama"]())
    expected = naive(model, ROWS)
    half = copy.deepcopy(model)
    for parameter in half.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    value, gradients, _ = by_hand(half, ROWS)
    assert value == pytest.approx(expected[0], rel=0.01)
    flat, reference = (torch.cat([found[name].flatten() for name in expected[1]]) for found in (gradients, expected[1]))
    assert torch.nn.functional.cosine_similarity(flat, reference, dim=0) > 0.999
    assert float(flat.norm() / reference.norm()) == pytest.approx(1, abs=0.02)
    assert {gradient.dtype for gradient in gradients.values()} == {torch.float32}


def test_dropout_is_off_in_evaluation_and_right_in_expectation() -> None:
    """The mean gradient of B in the topmost module is linear in the dropped input, so its expectation is that without dropout."""
    model = adapt(FAMILIES["llama"](), ["down_proj"], dropout=0.3, layers_to_transform=[2])
    step = FusedStep(model.get_base_model(), 4)
    name = next(name for name, _ in model.named_parameters() if "layers.2" in name and "lora_B" in name)
    parameter = dict(model.named_parameters())[name]
    with torch.no_grad():
        for other, value in model.named_parameters():
            if "lora_B" in other:
                value.zero_()  # then dropout changes no activation, only z
    model.eval()
    _, gradients = step.run(ROWS, None, backward=True)
    exact = gradients[1].clone()
    assert torch.equal(exact, step.run(ROWS, None, backward=True)[1][1])
    model.train()
    torch.manual_seed(5)
    drawn = torch.stack([step.run(ROWS, None, backward=True)[1][1] for _ in range(300)])
    assert parameter.shape == exact.shape and float(drawn.std(0).max()) > 0
    z = (drawn.mean(0) - exact) / (drawn.std(0) / 300 ** 0.5 + 1e-12)
    assert float(z.abs().mean()) == pytest.approx(0.8, abs=0.25)  # the mean of |N(0, 1)|


def test_neftune_changes_training_alone() -> None:
    model = adapt(FAMILIES["llama"]())
    plain, noisy = FusedStep(model.get_base_model(), 2), FusedStep(model.get_base_model(), 2, neftune_alpha=5.0)
    with torch.no_grad():
        assert float(noisy(ROWS, None)) != float(plain(ROWS, None))
        assert noisy.last_plan.shared.tokens == 0 < plain.last_plan.shared.tokens
        model.eval()
        assert float(noisy(ROWS, None)) == float(plain(ROWS, None))


def test_the_same_seed_gives_the_same_bits() -> None:
    base = FAMILIES["llama"]()

    def once() -> list[torch.Tensor]:
        model = adapt(copy.deepcopy(base), dropout=0.1)
        torch.manual_seed(3)
        return FusedStep(model.get_base_model(), 2).run(ROWS, None, backward=True)[1]

    assert all(torch.equal(left, right) for left, right in zip(once(), once(), strict=True))


def test_buffers_stop_growing_once_the_longest_pass_was_seen() -> None:
    model = adapt(FAMILIES["llama"]())
    step = FusedStep(model.get_base_model(), 2)

    def held() -> int:
        return sum(memory.numel() for buffers in (step.scratch, step.kept, step.shared_kept) for memory in buffers.memory.values())

    step.run(ROWS, None, backward=True)
    first = held()
    for rows in (ROWS[:3], ROWS[2:], ROWS):
        step.run(rows, None, backward=True)
    assert held() == first


def step_over_many_lengths(grown: Any) -> None:
    """What private memory grew by in steps whose rows get a tile shorter each, after the ten longest."""
    step = FusedStep(adapt(FAMILIES["llama"]().to(torch.bfloat16)).get_base_model(), 2)
    for number, length in enumerate(range(940, 60, -32)):
        step.run(make_rows((length, 8, 0)), None, backward=True)
        if number == 10:
            before = resident_bytes("RssAnon")
    grown.put(resident_bytes("RssAnon") - before)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads memory in /proc")
def test_memory_does_not_grow_with_the_lengths_that_were_seen() -> None:
    """A CPU's 16-bit products are compiled for every shape, hundreds in these steps; the last ones alone are kept."""
    context = multiprocessing.get_context("spawn")
    grown = context.SimpleQueue()
    child = context.Process(target=step_over_many_lengths, args=(grown,))
    child.start()
    child.join(120)
    assert child.exitcode == 0
    bytes_more = grown.get()
    assert bytes_more < 25_000_000, bytes_more


def test_modules_still_work_beside_it() -> None:
    model = adapt(FAMILIES["llama"]())
    before = naive(model, ROWS)
    FusedStep(model.get_base_model(), 2)
    assert_equal(naive(model, ROWS), before)


@pytest.mark.parametrize("base, lora, reason", [
    (lambda: LlamaForCausalLM(LlamaConfig(**{**SHAPE, "hidden_act": "gelu"})), {}, "an activation"),
    (lambda: MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=64)), {}, "sliding-window"),
    (FAMILIES["llama"], {"use_dora": True}, "DoRA"),
    (FAMILIES["llama"], {"modules_to_save": ["lm_head"]}, "modules trained in full"),
    (lambda: LlamaForCausalLM(LlamaConfig(**{**SHAPE, "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}})), {}, "rope of type dynamic"),
])
def test_what_it_cannot_take_is_named(base: Any, lora: dict[str, Any], reason: str) -> None:
    model = get_peft_model(base(), LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", **lora))
    assert reason in unsupported(model)
