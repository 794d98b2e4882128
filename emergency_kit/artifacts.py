"""Artifacts: the manifest that vouches for a folder, and what it says of how the folder was made.

Files are put in place by `files.py`. A folder's `manifest.json` is written last and holds the sha256 of every other file, the
resolved config, versions, hardware and the parents it was made from. `verify_folder` reads it back. Secrets of the
environment and in addresses do not reach it: `redact`.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from emergency_kit.config import REPOSITORY, Resolved
from emergency_kit.files import save_bytes

MANIFEST = "manifest.json"
SCHEMA_VERSION = 1
_SECRET_NAME = re.compile(r"(?i)(KEY|TOKEN|SECRET|PASSWORD)$")
_CREDENTIALS = re.compile(r"(\w+://)[^/\s@]+:[^/\s@]+@")
PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets", "safetensors", "tokenizers",
            "gguf", "libgguf", "xllamacpp", "bitsandbytes", "unsloth")


def hash_file(path: Path) -> str:
    """Hex sha256 of a file, read in pieces."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def hash_json(value: Any) -> str:
    """Hex sha256 of a JSON value in canonical form; half a surrogate pair, which JSON can write and UTF-8 cannot, counts as itself."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode("utf-8", "surrogatepass")).hexdigest()


def save_text(path: Path, text: str) -> Path:
    """Write a text file in one step; an existing file is replaced whole."""
    return save_bytes(path, text.encode("utf-8", errors="backslashreplace"))


def save_json(path: Path, value: Any) -> Path:
    """Write JSON in one step; an existing file is replaced whole."""
    return save_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def save_manifest(folder: Path, stage: str, resolved: Resolved, *, dataset_hash: str | None = None,
                  parents: list[Path] | None = None, extra: dict[str, Any] | None = None) -> Path:
    """Write `manifest.json` over all files that stand in `folder`. Call it last.

    parents: folders with a manifest, or files, that this artifact was made from.
    """
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != MANIFEST]
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # a model of 29 GB lies in several files
        files = {str(path.relative_to(folder)): digest for path, digest in zip(paths, pool.map(hash_file, paths))}
    manifest = describe(stage, resolved, dataset_hash, parents, extra) | {"files": files}
    return save_json(folder / MANIFEST, manifest | {"self": hash_json(manifest)})


def describe(stage: str, resolved: Resolved, dataset_hash: str | None = None,
             parents: list[Path] | None = None, extra: dict[str, Any] | None = None) -> dict[str, Any]:
    """The part of a manifest that says how something was made; reports carry it too."""
    return {
        "schema_version": SCHEMA_VERSION,
        "stage": stage,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "profile": resolved.profile,
        "config": redact(resolved.config.model_dump()),
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
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
        return None
    return manifest


def verify_folder(folder: Path) -> list[str]:
    """Problems of an artifact folder against its manifest; empty when it is whole."""
    manifest = load_manifest(folder)
    if manifest is None:
        return [f"{MANIFEST} is missing or not readable"]
    known = {key: value for key, value in manifest.items() if key != "self"}
    problems = [f"{MANIFEST} differs from its own hash"] if manifest.get("self", hash_json(known)) != hash_json(known) else []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return problems + [problem for problem in pool.map(lambda item: _problem_of(folder, *item), manifest["files"].items()) if problem]


def _problem_of(folder: Path, name: str, digest: str) -> str | None:
    path, shown = folder / name, name.encode("utf-8", "backslashreplace").decode()  # a console takes no half of a surrogate pair
    try:
        if not path.resolve().is_relative_to(folder.resolve()):
            return f"{shown} leads out of the folder"
        if not path.is_file():
            return f"{shown} is missing"
        return f"{shown} differs from its recorded sha256" if hash_file(path) != digest else None
    except (OSError, ValueError) as error:
        return f"{shown} is not readable ({getattr(error, 'strerror', None) or error})"


def redact(value: Any) -> Any:
    """The same value with secrets as `***`: what stands in environment variables that are named like keys or tokens,
    and credentials within addresses (`https://user:secret@host`)."""
    if isinstance(value, str):
        for secret in _secrets():
            value = value.replace(secret, "***")
        return _CREDENTIALS.sub(r"\1***@", value)
    if isinstance(value, dict):
        return {key: redact(item) for key, item in value.items()}
    return [redact(item) for item in value] if isinstance(value, (list, tuple)) else value


def _secrets() -> list[str]:
    # Short values would blank out ordinary words.
    return sorted((held for name, held in os.environ.items() if _SECRET_NAME.search(name) and len(held) >= 8), key=len, reverse=True)


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
