import multiprocessing
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from emergency_kit.evaluation.kept_answers import Answers, answer_key
from emergency_kit.inference.engine import Generated

MESSAGES = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.text(min_size=1, max_size=8), st.text(), st.integers(0, 999), st.booleans()), max_size=6))
def test_what_was_put_is_read_back(tmp_path, items):
    Path(tmp_path / ("a" * 32 + ".jsonl")).unlink(missing_ok=True)
    kept = Answers(tmp_path, "a" * 64)
    for key, text, tokens, ended in items:
        kept.put(key, Generated(text, tokens, ended))
    again = Answers(tmp_path, "a" * 64)
    assert again.damaged == 0 and {key: again.get(key) for key, *_ in items} == {key: Generated(*rest) for key, *rest in items}
    assert again.get("never asked") is None


@pytest.mark.parametrize("cut", range(0, 140, 7))
def test_a_line_cut_short_spoils_itself_alone(tmp_path, cut):
    kept = Answers(tmp_path, "b" * 64)
    for number in range(3):
        kept.put(f"key{number}", Generated(f"FACTS\n• {number}", number, True))
    whole = kept.path.read_bytes()
    kept.path.write_bytes(whole[:-cut] if cut else whole)
    again = Answers(tmp_path, "b" * 64)
    survived = len(again)
    assert survived >= 1 and again.damaged <= 1
    again.put("after", Generated("x", 1, True))
    last = Answers(tmp_path, "b" * 64)
    assert len(last) == survived + 1 and last.get("after") == Generated("x", 1, True)


def test_a_changed_answer_is_not_believed(tmp_path):
    kept = Answers(tmp_path, "c" * 64)
    kept.put("k", Generated("Call 112.", 3, True))
    kept.path.write_text(kept.path.read_text().replace("Call 112", "Call 911"))
    again = Answers(tmp_path, "c" * 64)
    assert again.get("k") is None and again.damaged == 1
    for junk in (b"[]", b"3", b"null", b'{"check": 1}', b"\xff\xfe", b'{"key": "k"}'):
        kept.path.write_bytes(junk)
        assert len(Answers(tmp_path, "c" * 64)) == 0


def _append(folder, name):
    kept = Answers(folder, "d" * 64)
    for number in range(50):
        kept.put(f"{name}{number}", Generated(name * 200, number, True))


def test_two_processes_append_at_once(tmp_path):
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_append, args=(tmp_path, name)) for name in "xyz"]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    again = Answers(tmp_path, "d" * 64)
    assert len(again) == 150 and again.damaged == 0


def test_the_key_holds_all_that_decides_an_answer():
    base = answer_key(MESSAGES, 10, 0.0, 0)
    other = [MESSAGES[0], {"role": "user", "content": "v"}]
    assert len({base, answer_key(other, 10, 0.0, 0), answer_key(MESSAGES, 11, 0.0, 0), answer_key(MESSAGES, 10, 0.7, 0), answer_key(MESSAGES, 10, 0.7, 1)}) == 5
    assert base == answer_key(MESSAGES, 10, 0.0, 5), "greedy: the seed decides nothing"
