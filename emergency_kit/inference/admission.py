"""Admission: what every request passes before the application sees it, as one ASGI middleware.

Checked in this order: the Host header (no DNS rebinding: a name that is not ours is refused, an address is not
a name), the Origin (a foreign page cannot use a server on this machine), the rate, the token, the size and the
time of the body. Every response carries the security headers; the page's own policy allows nothing from elsewhere.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import json
import time
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any, Awaitable, Callable, MutableMapping
from urllib.parse import urlsplit

from emergency_kit.inference.metrics import Metrics

Scope = MutableMapping[str, Any]
Event = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Event]]
Send = Callable[[Event], Awaitable[None]]

# Addresses whose rate is remembered; the one not seen for longest is forgotten first.
REMEMBERED = 4096
POLICY = ("default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; manifest-src 'self'; worker-src 'self'; "
          "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; trusted-types kit; require-trusted-types-for 'script'")
SECURITY_HEADERS = [
    (b"content-security-policy", POLICY.encode()), (b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"), (b"cross-origin-opener-policy", b"same-origin"), (b"x-frame-options", b"DENY"),
    (b"permissions-policy", b"camera=(), geolocation=(), microphone=()"), (b"cache-control", b"no-cache")]


@dataclass(frozen=True)
class Limits:
    """What the gate holds requests to. token: empty for none; hosts: names besides addresses and localhost;
    origins: pages of other origins that may ask; public: paths that need no token."""

    token: str = ""
    hosts: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
    public: frozenset[str] = frozenset()
    body_bytes: int = 131072
    body_seconds: float = 15
    requests_per_minute: int = 600
    page: frozenset[str] = field(default_factory=frozenset)


class Refused(Exception):
    """A request that the gate does not let in."""

    def __init__(self, status: int, reason: str, message: str, headers: list[tuple[bytes, bytes]] | None = None):
        super().__init__(message)
        self.status, self.reason, self.headers = status, reason, headers or []


class Admission:
    """The middleware. Counts every request, refused ones by reason."""

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]], limits: Limits, metrics: Metrics):
        self.app, self.limits, self.metrics = app, limits, metrics
        self._rates = Rates(limits.requests_per_minute)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":  # no WebSockets here
            return
        headers = read_headers(scope)
        origin = headers.get("origin", "")
        allowed = origin in self.limits.origins
        started = False
        status = 500

        async def send_with_headers(event: Event) -> None:
            nonlocal started, status
            if event["type"] == "http.response.start":
                started, status = True, event["status"]
                own = {name for name, _ in event["headers"]}
                extra = [header for header in SECURITY_HEADERS if header[0] not in own]
                cors = [(b"access-control-allow-origin", origin.encode("latin-1")), (b"vary", b"Origin")] if allowed else []
                event = {**event, "headers": [*event["headers"], *extra, *cors]}
            await send(event)

        try:
            preflight = self._check(scope, headers, origin, allowed)
            if preflight:
                await answer(send_with_headers, 204, b"", preflight)
            else:
                await self.app(scope, replay(await read_body(receive, self.limits.body_bytes, self.limits.body_seconds), receive), send_with_headers)
        except Refused as refusal:
            self.metrics.refused.labels(refusal.reason).inc()
            if not started:
                body = json.dumps({"error": {"message": str(refusal), "type": "invalid_request_error", "param": None, "code": refusal.reason}}).encode()
                await answer(send_with_headers, refusal.status, body, [(b"content-type", b"application/json"), *refusal.headers])
        finally:
            path = scope["path"]
            self.metrics.count_request("page" if path in self.limits.page else path, scope["method"], status)

    def _check(self, scope: Scope, headers: dict[str, str], origin: str, allowed: bool) -> list[tuple[bytes, bytes]] | None:
        """Raises Refused; the headers of an answer to a preflight request, where it is one."""
        host = headers.get("host", "")
        if not self._is_ours(host):
            raise Refused(403, "host", f"Host {host[:100]!r} is not this server's name; ask by its address, or name it with --set serve.hosts='[NAME]'")
        if origin and not allowed and urlsplit_host(origin) != host.lower():
            raise Refused(403, "origin", f"Origin {origin[:100]!r} may not use this server; allow it with --set serve.origins='[ORIGIN]'")
        if allowed and scope["method"] == "OPTIONS" and "access-control-request-method" in headers:
            return [(b"access-control-allow-methods", b"GET, POST"), (b"access-control-allow-headers", b"authorization, content-type"),
                    (b"access-control-max-age", b"600")]
        client = scope["client"][0] if scope.get("client") else ""
        if scope["method"] == "POST" and (wait := self._rates.take(client)):
            raise Refused(429, "rate", f"more than {self.limits.requests_per_minute} requests in a minute; try again in {wait} s", [(b"retry-after", str(wait).encode())])
        if self.limits.token and scope["path"] not in self.limits.public and not self._knows_token(headers):
            if scope["method"] != "POST":
                self._rates.take(client)  # guesses are counted, whichever way they come
            raise Refused(401, "token", "this server needs a token: send Authorization: Bearer TOKEN", [(b"www-authenticate", b"Bearer")])
        return None

    def _knows_token(self, headers: dict[str, str]) -> bool:
        scheme, _, given = headers.get("authorization", "").partition(" ")
        return scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode("latin-1"), self.limits.token.encode())

    def _is_ours(self, host: str) -> bool:
        name = urlsplit_host("//" + host, port=False)
        if name in ("localhost", *self.limits.hosts):
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True


class Rates:
    """A bucket of tokens for every address: full it holds a minute's requests, and it fills at that rate."""

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic):
        self._per_minute, self._clock = per_minute, clock
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, client: str) -> int:
        """0 when the request may pass, else the seconds until one may."""
        now = self._clock()
        left, seen = self._buckets.pop(client, (float(self._per_minute), now))
        left = min(float(self._per_minute), left + (now - seen) * self._per_minute / 60)
        passes = left >= 1
        self._buckets[client] = (left - 1 if passes else left, now)
        if len(self._buckets) > REMEMBERED:
            self._buckets.popitem(last=False)
        return 0 if passes else max(1, round((1 - left) * 60 / self._per_minute))


async def read_body(receive: Receive, limit: int, seconds: float) -> bytes:
    """The whole body; raises Refused for one over the limit, or one that takes too long."""
    body = b""
    deadline = time.monotonic() + seconds
    while True:
        try:
            event = await asyncio.wait_for(receive(), max(0.0, deadline - time.monotonic()))
        except TimeoutError:
            raise Refused(408, "slow", f"the body did not arrive within {seconds:g} s", [(b"connection", b"close")]) from None
        if event["type"] == "http.disconnect":
            raise Refused(400, "disconnect", "the client went away before its body had arrived")
        body += event.get("body", b"")
        if len(body) > limit:
            raise Refused(413, "size", f"the body is over {limit} bytes", [(b"connection", b"close")])
        if not event.get("more_body", False):
            return body


def read_headers(scope: Scope) -> dict[str, str]:
    """Headers by lower-case name; of several with one name the last."""
    return {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}


def urlsplit_host(url: str, port: bool = True) -> str:
    """Host, and the port where it is named, of an origin; empty where there is none."""
    try:
        parts = urlsplit(url)
        return parts.netloc.lower() if port else (parts.hostname or "").rstrip(".")
    except ValueError:
        return ""


def replay(body: bytes, receive: Receive) -> Receive:
    """`receive` that gives a body that was read already, and then what comes."""
    given = False

    async def receive_again() -> Event:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return receive_again


async def answer(send: Send, status: int, body: bytes, headers: list[tuple[bytes, bytes]]) -> None:
    """A whole response."""
    await send({"type": "http.response.start", "status": status, "headers": [*headers, (b"content-length", str(len(body)).encode())]})
    await send({"type": "http.response.body", "body": body})
