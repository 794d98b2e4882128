"""Loss and adapter gradients against a naive float32 reference, with and without padding and accumulation."""

import copy

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from emergency_kit.data.tokenize import IGNORE
from emergency_kit.model.head import find_head
from emergency_kit.training import end_to_end, loss, preference
from emergency_kit.training.batches import collate

VOCABULARY = 97
# (length, prompt length) of four rows; the last has one supervised token only.
ROWS = [(23, 11), (17, 4), (31, 20), (9, 8)]


@pytest.fixture
def model() -> torch.nn.Module:
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                                        num_attention_heads=4, num_key_value_heads=2, attn_implementation="eager"))
    adapted = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM"))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:  # PEFT starts B at zero, which would hide the gradient of A
            torch.nn.init.normal_(parameter, std=0.2)
    return adapted


@pytest.fixture
def rows() -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(1)
    built = []
    for length, prompt in ROWS:
        ids = torch.randint(2, VOCABULARY, (length,), generator=generator).tolist()
        built.append({"input_ids": ids, "labels": [IGNORE] * prompt + ids[prompt:]})
    return built


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.requires_grad}


def naive(model: torch.nn.Module, rows: list[dict[str, list[int]]]) -> tuple[float, dict[str, torch.Tensor]]:
    """Every row alone, all logits, the mean over all supervised tokens."""
    model = copy.deepcopy(model)
    total, count = torch.zeros(()), 0
    for row in rows:
        logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0].log_softmax(-1)
        for position, label in enumerate(row["labels"][1:]):
            if label != IGNORE:
                total = total - logits[position, label]
                count += 1
    (total / count).backward()
    return float((total / count).detach()), gradients(model)


@pytest.mark.parametrize("micro_batch", [1, 2, 4])
def test_loss_and_gradients_equal_the_naive_reference(model: torch.nn.Module, rows: list[dict[str, list[int]]], micro_batch: int) -> None:
    expected_loss, expected = naive(model, rows)
    loss.install(model.get_base_model())
    supervised = sum(label != IGNORE for row in rows for label in row["labels"])
    total = 0.0
    for start in range(0, len(rows), micro_batch):
        result = model(**collate(rows[start:start + micro_batch], pad_id=0), num_items_in_batch=supervised)["loss"]
        result.backward()
        total += float(result.detach())
    assert total == pytest.approx(expected_loss, abs=1e-5)
    found = gradients(model)
    assert found.keys() == expected.keys() and len(found) == 12
    for name in expected:
        assert expected[name].abs().max() > 1e-6, name
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("kind, settings", [
    ("granite", {"logits_scaling": 4.0, "embedding_multiplier": 3.0, "residual_multiplier": 0.5, "attention_multiplier": 0.1}),
    ("cohere", {"logit_scale": 0.25}), ("gemma2", {"final_logit_softcapping": 2.0, "head_dim": 8, "query_pre_attn_scalar": 8})])
@pytest.mark.parametrize("compared", ["labels", "pairs"])
def test_what_a_family_does_to_its_logits_is_part_of_the_loss(rows: list[dict[str, list[int]]], kind: str, settings: dict[str, float], compared: str) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                                  initializer_range=0.5, attn_implementation="eager", bos_token_id=1, eos_token_id=2, pad_token_id=0, **settings)
    model = AutoModelForCausalLM.from_config(config).eval()
    plain, batch = copy.deepcopy(model), collate(rows, pad_id=0)
    total = {"labels": 0.0, "pairs": []}
    for row in rows:
        scores = plain(input_ids=torch.tensor([row["input_ids"]])).logits[0].log_softmax(-1)
        of_row = sum(float(scores[place, label].detach()) for place, label in enumerate(row["labels"][1:]) if label != IGNORE)
        total = {"labels": total["labels"] - of_row, "pairs": [*total["pairs"], of_row]}
    state = torch.get_rng_state()
    if compared == "labels":
        loss.install(model)
        found = model(**batch, num_items_in_batch=1)["loss"]
        assert found.item() == pytest.approx(total["labels"], rel=1e-4)
        found.backward()
        assert model.model.layers[0].mlp.down_proj.weight.grad.abs().max() > 0
        hidden = plain.get_decoder()(**{name: batch[name] for name in ("input_ids", "attention_mask")}).last_hidden_state
        assert abs(loss.supervised_loss(hidden, batch["labels"], plain.lm_head, 1).item() / total["labels"] - 1) > 0.05, "the head alone would be another loss"
    else:
        preference.install(model, 0.1, 0.0)
        assert model(**batch, compared=batch["labels"])["log_probs"].tolist() == pytest.approx(total["pairs"], rel=1e-4)
    assert torch.equal(state, torch.get_rng_state())
    torch.testing.assert_close(model(input_ids=batch["input_ids"][:1]).logits, plain(input_ids=batch["input_ids"][:1]).logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind, plain", [("llama", True), ("mistral", True), ("qwen2", True), ("qwen3", True), ("granite", False), ("gemma2", False)])
def test_the_head_alone_is_taken_where_it_is_all_there_is(kind: str, plain: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, vocab_size=512, hidden_size=256, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
                                                                  num_key_value_heads=2, **({"logits_scaling": 8.0} if kind == "granite" else {})), dtype=dtype)
    assert (find_head(model) is model.lm_head) == plain


def test_a_mean_of_micro_batch_means_would_be_another_number(model: torch.nn.Module, rows: list[dict[str, list[int]]]) -> None:
    """The rows differ in supervised tokens, so the usual mistake is visible to the test above."""
    expected, _ = naive(model, rows)
    loss.install(model.get_base_model())
    with torch.no_grad():
        wrong = sum(float(model(**collate([row], pad_id=0))["loss"]) for row in rows) / len(rows)
    assert abs(wrong - expected) > 1e-3


def test_logits_are_computed_at_supervised_positions_only(rows: list[dict[str, list[int]]]) -> None:
    seen: list[int] = []
    head = torch.nn.Linear(8, VOCABULARY)
    head.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape[0]))
    batch = collate(rows, pad_id=0)
    loss.supervised_loss(torch.randn(*batch["labels"].shape, 8), batch["labels"], head)
    assert seen == [sum(length - prompt for length, prompt in ROWS)]


def test_a_batch_without_labels_gives_zero_and_a_gradient() -> None:
    hidden = torch.randn(2, 5, 8, requires_grad=True)
    result = loss.supervised_loss(hidden, torch.full((2, 5), IGNORE), torch.nn.Linear(8, VOCABULARY))
    result.backward()
    assert float(result) == 0.0 and torch.equal(hidden.grad, torch.zeros_like(hidden))


def test_the_reference_agrees_with_torch_cross_entropy() -> None:
    hidden, labels, head = torch.randn(1, 6, 8), torch.tensor([[IGNORE, IGNORE, 5, 6, IGNORE, 7]]), torch.nn.Linear(8, VOCABULARY)
    expected = F.cross_entropy(head(hidden)[0, :-1], labels[0, 1:], ignore_index=IGNORE)
    torch.testing.assert_close(loss.supervised_loss(hidden, labels, head), expected)


@pytest.mark.parametrize("micro_batch", [1, 2, 4])
def test_rows_end_to_end_equal_the_naive_reference(model: torch.nn.Module, rows: list[dict[str, list[int]]], micro_batch: int) -> None:
    expected_loss, expected = naive(model, rows)
    assert end_to_end.install(model.get_base_model())
    loss.install(model.get_base_model(), rows_end_to_end=True)
    supervised, total = sum(label != IGNORE for row in rows for label in row["labels"]), 0.0
    for start in range(0, len(rows), micro_batch):
        result = model(**collate(rows[start:start + micro_batch], pad_id=0), num_items_in_batch=supervised)["loss"]
        result.backward()
        total += float(result.detach())
    assert total == pytest.approx(expected_loss, abs=1e-5)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6, msg=name)


def test_end_to_end_leaves_sliding_windows_and_strangers_alone() -> None:
    config = MistralConfig(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, sliding_window=8)
    windowed = MistralForCausalLM(config)
    assert not end_to_end.install(windowed) and windowed.config._attn_implementation != end_to_end.NAME


@pytest.mark.parametrize("unpadded", [False, True])
def test_neftune_is_noise_of_the_right_size_in_training_alone(model: torch.nn.Module, rows: list[dict[str, list[int]]], unpadded: bool) -> None:
    base = model.get_base_model()
    if unpadded:
        end_to_end.install(base)
    seen: list[torch.Tensor] = []
    base.get_decoder().layers[0].register_forward_pre_hook(lambda module, inputs, options: seen.append((inputs or (options["hidden_states"],))[0]), with_kwargs=True)
    batch, alpha = collate(rows, pad_id=0), 5.0
    for noise, training in ((0.0, True), (alpha, True), (alpha, False)):
        base.__dict__.pop("forward", None)
        loss.install(base, neftune_alpha=noise, rows_end_to_end=unpadded)
        model.train(training)
        model(**batch)
    assert torch.equal(seen[0], seen[2])
    difference = (seen[1] - seen[0]).abs()
    for index, (length, _) in enumerate(ROWS):
        start = sum(other for other, _ in ROWS[:index])
        row = difference[0, start:start + length] if unpadded else difference[index, :length]
        limit = alpha / (length * 32) ** 0.5
        assert 0.9 * limit < float(row.detach().max()) <= limit * 1.0001
