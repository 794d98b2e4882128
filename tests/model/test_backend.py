"""Backends: the contract on each that this machine has, 4-bit weights, and that one is chosen before what it patches is imported."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from emergency_kit.config import Resolved, load_config
from emergency_kit.errors import ModelError
from emergency_kit.model import adapters, backend
from emergency_kit.training.engine import beyond_plain_loss
from tests.model import contract

bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed; make test installs it")
IDS = torch.arange(40, 90)[None]


def resolve(tiny: Path, *settings: str) -> Resolved:
    return load_config("embedded", settings=[f"model.name={tiny}", "model.load_in_4bit=true", "model.backend=hf", "lora.r=4", *settings])


@torch.no_grad()
def logits(model: object) -> torch.Tensor:
    return model.eval()(input_ids=IDS.to(model.device)).logits.float()  # type: ignore[attr-defined]


@pytest.mark.parametrize("four_bit", [False, True], ids=["full precision", "NF4"])
def test_the_contract_on_transformers_and_peft(tiny: Path, four_bit: bool) -> None:
    contract.check("hf", tiny, four_bit)


@pytest.mark.skipif(importlib.util.find_spec("unsloth") is None, reason="Unsloth is not installed (pip install '.[gpu]', on a machine with a CUDA GPU)")
@pytest.mark.parametrize("four_bit", ["false", "true"])
def test_the_contract_on_unsloth(tiny: Path, four_bit: str) -> None:
    done = subprocess.run([sys.executable, "-m", "tests.model.contract", "unsloth", str(tiny), four_bit], capture_output=True, text=True)
    assert done.returncode == 0 and "kept: Unsloth" in done.stdout, done.stdout[-3000:] + done.stderr[-3000:]


def test_4bit_weights_stay_as_they_were_quantised_when_the_model_answers(tiny: Path) -> None:
    """bitsandbytes lays them out anew on a CPU with bfloat16 instructions: what training read after an evaluation was other weights."""
    config = resolve(tiny, "model.dtype=float32").config
    loaded = backend.load_for_training(config.model, config.lora, False, 0)
    module = loaded.model.get_base_model().get_submodule("model.layers.0.self_attn.q_proj").base_layer
    before = bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
    logits(loaded.model)
    assert torch.equal(bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state), before)


def test_nf4_is_of_every_linear_module_but_the_head(tiny: Path) -> None:
    config = resolve(tiny).config
    loaded = backend.load_for_training(config.model, config.lora, False, 0)
    base = loaded.model.get_base_model()
    linears = {name: module for name, module in base.named_modules() if isinstance(module, torch.nn.Linear) and ".lora_" not in name}
    quantised = {name: module for name, module in linears.items() if isinstance(module, bitsandbytes.nn.Linear4bit)}
    assert set(linears) - set(quantised) == {"lm_head"} and len(quantised) == 2 * 7
    for module in quantised.values():
        state = module.weight.quant_state
        assert state.quant_type == "nf4" and state.nested and module.weight.dtype == torch.uint8
        assert module.compute_dtype == backend.pick_dtype(config.model, loaded.model.device.type)
    weight = quantised["model.layers.0.mlp.gate_proj.base_layer"].weight
    assert weight.numel() == 64 * 128 // 2  # half a byte each
    assert {base.lm_head.weight.dtype, base.model.embed_tokens.weight.dtype, base.model.norm.weight.dtype} == {backend.pick_dtype(config.model, loaded.model.device.type)}
    assert any("base weights NF4, compute" in note for note in loaded.notes)


def test_an_adapter_of_4_bit_training_is_merged_into_the_full_precision_base(tiny: Path, tmp_path: Path) -> None:
    from emergency_kit.artifacts import save_manifest
    from emergency_kit.export.merge import merge

    resolved = resolve(tiny, f"training.output_dir={tmp_path}", "model.dtype=float32", "export.merge_dtype=float32")
    loaded = backend.load_for_training(resolved.config.model, resolved.config.lora, False, 0)
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in loaded.model.parameters():
            if parameter.requires_grad:
                parameter += torch.randn_like(parameter) * 0.05
    folder = tmp_path / "checkpoints" / "final"
    folder.mkdir(parents=True)
    backend.save_trained(loaded.model, loaded.tokenizer, folder)
    save_manifest(folder, "train", resolved, parents=[tiny])
    merged = merge(resolved, folder)
    found = logits(backend.load_checkpoint(resolved.config.model, merged, torch.float32).model)
    exact = logits(backend.load_checkpoint(resolved.config.model, folder, torch.float32).model)  # the adapter on the full-precision base
    assert torch.allclose(found, exact, atol=1e-3)
    assert (logits(loaded.model) - exact).abs().max() > 100 * (found - exact).abs().max()  # 4-bit is another model


def test_loftq_begins_nearer_to_the_full_precision_model_than_4_bit_alone(tiny: Path, tmp_path: Path) -> None:
    exact = logits(backend.load_base(resolve(tiny).config.model, torch.float32).model)

    def load(*settings: str, first: object = None) -> backend.Loaded:
        config = resolve(tiny, "model.dtype=float32", "lora.r=16", *settings).config
        return backend.load_for_training(config.model, config.lora, False, 0, first=first)  # type: ignore[arg-type]

    plain, loftq = load(), load("lora.init=loftq")
    distance = [(logits(loaded.model) - exact).abs().mean().item() for loaded in (plain, loftq)]
    assert distance[1] < 0.8 * distance[0], distance
    name = "model.layers.0.self_attn.q_proj"
    module = loftq.model.get_base_model().get_submodule(name)
    rounded = bitsandbytes.functional.dequantize_4bit(module.base_layer.weight.data, module.base_layer.weight.quant_state).float()
    weight = backend.load_base(resolve(tiny).config.model, torch.float32).model.get_submodule(name).weight
    u, s, v = torch.linalg.svd(weight - rounded)
    product = module.scaling["default"] * module.lora_B["default"].weight @ module.lora_A["default"].weight
    assert torch.allclose(product, u[:, :16] @ torch.diag(s[:16]) @ v[:16], atol=1e-4)
    # The checkpoint is the difference, and the run goes on from the same bits.
    backend.save_trained(loftq.model, loftq.tokenizer, tmp_path, loftq.first)
    current, first = adapters.load_difference(tmp_path)
    again = load("lora.init=loftq", first=first)
    adapters.set_peft_model_state_dict(again.model, current)
    assert torch.equal(logits(again.model), logits(loftq.model))


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a CUDA GPU gets")
def test_the_choice_and_its_reason_on_a_cpu(tiny: Path) -> None:
    def choose(*settings: str) -> tuple[str, str, str]:
        choice = backend.choose(resolve(tiny, *settings).config.model)
        return choice.name, choice.device, choice.reason

    assert choose("model.backend=auto") == ("hf", "cpu", "device is cpu") and choose("model.backend=hf") == ("hf", "cpu", "by config")
    with pytest.raises(ModelError, match="model.backend is unsloth, which needs .*; next: --set model.backend=hf"):
        choose("model.backend=unsloth")
    with pytest.raises(ModelError, match=r"model.device is cuda, but torch .* sees no CUDA GPU; next: --profile embedded .* pip install '.\[gpu\]'"):
        choose("model.device=cuda")


@pytest.mark.parametrize("setting, reason", [
    ("training.method=dpo", "training.method dpo"), ("training.neftune_noise_alpha=5", "training.neftune_noise_alpha"), ("training.engine=fused", "training.engine fused"),
    ("training.label_smoothing_factor=0.1", "training.label_smoothing_factor"), ("training.finetuning_type=full", "full fine-tuning"), ("model.dtype=float32", "model.dtype float32"),
    ("lora.use_dora=true", "DoRA"), ("lora.init=loftq", "lora.init loftq"), ("lora.target_modules=all-linear", "all-linear"), ("lora.use_rslora=true", "")])
def test_what_unsloth_is_passed_by_for(setting: str, reason: str) -> None:
    config = load_config("mistral-7b", settings=[setting, *(["model.load_in_4bit=false"] if "full" in setting else [])]).config
    assert (beyond_plain_loss(config.training) or backend.beyond_unsloth(config.model, config.lora, config.training.finetuning_type == "full")) == reason


def test_a_missing_package_names_its_command(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None if name == "bitsandbytes" else find(name, *rest))
    with pytest.raises(ModelError, match=r"^model.load_in_4bit needs the package bitsandbytes; next: pip install '.\[gpu\]', or --set model.load_in_4bit=false$"):
        backend.choose(resolve(tiny).config.model)


def test_nothing_that_unsloth_patches_is_imported_before_the_choice() -> None:
    probe = "import sys, emergency_kit.cli, emergency_kit.training.run, emergency_kit.model.backend as backend\n" \
            "from emergency_kit.config import load_config\n" \
            "backend.choose(load_config('embedded').config.model)\n" \
            "print(sorted({'transformers', 'peft', 'trl'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr[-2000:]
