"""Numbers: whether an answer's rates, depths, times, distances, doses and emergency numbers are the card's and the country's.

In: an answer's text and knowledge cards. Out: one `NumberFinding` a number that stands in ANALYSIS, GUIDANCE or
unsectioned text, and which emergency number is named. A number is faithful when it lies within the tolerance that a
card states for its unit, after conversion (inches, feet, °F ...). Limits: a right value with the wrong meaning
("5 minutes" for another step of the same card) is not seen; list marks, dates and addresses are not numbers.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, Sequence

from emergency_kit.knowledge.cards import Card
from emergency_kit.knowledge.emergency_numbers import find_country, load_numbers
from emergency_kit.knowledge.matching import Reading, compile_pattern
from emergency_kit.knowledge.statements import Sentence

# Unit as written (stem) -> unit of the cards, factor, offset: value * factor + offset.
_UNITS: dict[str, tuple[str, float, float]] = {
    "minut": ("minutes", 1, 0), "min": ("minutes", 1, 0), "mins": ("minutes", 1, 0), "hour": ("minutes", 60, 0), "hr": ("minutes", 60, 0), "h": ("minutes", 60, 0), "day": ("minutes", 1440, 0),
    "second": ("minutes", 1 / 60, 0), "sec": ("minutes", 1 / 60, 0), "cm": ("cm", 1, 0), "centimet": ("cm", 1, 0), "mm": ("cm", 0.1, 0), "inch": ("cm", 2.54, 0), "m": ("cm", 100, 0),
    "meter": ("cm", 100, 0), "km": ("cm", 100_000, 0), "kilomet": ("cm", 100_000, 0), "feet": ("cm", 30.48, 0), "foot": ("cm", 30.48, 0), "ft": ("cm", 30.48, 0), "yard": ("cm", 91.44, 0),
    "mile": ("cm", 160_934, 0), "mg": ("mg", 1, 0), "milligram": ("mg", 1, 0), "g": ("mg", 1000, 0), "gram": ("mg", 1000, 0), "kg": ("mg", 1_000_000, 0), "ml": ("ml", 1, 0),
    "millilit": ("ml", 1, 0), "liter": ("ml", 1000, 0), "l": ("ml", 1000, 0), "drop": ("drops", 1, 0), "percent": ("%", 1, 0), "%": ("%", 1, 0), "volt": ("volts", 1, 0), "year": ("years", 1, 0),
    "time": ("times", 1, 0), "blow": ("times", 1, 0), "thrust": ("times", 1, 0), "breath": ("times", 1, 0), "compress": ("times", 1, 0), "push": ("times", 1, 0), "puff": ("times", 1, 0),
}
_CARD_UNITS = {"minutes": ("minutes", 1), "hours": ("minutes", 60), "days": ("minutes", 1440), "seconds": ("minutes", 1 / 60), "cm": ("cm", 1), "m": ("cm", 100), "km": ("cm", 100_000),
               "kg": ("mg", 1_000_000), "g": ("mg", 1000), "mg": ("mg", 1), "ml": ("ml", 1), "litres": ("ml", 1000)}
ROUNDING = 0.1
"""Share by which a converted value may miss its tolerance: 5 cm is "2 inches"."""
_GROUPED = re.compile(r"[1-9]\d{0,2}(?:,\d{3})+(?:\.\d+)?")
_GROUPED_BY_POINTS = re.compile(r"[1-9]\d{0,2}(?:(?:\.\d{3}){2,}(?:,\d+)?|\.\d{3},\d+)")
_DIAL = tuple(compile_pattern(text) for text in ("<call>", "&number emergency"))
_GENERIC = tuple(compile_pattern(text) for text in ("emergency_number|emergency_services|emergency_service|emergency_line|ambulance", "<fire_service>", "<police>"))


@dataclass(frozen=True)
class NumberFinding:
    """One number of an answer. unit: of the cards, "" where none is named. verdict: "faithful", "wrong" (the card has
    that unit with another value) or "foreign" (no card has anything like it)."""

    value: float
    unit: str
    verdict: Literal["faithful", "wrong", "foreign"]
    span: tuple[int, int]


def check_numbers(reading: Reading, cards: Sequence[Card]) -> tuple[NumberFinding, ...]:
    """Every number of an answer that is not an emergency number, in its order."""
    known = [(*_card_range(number.unit, number.tolerance), number.unit) for card in cards for number in card.numbers]
    dialled = _all_dialled()
    found = []
    for item in reading.sentences:
        if item.sentence.section in ("facts", "uncertainties"):
            continue
        calls = any(token.stem in _call_stems() for token in item.sentence.tokens)
        for place, token in enumerate(item.sentence.tokens):
            if not token.low[0].isdecimal() or (calls and token.low in dialled) or (place and item.sentence.tokens[place - 1].low in ("step", "steps")):
                continue
            value = _quantity(token.low)
            if value is not None:
                found.append(_judge(value, _unit_after(item.sentence, place), known, (token.start, token.end)))
    return tuple(found)


def _quantity(text: str) -> float | None:
    """The value of a number as written: "1,200.5", "1.200,5", "0,5", "0.5"; None for what is no quantity: dates, versions, addresses ("1.2.2024")."""
    if _GROUPED.fullmatch(text):
        return float(text.replace(",", ""))
    if _GROUPED_BY_POINTS.fullmatch(text):
        return float(text.replace(".", "").replace(",", "."))
    return float(text.replace(",", ".")) if len(re.split("[.,]", text)) <= 2 else None


def _card_range(unit: str, tolerance: tuple[float, float]) -> tuple[str, float, float]:
    name, factor = _CARD_UNITS.get(unit, (unit, 1))
    return name, tolerance[0] * factor, tolerance[1] * factor


def _unit_after(sentence: Sentence, place: int) -> tuple[str, float, float]:
    """The unit that follows a number, "" for none: "5 to 6 cm", "100-120 compressions a minute", "104 °F"."""
    tail = sentence.tokens[place + 1:place + 7]
    lows = [token.low for token in tail]
    if "°" in lows[:2] or any(low in ("celsius", "fahrenheit") for low in lows[:3]):
        return ("°C", 5 / 9, -160 / 9) if any(low in ("f", "fahrenheit") for low in lows[:4]) else ("°C", 1, 0)
    for token in tail:
        if token.stem in _UNITS:
            if any(low in ("per", "a", "every", "each", "/") and lows[step + 1:step + 2] in (["minute"], ["min"]) for step, low in enumerate(lows)):
                return "per minute", 1, 0
            return _UNITS[token.stem]
        if not (token.low[0].isdecimal() or token.low in ("to", "or", "and", "-", "–", "more", "quick", "firm", "sharp", "rescue", "back", "chest", "abdominal", "gentle", "per", "a")):
            break
    return "", 1, 0


def _judge(value: float, unit: tuple[str, float, float], known: Sequence[tuple[str, float, float, str]], span: tuple[int, int]) -> NumberFinding:
    name, factor, offset = unit
    measured = value * factor + offset
    if not name:
        values = [bound / _CARD_UNITS.get(raw, ("", 1))[1] for _, low, high, raw in known for bound in (low, high)]
        return NumberFinding(value, "", "faithful" if any(abs(value - bound) < 1e-6 for bound in values) else "foreign", span)
    same = [(low, high) for kind, low, high, _ in known if kind == name]
    if any(low * (1 - ROUNDING) <= measured <= high * (1 + ROUNDING) for low, high in same):
        return NumberFinding(value, name, "faithful", span)
    return NumberFinding(value, name, "wrong" if same else "foreign", span)


def _all_dialled() -> frozenset[str]:
    return frozenset(number for country in load_numbers().values() for service in (country.ambulance, country.fire, country.police) for number in service) | {"911", "112", "999", "000"}


def emergency_number(reading: Reading, country: str) -> Literal["right", "wrong", "generic", "assumed", "absent"]:
    """Which emergency number an answer names: the country's ("right"), another's ("wrong"), none but in words
    ("generic"), one although no country was given ("assumed"), or no call at all ("absent").

    Raises DataError for an unknown country.
    """
    where, dialled = find_country(country), _all_dialled()
    named = set()
    for item in reading.sentences:
        if item.sentence.section in ("facts", "uncertainties"):
            continue
        calls = any(token.stem in _call_stems() for token in item.sentence.tokens)
        named |= {token.low for token in item.sentence.tokens if calls and token.low in dialled}
    if where is not None and named:
        own = {number for service in (where.ambulance, where.fire, where.police) for number in service}
        return "right" if named <= own else "wrong"
    if named:
        return "assumed"
    return "generic" if any(True for pattern in _GENERIC for _ in reading.find(pattern)) else "absent"


def _call_stems() -> frozenset[str]:
    return frozenset(words[0] for words in _DIAL[0].items[0])
