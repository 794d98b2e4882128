"""Tokenizers of chat models' families, built here since none can be downloaded: each family's own way to split text, its special tokens with
their flags, and its chat template in the form in which its makers publish it (tools and images left out). The vocabularies are small."""

from __future__ import annotations

import copy
import functools
import json
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from emergency_kit.knowledge.cards import CARD_FOLDER

BUNDLED = "models/SmolLM2-135M-Instruct"
_ALTERNATE = ("{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}")
_SYSTEM_ASIDE = "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}{% set rest = messages[1:] %}{% else %}{% set rest = messages %}{% endif %}"
_CHATML = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
TEMPLATES = {
    # As first published: no system role, and no space before an answer.
    "mistral-v0.2": "{{ bos_token }}{% for m in messages %}" + _ALTERNATE + "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
                    "{% elif m['role'] == 'assistant' %}{{ m['content'] + eos_token }}{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}",
    # As revised: the system's text in the first user turn, spaces before [INST] and before an answer.
    "mistral-v0.2-revised": _SYSTEM_ASIDE + "{{ bos_token }}{% for m in rest %}" + _ALTERNATE + "{% if m['role'] == 'user' %}{% if loop.first and system is defined %}"
                            "{{ ' [INST] ' + system + '\\n\\n' + m['content'] + ' [/INST]' }}{% else %}{{ ' [INST] ' + m['content'] + ' [/INST]' }}{% endif %}"
                            "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}",
    # [INST] is one token; the system's text in the last user turn; no space before [/INST].
    "mistral-v0.3": _SYSTEM_ASIDE + "{{ bos_token }}{% for m in rest %}" + _ALTERNATE + "{% if m['role'] == 'user' %}{% if loop.last and system is defined %}"
                    "{{ '[INST] ' + system + '\\n\\n' + m['content'] + '[/INST]' }}{% else %}{{ '[INST] ' + m['content'] + '[/INST]' }}{% endif %}"
                    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] | trim + eos_token }}{% endif %}{% endfor %}",
    # BOS in front of the first turn; texts trimmed.
    "llama-3": "{% for m in messages %}{% set content = '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' + m['content'] | trim + '<|eot_id|>' %}"
               "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
               "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}",
    # A system turn with today's date.
    "llama-3.2": "{{ bos_token }}{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y %H:%M:%S.%f') %}{% endif %}" + _SYSTEM_ASIDE +
                 "{{ '<|start_header_id|>system<|end_header_id|>\\n\\nCutting Knowledge Date: December 2023\\nToday Date: ' + date_string + '\\n\\n' + (system | default('') | trim) + '<|eot_id|>' }}"
                 "{% for m in rest %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' + m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
                 "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}",
    # A system text of its own where none is given.
    "qwen-2.5": "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\\n' }}{% endif %}" + _CHATML,
    # The last answer has a thought, an empty one where none is given; a prompt has it where thinking is off.
    "qwen-3": "{% for m in messages %}{% if m['role'] == 'assistant' %}{% set content = m['content'] %}{% if '</think>' in content %}{% set content = content.split('</think>')[-1].lstrip('\\n') %}"
              "{% endif %}{{ '<|im_start|>assistant\\n' }}{% if loop.last %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}{{ content + '<|im_end|>\\n' }}"
              "{% else %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
              "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}{% endif %}",
    # One that always thinks: its prompt opens a thought that a conversation with an answer has closed.
    "qwen-3-thinking": "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ '<|im_start|>assistant\\n' }}{% if loop.last %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}{{ m['content'] + '<|im_end|>\\n' }}"
                       "{% else %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n<think>\\n' }}{% endif %}",
    # Its turns end with <end_of_turn>, while the tokenizer's own end token is <eos>.
    "gemma": "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}{% for m in messages %}" + _ALTERNATE +
             "{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}{{ '<start_of_turn>' + role + '\\n' + m['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}"
             "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}",
    # Its turns end with <|end|>, its conversations with <|endoftext|>; special tokens swallow the white space behind them.
    "phi-3": "{% for m in messages %}{{ '<|' + m['role'] + '|>\\n' + m['content'] + '<|end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}",
    "smollm2": "{% for m in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\\n' }}{% endif %}"
               "{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
}
_LLAMA_WORDS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
_LEGACY = {"normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]}, "pre_tokenizer": None}
_FIRST = {"normalizer": None, "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}}
_GEMMA = {"normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}, "pre_tokenizer": {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}}
# bos, eos and pad as published; None where there is none. added: further special tokens. bos_added: by the tokenizer itself, beside the template.
FAMILIES: dict[str, dict[str, Any]] = {
    "mistral-v0.2": {"splits": _LEGACY, "bos": "<s>", "eos": "</s>", "bos_added": True},
    "mistral-v0.2-revised": {"splits": _LEGACY, "bos": "<s>", "eos": "</s>", "bos_added": True},
    "mistral-v0.3": {"splits": _FIRST, "bos": "<s>", "eos": "</s>", "bos_added": True, "added": ["[INST]", "[/INST]"]},
    "llama-3": {"words": _LLAMA_WORDS, "bos": "<|begin_of_text|>", "eos": "<|eot_id|>", "bos_added": True, "added": ["<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>"]},
    "llama-3.2": {"words": _LLAMA_WORDS, "bos": "<|begin_of_text|>", "eos": "<|eot_id|>", "bos_added": True, "pad": "<|finetune_right_pad_id|>", "added": ["<|start_header_id|>", "<|end_header_id|>"]},
    "qwen-2.5": {"words": _LLAMA_WORDS.replace("{1,3}", ""), "nfc": True, "eos": "<|im_end|>", "pad": "<|endoftext|>", "added": ["<|im_start|>"]},
    "qwen-3": {"words": _LLAMA_WORDS.replace("{1,3}", ""), "nfc": True, "eos": "<|im_end|>", "pad": "<|endoftext|>", "added": ["<|im_start|>"], "plain": ["<think>", "</think>"]},
    "qwen-3-thinking": {"words": _LLAMA_WORDS.replace("{1,3}", ""), "nfc": True, "eos": "<|im_end|>", "pad": "<|endoftext|>", "added": ["<|im_start|>"], "plain": ["<think>", "</think>"]},
    "gemma": {"splits": _GEMMA, "bos": "<bos>", "eos": "<eos>", "pad": "<pad>", "bos_added": True, "added": ["<start_of_turn>", "<end_of_turn>"]},
    "phi-3": {"splits": _LEGACY, "bos": "<s>", "eos": "<|endoftext|>", "pad": "<|endoftext|>", "strips": ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]},
    "smollm2": {"bundled": True},
}


def build_tokenizer(family: str) -> PreTrainedTokenizerFast:
    """A tokenizer of the family with its chat template."""
    about = FAMILIES[family]
    if about.get("bundled"):
        loaded = AutoTokenizer.from_pretrained(BUNDLED)
        loaded.chat_template = TEMPLATES[family]
        return loaded
    parts = copy.deepcopy(_pieces() if "splits" in about else _bytes())
    parts.update(about.get("splits") or {
        "normalizer": {"type": "NFC"} if about.get("nfc") else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Split", "pattern": {"Regex": about["words"]}, "behavior": "Isolated", "invert": False},
                                                                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}]}})
    tokenizer = Tokenizer.from_str(json.dumps(parts))
    roles = {f"{role}_token": about[role] for role in ("bos", "eos", "pad") if role in about} | ({"unk_token": "<unk>"} if "splits" in about else {})
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False, rstrip=text in about.get("strips", ())) for text in
                                  dict.fromkeys([*roles.values(), *about.get("added", ()), *about.get("strips", ())])])
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in about.get("plain", ())])
    if about.get("bos_added"):
        from tokenizers.processors import TemplateProcessing

        tokenizer.post_processor = TemplateProcessing(single=f"{about['bos']} $A", special_tokens=[(about["bos"], tokenizer.token_to_id(about["bos"]))])
    built = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **roles)
    built.chat_template = TEMPLATES[family]
    return built


@functools.cache
def _pieces() -> dict[str, Any]:
    """Byte-fallback BPE in the form of SentencePiece's, trained on the knowledge cards."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))], limit_alphabet=80, show_progress=False)
    texts = [path.read_text(encoding="utf-8") for path in sorted(CARD_FOLDER.glob("*.yaml"))[:20]]
    # As in Mistral's own vocabulary, where [/INST] without a token of its own is ▁[, /, INST, ].
    tokenizer.train_from_iterator(["▁" + word for text in texts for word in text.split()] + ["▁[", "INST"] * 200, trainer)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    parts = json.loads(tokenizer.to_str())
    parts["added_tokens"] = [token for token in parts["added_tokens"] if not token["content"].startswith("<0x")]
    return parts


@functools.cache
def _bytes() -> dict[str, Any]:
    """The bundled tokenizer's byte-level vocabulary without its special tokens."""
    parts = json.loads(AutoTokenizer.from_pretrained(BUNDLED).backend_tokenizer.to_str())
    special = {token["content"] for token in parts["added_tokens"]}
    kept = [token for token in parts["model"]["vocab"] if token not in special][:4000]  # the first merges; the whole takes half a second a family
    parts["model"]["vocab"] = {token: number for number, token in enumerate(kept)}
    merges, tokens = [merge if isinstance(merge, list) else merge.split(" ") for merge in parts["model"]["merges"]], set(kept)
    parts["model"]["merges"] = [merge for merge in merges if {*merge, "".join(merge)} <= tokens]
    return parts | {"added_tokens": [], "post_processor": None}
