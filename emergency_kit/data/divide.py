"""Division of work among processes: batches go out, what is made of them comes back in order.

In: a function and batches. Out: its results, as one process would give them. Nothing is started for the first batches, since most data is no longer than
that. Processes are forked, so that tokenizer and index are there at once; they touch no GPU, ignore Ctrl-C, which is the parent's, and end with it.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain, islice
from typing import Any, Callable, Iterator, TypeVar

from emergency_kit.errors import DataError

T = TypeVar("T")
# Batches that one process does before others are started: with 256 records each a second or two.
ALONE = 20
# Batches under way for each process: what bounds the memory.
AHEAD = 3
_work: Any = None


def divide(work: Callable[[Any], T], batches: Iterator[Any], processes: int) -> Iterator[T]:
    """`map(work, batches)`, by several processes where there are many batches. Raises DataError where one of them dies."""
    for batch in islice(batches, ALONE) if processes > 1 else batches:
        yield work(batch)
    first = next(batches, None)
    if first is None:
        return
    with ProcessPoolExecutor(processes, multiprocessing.get_context("fork"), _begin, (work, os.getpid())) as pool:
        waiting: deque[Future[T]] = deque()
        try:
            for batch in chain([first], batches):
                waiting.append(pool.submit(_call, batch))
                if len(waiting) >= AHEAD * processes:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool:
            raise DataError(f"dataset.processes: one of {processes} processes that tokenise was ended, perhaps where memory ran out; next: --set dataset.processes=1") from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _begin(work: Any, parent: int) -> None:
    global _work
    _work = work
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads did not come with the fork
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _call(batch: Any) -> Any:
    return _work(batch)


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)
