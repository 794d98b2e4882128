"""Terminal: output that outlives its reader, and that a narrow terminal does not tear.

In: the streams of a command. Out: the same streams. `surviving` drops lines instead of ending the command or waiting for ever when
the terminal was closed, the pipe's reader went away, or the reader stopped reading; what is dropped is counted and said once
there is room again; `training.log` has every line. `folding` breaks lines that are longer than the terminal at spaces, since it would
break them in the middle of words. Regular files, pipes (for folding) and streams without a descriptor stay as they are.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import shutil
import signal
import stat
import sys
import textwrap
from typing import Any, Iterator

PATIENCE_SECONDS = 0.5
PIECE_BYTES = 2048  # a pipe or terminal that can be written to takes 4,096 without waiting (PIPE_BUF)


class Surviving:
    """A text stream over the descriptor of another. Everything but writing is the other's."""

    def __init__(self, stream: Any):
        self.stream = stream
        self.descriptor = stream.fileno()
        self.waiting = ""
        self.dropped = 0
        self.broken = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        """Take text; whole lines go out, or are dropped."""
        self.waiting += text
        if "\n" in text or "\r" in text:
            self.flush()
        return len(text)

    def writelines(self, lines: Any) -> None:
        """Take several pieces of text."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Send what waits, as far as the reader takes it."""
        text, self.waiting = self.waiting, ""
        if not text or self.broken:
            return
        # A reader that has stopped is asked without waiting, until it reads again.
        if not self._send(text, 0.0 if self.dropped else PATIENCE_SECONDS):
            self.dropped += 1

    def _send(self, text: str, seconds: float) -> bool:
        if self.dropped:
            text = f"({self.dropped} pieces of output were not taken by their reader; outputs/logs/training.log has them)\n" + text
        rest = memoryview(text.encode(self.stream.encoding or "utf-8", errors="backslashreplace"))
        poll = select.poll()
        poll.register(self.descriptor, select.POLLOUT)
        try:
            while rest:
                if not poll.poll(seconds * 1000):
                    return False
                rest = rest[os.write(self.descriptor, rest[:PIECE_BYTES]):]
        except OSError:
            self.broken = True
            return True
        self.dropped = 0
        return True


@contextlib.contextmanager
def surviving() -> Iterator[None]:
    """Standard output and error that survive a closed terminal, a gone and a stopped reader; SIGHUP is ignored meanwhile."""
    held = sys.stdout, sys.stderr
    hang_up = signal.signal(signal.SIGHUP, signal.SIG_IGN) if hasattr(signal, "SIGHUP") else None
    for stream in held:
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    sys.stdout, sys.stderr = (_survive(stream) for stream in held)
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        sys.stdout, sys.stderr = held
        if hang_up is not None:
            signal.signal(signal.SIGHUP, hang_up)


def _survive(stream: Any) -> Any:
    if not hasattr(select, "poll"):  # Windows
        return stream
    try:
        mode = os.fstat(stream.fileno()).st_mode
    except (OSError, ValueError, AttributeError):
        return stream
    return stream if stat.S_ISREG(mode) or stream.fileno() not in (1, 2) else Surviving(stream)


class Folding:
    """A text stream over that of a terminal, for whole lines of plain text; what moves the cursor or is written piece by piece passes as it is."""

    def __init__(self, stream: Any):
        self.stream = stream
        self.begun = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        """Take text; a line that begins with it and is too long is folded."""
        width = shutil.get_terminal_size().columns
        first, *rest = text.split("\n")
        lines = [first if self.begun else fold(first, width), *(fold(line, width) for line in rest)]
        self.begun = not text.endswith("\n") if text else self.begun
        self.stream.write("\n".join(lines))
        return len(text)

    def writelines(self, lines: Any) -> None:
        """Take several pieces of text."""
        for line in lines:
            self.write(line)


def fold(line: str, width: int) -> str:
    """A line in several of at most `width`, broken at spaces alone; those after the first begin where its last column does, or a little
    further in than it. A row of a table, and a line with control characters within, stay."""
    steered: str = re.findall(r"^(?:\r|\x1b\[[0-9;?]*[A-Za-z])*", line)[0]  # what a live display sends before a line above it
    line = line[len(steered):]
    if len(line) <= width or not line.isprintable() or re.match(r"\s*[│┃|]", line):
        return steered + line
    indent = min(len(line) - len(line.lstrip()) + 2, width // 2)
    for column in (match.end() for match in re.finditer(r"(?<=\S) {2,}(?=\S)", line)):
        if column <= width // 2 and max(map(len, line[column:].split())) <= width - column:
            indent = column
    return steered + textwrap.fill(line, width, subsequent_indent=" " * indent, break_on_hyphens=False, break_long_words=False, replace_whitespace=False)


@contextlib.contextmanager
def folding() -> Iterator[None]:
    """Standard output and error that fold long lines where they are a terminal's."""
    held = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (Folding(stream) if stream.isatty() else stream for stream in held)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = held
