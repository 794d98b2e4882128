"""Chat: one situation or a session of them, answered on the terminal or in a pipe.

In: `--prompt`, or lines on stdin, one situation a line. Out: on stdout the answer alone (or with
`--json` one JSON object a situation); cards, notes and prompts on stderr.
Run: `emergency-kit infer --prompt "the oil in my pan is on fire"`.
"""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

from emergency_kit.config import Resolved
from emergency_kit.data.format import build_messages, read_answer, shown_cards
from emergency_kit.errors import Interrupted, ModelError, UsageError
from emergency_kit.knowledge.cards import Card, load_cards
from emergency_kit.knowledge.emergency_numbers import find_country
from emergency_kit.knowledge.retrieve import Found, Retriever
from emergency_kit.model import backend

LEAVE = ("quit", "exit")


def infer(resolved: Resolved, checkpoint: Path | None = None, prompt: str | None = None, as_json: bool = False) -> None:
    """Answer one prompt, or hold a session where prompt is None.

    checkpoint: adapter, merged or base folder; by default the config's finished model. Raises UsageError
    for an empty prompt, ModelError for a checkpoint that cannot be used or a prompt over the model's
    context, Interrupted when Ctrl-C stops a single answer.
    """
    if prompt is not None and not prompt.strip():
        raise UsageError(f"--prompt: got {prompt!r}; expected the situation in words, or leave --prompt out for a session")
    if prompt is not None:
        _check_text(prompt, "--prompt")
    find_country(resolved.config.inference.country)
    training = resolved.config.training
    folder = Path(checkpoint or Path(training.output_dir) / "checkpoints" / training.model_name)
    backend.check_checkpoint(folder, resolved.config.model)
    chat = Chat(resolved, folder, as_json)
    if prompt is None:
        _hold_session(chat)
        return
    try:
        chat.answer(prompt)
    except KeyboardInterrupt:
        raise Interrupted("interrupted; the answer is not whole") from None


class Chat:
    """A loaded model that answers situations on stdout, with the cards that fit where the config grounds prompts."""

    def __init__(self, resolved: Resolved, folder: Path, as_json: bool):
        config = resolved.config
        self.settings, self.as_json = config.inference, as_json
        self.cards: dict[str, Card] = {}
        self.retriever: Retriever | None = None
        if config.dataset.grounding == "cards":
            self.cards = load_cards()
            self.retriever = Retriever(self.cards, config.dataset.top_k)
        _note(f"Loading {folder} ...")
        from emergency_kit.inference.engine import Engine

        loaded = backend.load_checkpoint(config.model, folder, fold=True)
        _note(f"Loaded: {', '.join([loaded.kind, *loaded.notes])}")
        self.engine = Engine(loaded)

    def answer(self, scenario: str) -> None:
        """Answer one situation. KeyboardInterrupt passes through, after a newline that ends the line so far."""
        shown: list[Card] | None = None
        found = self.retriever.find(scenario) if self.retriever else Found()
        if self.retriever:
            shown = shown_cards(found.ids, self.cards)
            _note(f"Cards: {found.describe(self.cards)}")
        messages = build_messages(scenario, shown, country=self.settings.country, fits=found.fits)
        stream = self.engine.stream(messages, self.settings.max_new_tokens, self.settings.temperature)
        try:
            for piece in stream:
                if not self.as_json:
                    print(piece, end="", flush=True)
        finally:
            if stream.text and not self.as_json:
                print(flush=True)
        self._report(stream.result, found)

    def _report(self, result: Any, found: Found) -> None:
        parsed = read_answer(result.text)
        if self.as_json:
            print(json.dumps({"answer": parsed.answer.to_dict(), "valid": parsed.valid, "problems": list(parsed.problems),
                              "cards": list(found.ids), "unsure": found.unsure, "text": result.text, "ended": result.ended},
                             ensure_ascii=False), flush=True)
        elif not parsed.valid:
            _note(f"Note: this answer does not have the four sections as taught: {parsed.problems[0]}")
        if not result.ended:
            _note(f"Note: the answer was cut off after {result.tokens} tokens; a longer limit: --max-new-tokens {2 * result.tokens}")


def _hold_session(chat: Chat) -> None:
    """Answer line after line until the input ends or the user leaves."""
    interactive = sys.stdin.isatty()
    if interactive and sys.stdout.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  gives input() line editing and history
    _note("Describe the situation in one line, then Enter. Ctrl-C stops an answer; quit, exit or Ctrl-D leaves.")
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
            chat.answer(line)
        except KeyboardInterrupt:
            _note("Stopped; this answer is not whole. Ctrl-C again leaves.")
        except ModelError as error:
            if not interactive:
                raise
            _note(f"error: {error}")  # a situation too long for the model: the person can tell it shorter


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


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
