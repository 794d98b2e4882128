"""THIRD-PARTY-NOTICES.md is of the lock as it is now, and of all else that the code pins; what it says is read from the packages."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from emergency_kit.errors import DataError
from emergency_kit.kit import notices
from emergency_kit.kit.fetch import ONLY_ON, WLLAMA
from emergency_kit.model.bundled import WHEEL

LOCK, PAGE = Path("requirements.lock"), Path("THIRD-PARTY-NOTICES.md").read_text(encoding="utf-8")
NEXT = "next: make notices"


def table(heading: str, page: str = PAGE) -> list[list[str]]:
    """Rows of the table under a heading, without its head."""
    section = page.split(f"## {heading}\n", 1)[1].split("\n## ", 1)[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line.startswith("|")][2:]


def test_the_page_names_every_package_of_the_lock_in_its_version() -> None:
    pinned = {tuple(line.split("==")) for line in LOCK.read_text(encoding="utf-8").splitlines() if re.match(r"[A-Za-z]", line)}
    assert {(name, version) for name, version, _, _ in table("Python packages")} == pinned and len(pinned) > 50, NEXT


def test_the_page_names_what_else_the_code_pins() -> None:
    names = {row[0] for row in table("Not Python packages of the lock")}
    assert {WLLAMA, WHEEL, *(name for only in ONLY_ON.values() for name in only)} <= names, NEXT
    assert all(all(row) and row[3].startswith("https://") for row in table("Not Python packages of the lock"))


def test_every_package_has_a_licence_an_address_and_a_text_or_a_place_of_one() -> None:
    texts = {name for heading in re.findall(r"^### (.+)$", PAGE, re.MULTILINE) for name in heading.split(", ")}
    elsewhere = set(re.findall(r"^- ([\w.-]+):", PAGE.split("## Texts that are not repeated here", 1)[1].split("\n## ", 1)[0], re.MULTILINE))
    for name, _, licence, address in table("Python packages"):
        assert licence != "not said" and address.startswith("http"), name
        assert (name in texts) != (name in elsewhere), name


def test_the_generator_reads_the_installed_packages(tmp_path: Path) -> None:
    lock = tmp_path / "small.lock"
    lock.write_text("# two\n" + "".join(line + "\n" for line in LOCK.read_text(encoding="utf-8").splitlines() if line.startswith(("PyYAML==", "rich=="))))
    page = notices.build_page(lock)
    assert [(row[0], row[2]) for row in table("Python packages", page)] == [("PyYAML", "MIT (in kits too)"), ("rich", "MIT")]
    assert "Kirill Simonov" in page and "Will McGugan" in page
    lock.write_text("rich==1.0\n")
    with pytest.raises(DataError, match=r"rich: [\d.]+ is installed, small.lock has 1.0; next: rm .venv/installed.txt, then make setup"):
        notices.build_page(lock)
    lock.write_text("no-such-package==1.0\n")
    with pytest.raises(DataError, match="no-such-package==1.0 of small.lock is not installed; next: make setup"):
        notices.build_page(lock)
