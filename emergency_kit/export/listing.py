"""A list of what an export folder holds: sizes, hashes, certificates and verdicts.

In: the folder's manifest. Out: a table. Every file is hashed again (a second a gigabyte). torch is not imported.
"""

from __future__ import annotations

from pathlib import Path

from emergency_kit.artifacts import hash_file, load_manifest
from emergency_kit.config import Resolved
from emergency_kit.errors import ExportError
from emergency_kit.export.verdict import describe_verdict


def list_exports(resolved: Resolved, folder: Path | None = None) -> None:
    """Print one line a file; raises ExportError where the folder is no export, or where a file is not the one that was written."""
    folder = Path(folder or Path(resolved.config.training.output_dir) / "gguf")
    manifest = load_manifest(folder)
    if manifest is None or manifest.get("stage") != "export":
        if folder.is_dir() and any(folder.glob("*.gguf")):
            raise ExportError(f"{folder}: its GGUF files have no manifest of an export, so that nothing vouches for them; export them again with --overwrite")
        print(f"{folder}: no exports. Next: make export-gguf")
        return
    files = manifest["export"]["files"]
    width = max([len("file"), *map(len, files)])
    print(f"{'file':<{width}}  {'type':<12} {'MB':>9}  {'sha256':<64}  {'certificate':<13}  verdict")
    changed = []
    for name, entry in sorted(files.items()):
        path = folder / name
        if not path.is_file():
            state = "file missing"
        elif path.stat().st_size != entry["bytes"] or hash_file(path) != entry["sha256"]:
            state = "FILE CHANGED"
        else:
            state = "OUT OF BOUNDS" if entry["certificate"]["outside"] else "within bounds"
        changed += [name] if state == "FILE CHANGED" else []
        print(f"{name:<{width}}  {entry['quantization']:<12} {entry['bytes'] / 1e6:>9.1f}  {entry['sha256']}  {state:<13}  {describe_verdict(entry['verdict'])}")
    for kind in ("ollama", "lmstudio"):
        inside = sorted({path.parent for path in (folder / kind).rglob("*.gguf")}) if (folder / kind).is_dir() else []
        for place in inside:
            print(f"{kind}: {place}")
    if changed:
        raise ExportError(f"{folder}: {', '.join(changed)} differs from what was exported and proved; export again with --overwrite")
