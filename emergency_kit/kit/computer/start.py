"""Start: opens the kit on this computer, with nothing but Python's standard library; works from a read-only stick.

Where the kit has wheels for this system and this Python they are unpacked, with the model, into a folder of the user's
(EMERGENCY_KIT_HOME names another), and llama.cpp answers natively; else the page is served as it is and the browser answers.
Run by start-linux.sh and its like. --page: only serve the page. --no-open: open no browser. --port N.
"""

import argparse
import hashlib
import http.server
import json
import os
import platform
import shutil
import subprocess
import sys
import threading
import webbrowser
import zipfile
from pathlib import Path

KIT = Path(__file__).resolve().parent.parent
COMPUTER = KIT / "computer"
NATIVE_PORT, PAGE_PORT = 8000, 8765


def main():
    parser = argparse.ArgumentParser(description="Open the emergency kit on this computer.")
    parser.add_argument("--fits", choices=("native", "page"), help=argparse.SUPPRESS)
    parser.add_argument("--page", action="store_true", help="serve the page only; the browser runs the model")
    parser.add_argument("--no-open", action="store_true", help="open no browser")
    parser.add_argument("--port", type=int, help="port to listen on, 0 for any that is free")
    given = parser.parse_args()
    wheels = find_wheels()
    if given.fits:
        sys.exit(0 if given.fits == "page" or wheels else 1)
    if wheels and not given.page:
        sys.exit(run_native(wheels, given))
    if not wheels:
        print("This kit has no llama.cpp for %s with Python %d.%d; the browser runs the model." % (this_system(), *sys.version_info[:2]))
    serve_page(given)


def this_system():
    system = {"Linux": "linux", "Darwin": "macos", "Windows": "windows"}.get(platform.system(), platform.system().lower())
    machine = {"amd64": "x86_64", "arm64": "arm64" if system == "macos" else "aarch64"}.get(platform.machine().lower(), platform.machine().lower())
    return "%s-%s" % (system, machine)


def find_wheels():
    """Names of the wheels for this system and Python; none where the kit has none, or no model."""
    try:
        table = json.loads((COMPUTER / "wheels.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return table.get("%s-%d.%d" % (this_system(), *sys.version_info[:2]), [])


def run_native(wheels, given):
    kit = json.loads((KIT / "page" / "kit.json").read_text(encoding="utf-8"))
    home = unpack(wheels, kit["model"])
    if home is None:
        return 1
    environment = dict(os.environ, PYTHONPATH=str(home / "site"), PYTHONNOUSERSITE="1", PYTHONDONTWRITEBYTECODE="1")
    port = NATIVE_PORT if given.port is None else given.port
    command = [sys.executable, "-m", "emergency_kit.kit.boot", str(KIT), str(home), str(port)] + (["--no-open"] if given.no_open else [])
    if os.name == "posix":
        os.execve(command[0], command, environment)  # one process, which a signal ends
    try:
        return subprocess.call(command, env=environment)
    except KeyboardInterrupt:
        return 0


def unpack(wheels, model):
    """The folder with everything unpacked; made once for each kit, whole or not at all."""
    sums = (KIT / "SHA256SUMS").read_bytes()
    base = os.environ.get("EMERGENCY_KIT_HOME") or os.path.join(os.environ.get("LOCALAPPDATA") or os.environ.get("XDG_DATA_HOME") or os.path.expanduser("~/.local/share"), "emergency-kit")
    home = Path(base) / hashlib.sha256(sums + repr(wheels).encode()).hexdigest()[:16]
    if (home / "whole").is_file():
        return home
    print("First start on this computer: unpacking into %s ..." % home, flush=True)
    digests = {line[66:]: line[:64] for line in sums.decode("utf-8").splitlines()}
    partial = home.with_name("%s.%d.partial" % (home.name, os.getpid()))
    try:
        (partial / "site").mkdir(parents=True)
        for name in ["computer/emergency-kit.zip"] + ["computer/wheels/" + name for name in wheels]:
            if digest(KIT / name) != digests.get(name):
                return damaged(name)
            with zipfile.ZipFile(KIT / name) as archive:
                archive.extractall(partial / "site")
        whole = hashlib.sha256()
        with open(partial / model["file"], "wb") as joined:
            for part in model["parts"]:
                content = (KIT / "page" / part["name"]).read_bytes()
                whole.update(content)
                joined.write(content)
        if whole.hexdigest() != model["sha256"]:
            return damaged("the model")
        (partial / "whole").write_text("")
        shutil.rmtree(home, ignore_errors=True)
        partial.rename(home)
        return home
    except OSError as error:
        print("error: %s; free some space, or name another folder: EMERGENCY_KIT_HOME=FOLDER" % error, file=sys.stderr)
        return None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def damaged(name):
    print("error: %s is not as it was packed; do not use this kit. The cards in cards.html may still be whole: sh verify.sh says." % name, file=sys.stderr)


def digest(path):
    found = hashlib.sha256()
    with open(path, "rb") as stream:
        for block in iter(lambda: stream.read(1 << 20), b""):
            found.update(block)
    return found.hexdigest()


class Handler(http.server.SimpleHTTPRequestHandler):
    """Files of the kit, with the headers that let llama.cpp use several threads in the browser."""

    extensions_map = dict(http.server.SimpleHTTPRequestHandler.extensions_map, **{".js": "text/javascript", ".wasm": "application/wasm", ".webmanifest": "application/manifest+json"})

    def __init__(self, *arguments):
        super().__init__(*arguments, directory=str(KIT))

    def end_headers(self):
        for name, value in (("Cross-Origin-Opener-Policy", "same-origin"), ("Cross-Origin-Embedder-Policy", "require-corp"), ("X-Content-Type-Options", "nosniff"), ("Cache-Control", "no-cache")):
            self.send_header(name, value)
        super().end_headers()

    def log_message(self, *_):
        """What anybody opens is nobody's business."""


class Server(http.server.ThreadingHTTPServer):
    def handle_error(self, *_):
        """A browser that went away midway is no error."""


def serve_page(given):
    for port in [PAGE_PORT, 0] if given.port is None else [given.port]:
        try:
            server = Server(("127.0.0.1", port), Handler)
            break
        except OSError as error:
            problem = error
    else:
        sys.exit("error: port %d: %s" % (given.port, problem.strerror))
    address = "http://127.0.0.1:%d/page/" % server.server_address[1]
    print("The page: %s   (Ctrl-C stops)" % address, flush=True)
    if not given.no_open:
        threading.Timer(0.5, webbrowser.open, [address]).start()
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        pass


if __name__ == "__main__":
    main()
