"""merge: the exact files, the same answers, and nothing left behind when it fails."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from emergency_kit.artifacts import load_manifest, verify_folder
from emergency_kit.errors import ExportError, ModelError, UsageError
from emergency_kit.export.merge import merge
from tests.export import tiny

FILES = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
         "special_tokens_map.json", "chat_template.jinja", "manifest.json"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_model(tmp_path_factory.mktemp("models") / "tiny-llama", hidden_size=64, intermediate_size=128)


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_adapter(tmp_path_factory.mktemp("checkpoints") / "final", base)


@pytest.fixture(scope="module")
def merged(base: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return merge(tiny.resolve(base, tmp_path_factory.mktemp("outputs")), checkpoint=adapter)


def test_folder_is_exact_and_verifies(merged: Path, base: Path, adapter: Path) -> None:
    assert merged.name == "final" and merged.parent.name == "merged"
    assert {path.name for path in merged.iterdir()} == FILES
    assert [path.name for path in merged.parent.iterdir()] == ["final"]
    assert verify_folder(merged) == []
    manifest = load_manifest(merged)
    assert manifest["stage"] == "merge"
    assert [parent["path"] for parent in manifest["parents"]] == [str(adapter), str(base)]
    assert manifest["merge"]["prompts"] == 5 and manifest["merge"]["positions"] > 500
    assert 0 <= manifest["merge"]["max_abs_logit_difference"] < 1e-3
    config = json.loads((merged / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and config["dtype"] == "float32"
    assert str(base.parent) not in (merged / "config.json").read_text()
    assert json.loads((merged / "special_tokens_map.json").read_text())["eos_token"] == "<|im_end|>"
    assert (merged / "model.safetensors").stat().st_mode & 0o600 == 0o600


def test_merged_model_answers_like_base_plus_adapter(merged: Path, base: Path, adapter: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(merged)
    ids = tokenizer("Dial 112: a burn of 10 cm, he’s 5.", return_tensors="pt").input_ids
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    whole = AutoModelForCausalLM.from_pretrained(merged).eval()
    with torch.inference_mode():
        without = plain(ids).logits
        expected = PeftModel.from_pretrained(plain, adapter).eval()(ids).logits
        found = whole(ids).logits
    assert (found - expected).abs().max() < 1e-3
    assert (found - without).abs().max() > 0.05, "the adapter must matter, or the test proves nothing"


def test_existing_output_is_kept_unless_overwritten(merged: Path, base: Path, adapter: Path, tmp_path: Path) -> None:
    resolved = tiny.resolve(base, tmp_path)
    before = (merged / "manifest.json").read_bytes()
    with pytest.raises(ExportError, match=r"already there; replace it with --overwrite"):
        merge(resolved, checkpoint=adapter, out=merged)
    assert (merged / "manifest.json").read_bytes() == before
    foreign = tmp_path / "documents"
    foreign.mkdir()
    (foreign / "letter.txt").write_text("dear")
    with pytest.raises(ExportError, match="was not written by merge"):
        merge(resolved, checkpoint=adapter, out=foreign, overwrite=True)
    assert [path.name for path in foreign.iterdir()] == ["letter.txt"]
    with pytest.raises(ExportError, match="holds the checkpoint"):
        merge(resolved, checkpoint=adapter, out=adapter.parent, overwrite=True)


def test_overwrite_gives_the_same_weights(base: Path, adapter: Path, merged: Path, tmp_path: Path) -> None:
    out = tiny.copy_folder(merged, tmp_path / "again")
    merge(tiny.resolve(base, tmp_path), checkpoint=adapter, out=out, overwrite=True)
    assert load_manifest(out)["files"] == load_manifest(merged)["files"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again"]


def test_full_model_is_nothing_to_merge(merged: Path, base: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="already a full model; nothing to merge"):
        merge(tiny.resolve(base, tmp_path), checkpoint=merged)


def test_missing_checkpoint_names_the_next_command(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such folder; next: make train"):
        merge(tiny.resolve(base, tmp_path))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_broken_adapter_weights_leave_nothing(value: float, base: Path, adapter: Path, tmp_path: Path) -> None:
    broken = tiny.copy_folder(adapter, tmp_path / "broken")
    weights = load_file(broken / "adapter_model.safetensors")
    weights[sorted(weights)[0]][0, 0] = value
    save_file(weights, broken / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ExportError, match=r"1 of \d+ weights of .*lora_A.* are NaN or infinite"):
        merge(tiny.resolve(base, tmp_path / "outputs"), checkpoint=broken)
    assert not list((tmp_path / "outputs").rglob("*.*"))


def test_cut_off_adapter_is_reported(base: Path, adapter: Path, tmp_path: Path) -> None:
    broken = tiny.copy_folder(adapter, tmp_path / "broken")
    path = broken / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ModelError, match="adapter_model.safetensors is not readable"):
        merge(tiny.resolve(base, tmp_path / "outputs"), checkpoint=broken)


def test_rounding_type_is_measured_and_refused_with_a_remedy(base: Path, adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"saving as bfloat16 moved a logit by 0\.\d+; the limit .* --set export.merge_dtype=float32") as refused:
        merge(tiny.resolve(base, tmp_path, "export.merge_dtype=bfloat16"), checkpoint=adapter)
    assert not any(path.is_file() for path in tmp_path.rglob("*"))
    allowed = str(refused.value).rpartition("--set ")[2]
    out = merge(tiny.resolve(base, tmp_path, "export.merge_dtype=bfloat16", allowed), checkpoint=adapter)
    assert {str(tensor.dtype) for tensor in load_file(out / "model.safetensors").values()} == {"torch.bfloat16"}
    assert load_manifest(out)["merge"]["max_abs_logit_difference"] > 1e-3


def test_auto_keeps_the_type_of_the_base_files(base: Path, adapter: Path, tmp_path: Path) -> None:
    out = merge(tiny.resolve(base, tmp_path, "export.merge_dtype=auto"), checkpoint=adapter)
    assert json.loads((out / "config.json").read_text())["dtype"] == json.loads((base / "config.json").read_text())["dtype"] == "float32"


def test_full_disk_is_said_before_loading(base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("usage", (), {"free": 1_000_000})
    monkeypatch.setattr("shutil.disk_usage", lambda folder: usage)
    with pytest.raises(UsageError, match=r"1 MB free, \d+ MB needed; free some space or choose another with --output"):
        merge(tiny.resolve(base, tmp_path), checkpoint=adapter)
