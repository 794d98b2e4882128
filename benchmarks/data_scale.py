"""Time and memory of preparing JSONL for training, from 10,000 to 1,000,000 records, beside a plain `datasets.map`.

Makes synthetic JSONL (about 2 kB a record, words as frequent as in a language) in a temporary folder. Each size is
prepared in a process of its own, on one core: read, tokenised, masked and cached by the kit; and, up to
--map-limit records, by `datasets.map` with the same tokenizer, prompts and masks, row by row and in batches. Peak
memory is the process's own (ru_maxrss). With --hold-out the file has no validation split beside it, so a tenth is held out.
Prints a Markdown table and draws benchmarks/data_scale.svg. Disk: about 6 kB a record.
Run: python benchmarks/data_scale.py 10000 30000 100000 300000 1000000
"""

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

WAYS = {"kit": "#1f6feb", "datasets.map in batches": "#d1242f", "datasets.map": "#9a6700"}
TOKENIZER = "models/SmolLM2-135M-Instruct"
CORE = min(os.sched_getaffinity(0))


def write_rows(path: Path, count: int) -> Path:
    """JSONL of instruction, input and output; word frequencies fall as 1 / rank (Zipf)."""
    import numpy as np

    vocabulary = json.loads(Path(TOKENIZER, "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    words = np.asarray([word[1:] for word in vocabulary if word[0] == "Ġ" and word[1:].isalpha() and len(word) > 2])
    shares = 1 / np.arange(1, len(words) + 1)
    chance = np.random.default_rng(0)
    with path.open("w", encoding="utf-8") as stream:
        for start in range(0, count, 1000):
            drawn = words[chance.choice(len(words), (min(1000, count - start), 380), p=shares / shares.sum())]
            for number, row in enumerate(drawn, start):
                output = f"FACTS\n• {' '.join(row[140:200])}.\n\nUNCERTAINTIES\n• {' '.join(row[200:230])}?\n\nANALYSIS\n• {' '.join(row[230:300])}.\n\nGUIDANCE\n1. {' '.join(row[300:])}."
                stream.write(json.dumps({"instruction": "", "input": f"{number}: {' '.join(row[:140])}.", "output": output}) + "\n")
    return path


def prepare(way: str, folder: Path) -> None:
    """In the child: prepare `folder` and print the seconds it took and how many tokens there are."""
    from transformers import AutoTokenizer

    from emergency_kit.config import load_config

    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    started, worked = time.perf_counter(), time.process_time()
    if way == "kit":
        from emergency_kit.data.cache import load_rows
        from emergency_kit.data.load import open_splits

        resolved = load_config("embedded", settings=[f"dataset.name={folder / 'data'}", f"training.output_dir={folder}", "dataset.grounding=none",
                                                     "dataset.max_samples=null", "dataset.max_eval_samples=null", "model.max_seq_length=2048"])
        splits = open_splits(resolved, "train", "validation")
        rows = {name: load_rows(split, tokenizer, resolved) for name, split in splits.items()}
        tokens = sum(len(split.ids) for split in rows.values())
    else:
        tokens = _map(tokenizer, folder, batched="batches" in way)
    print(json.dumps({"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - worked, "tokens": tokens}))


def _map(tokenizer, folder: Path, batched: bool) -> int:
    import datasets
    import pyarrow.compute as compute

    from emergency_kit.data.format import build_messages
    from emergency_kit.data.template import render_prompt

    def tokenise(rows):
        prompts = [render_prompt(tokenizer, build_messages(text, None, instruction)) for text, instruction in zip(rows["input"], rows["instruction"])]
        asked = tokenizer(prompts, add_special_tokens=False).input_ids
        answered = [ids + [tokenizer.eos_token_id] for ids in tokenizer([text.strip() for text in rows["output"]], add_special_tokens=False).input_ids]
        return {"input_ids": [one + two for one, two in zip(asked, answered)], "labels": [[-100] * len(one) + two for one, two in zip(asked, answered)]}

    def tokenise_one(row):
        return {name: values[0] for name, values in tokenise({name: [value] for name, value in row.items()}).items()}

    datasets.disable_progress_bars()
    tokens = 0
    for path in sorted((folder / "data").glob("*.jsonl")):
        data = datasets.load_dataset("json", data_files=str(path), split="train", cache_dir=str(folder / "map"))
        data = data.map(tokenise if batched else tokenise_one, batched=batched, remove_columns=data.column_names)
        tokens += compute.sum(compute.list_value_length(data.data.column("input_ids"))).as_py()
    return tokens


def measure(way: str, folder: Path) -> dict[str, float]:
    """Seconds, tokens and peak memory of a child process on one core."""
    out = folder / f"out-{abs(hash((way, time.time_ns())))}"
    out.mkdir()
    (out / "data").symlink_to(folder / "data")
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    child = subprocess.Popen([sys.executable, __file__, "--child", way, str(out)], stdout=subprocess.PIPE, text=True, env=environment,
                             preexec_fn=lambda: os.sched_setaffinity(0, {CORE}))
    printed = child.stdout.read()
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        sys.exit(f"{way} failed with status {status}")
    shutil.rmtree(out)
    return json.loads(printed.splitlines()[-1]) | {"peak_bytes": usage.ru_maxrss * 1024}


def table(results: list[tuple[int, str, dict[str, float]]]) -> str:
    """Markdown, a line a measurement."""
    lines = ["| records | way | seconds | of them on the CPU | records a second | peak memory |", "|---|---|---|---|---|---|"]
    lines += [f"| {size:,} | {way} | {run['seconds']:,.1f} | {run['cpu_seconds']:,.1f} | {size / run['seconds']:,.0f} | {run['peak_bytes'] / 1e9:.2f} GB |" for size, way, run in results]
    return "\n".join(lines)


def draw(results: list[tuple[int, str, dict[str, float]]]) -> str:
    """SVG of seconds over records, both axes logarithmic; the dashed line is linear growth from the kit's first size."""
    width, height, left, right, bottom, top = 640, 360, 56, 150, 40, 16
    sizes, seconds = [size for size, _, _ in results], [run["seconds"] for *_, run in results]
    low_x, high_x = math.floor(math.log10(min(sizes))), max(math.ceil(math.log10(max(sizes))), math.floor(math.log10(min(sizes))) + 1)
    low_y, high_y = math.floor(math.log10(min(seconds))), max(math.ceil(math.log10(max(seconds))), math.floor(math.log10(min(seconds))) + 1)

    def place(size: float, time_: float) -> tuple[float, float]:
        return (left + (width - left - right) * (math.log10(size) - low_x) / (high_x - low_x),
                top + (height - top - bottom) * (1 - (math.log10(time_) - low_y) / (high_y - low_y)))

    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12">',
             f'<rect width="{width}" height="{height}" fill="white"/>']
    for power in range(low_y, high_y + 1):
        y = place(10**low_x, 10**power)[1]
        parts.append(f'<line x1="{left}" x2="{width - right}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/><text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{10**power:g} s</text>')
    for power in range(low_x, high_x + 1):
        x = place(10**power, 10**low_y)[0]
        parts.append(f'<text x="{x:.1f}" y="{height - bottom + 18}" text-anchor="middle">{10**power:,}</text>')
    for number, (way, colour) in enumerate(WAYS.items()):
        points = [(size, run["seconds"]) for size, name, run in results if name == way]
        if not points:
            continue
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in points))
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/><text x="{width - right + 10}" y="{top + 16 + 18 * number}" fill="{colour}">{way}</text>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}"/>' for x, y in (place(*point) for point in points)]
        if way == "kit":
            (first, start), last = points[0], points[-1][0]
            (x1, y1), (x2, y2) = place(first, start), place(last, start * last / first)
            parts.append(f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="#57606a" stroke-dasharray="5 4"/>'
                         f'<text x="{width - right + 10}" y="{top + 16 + 18 * len(WAYS)}" fill="#57606a">linear growth</text>')
    return "\n".join([*parts, f'<text x="{(left + width - right) / 2}" y="{height - 4}" text-anchor="middle">records of 2 kB, one core</text></svg>']) + "\n"


def main() -> None:
    """Measure every size, the ways in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sizes", type=int, nargs="*", default=[10_000])
    parser.add_argument("--map-limit", type=int, default=50_000, help="largest size that datasets.map prepares as well")
    parser.add_argument("--repeats", type=int, default=1, help="runs of each; the quickest counts")
    parser.add_argument("--hold-out", action="store_true", help="no validation file: a tenth is held out")
    parser.add_argument("--plot", type=Path, default=Path(__file__).with_name("data_scale.svg"))
    parser.add_argument("--child", nargs=2, metavar=("WAY", "FOLDER"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        prepare(given.child[0], Path(given.child[1]))
        return
    results = []
    with tempfile.TemporaryDirectory(prefix="data_scale") as temporary:
        for size in given.sizes:
            folder = Path(temporary, str(size))
            (folder / "data").mkdir(parents=True)
            bytes_ = write_rows(folder / "data" / "train.jsonl", size).stat().st_size
            if not given.hold_out:
                write_rows(folder / "data" / "validation.jsonl", 100)
            print(f"{size:,} records, {bytes_ / size:,.0f} bytes each", file=sys.stderr, flush=True)
            ways = list(WAYS) if size <= given.map_limit else ["kit"]
            runs: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
            for way in ways * given.repeats:
                runs[way].append(measure(way, folder))
                print(f"  {way}: {runs[way][-1]['seconds']:.1f} s", file=sys.stderr, flush=True)
            if not given.hold_out:
                assert len({run["tokens"] for each in runs.values() for run in each}) == 1, "the ways differ in tokens"
            results += [(size, way, min(runs[way], key=lambda run: run["seconds"])) for way in ways]
            shutil.rmtree(folder)
    given.plot.write_text(draw(results), encoding="utf-8")
    print(table(results))


if __name__ == "__main__":
    main()
