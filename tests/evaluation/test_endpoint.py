import json

import pytest

from emergency_kit.errors import ModelError, UsageError
from emergency_kit.evaluation import wire
from emergency_kit.evaluation.contestant import open_contestant
from tests.evaluation.server import serve, wrap
from tests.tiny import BUNDLED, resolve

PROMPTS = [[{"role": "system", "content": "s"}, {"role": "user", "content": f"question {number}"}] for number in range(5)]


@pytest.fixture
def server():
    with serve() as asked:
        yield asked


def opened(server, tmp_path, path="/v1#mine"):
    return open_contestant(resolve(BUNDLED, training__output_dir=tmp_path, evaluation__batch_size=3), server.url + path)


def test_an_endpoint_answers_and_its_answers_are_kept(server, tmp_path):
    server.answer = lambda number, body: wrap("openai", "echo of " + body["messages"][-1]["content"], written=7)
    done = []
    found = opened(server, tmp_path).answer(PROMPTS, 50, lambda answers, tokens: done.append(answers))
    assert [answer.text for answer in found] == [f"echo of question {number}" for number in range(5)] and done[-1] == 5
    assert all(answer.tokens == 7 and answer.ended for answer in found)
    path, _, body = server.requests[0]
    assert path == "/v1/chat/completions" and body["model"] == "mine" and body["temperature"] == 0 and body["max_tokens"] == 50
    again = opened(server, tmp_path)
    assert again.answer(PROMPTS, 50, lambda *_: None) == found and len(server.requests) == 5 and again.kept == 5
    opened(server, tmp_path, "/v1#other").answer(PROMPTS, 50, lambda *_: None)
    assert len(server.requests) == 10


def test_an_answer_cut_off_is_seen(server, tmp_path):
    reply = json.dumps({"choices": [{"message": {"content": "half"}, "finish_reason": "length"}]}).encode()
    server.answer = lambda number, body: (200, {}, reply)
    assert opened(server, tmp_path).answer(PROMPTS[:1], 5, lambda *_: None)[0].ended is False


def test_what_is_no_endpoint_is_said_and_what_was_answered_stays(server, tmp_path, monkeypatch):
    monkeypatch.setattr(wire, "FIRST_WAIT_SECONDS", 0.01)
    server.answer = lambda number, body: wrap("openai", "fine") if number <= 3 else (404, {}, b"no such page")
    with pytest.raises(ModelError, match="HTTP 404"):
        opened(server, tmp_path).answer(PROMPTS, 50, lambda *_: None)
    server.answer = lambda number, body: wrap("openai", "fine")
    again = opened(server, tmp_path)
    again.answer(PROMPTS, 50, lambda *_: None)
    assert again.kept == 3
    server.answer = lambda number, body: (200, {}, b'{"hello": 1}')
    with pytest.raises(ModelError, match="not a chat completion"):
        opened(server, tmp_path, "/v1#third").answer(PROMPTS, 50, lambda *_: None)


@pytest.mark.parametrize("spec, message", [("nowhere/at/all", "no such folder"), ("missing.gguf", "no such file")])
def test_what_is_not_there_is_said(tmp_path, spec, message):
    with pytest.raises(ModelError, match=message):
        open_contestant(resolve(BUNDLED, training__output_dir=tmp_path), spec)


def test_a_folder_that_was_changed_is_refused(tmp_path):
    from emergency_kit.artifacts import save_manifest
    from tests.tiny import save_tiny_model

    folder = save_tiny_model(tmp_path / "model")
    resolved = resolve(folder, training__output_dir=tmp_path)
    save_manifest(folder, "merge", resolved)
    assert open_contestant(resolved, str(folder)).kind == "merged"
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-1] + b"\x01")
    with pytest.raises(ModelError, match="changed after it was made"):
        open_contestant(resolved, str(folder))


def test_an_unknown_endpoint_of_the_config_is_a_usage_error(tmp_path):
    from emergency_kit.evaluation.run import evaluate

    with pytest.raises(UsageError, match="primary_endpoints: got 'beauty'"):
        evaluate(resolve(BUNDLED, training__output_dir=tmp_path, evaluation__primary_endpoints="[beauty]"))
