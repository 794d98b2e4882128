"""Emergency numbers: many countries, each with a source, and texts that name the right one."""

from __future__ import annotations

from pathlib import Path

import pytest

from emergency_kit.errors import DataError
from emergency_kit.knowledge.emergency_numbers import find_country, load_numbers, load_sources, localise

# Numbers that are beyond doubt: whoever edits the file by accident hears of it.
SURE = {"US": "911", "CA": "911", "GB": "999", "DE": "112", "AU": "000", "NZ": "111", "IN": "112", "IE": "112", "FR": "112", "BR": "192", "JP": "119", "CN": "120", "ZA": "10177"}


def test_at_least_sixty_countries_each_with_a_source() -> None:
    countries = load_numbers()
    assert len(countries) >= 60 and all(country.sources for country in countries.values())
    used = {source for country in countries.values() for source in country.sources}
    assert used == set(load_sources())
    eu = "AT BE BG CY CZ DE DK EE ES FI FR GR HR HU IE IT LT LU LV MT NL PL PT RO SE SI SK".split()
    for code in eu:
        country = countries[code]
        assert all("112" in numbers for numbers in (country.ambulance, country.fire)), code


@pytest.mark.parametrize(("code", "number"), SURE.items())
def test_numbers_that_are_beyond_doubt(code: str, number: str) -> None:
    assert number in load_numbers()[code].ambulance


def test_texts_name_the_number_of_the_service() -> None:
    text = "Call your local emergency number from outside."
    assert localise(text, None, "fire") == text
    assert localise(text, find_country("jp"), "fire") == "Call 119 from outside."
    assert localise(text, find_country("JP"), "police") == "Call 110 from outside."
    assert localise(text, find_country("US"), "any") == "Call 911 from outside."
    assert "ambulance" in localise(text, find_country("JP"), "any") and "110" in localise(text, find_country("JP"), "any")
    assert find_country("") is None


@pytest.mark.parametrize(("code", "hint"), [("XX", "known are"), ("Japan", "did you mean JP"), ("usa", "known are")])
def test_an_unknown_country_is_said_with_what_is_known(code: str, hint: str) -> None:
    with pytest.raises(DataError, match=hint):
        find_country(code)


@pytest.mark.parametrize(("content", "words"), [
    ("sources: {}\ncountries: [", "YAML"),
    ("sources: {}\ncountries: {GB: {name: UK, ambulance: ['999'], fire: ['999'], police: ['nine'], sources: [a]}}", "police"),
    ("sources: {}\ncountries: {GB: {name: UK, ambulance: ['999'], fire: ['999'], police: ['999'], sources: [a]}}", "source 'a'"),
    ("sources: {}\ncountries: {GB: {name: UK, ambulance: ['999'], fire: ['999'], police: ['999'], sources: []}}", "sources"),
    ("just text", "YAML"),
])
def test_a_broken_file_is_named(tmp_path: Path, content: str, words: str) -> None:
    path = tmp_path / "numbers.yaml"
    path.write_text(content)
    with pytest.raises(DataError, match="numbers.yaml") as caught:
        load_numbers(path)
    assert words in str(caught.value)
