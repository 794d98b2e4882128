"""TAB in real shells, each with a terminal of its own; those that are not installed are skipped."""

from __future__ import annotations

import os
import pty
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

WAIT_SECONDS = 60


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home folder, and in it a folder for PATH with the command of this checkout."""
    home = tmp_path_factory.mktemp("home")
    (home / "bin").mkdir()
    command = home / "bin" / "emergency-kit"
    command.write_text(f'#!/bin/sh\nPYTHONPATH={Path.cwd()} exec {sys.executable} -m emergency_kit.cli "$@"\n')
    command.chmod(0o755)
    return home


def environment(home: Path) -> dict[str, str]:
    return os.environ | {"HOME": str(home), "PATH": f"{home / 'bin'}:{os.environ['PATH']}", "TERM": "xterm", "PS1": "$ ", "COLUMNS": "80"}


class Terminal:
    """An interactive shell with a terminal: type, and read until something stands there."""

    def __init__(self, arguments: list[str], home: Path):
        self.seen = ""
        self.pid, self.descriptor = pty.fork()
        if not self.pid:
            os.execvpe(arguments[0], arguments, environment(home))

    def type(self, text: str, until: str) -> str:
        """What the terminal shows after `text` was typed, until `until` is in it."""
        os.write(self.descriptor, text.encode())
        self.seen, ends = "", time.monotonic() + WAIT_SECONDS
        while until not in self.seen:
            assert time.monotonic() < ends, f"{text!r} showed {self.seen!r}; expected {until!r}"
            if select.select([self.descriptor], [], [], 0.1)[0]:
                self.seen += os.read(self.descriptor, 4096).decode(errors="replace")
        return self.seen

    def close(self) -> None:
        os.write(self.descriptor, b"\x03\x04")
        os.close(self.descriptor)
        os.waitpid(self.pid, 0)


def test_tab_completes_verbs_flags_and_values_in_bash(place: Path) -> None:
    """What --install wrote is what the shell's own start reads; TAB finishes a word that has one end, and lists several."""
    done = subprocess.run(["emergency-kit", "completion", "bash", "--install"], env=environment(place), capture_output=True, text=True)
    assert done.returncode == 0 and str(place / ".bash_completions" / "emergency-kit.sh") in done.stdout, done.stderr
    shell = Terminal(["bash", "--noprofile", "--rcfile", str(place / ".bashrc"), "-i"], place)
    try:
        shell.type("PS1='> '; bind 'set enable-bracketed-paste off' 2>/dev/null; echo rea''dy\n", "ready")
        shell.type("emergency-kit tr\t", "emergency-kit train ")
        shell.type("--prof\t", "ile ")
        shell.type("em\t", "bedded ")
        shell.type("\x15emergency-kit data \t\t", "preview")
        assert all(verb in shell.seen for verb in ("build", "cache", "inspect"))
        shell.type("\x15emergency-kit train --set training.learning\t", "training.learning_rate=")
        shell.type("\x15emergency-kit export-gguf -q q4_k\t", "q4_k_m ")
    finally:
        shell.close()


@pytest.mark.skipif(not shutil.which("zsh"), reason="zsh is not installed")
def test_tab_completes_in_zsh(place: Path) -> None:
    done = subprocess.run(["emergency-kit", "completion", "zsh", "--install"], env=environment(place), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    shell = Terminal(["zsh", "-i"], place)
    try:
        shell.type("echo rea''dy\n", "ready")
        shell.type("emergency-kit tra\t", "emergency-kit train")
        shell.type("--profile em\t", "embedded")
    finally:
        shell.close()


@pytest.mark.skipif(not shutil.which("fish"), reason="fish is not installed")
def test_tab_completes_in_fish(place: Path) -> None:
    done = subprocess.run(["emergency-kit", "completion", "fish", "--install"], env=environment(place), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

    def complete(line: str) -> list[str]:
        installed = place / ".config" / "fish" / "completions" / "emergency-kit.fish"
        asked = subprocess.run(["fish", "-c", f"source {installed}; complete -C '{line}'"], env=environment(place), capture_output=True, text=True)
        return [answer.partition("\t")[0] for answer in asked.stdout.splitlines()]

    assert complete("emergency-kit tra") == ["train"]
    assert complete("emergency-kit train --profile em") == ["embedded"]
    assert {"build", "inspect", "preview", "cache"} <= set(complete("emergency-kit data "))


def test_the_script_is_printed_for_every_shell_and_another_is_refused(place: Path) -> None:
    for shell in ("bash", "zsh", "fish"):
        printed = subprocess.run(["emergency-kit", "completion", shell], env=environment(place), capture_output=True, text=True).stdout
        assert "_EMERGENCY_KIT_COMPLETE" in printed and "emergency-kit" in printed
    refused = subprocess.run(["emergency-kit", "completion", "tcsh"], env=environment(place), capture_output=True, text=True)
    assert refused.returncode == 2 and refused.stderr == "error: completion: got 'tcsh'; expected bash, zsh, fish\n"
