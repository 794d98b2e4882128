"""Draw the loss curve of a run as SVG, from its training_state.json.

Run: python benchmarks/loss_curve.py outputs/checkpoints/final benchmarks/loss_curve.svg
"""

import json
import sys
from pathlib import Path

WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 640, 300, 48, 36, 16


def draw(folder: Path) -> str:
    """SVG text with training loss as a line and validation loss as dots; both axes linear from 0."""
    state = json.loads((folder / "training_state.json").read_text(encoding="utf-8"))
    losses = [(entry["step"], entry["loss"]) for entry in state["loss_history"]]
    validation = [(entry["step"], entry["loss"]) for entry in state["validation_history"]]
    steps, top = max(step for step, _ in losses), max(loss for _, loss in losses + validation) * 1.05

    def place(step: float, loss: float) -> tuple[float, float]:
        return LEFT + (WIDTH - LEFT - 10) * step / steps, TOP + (HEIGHT - TOP - BOTTOM) * (1 - loss / top)

    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12">',
             f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>']
    for tick in range(5):
        _, y = place(0, top * tick / 4)
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - 10}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>'
                     f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{top * tick / 4:.2f}</text>')
        x, _ = place(steps * tick / 4, 0)
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - 18}" text-anchor="middle">{steps * tick / 4:.0f}</text>')
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in losses))
    parts.append(f'<polyline points="{line}" fill="none" stroke="#1f6feb" stroke-width="2"/>')
    parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="#d1242f"/>' for x, y in (place(*point) for point in validation)]
    parts.append(f'<text x="{WIDTH - 14}" y="{TOP + 12}" text-anchor="end"><tspan fill="#1f6feb">training loss</tspan>, '
                 f'<tspan fill="#d1242f">validation loss</tspan></text><text x="{WIDTH / 2}" y="{HEIGHT - 3}" text-anchor="middle">step</text></svg>')
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(draw(Path(sys.argv[1])), encoding="utf-8")
