"""GGUF export: files with weights, tokenizer and chat template, for llama.cpp and what is built on it.

In: an adapter (merged on the way), a merged or a base folder of the Llama, Mistral, Qwen2 or Qwen3 family. Out:
`<output_dir>/gguf/<model>-<type>.gguf` for each type, its certificate beside it, then `manifest.json`. A file takes
its name only after real llama.cpp has loaded it and `certificate` is content. Memory: writing holds one block of rows
at a time; proving holds the model in float32 where it fits. Run: `emergency-kit export-gguf`, types by `-q` or `export.quantizations`.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emergency_kit.artifacts import hash_file, hash_parent, load_manifest, save_json, save_manifest, save_text
from emergency_kit.config import Resolved
from emergency_kit.errors import ExportError
from emergency_kit.export import architecture, certificate, certificate_text, packages
from emergency_kit.export.certificate import Examiner
from emergency_kit.export.gguf_file import Plan, build_plan, write_gguf
from emergency_kit.export.layouts import Layouts, write_layouts
from emergency_kit.export.memory import measure_peak
from emergency_kit.export.merge import load_skeleton, on_cpu
from emergency_kit.export.quantize import pick_quantizations
from emergency_kit.export.reference import load_reference
from emergency_kit.export.verdict import describe_verdict, find_verdict
from emergency_kit.export.vocabulary import Vocabulary, build_vocabulary
from emergency_kit.export.weights import Weights, load_weights
from emergency_kit.files import check_writable, staged_file
from emergency_kit.model import backend, hf_backend

METADATA_BYTES = 32_000_000


@dataclass(frozen=True)
class Source:
    """What is exported: a folder, its kind (`adapter` or `model`), and the name for the files."""

    folder: Path
    kind: str
    name: str


@dataclass(frozen=True)
class Opened:
    """A source that has been looked at: no weights are in memory. skeleton: the model without them; total: number of weights."""

    source: Source
    skeleton: Any
    family: architecture.Family
    weights: Weights
    tokenizer: Any
    vocabulary: Vocabulary
    license_id: str | None

    @property
    def total(self) -> int:
        """Number of weights, tied ones once."""
        return sum(place.weights for place in architecture.list_tensors(self.skeleton, str(self.source.folder)))


def export_gguf(resolved: Resolved, checkpoint: Path | None = None, out: Path | None = None, overwrite: bool = False,
                layouts: Layouts = Layouts(), override_verdict: str | None = None) -> list[Path]:
    """Write one GGUF file for each of `export.quantizations` and return their paths.

    checkpoint: adapter, merged or base folder; by default the merged model where it is of the adapter's
    making, else the adapter. out: folder, by default `<output_dir>/gguf`. layouts: what else to make of the files; one that is
    there already, of the same source, is taken as it is then. Raises ExportError for an unknown type, an existing file
    without `overwrite`, a model or tokenizer that llama.cpp cannot have, or a file out of its bounds; VerdictError
    (see `verdict`); ModelError for a broken checkpoint. A file that fails is not kept.
    """
    quantizations = pick_quantizations(list(resolved.config.export.quantizations))
    packages.require_gguf()
    source = pick_source(resolved, checkpoint)
    verdict = find_verdict(resolved, source.folder, override_verdict)
    out = Path(out or Path(resolved.config.training.output_dir) / "gguf")
    targets = {item.name: out / f"{source.name}-{item.name}.gguf" for item in quantizations}
    kept = _find_kept(out, source, list(targets.values()), overwrite, reuse=layouts.wanted)
    todo = [item for item in quantizations if targets[item.name] not in kept]
    written: dict[str, dict[str, Any]] = {}
    opened = open_source(resolved, source)
    if todo:
        plans = [build_plan(opened.skeleton, item, str(source.folder)) for item in todo]
        check_writable(out, sum(plan.total_bytes + METADATA_BYTES for plan in plans), remedy="choose another with --output")
        shown = f"{opened.vocabulary.kind} tokenizer ({opened.vocabulary.pre})" if opened.vocabulary.kind == "gpt2" else "SentencePiece tokenizer"
        print(f"Architecture {opened.family.name}, {shown}, {len(plans[0].types)} tensors, verdict: {describe_verdict(verdict)}", flush=True)
        examiner = build_examiner(resolved, opened)
        try:
            for plan in plans:
                target = targets[plan.quantization.name]
                written[target.name] = _export_one(plan, target, opened, examiner, resolved) | {"verdict": verdict}
        finally:
            if written:
                save_export_manifest(out, source, written, resolved)
    if layouts.wanted:
        write_layouts(layouts, list(targets.values()), source.name, opened.tokenizer, opened.license_id, resolved, overwrite)
        save_export_manifest(out, source, written, resolved)
    print(f"Next: llama-server -m {targets[quantizations[-1].name]}, or any program that reads GGUF; "
          f"emergency-kit export-gguf --list-exports --output {out}", flush=True)
    return list(targets.values())


def pick_source(resolved: Resolved, checkpoint: Path | None) -> Source:
    """The folder to export; the files are named by `--model-name` where it is given, else by the folder or the finished model."""
    training, section = resolved.config.training, on_cpu(resolved.config.model)
    if checkpoint is not None:
        folder = Path(checkpoint)
        print(f"Exporting {folder}", flush=True)
        named = resolved.origins.get("training.model_name") == "command line"
        return Source(folder, backend.check_checkpoint(folder, section), training.model_name if named else folder.resolve().name)
    adapter = resolved.finished_model
    merged = Path(training.output_dir) / "merged" / training.model_name
    folder, reason = adapter, f"there is no {merged}"
    if merged.is_dir():
        stale = _is_stale(merged, adapter)
        folder, reason = (adapter, f"{merged} was made from an earlier adapter; make merge ARGS=--overwrite renews it") if stale else (merged, "the merged model")
    kind = backend.check_checkpoint(folder, section)
    print(f"Exporting {folder} ({reason})", flush=True)
    return Source(folder, kind, training.model_name)


def open_source(resolved: Resolved, source: Source) -> Opened:
    """Look at names, shapes, tokenizer and licence of a source; raises ExportError or ModelError for what cannot be exported."""
    section = on_cpu(resolved.config.model)
    if source.kind == "adapter":
        backend.require_base(section)
    base = backend.base_name(section) if source.kind == "adapter" else str(source.folder)
    skeleton = load_skeleton(base, section)
    family = architecture.pick_family(skeleton.config, str(source.folder))
    places = architecture.list_tensors(skeleton, str(source.folder))
    weights = load_weights(base, section.revision if source.kind == "adapter" else None, source.folder if source.kind == "adapter" else None)
    weights.check({place.name: place.shape for place in places})
    tokenizer = hf_backend.load_tokenizer(str(source.folder), None)
    vocabulary = build_vocabulary(tokenizer, skeleton.config.vocab_size, str(source.folder))
    return Opened(source, skeleton, family, weights, tokenizer, vocabulary, find_license(resolved, source.folder))


def build_examiner(resolved: Resolved, opened: Opened) -> Examiner:
    """The examiner of a source's files."""
    return Examiner(resolved, opened.tokenizer, lambda: load_reference(
        resolved, opened.source.folder, opened.source.kind, opened.weights, opened.skeleton.config, opened.tokenizer, opened.total))


def find_license(resolved: Resolved, folder: Path) -> str | None:
    """License of the base model: known for the bundled one, else from a model card beside the weights."""
    if resolved.config.model.name == "bundled":
        return "apache-2.0"
    for place in (folder, Path(resolved.config.model.name)):
        card = place / "README.md"
        found = re.search(r"^license:\s*([\w.-]+)\s*$", card.read_text(encoding="utf-8", errors="replace"), re.M) if card.is_file() else None
        if found:
            return found.group(1)
    return None


def _is_stale(merged: Path, adapter: Path) -> bool:
    """Whether the adapter that stands there now is another one than the merged model was made from."""
    parents = (load_manifest(merged) or {}).get("parents", [])
    current = hash_parent(adapter) if adapter.is_dir() else None
    return bool(current and parents and parents[0]["sha256"] and parents[0]["sha256"] != current)


def _find_kept(out: Path, source: Source, targets: list[Path], overwrite: bool, reuse: bool) -> set[Path]:
    """Files that stand as they are; raises ExportError for one that is in the way."""
    there = [path for path in targets if path.exists()]
    if overwrite or not there:
        return set()
    if reuse:
        files = (load_manifest(out) or {}).get("export", {}).get("files", {})
        same = {path for path in there if files.get(path.name, {}).get("source_sha256") == hash_parent(source.folder) is not None}
        for path in sorted(same):
            print(f"{path}: already there, of the same model", flush=True)
        there = [path for path in there if path not in same]
        if not there:
            return same
    raise ExportError(f"{', '.join(map(str, there))}: already there; replace with --overwrite, or choose another folder with --output")


def _export_one(plan: Plan, target: Path, opened: Opened, examiner: Examiner, resolved: Resolved) -> dict[str, Any]:
    """Write and prove one file; returns its entry in the manifest."""
    source, started = opened.source, time.monotonic()
    with staged_file(target) as temporary:
        with measure_peak() as peak:
            write_gguf(temporary, plan, opened.skeleton.config, opened.weights, opened.vocabulary, opened.family, source.name, opened.license_id)
        wrote = time.monotonic() - started
        size = temporary.stat().st_size
        memory = f", {peak.added_bytes / 1e6:.0f} MB of memory beyond the program's own" if peak.added_bytes is not None else ""
        print(f"{target}: {size / 1e6:.1f} MB, written in {wrote:.0f} s{memory}", flush=True)
        if plan.fallbacks:
            listed = ", ".join(f"{number} as {name}" for name, number in plan.fallbacks.items())
            print(f"  {sum(plan.fallbacks.values())} of {len(plan.types)} tensors have rows that {plan.quantization.tensor_type} cannot pack: {listed}", flush=True)
        proof = certificate.certify(temporary, plan.quantization, examiner)
        certificate.check(proof, resolved.config.export)
        proof = {"file": target.name, "sha256": hash_file(temporary), "bytes": size, "fallbacks": plan.fallbacks, **proof}
    print(certificate_text.summarise(proof, time.monotonic() - started - wrote), flush=True)
    save_certificate(target, proof)
    shown = {**proof, "greedy": {key: value for key, value in proof["greedy"].items() if key != "answers"}}
    return {"quantization": plan.quantization.name, "bytes": size, "sha256": proof["sha256"], "source": str(source.folder),
            "source_sha256": hash_parent(source.folder), "fallbacks": plan.fallbacks, "write_seconds": round(wrote, 2),
            "write_peak_added_bytes": peak.added_bytes, "certificate": shown}


def save_certificate(target: Path, proof: dict[str, Any]) -> None:
    """Write a certificate beside its file, for programs and for people."""
    save_json(target.with_suffix(".certificate.json"), proof)
    save_text(target.with_suffix(".certificate.md"), certificate_text.render(proof))


def save_export_manifest(out: Path, source: Source, written: dict[str, dict[str, Any]], resolved: Resolved) -> None:
    """The manifest over all files of the folder; entries of files from earlier runs are carried on."""
    earlier = (load_manifest(out) or {}).get("export", {}).get("files", {})
    files = {name: entry for name, entry in (earlier | written).items() if (out / name).is_file()}
    save_manifest(out, "export", resolved, parents=[source.folder], extra={"export": {"files": files}})
