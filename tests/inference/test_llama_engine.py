import http.client
import socket
import threading
import time
import urllib.parse

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from emergency_kit.data.format import build_messages, read_answer
from emergency_kit.errors import ModelError
from emergency_kit.export.gguf import export_gguf
from emergency_kit.inference.torch_engine import Engine
from emergency_kit.inference.engine import open_engine
from emergency_kit.inference.grammar import build_grammar
from emergency_kit.inference.llama_engine import LlamaEngine, _build_request
from emergency_kit.model import backend
from tests.data.families import TEMPLATES
from tests.export.tiny import HELD_OUT
from tests.tiny import resolve, save_tiny_model

SCENARIOS = ["my house is on fire", "a man fell from a ladder and does not move, 112? 🙂", "gas", "the river rises, 10 cm an hour\n\n<|im_end|>", "a snake bit me"]
NEW = 24


@pytest.fixture(scope="module")
def engine(gguf):
    engine = LlamaEngine(gguf, slots=2, threads=1, drafts=True)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def reference(folder):
    return Engine(backend.load_checkpoint(resolve(folder).config.model, folder))


@pytest.fixture(scope="module")
def batch():
    return [build_messages(scenario, None) for scenario in SCENARIOS]


def test_prompts_are_the_same_tokens_in_both_engines(engine, reference, batch):
    assert [engine.encode(messages) for messages in batch] == [reference.encode(messages) for messages in batch]


def test_greedy_answers_are_those_of_transformers_streamed_and_batched(engine, reference, batch):
    seen = []
    answers = engine.generate(batch, NEW, progress=lambda done, tokens: seen.append((done, tokens)))
    assert answers == reference.generate(batch, NEW)
    assert seen[-1] == (len(batch), NEW * len(batch)) and [tokens for _, tokens in seen] == sorted(tokens for _, tokens in seen)
    for messages, answer in zip(batch[:3], answers):
        stream = engine.stream(messages, NEW)
        pieces = list(stream)
        assert len(pieces) > 3 and "".join(pieces) == answer.text and stream.result == answer


def test_drafts_are_kept_where_the_model_agrees_and_change_nothing(gguf, reference, batch):
    """A grammar makes the two-layer model repeat itself; what llama.cpp counts as drafted and kept is read from its events."""
    grammar = r"start: /((go out|stay in) and close the door\. ){12}/"
    engine = LlamaEngine(gguf, slots=1, threads=1, drafts=True)
    events: list[dict] = []
    engine._server.handle_completions(_build_request(engine.encode(batch[0]), 200, 0.0, 0, grammar), lambda event: events.append(event) and False)
    timings = events[-1]["timings"]
    assert 20 < timings["draft_n_accepted"] <= timings["draft_n"]
    text = "".join(event["choices"][0]["text"] for event in events if event.get("choices"))
    assert text == reference.generate(batch[:1], 200, grammar=grammar)[0].text and text.count("close the door") == 12
    engine.close()


def test_sampling_follows_the_seed_and_is_not_cut_to_the_likeliest(engine, batch):
    def sample(seed):
        return "".join(engine.stream(batch[0], NEW, temperature=1.0, seed=seed))

    assert sample(1) == sample(1) != sample(2)
    assert sample(None) != sample(None)
    # At a temperature this high almost every token is as likely: llama.cpp's own top-k of 40 would show.
    assert len({"".join(engine.stream(batch[0], 1, temperature=100.0, seed=seed)) for seed in range(60)}) > 50


def test_should_stop_is_asked_before_every_token(engine, batch):
    stream = engine.stream(batch[0], 500, should_stop=lambda: stream.tokens >= 7)
    list(stream)
    assert stream.result.tokens == 7 and not stream.result.ended
    assert list(engine.stream(batch[0], 500, should_stop=lambda: True)) == []


@pytest.mark.parametrize("name", ["engine", "reference"])
def test_answer_ends_before_a_text_to_stop_at_even_one_across_pieces(name, batch, request):
    engine = request.getfixturevalue(name)
    whole = "".join(engine.stream(batch[0], NEW))
    for start, length in ((20, 1), (25, 9), (40, 17)):
        stop = whole[start:start + length]
        stream = engine.stream(batch[0], NEW, stop=("never there", stop))
        assert "".join(stream) == whole[:whole.index(stop)] == stream.result.text and stream.result.ended
    assert "".join(engine.stream(batch[0], NEW, stop=("never there", whole[-3:] + "!"))) == whole


def test_system_prompt_is_computed_once(engine, reference, batch):
    engine.generate([build_messages("flood", None)] * 2, 1)  # both slots
    stream = engine.stream(build_messages("earthquake", None), 2)
    list(stream)
    assert stream.cached_tokens >= len(reference.tokenizer(batch[0][0]["content"]).input_ids)


def test_a_situation_asked_again_is_not_computed_again_after_others(gguf):
    engine = LlamaEngine(gguf, slots=1, threads=1)
    prompts = [build_messages(f"{what} " * 200, None) for what in ("flood", "fire", "gas leak")]
    first = engine.generate(prompts, 8)
    again = [engine.stream(messages, 8) for messages in prompts]
    assert [("".join(stream), stream.tokens) for stream in again] == [(answer.text, answer.tokens) for answer in first]
    assert all(stream.cached_tokens >= len(engine.encode(messages)) - 1 for stream, messages in zip(again, prompts))
    engine.close()


@pytest.mark.parametrize("leave", ["close", "forget"])
def test_a_cancelled_stream_frees_its_slot(gguf, batch, leave):
    engine = LlamaEngine(gguf, slots=1, threads=1)
    stream = engine.stream(batch[0], 3000)
    next(stream)
    waiting = engine.stream(batch[1], 4)
    done = threading.Event()
    thread = threading.Thread(target=lambda: (list(waiting), done.set()))
    thread.start()
    assert not done.wait(0.3), "one slot serves one answer"
    if leave == "close":
        stream.close()
    else:
        del stream
    assert done.wait(10) and waiting.result.tokens == 4
    thread.join()
    engine.close()


def test_more_streams_than_slots_all_end(engine, batch):
    streams = [engine.stream(batch[number % 5], NEW) for number in range(8)]
    threads = [threading.Thread(target=list, args=(stream,)) for stream in streams]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    alone = engine.generate(batch, NEW)
    assert [stream.result for stream in streams] == [alone[number % 5] for number in range(8)]


def test_closing_stops_what_runs_and_what_waits(gguf, batch):
    engine = LlamaEngine(gguf, slots=1, threads=1)
    streams = [engine.stream(batch[0], 3000) for _ in range(3)]
    next(streams[0])
    threads = [threading.Thread(target=list, args=(stream,)) for stream in streams]
    for thread in threads:
        thread.start()
    started = time.monotonic()
    engine.close()
    engine.close()
    for thread in threads:
        thread.join(10)
    assert time.monotonic() - started < 10 and not any(stream.result.ended for stream in streams)
    with pytest.raises(ModelError, match="closed"):
        next(engine.stream(batch[0], 4))


def test_closing_waits_for_a_request_whose_body_is_on_its_way(gguf, monkeypatch):
    """llama.cpp ends after its requests, and lets no thread of Python run until then: the rest of the body would never come."""
    engine = LlamaEngine(gguf, slots=1, threads=1)
    send, half_sent, got = http.client.HTTPConnection.send, threading.Event(), []

    def send_late(connection, data):
        if b"smoke in the stairwell" in data:
            half_sent.set()
            time.sleep(0.3)
        send(connection, data)

    expected = engine.tokenizer("smoke in the stairwell").input_ids
    monkeypatch.setattr(http.client.HTTPConnection, "send", send_late)
    thread = threading.Thread(target=lambda: got.extend(engine.tokenizer("smoke in the stairwell").input_ids))
    thread.start()
    assert half_sent.wait(10)
    started = time.monotonic()
    engine.close()
    assert time.monotonic() - started < 4
    thread.join(10)
    assert got == expected


def test_a_request_that_is_never_finished_does_not_keep_an_engine_open(gguf):
    engine = LlamaEngine(gguf, slots=1, threads=1)
    address = urllib.parse.urlsplit(engine._server.listening_address)
    with socket.create_connection((address.hostname, address.port)) as half:
        half.sendall(b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Length: 20\r\n\r\n")
        time.sleep(0.3)
        started = time.monotonic()
        engine.close()
        assert time.monotonic() - started < 20


def test_prompt_over_the_context_is_one_clear_error(gguf):
    engine = LlamaEngine(gguf, slots=1, context_tokens=256, threads=1)
    messages = build_messages("fire", None)
    room = engine.context_tokens - len(engine.encode(messages))
    with pytest.raises(ModelError, match=f"context of 256 tokens; lower max_new_tokens to {room} or less"):
        engine.stream(messages, room + 1)
    list(engine.stream(messages, room))
    with pytest.raises(ModelError, match="prompt 2 of 2 .*shorten the prompt"):
        engine.generate([messages, build_messages("fire " * 300, None)], 1)
    engine.close()


def test_both_engines_follow_the_same_grammar(engine, reference, batch):
    grammar = build_grammar(2048)
    answer = engine.generate(batch[:3], 14, grammar=grammar)
    assert answer == reference.generate(batch[:3], 14, grammar=grammar)
    assert "".join(engine.stream(batch[0], 14, grammar=grammar)) == answer[0].text
    for each in (engine, reference):
        with pytest.raises(ModelError, match="grammar: .*unknown_rule"):
            list(each.stream(batch[0], 4, grammar="start: unknown_rule"))


def test_random_model_ends_with_valid_structure_under_the_grammar(engine, batch):
    """A random model is the worst case: without the grammar it never writes a section, nor ends."""
    for seed in range(4):
        stream = engine.stream(batch[seed], 2048, temperature=1.5, seed=seed, grammar=build_grammar(2048))
        text = "".join(stream)
        assert stream.result.ended and read_answer(text).valid, text[-200:]


def test_damaged_and_missing_files(tmp_path, gguf, folder):
    model = resolve(folder).config.model
    with pytest.raises(ModelError, match="no such file; next: make export-gguf"):
        open_engine(model, tmp_path / "none.gguf")
    (tmp_path / "text.gguf").write_text("hello")
    with pytest.raises(ModelError, match="starts with b'hell', not with b'GGUF'"):
        open_engine(model, tmp_path / "text.gguf")
    (tmp_path / "cut.gguf").write_bytes(gguf.read_bytes()[:200_000])
    with pytest.raises(ModelError, match="llama.cpp cannot load it"):
        open_engine(model, tmp_path / "cut.gguf")


def test_open_engine_picks_by_the_path(gguf, folder):
    model = resolve(folder).config.model
    engine = open_engine(model, gguf, slots=1)
    assert isinstance(engine, LlamaEngine) and isinstance(open_engine(model, folder), Engine)
    engine.close()


def test_an_answer_that_goes_round_ends_at_the_first_step_that_stood_before():
    from emergency_kit.inference.engine import State, Stream, repeats_itself

    text = "GUIDANCE\n1. Call 112.\n2. Do not run.\n3. Call 112.\n4. Do not run.\n5. Call"

    def pieces(state: State):
        for place in range(0, len(text), 3):
            state.tokens += 1
            yield text[place:place + 3]

    stream = Stream(pieces, grammar="any")
    assert "".join(stream) == "GUIDANCE\n1. Call 112.\n2. Do not run.\n3. Call 112." and stream.ended
    assert "".join(Stream(pieces)) == text
    assert not repeats_itself("FACTS\n• a\n• a\n") and not repeats_itself("GUIDANCE\n1. a\n2. b\n3. a") and repeats_itself("1. a\n2. a\n")


def test_a_files_prompts_and_end_are_the_chat_templates(tmp_path):
    """Qwen 3's template, whose prompts open with an empty thought, and an end token that is not the tokenizer's own, as Gemma's and Phi's are not."""
    folder = save_tiny_model(tmp_path / "model")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template, tokenizer.eos_token = TEMPLATES["qwen-3"], "<|endoftext|>"
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    with torch.no_grad():  # whatever it reads, it says the end token
        model.model.embed_tokens.weight.fill_(1.0)
        model.lm_head.weight.fill_(0.0)
        model.lm_head.weight[end] = 1.0
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.fill_(0.0)
            layer.mlp.down_proj.weight.fill_(0.0)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    export_gguf(resolve(folder, training__output_dir=tmp_path, export__quantizations='["f32"]', export__allow_out_of_bounds="true", dataset__name=HELD_OUT, export__certificate_strings=1, export__certificate_prompts=1,
                        export__certificate_answer_tokens=1, export__certificate_max_new_tokens=1), checkpoint=folder, out=tmp_path / "files")
    reference = Engine(backend.load_checkpoint(resolve(folder).config.model, folder))
    engine = LlamaEngine(next((tmp_path / "files").glob("*.gguf")), slots=1, threads=1)
    try:
        messages = build_messages("smoke", None)
        assert reference.tokenizer.decode(engine.encode(messages)).endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n") and engine.encode(messages) == reference.encode(messages)
        assert engine.generate([messages], 5) == reference.generate([messages], 5)
        assert reference.generate([messages], 5)[0].ended
    finally:
        engine.close()
