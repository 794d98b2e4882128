"""What tuning cost: does the tuned model still know and do what the base model did?

In: the models of an evaluation that are folders. Out: for each, perplexity on plain text, the share of multiple-choice questions
answered rightly, the share of simple instructions followed; material in `questions.yaml`. A choice counts as the answer when the
model finds it the likeliest per token after the question. Limits: plain knowledge and short instructions in English; a small
model is near chance on much of it, so that the difference is what to read. GGUF files and endpoints are not measured here.
Run: `emergency-kit evaluate --tuning-cost`.
"""

from __future__ import annotations

import functools
import math
import random
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Sequence

import yaml

from emergency_kit.config import Resolved
from emergency_kit.evaluation.baselines import PLAIN_PROMPT
from emergency_kit.evaluation.contestant import Contestant, ask
from emergency_kit.evaluation.statistics import mcnemar, wilson
from emergency_kit.model import backend

if TYPE_CHECKING:
    import torch

MATERIAL = Path(__file__).parent / "questions.yaml"
CHOICES = 4
BATCH_ROWS = 32
INSTRUCTION_TOKENS = 80


@dataclass(frozen=True)
class Question:
    """choices: in the order asked; right: place of the right one."""

    text: str
    choices: tuple[str, ...]
    right: int


@functools.lru_cache(maxsize=1)
def load_material() -> tuple[tuple[Question, ...], tuple[tuple[str, str], ...], str]:
    """`(questions, (instruction, pattern) pairs, plain text)`; the order of choices is fixed by the question's place."""
    material = yaml.safe_load(MATERIAL.read_text(encoding="utf-8"))
    questions: list[Question] = []
    for group in material["questions"].values():
        for line in group:
            text, right, *wrong = (part.strip() for part in line.split("|"))
            choices = [right, *wrong]
            assert len(choices) == CHOICES, line
            random.Random(len(questions)).shuffle(choices)
            questions.append(Question(text, tuple(choices), choices.index(right)))
    return tuple(questions), tuple((prompt, pattern) for prompt, pattern in material["instructions"]), material["text"]


def measure_cost(resolved: Resolved, opened: Sequence[Contestant]) -> dict[str, Any]:
    """The three numbers of every folder among the models; the first one against each other by exact McNemar on the questions."""
    questions, instructions, text = load_material()
    rows, picked, tokens = [], [], 0
    for contestant in opened:
        if contestant.kind in ("gguf", "endpoint"):
            continue
        section = resolved.config.model
        print(f"What tuning cost: {contestant.name}", flush=True)
        loaded = backend.load_base(section) if contestant.is_base else backend.load_checkpoint(section, Path(contestant.path), fold=True)
        perplexity, tokens = measure_perplexity(loaded.model, loaded.tokenizer, text)
        picked.append([choice == question.right for choice, question in zip(pick_choices(loaded.model, loaded.tokenizer, questions), questions)])
        del loaded
        answers = ask(contestant, [[{"role": "system", "content": PLAIN_PROMPT}, {"role": "user", "content": prompt}] for prompt, _ in instructions], INSTRUCTION_TOKENS, name=f"{contestant.name}, instructions")
        followed = [bool(re.fullmatch(pattern, answer.text.strip())) for (answer,), (_, pattern) in zip(answers, instructions)]
        share = wilson(sum(picked[-1]), len(questions))
        assert share is not None
        rows.append({"name": contestant.name, "perplexity": round(perplexity, 4), "right": round(share.value, 4), "low": round(share.low, 4), "high": round(share.high, 4),
                     "p_against_first": float(f"{mcnemar(picked[0], picked[-1]):.3g}"), "instructions": round(sum(followed) / len(followed), 4)})
    return {"models": rows, "questions": len(questions), "chance": 1 / CHOICES, "text_tokens": tokens, "instruction_prompts": len(instructions)}


def measure_perplexity(model: Any, tokenizer: Any, text: str) -> tuple[float, int]:
    """`(perplexity, tokens)` of a text, paragraph by paragraph, each from its second token on."""
    total, count = 0.0, 0
    for paragraph in text.split("\n\n"):
        ids = tokenizer(" ".join(paragraph.split()), add_special_tokens=False)["input_ids"]
        scores = _score_rows(model, [ids], pad=tokenizer.pad_token_id or 0)[0]
        total, count = total - float(scores.sum()), count + len(scores)
    return math.exp(total / count), count


def pick_choices(model: Any, tokenizer: Any, questions: Sequence[Question]) -> list[int]:
    """For each question the place of the choice that the model finds likeliest, by the mean over its tokens."""
    rows, starts = [], []
    for question in questions:
        prompt = tokenizer(f"Question: {question.text}\nAnswer:", add_special_tokens=False)["input_ids"]
        for choice in question.choices:
            rows.append(prompt + tokenizer(f" {choice}", add_special_tokens=False)["input_ids"])
            starts.append(len(prompt) - 1)
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    means = [0.0] * len(rows)
    for start in range(0, len(order), BATCH_ROWS):
        chosen = order[start:start + BATCH_ROWS]
        for index, scores in zip(chosen, _score_rows(model, [rows[index] for index in chosen], pad=tokenizer.pad_token_id or 0)):
            means[index] = float(scores[starts[index]:].mean())
    return [max(range(CHOICES), key=lambda choice: means[number * CHOICES + choice]) for number in range(len(questions))]


def _score_rows(model: Any, rows: Sequence[Sequence[int]], pad: int) -> "list[torch.Tensor]":
    """Log-probability of every token but the first, one float32 tensor [tokens - 1] a row; rows are padded on the right."""
    import torch

    width = max(map(len, rows))
    ids = torch.tensor([list(row) + [pad] * (width - len(row)) for row in rows], device=model.device)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=model.device)
    with torch.inference_mode():
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].float()
    scores = logits.log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0].cpu()
    return [scores[place, :len(row) - 1] for place, row in enumerate(rows)]
