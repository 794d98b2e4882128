"""The structure of the package: imports flow one way, Unsloth in one file, no torch where --help needs speed."""

import ast
import resource
import subprocess
import sys
from pathlib import Path

import pytest

# A room may import from its own level and from those before it.
LEVELS = [{"errors"}, {"config_training"}, {"config"}, {"files"}, {"artifacts"}, {"knowledge"}, {"data", "model"}, {"training"}, {"inference"}, {"evaluation", "export"}, {"kit"}, {"api"}, {"cli"}]
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


def test_a_file_of_more_than_400_lines_says_why_in_its_head() -> None:
    texts = {path: path.read_text(encoding="utf-8") for folder in ("emergency_kit", "tests", "benchmarks") for path in Path(folder).rglob("*.py")}
    long = [path for path, text in texts.items() if len(text.splitlines()) > 400]
    assert [str(path) for path in long if "longer than" not in (ast.get_docstring(ast.parse(texts[path])) or "")] == []


def test_unsloth_is_imported_in_one_file() -> None:
    holders = [path for path in Path("emergency_kit").rglob("*.py") if any(name.split(".")[0] == "unsloth" for name in imports(path))]
    assert [str(path) for path in holders] == ["emergency_kit/model/unsloth_backend.py"]


def processor_seconds(*arguments: str) -> tuple[float, str]:
    """`(time of the processor, output)` of a Python process: on an idle machine the wall's, here other tests run beside it."""
    started = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=True)
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return ended.ru_utime + ended.ru_stime - started.ru_utime - started.ru_stime, done.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=str)
def test_help_is_quick_and_imports_no_torch(script: Path) -> None:
    assert len(script.read_text().splitlines()) <= 7
    seconds, libraries = [], []
    # A slow or crowded machine is measured by what the libraries that print the help take to import on it, in turns.
    while len(seconds) < 5 and not (seconds and min(seconds) < 0.3):
        taken, text = processor_seconds(str(script), "--help")
        seconds.append(taken)
        libraries.append(processor_seconds("-c", "import typer.main, typer.rich_utils, pydantic, yaml")[0])
        assert "Usage" in text
    assert min(seconds) < max(0.3, 1.4 * min(libraries)), (seconds, libraries)
    probe = f"import sys, runpy; sys.argv = ['x', '--help']\ntry: runpy.run_path({str(script)!r}, run_name='__main__')\nexcept SystemExit: pass\n" \
            "assert not {'torch', 'transformers'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", probe], capture_output=True).returncode == 0


def test_broad_handlers_are_few() -> None:
    """One in cli/entry.py, and one around trackers, whose errors are any library's and never a reason to lose a run."""
    broad = []
    for path in Path("emergency_kit").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ExceptHandler) and (node.type is None or getattr(node.type, "id", "") == "Exception"):
                broad.append(str(path))
    assert sorted(broad) == ["emergency_kit/cli/entry.py", "emergency_kit/training/callbacks.py"]
