"""Several GPUs of one host: the guide's configuration with one process, with two that hold the whole model each (DDP), and with two that divide it (FSDP2).

In: GPUs, the bundled base model's tokenizer. Out: one table (and everything in --json FILE): losses beside the first line's, tokens a second, memory of
a GPU; a run that fails says why. Each run is a command that a user would type, over Mistral-7B's shape with random weights (`gpu.build_base`), six steps of
the same effective batch without dropout. `--tiny` runs all of it over gloo on a CPU with a model of two layers, to try this script.
Run: python -m benchmarks.gpu_ranks [--ranks 2] [--ways one,ddp,fsdp,...] (a run takes a minute or two on an H200; none begins after --minutes).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.gpu import Bench, build_base, settings

STEPS = 6
NF4, WHOLE = ("model.load_in_4bit=true",), ("model.load_in_4bit=false", "training.engine=modules")
# Name: accelerate's file (none: one process), settings. The first is what the others stand beside; `modules` is the engine that FSDP takes.
WAYS: dict[str, tuple[str, tuple[str, ...]]] = {
    "one": ("", NF4), "ddp": ("ddp", NF4), "fsdp": ("fsdp", NF4), "one-modules": ("", (*NF4, "training.engine=modules")),
    "ddp-modules": ("ddp", (*NF4, "training.engine=modules")), "fsdp-bf16": ("fsdp", WHOLE), "one-bf16": ("", WHOLE), "ddp-bf16": ("ddp", WHOLE)}


def run(bench: Bench, way: str, ranks: int, seconds: float) -> dict[str, Any]:
    """One training run; raises RuntimeError with its last lines where it fails."""
    file, more = WAYS[way]
    out = bench.folder / f"ranks-{way}"
    launcher = ["-m", "accelerate.commands.launch", "--config_file", f"configs/accelerate/{file}.yaml", "--num_processes", str(ranks)] if file else []
    given = settings(bench, out.name, f"training.max_steps={STEPS}", "training.per_device_train_batch_size=2", "training.gradient_accumulation_steps=4",
                     "training.keep_effective_batch=true", "lora.dropout=0", "training.eval_steps=3", "training.save_steps=3", *more)
    started = time.monotonic()
    done = subprocess.run([sys.executable, *launcher, "scripts/train.py", "--profile", "mistral-7b", "--overwrite", *(word for one in given for word in ("--set", one))],
                          text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=seconds,
                          env={**os.environ, "PYTHONPATH": os.pathsep.join([".", *filter(None, [os.environ.get("PYTHONPATH")])]), "OMP_NUM_THREADS": "1" if bench.tiny else "4", **({} if file else {"CUDA_VISIBLE_DEVICES": "" if bench.tiny else "0"})})
    (bench.folder / f"{out.name}.log").write_text(done.stdout)
    if done.returncode:
        said = [line for line in done.stdout.splitlines() if line.startswith("error: ")]
        raise RuntimeError(said[0] if said else f"ended with {done.returncode}: {done.stdout[-1500:]}")
    state = json.loads((out / "checkpoints/final/training_state.json").read_text())
    logged = json.loads((out / f"checkpoints/checkpoint-{STEPS}/trainer_state.json").read_text())["log_history"]
    held = [entry["memory_gb"] for entry in logged if "memory_gb" in entry]
    return {"seconds": time.monotonic() - started, "losses": [entry["loss"] for entry in state["loss_history"]], "validation": state["validation_history"][-1]["loss"],
            "tokens_per_second": state["summary"]["tokens_per_second"], "step_seconds": state["step_seconds"] / STEPS, "held_gb": held[-1],
            "peak_gb": state["summary"]["peak_memory_bytes"] / 1e9}


def table(found: dict[str, dict[str, Any]], failed: dict[str, str], ranks: int) -> str:
    """All runs, one a line. Memory in training is what torch holds of rank 0's GPU at the last step; at most, loading counts too."""
    first = next(iter(found.values()), None)
    lines = ["| way | processes | losses of the steps | largest difference from the first line's | validation | tokens/s | s a step | GB in training | GB at most | s in all |",
             "|---" * 10 + "|"]
    for way, one in found.items():
        apart = max(abs(loss - other) / other for loss, other in zip(one["losses"], first["losses"]))
        lines.append(f"| {way} | {ranks if WAYS[way][0] else 1} | {', '.join(f'{loss:.4f}' for loss in one['losses'])} | {apart:.1e} | {one['validation']:.4f} | "
                     f"{one['tokens_per_second']:,.0f} | {one['step_seconds']:.2f} | {one['held_gb']:.2f} | {one['peak_gb']:.2f} | {one['seconds']:.0f} |")
    return "\n".join([*lines, *(f"not measured, {way}: {why}" for way, why in failed.items())])


def main() -> None:
    """See the file's opening."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="two layers, float32, on a CPU")
    parser.add_argument("--folder", type=Path, default=Path("outputs/gpu"))
    parser.add_argument("--tokenizer", type=Path, default=Path("models/SmolLM2-135M-Instruct"))
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--ways", default=",".join(WAYS), type=lambda text: text.split(","))
    parser.add_argument("--minutes", type=float, default=9.0, help="no run begins after that, and one under way is ended")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    unknown = [way for way in options.ways if way not in WAYS]
    if unknown:
        parser.error(f"--ways: got {', '.join(unknown)}; expected some of {', '.join(WAYS)}")
    bench, found, failed = Bench(options), {}, {}
    bench.folder.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 60 * options.minutes
    if not (bench.base / "config.json").is_file():
        print(f"base: {build_base(bench)}", flush=True)
    for way in options.ways:
        left = deadline - time.monotonic()
        if left < 0:
            failed[way] = "no time was left"
            continue
        try:
            found[way] = run(bench, way, options.ranks, left)
        except (RuntimeError, subprocess.TimeoutExpired, OSError) as error:
            failed[way] = str(error)
        print(f"[{way}] {found.get(way) or failed[way]}", flush=True)
    print(table(found, failed, options.ranks))
    if options.json:
        options.json.write_text(json.dumps({"found": found, "failed": failed}, indent=1))
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
