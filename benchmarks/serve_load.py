"""Load and fuzzing of `emergency-kit serve`: errors, times and memory over minutes, on loopback.

In: a checkpoint, by default outputs/gguf/final-q4_k_m.gguf, or where that is not, the bundled base model as
q4_k_m made here. Out: one line a minute, then a summary as JSON; exit 1 on any error, or where memory grew. Run: `make bench-serve` (30 minutes), `make fuzz-serve` (100,000 requests).
Memory is flat when the median of the last third of the samples is within 2 % + 8 MB of that of the middle third
(fuzzing: of the last three parts of ten, and of the first three).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Iterator

import httpx
import psutil

from tests.inference.fuzz import fuzz

SITUATIONS = ["the oil in my pan is on fire", "my father is not responding and hardly breathes", "a snake bit my brother on the ankle while hiking",
              "water is rising in the street and we are in the car", "she took too many of her heart tablets", "it smells of gas in the kitchen",
              "a man was hit by a car and bleeds heavily from the leg", "the boy is choking on a grape and cannot speak"]
TRAINED = Path("outputs/gguf/final-q4_k_m.gguf")
SAMPLE_SECONDS = 5


@contextlib.contextmanager
def served(checkpoint: Path, *arguments: str) -> Iterator[tuple[str, psutil.Process]]:
    """`(address, process)` of a server of its own; ended in order afterwards."""
    command = [sys.executable, "-m", "emergency_kit.cli", "serve", "--profile", "embedded", "--checkpoint", str(checkpoint), "--port", "0",
               "--set", "serve.requests_per_minute=1000000", *arguments]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        line = run.stdout.readline()
        if " at http" not in line:
            raise SystemExit(f"the server did not start: {' '.join(command)}")
        yield line.split(" at ")[1].split("/ ")[0], psutil.Process(run.pid)
    finally:
        run.send_signal(signal.SIGINT)
        run.wait(timeout=60)


def load(address: str, process: psutil.Process, minutes: float, clients: int) -> dict[str, object]:
    """Clients that ask one situation after another, streamed, every fifth answer broken off; memory sampled meanwhile."""
    ends = time.monotonic() + 60 * minutes
    results: Counter[str] = Counter()
    first, whole, memory = [], [], []

    def ask_on(number: int) -> None:
        chance = random.Random(number)
        with httpx.Client(base_url=address, timeout=120) as client:
            while time.monotonic() < ends:
                breaks_off, started = chance.random() < 0.2, time.monotonic()
                body = {"situation": chance.choice(SITUATIONS), "country": chance.choice(["", "GB", "US", "FR"]), "stream": True, "user": str(number)}
                with client.stream("POST", "/answer", json=body) as stream:
                    seen, kind = b"", f"status {stream.status_code}"
                    for piece in stream.iter_bytes():
                        if b"event: line" not in seen and b"event: line" in seen + piece:
                            first.append(time.monotonic() - started)
                        seen = seen[-20000:] + piece
                        if breaks_off and b"event: line" in seen:
                            kind = "broken off"
                            break
                    else:
                        kind = "whole" if b"event: done" in seen else "error " + kind
                        whole.append(time.monotonic() - started)
                results[kind] += 1

    threads = [threading.Thread(target=ask_on, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        time.sleep(SAMPLE_SECONDS)
        memory.append(process.memory_info().rss / 1e6)
        if len(memory) % (60 // SAMPLE_SECONDS) == 0:
            print(f"minute {len(memory) * SAMPLE_SECONDS // 60}: {dict(results)}, {memory[-1]:.0f} MB", flush=True)
    third = max(1, len(memory) // 3)
    middle, last = statistics.median(memory[third:2 * third] or memory), statistics.median(memory[-third:])
    health = httpx.get(f"{address}/health").json()
    return {"minutes": minutes, "clients": clients, "answers": dict(results), "first_line_median_s": round(statistics.median(first), 2),
            "first_line_p95_s": round(statistics.quantiles(first, n=20)[-1], 2), "whole_median_s": round(statistics.median(whole), 2),
            "memory_mb": {"start": round(memory[0]), "middle_third": round(middle), "last_third": round(last), "most": round(max(memory))},
            "flat": last <= middle * 1.02 + 8, "idle_afterwards": health["running"] == health["waiting"] == 0,
            "errors": sum(count for kind, count in results.items() if kind not in ("whole", "broken off"))}


def save_fuzz_model(folder: Path) -> Path:
    """A tiny random model: what is fuzzed is the server."""
    from tests.tiny import save_tiny_model

    return save_tiny_model(folder)


def fuzz_load(address: str, process: psutil.Process, requests: int) -> dict[str, object]:
    """Fuzzed requests in ten parts, with the memory after each."""
    counts: Counter[str] = Counter()
    memory, started = [], time.monotonic()
    for part in range(10):
        counts += fuzz(address, requests // 10, random.Random(part), workers=8)
        memory.append(round(process.memory_info().rss / 1e6))
        print(f"{(part + 1) * requests // 10} requests, {memory[-1]} MB, {dict(counts.most_common())}", flush=True)
    health = httpx.get(f"{address}/health").json()
    return {"requests": sum(counts.values()), "seconds": round(time.monotonic() - started), "statuses": dict(counts.most_common()), "memory_mb": memory,
            "flat": statistics.median(memory[-3:]) <= statistics.median(memory[:3]) * 1.02 + 8, "idle_afterwards": health["running"] == health["waiting"] == 0,
            "errors": counts["500"] + counts["no answer"]}


def main() -> None:
    """Load or fuzz, print the summary, fail on errors or growing memory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--fuzz", type=int, default=0, metavar="REQUESTS", help="fuzz a tiny model's server instead")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if options.fuzz:
            tiny = save_fuzz_model(Path(folder) / "tiny")
            os.environ["OMP_NUM_THREADS"] = "1"
            with served(tiny, "--set", f"model.name={tiny}", "--set", "model.dtype=float32", "--set", "inference.max_new_tokens=4") as (address, process):
                summary = fuzz_load(address, process, options.fuzz)
        else:
            with served(options.checkpoint or (TRAINED if TRAINED.is_file() else _bundled_gguf(Path(folder)))) as (address, process):
                summary = load(address, process, options.minutes, options.clients)
    print(json.dumps(summary, indent=1))
    sys.exit(0 if summary["flat"] and summary["idle_afterwards"] and not summary["errors"] else 1)


def _bundled_gguf(folder: Path) -> Path:
    # What it answers does not matter here, so its certificate is short and may be out of bounds.
    subprocess.run([sys.executable, "-m", "emergency_kit.cli", "export-gguf", "--profile", "embedded", "--checkpoint", "models/SmolLM2-135M-Instruct",
                    "--output", str(folder / "gguf"), "-q", "q4_k_m", "--allow-out-of-bounds", "--set", "export.certificate_prompts=1",
                    "--set", "export.certificate_answer_tokens=50"], check=True, stdout=subprocess.DEVNULL)
    return next((folder / "gguf").glob("*.gguf"))


if __name__ == "__main__":
    main()
