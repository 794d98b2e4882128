"""Survey: what a dataset is made of and what is wrong with it, before anything is trained on it.

In: any source that loads. Out: a `Survey`, shown on the terminal and as one self-contained page.
Rows are read as a stream; kept are a few numbers, a name and a MinHash signature a row. Rejected rows are
listed in `<output_dir>/data/`, as in training. Limits: personal data and keys are found by pattern, the
language is guessed from the text (py3langid) and only where it is long enough to tell.
Run: `emergency-kit data inspect SOURCE`.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Iterator, Sequence

import numpy as np

from emergency_kit.artifacts import save_text
from emergency_kit.config import DatasetConfig, Resolved
from emergency_kit.data import duplicates
from emergency_kit.data.build import ensure_built
from emergency_kit.data.columns import Rejected
from emergency_kit.data.format import Record, read_answer
from emergency_kit.data.formats import Row
from emergency_kit.data.load import Split
from emergency_kit.data.rejected import RejectedList
from emergency_kit.data.sources import open_source
from emergency_kit.data.tokenize import NO_LIMIT, encode

# Each finding names its rows up to this many; the count goes on.
NAMED = 50
# The language is told from so many characters at least, and no more than so many.
LANGUAGE_CHARACTERS = (60, 600)
_CONTROL = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {0x7F: 0x2421} | {code: 0xFFFD for code in range(0x80, 0xA0)}
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
    """One split. names, tokens, answer_tokens: one a record; rejected: rows by reason; findings: by what was found."""

    name: str
    columns: tuple[str, ...] = ()
    form: str = ""
    rejected: int = 0
    names: list[str] = field(default_factory=list)
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
    # What is wrong is to be shown, so nothing is fatal, and no row is left out for its length.
    dataset = resolved.config.dataset.model_copy(update={"strict": False})
    tokenizer = load_tokenizer(resolved.config.model)
    source = open_source(dataset, ensure_built(resolved) if dataset.name == "embedded" else None)
    limit = resolved.config.model.max_seq_length
    splits, signatures = [], []
    for split_name in source.splits():
        split = Split(split_name, source, dataset, resolved.config.training.seed, split_name)
        survey, signed = _survey_split(split, tokenizer, resolved, limit)
        splits.append(survey)
        signatures.append(signed)
    crossing: dict[str, Finding] = {}
    _find_duplicates(np.concatenate(signatures), splits, crossing)
    notes = [f"{path}: names no split, not read" for path in getattr(source, "ignored", [])]
    if dataset.train_split in source.splits() and dataset.validation_split not in source.splits():
        notes.append(f"no {dataset.validation_split} split: a tenth of {dataset.train_split} would be held out, near-duplicates together")
    return Survey(dataset.name, limit, splits, crossing, notes)


def printable(text: str) -> str:
    """Text with control characters made visible, so that data cannot steer a terminal."""
    return text.translate(_CONTROL)


def _survey_split(split: Split, tokenizer: Any, resolved: Resolved, limit: int) -> tuple[SplitSurvey, np.ndarray]:
    """A split's numbers and findings, and the signatures of its questions."""
    survey = SplitSurvey(split.name)
    special = [token for token in tokenizer.all_special_tokens if len(token) > 2]

    def note(row: Row, reason: Rejected) -> None:
        survey.find(f"rejected: {reason.reason}", row.place.rpartition("/")[2])

    def records() -> Iterator[Record]:
        for record in split.every():
            _look_at(survey, record, special)
            yield record

    def questions() -> Iterator[str]:
        for row in encode(records(), tokenizer, resolved, NO_LIMIT):
            survey.names.append(row.record.id)
            survey.tokens.append(row.tokens)
            survey.answer_tokens.append(row.answer)
            if row.tokens > limit:
                survey.find(f"over {limit} tokens", f"{row.record.id} ({row.tokens})")
            yield duplicates.question_of(row.record)

    with RejectedList(split, Path(resolved.config.training.output_dir) / "data" / f"rejected-{split.name}.jsonl", note=note):
        signed = duplicates.build_signatures(questions())
    survey.form, survey.columns, survey.rejected = " and ".join(split.forms), split.columns, split.rejected.total()
    return survey, signed


def choose_dataset(resolved: Resolved, name: str | None) -> Resolved:
    """The config with another dataset in it; columns and the like that a file sets for the configured one do not carry over."""
    if name is None or name == resolved.config.dataset.name:
        return resolved
    own = {key: getattr(DatasetConfig(), key) for key in ("columns", "revision", "config_name")
           if not resolved.origins.get(f"dataset.{key}", "").startswith("--set")}
    dataset = resolved.config.dataset.model_copy(update={"name": name, **own})
    return type(resolved)(resolved.config.model_copy(update={"dataset": dataset}), resolved.profile, resolved.profile_reason, resolved.origins)


def _look_at(survey: SplitSurvey, record: Record, special: Sequence[str]) -> None:
    survey.categories[record.category] += bool(record.category)
    survey.roles[record.role] += bool(record.role)
    parsed = read_answer(record.output)
    form = "JSON" if record.output.lstrip().startswith("{") else "text"
    survey.answers[f"four sections as {form}" if parsed.valid else "other"] += 1
    if not parsed.valid:
        survey.find("answer without the four sections", f"{record.id} ({parsed.problems[0]})")
    text = "\n".join((record.instruction, record.input, record.output))
    for what, pattern in PERSONAL.items():
        if match := pattern.search(text):
            survey.find(what, f"{record.id} ({_mask(match.group())})")
    if found := [token for token in special if token in text]:
        survey.find("control token of the model in the text", f"{record.id} ({found[0]})")
    survey.languages[_language(record)] += 1


def _mask(secret: str) -> str:
    """Enough to find it in the file, not enough to use it."""
    return secret[:3] + "…" + secret[-2:] if len(secret) > 8 else secret[:2] + "…"


def _language(record: Record) -> str:
    import py3langid

    least, most = LANGUAGE_CHARACTERS
    text = f"{record.input or record.instruction} {record.output}"
    return py3langid.classify(text[:most])[0] if len(text) >= least else "too short to tell"


def _find_duplicates(signatures: np.ndarray, splits: list[SplitSurvey], crossing: dict[str, Finding]) -> None:
    """Questions that are the same or almost the same (directly or in a chain), within a split and across; each later row is named once."""
    names = [(split, name) for split in splits for name in split.names]
    same, near = duplicates.group_equals(signatures), duplicates.group(signatures)
    crowded = np.bincount(near, minlength=len(near))[near] > 1
    # For a question, the first row of each split that has it.
    same_first: dict[int, dict[str, str]] = defaultdict(dict)
    near_first: dict[int, dict[str, str]] = defaultdict(dict)
    for index in np.flatnonzero(crowded).tolist():
        split, name = names[index]
        equal, alike = same_first[same[index]], near_first[near[index]]
        for other in alike:
            what, earlier = ("same question", equal[other]) if other in equal else ("near-duplicate question", alike[other])
            if other == split.name:
                split.find(what, f"{name} as {earlier}")
            else:
                crossing.setdefault(f"{what} in {other} and {split.name}", Finding()).add(f"{name} as {earlier}")
        equal.setdefault(split.name, name)
        alike.setdefault(split.name, name)
