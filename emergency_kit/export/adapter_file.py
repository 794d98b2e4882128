"""An adapter alone as a GGUF file, which llama.cpp adds to the base model's file when it loads.

In: a plain LoRA adapter's folder. Out: `<output_dir>/gguf/<model>-adapter-<type>.gguf` in f32 (the default), f16 or bf16,
a few megabytes, with its certificate: llama.cpp runs the base in f16 with the adapter on it, against base plus
adapter merged in PyTorch. Run: `emergency-kit export-gguf --adapter`.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from emergency_kit.artifacts import hash_file, hash_parent
from emergency_kit.files import check_writable, scratch_folder, staged_file
from emergency_kit.config import Resolved
from emergency_kit.errors import ExportError
from emergency_kit.export import architecture, certificate, certificate_text, gguf, packages
from emergency_kit.export.gguf_file import build_plan, write_gguf
from emergency_kit.export.quantize import QUANTIZATIONS, Quantization, encode_rows, pick_quantizations
from emergency_kit.export.verdict import find_verdict
from emergency_kit.export.weights import Adapter, load_weights
from emergency_kit.model import backend

BASE_TYPE = QUANTIZATIONS["f16"]


def export_adapter(resolved: Resolved, checkpoint: Path | None = None, out: Path | None = None, overwrite: bool = False,
                   override_verdict: str | None = None) -> list[Path]:
    """Write the adapter in each wanted type and return the paths.

    checkpoint: an adapter's folder, by default the finished model's. Raises ExportError for a folder that is no adapter or a type
    that is not a float, and as `gguf.export_gguf` does.
    """
    training = resolved.config.training
    given = resolved.origins.get("export.quantizations") == "command line"
    quantizations = pick_quantizations(list(resolved.config.export.quantizations) if given else ["f32"])
    unfit = [item.name for item in quantizations if not item.exact]
    if unfit:
        raise ExportError(f"--adapter -q {unfit[0]}: an adapter is kept in floats; expected f32, f16 or bf16")
    packages.require_gguf()
    source = gguf.pick_source(resolved, checkpoint or resolved.finished_model)
    if source.kind != "adapter":
        raise ExportError(f"checkpoint {source.folder}: a full model, not an adapter; leave --adapter out, or name an adapter's folder")
    verdict = find_verdict(resolved, source.folder, override_verdict)
    out = Path(out or Path(training.output_dir) / "gguf")
    targets = {item.name: out / f"{source.name}-adapter-{item.name}.gguf" for item in quantizations}
    there = [str(path) for path in targets.values() if path.exists()]
    if there and not overwrite:
        raise ExportError(f"{', '.join(there)}: already there; replace with --overwrite, or choose another folder with --output")
    opened = gguf.open_source(resolved, source)
    assert opened.weights.adapter is not None
    base_name = backend.base_name(resolved.config.model)
    plan = build_plan(opened.skeleton, BASE_TYPE, base_name)
    check_writable(out, plan.total_bytes + gguf.METADATA_BYTES, remedy="choose another with --output")
    examiner = gguf.build_examiner(resolved, opened)
    written: dict[str, dict[str, Any]] = {}
    with scratch_folder(out) as scratch:
        base = scratch / "base.gguf"
        print(f"Writing {base_name} as f16 to prove the adapter on it", flush=True)
        write_gguf(base, plan, opened.skeleton.config, load_weights(base_name, resolved.config.model.revision), opened.vocabulary, opened.family, source.name)
        for quantization in quantizations:
            target, started = targets[quantization.name], time.monotonic()
            with staged_file(target) as temporary:
                write_adapter(temporary, opened.weights.adapter, opened.skeleton.config, opened.family, quantization, source.name)
                proof = certificate.certify(base, BASE_TYPE, examiner, lora=temporary)
                certificate.check(proof, resolved.config.export)
                digest, size = hash_file(temporary), temporary.stat().st_size
            proof = {"file": target.name, "sha256": digest, "bytes": size, "fallbacks": {}, **proof, "quantization": f"adapter in {quantization.name} on its base in f16"}
            print(f"{target}: {size / 1e6:.1f} MB, rank {opened.weights.adapter.rank}, {len(opened.weights.adapter.factors)} adapted tensors")
            print(certificate_text.summarise(proof, time.monotonic() - started), flush=True)
            gguf.save_certificate(target, proof)
            shown = {**proof, "greedy": {key: value for key, value in proof["greedy"].items() if key != "answers"}}
            written[target.name] = {"quantization": f"adapter {quantization.name}", "bytes": size, "sha256": digest, "source": str(source.folder),
                                    "source_sha256": hash_parent(source.folder), "base": base_name, "fallbacks": {}, "certificate": shown, "verdict": verdict}
    gguf.save_export_manifest(out, source, written, resolved)
    print(f"Next: emergency-kit export-gguf --checkpoint {base_name} -q f16, then llama-server -m BASE.gguf --lora {targets[quantizations[-1].name]}", flush=True)
    return list(targets.values())


def write_adapter(path: Path, adapter: Adapter, config: Any, family: architecture.Family, quantization: Quantization, name: str) -> None:
    """Write one adapter file. llama.cpp scales by alpha over rank, so that alpha is written as scale times rank (rsLoRA too)."""
    from gguf import GGMLQuantizationType, GGUFWriter

    writer = GGUFWriter(path, family.name)
    try:
        writer.add_type("adapter")
        writer.add_name(name)
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", adapter.scale * adapter.rank)
        writer.add_file_type(quantization.file_type)
        for tensor, (down, up) in adapter.factors.items():
            gguf_name = architecture.gguf_name(tensor)
            if gguf_name is None:
                raise ExportError(f"checkpoint {adapter.folder}: it adapts {tensor}, which has no place in a GGUF file of {config.model_type}")
            rows = architecture.reorder_rows(gguf_name, up.numpy(), config, family)
            for suffix, values in (("lora_a", down.numpy()), ("lora_b", rows)):
                writer.add_tensor(f"{gguf_name}.{suffix}", encode_rows(values, quantization.tensor_type, f"{gguf_name}.{suffix}"),
                                  raw_shape=values.shape if quantization.tensor_type != "BF16" else None,
                                  raw_dtype=GGMLQuantizationType[quantization.tensor_type])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()
