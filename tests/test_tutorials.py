"""The tutorials, done as they are written: every command in order in a copy of this repository, its output beside the one shown.

In: the `bash`, `python`, `text` and `yaml` blocks of docs/tutorials, and the notebook in examples/. A `text` block is what the block above it prints:
its lines must come, in order, with numbers of any value, since those differ between machines; a line `[...]` stands for what was cut. `text recorded` is
what a model wrote once, which is not compared. The suite goes as far as the first command whose comment names minutes; `make test-tutorials`
(EMERGENCY_KIT_TUTORIALS=full) does the rest too, from the model that `make pipeline` has trained in outputs/.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

FOLDER = Path("docs/tutorials")
FULL = os.environ.get("EMERGENCY_KIT_TUTORIALS") == "full"
CUT = "[...]"
# What later stages need of a finished `make pipeline`, but for caches.
TRAINED = ("checkpoints/final", "data", "merged", "evaluation_report.json", "report.html", "verdict.json", "logs")


@dataclass
class Step:
    """Commands of one `bash` block, or one `python` block, and the output shown for them."""

    commands: list[tuple[str, bool]] = field(default_factory=list)
    """`(command, whether its comment names minutes)`"""
    shown: list[str] = field(default_factory=list)


def read_steps(page: Path) -> list[Step]:
    steps: list[Step] = []
    for kind, block in re.findall(r"^```([a-z ]*)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE):
        if kind == "bash":
            lines = [line for line in block.replace("\\\n", " ").splitlines() if line.strip()]
            steps.append(Step([(line.split(" #")[0].strip(), "minute" in line.partition(" #")[2]) for line in lines]))
        elif kind == "python":
            steps.append(Step([(f"python - <<'END'\n{block}END", takes_long(block))]))
        elif kind == "text":
            assert steps and not steps[-1].shown, f"{page}: a text block without commands of its own"
            steps[-1].shown = block.splitlines()
    return steps


def takes_long(code: str) -> bool:
    """Whether the comment that Python code begins with names minutes."""
    first = code.splitlines()[0]
    return first.startswith("#") and "minute" in first


def loose(line: str) -> str:
    """A line as it is compared: numbers of any value, spaces of any number, no rules and bars of tables."""
    line = re.sub(r"[━─┃│┏┓┡┩┳╇└┘┴█▉▊▋▌▍▎▏]+", " ", line)
    return " ".join(re.sub(r"\d[\d.,:]*", "0", line).split())


def missing(shown: list[str], printed: str) -> list[str]:
    """The shown lines that the output lacks, or has in another order."""
    lines, place, lacking = [loose(line) for line in printed.splitlines()], 0, []
    for line in filter(None, map(loose, shown)):
        if line == CUT:
            continue
        if line in lines[place:]:
            place += lines[place:].index(line) + 1
        else:
            lacking.append(line)
    return lacking


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A copy of what is tracked, with links to the environment and the base model; in full the trained model too."""
    copy = tmp_path / "kit"
    listed = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    for name in filter(None, listed.stdout.split("\0")):
        if Path(name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(name, copy / name)
    for name in ("requirements.lock", "pyproject.toml", "requirements-test.lock"):  # older than the environment: make sets nothing up
        os.utime(copy / name, (0, 0))
    if Path(".venv").exists():
        (copy / ".venv").symlink_to(Path(".venv").resolve())
    (copy / "models").mkdir()  # a new card's index goes here, not into the real models/
    for entry in Path("models").iterdir():
        (copy / "models" / entry.name).symlink_to(entry.resolve())
    programs = copy / "outputs" / "programs"
    programs.mkdir(parents=True)
    for name, command in {"emergency-kit": "-m emergency_kit.cli", "python": ""}.items():
        (programs / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {command} "$@"\n')
        (programs / name).chmod(0o755)
    if FULL:
        if not Path("outputs/checkpoints/final").exists():
            pytest.fail("outputs/checkpoints/final is not there. Next: make pipeline")
        for name in TRAINED:
            source, target = Path("outputs") / name, copy / "outputs" / name
            if source.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                (shutil.copytree if source.is_dir() else shutil.copy)(source, target)
    return copy


def run(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PATH": f"{folder / 'outputs/programs'}:{os.environ['PATH']}", "PYTHONPATH": str(folder), "COLUMNS": "150", "NO_COLOR": "1",
                   "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(["bash", "-c", command], cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, stdin=subprocess.DEVNULL)


@pytest.mark.parametrize("page", sorted(FOLDER.glob("*.md")), ids=lambda page: page.stem)
def test_a_tutorial_does_what_it_shows(page: Path, repository: Path) -> None:
    done = 0
    for step in read_steps(page):
        printed = ""
        for command, long in step.commands:
            if long and not FULL:
                assert done, f"{page} begins with a command that takes minutes: nothing of it is tried here"
                return
            outcome = run(command, repository)
            print(f"$ {command}\n{outcome.stdout}")
            # A comment may say which exit code is meant, as gate's 7; none means 0.
            meant = int(match[1]) if (match := re.search(rf"{re.escape(command)} +#.*exit code (\d+)", page.read_text(encoding="utf-8"))) else 0
            assert outcome.returncode == meant, f"{command}\n{outcome.stdout}"
            printed += outcome.stdout
            done += 1
        assert not missing(step.shown, printed), f"{[command for command, _ in step.commands]}\n{printed}"
    assert done


def test_what_is_compared() -> None:
    assert not missing(["train  30", CUT, "answers 100%"], "train 31\nmore\nanswers 7%\n")
    assert missing(["a 1", "b"], "b\na 2\n") == ["b"]
    assert missing(["Nothing to mend: 71 cards"], "Nothing to mend in 71 cards\n")


def test_yaml_of_the_tutorials_stands_in_the_examples() -> None:
    files = [path.read_text(encoding="utf-8") for path in Path("examples").rglob("*.yaml")]
    blocks = [(page, block) for page in FOLDER.glob("*.md") for block in re.findall(r"```yaml\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)]
    assert blocks
    for page, block in blocks:
        for piece in block.split(f"{CUT}\n"):
            assert any(piece.rstrip() in text for text in files), f"{page}:\n{piece}"


def test_the_notebook_runs_from_its_own_folder(repository: Path) -> None:
    notebook = json.loads((repository / "examples/first_answer.ipynb").read_text(encoding="utf-8"))
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    kept = cells if FULL else list(itertools.takewhile(lambda code: not takes_long(code), cells))
    assert len(kept) >= 3 and all(cell["outputs"] or "print" not in "".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code")
    (repository / "outputs/cells.py").write_text("\n".join(kept), encoding="utf-8")
    outcome = run("cd examples && python ../outputs/cells.py", repository)
    assert outcome.returncode == 0, outcome.stdout
    assert "train 30 records, 2 rejected" in outcome.stdout and "12 steps" in outcome.stdout
