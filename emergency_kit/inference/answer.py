"""Answer: one situation becomes events: the checked cards first, then the model's lines, then the whole.

In: an engine, the config, a situation. Out: `Found` (before the model writes a word), a `Line` for each line
that is whole, and `AnswerOut`. The model's words are never rewritten. Used by the server; no HTTP here.
"""

from __future__ import annotations

import functools
import json
import secrets
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Callable, Iterator, Mapping, Sequence, cast

from emergency_kit import __version__
from emergency_kit.artifacts import hash_parent
from emergency_kit.config import Resolved
from emergency_kit.data.format import build_messages, locate_lines, read_answer, shown_cards
from emergency_kit.errors import DataError
from emergency_kit.inference import schemas
from emergency_kit.inference.engine import Messages, Stream, check_length, open_engine
from emergency_kit.inference.grammar import build_grammar
from emergency_kit.inference.guard import CHOICES, guard_found
from emergency_kit.inference.guard import Line as GuardedLine
from emergency_kit.knowledge.cards import SAFE_MINIMUM, Card, Source, card_digest, load_cards
from emergency_kit.knowledge.emergency_numbers import Country, find_country, load_numbers, load_sources, localise
from emergency_kit.knowledge.retrieve import Found, Retriever

# Dividing by less overflows, and the most likely token is all that is left of the distribution.
GREEDY_BELOW = 1e-3


@dataclass(frozen=True)
class Asked:
    """A situation that is ready to be answered: checked, with its cards and its prompt."""

    situation: str
    country: str
    retrieved: Found
    found: schemas.Found
    messages: Messages
    prompt_tokens: int
    max_new_tokens: int
    temperature: float
    seed: int | None
    stop: tuple[str, ...]
    grammar: str
    as_json: bool


class Answerer:
    """A loaded model with its cards. `ask` and `answer` may run in several threads at once."""

    def __init__(self, resolved: Resolved, checkpoint: Path, slots: int):
        config = resolved.config
        self.settings = config.inference
        find_country(self.settings.country)
        self.cards = load_cards()
        self.grounded = config.dataset.grounding == "cards"
        self._retriever = Retriever(self.cards, config.dataset.top_k)
        self.engine = open_engine(config.model, checkpoint, slots)
        # Hugging Face's fast tokenizers refuse two threads at once ("Already borrowed").
        self._encoding = threading.Lock()
        self.model_id = checkpoint.stem if checkpoint.suffix == ".gguf" else checkpoint.resolve().name
        self._model_sha256 = hash_parent(checkpoint)
        self._cards_sha256 = card_digest(self.cards)

    def ask(self, situation: str, country: str = "", card_ids: Sequence[str] = (), instruction: str = "", max_tokens: int | None = None,
            temperature: float | None = None, seed: int | None = None, stop: Sequence[str] = (), as_json: bool = False) -> Asked:
        """Find the cards and build the prompt. card_ids: chosen by a person, instead of what retrieval finds first.
        as_json: the answer's text is the JSON twin of its four sections; asked for JSON itself, a small model forgets its card.

        Raises DataError for an unknown country or card, ModelError when the prompt does not fit the model.
        """
        country = (country or self.settings.country).upper()
        where = find_country(country)
        found = self._retriever.find(situation)
        if card_ids:
            found = self._choose(card_ids, found)
        shown = shown_cards(found.ids, self.cards)
        messages = build_messages(situation, shown if self.grounded else None, instruction, country, found.fits)
        with self._encoding:
            prompt = self.engine.encode(messages)
        limit = self.settings.max_new_tokens
        if self.engine.context_tokens is not None:
            limit = max(1, min(limit, self.engine.context_tokens - len(prompt)))
        check_length(prompt, limit, self.engine.context_tokens, "the prompt")
        limit = min(max_tokens or limit, limit)
        temperature = self.settings.temperature if temperature is None else temperature
        return Asked(situation, country, found, self._describe(found, shown, country, where), messages, len(prompt), limit,
                     temperature if temperature >= GREEDY_BELOW else 0.0, seed, tuple(stop),
                     build_grammar(limit) if as_json or self.settings.grammar else "", as_json)

    def answer(self, asked: Asked, should_stop: Callable[[], bool]) -> Iterator[str | schemas.Line | schemas.AnswerOut]:
        """Pieces of text as they are generated, a line when it is whole, at last the answer; nothing more once `should_stop` says so."""
        started = time.perf_counter()
        first: float | None = None
        with self._encoding:
            stream = self.engine.stream(asked.messages, asked.max_new_tokens, asked.temperature, asked.seed, should_stop, asked.stop, asked.grammar)
        shown = 0
        for piece in stream:
            first = first or time.perf_counter() - started
            if not asked.as_json:
                yield piece
            if "\n" in piece:
                lines, _ = self._check(asked, stream.text[:stream.text.rindex("\n") + 1])
                yield from lines[shown:]
                shown = len(lines)
        if not should_stop():
            lines, added = self._check(asked, stream.text)
            yield from lines[shown:]
            whole = self._whole(asked, stream, lines, added, time.perf_counter() - started, first)
            if asked.as_json:
                yield whole.text
            yield whole

    def knowledge(self) -> schemas.Knowledge:
        """All cards and countries."""
        return build_knowledge(self.cards, self.settings.country)

    def close(self) -> None:
        """Stop the engine."""
        self.engine.close()

    def _check(self, asked: Asked, text: str) -> tuple[list[schemas.Line], list[schemas.Added]]:
        """`(lines, added steps)` of what has been written; without the guard its lines alone."""
        if not self.settings.guard:
            return [schemas.Line(section=cast("schemas.Section", section) or None, text=text[start:end]) for section, start, end in locate_lines(text)], []
        guarded = guard_found(text, asked.retrieved, self.cards, asked.country, asked.situation)
        added = [schemas.Added(card_id=step.card_id, text=step.text, needs=step.without or None, instead=step.instead or None) for step in guarded.added]
        return [describe_line(line) for line in guarded.lines], added

    def _choose(self, card_ids: Sequence[str], found: Found) -> Found:
        ids = tuple(dict.fromkeys(card_ids))
        unknown = [card_id for card_id in ids if card_id not in self.cards]
        if unknown:
            raise DataError(f"cards: got {unknown[0]!r}; expected ids of GET /cards, for instance kitchen_grease_fire")
        chosen = () if ids == (SAFE_MINIMUM,) else ids
        return replace(found, ids=chosen, fits=len(chosen), unsure=False)

    def _describe(self, found: Found, shown: Sequence[Card], code: str, country: Country | None) -> schemas.Found:
        near = [hit.card_id for hit in found.ranked[:CHOICES]] if found.unsure else []
        return schemas.Found(
            cards=[describe_card(card, country) for card in shown], fits=found.fits, unsure=found.unsure,
            choices=[schemas.Choice(id=card_id, name=self.cards[card_id].name) for card_id in near],
            emergency=schemas.Emergency(service=shown[0].service, country=_describe_country(code, country) if country else None))

    def _whole(self, asked: Asked, stream: Stream, lines: list[schemas.Line], added: list[schemas.Added], seconds: float,
               first: float | None) -> schemas.AnswerOut:
        result = stream.result
        parsed = read_answer(result.text)
        return schemas.AnswerOut(
            **{name: getattr(asked.found, name) for name in schemas.Found.model_fields}, id=f"answer-{secrets.token_hex(12)}", created=int(time.time()),
            text=json.dumps(parsed.answer.to_dict(), ensure_ascii=False) if asked.as_json else result.text, sections=schemas.Sections(**parsed.answer.to_dict()), lines=lines, added=added,
            checks=schemas.Checks(four_sections=parsed.valid, problems=list(parsed.problems), ended=result.ended, guard=self.settings.guard),
            provenance=schemas.Provenance(
                model=self.model_id, kind=self.engine.description, model_sha256=self._model_sha256, cards_sha256=self._cards_sha256, kit_version=__version__,
                prompt_tokens=asked.prompt_tokens, completion_tokens=result.tokens, seconds=round(seconds, 3),
                first_token_seconds=None if first is None else round(first, 3), temperature=asked.temperature, seed=asked.seed))


def build_knowledge(cards: Mapping[str, Card], country: str) -> schemas.Knowledge:
    """All cards and countries, for a page that must work by itself."""
    countries = [_describe_country(code, each) for code, each in load_numbers().items()]
    return schemas.Knowledge(cards=[describe_card(card, None) for card in cards.values()], countries=sorted(countries, key=lambda each: each.name), country=country.upper())


def describe_line(line: GuardedLine) -> schemas.Line:
    """A guarded line as the server sends it."""
    return schemas.Line(
        section=cast("schemas.Section", line.section) or None, text=line.text, struck=schemas.Struck(card_id=line.card_id or None, rule=line.breaks) if line.breaks else None,
        from_card=schemas.FromCard(card_id=line.card_id, text=line.card_line) if line.card_line else None, unknown_numbers=list(line.numbers),
        on_card=line.on_card if line.section == "guidance" else None)


@functools.lru_cache(maxsize=1024)
def describe_card(card: Card, country: Country | None) -> schemas.CardOut:
    """A card as the server sends it, with the country's number in its texts."""
    actions = [schemas.ActionOut(text=localise(action.text, country, card.service), needs=action.needs,
                                 instead=action.instead and localise(action.instead, country, card.service)) for action in card.critical_actions]
    fields = {name: list(getattr(card, name)) for name in ("also_called", "signs", "dangers", "escalate_when", "uncertainties", "regional_notes")}
    return schemas.CardOut(id=card.id, category=card.category, name=card.name, service=card.service, critical_actions=actions,
                           never=[rule.text for rule in card.never], sources=[_describe_source(source) for source in card.sources], **fields)


def _describe_source(source: Source) -> schemas.SourceOut:
    return schemas.SourceOut(body=source.body, title=source.title, year=source.year)


def _describe_country(code: str, country: Country) -> schemas.CountryOut:
    sources = [_describe_source(load_sources()[name]) for name in country.sources]
    return schemas.CountryOut(code=code, name=country.name, ambulance=list(country.ambulance), fire=list(country.fire), police=list(country.police), sources=sources)
