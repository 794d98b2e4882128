"""The structure of the package: imports flow one way, Unsloth in one file, no torch where --help needs speed."""

import ast
import resource
import subprocess
import sys
from pathlib import Path

import pytest

# A room may import from its own level and from those before it.
LEVELS = [{"errors"}, {"config_training"}, {"config"}, {"files"}, {"artifacts"}, {"knowledge"}, {"data", "model"}, {"training"}, {"inference"}, {"evaluation", "export"}, {"kit"}, {"cli"}]
ROOMS = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}
SCRIPTS = sorted(Path("scripts").glob("*.py"))


def imports(path: Path) -> list[str]:
    found: list[str] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def room_of(path: Path) -> str:
    parts = path.relative_to("emergency_kit").parts
    return parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", sorted(Path("emergency_kit").rglob("*.py")), ids=str)
def test_imports_flow_one_way(path: Path) -> None:
    room = room_of(path)
    if room == "__init__":
        return
    for name in imports(path):
        if name.startswith("emergency_kit."):
            other = name.split(".")[1]
            # data.tokenize --preview asks the model room for its tokenizer; both stand on one level
            assert other not in ROOMS or ROOMS[other] <= ROOMS[room], f"{path} imports {name}"


def test_unsloth_is_imported_in_one_file() -> None:
    holders = [path for path in Path("emergency_kit").rglob("*.py") if any(name.split(".")[0] == "unsloth" for name in imports(path))]
    assert [str(path) for path in holders] == ["emergency_kit/model/unsloth_backend.py"]


@pytest.mark.parametrize("script", SCRIPTS, ids=str)
def test_help_is_quick_and_imports_no_torch(script: Path) -> None:
    assert len(script.read_text().splitlines()) <= 6
    seconds = []
    for _ in range(5):
        # Time of the processor, which is the wall's on an idle machine: other tests run beside this one.
        started = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([sys.executable, str(script), "--help"], capture_output=True, text=True)
        ended = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(ended.ru_utime + ended.ru_stime - started.ru_utime - started.ru_stime)
        assert done.returncode == 0 and "Usage" in done.stdout
    assert min(seconds) < 0.3, seconds
    probe = f"import sys, runpy; sys.argv = ['x', '--help']\ntry: runpy.run_path({str(script)!r}, run_name='__main__')\nexcept SystemExit: pass\n" \
            "assert not {'torch', 'transformers'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", probe], capture_output=True).returncode == 0


def test_broad_handlers_are_few() -> None:
    """One in cli.main, and one around trackers, whose errors are any library's and never a reason to lose a run."""
    broad = []
    for path in Path("emergency_kit").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ExceptHandler) and (node.type is None or getattr(node.type, "id", "") == "Exception"):
                broad.append(str(path))
    assert sorted(broad) == ["emergency_kit/cli.py", "emergency_kit/training/callbacks.py"]
