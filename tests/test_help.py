"""Help, first page and reference: complete, current, whole words from 60 columns on, and the nearest of what there is."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Iterator

import pytest

import emergency_kit
from emergency_kit import terminal
from emergency_kit.cli.command import app
from emergency_kit.cli.overview import FLOW, OTHER_NAMES, WAY, find_command, next_verb, overview, suggest_flag
from emergency_kit.cli.reference import reference
from emergency_kit.config import Config
from emergency_kit.errors import UsageError

CLI = [sys.executable, "-m", "emergency_kit.cli"]
NARROW = 60


def walk(verbs: Any = app, before: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The words of every verb and group."""
    for info in verbs.registered_commands:
        yield (*before, info.name or info.callback.__name__.replace("_", "-"))
    for info in verbs.registered_groups:
        yield (*before, info.name)
        yield from walk(info.typer_instance, (*before, info.name))


EVERY = sorted(walk())


def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*CLI, *arguments], capture_output=True, text=True, env=os.environ | variables)


def on_terminal(arguments: list[str], columns: int, **variables: str) -> str:
    """What a command sends to a terminal of so many columns."""
    pid, descriptor = pty.fork()
    if not pid:
        os.execve(CLI[0], [*CLI, *arguments], os.environ | {"COLUMNS": str(columns), "TERM": "xterm"} | variables)
    shown, ends = b"", time.monotonic() + 120
    while time.monotonic() < ends:
        if select.select([descriptor], [], [], 1)[0]:
            try:
                piece = os.read(descriptor, 65536)
            except OSError:  # its end is closed
                break
            shown += piece
    os.waitpid(pid, 0)
    os.close(descriptor)
    return shown.decode().replace("\r\n", "\n")


def help_of(words: tuple[str, ...]) -> str:
    command, named = find_command(list(words))
    return str(command.get_help(command.make_context(" ".join(["emergency-kit", *named]), [], resilient_parsing=True)))


def too_long(text: str, width: int) -> list[str]:
    """Lines over the width whose last word could have stood on a line of its own."""
    return [line for line in text.splitlines() if len(line) > width and len(line.split()) > 1 and line.rindex(" ") > width // 2]


@pytest.mark.parametrize("words", EVERY, ids=" ".join)
def test_help_fits_a_narrow_terminal_with_every_word_whole(words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(NARROW))
    narrow = help_of(words)
    assert not too_long(narrow, NARROW)
    monkeypatch.setenv("COLUMNS", "80")
    wide = help_of(words)
    assert narrow.split() == wide.split() and not too_long(wide, 80)


@pytest.mark.parametrize("words", EVERY, ids=" ".join)
def test_examples_and_next_commands_are_ones_that_exist(words: tuple[str, ...]) -> None:
    for line in re.findall(r"^    emergency-kit (.*)$", help_of(words), re.MULTILINE):
        command, named = find_command(shlex.split(line))
        command.make_context("x", shlex.split(line)[len(named):])
        assert len(line) <= NARROW - len("    emergency-kit ")


def test_the_first_page_has_every_verb_once_in_one_line_each(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("COLUMNS", str(NARROW))
    page = overview(tmp_path)
    verbs = [verb for group in FLOW.values() for verb in group]
    assert sorted(verbs) == sorted(words[0] for words in EVERY if len(words) == 1)
    assert re.findall(r"^  ([a-z-]+) {2,}\S", page, re.MULTILINE) == verbs and max(map(len, page.splitlines())) <= NARROW
    assert [verbs.index(verb) for verb in ("setup", "verify", "data", "plan", "train", "evaluate", "merge", "export-gguf", "kit", "infer")] == sorted(
        verbs.index(verb) for verb in ("setup", "verify", "data", "plan", "train", "evaluate", "merge", "export-gguf", "kit", "infer"))


def test_the_first_page_says_what_to_do_next_here(tmp_path: Path) -> None:
    assert "Next: emergency-kit setup\n" in overview(tmp_path)
    for place, (file, verb, _) in enumerate(WAY):
        assert next_verb(tmp_path)[0] == verb
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("{}")
        assert next_verb(tmp_path)[0] == (WAY[place + 1][1] if place + 1 < len(WAY) else "infer")
    training = Config().training
    assert {file for file, _, _ in WAY} >= {f"{training.output_dir}/checkpoints/{training.model_name}/manifest.json"}


def test_alone_with_help_and_with_a_group_alone_it_shows_what_there_is() -> None:
    alone = run()
    assert alone.returncode == 0 and alone.stdout == run("--help").stdout == run("help").stdout and "Train adapters" in alone.stdout
    assert run("data").stdout == run("data", "--help").stdout == run("help", "data").stdout and "preview" in run("data").stdout
    assert run("help", "data", "cache", "prune").stdout == run("data", "cache", "prune", "-h").stdout
    assert run("--version").stdout == f"emergency-kit {emergency_kit.__version__}\n"


@pytest.mark.parametrize("typed, meant", [
    ("tran", "train"), ("evalute", "evaluate"), ("eval", "evaluate"), ("export_gguf", "export-gguf"), ("merge_lora", "merge"), ("inspect", "data inspect"),
    ("data insect", "data inspect"), ("data cache prun", "data cache prune"), ("data infer", "infer"), *OTHER_NAMES.items()])
def test_an_unknown_verb_is_answered_with_the_nearest(typed: str, meant: str) -> None:
    with pytest.raises(UsageError, match=f"; did you mean emergency-kit {meant}\\?; all verbs: emergency-kit"):
        find_command(typed.split())


def test_nothing_is_suggested_where_nothing_is_near() -> None:
    for words, message in ((["xyzzy"], "no such verb 'xyzzy'; all verbs: emergency-kit"), (["--nope"], "got '--nope' where a verb stands; all verbs: emergency-kit"),
                           (["data", "--set"], "got '--set' where a verb stands; all verbs: emergency-kit data")):
        with pytest.raises(UsageError) as error:
            find_command(words)
        assert str(error.value) == message


@pytest.mark.parametrize("flag, near", [("--max-step", "--max-steps"), ("--learning-rate", "--set training.learning_rate=VALUE"), ("--epochs", "--set training.num_epochs=VALUE"),
                                        ("--batch-size", "--set training.batch_size=VALUE"), ("--xyzzy", "")])
def test_an_unknown_flag_is_answered_with_the_nearest_or_with_its_config_key(flag: str, near: str) -> None:
    command, _ = find_command(["train"])
    with pytest.raises(Exception) as error:
        command.make_context("emergency-kit train", [flag, "1"])
    assert suggest_flag(error.value) == f"No such option: {flag}" + (f"; did you mean {near}?" if near else "")


def test_what_help_tells_of_defaults_is_what_the_config_has() -> None:
    config = Config()
    for words, told in ((("serve",), f"Port, {config.serve.port} by default"), (("serve",), f"{config.serve.host} by default"),
                        (("train",), f"{config.training.output_dir} by default"), (("train",), f"{config.training.model_name} by default"),
                        (("infer",), f"{config.inference.temperature:g}, the default")):
        assert told in " ".join(help_of(words).split())


def test_the_reference_in_the_docs_is_current_and_names_every_verb_and_flag() -> None:
    page = Path("docs/CLI.md").read_text(encoding="utf-8")
    assert page == reference(), "run: emergency-kit reference > docs/CLI.md"
    for words in EVERY:
        assert f"`emergency-kit {' '.join(words)}" in page
        command, _ = find_command(list(words))
        for parameter in command.params:
            assert f"{parameter.opts[-1]}`" in page or parameter.metavar in page, (words, parameter.name)


def test_piped_output_has_no_colour_and_whole_lines_and_no_color_is_obeyed(tmp_path: Path) -> None:
    piped = run("knowledge", "show", "stroke", COLUMNS="60")
    explained = run("config", "explain", "--profile", "embedded", COLUMNS="60").stdout
    assert piped.returncode == 0 and "\x1b" not in piped.stdout + explained and any(len(line) > 100 for line in explained.splitlines())
    assert "\x1b" not in run("knowledge", "list").stdout
    answer = "FACTS\n• Smoke.\n\nUNCERTAINTIES\n• None.\n\nANALYSIS\n• Bad.\n\nGUIDANCE\n1. Leave."
    rows = [{"input": f"smoke number {number} in house {number * 7}", "output": answer} for number in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    colour = re.compile(r"\x1b\[[0-9;]*\b3[0-7]m")
    preview = ["data", "preview", str(tmp_path / "rows.jsonl"), "--profile", "embedded", "--set", f"training.output_dir={tmp_path}", "--set", "dataset.grounding=none"]
    assert colour.search(on_terminal(preview, 80)) and not colour.search(on_terminal(preview, 80, NO_COLOR="1"))


def test_long_lines_are_folded_between_words_on_a_terminal() -> None:
    whole = run("config", "explain", "--profile", "embedded").stdout
    shown = on_terminal(["config", "explain", "--profile", "embedded"], NARROW)
    assert shown.split() == whole.split() and not too_long(shown, NARROW) and len(shown.splitlines()) > len(whole.splitlines())
    error = on_terminal(["train", "--learning-rate", "3"], NARROW)
    assert max(map(len, error.splitlines())) <= NARROW and error.startswith("error: No such option")


@pytest.mark.parametrize("line, folded", [
    ("short", "short"),
    ("  ok    Hardware: Intel(R) Xeon(R) Processor, 2 cores, 25 GB memory", "  ok    Hardware: Intel(R) Xeon(R)\n        Processor, 2 cores, 25 GB\n        memory"),
    ("a line of words that goes on and on, well over-the-edge", "a line of words that goes on and on,\n  well over-the-edge"),
    ("x = 1  [configs/embedded/a_long_name_of_a_file.yaml:12]", "x = 1\n  [configs/embedded/a_long_name_of_a_file.yaml:12]"),
    ("│ a row of a table that is wider than the terminal is │", "│ a row of a table that is wider than the terminal is │"),
    ("\r\x1b[2Ka line above a live display that is too long for it", "\r\x1b[2Ka line above a live display that is\n  too long for it"),
    ("some \x1b[32mcoloured words\x1b[0m in a line that is too long for it", "some \x1b[32mcoloured words\x1b[0m in a line that is too long for it"),
])
def test_fold(line: str, folded: str) -> None:
    assert terminal.fold(line, 36) == folded


def test_pieces_of_a_line_pass_as_they_are(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    stream = terminal.Folding(sys.stdout)
    for piece in ("a first piece ", "and then very many more words", "\n", "and a whole line of words\n"):
        stream.write(piece)
    assert capsys.readouterr().out == "a first piece and then very many more words\nand a whole line of\n  words\n"


def test_closed_streams_are_no_error() -> None:
    for closed in (">&-", "2>&-", ">&- 2>&-"):
        for arguments, code in (("--version", 0), ("xyzzy", 2)):
            assert subprocess.run(f"{shlex.join(CLI)} {arguments} {closed}", shell=True, capture_output=True).returncode == code
