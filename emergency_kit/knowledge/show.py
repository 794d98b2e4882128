"""Cards and emergency numbers as people read them: on the terminal, and as docs/Knowledge.md.

In: all cards. Out: `knowledge list`, `knowledge show HAZARD`, `knowledge check`, and the page in which a
domain expert reviews every rule.
"""

from __future__ import annotations

import difflib
from collections import defaultdict
from typing import Mapping

from rich.console import Console
from rich.table import Column, Table

from emergency_kit.errors import DataError, UsageError
from emergency_kit.knowledge.cards import Card, Number, load_cards
from emergency_kit.knowledge.check import MEANT, check_knowledge
from emergency_kit.knowledge.emergency_numbers import Country, find_country, load_numbers, load_sources, localise

from emergency_kit.knowledge.retrieve import Retriever


def list_cards() -> None:
    """Print every card: id, name, and how much stands on it."""
    console, cards = Console(highlight=False), load_cards()
    table = Table(Column("hazard", no_wrap=True), "name", "do", "never", "sources", "newest")
    for category, members in by_category(cards).items():
        table.add_section()
        table.add_row(category.replace("_", " ").upper(), style="bold")
        for card in members:
            table.add_row(card.id, card.name, str(len(card.critical_actions)), str(len(card.never)), str(len(card.sources)), str(max(source.year for source in card.sources)))
    console.print(table)
    console.print(f"{len(cards)} cards in {len(by_category(cards))} categories, emergency numbers of {len(load_numbers())} countries. One in full: emergency-kit knowledge show HAZARD")


def show_card(hazard: str, country: str = "") -> None:
    """Print one card in full; raises UsageError for an unknown one, naming near ones."""
    cards, where = load_cards(), find_country(country)
    wanted = hazard.strip().lower().replace(" ", "_").replace("-", "_")
    if wanted not in cards:
        names = {card.name.lower(): card.id for card in cards.values()} | {card_id: card_id for card_id in cards}
        near = [names[match] for match in difflib.get_close_matches(hazard.lower(), names, 3, 0.5)] + [card_id for card_id in cards if wanted and wanted in card_id]
        raise UsageError(f"no card {hazard!r}; {'near: ' + ', '.join(dict.fromkeys(near)) if near else 'see emergency-kit knowledge list'}")
    Console(highlight=False, markup=False, soft_wrap=False).print(describe_card(cards[wanted], where))


def find_cards(scenario: str, number: int) -> None:
    """Print the cards that come nearest to a scenario, and what an answer would be given."""
    cards = load_cards()
    found = Retriever(cards, 3).find(scenario)
    for hit in found.ranked[:number]:
        print(f"{hit.score:8.2f}  {hit.card_id:<24} {', '.join(hit.words)}")
    print(f"Cards: {found.describe(cards)}")


def describe_card(card: Card, where: Country | None = None) -> str:
    """A card as plain text."""
    lines = [f"{card.name} ({card.id}, {card.category.replace('_', ' ')}; calls: {card.service})", "", "Signs: " + "; ".join(card.signs) + ".", ""]
    lines += ["Danger: " + " ".join(card.dangers), "", "Do, in this order:"]
    for number, action in enumerate(card.critical_actions, 1):
        lines.append(f"  {number}. {localise(action.text, where, card.service)}")
        lines += [f"     Without {action.needs}: {action.instead}"] if action.instead else []
    lines += ["", "Never:", *(f"  - {rule.text}" for rule in card.never)]
    lines += ["", "Find out:", *(f"  - {unknown}" for unknown in card.uncertainties)]
    lines += ["", "Gets worse when:", *(f"  - {text}" for text in card.escalate_when)]
    lines += ["", "Numbers:", *(f"  - {_number(number)}" for number in card.numbers)] if card.numbers else []
    lines += ["", "Where guidance differs:", *(f"  - {note}" for note in card.regional_notes)] if card.regional_notes else []
    lines += ["", "Sources:", *(f"  - {source.body}: {source.title} ({source.year})" for source in card.sources)]
    return "\n".join(lines)


def _number(number: Number) -> str:
    low, high = number.tolerance
    span = f", {low:g} to {high:g} are taught" if low != high else ""
    return f"{number.what}: {number.value:g} {number.unit}{span} ({number.source}, {number.year})"


def print_check() -> None:
    """Print every problem; raises DataError where there is one."""
    cards, countries = load_cards(), load_numbers()
    problems = check_knowledge(cards, countries)
    for problem in problems:
        print(f"{problem.kind}: {problem.card}: {problem.text}")
    if problems:
        raise DataError(f"knowledge check: {len(problems)} problems in {len({problem.card for problem in problems})} cards; mend them in emergency_kit/knowledge/")
    rules = sum(len(card.critical_actions) + len(card.never) for card in cards.values())
    print(f"Nothing to mend: {len(cards)} cards, {rules} rules, {sum(len(card.numbers) for card in cards.values())} numbers, {len(countries)} countries; "
          f"{len(MEANT)} pairs of cards differ on purpose (docs/Knowledge.md).")


def by_category(cards: Mapping[str, Card]) -> dict[str, list[Card]]:
    """Cards by category, in file order."""
    groups: dict[str, list[Card]] = defaultdict(list)
    for card in cards.values():
        groups[card.category].append(card)
    return dict(groups)


def reference() -> str:
    """docs/Knowledge.md: every rule with what satisfies or breaks it, every number and source."""
    cards, countries = load_cards(), load_numbers()
    lines = [
        "# Knowledge", "",
        "Generated by `emergency-kit knowledge reference`; a test keeps it current. For a domain expert: every rule that answers are built from and "
        "held to, with its sources. No clinician has reviewed these cards; source years are those of the edition that the card was written from. "
        "To correct one, edit its file under `emergency_kit/knowledge/cards/`, run `emergency-kit knowledge check`, and generate this page again; answers change with no retraining.", "",
        f"{len(cards)} cards in {len(by_category(cards))} categories, {len(countries)} countries.", "", "## Cards", ""]
    for category, members in by_category(cards).items():
        lines.append(f"- **{category.replace('_', ' ')}**: " + ", ".join(f"[{card.name}](#{card.id})" for card in members))
    for category, members in by_category(cards).items():
        lines += ["", f"## {category.replace('_', ' ').capitalize()}"]
        for card in members:
            lines += _card_lines(card)
    lines += ["", "## Where two cards differ on purpose", "", "| advises | forbids | why both are right |", "|---|---|---|"]
    lines += [f"| {advising} | {forbidding} | {why} |" for (advising, forbidding), why in MEANT.items()]
    lines += ["", "## Emergency numbers", "", "| country | ambulance | fire | police | source |", "|---|---|---|---|---|"]
    lines += [f"| {country.name} ({code}) | {' or '.join(country.ambulance)} | {' or '.join(country.fire)} | {' or '.join(country.police)} | {', '.join(country.sources)} |"
              for code, country in countries.items()]
    lines += ["", *(f"- {name}: {source.body}, {source.title}, {source.year}" for name, source in load_sources().items())]
    return "\n".join(lines) + "\n"


def _card_lines(card: Card) -> list[str]:
    lines = ["", f'### <a id="{card.id}"></a>{card.name}', "", f"`{card.id}`, calls: {card.service}. Signs: {'; '.join(card.signs)}.", "", " ".join(card.dangers), "",
             "| | do | an answer gives it with any of |", "|---|---|---|"]
    for number, action in enumerate(card.critical_actions, 1):
        without = f" *Without {action.needs}:* {action.instead}" if action.instead else ""
        lines.append(f"| {number} | {action.text}{without} | {', '.join(action.phrases)} |")
    lines += ["", "| never | an answer breaks it when it advises any of |", "|---|---|"]
    lines += [f"| {rule.text} | {', '.join(rule.broken_by)} |" for rule in card.never]
    lines += ["", f"Find out: {' '.join(card.uncertainties)} Worse when: {' '.join(card.escalate_when)}"]
    lines += ["", *(f"- Number: {_number(number)}" for number in card.numbers)] if card.numbers else []
    lines += ["", *(f"- Differs: {note}" for note in card.regional_notes)] if card.regional_notes else []
    return lines + ["", "Sources: " + "; ".join(f"{source.body}, {source.title} ({source.year})" for source in card.sources) + "."]
