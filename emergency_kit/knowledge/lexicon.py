"""Lexicon: the word classes that patterns and scope rules name, from `lexicon.yaml`.

In: `lexicon.yaml`. Out: sets of stems. A class is written in patterns as `<pour>`.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Mapping

import yaml

from emergency_kit.errors import DataError
from emergency_kit.knowledge.statements import stem

LEXICON_FILE = Path(__file__).parent / "lexicon.yaml"


@dataclass(frozen=True)
class Lexicon:
    """classes: words (several joined by "_") of each class, as written. The rest: stems."""

    classes: Mapping[str, tuple[str, ...]]
    verbs: frozenset[str]
    bad: frozenset[str]
    good: frozenset[str]
    better: frozenset[str]
    says: frozenset[str]
    advises: frozenset[str]
    professionals: frozenset[str]


@functools.lru_cache(maxsize=1)
def lexicon() -> Lexicon:
    """The package's lexicon; raises DataError when the file is not well formed."""
    try:
        raw = yaml.load(LEXICON_FILE.read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        words = {name: tuple(str(text).split()) for name, text in raw["classes"].items()}
        sets = {name: frozenset(stem(word) for word in str(raw[name]).split()) for name in ("verbs", "bad", "good", "better", "says", "advises", "professionals")}
    except (OSError, KeyError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise DataError(f"{LEXICON_FILE}: cannot be read as a lexicon: {error}") from None
    return Lexicon(words, **sets)
