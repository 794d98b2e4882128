"""Structure: whether one answer has the form that was taught, ends, and does not run in circles.

In: an answer's text as the model wrote it. Out: `Checks`. Reading answers is `data/format.py`'s; this
file judges. It says nothing about whether the content is right; `safety.py` does.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Sequence

from emergency_kit.data.format import parse_answer, parse_json_answer, read_answer
from emergency_kit.inference.engine import Generated
from emergency_kit.knowledge.cards import normalise

LOOP_WORDS = 12
LOOP_TIMES = 3
# Numbered steps that repeat are a loop although their numbers differ.
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


def check_answer(generated: Generated) -> Checks:
    """All checks of one generated answer."""
    text = generated.text
    problems: Sequence[str] = read_answer(text).problems if text.strip() else ("the answer is empty",)
    loop = find_loop(text)
    if loop:
        problems = (*problems, f"repeats itself: {loop[:60]!r}")
    if not generated.ended:
        problems = (*problems, f"did not end within {generated.tokens} tokens")
    return Checks(parse_json_answer(text).valid, parse_answer(text).valid, generated.ended, loop is not None,
                  generated.tokens, tuple(problems))
