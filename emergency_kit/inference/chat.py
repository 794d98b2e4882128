"""Chat: one situation or a session of them, answered on the terminal or in a pipe.

In: `--prompt`, or lines on stdin, one situation a line; `/help` lists what else a session knows. Out: on stdout the
guarded answer (with `--no-guard` the model's text alone, with `--json` one JSON object a situation); notes and
prompts on stderr. The checked guidance is shown before the model has written a word, and a line of the model
once it is whole and checked. Run: `emergency-kit infer --prompt "the oil in my pan is on fire"`.
"""

from __future__ import annotations

import contextlib
import json
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Iterator

from emergency_kit.config import InferenceConfig, Resolved
from emergency_kit.data.format import build_messages, read_answer, shown_cards
from emergency_kit.errors import DataError, Interrupted, ModelError, UsageError
from emergency_kit.inference.engine import Stream, check_model, open_engine
from emergency_kit.inference.grammar import build_grammar
from emergency_kit.inference.guard import Guarded, guard_found
from emergency_kit.inference.show import Page, explain
from emergency_kit.inference.warm_up import start_warm_up
from emergency_kit.knowledge.cards import Card, load_cards
from emergency_kit.knowledge.emergency_numbers import find_country
from emergency_kit.knowledge.retrieve import Found, Retriever

LEAVE = ("quit", "exit", "/quit", "/exit")
HELP = """Describe the situation in one line, then Enter. Ctrl-C stops an answer; quit, exit or Ctrl-D leaves.
  /region GB   the country whose emergency number is shown; /region alone forgets it
  /add TEXT    say more about the last situation, and have it answered again
  /card NAME   answer the last situation with this card; a number chooses among those offered
  /why         where the last answer comes from, and what was struck or added
  /json        one JSON object an answer, or text again
  /help        this list"""


@dataclass
class _Asked:
    """The last situation and what came of it, for `/why`, `/add` and `/card`."""

    scenario: str = ""
    found: Found = field(default_factory=Found)
    guarded: Guarded | None = None


def infer(resolved: Resolved, checkpoint: Path | None = None, prompt: str | None = None, as_json: bool = False) -> None:
    """Answer one prompt, or hold a session where prompt is None.

    checkpoint: GGUF file, adapter, merged or base folder; by default the config's finished model. Raises
    UsageError for an empty prompt, ModelError for a checkpoint that cannot be used or a prompt over the
    model's context, Interrupted when Ctrl-C stops a single answer.
    """
    if prompt is not None and not prompt.strip():
        raise UsageError(f"--prompt: got {prompt!r}; expected the situation in words, or leave --prompt out for a session")
    if prompt is not None:
        _check_text(prompt, "--prompt")
    find_country(resolved.config.inference.country)
    folder = Path(checkpoint or resolved.finished_model)
    check_model(folder, resolved.config.model)
    chat = Chat(resolved, folder, as_json)
    try:
        if prompt is None:
            _hold_session(chat)
        else:
            chat.answer(prompt)
    except KeyboardInterrupt:
        raise Interrupted("interrupted; the answer is not whole") from None
    finally:
        chat.engine.close()


class Chat:
    """A loaded model that answers situations on stdout, with the cards that fit where the config grounds prompts."""

    def __init__(self, resolved: Resolved, folder: Path, as_json: bool):
        config = resolved.config
        self.settings: InferenceConfig = config.inference
        self.as_json, self.grounded = as_json, config.dataset.grounding == "cards"
        self.cards: dict[str, Card] = load_cards() if self.grounded or self.settings.guard else {}
        self.retriever = Retriever(self.cards, config.dataset.top_k) if self.cards else None
        self.asked = _Asked()
        _note(f"Loading {folder} ...")
        self.engine = open_engine(config.model, folder, slots=1)
        _note(f"Loaded: {self.engine.description}")

    def answer(self, scenario: str, card_id: str = "") -> None:
        """Answer one situation, with a card that was chosen or those that retrieval finds. KeyboardInterrupt passes through, after a newline."""
        found = self.retriever.find(scenario) if self.retriever else Found()
        if card_id:
            found = replace(found, ids=(card_id,), fits=1, unsure=False)
        self.asked = _Asked(scenario, found)
        if self.retriever:
            _note(f"Cards: {found.describe(self.cards)}")
        stream = self._start(scenario, found)
        try:
            if self.as_json:
                for _ in stream:
                    pass
            elif self.settings.guard:
                self._show_guarded(stream)
            else:
                _show_plain(stream)
        finally:
            stream.close()
        self._report(stream)

    def _start(self, scenario: str, found: Found) -> Stream:
        settings = self.settings
        shown = shown_cards(found.ids, self.cards) if self.grounded else None
        messages = build_messages(scenario, shown, country=settings.country, fits=found.fits)
        # JSON too is written from the four sections: asked for JSON itself, the model forgets its card (benchmarks/RESULTS.md).
        grammar = build_grammar(settings.max_new_tokens) if settings.grammar else ""
        return self.engine.stream(messages, settings.max_new_tokens, settings.temperature, grammar=grammar)

    def _check(self, text: str) -> Guarded:
        asked = self.asked
        asked.guarded = guard_found(text, asked.found, self.cards, self.settings.country, asked.scenario)
        return asked.guarded

    def _show_guarded(self, stream: Stream) -> None:
        """The guidance at once, then each line of the model when it is whole."""
        page = Page(colour=sys.stdout.isatty())
        _print(page.head(self._check("")))
        shown = 0
        section, number = "", 0
        while True:
            piece = next(stream, None)
            if piece is not None and "\n" not in piece:
                continue
            whole = stream.text if piece is None else stream.text[:stream.text.rindex("\n") + 1]
            guarded = self._check(whole)
            for line in guarded.lines[shown:]:
                if line.section != section:
                    section, number = line.section, 0
                    _print(page.heading(section))
                number += 1
                _print(page.line(line, number))
            shown = len(guarded.lines)
            if piece is None:
                break
        _print(page.tail(guarded))

    def _report(self, stream: Stream) -> None:
        result, asked = stream.result, self.asked
        parsed = read_answer(result.text)
        if self.as_json:
            answer = {"answer": parsed.answer.to_dict(), "valid": parsed.valid, "problems": list(parsed.problems),
                      "cards": list(asked.found.ids), "unsure": asked.found.unsure, "text": result.text, "ended": result.ended}
            checks = {"guard": self._check(result.text).to_dict()} if self.settings.guard else {}
            print(json.dumps(answer | checks, ensure_ascii=False), flush=True)
        elif not parsed.valid:
            _note(f"Note: this answer does not have the four sections as taught: {parsed.problems[0]}")
        if not result.ended:
            _note(f"Note: the answer was cut off after {result.tokens} tokens; a longer limit: --max-new-tokens {2 * result.tokens}")

    def obey(self, line: str) -> None:
        """A line of a session that starts with a slash, or a number that chooses a card."""
        command, _, rest = line.strip().partition(" ")
        rest, asked = rest.strip(), self.asked
        choices = asked.guarded.choices if asked.guarded else ()
        if command == "/region":
            where = find_country(rest)
            self.settings = self.settings.model_copy(update={"country": rest.upper()})
            _note(f"Emergency number: {where.number('any')} ({where.name})" if where else "Emergency number: your local one")
        elif command == "/json":
            self.as_json = not self.as_json
            _note(f"Answers are {'JSON' if self.as_json else 'text'} from now on")
        elif command == "/help":
            _note(HELP)
        elif not asked.scenario:
            _note(f"{command}: describe a situation first; /help lists what a session knows")
        elif command == "/why":
            if asked.guarded is None:
                self._check("")
            assert asked.guarded is not None
            words = {hit.card_id: hit.words for hit in asked.found.ranked}
            _print(explain(asked.guarded, words, self.engine.description))
        elif command == "/add" and rest:
            self.answer(f"{asked.scenario} {rest}")
        elif command.isdecimal() and 1 <= int(command) <= len(choices):
            self.answer(asked.scenario, choices[int(command) - 1][0])
        elif command == "/card" and (found := [card_id for card_id, card in self.cards.items() if rest.lower() in (card_id, card.name.lower())]):
            self.answer(asked.scenario, found[0])
        else:
            _note(f"{line.strip()}: not known here; /help lists what a session knows, emergency-kit knowledge list the cards")


def _show_plain(stream: Stream) -> None:
    try:
        for piece in stream:
            print(piece, end="", flush=True)
    finally:
        if stream.text:
            print(flush=True)


def _hold_session(chat: Chat) -> None:
    """Answer line after line until the input ends or the user leaves."""
    interactive = sys.stdin.isatty()
    if interactive and sys.stdout.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  gives input() line editing and history
    _note(HELP if interactive else HELP.splitlines()[0])
    if interactive and chat.grounded and chat.settings.warm_up:
        start_warm_up(chat.engine, chat.cards, chat.settings.country)
    while True:
        try:
            line = _read_line(interactive)
        except KeyboardInterrupt:
            _note("\nLeft with Ctrl-C; quit, exit or Ctrl-D does the same.")
            return
        if line is None or line.strip().lower() in LEAVE:
            return
        if not line.strip():
            continue
        try:
            if line.strip().startswith("/") or line.strip().isdecimal() and chat.asked.guarded and chat.asked.guarded.choices:
                chat.obey(line)
            else:
                chat.answer(line)
        except KeyboardInterrupt:
            _note("Stopped; this answer is not whole. Ctrl-C again leaves.")
        except (ModelError, DataError) as error:
            if not interactive:
                raise
            _note(f"error: {error}")  # a situation too long for the model, or an unknown country: the person can say it otherwise


def _read_line(interactive: bool) -> str | None:
    """The next line without its end, or None when the input has ended."""
    try:
        if interactive and sys.stdout.isatty():
            return input("> ")
        if interactive:
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
    except EOFError:
        return None
    except UnicodeDecodeError as error:
        raise UsageError(f"stdin: not UTF-8 at byte {error.start}; expected situations as UTF-8 text, one a line") from None
    if line:
        _check_text(line, "stdin")
    return line.rstrip("\r\n") if line else None


def _check_text(text: str, place: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:  # bytes that are not UTF-8 reach Python as lone surrogates
        raise UsageError(f"{place}: got {text!r:.80}, which is not UTF-8 text; expected the situation in words") from None


def _print(lines: Iterator[str]) -> None:
    for line in lines:
        print(line, flush=True)


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
