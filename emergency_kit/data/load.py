"""Loading: any source becomes a list of records, or one clear error that names the place.

In: `dataset` of the config: `embedded`, a Hub dataset, a folder with one JSONL file a split, or one
JSONL file. Out: `Record`s of a split. All sources yield `(place, row)` pairs to one mapping.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any, Iterator, Mapping

from emergency_kit.artifacts import hash_json
from emergency_kit.config import DatasetConfig, Resolved
from emergency_kit.data.build import ensure_built
from emergency_kit.data.format import Record
from emergency_kit.errors import DataError
from emergency_kit.knowledge.cards import load_cards
from emergency_kit.knowledge.retrieve import Retriever

Rows = Iterator[tuple[str, Mapping[str, Any]]]
HELD_OUT_SHARE = 0.1


def load_split(resolved: Resolved, split: str) -> list[Record]:
    """Records of `train`, `validation` or `test`, in source order.

    A missing validation split is held out of train by seed; a missing test split is the validation
    split; both are said aloud. Raises DataError with place and remedy for anything unreadable.
    """
    dataset = resolved.config.dataset
    names = {"train": dataset.train_split, "validation": dataset.validation_split, "test": dataset.test_split}
    source = _source(resolved)
    available = source.splits()
    if split == "test" and names["test"] not in available:
        print(f"{dataset.name} has no {names['test']} split: the validation split stands in for it", flush=True)
        split = "validation"
    if split in ("train", "validation") and names["validation"] not in available:
        return _held_out(source, names["train"], split, resolved)
    return _records(source, names[split], dataset)


def dataset_hash(records: list[Record]) -> str:
    """sha256 over the records, in order."""
    return hash_json([record.to_json() for record in records])


def _held_out(source: "_Folder | _Hub", train: str, split: str, resolved: Resolved) -> list[Record]:
    records = _records(source, train, resolved.config.dataset)
    if len(records) < 2:
        raise DataError(f"{resolved.config.dataset.name}: one record cannot be split into training and validation; add records")
    order = list(range(len(records)))
    random.Random(resolved.config.training.seed).shuffle(order)
    held = set(order[:max(1, round(len(records) * HELD_OUT_SHARE))])
    if split == "validation":
        print(f"{resolved.config.dataset.name} has no validation split: {len(held)} of {len(records)} training records are held out", flush=True)
    return [record for index, record in enumerate(records) if (index in held) == (split == "validation")]


def _source(resolved: Resolved) -> "_Folder | _Hub":
    name = resolved.config.dataset.name
    if name == "embedded":
        return _Folder(ensure_built(resolved))
    path = Path(name)
    looks_local = path.exists() or name.startswith((".", "/", "~")) or path.suffix in (".jsonl", ".json") or name.count("/") > 1
    return _Folder(path) if looks_local else _Hub(resolved.config.dataset)


class _Folder:
    """A folder with `<split>.jsonl` files, or one JSONL file, which is the training split."""

    def __init__(self, path: Path):
        if not path.exists():
            raise DataError(f"dataset {path}: no such file or folder; check dataset.name")
        self.path = path

    def splits(self) -> list[str]:
        return [file.stem for file in self.path.glob("*.jsonl")] if self.path.is_dir() else ["train"]

    def rows(self, split: str) -> Rows:
        path = self.path / f"{split}.jsonl" if self.path.is_dir() else self.path
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            raise DataError(f"dataset {path}: no such file; the folder has {', '.join(self.splits()) or 'no JSONL files'}") from None
        except OSError as error:
            raise DataError(f"dataset {path}: cannot be read ({error.strerror})") from None
        if not content.strip():
            raise DataError(f"dataset {path}: empty; expected one JSON object a line")
        for number, line in enumerate(content.split(b"\n"), 1):
            if not line.strip():
                continue
            place = f"{path}:{number}"
            try:
                row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except UnicodeDecodeError as error:
                raise DataError(f"{place}: not UTF-8 at byte {error.start} of the line; save the file as UTF-8") from None
            except (ValueError, RecursionError) as error:
                raise DataError(f"{place}: not a whole JSON object ({str(error)[:80]}); mend or remove the line") from None
            if not isinstance(row, dict):
                raise DataError(f"{place}: got {type(row).__name__}; expected a JSON object")
            yield place, row


class _Hub:
    """A dataset on the Hub, cached by the `datasets` library."""

    def __init__(self, dataset: DatasetConfig):
        from datasets import load_dataset
        from datasets.exceptions import DatasetsError

        try:
            self.data = load_dataset(dataset.name, revision=dataset.revision)
        except (DatasetsError, OSError, ValueError, ConnectionError) as error:
            first = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
            raise DataError(f"dataset {dataset.name}: cannot be loaded from the Hub ({first}); check the name, the network or HF_TOKEN, "
                            "or use a local JSONL file: --set dataset.name=FILE") from None
        self.name = dataset.name

    def splits(self) -> list[str]:
        return list(self.data)

    def rows(self, split: str) -> Rows:
        if split not in self.data:
            raise DataError(f"dataset {self.name}: no split {split!r}; it has {', '.join(self.data)}")
        for number, row in enumerate(self.data[split], 1):
            yield f"{self.name}/{split}:{number}", row


def _records(source: "_Folder | _Hub", split: str, dataset: DatasetConfig) -> list[Record]:
    cards = load_cards()
    retriever = Retriever(cards, dataset.top_k) if dataset.grounding == "cards" else None
    records: list[Record] = []
    for place, row in source.rows(split):
        record = read_record(place, row, dataset.columns)
        unknown = [card for card in record.cards if card not in cards]
        if unknown and retriever:
            raise DataError(f"{place}: card {unknown[0]!r} is not among the knowledge cards")
        if retriever and not record.cards and "cards" not in row:
            found = tuple(hit.card_id for hit in retriever.find(record.input or record.instruction))
            record = Record(**{**vars(record), "cards": found})
        records.append(record)
    if not records:
        raise DataError(f"dataset {dataset.name}: split {split!r} has no records")
    return records


def read_record(place: str, row: Mapping[str, Any], columns: Mapping[str, str]) -> Record:
    """One row as a Record; `columns` maps field names to the row's column names.

    Raises DataError when a column is missing or mapped wrongly, or the answer is empty.
    """
    values: dict[str, Any] = {}
    for name in ("id", "category", "role", "instruction", "input", "output"):
        column = columns.get(name, name)
        if column not in row:
            if name in columns or name == "output":
                raise DataError(f"{place}: no column {column!r} for {name}; it has {', '.join(map(str, row))}. Next: set dataset.columns")
            continue
        value = row[column]
        if value is not None and not isinstance(value, (str, int)):
            raise DataError(f"{place}: column {column!r} holds {type(value).__name__}; expected text")
        values[name] = "" if value is None else str(value)
    for name in ("hazards", "cards", "sources"):
        value = row.get(name) or []
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise DataError(f"{place}: column {name!r} holds {value!r}; expected a list of texts")
        values[name] = tuple(value)
    values.setdefault("id", place)
    values.setdefault("input", "")
    record = Record(**values)
    if not record.output.strip():
        raise DataError(f"{place}: record {record.id}: the answer ({columns.get('output', 'output')}) is empty; mend or remove it")
    if not (record.input.strip() or record.instruction.strip()):
        raise DataError(f"{place}: record {record.id}: both input and instruction are empty or missing; mend or remove it")
    return record
