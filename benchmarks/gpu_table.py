"""What `benchmarks/gpu.py` has found, as the Markdown tables of benchmarks/RESULTS.md.

In: its findings by part, and the parts that failed. Out: text on stdout. Limits: a cell that has no figure is empty.
"""

from __future__ import annotations

import statistics
from typing import Any


def print_table(found: dict[str, Any], failed: dict[str, str]) -> None:
    """Everything found, as one Markdown table; a cell that has no figure is empty."""
    limits = found.get("limits", {})
    peak = limits.get("tflops") or None
    print(f"\n{limits.get('device', '')}, torch {limits.get('torch', '')}: bf16 products {limits.get('tflops', 0):.0f} TFLOP/s, copies {limits.get('copy_tb', 0):.2f} TB/s")
    print("| Mistral-7B's shape, random weights | base loaded, GB | load, s | set | tokens/s (range) | samples/s | useful share of the peak | peak memory, GB (foretold) | seconds a step (foretold) | loss, first to last |\n" + "|---" * 10 + "|")
    for name, mine in found.get("speed", {}).get("contenders", {}).items():
        for of in found["speed"]["rows"]:
            one = mine["sets"].get(of)
            cells = ["", "", "", "", "", mine["error"]] if one is None else [
                f"{one['tokens_per_second']:.0f} ({one['range'][0]:.0f} to {one['range'][1]:.0f})", f"{one['samples_per_second']:.2f}", f"{one['tflops'] / peak:.2f}" if peak else "",
                f"{one['peak_bytes'] / 1e9:.2f}" + (f" ({one['foretold_bytes'] / 1e9:.2f})" if "foretold_bytes" in one else ""),
                f"{statistics.median(one['seconds'][1:]):.2f}" + (f" ({one['foretold_seconds']:.2f})" if "foretold_seconds" in one else ""), f"{one['losses'][0]:.4f} to {one['losses'][-1]:.4f}"]
            print(f"| {name} | {mine.get('loaded_bytes', 0) / 1e9:.2f} | {mine.get('seconds_to_load', 0):.0f} | {of} | {' | '.join(cells)} |")
    rows = [("2,000 samples x 3 epochs of 350 tokens, minutes", lambda: ", ".join(
                f"{name} {6000 / mine['sets']['350']['samples_per_second'] / 60:.1f}" for name, mine in found["speed"]["contenders"].items() if "350" in mine["sets"])),
            ("distance of a step's gradients from float32's: kit, transformers' modules", lambda: f"{found['gradients']['fused']['distance']:.4f}, "
                f"{found['gradients']['modules']['distance']:.4f}"),
            ("plan: memory foretold and measured, GB", lambda: f"{found['plan']['plan']['bytes'] / 1e9:.2f}, {found['plan']['bytes'] / 1e9:.2f}"),
            ("plan: seconds of all steps foretold and measured", lambda: f"{found['plan']['plan']['training'] or 0:.2f}, {found['plan']['step_seconds']:.2f}"),
            ("killed and resumed: largest difference of a loss", lambda: f"{found['resume']['largest_loss_difference']:.2e}, same bits {found['resume']['same_bits']}"),
            ("merged into the full-precision base: largest difference of a logit", lambda: f"{found['merge']['largest_logit_difference']:.1e}"),
            ("merge, s", lambda: f"{found['merge']['seconds']:.0f}"),
            ("GGUF q8_0, GB; export, s; mean KL", lambda: f"{found['export']['gguf_bytes'] / 1e9:.2f}; {found['export']['seconds']:.0f}; {found['export']['mean_kl']:.4f}"),
            ("embedded profile, GPU beside CPU: largest difference of a loss", lambda: f"{found['embedded']['largest_loss_difference']:.3%}"),
            ("embedded profile on the GPU, seconds", lambda: ", ".join(f"{stage} {taken:.0f}" for stage, taken in found["embedded"]["seconds"].items()))]
    print("\n| | |\n|---|---|")
    for name, cell in rows:
        try:
            print(f"| {name} | {cell()} |")
        except KeyError:
            print(f"| {name} | |")
    for name, why in failed.items():
        print(f"not measured, {name}: {why}")
