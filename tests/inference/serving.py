"""A real server on a free loopback port, in a thread of the test process, so that torch is loaded once."""

import asyncio
import contextlib
import socket
import threading
import time
from pathlib import Path
from typing import Iterator

import httpx

from emergency_kit.inference.server import build_server
from tests.tiny import resolve

OIL = "the oil in my pan is on fire"


@contextlib.contextmanager
def serving(checkpoint: Path, token: str = "", **settings: object) -> Iterator[str]:
    """The address of a server for a model folder; `serve__slots=1` stands for `--set serve.slots=1`."""
    resolved = resolve(checkpoint, **settings)
    server, _ = build_server(resolved, checkpoint, token)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listening])), daemon=True)
        thread.start()
        try:
            deadline = time.monotonic() + 30
            while not server.started:
                assert thread.is_alive() and time.monotonic() < deadline
                time.sleep(0.02)
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(timeout=30)
            assert not thread.is_alive()


def wait_for(condition, seconds: float = 15) -> None:
    """Until a condition holds; fails the test where it does not in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def is_idle(address: str) -> bool:
    """Whether nothing runs or waits."""
    health = httpx.get(f"{address}/health").json()
    return health["running"] == health["waiting"] == 0
