"""A real HTTP server on loopback that speaks the providers' wire formats and misbehaves on demand."""

from __future__ import annotations

import contextlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Callable, Iterator

SCORES = {"completeness": 80, "accuracy": 90, "actionability": 70, "structure": 100, "appropriateness": 60}


class Asked:
    """What came in, and how to answer. answer: from the request's number and its body to `(status, headers, bytes)`, or None to hang."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, dict[str, str], dict[str, Any]]] = []
        self.answer: Callable[[int, dict[str, Any]], tuple[int, dict[str, str], bytes] | None] = lambda number, body: wrap("openai", SCORES)
        self.url = ""
        self.closing = threading.Event()


def wrap(form: str, value: Any, read: int = 100, written: int = 20) -> tuple[int, dict[str, str], bytes]:
    """A good reply of a provider that says `value`."""
    text = value if isinstance(value, str) else json.dumps(value)
    body = {
        "openai": {"choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}], "usage": {"prompt_tokens": read, "completion_tokens": written}},
        "anthropic": {"content": [{"type": "text", "text": text}], "usage": {"input_tokens": read, "output_tokens": written}},
        "gemini": {"candidates": [{"content": {"parts": [{"text": text}]}}], "usageMetadata": {"promptTokenCount": read, "candidatesTokenCount": written}},
    }[form]
    return 200, {}, json.dumps(body).encode()


def question_of(body: dict[str, Any]) -> str:
    """The user's text in a request of any of the three formats."""
    return body["contents"][0]["parts"][0]["text"] if "contents" in body else body["messages"][-1]["content"]


@contextlib.contextmanager
def serve() -> Iterator[Asked]:
    """Run the server until the block ends."""
    asked, lock = Asked(), threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                asked.requests.append((self.path, {name.lower(): value for name, value in self.headers.items()}, body))
                number = len(asked.requests)
            reply = asked.answer(number, body)
            if reply is None:
                asked.closing.wait(5)
                return
            status, headers, content = reply
            with contextlib.suppress(OSError):
                self.send_response(status)
                for name, value in ({"Content-Length": str(len(content))} | headers).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    asked.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield asked
    finally:
        asked.closing.set()
        server.shutdown()
        server.server_close()
        thread.join(5)
