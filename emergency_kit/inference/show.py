"""Show: a guarded answer as a person reads it on a terminal or in a pipe.

In: `Guarded`, whole or so far. Out: lines of plain text, the call for help first, steps numbered, wrapped and set
apart; on a terminal bold and struck through as well. What the model wrote stands as it wrote it: a line that
breaks a never-rule is marked STRUCK and named, a card's line with a slip is shown from the card, the model's
beside it. Limits: nothing here decides anything; that is `guard.py`.
"""

from __future__ import annotations

import shutil
import textwrap
from typing import Iterator

from emergency_kit.inference.guard import CardGuidance, Guarded, Line, Step

BOLD, DIM, STRIKE, PLAIN = "\x1b[1m", "\x1b[2m", "\x1b[9m", "\x1b[0m"
WIDEST = 76
# A terminal obeys control characters; those in a text are shown as what they are.
_CONTROL = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\t\n"}


class Page:
    """Writes the parts of an answer. colour: whether the reader is a terminal."""

    def __init__(self, colour: bool):
        self.colour = colour
        self.width = min(WIDEST, shutil.get_terminal_size((WIDEST, 24)).columns)

    def head(self, guarded: Guarded) -> Iterator[str]:
        """The call for help, then the cards in full: all of it is known before the model writes a word."""
        yield self._bold(f"CALL FOR HELP: {guarded.number}")
        for card in guarded.cards:
            yield ""
            yield from self._card(card)
        if guarded.unsure:
            yield ""
            yield from self._wrap("Not sure which of these it is: ", ", ".join(f"{number} {name}" for number, (_, name) in enumerate(guarded.choices, 1))
                                  + ". In a session, type the number to choose.")
        yield ""
        yield self._bold("THE MODEL'S ANSWER") + self._dim(" (by a small computer model; where it differs, follow the checked guidance)")

    def line(self, line: Line, number: int) -> Iterator[str]:
        """One statement of the model; number: its place in its section, from 1."""
        mark = f"{number}. " if line.section == "guidance" else "• "
        if line.breaks:
            yield from self._wrap(f"{mark}STRUCK: ", line.text, STRIKE)
            yield from self._wrap("   ", f"(against the checked guidance: {line.breaks})", BOLD)
        elif line.card_line:
            yield from self._wrap(mark, line.card_line)
            yield from self._wrap("   ", f"(from the card; the model wrote: {line.text})", DIM)
        else:
            yield from self._wrap(mark, line.text)
            if line.section == "guidance" and not line.on_card:
                yield from self._wrap("   ", "(the model's own words, on no card)", DIM)
        if line.numbers and not line.breaks:
            yield from self._wrap("   ", f"(no card states {', '.join(line.numbers)}: do not rely on it)", BOLD)

    def heading(self, section: str) -> Iterator[str]:
        """A section's name."""
        yield ""
        yield self._bold(section.upper())

    def tail(self, guarded: Guarded) -> Iterator[str]:
        """What the answer lacks."""
        if guarded.added:
            yield ""
            yield self._bold("ADDED FROM THE CARD") + self._dim(" (the model left these out)")
        for step in guarded.added:
            yield from self._wrap("+ ", step.text + _describe_without(step))

    def _card(self, card: CardGuidance) -> Iterator[str]:
        fits = "CHECKED GUIDANCE" if card.fits else "CHECKED GUIDANCE, if it is this"
        yield self._bold(f"{fits}: {card.name}" + (f" (call {card.number})" if card.number else ""))
        for danger in card.dangers:
            yield from self._wrap("Danger: ", danger)
        for number, step in enumerate(card.steps, 1):
            yield from self._wrap(f"{number}. ", step.text + _describe_without(step))
        for rule in card.never:
            yield from self._wrap("x  ", rule, BOLD)
        yield from self._wrap("Sources: ", "; ".join(card.sources), DIM)

    def _wrap(self, mark: str, text: str, style: str = "") -> Iterator[str]:
        for line in textwrap.wrap(text.translate(_CONTROL), max(20, self.width - len(mark)), break_long_words=False, break_on_hyphens=False) or [""]:
            yield mark + (f"{style}{line}{PLAIN}" if style and self.colour else line)
            mark = " " * len(mark)

    def _bold(self, text: str) -> str:
        return f"{BOLD}{text}{PLAIN}" if self.colour else text

    def _dim(self, text: str) -> str:
        return f"{DIM}{text}{PLAIN}" if self.colour else text


def _describe_without(step: Step) -> str:
    if not step.instead:
        return ""
    return f" If you have none: {step.instead}" if step.without == "the device" else f" Without {step.without}: {step.instead}"


def explain(guarded: Guarded, words: dict[str, tuple[str, ...]], engine: str) -> Iterator[str]:
    """Why an answer is as it is: cards and the words that found them, what was struck, changed and added, and by which model."""
    for card in guarded.cards:
        yield f"Card {card.name} ({card.id}){'' if card.fits else ', only near'}: found by {', '.join(words.get(card.id, ())) or 'nothing that fits better'}"
        yield f"  sources: {'; '.join(card.sources)}"
        for note in card.regional_notes:
            yield f"  note: {note}"
    yield f"Retrieval is {'unsure; near are ' + ', '.join(name for _, name in guarded.choices) if guarded.unsure else 'sure'}."
    for line in guarded.lines:
        if line.breaks:
            yield f"Struck in {line.section.upper()}: {line.text!r} is against {line.breaks!r}" + (f" ({line.card_id})" if line.card_id else "")
        elif line.card_line:
            yield f"Shown from the card: {line.card_line!r} for {line.text!r}"
        elif line.numbers:
            yield f"Unchecked number in: {line.text!r}"
    yield from (f"Added from {step.card_id}: {step.text!r}" for step in guarded.added)
    yield f"Model: {engine}"
