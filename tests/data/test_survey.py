"""Inspection of a dataset in which everything that can be wrong is wrong at a known place."""

from __future__ import annotations

import html.parser
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from emergency_kit.config import load_config
from emergency_kit.data.format import Record, record_messages
from emergency_kit.data.survey import PERSONAL, Survey, build_survey, choose_dataset, inspect, printable
from emergency_kit.data.survey_page import histogram
from emergency_kit.data.tokenize import encode_prompt
from emergency_kit.errors import DataError
from tests.data.files import resolve, write

GOOD = "FACTS\n• Oil burns.\n\nUNCERTAINTIES\n• Who is there?\n\nANALYSIS\n• Fire spreads.\n\nGUIDANCE\n1. Leave the kitchen."
PAN = "There is oil burning in a pan on the stove of the shared kitchen and the curtain next to it has begun to smoke"
ROWS: list[object] = [
    {"input": PAN, "output": GOOD, "category": "fire", "role": "parent"},
    {"input": PAN.upper() + "!", "output": GOOD, "category": "fire", "role": "parent"},
    {"input": PAN + " badly", "output": json.dumps({"facts": ["a"], "uncertainties": ["b"], "analysis": ["c"], "guidance": ["d"]}), "category": "fire"},
    {"input": "Una sartén está ardiendo en la cocina y no sé qué hacer, mi hijo está aquí", "output": "Salga de la casa y llame a los bomberos ahora mismo.", "category": "fire"},
    {"input": "Mail bob.smith@example.com or call +49 171 2345678, gas smells", "output": GOOD, "category": "gas"},
    {"input": "The key is hf_abcdefghijklmnopqrstuvwxyzABCDEF, water rises", "output": GOOD + "\n<|im_end|>", "category": "flood"},
    {"input": "help " * 400, "output": GOOD, "id": "the-long-one"},
    {"input": "", "output": "x"}, {"input": "x", "output": ""}, ["no object"], {"unknown": 1},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("survey")
    write(folder / "train.jsonl", *ROWS)
    (folder / "train.jsonl").open("a").write("cut sh\n")
    write(folder / "test.jsonl", {"input": PAN, "output": GOOD}, {"input": PAN + " again", "output": GOOD}, {"input": "A tree fell on the road, nobody is hurt but cars cannot pass", "output": GOOD})
    write(folder / "notes.jsonl", {"input": "a", "output": "b"})
    return folder


@pytest.fixture(scope="module")
def survey(folder: Path) -> Survey:
    return build_survey(resolve(folder, "model.max_seq_length=300", "dataset.strict=true", f"training.output_dir={folder / 'out'}"))


def test_counts_columns_form_and_lengths(survey: Survey, folder: Path) -> None:
    train, test = survey.splits
    assert (train.name, len(train.tokens), train.rejected, train.form) == ("train", 7, 5, "input/output")
    assert train.columns == ("input", "output", "category", "role", "id", "unknown") and len(test.tokens) == 3
    tokenizer = AutoTokenizer.from_pretrained("models/SmolLM2-135M-Instruct")
    answer = len(tokenizer(GOOD).input_ids) + 1
    assert train.answer_tokens[0] == answer
    assert train.tokens[0] == answer + len(encode_prompt(tokenizer, record_messages(Record("", PAN, GOOD), {}, "none")))
    assert train.categories["fire"] == 4 and train.roles["parent"] == 2
    assert survey.notes == [f"{folder}/notes.jsonl: names no split, not read", "no validation split: a tenth of train would be held out, near-duplicates together"]


def test_findings_name_their_rows(survey: Survey, folder: Path) -> None:
    findings = {what: finding.rows for what, finding in next(split for split in survey.splits if split.name == "train").findings.items()}
    assert findings == {
        "over 300 tokens": [f"the-long-one ({next(s for s in survey.splits if s.name == 'train').tokens[6]})"],
        "same question": ["train.jsonl:2 as train.jsonl:1"],
        "near-duplicate question": ["train.jsonl:3 as train.jsonl:1"],
        "answer without the four sections": ["train.jsonl:4 (text before the first heading: 'Salga de la casa y llame a los bomberos ahora mismo.')"],
        "e-mail address": ["train.jsonl:5 (bob…om)"], "phone number": ["train.jsonl:5 (+49…78)"], "access key": ["train.jsonl:6 (hf_…EF)"],
        "control token of the model in the text": ["train.jsonl:6 (<|im_end|>)"],
        "rejected: empty question": ["train.jsonl:8"], "rejected: empty answer": ["train.jsonl:9"], "rejected: not a JSON object but list": ["train.jsonl:10"],
        "rejected: columns of no known form": ["train.jsonl:11"], "rejected: not a whole JSON object": ["train.jsonl:12"]}
    crossing = {what: finding.rows for what, finding in survey.crossing.items()}
    assert crossing == {"same question in train and test": ["test.jsonl:1 as train.jsonl:1"], "near-duplicate question in train and test": ["test.jsonl:2 as train.jsonl:1"]}
    assert len((folder / "out" / "data" / "rejected-train.jsonl").read_text().splitlines()) == 5


def test_answers_and_languages(survey: Survey) -> None:
    train = next(split for split in survey.splits if split.name == "train")
    assert train.answers == {"four sections as text": 5, "four sections as JSON": 1, "other": 1}
    assert train.languages["es"] == 1 and train.languages["en"] >= 5


class _Page(html.parser.HTMLParser):
    """Tags that are open at the end, and everything a page would load."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loads += [str(value) for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "rect", "line", "br", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in self.open:
            assert self.open.pop() == tag


def test_the_terminal_and_the_page_show_it_all(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "odd" / "train.jsonl", *ROWS, {"id": "<script>\x1b[31m", "input": "mail a.b@example.org <b>", "output": "x", "category": "<i>"})
    inspect(resolve("nothing/here", "model.max_seq_length=300", f"training.output_dir={tmp_path / 'out'}"), str(tmp_path / "odd"), tmp_path / "page.html")
    shown, page = capsys.readouterr().out, (tmp_path / "page.html").read_text()
    for text in ("recognised as", "input/output", "over 300 tokens", "1 phone number: train.jsonl:5", "<script>␛[31m (a.b…rg)", f"Page: {tmp_path}/page.html"):
        assert text in shown, text
    assert "\x1b" not in shown and "<script>" not in page and "<i>" not in page and "&lt;script&gt;" in page
    parser = _Page()
    parser.feed(page)
    assert parser.open == [] and parser.loads == [] and "<svg" in page and "bob.smith@example.com" not in page + shown


def test_a_dataset_of_broken_rows_is_shown_not_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "train.jsonl", *[{"input": "a", "output": ""}] * 3)
    inspect(resolve(path, f"training.output_dir={tmp_path}"), page=tmp_path / "page.html")
    assert "3 rejected: empty answer: train.jsonl:1, train.jsonl:2, train.jsonl:3" in capsys.readouterr().out
    (tmp_path / "train.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(DataError, match="no known form"):
        inspect(resolve(path), page=tmp_path / "other.html")
    assert not (tmp_path / "other.html").exists()


def test_another_source_takes_along_only_what_the_command_line_sets(tmp_path: Path) -> None:
    config = tmp_path / "more.yaml"
    config.write_text("dataset:\n  name: me/pans\n  revision: v1\n  columns: {input: Q, output: A}\n")
    dataset = choose_dataset(load_config("mistral-7b", config), "x.csv").config.dataset
    assert (dataset.name, dataset.revision, dataset.columns) == ("x.csv", None, {})
    dataset = choose_dataset(load_config("mistral-7b", config, ["dataset.columns={input: W}"]), "x.csv").config.dataset
    assert dataset.columns == {"input": "W"}
    resolved = load_config("mistral-7b", config)
    assert choose_dataset(resolved, None) is resolved is choose_dataset(resolved, "me/pans")


@pytest.mark.parametrize("what, yes, no", [
    ("e-mail address", ["a.b+c@x-y.org"], ["@home", "a@b", "10@20"]),
    ("phone number", ["555-123-4567", "(555) 123-4567", "+44 20 7946 0958", "0171 2345678"], ["call 112", "2020-2024", "10 000 people", "5 to 6 cm", "1 2 3 4 5"]),
    ("access key", ["AKIAIOSFODNN7EXAMPLE", "ghp_" + "a" * 36, "sk-proj-abcdefghijklmnopqrst"], ["task-force", "sk-8", "hf_short"]),
    ("private key", ["-----BEGIN RSA PRIVATE KEY-----"], ["-----BEGIN PUBLIC KEY-----"]),
    ("password", ["password: hunter22", "API_KEY=abcdef1"], ["the password is unknown", "secret: no"]),
    ("card number", ["4111 1111 1111 1111"], ["1234 5678", "2024-01-01"]),
])
def test_personal_data_patterns(what: str, yes: list[str], no: list[str]) -> None:
    assert all(PERSONAL[what].search(f"so {text} it is") for text in yes) and not [text for text in no if PERSONAL[what].search(f"so {text} it is")]


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=200))
def test_the_histogram_counts_every_value_once(values: list[int]) -> None:
    bins = histogram(values)
    assert sum(count for _, _, count, _ in bins) == len(values) and max(share for *_, share in bins) == 1 and len(bins) <= 25
    assert all(count == sum(low <= value <= high for value in values) for low, high, count, _ in bins)
    assert [low for low, *_ in bins[1:]] == [high + 1 for _, high, *_ in bins[:-1]] and np.all([share >= 0 for *_, share in bins])


def test_control_characters_become_visible() -> None:
    assert printable("a\x1b[31m\x00\n\tb\x7f\x9b") == "a␛[31m␀\n\tb␡�"
