"""A live run recorded on a terminal, as an SVG for the docs.

In: a command, by default a short training of the embedded profile. Out: docs/images/training_run.svg: the last lines of what a terminal of
120 columns was sent, and the live lines below them as they stood at `--at` of the way. The command runs on a pseudo-terminal; nothing is drawn by hand.
Run: `.venv/bin/python benchmarks/record_run.py --out docs/images/training_run.svg -- --max-steps 12 --output-dir outputs/recorded`.
"""

from __future__ import annotations

import argparse
import io
import os
import pty
import re
import struct
import sys
from fcntl import ioctl
from pathlib import Path
from termios import TIOCSWINSZ

from rich.console import Console
from rich.text import Text

COLUMNS, ROWS = 120, 50
# What rich's Live sends before it draws its lines anew: back to the first of them.
FRAME = re.compile(r"(?:\r\x1b\[2K)(?:\x1b\[1A\x1b\[2K)+")


def record(command: list[str]) -> str:
    """Everything that the command sends to a terminal."""
    pid, terminal = pty.fork()
    if not pid:
        os.environ |= {"TERM": "xterm-256color", "COLUMNS": str(COLUMNS), "LINES": str(ROWS)}
        os.execvp(command[0], command)
    ioctl(terminal, TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    sent = b""
    while True:
        try:
            piece = os.read(terminal, 65536)
        except OSError:  # Linux's way to say that the other end is closed
            break
        if not piece:
            break
        sent += piece
    if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]):
        sys.exit(sent.decode(errors="replace")[-3000:])
    return sent.decode(errors="replace")


def stand_still(sent: str, at: float, lines: int) -> str:
    """What stood on the screen after a share of the live frames: the last lines, the frame below them."""
    pieces = FRAME.split(sent.replace("\r\n", "\n"))
    chosen = max(1, round(at * (len(pieces) - 1)))
    # A frame is two lines; what stands before it in a piece scrolled up for good.
    above = [line for piece in pieces[:chosen] for line in piece.split("\n")[:-2] if line.strip("\r\x1b[?25hl ")]
    above += pieces[chosen].split("\n")[:-2]
    return "\n".join([*above[-lines:], *pieces[chosen].split("\n")[-2:]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/images/training_run.svg"))
    parser.add_argument("--at", type=float, default=0.7)
    parser.add_argument("--lines", type=int, default=20)
    parser.add_argument("arguments", nargs="*", help="flags of train")
    given = parser.parse_args()
    command = [sys.executable, "-m", "emergency_kit.cli", "train", "--profile", "embedded", *(given.arguments or ["--max-steps", "12", "--output-dir", "outputs/recorded"])]
    shown = stand_still(record(command), given.at, given.lines)
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True)
    console.print(Text.from_ansi("$ emergency-kit train\n" + shown), soft_wrap=False)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    # The theme's fonts would be loaded from a network; the reader's own do.
    given.out.write_text(re.sub(r"@font-face\s*{[^}]*}", "", console.export_svg(title="emergency-kit train")), encoding="utf-8")
    print(f"{given.out}: {given.out.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
