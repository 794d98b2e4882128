"""Guard: what a model wrote, line by line as it wrote it, beside the checked guidance of the cards.

In: an answer's text and the cards that retrieval found. Out: `Guarded`: every line byte for byte, with what is wrong
with it (it breaks a never-rule, it is a card's line with a slip, it has a number that no card states), the
life-saving steps that it lacks, and the cards with their sources and emergency number. No word of the model is
rewritten or dropped here: those who show it strike a line, or show the card's line in its place, and say so.
Limits: those of `knowledge/rules.py::examine`, which finds what is advised; cards and retrieval are in English.
"""

from __future__ import annotations

import functools
import re
from dataclasses import asdict, dataclass
from typing import Any, Iterable, Mapping, Sequence

from rapidfuzz import fuzz

from emergency_kit.data.format import SECTIONS, locate_lines, parse_json_answer, render_answer
from emergency_kit.knowledge.cards import SAFE_MINIMUM, Card, normalise
from emergency_kit.knowledge.emergency_numbers import ANY_COUNTRY, Country, find_country, localise
from emergency_kit.knowledge.retrieve import Found
from emergency_kit.knowledge.rules import Examination, advises, examine, foreign_numbers

# A line this near to a card's line (0 to 100, rapidfuzz.fuzz.ratio on normalised text) is that line with a slip.
SLIP_RATIO = 80.0
# Cards whose never-rules hold beside those shown: retrieval's ranking is right more often than its first choice.
NEAR_CARDS = 5
# What a person is offered when retrieval is unsure.
CHOICES = 3
TALKS_OUT = "Talks the reader out of: "
# Calling for help may only be forbidden in a card's own words ("not from inside the car").
_REFUSES_HELP = re.compile(r"(?:do not|don't|dont|never|no need to|you need not) (?:call|phone|ring|dial|ask|shout|get|seek|send) (?:\w+ ){0,4}"
                           r"(?:help|emergency|ambulance|doctor|police|fire brigade|rescuers|999|112|911|000)\b")
# Section, start, end of a statement.
Place = tuple[str, int, int]


@dataclass(frozen=True)
class Line:
    """One statement as the model wrote it. section: "" outside the four; start, end: offsets into `Guarded.text`.

    breaks: the never-rule that it breaks, or the help that it talks out of; card_id: whose rule or line that is.
    card_line: the card's line, where this is it with a slip. numbers: digits that neither the cards nor the situation state.
    on_card: a step that is a line of a shown card, as it stands or with a slip.
    """

    section: str
    text: str
    start: int
    end: int
    breaks: str = ""
    card_id: str = ""
    card_line: str = ""
    numbers: tuple[str, ...] = ()
    on_card: bool = False


@dataclass(frozen=True)
class Step:
    """An action of a card. text: with the country's number; without, instead: what to do where something is lacking."""

    card_id: str
    text: str
    without: str = ""
    instead: str = ""


@dataclass(frozen=True)
class CardGuidance:
    """A card as people read it. fits: whether retrieval trusts it; number: whom to call, "" where no country is known."""

    id: str
    name: str
    fits: bool
    number: str
    service: str
    dangers: tuple[str, ...]
    steps: tuple[Step, ...]
    never: tuple[str, ...]
    escalate_when: tuple[str, ...]
    sources: tuple[str, ...]
    regional_notes: tuple[str, ...]


@dataclass(frozen=True)
class Guarded:
    """An answer with its checks. text: the model's, unchanged; lines: all its statements, in order.

    added: life-saving steps of fitting cards that it lacks, in the order to act. cards: the checked guidance, best
    first. number: the emergency number of the country for the first card, or "your local emergency number". unsure,
    choices: whether retrieval is close to a guess, and the `(id, name)` of cards to choose from.
    """

    text: str
    lines: tuple[Line, ...]
    added: tuple[Step, ...]
    cards: tuple[CardGuidance, ...]
    number: str
    country: str
    unsure: bool
    choices: tuple[tuple[str, str], ...]

    @property
    def struck(self) -> tuple[Line, ...]:
        """The lines that must not be shown as guidance."""
        return tuple(line for line in self.lines if line.breaks)

    @property
    def shown_text(self) -> str:
        """What a reader is told to do and know, struck lines left out and slips as on the card; for measuring."""
        blocks: dict[str, list[str]] = {section: [] for section in ("", *SECTIONS)}
        for line in self.lines:
            if not line.breaks:
                blocks[line.section].append(f"• {line.card_line or line.text}")
        blocks["guidance"] += [f"• {step.text}" for step in self.added]
        return "\n".join("\n".join([section.upper(), *lines]) for section, lines in blocks.items() if lines)

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self)


def guard(text: str, cards: Sequence[Card], country: str = "", fits: int = 1, near: Iterable[Card] = (), scenario: str = "",
          unsure: bool = False, choices: Iterable[Card] = ()) -> Guarded:
    """Check an answer against the cards of its situation.

    cards: shown to the model, best first; fits: how many of them, from the first, are trusted; near: more cards whose
    never-rules hold, which may also stand in `cards`. scenario: its numbers count as known. choices: cards to choose
    from where retrieval is `unsure`. A JSON answer is read as its text twin. Raises DataError for an unknown country.
    """
    where = find_country(country)
    text = render_answer(parse_json_answer(text).answer) if text.lstrip().startswith("{") else text
    others = [card for card in near if card not in cards]
    places = locate_lines(text)
    doubted = [card for card in (*cards[fits:], *choices) if card not in cards[:fits]] if unsure else []
    trusted = list(cards[:fits])
    contested = _find_contested(trusted, country, where)
    broken = _find_broken(text, places, cards, fits, others, doubted, contested, country, where)
    known = _card_lines(cards, where)
    own = {normalise(line) for _, line in known}
    said = set(normalise(scenario).split())
    lines = []
    for place in places:
        section, start, end = place
        written = text[start:end]
        rule, owner = broken.get(place, ("", ""))
        slip = _find_slip(written, known) if not rule and section == "guidance" else None
        strange = tuple(number for number in foreign_numbers([normalise(written)], cards, [where] if where else [])
                        if number not in said) if section == "guidance" else ()
        on_card = section == "guidance" and not rule and (slip is not None or normalise(written) in own)
        lines.append(Line(section, written, start, end, rule, owner or (slip[0] if slip else ""), slip[1] if slip else "", strange, on_card))
    added = _find_missing(text, lines, trusted, doubted, contested, country, where)
    guidance = tuple(_describe_card(card, rank < fits, where) for rank, card in enumerate(cards))
    number = where.number(cards[0].service if cards else "any") if where else ANY_COUNTRY
    return Guarded(text, tuple(lines), added, guidance, number, country.upper(), unsure, tuple((card.id, card.name) for card in choices) if unsure else ())


def guard_found(text: str, found: Found, library: Mapping[str, Card], country: str = "", scenario: str = "") -> Guarded:
    """`guard` with everything that retrieval found for a scenario; the safe minimum stands where no card fits."""
    cards = [library[card_id] for card_id in found.ids] or [library[SAFE_MINIMUM]]
    near = [library[hit.card_id] for hit in found.ranked[:NEAR_CARDS]]
    return guard(text, cards, country, max(found.fits, 1) if cards else 0, near, scenario, found.unsure, near[:CHOICES])


def _find_broken(text: str, places: Sequence[Place], cards: Sequence[Card], fits: int, others: Sequence[Card], doubted: Sequence[Card],
                 contested: Mapping[str, tuple[str, str]], country: str, where: Country | None) -> dict[Place, tuple[str, str]]:
    """`{place: (rule, card id)}` of every line that must be struck.

    A line of a card that fits is right as it stands, unless another that fits forbids it, and so is any card's line by its own rules; but
    where retrieval is unsure, it must also keep the never-rules of the cards that it may be instead (`doubted`). contested: of `_find_contested`.
    """
    trusted = cards[:fits]
    found = {place: contested[line] for place in places if (line := normalise(text[place[1]:place[2]])) in contested}
    right = {normalise(line) for _, line in _card_lines(trusted, where)}
    for section, start, end in places:
        if section in ("", "guidance") and _REFUSES_HELP.match(normalise(text[start:end])) and normalise(text[start:end]) not in right:
            found[section, start, end] = (f"{TALKS_OUT}calling for help", "")
    for group, exempt in ((trusted, right), *(([card], right | {normalise(line) for _, line in _card_lines([card], where)}) for card in cards[fits:]),
                          (others, right), *(([card], {normalise(line) for _, line in _card_lines([card], where)}) for card in doubted)):
        left = text
        for section, start, end in places:
            if normalise(text[start:end]) in exempt or (group is others and section in ("facts", "uncertainties")):
                left = _blank(left, start, end)
        for place, reason in _find_dangers(left, places, group, country).items():
            if normalise(text[place[1]:place[2]]) not in right or not reason[0].startswith(TALKS_OUT):
                found.setdefault(place, reason)
    return found


def _find_contested(trusted: Sequence[Card], country: str, where: Country | None) -> dict[str, tuple[str, str]]:
    """`{normalised action: (rule, card id)}`: actions of cards that fit which another of them forbids, better fitting or not (aspirin, beside a stroke).

    Patterns find some of another card's actions by chance; those were told by hand (`knowledge/chance.yaml`)."""
    found: dict[str, tuple[str, str]] = {}
    for card in trusted:
        others = tuple(other for other in trusted if other is not card)
        for _, line in _card_lines([card], where, rules=False) if others else ():
            if forbidden := _list_forbidding(line, others, country):
                found.setdefault(normalise(line), forbidden[0])
    return found


@functools.lru_cache(maxsize=1024)  # an answer is checked anew with each of its lines, and these do not change
def _list_forbidding(line: str, cards: tuple[Card, ...], country: str = "") -> tuple[tuple[str, str], ...]:
    """`(rule, card id)` of the never-rules that a line breaks; those that name it in their own words first, since they say best why."""
    named = {(rule.text, card.id) for card in cards for rule in card.never if any(advises(normalise(line), phrase) for phrase in rule.broken_by)}
    broken = [(rule.rule, rule.card_id) for rule in examine(f"GUIDANCE\n• {line}", cards, country).rules if rule.stance == "affirmed"]
    return tuple(sorted(broken, key=lambda rule: rule not in named))


def list_contested(cards: Mapping[str, Card]) -> list[tuple[str, str, str, int, str]]:
    """`(card id, its rule, other card id, number of its action, "text" or "instead")` of every action that another card forbids: for where nothing can be examined."""
    found = []
    for card in cards.values():
        others = tuple(other for other in cards.values() if other is not card)
        for number, action in enumerate(card.critical_actions):
            for part, line in (("text", action.text), ("instead", action.instead)):
                found += [(card_id, rule, card.id, number, part) for rule, card_id in (_list_forbidding(line, others) if line else ())]
    return found


def _find_dangers(text: str, places: Sequence[Place], cards: Sequence[Card], country: str) -> dict[Place, tuple[str, str]]:
    """What an examination finds; it names one place a rule, so what was found is blanked out and the rest examined again."""
    found: dict[Place, tuple[str, str]] = {}
    for _ in places if cards else ():
        hits = _list_dangers(examine(text, cards, country))
        struck = {place: hits[span] for span in hits for place in places if place[1] < span[1] and span[0] < place[2]}
        if not struck:
            break
        for place, reason in struck.items():
            found.setdefault(place, reason)
            text = _blank(text, place[1], place[2])
    return found


def _list_dangers(examination: Examination) -> dict[tuple[int, int], tuple[str, str]]:
    """`{span: (what is wrong, card id)}`."""
    hits = {rule.span: (rule.rule, rule.card_id) for rule in examination.rules if rule.stance == "affirmed" and rule.span}
    for item in examination.prohibitions:
        card_id, found, action = item.what.partition(": ")
        hits[item.span] = (f"{TALKS_OUT}{action}", card_id) if found else (f"{TALKS_OUT}{item.what.replace('_', ' ')}", "")
    return hits


def _blank(text: str, start: int, end: int) -> str:
    """The text with spaces in place of a line, so that offsets stay."""
    return text[:start] + " " * (end - start) + text[end:]


def _card_lines(cards: Iterable[Card], where: Country | None, rules: bool = True) -> list[tuple[str, str]]:
    """`(card id, line)` of everything on cards that guidance is made of, as their prompt shows it; without rules, of their actions."""
    found: list[tuple[str, str]] = []
    for card in cards:
        for action in card.critical_actions:
            found += [(card.id, localise(line, where, card.service)) for line in (action.text, action.instead) if line]
        found += [(card.id, rule.text) for rule in card.never] if rules else []
    return found


def _find_slip(written: str, known: Sequence[tuple[str, str]]) -> tuple[str, str] | None:
    """`(card id, card's line)` where a line is nearly one of the cards', None where it is one exactly or none."""
    line = normalise(written)
    best, best_ratio = None, SLIP_RATIO
    for card_id, card_line in known:
        target = normalise(card_line)
        if target in line and len(line) - len(target) <= 8:  # the line itself, or behind "First:" and the like
            return None
        ratio = fuzz.ratio(line, target)
        if ratio >= best_ratio:
            best, best_ratio = (card_id, card_line), ratio
    return best


def _find_missing(text: str, lines: Sequence[Line], trusted: Sequence[Card], doubted: Sequence[Card], contested: Mapping[str, tuple[str, str]],
                  country: str, where: Country | None) -> tuple[Step, ...]:
    """Critical actions that no line gives which stays, by its own words or as a card's line with a slip, and that no doubted card and no other that fits forbids."""
    left = text
    for line in lines:
        if line.breaks:
            left = _blank(left, line.start, line.end)
    shown = {normalise(line.card_line or line.text) for line in lines if not line.breaks}
    given = {(finding.card_id, finding.action) for finding in examine(left, trusted, country).actions if finding.given}
    added: list[Step] = []
    for card in trusted:
        for action in card.critical_actions:
            step = _describe_step(card, action, where)
            forbidden = any(rule.stance == "affirmed" for rule in examine(f"GUIDANCE\n• {step.text}", doubted, country).rules)
            if not forbidden and normalise(step.text) not in contested and (card.id, action.text) not in given and normalise(step.text) not in shown | {normalise(other.text) for other in added}:
                added.append(step)
    return tuple(added)


def _describe_step(card: Card, action: Any, where: Country | None) -> Step:
    return Step(card.id, localise(action.text, where, card.service), action.needs or "", localise(action.instead or "", where, card.service))


def _describe_card(card: Card, fits: bool, where: Country | None) -> CardGuidance:
    return CardGuidance(
        card.id, card.name, fits, where.number(card.service) if where else "", card.service, card.dangers,
        tuple(_describe_step(card, action, where) for action in card.critical_actions), tuple(rule.text for rule in card.never),
        card.escalate_when, tuple(f"{source.body}: {source.title} ({source.year})" for source in card.sources), card.regional_notes)
