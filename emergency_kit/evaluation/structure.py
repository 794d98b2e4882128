"""Structure: whether one answer has the form that was taught, ends, does not run in circles, and can be read.

In: an answer's text as the model wrote it. Out: `Checks`. Reading answers is `data/format.py`'s; this
file judges. It says nothing about whether the content is right; `safety.py` does. Readability is the Flesch-Kincaid
grade (Kincaid et al. 1975): years of US schooling that a text asks for. Limits: syllables are counted by their vowels
(within about 3 % over a text); the language of fewer than 40 letters is not guessed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Sequence

from emergency_kit.data.format import parse_answer, parse_json_answer, read_answer
from emergency_kit.inference.engine import Generated
from emergency_kit.knowledge.cards import normalise

LOOP_WORDS = 12
LANGUAGE_LETTERS = 40
LOOP_TIMES = 3
# Numbered steps that repeat are a loop although their numbers differ.
_WORD = re.compile(r"[a-z]+(?:'[a-z]+)?")
_VOWELS = re.compile(r"[aeiouy]+")
_SILENT = re.compile(r"(?:(?<![aeiouyl])e|(?<![aeioutdy])ed|(?<![aeiouyscgxzh])es|(?<=[aeiouy]l)e)$")
_SENTENCE_END = re.compile(r"(?<=[.!?;:])\s+")
_MARK = re.compile(r"^[ \t]*(?:[•*\-–]|\d{1,3}[.)])[ \t]+", re.MULTILINE)


@dataclass(frozen=True)
class Checks:
    """What was found in one answer. problems: for people; empty when every check passed."""

    valid_json: bool
    valid_structured_text: bool
    ended: bool
    loops: bool
    tokens: int
    problems: tuple[str, ...]
    language: str = ""
    """Two-letter code; empty where there is too little text."""
    grade: float | None = None
    """Flesch-Kincaid grade of the guidance, of the whole text where there is none; None for a text without words."""

    @property
    def valid_structure(self) -> bool:
        """The four sections, as text or as JSON."""
        return self.valid_json or self.valid_structured_text


def find_loop(text: str) -> str | None:
    """The first run of 12 words that stands three times or more in a text, or None."""
    words = normalise(_MARK.sub("", text)).split()
    counts: dict[tuple[str, ...], int] = {}
    for start in range(len(words) - LOOP_WORDS + 1):
        run = tuple(words[start:start + LOOP_WORDS])
        counts[run] = counts.get(run, 0) + 1
    return next((" ".join(run) for run, times in counts.items() if times >= LOOP_TIMES), None)


def count_syllables(word: str) -> int:
    """Groups of vowels, the silent e at the end left out; at least one."""
    groups = len(_VOWELS.findall(word))
    return max(1, groups - (groups > 1 and bool(_SILENT.search(word))))


def measure_grade(sentences: Sequence[str]) -> float | None:
    """Flesch-Kincaid grade: 0.39 words a sentence + 11.8 syllables a word - 15.59; None without words."""
    words = [_WORD.findall(sentence.lower()) for sentence in sentences]
    words = [sentence for sentence in words if sentence]
    count = sum(map(len, words))
    if not count:
        return None
    syllables = sum(count_syllables(word) for sentence in words for word in sentence)
    return 0.39 * count / len(words) + 11.8 * syllables / count - 15.59


def guess_language(text: str) -> str:
    """Two-letter code of the language; empty where there are fewer than 40 letters."""
    import py3langid

    return py3langid.classify(text)[0] if sum(map(str.isalpha, text)) >= LANGUAGE_LETTERS else ""


def check_answer(generated: Generated) -> Checks:
    """All checks of one generated answer."""
    text = generated.text
    problems: Sequence[str] = read_answer(text).problems if text.strip() else ("the answer is empty",)
    loop = find_loop(text)
    if loop:
        problems = (*problems, f"repeats itself: {loop[:60]!r}")
    if not generated.ended:
        problems = (*problems, f"did not end within {generated.tokens} tokens")
    language = guess_language(text)
    if language not in ("", "en"):
        problems = (*problems, f"is not in English but looks like {language!r}")
    guidance = read_answer(text).answer.guidance
    sentences = [part for line in guidance or text.splitlines() for part in _SENTENCE_END.split(line)]
    return Checks(parse_json_answer(text).valid, parse_answer(text).valid, generated.ended, loop is not None,
                  generated.tokens, tuple(problems), language, measure_grade(sentences))
