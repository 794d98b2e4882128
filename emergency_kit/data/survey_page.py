"""How a survey is shown: tables on the terminal, and a page that loads nothing.

In: a `Survey`. Out: lines on stdout; HTML with histograms drawn as SVG.
"""

from __future__ import annotations

from collections import Counter
from html import escape
from typing import Callable

import numpy as np
from rich.console import Console
from rich.table import Table

from emergency_kit.data.survey import Finding, SplitSurvey, Survey, printable

BINS = 24
BAR = "▏▎▍▌▋▊▉█"
BAR_CHARACTERS = 40
# The page names more of them.
NAMED_ON_TERMINAL = 10


def print_survey(survey: Survey) -> None:
    """Print the tables, the lengths and everything that needs a look."""
    console = Console(highlight=False, markup=False, soft_wrap=True)
    console.print(f"Dataset {survey.name}")
    for note in survey.notes:
        console.print(f"Note: {note}")
    table = Table("", *(split.name for split in survey.splits))
    for label, cells in summary(survey):
        table.add_row(label, *map(printable, cells))
    console.print(table)
    for split in survey.splits:
        if split.tokens:
            console.print(f"Tokens of a row in {split.name} (model.max_seq_length is {survey.limit}):")
        for low, high, count, share in histogram(split.tokens):
            # A bar of eighths of a character; what is there at all shows.
            eighths = max(round(share * BAR_CHARACTERS * 8), bool(count))
            console.print(f"  {low:>6}-{high:<6} {BAR[-1] * (eighths // 8)}{BAR[eighths % 8 - 1] if eighths % 8 else ''} {count}")
    for title, findings in finding_groups(survey):
        console.print(f"{title}:")
        for what, finding in findings.items():
            rows = ", ".join(printable(row) for row in finding.rows[:NAMED_ON_TERMINAL])
            console.print(f"  {finding.count} {what}: {rows}{', ...' if finding.count > NAMED_ON_TERMINAL else ''}")
    if not finding_groups(survey):
        console.print("Nothing found that needs a look.")


def summary(survey: Survey) -> list[tuple[str, list[str]]]:
    """Rows of the main table, a cell a split."""
    def row(label: str, value: Callable[[SplitSurvey], str]) -> tuple[str, list[str]]:
        return label, [value(split) for split in survey.splits]

    def found(label: str, what: str) -> tuple[str, list[str]]:
        return row(label, lambda split: str(split.findings.get(what, Finding()).count))

    return [
        row("records", lambda split: f"{len(split.tokens):,}"),
        row("rejected rows", lambda split: f"{split.rejected:,}"),
        row("recognised as", lambda split: split.form or "no form"),
        row("columns", lambda split: ", ".join(split.columns)),
        row("tokens", lambda split: f"{sum(split.tokens):,}"),
        row("  of them answers", lambda split: f"{sum(split.answer_tokens):,}"),
        row("tokens a row: median", lambda split: _percentile(split.tokens, 50)),
        row("  90 % under", lambda split: _percentile(split.tokens, 90)),
        row("  longest", lambda split: _percentile(split.tokens, 100)),
        found(f"over {survey.limit} tokens", f"over {survey.limit} tokens"),
        row("answers", lambda split: _shares(split.answers)),
        row("languages", lambda split: _shares(split.languages)),
        row("categories", lambda split: _shares(split.categories, 4) or "no column"),
        row("roles", lambda split: _shares(split.roles, 4) or "no column"),
        found("same questions", "same question"),
        found("near-duplicate questions", "near-duplicate question"),
    ]


def _percentile(values: list[int], percent: float) -> str:
    return f"{np.percentile(values, percent):.0f}" if values else "-"


def _shares(counts: Counter[str], most: int = 3) -> str:
    total = sum(counts.values())
    parts = [f"{name} {count / total:.0%}" for name, count in counts.most_common(most) if count]
    return ", ".join(parts) + (f" and {len(+counts) - most} more" if len(+counts) > most else "")


def histogram(values: list[int]) -> list[tuple[int, int, int, float]]:
    """`(from, to, count, share of the tallest)` of each bin; no bin where there is no value."""
    if not values:
        return []
    width = max(1, -(-(max(values) + 1 - min(values)) // BINS))
    first = min(values) // width
    counts = np.bincount(np.asarray(values) // width - first)
    return [((first + index) * width, (first + index + 1) * width - 1, int(count), count / counts.max()) for index, count in enumerate(counts)]


def finding_groups(survey: Survey) -> list[tuple[str, dict[str, Finding]]]:
    """What needs a look, by split, and at the end what stands in two splits."""
    groups = [(f"To look at in {split.name}", split.findings) for split in survey.splits] + [("To look at across splits", survey.crossing)]
    return [(title, findings) for title, findings in groups if findings]


_STYLE = """
:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif }
body { max-width: 64rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; width: 100% } th, td { padding: .25rem .75rem; text-align: left; border-bottom: 1px solid #8884; vertical-align: top }
svg { width: 100%; height: auto; max-width: 48rem } rect { fill: #2f6fb0 } rect.over { fill: #c0392b } text { font: 11px system-ui, sans-serif; fill: currentColor }
line { stroke: #c0392b; stroke-dasharray: 4 3 } code { overflow-wrap: anywhere } details { padding: .25rem 0 } summary { cursor: pointer }
"""


def render_page(survey: Survey) -> str:
    """The survey as one HTML page; every text from the data is escaped."""
    head = "".join(f"<th>{escape(name)}</th>" for name in ("", *(split.name for split in survey.splits)))
    rows = "\n".join(f"<tr><th>{escape(label)}</th>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>" for label, cells in summary(survey))
    notes = "".join(f"<p>{escape(note)}</p>" for note in survey.notes)
    plots = "\n".join(f"<h3>{escape(split.name)}</h3>{_plot(split.tokens, survey.limit, 'tokens of a row')}{_bars(split.categories, 'records per category')}" for split in survey.splits)
    found = "\n".join(f"<h3>{escape(title)}</h3>" + "".join(
        f"<details><summary>{finding.count} {escape(what)}</summary><ul>" + "".join(f"<li><code>{escape(name)}</code></li>" for name in finding.rows)
        + (f"<li>and {finding.count - len(finding.rows)} more</li>" if finding.count > len(finding.rows) else "") + "</ul></details>"
        for what, finding in findings.items()) for title, findings in finding_groups(survey)) or "<p>Nothing found that needs a look.</p>"
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Dataset {escape(survey.name)}</title><style>{_STYLE}</style></head><body>
<h1>Dataset {escape(survey.name)}</h1>
{notes}<table><thead><tr>{head}</tr></thead><tbody>
{rows}</tbody></table>
<h2>To look at</h2>
{found}
<h2>Lengths and categories</h2>
{plots}
</body></html>
"""


def _plot(values: list[int], limit: int, title: str) -> str:
    bins = histogram(values)
    if not bins:
        return "<p>No records.</p>"
    width, height = 640 / len(bins), 140
    bars = "".join(
        f'<rect{" class=over" if low > limit else ""} x="{index * width:.1f}" y="{height - share * height:.1f}" width="{width - 1:.1f}" height="{share * height:.1f}">'
        f"<title>{low} to {high}: {count}</title></rect>" for index, (low, high, count, share) in enumerate(bins))
    marks = "".join(f'<text x="{index * width:.1f}" y="{height + 14}">{bins[index][0]}</text>' for index in range(0, len(bins), max(1, len(bins) // 8)))
    x = (limit - bins[0][0]) / (bins[-1][1] + 1 - bins[0][0]) * 640
    line = f'<line x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{height}"/>' if 0 <= x < 640 else ""
    return f'<svg viewBox="0 0 640 {height + 34}" role="img" aria-label="{escape(title)}">{bars}{line}{marks}<text x="0" y="{height + 30}">{escape(title)}</text></svg>'


def _bars(counts: Counter[str], title: str) -> str:
    items = (+counts).most_common(30)
    if not items:
        return ""
    most = items[0][1]
    bars = "".join(
        f'<text x="0" y="{index * 18 + 12}">{escape(name[:28])}</text><rect x="190" y="{index * 18 + 2}" width="{380 * count / most:.1f}" height="13"/>'
        f'<text x="{196 + 380 * count / most:.1f}" y="{index * 18 + 12}">{count}</text>' for index, (name, count) in enumerate(items))
    return f'<svg viewBox="0 0 640 {len(items) * 18 + 20}" role="img" aria-label="{escape(title)}">{bars}<text x="0" y="{len(items) * 18 + 16}">{escape(title)}</text></svg>'
