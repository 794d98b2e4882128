"""Metrics: what the server counts, in Prometheus' text form at `/metrics`.

No metric carries what anybody wrote. Labels come from short fixed lists, so that no request can add one.
"""

from __future__ import annotations

from typing import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, PlatformCollector, ProcessCollector, generate_latest

ROUTES = ("/answer", "/v1/chat/completions", "/v1/models", "/cards", "/health", "/metrics", "/openapi.json", "page")
METHODS = ("GET", "POST", "OPTIONS")
SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """One server's metrics, in a registry of their own."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)
        self.requests = Counter("emergency_kit_requests", "Requests by route, method and status.", ["route", "method", "status"], registry=registry)
        self.refused = Counter("emergency_kit_refused", "Requests refused before anything was generated.", ["reason"], registry=registry)
        self.cancelled = Counter("emergency_kit_cancelled", "Answers whose client went away.", registry=registry)
        self.failed = Counter("emergency_kit_failed", "Answers that an error ended.", registry=registry)
        self.tokens = Counter("emergency_kit_tokens", "Tokens read and written.", ["kind"], registry=registry)
        self.answers = Counter("emergency_kit_answers", "Whole answers.", registry=registry)
        self.struck = Counter("emergency_kit_struck_lines", "Lines of the model's that went against a never-rule.", registry=registry)
        self.added = Counter("emergency_kit_added_steps", "Steps added from the cards.", registry=registry)
        self.first_token = Histogram("emergency_kit_first_token_seconds", "From the slot to the first text.", buckets=SECONDS, registry=registry)
        self.seconds = Histogram("emergency_kit_answer_seconds", "From the slot to the whole answer.", buckets=SECONDS, registry=registry)

    def watch(self, name: str, help_text: str, value: Callable[[], float]) -> None:
        """A gauge that is read when it is asked for."""
        Gauge(f"emergency_kit_{name}", help_text, registry=self._registry).set_function(value)

    def count_request(self, route: str, method: str, status: int) -> None:
        """One request, under labels from fixed lists."""
        self.requests.labels(route if route in ROUTES else "other", method if method in METHODS else "other", str(status)).inc()

    def render(self) -> bytes:
        """The text that Prometheus reads."""
        return generate_latest(self._registry)
