"""The dataset card: what the builder made, measured on what it made.

In: the records of the three splits. Out: Markdown with counts, shares of the hard cases, balance over
hazards, lengths, repetition (distinct 4-grams, near-duplicates by MinHash) and what only the test split has.
"""

from __future__ import annotations

from collections import Counter
from typing import Iterable, Mapping, Sequence

import numpy as np

from emergency_kit.data import duplicates
from emergency_kit.data.format import Record, read_answer
from emergency_kit.knowledge.cards import SAFE_MINIMUM, load_cards, normalise

NGRAM = 4
CROSSING_NGRAM = 8


def distinct_ngrams(texts: Iterable[str], length: int = NGRAM) -> float:
    """Distinct word n-grams over all word n-grams; 1 means that none comes twice."""
    seen: Counter[str] = Counter()
    for text in texts:
        seen.update(ngrams(text, length))
    return len(seen) / max(1, seen.total())


def ngrams(text: str, length: int) -> list[str]:
    """Runs of `length` words of the normalised text."""
    words = normalise(text).split()
    return [" ".join(words[start:start + length]) for start in range(len(words) - length + 1)]


def hard_cases(records: Sequence[Record]) -> dict[str, int]:
    """How many records hold each hard case; a record can hold several."""
    counts: Counter[str] = Counter()
    for record in records:
        counts["an action is impossible"] += ", step " in record.output and " changes." in record.output
        counts["somebody contradicts the card"] += "Do not follow the advice" in record.output
        counts["a country's own emergency number"] += bool(record.country)
        counts["two cards that both apply"] += len(record.hazards) > 1
        if record.cards is None:
            continue
        shown, right = set(record.cards), [hazard for hazard in record.hazards if hazard != SAFE_MINIMUM]
        counts["the right card alone"] += len(right) == 1 and shown == set(right)
        counts["the right card among others"] += bool(right) and set(right) < shown
        counts["a wrong card only: the answer must not follow it"] += bool(shown) and not shown & set(right)
        counts["no card: the safe minimum"] += not shown
    return dict(counts)


def crossings(records: Mapping[str, Sequence[Record]]) -> list[str]:
    """Texts of the test or validation split that say almost the same as a training text, or share 8 words in a row with one."""
    train = list(records["train"])
    seen = {gram for record in train for gram in ngrams(record.input, CROSSING_NGRAM)}
    found = [f"{record.id}: {gram!r}" for split in ("validation", "test") for record in records[split]
             for gram in ngrams(record.input, CROSSING_NGRAM) if gram in seen]
    every = [(split, record) for split, items in records.items() for record in items]
    pairs = duplicates.similar_pairs(duplicates.build_signatures(record.input for _, record in every))
    found += [f"{every[first][1].id} and {every[second][1].id} are near-duplicates" for first, second in pairs
              if "train" in (every[first][0], every[second][0]) and every[first][0] != every[second][0]]
    return found


def describe(records: Mapping[str, Sequence[Record]], seed: int) -> str:
    """The dataset card as Markdown."""
    every = [record for items in records.values() for record in items]
    trained = {hazard for record in records["train"] for hazard in record.hazards}
    tested = {hazard for record in records["test"] for hazard in record.hazards}
    roles = {split: {record.role for record in items} for split, items in records.items()}
    pairs = {split: {record.hazards for record in items if len(record.hazards) > 1} for split, items in records.items()}
    repeated = Counter(record.output for record in every).most_common(1)[0][1]
    near = {split: _near_duplicate_share(items) for split, items in records.items()}
    lines = [
        "# The embedded dataset", "",
        f"Built from {len(load_cards())} knowledge cards and hand-written situations with seed {seed}: "
        + ", ".join(f"{len(items)} {split}" for split, items in records.items()) + f", {len(every)} records in all. "
        "English. Licence: Apache-2.0, as the project. No text comes from another dataset.", "",
        "Every record is a JSON object: id, category, role, instruction, input (what is reported), output (the answer), hazards (cards that "
        "the answer must follow), cards (cards that the prompt shows, in order), fits (how many of them, from the first, are shown as fitting), "
        "lacks (what is missing on the spot), country, sources.", "",
        "Every answer was held to the cards that it follows when it was built: all critical actions, no never-rule broken, no number of its own.", "",
        "## Hard cases", "", "| case | " + " | ".join(records) + " |", "|---|" + "---|" * len(records)]
    cases = {split: hard_cases(items) for split, items in records.items()}
    lines += [f"| {case} | " + " | ".join(f"{cases[split][case] / max(1, len(records[split])):.1%}" if case in cases[split] else "-" for split in records) + " |" for case in cases["train"]]
    lines += ["", "Test records name no cards: when they are loaded they get what retrieval finds, right or wrong, as in use.", "",
              "## What only the test split has", "",
              f"- Hazards ({len(tested - trained)} of {len(tested | trained)}, {len(tested - trained) / len(tested | trained):.0%}): {', '.join(sorted(tested - trained))}.",
              f"- Roles: {', '.join(sorted(roles['test'] - roles['train'] - roles['validation']))}.",
              f"- Hazards together: {', '.join(' and '.join(pair) for pair in sorted(pairs['test'] - pairs['train']))}.", "",
              f"Splits are by situation. Texts that cross from train into validation or test (near-duplicates, or {CROSSING_NGRAM} words in a row): {len(crossings(records))}.", "",
              "## Repetition", "", "| | " + " | ".join(records) + " |", "|---|" + "---|" * len(records),
              f"| distinct {NGRAM}-grams of the situations | " + " | ".join(f"{distinct_ngrams(r.input for r in items):.1%}" for items in records.values()) + " |",
              f"| situations with a near-duplicate (similarity {duplicates.SIMILAR}) | " + " | ".join(f"{near[split]:.1%}" for split in records) + " |", "",
              f"The most frequent answer stands in {repeated} of {len(every)} records ({repeated / len(every):.2%}).", "",
              "## Lengths in words", "", "| | least | 10 % | median | 90 % | most |", "|---|---|---|---|---|---|",
              _lengths("situation", (record.input for record in every)), _lengths("answer", (record.output for record in every)),
              _lengths("facts", (" ".join(read_answer(record.output).answer.facts) for record in every)), "",
              "## Records per hazard", "", "| hazard | " + " | ".join(records) + " |", "|---|" + "---|" * len(records)]
    per = {split: Counter("+".join(record.id.split("/")[0].split("+")) for record in items) for split, items in records.items()}
    lines += [f"| {hazard} | " + " | ".join(str(per[split][hazard]) for split in records) + " |" for hazard in sorted(set().union(*per.values()))]
    lines += ["", "## Roles", "", ", ".join(f"{role} {count}" for role, count in Counter(record.role for record in every).most_common()) + "."]
    return "\n".join(lines) + "\n"


def _near_duplicate_share(records: Sequence[Record]) -> float:
    pairs = duplicates.similar_pairs(duplicates.build_signatures(record.input for record in records))
    return len(np.unique(pairs)) / max(1, len(records))


def _lengths(name: str, texts: Iterable[str]) -> str:
    words = [len(text.split()) for text in texts]
    marks = np.percentile(words, [0, 10, 50, 90, 100])
    return f"| {name} | " + " | ".join(f"{mark:.0f}" for mark in marks) + " |"
