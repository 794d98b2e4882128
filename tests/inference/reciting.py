"""A tiny model that has learnt texts by heart, so that a test knows what a real model will write, word for word."""

from pathlib import Path
from typing import Mapping

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from emergency_kit.data.format import build_messages, shown_cards
from emergency_kit.data.template import render_prompt
from emergency_kit.knowledge.cards import load_cards
from emergency_kit.knowledge.retrieve import Retriever
from tests.tiny import save_tiny_model


def save_reciting_model(folder: Path, answers: Mapping[str, str], country: str, steps: int = 90) -> Path:
    """A model folder whose greedy answer to each situation in that country is the given text; raises AssertionError where it did not learn them."""
    save_tiny_model(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.05)
    cards = load_cards()
    retriever = Retriever(cards, 2)
    rows = []
    for situation, text in answers.items():
        found = retriever.find(situation)
        prompt = tokenizer(render_prompt(tokenizer, build_messages(situation, shown_cards(found.ids, cards), "", country, found.fits)), add_special_tokens=False).input_ids
        answer = tokenizer(text, add_special_tokens=False).input_ids + [tokenizer.eos_token_id]
        rows.append((torch.tensor([prompt + answer]), len(prompt)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for _ in range(steps):
        worst = 0.0
        for ids, start in rows:
            loss = torch.nn.functional.cross_entropy(model(ids, logits_to_keep=ids.shape[1] - start + 1).logits[0, :-1], ids[0, start:])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            worst = max(worst, loss.item())
        if worst < 0.05:
            break
    assert worst < 0.2, f"the texts were not learnt: loss {worst:.2f}"
    model.save_pretrained(folder)
    return folder
