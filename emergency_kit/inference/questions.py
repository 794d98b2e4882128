"""Questions: what the server takes, as pydantic models; the OpenAPI document is made from them.

In: JSON bodies. Out: checked, frozen values. The docstring under a field is its description in the document.
Limits on length stand here as constants, on size and rate in `admission.py`. Unknown keys of a request are ignored,
since clients of the OpenAI API send more than a local server needs; known ones that cannot be honoured are errors.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Optional

from pydantic import AfterValidator, BeforeValidator, Field, field_validator

from emergency_kit.inference.schemas import Body
from emergency_kit.knowledge.cards import load_cards
from emergency_kit.knowledge.emergency_numbers import find_country, load_numbers

MAX_CHARACTERS = 4000
"""Longest report of a situation: about three pages of a phone's screen, and 1,000 tokens of the bundled model."""
MAX_MESSAGES = 64


def _check_text(text: str) -> str:
    if not text.strip():
        raise ValueError("expected some text")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("expected text that can be written as UTF-8") from None
    return text


def _check_country(code: str) -> str:
    find_country(code)
    return code.upper()


def _read_whole(value: Any) -> Any:
    """JSON knows no integers: 1.0 is one."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Text = Annotated[str, Field(max_length=MAX_CHARACTERS, json_schema_extra={"pattern": r"\S"}), AfterValidator(_check_text)]
Country = Annotated[str, AfterValidator(_check_country), Field(json_schema_extra={"enum": ["", *load_numbers()]})]
CardId = Annotated[str, Field(json_schema_extra={"enum": list(load_cards())})]
User = Annotated[str, Field(max_length=128, pattern=r"^[ -~]*$")]
# The bounds stand before the validator: behind it pydantic leaves them out of the document.
Tokens = Annotated[int, Field(ge=1, le=2**31, strict=True), BeforeValidator(_read_whole)]
Seed = Annotated[int, Field(ge=0, lt=2**31, strict=True), BeforeValidator(_read_whole)]
One = Annotated[int, Field(ge=1, le=1, strict=True), BeforeValidator(_read_whole)]


class Question(Body):
    """A situation to answer."""

    situation: Text
    """What is happening, in words."""
    country: Country = ""
    """Two-letter code of the country whose emergency number the answer names; empty for the server's own setting."""
    cards: list[CardId] = Field(default_factory=list, max_length=5)
    """Ids of the cards to answer from, where a person has chosen them; empty for those that retrieval finds."""
    stream: bool = Field(default=False, strict=True)
    """Send events as they come (text/event-stream): `cards`, `waiting`, `line`, and `done` or `error`."""
    max_tokens: Optional[Tokens] = None
    """Longest answer in tokens; at most the server's own limit, which holds where this is more."""
    temperature: Optional[Annotated[float, Field(ge=0, le=2, strict=True)]] = None
    """0 is greedy; by default the server's setting."""
    seed: Optional[Seed] = None
    """Fixes a sampled answer."""
    user: User = ""
    """Whose request this is, for a fair queue among several people at one address."""


class Part(Body):
    """A part of a message; only text is read."""

    type: Literal["text"]
    text: Annotated[str, Field(max_length=MAX_CHARACTERS)]


class Message(Body):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Optional[Annotated[str, Field(max_length=MAX_CHARACTERS)] | Annotated[list[Part], Field(max_length=MAX_MESSAGES)]] = None

    @property
    def text(self) -> str:
        """The words of the message."""
        return self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content or ())


class StreamOptions(Body):
    """Options of a streamed completion."""

    include_usage: bool = False
    """Send the token counts in a last chunk."""


class ResponseFormat(Body):
    """Form of the answer: the four sections as text, or their JSON twin."""

    type: Literal["text", "json_object"]


class ChatRequest(Body):
    """A chat completion, as in the OpenAI API.

    The user's turns are the situation, the newest last; they are answered like any other, with the cards that fit.
    Turns of the assistant are not read again. A system message is passed on as an instruction.
    """

    model: str = Field(default="", max_length=256)
    """Any name; the server's one model answers, and the reply names it."""
    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES, json_schema_extra={"contains": {
        "type": "object", "required": ["role", "content"], "properties": {"role": {"const": "user"}, "content": {"type": "string", "pattern": "\\S"}}}})
    """At least one of the user's, with words in it."""
    stream: Optional[Annotated[bool, Field(strict=True)]] = False
    stream_options: Optional[StreamOptions] = None
    max_tokens: Optional[Tokens] = None
    max_completion_tokens: Optional[Tokens] = None
    temperature: Optional[Annotated[float, Field(ge=0, le=2, strict=True)]] = None
    seed: Optional[Seed] = None
    stop: Optional[Annotated[str, Field(min_length=1, max_length=64)] | Annotated[list[Annotated[str, Field(min_length=1, max_length=64)]], Field(max_length=4)]] = None
    response_format: Optional[ResponseFormat] = None
    n: Optional[One] = 1
    """Only 1."""
    top_p: Optional[Annotated[float, Field(ge=1, le=1, strict=True)]] = 1
    """Only 1: the distribution is the model's own."""
    tools: Optional[Annotated[list[Any], Field(max_length=0)]] = None
    """Not supported: only an empty list."""
    country: Country = ""
    """Ours: two-letter code of the country whose emergency number the answer names."""
    user: Optional[User] = ""

    @field_validator("messages")
    @classmethod
    def _someone_asks(cls, messages: list[Message]) -> list[Message]:
        said = "\n".join(message.text for message in messages if message.role == "user")
        _check_text(said)
        if sum(len(message.text) for message in messages if message.role != "assistant") > 2 * MAX_CHARACTERS:
            raise ValueError(f"expected at most {2 * MAX_CHARACTERS} characters in all messages that are read")
        for message in messages:
            message.text.encode(errors="strict")
        return messages

    @property
    def situation(self) -> str:
        """The user's turns, the newest last."""
        return "\n".join(message.text.strip() for message in self.messages if message.role == "user" and message.text.strip())

    @property
    def instruction(self) -> str:
        """What system and developer messages ask for."""
        return "\n".join(message.text.strip() for message in self.messages if message.role in ("system", "developer") and message.text.strip())

    @property
    def limit(self) -> int | None:
        """The asked limit of tokens."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def stop_texts(self) -> tuple[str, ...]:
        """Texts that the answer ends before."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
