"""The one place that knows how a record becomes a prompt and how an answer is written, read and checked.

Training, evaluation, inference and export all import it, so that a model is asked exactly as it was
taught; the chat template is in template.py. In: a `Record` or a scenario, knowledge cards. Out: chat messages, answers.
Text that a model produced is parsed, never rewritten.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, field
from typing import Iterable, Mapping, Optional, Sequence

from emergency_kit.knowledge.cards import SAFE_MINIMUM, Card
from emergency_kit.knowledge.emergency_numbers import find_country, localise

SECTIONS = ("facts", "uncertainties", "analysis", "guidance")
SYSTEM_PROMPT = (
    "You answer emergencies offline. Write four sections: FACTS, UNCERTAINTIES, ANALYSIS, GUIDANCE. "
    "Take guidance only from the card that fits the situation, in its order. "
    "If no card fits, say so and give the safe minimum."
)
# What tokenizers of chat models take for a control token: <|im_end|>, </s>, <start_of_turn>, [/INST] and their like.
_CONTROL = re.compile(r"<(?=[|\uff5c/]?[^<>\s]{1,60}>)|\[(?=/?[A-Z_]{2,40}\])")
SAFE_HEADING = "CARD: none fits. SAFE MINIMUM"
ANSWER_SCHEMA = {
    "type": "object",
    "properties": {section: {"type": "array", "items": {"type": "string", "minLength": 1}, "minItems": 1} for section in SECTIONS},
    "required": list(SECTIONS),
    "additionalProperties": False,
}


@dataclass(frozen=True)
class Record:
    """One training or test example.

    hazards: cards that the answer must follow. cards: cards shown in the prompt, in order; they
    differ where a wrong card, an extra card or none was found; None means that retrieval has not been
    asked yet. fits: how many of them, from the first, are shown as cards that fit. lacks: resources that
    the situation is without. country: two-letter code whose emergency number the prompt shows.
    """

    id: str
    input: str
    output: str
    instruction: str = ""
    category: str = ""
    role: str = ""
    hazards: tuple[str, ...] = ()
    cards: Optional[tuple[str, ...]] = None
    fits: int = 1
    lacks: tuple[str, ...] = ()
    country: str = ""
    sources: tuple[str, ...] = ()

    def to_json(self) -> str:
        """The record as one line of JSONL."""
        return json.dumps(asdict(self), ensure_ascii=False)


@dataclass(frozen=True)
class Answer:
    """A parsed answer: four lists of statements, in reading order."""

    facts: tuple[str, ...] = ()
    uncertainties: tuple[str, ...] = ()
    analysis: tuple[str, ...] = ()
    guidance: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, list[str]]:
        """The JSON twin of the answer."""
        return {section: list(getattr(self, section)) for section in SECTIONS}


@dataclass(frozen=True)
class Parsed:
    """What `parse_answer` found: the answer as far as it could be read, and every problem."""

    answer: Answer
    problems: tuple[str, ...] = field(default=())

    @property
    def valid(self) -> bool:
        """All four sections, in order, at line starts, none empty."""
        return not self.problems


def render_card(card: Card, heading: str = "CARD", country: str = "") -> str:
    """A knowledge card as the model reads it, with the emergency number of a country."""
    where = find_country(country)
    lines = [f"{heading}: {card.name}", *(f"Danger: {danger}" for danger in card.dangers)]
    for number, action in enumerate(card.critical_actions, 1):
        without = f" Without {action.needs}: {action.instead}" if action.instead else ""
        lines.append(f"{number}. {localise(action.text, where, card.service)}{without}")
    lines += [f"Never: {rule.text}" for rule in card.never]
    lines += [f"Ask: {unknown}" for unknown in card.uncertainties]
    return "\n".join(lines)


def build_messages(scenario: str, cards: Sequence[Card] | None, instruction: str = "", country: str = "", fits: int = 1) -> list[dict[str, str]]:
    """Chat messages that ask for an answer.

    cards: the knowledge cards to show, best first; only the safe minimum says that none fits; None means
    that prompts are not grounded (`dataset.grounding: none`). fits: how many of them fit, from the first.
    """
    blocks: list[str] = []
    for rank, card in enumerate(cards or ()):
        # A model this small cannot weigh two cards by itself; the heading passes on which ones retrieval trusts.
        heading = SAFE_HEADING if card.id == SAFE_MINIMUM else "CARD" if rank < fits else "OTHER CARD"
        blocks.append(render_card(card, heading, country))
    blocks += [text for text in (disarm(instruction).strip(),) if text]
    blocks += [f"SITUATION: {disarm(scenario).strip()}"] if scenario.strip() else []
    return [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": "\n\n".join(blocks)}]


def disarm(text: str) -> str:
    """A person's text with a space after each bracket that opens a control token, so that no report can end its own turn or write another's."""
    return _CONTROL.sub(lambda found: f"{found[0]} ", text)


def shown_cards(ids: Iterable[str], cards: Mapping[str, Card]) -> list[Card]:
    """The cards of a prompt: those that were found, or the safe minimum where none was."""
    return [cards[card_id] for card_id in ids] or [cards[SAFE_MINIMUM]]


def record_messages(record: Record, cards: Mapping[str, Card], grounding: str) -> list[dict[str, str]]:
    """The prompt of a record under `dataset.grounding`."""
    shown = shown_cards(record.cards or (), cards) if grounding == "cards" else None
    return build_messages(record.input, shown, record.instruction, record.country, record.fits)


def render_answer(answer: Answer) -> str:
    """An answer as text: bullets, and numbers for GUIDANCE, in the order to act."""
    blocks = []
    for section in SECTIONS:
        items = getattr(answer, section)
        marks = [f"{number}." for number in range(1, len(items) + 1)] if section == "guidance" else ["•"] * len(items)
        blocks.append("\n".join([section.upper(), *(f"{mark} {item}" for mark, item in zip(marks, items))]))
    return "\n\n".join(blocks)


_HEADING = re.compile(r"^[ \t]*(?:#{1,6}[ \t]*)?(?:\*\*|__)?(FACTS|UNCERTAINTIES|ANALYSIS|GUIDANCE)(?:\*\*|__)?[ \t]*:?(?:\*\*|__)?[ \t]*$")
_BULLET = re.compile(r"^[ \t]*(?:[•*\-–]|\d{1,3}[.)])[ \t]+(\S.*?)[ \t]*$")


def parse_answer(text: str) -> Parsed:
    """Read the four sections strictly: headings alone on their line, each followed by bullets.

    A line that follows a bullet without a mark of its own continues it.
    """
    found: list[tuple[str, list[str]]] = []
    problems: list[str] = []
    for line in text.splitlines():
        heading = _HEADING.match(line)
        if heading:
            found.append((heading.group(1).lower(), []))
        elif not line.strip():
            continue
        elif not found:
            problems.append(f"text before the first heading: {line.strip()[:60]!r}")
        elif bullet := _BULLET.match(line):
            found[-1][1].append(bullet.group(1))
        elif found[-1][1]:
            found[-1][1][-1] += " " + line.strip()
        else:
            problems.append(f"{found[-1][0].upper()} has text without a bullet: {line.strip()[:60]!r}")
    names = [name for name, _ in found]
    problems += [f"section {section.upper()} is missing" for section in SECTIONS if section not in names]
    problems += [f"section {section.upper()} stands {names.count(section)} times" for section in SECTIONS if names.count(section) > 1]
    if not problems and names != list(SECTIONS):
        problems.append("sections are not in the order " + ", ".join(section.upper() for section in SECTIONS))
    problems += [f"section {name.upper()} is empty" for name, items in found if not items]
    content: dict[str, tuple[str, ...]] = {}
    for name, items in found:
        content.setdefault(name, tuple(items))
    return Parsed(Answer(**content), tuple(problems))


def locate_lines(text: str) -> list[tuple[str, int, int]]:
    """`(section, start, end)` of every statement of an answer as offsets into its text, marks left out.

    section: "" before the first heading. A line that `parse_answer` would join to the one before stands by itself.
    """
    found: list[tuple[str, int, int]] = []
    section, start = "", 0
    for line in text.splitlines(keepends=True):
        bare = line.rstrip()
        if heading := _HEADING.match(bare):
            section = heading.group(1).lower()
        elif bare.strip():
            bullet = _BULLET.match(bare)
            begin = bullet.start(1) if bullet else len(bare) - len(bare.lstrip())
            found.append((section, start + begin, start + (bullet.end(1) if bullet else len(bare))))
        start += len(line)
    return found


def parse_json_answer(text: str) -> Parsed:
    """Read the JSON twin of an answer; the whole text must be one JSON object of ANSWER_SCHEMA."""
    try:
        value = json.loads(text)
    except ValueError as error:
        return Parsed(Answer(), (f"not JSON: {error}",))
    if not isinstance(value, dict):
        return Parsed(Answer(), (f"JSON {type(value).__name__}, not an object",))
    problems = [f"key {key!r} is not one of {', '.join(SECTIONS)}" for key in value if key not in SECTIONS]
    content: dict[str, tuple[str, ...]] = {}
    for section in SECTIONS:
        items = value.get(section)
        if not isinstance(items, list) or not items or not all(isinstance(item, str) and item.strip() for item in items):
            problems.append(f"{section!r} is not a list of texts with at least one")
        else:
            content[section] = tuple(items)
    return Parsed(Answer(**content), tuple(problems))


def read_answer(text: str) -> Parsed:
    """An answer in either form: JSON where it opens with a brace, else text."""
    return parse_json_answer(text) if text.lstrip().startswith("{") else parse_answer(text)
