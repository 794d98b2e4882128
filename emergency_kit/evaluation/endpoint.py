"""An OpenAI-compatible endpoint as a contestant: `http://host:port/v1#model`.

In: chat messages. Out: what the endpoint answered, untouched. Used for llama-server, vLLM, Ollama, our own `serve` or a
hosted model. A key is read from OPENAI_API_KEY in the environment or `.env`, where there is one. Limits: the prompt
template is the server's own; one that caches nothing sends the same answer only if it decodes greedily at temperature 0.
"""

from __future__ import annotations

import threading
from typing import Callable, Sequence

from emergency_kit.errors import ModelError
from emergency_kit.evaluation.contestant import Report, run_each
from emergency_kit.evaluation.wire import Client, WireError, read_key
from emergency_kit.inference.engine import Generated, Messages
from emergency_kit.training import ranks

TIMEOUT_SECONDS = 300.0
RETRIES = 4


class EndpointAsker:
    """Requests to `/chat/completions`, several at once."""

    def __init__(self, address: str, at_once: int):
        self.url, _, self.model = address.partition("#")
        self.at_once = at_once
        key = read_key("OPENAI_API_KEY")
        self.client = Client(TIMEOUT_SECONDS, RETRIES, {"Authorization": f"Bearer {key}"} if key else {})
        self.description = f"endpoint {self.url}, {at_once} at once"

    def ask(self, prompts: Sequence[Messages], wanted: Sequence[int], max_new_tokens: int, temperature: float, seed: int,
            put: Callable[[int, Generated], None], report: Report) -> None:
        """See `contestant.Asker`; of several ranks the first asks all, as many at once as with one. Raises ModelError where the endpoint does not
        answer, or not in the format."""
        stopped = threading.Event()
        tokens = [0]

        def one(number: int) -> None:
            if stopped.is_set():
                return
            place = wanted[number]
            body = {"model": self.model or "default", "messages": prompts[place], "max_tokens": max_new_tokens, "temperature": temperature}
            answer = self._ask(body | ({"seed": seed + place} if temperature else {}))
            tokens[0] += answer.tokens
            put(place, answer)

        run_each(one, len(wanted) if ranks.is_first() else 0, self.at_once, stopped, lambda done: report(done, tokens[0]))

    def _ask(self, body: dict[str, object]) -> Generated:
        try:
            reply = self.client.post(f"{self.url.rstrip('/')}/chat/completions", body)
        except WireError as error:
            raise ModelError(f"endpoint {self.url}: {error}; answers so far are kept, the same command goes on there") from None
        try:
            choice = reply["choices"][0]
            text = choice["message"]["content"]
            tokens = reply.get("usage", {}).get("completion_tokens", 0)
            if not isinstance(text, str) or not isinstance(tokens, int):
                raise TypeError
            return Generated(text, tokens, choice.get("finish_reason") == "stop")
        except (KeyError, IndexError, TypeError, AttributeError):
            raise ModelError(f"endpoint {self.url}: its reply is not a chat completion ({str(reply)[:120]!r}); "
                             "name the address that ends before /chat/completions, for instance http://127.0.0.1:8080/v1#name") from None

    def close(self) -> None:
        """Close the connections."""
        self.client.close()
