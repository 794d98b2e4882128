"""Patterns: for every critical action and never-rule of every card, the wordings that show it.

In: `patterns/<category>.yaml`, under each card's id `actions` and `never`, each a mapping from the card's line
to patterns (`matching.py` says how they are written), `time_critical`: the lines to act on first, and `excuses`:
words that, in the same sentence, name the case that a rule leaves open ("unless an expert says so"). A card
that has no entry there (a card of one's own) falls back on its own phrases. `chance.yaml`: lines of other cards that the
patterns of a rule find by chance. Out: frozen `CardPatterns`.
Patterns stand beside the cards, not in them: they change no prompt, no dataset and no retrieval index.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Mapping

import yaml

from emergency_kit.errors import DataError
from emergency_kit.knowledge.cards import Card, normalise
from emergency_kit.knowledge.matching import Pattern, compile_pattern
from emergency_kit.knowledge.statements import stem

PATTERN_FOLDER = Path(__file__).parent / "patterns"
PROHIBITION_FILE = Path(__file__).parent / "prohibitions.yaml"
CHANCE_FILE = Path(__file__).parent / "chance.yaml"


@dataclass(frozen=True)
class CardPatterns:
    """Patterns by the card's line. time_critical: the actions that come before all others; excuses: stems by rule."""

    actions: Mapping[str, tuple[Pattern, ...]]
    never: Mapping[str, tuple[Pattern, ...]]
    time_critical: frozenset[str]
    excuses: Mapping[str, frozenset[str]]


@functools.lru_cache(maxsize=1)
def load_patterns(folder: Path = PATTERN_FOLDER) -> Mapping[str, Mapping[str, Any]]:
    """Raw entries of all files by card id; raises DataError for a file that is not well formed."""
    entries: dict[str, Mapping[str, Any]] = {}
    for path in sorted(folder.glob("*.yaml")):
        try:
            content = yaml.load(path.read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader)) or {}
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise DataError(f"{path}: cannot be read as YAML: {' '.join(str(error).split())}") from None
        for card_id, entry in content.items():
            if not isinstance(entry, dict) or not set(entry) <= {"actions", "never", "time_critical", "excuses"}:
                raise DataError(f"{path}: {card_id}: expected the keys actions, never, time_critical and excuses")
            entries[card_id] = entry
    return entries


@functools.lru_cache(maxsize=1)
def load_prohibitions() -> Mapping[str, tuple[Pattern, ...]]:
    """Patterns of help that nobody is to be talked out of, by name; raises DataError for a file that is not well formed."""
    try:
        content = yaml.load(PROHIBITION_FILE.read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        return {str(name): tuple(compile_pattern(str(text)) for text in texts) for name, texts in content.items()}
    except (OSError, ValueError, AttributeError, TypeError, yaml.YAMLError) as error:
        raise DataError(f"{PROHIBITION_FILE}: cannot be read: {' '.join(str(error).split())}") from None


@functools.lru_cache(maxsize=1)
def load_chance() -> Mapping[tuple[str, str], frozenset[str]]:
    """`{(card id, never-rule or action): normalised lines}`: what other cards say, and the patterns find though it does not break the rule or forbid the
    action, each read by hand.

    Patterns are made for answers about their own hazard; an answer that follows another hazard's card is told by its lines. Raises DataError
    for a file that is not well formed.
    """
    try:
        content = yaml.load(CHANCE_FILE.read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        return {(card_id, rule): frozenset(normalise(line) for line in lines) for card_id, rules in content.items() for rule, lines in rules.items()}
    except (OSError, ValueError, AttributeError, TypeError, yaml.YAMLError) as error:
        raise DataError(f"{CHANCE_FILE}: cannot be read: {' '.join(str(error).split())}") from None


def phrase_pattern(phrase: str) -> Pattern:
    """A card's own phrase: its words side by side; one that forbids ("do not turn on") asks for the ban."""
    for opening in ("do not ", "don't ", "never ", "avoid "):
        if phrase.startswith(opening) and " " in phrase.removeprefix(opening):
            return compile_pattern(f"!={phrase.removeprefix(opening)}")
    return compile_pattern(f"={phrase.replace('do not ', 'not ')}")


def _without_articles(phrase: str) -> str:
    return " ".join(word for word in phrase.split() if word not in ("the", "a", "an"))


@functools.lru_cache(maxsize=512)
def card_patterns(card: Card) -> CardPatterns:
    """The patterns of a card, its own phrases among them."""
    entry = load_patterns().get(card.id, {})
    written_actions, written_never = entry.get("actions") or {}, entry.get("never") or {}
    actions = {action.text: (*map(compile_pattern, written_actions.get(action.text, ())), *map(phrase_pattern, action.phrases))
               for action in card.critical_actions}
    never = {rule.text: tuple(map(compile_pattern, (*written_never.get(rule.text, ()), *map(_without_articles, rule.broken_by)))) for rule in card.never}
    first = entry.get("time_critical") or [card.critical_actions[0].text]
    excuses = {rule: frozenset(stem(word) for word in str(words).split()) for rule, words in (entry.get("excuses") or {}).items()}
    return CardPatterns(actions, never, frozenset(first), excuses)
