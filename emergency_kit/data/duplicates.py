"""Near-duplicates: which texts of a data set say almost the same, by MinHash (Broder 1997).

In: texts. Out: a group number for each; texts of one group are near-duplicates, directly or in a chain.
Signatures come from `rensa` (Rust; a pure Python one takes longer than tokenising). Memory is SIGNATURE x 4
bytes a text. Limits: an estimate; the share of equal signature values is the Jaccard similarity of the texts'
word triples give or take 0.06. In scripts that put no space between words only texts that are the same are found.
"""

from __future__ import annotations

import re
from array import array
from typing import Iterable, Iterator

import numpy as np
from rensa import RMinHash

from emergency_kit.data.format import Record

SIGNATURE = 64
# Texts of similarity 0.7 share one of the 21 bands of three values with probability 0.9998.
BAND = 3
# Word triples shared by two texts, of all that either has, from which on they count as almost the same.
SIMILAR = 0.7
# A split must not be crossed by a pair that the estimate takes for a little less alike than it is.
SAFELY_SIMILAR = 0.6
SHINGLE_WORDS = 3
# Texts of one band are compared with so many that sort next to them.
_REACH = 16
_SEED = 20
_WORD = re.compile(r"\w+")


def question_of(record: Record) -> str:
    """What a record is compared by: its input; the instruction weighs as one word beside it, since many records share one."""
    if not record.input.strip():
        return record.instruction
    return f"{record.input} {'_'.join(_WORD.findall(record.instruction))}"


def build_signatures(texts: Iterable[str], batch: int = 1024) -> np.ndarray:
    """MinHash signatures, uint32, shape (texts, SIGNATURE)."""
    values = array("I")  # grows in place, where joining parts would hold all of them twice
    for chunk in _chunks(texts, batch):
        values.frombytes(np.asarray(RMinHash.digests_from_token_sets(chunk, SIGNATURE, _SEED), np.uint32).tobytes())
    return np.frombuffer(values, np.uint32).reshape(-1, SIGNATURE)


def _chunks(texts: Iterable[str], size: int) -> Iterator[list[list[str]]]:
    chunk: list[list[str]] = []
    for text in texts:
        words = _WORD.findall(text.lower())
        chunk.append([" ".join(words[start:start + SHINGLE_WORDS]) for start in range(max(1, len(words) - SHINGLE_WORDS + 1))])
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def group(signatures: np.ndarray, similar: float = SIMILAR) -> np.ndarray:
    """Group number of each text, int64 (texts,): the index of the group's first text.

    Candidates that a chain has joined already are not compared again, so a crowd of alike texts costs little.
    """
    first, place = np.unique(group_equals(signatures), return_inverse=True)
    distinct = signatures if len(first) == len(signatures) else signatures[first]
    parent = np.arange(len(first))
    for one, other in _candidates(distinct):
        apart = parent[one] != parent[other]
        pairs = _alike(distinct, one[apart], other[apart], similar)
        for left, right in pairs.tolist():
            low, high = sorted((_root(parent, left), _root(parent, right)))
            parent[high] = low
        while len(pairs) and (parent != (above := parent[parent])).any():
            parent = above
    return first[parent][place]


def similar_pairs(signatures: np.ndarray, similar: float = SIMILAR) -> np.ndarray:
    """Pairs `(earlier, later)` of texts that are alike, int64 (pairs, 2), for small sets: a crowd of alike texts makes many.

    Of texts with equal signatures each later one is paired with the first alone.
    """
    same = group_equals(signatures)
    twins = np.flatnonzero(same != np.arange(len(same)))
    first = np.unique(same)
    distinct = signatures[first]
    found = [np.stack([same[twins], twins], 1)]
    found += [first[_alike(distinct, one, other, similar)] for one, other in _candidates(distinct)]
    return np.unique(np.sort(np.concatenate(found), 1), axis=0)


def group_equals(signatures: np.ndarray) -> np.ndarray:
    """Index of the first text with the same signature, int64 (texts,): the same words in the same order, all but surely."""
    _, first, place = np.unique(_key(signatures, 0, SIGNATURE), return_index=True, return_inverse=True)
    return first[place]


def _candidates(signatures: np.ndarray, chunk: int = 1 << 17) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Texts that share a band (locality-sensitive hashing) and are at most _REACH apart within it."""
    keys = [_key(signatures, start, start + BAND) for start in range(0, SIGNATURE - BAND + 1, BAND)]
    for key, following in zip(keys, [*keys[1:], *keys[:1]]):
        # Within a band alike texts sort next to each other by the band that follows.
        order = np.lexsort((following, key))
        key = key[order]
        for distance in range(1, _REACH + 1):
            near = np.flatnonzero(key[:-distance] == key[distance:])
            if not len(near):
                break
            for start in range(0, len(near), chunk):
                places = near[start:start + chunk]
                yield order[places], order[places + distance]


def _key(signatures: np.ndarray, start: int, end: int) -> np.ndarray:
    """One uint64 for some values of each signature, the same for the same values and all but surely for no others."""
    key = np.zeros(len(signatures), np.uint64)
    for column in range(start, end):
        key = (key ^ signatures[:, column]) * np.uint64(0x9E3779B97F4A7C15)
        key ^= key >> np.uint64(29)
    return key


def _alike(signatures: np.ndarray, one: np.ndarray, other: np.ndarray, similar: float) -> np.ndarray:
    alike = (signatures[one] == signatures[other]).mean(1) >= similar if len(one) else np.zeros(0, bool)
    return np.stack([one[alike], other[alike]], 1)


def _root(parent: np.ndarray, index: int) -> int:
    while parent[index] != index:
        parent[index] = parent[parent[index]]
        index = int(parent[index])
    return index
