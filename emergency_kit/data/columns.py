"""Columns: a row of any known form becomes a `Record`, or is rejected for one stated reason.

In: rows, and `dataset.columns` where the user maps them. Out: `Record`s. A form is recognised by the
names of the columns, whatever their capitals, anew wherever a file's rows change their columns.
Limits: one question and one answer a record; of a longer conversation the last answer is trained, and
what was said before it is the question.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Callable, Mapping, Sequence

from emergency_kit.data.format import Record

_ASKED = ("instruction", "question", "query", "prompt")
_INPUT = ("input", "context")
_ANSWERED = ("output", "response", "answer", "completion")
_TURNS = ("messages", "conversations", "conversation")
_ABOUT = ("id", "category", "role", "country")
_LISTS = ("hazards", "cards", "lacks", "sources")
_SPEAKERS = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "model": "assistant", "chatgpt": "assistant", "bot": "assistant"}
SUPPORTED = "Input/Output, instruction/response, Alpaca (instruction, input, output), ShareGPT (conversations), messages, prompt/completion"
MAP_THEM = "Next: map them, for instance --set 'dataset.columns={input: Question, output: Answer}'"


class Rejected(Exception):
    """A row that cannot become a record. reason: one of few, for counting; detail: what this row holds."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason} ({detail})" if detail else reason)
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class Form:
    """How rows of one set of columns are read. columns: those that become part of a record, in order."""

    name: str
    columns: tuple[str, ...]
    build: Callable[[Mapping[str, Any], str], Record]

    def __str__(self) -> str:
        return f"{self.name} ({', '.join(self.columns)})"


def recognise(names: Sequence[str], mapped: Mapping[str, str]) -> Form | None:
    """The form of rows with these columns; `mapped` is `dataset.columns`, where it names columns that are there. None for no known form."""
    known = {str(name).lower(): str(name) for name in reversed(names)}
    mapped = {field: column for field, column in mapped.items() if column in names}
    about = {field: mapped.get(field, known.get(field, "")) for field in (*_ABOUT, *_LISTS, "fits")}
    about = {field: column for field, column in about.items() if column}
    main = {field: column for field, column in mapped.items() if field not in about}
    turns = next((known[name] for name in _TURNS if name in known), None)
    asked, given, answered = (next((known[name] for name in kind if name in known), None) for kind in (_ASKED, _INPUT, _ANSWERED))
    if main:
        name, fields = "mapped by dataset.columns", {"instruction": known.get("instruction"), "input": known.get("input"), "output": answered} | main
    elif turns:
        form = "messages" if turns.lower() == "messages" else "ShareGPT"
        return Form(form, (turns, *about.values()), lambda row, place: _conversation(row.get(turns), row, about, place))
    elif asked and given:
        name = "Alpaca" if (asked.lower(), given.lower()) == ("instruction", "input") else f"{asked}/{answered} with {given}"
        name = "records of this kit" if {"cards", "hazards"} <= about.keys() else name
        fields = {"instruction": asked, "input": given, "output": answered}
    elif asked:
        # A dataset with one question column asks it; the instruction of a record is what stands above a situation.
        name, fields = f"{asked}/{answered}", {"input": asked, "output": answered}
    else:
        name, fields = f"{given}/{answered}", {"input": given, "output": answered}
    named = {field: column for field, column in fields.items() if column}
    if "output" not in named or len(named) < 2:
        return None
    return Form(name, tuple(dict.fromkeys((*named.values(), *about.values()))), lambda row, place: _plain(named, row, about, place))


def _plain(fields: Mapping[str, str], row: Mapping[str, Any], about: Mapping[str, str], place: str) -> Record:
    texts: dict[str, Any] = {field: row.get(column) for field, column in fields.items()}
    if isinstance(texts.get("input"), list):  # prompt/completion as turns
        answer = texts["output"] if isinstance(texts["output"], list) else [{"role": "assistant", "content": texts["output"]}]
        return _conversation([*texts["input"], *answer], row, about, place)
    return _record(texts, row, about, place)


def _conversation(turns: Any, row: Mapping[str, Any], about: Mapping[str, str], place: str) -> Record:
    if isinstance(turns, str) and turns.startswith("["):  # CSV has no lists
        turns = _parse_list(turns)
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        raise Rejected("no list of turns", repr(turns)[:80])
    spoken: list[tuple[str, str]] = []
    for turn in turns:
        name, text = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        speaker = _SPEAKERS.get(str(name).lower())
        if speaker is None or not isinstance(text, str):
            raise Rejected("a turn without a known speaker and text", f"{name!r}: {text!r:.60}")
        spoken.append((speaker, text))
    system = "\n".join(text for speaker, text in spoken if speaker == "system")
    spoken = [turn for turn in spoken if turn[0] != "system"]
    while spoken and spoken[-1][0] != "assistant":
        spoken.pop()
    if not spoken:
        raise Rejected("no answer in the conversation")
    answer = spoken.pop()[1]
    asked = spoken[0][1] if len(spoken) == 1 else "\n".join(f"{speaker.capitalize()}: {text.strip()}" for speaker, text in spoken)
    return _record({"instruction": system, "input": asked, "output": answer}, row, about, place)


def _record(texts: Mapping[str, Any], row: Mapping[str, Any], about: Mapping[str, str], place: str) -> Record:
    values: dict[str, Any] = {"input": ""}
    for field, value in texts.items():
        values[field] = _text(field, value)
    if not values["output"].strip():
        raise Rejected("empty answer")
    if not (values["input"].strip() or values.get("instruction", "").strip()):
        raise Rejected("empty question")
    for field, column in about.items():
        value = row.get(column)
        if value is None or value == "" or value != value:
            continue
        if field in _LISTS:
            values[field] = _texts(value)
        elif field == "fits":
            values[field] = _number(value)
        else:
            values[field] = _unicode(value if isinstance(value, str) else _as_json(value))
    values.setdefault("id", place.rpartition("/")[2])
    return Record(**values)


def _text(field: str, value: Any) -> str:
    if isinstance(value, str):
        return _unicode(value)
    if value is None or value != value:  # NaN stands for nothing in tables that pandas wrote
        return ""
    if field == "output" and isinstance(value, (dict, list)):
        return _unicode(_as_json(value))
    raise Rejected(f"{field} is not text", f"{type(value).__name__} {value!r:.60}")


def _unicode(text: str) -> str:
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise Rejected("half a character (a lone surrogate)", ascii(text)[:60]) from None
    return text


def _texts(value: Any) -> tuple[str, ...]:
    """A list of texts; CSV holds it as JSON or with commas."""
    if isinstance(value, str):
        value = _parse_list(value) if value.startswith("[") else [item.strip() for item in value.split(",") if item.strip()]
    items = value if isinstance(value, list) else [value]
    return tuple(_unicode(item if isinstance(item, str) else _as_json(item)) for item in items)


def _parse_list(text: str) -> list[Any]:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise Rejected("a list that is not valid JSON", text[:60]) from None


def _number(value: Any) -> int:
    try:
        return int(value)
    except (TypeError, ValueError, OverflowError):
        raise Rejected("fits is not a number", repr(value)[:60]) from None


def _as_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)
