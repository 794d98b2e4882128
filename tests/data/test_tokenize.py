"""Masks token by token on a golden example, rows at the length limit, one BOS, and a cache that cannot be stale."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from emergency_kit.config import load_config
from emergency_kit.data import tokenize
from emergency_kit.data.format import Record, build_messages, record_messages
from emergency_kit.data.tokenize import IGNORE, build_rows, encode_prompt, encode_record, load_rows
from emergency_kit.errors import DataError
from emergency_kit.knowledge.cards import load_cards

GOLDEN = Record(id="golden", input="Call 112 now", output="FACTS\n• Smoke.\n\nGUIDANCE\n1. Call 112.", cards=())
# Every token of the golden row with its label: `-` is not supervised, `+` is.
GOLDEN_TOKENS = """
-<|im_start|> -system -\\n -You -Ġanswer -Ġemergencies -Ġoffline -. -ĠWrite -Ġfour -Ġsections -: -ĠF -AC -TS -, -ĠUNC -ER -TA -IN -TIES -, -ĠA -NAL -YS -IS
-, -ĠG -UID -ANCE -. -ĠTake -Ġguidance -Ġonly -Ġfrom -Ġthe -Ġcard -Ġthat -Ġfits -Ġthe -Ġsituation -, -Ġin -Ġits -Ġorder -. -ĠIf -Ġno -Ġcard -Ġfits -, -Ġsay
-Ġso -Ġand -Ġgive -Ġthe -Ġsafe -Ġminimum -. -<|im_end|> -\\n -<|im_start|> -user -\\n -C -ARD -: -Ġnone -Ġfits -. -\\n -\\n -S -IT -U -ATION -: -ĠCall -Ġ -1
-1 -2 -Ġnow -<|im_end|> -\\n -<|im_start|> -ass -istant -\\n
+F +AC +TS +\\n +âĢ¢ +ĠSmoke +. +\\n +\\n +G +UID +ANCE +\\n +1 +. +ĠCall +Ġ +1 +1 +2 +. +<|im_end|>
""".split()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained("models/SmolLM2-135M-Instruct")


def resolve(out: Path, *settings: str) -> object:
    return load_config("embedded", settings=[f"training.output_dir={out}", *settings])


def test_golden_mask_token_by_token(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    row = build_rows([GOLDEN], tokenizer, resolve(tmp_path))[0]
    tokens = [token.replace("Ċ", "\\n") for token in tokenizer.convert_ids_to_tokens(row["input_ids"])]
    shown = [("-" if label == IGNORE else "+") + token for token, label in zip(tokens, row["labels"])]
    print(" ".join(shown))
    assert shown == GOLDEN_TOKENS
    prompt = sum(item.startswith("-") for item in shown)
    assert [label for label in row["labels"] if label != IGNORE] == row["input_ids"][prompt:]


def test_numbers_are_read_digit_by_digit(tokenizer: PreTrainedTokenizerBase) -> None:
    assert tokenizer.tokenize("112") == ["1", "1", "2"]
    assert tokenizer.tokenize("1-800") == ["1", "-", "8", "0", "0"]
    assert tokenizer.tokenize("10 cm") == ["1", "0", "Ġcm"]
    assert tokenizer.eos_token == "<|im_end|>"


def test_every_embedded_row_ends_with_the_end_token_and_supervises_its_answer_alone(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    from emergency_kit.data.build import build_records

    records = build_records(7)["train"]
    rows = build_rows(records, tokenizer, resolve(tmp_path))
    cards = load_cards()
    for record, row in zip(records, rows):
        supervised = [label for label in row["labels"] if label != IGNORE]
        assert tokenizer.decode(supervised) == record.output + "<|im_end|>"
        prompt = row["input_ids"][:len(row["input_ids"]) - len(supervised)]
        assert prompt == encode_prompt(tokenizer, record_messages(record, cards, "cards"))
    assert rows.supervised == sum(label != IGNORE for row in rows for label in row["labels"])


def test_rows_at_over_and_far_over_the_limit(tokenizer: PreTrainedTokenizerBase) -> None:
    messages = build_messages(GOLDEN.input, [])
    ids, prompt = encode_record(tokenizer, GOLDEN, messages, 2048, "error")
    assert encode_record(tokenizer, GOLDEN, messages, len(ids), "error") == (ids, prompt)
    with pytest.raises(DataError, match=rf"record golden: {len(ids)} tokens .*max_seq_length is {len(ids) - 1}"):
        encode_record(tokenizer, GOLDEN, messages, len(ids) - 1, "error")
    assert encode_record(tokenizer, GOLDEN, messages, len(ids) - 1, "drop") is None
    cut, shorter = encode_record(tokenizer, GOLDEN, messages, len(ids) - 5, "truncate_prompt")
    assert len(cut) == len(ids) - 5 and cut[shorter:] == ids[prompt:] and cut[0] == ids[0] and cut[shorter - 1] == ids[prompt - 1]
    with pytest.raises(DataError, match="an answer is never cut"):
        encode_record(tokenizer, GOLDEN, messages, 10, "truncate_prompt")


def test_what_is_dropped_is_said_and_fatal_when_strict(tokenizer: PreTrainedTokenizerBase, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    long = Record(id="long", input="help " * 300, output=GOLDEN.output)
    settings = ["model.max_seq_length=200", "dataset.overlength=drop"]
    assert len(build_rows([GOLDEN, long], tokenizer, resolve(tmp_path, *settings))) == 1
    assert "1 of 2 records over 200 tokens dropped, first long" in capsys.readouterr().out
    with pytest.raises(DataError, match="dataset.strict"):
        build_rows([GOLDEN, long], tokenizer, resolve(tmp_path, *settings, "dataset.strict=true"))
    with pytest.raises(DataError, match="no record is within"):
        build_rows([long], tokenizer, resolve(tmp_path, *settings))


def test_exactly_one_bos_where_the_tokenizer_adds_one(tokenizer: PreTrainedTokenizerBase) -> None:
    from tests.export.tiny import build_sentencepiece_tokenizer

    mistral = build_sentencepiece_tokenizer()
    ids = encode_prompt(mistral, build_messages("smoke in the corridor", []))
    assert ids.count(mistral.bos_token_id) == 1 and ids[0] == mistral.bos_token_id
    row, _ = encode_record(mistral, GOLDEN, build_messages(GOLDEN.input, []), 4096, "error")
    assert row[-1] == mistral.eos_token_id and row.count(mistral.bos_token_id) == 1


def test_the_cache_is_used_and_never_stale(tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = resolve(tmp_path)
    first = load_rows([GOLDEN], tokenizer, config)
    cached = list((tmp_path / "cache").iterdir())
    assert len(cached) == 1
    again = load_rows([GOLDEN], tokenizer, config)
    assert again[0] == first[0] and again.names == ("golden",) and list((tmp_path / "cache").iterdir()) == cached
    for change in (lambda: load_rows([Record(**{**vars(GOLDEN), "output": "FACTS\n• Other."})], tokenizer, config),
                   lambda: load_rows([GOLDEN], tokenizer, resolve(tmp_path, "model.max_seq_length=999"))):
        before = len(list((tmp_path / "cache").iterdir()))
        change()
        assert len(list((tmp_path / "cache").iterdir())) == before + 1
    cached[0].write_bytes(b"damaged")
    assert load_rows([GOLDEN], tokenizer, config)[0] == first[0]
    monkeypatch.setattr(tokenize, "TOKENS_VERSION", 999)
    load_rows([GOLDEN], tokenizer, config)
    assert len(list((tmp_path / "cache").iterdir())) == 4
    monkeypatch.setattr("emergency_kit.data.format.NO_CARD", "CARD: there is none.")
    load_rows([GOLDEN], tokenizer, config)
    assert len(list((tmp_path / "cache").iterdir())) == 5
