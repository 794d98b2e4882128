"""What the guide's configuration costs on one GPU: Mistral-7B in 4-bit beside its peers, the plan beside what came, kill and resume, merge, export.

In: a CUDA GPU; the bundled base model's folder. Out: one table last (and everything in --json FILE); a part that fails says why, and leaves
its cells empty. Mistral-7B's weights are random, of its exact shape, since none are downloaded: memory and speed are those of the real
ones, losses mean something only beside each other. `--tiny` runs all of it on a CPU with a model of two layers, to try this script.
What is timed runs alone; resume, the embedded profile, merge and export run side by side afterwards. Run: make bench-gpu (no part begins after
nine minutes). trl and unsloth are measured where they are installed; `--parts …,gradients` adds how far a step's gradients are from float32's.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Callable

from benchmarks.gpu_table import print_table
from tests.tiny import cut_tokenizer

STEP_ROWS = 8
SETS = {"350": 350, "512": 512, "2048": 2048}
TINY_SETS = {"350": 35, "512": 51, "2048": 204}
MISTRAL = {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
           "head_dim": 128, "max_position_embeddings": 32768, "rope_theta": 1e6, "sliding_window": None, "rms_norm_eps": 1e-5}
TINY = MISTRAL | {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
# Of the files made here: they show that it works, not how good a model of random weights is.
SHORT_CERTIFICATE = [f"export.{name}" for name in ("certificate_strings=40", "certificate_answer_tokens=40", "certificate_prompts=1", "certificate_max_new_tokens=4")]
CLI = [sys.executable, "-m", "emergency_kit.cli"]


class Bench:
    """Folder, options and findings of one run."""

    def __init__(self, options: argparse.Namespace):
        self.tiny, self.folder, self.found, self.failed = options.tiny, options.folder, {}, {}
        self.deadline = time.monotonic() + 60 * (options.minutes or (60 if options.tiny else 9))
        self.base, self.tokenizer = self.folder / "base", options.tokenizer
        self.profile = ["model.device=cpu", "model.load_in_4bit=false", "model.dtype=float32", *SHORT_CERTIFICATE] if self.tiny else ["model.backend=hf"]
        self.options = options

    def part(self, name: str, work: Callable[[], dict[str, Any]]) -> None:
        """Run a part; whatever goes wrong in it is said and the next one begins."""
        if name not in self.options.parts:
            return
        if time.monotonic() > self.deadline:
            self.failed[name] = "no time was left"
            return
        started = time.monotonic()
        try:
            self.found[name] = work()
        except (subprocess.SubprocessError, RuntimeError, OSError, ValueError, KeyError, ImportError) as error:
            self.failed[name] = f"{type(error).__name__}: {str(error)[-1500:]}"
        print(f"[{name}: {time.monotonic() - started:.0f} s] {json.dumps(self.found.get(name, self.failed.get(name)))[:1500]}", flush=True)

    def left(self) -> float:
        """Seconds that a command may take."""
        return max(30.0, self.deadline - time.monotonic())

    def cli(self, log: str, stage: str, *settings: str, flags: tuple[str, ...] = (), **environment: str) -> str:
        """One command of the kit; its output, which is kept as a log, too. Raises RuntimeError with the last lines."""
        given = [part for setting in settings for part in ("--set", setting)]
        done = subprocess.run([*CLI, stage, *flags, *given], capture_output=True, text=True, env={**os.environ, **environment}, timeout=self.left())
        (self.folder / f"{log}.log").write_text(done.stdout + done.stderr)
        if done.returncode:
            raise RuntimeError(f"{stage} ended with {done.returncode}: {(done.stdout + done.stderr)[-1200:]}")
        return done.stdout


def measure_limits(bench: Bench) -> dict[str, Any]:
    """The card's bf16 matrix products and copies, on random data."""
    import torch

    if bench.tiny:
        return {"device": "CPU", "tflops": 0.0, "copy_tb": 0.0}
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    block = torch.randn(2**30, device="cuda")

    def taken(work: Callable[[], Any], repeats: int = 20) -> float:
        times = []
        for _ in range(repeats):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            work()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end) / 1e3)
        return statistics.median(times[3:])

    taken_all = {"tflops": 2 * 8192**3 / taken(lambda: a @ b) / 1e12, "copy_tb": 2 * block.numel() * 4 / taken(block.clone) / 1e12}  # noqa: F821  deleted below
    del a, b, block
    torch.cuda.empty_cache()  # not to stand beside what is measured
    return {"device": torch.cuda.get_device_name(), "torch": torch.__version__, **taken_all}


def build_base(bench: Bench) -> dict[str, Any]:
    """The model's folder in bfloat16, with the bundled tokenizer cut to its first 32,000 tokens; rows of its text."""
    import torch
    from transformers import AutoTokenizer, MistralConfig, MistralForCausalLM

    cut_tokenizer(bench.tokenizer, bench.base, MISTRAL["vocab_size"])
    tokenizer = AutoTokenizer.from_pretrained(bench.base)
    torch.manual_seed(0)
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    with torch.device("cpu" if bench.tiny else "cuda"):
        model = MistralForCausalLM._from_config(MistralConfig(**(TINY if bench.tiny else MISTRAL), **ids), dtype=torch.bfloat16)
    count = sum(parameter.numel() for parameter in model.parameters())
    model.save_pretrained(bench.base, max_shard_size="4GB")
    del model
    if not bench.tiny:
        torch.cuda.empty_cache()
    return {"parameters": count, "bytes": sum(file.stat().st_size for file in bench.base.glob("*.safetensors"))}


def build_rows(bench: Bench, steps: int) -> dict[str, list[dict[str, Any]]]:
    """Rows of the embedded dataset's text, by set, 60 % of each the answer."""
    from transformers import AutoTokenizer

    from emergency_kit.data.build import build_records

    text = "\n\n".join(f"{record.input}\n{record.output}" for record in build_records(7, 3600)["train"])
    stream, at = AutoTokenizer.from_pretrained(bench.base)(text)["input_ids"], 0
    sets: dict[str, list[dict[str, Any]]] = {}
    for name in bench.options.sets.split(","):
        sets[name], length = [], (TINY_SETS if bench.tiny else SETS)[name]
        for index in range(steps * STEP_ROWS):
            long = length + (index * 37 % 101 - 50) * length // 350 if name == "350" else length  # those of a data set differ
            sets[name].append({"ids": stream[at:at + long], "prompt": long * 2 // 5})
            at += long
    if at > len(stream):
        raise ValueError(f"{at} tokens are wanted, {len(stream)} are there")
    return sets


class Contender:
    """A process of gpu_peers.py that takes a step when told; `error` says why it cannot."""

    def __init__(self, name: str, bench: Bench, file: Path, steps: int, dropout: float):
        self.name, self.error, self.loaded, self.records = name, "", {}, {}
        self.log = bench.folder / f"{name}.log"
        self.process = subprocess.Popen([sys.executable, "-m", "benchmarks.gpu_peers", name, str(bench.base), str(file), str(bench.folder / name), str(steps), str(dropout)],
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log.open("w"), text=True)

    def read(self, key: str) -> dict[str, Any]:
        """The next JSON line that has `key`; empty, with `error` set, where the process ends before."""
        for line in self.process.stdout:
            if line.startswith("{") and key in (record := json.loads(line)):
                return record
        self.error = (self.log.read_text().strip() or "ended").splitlines()[-1][:300]
        return {}

    def step(self, word: str, name: str) -> None:
        """One optimizer step of a set."""
        if not self.error:
            self.process.stdin.write(f"{word}\n")
            self.process.stdin.flush()
            self.records.setdefault(name, []).append(self.read("seconds"))

    def close(self) -> None:
        """End it."""
        self.process.stdin.close()
        with_time = time.monotonic() + 30
        while self.process.poll() is None and time.monotonic() < with_time:
            time.sleep(0.1)
        self.process.kill()


def measure_speed(bench: Bench) -> dict[str, Any]:
    """Every contender's steps in turns, a set of lengths after another; the first of each set warms up."""
    steps = bench.options.rounds + 1
    sets = build_rows(bench, steps)
    file = bench.folder / "rows.json"
    file.write_text(json.dumps([row for rows in sets.values() for row in rows]))
    names = [name for name in bench.options.contenders.split(",") if (peer := name.split("-")[0]) not in ("trl", "unsloth") or importlib.util.find_spec(peer)]
    contenders = [Contender(name, bench, file, steps * len(sets), bench.options.dropout) for name in names]
    for one in contenders:
        one.loaded = one.read("ready")
    for name in sets:
        for index in range(steps):
            for one in contenders if index % 2 == 0 else reversed(contenders):
                one.step("reset" if index == 0 else "", name)
            print(f"{name}, step {index}: " + ", ".join(f"{one.name} {one.records[name][-1].get('seconds', float('nan')):.2f} s" for one in contenders if name in one.records), flush=True)
    for one in contenders:
        one.close()
    weights, said = parameters(bench), foretell_sets(bench, sets)
    found: dict[str, Any] = {"rows": {name: statistics.mean(len(row["ids"]) for row in rows) for name, rows in sets.items()}, "contenders": {}}
    for one in contenders:
        found["contenders"][one.name] = mine = {"error": one.error, **one.loaded, "sets": {}}
        for name, rows in sets.items():
            records = one.records.get(name, [])
            if len(records) == steps and all(records):
                mine["sets"][name] = score(records, rows, weights) | said.get(one.name, {}).get(name, {})
    return found


def foretell_sets(bench: Bench, sets: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, dict[str, float]]]:
    """By contender and set what `plan` says beforehand from the card's rates: seconds a step, and bytes without CUDA's context and fragmentation.

    The kit keeps as many layers as fit beside the longest rows of the run; so of `kit`, whose run holds all sets, bytes stand at the longest alone.
    """
    import numpy as np

    from emergency_kit.config import load_config
    from emergency_kit.data.tokenize import TokenRows
    from emergency_kit.training.prediction import Card, predict

    limits = bench.found.get("limits", {})
    if not limits.get("tflops"):
        return {}
    card, found = Card(limits["device"], 141e9, limits["tflops"] * 1e12, limits["copy_tb"] * 1e12), {}
    for name, more in (("kit", []), ("kit-again", ["training.gradient_checkpointing=true"])):
        resolved = load_config("mistral-7b", settings=[f"model.name={bench.base}", "model.backend=hf", "training.max_steps=4", *more])
        found[name] = {}
        for of, listed in sets.items():
            lengths = [len(row["ids"]) for row in listed]
            rows = TokenRows(np.full(sum(lengths), 5, np.int32), np.cumsum([0, *lengths]).astype(np.int64), np.array([row["prompt"] for row in listed], np.int32))
            made = predict(resolved, card, {"train": rows, "validation": rows})
            found[name][of] = {"foretold_seconds": made.step_seconds}
            if more or of == list(sets)[-1]:
                found[name][of]["foretold_bytes"] = sum(value for term, value in made.terms.items() if term not in ("CUDA context", "fragmentation"))
    return found


def score(records: list[dict[str, Any]], rows: list[dict[str, Any]], weights: dict[str, int]) -> dict[str, Any]:
    """Speed, memory and losses of one contender on one set; medians over the steps after the first."""
    tokens, flops = [], []
    for start in range(0, len(rows), STEP_ROWS):
        step = rows[start:start + STEP_ROWS]
        tokens.append(sum(len(row["ids"]) for row in step))
        # Forward, and back through frozen weights: 2 + 2 FLOP a weight; logits only where there is a label.
        flops.append(4 * (weights["layers"] * tokens[-1] + weights["head"] * sum(len(row["ids"]) - row["prompt"] for row in step)))
    seconds = [record["seconds"] for record in records]
    speed = [count / taken for count, taken in zip(tokens, seconds)][1:]
    return {"tokens_per_second": statistics.median(speed), "range": [min(speed), max(speed)], "samples_per_second": STEP_ROWS / statistics.median(seconds[1:]),
            "tflops": statistics.median(work / taken for work, taken in zip(flops, seconds)) / 1e12, "peak_bytes": max(record["peak_bytes"] for record in records),
            "seconds": seconds, "losses": [record["loss"] for record in records]}


def parameters(bench: Bench) -> dict[str, int]:
    """Weights of the layers, and of the head."""
    shape = TINY if bench.tiny else MISTRAL
    hidden, kv = shape["hidden_size"], shape["num_key_value_heads"] * shape["head_dim"]
    layer = 2 * hidden * shape["num_attention_heads"] * shape["head_dim"] + 2 * hidden * kv + 3 * hidden * shape["intermediate_size"]
    return {"layers": layer * shape["num_hidden_layers"], "head": hidden * shape["vocab_size"]}


def settings(bench: Bench, out: str, *more: str) -> list[str]:
    """The guide's profile on the model made here and the embedded data, a few steps long."""
    return [f"model.name={bench.base}", *bench.profile, "dataset.name=embedded", "dataset.grounding=none", "dataset.max_samples=64", "dataset.max_eval_samples=4",
            "dataset.columns={}", "training.num_epochs=1", "training.warmup_steps=2", "training.logging_steps=1", "training.save_steps=2", "training.eval_steps=4",
            f"training.output_dir={bench.folder / out}", *more]


def compare_gradients(bench: Bench) -> dict[str, Any]:
    """One step's gradients through `fused` and through transformers' modules beside float32's."""
    file = bench.folder / "gradient-rows.json"
    file.write_text(json.dumps(build_rows(bench, 1)["350"]))
    said = subprocess.run([sys.executable, "-m", "benchmarks.gpu_gradients", str(bench.base), str(file), str(STEP_ROWS)], capture_output=True, text=True, timeout=bench.left())
    if said.returncode:
        raise RuntimeError(said.stderr[-1200:])
    return json.loads(said.stdout.strip().splitlines()[-1])


def foresee(bench: Bench) -> dict[str, Any]:
    """What `plan` says beforehand and what the run then takes: memory and time."""
    said = subprocess.run([sys.executable, "-m", "benchmarks.plan_accuracy", "--profile", "mistral-7b", "--predict", *settings(bench, "whole")], check=True,
                          capture_output=True, text=True, timeout=bench.left()).stdout
    (bench.folder / "plan.log").write_text(said)
    bench.cli("whole", "train", *settings(bench, "whole"), flags=("--profile", "mistral-7b", "--overwrite"))
    state = json.loads((bench.folder / "whole/checkpoints/final/training_state.json").read_text())
    return {"plan": json.loads(said.strip().splitlines()[-1]), "bytes": state["summary"]["peak_memory_bytes"], "seconds": state["wall_seconds"],
            "step_seconds": state["summary"]["tokens"] / state["summary"]["tokens_per_second"], "losses": read_losses(bench.folder / "whole")}


def read_losses(out: Path) -> dict[int, float]:
    """Step to logged training loss."""
    import re

    text = (out / "logs" / "training.log").read_text()
    return {int(step): float(loss) for step, loss in re.findall(r"Step (\d+)/\d+, Loss: ([\d.]+)", text)}


def kill_and_resume(bench: Bench) -> dict[str, Any]:
    """The same run, killed after its second checkpoint and started again."""
    import torch
    from safetensors.torch import load_file

    given = [part for setting in settings(bench, "killed") for part in ("--set", setting)]
    command = [*CLI, "train", "--profile", "mistral-7b", *given]
    with (bench.folder / "killed.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    while process.poll() is None and not (bench.folder / "killed/checkpoints/checkpoint-4").is_dir():
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    if process.wait() != -signal.SIGKILL:
        raise RuntimeError(f"it ended before it was killed: {(bench.folder / 'killed.log').read_text()[-800:]}")
    bench.cli("resumed", "train", *settings(bench, "killed"), flags=("--profile", "mistral-7b"))
    whole, killed = (load_file(bench.folder / name / "checkpoints/final/adapter_model.safetensors") for name in ("whole", "killed"))
    first, again = read_losses(bench.folder / "whole"), read_losses(bench.folder / "killed")
    return {"largest_loss_difference": max(abs(again[step] - loss) / loss for step, loss in first.items()), "same_bits": all(torch.equal(whole[key], killed[key]) for key in whole),
            "largest_weight_difference": max(float((whole[key] - killed[key]).abs().max()) for key in whole), "largest_weight": max(float(value.abs().max()) for value in whole.values())}


def run_embedded(bench: Bench) -> dict[str, Any]:
    """The embedded profile on the GPU and, beside it, its training on this machine's CPU. Where a stage fails, what was found before it is kept."""
    sizes = ["training.max_steps=2", "evaluation.max_samples=2", "evaluation.max_new_tokens=8", "evaluation.compare_base=false", *SHORT_CERTIFICATE] if bench.tiny else [
        "training.max_steps=12", "evaluation.max_samples=12", "evaluation.compare_base=false", *SHORT_CERTIFICATE]
    found: dict[str, Any] = bench.found.setdefault("embedded", {"seconds": {}})

    def where(name: str, kind: str) -> list[str]:
        return [f"model.device={kind}", f"training.output_dir={bench.folder / name}", *sizes]

    with ThreadPoolExecutor(1) as pool:
        # A third of the cores: merge and export work beside it.
        beside = pool.submit(bench.cli, "embedded-cpu", "train", *where("embedded-cpu", "cpu"), flags=("--profile", "embedded"), CUDA_VISIBLE_DEVICES="",
                             OMP_NUM_THREADS=str(max(1, (os.cpu_count() or 1) // 3)))
        for stage, more in (("train", ()), ("evaluate", ()), ("merge", ()), ("export-gguf", ("-q", "q8_0", "--allow-out-of-bounds"))):
            started = time.monotonic()
            bench.cli(f"embedded-{stage}", stage, *where("embedded-gpu", "cpu" if bench.tiny else "cuda"), flags=("--profile", "embedded", *more))
            found["seconds"][stage] = time.monotonic() - started
        beside.result()
    gpu, cpu = read_losses(bench.folder / "embedded-gpu"), read_losses(bench.folder / "embedded-cpu")
    return found | {"largest_loss_difference": max(abs(gpu[step] - loss) / loss for step, loss in cpu.items()), "last_losses": [list(gpu.values())[-1], list(cpu.values())[-1]]}


def merge(bench: Bench) -> dict[str, Any]:
    """The adapter of the plan's run into the full-precision base; logits compared."""
    started = time.monotonic()
    bench.cli("merge", "merge", *settings(bench, "whole"), flags=("--profile", "mistral-7b"))
    manifest = json.loads((bench.folder / "whole/merged/final/manifest.json").read_text())
    return {"seconds": time.monotonic() - started, "largest_logit_difference": manifest["merge"]["max_abs_logit_difference"]}


def export(bench: Bench) -> dict[str, Any]:
    """The merged model as a GGUF file, with a short certificate."""
    started = time.monotonic()
    bench.cli("export", "export-gguf", *settings(bench, "whole", *SHORT_CERTIFICATE), flags=("--profile", "mistral-7b", "-q", "q8_0", "--allow-out-of-bounds"))
    file = next((bench.folder / "whole/gguf").glob("*.gguf"))
    proof = json.loads(file.with_suffix(".certificate.json").read_text())
    return {"seconds": time.monotonic() - started, "gguf_bytes": file.stat().st_size, "tokens_equal": proof["tokenizer"]["equal"], "mean_kl": proof["distributions"]["mean_kl"]}


def main() -> None:
    """See the file's opening."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="two layers on a CPU")
    parser.add_argument("--folder", type=Path, default=Path("outputs/gpu"))
    parser.add_argument("--tokenizer", type=Path, default=Path("models/SmolLM2-135M-Instruct"))
    parser.add_argument("--parts", default="limits,base,speed,plan,resume,embedded,merge,export", type=lambda text: text.split(","))
    parser.add_argument("--sets", default=",".join(SETS), help="lengths of rows, of 350, 512, 2048")
    parser.add_argument("--contenders", default="original,trl,unsloth,kit,kit-again")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dropout", type=float, default=0.05)
    parser.add_argument("--minutes", type=float, help="no part begins after that: 9, or 60 for --tiny")
    parser.add_argument("--json", type=Path)
    bench = Bench(parser.parse_args())
    bench.folder.mkdir(parents=True, exist_ok=True)
    for name, work in (("limits", measure_limits), ("base", build_base), ("speed", measure_speed), ("gradients", compare_gradients), ("plan", foresee)):
        bench.part(name, lambda work=work: work(bench))
    with ThreadPoolExecutor(3) as pool:  # these show that it works, not how fast
        for group in ((("resume", kill_and_resume),), (("embedded", run_embedded),), (("merge", merge), ("export", export))):
            pool.submit(lambda group=group: [bench.part(name, lambda work=work: work(bench)) for name, work in group])
    print_table(bench.found, bench.failed)
    if bench.options.json:
        bench.options.json.write_text(json.dumps({"found": bench.found, "failed": bench.failed}, indent=1))
    sys.exit(bool(bench.failed))


if __name__ == "__main__":
    main()
