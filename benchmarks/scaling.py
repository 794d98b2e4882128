"""Scaling: what 1 to 1,024 GPUs make of a LoRA run, by a model on paper; and on this machine's cores, measured beside the same model.

In: nothing. Out: docs/Scaling.md's tables (--write puts them there), or with --measure N… a table of real runs. Memory of a GPU and the seconds
of its arithmetic are `training/memory.py`'s and `training/prediction.py`'s, which stand beside an H200 in benchmarks/RESULTS.md; here is
only what several GPUs add: what they exchange, and what sharding saves. Limits: every row is as long as the config allows, so that no rank
waits for another's longer rows; exchange and arithmetic never overlap; loading, saving, validation and lost hosts are not in it. Nothing
on paper here was measured on more than one GPU.
Run: make bench-scaling, with ARGS="--write", ARGS="--price 2.5" or ARGS="--measure 1 2 4" (a minute or two a number).
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

from emergency_kit.config import load_config
from emergency_kit.model.shape import KNOWN, load_shape
from emergency_kit.training import memory, prediction
from emergency_kit.training.prediction import Card

DOCS = Path("docs/Scaling.md")
# Dense bf16, memory and its bandwidth: NVIDIA, H100 Tensor Core GPU data sheet, SXM, 2023.
H100 = Card("H100 SXM", 80e9, 989e12, 3.35e12)
# GPUs of a host, all of them joined through NVSwitch: NVIDIA, DGX H100 data sheet, 2023.
HOST_GPUS = 8
# Bytes a second of a GPU in one direction. NVLink: 900 GB/s in both (H100 data sheet, 2023).
NVLINK = 450e9
# InfiniBand: a 400 Gb/s port a GPU (DGX H100 data sheet, 2023). Ethernet: an assumption, 100 Gb/s a host, shared by its GPUs.
INFINIBAND, ETHERNET = 400e9 / 8, 100e9 / 8 / HOST_GPUS
# Share of those rates that a collective reaches, and seconds that one step of a ring takes however little it carries: assumptions.
LINK_SHARE, INSIDE_SECONDS, BETWEEN_SECONDS = 0.75, 5e-6, 20e-6
# Layers that FSDP holds whole at a time: the one that computes and the one that is fetched meanwhile. An assumption.
GATHERED_LAYERS = 2
SAMPLES = 100_000
GPUS = (1, 2, 8, 16, 64, 256, 1024)

_LLAMA = {"model_type": "llama", "tie_word_embeddings": False, "torch_dtype": "bfloat16"}
# config.json of each, from the models' own pages: Mistral-7B, Llama-2-13B, Llama-3-70B.
MODELS = {
    "7B": KNOWN["mistral-7b-instruct-v0.2"],
    "13B": _LLAMA | {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40, "num_key_value_heads": 40, "vocab_size": 32000},
    "70B": _LLAMA | {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256}}
# FSDP gathers weights around transformers' modules, which `fused` reads past.
WAYS = {"DDP, NF4": ("model.load_in_4bit=true",), "DDP, bf16": ("model.load_in_4bit=false",), "FSDP, bf16": ("model.load_in_4bit=false", "training.engine=modules")}


@dataclass(frozen=True)
class Rank:
    """One GPU's part of a step. seconds: of its arithmetic; gradient_bytes: of the adapters, float32; base_bytes: of the base in the compute type;
    passes: forward and backward passes of a step; rows: that it takes in a step; sharded: by FSDP."""

    made: prediction.Plan
    seconds: float
    gradient_bytes: float
    base_bytes: float
    passes: int
    rows: int
    sharded: bool

    @property
    def layers(self) -> int:
        return self.made.shape.layers


@functools.cache
def rank(model: str, way: str, pass_rows: int = 2, passes: int = 4) -> Rank:
    """A rank of the guide's configuration (2 rows x 4 passes, 2,048 tokens each, rank 16 on seven modules), every layer's activations made again."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(MODELS[model]))
        resolved = load_config("mistral-7b", settings=[f"model.name={folder}", "training.gradient_checkpointing=true", f"training.per_device_train_batch_size={pass_rows}",
                                                       f"training.gradient_accumulation_steps={passes}", f"training.per_device_eval_batch_size={pass_rows}", *WAYS[way]])
        shape = load_shape(resolved.config.model)
        seconds = prediction.predict(resolved, H100).step_seconds
    made = prediction.make(resolved, shape, {}, H100.memory_bytes, process_bytes=0)
    return Rank(made, seconds, float(memory.adapter_parameters(shape, resolved.config.lora) * memory.FLOAT), shape.weight_bytes(False), passes, pass_rows * passes,
                way.startswith("FSDP"))


def gather_seconds(size: float, gpus: int, between: float, times: int = 1) -> float:
    """All-gather of so many bytes, or as long a reduce-scatter, among GPUs of whole hosts, in `times` pieces.

    A ring of n hands on (n-1)/n of the bytes in n-1 steps (Patarasuk and Yuan 2009, "Bandwidth optimal all-reduce algorithms for clusters of
    workstations"), each with its latency. Here are two, one after the other: between hosts for every GPU's eighth, through its own port; inside for all.
    """
    inside, hosts = min(gpus, HOST_GPUS), -(-gpus // HOST_GPUS)
    over_ports = (hosts - 1) / hosts * size / inside / (LINK_SHARE * between) + times * (hosts - 1) * BETWEEN_SECONDS
    return over_ports + (inside - 1) / inside * size / (LINK_SHARE * NVLINK) + times * (inside - 1) * INSIDE_SECONDS


def exchange_seconds(one: Rank, gpus: int, between: float = INFINIBAND) -> float:
    """Of a step. DDP: an all-reduce of the gradients, which is a reduce-scatter and an all-gather. FSDP: layer by layer, all weights are
    gathered on the way there and once more on the way back, in every pass; of gradients each rank keeps its share."""
    if one.sharded:
        weights = 2 * one.passes * gather_seconds(one.base_bytes + one.gradient_bytes, gpus, between, one.layers + 1)
        return weights + gather_seconds(one.gradient_bytes, gpus, between, one.layers)
    return 2 * gather_seconds(one.gradient_bytes, gpus, between)


def sent_bytes(one: Rank, gpus: int) -> float:
    """What a GPU sends in a step, over whichever link: 2(n-1)/n of the gradients (a ring's all-reduce); FSDP: (n-1)/n of what is gathered or reduced."""
    share = (gpus - 1) / gpus
    return share * (2 * one.passes * (one.base_bytes + one.gradient_bytes) + one.gradient_bytes) if one.sharded else 2 * share * one.gradient_bytes


def gpu_bytes(one: Rank, gpus: int) -> float:
    """Peak memory of a GPU. DDP adds the buckets that it lays gradients in; FSDP divides base, adapters, gradients and moments, and holds a few layers
    and what is outside of the layers whole."""
    shape, largest = one.made.shape, 0.0
    for terms in one.made.phases.values():
        held = {name: size for name, size in terms.items() if name != "fragmentation"}
        if gpus > 1 and one.sharded:
            for name in ("base weights", "adapters", "adapters' gradients", "optimizer (AdamW's two moments)", "AdamW's work on all adapters at once"):
                held[name] = held.get(name, 0.0) / gpus
            held["gathered"] = 2.0 * (GATHERED_LAYERS * shape.linear_parameters / shape.layers + shape.other_parameters)
        elif gpus > 1:
            held["buckets"] = one.gradient_bytes
        context = held.pop("CUDA context")
        largest = max(largest, context + (1 + memory.GPU_FRAGMENTATION) * sum(held.values()))
    return largest


def efficiency(one: Rank, gpus: int, between: float = INFINIBAND) -> float:
    """Share of its time that a GPU computes: 1 where there is nothing to exchange."""
    return one.seconds / (one.seconds + exchange_seconds(one, gpus, between))


def cost(one: Rank, gpus: int, price: float = 1.0) -> float:
    """Of SAMPLES rows, where a GPU costs `price` an hour: price x SAMPLES / rows of a rank's step x seconds of the step / 3600. Their number cancels out."""
    return price * SAMPLES / one.rows * (one.seconds + exchange_seconds(one, gpus)) / 3600


def fits(one: Rank, gpus: int) -> bool:
    return gpu_bytes(one, gpus) <= prediction.USABLE * H100.memory_bytes


def lay(title: str, ranks: dict[tuple[str, str], Rank], cell: Callable[[Rank, int], str], counts: tuple[int, ...] = GPUS) -> list[str]:
    """A table of one figure by numbers of GPUs; a dash where the card is too small for it, no line where it is for all of them."""
    rows = [f"| {model} | {way} | " + " | ".join(cell(one, gpus) if fits(one, gpus) else "-" for gpus in counts) + " |"
            for (model, way), one in ranks.items() if any(fits(one, gpus) for gpus in counts)]
    return [title, "", "| model | way | " + " | ".join(f"{gpus:,}" for gpus in counts) + " |", "|---" * (2 + len(counts)) + "|", *rows, ""]


def tables(price: float = 1.0) -> str:
    """docs/Scaling.md's tables, between its two marks."""
    whole, single = ({(model, way): rank(model, way, *rows) for model in MODELS for way in WAYS} for rows in ((2, 4), (1, 1)))
    several, slow = GPUS[1:], tuple(gpus for gpus in GPUS if gpus > HOST_GPUS)
    lines = [
        *lay("**Memory of a GPU, GB.** A dash: more than an 80 GB card takes.", whole, lambda one, gpus: f"{gpu_bytes(one, gpus) / 1e9:.1f}"),
        *lay("**What a GPU sends in a step of 8 rows, GB.**", whole, lambda one, gpus: f"{sent_bytes(one, gpus) / 1e9:.2f}", several),
        *lay("**Efficiency in %, 8 rows a GPU and step**, InfiniBand between hosts.", whole, lambda one, gpus: f"{100 * efficiency(one, gpus):.1f}", several),
        *lay("**Efficiency in %, 1 row a GPU and step**, InfiniBand between hosts.", single, lambda one, gpus: f"{100 * efficiency(one, gpus):.1f}", several),
        *lay("**Efficiency in %, 8 rows a GPU and step**, 100 Gb/s Ethernet a host.", whole, lambda one, gpus: f"{100 * efficiency(one, gpus, ETHERNET):.1f}", slow),
        *lay(f"**Cost of {SAMPLES:,} rows of 2,048 tokens**, at {price:g} a GPU-hour; InfiniBand between hosts.", whole, lambda one, gpus: f"{cost(one, gpus, price):,.1f}")]
    seconds = ", ".join(f"{model} {whole[model, 'DDP, NF4'].seconds:.1f} (NF4), {whole[model, 'DDP, bf16'].seconds:.1f} (bf16), {whole[model, 'FSDP, bf16'].seconds:.1f} (bf16, "
                        "`modules`)" for model in MODELS)
    adapters = ", ".join(f"{model} {whole[model, 'DDP, NF4'].gradient_bytes / 1e6:.0f} MB" for model in MODELS)
    return "\n".join([f"Gradients of the adapters: {adapters}.", f"Seconds of a GPU's arithmetic in a step of 8 rows: {seconds}.", "", *lines]).rstrip()


MARKS = "<!-- tables of benchmarks/scaling.py -->", "<!-- end of tables -->"


def written(text: str) -> str:
    """The page with its tables made anew."""
    before, rest = text.split(MARKS[0], 1)
    return f"{before}{MARKS[0]}\n\n{tables()}\n\n{MARKS[1]}{rest.split(MARKS[1], 1)[1]}"


# Measured: several processes on this machine's cores

STEPS = 20


@dataclass(frozen=True)
class Measured:
    """step_seconds: of an optimizer step; tokens_per_second: as the run's summary has it; exchange_seconds: of one all-reduce of its gradients."""

    ranks: int
    step_seconds: float
    tokens_per_second: float
    exchange_seconds: float


def measure(counts: list[int]) -> str:
    """Real runs with so many ranks, and the model's prediction beside them, as a table. The first count must be 1: the rest is predicted from it."""
    from tests.tiny import save_tiny_model

    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        settings = [f"model.name={save_tiny_model(place / 'tiny')}", "model.dtype=float32", "dataset.build_size=200", "dataset.max_samples=160", "dataset.max_eval_samples=4",
                    f"training.max_steps={STEPS}", "training.save_strategy=no", "training.eval_strategy=no"]
        resolved = load_config("embedded", settings=settings)
        size = memory.adapter_parameters(load_shape(resolved.config.model), resolved.config.lora) * memory.FLOAT
        found = [_run(count, settings, place / f"ranks-{count}", size) for count in counts]
    alone, cores = found[0], len(os.sched_getaffinity(0))
    lines = ["| ranks | s a step | predicted | tokens/s | all-reduce of the gradients, ms |", "|---|---|---|---|---|"]
    for one in found:
        predicted = "" if one is alone else f"{alone.step_seconds * max(1, one.ranks / cores) + one.exchange_seconds:.3f}"
        lines.append(f"| {one.ranks} | {one.step_seconds:.3f} | {predicted} | {one.tokens_per_second:,.0f} | {1000 * one.exchange_seconds:.2f} |")
    return "\n".join([f"{cores} cores, a thread a rank, {resolved.config.training.per_device_train_batch_size * resolved.config.training.gradient_accumulation_steps} rows a rank "
                      f"and step, {STEPS} steps, {size / 1e3:.0f} kB of gradients; predicted from the first line: its step x ranks / cores, and the all-reduce.", "", *lines])


def _run(ranks: int, settings: list[str], out: Path, size: int) -> Measured:
    """One run under torchrun. An all-reduce as large as its gradients is timed just before it, among as many processes."""
    probe = out.with_suffix(".json")
    _torchrun(ranks, ["-m", "benchmarks.scaling", "--probe", str(size), str(probe)])
    _torchrun(ranks, ["scripts/train.py", "--profile", "embedded", "--output-dir", str(out), *(word for one in settings for word in ("--set", one))])
    state = json.loads((out / "checkpoints/final/training_state.json").read_text())
    return Measured(ranks, state["step_seconds"] / state["step"], state["summary"]["tokens_per_second"], json.loads(probe.read_text()))


def _torchrun(ranks: int, command: list[str]) -> None:
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", *command], text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ".", "CUDA_VISIBLE_DEVICES": ""})
    if done.returncode:
        raise SystemExit(f"{ranks} ranks, {' '.join(command[:2])}: ended with code {done.returncode}\n{done.stdout[-3000:]}")


def probe(size: int, file: Path) -> None:
    """Median seconds of an all-reduce of so many bytes over gloo; rank 0 writes it."""
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    data, taken = torch.ones(size // 4), []
    for _ in range(22):
        dist.barrier()
        started = time.perf_counter()
        dist.all_reduce(data)
        taken.append(time.perf_counter() - started)
    if dist.get_rank() == 0:
        file.write_text(json.dumps(statistics.median(taken[2:])))
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="put the tables into docs/Scaling.md")
    parser.add_argument("--price", type=float, default=1.0, help="of a GPU-hour")
    parser.add_argument("--measure", type=int, nargs="+", metavar="N", help="numbers of ranks to run here, 1 first")
    parser.add_argument("--probe", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.probe:
        probe(int(given.probe[0]), Path(given.probe[1]))
    elif given.measure:
        if given.measure[0] != 1:
            parser.error("--measure: the first number must be 1, from which the others are predicted")
        print(measure(given.measure))
    elif given.write:
        DOCS.write_text(written(DOCS.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        print(tables(given.price))


if __name__ == "__main__":
    main()
