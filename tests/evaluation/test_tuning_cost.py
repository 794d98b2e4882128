import math
import re

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from emergency_kit.evaluation.tuning_cost import CHOICES, Question, load_material, measure_perplexity, pick_choices
from tests.tiny import save_tiny_model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = save_tiny_model(tmp_path_factory.mktemp("tiny"))
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(folder)


def test_the_material_is_well_formed():
    questions, instructions, text = load_material()
    assert len(questions) >= 200 and len({question.text for question in questions}) == len(questions)
    assert all(len(set(question.choices)) == CHOICES for question in questions)
    places = [question.right for question in questions]
    assert all(0.15 < places.count(place) / len(places) < 0.35 for place in range(CHOICES)), "the right choice stands everywhere about equally often"
    assert len(text.split()) > 500 and all(re.compile(pattern) for _, pattern in instructions)


def test_patterns_of_instructions_tell_right_from_wrong():
    patterns = {prompt: pattern for prompt, pattern in load_material()[1]}
    for prompt, right, wrong in [("Reply with the single word yes.", "Yes.", "Yes, I will."), ("What is 2 + 2? Reply with the number only.", "4", "It is 4."),
                                 ("List three fruits.", "Apples, bananas and pears.", "Apples and apples."), ("Is ice hot? Answer yes or no.", "No.", "Yes.")]:
        assert re.fullmatch(patterns[prompt], right) and not re.fullmatch(patterns[prompt], wrong), prompt


def test_perplexity_against_the_models_own_loss(tiny):
    model, tokenizer = tiny
    text = "The cat sleeps on the wall.\n\nIt is a warm day."
    total, count = 0.0, 0
    for paragraph in text.split("\n\n"):
        ids = tokenizer(paragraph, return_tensors="pt", add_special_tokens=False)["input_ids"]
        total += model(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    found, tokens = measure_perplexity(model, tokenizer, text)
    assert tokens == count and math.isclose(found, math.exp(total / count), rel_tol=1e-4)


def test_choices_in_a_padded_batch_are_those_of_single_rows(tiny):
    model, tokenizer = tiny
    questions = load_material()[0][:12]
    found = pick_choices(model, tokenizer, questions)
    for question, picked in zip(questions, found):
        means = []
        for choice in question.choices:
            prompt = tokenizer(f"Question: {question.text}\nAnswer:", add_special_tokens=False)["input_ids"]
            ids = torch.tensor([prompt + tokenizer(f" {choice}", add_special_tokens=False)["input_ids"]])
            scores = model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[len(prompt) - 1:]
            means.append(scores.mean().item())
        assert means[picked] >= max(means) - 1e-4
    assert pick_choices(model, tokenizer, [Question("x", ("a", "b", "c", "d"), 0)])[0] in range(CHOICES)
