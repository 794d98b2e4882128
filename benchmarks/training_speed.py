"""Training throughput of this project beside the original system's settings and TRL's, in one run, a step in turns.

In: nothing. Out: a table on the console (and in --json FILE), and with --curve a plot of the losses. Every contender is
a process that waits; in each round each takes one optimizer step on the same rows, so that a noisy machine is noisy for
all. Real, unpadded tokens per second; medians and ranges over the rounds after a warm-up step.
Run: make bench-training (an hour on two cores, 14 GB). Needs trl and matplotlib, which that target installs.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

STEP_ROWS = 8
# SmolLM2-135M: weights of the 30 layers, and of the head; forward and backward through frozen weights are 2 + 2 FLOP a weight.
LAYER_WEIGHTS, HEAD_WEIGHTS = 106_168_320, 28_311_552


def build_rows(grounding: str, steps: int) -> dict[str, list[dict[str, Any]]]:
    """Token rows of the embedded dataset: of 300 to 359 tokens without cards, of any length with them."""
    from emergency_kit.config import load_config
    from emergency_kit.data.cache import load_rows
    from emergency_kit.data.load import open_splits
    from emergency_kit.model.backend import load_tokenizer

    low, high = (300, 360) if grounding == "none" else (0, 10**6)
    resolved = load_config("embedded", settings=[f"dataset.grounding={grounding}", "training.output_dir=outputs/bench", "dataset.max_samples=null",
                                                 "dataset.max_eval_samples=null"])
    tokenizer = load_tokenizer(resolved.config.model)
    found = {}
    for name, wanted in (("train", steps * STEP_ROWS), ("validation", 16)):
        rows = load_rows(open_splits(resolved, "train", "validation")[name], tokenizer, resolved)
        found[name] = [{"ids": rows[index]["input_ids"], "prompt": int(rows.prompts[index])}
                       for index in range(len(rows)) if low <= rows.lengths[index] < high][:wanted]
    return found


class Contender:
    """A process of training_peers.py that takes a step when told."""

    def __init__(self, name: str, file: Path, folder: Path, steps: int, dropout: float):
        self.name, self.records, self.closing = name, [], {}
        self.process = subprocess.Popen([sys.executable, str(Path(__file__).with_name("training_peers.py")), name, str(file), str(folder / name), str(steps),
                                         str(dropout)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=(folder / f"{name}.log").open("w"), text=True,
                                        env={**os.environ, "PYTHONPATH": "."})
        self.log = folder / f"{name}.log"
        self.read("ready")

    def read(self, key: str) -> dict[str, Any]:
        """The next JSON line that has `key`."""
        for line in self.process.stdout:
            if line.startswith("{") and key in (record := json.loads(line)):
                return record
        raise SystemExit(f"{self.name} ended: {self.log.read_text()[-2000:]}")

    def step(self) -> None:
        """One optimizer step."""
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        self.records.append(self.read("seconds"))

    def finish(self) -> None:
        """Its memory and validation loss."""
        self.process.stdin.close()
        self.closing = self.read("peak_bytes")
        self.process.wait()


def gemm_peak() -> dict[str, float]:
    """GFLOP/s of one product of 4096 x 4096 matrices, by type."""
    code = ("import torch, time, json\nfound = {}\nfor kind in ('float32', 'bfloat16'):\n  a, b = (torch.ones(4096, 4096, dtype=getattr(torch, kind)) for _ in range(2))\n"
            "  a @ b\n  s = time.perf_counter(); a @ b; found[kind] = 2 * 4096**3 / (time.perf_counter() - s) / 1e9\nprint(json.dumps(found))")
    return json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


def measure(names: list[str], rows: dict[str, Any], rounds: int, dropout: float, warm: int = 1) -> tuple[list[Contender], list[dict[str, float]]]:
    """Rounds in turns; the peak of matrix products is measured once a round."""
    with tempfile.TemporaryDirectory() as temporary:
        file = Path(temporary) / "rows.json"
        file.write_text(json.dumps(rows))
        contenders = [Contender(name, file, Path(temporary), rounds + warm, dropout) for name in names]
        peaks = []
        for index in range(rounds + warm):
            for contender in contenders if index % 2 == 0 else reversed(contenders):
                contender.step()
            peaks.append(gemm_peak())
            print(f"round {index}: " + ", ".join(f"{contender.name} {contender.records[-1]['seconds']:.1f} s" for contender in contenders), flush=True)
        for contender in contenders:
            contender.finish()
    return contenders, peaks[warm:]


def table(contenders: list[Contender], peaks: list[dict[str, float]], rows: list[dict[str, Any]], warm: int) -> dict[str, Any]:
    """Print the results; return them."""
    peak = {kind: statistics.median(found[kind] for found in peaks) for kind in peaks[0]}
    best = max(peak.values())
    tokens, flops = [], []
    for start in range(0, len(rows), STEP_ROWS):
        step = rows[start:start + STEP_ROWS]
        tokens.append(sum(len(row["ids"]) for row in step))
        flops.append(4 * (LAYER_WEIGHTS * tokens[-1] + HEAD_WEIGHTS * sum(len(row["ids"]) - row["prompt"] for row in step)))
    original = next((one for one in contenders if one.name == "original"), None)
    peers = [one for one in contenders if one.name.startswith("trl")]
    speed = {one.name: [tokens[index] / record["seconds"] for index, record in enumerate(one.records)][warm:] for one in contenders}
    fastest = max(peers, key=lambda one: statistics.median(speed[one.name]), default=None)
    result: dict[str, Any] = {"gemm_gflops": peak, "contenders": {}}
    print(f"matrix products: {', '.join(f'{kind} {value:.0f} GFLOP/s' for kind, value in peak.items())}")
    print("| | tokens/s: median (range) | to the original | to the fastest TRL | useful FLOP of the peak | peak memory, GB |\n|---|---|---|---|---|---|")
    for one in contenders:
        def ratios(other: Contender | None) -> str:
            if other is None:
                return ""
            found = sorted(mine / theirs for mine, theirs in zip(speed[one.name], speed[other.name]))  # noqa: B023  called in its own turn
            return f"{statistics.median(found):.2f} ({found[0]:.2f} to {found[-1]:.2f})"

        share = statistics.median(flops[index] / record["seconds"] for index, record in enumerate(one.records) if index >= warm) / best / 1e9
        found = sorted(speed[one.name])
        result["contenders"][one.name] = {"tokens_per_second": found, "to_original": ratios(original), "to_trl": ratios(fastest), "useful_share": share,
                                          **one.closing, "losses": [record["loss"] for record in one.records]}
        print(f"| {one.name} | {statistics.median(found):.0f} ({found[0]:.0f} to {found[-1]:.0f}) | {ratios(original)} | {ratios(fastest)} | {share:.2f} "
              f"| {one.closing['peak_bytes'] / 1e9:.2f} |")
    for one in contenders:
        if "model_seconds" in one.closing:
            wall = sum(record["seconds"] for record in one.records)
            print(f"{one.name}: {100 * (1 - one.closing['model_seconds'] / wall):.1f} % of the time outside the model; "
                  f"{one.closing['tokens_computed']:,} of {one.closing['tokens']:,} tokens computed")
    return result


def curve(contenders: list[Contender], file: Path) -> None:
    """Losses of all, and the validation losses after the same steps."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "kit"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    for one in contenders:
        axes.plot(range(1, len(one.records) + 1), [record["loss"] for record in one.records],
                  label=f"{one.name}, validation {one.closing['validation_loss']:.4f}", linestyle="--" if one.name.startswith("kit") else "-")
        print(f"{one.name}: validation loss {one.closing['validation_loss']:.4f} after {len(one.records)} steps")
    axes.set(xlabel="optimizer step", ylabel="training loss", title="Same rows, same steps")
    axes.legend()
    figure.savefig(file, metadata={"Date": None})


def startup(repeats: int) -> list[float]:
    """Seconds from the command to its first step, with data, tokens and index in their caches."""
    found = []
    for _ in range(repeats + 1):
        started = time.time()
        process = subprocess.Popen([sys.executable, "-u", "scripts/train.py", "--overwrite", "--output-dir", "outputs/bench", "--set", "training.max_steps=1",
                                    "--set", "training.save_steps=100"], stdout=subprocess.PIPE, text=True)
        for line in process.stdout:
            if "Epoch 1/" in line:
                found.append(time.time() - started)
                process.kill()
        process.wait()
    return found[1:]


def main() -> None:
    """See the file's opening."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--grounding", choices=["none", "cards"], default="none")
    parser.add_argument("--dropout", type=float, default=0.05)
    parser.add_argument("--contenders", default="original,trl-bf16-checkpointing,trl-bf16,trl-float32-checkpointing,trl-float32,kit-modules,kit-no-sharing,kit")
    parser.add_argument("--curve", type=Path)
    parser.add_argument("--startup", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.startup:
        print(f"command to first step: {', '.join(f'{seconds:.1f}' for seconds in startup(5))} s")
        return
    rows = build_rows(options.grounding, options.rounds + 1)
    lengths = [len(row["ids"]) for row in rows["train"]]
    print(f"{len(lengths)} rows of {statistics.mean(lengths):.0f} tokens, {1 - sum(row['prompt'] for row in rows['train']) / sum(lengths):.0%} of them answer; "
          f"dropout {options.dropout}")
    contenders, peaks = measure(options.contenders.split(","), rows, options.rounds, options.dropout)
    result = table(contenders, peaks, rows["train"], 1)
    if options.curve:
        curve(contenders, options.curve)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
