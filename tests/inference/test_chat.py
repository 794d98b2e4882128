import json
import os
import signal
import subprocess
import sys
import time

import pytest

from emergency_kit.errors import ModelError, UsageError
from emergency_kit.inference.chat import infer
from tests.tiny import resolve, save_tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


def start(folder, *arguments):
    command = [sys.executable, "-m", "emergency_kit.cli", "infer", "--profile", "embedded", "--checkpoint", str(folder),
               "--set", f"model.name={folder}", "--set", "model.dtype=float32", *arguments]
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
    assert list(answer) == ["answer", "valid", "problems", "cards", "unsure", "text", "ended"]
    assert list(answer["answer"]) == ["facts", "uncertainties", "analysis", "guidance"]
    assert answer["valid"] is False and answer["problems"] and answer["ended"] is False and answer["text"]
    assert answer["cards"][0] == "kitchen_grease_fire"
    assert b"Cards: Kitchen grease fire" in err and b"cut off after 8 tokens" in err


def test_the_answer_in_process_is_the_answer_alone(folder, capsys):
    resolved = resolve(folder, inference__max_new_tokens=8, dataset__grounding="none")
    infer(resolved, checkpoint=folder, prompt="the oil in my pan is on fire")
    shown = capsys.readouterr()
    infer(resolved, checkpoint=folder, prompt="the oil in my pan is on fire", as_json=True)
    answer = json.loads(capsys.readouterr().out)
    assert shown.out == answer["text"] + "\n"
    assert "Cards:" not in shown.err and answer["cards"] == []
    assert "does not have the four sections" in shown.err


def test_session_in_a_pipe_where_ctrl_c_stops_an_answer_and_not_the_program(folder):
    run = start(folder, "--max-new-tokens", "4000")
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
    run = start(folder, "--max-new-tokens", "4000", "--prompt", "my house is on fire")
    read_until(run.stdout, lambda seen: len(seen) > 40)
    run.send_signal(signal.SIGINT)
    assert run.wait(timeout=60) == 130
    err = read_until(run.stderr, lambda seen: b"interrupted" in seen)
    assert b"error: interrupted; the answer is not whole\n" in err and b"Traceback" not in err


def test_session_ends_with_the_input(folder):
    run = start(folder, "--json", "--max-new-tokens", "4")
    out, err = run.communicate(b"my house is on fire\n\na snake bit me", timeout=60)
    assert run.returncode == 0, err
    assert [bool(json.loads(line)["text"]) for line in out.splitlines()] == [True, True]
