"""First token and tokens/s of the llama.cpp engine beside transformers `generate`, in turn in one run, alone and beside a busy process.

In: a GGUF file and the merged model that it was made from. Out: a Markdown table of medians, with each contender's
rounds taken A B A B. "Warm" is a loaded model that has answered before: the system prompt is cached, the card and
the situation are new each time; then once more after the warm-up that `serve` does while nobody asks, for cards
that nobody asked about. Needs two idle cores; say what else ran. Run: `make bench-inference`.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, Callable

from emergency_kit.config import load_config
from emergency_kit.data.format import build_messages
from emergency_kit.knowledge.cards import load_cards

NEW_TOKENS = 256  # a whole answer, or nearly
STREAMS = 4


def prompts(rounds: int, last: bool = False) -> list[list[dict[str, str]]]:
    """One prompt a round, each with another card, so that nothing but the system prompt can be cached. last: of the last cards instead of the first."""
    cards = [card for card in load_cards().values() if card.id != "safe_minimum"]
    return [build_messages(f"please help, {card.also_called[0]}, I do not know what to do", [card]) for card in (cards[-rounds:] if last else cards[:rounds])]


class Llama:
    """llama.cpp as `infer` and `serve` open it, grammar off, so that both write freely."""

    def __init__(self, path: Path, slots: int):
        from emergency_kit.inference.engine import open_engine

        self.engine: Any = open_engine(load_config("embedded").config.model, path, slots)

    def one(self, messages: list[dict[str, str]]) -> tuple[float, float]:
        """`(seconds to the first token, tokens/s after it)`."""
        stream = self.engine.stream(messages, NEW_TOKENS)
        started = time.perf_counter()
        next(stream)
        first = time.perf_counter() - started
        for _ in stream:
            pass
        return first, (stream.tokens - 1) / max(1e-9, time.perf_counter() - started - first)

    def warm(self, _: None) -> tuple[int, float]:
        """`(cards whose prompts are computed beforehand, seconds that it took)`."""
        from emergency_kit.inference.warm_up import warm_up

        started = time.perf_counter()
        return warm_up(self.engine, load_cards()), time.perf_counter() - started

    def many(self, batch: list[list[dict[str, str]]]) -> float:
        """Tokens/s of several streams together, prompts included."""
        started = time.perf_counter()
        streams = [self.engine.stream(messages, NEW_TOKENS) for messages in batch]
        threads = [threading.Thread(target=list, args=(stream,)) for stream in streams]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return sum(stream.tokens for stream in streams) / (time.perf_counter() - started)


class Transformers:
    """The same model through transformers' own `generate`, greedy, in the compute type that is fastest here."""

    def __init__(self, folder: Path):
        from emergency_kit.data.tokenize import encode_prompt
        from emergency_kit.model import backend

        self.loaded = backend.load_checkpoint(load_config("embedded").config.model, folder)
        self.encode: Callable[..., list[int]] = encode_prompt

    def one(self, messages: list[dict[str, str]]) -> tuple[float, float]:
        import torch
        from transformers.generation.streamers import BaseStreamer

        times: list[float] = []

        class Clock(BaseStreamer):
            def put(self, value: Any) -> None:
                times.append(time.perf_counter())

            def end(self) -> None:
                pass

        ids = torch.tensor([self.encode(self.loaded.tokenizer, messages)])
        started = time.perf_counter()
        with torch.inference_mode():
            self.loaded.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False, streamer=Clock(),
                                       pad_token_id=self.loaded.tokenizer.pad_token_id)
        tokens = times[1:]  # the streamer gets the prompt first
        return tokens[0] - started, (len(tokens) - 1) / max(1e-9, tokens[-1] - tokens[0])


def serve(contender: str, path: str, slots: int) -> None:
    """A contender in a process of its own, one request a line: torch's threads and llama.cpp's do not disturb each other."""
    made = Llama(Path(path), slots) if contender == "llama" else Transformers(Path(path))
    print("ready", flush=True)
    for line in sys.stdin:
        what, messages = json.loads(line)
        result = getattr(made, what)(messages)
        print(json.dumps(result), flush=True)


class Contender:
    def __init__(self, name: str, path: Path, slots: int = 1):
        self.process = subprocess.Popen([sys.executable, __file__, "--serve", name, str(path), str(slots)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._read("ready")

    def ask(self, what: str, messages: Any) -> Any:
        assert self.process.stdin
        self.process.stdin.write(json.dumps([what, messages]) + "\n")
        self.process.stdin.flush()
        return json.loads(self._read())

    def _read(self, wanted: str = "") -> str:
        assert self.process.stdout
        for line in self.process.stdout:
            if not wanted or line.strip() == wanted:
                return line
        raise SystemExit("a contender ended early; see its message above")

    def stop(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait(30)


def spin() -> None:
    while True:
        pass


def measure(llama: Contender, other: Contender, rounds: int, title: str) -> None:
    taken: dict[str, list[tuple[float, float]]] = {"llama": [], "transformers": []}
    for number, messages in enumerate(prompts(rounds + 1)):
        for name, contender in (("llama", llama), ("transformers", other)):
            result = contender.ask("one", messages)
            if number:  # the first round warms up
                taken[name].append(tuple(result))
    many = [llama.ask("many", prompts(STREAMS * (turn + 1))[-STREAMS:]) for turn in range(2)]
    speeds = {name: statistics.median(speed for _, speed in rows) for name, rows in taken.items()}
    firsts = {name: [first for first, _ in rows] for name, rows in taken.items()}
    for name in taken:
        print(f"| {title} | {name} | {statistics.median(firsts[name]):.2f} s | {max(firsts[name]):.2f} s | {speeds[name]:.0f} | "
              f"{min(speed for _, speed in taken[name]):.0f} | {f'{max(many):.0f}' if name == 'llama' else ''} |", flush=True)
    pairs = [one[1] / two[1] for one, two in zip(taken["llama"], taken["transformers"])]
    print(f"| {title} | ratio | | | {statistics.median(pairs):.1f} x (pairs: {min(pairs):.1f} to {max(pairs):.1f}) | | |", flush=True)


def measure_warmed_up(llama: Contender, rounds: int) -> None:
    number, seconds = llama.ask("warm", None)
    taken = [llama.ask("one", messages) for messages in prompts(rounds, last=True)]
    firsts = [first for first, _ in taken]
    print(f"| nothing of ours, prompts of {number} cards computed before in {seconds:.0f} s | llama | {statistics.median(firsts):.2f} s | {max(firsts):.2f} s | "
          f"{statistics.median(speed for _, speed in taken):.0f} | {min(speed for _, speed in taken):.0f} | |", flush=True)


def main() -> None:
    if sys.argv[1:2] == ["--serve"]:
        serve(sys.argv[2], sys.argv[3], int(sys.argv[4]))
        return
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gguf", type=Path, default=Path("outputs/gguf/final-q4_k_m.gguf"))
    parser.add_argument("--merged", type=Path, default=Path("outputs/merged/final"))
    parser.add_argument("--rounds", type=int, default=8)
    options = parser.parse_args()
    llama, other = Contender("llama", options.gguf, STREAMS), Contender("transformers", options.merged)
    print(f"{options.gguf.name}, {options.rounds} rounds in turn, {NEW_TOKENS} new tokens at most\n")
    print("| beside | engine | first token, median | slowest | tokens/s, median | slowest | four streams, tokens/s |\n|---|---|---|---|---|---|---|")
    measure(llama, other, options.rounds, "nothing of ours")
    measure_warmed_up(llama, options.rounds)
    busy = multiprocessing.Process(target=spin, daemon=True)
    busy.start()
    try:
        measure(llama, other, options.rounds, "one busy process")
    finally:
        busy.terminate()
    llama.stop()
    other.stop()


if __name__ == "__main__":
    main()
