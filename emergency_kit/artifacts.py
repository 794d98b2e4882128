"""Artifacts: files and folders that are there whole or not at all, and the manifest that vouches for them.

Everything is written to a temporary sibling, flushed to the disk, then renamed. A folder's
`manifest.json` is written last and holds the sha256 of every other file, the resolved config,
versions, hardware and the parents it was made from. `verify_folder` reads it back.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import tempfile
import uuid
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Iterator

from emergency_kit.config import REPOSITORY, Resolved
from emergency_kit.errors import UsageError

MANIFEST = "manifest.json"
SCHEMA_VERSION = 1
PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets", "safetensors", "tokenizers",
            "gguf", "libgguf", "xllamacpp", "bitsandbytes", "unsloth")


def hash_file(path: Path) -> str:
    """Hex sha256 of a file, read in pieces."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def hash_json(value: Any) -> str:
    """Hex sha256 of a JSON value in canonical form."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def save_text(path: Path, text: str) -> Path:
    """Write a text file in one step; an existing file is replaced whole."""
    with staged_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


def save_json(path: Path, value: Any) -> Path:
    """Write JSON in one step; an existing file is replaced whole."""
    return save_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


@contextlib.contextmanager
def staged_file(path: Path) -> Iterator[Path]:
    """A temporary sibling to write to; on success it is flushed and takes the place of `path`."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{uuid.uuid4().hex[:12]}.partial"
    try:
        yield temporary
        _flush(temporary)
        os.replace(temporary, path)
        _flush(path.parent)
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()


@contextlib.contextmanager
def staged_folder(path: Path) -> Iterator[Path]:
    """A temporary sibling folder to fill; on success it is flushed and takes the place of `path`.

    An existing folder at `path` stays until the new one is whole.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{uuid.uuid4().hex[:12]}.partial"
    retired = path.parent / f".{uuid.uuid4().hex[:12]}.retired"
    temporary.mkdir()
    mode = temporary.stat().st_mode & 0o666  # what the umask leaves of a file's permissions
    try:
        yield temporary
        for file in sorted(temporary.rglob("*")):
            if file.is_file():
                file.chmod(mode)  # safetensors writes for the owner alone; an artifact is made to be passed on
            _flush(file)
        _flush(temporary)
        if path.exists():
            os.replace(path, retired)
        try:
            os.replace(temporary, path)
        except OSError:
            if retired.exists():
                os.replace(retired, path)
            raise
        _flush(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if path.exists():
            shutil.rmtree(retired, ignore_errors=True)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save_manifest(folder: Path, stage: str, resolved: Resolved, *, dataset_hash: str | None = None,
                  parents: list[Path] | None = None, extra: dict[str, Any] | None = None) -> Path:
    """Write `manifest.json` over all files that stand in `folder`. Call it last.

    parents: folders with a manifest, or files, that this artifact was made from.
    """
    files = {str(path.relative_to(folder)): hash_file(path)
             for path in sorted(folder.rglob("*")) if path.is_file() and path.name != MANIFEST}
    return save_json(folder / MANIFEST, describe(stage, resolved, dataset_hash, parents, extra) | {"files": files})


def describe(stage: str, resolved: Resolved, dataset_hash: str | None = None,
             parents: list[Path] | None = None, extra: dict[str, Any] | None = None) -> dict[str, Any]:
    """The part of a manifest that says how something was made; reports carry it too."""
    return {
        "schema_version": SCHEMA_VERSION,
        "stage": stage,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "profile": resolved.profile,
        "config": resolved.config.model_dump(),
        "git_commit": git_commit(),
        "packages": package_versions(),
        "hardware": hardware(),
        "dataset_hash": dataset_hash,
        "parents": [{"path": str(parent), "sha256": hash_parent(parent)} for parent in parents or []],
        **(extra or {}),
    }


def hash_parent(path: Path) -> str | None:
    """sha256 of a file, or of a folder's list of file hashes (so that its date does not matter); None where there is neither."""
    if path.is_dir():
        manifest = load_manifest(path)
        return hash_json(manifest["files"]) if manifest else None
    return hash_file(path) if path.is_file() else None


def load_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a folder, or None where it is missing or not readable as one."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
        return None
    return manifest


def verify_folder(folder: Path) -> list[str]:
    """Problems of an artifact folder against its manifest; empty when it is whole."""
    manifest = load_manifest(folder)
    if manifest is None:
        return [f"{MANIFEST} is missing or not readable"]
    problems = []
    for name, digest in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            problems.append(f"{name} is missing")
        elif hash_file(path) != digest:
            problems.append(f"{name} differs from its recorded sha256")
    return problems


def check_writable(folder: Path, needed_bytes: int = 0, remedy: str = "choose another with --output-dir") -> None:
    """Raise UsageError when `folder` cannot be made, written to, or has less free space than needed."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".", suffix=".partial") as probe:
            probe.write(b"\0" * 4096)
            probe.flush()
    except OSError as error:
        raise UsageError(f"output folder {folder}: not writable ({error.strerror}); {remedy}") from None
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise UsageError(f"output folder {folder}: {free / 1e6:.0f} MB free, {needed_bytes / 1e6:.0f} MB needed; "
                         f"free some space or {remedy}")


def package_versions() -> dict[str, str]:
    """Installed versions of the packages that shape a result."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions


def hardware() -> dict[str, Any]:
    """Processor, cores, memory and GPUs as far as the system tells."""
    model = platform.processor()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    memory = None
    with contextlib.suppress(ValueError, OSError, AttributeError):
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    gpus: list[str] = []
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        listed = subprocess.run(["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"],
                                capture_output=True, text=True, timeout=10)
        gpus = listed.stdout.split("\n")[:-1] if listed.returncode == 0 else []
    return {"system": platform.platform(), "processor": model, "cores": os.cpu_count(), "memory_bytes": memory, "gpus": gpus}


def git_commit() -> str | None:
    """Commit of the code, with `+changes` where files differ from it; None outside a repository."""
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=REPOSITORY, capture_output=True, text=True, timeout=10)
        changed = subprocess.run(["git", "status", "--porcelain", "-uno"], cwd=REPOSITORY, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return commit.stdout.strip() + ("+changes" if changed.stdout.strip() else "") if commit.returncode == 0 else None
