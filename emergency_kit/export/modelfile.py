"""Modelfile: how Ollama is to run an exported file, from the chat template that training used.

In: a tokenizer with its chat template, the config. Out: the Modelfile's text; a parser of its grammar
(https://github.com/ollama/ollama/blob/main/docs/modelfile.md); and a proof that the template in it, filled in as Ollama
does, gives the very prompts of training. Ollama's templates are Go's: what is written here uses
`.System`, `.Prompt`, `.Response` and `if`, and the evaluator knows no more.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from emergency_kit.config import Resolved
from emergency_kit.data.format import SYSTEM_PROMPT
from emergency_kit.data.template import apply_template, as_accepted, find_turn, render_prompt
from emergency_kit.errors import ExportError
from emergency_kit.export import parity

INSTRUCTIONS = ("FROM", "PARAMETER", "TEMPLATE", "SYSTEM", "ADAPTER", "LICENSE", "MESSAGE")
PARAMETERS: dict[str, type] = {
    "num_ctx": int, "num_predict": int, "num_keep": int, "num_batch": int, "num_gpu": int, "num_thread": int, "seed": int, "top_k": int, "repeat_last_n": int,
    "temperature": float, "top_p": float, "min_p": float, "typical_p": float, "repeat_penalty": float, "presence_penalty": float,
    "frequency_penalty": float, "stop": str}
_SYSTEM, _USER, _ASSISTANT, _NEXT = "SYSTEM-MARK", "USER-MARK", "ASSISTANT-MARK", "NEXT-MARK"


@dataclass
class Modelfile:
    """What a Modelfile says. parameters: `(name, value)` in order; messages: `(role, text)`."""

    source: str = ""
    template: str | None = None
    system: str | None = None
    adapters: list[str] = field(default_factory=list)
    licenses: list[str] = field(default_factory=list)
    parameters: list[tuple[str, Any]] = field(default_factory=list)
    messages: list[tuple[str, str]] = field(default_factory=list)

    @property
    def stops(self) -> list[str]:
        """Texts that end an answer."""
        return [value for name, value in self.parameters if name == "stop"]


def build_modelfile(file_name: str, tokenizer: Any, license_id: str | None, resolved: Resolved) -> str:
    """The Modelfile of a GGUF file that lies beside it."""
    config = resolved.config
    parameters: list[tuple[str, Any]] = [*(("stop", _quote(token)) for token in _stops(tokenizer)), ("num_ctx", config.model.max_seq_length),
                                         ("num_predict", config.inference.max_new_tokens), ("temperature", f"{config.inference.temperature:g}"),
                                         ("repeat_penalty", "1")]  # Ollama's default, 1.1, punishes the words of the card
    if config.inference.temperature > 0:
        parameters += [("top_k", 0), ("top_p", 1)]
    grounded = ["# Trained to follow the knowledge card in the prompt, which Ollama does not look up: paste one above the situation",
                "# (emergency-kit knowledge show HAZARD), or use the kit's own page."] if config.dataset.grounding == "cards" else []
    return "\n".join([
        "# Written by emergency-kit export-gguf --ollama. Not a doctor: in an emergency call your local emergency number first.", *grounded,
        f"FROM ./{file_name}", f"TEMPLATE {_quote(build_template(tokenizer))}", f"SYSTEM {_quote(SYSTEM_PROMPT)}",
        *(f"PARAMETER {name} {value}" for name, value in parameters), *([f"LICENSE {_quote(license_id)}"] if license_id else [])]) + "\n"


def _stops(tokenizer: Any) -> list[str]:
    """What ends an answer: the chat template's end token, and the tokenizer's own where it is another."""
    return list(dict.fromkeys([find_turn(tokenizer).end, tokenizer.eos_token]))


def build_template(tokenizer: Any) -> str:
    """The chat template as a Go template of system prompt, user's text and answer.

    A conversation's first turn has the system prompt, later ones have not; Ollama writes the BOS token itself
    where the tokenizer does. Raises ExportError for a template that does more than wrap these texts.
    """
    accepted = as_accepted(tokenizer, [{"role": "system", "content": _SYSTEM}, {"role": "user", "content": _USER}])
    turns = [*accepted, {"role": "assistant", "content": _ASSISTANT}, {"role": "user", "content": _NEXT}]
    first, both = apply_template(tokenizer, accepted), apply_template(tokenizer, turns)
    opening = re.fullmatch(f"(.*){_SYSTEM}(.*){_USER}(.*)", first, re.S)
    later = re.fullmatch(f"(.*){_SYSTEM}(.*){_USER}(.*){_ASSISTANT}(.*){_NEXT}(.*)", both, re.S)
    # Qwen 3 leaves the empty thought, with which it begins every answer, out of earlier turns; Ollama will show it there. The space before an answer
    # (Mistral) is written by the model.
    if not opening or not later or opening.groups()[:2] != later.groups()[:2] or not opening.group(3).startswith(later.group(3).rstrip(" ")) or later.group(5) != opening.group(3):
        raise ExportError("the chat template does more than wrap system prompt, user's text and answer, so that no Modelfile can be written for it; "
                          "serve the GGUF file with llama.cpp, which runs the template itself")
    head, middle, tail = opening.groups()
    if tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id] and tokenizer.bos_token:
        head = head.removeprefix(tokenizer.bos_token)
    head, middle, tail, between = map(_escape, (head, middle, tail, later.group(4)))
    return f"{{{{ if .System }}}}{head}{{{{ .System }}}}{middle}{{{{ else }}}}{between}{{{{ end }}}}{{{{ .Prompt }}}}{tail}{{{{ .Response }}}}"


def parse_modelfile(text: str) -> Modelfile:
    """Read a Modelfile by Ollama's grammar; raises ExportError with the line's number."""
    found, lines, number = Modelfile(), text.splitlines(keepends=True), 0
    while number < len(lines):
        line, place = lines[number], number + 1
        number += 1
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        name, _, rest = line.strip().partition(" ")
        if name.upper() not in INSTRUCTIONS:
            raise ExportError(f"Modelfile, line {place}: instruction {name!r} is unknown; known: {', '.join(INSTRUCTIONS)}")
        rest = line.lstrip()[len(name):].lstrip(" ")
        key, value = "", rest
        if name.upper() in ("PARAMETER", "MESSAGE"):
            key, _, value = rest.partition(" ")
        value = value.lstrip(" ")
        mark = '"""' if value.startswith('"""') else '"' if value.startswith('"') else ""
        if mark:
            value = value[len(mark):]
            while mark not in value:
                if number >= len(lines):
                    raise ExportError(f"Modelfile, line {place}: {name} opens with {mark} and nothing closes it")
                value += lines[number]
                number += 1
            value, _, after = value.partition(mark)
            if after.strip():
                raise ExportError(f"Modelfile, line {place}: text stands behind the closing {mark}")
        else:
            value = value.strip()
        _take(found, name.upper(), key, value, place)
    if not found.source:
        raise ExportError("Modelfile: no FROM line")
    return found


def fill_template(template: str, system: str, prompt: str, response: str) -> str:
    """A template filled in as Go's text/template does, for the actions that `build_template` writes."""
    values = {"System": system, "Prompt": prompt, "Response": response}
    parts = re.split(r"\{\{\s*(.*?)\s*\}\}", template, flags=re.S)
    written, shown = [], [True]
    for index, part in enumerate(parts):
        if index % 2 == 0 or part.startswith('"'):
            if all(shown):
                written.append(part if index % 2 == 0 else part[1:-1])
        elif match := re.fullmatch(r"if \.(System|Prompt|Response)", part):
            shown.append(bool(values[match.group(1)]))
        elif part == "else" and len(shown) > 1:
            shown[-1] = not shown[-1]
        elif part == "end" and len(shown) > 1:
            shown.pop()
        elif part[1:] in values and part[0] == ".":
            if all(shown):
                written.append(values[part[1:]])
        else:
            raise ExportError(f"template: action {{{{ {part} }}}} is not one that is known here")
    if len(shown) != 1:
        raise ExportError("template: an `if` without its `end`")
    return "".join(written)


def prove_modelfile(text: str, tokenizer: Any, resolved: Resolved) -> None:
    """Raise ExportError unless the Modelfile parses and its prompts are those of training."""
    parsed = parse_modelfile(text)
    if parsed.system != SYSTEM_PROMPT or parsed.stops != _stops(tokenizer) or parsed.template is None:
        raise ExportError("Modelfile: read back, it does not hold the system prompt and the stop tokens that training used; report this tokenizer")
    bos = tokenizer.bos_token or ""
    for messages in parity.build_messages_for_proof(resolved):
        expected = render_prompt(tokenizer, messages)
        found = fill_template(parsed.template, parsed.system, messages[1]["content"], "")
        if found != expected and bos + found != expected:
            raise ExportError(f"Modelfile: its template renders {found[:80]!r} where training saw {expected[:80]!r}; report this chat template")


def _take(found: Modelfile, name: str, key: str, value: str, place: int) -> None:
    if not value:
        raise ExportError(f"Modelfile, line {place}: {name} has no value")
    if name == "FROM":
        found.source = value
    elif name == "TEMPLATE":
        found.template = value
    elif name == "SYSTEM":
        found.system = value
    elif name == "ADAPTER":
        found.adapters.append(value)
    elif name == "LICENSE":
        found.licenses.append(value)
    elif name == "MESSAGE":
        if key not in ("system", "user", "assistant"):
            raise ExportError(f"Modelfile, line {place}: role {key!r} is not system, user or assistant")
        found.messages.append((key, value))
    elif key not in PARAMETERS:
        raise ExportError(f"Modelfile, line {place}: parameter {key!r} is unknown; known: {', '.join(PARAMETERS)}")
    else:
        try:
            found.parameters.append((key, PARAMETERS[key](value)))
        except ValueError:
            raise ExportError(f"Modelfile, line {place}: {key} is {value!r}; expected {PARAMETERS[key].__name__}") from None


def _quote(text: str) -> str:
    if '"""' in text:
        raise ExportError(f"a text for the Modelfile holds three quotes, which its grammar cannot write: {text[:80]!r}")
    return f'"""{text}"""' if '"' in text or "\n" in text or text != text.strip() or "{{" in text else f'"{text}"'


def _escape(text: str) -> str:
    """Literal text for a Go template; a brace at its end would open the action behind it a letter early."""
    return re.sub(r"\{\{|\{\Z", lambda found: f'{{{{ "{found.group()}" }}}}', text)
