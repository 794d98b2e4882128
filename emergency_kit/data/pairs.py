"""Pairs: every answer beside an unsafe twin, for preference training (`training.method: dpo`).

In: records whose answers follow knowledge cards. Out: `PairRows`. The twin is the same answer with one or two of its cards' never-rules
broken: a warning turned into advice, or a critical action given up for what the card forbids. It keeps the four sections, so that what
is learnt is the deed and not the form. Every twin is read back by the same rules that judge answers, and left out unless it is found
to be dangerous. Limits: a twin is wrong in the ways that cards foresee; records without such a card have none.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass, replace
from typing import Any, Iterable, Mapping

import numpy as np

from emergency_kit.artifacts import hash_json
from emergency_kit.config import Resolved
from emergency_kit.data.format import Answer, Record, parse_answer, render_answer
from emergency_kit.data.tokenize import TokenRows, encode
from emergency_kit.errors import DataError
from emergency_kit.knowledge.cards import Card, Never, load_cards
from emergency_kit.knowledge.rules import examine

_BAN = re.compile(r"^(?:do not|don't|never) ", re.IGNORECASE)
# Share of broken rules that take the place of a critical action; the others turn the warning itself round.
INSTEAD = 0.5
# Share that is worded by a phrase which breaks the rule instead of by the rule itself.
PHRASES = 0.25


def build_unsafe(record: Record, cards: Mapping[str, Card], seed: int) -> str | None:
    """The unsafe twin of a record's answer; None where its cards have no rule that a plain sentence breaks. The same for the same seed."""
    parsed = parse_answer(record.output)
    followed = [cards[name] for name in record.hazards if name in cards]
    chance = random.Random(f"{seed} {record.id}")
    rules = [(card, rule) for card in followed for rule in card.never]
    if parsed.problems or not rules:
        return None
    guidance, changed = list(parsed.answer.guidance), 0
    bans = {rule.text for _, rule in rules}
    for card, rule in chance.sample(rules, min(len(rules), chance.choice((1, 1, 2)))):
        deed = _break(rule, card, chance)
        if deed is None:
            continue
        steps = [place for place, text in enumerate(guidance) if text not in bans and not _BAN.match(text)]
        if rule.text in guidance and (chance.random() >= INSTEAD or len(steps) < 2):
            guidance[guidance.index(rule.text)] = deed
        elif len(steps) > 1:
            guidance[chance.choice(steps)] = deed
            if rule.text in guidance:
                guidance.remove(rule.text)
        else:
            continue
        changed += 1
    text = render_answer(Answer(parsed.answer.facts, parsed.answer.uncertainties, parsed.answer.analysis, tuple(guidance)))
    if not changed or not any(finding.stance == "affirmed" for finding in examine(text, followed, record.country, record.lacks).rules):
        return None
    return text


def _break(rule: Never, card: Card, chance: random.Random) -> str | None:
    """A sentence that advises what a never-rule forbids, as the judge reads it."""
    turned = [_BAN.sub("", rule.text)] if _BAN.match(rule.text) else []
    phrases = [f"{phrase}." for phrase in chance.sample(rule.broken_by, len(rule.broken_by))]
    # Rules are whole sentences; a phrase is often a torso, and no more than a spice.
    for deed in phrases + turned if chance.random() < PHRASES else turned + phrases:
        deed = deed[:1].upper() + deed[1:]
        found = examine(f"GUIDANCE\n1. {deed}", [card]).rules
        if any(finding.rule == rule.text and finding.stance == "affirmed" for finding in found):
            return deed
    return None


@dataclass(frozen=True)
class PairRows:
    """Rows of tokens, the safe answer's and its twin's, under the same prompt and in the same order."""

    chosen: TokenRows
    rejected: TokenRows

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index: int) -> tuple[dict[str, list[int]], dict[str, list[int]]]:
        return self.chosen[index], self.rejected[index]

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of both rows of each pair, shape (pairs,)."""
        return self.chosen.lengths + self.rejected.lengths

    @property
    def ids(self) -> np.ndarray:
        """All tokens of both."""
        return np.concatenate([self.chosen.ids, self.rejected.ids])

    @property
    def supervised(self) -> int:
        """Tokens of all answers."""
        return self.chosen.supervised + self.rejected.supervised

    def digest(self) -> str:
        """Hash of the tokens of both."""
        return hash_json([self.chosen.digest(), self.rejected.digest()])


def load_pairs(records: Iterable[Record], tokenizer: Any, resolved: Resolved, name: str) -> PairRows:
    """Pairs of a split, tokenised; raises DataError where no record has an unsafe twin."""
    cards, seed = load_cards(), resolved.config.training.seed
    records = list(records)
    twins = [(record, build_unsafe(record, cards, seed)) for record in records]
    pairs = [(record, replace(record, output=unsafe)) for record, unsafe in twins if unsafe]
    if not pairs:
        raise DataError(f"training.method dpo: none of the {len(records)} {name} records names a knowledge card with a rule to break (field hazards); "
                        "use the embedded dataset, or training.method sft")
    sides = [list(encode(side, tokenizer, resolved)) for side in zip(*pairs)]
    kept = [pair for pair in zip(*sides) if pair[0].ids and pair[1].ids]
    print(f"{len(kept)} pairs of a safe and an unsafe answer for {name}; {len(records) - len(pairs)} records have no unsafe twin"
          + (f", {len(pairs) - len(kept)} are too long" if len(kept) < len(pairs) else ""), flush=True)
    if not kept:
        raise DataError(f"no pair is within model.max_seq_length {resolved.config.model.max_seq_length}; raise it")
    return PairRows(*(_rows([pair[side] for pair in kept]) for side in (0, 1)))


def _rows(encoded: list[Any]) -> TokenRows:
    starts = np.cumsum([0, *(len(row.ids) for row in encoded)], dtype=np.int64)
    return TokenRows(np.concatenate([np.asarray(row.ids, np.int32) for row in encoded]), starts, np.asarray([row.prompt for row in encoded], np.int32))
