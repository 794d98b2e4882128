"""Providers: how each service is asked for one text, on its own wire format.

In: a system text and a question. Out: the reply's text with the tokens read and written. Anthropic's Messages API, OpenAI's chat
completions (and whatever speaks it), Gemini's generateContent. httpx carries all three: the providers' own packages with what
they need weigh 84 MB and sixteen more packages, LiteLLM 44 MB and twenty-seven, for three small JSON bodies.
Limits: written from the providers' public documentation and run against local servers that speak it, not against the services.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Callable
from urllib.parse import quote, urlsplit

from emergency_kit.config import JudgeConfig
from emergency_kit.errors import UsageError
from emergency_kit.evaluation.wire import Client, WireError, read_key


@dataclass(frozen=True)
class Reply:
    """A reply's text and what it cost in tokens; 0 where the service did not say."""

    text: str
    read_tokens: int
    written_tokens: int


@dataclass(frozen=True)
class Provider:
    """One service. key: name of the environment variable; required: whether it cannot be asked without."""

    name: str
    model: str
    base_url: str
    key: str
    required: bool
    headers: Callable[[str], dict[str, str]]
    request: Callable[[str, str, str, str, int], tuple[str, dict[str, Any]]]
    read: Callable[[dict[str, Any]], Reply]


def _ask_anthropic(base: str, model: str, system: str, question: str, most: int) -> tuple[str, dict[str, Any]]:
    return f"{base}/v1/messages", {"model": model, "max_tokens": most, "system": system, "messages": [{"role": "user", "content": question}]}


def _read_anthropic(reply: dict[str, Any]) -> Reply:
    usage = reply.get("usage", {})
    return Reply("".join(part["text"] for part in reply["content"] if part.get("type") == "text"), usage.get("input_tokens", 0), usage.get("output_tokens", 0))


def _ask_openai(base: str, model: str, system: str, question: str, most: int) -> tuple[str, dict[str, Any]]:
    return f"{base}/chat/completions", {"model": model, "max_completion_tokens": most, "response_format": {"type": "json_object"},
                                        "messages": [{"role": "system", "content": system}, {"role": "user", "content": question}]}


def _ask_compatible(base: str, model: str, system: str, question: str, most: int) -> tuple[str, dict[str, Any]]:
    address, body = _ask_openai(base, model, system, question, most)
    del body["max_completion_tokens"], body["response_format"]  # many servers know the old name alone
    return address, body | {"max_tokens": most, "temperature": 0}


def _read_openai(reply: dict[str, Any]) -> Reply:
    usage = reply.get("usage") or {}
    return Reply(reply["choices"][0]["message"]["content"], usage.get("prompt_tokens", 0), usage.get("completion_tokens", 0))


def _ask_gemini(base: str, model: str, system: str, question: str, most: int) -> tuple[str, dict[str, Any]]:
    return f"{base}/v1beta/models/{quote(model, safe='')}:generateContent", {
        "systemInstruction": {"parts": [{"text": system}]}, "contents": [{"role": "user", "parts": [{"text": question}]}],
        "generationConfig": {"maxOutputTokens": most, "responseMimeType": "application/json"}}


def _read_gemini(reply: dict[str, Any]) -> Reply:
    usage = reply.get("usageMetadata", {})
    return Reply("".join(part.get("text", "") for part in reply["candidates"][0]["content"]["parts"]),
                 usage.get("promptTokenCount", 0), usage.get("candidatesTokenCount", 0))


def _bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"} if key else {}


PROVIDERS = {provider.name: provider for provider in (
    Provider("anthropic", "claude-sonnet-4-5", "https://api.anthropic.com", "ANTHROPIC_API_KEY", True,
             lambda key: {"x-api-key": key, "anthropic-version": "2023-06-01"}, _ask_anthropic, _read_anthropic),
    Provider("openai", "gpt-4.1-mini", "https://api.openai.com/v1", "OPENAI_API_KEY", True, _bearer, _ask_openai, _read_openai),
    Provider("gemini", "gemini-2.5-flash", "https://generativelanguage.googleapis.com", "GEMINI_API_KEY", True,
             lambda key: {"x-goog-api-key": key}, _ask_gemini, _read_gemini),
    Provider("openai-compatible", "default", "", "OPENAI_COMPATIBLE_API_KEY", False, _bearer, _ask_compatible, _read_openai),
)}


class Service:
    """A provider with a key and a client; `ask` may be called from several threads."""

    def __init__(self, settings: JudgeConfig):
        """Raises UsageError where the key or the address is missing."""
        self.provider = PROVIDERS[settings.provider]
        self.model = settings.model or self.provider.model
        self.base_url = (settings.base_url or self.provider.base_url).rstrip("/")
        if not self.base_url:
            raise UsageError("judge.base_url: empty; an openai-compatible judge needs its address, for instance --ai-base-url http://127.0.0.1:8080/v1")
        if urlsplit(self.base_url).scheme not in ("http", "https") or not urlsplit(self.base_url).hostname:
            raise UsageError(f"judge.base_url: got {self.base_url!r}; expected an address such as http://127.0.0.1:8080/v1")
        key = read_key(self.provider.key) or ""
        if self.provider.required and not key:
            raise UsageError(f"--ai with {self.provider.name}: {self.provider.key} is not set; next: put it into the environment or into a line {self.provider.key}=... of .env")
        self.local = urlsplit(self.base_url).hostname in ("127.0.0.1", "localhost", "::1")
        self.client = Client(settings.timeout_seconds, settings.retries, self.provider.headers(key))

    def ask(self, system: str, question: str, most_tokens: int) -> Reply:
        """One reply; raises WireError where there is none or it is not of the format."""
        address, body = self.provider.request(self.base_url, self.model, system, question, most_tokens)
        reply = self.client.post(address, body)
        try:
            found = self.provider.read(reply)
        except (KeyError, IndexError, TypeError, AttributeError):
            raise WireError(f"its reply is not in the format of {self.provider.name} ({str(reply)[:120]!r})") from None
        counts = (found.read_tokens, found.written_tokens)
        if not isinstance(found.text, str) or not all(type(count) is int and 0 <= count < 10 ** 9 for count in counts):
            raise WireError(f"its reply is not in the format of {self.provider.name} ({str(reply)[:120]!r})")
        return found
