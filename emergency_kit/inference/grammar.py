"""Grammar: answers that have the four sections by construction, in llama.cpp and in transformers alike.

In: the most tokens that an answer may have. Out: a grammar in llguidance's Lark form, which both engines decode under
(llama.cpp carries llguidance; `Constraint` is the same for a transformers model). The grammar only decides
which token may come next: no text is changed afterwards. Every list and line is bounded, so that an answer
of the default length ends by itself whatever the model does.
Limits: a line that reaches its bound ends there; taught lines have at most 39 tokens.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, Callable

from emergency_kit.data.format import SECTIONS
from emergency_kit.errors import ModelError
from emergency_kit.inference.engine import repeats_itself

if TYPE_CHECKING:
    import torch

# Most items of a section; the longest taught answers have 6, 5, 7 and 20.
ITEMS = {"facts": 8, "uncertainties": 6, "analysis": 8, "guidance": 20}
# A line's fewest and most tokens as a bound, and what stands around a line: bullet or number, and its end.
SHORTEST_BOUND, LONGEST_BOUND, AROUND_LINE, HEADINGS = 40, 400, 5, 32
LINE_CHARACTERS = 240
_LINE = r"/[^\x00-\x20\x7f\x85\u00a0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000][^\x00-\x1f\x7f\x85\u2028\u2029]*/"


def bound_line(max_new_tokens: int) -> int:
    """Most tokens of one line, so that an answer with every line and list at its bound has `max_new_tokens`, where that is possible."""
    return min(LONGEST_BOUND, max(SHORTEST_BOUND, (max_new_tokens - HEADINGS) // sum(ITEMS.values()) - AROUND_LINE))


def build_grammar(max_new_tokens: int) -> str:
    """The four sections as `data/format.py` writes them: bullets, and steps numbered from 1."""
    blocks, rules = [], [f"line[max_tokens={bound_line(max_new_tokens)}]: LINE", f"LINE: {_LINE}"]
    for section in SECTIONS[:-1]:
        blocks.append(f'"{section.upper()}\\n" bullet{{1,{ITEMS[section]}}} "\\n"')
    rules.insert(0, 'bullet: "• " line "\\n"')
    last = ITEMS["guidance"]
    for number in range(1, last + 1):
        mark = '"' + ("\\n" if number > 1 else "") + f'{number}. "'
        rules.insert(0, f"step{number}: {mark} line" + (f" step{number + 1}?" if number < last else ""))
    return "\n".join([f'start: {" ".join(blocks)} "GUIDANCE\\n" step1', *rules]) + "\n"


def build_gbnf() -> str:
    """The same four sections in llama.cpp's own form, for builds without llguidance (WebAssembly); a line is bounded in characters."""
    first = r"[^\x00-\x20\x7f\x85\u00a0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]"
    rules = [f'line ::= {first} [^\\x00-\\x1f\\x7f\\x85\\u2028\\u2029]{{0,{LINE_CHARACTERS}}}', 'bullet ::= "• " line "\\n"']
    last = ITEMS["guidance"]
    rules += [f'step{number} ::= "{chr(92) + "n" if number > 1 else ""}{number}. " line' + (f" step{number + 1}?" if number < last else "") for number in range(1, last + 1)]
    blocks = " ".join(f'"{section.upper()}\\n" bullet{{1,{ITEMS[section]}}} "\\n"' for section in SECTIONS[:-1])
    return "\n".join([f'root ::= {blocks} "GUIDANCE\\n" step1', *rules]) + "\n"


@functools.lru_cache(maxsize=16)
def check_grammar(grammar: str) -> None:
    """Raise ModelError for a grammar that cannot be read: llama.cpp would answer without it and not say so."""
    from llguidance import LLMatcher

    if problem := LLMatcher.validate_grammar(grammar):
        raise ModelError(f"grammar: {' '.join(problem.split())[:300]}")


class Constraint:
    """A grammar followed by one answer of a transformers model, token by token."""

    def __init__(self, tokenizer: Any, grammar: str, decode: Callable[[list[int]], str], end_ids: set[int]):
        """tokenizer: from `build_tokenizer`. decode: text of token ids. Raises ModelError for a grammar that cannot be read."""
        from llguidance import LLMatcher

        self._decode, self._end_ids = decode, end_ids
        self._ids: list[int] = []
        self._over = False
        check_grammar(grammar)
        self._matcher = LLMatcher(tokenizer, grammar, log_level=0)

    def allows(self, token: int) -> bool:
        """Whether a token may come next; far cheaper than `mask`."""
        return token in self._end_ids if self._over else bool(self._matcher.validate_tokens([token]))

    def mask(self, logits: "torch.Tensor") -> "torch.Tensor":
        """Logits [vocabulary] with minus infinity where a token may not come next."""
        import numpy
        import torch

        blocked = torch.ones(len(logits), dtype=torch.bool)
        if self._over:
            blocked[sorted(self._end_ids)] = False
        else:
            allowed = numpy.unpackbits(numpy.frombuffer(self._matcher.compute_bitmask(), dtype=numpy.uint8), bitorder="little")
            known = min(len(logits), len(allowed))
            blocked[:known] = torch.from_numpy(allowed[:known] == 0)
        return logits.masked_fill(blocked.to(logits.device), float("-inf"))

    @property
    def stopped(self) -> bool:
        """Whether nothing more may come but the end token, or not even that."""
        return self._over or bool(self._matcher.is_stopped())

    def take(self, token: int) -> None:
        """The token that came; a step that stood before ends the answer."""
        if self.stopped:
            return
        taken = self._matcher.consume_token(token)
        assert taken, self._matcher.get_error()
        self._ids.append(token)
        if "\n" in self._decode([token]):
            self._over = repeats_itself(self._decode(self._ids))


def build_tokenizer(tokenizer: Any, vocabulary: int, end_ids: set[int]) -> Any:
    """llguidance's view of a Hugging Face tokenizer; takes about a second, so it is made once a model."""
    from llguidance.hf import from_tokenizer

    return from_tokenizer(tokenizer, n_vocab=vocabulary, eos_token=sorted(end_ids))
