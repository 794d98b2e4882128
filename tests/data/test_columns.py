"""Forms by their columns, mapped columns, and every reason for which a row is rejected."""

from __future__ import annotations

import json
from typing import Any, Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emergency_kit.data.columns import Rejected, recognise
from emergency_kit.data.format import Record, read_answer


def read(row: Mapping[str, Any], mapped: Mapping[str, str] | None = None) -> tuple[str, Record]:
    form = recognise(tuple(row), mapped or {})
    assert form is not None, row
    return str(form), form.build(row, "folder/rows.jsonl:7")


def turns(*pairs: tuple[str, str], names: tuple[str, str] = ("role", "content")) -> list[dict[str, str]]:
    return [dict(zip(names, pair)) for pair in pairs]


@pytest.mark.parametrize("row, form, instruction, asked", [
    ({"Input": "smoke", "Output": "A"}, "Input/Output (Input, Output)", "", "smoke"),
    ({"instruction": "smoke", "response": "A"}, "instruction/response (instruction, response)", "", "smoke"),
    ({"question": "smoke", "answer": "A", "id": "x"}, "question/answer (question, answer, id)", "", "smoke"),
    ({"instruction": "Say", "input": "smoke", "output": "A"}, "Alpaca (instruction, input, output)", "Say", "smoke"),
    ({"instruction": "smoke", "input": "", "output": "A", "text": "t"}, "Alpaca (instruction, input, output)", "smoke", ""),
    ({"instruction": "Say", "context": "smoke", "response": "A"}, "instruction/response with context (instruction, context, response)", "Say", "smoke"),
    ({"prompt": "smoke", "completion": "A"}, "prompt/completion (prompt, completion)", "", "smoke"),
    ({"prompt": turns(("user", "smoke")), "completion": turns(("assistant", "A"))}, "prompt/completion (prompt, completion)", "", "smoke"),
    ({"messages": turns(("system", "Say"), ("user", "smoke"), ("assistant", "A"))}, "messages (messages)", "Say", "smoke"),
    ({"messages": '[{"role": "user", "content": "smoke"}, {"role": "assistant", "content": "A"}]'}, "messages (messages)", "", "smoke"),
    ({"conversations": turns(("human", "smoke"), ("gpt", "A"), names=("from", "value"))}, "ShareGPT (conversations)", "", "smoke"),
    ({"conversations": turns(("human", "smoke"), ("gpt", "where?"), ("human", "here"), ("gpt", "A"), ("human", "thanks"), names=("from", "value"))},
     "ShareGPT (conversations)", "", "User: smoke\nAssistant: where?\nUser: here"),
])
def test_forms(row: dict[str, Any], form: str, instruction: str, asked: str) -> None:
    name, record = read(row)
    assert (name, record.instruction, record.input, record.output) == (form, instruction, asked, "A")
    assert record.id == row.get("id", "rows.jsonl:7")


def test_mapped_columns() -> None:
    row = {"Q": "smoke", "A": "Leave.", "kind": "fire", "input": "not this", "output": "nor this"}
    name, record = read(row, {"input": "Q", "output": "A", "category": "kind"})
    assert name == "mapped by dataset.columns (Q, A, kind)" and (record.input, record.output, record.category) == ("smoke", "Leave.", "fire")
    name, record = read({"messages": turns(("user", "smoke"), ("assistant", "A")), "kind": "fire"}, {"category": "kind"})
    assert (name, record.category) == ("messages (messages, kind)", "fire")


def test_answers_as_text_or_json_are_the_same_answer() -> None:
    sections = {"facts": ["Smoke."], "uncertainties": ["Who?"], "analysis": ["Bad."], "guidance": ["Leave."]}
    text = "FACTS\n• Smoke.\n\nUNCERTAINTIES\n• Who?\n\nANALYSIS\n• Bad.\n\nGUIDANCE\n1. Leave."
    answers = [read_answer(read({"input": "smoke", "output": output})[1].output) for output in (text, sections)]
    assert all(parsed.valid and parsed.answer.to_dict() == sections for parsed in answers)


def test_the_kit_s_own_fields_come_back() -> None:
    record = Record("a", "smoke", "A", "Say", "fire", "parent", ("x",), ("x", "y"), 2, ("a phone",), "DE", ("WHO, Burns, 2020",))
    assert read(json.loads(record.to_json()))[1] == record
    none, empty = Record("a", "smoke", "A"), Record("a", "smoke", "A", cards=())
    assert read(json.loads(none.to_json()))[1].cards is None and read(json.loads(empty.to_json()))[1].cards == ()


def test_foreign_columns_of_the_same_names_are_taken_as_text() -> None:
    record = read({"input": "smoke", "output": "A", "id": 5, "category": ["a"], "role": float("nan"), "sources": [{"url": 1}], "cards": "x, y"})[1]
    assert (record.id, record.category, record.role, record.sources, record.cards) == ("5", '["a"]', "", ('{"url": 1}',), ("x", "y"))


@pytest.mark.parametrize("columns", [(), ("text",), ("input",), ("output",), ("chosen", "rejected"), ("role", "id", "output")])
def test_no_known_form(columns: tuple[str, ...]) -> None:
    assert recognise(columns, {}) is None


@pytest.mark.parametrize("row, reason", [
    ({"input": "a", "output": " \n"}, "empty answer"), ({"input": "a", "output": None}, "empty answer"), ({"input": "a", "output": float("nan")}, "empty answer"),
    ({"input": " ", "output": "b"}, "empty question"), ({"instruction": None, "input": "", "output": "b"}, "empty question"),
    ({"input": {"a": 1}, "output": "b"}, "input is not text"), ({"input": "a", "output": 5}, "output is not text"),
    ({"input": "half \ud83d", "output": "b"}, "half a character (a lone surrogate)"), ({"input": "a", "output": ["\ud83d"]}, "half a character (a lone surrogate)"),
    ({"messages": []}, "no list of turns"), ({"messages": "smoke"}, "no list of turns"), ({"messages": "[{"}, "a list that is not valid JSON"),
    ({"messages": turns(("user", "a"))}, "no answer in the conversation"), ({"messages": turns(("tool", "a"))}, "a turn without a known speaker and text"),
    ({"messages": turns(("user", "a"), ("assistant", " "))}, "empty answer"), ({"messages": turns(("assistant", "a"))}, "empty question"),
    ({"input": "a", "output": "b", "fits": "x"}, "fits is not a number"),
])
def test_rejected_for_one_stated_reason(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(Rejected) as rejected:
        read(row)
    assert rejected.value.reason == reason


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5), lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3), max_leaves=6)
COLUMNS = st.sampled_from(["input", "Output", "instruction", "prompt", "completion", "messages", "conversations", "id", "category", "cards", "fits", "hazards", "country", "x"])


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.dictionaries(COLUMNS, JSON | st.lists(st.dictionaries(st.sampled_from(["role", "content"]), st.sampled_from(["user", "assistant", ""]) | JSON)), max_size=6),
       st.dictionaries(st.sampled_from(["input", "output", "category"]), COLUMNS, max_size=2))
def test_any_row_becomes_a_record_or_is_rejected(row: dict[str, Any], mapped: dict[str, str]) -> None:
    form = recognise(tuple(row), mapped)
    if form is None:
        return
    try:
        record = form.build(row, "a:1")
    except Rejected:
        return
    assert record.output.strip() and (record.input + record.instruction).strip() and record.to_json().encode()
