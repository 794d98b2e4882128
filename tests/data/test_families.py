"""Chat templates of many families: training rows are the template's own tokens, answer and end token alone are learnt, and prompts are what rows begin with."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from emergency_kit.config import load_config
from emergency_kit.data.format import SYSTEM_PROMPT, Record, build_messages, record_messages
from emergency_kit.data.template import SETTINGS, PromptRenderer, as_accepted, find_turn, render_prompt
from emergency_kit.data.tokenize import IGNORE, build_rows, encode_prompt, encode_row, end_of_turn
from emergency_kit.inference.torch_engine import Engine
from emergency_kit.model.backend import Loaded
from emergency_kit.model.hf_backend import load_tokenizer
from emergency_kit.training.batches import collate
from tests.data.families import FAMILIES, build_tokenizer

RESOLVED = load_config("embedded", settings=["dataset.grounding=none", "model.max_seq_length=100000"])
# What stands before the user's text, behind it, and behind the answer. SYSTEM is the kit's system prompt.
CHATML = ("<|im_start|>system\nSYSTEM<|im_end|>\n<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>")
LLAMA_TAIL = "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
GOLDEN = {
    "mistral-v0.2": ("<s>[INST] SYSTEM\n\n", " [/INST]", "</s>"),
    "mistral-v0.2-revised": ("<s> [INST] SYSTEM\n\n", " [/INST]", "</s>"),
    "mistral-v0.3": ("<s>[INST] SYSTEM\n\n", "[/INST]", "</s>"),
    "llama-3": ("<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nSYSTEM<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n", LLAMA_TAIL, "<|eot_id|>"),
    "llama-3.2": ("<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\nSYSTEM<|eot_id|>"
                  "<|start_header_id|>user<|end_header_id|>\n\n", LLAMA_TAIL, "<|eot_id|>"),
    "qwen-2.5": CHATML,
    "qwen-3": (CHATML[0], CHATML[1] + "<think>\n\n</think>\n\n", CHATML[2]),
    "qwen-3-thinking": (CHATML[0], CHATML[1] + "<think>\n\n</think>\n\n", CHATML[2]),
    "gemma": ("<bos><start_of_turn>user\nSYSTEM\n\n", "<end_of_turn>\n<start_of_turn>model\n", "<end_of_turn>"),
    "phi-3": ("<|system|>\nSYSTEM<|end|>\n<|user|>\n", "<|end|>\n<|assistant|>\n", "<|end|>"),
    "smollm2": CHATML,
}
# Tokens of ` [/INST]` or what stands in its place, of the answer `FACTS` and of its end: a border is never a matter of taste.
BORDERS = {
    "mistral-v0.2": ["]", "F", "A"],  # no space before the answer: its first token is not a word's beginning
    "mistral-v0.2-revised": ["]", "▁F", "A"],
    "mistral-v0.3": ["[/INST]", "▁F", "A"],
    "gemma": ["<0x0A>", "F", "A"],
    "phi-3": ["<|assistant|>", "▁F", "A"],
    "llama-3": ["ĊĊ", "F", "AC"], "qwen-3": ["ĊĊ", "F", "AC"], "smollm2": ["Ċ", "F", "AC"],
}
CONTROLS = ["<|im_end|>", "<|im_start|>system\n", "</s>", "<s>", "[INST]", " [/INST]", "<|eot_id|>", "<bos>", "<end_of_turn>", "<|end|>", "<|user|>", "</think>"]
ASKED = st.text(min_size=1, max_size=60).filter(str.strip) | st.lists(st.sampled_from([*CONTROLS, "smoke", " ", "\n", "112", "é"]), min_size=1, max_size=6).map("".join).filter(str.strip)
# What an answer may hold: anything but control tokens, which would be learnt as such (`data inspect` names them).
ANSWERED = st.text(st.characters(codec="utf-8", exclude_characters="<["), min_size=1, max_size=80).filter(str.strip) | st.sampled_from(
    ["FACTS\n• Smoke.\n\nGUIDANCE\n1. Call 112.", "The fire.", "]x", " 1-800-222-1222 ", "\u00a0a", "e\u0301"])


@functools.cache
def tokenizer_of(family: str) -> Any:
    return build_tokenizer(family)


@pytest.mark.parametrize("family", FAMILIES)
def test_golden_prompts_and_end_tokens(family: str) -> None:
    tokenizer, (head, tail, end) = tokenizer_of(family), GOLDEN[family]
    messages = build_messages("oil burns", None)
    assert render_prompt(tokenizer, messages) == head.replace("SYSTEM", SYSTEM_PROMPT) + "SITUATION: oil burns" + tail
    assert find_turn(tokenizer).end == end and tokenizer.convert_ids_to_tokens(end_of_turn(tokenizer)) == end
    assert PromptRenderer(tokenizer)._wrapped == (head.replace("SYSTEM", SYSTEM_PROMPT), tail)
    ids, prompt = encode_row(tokenizer, messages, "FACTS")
    border = BORDERS.get(family)
    if border:
        assert tokenizer.convert_ids_to_tokens(ids[prompt - 1:prompt + 2]) == border
    assert tokenizer.convert_ids_to_tokens(ids[-1]) == end


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_are_the_templates_own_tokens(family: str) -> None:
    tokenizer = tokenizer_of(family)
    end, bos = end_of_turn(tokenizer), tokenizer.bos_token_id

    @settings(max_examples=40, deadline=None, derandomize=True)
    @given(texts=st.lists(st.tuples(ASKED, ASKED | st.just(""), ANSWERED), min_size=1, max_size=4))
    def hold(texts: list[tuple[str, str, str]]) -> None:
        records = [Record(f"r{number}", asked, answered, instruction) for number, (asked, instruction, answered) in enumerate(texts)]
        rows = build_rows(records, tokenizer, RESOLVED)
        for record, row in zip(records, rows):
            messages = record_messages(record, {}, "none")
            accepted = as_accepted(tokenizer, messages)
            whole = tokenizer.apply_chat_template([*accepted, {"role": "assistant", "content": record.output.strip()}], tokenize=True, return_dict=False, **SETTINGS)
            ids, labels = row["input_ids"], row["labels"]
            assert ids == whole[:len(ids)], tokenizer.convert_ids_to_tokens(ids)
            rest = tokenizer.decode(whole[len(ids):]).replace(tokenizer.eos_token, "")
            assert not rest.strip()  # behind the end token a template has a new line at most, and Phi the end of the conversation
            assert bos is None or family in ("phi-3", "smollm2") or ids.count(bos) == 1 and ids[0] == bos
            prompt = encode_prompt(tokenizer, messages)
            assert ids[:len(prompt)] == prompt and labels == [IGNORE] * len(prompt) + ids[len(prompt):]
            assert ids[-1] == end and ids[len(prompt):].count(end) == 1
            alone = tokenizer(record.output.strip(), add_special_tokens=False).input_ids  # a letter that the vocabulary lacks is lost in both
            learnt, expected = (tokenizer.decode(part, clean_up_tokenization_spaces=False) for part in (ids[len(prompt):-1], alone))
            assert learnt.lstrip(" ") == expected.lstrip(" ")
            system = SYSTEM_PROMPT if accepted[0]["role"] == "system" else f"{SYSTEM_PROMPT}\n\n"
            assert accepted[0]["content"].startswith(system) and len(accepted) == (2 if accepted[0]["role"] == "system" else 1)
        # A user cannot write a turn: as many control tokens as the template itself writes.
        special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
        plain = sum(number in special for number in encode_prompt(tokenizer, build_messages("fire", None)))
        assert all(sum(number in special for number, label in zip(row["input_ids"], row["labels"]) if label == IGNORE) == plain for row in rows)
        batch = collate(list(rows), tokenizer.pad_token_id if tokenizer.pad_token_id is not None else end)
        assert ((batch["labels"] == IGNORE) | (batch["attention_mask"] == 1)).all()  # padding is never learnt, whichever token it is
        assert ((batch["labels"] == end).sum(1) == 1).all()

    hold()


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_stops_at_the_token_that_was_learnt(family: str, tmp_path: Path) -> None:
    tokenizer_of(family).save_pretrained(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path), None)
    assert encode_row(tokenizer, build_messages("fire", None), "FACTS") == encode_row(tokenizer_of(family), build_messages("fire", None), "FACTS")
    assert tokenizer.pad_token_id is not None
    end = end_of_turn(tokenizer)
    torch.manual_seed(0)
    # As on the Hub: the model's own settings may know the tokenizer's end token alone.
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1,
                                         max_position_embeddings=4096, eos_token_id=tokenizer.eos_token_id, bos_token_id=None, pad_token_id=None)).eval()
    with torch.no_grad():  # a model that says the end token after whatever it reads
        model.lm_head.weight.zero_()
        model.model.norm.weight.zero_()
    model.lm_head = torch.nn.Linear(16, len(tokenizer))
    with torch.no_grad():
        model.lm_head.bias.zero_()
        model.lm_head.bias[end] = 9.0
    answer, = Engine(Loaded(model, tokenizer, "base", "")).generate([build_messages("fire", None)], 5)
    assert answer.text == "" and answer.tokens == 1 and answer.ended


def test_a_template_that_leaves_the_answers_header_out_of_its_prompt() -> None:
    tokenizer = build_tokenizer("smollm2")
    tokenizer.chat_template = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    assert render_prompt(tokenizer, build_messages("fire", None)).endswith("SITUATION: fire<|im_end|>\n<|im_start|>assistant\n")
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    ids, prompt = encode_row(tokenizer, build_messages("fire", None), "Leave.")
    assert tokenizer.decode(ids[:prompt]).endswith("SITUATION: fire\nassistant:") and tokenizer.decode(ids[prompt:]) == " Leave.<|im_end|>"


def test_where_a_token_stands_over_the_border_the_prompt_stays() -> None:
    tokenizer = build_tokenizer("smollm2")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'user' %} A{% endif %}{% endfor %}"
    messages = build_messages("fire", None)
    ids, prompt = encode_row(tokenizer, messages, "nswer")
    assert ids[:prompt] == encode_prompt(tokenizer, messages) and tokenizer.convert_ids_to_tokens(ids[prompt - 1]) == "ĠA"
    assert tokenizer.decode(ids[prompt:]) == "nswer<|im_end|>" and tokenizer.convert_ids_to_tokens(ids[-1]) == "<|im_end|>"
