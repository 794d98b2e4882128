"""docs/Architecture.md: what it names is there, and each diff that it shows applies to a copy of the tree and does what it is shown for."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = Path("docs/Architecture.md").read_text(encoding="utf-8")
PACKAGE = Path("emergency_kit")
DIFFS = dict(re.findall(r"^### Add (.+?)\n.*?^```diff\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE))
RECORD = "- input: the oil in my pan is on fire\n  output: Cover the pan.\n"
# What is run in the copy once the diff has been applied: Python, or files of tests with what is chosen of them.
TRIALS = {
    "a model family": ("tests/data/test_families.py", "tests/export/test_gguf.py", "-k", "granite"),
    "a dataset format": """
from pathlib import Path
from emergency_kit.config import load_config
from emergency_kit.data.load import open_split
Path("mine.yaml").write_text(RECORD)
record, = open_split(load_config("embedded", settings=["dataset.name=mine.yaml", "dataset.grounding=none"]), "train").every()
assert (record.input, record.output) == ("the oil in my pan is on fire", "Cover the pan."), record
""",
    "a hazard": """
from emergency_kit.knowledge.cards import load_cards
from emergency_kit.knowledge.check import check_knowledge
from emergency_kit.knowledge.emergency_numbers import load_numbers
from emergency_kit.knowledge.retrieve import Retriever
from tests.knowledge.test_cards import HAZARDS
cards = load_cards()
assert "dust_storm" in cards and set(cards) == set(HAZARDS)
assert check_knowledge(cards, load_numbers(), 2026) == []
found = Retriever(cards).find("we are on the highway and a wall of dust is coming, I cannot see the cars in front any more")
assert found.ids[0] == "dust_storm", found.describe(cards)
""",
    "a metric": """
import json
from pathlib import Path
from emergency_kit.data.format import Record
from emergency_kit.evaluation.run import evaluate
from tests.tiny import resolve, save_tiny_model
model = save_tiny_model(Path("tiny"))
for split in ("train", "test"):
    Path(f"{split}.jsonl").write_text(Record(id="1", input="the pan burns", output="x").to_json())
report = json.loads(evaluate(resolve(model, dataset__name="t*.jsonl", evaluation__engine="torch", evaluation__compare_base="false", evaluation__max_new_tokens=4,
                                     dataset__grounding="none"), checkpoint=model).read_text())
assert report["models"][0]["metrics"]["steps"] == {"value": 0.0, "low": 0.0, "high": 0.0, "n": 1}, report["models"][0]["metrics"]
assert "steps in the guidance" in Path("outputs/report.html").read_text()
""",
    "a backend": ("tests/model/test_backend.py", "-k", "8_bits"),
}


def names_in(path: Path) -> set[str]:
    """What a file defines: functions, classes, their methods as `Class.method`, constants."""
    found: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign):
            found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found.add(node.target.id)
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found |= {node.name} | {f"{node.name}.{inner.name}" for inner in ast.iter_child_nodes(node) if isinstance(inner, ast.FunctionDef)}
    return found


def test_the_ways_lead_through_what_is_there() -> None:
    rows = re.findall(r"^\| `([\w/]+\.py)` \| (`[^|]+) \|", PAGE, re.MULTILINE)
    assert len(rows) > 40
    for path, cell in rows:
        assert set(re.findall(r"`([\w.]+)`", cell)) <= names_in(PACKAGE / path), f"{path}: {cell}"
    for path in re.findall(r"`((?:[\w]+/)+[\w]+\.py)`", PAGE):
        assert (PACKAGE / path).is_file() or Path(path).is_file(), path


def test_every_room_has_a_row() -> None:
    rows = re.search(r"^\| room \|.*?\n\n", PAGE, re.DOTALL | re.MULTILINE)
    assert rows is not None
    rooms = {path.stem for path in PACKAGE.iterdir() if not path.name.startswith(("_", "py.typed"))}
    assert set(re.findall(r"`(\w+)`", " ".join(line.split("|")[1] for line in rows[0].splitlines() if "|" in line))) == rooms


def test_a_trial_for_every_diff() -> None:
    assert set(DIFFS) == set(TRIALS)


LONG = {"a model family", "a hazard", "a backend"}


@pytest.mark.parametrize("name", TRIALS)
def test_the_diff_applies_and_does_what_it_is_shown_for(name: str, tmp_path: Path) -> None:
    if name == "a backend":
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed; make test installs it")
    for folder in ("emergency_kit", "tests", "configs"):
        shutil.copytree(folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "SmolLM2-135M-Instruct").symlink_to(Path("models/SmolLM2-135M-Instruct").resolve())
    # Outside of a repository, whichever one this folder may stand in.
    applied = subprocess.run(["git", "apply", "-"], cwd=tmp_path, input=DIFFS[name], text=True, capture_output=True, env={**os.environ, "GIT_CEILING_DIRECTORIES": str(tmp_path.parent)})
    assert applied.returncode == 0, applied.stderr
    if name in LONG and os.environ.get("EMERGENCY_KIT_DOCS") != "full":
        pytest.skip("the diff applies; its trial, half a minute and more, is part of make test-docs")
    trial = TRIALS[name]
    command = ["-c", f"RECORD = {RECORD!r}\n{trial}"] if isinstance(trial, str) else ["-m", "pytest", "-q", "-p", "no:cacheprovider", *trial]
    done = subprocess.run([sys.executable, *command], cwd=tmp_path, text=True, capture_output=True, env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
