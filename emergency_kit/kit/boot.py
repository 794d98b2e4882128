"""Boot: a kit on a computer, from what start.py unpacked: known questions at the first start, then the page and llama.cpp.

In: the kit's folder, the folder that it was unpacked into, a port. Out: a server on loopback until Ctrl-C. torch is not needed.
Run: by computer/start.py of a kit.
"""

from __future__ import annotations

import argparse
import json
import socket
import sys
import threading
import time
import webbrowser
from pathlib import Path
from typing import Any

from emergency_kit.artifacts import save_text
from emergency_kit.config import Resolved, load_config
from emergency_kit.errors import KitError
from emergency_kit.kit.known import compare
from emergency_kit.kit.page import load_retrieval
from emergency_kit.knowledge import index
from emergency_kit.knowledge.cards import load_cards

PATIENCE_SECONDS = 120


def boot(kit: Path, home: Path, port: int, open_browser: bool) -> None:
    """Serve a kit; raises the errors of `serve`. What differs from the recorded answers is printed, and printed again at every start."""
    resolved = load_config("embedded", home / "site" / "kit.yaml", flags={"serve.port": port})
    settings: dict[str, Any] = json.loads((kit / "page" / "kit.json").read_text(encoding="utf-8"))
    model = home / settings["model"]["file"]
    if not list(index.INDEX_FOLDER.glob("retrieval-*.npz")):
        index.adopt_index(load_cards(), load_retrieval(kit / "page"))
    _test_once(resolved, home, model, settings["self_test"])
    if open_browser and port:
        threading.Thread(target=_open_when_ready, args=(port,), daemon=True).start()
    from emergency_kit.inference.server import serve

    serve(resolved, model, token="")


def _test_once(resolved: Resolved, home: Path, model: Path, recorded: dict[str, Any]) -> None:
    passed = home / "self-test"
    if passed.is_file():
        return
    from emergency_kit.inference.llama_engine import LlamaEngine

    print(f"First start: asking {len(recorded['questions'])} known questions ...", flush=True)
    engine = LlamaEngine(model, slots=1)
    try:
        config = resolved.config
        problems = compare(engine, load_cards(), config.dataset.top_k, config.dataset.grounding == "cards", recorded)
    finally:
        engine.close()
    for problem in problems:
        print(f"WARNING: not as recorded when this kit was packed: {problem}", flush=True)
    if problems:
        print("The checked cards are not touched by this. Check the kit: sh verify.sh", flush=True)
    else:
        save_text(passed, "passed\n")
        print("All as recorded when this kit was packed.", flush=True)


def _open_when_ready(port: int) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            time.sleep(0.2)
            continue
        webbrowser.open(f"http://127.0.0.1:{port}/")
        return


def main() -> None:
    """Entry point of `python -m emergency_kit.kit.boot`."""
    parser = argparse.ArgumentParser(description="Serve an unpacked kit.")
    parser.add_argument("kit", type=Path)
    parser.add_argument("home", type=Path)
    parser.add_argument("port", type=int)
    parser.add_argument("--no-open", action="store_true")
    given = parser.parse_args()
    try:
        boot(given.kit, given.home, given.port, not given.no_open)
    except KitError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
