"""Does `pip install -e '.[gpu]'` resolve beside the pins of requirements.lock? Asks the package index, installs nothing, needs no GPU.

Out: a table of what pip would install beyond those pins. Fails where a pin moves, where Unsloth is older than the gpu extra wants, or where a
GPU lock names another version. Run: `make prove-gpu-install`.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.model.test_locks import pins


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        # Neither a wheel that an index lacks here (torch's CPU build) nor CUDA's libraries decide anything: their names are compared, not they.
        done = subprocess.run([sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--dry-run", "--ignore-installed", "--no-build-isolation",
                               "--report", str(report), "-c", "requirements.lock", "-e", ".[gpu]"], capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"pip finds no versions that go together:\n{done.stderr[-3000:]}")
        metadata = [entry["metadata"] for entry in json.loads(report.read_text())["install"]]
    found = {name.replace("_", "-").lower(): version.partition("+")[0] for name, version in ((entry["name"], entry["version"]) for entry in metadata)}
    base = pins("requirements.lock")
    moved = [f"{name} {found[name]} (pinned {base[name]})" for name in base if name in found and found[name] != base[name]]
    for lock in ("requirements-gpu-cu12.lock", "requirements-gpu-cu13.lock"):
        # triton comes with torch: a CPU build names none, so pip takes the newest for Unsloth.
        moved += [f"{name} {found[name]} ({lock}: {version})" for name, version in pins(lock).items() if name in found and name != "triton" and found[name] != version]
    print(f"{len(found)} packages, {sum(name in base for name in found)} of them pinned in requirements.lock; beside those:")
    print("\n".join(f"  {name} {version}" for name, version in sorted(found.items()) if name not in base))
    sys.exit(f"other versions than the locks name: {', '.join(moved)}" if moved else 0)


if __name__ == "__main__":
    main()
