"""Knowledge cards: what recognised bodies teach about one emergency, checked when loaded.

In: the YAML files under `cards/`, one a category, or another folder of the same form. Out: frozen
`Card` objects by id, ordered by file name, then by place in the file. Every problem is a `DataError`
of one line that names file, card, field and value. `normalise` is the only text normalisation that
phrases are matched with. Limits: cards are short general first aid in English; they were checked
against named sources by engineers, not by clinicians.
"""

from __future__ import annotations

import datetime
import functools
import re
import unicodedata
from pathlib import Path
from typing import Annotated, Any, Literal, Mapping, Optional

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StrictFloat, StrictInt, ValidationError, field_validator, model_validator

from emergency_kit.artifacts import hash_json
from emergency_kit.errors import DataError

CARD_FOLDER = Path(__file__).parent / "cards"
SAFE_MINIMUM = "safe_minimum"
"""The card for what no other card covers."""
_QUOTES = str.maketrans({"‘": "'", "’": "'", "‛": "'", "ʼ": "'", "“": '"', "”": '"', "„": '"'})
# Inside a number a point stays, inside a word an apostrophe: "don't" must remain a negation.
_PUNCTUATION = re.compile(r"(?!(?<=\d)\.(?=\d))(?!(?<=\w)'(?=\w))[\W_]")


def normalise(text: str) -> str:
    """Text as phrases are matched: lower case, NFKC, straight quotes, no punctuation, single spaces."""
    text = unicodedata.normalize("NFKC", text).translate(_QUOTES).lower()
    return " ".join(_PUNCTUATION.sub(" ", text).split())


def contains_phrase(normalised: str, phrase: str) -> bool:
    """Whether a normalised text holds a normalised phrase as whole words."""
    return f" {phrase} " in f" {normalised} "


def _check_line(text: str) -> str:
    if not text.strip() or text != text.strip() or any(unicodedata.category(letter) == "Cc" for letter in text):
        raise ValueError("expected one line of text without tabs or outer spaces")
    return text


def _check_phrase(phrase: str) -> str:
    if not phrase or phrase != normalise(phrase):
        raise ValueError(f"expected a normalised phrase: {normalise(phrase)!r}")
    return phrase


def _check_year(year: int) -> int:
    this_year = datetime.date.today().year
    if not 1990 <= year <= this_year:
        raise ValueError(f"expected a year between 1990 and {this_year}")
    return year


Line = Annotated[str, AfterValidator(_check_line)]
Phrase = Annotated[str, AfterValidator(_check_phrase)]
Year = Annotated[StrictInt, AfterValidator(_check_year)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


Resource = Literal["a phone", "running water", "another person", "a way to move", "the device"]
"""What an action can need and a scenario can lack; "the device" is the one that the action names (defibrillator, inhaler)."""
Unit = Literal["minutes", "hours", "days", "seconds", "per minute", "times", "cm", "m", "km", "°C", "kg", "g", "mg", "ml", "litres", "drops", "%", "volts", "years"]


class Action(_Frozen):
    """One thing to do."""

    text: Line
    """One short imperative sentence."""
    phrases: tuple[Phrase, ...] = Field(min_length=3)
    """Any one of these in a normalised answer shows that it gives the action; the first stands in `text`."""
    needs: Optional[Resource] = None
    """What the action cannot be done without."""
    instead: Optional[Line] = None
    """What to do where that is lacking: one short imperative sentence."""

    @model_validator(mode="after")
    def _first_phrase_in_text(self) -> Action:
        if not contains_phrase(normalise(self.text), self.phrases[0]):
            raise ValueError(f"expected the first phrase {self.phrases[0]!r} to stand in the text {self.text!r}")
        if (self.needs is None) != (self.instead is None):
            raise ValueError("expected `needs` and `instead` together")
        return self


class Never(_Frozen):
    """One thing not to do."""

    text: Line
    """One short sentence that starts with "Do not"."""
    broken_by: tuple[Phrase, ...] = Field(min_length=2)
    """Any one of these, advised rather than warned of, breaks the rule."""

    @field_validator("text")
    @classmethod
    def _starts_with_do_not(cls, text: str) -> str:
        if not text.startswith("Do not "):
            raise ValueError('expected a text that starts with "Do not"')
        return text


class Number(_Frozen):
    """A number that a card states, what it counts, and who says so."""

    what: Line
    value: StrictInt | StrictFloat
    unit: Unit
    tolerance: tuple[StrictInt | StrictFloat, StrictInt | StrictFloat]
    """Lowest and highest value that recognised bodies teach, both included."""
    source: Line
    year: Year

    @model_validator(mode="after")
    def _value_within_tolerance(self) -> Number:
        low, high = self.tolerance
        if not low <= self.value <= high:
            raise ValueError(f"expected the value {self.value} within its tolerance {low} to {high}")
        return self


class Source(_Frozen):
    """A publication of a recognised body."""

    body: Line
    title: Line
    year: Year


class Card(_Frozen):
    """One emergency: how it is known, why it is dangerous, what to do in order, what never to do."""

    id: str = Field(pattern=r"^[a-z][a-z0-9_]*$")
    category: Line
    """The name of the card's file; a file states it once for all its cards."""
    name: Line
    service: Literal["ambulance", "fire", "police", "any"]
    """Whom the emergency number has to reach, for countries with one number a service."""
    also_called: tuple[Line, ...] = Field(min_length=1)
    """Words that people use for it; for retrieval only."""
    signs: tuple[Line, ...] = Field(min_length=1)
    dangers: tuple[Line, ...] = Field(min_length=1)
    critical_actions: tuple[Action, ...] = Field(min_length=1)
    """In the order to act."""
    never: tuple[Never, ...] = Field(min_length=1)
    escalate_when: tuple[Line, ...] = Field(min_length=1)
    numbers: tuple[Number, ...]
    """Every number that the texts state in digits."""
    uncertainties: tuple[Line, ...] = Field(min_length=1)
    """What has to be found out."""
    sources: tuple[Source, ...] = Field(min_length=2)
    regional_notes: tuple[Line, ...]
    """Where recognised bodies differ."""


_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _UniqueKeyLoader(_Loader):
    """YAML keeps the last of two equal keys without a word; a second `never` list must not vanish like that."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [str(key.value) for key, _ in node.value]
        for (key, _), name in zip(node.value, keys):
            if keys.count(name) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"key {name!r} stands twice", key.start_mark)
        return super().construct_mapping(node, deep)


def load_cards(folder: Path | None = None) -> dict[str, Card]:
    """All cards of a folder (default: the package's own) by id.

    Raises DataError when the folder or a file cannot be read, or a card is not well formed.
    """
    return dict(_load_folder(Path(folder or CARD_FOLDER).resolve()))


@functools.lru_cache(maxsize=8)
def _load_folder(folder: Path) -> Mapping[str, Card]:
    paths = sorted(folder.glob("*.yaml"))
    if not paths:
        raise DataError(f"{folder}: got no .yaml file; expected a folder of knowledge cards")
    cards: dict[str, Card] = {}
    for path in paths:
        for card in _load_file(path):
            if card.id in cards:
                raise DataError(f"{path}: card {card.id}: id: got {card.id!r} twice (also in category {cards[card.id].category}); expected unique ids")
            cards[card.id] = card
    return cards


def _load_file(path: Path) -> list[Card]:
    try:
        document = yaml.load(path.read_text(encoding="utf-8"), _UniqueKeyLoader)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:  # ValueError: not UTF-8, or a date of no calendar
        raise DataError(f"{path}: cannot be read as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(document, dict) or set(document) != {"category", "cards"} or not isinstance(document["cards"], list):
        raise DataError(f"{path}: expected exactly two keys, category and a list of cards")
    if document["category"] != path.stem:
        raise DataError(f"{path}: category: got {document['category']!r}; expected {path.stem!r}, the file's name")
    return [_build_card(path, place, raw) for place, raw in enumerate(document["cards"], 1)]


def _build_card(path: Path, place: int, raw: Any) -> Card:
    if not isinstance(raw, dict):
        raise DataError(f"{path}: card number {place}: got {raw!r:.80}; expected a mapping")
    name = raw.get("id", f"number {place}")
    if "category" in raw:
        raise DataError(f"{path}: card {name}: category: got {raw['category']!r}; expected it once at the head of the file")
    try:
        return Card(category=path.stem, **{str(key): value for key, value in raw.items()})
    except ValidationError as error:
        first, *others = error.errors()
        place_in_card = ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        rest = f" (and {len(others)} more)" if others else ""
        raise DataError(f"{path}: card {name}: {place_in_card}: got {first['input']!r:.80}; {message}{rest}") from error


def card_digest(cards: Mapping[str, Card]) -> str:
    """Hex sha256 over the cards' content, whatever their order."""
    return hash_json({card_id: card.model_dump(mode="json") for card_id, card in cards.items()})
