"""Matching: where a sentence holds a pattern, and whether it tells the reader to do it.

In: patterns and an answer. Out: `Match`es with a stance and character offsets. A pattern is a row of items with
gaps between them: `<pour> (on)? water|liquid` as `"<pour> water|liquid"`; `a_b` stands for words side by side,
`<class>` for a class of the lexicon, a leading `!` asks for the ban ("do not turn on" gives "leave switches
alone"), a leading `&` lets the items stand in any order. Words are compared by stem. Passive forms ("water may
be poured") are found without being written. Limits: those of `scope.py`.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Iterator, Sequence

from emergency_kit.errors import DataError
from emergency_kit.knowledge import scope
from emergency_kit.knowledge.lexicon import lexicon
from emergency_kit.knowledge.statements import Sentence, Token, read_sentences, stem

GAP_WORDS = 5
"""Most words between two items of a pattern."""
ANY_ORDER_WORDS = 12
_BE = frozenset("be been being is are was were".split())
_TELLS = frozenset("i im i'm we we're was were".split())
_ACTS = frozenset("he she someone somebody who it fire flames smoke water gas wind".split())
_FINITE = frozenset("is are was were may might can could will would has have".split())
_MODAL = frozenset("should must can may could need needs to might".split())


@dataclass(frozen=True)
class Pattern:
    """items: for each, alternatives, each a tuple of stems side by side."""

    text: str
    items: tuple[tuple[tuple[str, ...], ...], ...]
    wants_ban: bool = False
    any_order: bool = False
    gap: int = GAP_WORDS

    @functools.cached_property
    def first_stems(self) -> tuple[frozenset[str], ...]:
        return tuple(frozenset(words[0] for words in item) for item in self.items)


@dataclass(frozen=True)
class Match:
    """stance: "affirmed", "warned" or "silent". flags: all scope flags of the matched words. start, end: offsets into the text."""

    stance: str
    start: int
    end: int
    flags: int
    sentence: int


@functools.lru_cache(maxsize=50_000)
def compile_pattern(text: str) -> Pattern:
    """A pattern from its written form; raises DataError for an unknown class or an empty item."""
    body = text
    wants_ban = body.startswith("!")
    body = body.removeprefix("!")
    any_order = body.startswith("&")
    body = body.removeprefix("&")
    gap = 0 if body.startswith("=") else GAP_WORDS
    body = body.removeprefix("=")
    items = []
    for item in body.split():
        words: list[str] = []
        for part in item.split("|"):
            if part.startswith("<"):
                if not part.endswith(">") or part[1:-1] not in lexicon().classes:
                    raise DataError(f"pattern {text!r}: {part} is no class of the lexicon")
                words += lexicon().classes[part[1:-1]]
            else:
                words.append(part)
        if not all(words) or not words:
            raise DataError(f"pattern {text!r}: an item has an empty alternative")
        items.append(tuple(dict.fromkeys(tuple(stem(piece) for piece in word.split("_")) for word in words)))
    if not items:
        raise DataError(f"pattern {text!r}: no items")
    return Pattern(text, tuple(items), wants_ban, any_order, gap)


@dataclass(frozen=True)
class Read:
    """One sentence ready to match. words: indices of its word tokens; at: positions within `words` by stem."""

    sentence: Sentence
    flags: list[int]
    words: tuple[int, ...]
    at: dict[str, list[int]]


def read(text: str) -> list[Read]:
    """An answer's sentences with scope and an index of their stems."""
    sentences = read_sentences(text)
    found = []
    for place, sentence in enumerate(sentences):
        following = sentences[place + 1] if place + 1 < len(sentences) else None
        tokens = sentence.tokens
        # An auxiliary is no deed: "do not hold back CPR" has no "do CPR".
        words = tuple(index for index, token in enumerate(tokens)
                      if token.word and not (token.low == "do" and index + 1 < len(tokens) and tokens[index + 1].low == "not"))
        at: dict[str, list[int]] = {}
        for position, index in enumerate(words):
            at.setdefault(tokens[index].stem, []).append(position)
        found.append(Read(sentence, scope.scopes(sentence, following), words, at))
    return found


class Reading:
    """An answer ready to match. text: as it was written; sentences: its `Read`s; where: numbers of the sentences that hold a stem."""

    def __init__(self, text: str):
        self.text, self.sentences = text, read(text)
        self.where: dict[str, set[int]] = {}
        for number, item in enumerate(self.sentences):
            for stemmed in item.at:
                self.where.setdefault(stemmed, set()).add(number)
        self._stems = self.where.keys()

    def find(self, pattern: Pattern) -> Iterator[Match]:
        """Every place where a pattern stands, with its stance."""
        numbers: set[int] | None = None
        for firsts in pattern.first_stems:
            here = self._stems & firsts
            if not here:
                return
            holding = set().union(*(self.where[stemmed] for stemmed in here))
            numbers = holding if numbers is None else numbers & holding
            if not numbers:
                return
        for number in sorted(numbers or ()):
            item = self.sentences[number]
            for places in _places(item, pattern):
                yield _judge(item, places, number)


def _places(item: Read, pattern: Pattern) -> Iterator[list[int]]:
    """Lists of word positions that hold the pattern, at most one a starting word."""
    spots = [_spots(item, alternatives) for alternatives in pattern.items]
    if not all(spots):
        return
    if pattern.any_order:
        yield from _any_order(spots)
        return
    for start, end in spots[0]:
        if chain := _chain(spots, 1, end, [*range(start, end)], pattern.gap):
            yield chain
    if len(spots) >= 2:
        yield from _passive(item, spots)


def _spots(item: Read, alternatives: Sequence[tuple[str, ...]]) -> list[tuple[int, int]]:
    found = []
    for words in alternatives:
        for start in item.at.get(words[0], ()):
            if len(words) == 1:
                found.append((start, start + 1))
            else:
                end = _side_by_side(item, start, words)
                if end:
                    found.append((start, end))
    return sorted(set(found))


def _side_by_side(item: Read, start: int, words: Sequence[str]) -> int:
    """End of several words that stand together; a particle may stand off its verb: "turn the gas off"."""
    position = start + 1
    for word in words[1:]:
        places = item.at.get(word, ())
        allowed = 3 if len(words) == 2 and word in ("off", "out", "on", "up", "away", "down", "back", "in") else 0
        nearest = next((place for place in places if position <= place <= position + allowed), None)
        if nearest is None:
            return 0
        position = nearest + 1
    # The words between stay free for the next item.
    return start + 2 if len(words) == 2 and position - start > 2 else position


def _chain(spots: Sequence[list[tuple[int, int]]], level: int, after: int, taken: list[int], gap: int) -> list[int] | None:
    if level == len(spots):
        return taken
    for start, end in spots[level]:
        if after <= start <= after + gap or (start < after and start > taken[0] and start not in taken and level == 1):
            if done := _chain(spots, level + 1, max(after, end), [*taken, *range(start, end)], gap):
                return done
    return None


def _passive(item: Read, spots: Sequence[list[tuple[int, int]]]) -> Iterator[list[int]]:
    tokens, words = item.sentence.tokens, item.words
    for verb_start, verb_end in spots[0]:
        low = tokens[words[verb_start]].low
        if not low.endswith(("ed", "en", "n", "t", "d")) or verb_start == 0:
            continue
        before = [tokens[words[place]].low for place in range(max(0, verb_start - 3), verb_start)]
        if not any(word in _BE for word in before):
            continue
        for start, end in spots[1]:
            if verb_start - 7 <= start and end <= verb_start:
                rest: list[int] | None = [*range(start, end), *range(verb_start, verb_end)]
                if len(spots) > 2:
                    rest = _chain(spots, 2, verb_end, rest or [], GAP_WORDS)
                if rest:
                    yield rest
                break


def _any_order(spots: Sequence[list[tuple[int, int]]]) -> Iterator[list[int]]:
    for start, end in spots[0]:
        taken = [*range(start, end)]
        for others in spots[1:]:
            near = [spot for spot in others if abs(spot[0] - start) <= ANY_ORDER_WORDS and spot[0] not in taken]
            if not near:
                break
            best = min(near, key=lambda spot: abs(spot[0] - start))
            taken += range(*best)
        else:
            yield sorted(taken)


def _judge(item: Read, places: list[int], number: int) -> Match:
    tokens = item.sentence.tokens
    indices = [item.words[place] for place in places]
    first, last = min(indices), max(indices)
    # A ban may stand at any of the words ("pour sand, not water"); a condition or a speaker counts at the first:
    # in "wait until the car has filled" the filling is what to wait for.
    # A verb that itself refuses ("skip the hospital", "stop the insulin") does not discourage what it takes.
    counted = scope.NEG | scope.LIMITED | scope.AWAY | (0 if scope.refuses(tokens[first]) else scope.SOFT)
    flags = item.flags[first] | scope.flags_of(item.flags, indices) & counted
    flags |= _form_flags(tokens, item.words, places, flags, frozenset(indices))
    if first + 1 not in indices and any(token.low in ("nothing", "nobody") for token in tokens[first + 1:first + 2]):
        flags |= scope.NEG  # "touch nothing"
    if last + 1 < len(tokens) and tokens[last + 1].low == "nothing":
        flags |= scope.NEG  # "eat and drink nothing"
    if flags & (scope.NEG | scope.SOFT):
        stance = "warned"
    elif flags & (scope.COND | scope.TOLD):
        stance = "silent"
    else:
        stance = "affirmed"
    return Match(stance, tokens[first].start, tokens[last].end, flags, number)


def _form_flags(tokens: Sequence[Token], words: Sequence[int], places: list[int], flags: int, matched: frozenset[int]) -> int:
    """What the form of the first word and the rest of the sentence add: reports, gerunds that are praised or condemned."""
    first, last = min(places), max(places)
    head = tokens[words[first]]
    before = [tokens[words[place]].low for place in range(max(0, first - 4), first)]
    added = 0
    is_verb = head.stem in lexicon().verbs
    # "The melted tights should be peeled off" is an order.
    ordered = any(token.low in _MODAL for token in tokens[words[first] + 1:words[last]]) and any(token.low in _BE for token in tokens[words[first] + 1:words[last]])
    if head.low.endswith("ed") and head.stem != head.low and (before or is_verb) and not ordered and not any(word in _MODAL for word in before):
        added |= scope.TOLD
    elif is_verb and before and (before[-1] in ("who", "they") or (head.low.endswith("s") and head.stem in lexicon().says)):
        added |= scope.TOLD
    elif head.low.endswith("s") and is_verb and before and before[-1] in _ACTS:
        if not any(token.stem in lexicon().better for token in tokens[:words[first]]):
            added |= scope.TOLD
    # "Take the stairs, the lift may fail": what follows the comma is the subject of its own clause.
    if len(places) == 2 and words[last] + 1 < len(tokens) and tokens[words[last] + 1].low in _FINITE and any(token.low == "," for token in tokens[words[first]:words[last]]):
        added |= scope.TOLD
    # "I'm at the side holding the rail" tells, it does not advise.
    if head.low.endswith("ing") and any(token.low in _TELLS for token in tokens[max(0, words[first] - 8):words[first]]):
        added |= scope.TOLD
    if head.low in ("leave", "leaving") and words[first] + 1 < len(tokens) and tokens[words[first] + 1].low == "with":
        added |= scope.AWAY  # whom one leaves with is not left
    if head.low in ("keep", "hold") and any(token.low in ("away", "off", "clear", "back") for token in tokens[words[last] + 1:words[last] + 3]):
        added |= scope.AWAY
    verdict = None
    opens = next(token.low for token in tokens if token.word)
    plural = head.low.endswith("s") and not head.low.endswith("ss")  # "thrusts can injure": a noun after all
    if opens.endswith("ing") and len(opens) > 5 or head.low.endswith("ing") or plural or not is_verb or (before and before[-1] in ("a", "an", "the")) or (before and before[-1] == "to" and first <= 1):
        verdict = None if flags & scope.NEG else scope.condemned(tokens, words[first], words[last] + 1, matched, subject=opens.endswith("ing") or head.low.endswith("ing") or (plural and first == 0))
    else:
        rest = [token.low for token in tokens[words[last] + 1:words[last] + 7]]
        if "and" in rest and any(word in ("will", "can", "could", "may", "might", "would") for word in rest):
            verdict = scope.condemned(tokens, words[first], words[last] + 1, matched, subject=False)
            verdict = verdict if verdict else None
    if verdict:
        added |= scope.SOFT
    return added


def stance_of(match: Match, pattern: Pattern) -> str:
    """The stance towards what the pattern stands for: a pattern that wants the ban turns it."""
    if not pattern.wants_ban:
        return match.stance
    return "affirmed" if match.flags & scope.NEG and not match.flags & (scope.COND | scope.TOLD) else "silent"
