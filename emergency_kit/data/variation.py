"""Variation: how the same situation is told by other people, in other places, under other circumstances.

In: hand-written sentences (`additions.yaml`), each for one split, and the builder's chance.
Out: a telling with sentences added, or written as a hurried hand writes it. Whatever is added comes with
the fact that it states, so that an answer's FACTS stay true. Numbers and negations are never touched.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import yaml

from emergency_kit.errors import DataError
from emergency_kit.knowledge.cards import normalise

ADDITIONS = Path(__file__).parent / "additions.yaml"
_KEPT = re.compile(r"\d|^(?:no|not|never|none|cannot|can't|cant|don't|dont|didn't|isn't|won't|without)$", re.IGNORECASE)


@dataclass(frozen=True)
class Addition:
    """A sentence for the tellings of a split. settings: where it can be said; lacks: the resource it says is missing."""

    split: str
    text: str
    fact: str = ""
    kind: str = ""
    settings: tuple[str, ...] = ()
    lacks: str = ""


@lru_cache(maxsize=2)
def load_additions(path: Path = ADDITIONS) -> dict[str, tuple[Addition, ...]]:
    """Sentences by their use: `additions`, `speakers` (with `{advice}` in them), `openings`."""
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        return {use: tuple(Addition(**{**item, "settings": tuple(item.get("settings", ()))}) for item in content[use])
                for use in ("additions", "speakers", "openings")}
    except (yaml.YAMLError, KeyError, TypeError) as error:
        raise DataError(f"{path.name}: not a table of additions, speakers and openings ({error})") from None


def join(first: str, second: str) -> str:
    """Two pieces of a telling as one text."""
    return f"{first}{'' if first[-1:] in '.!?…' else '.'} {second}"


def shingles(text: str) -> frozenset[str]:
    """The text's word triples; how much two texts share of them says how alike they are."""
    words = normalise(text).split()
    return frozenset(" ".join(words[start:start + 3]) for start in range(max(1, len(words) - 2)))


def hurry(text: str, chance: random.Random) -> str:
    """The text as a hurried hand types it: no capitals, few marks, a slip in about every twelfth word."""
    words = [_slip(word, chance) if chance.random() < 0.08 else word for word in text.lower().split()]
    words = [word.rstrip(",;:.") if chance.random() < 0.7 else word for word in words]
    return " ".join(word for word in words if word)


def shout(text: str) -> str:
    """The text in capitals."""
    return text.upper()


def _slip(word: str, chance: random.Random) -> str:
    if len(word) < 4 or _KEPT.search(word.strip(",.;:!?\"'")):
        return word
    place = chance.randrange(1, len(word) - 1)
    kind = chance.randrange(3)
    if kind == 0:
        return word[:place] + word[place + 1:]
    if kind == 1:
        return word[:place] + word[place + 1] + word[place] + word[place + 2:]
    return word[:place] + word[place] + word[place:]
