"""export_adapter and export-gguf's listing: an adapter that llama.cpp adds to the base, and what the list says of it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy
import pytest
from gguf import GGUFReader

from emergency_kit.artifacts import load_manifest, verify_folder
from emergency_kit.errors import ExportError
from emergency_kit.export import architecture, certificate
from emergency_kit.export.adapter_file import export_adapter, write_adapter
from emergency_kit.export.gguf import build_examiner, open_source, pick_source
from emergency_kit.export.gguf_file import build_plan, write_gguf
from emergency_kit.export.listing import list_exports
from emergency_kit.export.quantize import QUANTIZATIONS
from emergency_kit.export.weights import load_weights
from tests.export import tiny


def test_llama_cpp_applies_it_and_the_list_names_it(base: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    resolved = tiny.resolve(base, tmp_path)
    path = export_adapter(resolved, checkpoint=adapter)[0]
    assert path.name == "final-adapter-f32.gguf" and verify_folder(path.parent) == []
    assert sorted(item.name for item in path.parent.iterdir()) == ["final-adapter-f32.certificate.json", "final-adapter-f32.certificate.md", path.name, "manifest.json"]
    proof = load_manifest(path.parent)["export"]["files"][path.name]["certificate"]
    assert proof["distributions"]["mean_kl"] < 1e-4 and proof["outside"] == []
    reader = GGUFReader(path)
    fields = {name: reader.fields[name].contents() for name in ("general.type", "adapter.type", "adapter.lora.alpha", "general.architecture")}
    assert fields == {"general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": 8.0, "general.architecture": "llama"}
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert len(tensors) == 2 * 5 * 2 and list(tensors["blk.0.attn_q.weight.lora_a"].shape) == [256, 4] and list(tensors["blk.0.attn_q.weight.lora_b"].shape) == [4, 256]
    with pytest.raises(ExportError, match="already there"):
        export_adapter(resolved, checkpoint=adapter)
    capsys.readouterr()
    list_exports(resolved)
    listed = capsys.readouterr().out
    assert "adapter f32" in listed and load_manifest(path.parent)["files"][path.name] in listed and "within bounds" in listed and listed.rstrip().endswith("none")


def test_the_proof_fails_without_the_adapters_part(base: Path, adapter: Path, tmp_path: Path) -> None:
    resolved = tiny.resolve(base, tmp_path)
    opened = open_source(resolved, pick_source(resolved, adapter))
    examiner = build_examiner(resolved, opened)
    plan = build_plan(opened.skeleton, QUANTIZATIONS["f16"], "tiny")
    write_gguf(tmp_path / "base.gguf", plan, opened.skeleton.config, load_weights(str(base)), opened.vocabulary, opened.family, "tiny")
    found = opened.weights.adapter
    wrong = [dataclasses.replace(found, scale=0.0), dataclasses.replace(found, scale=found.scale / 2)]
    for changed in wrong:
        write_adapter(tmp_path / "a.gguf", changed, opened.skeleton.config, opened.family, QUANTIZATIONS["f32"], "tiny")
        proof = certificate.certify(tmp_path / "base.gguf", QUANTIZATIONS["f16"], examiner, lora=tmp_path / "a.gguf")
        assert "mean KL divergence" in " ".join(proof["outside"])


def test_types_and_full_models_are_refused(base: Path, adapter: Path, tmp_path: Path) -> None:
    from emergency_kit.config import load_config

    quantised = load_config("embedded", settings=[f"model.name={base}", f"training.output_dir={tmp_path}"], flags={"export.quantizations": ["q8_0"]})
    with pytest.raises(ExportError, match="--adapter -q q8_0: an adapter is kept in floats"):
        export_adapter(quantised, checkpoint=adapter)
    with pytest.raises(ExportError, match="a full model, not an adapter"):
        export_adapter(tiny.resolve(base, tmp_path), checkpoint=base)


@pytest.mark.parametrize("name", ["f16", "bf16"])
def test_narrow_types_hold_the_rows(name: str, base: Path, adapter: Path, tmp_path: Path) -> None:
    resolved = tiny.resolve(base, tmp_path)
    opened = open_source(resolved, pick_source(resolved, adapter))
    write_adapter(tmp_path / "a.gguf", opened.weights.adapter, opened.skeleton.config, opened.family, QUANTIZATIONS[name], "tiny")
    from gguf.quants import dequantize

    tensors = {tensor.name: tensor for tensor in GGUFReader(tmp_path / "a.gguf").tensors}
    for tensor, (down, up) in opened.weights.adapter.factors.items():
        key = architecture.gguf_name(tensor)
        for suffix, expected in (("lora_a", down.numpy()), ("lora_b", architecture.reorder_rows(key, up.numpy(), opened.skeleton.config, opened.family))):
            found = tensors[f"{key}.{suffix}"]
            assert list(found.shape) == list(expected.shape)[::-1] and found.tensor_type.name == name.upper()
            assert numpy.allclose(dequantize(found.data, found.tensor_type).reshape(expected.shape), expected, rtol=0.01, atol=1e-4)


def test_listing_of_nothing_and_of_files_without_a_manifest(tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    resolved = tiny.resolve(base, tmp_path)
    list_exports(resolved)
    assert "no exports. Next: make export-gguf" in capsys.readouterr().out
    (tmp_path / "gguf").mkdir()
    (tmp_path / "gguf" / "x.gguf").write_bytes(b"x")
    with pytest.raises(ExportError, match="nothing vouches for them"):
        list_exports(resolved)


