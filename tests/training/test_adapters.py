"""Kinds of adapters: what each begins as, what is trained, and that a finished one means on the base model what it meant in training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from emergency_kit.config import Resolved, load_config
from emergency_kit.errors import ConfigError, ModelError
from emergency_kit.model import adapters, backend
from emergency_kit.model.backend import Loaded
from emergency_kit.training.engine import install_engine
from emergency_kit.training.schedule import group_parameters
from tests.tiny import WHOLE, save_tiny_model

IDS = torch.arange(40, 90)[None]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny", tokens=WHOLE)


def resolve(tiny: Path, *settings: str) -> Resolved:
    return load_config("embedded", settings=[f"model.name={tiny}", "model.dtype=float32", "lora.r=4", *settings])


def load(tiny: Path, *settings: str, first: Any = None) -> Loaded:
    config = resolve(tiny, *settings).config
    return backend.load_for_training(config.model, config.lora, False, 0, config.training.finetuning_type == "full", first=first)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(input_ids=IDS).logits


def trained(model: Any) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def perturb(model: Any) -> None:
    """As if it had been trained: every trained weight is moved."""
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += torch.randn_like(parameter) * 0.05


@pytest.mark.parametrize("settings", [("lora.use_rslora=true",), ("lora.use_dora=true",), ("lora.init=pissa",), ("lora.init=pissa_niter_8",), ("lora.init=pissa", "lora.use_rslora=true"),
                                      ("lora.target_modules=all-linear",), ("lora.modules_to_save=[lm_head]",), ("training.finetuning_type=full",)], ids=" ".join)
def test_every_kind_begins_as_the_base_model(tiny: Path, settings: tuple[str, ...]) -> None:
    base = logits(backend.load_base(resolve(tiny).config.model).model)
    assert torch.allclose(logits(load(tiny, *settings).model), base, atol=2e-3)


def test_rslora_changes_the_scale_alone(tiny: Path) -> None:
    plain, other = load(tiny), load(tiny, "lora.use_rslora=true")
    assert all(torch.equal(a, b) for a, b in zip(plain.model.state_dict().values(), other.model.state_dict().values()))
    scales = [{module.scaling["default"] for module in loaded.model.modules() if hasattr(module, "lora_A")} for loaded in (plain, other)]
    assert scales == [{32 / 4}, {32 / 2}]


def test_dora_trains_a_magnitude_for_every_output(tiny: Path) -> None:
    more = trained(load(tiny, "lora.use_dora=true").model) - trained(load(tiny).model)
    assert len(more) == 2 * 7 and all("lora_magnitude_vector" in name for name in more)


def test_all_linear_is_every_linear_module_but_the_head(tiny: Path) -> None:
    assert trained(load(tiny, "lora.target_modules=all-linear").model) == trained(load(tiny).model)
    assert len(trained(load(tiny, "lora.target_modules=[q_proj]").model)) == 2 * 2
    with pytest.raises(ModelError, match="lora.target_modules"):
        load(tiny, "lora.target_modules=[nothing_proj]")


def test_modules_to_save_are_trained_in_full_and_saved(tiny: Path, tmp_path: Path) -> None:
    loaded = load(tiny, "lora.modules_to_save=[lm_head]")
    assert trained(loaded.model) - trained(load(tiny).model) == {"base_model.model.lm_head.modules_to_save.default.weight"}
    loaded.model.save_pretrained(tmp_path)
    assert "base_model.model.lm_head.weight" in load_file(tmp_path / "adapter_model.safetensors")
    with pytest.raises(ModelError, match="lora.modules_to_save: 'nothing'"):
        load(tiny, "lora.modules_to_save=[nothing]")


@pytest.mark.parametrize("name", ["lm_head", "embed_tokens"])
def test_a_head_that_the_base_model_ties_is_not_trained_alone(tmp_path: Path, name: str) -> None:
    tied = save_tiny_model(tmp_path / "tied", tied=True)
    with pytest.raises(ModelError, match=f"ties lm_head to embed_tokens, so {name} cannot"):
        load(tied, f"lora.modules_to_save=[{name}]")


def _with_tokenizer(folder: Path, base: Path) -> Path:
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (base / name).exists():
            (folder / name).write_bytes((base / name).read_bytes())
    return folder


def test_pissa_takes_the_largest_directions(tiny: Path) -> None:
    base, loaded = backend.load_base(resolve(tiny).config.model).model, load(tiny, "lora.init=pissa")
    name = "model.layers.0.self_attn.q_proj"
    weight, module = base.get_submodule(name).weight, loaded.model.get_base_model().get_submodule(name)
    u, s, v = torch.linalg.svd(weight)
    product = module.scaling["default"] * module.lora_B["default"].weight @ module.lora_A["default"].weight
    assert torch.allclose(product, u[:, :4] @ torch.diag(s[:4]) @ v[:4], atol=1e-4)
    assert torch.allclose(module.base_layer.weight + product, weight, atol=1e-5)


@pytest.mark.parametrize("settings", [("lora.init=pissa",), ("lora.init=pissa", "lora.use_rslora=true")], ids=" ".join)
def test_a_pissa_checkpoint_is_a_plain_adapter_on_the_unchanged_base(tiny: Path, tmp_path: Path, settings: tuple[str, ...]) -> None:
    loaded, config = load(tiny, *settings), resolve(tiny).config
    perturb(loaded.model)
    wanted = logits(loaded.model)
    loaded.model.save_pretrained(tmp_path)
    adapters.save_difference(loaded.model, loaded.first, tmp_path)
    _with_tokenizer(tmp_path, tiny)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["r"] == 8 and saved["init_lora_weights"] is True
    found = backend.load_checkpoint(config.model, tmp_path, torch.float32)
    assert torch.allclose(logits(found.model), wanted, atol=1e-3)
    # And the run itself goes on from the same bits.
    current, first = adapters.load_difference(tmp_path)
    assert all(torch.equal(first[name], value) for name, value in loaded.first.items())
    again = load(tiny, *settings, first=first)
    adapters.set_peft_model_state_dict(again.model, current)
    assert all(torch.equal(a, b) for a, b in zip(again.model.state_dict().values(), loaded.model.state_dict().values()))
    assert torch.equal(logits(again.model), wanted)


def test_training_goes_on_from_an_adapter_with_its_own_rank(tiny: Path, tmp_path: Path) -> None:
    earlier = load(tiny, "lora.r=2", "lora.target_modules=[q_proj,v_proj]")
    perturb(earlier.model)
    earlier.model.save_pretrained(tmp_path)
    _with_tokenizer(tmp_path, tiny)
    loaded = load(tiny, f"lora.adapter={tmp_path}", "lora.dropout=0.25")
    assert torch.equal(logits(loaded.model), logits(earlier.model)) and trained(loaded.model) == trained(earlier.model)
    assert any("with its own lora.r 2 (config: 4)" in note for note in loaded.notes)
    assert {module.p for name, module in loaded.model.named_modules() if "lora_dropout" in name and hasattr(module, "p")} == {0.25}
    assert backend.load_checkpoint(resolve(tiny).config.model, tmp_path, torch.float32)  # unchanged on the disk
    with pytest.raises(ModelError, match="lora.adapter .*a full model, not an adapter"):
        load(tiny, f"lora.adapter={tiny}")
    broken = load_file(tmp_path / "adapter_model.safetensors")
    save_file({name: value[:1, :1].contiguous() for name, value in broken.items()}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ModelError, match="lora.adapter .*cannot be loaded"):
        load(tiny, f"lora.adapter={tmp_path}")


def test_full_fine_tuning_trains_every_weight_in_float32(tiny: Path) -> None:
    model = load(tiny, "training.finetuning_type=full", "model.dtype=bfloat16").model
    assert trained(model) == {name for name, _ in model.named_parameters()}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_loraplus_gives_b_its_own_rate(tiny: Path) -> None:
    model = load(tiny, "lora.modules_to_save=[lm_head]").model
    training = resolve(tiny, "training.weight_decay=0.1").config.training
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decaying = [name for name in trained(model)]
    slow, still, fast = group_parameters(model, decaying, training, 16.0)
    assert {".lora_B." in names[id(parameter)] for parameter in fast["params"]} == {True} and len(fast["params"]) == 14
    assert not any(".lora_B." in names[id(parameter)] for parameter in slow["params"]) and len(slow["params"]) == 15 and still["params"] == []
    assert (slow["lr"], fast["lr"], slow["weight_decay"], fast["weight_decay"]) == (2e-3, 16 * 2e-3, 0.1, 0.1)


@pytest.mark.parametrize("settings, reason", [
    ((), None), (("lora.use_rslora=true",), None), (("lora.init=pissa",), None), (("lora.target_modules=all-linear",), None),
    (("lora.use_dora=true",), "DoRA"), (("lora.modules_to_save=[lm_head]",), "modules trained in full"), (("training.finetuning_type=full",), "full fine-tuning"),
    (("training.label_smoothing_factor=0.1",), "label smoothing"), (("training.method=dpo",), "training.method dpo")])
def test_the_engine_is_fused_where_it_can_and_one_line_says_where_not(tiny: Path, settings: tuple[str, ...], reason: str | None) -> None:
    loaded = load(tiny, *settings)
    fused = install_engine(loaded, resolve(tiny, *settings).config.training, 2, 512)
    assert (fused is None) == (reason is not None)
    assert any(note == f"engine modules (fused is not for {reason})" for note in loaded.notes) == (reason is not None)


@pytest.mark.parametrize("settings", [("lora.use_rslora=true", "lora.alpha=16"), ("lora.init=pissa",)], ids=" ".join)
def test_fused_and_modules_agree_on_what_fused_takes(tiny: Path, settings: tuple[str, ...]) -> None:
    found = []
    for engine in ("fused", "modules"):
        loaded = load(tiny, *settings)
        perturb(loaded.model)
        install_engine(loaded, resolve(tiny, *settings, f"training.engine={engine}", "training.int8_backward=false").config.training, 2, 512)
        labels = IDS.clone()
        labels[:, :10] = -100
        loss = loaded.model.train()(input_ids=IDS, attention_mask=torch.ones_like(IDS), labels=labels)["loss"]
        loss.backward()
        found.append((loss.item(), [parameter.grad for parameter in loaded.model.parameters() if parameter.requires_grad]))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-4) for a, b in zip(found[0][1], found[1][1]))


@pytest.mark.parametrize("settings, message", [
    (("lora.init=loftq",), "set model.load_in_4bit to true"), (("lora.init=pissa", "model.load_in_4bit=true"), "choose loftq"),
    (("lora.init=pissa", "lora.use_dora=true"), "lora.init pissa does not go with lora.use_dora"), (("lora.init=best",), "pissa_niter_N"),
    (("training.finetuning_type=full", "model.load_in_4bit=true"), "no use for model.load_in_4bit"),
    (("training.finetuning_type=full", "lora.use_dora=true"), "no use for lora.use_dora")])
def test_what_does_not_go_together_is_said_at_the_start(tiny: Path, settings: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve(tiny, *settings)
