"""What both engines share: the answer, its stream, the check of length; and `open_engine`, which picks one.

A GGUF file runs in llama.cpp (`llama_engine.py`), a folder in transformers (`torch_engine.py`). Both have the same
methods with the same arguments and results. Nothing here imports torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Callable, Iterator, Sequence

from emergency_kit.config import ModelSection
from emergency_kit.errors import ModelError

if TYPE_CHECKING:
    from emergency_kit.inference.torch_engine import Engine
    from emergency_kit.inference.llama_engine import LlamaEngine

Messages = list[dict[str, str]]
# Called after every decoding step with the work done in answers (fractions within a batch) and the tokens so far.
Progress = Callable[[float, int], None]


@dataclass(frozen=True)
class Generated:
    """One answer. text: without the end token; tokens: generated, the end token included; ended: before the limit
    it wrote an end token or a text to stop at, or under a grammar began to repeat itself."""

    text: str
    tokens: int
    ended: bool


@dataclass
class State:
    """An answer on its way. tokens: generated so far; cached_tokens: of the prompt, not computed again."""

    text: str = ""
    tokens: int = 0
    cached_tokens: int = 0
    ended: bool = False

    @property
    def result(self) -> Generated:
        """The answer as far as it has come."""
        return Generated(self.text, self.tokens, self.ended)


class Stream(Iterator[str]):
    """Pieces of one answer's text as they are generated; `result` holds the whole once it is exhausted or stopped.

    over: whether nothing more will come. `close` frees what the answer occupies; a stream that is exhausted or that nobody holds any more is closed.
    """

    def __init__(self, pieces: Callable[[State], Iterator[str]], stop: Sequence[str] = (), grammar: str = ""):
        self._state = State()
        source = _stop_at_repeat(pieces(self._state), self._state) if grammar else pieces(self._state)
        self._pieces = _stop_at(source, stop, self._state) if stop else source
        self.over = False

    def __next__(self) -> str:
        try:
            piece = next(self._pieces)
        except StopIteration:
            self.over = True
            raise
        self._state.text += piece
        return piece

    def close(self) -> None:
        """Stop generating; the pieces taken so far stay."""
        self._pieces.close()  # type: ignore[attr-defined]

    @property
    def text(self) -> str:
        """The pieces taken so far."""
        return self._state.text

    @property
    def tokens(self) -> int:
        """Tokens generated so far."""
        return self._state.tokens

    @property
    def cached_tokens(self) -> int:
        """Tokens of the prompt that were not computed again."""
        return self._state.cached_tokens

    @property
    def ended(self) -> bool:
        """Whether the answer came to its end before the limit."""
        return self._state.ended

    @property
    def result(self) -> Generated:
        """The answer as far as it has been taken from the stream."""
        return self._state.result


def _stop_at(source: Iterator[str], stop: Sequence[str], state: State) -> Iterator[str]:
    """The pieces before the first text of `stop`; what may be its beginning waits until that is known."""
    held = ""
    try:
        for piece in source:
            held += piece
            places = [held.find(text) for text in stop if text in held]
            if places:
                state.ended = True
                held = held[:min(places)]
                break
            waiting = max(length for text in stop for length in range(len(text)) if held.endswith(text[:length]))
            if ready := held[:len(held) - waiting]:
                yield ready
            held = held[len(held) - waiting:]
        if held:
            yield held
    finally:
        source.close()  # type: ignore[attr-defined]


def repeats_itself(text: str) -> bool:
    """Whether the last whole line of an answer is a step that it has already written: a small model may go round like that.

    Everything before is a whole answer, since steps are the last section.
    """
    if not text.endswith("\n"):
        return False
    steps = [line.split(". ", 1)[1] for line in text.splitlines() if line[:1].isdigit() and ". " in line[:5]]
    last = text.splitlines()[-1]
    return bool(steps) and last[:1].isdigit() and steps[-1] in steps[:-1]


def _stop_at_repeat(source: Iterator[str], state: State) -> Iterator[str]:
    """The pieces up to the end of the first step that stood before."""
    text = ""
    try:
        for piece in source:
            text += piece
            if "\n" in piece and repeats_itself(text[:text.rindex("\n") + 1]):
                state.ended = True
                rest = piece[:piece.rindex("\n")]
                if rest:
                    yield rest
                return
            yield piece
    finally:
        source.close()  # type: ignore[attr-defined]


def check_length(prompt: list[int], max_new_tokens: int, context_tokens: int | None, name: str) -> None:
    """Raise ModelError where a prompt and the answer do not fit the context."""
    if context_tokens is None or len(prompt) + max_new_tokens <= context_tokens:
        return
    left = context_tokens - len(prompt)
    remedy = f"lower max_new_tokens to {left} or less, or shorten the prompt" if left > 0 else "shorten the prompt"
    raise ModelError(f"{name} is {len(prompt)} tokens long, and with max_new_tokens {max_new_tokens} it exceeds "
                     f"the model's context of {context_tokens} tokens; {remedy}")


def check_model(checkpoint: Path, model: ModelSection) -> str:
    """`gguf`, `adapter` or `model`, after looking that the file or folder is there and whole."""
    checkpoint = Path(checkpoint)
    if checkpoint.suffix == ".gguf":
        if not checkpoint.is_file():
            raise ModelError(f"checkpoint {checkpoint}: no such file; next: make export-gguf, or ls {checkpoint.parent} to see what is there")
        with checkpoint.open("rb") as file:
            magic = file.read(4)
        if magic != b"GGUF":
            raise ModelError(f"checkpoint {checkpoint}: starts with {magic!r}, not with b'GGUF'; the file is damaged or not a GGUF file, export it again")
        return "gguf"
    from emergency_kit.model import backend

    return backend.check_checkpoint(checkpoint, model)


def open_engine(model: ModelSection, checkpoint: Path, slots: int = 4) -> "Engine | LlamaEngine":
    """The engine for a GGUF file, or for an adapter, merged or base folder.

    slots: answers at once in llama.cpp; each reserves memory for its context. Raises ModelError where the
    checkpoint is missing, incomplete or damaged.
    """
    if check_model(checkpoint, model) == "gguf":
        from emergency_kit.inference.llama_engine import LlamaEngine

        return LlamaEngine(Path(checkpoint), slots, drafts=True)
    from emergency_kit.inference.torch_engine import Engine
    from emergency_kit.model import backend

    return Engine(backend.load_checkpoint(model, Path(checkpoint), fold=True))
