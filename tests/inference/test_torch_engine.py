import json
from types import SimpleNamespace

import pytest
import torch
from transformers import DynamicCache

from emergency_kit.data.format import build_messages
from emergency_kit.data.template import render_prompt
from emergency_kit.errors import ModelError
from emergency_kit.inference import kv_cache
from emergency_kit.inference.torch_engine import Engine
from emergency_kit.model import backend
from tests.tiny import resolve, save_tiny_model

SCENARIOS = ["my house is on fire", "a man fell from a ladder and does not move, his leg is bent and he bleeds", "gas", "the river rises", "a snake bit me"]
NEW = 24


@pytest.fixture(scope="module")
def engine(folder):
    return Engine(backend.load_checkpoint(resolve(folder).config.model, folder))


@pytest.fixture(scope="module")
def batch():
    return [build_messages(scenario, None) for scenario in SCENARIOS]


def ends_at(folder, tmp_path, token):
    """The same model with one more end token, as a model folder says it."""
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": [2, token]}))
    return Engine(backend.load_checkpoint(resolve(tmp_path).config.model, tmp_path))


@pytest.mark.parametrize("room", [16, 256])
def test_batched_greedy_equals_one_by_one_and_the_library(engine, folder, batch, room, monkeypatch):
    """transformers' own generate, attention and cache are the reference; room: of 16 tokens, so that the engine's cache grows on the way, and prompts one by one."""
    monkeypatch.setattr(kv_cache, "ROOM", room)
    monkeypatch.setattr(kv_cache, "PROMPT_TOKENS", 8 * room)
    library = backend.load_checkpoint(resolve(folder).config.model, folder).model
    assert (library.config._attn_implementation, engine.model.config._attn_implementation) == ("eager", kv_cache.NAME)
    assert f"attention {kv_cache.NAME}" in engine.description
    prompts = [engine.encode(messages) for messages in batch]
    assert len({len(prompt) for prompt in prompts}) == len(prompts), "different lengths, so that rows are padded"
    together = engine.generate(batch, NEW, batch_size=3)
    for messages, prompt, answer in zip(batch, prompts, together, strict=True):
        assert engine.generate([messages], NEW) == [answer]
        reference = library.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                                          max_new_tokens=NEW, do_sample=False, pad_token_id=2)[0, len(prompt):].tolist()
        assert engine.tokenizer.decode(reference, skip_special_tokens=True) == answer.text
        assert len(set(reference)) > NEW // 2, "a model that repeats itself would prove nothing"
    assert len({answer.text for answer in together}) == len(batch)


def test_logits_are_those_of_transformers_own_attention_and_cache(engine, folder, batch):
    library = backend.load_checkpoint(resolve(folder).config.model, folder).model
    ids = torch.tensor([engine.encode(batch[1])])
    caches = [DynamicCache(config=library.config), kv_cache.new_cache(engine.model, True)]
    for start, end in ((0, ids.shape[1] - 70), (ids.shape[1] - 70, ids.shape[1] - 1), (ids.shape[1] - 1, ids.shape[1])):
        theirs, ours = (engine._step.__wrapped__(SimpleNamespace(model=model), ids[:, start:end], torch.ones(1, end), torch.arange(start, end)[None], cache).detach()
                        for model, cache in zip((library, engine.model), caches))
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert caches[1].get_seq_length() == ids.shape[1] and caches[1].layers[0].keys.shape[2] % kv_cache.ROOM == 0


def test_rows_that_end_leave_the_batch_and_the_others_stay_as_they_were(engine, folder, batch, tmp_path):
    plain = engine.generate(batch, NEW)
    tokens = [[] for _ in batch]
    for rows, step in engine._decode([engine.encode(messages) for messages in batch], NEW):
        for row, token in zip(rows, step):
            tokens[row].append(token)
    stop = tokens[0][5]
    answers = ends_at(folder, tmp_path, stop).generate(batch, NEW, batch_size=5)
    for ids, before, answer in zip(tokens, plain, answers, strict=True):
        assert answer.ended == (stop in ids)
        assert answer.tokens == (ids.index(stop) + 1 if answer.ended else NEW)
        if not answer.ended:
            assert answer == before
    assert answers[0].ended and not all(answer.ended for answer in answers)
    assert answers[0].text == engine.tokenizer.decode(tokens[0][:tokens[0].index(stop)], skip_special_tokens=True)


def test_stream_equals_generate(engine, batch):
    for messages in batch[:3]:
        stream = engine.stream(messages, NEW)
        pieces = list(stream)
        assert len(pieces) > 3
        assert engine.generate([messages], NEW) == [stream.result]
        assert "".join(pieces) == stream.result.text


def test_sampling_follows_the_seed(engine, batch):
    def sample(seed):
        return "".join(engine.stream(batch[0], NEW, temperature=1.0, seed=seed))

    assert sample(1) == sample(1) != sample(2)


def test_should_stop_is_asked_before_every_token(engine, batch):
    stream = engine.stream(batch[0], 500, should_stop=lambda: stream.tokens >= 7)
    list(stream)
    assert stream.result.tokens == 7 and not stream.result.ended
    assert list(engine.stream(batch[0], 500, should_stop=lambda: True)) == []


def test_progress_reaches_the_end(engine, batch):
    seen = []
    engine.generate(batch, NEW, batch_size=2, progress=lambda done, tokens: seen.append((done, tokens)))
    assert seen == sorted(seen) and seen[-1] == (len(batch), NEW * len(batch))


def test_prompt_has_the_templates_special_tokens_and_no_more(engine, batch):
    ids = engine.encode(batch[0])
    assert engine.tokenizer.decode(ids) == render_prompt(engine.tokenizer, batch[0])
    assert ids.count(1) == 3  # <|im_start|> of system, user and assistant


def test_prompt_over_the_context_is_one_clear_error(tmp_path, batch):
    folder = save_tiny_model(tmp_path, context_tokens=128)
    engine = Engine(backend.load_checkpoint(resolve(folder).config.model, folder))
    length = len(engine.encode(batch[1]))
    with pytest.raises(ModelError, match=rf"prompt 2 of 5 is {length} tokens long.*128 tokens; lower max_new_tokens to {128 - length} or less"):
        engine.generate(batch, 129 - length)
    with pytest.raises(ModelError, match="shorten the prompt"):
        engine.stream(build_messages("fire " * 200, None), 1)
    assert engine.stream(batch[1], 128 - length).__next__()


def test_an_adapters_answers(engine, folder, batch):
    from peft import LoraConfig, get_peft_model

    loaded = backend.load_checkpoint(resolve(folder).config.model, folder)
    torch.manual_seed(3)
    loaded.model = get_peft_model(loaded.model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)).eval()
    adapted = Engine(loaded)
    answers = adapted.generate(batch, NEW, batch_size=3)
    assert answers == [adapted.generate([messages], NEW)[0] for messages in batch]
    assert answers != engine.generate(batch, NEW)


def test_an_error_in_the_model_reaches_the_caller(folder, batch):
    engine = Engine(backend.load_checkpoint(resolve(folder).config.model, folder))
    engine.model.lm_head = torch.nn.Linear(3, 3)
    with pytest.raises(RuntimeError):
        list(engine.stream(batch[0], 4))


def test_a_sampled_answer_is_fixed_by_its_seed_whatever_stands_beside_it(engine, batch):
    seeds = [5, 6, 7, 8, 9][:len(batch)]
    together = engine.generate(batch, NEW, batch_size=len(batch), temperature=0.9, seeds=seeds)
    for messages, seed, answer in zip(batch, seeds, together, strict=True):
        alone = engine.stream(messages, NEW, 0.9, seed)
        assert "".join(alone) == answer.text
    others = engine.generate(batch, NEW, batch_size=len(batch), temperature=0.9, seeds=[seed + 50 for seed in seeds])
    assert [answer.text for answer in others] != [answer.text for answer in together]
    assert [answer.text for answer in together] != [answer.text for answer in engine.generate(batch, NEW, batch_size=len(batch))]
