"""Cards on the terminal and in the docs: readable, complete, current; unknown names are helped along."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from emergency_kit.errors import DataError, UsageError
from emergency_kit.knowledge import show
from emergency_kit.knowledge.cards import load_cards
from emergency_kit.knowledge.emergency_numbers import find_country

CARDS = load_cards()


def test_the_page_for_experts_is_current() -> None:
    assert show.reference() == Path("docs/Knowledge.md").read_text(encoding="utf-8"), "run: emergency-kit knowledge reference > docs/Knowledge.md"


def test_the_page_holds_every_rule_phrase_number_and_source() -> None:
    page = show.reference()
    for card in CARDS.values():
        wanted = [text for action in card.critical_actions for text in (action.text, action.instead or "", *action.phrases)]
        wanted += [text for rule in card.never for text in (rule.text, *rule.broken_by)] + [number.what for number in card.numbers]
        wanted += [f"{source.title} ({source.year})" for source in card.sources] + list(card.regional_notes)
        assert not [text for text in wanted if text not in page], card.id


def test_a_card_is_shown_in_full_with_a_countrys_number() -> None:
    for card in CARDS.values():
        text = show.describe_card(card)
        assert all(part in text for part in (card.name, *(action.text for action in card.critical_actions), *(rule.text for rule in card.never), *card.uncertainties))
    assert "Call 119" in show.describe_card(CARDS["stroke"], find_country("JP"))


def test_an_unknown_card_names_near_ones() -> None:
    with pytest.raises(UsageError, match="near: stroke"):
        show.show_card("strok")
    with pytest.raises(UsageError, match="knowledge list"):
        show.show_card("zzzz")


def test_list_names_every_card(capsys: pytest.CaptureFixture[str]) -> None:
    show.list_cards()
    printed = capsys.readouterr().out
    assert all(card_id in printed for card_id in CARDS) and f"{len(CARDS)} cards" in printed


def test_check_passes_and_says_how_much_it_checked(capsys: pytest.CaptureFixture[str]) -> None:
    show.print_check()
    assert f"{len(CARDS)} cards" in capsys.readouterr().out


def test_check_fails_with_the_exit_code_of_data(monkeypatch: pytest.MonkeyPatch) -> None:
    stroke = CARDS["stroke"]
    broken = stroke.model_copy(update={"sources": (stroke.sources[0].model_copy(update={"year": 1999}),) * 2})
    monkeypatch.setattr(show, "load_cards", lambda: {**CARDS, "stroke": broken})
    with pytest.raises(DataError, match="problems in 1 cards") as caught:
        show.print_check()
    assert caught.value.exit_code == 3


@pytest.mark.parametrize(("arguments", "words", "code"), [
    (["knowledge", "show", "stroke"], ["Stroke", "Do, in this order", "Sources:"], 0),
    (["knowledge", "show", "Heat stroke"], ["heat_stroke"], 0),
    (["knowledge", "show", "strok"], ["near: stroke"], 2),
    (["knowledge", "show", "stroke", "--country", "XX"], ["country 'XX'"], 3),
    (["knowledge", "find", "the oil in my pan is on fire"], ["kitchen_grease_fire", "Cards:"], 0),
])
def test_the_verbs(arguments: list[str], words: list[str], code: int) -> None:
    done = subprocess.run([sys.executable, "-m", "emergency_kit.cli", *arguments], capture_output=True, text=True)
    assert done.returncode == code and "Traceback" not in done.stderr, done.stderr
    assert all(word in done.stdout + done.stderr for word in words), done.stdout + done.stderr
