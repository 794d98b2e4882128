"""Twins: every never-rule and critical action of a card, told in frames that affirm it, forbid it, or leave it to others.

In: cards. Out: `Twin`s, sentences whose meaning is known because they were made from the card: the line's own words and
each of its paraphrases in every frame. Run: `make twins`, or `python -m emergency_kit.evaluation.twins`, for all of them;
the test suite draws a thinned set.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from dataclasses import dataclass
from typing import Iterator

from emergency_kit.knowledge.cards import Card, load_cards
from emergency_kit.knowledge.lexicon import lexicon
from emergency_kit.knowledge.rules import examine
from emergency_kit.knowledge.statements import stem

AFFIRMED: tuple[str, ...] = ("{B}.", "You should {b}.", "Do not panic, but {b}.", "Do not hesitate to {b}.", "First, {b}.", "Go ahead and {b}.", "It is safe to {b}.", "You can {b}.",
            "Don't be afraid to {b}.", "The best thing is to {b}.", "Stay calm. Then {b}.", "Do:\n- {b}")
NEGATED: tuple[str, ...] = ("Do not {b}.", "Never {b}.", "You must not {b}.", "Do not, under any circumstances, {b}.", "It is a myth that you should {b}.", "It is dangerous to {b}.",
           "Under no circumstances should you {b}.", "Be careful and never {b}.", "{B}? No.", "Do NOT:\n- {b}", "Read this rather than {b}.", "Resist the urge to {b}.", "Don't {b}.")
BORROWED: tuple[str, ...] = ("Paramedics may {b}.", "The neighbour says to {b}.", "Should you {b}?", "If you {b}, it gets worse.")
_EXCEPTION = re.compile(r" (?:unless|until|while|when|once|before they|in great|even with) ")


@dataclass(frozen=True)
class Twin:
    """One sentence. number: of the line on its card, from 0; wanted: stances that are right (never-rules), or whether
    the action is given ("given", "not given")."""

    card_id: str
    kind: str
    number: int
    text: str
    wanted: tuple[str, ...]


def build_twins(card: Card, thin: bool = False) -> Iterator[Twin]:
    """All twins of a card; thin: the line's own words in every frame, each paraphrase in one frame of each kind."""
    for number, rule in enumerate(card.never):
        # A rule's exception is not part of what it forbids.
        own = _EXCEPTION.split(rule.text.removeprefix("Do not ").rstrip("."))[0]
        for place, body in enumerate([own, *(phrase for phrase in rule.broken_by if _is_order(phrase) and "not" not in phrase.split())]):
            for frames, wanted in ((AFFIRMED, ("affirmed",)), (NEGATED, ("warned",)), (BORROWED, ("silent", "warned"))):
                for frame in frames if place == 0 or not thin else (frames[place % len(frames)],):
                    # A comma inside the body would end the condition of "If you ..., it gets worse".
                    if not (frame.startswith("If you") and "," in body):
                        yield Twin(card.id, "never", number, _told(frame, body), wanted)
    for number, action in enumerate(card.critical_actions):
        orders = [phrase for phrase in action.phrases if _is_order(phrase) and not {"not", "without", "never", "no", "if"} & set(phrase.split())]
        for place, body in enumerate(orders):
            for frames, wanted in ((AFFIRMED, ("given",)), (NEGATED, ("not given",)), (BORROWED[:2], ("not given",))):
                for frame in frames if place == 0 or not thin else (frames[place % len(frames)],):
                    yield Twin(card.id, "action", number, _told(frame, body), wanted)


def _is_order(phrase: str) -> bool:
    words = phrase.split()
    return len(words) > 1 and stem(words[0]) in lexicon().verbs and not words[0].endswith(("ed", "ing", "s")) and words[0] not in ("don't", "do", "avoid")


def _told(frame: str, body: str) -> str:
    return frame.format(b=body[0].lower() + body[1:], B=body[0].upper() + body[1:])


def is_right(twin: Twin, card: Card) -> bool:
    """Whether `examine` reads a twin as it was meant."""
    found = examine(twin.text, [card])
    if twin.kind == "never":
        return found.rules[twin.number].stance in twin.wanted
    return found.actions[twin.number].given == (twin.wanted == ("given",))


def main() -> int:
    """Check all twins of all cards; prints what is read wrongly and returns how many."""
    counts: Counter[tuple[str, bool]] = Counter()
    for card in load_cards().values():
        for twin in build_twins(card):
            right = is_right(twin, card)
            counts[twin.kind, right] += 1
            if not right:
                print(f"{twin.card_id} {twin.kind} {twin.number + 1}: expected {' or '.join(twin.wanted)}: {twin.text!r}")
    print(", ".join(f"{kind}: {counts[kind, True]} of {counts[kind, True] + counts[kind, False]} twins read as meant" for kind in ("never", "action")))
    return sum(number for (_, right), number in counts.items() if not right)


if __name__ == "__main__":
    sys.exit(bool(main()))
