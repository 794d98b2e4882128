"""Emergency numbers by country, from one file with sources.

In: `emergency_numbers.yaml` and a country's two-letter code (ISO 3166-1). Out: texts in which "your
local emergency number" is the country's own. Without a country the text stays as it is.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Annotated, Mapping

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from emergency_kit.errors import DataError
from emergency_kit.knowledge.cards import Line, Source

NUMBERS_FILE = Path(__file__).parent / "emergency_numbers.yaml"
ANY_COUNTRY = "your local emergency number"
Dialled = Annotated[str, Field(pattern=r"^[0-9]{2,6}$")]
Dialled_list = Annotated[tuple[Dialled, ...], Field(min_length=1, max_length=2)]


class Country(BaseModel):
    """The numbers of one country, the one to prefer first."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Line
    ambulance: Dialled_list
    fire: Dialled_list
    police: Dialled_list
    sources: tuple[Line, ...] = Field(min_length=1)

    def number(self, service: str) -> str:
        """`999 or 112` for a service; for `any` the number that all three share, or all of them by name."""
        if service != "any":
            return " or ".join(getattr(self, service))
        shared = [number for number in self.ambulance if number in self.fire and number in self.police]
        if shared:
            return " or ".join(shared)
        return f"{self.ambulance[0]} (ambulance), {self.fire[0]} (fire) or {self.police[0]} (police)"


class _File(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")
    sources: dict[str, Source]
    countries: dict[Annotated[str, Field(pattern=r"^[A-Z]{2}$")], Country]


@functools.lru_cache(maxsize=4)
def load_numbers(path: Path = NUMBERS_FILE) -> Mapping[str, Country]:
    """Countries by code; raises DataError for a file that is not well formed or names an unknown source."""
    return _load(path).countries


@functools.lru_cache(maxsize=4)
def load_sources(path: Path = NUMBERS_FILE) -> Mapping[str, Source]:
    """The sources that countries refer to, by name."""
    return _load(path).sources


def _load(path: Path) -> _File:
    try:
        file = _File(**yaml.load(path.read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader)))
    except (OSError, ValueError, yaml.YAMLError, TypeError) as error:
        raise DataError(f"{path}: cannot be read as YAML: {' '.join(str(error).split())}") from None
    except ValidationError as error:
        first = error.errors()[0]
        raise DataError(f"{path}: {'.'.join(map(str, first['loc']))}: got {first['input']!r:.60}; {first['msg']}") from None
    for code, country in file.countries.items():
        unknown = [source for source in country.sources if source not in file.sources]
        if unknown:
            raise DataError(f"{path}: {code}: source {unknown[0]!r} is not in the table of sources")
    return file


def find_country(code: str) -> Country | None:
    """The country of a code; None for the empty code. Raises DataError for an unknown one, naming near ones."""
    if not code:
        return None
    countries = load_numbers()
    if code.upper() not in countries:
        named = [known for known, country in countries.items() if code.lower() in (country.name.lower(), known.lower())]
        hint = f"did you mean {named[0]}?" if named else f"known are {', '.join(countries)}"
        raise DataError(f"country {code!r}: not in the list of emergency numbers; {hint} Leave it empty for 'your local emergency number'")
    return countries[code.upper()]


def localise(text: str, country: Country | None, service: str) -> str:
    """The text with the country's number in place of "your local emergency number"."""
    return text if country is None or ANY_COUNTRY not in text else text.replace(ANY_COUNTRY, country.number(service))
