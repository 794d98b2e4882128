"""Fetch: what a kit takes from package registries when it is packed: llama.cpp in WebAssembly from npm, wheels from PyPI.

In: names with pinned versions; npm and pip with whatever registry they are set to. Out: files in a cache folder, fetched once. The
npm package is checked against the hash that stands here; wheels are of the versions that are installed here, since those were tested.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import io
import json
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

from emergency_kit.errors import ExportError, UsageError

WLLAMA = "@wllama/wllama@3.13.0"
WLLAMA_FILE = "wllama-wllama-3.13.0.tgz"
WLLAMA_SHA512 = "ZvoRdQAn+E+18EvQ9qS036gudiI9rbZRBJgG/qNICPPwrA0Y6SMMdbziz/j7K/0WxcbJlhaRraVIYsnEy732NA=="  # `npm view @wllama/wllama@3.13.0 dist.integrity`
ENGINE_FILES = {"package/esm/index.min.js": "wllama.js", "package/esm/wasm/wllama.wasm": "wllama.wasm", "package/LICENCE": "LICENCE"}
# What `emergency-kit serve` imports for a GGUF file; torch and transformers are not among them.
SERVING = ("annotated-doc", "annotated-types", "anyio", "click", "fastapi", "h11", "idna", "Jinja2", "llguidance", "MarkupSafe", "numpy", "opentelemetry-api", "prometheus_client",
           "pydantic", "pydantic_core", "python-dotenv", "PyYAML", "RapidFuzz", "shellingham", "snowballstemmer", "starlette", "typer", "typing-inspection", "typing_extensions",
           "uvicorn", "xllamacpp", "xxhash")
ONLY_ON = {"windows-x86_64": ("colorama==0.4.6",)}  # click's console there
# Oldest systems first: pip takes the first tag that has a wheel.
TAGS = {
    "linux-x86_64": [*(f"manylinux_2_{minor}_x86_64" for minor in range(31, 4, -1)), "manylinux2014_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64"],
    "linux-aarch64": [*(f"manylinux_2_{minor}_aarch64" for minor in range(31, 16, -1)), "manylinux2014_aarch64"],
    "macos-arm64": [f"macosx_{major}_0_{kind}" for major in (11, 12, 13, 14) for kind in ("arm64", "universal2")],
    "macos-x86_64": [*(f"macosx_10_{minor}_{kind}" for minor in range(9, 16) for kind in ("x86_64", "universal2")), *(f"macosx_{major}_0_{kind}" for major in (11, 12, 13, 14) for kind in ("x86_64", "universal2"))],
    "windows-x86_64": ["win_amd64"],
}


def fetch_engine(cache: Path, archive: str | None = None) -> dict[str, bytes]:
    """Files of llama.cpp in WebAssembly by name, with their licence.

    archive: the npm package as a file, for a machine without npm. Raises ExportError where it cannot be had, or is not the one pinned here.
    """
    path = Path(archive) if archive else cache / WLLAMA_FILE
    if not path.is_file() and archive:
        raise UsageError(f"kit.wllama_archive: {archive}: no such file; npm pack {WLLAMA} fetches it")
    if not path.is_file():
        if shutil.which("npm") is None:
            raise ExportError(f"npm is not installed, and {path} is not there; next: install Node.js, or run `npm pack {WLLAMA}` on another machine and "
                              f"name the file with --set kit.wllama_archive=FILE, or pack without the browser's engine: --no-browser")
        cache.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(["npm", "pack", WLLAMA, "--silent", "--pack-destination", str(cache)], capture_output=True, text=True)
        if done.returncode or not path.is_file():
            raise ExportError(f"npm could not fetch {WLLAMA} ({' '.join(done.stderr.split())[:300]}); next: check the network, or --no-browser")
    content = path.read_bytes()
    if base64.b64encode(hashlib.sha512(content).digest()).decode() != WLLAMA_SHA512:
        raise ExportError(f"{path}: not the {WLLAMA} that this kit was tested with (its sha512 differs); delete it and fetch it again")
    with tarfile.open(fileobj=io.BytesIO(content)) as package:
        return {name: package.extractfile(member).read() for member, name in ENGINE_FILES.items()}  # type: ignore[union-attr]


def fetch_wheels(cache: Path, platform: str, python: str) -> list[Path]:
    """Wheels of all that serving needs, for a platform of TAGS and a Python such as 3.12; raises ExportError where one cannot be had."""
    if platform not in TAGS:
        raise UsageError(f"kit.platforms: got {platform!r}; expected some of {', '.join(TAGS)}")
    wanted = [f"{name}=={importlib.metadata.version(name)}" for name in SERVING] + list(ONLY_ON.get(platform, ()))
    folder = cache / f"wheels-{platform}-{python}"
    record = folder / "wheels.json"
    content = json.dumps({"wanted": wanted, "tags": TAGS[platform]})
    if record.is_file() and record.read_text() == content:
        return sorted(folder.glob("*.whl"))
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    abi = "cp" + python.replace(".", "")
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--implementation", "cp",
               "--python-version", python, *(item for tag in (abi, "abi3", "none") for item in ("--abi", tag)), *(item for tag in TAGS[platform] for item in ("--platform", tag)),
               "--dest", str(folder), *wanted]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or len(wheels) != len(wanted):
        reason = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()[-1:]
        raise ExportError(f"wheels for {platform}, Python {python}: pip could not fetch them ({' '.join(reason)[:300]}); next: check the network, name others with "
                          "--platform, or pack none: --platform none")
    record.write_text(content)
    return wheels


def licences_of(wheel: Path) -> dict[str, bytes]:
    """Licence texts within a wheel by a name for the kit; what it says of its licence where it holds none."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if ".dist-info/" in name and not name.endswith("/")]
        found = [name for name in names if any(word in Path(name).name.upper() for word in ("LICEN", "NOTICE", "COPYING", "AUTHORS"))]
        chosen = found or [name for name in names if name.endswith("/METADATA")]
        package = "-".join(wheel.name.split("-")[:2])
        return {f"{package}/{name.split('.dist-info/', 1)[1].replace('licenses/', '').replace('/', '-')}": archive.read(name) for name in chosen}
