"""The measurer measured: how well `examine` finds what people found, on sentences and answers labelled by hand.

In: `measurer/sentences.yaml` and `measurer/answers.yaml` (labels made before the patterns were tuned; the sha256 of an
id decides its half; patterns were tuned on the development half alone). Out: `measurer/figures.yaml`, which the report
prints beside every rate. Limits: one author wrote cards' patterns, sentences and labels; wordings that he thinks
of in neither stay unmeasured. Run: `make measurer`, or `python -m emergency_kit.evaluation.measurer [--show]`.
"""

from __future__ import annotations

import functools
import hashlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Iterator, Mapping

import yaml

from emergency_kit.artifacts import save_text
from emergency_kit.errors import DataError
from emergency_kit.knowledge.cards import Card, load_cards
from emergency_kit.knowledge.rules import examine

FOLDER = Path(__file__).parent / "measurer"
FIGURES_FILE = FOLDER / "figures.yaml"
HALVES = ("development", "test")
_STANCES = {"a": "affirmed", "w": "warned", "s": "silent"}


@dataclass(frozen=True)
class Pair:
    """One label: what a person found of one line of a card in one text, and what `examine` finds.

    source: "sentences" or "answers"; kind: "never" or "action"; wanted, found: the line is affirmed or given.
    """

    id: str
    source: str
    kind: str
    text: str
    wanted: bool
    found: bool

    @property
    def half(self) -> str:
        """Decided by the id of the text alone, so that labels added later move none."""
        return half_of(self.id.partition("#")[0])


def half_of(name: str) -> str:
    """"development" or "test"."""
    return HALVES[hashlib.sha256(name.encode()).digest()[0] % 2]


def sentence_pairs(cards: Mapping[str, Card] | None = None) -> Iterator[Pair]:
    """Every labelled sentence; raises DataError for one that names no line of its card."""
    cards = cards or load_cards()
    for card_id, rows in _load("sentences.yaml").items():
        for place, row in enumerate(rows):
            (key, text), = row.items()
            key, name = str(key), f"{card_id}/{key}/{place}"
            found = examine(text, [cards[card_id]])
            try:
                if key.startswith("A"):
                    yield Pair(name, "sentences", "action", text, key[-1] == "y", found.actions[int(key[1:-1]) - 1].given)
                else:
                    yield Pair(name, "sentences", "never", text, _STANCES[key[-1]] == "affirmed", found.rules[int(key[:-1]) - 1].stance == "affirmed")
            except (ValueError, IndexError, KeyError):
                raise DataError(f"{FOLDER / 'sentences.yaml'}: {name}: the key names no line of the card") from None


def answer_pairs(cards: Mapping[str, Card] | None = None) -> Iterator[Pair]:
    """Every line of the card of every labelled answer."""
    cards = cards or load_cards()
    for row in _load("answers.yaml"):
        card = cards[row["card"]]
        found = examine(row["text"], [card])
        for number, rule in enumerate(found.rules, 1):
            yield Pair(f"{row['id']}#N{number}", "answers", "never", row["text"], number in row["affirmed"], rule.stance == "affirmed")
        for number, action in enumerate(found.actions, 1):
            yield Pair(f"{row['id']}#A{number}", "answers", "action", row["text"], number in row["given"], action.given)


def _load(name: str) -> Any:
    path = FOLDER / name
    try:
        return yaml.load(path.read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise DataError(f"{path}: cannot be read as YAML: {' '.join(str(error).split())}") from None


def measure_matcher() -> dict[str, Any]:
    """Counts, precision, recall and specificity by source, kind and half; shares run from 0 to 1, rounded to 4 places."""
    counts: dict[tuple[str, str, str], list[int]] = {}
    for pair in (*sentence_pairs(), *answer_pairs()):
        cell = counts.setdefault((pair.source, pair.kind, pair.half), [0, 0, 0, 0])
        cell[(0 if pair.found else 1) if pair.wanted else (2 if pair.found else 3)] += 1
    figures: dict[str, Any] = {}
    for source in ("sentences", "answers"):
        for kind in ("never", "action"):
            for half in HALVES:
                hits, misses, false_alarms, clears = counts.get((source, kind, half), [0, 0, 0, 0])
                figures.setdefault(source, {}).setdefault(kind, {})[half] = {
                    "labelled": hits + misses, "found": hits, "missed": misses, "false_alarms": false_alarms, "cleared": clears,
                    "precision": _share(hits, hits + false_alarms), "recall": _share(hits, hits + misses), "specificity": _share(clears, clears + false_alarms)}
    return figures


def _share(part: int, whole: int) -> float | None:
    return round(part / whole, 4) if whole else None


@functools.lru_cache(maxsize=1)
def load_figures() -> Mapping[str, Any]:
    """The stored figures, as `measure_matcher` gives them."""
    return _load("figures.yaml")


def correct_rate(rate: float, kind: str = "never", source: str = "answers") -> float | None:
    """A rate of flags corrected for what the matcher misses and makes up (Rogan and Gladen 1978), 0 to 1.

    rate: share of flagged lines. kind: "never" or "action". None where sensitivity and specificity cannot carry it.
    """
    figures = load_figures()[source][kind]["test"]
    if figures["recall"] is None or figures["specificity"] is None or figures["recall"] + figures["specificity"] <= 1:
        return None
    return min(1.0, max(0.0, (rate + figures["specificity"] - 1) / (figures["recall"] + figures["specificity"] - 1)))


def main(arguments: list[str]) -> None:
    """Measure, print, and store; --show lists what is wrong on the development half."""
    figures = measure_matcher()
    if "--show" in arguments:
        for pair in (*sentence_pairs(), *answer_pairs()):
            if pair.half == HALVES[0] and pair.wanted != pair.found:
                print(f"{pair.id}: labelled {pair.wanted}, found {pair.found}: {pair.text if pair.source == 'sentences' else ''}")
    for source, kinds in figures.items():
        for kind, halves in kinds.items():
            for half, cell in halves.items():
                print(f"{source:9} {kind:6} {half:11} precision {cell['precision']} recall {cell['recall']} ({cell['found']} of {cell['labelled']}, {cell['false_alarms']} false alarms)")
    save_text(FIGURES_FILE, "# Written by `make measurer`; read by the report. Shares from 0 to 1.\n" + yaml.safe_dump(figures, sort_keys=False))


if __name__ == "__main__":
    main(sys.argv[1:])
