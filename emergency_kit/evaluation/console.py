"""Console: progress while answers are generated, and the short table at the end.

On a terminal a Rich bar and table; in a pipe plain lines, one every 15 seconds even while a long
prompt is being read.
"""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path
from typing import Any

from emergency_kit.evaluation.metrics import METRICS
from emergency_kit.evaluation.report import failing_samples

LINE_SECONDS = 15
MOST_FAILING = 10


class Progress:
    """A context in which `update(answers done, tokens so far)` shows how far one model is."""

    def __init__(self, name: str, total: int):
        self.name, self.total = name, total
        self._done, self._tokens = 0.0, 0
        self._bar: Any = None
        self._left = threading.Event()
        self._clock = threading.Thread(target=self._say_regularly, daemon=True)

    def __enter__(self) -> "Progress":
        self._started = time.monotonic()
        if sys.stdout.isatty():
            from rich.progress import BarColumn, Progress as Bar, TextColumn, TimeRemainingColumn

            self._bar = Bar(TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[text]}"), TimeRemainingColumn())
            self._task = self._bar.add_task(self.name, total=self.total, text="")
            self._bar.start()
        else:
            self._clock.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._left.set()
        if self._bar:
            self._bar.stop()
        else:
            self._clock.join()
            self._say()

    def update(self, done: float, tokens: int) -> None:
        """Take what has been reached. done: finished answers, fractions for those being written; tokens: generated so far."""
        self._done, self._tokens = done, tokens
        if self._bar:
            self._bar.update(self._task, completed=done, text=self._text())

    def _text(self) -> str:
        elapsed = time.monotonic() - self._started
        return f"{int(self._done)} of {self.total} answers, {self._tokens / max(elapsed, 1e-9):.0f} tokens/s"

    def _say_regularly(self) -> None:
        while not self._left.wait(LINE_SECONDS):
            self._say()

    def _say(self) -> None:
        elapsed = time.monotonic() - self._started
        left = elapsed * (self.total - self._done) / self._done if self._done else 0
        print(f"  {self.name}: {self._text()}, {elapsed:.0f} s" + (f", about {left:.0f} s left" if left else ""), flush=True)


def print_report(report: dict[str, Any], path: Path, page: Path) -> None:
    """Print the numbers, at most ten failing samples, the verdict, and where the report stands."""
    columns = [*report["models"], *report["baselines"]]
    names = [column["name"] for column in columns]
    rows = [(metric.label, *(_cell(column["metrics"].get(metric.name), metric.unit) for column in columns)) for metric in METRICS]
    rows.append(("scenarios", *(str(column["samples"]) for column in columns)))
    rows.append(("tokens a second, this run", *(f"{column['tokens_per_second']:.0f}" if column.get("tokens_per_second") else "-" for column in columns)))
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table

        table = Table("", *names)
        for row in rows:
            table.add_row(*row)
        Console().print(table)
    else:
        widths = [max(24, len(name) + 2) for name in names]
        for label, *cells in [("", *names), *rows]:
            print(f"{label:<32}" + "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths)))
    failing = failing_samples(report)
    if failing:
        print(f"{len(failing)} of {report['total_samples']} answers to look at{', the first ten' if len(failing) > MOST_FAILING else ''}:")
    for index, record_id, wrong in failing[:MOST_FAILING]:
        print(f"  {index:>3} {record_id}: {wrong if len(wrong) <= 160 else wrong[:157] + '...'}")
    from emergency_kit.evaluation.gate import print_verdict

    print_verdict(report["verdict"])
    print(f"Report: {path}\nPage: {page}", flush=True)


def _cell(numbers: dict[str, Any] | None, unit: str) -> str:
    if not numbers:
        return "-"
    scale = 100 if unit == "%" else 1
    return f"{numbers['value'] * scale:.1f}{unit} ({numbers['low'] * scale:.1f} to {numbers['high'] * scale:.1f})"
