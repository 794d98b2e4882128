"""Pack: an exported model becomes a folder for a USB stick: cards on paper, a page that answers in a browser, start scripts for computers.

In: a GGUF file of `export-gguf`, with its certificate and verdict. Out: outputs/kit, whole or not at all. What goes in is chosen in this
order, until the size limit: cards and page; the model with llama.cpp for the browser; llama.cpp for each Python and platform.
Limits: npm and PyPI are asked when packing, unless the cache has it all. Run: `emergency-kit kit --model outputs/gguf/final-q4_k_m.gguf`.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Iterator

import yaml

from emergency_kit.artifacts import hash_file, load_manifest, save_json, save_manifest, save_text
from emergency_kit.config import REPOSITORY, Resolved
from emergency_kit.errors import ExportError, UsageError
from emergency_kit.export.modelfile import build_modelfile
from emergency_kit.export.verdict import describe_verdict, find_verdict
from emergency_kit.files import check_writable, folder_bytes, staged_folder
from emergency_kit.inference.llama_engine import LlamaEngine
from emergency_kit.kit import check, fetch, known, page, paper
from emergency_kit.knowledge.cards import card_digest, load_cards
from emergency_kit.knowledge.emergency_numbers import load_numbers

TEXTS, COMPUTER = Path(__file__).parent / "texts", Path(__file__).parent / "computer"
SCRIPTS = {"linux": "start-linux.sh", "macos": "start-macos.command", "windows": "start-windows.bat"}
HOWTO = {"linux": "\n   - Linux: in a terminal in this folder:  sh start-linux.sh", "macos": "\n   - macOS: open start-macos.command (or in a terminal: sh start-macos.command)",
         "windows": "\n   - Windows: double-click start-windows.bat"}
# What manifest, sums and readme may still add to a size that is being chosen for.
RESERVE_BYTES, BYTES_A_FILE = 100_000, 400
UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
EPOCH = (2020, 1, 1, 0, 0, 0)  # of members of the zip, so that the same code gives the same bytes


@dataclass
class Packing:
    """A kit on its way: its folder, what it may weigh, what went in and what did not."""

    folder: Path
    limit_bytes: int | None
    contents: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    wheels: dict[str, list[str]] = field(default_factory=dict)

    def fits(self, added_bytes: int, files: int, what: str) -> bool:
        """Whether so many bytes more are within the limit; notes what is left out."""
        if self.limit_bytes is None:
            return True
        now = folder_bytes(self.folder) + RESERVE_BYTES + BYTES_A_FILE * (files + sum(path.is_file() for path in self.folder.rglob("*")))
        if now + added_bytes <= self.limit_bytes:
            return True
        self.left_out.append(f"{what}: {added_bytes / 1e6:.1f} MB, with {max(0, self.limit_bytes - now) / 1e6:.1f} MB of {self.limit_bytes / 1e6:.1f} MB left")
        return False


def kit(resolved: Resolved, model: Path | None = None, out: Path | None = None, size_limit: str | None = None, override_verdict: str | None = None,
        sign_key: Path | None = None, browser: bool = True, overwrite: bool = False) -> Path:
    """Pack a kit and return its folder.

    model: an exported GGUF file, by default the smallest in `<output_dir>/gguf` within its bounds. size_limit: such as 200MB.
    sign_key: a private SSH key. browser: whether with llama.cpp in WebAssembly. Raises UsageError for a folder in the way or a wrong size, ExportError for a file that no export vouches for or for
    what cannot be fetched, VerdictError (see `export/verdict.py`).
    """
    out = Path(out or Path(resolved.config.training.output_dir) / "kit")
    limit = read_size(size_limit) if size_limit else None
    _check_place(out, overwrite)
    model = Path(model or pick_model(Path(resolved.config.training.output_dir) / "gguf"))
    entry = find_export(model)
    verdict = find_verdict(resolved, Path(entry["source"]), override_verdict or entry["verdict"]["override"])
    verdict = verdict if verdict["file"] else entry["verdict"] | ({"override": override_verdict.strip()} if override_verdict and override_verdict.strip() else {})
    check_writable(out.parent, model.stat().st_size * 2 + 60_000_000, remedy="choose another with --output")
    cache = Path(resolved.config.training.output_dir) / "cache" / "kit"
    print(f"Packing {model} ({model.stat().st_size / 1e6:.1f} MB), verdict: {describe_verdict(verdict)}", flush=True)
    with staged_folder(out) as folder:
        packing = Packing(folder, limit)
        _add_cards(packing, resolved)
        settings = _add_model(packing, resolved, model, entry, cache, browser)
        page.save_settings(folder / "page", settings)
        if settings["model"]:
            _add_computers(packing, resolved, cache)
        _add_papers(packing, model, entry, verdict, bool(sign_key))
        save_text(folder / check.PAGE_SUMS, check.list_sums(folder, without=("page/service_worker.js", check.PAGE_SUMS)))
        page.save_worker(folder / "page")
        summary = {"model": settings["model"] and {"file": model.name, "sha256": entry["sha256"]}, "contents": packing.contents, "left_out": packing.left_out, "verdict": verdict}
        save_manifest(folder, "kit", resolved, parents=[model], extra={"kit": summary})
        (folder / check.SUMS).write_bytes(check.list_sums(folder).encode())
        if sign_key:
            check.sign(folder, sign_key)
        if limit is not None and folder_bytes(folder) > limit:
            raise ExportError(f"the kit has {folder_bytes(folder) / 1e6:.2f} MB even without what can be left out, more than --size-limit {size_limit}; next: a larger limit")
    for name in (*SCRIPTS.values(), "verify.sh"):
        with contextlib.suppress(OSError):  # a FAT stick has no such permissions
            (out / name).chmod(0o755)
    _report(out, packing)
    return out


def read_size(text: str) -> int:
    """Bytes of `200MB`, `1.5 GB` or `150 MiB`; raises UsageError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if not match or match[2].upper() not in UNITS or float(match[1]) == 0:
        raise UsageError(f"--size-limit: got {text!r}; expected a size such as 200MB or 1.5GB")
    return int(float(match[1]) * UNITS[match[2].upper()])


def pick_model(folder: Path) -> Path:
    """The smallest exported file of a folder whose certificate is within its bounds; raises ExportError where there is none."""
    files = ((load_manifest(folder) or {}).get("export") or {}).get("files", {})
    sound = sorted((entry["bytes"], name) for name, entry in files.items() if not entry["certificate"]["outside"] and (folder / name).is_file())
    if not sound:
        raise ExportError(f"{folder}: no exported GGUF file within its bounds; next: make export-gguf, or name a file with --model")
    return folder / sound[0][1]


def find_export(model: Path) -> dict[str, Any]:
    """The entry of a GGUF file in its export's manifest; raises UsageError for no file, ExportError where nothing vouches for it."""
    if not model.is_file() or model.suffix != ".gguf":
        there = sorted(path.name for path in (model if model.is_dir() else model.parent).glob("*.gguf")) if (model if model.is_dir() else model.parent).is_dir() else []
        raise UsageError(f"--model {model}: not a GGUF file; " + (f"there: {', '.join(there)}" if there else "next: make export-gguf"))
    manifest = load_manifest(model.parent)
    entry = (manifest or {}).get("export", {}).get("files", {}).get(model.name) if manifest and manifest.get("stage") == "export" else None
    if entry is None:
        raise ExportError(f"{model}: no export's manifest beside it, so that neither a certificate nor a verdict vouches for it; next: make export-gguf")
    if hash_file(model) != entry["sha256"]:
        raise ExportError(f"{model}: not the file that was exported and proved (its sha256 differs); next: make export-gguf ARGS=--overwrite")
    return entry


def _check_place(out: Path, overwrite: bool) -> None:
    if not out.exists():
        return
    manifest = load_manifest(out) if out.is_dir() else None
    if not overwrite:
        raise UsageError(f"{out}: already there; replace it with --overwrite, or choose another folder with --output")
    if not (manifest and manifest.get("stage") == "kit") and not (out.is_dir() and not any(out.iterdir())):
        raise UsageError(f"{out}: holds something else than a kit, which is not replaced; choose another folder with --output")


def _add_cards(packing: Packing, resolved: Resolved) -> None:
    cards = load_cards()
    save_text(packing.folder / "cards.html", paper.build_sheets(cards, load_numbers(), card_digest(cards)))
    page.save_page(packing.folder / "page", resolved.config.inference.country)
    save_text(packing.folder / "index.html", (TEXTS / "index.html").read_text(encoding="utf-8"))
    packing.contents += [f"cards.html: {len(cards)} cards to print, a sheet each, and the emergency numbers of {len(load_numbers())} countries", "page/: the same cards in a page that finds those that fit"]


def _add_model(packing: Packing, resolved: Resolved, model: Path, entry: dict[str, Any], cache: Path, browser: bool) -> dict[str, Any]:
    """Copy the model in parts, with the browser's engine, where they fit; returns kit.json's content."""
    config = resolved.config
    engine_files = fetch.fetch_engine(cache, config.kit.wllama_archive) if browser else {}
    size = model.stat().st_size + sum(map(len, engine_files.values()))
    part_bytes = config.kit.part_megabytes * 1_000_000
    if not packing.fits(size, size // part_bytes + 40, f"the model {model.name} and llama.cpp for the browser"):
        return page.build_settings(config, None, None, None)
    place = packing.folder / "page"
    for folder in ("engine", "model"):
        (place / folder).mkdir()
    for name, content in engine_files.items():
        (place / "engine" / name).write_bytes(content)
    parts = [{"name": f"model/{path.name}", "bytes": path.stat().st_size, "sha256": hash_file(path)} for path in split(model, place / "model", part_bytes)]
    print("Recording the answers to known questions ...", flush=True)
    engine = LlamaEngine(model, slots=1)
    try:
        self_test = known.record(engine, load_cards(), config.dataset.top_k, config.dataset.grounding == "cards")
        described = {"name": model.stem, "file": model.name, "sha256": entry["sha256"], "quantization": entry["quantization"], "parts": parts, "browser": bool(browser)}
        settings = page.build_settings(config, engine, described, self_test)
        modelfile = build_modelfile(model.name, _HubTokenizer(engine), None, resolved)
    finally:
        engine.close()
    save_json(packing.folder / "self_test.json", self_test)
    save_text(packing.folder / "ollama" / "Modelfile", modelfile)
    joined = " ".join(f"../page/{part['name']}" for part in parts)
    save_text(packing.folder / "ollama" / "README.txt", (TEXTS / "ollama.txt").read_text(encoding="utf-8").replace("@JOIN@", f"cat {joined} > {model.name}").replace("@NAME@", model.stem.lower()))
    outside = entry["certificate"]["outside"]
    packing.contents.append(f"page/model/: the model {model.name}, {model.stat().st_size / 1e6:.1f} MB in {len(parts)} part{'s' if len(parts) > 1 else ''}; ollama/: a Modelfile for it"
                            + (f"\n  Its certificate is OUT OF BOUNDS: {'; '.join(outside)}" if outside else ""))
    if browser:
        packing.contents.append(f"page/engine/: llama.cpp in WebAssembly ({fetch.WLLAMA}), so that a browser alone can answer")
    else:
        packing.left_out.append("llama.cpp for the browser: --no-browser")
    return settings


def split(model: Path, folder: Path, part_bytes: int) -> list[Path]:
    """A file in parts of at most so many bytes; joined in order they are the file."""
    parts: list[Path] = []
    with model.open("rb") as stream:
        while content := stream.read(part_bytes):
            parts.append(folder / f"{model.name}.part{len(parts) + 1:03d}")
            parts[-1].write_bytes(content)
    return parts


def _add_computers(packing: Packing, resolved: Resolved, cache: Path) -> None:
    """The program, and for each Python and platform the wheels that still fit."""
    computer = packing.folder / "computer"
    computer.mkdir()
    for path in COMPUTER.iterdir():
        if path.is_file():
            (computer / path.name).write_bytes(path.read_bytes())
    _zip_program(computer / "emergency-kit.zip", resolved)
    (computer / "wheels").mkdir()
    for python in resolved.config.kit.python_versions:
        for platform in resolved.config.kit.platforms:
            wheels = fetch.fetch_wheels(cache, platform, python)
            added = [wheel for wheel in wheels if not (computer / "wheels" / wheel.name).exists()]
            if packing.fits(sum(wheel.stat().st_size for wheel in added), len(added) * 2, f"llama.cpp for {platform}, Python {python}"):
                for wheel in added:
                    shutil.copyfile(wheel, computer / "wheels" / wheel.name)
                packing.wheels[f"{platform}-{python}"] = [wheel.name for wheel in wheels]
    save_json(computer / "wheels.json", packing.wheels)
    if packing.wheels:
        packing.contents.append(f"computer/: llama.cpp and this program for {', '.join(packing.wheels)}")
    if not resolved.config.kit.platforms:
        packing.left_out.append("llama.cpp for computers: no platform was named")


def _zip_program(target: Path, resolved: Resolved) -> None:
    """This package, its configs, and the settings that the model is asked under."""
    config = resolved.config
    overlay = {"dataset": {"grounding": config.dataset.grounding, "top_k": config.dataset.top_k}, "inference": config.inference.model_dump(), "serve": {"slots": 1}}
    package = REPOSITORY / "emergency_kit"
    files = {path.relative_to(REPOSITORY).as_posix(): path for path in _files_of(package)} | {path.relative_to(REPOSITORY).as_posix(): path for path in _files_of(REPOSITORY / "configs")}
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, path in sorted(files.items()):
            archive.writestr(zipfile.ZipInfo(name, EPOCH), path.read_bytes(), zipfile.ZIP_DEFLATED)
        archive.writestr(zipfile.ZipInfo("kit.yaml", EPOCH), yaml.safe_dump(overlay), zipfile.ZIP_DEFLATED)


def _files_of(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file() and "__pycache__" not in path.parts)


def _add_papers(packing: Packing, model: Path, entry: dict[str, Any], verdict: dict[str, Any], signed: bool) -> None:
    """Readme, verdict, certificate, licences and scripts."""
    folder = packing.folder
    save_json(folder / "verdict.json", {"model": model.name, "sha256": entry["sha256"], **verdict})
    for suffix in ("json", "md"):
        source = model.with_suffix(f".certificate.{suffix}")
        if not source.is_file():
            raise ExportError(f"{source}: missing, so that nothing proves the file; next: make export-gguf ARGS=--overwrite")
        (folder / f"certificate.{suffix}").write_bytes(source.read_bytes())
    licences = folder / "licences"
    save_text(licences / "emergency-kit-LICENSE", (REPOSITORY / "LICENSE").read_text(encoding="utf-8"))
    save_text(licences / "llama.cpp-LICENSE", (TEXTS / "llama.cpp-LICENSE.txt").read_text(encoding="utf-8"))
    save_text(licences / "README.txt", (TEXTS / "licences.txt").read_text(encoding="utf-8"))
    for wheel in sorted((folder / "computer" / "wheels").glob("*.whl")):
        for name, content in fetch.licences_of(wheel).items():
            place = licences / re.sub(r"[^A-Za-z0-9./_+-]", "-", name)
            place.parent.mkdir(exist_ok=True)
            place.write_bytes(content)
    pythons = ", ".join(sorted({key.rsplit("-", 1)[1] for key in packing.wheels})) or "none"
    save_text(folder / "verify.sh", (TEXTS / "verify.sh").read_text(encoding="utf-8"))
    if (folder / "computer").is_dir():
        for system in ("linux", "macos"):
            save_text(folder / SCRIPTS[system], (TEXTS / "start.sh").read_text(encoding="utf-8").replace("@NAME@", SCRIPTS[system]).replace("@PYTHONS@", pythons))
        (folder / SCRIPTS["windows"]).write_bytes((TEXTS / SCRIPTS["windows"]).read_text(encoding="utf-8").replace("\n", "\r\n").encode())
        howto = "".join(HOWTO.values())
    else:
        howto = "\n   this kit has no model; open page/ from a web host."
    text = (TEXTS / "README.txt").read_text(encoding="utf-8")
    for mark, value in {"START": howto, "CONTENTS": "\n".join(f"- {item}" for item in packing.contents), "LEFT_OUT": "\n".join(f"- {item}" for item in packing.left_out) or "Nothing.",
                        "VERDICT": describe_verdict(verdict), "SIGNED": "\nSHA256SUMS.sig signs it; ask whoever gave you the kit for their public key." if signed else ""}.items():
        text = text.replace(f"@{mark}@", value)
    save_text(folder / "README.txt", text)


class _HubTokenizer:
    """As much of a Hugging Face tokenizer as a Modelfile is built from, by llama.cpp."""

    def __init__(self, engine: LlamaEngine):
        self._engine = engine
        self.bos_token, self.bos_token_id = engine.tokenizer.bos_token, engine.tokenizer.bos_token_id
        self.eos_token = engine.tokenizer.eos_token
        self.apply_chat_template = engine.tokenizer.apply_chat_template

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": self._engine.tokenizer(text).input_ids}


def _report(out: Path, packing: Packing) -> None:
    print(f"{out}: {folder_bytes(out) / 1e6:.1f} MB, {sum(path.is_file() for path in out.rglob('*'))} files")
    for item in packing.contents:
        print(f"  {item}")
    for item in packing.left_out:
        print(f"  LEFT OUT {item}")
    print(f"Next: emergency-kit kit --verify {out}; then copy it to a stick, or: sh {out / SCRIPTS['linux']}", flush=True)
