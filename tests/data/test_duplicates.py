"""Near-duplicates against exact Jaccard similarity, and groups that chains join."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emergency_kit.data.duplicates import SAFELY_SIMILAR, build_signatures, group, group_equals, question_of, similar_pairs
from emergency_kit.data.format import Record

WORDS = [f"word{number}" for number in range(2000)]


def jaccard(one: str, other: str) -> float:
    first, second = ({tuple(text.split()[start:start + 3]) for start in range(len(text.split()) - 2)} for text in (one, other))
    return len(first & second) / len(first | second)


def families(count: int, seed: int = 0) -> list[str]:
    """Texts in threes: one, one near it, one that shares little with it."""
    chance = random.Random(seed)
    texts = []
    for _ in range(count):
        words = chance.choices(WORDS, k=60)
        near, far = list(words), list(words)
        near[chance.randrange(60)] = "other"
        for place in range(0, 60, 4):
            far[place] = chance.choice(WORDS)
        texts += [" ".join(words), " ".join(near), " ".join(far)]
    return texts


def test_the_estimate_is_the_jaccard_similarity_of_word_triples() -> None:
    texts = families(200)
    signatures = build_signatures(texts)
    pairs = [(start, start + 1) for start in range(0, 600, 3)] + [(start, start + 2) for start in range(0, 600, 3)]
    errors = [(signatures[a] == signatures[b]).mean() - jaccard(texts[a], texts[b]) for a, b in pairs]
    assert abs(np.mean(errors)) < 0.01 and np.std(errors) < 0.06


def test_pairs_and_groups_find_the_near_and_leave_the_far() -> None:
    signatures = build_signatures(families(300))
    groups = group(signatures)
    assert np.mean(groups[1::3] == groups[0::3]) == 1 and np.mean(groups[2::3] == np.arange(2, 900, 3)) == 1
    assert {tuple(pair) for pair in similar_pairs(signatures).tolist()} == {(start, start + 1) for start in range(0, 900, 3)}


def test_texts_that_differ_in_case_and_punctuation_are_the_same() -> None:
    signatures = build_signatures(["The pan is on fire", "the PAN is on fire!!", "The pan is on ice", "火事です", "火事です。", "?", "!"])
    assert group_equals(signatures).tolist() == [0, 0, 2, 3, 3, 5, 5]
    assert similar_pairs(signatures).tolist() == [[0, 1], [3, 4], [5, 6]]


def test_a_chain_is_one_group() -> None:
    words = random.Random(0).choices(WORDS, k=80)
    texts = []
    for step in range(30):
        texts.append(" ".join(words))
        words[step * 2] = f"changed{step}"
    assert jaccard(texts[0], texts[-1]) < 0.3
    assert set(group(build_signatures(texts), SAFELY_SIMILAR)) == {0}


def test_a_crowd_of_alike_texts_is_one_group_in_little_time() -> None:
    chance = random.Random(0)
    base = chance.choices(WORDS, k=60)
    signatures = build_signatures(" ".join(base + chance.choices(WORDS, k=4)) for _ in range(20_000))
    assert len(set(group(signatures).tolist())) == 1


@pytest.mark.parametrize("count", [0, 1])
def test_nothing_to_compare(count: int) -> None:
    signatures = build_signatures(["one text"] * count)
    assert signatures.shape == (count, 64) and group(signatures).tolist() == list(range(count)) and similar_pairs(signatures).shape == (0, 2)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.text(max_size=40), max_size=30))
def test_equal_texts_are_in_one_group_whatever_they_are(texts: list[str]) -> None:
    groups = group(build_signatures(texts))
    for index, text in enumerate(texts):
        assert groups[index] == groups[texts.index(text)] <= index


def test_a_shared_instruction_does_not_make_questions_alike_nor_a_shared_input() -> None:
    long = " ".join(WORDS[:100])
    questions = [question_of(Record("", given, "", asked)) for given, asked in (("smoke in the hall", long), ("gas in the cellar", long), ("none", "What is fire?"), ("none", "Who calls?"))]
    assert group(build_signatures(questions)).tolist() == [0, 1, 2, 3]
