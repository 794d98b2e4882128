"""`emergency-kit serve` over real HTTP with a tiny model: contracts, bounds, fairness, cancelling, hostile input."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings

from emergency_kit.data.format import parse_answer, parse_json_answer
from emergency_kit.errors import ModelError, UsageError
from emergency_kit.inference.gate import Rates
from emergency_kit.inference.server import serve
from tests.inference.fuzz import fuzz
from tests.inference.serving import OIL, is_idle, serving, wait_for
from tests.tiny import resolve, save_tiny_model

LONG = {"inference__max_new_tokens": 8000}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def address(folder):
    with serving(folder, inference__max_new_tokens=8, serve__requests_per_minute=100000, serve__slots=2) as address:
        yield address


@pytest.fixture(scope="module")
def client(address):
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
        yield client


def events(response):
    """`[(name, data)]` of a text/event-stream."""
    blocks = [block.split("\n") for block in response.text.split("\n\n") if block and not block.startswith(":")]
    return [(block[0].removeprefix("event: "), json.loads(block[-1].removeprefix("data: "))) for block in blocks]


def test_json_is_the_twin_of_the_same_sections_whole_and_streamed(folder):
    with serving(folder) as address, openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
        asked = dict(model="any", messages=[{"role": "user", "content": OIL}])
        text = client.chat.completions.create(**asked).choices[0].message.content
        twin = client.chat.completions.create(**asked, response_format={"type": "json_object"}).choices[0].message.content
        streamed = "".join(chunk.choices[0].delta.content or "" for chunk in client.chat.completions.create(**asked, response_format={"type": "json_object"}, stream=True))
        assert parse_json_answer(twin).valid and twin == streamed and json.loads(twin) == parse_answer(text).answer.to_dict()
        whole = httpx.post(f"{address}/answer", json={"situation": OIL}).json()
        assert whole["text"] == text and whole["sections"] == json.loads(twin)


def test_the_real_openai_client_completes_and_streams_the_same(client):
    model = client.models.list().data[0].id
    asked = dict(model=model, messages=[{"role": "system", "content": "Be short."}, {"role": "user", "content": [{"type": "text", "text": OIL}]}], max_tokens=6)
    whole = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content and len(text) > 5
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason == "length"
    assert whole.usage == chunks[-1].usage and whole.usage.completion_tokens == 6
    assert whole.model == model and whole.model_extra["emergency_kit"]["cards"][0]["id"] == "kitchen_grease_fire"
    assert chunks[-2].model_extra["emergency_kit"]["text"] == text


def test_stop_seed_and_temperature_reach_the_model(client):
    def say(**options):
        return client.chat.completions.create(model="any", messages=[{"role": "user", "content": OIL}], max_tokens=8, **options).choices[0]

    assert say(temperature=1, seed=3) == say(temperature=1, seed=3) != say(temperature=1, seed=4)
    text = say().message.content
    stopped = say(stop=[text[9:12]])
    assert stopped.message.content == text[:text.index(text[9:12])] and stopped.finish_reason == "stop"


def test_the_openai_client_reads_our_errors(client):
    with pytest.raises(openai.BadRequestError, match="messages"):
        client.chat.completions.create(model="", messages=[])
    with pytest.raises(openai.BadRequestError, match="n: Input should be less than or equal to 1"):
        client.chat.completions.create(model="", messages=[{"role": "user", "content": OIL}], n=2)
    with pytest.raises(openai.BadRequestError, match="tools"):
        client.chat.completions.create(model="", messages=[{"role": "user", "content": OIL}], tools=[{"type": "function"}])


def test_answer_gives_sections_cards_checks_and_provenance(address):
    answer = httpx.post(f"{address}/answer", json={"situation": OIL, "country": "gb"}).json()
    card = answer["cards"][0]
    assert card["id"] == "kitchen_grease_fire" and any("999 or 112" in action["text"] for action in card["critical_actions"])
    assert answer["emergency"]["service"] == "fire" and answer["emergency"]["country"]["fire"] == ["999", "112"]
    assert card["sources"] and answer["emergency"]["country"]["sources"]
    assert set(answer["sections"]) == {"facts", "uncertainties", "analysis", "guidance"}
    assert answer["checks"]["ended"] is False and answer["checks"]["guard"] is True
    assert [step["card_id"] for step in answer["added"]] == ["kitchen_grease_fire"] * len(card["critical_actions"]), "the tiny model gives none of them"
    assert answer["provenance"]["completion_tokens"] == 8 and len(answer["provenance"]["cards_sha256"]) == 64


def test_answer_streams_cards_before_lines_and_ends_with_the_whole(address):
    asked = {"situation": OIL, "country": "GB"}
    response = httpx.post(f"{address}/answer", json=asked | {"stream": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    names = [name for name, _ in events(response)]
    assert names[0] == "cards" and names[-1] == "done" and set(names[1:-1]) <= {"line", "waiting"}
    whole = httpx.post(f"{address}/answer", json=asked).json()
    done = events(response)[-1][1]
    own = ("id", "created", "provenance")
    assert {key: value for key, value in done.items() if key not in own} == {key: value for key, value in whole.items() if key not in own}
    assert [line["text"] for name, line in events(response) if name == "line"] == [line["text"] for line in done["lines"]]


def test_a_chosen_card_is_answered_from_and_safe_minimum_means_none(address):
    for chosen, fits in (("snake_bite", 1), ("safe_minimum", 0)):
        answer = httpx.post(f"{address}/answer", json={"situation": OIL, "cards": [chosen]}).json()
        assert (answer["cards"][0]["id"], answer["fits"], answer["unsure"]) == (chosen, fits, False)


def test_an_unsure_retrieval_offers_cards_to_choose_from(address):
    found = httpx.post(f"{address}/answer", json={"situation": "something smells odd and I feel a bit dizzy"}).json()
    if found["unsure"]:
        assert 1 < len(found["choices"]) <= 4
    assert isinstance(found["unsure"], bool)


@pytest.mark.parametrize("body, message", [
    ({}, "situation: Field required"), ({"situation": "  "}, "expected some text"), ({"situation": "x" * 4001}, "at most 4000 characters"),
    ({"situation": OIL, "country": "XQ"}, "'XQ': not in the list"), ({"situation": OIL, "country": "GBR"}, "'GBR': not in the list"),
    ({"situation": OIL, "cards": ["no_such_card"]}, "got 'no_such_card'"), ({"situation": OIL, "cards": ["snake_bite", "stroke", "burn"]}, "cards: got"),
    ({"situation": OIL, "max_tokens": 0}, "greater than or equal to 1"), ({"situation": 7}, "valid string"), ([], "body: Input should be"), ("\ud800", "body")])
def test_each_wrong_body_is_one_clear_400(address, body, message):
    response = httpx.post(f"{address}/answer", content=json.dumps(body), headers={"content-type": "application/json"})
    assert response.status_code == 400 and message in response.json()["error"]["message"]
    assert "Traceback" not in response.text


def test_bounds_of_size_and_rate_and_of_a_slow_body(folder):
    with serving(folder, inference__max_new_tokens=1, serve__requests_per_minute=4, serve__max_body_bytes=2048) as address:
        large = httpx.post(f"{address}/answer", content=b"{" + b" " * 3000 + b"}", headers={"content-type": "application/json"})
        assert large.status_code == 413 and "over 2048 bytes" in large.json()["error"]["message"]
        statuses = [httpx.post(f"{address}/answer", json={"situation": OIL}).status_code for _ in range(5)]
        assert statuses == [200] * 3 + [429] * 2
        refused = httpx.post(f"{address}/answer", json={"situation": OIL})
        assert 1 <= int(refused.headers["retry-after"]) <= 15
        assert httpx.get(f"{address}/health").status_code == 200


def test_rates_fill_again_and_remember_a_bounded_number_of_addresses():
    now = [0.0]
    rates = Rates(60, clock=lambda: now[0])
    assert [rates.take("a") for _ in range(61)] == [0] * 60 + [1]
    now[0] = 1.0
    assert (rates.take("a"), rates.take("a"), rates.take("b")) == (0, 1, 0)
    for number in range(10000):
        rates.take(str(number))
    assert len(rates._buckets) == 4096


@pytest.mark.parametrize("headers, status", [
    ({"host": "evil.example"}, 403), ({"host": "localhost.evil.example"}, 403), ({"host": ""}, 403), ({"host": "127.0.0.1.evil.example:80"}, 403),
    ({"host": "localhost:1"}, 200), ({"host": "[::1]:80"}, 200), ({"host": "192.0.2.7"}, 200), ({"origin": "null"}, 403), ({"origin": "http://evil.example"}, 403)])
def test_foreign_names_and_pages_are_refused(address, headers, status):
    assert httpx.get(f"{address}/cards", headers=headers).status_code == status


def test_an_allowed_origin_may_ask_and_a_foreign_one_sees_nothing(folder):
    with serving(folder, inference__max_new_tokens=1, serve__origins='["https://kit.example"]', serve__hosts='["kit.example"]') as address:
        asked = {"access-control-request-method": "POST", "access-control-request-headers": "content-type"}
        preflight = httpx.options(f"{address}/answer", headers={"origin": "https://kit.example", **asked})
        assert preflight.status_code == 204 and preflight.headers["access-control-allow-origin"] == "https://kit.example"
        done = httpx.post(f"{address}/answer", json={"situation": OIL}, headers={"origin": "https://kit.example", "host": "kit.example"})
        assert done.status_code == 200 and done.headers["access-control-allow-origin"] == "https://kit.example"
        foreign = httpx.options(f"{address}/answer", headers={"origin": "https://evil.example", **asked})
        assert foreign.status_code == 403 and "access-control-allow-origin" not in foreign.headers


def test_a_token_guards_all_but_health_document_and_page(folder):
    with serving(folder, token="correct-horse", inference__max_new_tokens=1) as address:
        for path, open_to_all in {"/": True, "/page.js": True, "/health": True, "/openapi.json": True, "/cards": False, "/metrics": False, "/v1/models": False}.items():
            assert httpx.get(address + path).status_code == (200 if open_to_all else 401), path
        for given in ("Bearer wrong", "Bearer", "Basic correct-horse", "Bearer correct-hors\u00e9"):
            assert httpx.post(f"{address}/answer", json={"situation": OIL}, headers={"authorization": given.encode("latin-1")}).status_code == 401
        assert httpx.post(f"{address}/answer", json={"situation": OIL}, headers={"authorization": "Bearer correct-horse"}).status_code == 200
        with pytest.raises(openai.AuthenticationError, match="needs a token"):
            openai.OpenAI(base_url=f"{address}/v1", api_key="wrong", max_retries=0).models.list()


def test_eight_clients_at_once_get_what_they_get_alone(address):
    def ask(number):
        return httpx.post(f"{address}/answer", json={"situation": f"{OIL}, said caller {number}", "user": str(number)}, timeout=60)

    alone = [ask(number).json()["text"] for number in range(8)]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(ask, range(8)))
    assert [response.status_code for response in together] == [200] * 8
    assert [response.json()["text"] for response in together] == alone
    assert is_idle(address)


@pytest.fixture
def paced(monkeypatch):
    """The tiny model at fifty tokens a second: an answer lasts longer than what a test does meanwhile."""
    from emergency_kit.inference.engine import Engine

    step = Engine._step
    monkeypatch.setattr(Engine, "_step", lambda *arguments, **more: (time.sleep(0.02), step(*arguments, **more))[1])


def test_whoever_goes_away_frees_the_slot_while_running_and_while_waiting(folder, paced):
    with serving(folder, **LONG, serve__slots=1) as address:
        body = {"situation": OIL, "stream": True}
        with httpx.stream("POST", f"{address}/answer", json=body, timeout=30) as first:
            begun = first.iter_bytes()  # kept: a forgotten iterator closes the connection
            next(begun)
            wait_for(lambda: httpx.get(f"{address}/health").json()["running"] == 1)
            with httpx.stream("POST", f"{address}/v1/chat/completions", json={"messages": [{"role": "user", "content": OIL}], "stream": True}, timeout=30):
                wait_for(lambda: httpx.get(f"{address}/health").json()["waiting"] == 1)
            wait_for(lambda: httpx.get(f"{address}/health").json()["waiting"] == 0)
        wait_for(lambda: is_idle(address))
        host, port = address.removeprefix("http://").split(":")
        sent = json.dumps({"situation": OIL}).encode()
        with socket.create_connection((host, int(port))) as line:  # not streamed: nothing is sent before the end, and still the going is noticed
            line.sendall(b"POST /answer HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%s" % (len(sent), sent))
            wait_for(lambda: httpx.get(f"{address}/health").json()["running"] == 1)
        wait_for(lambda: is_idle(address))
        assert "emergency_kit_cancelled_total 2.0" in httpx.get(f"{address}/metrics").text


def test_a_full_queue_says_try_again_and_waiting_clients_hear_their_place(folder, paced):
    with serving(folder, **LONG, serve__slots=1, serve__queue=2) as address:
        body = {"situation": OIL, "stream": True}
        with httpx.stream("POST", f"{address}/answer", json=body, timeout=30) as first:
            begun = first.iter_bytes()  # kept: a forgotten iterator closes the connection
            next(begun)
            wait_for(lambda: httpx.get(f"{address}/health").json()["running"] == 1)
            with httpx.stream("POST", f"{address}/answer", json=body, timeout=30) as second:
                read = iter(second.iter_bytes())
                seen = next(read)
                wait_for(lambda: httpx.get(f"{address}/health").json()["waiting"] == 1)
                full = httpx.post(f"{address}/answer", json=body)
                assert full.status_code == 503 and full.headers["retry-after"] == "2"
                while b"event: waiting" not in seen:
                    seen += next(read)
                assert b'"waiting":1' in seen and seen.startswith(b"event: cards")


def test_a_prompt_over_the_context_is_a_400_before_any_stream(tmp_path):
    folder = save_tiny_model(tmp_path, context_tokens=200)
    with serving(folder) as address:
        for path, body in {"/answer": {"situation": OIL}, "/v1/chat/completions": {"messages": [{"role": "user", "content": OIL}]}}.items():
            response = httpx.post(address + path, json=body | {"stream": True})
            assert response.status_code == 400 and response.json()["error"]["code"] == "context_length_exceeded"


def test_an_error_in_the_model_is_a_500_without_a_traceback_and_the_server_goes_on(address, monkeypatch):
    import torch

    from emergency_kit.inference.engine import Engine

    monkeypatch.setattr(Engine, "_step", lambda *_: torch.zeros(1) @ torch.zeros(2))
    response = httpx.post(f"{address}/answer", json={"situation": OIL})
    assert response.status_code == 500 and response.json()["error"]["code"] == "failed" and "Traceback" not in response.text
    streamed = httpx.post(f"{address}/answer", json={"situation": OIL, "stream": True})
    assert events(streamed)[-1][0] == "error"
    monkeypatch.undo()
    assert httpx.post(f"{address}/answer", json={"situation": OIL}).status_code == 200


def test_connections_that_never_ask_are_closed(folder, monkeypatch):
    monkeypatch.setattr("emergency_kit.inference.server.HEAD_SECONDS", 0.3)
    with serving(folder) as address:
        port = int(address.rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port), timeout=10) as silent, socket.create_connection(("127.0.0.1", port), timeout=10) as dribbling:
            dribbling.sendall(b"GET /health HTTP/1.1\r\nHost: loc")
            assert silent.recv(1) == dribbling.recv(1) == b""


def test_metrics_count_without_words_of_anybody(address):
    httpx.post(f"{address}/answer", json={"situation": "a very secret fire"})
    httpx.get(f"{address}/no/such/secret")
    text = httpx.get(f"{address}/metrics").text
    assert 'emergency_kit_requests_total{method="GET",route="other",status="404"}' in text and "secret" not in text
    assert "process_resident_memory_bytes" in text and "emergency_kit_first_token_seconds_bucket" in text


def test_the_document_describes_every_route_and_no_page(address):
    document = httpx.get(f"{address}/openapi.json").json()
    assert set(document["paths"]) == {"/answer", "/v1/chat/completions", "/v1/models", "/cards", "/health", "/metrics"}
    assert document["openapi"].startswith("3.1")


def test_schemathesis_finds_nothing(address):
    schema = schemathesis.openapi.from_url(f"{address}/openapi.json")
    for operation in schema.get_all_operations():
        @settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
        @given(case=operation.ok().as_strategy())
        def check(case):
            case.call_and_validate(timeout=60)

        check()


def test_fuzzed_requests_never_fail_the_server(address):
    counts = fuzz(address, 400, random.Random(5), workers=4)
    assert counts["500"] == counts["no answer"] == 0, counts
    assert sum(counts.values()) == 400 and counts["200"] > 10 and counts["400"] > 50
    assert is_idle(address)


@pytest.mark.parametrize("host, message", [("0.0.0.0", "which others can reach, without a token"), ("::", "without a token"), ("no.such.host.invalid", "no address of this machine")])
def test_a_public_address_without_a_token_is_refused_before_anything_is_loaded(tmp_path, host, message):
    with pytest.raises(UsageError, match=message):
        serve(resolve(tmp_path, serve__host=f"'{host}'"), checkpoint=tmp_path / "none")


def test_refusals_before_loading(tmp_path):
    with pytest.raises(ModelError, match="no such folder"):
        serve(resolve(tmp_path), checkpoint=tmp_path / "none")
    with pytest.raises(UsageError, match="--token: expected 8 to 256"):
        serve(resolve(tmp_path), checkpoint=tmp_path / "none", token="kurz")


def test_the_command_serves_until_ctrl_c_and_names_a_port_in_use(folder):
    arguments = [sys.executable, "-m", "emergency_kit.cli", "serve", "--profile", "embedded", "--checkpoint", str(folder), "--set", f"model.name={folder}",
                 "--set", "model.dtype=float32"]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        busy = subprocess.run([*arguments, "--port", str(taken.getsockname()[1])], capture_output=True, text=True, timeout=60)
        assert busy.returncode == 2 and "Address already in use; next: another --port" in busy.stderr
    run = subprocess.Popen([*arguments, "--port", "0"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    line = run.stdout.readline()
    address = line.split(" at ")[1].split("/ ")[0]
    with httpx.stream("POST", f"{address}/answer", json={"situation": OIL, "stream": True}, timeout=30) as stream:
        begun = stream.iter_bytes()
        next(begun)
        started = time.monotonic()
        run.send_signal(signal.SIGINT)
        assert run.wait(timeout=30) == 0
    assert time.monotonic() - started < 15
    err = run.stderr.read()
    assert "Stopped." in err and "Traceback" not in err, err
