"""Workers: calls side by side, each in a fresh Python process with its share of the cores. What `sweep --workers N` stands on.

In: picklable calls, a log for each. Out: `(number, None)` when a call begins and `(number, answer)` when it ends: what it returned, or the KitError
that it raised, or one made of how its process died. `concurrent.futures` hands the calls out. One process that is killed costs its own call alone.
SIGINT and SIGTERM reach every process as SIGTERM, which a run answers by saving; a process whose parent has died is ended the same way.
Why not joblib (1.6, tried in 2026): where one worker dies or Ctrl-C comes, its loky ends all others with SIGKILL, so that nothing is saved, and its
workers are used again, so that one run's memory and GPU are the next one's; ProcessPoolExecutor, too, gives up all calls where one process dies.
Limits: POSIX; a GPU each where there are several was not run by us.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import FrameType
from typing import Any, Callable, Generator, Iterator

from emergency_kit.config import REPOSITORY
from emergency_kit.errors import Interrupted, KitError, TrainingError

STOPPED_EARLY = "stopped before it trained a step"


class Killed(TrainingError):
    """A process that ended without an answer."""


class Workers:
    """Up to `number` processes at a time. threads: of each, unless OMP_NUM_THREADS says otherwise; devices: names of GPUs, by worker; [] leaves them alone."""

    def __init__(self, number: int, threads: int, devices: list[str]):
        self.number, self.threads, self.devices = number, threads, devices
        self.stopping = False
        self.live: set[subprocess.Popen[bytes]] = set()
        self.lock = threading.RLock()  # taken again by the handler of a second signal
        self.events: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.free: queue.SimpleQueue[int] = queue.SimpleQueue()
        for worker in range(number):
            self.free.put(worker)

    def run(self, calls: list[Callable[[], Any]], logs: list[Path]) -> Generator[tuple[int, Any], None, None]:
        """Yield what begins and what ends, as it does. Once stopped, calls that have not begun end with Interrupted and begin never."""
        with self._signals(), ThreadPoolExecutor(self.number) as pool:
            try:
                futures = {pool.submit(self._call, number, call, log): number for number, (call, log) in enumerate(zip(calls, logs))}
                for future in futures:
                    future.add_done_callback(self.events.put)
                ended = 0
                while ended < len(futures):
                    event = self.events.get()
                    if isinstance(event, Future):
                        ended += 1
                        yield futures[event], event.result()
                    else:
                        yield event, None
            finally:
                self.stop()  # nothing is left to stop unless an error is on its way

    def stop(self) -> None:
        """Ask every process to save and end; a second time, to end at once."""
        with self.lock:
            self.stopping = True
            for process in self.live:
                process.terminate()

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        def handle(number: int, frame: FrameType | None) -> None:
            if not self.stopping:
                os.write(2, b"\nStopping: every run finishes the pass under way, then it is saved; once more stops at once.\n")
            self.stop()

        mine = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
        before = {number: signal.signal(number, handle) for number in mine}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _call(self, number: int, call: Callable[[], Any], log: Path) -> Any:
        if self.stopping:
            return Interrupted("not begun")
        worker = self.free.get()
        try:
            log.parent.mkdir(parents=True, exist_ok=True)
            with log.open("ab") as file:
                with self.lock:
                    if self.stopping:  # meanwhile
                        return Interrupted("not begun")
                    # A session of its own: Ctrl-C in the terminal reaches the sweep alone, which passes it on once.
                    process = subprocess.Popen([sys.executable, "-P", "-m", __name__], env=self._environment(worker), start_new_session=True,
                                               stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file)
                    self.live.add(process)
                self.events.put(number)
                text, _ = process.communicate(pickle.dumps(os.getpid()) + pickle.dumps(call))
            with self.lock:
                self.live.discard(process)
            return pickle.loads(text) if text else Interrupted("stopped") if self.stopping else Killed(_how(process.returncode, log))
        finally:
            self.free.put(worker)

    def _environment(self, worker: int) -> dict[str, str]:
        """What must be known before torch is imported, and where this very package is."""
        path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
        device = {"CUDA_VISIBLE_DEVICES": self.devices[worker % len(self.devices)]} if self.devices else {}
        return {"OMP_NUM_THREADS": str(self.threads), "RAYON_NUM_THREADS": str(self.threads)} | os.environ | {"PYTHONPATH": path} | device


def _how(status: int, log: Path) -> str:
    if status == -signal.SIGKILL:
        return "killed (SIGKILL, which is also how the system ends a process where memory runs out)"
    return f"ended by {signal.Signals(-status).name if status < 0 else f'an error (exit code {status})'}, see {log}"


def main() -> None:
    """One call, from standard input, in a process of its own; its answer goes to standard output, all that is printed to standard error: the log."""
    answer = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        threading.Thread(target=_end_with, args=(pickle.load(sys.stdin.buffer),), daemon=True).start()
        result = pickle.load(sys.stdin.buffer)()  # this imports torch, with the environment as it is to be
    except KitError as error:
        print(f"error: {error}", flush=True)
        result = error
    except KeyboardInterrupt:
        result = Interrupted(STOPPED_EARLY)
    with contextlib.suppress(BrokenPipeError), answer:  # the sweep's own process may be gone; what a run made is on the disk
        pickle.dump(result, answer)


def _end_with(parent: int) -> None:
    """Stop politely once the sweep's own process is gone: nobody would see what this one does, or could stop it by Ctrl-C."""
    while os.getppid() == parent:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    main()
