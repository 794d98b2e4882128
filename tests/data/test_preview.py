"""Rows as the model reads them: what is supervised set apart, ids on demand, odd rows told."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from emergency_kit.data.preview import preview
from tests.data.files import resolve, write

ROWS = [{"id": f"r{number}", "input": f"smoke {number} \x1b[31m", "output": f"Leave {number}."} for number in range(3)]


@pytest.fixture()
def source(tmp_path: Path) -> Path:
    write(tmp_path / "train.jsonl", *ROWS, {"id": "long", "input": "help " * 400, "output": "Leave."})
    write(tmp_path / "validation.jsonl", ROWS[0])
    return tmp_path


def test_supervised_text_stands_between_marks_in_a_pipe(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    preview(resolve(source), None, "train", 2)
    lines = capsys.readouterr().out
    assert lines.startswith(f"train: {source}/train.jsonl read as input/output (input, output, id)\n--- r0: ")
    assert "SITUATION: smoke 0 ␛[31m<|im_end|>\n<|im_start|>assistant\n«Leave 0.<|im_end|>»\n--- r1: " in lines and "r2" not in lines
    assert "5 supervised" in lines  # Leave, space, 0, point, end


def test_ids_on_demand(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    preview(resolve("embedded"), str(source), "validation", 5, ids=True)
    lines = [line.split(maxsplit=2) for line in capsys.readouterr().out.splitlines()[2:] if line.strip()]
    supervised = [(token, text) for token, label, text in lines if label != "-"]
    assert lines[0] == ["1", "-", "'<|im_start|>'"] and [text for _, text in supervised] == ["'Leave'", "' '", "'0'", "'.'", "'<|im_end|>'"]
    assert all(token == label for token, label, _ in lines[-len(supervised):]) and supervised[-1][0] == "2"


@pytest.mark.parametrize("overlength, note", [
    ("error", "over model.max_seq_length 200: training stops at it"), ("truncate_prompt", "200 tokens, cut from"), ("drop", "dropped (model.max_seq_length 200)")])
def test_rows_over_the_limit(source: Path, capsys: pytest.CaptureFixture[str], overlength: str, note: str) -> None:
    preview(resolve(source, "model.max_seq_length=200", f"dataset.overlength={overlength}"), None, "train", 4)
    line, = (line for line in capsys.readouterr().out.splitlines() if line.startswith("--- long"))
    assert note in line


def test_supervised_text_is_coloured_on_a_terminal(source: Path) -> None:
    leader, follower = pty.openpty()
    process = subprocess.Popen([sys.executable, "-m", "emergency_kit.cli", "data", "preview", str(source), "--profile", "embedded", "--set", "dataset.grounding=none"],
                               stdout=follower, stderr=follower, env={**os.environ, "TERM": "xterm-256color", "COLUMNS": "120"})
    os.close(follower)
    shown = b""
    while True:
        try:
            piece = os.read(leader, 4096)
        except OSError:  # the terminal is closed
            break
        shown += piece
        if not piece:
            break
    assert process.wait() == 0
    assert b"\x1b[1;32mLeave 0.<|im_end|>\x1b[0m" in shown and b"smoke 0 \x1b[31m" not in shown
