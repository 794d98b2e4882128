"""Masks token by token on a golden example, rows at the length limit, one BOS, and batches that equal single rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from emergency_kit.config import Resolved, load_config
from emergency_kit.data.format import Record, build_messages, record_messages
from emergency_kit.data.template import render_prompt
from emergency_kit.data.tokenize import IGNORE, NO_LIMIT, build_rows, encode, encode_prompt, fit_row
from emergency_kit.errors import DataError
from emergency_kit.knowledge.cards import load_cards
from tests.export.tiny import build_sentencepiece_tokenizer

GOLDEN = Record(id="golden", input="Call 112 now", output="FACTS\n• Smoke.\n\nGUIDANCE\n1. Call 112.", cards=())
# Every token of the golden row with its label: `-` is not supervised, `+` is.
GOLDEN_TOKENS = """
-<|im_start|> -system -\\n -You -Ġanswer -Ġemergencies -Ġoffline -. -ĠWrite -Ġfour -Ġsections -: -ĠF -AC -TS -, -ĠUNC -ER -TA -IN -TIES -, -ĠA -NAL -YS -IS
-, -ĠG -UID -ANCE -. -ĠTake -Ġguidance -Ġonly -Ġfrom -Ġthe -Ġcard -Ġthat -Ġfits -Ġthe -Ġsituation -, -Ġin -Ġits -Ġorder -. -ĠIf -Ġno -Ġcard -Ġfits -, -Ġsay
-Ġso -Ġand -Ġgive -Ġthe -Ġsafe -Ġminimum -. -<|im_end|> -\\n -<|im_start|> -user -\\n -S -IT -U -ATION -: -ĠCall -Ġ -1
-1 -2 -Ġnow -<|im_end|> -\\n -<|im_start|> -ass -istant -\\n
+F +AC +TS +\\n +âĢ¢ +ĠSmoke +. +\\n +\\n +G +UID +ANCE +\\n +1 +. +ĠCall +Ġ +1 +1 +2 +. +<|im_end|>
""".split()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained("models/SmolLM2-135M-Instruct")


def resolve(*more: str, grounding: str = "none") -> Resolved:
    return load_config("embedded", settings=[f"dataset.grounding={grounding}", *more])


def test_golden_mask_token_by_token(tokenizer: PreTrainedTokenizerBase) -> None:
    row = build_rows([GOLDEN], tokenizer, resolve())[0]
    tokens = [token.replace("Ċ", "\\n") for token in tokenizer.convert_ids_to_tokens(row["input_ids"])]
    shown = [("-" if label == IGNORE else "+") + token for token, label in zip(tokens, row["labels"])]
    assert shown == GOLDEN_TOKENS
    prompt = sum(item.startswith("-") for item in shown)
    assert row["labels"] == [IGNORE] * prompt + row["input_ids"][prompt:]


def test_numbers_are_read_digit_by_digit(tokenizer: PreTrainedTokenizerBase) -> None:
    assert tokenizer.tokenize("112") == ["1", "1", "2"]
    assert tokenizer.tokenize("1-800") == ["1", "-", "8", "0", "0"]
    assert tokenizer.tokenize("10 cm") == ["1", "0", "Ġcm"]
    assert tokenizer.eos_token == "<|im_end|>"


TEXT = st.text(min_size=1, max_size=80).filter(str.strip) | st.sampled_from([" <|im_start|>user\nhi", "<|im_end|>", "  two  spaces ", "x<|endoftext|>\n", "\n\nEnd\n"])


@settings(max_examples=80, deadline=None, derandomize=True)
@given(texts=st.lists(st.tuples(TEXT, TEXT, st.sampled_from(["", "Say <|im_end|>"]), st.sampled_from([(), ("stroke",), ("burn_thermal", "stroke")])), min_size=1, max_size=6),
       grounding=st.sampled_from(["none", "cards"]))
def test_labels_stand_on_the_answer_alone_and_batches_equal_single_texts(tokenizer: PreTrainedTokenizerBase, texts: list[Any], grounding: str) -> None:
    cards = load_cards()
    records = [Record(f"r{number}", asked, answered, instruction, cards=tuple(card for card in shown if card in cards)) for number, (asked, answered, instruction, shown) in enumerate(texts)]
    rows = build_rows(records, tokenizer, resolve("model.max_seq_length=100000", grounding=grounding))
    assert len(rows) == len(records)
    for record, row, length in zip(records, rows, rows.lengths):
        prompt = tokenizer(render_prompt(tokenizer, record_messages(record, cards, grounding)), add_special_tokens=False).input_ids
        answer = tokenizer(record.output.strip(), add_special_tokens=False).input_ids + [tokenizer.eos_token_id]
        assert row == {"input_ids": prompt + answer, "labels": [IGNORE] * len(prompt) + answer}
        assert length == len(prompt) + len(answer)
    assert rows.supervised == sum(label != IGNORE for row in rows for label in row["labels"])


@pytest.mark.parametrize("name", ["bundled", "sentencepiece"])
def test_a_thousand_prompts_in_batches_equal_single_ones(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    other = tokenizer if name == "bundled" else build_sentencepiece_tokenizer()
    records = [Record(f"r{number}", f"{'smoke ' * (number % 7)}in corridor {number}", f"Leave {number}.", "Say." if number % 3 else "") for number in range(1000)]
    cards = load_cards()
    for record, row in zip(records, encode(records, other, resolve())):
        assert row.record is record
        assert row.ids[:row.prompt] == encode_prompt(other, record_messages(record, cards, "none")) and row.answer == len(row.ids) - row.prompt


def test_rows_at_over_and_far_over_the_limit(tokenizer: PreTrainedTokenizerBase) -> None:
    prompt, answer = list(range(100, 150)), list(range(10))
    assert fit_row("golden", prompt, answer, 60, "error") == (prompt + answer, 50)
    with pytest.raises(DataError, match=r"record golden: 60 tokens \(10 of them answer\), model.max_seq_length is 59; raise it"):
        fit_row("golden", prompt, answer, 59, "error")
    assert fit_row("golden", prompt, answer, 59, "drop") is None
    assert fit_row("golden", prompt, answer, 55, "truncate_prompt") == (prompt[:23] + prompt[28:] + answer, 45)
    with pytest.raises(DataError, match="an answer is never cut"):
        fit_row("golden", prompt, answer, 10, "truncate_prompt")


@settings(max_examples=100, deadline=None, derandomize=True)
@given(prompt=st.integers(1, 60), answer=st.integers(1, 30), limit=st.integers(1, 100))
def test_a_cut_row_keeps_its_answer_and_both_ends_of_its_prompt(prompt: int, answer: int, limit: int) -> None:
    asked, answered = list(range(100, 100 + prompt)), list(range(answer))
    if answer >= limit and prompt + answer > limit:
        return
    row, length = fit_row("r", asked, answered, limit, "truncate_prompt") or ([], 0)
    assert len(row) == min(limit, prompt + answer) and row[length:] == answered and row[0] == asked[0]
    assert row[:length] == sorted(set(row[:length])) and (length < 2 or row[length - 1] == asked[-1])


def test_what_is_dropped_or_cut_is_said_and_fatal_when_strict(tokenizer: PreTrainedTokenizerBase, capsys: pytest.CaptureFixture[str]) -> None:
    long = Record(id="long", input="help " * 300, output=GOLDEN.output)
    drop = ["model.max_seq_length=200", "dataset.overlength=drop"]
    assert len(build_rows([GOLDEN, long], tokenizer, resolve(*drop))) == 1
    assert "1 of 2 records over 200 tokens dropped, first long" in capsys.readouterr().out
    rows = build_rows([GOLDEN, long], tokenizer, resolve("model.max_seq_length=200", "dataset.overlength=truncate_prompt"))
    assert rows.lengths.tolist() == [len(GOLDEN_TOKENS), 200]
    assert "1 of 2 records over 200 tokens truncated in the prompt, first long" in capsys.readouterr().out
    with pytest.raises(DataError, match="dataset.strict makes it fatal"):
        build_rows([GOLDEN, long], tokenizer, resolve(*drop, "dataset.strict=true"))
    with pytest.raises(DataError, match="no record is within"):
        build_rows([long], tokenizer, resolve(*drop))
    measured, = encode([long], tokenizer, resolve(*drop), NO_LIMIT)
    assert measured.tokens == len(measured.ids) > 300


def test_exactly_one_bos_where_the_tokenizer_adds_one() -> None:
    mistral = build_sentencepiece_tokenizer()
    ids = encode_prompt(mistral, build_messages("smoke in the corridor", []))
    assert ids.count(mistral.bos_token_id) == 1 and ids[0] == mistral.bos_token_id
    row = build_rows([GOLDEN], mistral, resolve("model.max_seq_length=4096"))[0]["input_ids"]
    assert row[-1] == mistral.eos_token_id and row.count(mistral.bos_token_id) == 1


def test_rows_on_disk_are_those_in_memory(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    records = [Record(f"r{number}", f"smoke {number}", f"Leave {number}. " * (number % 5 + 1)) for number in range(600)]
    stored, held = build_rows(records, tokenizer, resolve(), tmp_path), build_rows(records, tokenizer, resolve())
    assert [stored[index] for index in range(600)] == list(held) and isinstance(stored.ids, np.memmap)
    assert (tmp_path / "ids.bin").stat().st_size == 4 * len(held.ids) and json.loads((tmp_path / "overlength.json").read_text()) == {"dropped": [], "truncated in the prompt": []}
    with pytest.raises(IndexError):
        stored[600]
