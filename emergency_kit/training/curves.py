"""Curves of a run: `logs/training.html` and `logs/training.png`, written anew as it goes.

In: the Trainer's log history. Out: loss with its smoothed course and the validation loss, learning rate, gradient norm, throughput and memory
(on a GPU also utilisation and temperature) over steps; one page that loads nothing, and one picture. Both are replaced whole, so a reader
never sees half of one; a disk that refuses is said once and the run goes on. A resumed run draws on from what its checkpoint holds.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from functools import cached_property
from html import escape
from io import BytesIO
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from emergency_kit.artifacts import save_text
from emergency_kit.files import save_bytes

# Weight of the past in the smoothed loss, with Adam's correction for the beginning (Kingma and Ba 2015).
PAST = 0.9
# Most points that are drawn of a curve; of more, every n-th.
POINTS = 1500
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 640, 240, 62, 16, 30, 28
COLOURS = ("#1f5fa8", "#b5651d", "#1a7f4b")
# Both are at most so old while a run goes on, or so many times as old as they took to draw: 2 % of a run at most.
SECONDS_BETWEEN, TIMES_BETWEEN = 5.0, 50

STYLE = """:root{color-scheme:light dark;--ink:#1b1f24;--paper:#fff;--soft:#5b6570;--line:#d5dae0}
@media(prefers-color-scheme:dark){:root{--ink:#e8eaed;--paper:#16191d;--soft:#a3acb6;--line:#3a424b}}
*{box-sizing:border-box}body{font:16px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--paper);max-width:84rem;margin:0 auto;padding:1rem}
h1{font-size:1.4rem;margin:.2rem 0}p{color:var(--soft);margin:.2rem 0 1rem}main{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,30rem),1fr));gap:1rem}
figure{margin:0}svg{width:100%;height:auto;display:block}svg text{fill:var(--ink);font:12px system-ui,sans-serif}svg .soft{fill:var(--soft)}"""


class Smoothed:
    """Exponential mean of losses. value: the mean so far; count: losses in it."""

    def __init__(self) -> None:
        self.sum, self.count = 0.0, 0

    def add(self, loss: float) -> float:
        """Take one loss; the mean with it."""
        self.sum, self.count = PAST * self.sum + (1 - PAST) * loss, self.count + 1
        return self.value

    @property
    def value(self) -> float:
        return self.sum / (1 - PAST**self.count) if self.count else float("nan")


@dataclass
class Chart:
    """title with unit; lines: `{name: [(step, value)]}`."""

    title: str
    lines: dict[str, list[tuple[float, float]]] = field(default_factory=dict)

    @cached_property
    def values(self) -> list[float]:
        """Round values at the left, lowest first, that hold every point between them."""
        seen = [value for line in self.lines.values() for _, value in line]
        low, high = min(seen), max(seen)
        largest = max(abs(low), abs(high))
        # What differs by rounding alone is flat: a step between such values would be lost beside them.
        span = high - low if high - low > max(1e-9 * largest, 1e-30) else largest if largest > 1e-30 else 1.0
        unit = 10.0 ** math.floor(math.log10(span / 4))
        step = next(unit * factor for factor in (1, 2, 5, 10) if span / (unit * factor) <= 5)
        first, last = math.floor(low / step), math.ceil(high / step)
        return [step * number for number in range(first, max(last, first + 1) + 1)]

    @cached_property
    def steps(self) -> list[int]:
        """Steps below, first and last among them."""
        seen = [step for line in self.lines.values() for step, _ in line]
        first, last = int(min(seen)), int(max(max(seen), min(seen) + 1))
        return sorted({round(first + (last - first) * part / 4) for part in range(5)})

    def place(self, point: tuple[float, float]) -> tuple[float, float]:
        """Of a step and a value, in the figure."""
        across, up = (point[0] - self.steps[0]) / (self.steps[-1] - self.steps[0]), (point[1] - self.values[0]) / (self.values[-1] - self.values[0])
        return LEFT + (WIDTH - LEFT - RIGHT) * across, TOP + (HEIGHT - TOP - BOTTOM) * (1 - up)


def build_charts(history: list[dict[str, Any]]) -> list[Chart]:
    """Charts of a log history; those without a value are left out."""
    smoothed = Smoothed()
    loss = _line(history, "loss")
    charts = [Chart("Loss", {"loss": loss, "smoothed": [(step, smoothed.add(value)) for step, value in loss], "validation": _line(history, "eval_loss")}),
              *(Chart(title, {key: _line(history, key)}) for title, key in (
                  ("Learning rate", "learning_rate"), ("Gradient norm, before clipping", "grad_norm"), ("Throughput, tokens/s", "tokens_per_second"), ("Memory held, GB", "memory_gb"),
                  ("GPU utilisation, %", "gpu_utilisation_percent"), ("GPU temperature, °C", "gpu_temperature_celsius"), ("GPU power, W", "gpu_power_watts")))]
    for chart in charts:
        chart.lines = {name: line for name, line in chart.lines.items() if line}
    return [chart for chart in charts if chart.lines]


def _line(history: list[dict[str, Any]], key: str) -> list[tuple[float, float]]:
    points = [(float(entry["step"]), float(entry[key])) for entry in history if isinstance(entry.get(key), (int, float)) and abs(entry[key]) < 1e30 and "step" in entry]
    every = -(-len(points) // POINTS) or 1
    return points[::every] + (points[-1:] if points and (len(points) - 1) % every else [])


def draw_svg(chart: Chart) -> str:
    """One chart as an SVG figure."""
    parts = [f'<text x="{LEFT}" y="16" font-weight="600">{escape(chart.title)}</text>']
    for value in chart.values:
        y = chart.place((chart.steps[0], value))[1]
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="var(--line)"/><text class="soft" text-anchor="end" x="{LEFT - 6}" y="{y + 4:.1f}">{value:.4g}</text>')
    for step in chart.steps:
        parts.append(f'<text class="soft" text-anchor="middle" x="{chart.place((step, chart.values[0]))[0]:.1f}" y="{HEIGHT - BOTTOM + 18}">{step}</text>')
    for number, (name, line) in enumerate(chart.lines.items()):
        places = [chart.place(point) for point in line]
        faint = ' stroke-opacity=".35"' if name == "loss" and "smoothed" in chart.lines else ""
        drawn = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{COLOURS[number]}"/>' for x, y in places) if len(places) < 2 or name == "validation" else ""
        parts.append(f'<g><title>{escape(name)}: {line[-1][1]:.4g} at step {line[-1][0]:g}</title><polyline fill="none" stroke="{COLOURS[number]}" stroke-width="2"{faint} points="'
                     + " ".join(f"{x:.1f},{y:.1f}" for x, y in places) + f'"/>{drawn}</g>')
        parts.append(f'<text text-anchor="end" x="{WIDTH - RIGHT}" y="{16 + 14 * number}" style="fill:{COLOURS[number]}">{escape(name.replace("_", " "))} {line[-1][1]:.4g}</text>')
    return f'<figure><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(chart.title)} over steps">{"".join(parts)}</svg></figure>'


def render_page(history: list[dict[str, Any]], title: str, status: str, running: bool) -> str:
    """The whole page; while a run goes on it loads itself anew every ten seconds."""
    again = '<meta http-equiv="refresh" content="10">' if running else ""
    charts = "".join(draw_svg(chart) for chart in build_charts(history)) or "<p>No loss has been logged yet.</p>"
    return (f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">{again}<title>{escape(title)}</title>'
            f"<style>{STYLE}</style></head><body><h1>{escape(title)}</h1><p>{escape(status)}</p><main>{charts}</main></body></html>\n")


def draw_png(history: list[dict[str, Any]], title: str) -> bytes:
    """All charts in one picture, two beside each other, drawn at twice the size and halved."""
    from PIL import Image, ImageDraw, ImageFont

    charts, scale = build_charts(history), 2
    image = Image.new("RGB", (2 * WIDTH * scale, (36 + HEIGHT * max(1, -(-len(charts) // 2))) * scale), "white")
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(12 * scale)
    pen.text((LEFT * scale, 10 * scale), title, fill="#1b1f24", font=ImageFont.load_default(16 * scale))
    for number, chart in enumerate(charts):
        across, down = number % 2 * WIDTH, 36 + number // 2 * HEIGHT

        def at(x: float, y: float) -> tuple[float, float]:
            return (across + x) * scale, (down + y) * scale  # noqa: B023  called in its own turn

        pen.text(at(LEFT, 4), chart.title, fill="#1b1f24", font=font)
        for value in chart.values:
            y = chart.place((chart.steps[0], value))[1]
            pen.line([at(LEFT, y), at(WIDTH - RIGHT, y)], fill="#d5dae0", width=scale)
            pen.text(at(LEFT - 6, y), f"{value:.4g}", fill="#5b6570", font=font, anchor="rm")
        for step in chart.steps:
            pen.text(at(chart.place((step, chart.values[0]))[0], HEIGHT - BOTTOM + 6), str(step), fill="#5b6570", font=font, anchor="mt")
        for order, (name, line) in enumerate(chart.lines.items()):
            places = [at(*chart.place(point)) for point in line]
            colour = "#a9c3e0" if name == "loss" and "smoothed" in chart.lines else COLOURS[order]
            if len(places) > 1:
                pen.line(places, fill=colour, width=2 * scale, joint="curve")
            else:
                pen.circle(places[0], 3 * scale, fill=colour)
            pen.text(at(WIDTH - RIGHT, 4 + 14 * order), f"{name.replace('_', ' ')} {line[-1][1]:.4g}", fill=colour, font=font, anchor="rt")
    out = BytesIO()
    image.resize((image.width // scale, image.height // scale), Image.Resampling.LANCZOS).save(out, "PNG", optimize=True)
    return out.getvalue()


class CurvesCallback(TrainerCallback):
    """Writes page and picture at each log, at most every few seconds, and at the end."""

    def __init__(self, folder: Path, name: str):
        self.folder, self.name = folder, name
        self.written = self.next = 0.0
        self.failed = False

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.is_world_process_zero and time.monotonic() > self.next:
            self.write(state, running=True)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.is_world_process_zero:
            self.write(state, running=False)

    def write(self, state: TrainerState, running: bool) -> None:
        """Replace both files."""
        from emergency_kit.training.callbacks import LOG

        started = time.monotonic()
        title = f"Training of {self.name}"
        status = f"Step {state.global_step} of {state.max_steps}, {'running' if running else 'ended'}, {time.strftime('%Y-%m-%d %H:%M:%S')}"
        try:
            save_text(self.folder / "training.html", render_page(state.log_history, title, status, running))
            save_bytes(self.folder / "training.png", draw_png(state.log_history, f"{title}: {status}"))
        except OSError as error:
            if not self.failed:
                LOG.warning("%s cannot be written (%s); training goes on without curves", error.filename or self.folder, error.strerror or error)
            self.failed = True
        self.written = time.monotonic()
        self.next = self.written + max(SECONDS_BETWEEN, TIMES_BETWEEN * (self.written - started))
