"""Loading: a split of any source as a stream of records, with nothing lost silently.

In: `dataset` of the config. Out: a `Split`, which can be read any number of times, in the same order.
Rows that cannot become a record are counted by reason and listed in a file; `dataset.strict` makes the
first of them fatal. Memory: none that grows, but 9 bytes a record where a split is sampled, and some
300 (a MinHash signature) where a validation split is held out.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Callable, Iterable, Iterator

import numpy as np

from emergency_kit.artifacts import hash_json
from emergency_kit.config import DatasetConfig, Resolved
from emergency_kit.data.build import ensure_built
from emergency_kit.data.columns import MAP_THEM, SUPPORTED, Form, Rejected, recognise
from emergency_kit.data.format import Record
from emergency_kit.data.formats import Row
from emergency_kit.data.grounding import grounding
from emergency_kit.data.rejected import RejectedList, describe_rejected
from emergency_kit.data.sources import Files, Hub, open_source
from emergency_kit.errors import DataError
from emergency_kit.knowledge.cards import card_digest, load_cards
from emergency_kit.knowledge.emergency_numbers import load_numbers
from emergency_kit.knowledge.index import cue_digest

HELD_OUT_SHARE = 0.1
# Rows that are looked at before the first is read: a form that none of them has is an error of the whole file.
LOOK_AHEAD = 100


@dataclass
class Split:
    """Records of one split, read from the source at each iteration.

    held_out: `validation` or `train` where both are made from the training rows. said: lines that were
    printed about it. forms: what its rows were read as. columns: of the first rows. rejected: counts by reason of the last reading.
    """

    name: str
    source: Files | Hub
    dataset: DatasetConfig
    seed: int
    source_split: str
    held_out: str = ""
    limit: int | None = None
    said: list[str] = field(default_factory=list)
    forms: list[str] = field(default_factory=list)
    columns: tuple[str, ...] = ()
    rejected: Counter[str] = field(default_factory=Counter)
    on_rejected: Callable[[Row, Rejected], None] | None = None
    _kept: np.ndarray | None = None

    def digest(self) -> str:
        """sha256 of all that decides which records this split has and which cards they show."""
        dataset = self.dataset
        grounded = [card_digest(load_cards()), cue_digest(), dataset.top_k] if dataset.grounding == "cards" else []
        return hash_json([self.source.digest(self.source_split), dict(dataset.columns), dataset.grounding, grounded, self.held_out, self.limit,
                          self.seed if self.held_out or self.limit else None])

    def __iter__(self) -> Iterator[Record]:
        """Records of this split with their cards; raises DataError where there is none."""
        return map(grounding(self.dataset), self.chosen())

    def chosen(self) -> Iterator[Record]:
        """The same without the cards that retrieval finds."""
        kept = self._select()
        count = 0
        for count, record in enumerate(self._read(), 1):
            if kept is None or count <= len(kept) and kept[count - 1]:
                yield record
        if kept is not None and count != len(kept):
            raise DataError(f"dataset {self.source.name}: changed while it was read; run again")
        if not count:
            raise self._no_records()

    def every(self) -> Iterator[Record]:
        """All records that the source's split has, with their cards, and no error where there is none."""
        yield from map(grounding(self.dataset), self._read())

    def _read(self, quiet: bool = False) -> Iterator[Record]:
        """Records of all rows that can become one. quiet: nothing is printed, counted or listed."""
        rows = self.source.rows(self.source_split)
        head = list(islice(rows, LOOK_AHEAD))
        self._look_at(head)
        self.rejected.clear()
        yield from self.records(chain(head, rows), quiet)

    def look(self, rows: Iterable[Row]) -> None:
        """Raise DataError where the first of these rows have no known form."""
        self._look_at(list(islice(rows, LOOK_AHEAD)))

    def records(self, rows: Iterable[Row], quiet: bool = False) -> Iterator[Record]:
        """Records of these rows, one after the other; `rejected` counts on."""
        forms: dict[tuple[str, ...], Form | None] = {}
        check = _card_check(self.dataset)
        for row in rows:
            try:
                record = check(self._build(row, forms, quiet))
            except Rejected as reason:
                if self.dataset.strict:
                    raise DataError(f"{row.place}: {reason}; mend or remove it (dataset.strict makes it fatal)") from None
                self.rejected[reason.reason] += 1
                if self.on_rejected and not quiet:
                    self.on_rejected(row, reason)
            else:
                yield record

    def _look_at(self, head: list[Row]) -> None:
        readable = [row for row in head if not row.problem]
        if not readable:
            return
        self.columns = tuple(dict.fromkeys(str(name) for row in readable for name in row.value))
        has = ", ".join(self.columns)
        for name, column in self.dataset.columns.items():
            if column not in self.columns:
                raise DataError(f"{readable[0].place}: no column {column!r}, which dataset.columns names for {name}; it has {has}. Next: set dataset.columns")
        if not any(recognise(tuple(row.value), self.dataset.columns) for row in readable):
            raise DataError(f"{readable[0].place}: columns {has} are no known form ({SUPPORTED}). {MAP_THEM}")

    def _build(self, row: Row, forms: dict[tuple[str, ...], Form | None], quiet: bool) -> Record:
        if row.problem:
            reason, _, detail = row.problem.partition(" (")
            raise Rejected(reason, detail.removesuffix(")"))
        names = tuple(row.value)
        if names not in forms:
            forms[names] = recognise(names, self.dataset.columns)
        form = forms[names]
        if form is None:
            raise Rejected("columns of no known form", ", ".join(names))
        if not quiet and form.name not in self.forms:
            self._say_form(form, row)
        return form.build(row.value, row.place)

    def _say(self, line: str) -> None:
        self.said.append(line)
        print(line, flush=True)

    def _say_form(self, form: Form, row: Row) -> None:
        unread = [name for name in self.columns if name not in form.columns] if not self.forms else []
        what = f"from {row.place} on also" if self.forms else f"{self.source.describe(self.source_split)}"
        self.forms.append(form.name)
        self._say(f"{self.name}: {what} read as {form}" + (f"; columns not read: {', '.join(unread)}" if unread else ""))

    def _no_records(self) -> DataError:
        why = f"; all {self.rejected.total()} rows were rejected ({describe_rejected(self.rejected)})" if self.rejected else ""
        return DataError(f"dataset {self.source.name}: split {self.source_split!r} has no records{why}. Next: emergency-kit data inspect {self.source.name}")

    def _select(self) -> np.ndarray | None:
        """Which records of the source's split belong to this one, bool (records,); None for all of them."""
        if self._kept is not None or not (self.held_out or self.limit):
            return self._kept
        if self.source_split not in self.source.groups:
            self.source.groups[self.source_split] = self._measure()
        categories, groups = self.source.groups[self.source_split]
        chance = np.random.default_rng(self.seed)
        kept = np.ones(len(categories), bool)
        if self.held_out:
            assert groups is not None
            held = _hold_out(groups, chance)
            kept = held if self.held_out == "validation" else ~held
            if not kept.any():
                raise DataError(f"dataset {self.source.name}: {len(groups)} records that say the same cannot be split into training and validation; "
                                "add records, or a validation split")
        if self.limit is not None and self.limit < kept.sum():
            self._say(f"{self.name}: {self.limit} of {kept.sum()} records drawn{', the categories in turn' if len(np.unique(categories)) > 1 else ''} (seed {self.seed})")
            kept = _sample(kept, categories, self.limit, chance)
        self._kept = kept
        return kept

    def _measure(self) -> tuple[np.ndarray, np.ndarray | None]:
        """`(category, near-duplicate group)` of each record of the source's split, as numbers; no groups where none are needed."""
        from emergency_kit.data import duplicates

        numbers: dict[str, int] = {}
        categories: list[int] = []

        def texts() -> Iterator[str]:
            for record in self._read(quiet=True):
                categories.append(numbers.setdefault(record.category, len(numbers)))
                yield duplicates.question_of(record)

        groups = duplicates.group(duplicates.build_signatures(texts()), duplicates.SAFELY_SIMILAR) if self.held_out else None
        for _ in texts() if groups is None else ():
            pass
        if not categories:
            raise self._no_records()
        return np.asarray(categories, np.int32), groups


def _hold_out(groups: np.ndarray, chance: np.random.Generator) -> np.ndarray:
    """A tenth of the records, whole groups only, so that no near-duplicate crosses."""
    names, sizes = np.unique(groups, return_counts=True)
    wanted = max(1, round(len(groups) * HELD_OUT_SHARE))
    order = chance.permutation(len(names))
    order = order[sizes[order] <= wanted]
    taken = order[np.cumsum(sizes[order]) <= wanted]
    # Where every group is over a tenth, the smallest one is held out.
    return np.isin(groups, names[taken] if len(taken) else names[[np.argmin(sizes)]])


def _sample(kept: np.ndarray, categories: np.ndarray, limit: int, chance: np.random.Generator) -> np.ndarray:
    """`limit` of the kept records after shuffling, the categories in turn until they run out."""
    order = chance.permutation(np.flatnonzero(kept))
    turn = np.zeros(len(order), np.int64)
    for category in np.unique(categories[order]):
        places = np.flatnonzero(categories[order] == category)
        turn[places] = np.arange(len(places))
    chosen = order[np.argsort(turn, kind="stable")[:limit]]
    return np.isin(np.arange(len(kept)), chosen)


def _card_check(dataset: DatasetConfig) -> Callable[[Record], Record]:
    """What rejects records that name a card or a country that there is not."""
    if dataset.grounding != "cards":
        return lambda record: record
    cards, countries = load_cards(), load_numbers()

    def check(record: Record) -> Record:
        for card in record.cards or ():
            if card not in cards:
                raise Rejected("unknown card", card)
        if record.country and record.country.upper() not in countries:
            raise Rejected("unknown country code", record.country)
        return record

    return check


def open_split(resolved: Resolved, split: str) -> Split:
    """The split `train`, `validation` or `test`, with `max_samples` and `max_eval_samples` applied to the first two."""
    return open_splits(resolved, split)[split]


def open_splits(resolved: Resolved, *names: str) -> dict[str, Split]:
    """Several splits of one source, which is opened once.

    A missing validation split is held out of train; a missing test split is the validation split;
    both are said aloud. Raises DataError for a source that is not there.
    """
    dataset = resolved.config.dataset
    source = open_source(dataset, ensure_built(resolved) if dataset.name == "embedded" else None)
    return {name: _choose(source, dataset, resolved.config.training.seed, name) for name in names}


def _choose(source: Files | Hub, dataset: DatasetConfig, seed: int, split: str) -> Split:
    names = {"train": dataset.train_split, "validation": dataset.validation_split, "test": dataset.test_split}
    limits = {"train": dataset.max_samples, "validation": dataset.max_eval_samples, "test": None}
    available = source.splits()
    limit = limits[split]
    if dataset.streaming and split in ("train", "validation") and names["validation"] not in available:
        raise DataError(f"dataset.streaming: {dataset.name} has no {names['validation']} split, and none can be held out of a stream; name another with "
                        "dataset.validation_split, put a file of that name beside it, or prepare the data beforehand (dataset.streaming=false)")
    if split == "test" and names["test"] not in available:
        print(f"{dataset.name} has no {names['test']} split: the validation split stands in for it", flush=True)
        split = "validation"
    if split in ("train", "validation") and names["validation"] not in available:
        if split == "validation":
            print(f"{dataset.name} has no {names['validation']} split: a tenth of its {names['train']} records is held out, "
                  f"near-duplicates together (seed {seed})", flush=True)
        return Split(split, source, dataset, seed, names["train"], held_out=split, limit=limit)
    return Split(split, source, dataset, seed, names[split], limit=limit)


def load_split(resolved: Resolved, split: str) -> list[Record]:
    """All records of a split in memory; what was rejected is said aloud and listed under `<output_dir>/data/`."""
    stream = open_split(resolved, split)
    with RejectedList(stream, Path(resolved.config.training.output_dir) / "data" / f"rejected-{split}.jsonl"):
        return list(stream)


def dataset_hash(records: list[Record]) -> str:
    """sha256 over the records, in order."""
    return hash_json([record.to_json() for record in records])
