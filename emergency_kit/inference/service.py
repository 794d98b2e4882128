"""Service: requests become answers through the fair queue; streams, their events and their cancelling.

In: an `Answerer`, `Slots`, `Metrics`. Out: async iterators of events that the routes of `api.py` send on.
Whoever goes away gives the slot back at the next token.
"""

from __future__ import annotations

import asyncio
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any, AsyncGenerator

from pydantic import BaseModel
from starlette.requests import Request

from emergency_kit.inference.answer import Answerer, Asked
from emergency_kit.inference.metrics import Metrics
from emergency_kit.inference.schemas import AnswerOut, Line
from emergency_kit.inference.slots import AnswerFailed, Run, Slots

# How often a waiting client hears how many are before it; it also shows that the line is alive.
WAIT_SECONDS = 1.0
KEEP_ALIVE_SECONDS = 10.0


class Waiting(BaseModel):
    """An event of a stream: how many requests wait, this one among them."""

    waiting: int


Item = str | Line | AnswerOut | Waiting | None
"""A piece of text, a whole line, the whole answer, a place in the queue, or None for "still there"."""


class Service:
    """One model behind a fair queue."""

    def __init__(self, answerer: Answerer, slots: Slots, metrics: Metrics):
        self.answerer, self.slots, self.metrics = answerer, slots, metrics
        # Retrieval and tokenising take milliseconds; they must not wait behind the event loop or a slot.
        self._preparing = ThreadPoolExecutor(2, thread_name_prefix="prepare")
        metrics.watch("running", "Answers being generated.", lambda: slots.running_now)
        metrics.watch("waiting", "Requests that wait for a slot.", lambda: slots.waiting_now)

    async def ask(self, client: str, **arguments: Any) -> Asked:
        """Find the cards and build the prompt; raises QueueFull before any work where there is no room."""
        self.slots.check_room(client)
        return await asyncio.get_running_loop().run_in_executor(self._preparing, lambda: self.answerer.ask(**arguments))

    async def stream(self, client: str, asked: Asked) -> AsyncGenerator[Item, None]:
        """What happens to one request, in its order. Closing or cancelling it frees the slot."""
        turn = asyncio.ensure_future(self.slots.acquire(client))
        run: Run[Any] | None = None
        whole = failed = False
        try:
            while not (await asyncio.wait({turn}, timeout=WAIT_SECONDS))[0]:
                yield Waiting(waiting=self.slots.waiting_now)
            turn.result()
            run = self.slots.run(client, lambda should_stop: self.answerer.answer(asked, should_stop))
            while True:
                try:
                    item = await asyncio.wait_for(anext(run), KEEP_ALIVE_SECONDS)
                except TimeoutError:
                    yield None
                    continue
                except StopAsyncIteration:
                    break
                except AnswerFailed as failure:
                    failed = True
                    self.metrics.failed.inc()
                    say_failure(failure.__cause__)
                    raise
                if isinstance(item, AnswerOut):
                    whole = True
                    self._count(item)
                yield item
        finally:
            if run:
                run.stop()
                if not whole and not failed:
                    self.metrics.cancelled.inc()
            elif not turn.done():
                turn.cancel()
            elif not turn.cancelled() and not turn.exception():
                self.slots.release(client)

    async def whole(self, request: Request, client: str, asked: Asked) -> AnswerOut | None:
        """The answer in one; None when the client went away meanwhile."""

        async def collect() -> AnswerOut | None:
            stream = self.stream(client, asked)
            try:
                return [item async for item in stream if isinstance(item, AnswerOut)][-1]
            finally:
                await stream.aclose()

        answer, gone = asyncio.ensure_future(collect()), asyncio.ensure_future(_until_gone(request))
        try:
            await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
            return answer.result() if answer.done() else None
        finally:
            answer.cancel()
            gone.cancel()

    def close(self) -> None:
        """Stop all answers, then the engine."""
        self.slots.close()
        self._preparing.shutdown()
        self.answerer.close()

    def _count(self, answer: AnswerOut) -> None:
        provenance, metrics = answer.provenance, self.metrics
        metrics.answers.inc()
        metrics.tokens.labels("prompt").inc(provenance.prompt_tokens)
        metrics.tokens.labels("completion").inc(provenance.completion_tokens)
        metrics.seconds.observe(provenance.seconds)
        if provenance.first_token_seconds is not None:
            metrics.first_token.observe(provenance.first_token_seconds)
        metrics.struck.inc(sum(line.struck is not None for line in answer.lines))
        metrics.added.inc(len(answer.added))


def say_failure(error: BaseException | None) -> None:
    """One line of an unforeseen error for whoever runs the server."""
    print(f"error: unexpected {type(error).__name__}: {error}; run with --debug and report it", file=sys.stderr, flush=True)


async def _until_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def sse(name: str, data: Any) -> bytes:
    """One event of text/event-stream; without a name where it is empty, as the OpenAI API sends them."""
    text = data if isinstance(data, str) else data.model_dump_json() if isinstance(data, BaseModel) else json.dumps(data, ensure_ascii=False)
    return (f"event: {name}\n" if name else "").encode() + b"data: " + text.encode() + b"\n\n"
