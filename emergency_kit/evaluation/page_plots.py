"""Plots of the report's page, as inline SVG and as a coloured table.

In: the report's models and slices. Out: HTML. Colours are told apart by position and words too; text scales with the page.
"""

from __future__ import annotations

from html import escape
from typing import Any

from emergency_kit.evaluation.metrics import BY_NAME, METRICS
from emergency_kit.evaluation.slices import SHOWN

COLOURS = ("var(--one)", "var(--two)", "var(--three)", "var(--four)", "var(--soft)")
WIDTH, LEFT, ROW, GAP = 720, 190, 15, 14


def draw_intervals(report: dict[str, Any]) -> str:
    """A dot and a whisker for each share of each model; the first five models."""
    models = report["models"][:len(COLOURS)]
    metrics = [metric for metric in METRICS if metric.unit == "%" and any(metric.name in model["metrics"] for model in models)]
    height = 24 + len(metrics) * (ROW * len(models) + GAP) + 20 * len(models)
    scale = WIDTH - LEFT - 70
    parts = [f'<line x1="{LEFT + scale * tick / 4:.0f}" y1="4" x2="{LEFT + scale * tick / 4:.0f}" y2="{height - 20 * len(models) - 20}" stroke="var(--line)"/>'
             f'<text class="soft" text-anchor="middle" x="{LEFT + scale * tick / 4:.0f}" y="{height - 20 * len(models) - 6}">{25 * tick} %</text>' for tick in range(5)]
    y = 14
    for metric in metrics:
        parts.append(f'<text x="0" y="{y + 4}">{escape(metric.label)}</text>')
        for number, model in enumerate(models):
            value = model["metrics"].get(metric.name)
            if value:
                x, low, high = (LEFT + scale * value[key] for key in ("value", "low", "high"))
                colour = COLOURS[number]
                parts.append(f'<line x1="{low:.1f}" x2="{max(high, low + 1):.1f}" y1="{y}" y2="{y}" stroke="{colour}" stroke-width="3" stroke-opacity=".45"/>'
                             f'<circle cx="{x:.1f}" cy="{y}" r="4.5" fill="{colour}"><title>{escape(model["name"])}: {value["value"]:.1%}</title></circle>'
                             f'<text class="soft" x="{LEFT + scale + 12}" y="{y + 4}">{value["value"]:.1%}</text>')
            y += ROW
        y += GAP
    for number, model in enumerate(models):
        place = height - 20 * (len(models) - number) + 10
        parts.append(f'<circle cx="{LEFT + 6}" cy="{place}" r="4.5" fill="{COLOURS[number]}"/><text x="{LEFT + 18}" y="{place + 4}">{escape(model["name"])}</text>')
    return f'<svg viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" role="img" aria-label="Shares of each model with their intervals">{"".join(parts)}</svg>'


def draw_heat_map(slices: dict[str, dict[str, Any]]) -> str:
    """A table a dimension, each cell coloured from red over yellow to green by how good its value is."""
    heads = "".join(f"<th>{escape(BY_NAME[name].label)}</th>" for name in SHOWN)
    blocks = []
    for dimension, parts in slices.items():
        rows = "".join(f'<tr><td>{escape(part)} <small>{numbers["n"]}</small></td>{"".join(_cell(name, numbers.get(name)) for name in SHOWN)}</tr>'
                       for part, numbers in parts.items())
        table = f'<div class="box"><table class="heat"><thead><tr><th>{escape(dimension)}</th>{heads}</tr></thead><tbody>{rows}</tbody></table></div>'
        closed = len(parts) > 8
        blocks.append(f"<details><summary>{escape(dimension)}: {len(parts)} parts</summary>{table}</details>" if closed else f"<h3>By {escape(dimension)}</h3>{table}")
    return "".join(blocks)


def _cell(name: str, numbers: dict[str, Any] | None) -> str:
    if not numbers:
        return '<td class="none">–</td>'
    good = numbers["value"] if BY_NAME[name].better == "high" else 1 - numbers["value"]
    # Harm is rare where a model is any good: a fifth of bad outcomes is already all red.
    strength = max(0.0, 1 - (1 - good) * (5 if BY_NAME[name].better == "low" else 1.6))
    hue = 8 + 122 * strength
    return f'<td style="background:hsl({hue:.0f} 62% 74%)" title="{numbers["low"]:.0%} to {numbers["high"]:.0%} of {numbers["n"]}">{numbers["value"]:.0%}</td>'
