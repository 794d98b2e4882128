"""Layouts: exported files where Ollama and LM Studio look for them.

In: GGUF files of one model. Out: `<folder>/ollama/<file's name>/Modelfile` with the file beside it, and
`<folder>/lmstudio/<publisher>/<model>/<file>`, as LM Studio's models folder is built, with a preset that holds the system prompt.
The files are hard links where the disk can have them, so that they take no room twice. Where Ollama is
installed and running it makes the model, and what it then shows is compared with what was written.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emergency_kit.artifacts import save_json, save_text
from emergency_kit.files import staged_file
from emergency_kit.config import Resolved
from emergency_kit.data.format import SYSTEM_PROMPT
from emergency_kit.errors import ExportError
from emergency_kit.export import modelfile
from emergency_kit.export.progress import report_while


@dataclass(frozen=True)
class Layouts:
    """What is wanted. ollama_name: the model's name in Ollama; without it, `<model>:<type>`."""

    ollama: bool = False
    ollama_name: str | None = None
    lmstudio: bool = False

    @property
    def wanted(self) -> bool:
        """Whether any is."""
        return self.ollama or self.lmstudio


def write_layouts(layouts: Layouts, files: list[Path], model_name: str, tokenizer: Any, license_id: str | None, resolved: Resolved, overwrite: bool) -> None:
    """Lay out files that lie in one folder; raises ExportError where the Modelfile does not say what the model was trained with."""
    out = files[0].parent
    if layouts.ollama:
        text = {path: modelfile.build_modelfile(path.name, tokenizer, license_id, resolved) for path in files}
        for path in files:
            folder = out / "ollama" / path.stem
            modelfile.prove_modelfile(text[path], tokenizer, resolved)
            _link(path, folder / path.name, overwrite)
            save_text(folder / "Modelfile", text[path])
            name = _ollama_name(layouts, path, model_name, several=len(files) > 1)
            print(f"{folder / 'Modelfile'}: template, system prompt, stop tokens and parameters as in training", flush=True)
            _create_in_ollama(name, folder)
    if layouts.lmstudio:
        folder = out / "lmstudio" / resolved.config.export.lmstudio_publisher / model_name
        for path in files:
            _link(path, folder / path.name, overwrite)
        preset = {"identifier": f"@local:{model_name}", "name": model_name, "changed": False, "load": {"fields": []},
                  "operation": {"fields": [{"key": "llm.prediction.systemPrompt", "value": SYSTEM_PROMPT},
                                           {"key": "llm.prediction.temperature", "value": resolved.config.inference.temperature}]}}
        save_json(out / "lmstudio" / "config-presets" / f"{model_name}.preset.json", preset)
        print(f"{folder}: copy the folder {folder.parent.name}/ into LM Studio's models folder (~/.lmstudio/models), and the preset beside it "
              "into ~/.lmstudio/config-presets", flush=True)


def _link(source: Path, target: Path, overwrite: bool) -> None:
    if target.exists() and os.path.samefile(source, target):
        return
    if target.exists() and not overwrite:
        raise ExportError(f"{target}: already there, and another file than {source}; replace with --overwrite")
    with staged_file(target) as temporary:
        try:
            os.link(source, temporary)
        except OSError:  # another disk, or one without links
            shutil.copyfile(source, temporary)


def _ollama_name(layouts: Layouts, path: Path, model_name: str, several: bool) -> str:
    tag = path.stem.removeprefix(f"{model_name}-")
    name = layouts.ollama_name or model_name.lower().replace(" ", "-")
    return name if ":" in name or (layouts.ollama_name and not several) else f"{name}:{tag}"


def _create_in_ollama(name: str, folder: Path) -> None:
    """Have Ollama make the model where it is installed and its server answers."""
    command = f"ollama create {name} -f {folder / 'Modelfile'}"
    program = shutil.which("ollama")
    if program is None:
        print(f"  not checked by Ollama, which is not installed here. Next, where it is: {command}", flush=True)
        return
    with report_while("Ollama is making the model"):
        done = subprocess.run([program, "create", name, "-f", str(folder / "Modelfile")], capture_output=True, encoding="utf-8", errors="replace", timeout=1800)
    said = " ".join((done.stderr or done.stdout).split())[-300:]
    if done.returncode and any(word in said for word in ("could not connect", "connection refused", "server not responding")):
        print(f"  not checked by Ollama, whose server does not run ({said}). Next: ollama serve, then {command}", flush=True)
        return
    if done.returncode:
        raise ExportError(f"{folder / 'Modelfile'}: ollama create refused it ({said})")
    shown = subprocess.run([program, "show", name, "--modelfile"], capture_output=True, encoding="utf-8", errors="replace", timeout=60)
    written = modelfile.parse_modelfile((folder / "Modelfile").read_text(encoding="utf-8"))
    found = modelfile.parse_modelfile(shown.stdout)
    unequal = [key for key in ("template", "system") if getattr(written, key) != getattr(found, key)]
    unequal += ["stop"] if set(written.stops) - set(found.stops) else []
    if shown.returncode or unequal:
        raise ExportError(f"model {name} in Ollama has another {', '.join(unequal) or 'state'} than {folder / 'Modelfile'}; report this version of Ollama")
    print(f"  Ollama made {name} and shows the same template, system prompt and stop tokens. Next: ollama run {name}", flush=True)
