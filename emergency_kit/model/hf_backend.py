"""The backend on transformers, PEFT and, for 4-bit, bitsandbytes: any device.

Base weights stand in the compute type or in NF4, adapter weights in float32 (float16 and bfloat16
adapters lose small updates). PEFT takes two seconds to import, so it is imported where there are adapters.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers.utils import logging

from emergency_kit.config import LoraSection, ModelSection
from emergency_kit.errors import ModelError
from emergency_kit.model import hub
from emergency_kit.model.backend import Loaded, base_name, pick_attention, pick_device, pick_dtype

if TYPE_CHECKING:
    from emergency_kit.model import adapters

owns_loss = False


def load(model: ModelSection, device: str, gradient_checkpointing: bool, full: bool = False, sharded: bool = False, tokenizer: Any = None) -> Loaded:
    """See `Backend.load`. In 4-bit: NF4 with double quantisation; embedding, head and norms stay in the compute type."""
    dtype = pick_dtype(model, device)
    options: dict[str, Any] = {}
    if model.load_in_4bit:
        # Only tensors of a float type are divided: 4-bit weights then lie in the bytes of one instead of in uint8.
        options["quantization_config"] = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                                                            bnb_4bit_compute_dtype=dtype, bnb_4bit_quant_storage=dtype if sharded else torch.uint8)
    elif sharded:
        options["device_map"] = None  # it need not fit a GPU: it is divided on its way there
    loaded = load_model(base_name(model), model, torch.float32 if full else dtype, kind="base", tokenizer=tokenizer, **options)
    base = loaded.model
    if device == "cpu":
        _keep_4bit(base)
    base.config.use_cache = False
    if gradient_checkpointing:
        base.gradient_checkpointing_enable({"use_reentrant": False})
        base.enable_input_require_grads()
    base.train()
    loaded.notes.append(f"every weight trained, in torch.float32, compute {dtype}" if full else f"base weights {'NF4' if model.load_in_4bit else dtype}, compute {dtype}")
    loaded.notes.append(f"attention {pick_attention(model, device)}")
    return loaded


def _keep_4bit(model: Any) -> None:
    """Leave 4-bit weights as they were quantised. On a CPU with bfloat16 instructions, bitsandbytes would lay them out anew for its own kernel whenever the model
    answers, and round their scales to bfloat16 for good: what reads them afterwards would read other weights."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def attach(loaded: Loaded, model: ModelSection, lora: LoraSection, gradient_checkpointing: bool, seed: int, first: "adapters.First | None" = None) -> None:
    """See `Backend.attach`."""
    from emergency_kit.model import adapters

    torch.manual_seed(seed)
    if lora.adapter:
        loaded.model, notes = adapters.continue_adapters(loaded.model, Path(lora.adapter), lora)
        loaded.notes += notes
    else:
        weights = Path(base_name(model))
        if lora.init == "loftq" and not weights.is_dir():
            with hub.cache_where_unreachable(True):
                weights = Path(snapshot_download(base_name(model), revision=model.revision, allow_patterns=["*.safetensors"]))
        loaded.model, loaded.first = adapters.add_adapters(loaded.model, lora, weights, first)
    if pick_dtype(model, pick_device(model)) != torch.float32:
        # Autocast brings both operands to the compute type; PEFT's own cast of the input to float32 would be in vain.
        for module in loaded.model.modules():
            if hasattr(module, "cast_input_dtype_enabled"):
                module.cast_input_dtype_enabled = False
    for parameter in loaded.model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    loaded.model.train()
    kind = ", ".join(name for name, there in (("rsLoRA", lora.use_rslora), ("DoRA", lora.use_dora), (lora.init, lora.init != "default")) if there and not lora.adapter)
    loaded.notes.append(f"adapters torch.float32{f', {kind}' if kind else ''}")


# A larger model's float32 copy does not fit the machines that need the speed.
FOLD_BELOW_BYTES = 4_000_000_000


def load_adapter(base: str, folder: Path, model: ModelSection, dtype: torch.dtype | None, fold: bool = False) -> Loaded:
    """The base model with a trained adapter on it, for inference; the tokenizer is the adapter's own.

    fold: add a small model's adapter into its weights in float32 before they become `dtype`, as the merged
    model has them; decoding is then about 1.4 times as fast (benchmarks/RESULTS.md).
    """
    from peft import PeftModel

    files = list(Path(base).glob("*.safetensors"))
    fold = fold and bool(files) and sum(file.stat().st_size for file in files) < FOLD_BELOW_BYTES
    loaded = load_model(base, model, torch.float32 if fold else dtype, kind="adapter", tokenizer=load_tokenizer(str(folder), None))
    try:
        loaded.model = PeftModel.from_pretrained(loaded.model, str(folder), autocast_adapter_dtype=False).eval()
    except (SafetensorError, ValueError, RuntimeError, TypeError) as error:
        raise ModelError(f"checkpoint {folder}: the adapter cannot be loaded on {base} ({hub.first_line(error)}); "
                         "use another checkpoint or train again") from None
    if fold:
        loaded.model = loaded.model.merge_and_unload().to(dtype or pick_dtype(model, pick_device(model)))
        loaded.notes.append("adapter folded into the weights")
    return loaded


def load_model(name: str, model: ModelSection, dtype: torch.dtype | None, kind: str, tokenizer: Any = None,
               **options: Any) -> Loaded:
    """A base or merged model by folder or Hub id, in evaluation mode on the picked device. tokenizer: one that is loaded already; None loads the model's."""
    device = pick_device(model)
    dtype = dtype or pick_dtype(model, device)
    attention = pick_attention(model, device)
    revision = None if Path(name).is_dir() else model.revision
    if Path(name).is_dir():
        hub.require_whole(Path(name))
    logging.disable_progress_bar()
    with hub.cache_where_unreachable(not Path(name).is_dir()):
        try:
            loaded = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, attn_implementation=attention, revision=revision,
                                                          **{"device_map": {"": device} if device == "cuda" else None} | options)
        except (OSError, ValueError, RuntimeError, SafetensorError, ImportError) as error:
            raise ModelError(hub.explain(error, f"model {name}", name, revision)) from None
        finally:
            logging.enable_progress_bar()
    return Loaded(loaded.eval(), tokenizer or load_tokenizer(name, revision), kind, name)


def load_tokenizer(name: str, revision: str | None) -> Any:
    """A tokenizer with a chat template, an end token and a padding token."""
    with hub.cache_where_unreachable(not Path(name).is_dir()):
        try:
            tokens = AutoTokenizer.from_pretrained(name, revision=revision)
        except (OSError, ValueError, RuntimeError, ImportError) as error:
            raise ModelError(hub.explain(error, f"tokenizer of {name}", name, revision)) from None
    if tokens.chat_template is None:
        raise ModelError(f"tokenizer of {name}: no chat template; choose an instruct model")
    if tokens.eos_token_id is None:
        raise ModelError(f"tokenizer of {name}: no end token; choose an instruct model")
    if tokens.pad_token_id is None:
        tokens.pad_token = tokens.unk_token or tokens.eos_token
    return tokens
