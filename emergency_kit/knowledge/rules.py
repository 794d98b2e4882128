"""Rules: whether statements of guidance give a card's actions, keep its never-rules and state its numbers.

In: normalised statements and a card. Out: findings. Matching is plain: a phrase as whole words; a phrase
behind "do not", "never" or the like in the same statement is a warning, not advice, and a statement that
opens with one gives no action, except one that is itself worded so.
Limits: wording that no phrase foresees is not found; the phrases are the card's.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Iterable, Sequence

from emergency_kit.knowledge import scope
from emergency_kit.knowledge.cards import Action, Card, contains_phrase, normalise
from emergency_kit.knowledge.emergency_numbers import ANY_COUNTRY, Country, find_country, localise
from emergency_kit.knowledge.lexicon import lexicon
from emergency_kit.knowledge.matching import Match, Pattern, Reading, stance_of
from emergency_kit.knowledge.patterns import card_patterns, load_chance, load_prohibitions, phrase_pattern
from emergency_kit.knowledge.statements import Sentence

_WARNING = re.compile(r"\b(?:do not|don't|dont|never|avoid|without|instead of|rather than|not to|no)\b")
_FORBIDS = re.compile(r"^(?:do not|don't|dont|never|avoid) ")
_NUMBER = re.compile(r"\d+(?:\.\d+)?")


def advises(statement: str, phrase: str) -> bool:
    """Whether a normalised statement advises a phrase rather than warns of it."""
    before, found, _ = f" {statement} ".partition(f" {phrase} ")
    return bool(found) and not _WARNING.search(before)


def gives_action(statements: Iterable[str], action: Action, card: Card, country: Country | None = None, lacks: Sequence[str] = ()) -> bool:
    """Whether any statement gives an action, or what stands in for it where a resource is lacking."""
    phrases = set(action.phrases)
    if country:
        phrases |= {normalise(localise(phrase, country, card.service)) for phrase in action.phrases if ANY_COUNTRY in phrase}
    if action.instead and action.needs in lacks:
        phrases.add(normalise(action.instead))
    return any(contains_phrase(statement, phrase) for statement in statements for phrase in phrases
               if not _FORBIDS.match(statement) or _FORBIDS.match(phrase))


def broken_rules(statements: Sequence[str], card: Card) -> list[tuple[str, str]]:
    """`(never-rule, statement)` of every rule that a statement breaks."""
    return [(rule.text, statement) for rule in card.never for statement in statements if any(advises(statement, phrase) for phrase in rule.broken_by)]


def foreign_numbers(statements: Iterable[str], cards: Sequence[Card], countries: Sequence[Country] = ()) -> list[str]:
    """Numbers in statements that neither the cards nor a country's list of emergency numbers state."""
    known = {float(number.value) for card in cards for number in card.numbers}
    known |= {float(value) for country in countries for service in (country.ambulance, country.fire, country.police) for value in service}
    return [number for statement in statements for number in _NUMBER.findall(statement) if float(number) not in known]


@dataclass(frozen=True)
class ActionFinding:
    """Whether an answer gives one critical action. action: its text on the card; span: where, as offsets into the answer."""

    card_id: str
    action: str
    given: bool
    span: tuple[int, int] | None = None


@dataclass(frozen=True)
class RuleFinding:
    """What an answer says of one never-rule. rule: its text on the card; stance: "affirmed" (harm), "warned" or "silent"."""

    card_id: str
    rule: str
    stance: str
    span: tuple[int, int] | None = None


@dataclass(frozen=True)
class Prohibition:
    """Help that an answer talks the reader out of. what: a short name; span: where."""

    what: str
    span: tuple[int, int]


@dataclass(frozen=True)
class Examination:
    """Everything that an answer says of its cards' actions and never-rules, in the cards' order."""

    actions: tuple[ActionFinding, ...]
    rules: tuple[RuleFinding, ...]
    prohibitions: tuple[Prohibition, ...]


def examine(text: str, cards: Iterable[Card], country: str = "", lacks: Sequence[str] = ()) -> Examination:
    """What an answer says of the cards of its situation.

    country: two-letter code whose emergency number counts as the local one. lacks: resources whose replacement
    counts as the action. Raises DataError for an unknown country.
    """
    return examine_reading(Reading(text), cards, country, lacks)


def examine_reading(reading: Reading, cards: Iterable[Card], country: str = "", lacks: Sequence[str] = ()) -> Examination:
    """The same of a text that has been read already; reading takes over a third of the time with one card."""
    where, cards = find_country(country), tuple(cards)
    actions, rules = [], []
    for card in cards:
        patterns = card_patterns(card)
        actions += [_examine_action(reading, card, action, patterns.actions[action.text], where, lacks) for action in card.critical_actions]
        rules += [_examine_rule(reading, card, rule.text, patterns.never[rule.text], patterns.excuses.get(rule.text, frozenset())) for rule in card.never]
    return Examination(tuple(actions), tuple(rules), tuple(_find_prohibitions(reading, cards, actions, rules)))


def _find_prohibitions(reading: Reading, cards: Sequence[Card], actions: Sequence[ActionFinding], rules: Sequence[RuleFinding]) -> list[Prohibition]:
    """Help that is talked down, and time-critical actions that are forbidden outright.

    What a card itself says in that place (a never-rule kept, an action that is a ban) is no prohibition.
    """
    own = [finding.span for finding in actions if finding.span] + [finding.span for finding in rules if finding.span and finding.stance == "warned"]
    nothing: frozenset[str] = frozenset()
    wanted = [(name, pattern, False, nothing) for name, patterns in load_prohibitions().items() for pattern in patterns]
    for card in cards:
        patterns = card_patterns(card)
        wanted += [(f"{card.id}: {action}", pattern, True, load_chance().get((card.id, action), nothing)) for action in patterns.time_critical for pattern in patterns.actions.get(action, ()) if not pattern.wants_ban and len(pattern.items) > 1]
    found: dict[tuple[int, int], Prohibition] = {}
    for name, pattern, bans_action, chance in wanted:
        for match in reading.find(pattern):
            sentence = reading.sentences[match.sentence].sentence
            if chance and normalise(reading.text[sentence.start:sentence.end]) in chance:
                continue
            banned = match.flags & scope.NEG and not match.flags & (scope.LIMITED | scope.COND | scope.TOLD | scope.AFTER | scope.BEFORE)
            head = next(place for place, token in enumerate(sentence.tokens) if token.start >= match.start)
            # "Start CPR if they are not breathing" denies the breathing, not the CPR.
            banned = banned and bool(not bans_action or reading.sentences[match.sentence].flags[head] & scope.NEG)
            if sentence.section in ("facts", "uncertainties") or (bans_action and (not _opens(sentence, match) or _meets(own, sentence.start, sentence.end))):
                continue
            if not (banned if bans_action or pattern.wants_ban else match.stance == "affirmed"):
                continue
            if _meets(own, match.start, match.end) or _meets(found, match.start, match.end):
                continue
            found[match.start, match.end] = Prohibition(name, (match.start, match.end))
    return [found[span] for span in sorted(found)]


def _meets(spans: Iterable[tuple[int, int]], start: int, end: int) -> bool:
    """Whether any span shares a character with start to end."""
    return any(first < end and start < last for first, last in spans)


def _examine_action(reading: Reading, card: Card, action: Action, patterns: Sequence[Pattern], country: Country | None, lacks: Sequence[str]) -> ActionFinding:
    wanted = list(patterns)
    if country:
        wanted += [phrase_pattern(normalise(localise(phrase, country, card.service))) for phrase in action.phrases if ANY_COUNTRY in phrase]
    sectioned = any(item.sentence.section == "guidance" for item in reading.sentences)
    instead = phrase_pattern(normalise(action.instead)) if action.instead and action.needs in lacks else None
    spans: dict[int, list[tuple[bool, int, int]]] = {}
    for pattern in (*wanted, instead) if instead else wanted:
        for match in reading.find(pattern):
            section = reading.sentences[match.sentence].sentence.section
            # What stands in for an action may itself be a ban ("give nothing by mouth").
            if (section != "guidance" if sectioned else section in ("facts", "uncertainties")) or (pattern is not instead and stance_of(match, pattern) != "affirmed"):
                continue
            spans.setdefault(match.sentence, []).append((pattern.wants_ban, match.start, match.end))
    if not spans:
        return ActionFinding(card.id, action.text, False)
    # The action stands where most of its patterns meet; a lone word may fit an earlier step by chance.
    best = min(spans, key=lambda number: (-sum(not ban for ban, _, _ in spans[number]), -len(spans[number]), number))
    _, start, end = min(spans[best])
    return ActionFinding(card.id, action.text, True, (start, end))


def _examine_rule(reading: Reading, card: Card, rule: str, patterns: Sequence[Pattern], excuses: frozenset[str]) -> RuleFinding:
    """One rule: affirmed anywhere outweighs a warning elsewhere, since a reader may act on either."""
    stances: dict[str, tuple[int, int]] = {}
    chance = load_chance().get((card.id, rule), frozenset())
    for pattern in patterns:
        for match in reading.find(pattern):
            sentence = reading.sentences[match.sentence].sentence
            if sentence.section == "uncertainties" or (sentence.section == "facts" and not _orders(sentence, match)):
                continue
            stance = stance_of(match, pattern)
            if stance == "affirmed" and (match.flags & (scope.BEFORE | scope.AWAY) or _is_tap_water(sentence, match) or excuses & reading.sentences[match.sentence].at.keys()
                                          or chance and normalise(reading.text[sentence.start:sentence.end]) in chance):
                continue
            stances.setdefault(stance, (match.start, match.end))
    for stance in ("affirmed", "warned"):
        if stance in stances:
            return RuleFinding(card.id, rule, stance, stances[stance])
    return RuleFinding(card.id, rule, "silent")


def _is_tap_water(sentence: Sentence, match: Match) -> bool:
    """Whether a match begins with the adjective of "cool it under running water", which has nobody run water anywhere."""
    place = next(number for number, token in enumerate(sentence.tokens) if token.start >= match.start)
    lows = [token.low for token in sentence.tokens]
    return lows[place:place + 2] == ["running", "water"] and bool({"under", "with", "in"} & set(lows[max(0, place - 2):place]))


def _opens(sentence: Sentence, match: Match) -> bool:
    """Whether a banned verb is the sentence's first deed: "Do not X", "You should never X"."""
    before = [token.low for token in sentence.tokens if token.start < match.start]
    head = next(token for token in sentence.tokens if token.start >= match.start)
    return len(before) <= 4 and before[-1:] != ["to"] and "advice" not in before and head.stem in lexicon().verbs and head.low != "is"


def _orders(sentence: Sentence, match: Match) -> bool:
    """Whether a sentence of FACTS is an order after all: it opens with the bare verb that was matched."""
    first = sentence.tokens[0]
    return match.start == first.start and first.stem in lexicon().verbs and not first.low.endswith(("s", "ed", "ing"))
