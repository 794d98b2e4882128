"""GGUF: one file with weights, tokenizer and chat template, for llama.cpp and what is built on it.

In: an adapter (merged on the way), a merged or a base folder of the Llama, Mistral, Qwen2 or Qwen3
family. Out: `<output_dir>/gguf/<model>-<type>.gguf` for each type, then `manifest.json`. A file takes its
name only after real llama.cpp has loaded it and `parity.prove_gguf` is content. Memory: the model in
float32 plus one tensor. Run: `emergency-kit export-gguf`, types by `-q` or `export.quantizations`.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from emergency_kit.artifacts import check_writable, hash_parent, load_manifest, save_manifest, staged_file
from emergency_kit.config import Resolved
from emergency_kit.errors import ExportError
from emergency_kit.export import architecture, parity
from emergency_kit.export.merge import load_merged, load_skeleton, on_cpu
from emergency_kit.export.progress import INTERVAL_SECONDS, report_while
from emergency_kit.export.quantize import Quantization, choose_type, count_bytes, encode_rows, pick_quantizations
from emergency_kit.export.vocabulary import Vocabulary, add_vocabulary, build_vocabulary
from emergency_kit.model import backend

METADATA_BYTES = 32_000_000


@dataclass
class Source:
    """What is exported: a folder, its kind (`adapter` or `model`), and the name for the files."""

    folder: Path
    kind: str
    name: str


@dataclass
class Plan:
    """Type of every tensor of one file. fallbacks: type that the rows got instead, to number of tensors."""

    quantization: Quantization
    types: dict[str, str] = field(default_factory=dict)
    fallbacks: dict[str, int] = field(default_factory=dict)
    total_bytes: int = 0


def export_gguf(resolved: Resolved, checkpoint: Path | None = None, out: Path | None = None, overwrite: bool = False) -> list[Path]:
    """Write one GGUF file for each of `export.quantizations` and return their paths.

    checkpoint: adapter, merged or base folder; by default the merged model where it is of the adapter's
    making, else the adapter. out: folder, by default `<output_dir>/gguf`. Raises ExportError for an unknown type,
    an existing file without `overwrite`, a model or tokenizer that llama.cpp cannot have, or a file that does not
    answer like its source; ModelError for a broken checkpoint. A file that fails is not kept.
    """
    quantizations = pick_quantizations(list(resolved.config.export.quantizations))
    section = on_cpu(resolved.config.model)
    source = _pick_source(resolved, checkpoint)
    out = Path(out or Path(resolved.config.training.output_dir) / "gguf")
    targets = {item.name: out / f"{source.name}-{item.name}.gguf" for item in quantizations}
    there = [str(path) for path in targets.values() if path.exists()]
    if there and not overwrite:
        raise ExportError(f"{', '.join(there)}: already there; replace with --overwrite, or choose another folder with --output")
    if source.kind == "adapter":
        backend.require_base(section)
    skeleton = load_skeleton(backend.base_name(section) if source.kind == "adapter" else str(source.folder), section)
    family = architecture.pick_family(skeleton.config, str(source.folder))
    plans = [build_plan(skeleton, item, str(source.folder)) for item in quantizations]
    check_writable(out, sum(plan.total_bytes + METADATA_BYTES for plan in plans), remedy="choose another with --output")

    model, tokenizer, merged_by = _load(resolved, source)
    vocabulary = build_vocabulary(tokenizer, skeleton.config.vocab_size, str(source.folder))
    shown = f"{vocabulary.kind} tokenizer ({vocabulary.pre})" if vocabulary.kind == "gpt2" else "SentencePiece tokenizer"
    print(f"Architecture {family.name}, {shown}, {len(plans[0].types)} tensors", flush=True)
    written: dict[str, dict[str, Any]] = {}
    try:
        for plan in plans:
            target = targets[plan.quantization.name]
            written[target.name] = _export_one(plan, target, model, tokenizer, vocabulary, source, family, resolved) | merged_by
    finally:
        if written:
            _save_manifest(out, source, written, resolved)
    print(f"Next: llama-server -m {targets[quantizations[-1].name]}, or any program that reads GGUF", flush=True)
    return list(targets.values())


def build_plan(model: Any, quantization: Quantization, source: str) -> Plan:
    """Choose each tensor's type; `model` may be a skeleton. Names are GGUF's, in the order of the file."""
    plan = Plan(quantization)
    shape = architecture.shape_of(model.config)
    for name, tensor in architecture.list_tensors(model, source):
        tensor_type, fell_back = choose_type(quantization, name, tensor.dim(), tensor.shape[-1], shape)
        plan.types[name] = tensor_type
        plan.total_bytes += count_bytes(tensor_type, tensor.numel())
        if fell_back:
            plan.fallbacks[tensor_type] = plan.fallbacks.get(tensor_type, 0) + 1
    return plan


def write_gguf(path: Path, plan: Plan, model: Any, vocabulary: Vocabulary, family: architecture.Family, name: str,
               license_id: str | None = None) -> None:
    """Write one file, tensor by tensor. model: in float32, or any type that float32 holds exactly."""
    from gguf import GGML_QUANT_VERSION, GGMLQuantizationType, GGUFWriter

    import numpy

    config, quantization = model.config, plan.quantization
    writer = GGUFWriter(path, family.name)
    try:
        architecture.add_metadata(writer, config, family, name, license_id)
        writer.add_file_type(quantization.file_type)
        if not quantization.exact:
            writer.add_quantization_version(GGML_QUANT_VERSION)
        add_vocabulary(writer, vocabulary)
        factors = architecture.build_rope_factors(config)
        if factors is not None:
            writer.add_tensor_info("rope_freqs.weight", factors.shape, factors.dtype, factors.nbytes)
        tensors = list(architecture.list_tensors(model, name))
        for tensor_name, tensor in tensors:
            tensor_type = plan.types[tensor_name]
            writer.add_tensor_info(tensor_name, tuple(tensor.shape), numpy.dtype(numpy.float32), count_bytes(tensor_type, tensor.numel()),
                                   raw_dtype=GGMLQuantizationType[tensor_type])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if factors is not None:
            writer.write_tensor_data(factors)
        last = time.monotonic()
        for number, (tensor_name, tensor) in enumerate(tensors, 1):
            rows = architecture.reorder_rows(tensor_name, tensor.detach().to("cpu", torch.float32).numpy(), config, family)
            writer.write_tensor_data(encode_rows(rows, plan.types[tensor_name], tensor_name))
            if time.monotonic() - last > INTERVAL_SECONDS:
                last = time.monotonic()
                print(f"  ... {quantization.name}: tensor {number} of {len(tensors)}", flush=True)
    finally:
        writer.close()


def _pick_source(resolved: Resolved, checkpoint: Path | None) -> Source:
    training, section = resolved.config.training, on_cpu(resolved.config.model)
    if checkpoint is not None:
        folder = Path(checkpoint)
        print(f"Exporting {folder}", flush=True)
        return Source(folder, backend.check_checkpoint(folder, section), folder.resolve().name)
    adapter = Path(training.output_dir) / "checkpoints" / training.model_name
    merged = Path(training.output_dir) / "merged" / training.model_name
    folder, reason = adapter, f"there is no {merged}"
    if merged.is_dir():
        stale = _is_stale(merged, adapter)
        folder, reason = (adapter, f"{merged} was made from an earlier adapter; make merge ARGS=--overwrite renews it") if stale else (merged, "the merged model")
    kind = backend.check_checkpoint(folder, section)
    print(f"Exporting {folder} ({reason})", flush=True)
    return Source(folder, kind, training.model_name)


def _is_stale(merged: Path, adapter: Path) -> bool:
    """Whether the adapter that stands there now is another one than the merged model was made from."""
    parents = (load_manifest(merged) or {}).get("parents", [])
    current = hash_parent(adapter) if adapter.is_dir() else None
    return bool(current and parents and parents[0]["sha256"] and parents[0]["sha256"] != current)


def _load(resolved: Resolved, source: Source) -> tuple[Any, Any, dict[str, Any]]:
    """Model in float32 on the CPU, tokenizer, and what the manifest says of a merge on the way."""
    if source.kind == "adapter":
        merged = load_merged(resolved, source.folder)
        print(f"Merged with {backend.base_name(resolved.config.model)} in memory: largest logit difference {merged.difference:.1e} "
              f"(limit {resolved.config.export.merge_max_logit_difference:g})", flush=True)
        return merged.model, merged.tokenizer, {"merge_max_abs_logit_difference": merged.difference}
    with report_while(f"loading {source.folder}"):
        loaded = backend.load_checkpoint(on_cpu(resolved.config.model), source.folder, dtype=torch.float32)
    return loaded.model, loaded.tokenizer, {}


def _export_one(plan: Plan, target: Path, model: Any, tokenizer: Any, vocabulary: Vocabulary, source: Source,
                family: architecture.Family, resolved: Resolved) -> dict[str, Any]:
    """Write and prove one file; returns its entry in the manifest."""
    started = time.monotonic()
    with staged_file(target) as temporary:
        write_gguf(temporary, plan, model, vocabulary, family, source.name, _find_license(resolved, source))
        wrote = time.monotonic() - started
        proof = parity.prove_gguf(temporary, plan.quantization, model, tokenizer, resolved)
    size = target.stat().st_size
    print(f"{target}: {size / 1e6:.1f} MB, written in {wrote:.0f} s, proved in {time.monotonic() - started - wrote:.0f} s")
    if plan.fallbacks:
        listed = ", ".join(f"{number} as {name}" for name, number in plan.fallbacks.items())
        print(f"  {sum(plan.fallbacks.values())} of {len(plan.types)} tensors have rows that {plan.quantization.tensor_type} cannot pack: {listed}")
    ties = f", {proof['tied']} tied" if proof["tied"] else ""
    print(f"  llama.cpp: {proof['prompts']} prompts split into the same tokens; {proof['equal']} of {proof['tokens']} chosen tokens equal PyTorch's"
          f"{ties}{'' if plan.quantization.exact else ' in float32'}")
    if proof["templates_equal"] < proof["prompts"]:
        print(f"  note: llama.cpp renders {proof['prompts'] - proof['templates_equal']} of {proof['prompts']} chats otherwise than transformers; "
              "send rendered prompts, as the kit does, not chat messages")
    print(end="", flush=True)
    return {"quantization": plan.quantization.name, "bytes": size, "source": str(source.folder), "fallbacks": plan.fallbacks, "proof": proof}


def _find_license(resolved: Resolved, source: Source) -> str | None:
    """License of the base model: known for the bundled one, else from a model card beside the weights."""
    if resolved.config.model.name == "bundled":
        return "apache-2.0"
    for folder in (source.folder, Path(resolved.config.model.name)):
        card = folder / "README.md"
        found = re.search(r"^license:\s*([\w.-]+)\s*$", card.read_text(encoding="utf-8", errors="replace"), re.M) if card.is_file() else None
        if found:
            return found.group(1)
    return None


def _save_manifest(out: Path, source: Source, written: dict[str, dict[str, Any]], resolved: Resolved) -> None:
    """The manifest over all files of the folder; entries of files from earlier runs are carried on."""
    earlier = (load_manifest(out) or {}).get("export", {}).get("files", {})
    files = {name: entry for name, entry in (earlier | written).items() if (out / name).is_file()}
    save_manifest(out, "export", resolved, parents=[source.folder], extra={"export": {"files": files}})
