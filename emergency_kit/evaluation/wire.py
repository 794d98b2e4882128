"""JSON over HTTP to services that may be slow, busy, broken or hostile.

In: an address, a JSON body. Out: the JSON object of the reply, or a `WireError` in words. httpx carries it; this file adds
what a long batch needs: tries again after 408, 409, 429, 5xx and lost connections, waits doubling from a second or as
Retry-After says, a limit to what a reply may weigh, and keys that never reach a message. Limits: no streaming.
"""

from __future__ import annotations

import email.utils
import json
import os
import random
import time
from pathlib import Path
from typing import Any, Mapping

import httpx

FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 1.0, 60.0
LARGEST_REPLY_BYTES = 4_000_000
AGAIN = {408, 409, 429, 500, 502, 503, 504, 529}


class WireError(Exception):
    """A request that got no usable reply. status: the HTTP status, None where there was none."""

    def __init__(self, message: str, status: int | None = None):
        self.status = status
        super().__init__(message)


class Client:
    """Requests with one set of headers; safe to use from several threads."""

    def __init__(self, timeout_seconds: float, retries: int, headers: Mapping[str, str]):
        self.retries, self.timeout_seconds = retries, timeout_seconds
        self.secrets = [value.removeprefix("Bearer ") for value in headers.values() if len(value) > 7]
        self._client = httpx.Client(headers=dict(headers), timeout=timeout_seconds, follow_redirects=False,
                                    mounts={"all://127.0.0.1": None, "all://localhost": None})  # never through a proxy
        self.tries = 0

    def post(self, url: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """The reply's JSON object; raises WireError after the last try, at once where trying again cannot help."""
        for attempt in range(self.retries + 1):
            self.tries += 1
            try:
                return self._post(url, body)
            except _Again as again:
                if attempt == self.retries:
                    raise WireError(f"{self._hide(again.message)}, after {attempt + 1} tries", again.status) from None
                wait = min(LONGEST_WAIT_SECONDS, FIRST_WAIT_SECONDS * 2 ** attempt) * random.uniform(0.75, 1.25)
                time.sleep(min(LONGEST_WAIT_SECONDS, again.after_seconds) if again.after_seconds is not None else wait)
        raise AssertionError("unreachable")

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def _post(self, url: str, body: Mapping[str, Any]) -> dict[str, Any]:
        try:
            with self._client.stream("POST", url, json=dict(body)) as reply:
                content, deadline = b"", time.monotonic() + self.timeout_seconds
                for piece in reply.iter_bytes():
                    content += piece
                    if len(content) > LARGEST_REPLY_BYTES:
                        raise WireError(f"its reply is over {LARGEST_REPLY_BYTES / 1e6:.0f} MB", reply.status_code)
                    if time.monotonic() > deadline:  # a server that drips is as bad as one that is silent
                        raise _Again(f"no whole reply within {self.timeout_seconds:.0f} s", None)
        except httpx.TimeoutException:
            raise _Again(f"no reply within {self.timeout_seconds:.0f} s", None) from None
        except (httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
            raise WireError(f"{url!r} is no address ({error})") from None
        except httpx.DecodingError:
            raise WireError("its reply is packed in a way that cannot be read") from None
        except httpx.TransportError as error:
            raise _Again(f"cannot be reached ({self._hide(str(error)) or type(error).__name__})", None) from None
        return self._read(reply, content)

    def _read(self, reply: httpx.Response, content: bytes) -> dict[str, Any]:
        status = reply.status_code
        shown = self._hide(" ".join(content[:300].decode("utf-8", "replace").split()))
        if status in AGAIN:
            raise _Again(f"HTTP {status} ({shown})", status, _read_retry_after(reply.headers.get("retry-after")))
        if status in (401, 403):
            raise WireError(f"HTTP {status}: the key was refused ({shown})", status)
        if status != 200:
            raise WireError(f"HTTP {status} ({shown})", status)
        try:
            value = json.loads(content)
        except (ValueError, RecursionError):
            raise WireError(f"its reply is not JSON ({shown[:80]!r})", status) from None
        if not isinstance(value, dict):
            raise WireError(f"its reply is not a JSON object ({shown[:80]!r})", status)
        return value

    def _hide(self, text: str) -> str:
        for secret in self.secrets:
            text = text.replace(secret, "[key]")
        return text


class _Again(Exception):
    def __init__(self, message: str, status: int | None, after_seconds: float | None = None):
        self.message, self.status, self.after_seconds = message, status, after_seconds


def _read_retry_after(value: str | None) -> float | None:
    """Seconds, or an HTTP date (RFC 9110); None for anything else."""
    if not value:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, TypeError):
            return None
    return max(0.0, seconds) if seconds == seconds else None


def read_key(name: str, folder: Path = Path()) -> str | None:
    """A key from the environment, else from `.env` in the folder; None where there is none."""
    if os.environ.get(name, "").strip():
        return os.environ[name].strip()
    try:
        lines = (folder / ".env").read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return None
    for line in lines:
        left, equals, right = line.strip().removeprefix("export ").partition("=")
        if equals and left.strip() == name and right.strip():
            return right.strip().strip("'\"") or None
    return None
