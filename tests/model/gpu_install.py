"""Do the GPU locks resolve from the package index? pip resolves all that `make setup-gpu` would install, and installs nothing; no GPU needed.

Out: what was found, by lock and Python. Fails where pip finds no wheels that go together, where one would be installed that no lock pins, where a pin is
not what would be installed, and where `pip install '.[gpu]'` moves a pin of requirements.lock or takes an older package than the lock for CUDA 13, whose
torch is the base's; a newer one is told. Limits: Linux on x86-64. pip judges `python_version` by the Python it runs on, so what the wheels demand on each is held to the pins here.
Run: `make prove-gpu-install`.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests.model.test_locks import installed, pins

CUDAS, PYTHONS = (12, 13), ("3.11", "3.12", "3.13")
PIP_WHEEL = "pip==26.3"  # reads metadata without fetching the wheels: 2 GB less for each resolution


def run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        said = "\n".join(line for line in done.stderr.splitlines() if not line.startswith("WARNING"))
        sys.exit(f"pip fails; next: check the network and the package index, then the pins\n{' '.join(command)}\n{said[-3000:]}")


def resolve(command: list[str], report: Path) -> list[dict]:  # type: ignore[type-arg]
    """Metadata of each package that `command`, a dry run of pip, would install."""
    report.unlink(missing_ok=True)
    run(command)
    return [entry["metadata"] for entry in json.loads(report.read_text())["install"]]


def versions(metadata: list[dict]) -> dict[str, str]:  # type: ignore[type-arg]
    return {canonicalize_name(entry["name"]): entry["version"].partition("+")[0] for entry in metadata}


def unmet(metadata: list[dict], pinned: dict[str, str], python: str) -> list[str]:  # type: ignore[type-arg]
    """What these packages demand on Linux under `python`, and on the extras named by others, that the pins do not meet."""
    demands = {canonicalize_name(entry["name"]): [Requirement(text) for text in entry.get("requires_dist", ())] for entry in metadata}
    waiting, seen, missing = [(name, "") for name in demands], set(), []
    while waiting:
        name, extra = waiting.pop()
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        here = {"python_version": python, "python_full_version": f"{python}.0", "platform_system": "Linux", "platform_machine": "x86_64", "sys_platform": "linux", "extra": extra}
        for one in demands.get(name, ()):
            if one.marker is None or one.marker.evaluate(here):
                wanted = canonicalize_name(one.name)
                waiting += [(wanted, each) for each in one.extras]
                if wanted not in pinned or not one.specifier.contains(pinned[wanted], prereleases=True):
                    missing.append(f"{name} wants {one}")
    return sorted(set(missing))


def main() -> None:
    began, wrong = time.monotonic(), []
    with tempfile.TemporaryDirectory() as folder:
        run([sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps", "--dest", folder, PIP_WHEEL])
        report = Path(folder) / "report.json"
        pip = [sys.executable, f"{next(Path(folder).glob('pip-*.whl'))}/pip", "--disable-pip-version-check", "install", "--quiet",
               "--dry-run", "--ignore-installed", "--use-feature=fast-deps", "--report", str(report)]
        for cuda in CUDAS:
            pinned = installed("requirements.lock", f"requirements-gpu-cu{cuda}.lock")
            for python in PYTHONS:
                command = " ".join([*pip, "--only-binary=:all:", "--python-version", python])
                metadata = resolve(["make", "--no-print-directory", "-o", "setup", "setup-gpu", f"CUDA={cuda}", f"PIP={command}"], report)
                found = versions(metadata)
                differ = [f"{name} {found.get(name, 'missing')}, pinned {pinned.get(name, 'nowhere')}" for name in sorted(found | pinned) if found.get(name) != pinned.get(name)]
                differ += unmet(metadata, pinned, python)
                wrong += [f"CUDA {cuda}, Python {python}: {line}" for line in differ]
                print(f"CUDA {cuda}, Python {python}: {len(found)} packages resolved, {len(pinned)} pinned, {len(differ)} faults; torch {found['torch']}", flush=True)
        free = versions(resolve([*pip, "--no-build-isolation", "-c", "requirements.lock", ".[gpu]"], report))
    base, pinned = pins("requirements.lock"), installed("requirements.lock", "requirements-gpu-cu13.lock")
    # triton comes with torch, of which an index may offer a CPU build: pip then takes the newest for Unsloth.
    others = {name: version for name, version in free.items() if name in pinned and name != "triton" and version != pinned[name]}
    wrong += [f"pip install '.[gpu]': {name} {version}, pinned {pinned[name]}" for name, version in others.items() if name in base or Version(version) < Version(pinned[name])]
    print(f"pip install '.[gpu]' beside the pins of requirements.lock: {len(free)} packages, {sum(name in base for name in free)} of them pinned there; "
          f"otherwise than locked: {', '.join(f'{name} {version} (lock: {pinned[name]})' for name, version in sorted(others.items())) or 'none'}")
    print(f"{time.monotonic() - began:.0f} seconds")
    sys.exit("\n".join(["these are not as locked:", *wrong]) if wrong else 0)


if __name__ == "__main__":
    main()
