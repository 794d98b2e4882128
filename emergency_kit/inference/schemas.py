"""Schemas: what the server returns, as pydantic models; the OpenAPI document is made from them.

Out: frozen values. The docstring under a field is its description in the document. What the server takes stands
in `questions.py`.
"""

from __future__ import annotations

from typing import Literal, Optional

from pydantic import BaseModel, ConfigDict, Field

Section = Literal["facts", "uncertainties", "analysis", "guidance"]


class Body(BaseModel):
    """What all of them share."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True, protected_namespaces=(), allow_inf_nan=False)


class SourceOut(Body):
    """A publication of a recognised body."""

    body: str
    title: str
    year: int


class ActionOut(Body):
    """One thing to do, with the country's emergency number in it."""

    text: str
    needs: Optional[str] = None
    instead: Optional[str] = None


class CardOut(Body):
    """A knowledge card: checked guidance for one emergency."""

    id: str
    category: str
    name: str
    service: Literal["ambulance", "fire", "police", "any"]
    also_called: list[str]
    signs: list[str]
    dangers: list[str]
    critical_actions: list[ActionOut]
    never: list[str]
    escalate_when: list[str]
    uncertainties: list[str]
    regional_notes: list[str]
    sources: list[SourceOut]


class Choice(Body):
    """A card that a person may choose where retrieval is unsure."""

    id: str
    name: str


class CountryOut(Body):
    """The emergency numbers of a country, the one to prefer first."""

    code: str
    name: str
    ambulance: list[str]
    fire: list[str]
    police: list[str]
    sources: list[SourceOut]


class Emergency(Body):
    """Whom to call. country is null where none was named: then the local emergency number has to be known."""

    service: Literal["ambulance", "fire", "police", "any"]
    country: Optional[CountryOut]


class Found(Body):
    """What retrieval found: the first event of a stream, and a part of every answer."""

    cards: list[CardOut]
    """The cards shown to the model, best first; the safe minimum where none fits."""
    fits: int
    """How many of them, from the first, are trusted to fit; 0 where none does."""
    unsure: bool
    """Whether the first card, or that none fits, is close to a guess."""
    choices: list[Choice]
    """Where it is unsure: the nearest cards, for a person to choose from."""
    emergency: Emergency


class Struck(Body):
    """Why a line is not shown as guidance: the never-rule that it goes against, or the help that it talks out of."""

    card_id: Optional[str]
    rule: str


class FromCard(Body):
    """The line of a card that a line of the model's is, with a slip."""

    card_id: str
    text: str


class Line(Body):
    """One line of the model's, as written, without its bullet or number. section is null for what stands before the first heading."""

    section: Optional[Section]
    text: str
    struck: Optional[Struck] = None
    from_card: Optional[FromCard] = None
    unknown_numbers: list[str] = Field(default_factory=list)
    """Numbers in guidance that neither the cards nor the situation state."""
    on_card: Optional[bool] = None
    """For a step: whether it is a line of a shown card; null for other lines and without the guard."""


class Added(Body):
    """A life-saving step of a card that the model left out."""

    card_id: str
    text: str
    needs: Optional[str] = None
    instead: Optional[str] = None


class Checks(Body):
    """What was checked."""

    four_sections: bool
    problems: list[str]
    ended: bool
    """Whether the model ended by itself, before the limit."""
    guard: bool
    """Whether the model's lines were held to the cards."""


class Provenance(Body):
    """Where an answer comes from."""

    model: str
    kind: str
    model_sha256: Optional[str]
    """Of the GGUF file, or of the list of file hashes of a folder that has a manifest."""
    cards_sha256: str
    kit_version: str
    prompt_tokens: int
    completion_tokens: int
    seconds: float
    first_token_seconds: Optional[float]
    temperature: float
    seed: Optional[int]


class Sections(Body):
    """The model's statements by section, as written."""

    facts: list[str]
    uncertainties: list[str]
    analysis: list[str]
    guidance: list[str]


class AnswerOut(Found):
    """A whole answer."""

    id: str
    created: int
    """Seconds since 1970."""
    text: str
    """What the model wrote, byte for byte; where JSON was asked for, the JSON twin of its sections."""
    sections: Sections
    lines: list[Line]
    added: list[Added]
    checks: Checks
    provenance: Provenance


class Knowledge(Body):
    """All cards and countries, for a page that must work without the server."""

    cards: list[CardOut]
    countries: list[CountryOut]
    country: str
    """The server's own setting; empty where it has none."""


class Health(Body):
    """Whether the server can answer."""

    status: Literal["ok"]
    version: str
    running: int
    waiting: int
    slots: int


class ModelOut(Body):
    """A model, as in the OpenAI API."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["emergency-kit"] = "emergency-kit"


class ModelList(Body):
    """The one model of this server."""

    object: Literal["list"] = "list"
    data: list[ModelOut]


class Usage(Body):
    """Tokens of a completion."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Reply(Body):
    """The assistant's turn."""

    role: Literal["assistant"] = "assistant"
    content: str


class CompletionChoice(Body):
    """The one choice of a completion."""

    index: Literal[0] = 0
    message: Reply
    finish_reason: Literal["stop", "length"]


class Completion(Body):
    """A chat completion, as in the OpenAI API; `emergency_kit` is ours."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage
    emergency_kit: AnswerOut


class ErrorDetail(Body):
    """What is wrong, and where."""

    message: str
    type: str
    param: Optional[str] = None
    code: Optional[str] = None


class ErrorOut(Body):
    """Every error, in the form of the OpenAI API."""

    error: ErrorDetail
