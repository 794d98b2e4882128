"""Server: `emergency-kit serve`, one model on loopback for programs and for the page.

In: the config's `serve` section, flags. Out: HTTP until Ctrl-C. Starlette and FastAPI carry the routes, uvicorn the
protocol. A public address needs a token. Nothing that anybody writes is logged.
Run: `emergency-kit serve --checkpoint outputs/gguf/final-q4_k_m.gguf`, then open the address that it prints.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import os
import re
import socket
import sys
from pathlib import Path
from typing import Any

from emergency_kit.config import Resolved
from emergency_kit.errors import UsageError
from emergency_kit.inference.engine import check_model
from emergency_kit.knowledge.emergency_numbers import find_country

# A client that has not sent its whole head by then is cut off; an idle connection, too.
HEAD_SECONDS = 15
IDLE_SECONDS = 30
# How long answers may go on after Ctrl-C.
GRACE_SECONDS = 3
TOKEN_VARIABLE = "EMERGENCY_KIT_TOKEN"


def serve(resolved: Resolved, checkpoint: Path | None = None, token: str | None = None) -> None:
    """Serve one model until Ctrl-C or SIGTERM.

    checkpoint: adapter, merged or base folder, or a GGUF file; by default the config's finished model. token: what
    clients must send as a bearer token; by default the variable EMERGENCY_KIT_TOKEN, or none. Raises UsageError
    for a public address without a token or an address that cannot be had, ModelError for a checkpoint that cannot be used.
    """
    config = resolved.config
    token = _check_token(os.environ.get(TOKEN_VARIABLE, "") if token is None else token)
    find_country(config.inference.country)
    family, address = _look_up(config.serve.host, config.serve.port)
    if not token and not ipaddress.ip_address(address[0]).is_loopback:
        raise UsageError(f"--host: got {config.serve.host!r}, which others can reach, without a token; next: --token SECRET (or {TOKEN_VARIABLE}), or --host 127.0.0.1")
    checkpoint = Path(checkpoint or resolved.finished_model)
    check_model(checkpoint, config.model)
    with _listen(family, address) as listening:
        _note(f"Loading {checkpoint} ...")
        server, description = build_server(resolved, checkpoint, token)
        _note(f"Loaded: {description}")
        host, port = listening.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        print(f"Serving {checkpoint} at http://{shown}:{port}/ (API: /openapi.json; Ctrl-C stops)", flush=True)
        if not ipaddress.ip_address(host).is_loopback:
            _note("Others can reach this address, and what they send is not encrypted; put a TLS proxy before it where the network is not yours.")
        with contextlib.suppress(KeyboardInterrupt):  # uvicorn has shut down in order and hands the signal on
            asyncio.run(server.serve(sockets=[listening]))
    _note("Stopped.")


def build_server(resolved: Resolved, checkpoint: Path, token: str = "") -> tuple[Any, str]:
    """`(uvicorn server, description of the engine)` for a checkpoint that has been checked; it listens on nothing yet."""
    import uvicorn
    from uvicorn.protocols.http.h11_impl import H11Protocol

    from emergency_kit.inference.answer import Answerer
    from emergency_kit.inference.api import build_app
    from emergency_kit.inference.admission import Limits
    from emergency_kit.inference.metrics import Metrics
    from emergency_kit.inference.service import Service
    from emergency_kit.inference.slots import Slots
    from emergency_kit.inference.warm_up import start_warm_up

    class Protocol(H11Protocol):
        """uvicorn's, and a connection that never completes the head of a request is closed."""

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self.loop.call_later(HEAD_SECONDS, self._close_if_headless)

        def _close_if_headless(self) -> None:
            if self.cycle is None and not self.transport.is_closing():
                self.transport.close()

    config = resolved.config
    answerer = Answerer(resolved, checkpoint, config.serve.slots)
    limits = Limits(token=token, hosts=tuple(name.lower() for name in (*config.serve.hosts, config.serve.host)), origins=tuple(config.serve.origins),
                    body_bytes=config.serve.max_body_bytes, requests_per_minute=config.serve.requests_per_minute)
    app = build_app(Service(answerer, Slots(config.serve.slots, config.serve.queue), Metrics()), limits)
    if os.environ.get("EMERGENCY_KIT_DEBUG") != "1":
        logging.getLogger("uvicorn.error").addFilter(_without_traceback)
    protocol = uvicorn.Config(app, http=Protocol, ws="none", loop="asyncio", lifespan="on", access_log=False, log_level="warning", server_header=False,
                            proxy_headers=False, limit_concurrency=config.serve.connections, timeout_keep_alive=IDLE_SECONDS, timeout_graceful_shutdown=GRACE_SECONDS,
                            h11_max_incomplete_event_size=16384)
    if config.inference.warm_up and answerer.grounded:
        start_warm_up(answerer.engine, answerer.cards, config.inference.country)
    return uvicorn.Server(protocol), answerer.engine.description


def _without_traceback(record: logging.LogRecord) -> bool:
    record.exc_info = None
    return True


def _check_token(token: str) -> str:
    if token and not re.fullmatch(r"[!-~]{8,256}", token):
        raise UsageError("--token: expected 8 to 256 printable ASCII characters without spaces; next: --token \"$(openssl rand -hex 16)\"")
    return token


def _look_up(host: str, port: int) -> tuple[int, tuple[Any, ...]]:
    """`(family, address)` of a host; of several the first."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except (OSError, UnicodeError) as error:
        raise UsageError(f"--host: got {host!r}, which is no address of this machine ({error}); next: --host 127.0.0.1") from None
    return family, address


def _listen(family: int, address: tuple[Any, ...]) -> socket.socket:
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind(address)
        listening.listen(128)
    except OSError as error:
        listening.close()
        raise UsageError(f"--host {address[0]} --port {address[1]}: {error.strerror}; next: another --port, 0 for any that is free") from None
    return listening


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
