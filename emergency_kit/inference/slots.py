"""Slots: how many answers are generated at once, who waits for one, and in which turn.

In: a client's key and a function that generates in a thread. Out: its items on the event loop. The next slot
goes to the waiting client with the fewest answers running, the longest not served first among equals, so that
one client's twenty requests do not stand in front of another's one. A slot is free again when its thread has
ended, whether the answer ended, failed or was cancelled.
"""

from __future__ import annotations

import asyncio
import threading
from collections import Counter, deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import AsyncIterator, Callable, Generic, Iterator, TypeVar

from emergency_kit.errors import KitError

Item = TypeVar("Item")
# Asked before every token; true once nobody waits for the answer any more.
ShouldStop = Callable[[], bool]


class QueueFull(Exception):
    """Too many wait already; the caller may try again later."""


class AnswerFailed(Exception):
    """Something unforeseen ended an answer; the cause is chained."""


class Slots:
    """`size` answers at once and at most `waiting` behind them, half of those from one client. One event loop only."""

    def __init__(self, size: int, waiting: int):
        self.size, self.waiting = size, waiting
        self._executor = ThreadPoolExecutor(size, thread_name_prefix="answer")
        self._running: Counter[str] = Counter()
        # A client's place in this order is its turn: it goes to the end when it is served.
        self._queues: dict[str, deque[asyncio.Future[None]]] = {}
        self._closing = threading.Event()

    @property
    def running_now(self) -> int:
        """Answers being generated."""
        return self._running.total()

    @property
    def waiting_now(self) -> int:
        """Requests that wait for a slot."""
        return sum(map(len, self._queues.values()))

    def check_room(self, client: str) -> None:
        """Raises QueueFull when a request of this client could neither run nor wait."""
        if self.running_now < self.size:
            return
        own = len(self._queues.get(client, ()))
        if self.waiting_now >= self.waiting or own >= max(1, self.waiting // 2):
            raise QueueFull

    async def acquire(self, client: str) -> None:
        """Wait for a slot; raises QueueFull. Whoever is cancelled while waiting leaves the queue."""
        self.check_room(client)
        if self.running_now < self.size and not self.waiting_now:
            self._running[client] += 1
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queues.setdefault(client, deque()).append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():  # served and cancelled in the same moment
                self.release(client)
            elif turn in self._queues.get(client, ()):
                self._queues[client].remove(turn)
                if not self._queues[client]:
                    del self._queues[client]
            raise

    def release(self, client: str) -> None:
        """Give a slot back and serve the next in turn; whoever gives it back counts as served just now."""
        order = sorted(self._queues, key=lambda name: self._running[name])  # stable: the first of the fewest
        self._running[client] -= 1
        self._running += Counter()  # drops keys that stand at zero
        for chosen in order:
            queue = self._queues.pop(chosen)
            while queue and queue[0].done():  # cancelled a moment ago
                queue.popleft()
            if not queue:
                continue
            turn = queue.popleft()
            if queue:
                self._queues[chosen] = queue
            self._running[chosen] += 1
            turn.set_result(None)
            return

    def run(self, client: str, generate: Callable[[ShouldStop], Iterator[Item]]) -> "Run[Item]":
        """Start `generate` in a thread of the slot that `client` has acquired; the slot is given back at its end."""
        return Run(self, client, generate)

    def close(self) -> None:
        """Stop all answers, and wait until their threads have ended."""
        self._closing.set()
        self._executor.shutdown(wait=True)


class Run(AsyncIterator[Item], Generic[Item]):
    """Items of one generating thread, as they come; `stop()` ends it early. Raises the thread's KitError, or AnswerFailed for any other error."""

    def __init__(self, slots: Slots, client: str, generate: Callable[[ShouldStop], Iterator[Item]]):
        loop = asyncio.get_running_loop()
        self._items: asyncio.Queue[Item | Future[None]] = asyncio.Queue()
        self._stop = threading.Event()

        def work() -> None:
            for item in generate(lambda: self._stop.is_set() or slots._closing.is_set()):
                loop.call_soon_threadsafe(self._items.put_nowait, item)

        def end(future: Future[None]) -> None:
            slots.release(client)
            self._items.put_nowait(future)

        def ended(future: Future[None]) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(end, future)

        slots._executor.submit(work).add_done_callback(ended)

    async def __anext__(self) -> Item:
        item = await self._items.get()
        if isinstance(item, Future):
            error = item.exception()
            if error is None:
                raise StopAsyncIteration
            raise error if isinstance(error, KitError) else AnswerFailed from error
        return item

    def stop(self) -> None:
        """Ask the thread to end before its next token; does nothing when it has ended."""
        self._stop.set()
