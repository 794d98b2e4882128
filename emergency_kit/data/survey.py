"""Survey: what a dataset is made of and what is wrong with it, before anything is trained on it.

In: any source that loads. Out: a `Survey`, shown on the terminal and as one self-contained page.
Rows are read as a stream; kept are a few numbers and a MinHash signature a row, and the names of rows
that need a look. Limits: personal data and keys are found by pattern, the language is guessed from the
text (py3langid) and only where it is long enough to tell. Run: `emergency-kit data inspect SOURCE`.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Iterator

import numpy as np

from emergency_kit.artifacts import save_text
from emergency_kit.config import Resolved
from emergency_kit.data import duplicates
from emergency_kit.data.build import ensure_built
from emergency_kit.data.columns import Rejected
from emergency_kit.data.format import Record, read_answer
from emergency_kit.data.load import Split
from emergency_kit.data.sources import Files, Row, open_source
from emergency_kit.data.tokenize import encode

# Each finding names its rows up to this many; the count goes on.
NAMED = 20
LANGUAGE_CHARACTERS = 60
# Longer than any row: lengths are measured, not enforced.
_NO_LIMIT = 1 << 30
PERSONAL = {
    "e-mail address": re.compile(r"\b[\w.+-]+@[\w-]+\.[a-z]{2,}\b", re.IGNORECASE),
    "phone number": re.compile(r"(?<![\w.])(?:\+\d{1,3}[ .-]?(?:\(?\d{1,4}\)?[ .-]?){2,4}\d{2,4}|\(?\d{3}\)?[ .-]\d{3}[ .-]\d{4}|0\d{3,4}[ .-]\d{5,7})(?![\w.])"),
    "private key": re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----"),
    "access key": re.compile(r"\b(?:AKIA[0-9A-Z]{16}|gh[pousr]_[A-Za-z0-9]{36,}|hf_[A-Za-z0-9]{30,}|sk-[A-Za-z0-9_-]{20,}|xox[abprs]-[A-Za-z0-9-]{10,}|AIza[\w-]{35})"),
    "password": re.compile(r"\b(?:password|passwd|api[_-]?key|secret)\s*[:=]\s*\S{6,}", re.IGNORECASE),
    "card number": re.compile(r"(?<![\d-])(?:\d{4}[ -]){3}\d{4}(?![\d-])"),
}


@dataclass
class Finding:
    """Something to look at: how many rows, and the first of them by name."""

    count: int = 0
    rows: list[str] = field(default_factory=list)

    def add(self, row: str) -> None:
        """Count one more row."""
        self.count += 1
        if len(self.rows) < NAMED:
            self.rows.append(row)


@dataclass
class SplitSurvey:
    """One split. tokens, prompt_tokens, answer_tokens: one number a record; findings: by what was found."""

    name: str
    columns: tuple[str, ...] = ()
    form: str = ""
    tokens: list[int] = field(default_factory=list)
    answer_tokens: list[int] = field(default_factory=list)
    answers: Counter[str] = field(default_factory=Counter)
    languages: Counter[str] = field(default_factory=Counter)
    categories: Counter[str] = field(default_factory=Counter)
    roles: Counter[str] = field(default_factory=Counter)
    findings: dict[str, Finding] = field(default_factory=dict)

    def find(self, what: str, row: str) -> None:
        """Note a row that needs a look."""
        self.findings.setdefault(what, Finding()).add(row)


@dataclass
class Survey:
    """A whole dataset. limit: `model.max_seq_length`; crossing: what stands in more than one split."""

    name: str
    limit: int
    splits: list[SplitSurvey]
    crossing: dict[str, Finding]
    notes: list[str]


def inspect(resolved: Resolved, source: str | None = None, page: Path | None = None) -> Survey:
    """Survey a dataset, print it, and write it as a page where `page` is given."""
    from emergency_kit.data.survey_page import print_survey, render_page

    survey = build_survey(resolved, source)
    print_survey(survey)
    if page:
        save_text(page, render_page(survey))
        print(f"Page: {page}")
    return survey


def build_survey(resolved: Resolved, name: str | None = None) -> Survey:
    """Read every split of a dataset once and measure it; raises DataError where it cannot be read at all."""
    from emergency_kit.model.backend import load_tokenizer

    resolved = choose_dataset(resolved, name)
    dataset = resolved.config.dataset
    tokenizer = load_tokenizer(resolved.config.model)
    source = open_source(dataset, ensure_built(resolved) if dataset.name == "embedded" else None)
    limit = resolved.config.model.max_seq_length
    notes = [f"{path}: names no split, not read" for path in getattr(source, "ignored", [])]
    names, texts, splits = [], [], []
    for split_name in source.splits():
        survey = SplitSurvey(split_name)
        split = Split(split_name, source, dataset, resolved.config.training.seed, split_name)
        split.on_rejected = lambda row, reason, survey=survey: _note_rejected(survey, row, reason)

        def records(split: Split = split, survey: SplitSurvey = survey) -> Iterator[Record]:
            for record in split:
                _look_at(survey, record)
                names.append((len(splits), record.id))
                yield record

        signatures: list[str] = []
        for row in encode(records(), tokenizer, resolved, _NO_LIMIT):
            survey.tokens.append(row.tokens)
            survey.answer_tokens.append(row.answer)
            if row.tokens > limit:
                survey.find(f"over {limit} tokens", f"{row.record.id} ({row.tokens})")
            signatures.append(row.record.input or row.record.instruction)
            if len(signatures) == 4096:
                texts.append(duplicates.build_signatures(signatures))
                signatures.clear()
        texts.append(duplicates.build_signatures(signatures))
        survey.form, survey.columns = split.form, split.columns
        splits.append(survey)
    crossing: dict[str, Finding] = {}
    _find_duplicates(np.concatenate(texts), names, splits, crossing)
    return Survey(dataset.name, limit, splits, crossing, notes)


def choose_dataset(resolved: Resolved, name: str | None) -> Resolved:
    """The config with another dataset in it; column names that were set for the configured one do not carry over."""
    if name is None or name == resolved.config.dataset.name:
        return resolved
    kept = {} if "dataset.columns" not in resolved.origins or not resolved.origins["dataset.columns"].startswith("--set") else resolved.config.dataset.columns
    dataset = resolved.config.dataset.model_copy(update={"name": name, "columns": kept, "revision": None})
    return type(resolved)(resolved.config.model_copy(update={"dataset": dataset}), resolved.profile, resolved.profile_reason, resolved.origins)


def _note_rejected(survey: SplitSurvey, row: Row, reason: Rejected) -> None:
    survey.find(f"rejected: {reason.reason}", row.place.rsplit("/", 1)[-1])


def _look_at(survey: SplitSurvey, record: Record) -> None:
    survey.categories[record.category] += bool(record.category)
    survey.roles[record.role] += bool(record.role)
    parsed = read_answer(record.output)
    form = "JSON" if record.output.lstrip().startswith("{") else "structured text"
    survey.answers[form if parsed.valid else f"not {'valid ' + form if parsed.answer.to_dict() != read_answer('').answer.to_dict() else 'structured'}"] += 1
    if not parsed.valid:
        survey.find("answer without the four sections", f"{record.id} ({parsed.problems[0]})")
    text = "\n".join((record.instruction, record.input, record.output))
    for what, pattern in PERSONAL.items():
        if match := pattern.search(text):
            survey.find(what, f"{record.id} ({_mask(match.group())})")
    survey.languages[_language(record)] += 1


def _mask(secret: str) -> str:
    """Enough to find it in the file, not enough to use it."""
    return secret[:3] + "…" + secret[-2:] if len(secret) > 8 else secret[:2] + "…"


def _language(record: Record) -> str:
    import py3langid

    text = f"{record.input} {record.output}"
    return py3langid.classify(text)[0] if len(text) >= LANGUAGE_CHARACTERS else "too short to tell"


def _find_duplicates(signatures: np.ndarray, names: list[tuple[int, str]], splits: list[SplitSurvey], crossing: dict[str, Finding]) -> None:
    """Questions that are the same or almost the same, within a split and across; each later row is named once."""
    named: set[tuple[int, str]] = set()
    for first, second in duplicates.similar_pairs(signatures):
        same = bool((signatures[first] == signatures[second]).all())
        what = "same question" if same else "near-duplicate question"
        (split, row), (other, earlier) = names[second], names[first]
        if (second, what if split == other else "across") in named:
            continue
        named.add((second, what if split == other else "across"))
        if split == other:
            splits[split].find(what, f"{row} as {earlier}")
        else:
            where = f"{what} in {splits[other].name} and {splits[split].name}"
            crossing.setdefault(where, Finding()).add(f"{row} as {earlier}")
