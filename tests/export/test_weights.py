"""weights: rows from the disk as transformers and PEFT have them, little memory, and every way in which a folder can be wrong."""

from __future__ import annotations

import json
from pathlib import Path

import numpy
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from emergency_kit.errors import ExportError, ModelError
from emergency_kit.export import packages
from emergency_kit.export.memory import measure_peak
from emergency_kit.export.weights import BLOCK_WEIGHTS, cut_rows, load_adapter, load_weights
from tests.export import tiny


def test_blocks_are_the_models_tensors(base: Path) -> None:
    weights = load_weights(str(base))
    for name, tensor in AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).state_dict().items():
        if name in weights.files:
            blocks = [weights.block(name, rows) for rows in cut_rows(tuple(tensor.shape))]
            assert numpy.array_equal(numpy.concatenate(blocks), tensor.numpy()) and all(block.size <= max(BLOCK_WEIGHTS, tensor[0].numel()) for block in blocks)
    assert len(cut_rows((49152, 256))) == 12 and cut_rows((4, 2**21)) == [range(0, 1), range(1, 2), range(2, 3), range(3, 4)]
    assert cut_rows((4096, 8192), together=96)[1] == range(96, 192), "heads stay whole"


def test_an_adapter_is_added_as_peft_adds_it(base: Path, adapter: Path) -> None:
    merged = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter).merge_and_unload().state_dict()
    weights = load_weights(str(base), adapter=adapter)
    assert len(weights.adapter.factors) == 10
    for name in weights.files:
        assert torch.allclose(weights.read(name), merged[name], rtol=0, atol=1e-6)
    name = "model.layers.1.self_attn.q_proj.weight"
    assert torch.allclose(weights.read(name, 100, 164), merged[name][100:164], rtol=0, atol=1e-6)


def test_shards_and_narrow_types_are_read(base: Path, tmp_path: Path) -> None:
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(base / "model.safetensors").items()}
    names = list(tensors)
    for number, part in enumerate((names[::2], names[1::2])):
        save_file({name: tensors[name] for name in part}, tmp_path / f"m{number}.safetensors")
    index = {name: f"m{number % 2}.safetensors" for number, name in enumerate(names)}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    weights = load_weights(str(tmp_path))
    assert all(torch.equal(weights.read(name), tensors[name].float()) for name in names)


def test_memory_is_one_block_however_large_the_tensor(tmp_path: Path) -> None:
    save_file({"large": torch.ones(100_000, 1024, dtype=torch.bfloat16)}, tmp_path / "model.safetensors")
    weights = load_weights(str(tmp_path))
    weights.block("large", range(16))  # what the first read loads once
    with measure_peak() as peak:
        for rows in cut_rows((100_000, 1024)):
            weights.block("large", rows)
    assert peak.added_bytes is None or peak.added_bytes < 40_000_000, "205 MB are on the disk, 410 MB in float32"


def test_wrong_folders_are_named(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no safetensors files"):
        load_weights(str(tmp_path))
    weights = load_weights(str(base))
    with pytest.raises(ModelError, match="tensor nothing is in none"):
        weights.check({"nothing": (1,)})
    with pytest.raises(ModelError, match=r"has shape \(256,\) in model.safetensors, but config.json makes it \(5,\)"):
        weights.check({"model.norm.weight": (5,)})
    save_file({"w": torch.zeros(4, 4, dtype=torch.int8)}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="stored as torch.int8; name the full-precision model"):
        load_weights(str(tmp_path)).read("w")
    (tmp_path / "model.safetensors").write_bytes(b"\x10" * 64)
    with pytest.raises(ModelError, match="not readable"):
        load_weights(str(tmp_path))


@pytest.mark.parametrize(("change", "message"), [
    ({"use_dora": True}, "not a plain LoRA adapter .use_dora"), ({"bias": "all"}, "bias"), ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save")])
def test_other_adapters_are_merged_by_peft_first(change: dict, message: str, adapter: Path, tmp_path: Path) -> None:
    folder = tiny.copy_folder(adapter, tmp_path / "a")
    config = json.loads((folder / "adapter_config.json").read_text()) | change
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ExportError, match=message):
        load_adapter(folder)


def test_rank_stabilised_scale_and_infinite_factors(adapter: Path, tmp_path: Path) -> None:
    folder = tiny.copy_folder(adapter, tmp_path / "a")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert load_adapter(folder).scale == 2.0
    (folder / "adapter_config.json").write_text(json.dumps(config | {"use_rslora": True}))
    assert load_adapter(folder).scale == 4.0
    tensors = load_file(folder / "adapter_model.safetensors")
    next(iter(tensors.values()))[0, 0] = float("inf")
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(ExportError, match="holds NaN or infinite weights"):
        load_adapter(folder)


def test_a_gguf_package_of_somebody_else_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    packages.require_gguf()
    import importlib.metadata

    files = importlib.metadata.files("gguf")
    changed = next(file for file in files if file.name == "gguf_writer.py")
    foreign = tmp_path / "gguf_writer.py"
    foreign.write_text("class GGUFWriter: pass\n")
    monkeypatch.setattr(type(changed), "locate", lambda self: foreign if self.name == "gguf_writer.py" else self.dist.locate_file(self))
    with pytest.raises(ExportError, match="gguf was overwritten by another package: gguf/gguf_writer.py"):
        packages.require_gguf()
    foreign.unlink()
    with pytest.raises(ExportError, match="gguf is incomplete"):
        packages.require_gguf()
