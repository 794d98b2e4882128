"""Contestants: anything that can answer, opened in one way.

In: a word that names it: `base`, an adapter, merged or base folder, a `.gguf` file, or an OpenAI-compatible endpoint
(`http://host:port/v1#model`). Out: a `Contestant`, which answers prompts with answers kept on disk; several ranks answer a part each. On a
CPU a folder is run by llama.cpp from a file made for the purpose and proved against PyTorch; whatever runs, its description says so.
Limits: an endpoint's answers are kept by its address and model name, since nobody outside can hash its weights.
"""

from __future__ import annotations

import concurrent.futures
import os
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Protocol, Sequence

from emergency_kit import artifacts
from emergency_kit.config import Resolved
from emergency_kit.errors import KitError, ModelError
from emergency_kit.evaluation.kept_answers import Answers, answer_key
from emergency_kit.evaluation.console import Progress
from emergency_kit.evaluation.division import bring_together, deal
from emergency_kit.evaluation.purpose_file import make_file
from emergency_kit.inference.engine import Generated, Messages
from emergency_kit.model import backend
from emergency_kit.model.process_memory import cores
from emergency_kit.training import ranks

# Slots of llama.cpp: each has its own context in memory, and more are hardly faster.
MOST_SLOTS = 16
# What decides an answer beside the files: raise it when the prompt's rendering or the engines' arithmetic change.
ANSWERS_VERSION = 2
Report = Callable[[float, int], None]


class Asker(Protocol):
    """Runs this rank's part of the prompts at the places `wanted`. `ask` calls `put(place, answer)` as answers end and `report(answers, tokens)` on
    the way. A sampled answer's seed is `seed` and its place."""

    description: str

    def ask(self, prompts: Sequence[Messages], wanted: Sequence[int], max_new_tokens: int, temperature: float, seed: int,
            put: Callable[[int, Generated], None], report: Report) -> None: ...

    def close(self) -> None: ...


@dataclass
class Contestant:
    """One thing that answers. kind: base, adapter, merged, gguf or endpoint. sha256: hash of its files, None for an endpoint.

    is_base: whether it is the config's own base model.
    seconds, tokens: spent and written by this run, answers from the disk not counted; of several ranks the slowest's seconds and all tokens.
    kept: answers that came from the disk.
    """

    name: str
    kind: str
    path: str
    sha256: str | None
    open_asker: Callable[[], Asker]
    answers: Answers
    is_base: bool = False
    seconds: float = 0.0
    tokens: int = 0
    kept: int = 0
    _asker: Asker | None = field(default=None, repr=False)

    def answer(self, prompts: Sequence[Messages], max_new_tokens: int, report: Report, temperature: float = 0.0, seed: int = 0) -> list[Generated]:
        """Answers in the prompts' order, on every rank; each is on the disk as soon as it has ended, so that an interrupted run goes on there. Rank 0
        says what is missing, and its own progress stands for all ranks'."""
        keys = [answer_key(messages, max_new_tokens, temperature, seed) for messages in prompts]
        missing = ranks.shared([place for place, key in enumerate(keys) if self.answers.get(key) is None])
        done = len(prompts) - len(missing)
        self.kept += done
        if missing:
            asker = self.asker()
            mine: dict[str, Generated] = {}
            lock = threading.Lock()

            def put(place: int, answer: Generated) -> None:
                with lock:
                    self.answers.put(keys[place], answer)
                    mine[keys[place]] = answer

            started = time.monotonic()
            asker.ask(prompts, missing, max_new_tokens, temperature, seed, put,
                      lambda more, tokens: report(min(len(prompts), done + more * ranks.world()), tokens * ranks.world()))
            self.seconds += max(bring_together({ranks.rank(): time.monotonic() - started}).values())
            found = bring_together(mine)
            self.tokens += sum(answer.tokens for answer in found.values())
            self.answers.take(found)
        report(len(prompts), self.tokens)
        return ranks.shared([self.answers.known[key] for key in keys] if ranks.is_first() else [])

    def asker(self) -> Asker:
        """What runs the prompts, loaded when first needed."""
        if self._asker is None:
            self._asker = self.open_asker()
        return self._asker

    @property
    def engine(self) -> str:
        """What ran it, in words; before anything ran, that its answers are kept ones."""
        return self._asker.description if self._asker else "answers kept from an earlier run"

    def close(self) -> None:
        """Free what it occupies."""
        if self._asker:
            self._asker.close()


def ask(contestant: Contestant, prompts: Sequence[Messages], max_new_tokens: int, rounds: Sequence[tuple[float, int]] = ((0.0, 0),),
        name: str = "") -> list[tuple[Generated, ...]]:
    """For each prompt its answer in each round `(temperature, seed)`, with progress on the console."""
    name = name or contestant.name
    if contestant.answers.damaged:
        print(f"  {name}: {contestant.answers.damaged} kept answers are damaged and are given again", flush=True)
    kept = contestant.kept
    with Progress(name, len(prompts) * len(rounds)) as progress:
        found = []
        for number, (temperature, seed) in enumerate(rounds):
            before = number * len(prompts)
            found.append(contestant.answer(prompts, max_new_tokens, lambda done, tokens: progress.update(before + done, tokens), temperature, seed))  # noqa: B023  called in its own turn
    kept = contestant.kept - kept
    print(f"  {name}: {contestant.engine}" + (f"; {kept} of {len(prompts) * len(rounds)} answers kept from an earlier run" if kept else ""), flush=True)
    return list(zip(*found))


def open_contestant(resolved: Resolved, spec: str, name: str = "") -> Contestant:
    """Look that a contestant is whole and hash it; nothing is loaded before it is asked.

    Raises ModelError for a folder or file that is missing, damaged or of another base model, or for a wrong address.
    """
    config = resolved.config
    kept = Path(config.training.output_dir) / "cache" / "answers"
    if spec.startswith(("http://", "https://")):
        from emergency_kit.evaluation.endpoint import EndpointAsker

        fingerprint = artifacts.hash_json([ANSWERS_VERSION, spec])
        return Contestant(name or spec, "endpoint", spec, None, lambda: EndpointAsker(spec, config.evaluation.batch_size), Answers(kept, fingerprint))
    path = Path(backend.base_name(config.model)) if spec == "base" else Path(spec)
    if spec == "base":
        backend.require_base(config.model)
    if path.suffix == ".gguf":
        from emergency_kit.inference.engine import check_model

        check_model(path, config.model)
        digest = artifacts.hash_file(path)
        return Contestant(name or path.name, "gguf", str(path), digest, lambda: LlamaAsker(path, config.evaluation.batch_size),
                          Answers(kept, artifacts.hash_json([ANSWERS_VERSION, digest])))
    if spec == "base" and not path.is_dir():  # a Hub id: hashed by its name and revision
        fingerprint = artifacts.hash_json([ANSWERS_VERSION, spec, config.model.name, config.model.revision])
        return Contestant(name or "base", "base", str(path), None, lambda: TorchAsker(resolved, None), Answers(kept, fingerprint), is_base=True)
    return _open_folder(resolved, spec, path, name, kept)


def _open_folder(resolved: Resolved, spec: str, path: Path, name: str, kept: Path) -> Contestant:
    kind = "base" if spec == "base" else backend.check_checkpoint(path, resolved.config.model)
    manifest = artifacts.load_manifest(path)
    if kind == "model":
        kind = backend.kind_of(manifest)
    problems = artifacts.verify_folder(path) if manifest else []
    if problems:
        raise ModelError(f"checkpoint {path}: changed after it was made ({problems[0]}); use another, or make it again")
    digest = artifacts.hash_parent(path) or artifacts.hash_json({file.name: artifacts.hash_file(file) for file in sorted(path.iterdir()) if file.is_file()})
    made = [ANSWERS_VERSION, digest] + ([artifacts.hash_parent(Path(backend.base_name(resolved.config.model)))] if kind == "adapter" else [])
    engine, file_type = _pick_engine(resolved)
    if engine == "llama.cpp":
        file = Path(resolved.config.training.output_dir) / "cache" / "evaluation" / f"{artifacts.hash_json(made)[:24]}-{file_type}.gguf"
        return Contestant(name or path.name, kind, str(path), digest, lambda: LlamaAsker(_make_once(resolved, path, file, file_type), resolved.config.evaluation.batch_size),
                          Answers(kept, artifacts.hash_json([*made, file_type])), is_base=spec == "base")
    return Contestant(name or path.name, kind, str(path), digest, lambda: TorchAsker(resolved, None if spec == "base" else path),
                      Answers(kept, artifacts.hash_json([*made, "torch", resolved.config.model.dtype])), is_base=spec == "base")


def _make_once(resolved: Resolved, path: Path, file: Path, file_type: str) -> Path:
    return ranks.first_then_others(lambda: make_file(resolved, path, file, file_type), "making the file that llama.cpp runs", resolved.config.training.rank_timeout_seconds)


def _pick_engine(resolved: Resolved) -> tuple[str, str]:
    """`(engine, GGUF type)` for folders."""
    settings = resolved.config.evaluation
    if settings.engine != "auto":
        return settings.engine, settings.file_type
    device = backend.pick_device(resolved.config.model)
    import torch

    if device != "cpu" or backend.pick_dtype(resolved.config.model, device) == torch.bfloat16:
        return "torch", ""
    from emergency_kit.errors import ExportError
    from emergency_kit.export import architecture
    from emergency_kit.export.merge import load_skeleton, on_cpu

    name = backend.base_name(resolved.config.model)
    try:
        architecture.pick_family(load_skeleton(name, on_cpu(resolved.config.model)).config, name)
    except ExportError as error:
        print(f"Evaluating in PyTorch, since llama.cpp cannot have this model: {error}", flush=True)
        return "torch", ""
    return "llama.cpp", settings.file_type


class LlamaAsker:
    """A GGUF file in llama.cpp, several answers at once; ranks on one machine share its cores."""

    def __init__(self, path: Path, slots: int):
        from emergency_kit.inference.llama_engine import LlamaEngine

        beside = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # torchrun sets OMP_NUM_THREADS to 1, which the engine would take
        self.engine = LlamaEngine(path, min(MOST_SLOTS, slots), threads=max(1, cores() // beside) if beside > 1 else None)
        self.description = self.engine.description

    def ask(self, prompts: Sequence[Messages], wanted: Sequence[int], max_new_tokens: int, temperature: float, seed: int,
            put: Callable[[int, Generated], None], report: Report) -> None:
        """Answers in any order; see `Asker`."""
        mine = wanted[ranks.rank()::ranks.world()]
        written = [0] * len(mine)
        stopped = threading.Event()

        def one(number: int) -> None:
            place = mine[number]
            stream = self.engine.stream(prompts[place], max_new_tokens, temperature, seed + place if temperature else None, stopped.is_set)
            for _ in stream:
                written[number] = stream.tokens
            if not stopped.is_set():
                put(place, stream.result)
                written[number] = stream.tokens

        run_each(one, len(mine), self.engine.slots, stopped, lambda done: report(done, sum(written)))

    def close(self) -> None:
        """Stop llama.cpp."""
        self.engine.close()


class TorchAsker:
    """A folder in PyTorch, in left-padded batches of similar length."""

    def __init__(self, resolved: Resolved, folder: Path | None):
        from emergency_kit.inference.torch_engine import Engine

        section = resolved.config.model
        loaded: Any = backend.load_base(section) if folder is None else backend.load_checkpoint(section, folder, fold=True)
        self.engine = Engine(loaded)
        self.batch_size = resolved.config.evaluation.batch_size
        self.description = f"PyTorch, {self.batch_size} at once, {self.engine.description}"

    def ask(self, prompts: Sequence[Messages], wanted: Sequence[int], max_new_tokens: int, temperature: float, seed: int,
            put: Callable[[int, Generated], None], report: Report) -> None:
        """Batch after batch; each is kept when it has ended. See `Asker`."""
        done, tokens = 0, 0
        for chosen in deal(prompts, wanted, self.batch_size):
            answers = self.engine.generate([prompts[index] for index in chosen], max_new_tokens, len(chosen), progress=lambda more, new: report(done + more, tokens + new),  # noqa: B023  called in its own turn
                                           temperature=temperature, seeds=[seed + index for index in chosen])
            for index, answer in zip(chosen, answers):
                put(index, answer)
            done, tokens = done + len(chosen), tokens + sum(answer.tokens for answer in answers)
            report(done, tokens)

    def close(self) -> None:
        """Let go of the model."""
        del self.engine


def run_each(one: Callable[[int], None], number: int, at_once: int, stopped: threading.Event, report: Callable[[float], None]) -> None:
    """Call `one` for 0 to number - 1 in threads; the first error, or Ctrl-C, stops the rest and is raised."""
    if not number:
        return
    with concurrent.futures.ThreadPoolExecutor(max_workers=min(at_once, number)) as pool:
        waiting = {pool.submit(one, index) for index in range(number)}
        try:
            while waiting:
                ended, waiting = concurrent.futures.wait(waiting, timeout=0.5, return_when=concurrent.futures.FIRST_COMPLETED)
                for future in ended:
                    future.result()
                report(number - len(waiting))
        except (KeyboardInterrupt, KitError):
            stopped.set()
            for future in waiting:
                future.cancel()
            raise
