"""Every GGUF type of one model: size, time, memory, distance from the merged model, what its answers give and break.

Runs `emergency-kit export-gguf` for all types into `--work`, bounds off, and prints the table of benchmarks/RESULTS.md from the
manifest that it leaves. Half an hour for the default run's merged model on two cores.
Run: `make bench-export`, or with `--checkpoint FOLDER`.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from emergency_kit.export.quantize import QUANTIZATIONS


def table(folder: Path) -> str:
    """Markdown rows, one a type."""
    files = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["export"]["files"]
    lines = ["| type | MB | fell back | written in s | memory for writing, MB | mean KL | p99 KL | top-1 % | perplexity | answers the same | actions given % | rules broken | four sections |",
             "|---|---|---|---|---|---|---|---|---|---|---|---|---|"]
    entries = sorted(files.values(), key=lambda entry: list(QUANTIZATIONS).index(entry["quantization"]))
    for entry in entries:
        proof = entry["certificate"]
        numbers, file, greedy = proof["distributions"], proof["safety"]["file"], proof["greedy"]
        memory = "–" if entry["write_peak_added_bytes"] is None else f"{entry['write_peak_added_bytes'] / 1e6:.0f}"
        lines.append(f"| {entry['quantization']} | {entry['bytes'] / 1e6:.1f} | {sum(entry['fallbacks'].values())} | {entry['write_seconds']:.1f} | {memory} | "
                     f"{numbers['mean_kl']:.2g} | {numbers['p99_kl']:.2g} | {numbers['top1_percent']:.2f} | {numbers['perplexity']:.4f} | {greedy['same']} of {greedy['prompts']} | "
                     f"{file['recall_percent']:.1f} | {file['broken_rules'] + file['dangerous_prohibitions']} | {file['valid_structure']} of {file['answers']} |")
    first = entries[0]["certificate"]
    reference = first["safety"]["reference"]
    lines.append(f"| merged model | | | | | | | | {first['distributions']['reference_perplexity']:.4f} | | {reference['recall_percent']:.1f} | "
                 f"{reference['broken_rules'] + reference['dangerous_prohibitions']} | {reference['valid_structure']} of {reference['answers']} |")
    return "\n".join(lines)


def main() -> None:
    """Export all types and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("outputs/bench/export"))
    parser.add_argument("--checkpoint", type=Path, default=Path("outputs/merged/final"))
    parser.add_argument("-q", default="q4_k_m,q8_0,f16,q5_k_m,q2_k,q6_k,q4_0,q3_k_m,bf16,f32", help="in this order, those people use first")
    parser.add_argument("--table-only", action="store_true", help="print the table of an earlier run")
    arguments = parser.parse_args()
    if not arguments.table_only:
        started = time.monotonic()
        done = subprocess.run([sys.executable, "-m", "emergency_kit.cli", "export-gguf", "--profile", "embedded", "--checkpoint", str(arguments.checkpoint),
                               "--output", str(arguments.work), "-q", arguments.q, "--allow-out-of-bounds", "--overwrite"])
        if done.returncode:
            sys.exit(done.returncode)
        print(f"all types: {time.monotonic() - started:.0f} s; largest resident memory of any process "
              f"{resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6:.2f} GB (the merged model in float32 and its answers)")
    print(table(arguments.work))


if __name__ == "__main__":
    main()
