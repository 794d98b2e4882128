"""docs/Troubleshooting.md has an entry for every message that a command can end with, and none for a message that is no more."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from pathlib import Path

import pytest

from emergency_kit import errors
from tests.messages import HOLE, Message, Package, words

PAGE = Path("docs/Troubleshooting.md")
# Texts that the source could put together and no run does.
IMPOSSIBLE = {
    "emergency_kit/export/verdict.py": (": ship (", "a model that may ship is not refused"),
    "emergency_kit/data/cache.py": ("differs from its checksum", "caught in the same function: the split is tokenised anew, and that is said")}
# Places that hand on a message that was made elsewhere.
FORWARDS = {"emergency_kit/data/load.py"}
# A pattern of so few words finds nothing by itself, unless it is the whole message.
LEAST_WORDS = 3


@dataclass(frozen=True)
class Entry:
    patterns: tuple[str, ...]
    rest: str
    line: int
    exit_code: int | None  # of the section that it stands in, where that is of one


def entries(text: str) -> list[Entry]:
    """List items that begin with quoted messages."""
    found = []
    for item in re.finditer(r"^- (`[^\n]*(?:\n  [^\n]*)*)", text, re.MULTILINE):
        quoted, rest = re.match(r"((?:`[^`]+`,?\s*)+)(.*)", item[1], re.DOTALL).groups()
        section = re.findall(r"^## (.*)", text[:item.start()], re.MULTILINE)[-1]
        code = re.search(r"exit code (\d+)", section)
        found.append(Entry(tuple(re.findall(r"`([^`]+)`", quoted)), rest, text[:item.start()].count("\n") + 1, int(code[1]) if code else None))
    return found


@functools.cache
def expression(pattern: str) -> re.Pattern[str]:
    """A regular expression of a quoted message, from its beginning on; `...` at the beginning is a hole, elsewhere it may leave out words, too.

    One of few words must be the whole message, and `...` its holes.
    """
    short = words(pattern) < LEAST_WORDS
    pieces = [re.escape(" ".join(piece.split())) for piece in re.split(r"\s*\.\.\.(?!\.)\s*", pattern)]
    gap = r"[\0\W]*\0[\0\W]*?" if short else "[^\n]*?"
    return re.compile((r"\0" + gap if not pieces[0] and not short else "") + gap.join(pieces[not pieces[0] and not short:]) + ("$" if short else ""))


@pytest.fixture(scope="module")
def package() -> Package:
    return Package()


@pytest.fixture(scope="module")
def messages(package: Package) -> list[Message]:
    found = sorted(set(package.messages()), key=lambda message: (message.place, message.text))
    return [message for message in found if IMPOSSIBLE.get(file_of(message), ("\n", ""))[0] not in message.text]


@pytest.fixture(scope="module")
def page() -> str:
    return PAGE.read_text(encoding="utf-8")


def file_of(message: Message) -> str:
    return message.place.rpartition(":")[0]


def matched(entry: Entry, messages: list[Message]) -> set[Message]:
    patterns = [expression(pattern) for pattern in entry.patterns]
    return {message for message in messages if any(pattern.match(message.text) for pattern in patterns)}


def missing(text: str, messages: list[Message]) -> list[str]:
    patterns = [expression(pattern) for entry in entries(text) for pattern in entry.patterns]
    return [f"{message.place}: {message.text.replace(HOLE, '...')}" for message in messages if words(message.text) and not any(pattern.match(message.text) for pattern in patterns)]


def stale(text: str, messages: list[Message]) -> list[str]:
    return [f"{PAGE}:{entry.line}: {pattern}" for entry in entries(text) for pattern in entry.patterns
            if not any(expression(pattern).match(message.text) for message in messages)]


def test_every_message_has_an_entry(page: str, messages: list[Message]) -> None:
    assert not missing(page, messages)


def test_no_entry_is_stale(page: str, messages: list[Message]) -> None:
    assert not stale(page, messages)


def test_every_error_is_found_under_its_exit_code(page: str, messages: list[Message]) -> None:
    found = [(entry.exit_code, matched(entry, messages)) for entry in entries(page)]
    for message in messages:
        code = getattr(getattr(errors, message.kind, None), "exit_code", None)
        assert code is None or not words(message.text) or any(message in known and code == section for section, known in found), (code, message)


def test_every_entry_names_a_cause_and_a_remedy(page: str) -> None:
    for entry in entries(page):
        assert re.match(r":\s+\S.{10,}\*\*Do:\*\* \S.{8,}", entry.rest, re.DOTALL), f"{PAGE}:{entry.line}: {entry.patterns[0]}"


def test_an_entry_that_is_taken_out_is_missed(page: str, messages: list[Message]) -> None:
    """No other entry says the same, so that each one's end is seen."""
    found = {entry: matched(entry, messages) for entry in entries(page)}
    for entry in found:
        assert found[entry] - set().union(*(other for one, other in found.items() if one != entry and one.exit_code == entry.exit_code)), f"{PAGE}:{entry.line}: said by others, too"
    without = re.sub(r"\n- `a finished model is already in .*", "", page)
    assert [line.partition(": ")[0].rpartition(":")[0] for line in missing(without, messages)] == ["emergency_kit/training/resume.py"]


def test_an_entry_for_a_message_of_before_is_named(page: str, messages: list[Message]) -> None:
    old = page.replace("\n## Stopped", "\n- `the tape drive is out of paper`: of before. **Do:** nothing any more.\n\n## Stopped", 1)
    assert [line.partition(": ")[2] for line in stale(old, messages)] == ["the tape drive is out of paper"]


def test_every_error_of_the_family_is_read(package: Package, messages: list[Message]) -> None:
    """The collector must not lose sight of a `raise`: each is at hand with words of its own, or hands a message on."""
    said = {message.place for message in messages if words(message.text)}
    unread = [f"{path}:{call.lineno}" for path, call, _ in package.at if getattr(call.func, "id", "") in package.errors and call.args and f"{path}:{call.lineno}" not in said]
    assert {place.rpartition(":")[0] for place in unread} == FORWARDS, unread
    assert len(said) > 370


def test_messages_are_followed_to_where_they_are_made(tmp_path: Path) -> None:
    (tmp_path / "errors.py").write_text("class KitError(Exception): pass\nclass DataError(KitError): pass\nclass ConfigError(KitError): pass\n")
    (tmp_path / "room.py").write_text('''
def why(name):
    return f"is called {name}" if name else "has no name at all"

def names(rows, problems):
    for row in rows:
        problems.append(f"row {row}: " + why(row))
    tell(problems)

def tell(problems):
    if problems:
        raise ConfigError(problems)

def refuse(text):
    raise DataError(text)

def read(path):
    problem = "cannot be read today" if path else ""
    if problem:
        raise DataError(f"{path}: {problem}")
    refuse(f"file {path} is on the moon")
''')
    found = {message.text.replace(HOLE, "...") for message in Package(tmp_path).messages()}
    assert {"row ...: is called ...", "row ...: has no name at all", "...: cannot be read today", "file ... is on the moon"} <= found
