"""The commands that README, docs and guide show: make targets exist, the kit's own parser takes every line, files and links are there."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from typer.exceptions import TyperException

from emergency_kit.cli.overview import find_command
from emergency_kit.config import load_config
from emergency_kit.errors import KitError

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


def words_of(line: str) -> list[str]:
    """The words of one command, without what leads its output elsewhere or follows after it."""
    words = shlex.split(line, comments=True)
    ends = [place for place, word in enumerate(words) if word in ("|", ">", "<", "&&", "&", ";") or word.endswith(";")]
    return words[:ends[0]] if ends else words


def kit_words(line: str) -> list[str] | None:
    """What the command line of the kit gets from a line of a page; None where it is no call of the kit. What goes before (torchrun, a variable) is not looked at."""
    words = words_of(line)
    for place, word in enumerate(words):
        if word.endswith("emergency-kit") and word != "ai-emergency-kit":
            return words[place + 1:]
        if script := re.fullmatch(r"scripts/(\w+)\.py", word):
            named = re.search(r'main\("([\w-]+)"\)', Path(word).read_text(encoding="utf-8"))
            assert named, f"{script[0]} names no verb"
            return [named[1], *words[place + 1:]]
    return None


def parse(words: list[str]) -> dict[str, Any]:
    """What the kit's own parser makes of a command line; nothing is run. An error of the parser is the test's."""
    if not words or words[0].startswith("--"):  # the first page, or the program's own flags
        assert not words or words[0] in ("--help", "--version"), words
        return {"verb": ""}
    command, named = find_command(list(words))
    if {"--help", "-h"} & set(words[len(named):]) or hasattr(command, "commands") and len(named) == len(words):
        return {"verb": " ".join(named)}
    return {"verb": " ".join(named), **command.make_context("emergency-kit", words[len(named):]).params}


def written_out(line: str) -> list[str]:
    """The kit's calls that a `make` line comes to, by make's own dry run; other lines as they are."""
    words = [word for word in words_of(line) if not re.fullmatch(r"[A-Z_]+=\S*", word)] if line else []
    if words[:1] != ["make"]:
        return [line]
    done = subprocess.run(["make", "-n", *words_of(line)[words_of(line).index("make") + 1:]], capture_output=True, text=True)
    assert done.returncode == 0, f"{line}: {done.stderr}"
    return [shown for shown in done.stdout.replace("\\\n", " ").splitlines() if "bin/emergency-kit" in shown]


def inline_commands() -> list[str]:
    """Commands in the text of the pages that are whole: with a verb, and no place-holder in dots."""
    found = {span for page in PAGES for span in re.findall(r"`((?:emergency-kit|make|python scripts/\w+\.py) [^`]+)`", without_blocks(page))}
    return sorted(span for span in found if "..." not in span)


def without_blocks(page: Path) -> str:
    return re.sub(r"^ *```.*?^ *```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def test_every_command_of_a_block_is_one_that_the_kit_takes() -> None:
    """Verbs, flags and their values by the command line's own parser; settings by the config's own check; make's by a dry run."""
    seen = 0
    for line in commands():
        for shown in written_out(line):
            words = kit_words(shown)
            if words is None or "FILE" in " ".join(words):
                continue
            given = parse(words)
            if given.get("set_") and given["verb"] != "sweep":
                load_config(given["profile"], given.get("config"), given["set_"])
            seen += 1
    assert seen > 60


@pytest.mark.parametrize("line", ["emergency-kit trian", "emergency-kit train --epoch 3", "python scripts/train.py --max-steps many", "make trian", "make plan ARGS=--gpus",
                                  "emergency-kit data cache prune --days"])
def test_a_wrong_command_is_refused(line: str) -> None:
    with pytest.raises((AssertionError, TyperException, KitError)):
        for shown in written_out(line):
            parse(kit_words(shown))


def test_every_command_in_the_text_names_a_verb_and_flags_that_exist() -> None:
    for line in inline_commands():
        for shown in written_out(re.sub(r"=\Z", "=2", line)):
            words = kit_words(shown)
            if words is not None:
                try:
                    parse(words)
                except TyperException as error:
                    assert error.format_message().startswith("Missing ") or "requires an argument" in error.format_message(), f"{line}: {error.format_message()}"


def test_every_file_that_a_command_names_is_there_or_made() -> None:
    """Paths that are neither below outputs/ nor in capitals (a place to be filled in) nor made by a command of the same page."""
    made = re.compile(r"(?:outputs|emergency_kit/knowledge/c\w+)/|~|\.?\./|/")
    for line in commands():
        for word in words_of(line):
            path = word.rpartition("=")[2]
            if re.fullmatch(r"[\w.-]+(?:/[\w.-]+)+", path) and not made.match(path) and path != "owner/name" and not path.isupper():
                assert Path(path).exists(), f"{path} in {line}"


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
