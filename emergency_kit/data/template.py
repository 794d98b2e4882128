"""The chat template: a conversation as the text that a model reads, and how its answer ends.

In: a tokenizer with its chat template (Hugging Face's, or llama.cpp's in the same shape), chat messages of `format.py`. Out: prompt
text up to the answer, and the answer's `Turn`. Nothing here knows a family by name: what a template does is found by rendering marks.
Limits: the first answer of a conversation. A template that writes today's date and takes no `date_string` changes with the day.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from emergency_kit.data.format import SYSTEM_PROMPT, build_messages

# What every template is asked: no thoughts (Qwen 3), and a date that stands still (Llama 3.1 and 3.2, whose own default this is), since a
# prompt must be tomorrow what it was in training. A template that knows neither ignores both; llama.cpp gets the same.
SETTINGS: dict[str, Any] = {"enable_thinking": False, "date_string": "26 Jul 2024"}
_USER, _ANSWER, _NEXT = "USER-MARK", "ANSWER-MARK", "NEXT-MARK"
# A control token by its looks, for a tokenizer that lists none (llama.cpp's).
_LOOKS = re.compile(r"<[^<>\s]{1,60}>|\[[|/]?[A-Za-z_]{2,40}\|?\]")


@dataclass(frozen=True)
class Turn:
    """How an answer stands in its turn. lead: white space before it; closing: what ends it, up to and with the end token; end: that token."""

    lead: str
    closing: str
    end: str


class PromptRenderer:
    """`render_prompt` for many prompts: the chat template is rendered once where all it does is wrap the user's text."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._wrapped: tuple[str, str] | None = None
        texts = ("first mark", "CARD: second\n\nmark {{ 1 }}")
        rendered = [render_prompt(tokenizer, build_messages(text, None)) for text in texts]
        asked = [build_messages(text, None)[1]["content"] for text in texts]
        head, mark, tail = rendered[0].partition(asked[0])
        if mark and rendered[1] == head + asked[1] + tail:
            self._wrapped = head, tail

    def __call__(self, messages: list[dict[str, str]]) -> str:
        """Prompt text up to where the answer begins."""
        content = messages[1]["content"]
        # Templates may trim what stands at the ends, and the wrapping was found with the kit's own system prompt.
        if self._wrapped and messages[0]["content"] == SYSTEM_PROMPT and content == content.strip():
            return content.join(self._wrapped)
        return render_prompt(self._tokenizer, messages)


def render_prompt(tokenizer: Any, messages: list[dict[str, str]]) -> str:
    """Prompt text up to where the answer begins, by the tokenizer's own chat template.

    Templates that know no system role (Gemma, Mistral's first), or drop it once an answer follows (Mistral v0.3), get it at the head of the
    user's turn. Where a whole conversation has more before its answer than the template's generation prompt (a thought that is opened and
    never closed, a header left out), the prompt is that.
    """
    return _render(tokenizer, messages)[1]


def as_accepted(tokenizer: Any, messages: list[dict[str, str]]) -> list[dict[str, str]]:
    """The messages that the chat template gets: as they are, or with the system's text in the user's turn."""
    return _render(tokenizer, messages)[0]


def apply_template(tokenizer: Any, messages: list[dict[str, str]], prompt: bool = True) -> str:
    """The text of messages by the chat template under SETTINGS. prompt: an answer is to follow. Raises jinja2.TemplateError where it refuses them."""
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt, **SETTINGS)


def find_turn(tokenizer: Any) -> Turn:
    """How the template writes an answer. Its end token is the one the template ends a turn with (Gemma's <end_of_turn>, Phi's <|end|>), which need
    not be the tokenizer's own; that one is taken where the template writes none."""
    import jinja2

    asked = [{"role": "user", "content": _USER}]
    prompt, before = apply_template(tokenizer, asked), _before_answer(tokenizer, asked)
    lead = before[len(prompt):] if before and before.startswith(prompt) else ""
    lead = lead if lead.isspace() else ""  # anything else belongs to the prompt
    try:
        # A turn that another one follows: some templates leave the end token off the last answer.
        both = apply_template(tokenizer, [*asked, {"role": "assistant", "content": _ANSWER}, {"role": "user", "content": _NEXT}])
    except jinja2.TemplateError:
        both = ""
    after = both.partition(_ANSWER)[2].partition(_NEXT)[0]
    known = getattr(tokenizer, "added_tokens_decoder", None)
    tokens = _LOOKS.findall(after) if known is None else [token.content for token in known.values() if token.content in after]
    if not tokens:
        return Turn(lead, tokenizer.eos_token, tokenizer.eos_token)
    end = min(tokens, key=lambda token: (after.find(token), -len(token)))
    return Turn(lead, after[:after.find(end) + len(end)], end)


def _before_answer(tokenizer: Any, accepted: list[dict[str, str]]) -> str | None:
    """What stands before the answer in a whole conversation; None where the template does not tell."""
    import jinja2

    try:
        whole = apply_template(tokenizer, [*accepted, {"role": "assistant", "content": _ANSWER}], prompt=False)
    except jinja2.TemplateError:
        return None
    before, mark, _ = whole.rpartition(_ANSWER)
    return before if mark else None


def _render(tokenizer: Any, messages: list[dict[str, str]]) -> tuple[list[dict[str, str]], str]:
    """`(messages as accepted, prompt)`."""
    import jinja2

    system, user = messages[0]["content"], messages[1]["content"]
    folded = [{"role": "user", "content": f"{system}\n\n{user}"}]
    try:
        text = apply_template(tokenizer, messages)
        before = _before_answer(tokenizer, messages) if system in text else None
        accepted = messages if system in text and (before is None or system in before) else folded
    except jinja2.TemplateError:
        accepted = folded
    if accepted is folded:
        text, before = apply_template(tokenizer, folded), _before_answer(tokenizer, folded)
    return accepted, text if before is None or before.rstrip() == text.rstrip() else before
