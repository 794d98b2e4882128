"""Tiny random models and adapters with real tokenizers, saved as the real stages save theirs."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, normalizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from emergency_kit.config import Resolved, load_config
from emergency_kit.knowledge.cards import CARD_FOLDER

BUNDLED = Path("models/SmolLM2-135M-Instruct")
HELD_OUT = Path(__file__).parent / "held_out"
MISTRAL_TEMPLATE = ("{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
                    "{% elif m.role == 'assistant' %}{{ m.content + eos_token }}{% else %}{{ raise_exception('no system role') }}{% endif %}{% endfor %}")


def save_model(folder: Path, kind: str = "llama", tokenizer: Any = None, **settings: Any) -> Path:
    """Two layers, rows of 256 and 512 weights, random; norms and biases random too, so that none can be forgotten unseen."""
    tokenizer = tokenizer or AutoTokenizer.from_pretrained(BUNDLED)
    base: dict[str, Any] = {
        "vocab_size": len(tokenizer), "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 8,
        "num_key_value_heads": 2, "max_position_embeddings": 4096, "initializer_range": 0.1, "tie_word_embeddings": True,
        "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(base | settings)))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_adapter(folder: Path, base: Path) -> Path:
    """A random LoRA adapter on a saved model, with both factors nonzero."""
    torch.manual_seed(1)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"], task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


def copy_folder(source: Path, target: Path) -> Path:
    """A copy that a test may damage."""
    shutil.copytree(source, target)
    return target


def build_split_tokenizer(pre_tokenizer: dict[str, Any], ignore_merges: bool = False) -> PreTrainedTokenizerFast:
    """The bundled vocabulary under another way to split text."""
    loaded = AutoTokenizer.from_pretrained(BUNDLED)
    parts = copy.deepcopy(json.loads(loaded.backend_tokenizer.to_str()))
    parts["pre_tokenizer"] = pre_tokenizer
    parts["model"]["ignore_merges"] = ignore_merges
    return _wrap(Tokenizer.from_str(json.dumps(parts)), loaded.chat_template, bos="<|im_start|>", eos="<|im_end|>", unk="<|endoftext|>", pad="<|im_end|>")


def build_sentencepiece_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-fallback BPE in the form of Mistral 7B's, trained on the knowledge cards."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    trainer = trainers.BpeTrainer(vocab_size=2000, special_tokens=["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))],
                                  limit_alphabet=80, show_progress=False)
    words = [word for path in sorted(CARD_FOLDER.glob("*.yaml")) for word in path.read_text(encoding="utf-8").split()]
    tokenizer.train_from_iterator(words, trainer)
    parts = json.loads(tokenizer.to_str())
    parts["added_tokens"] = [token for token in parts["added_tokens"] if not token["content"].startswith("<0x")]
    return _wrap(Tokenizer.from_str(json.dumps(parts)), MISTRAL_TEMPLATE, bos="<s>", eos="</s>", unk="<unk>", pad="<unk>")


def _wrap(tokenizer: Tokenizer, template: str, **special: str) -> PreTrainedTokenizerFast:
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **{f"{role}_token": token for role, token in special.items()})
    wrapped.chat_template = template
    return wrapped


def resolve(model: Path, output: Path, *settings: str) -> Resolved:
    """The embedded profile on a tiny model, with a short certificate on three held-out records; random weights do not survive 4 bits."""
    return load_config("embedded", settings=[
        f"model.name={model}", f"training.output_dir={output}", f"dataset.name={HELD_OUT}", "export.certificate_strings=120", "export.certificate_answer_tokens=60",
        "export.certificate_prompts=2", "export.certificate_max_new_tokens=6", "export.max_mean_kl={q4_k_m: 1.0}",
        "export.min_top1_percent={f32: 97, f16: 90, bf16: 80, q8_0: 50, q4_k_m: 0}", *settings])
