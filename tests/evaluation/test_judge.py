import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emergency_kit.config import load_config
from emergency_kit.data.format import Answer, Record, render_answer
from emergency_kit.errors import UsageError
from emergency_kit.evaluation import wire
from emergency_kit.evaluation.judge import CRITERIA, judge, read_scores
from emergency_kit.evaluation.metrics import score
from emergency_kit.inference.engine import Generated
from emergency_kit.knowledge.cards import load_cards
from tests.evaluation.server import SCORES, question_of, serve, wrap

KEYS = {"anthropic": ("ANTHROPIC_API_KEY", "x-api-key", "/v1/messages", ""), "openai": ("OPENAI_API_KEY", "authorization", "/v1/chat/completions", "/v1"),
        "gemini": ("GEMINI_API_KEY", "x-goog-api-key", "/v1beta/models/tester:generateContent", ""),
        "openai-compatible": ("OPENAI_COMPATIBLE_API_KEY", "authorization", "/chat/completions", "")}
SECRET = "sk-very-secret-1234567890"


@pytest.fixture(autouse=True)
def clean(monkeypatch, tmp_path):
    for name, *_ in KEYS.values():
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(wire, "FIRST_WAIT_SECONDS", 0.01)


@pytest.fixture
def server():
    with serve() as asked:
        yield asked


def answers(number=3, text="GUIDANCE\n1. Turn off the heat."):
    card = load_cards()["kitchen_grease_fire"]
    good = render_answer(Answer(("a",), ("b",), ("c",), tuple(action.text for action in card.critical_actions)))
    return [score(Record(id=f"r{index}", input=f"the pan burns {index}", output=good, hazards=(card.id,)), Generated(f"{text} {index}", 5, True), load_cards()) for index in range(number)]


def resolved(server, tmp_path, provider="openai-compatible", **more):
    values = {"provider": provider, "model": "tester", "base_url": server.url + KEYS[provider][3], "timeout_seconds": 1.0, "retries": 2, "repeat_samples": 0, "concurrency": 1} | more
    return load_config("embedded", settings=[f"training.output_dir={tmp_path}", *(f"judge.{name}={value}" for name, value in values.items())])


@pytest.mark.parametrize("provider", KEYS)
def test_each_providers_wire_format(server, tmp_path, monkeypatch, provider, capsys):
    variable, header, path, _ = KEYS[provider]
    monkeypatch.setenv(variable, SECRET)
    server.answer = lambda number, body: wrap(provider.removesuffix("-compatible"), SCORES)
    found = judge(resolved(server, tmp_path, provider), answers())
    assert found["judged"] == found["asked"] == 3 and found["failed"] == [] and found["stopped"] is None
    assert {name: found["scores"][name] for name in CRITERIA} == SCORES and found["scores"]["overall"] == 80
    got_path, headers, body = server.requests[0]
    assert got_path == path and headers[header].removeprefix("Bearer ") == SECRET
    assert "the pan burns 0" in question_of(body) and "Turn off the heat. 0" in question_of(body) and "Never: " in question_of(body)
    assert "tester" in (body.get("model") or got_path)
    assert SECRET not in capsys.readouterr().out + json.dumps(found)


def test_replies_are_kept_and_paid_once(server, tmp_path):
    settings = resolved(server, tmp_path)
    first = judge(settings, answers())
    assert len(server.requests) == 3
    assert judge(settings, answers())["results"] == first["results"] and len(server.requests) == 3
    judge(settings, answers(text="GUIDANCE\n1. Leave."))
    assert len(server.requests) == 6, "other answers are other questions"


def test_busy_servers_are_asked_again(server, tmp_path):
    replies = [(429, {"Retry-After": "0"}, b"slow down"), (500, {}, b"oops"), wrap("openai", SCORES)]
    server.answer = lambda number, body: replies[number - 1]
    found = judge(resolved(server, tmp_path), answers(1))
    assert found["judged"] == 1 and len(server.requests) == 3


def test_a_server_that_stays_busy_fails_that_answer_alone(server, tmp_path):
    server.answer = lambda number, body: (529, {}, b"overloaded") if "burns 1" in question_of(body) else wrap("openai", SCORES)
    found = judge(resolved(server, tmp_path), answers())
    assert found["judged"] == 2 and [item["id"] for item in found["failed"]] == ["r1"] and "after 3 tries" in found["failed"][0]["error"]


def test_a_refused_key_stops_at_once_keeps_what_there_is_and_is_not_shown(server, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OPENAI_COMPATIBLE_API_KEY", SECRET)
    server.answer = lambda number, body: wrap("openai", SCORES) if number == 1 else (401, {}, f"bad key {SECRET}".encode())
    found = judge(resolved(server, tmp_path), answers(5))
    assert found["judged"] == 1 and len(server.requests) == 2 and "the key was refused" in found["stopped"]
    assert SECRET not in json.dumps(found) + capsys.readouterr().out
    server.answer = lambda number, body: wrap("openai", SCORES)
    assert judge(resolved(server, tmp_path), answers(5))["judged"] == 5 and len(server.requests) == 6, "only the four missing ones were asked"


def test_silence_and_lost_connections_end(server, tmp_path):
    server.answer = lambda number, body: None
    found = judge(resolved(server, tmp_path, timeout_seconds=0.2, retries=1), answers(1))
    assert found["judged"] == 0 and "no reply within" in found["failed"][0]["error"]
    dead = load_config("embedded", settings=[f"training.output_dir={tmp_path}", "judge.provider=openai-compatible", "judge.base_url=http://127.0.0.1:9", "judge.retries=0"])
    assert "cannot be reached" in judge(dead, answers(1))["failed"][0]["error"]


@pytest.mark.parametrize("content", [
    b"", b"not json", b"[]", b"null", b'{"choices": []}', b'{"choices": [{"message": {"content": null}}]}', b'{"choices": [{"message": {"content": 3}}]}',
    b'{"choices": "x"}', b"\xff\xfe\x00", b"[" * 100_000, b"{" * 2000, b'{"choices": [{"message": {"content": "{}"}}], "usage": {"prompt_tokens": -5}}',
    b'{"choices": [{"message": {"content": "{}"}}], "usage": {"prompt_tokens": "many"}}', b'{"choices": [{"message": {"content": "{}"}}], "usage": 7}',
    b"x" * 5_000_000])
def test_malformed_and_hostile_replies_are_failures_of_one_answer(server, tmp_path, content):
    server.answer = lambda number, body: (200, {}, content)
    found = judge(resolved(server, tmp_path, retries=0), answers(1))
    assert found["judged"] == 0 and len(found["failed"]) == 1 and found["scores"]["overall"] is None


@pytest.mark.parametrize("headers", [{"Content-Encoding": "gzip"}, {"Location": "http://127.0.0.1:1/"}, {"Retry-After": "nonsense"}, {"Retry-After": "inf"}])
def test_hostile_headers(server, tmp_path, headers):
    server.answer = lambda number, body: (503 if "Retry-After" in headers else 302 if "Location" in headers else 200, headers, b"not packed")
    if headers.get("Retry-After") == "inf":
        server.answer = lambda number, body: (404, headers, b"")
    assert judge(resolved(server, tmp_path, retries=1), answers(1))["judged"] == 0


@pytest.mark.parametrize("text", [
    '{"completeness": 80}', json.dumps(SCORES | {"accuracy": 101}), json.dumps(SCORES | {"accuracy": -1}), json.dumps(SCORES | {"accuracy": "90"}),
    json.dumps(SCORES | {"accuracy": True}), json.dumps(SCORES | {"accuracy": 90.5}), json.dumps(SCORES | {"accuracy": None}), "The answer is excellent: 100/100", "[]", "}{",
    '{"completeness": NaN, "accuracy": 1, "actionability": 1, "structure": 1, "appropriateness": 1}'])
def test_scores_that_are_none_are_not_believed(text):
    with pytest.raises(ValueError):
        read_scores(text)


@given(st.fixed_dictionaries({name: st.integers(0, 100) for name in CRITERIA}), st.sampled_from(["{}", "```json\n{}\n```", "Here: {} Done."]))
def test_scores_are_read_with_or_without_a_fence(scores, frame):
    assert read_scores(frame.replace("{}", json.dumps(scores))) == scores


def test_one_unreadable_reply_is_asked_for_once_more(server, tmp_path):
    server.answer = lambda number, body: wrap("openai", "I think it is good." if number == 1 else SCORES)
    assert judge(resolved(server, tmp_path), answers(1))["judged"] == 1 and len(server.requests) == 2


def test_agreement_with_itself_and_over_positions(server, tmp_path):
    server.answer = lambda number, body: wrap("openai", {"better": 1} if "Which answer is better" in question_of(body) else SCORES)
    found = judge(resolved(server, tmp_path, repeat_samples=2), answers())
    assert len(server.requests) == 3 + 2 * 3
    assert found["agreement"]["repeat_kappa"] == 1 and found["agreement"]["repeat_mean_difference"] == 0
    assert found["agreement"]["position_consistent"] == 0, "a judge that always names the first is caught"
    fair = lambda number, body: wrap("openai", {"better": 1 if question_of(body).index("Turn off the heat. ") < question_of(body).index("ANSWER 2") else 2})
    server.answer = lambda number, body: fair(number, body) if "Which answer is better" in question_of(body) else wrap("openai", SCORES)
    found = judge(resolved(server, tmp_path / "other", repeat_samples=2), answers())
    assert found["agreement"]["position_consistent"] == 1 and found["agreement"]["preferred_to_reference"] == 1


@pytest.fixture
def far(server, monkeypatch):
    """The local server counted as one that costs money."""
    from emergency_kit.evaluation.providers import Service

    made = Service.__init__
    monkeypatch.setattr(Service, "__init__", lambda self, settings: (made(self, settings), setattr(self, "local", False))[0])
    return server


def test_the_estimate_is_asked_and_a_no_sends_nothing(far, tmp_path, capsys):
    questions = []
    found = judge(resolved(far, tmp_path), answers(), confirm=lambda question: questions.append(question) or False)
    assert len(questions) == 1 and "USD" in questions[0] and far.requests == [] and found["stopped"] == "not confirmed"
    assert judge(resolved(far, tmp_path), answers(), confirm=lambda _: True)["judged"] == 3
    assert judge(resolved(far, tmp_path), answers(), confirm=lambda _: pytest.fail("nothing is left to pay"))["judged"] == 3


def test_the_budget_is_never_passed(far, tmp_path):
    far.answer = lambda number, body: wrap("openai", SCORES, read=400, written=100)
    prices = {"input_usd": 1000.0, "output_usd": 1000.0}
    found = judge(resolved(far, tmp_path, budget_usd=2.0, concurrency=4, **prices), answers(20), yes=True)
    assert 0 < found["judged"] < 20 and found["cost_usd"] <= 2.0 and "budget" in found["stopped"]
    before = len(far.requests)
    assert judge(resolved(far, tmp_path / "b", budget_usd=0.0, **prices), answers(), yes=True)["judged"] == 0 and len(far.requests) == before


def test_what_is_missing_is_said_first(server, tmp_path, monkeypatch):
    with pytest.raises(UsageError, match="ANTHROPIC_API_KEY is not set"):
        judge(resolved(server, tmp_path, "anthropic"), answers())
    with pytest.raises(UsageError, match="needs its address"):
        judge(load_config("embedded", settings=["judge.provider=openai-compatible"]), answers())
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    monkeypatch.setattr("sys.stdin", open("/dev/null"))
    with pytest.raises(UsageError, match="add --yes"):
        judge(load_config("embedded", settings=["judge.provider=openai"]), answers())


def test_keys_come_from_the_environment_or_dot_env(tmp_path, monkeypatch):
    assert wire.read_key("OPENAI_API_KEY", tmp_path) is None
    (tmp_path / ".env").write_text('# keys\nexport OTHER=1\nOPENAI_API_KEY="from file"\n')
    assert wire.read_key("OPENAI_API_KEY", tmp_path) == "from file"
    monkeypatch.setenv("OPENAI_API_KEY", "from environment")
    assert wire.read_key("OPENAI_API_KEY", tmp_path) == "from environment"
    (tmp_path / ".env").write_bytes(b"\xff\xfe")
    assert wire.read_key("OTHER", tmp_path) is None
