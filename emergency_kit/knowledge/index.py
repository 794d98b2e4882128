"""The index of retrieval: a linear model from the words of a scenario to the cards, fitted once.

In: cards, how strangers tell them (`cues/*.yaml`, the training `situations/*.yaml`). Out: an `Index` that
scores any text, kept under `models/` by a hash of all that it was fitted to, so a new or corrected card counts
at once. The model is ridge regression (Hoerl and Kennard 1970) from TF-IDF features, words, pairs of words
and pieces of words, to one column a card, one for "no card", and one for whether any card applies.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Iterable, Mapping, Sequence
from zipfile import BadZipFile

import numpy as np
import yaml

from emergency_kit.artifacts import hash_file, hash_json
from emergency_kit.config import REPOSITORY
from emergency_kit.errors import DataError
from emergency_kit.files import staged_file
from emergency_kit.knowledge.cards import SAFE_MINIMUM, Card, card_digest, normalise
from emergency_kit.knowledge.situations import load_situations

CUE_FOLDER = Path(__file__).parent / "cues"
INDEX_FOLDER = REPOSITORY / "models"
# Fitted models of so many sets of cards stay, the last used: whoever tries a changed card goes back to the cards as they were.
KEPT = 3
# Chosen on the development half of tests/knowledge/labelled_scenarios.yaml (benchmarks/RESULTS.md).
RIDGE = 0.7
NAME_WEIGHT, SIGN_WEIGHT, ADVICE_WEIGHT = 2.0, 1.0, 0.3
KIND = {"w": 1.0, "p": 0.8, "c": 0.5}  # words, pairs of neighbours, pieces of words
PIECE_LETTERS = (3, 4, 5)
MATCHED_WORDS = 6
# A feature of more documents than this is multiplied densely, one of fewer pair by pair; either alone takes longer.
OFTEN = 300
BLOCK = 512
STOPWORDS = frozenset(
    """a an the and or of to in on at is are was were be been it its it's i my me we our you your he his she her they them their this that
    there with for from so as but if do does did have has had just can what how now get got please help not no""".split())


@functools.lru_cache(maxsize=2)
def load_cues(folder: Path = CUE_FOLDER) -> dict[str, tuple[str, ...]]:
    """How people report each hazard, by card id; raises DataError for a file that is not well formed."""
    cues: dict[str, tuple[str, ...]] = {}
    for path in sorted(folder.glob("*.yaml")):
        try:
            content = yaml.load(path.read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
            for card_id, items in content.items():  # a second file adds to what the first has of a card
                cues[card_id] = (*cues.get(card_id, ()), *(str(cue) for cue in items))
        except (OSError, ValueError, yaml.YAMLError, AttributeError, TypeError) as error:
            raise DataError(f"{path}: not a table of cues by card ({' '.join(str(error).split())})") from None
    return cues


def _tellings() -> list[tuple[str, str]]:
    """`(card id, text)` of the hand-written training situations; those of the other splits measure the whole system."""
    return [(situation.hazards[0], text) for situation in load_situations() if situation.split == "train" and len(situation.hazards) == 1
            for _, text in situation.tellings]


@functools.cache
def cue_digest() -> str:
    """sha256 of all that retrieval learns from beside the cards."""
    return hash_json([load_cues(), _tellings()])


def stem(word: str) -> str:
    """A word without a plural, -ing, -ed or -ly ending, so that "burning", "burned" and "burns" meet."""
    for ending in ("ing", "ed", "es", "s", "ly"):
        if word.endswith(ending) and len(word) - len(ending) >= 3:
            return word[:-len(ending)]
    return word


def _features(words: Sequence[str]) -> list[str]:
    """What a text is known by: stems, pairs of neighbouring stems, and pieces of words, which survive slips."""
    stems = [stem(word) for word in words]
    features = [f"p:{first} {second}" for first, second in zip(stems, stems[1:])]
    for word, stemmed in zip(words, stems):
        if word not in STOPWORDS:
            features += _own_features(word, stemmed)
    return features


@functools.lru_cache(maxsize=50_000)
def _own_features(word: str, stemmed: str) -> tuple[str, ...]:
    marked = f"^{word}$"
    return (f"w:{stemmed}", *(f"c:{marked[start:start + length]}" for length in PIECE_LETTERS for start in range(len(marked) - length + 1)))


@dataclass(frozen=True)
class Index:
    """A fitted model. weights: float16 (features, cards + 2): a column a card, one for "no card", one for whether any applies. idf: float32."""

    card_ids: tuple[str, ...]
    features: dict[str, int]
    idf: np.ndarray
    weights: np.ndarray

    def score(self, words: Sequence[str]) -> np.ndarray:
        """Scores of a text, float32 (cards + 2,); zeros where no word is known."""
        places, values = _vector(_features(words), self.features, self.idf)
        return values @ self.weights[places].astype(np.float32)

    def speaking(self, words: Sequence[str], column: int) -> tuple[str, ...]:
        """The words that speak most for a card."""
        said: dict[str, float] = {}
        for word in dict.fromkeys(words):
            places = [self.features[name] for name in _own_features(word, stem(word)) if name in self.features] if word not in STOPWORDS else []
            said[word] = float((self.idf[places] * self.weights[places, column]).sum())
        return tuple(word for word in sorted(said, key=lambda word: -said[word])[:MATCHED_WORDS] if said[word] > 0)


def _vector(names: Iterable[str], features: Mapping[str, int], idf: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    counts = [(features[name], count) for name, count in Counter(names).items() if name in features]
    if not counts:
        return np.zeros(0, np.int64), np.zeros(0, np.float32)
    places, number = np.asarray(counts).T
    values = ((1 + np.log(number)) * idf[places]).astype(np.float32)
    return places, values / np.linalg.norm(values)


def _documents(cards: Mapping[str, Card]) -> list[tuple[str, str, float]]:
    """`(card id, text, weight)` of everything that is known about how a card is told."""
    cues = load_cues()
    found = [(card_id, text, 1.0) for card_id, text in _tellings() if card_id in cards]
    for card_id, card in cards.items():
        found += [(card_id, name, NAME_WEIGHT) for name in (card.name, *card.also_called)]
        found += [(card_id, sign, SIGN_WEIGHT) for sign in card.signs]
        found.append((card_id, " ".join((*card.dangers, *(action.text for action in card.critical_actions))), ADVICE_WEIGHT))
        found += [(card_id, cue, 1.0) for cue in cues.get(card_id, ())]
    return found


def _fit(cards: Mapping[str, Card]) -> Index:
    documents = _documents(cards)
    named = [_features(normalise(text).split()) for _, text, _ in documents]
    frequency = Counter(name for names in named for name in set(names))
    features = {name: place for place, name in enumerate(sorted(frequency))}
    idf = np.asarray([math.log(1 + len(documents) / frequency[name]) * KIND[name[0]] for name in features], np.float32)
    if not documents:
        return Index((), {}, idf, np.zeros((0, 2), np.float16))
    rows = [_vector(names, features, idf) for names in named]
    card_ids = tuple(card_id for card_id in cards if card_id != SAFE_MINIMUM)
    column = {card_id: place for place, card_id in enumerate((*card_ids, SAFE_MINIMUM))}
    owner = np.asarray([column[card_id] for card_id, _, _ in documents], np.int64)
    targets = np.zeros((len(documents), len(card_ids) + 2), np.float32)
    targets[np.arange(len(documents)), owner] = 1
    targets[:, -1] = np.where(owner == len(card_ids), -1, 1)
    dual = _solve(_gram(rows, [frequency[name] for name in features]), targets, np.asarray([weight for *_, weight in documents], np.float32))
    return Index(card_ids, features, idf, _unfold(rows, dual, len(features)))


def _gram(rows: list[tuple[np.ndarray, np.ndarray]], frequency: list[int]) -> np.ndarray:
    """Similarity of every two documents, float32 (documents, documents)."""
    number = len(rows)
    document = np.concatenate([np.full(len(places), row) for row, (places, _) in enumerate(rows)])
    place = np.concatenate([places for places, _ in rows])
    value = np.concatenate([values for _, values in rows])
    often = np.asarray(frequency) > OFTEN
    heavy = np.flatnonzero(often)
    dense = np.zeros((number, len(heavy)), np.float32)
    mask = often[place]
    dense[document[mask], np.searchsorted(heavy, place[mask])] = value[mask]
    gram = dense @ dense.T
    # Rare features touch few documents: their products are added pair by pair.
    order = np.argsort(place[~mask], kind="stable")
    document, place, value = document[~mask][order], place[~mask][order], value[~mask][order]
    starts = np.flatnonzero(np.r_[True, place[1:] != place[:-1]]) if len(place) else np.zeros(0, np.int64)
    sizes = np.diff(np.r_[starts, len(place)])
    flat = gram.ravel()
    for size in np.unique(sizes):
        block = starts[sizes == size][:, None] + np.arange(size)
        pairs = document[block][:, :, None] * number + document[block][:, None, :]
        products = value[block][:, :, None] * value[block][:, None, :]
        np.add.at(flat, pairs.ravel(), products.ravel())
    return gram


def _solve(gram: np.ndarray, targets: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Dual weights of weighted ridge regression, float32 (documents, columns); `gram` is overwritten."""
    root = np.sqrt(weight)[:, None]
    gram *= root
    gram *= root.T
    gram[np.diag_indices(len(gram))] += RIDGE
    # Cholesky by block columns, in place: all of it but the diagonal blocks is matrix products, several times faster here than LAPACK's own.
    blocks = [slice(start, min(start + BLOCK, len(gram))) for start in range(0, len(gram), BLOCK)]
    inverses = []
    for block in blocks:
        gram[block.start:, block] -= gram[block.start:, :block.start] @ gram[block, :block.start].T
        inverses.append(np.linalg.inv(np.linalg.cholesky(gram[block, block])))
        gram[block.stop:, block] = gram[block.stop:, block] @ inverses[-1].T
    solved = targets * root
    for block, inverse in zip(blocks, inverses):
        solved[block] = inverse @ (solved[block] - gram[block, :block.start] @ solved[:block.start])
    for block, inverse in zip(reversed(blocks), reversed(inverses)):
        solved[block] = inverse.T @ (solved[block] - gram[block.stop:, block].T @ solved[block.stop:])
    return root * solved


def _unfold(rows: list[tuple[np.ndarray, np.ndarray]], dual: np.ndarray, features: int) -> np.ndarray:
    """Weights of the features from those of the documents, float16 (features, columns): in half the bytes they find the same cards."""
    weights = np.zeros((features, dual.shape[1]), np.float32)
    for (places, values), own in zip(rows, dual):
        weights[places] += values[:, None] * own
    return weights.astype(np.float16)


@functools.lru_cache(maxsize=4)
def _code() -> str:
    return hash_file(Path(__file__))


_INDEXES: dict[str, Index] = {}


def _place(cards: Mapping[str, Card]) -> tuple[str, Path]:
    """`(key, file)` of the model that is fitted to these cards."""
    key = hash_json([card_digest(cards), list(cards), cue_digest(), _code()])[:24]
    return key, INDEX_FOLDER / f"retrieval-{key}.npz"


def adopt_index(cards: Mapping[str, Card], index: Index) -> None:
    """Keep a model that was fitted to these cards elsewhere, so that it is not fitted again."""
    _save_index(_place(cards)[1], index)


def load_index(cards: Mapping[str, Card]) -> Index:
    """The fitted model of these cards, from memory, from `models/`, or fitted now."""
    key, path = _place(cards)
    if key not in _INDEXES:
        index = _read_index(path)
        if index is None:
            print("Fitting retrieval to the cards and cues, once after a change (up to half a minute) ...", file=sys.stderr, flush=True)
            index = _fit(cards)
            _save_index(path, index)
        if len(_INDEXES) >= 8:
            _INDEXES.pop(next(iter(_INDEXES)))
        _INDEXES[key] = index
    return _INDEXES[key]


def _save_index(path: Path, index: Index) -> None:
    """Keep a fitted model; where the folder cannot be written the next process fits it again."""
    try:
        with staged_file(path) as temporary:
            with temporary.open("wb") as stream:
                np.savez(stream, card_ids=list(index.card_ids), features=np.frombuffer("\n".join(index.features).encode(), np.uint8), idf=index.idf, weights=index.weights)
        others = sorted((other for other in path.parent.glob("retrieval-*.npz") if other != path), key=lambda other: other.stat().st_mtime_ns)
        for other in others[:max(0, len(others) + 1 - KEPT)]:
            other.unlink(missing_ok=True)
    except OSError:
        return


def _read_index(path: Path) -> Index | None:
    try:
        with np.load(path) as stored:
            features = {name: place for place, name in enumerate(stored["features"].tobytes().decode().split("\n"))}
            index = Index(tuple(stored["card_ids"].tolist()), features, stored["idf"], stored["weights"])
        with contextlib.suppress(OSError):
            os.utime(path)  # what is used stays
        return index
    except (OSError, ValueError, KeyError, EOFError, BadZipFile):
        return None
