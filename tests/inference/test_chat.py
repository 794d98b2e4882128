import io
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from emergency_kit.errors import DataError, ModelError, UsageError
from emergency_kit.inference.chat import infer
from tests.tiny import resolve


@pytest.fixture(autouse=True)
def one_llama_thread(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def start(checkpoint, *arguments):
    command = [sys.executable, "-m", "emergency_kit.cli", "infer", "--profile", "embedded", "--checkpoint", str(checkpoint),
               "--set", f"model.name={checkpoint}", "--set", "model.dtype=float32", *arguments]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0,
                            env=os.environ | {"OMP_NUM_THREADS": "1"})


def read_until(stream, wanted, seconds=60):
    """Bytes of a pipe until `wanted(bytes)`; a pipe that ends or stays silent fails the test."""
    os.set_blocking(stream.fileno(), False)
    seen, deadline = b"", time.monotonic() + seconds
    while not wanted(seen):
        assert time.monotonic() < deadline, seen
        piece = stream.read(65536)
        assert piece != b"", seen
        seen += piece or b""
        time.sleep(0.02)
    return seen


@pytest.mark.parametrize("prompt", ["", "  \n"])
def test_empty_prompt_is_a_usage_error(prompt, tmp_path):
    with pytest.raises(UsageError, match="--prompt: got"):
        infer(resolve(tmp_path), checkpoint=tmp_path / "none", prompt=prompt)


def test_missing_checkpoint_is_said_before_anything_is_loaded(tmp_path):
    with pytest.raises(ModelError, match="no such folder; next: make train"):
        infer(resolve(tmp_path, training__output_dir=tmp_path), prompt="fire")


def test_prompt_that_is_not_text(tmp_path):
    with pytest.raises(UsageError, match="not UTF-8"):
        infer(resolve(tmp_path), prompt="fire \udcff")


def test_json_is_one_object_and_nothing_else(folder):
    run = start(folder, "--json", "--max-new-tokens", "8", "--prompt", "the oil in my pan is on fire")
    out, err = run.communicate(timeout=60)
    assert run.returncode == 0, err
    answer = json.loads(out)
    assert list(answer) == ["answer", "valid", "problems", "cards", "unsure", "text", "ended", "guard"]
    assert list(answer["answer"]) == ["facts", "uncertainties", "analysis", "guidance"]
    assert answer["valid"] is False and answer["problems"] and answer["ended"] is False and answer["text"]
    assert answer["cards"][0] == "kitchen_grease_fire"
    assert answer["text"].startswith("FACTS\n• ") and answer["guard"]["cards"][0]["sources"] and answer["guard"]["added"]
    assert b"Cards: Kitchen grease fire" in err and b"cut off after 8 tokens" in err


def test_the_answer_in_process_is_the_answer_alone(folder, capsys):
    resolved = resolve(folder, inference__max_new_tokens=8, dataset__grounding="none", inference__guard=False, inference__grammar=False)
    infer(resolved, checkpoint=folder, prompt="the oil in my pan is on fire")
    shown = capsys.readouterr()
    infer(resolved, checkpoint=folder, prompt="the oil in my pan is on fire", as_json=True)
    answer = json.loads(capsys.readouterr().out)
    assert shown.out == answer["text"] + "\n"
    assert "Cards:" not in shown.err and answer["cards"] == []
    assert "does not have the four sections" in shown.err


def test_session_in_a_pipe_where_ctrl_c_stops_an_answer_and_not_the_program(gguf):
    run = start(gguf, "--max-new-tokens", "3000", "--no-guard")
    run.stdin.write(b"my house is on fire\n")
    first = read_until(run.stdout, lambda seen: len(seen) > 40)
    run.send_signal(signal.SIGINT)
    notes = read_until(run.stderr, lambda seen: b"Stopped" in seen)
    assert b"quit, exit or Ctrl-D leaves" in notes and b"cut off" not in notes
    run.stdin.write(b"\n   \na snake bit me\n")
    read_until(run.stdout, lambda seen: len(seen.partition(b"\n")[2]) > 40)
    run.send_signal(signal.SIGINT)
    read_until(run.stderr, lambda seen: b"Stopped" in seen)
    run.stdin.write(b"Quit\nnever answered\n")
    run.stdin.close()
    assert run.wait(timeout=60) == 0
    assert first


def test_ctrl_c_during_a_single_answer_exits_130(folder):
    run = start(folder, "--max-new-tokens", "4000", "--no-guard", "--prompt", "my house is on fire")
    read_until(run.stdout, lambda seen: len(seen) > 40)
    run.send_signal(signal.SIGINT)
    assert run.wait(timeout=60) == 130
    err = read_until(run.stderr, lambda seen: b"interrupted" in seen)
    assert b"error: interrupted; the answer is not whole\n" in err and b"Traceback" not in err


def test_session_ends_with_the_input(gguf):
    run = start(gguf, "--json", "--max-new-tokens", "4")
    out, err = run.communicate(b"my house is on fire\n\na snake bit me", timeout=60)
    assert run.returncode == 0, err
    assert [bool(json.loads(line)["text"]) for line in out.splitlines()] == [True, True]


def test_guarded_answer_of_a_gguf_file_with_the_call_for_help_first(gguf, capsys):
    infer(resolve(gguf, inference__country="GB"), checkpoint=gguf, prompt="the oil in my pan is on fire")
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[0] == "CALL FOR HELP: 999 or 112" and lines[2] == "CHECKED GUIDANCE: Kitchen grease fire (call 999 or 112)"
    assert "1. Turn off the heat if you can reach the control safely." in lines and "x  Do not pour water on burning oil." in lines
    assert any(line.startswith("Sources: NFPA") for line in lines)
    model = lines.index("FACTS")
    assert [line for line in lines[model:] if line in ("FACTS", "UNCERTAINTIES", "ANALYSIS", "GUIDANCE")] == ["FACTS", "UNCERTAINTIES", "ANALYSIS", "GUIDANCE"]
    assert any(line.startswith("ADDED FROM THE CARD") for line in lines) and "+ Leave the pan covered until it is completely cool." in lines
    assert max(map(len, lines)) <= 110 and "\x1b" not in out
    assert "llama.cpp" in err and "does not have the four sections" not in err and "cut off" not in err


def test_session_commands(gguf, capsys, monkeypatch):
    """Region, why, add, card, a number as a choice, JSON and what is not known, in one piped session."""
    lines = ["/why", "the oil in my pan is on fire", "/region gb", "/why", "/add and the curtains burn too", "/card stroke", "/json", "/card Snake bite", "/nonsense", "quit"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines) + "\n"))
    infer(resolve(gguf, inference__max_new_tokens=30), checkpoint=gguf)
    out, err = capsys.readouterr()
    assert "/why: describe a situation first" in err and "Emergency number: 999 or 112 (United Kingdom)" in err
    answers = out.split("CALL FOR HELP: ")[1:]
    assert answers[0].startswith("your local emergency number") and answers[1].startswith("999")
    assert "Card Kitchen grease fire (kitchen_grease_fire): found by" in answers[0] and "Model: llama.cpp" in answers[0]
    assert "CHECKED GUIDANCE: Stroke" in answers[2]
    answer = json.loads(out.splitlines()[-1])
    assert answer["cards"] == ["snake_bite"] and answer["guard"]["country"] == "GB"
    assert "Answers are JSON from now on" in err and "/nonsense: not known here" in err


def test_unknown_country_in_a_session_names_those_that_are_known(gguf, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("/region XX\n"))
    with pytest.raises(DataError, match="country 'XX': not in the list"):
        infer(resolve(gguf, inference__max_new_tokens=30), checkpoint=gguf)
