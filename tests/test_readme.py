"""The commands that README, docs and guide show: make targets exist, scripts know the flags, files and links are there."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

PAGES = [Path("README.md"), Path("CONTRIBUTING.md"), *sorted(Path("docs").rglob("*.md"))]
# Every target that the guide names.
GUIDE_TARGETS = {"setup", "verify", "train", "evaluate", "infer", "merge", "export-gguf", "pipeline", "test", "help", "clean"}


def commands() -> list[str]:
    """Lines of the pages' bash blocks, comments and continuations folded away."""
    lines: list[str] = []
    for page in PAGES:
        for block in re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
            lines += [line.split(" #")[0].strip() for line in block.replace("\\\n", " ").splitlines() if line.strip() and not line.startswith("#")]
    return lines


def targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", Path("Makefile").read_text(), re.MULTILINE))


def test_every_make_target_of_the_guide_and_the_pages_exists() -> None:
    named = {word for line in commands() for part in line.split("&&") if "make " in part
             for word in part.split("make ", 1)[1].split()[:1]}
    assert GUIDE_TARGETS | named <= targets(), named - targets()
    listed = subprocess.run(["make", "help"], capture_output=True, text=True, check=True).stdout
    assert all(f"make {target}" in listed for target in GUIDE_TARGETS)


def test_every_script_command_uses_flags_that_exist() -> None:
    seen = 0
    for line in commands():
        if match := re.search(r"(?:python scripts/(\w+)\.py|emergency-kit ((?:config|data|knowledge) \w+(?: (?:list|prune)\b)?|[a-z-]+))(.*)", line):
            script, verb, rest = match.groups()
            program = ["python", f"scripts/{script}.py"] if script else ["emergency-kit", *verb.split()]
            program[0] = str(Path(".venv/bin") / program[0]) if (Path(".venv/bin") / program[0]).exists() else program[0]
            helped = subprocess.run([*program, "--help"], capture_output=True, text=True)
            assert helped.returncode == 0, line
            for flag in re.findall(r"(?<!\S)(--?[a-z][a-z-]*)", rest):
                assert re.search(rf"(?<!\S){flag}\b", helped.stdout.replace(",", " ")), f"{flag} in {line}"
            seen += 1
    assert seen > 10


def test_a_dry_run_of_make_reaches_every_verb() -> None:
    for target, verb in {"train": "train", "evaluate": "evaluate", "infer": "infer", "merge": "merge", "export-gguf": "export-gguf",
                         "pipeline": "pipeline", "verify": "verify"}.items():
        shown = subprocess.run(["make", "-n", target, "ARGS=--profile embedded"], capture_output=True, text=True, check=True).stdout
        assert f"emergency-kit {verb} --profile embedded" in shown


def test_links_and_paths_of_the_pages_exist() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert "://" in target or (page.parent / target).exists(), f"{page}: {target}"
    tree = re.search(r"```\nMakefile.*?```", Path("README.md").read_text(encoding="utf-8"), re.DOTALL).group(0)
    for name in re.findall(r"^(?:  )?([\w/.]+)", tree, re.MULTILINE):
        assert Path(name).exists() or (Path("emergency_kit") / name).exists(), name
    rooms = {path.name for path in Path("emergency_kit").iterdir() if path.is_dir() and not path.name.startswith("_")}
    assert all(f"{room}/" in tree for room in rooms)


@pytest.mark.parametrize("shell", [shell for shell in ("bash", "zsh") if shutil.which(shell)])
def test_the_environment_can_be_activated_from_anywhere(shell: str, tmp_path: Path) -> None:
    script = Path("activate_env.sh").resolve()
    done = subprocess.run([shell, "-c", f'cd "{tmp_path}" && source "{script}" && command -v python && deactivate'], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert str(script.parent / ".venv/bin/python") in done.stdout and "deactivate" in done.stdout and not done.stderr


def copy_for_clean(folder: Path) -> Path:
    (folder / "scripts").mkdir()
    shutil.copy("scripts/clean.sh", folder / "scripts")
    for name in ("outputs/cache/x", "outputs/checkpoints/final/x", "outputs/gguf/x"):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text("x")
    return folder


@pytest.mark.parametrize("answer, flag, gone, kept", [
    ("n\n", [], [], ["outputs/cache", "outputs/gguf", "outputs/checkpoints"]), ("", [], [], ["outputs/cache", "outputs/checkpoints"]),
    ("y\n", [], ["outputs/cache", "outputs/gguf"], ["outputs/checkpoints/final/x"]),
    ("y\n", ["--checkpoints"], ["outputs/cache", "outputs/checkpoints"], [])])
def test_clean_shows_asks_and_spares_checkpoints(tmp_path: Path, answer: str, flag: list[str], gone: list[str], kept: list[str]) -> None:
    folder = copy_for_clean(tmp_path)
    done = subprocess.run(["bash", "scripts/clean.sh", *flag], cwd=folder, input=answer, capture_output=True, text=True)
    assert done.returncode == 0 and "outputs/cache" in done.stdout and "Delete? [y/N]" in done.stdout
    assert not any((folder / name).exists() for name in gone) and all((folder / name).exists() for name in kept)


def test_no_large_files_and_no_outputs_are_tracked() -> None:
    tracked = subprocess.run(["git", "ls-files", "-z"], capture_output=True, text=True)
    if tracked.returncode != 0:
        pytest.skip("not a git checkout")
    for name in filter(None, tracked.stdout.split("\0")):
        assert not Path(name).exists() or Path(name).stat().st_size < 5_000_000, name
        assert not name.startswith(("outputs/", "models/", ".venv/")), name
