"""The fair queue: turns, bounds, cancelling, and what ends a slot."""

import asyncio
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emergency_kit.inference.slots import AnswerFailed, QueueFull, Slots


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, 20))


async def settle():
    for _ in range(5):
        await asyncio.sleep(0)


def test_one_clients_many_requests_do_not_stand_before_another_clients_one():
    async def story():
        slots, served = Slots(1, 64), []

        async def ask(client, number):
            await slots.acquire(client)
            served.append((client, number))

        await slots.acquire("greedy")
        waiting = [asyncio.ensure_future(ask("greedy", number)) for number in range(10)]
        await settle()
        waiting.append(asyncio.ensure_future(ask("late", 0)))
        await settle()
        for _ in range(11):
            slots.release(served[-1][0] if served else "greedy")
            await settle()
        await asyncio.gather(*waiting)
        return served

    served = run(story())
    assert served[0] == ("late", 0), "whose fewest answers run is served first"
    assert served[1:] == [("greedy", number) for number in range(10)], "within one client the first is first"


def test_the_queue_is_bounded_in_all_and_for_each_client():
    async def story():
        slots = Slots(1, 4)
        await slots.acquire("a")
        waiting = [asyncio.ensure_future(slots.acquire("a")) for _ in range(2)]
        await settle()
        with pytest.raises(QueueFull):
            await slots.acquire("a")
        waiting += [asyncio.ensure_future(slots.acquire(name)) for name in "bc"]
        await settle()
        with pytest.raises(QueueFull):
            slots.check_room("d")
        assert (slots.running_now, slots.waiting_now) == (1, 4)
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        assert (slots.running_now, slots.waiting_now) == (1, 0)

    run(story())


def test_whoever_is_cancelled_in_the_moment_of_being_served_gives_the_slot_back():
    async def story():
        slots = Slots(1, 4)
        await slots.acquire("a")
        turn = asyncio.ensure_future(slots.acquire("b"))
        await settle()
        slots.release("a")  # serves b, whose task has not run yet
        turn.cancel()
        await asyncio.gather(turn, return_exceptions=True)
        assert (slots.running_now, slots.waiting_now) == (0, 0)
        await slots.acquire("c")

    run(story())


def test_a_slot_given_back_in_the_moment_of_a_cancel_goes_to_the_next():
    async def story():
        slots = Slots(1, 4)
        await slots.acquire("a")
        first, second = asyncio.ensure_future(slots.acquire("b")), asyncio.ensure_future(slots.acquire("c"))
        await settle()
        first.cancel()
        slots.release("a")
        await asyncio.gather(first, return_exceptions=True)
        await second
        assert first.cancelled() and (slots.running_now, slots.waiting_now) == (1, 0)

    run(story())


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3), st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(["ask", "cancel", "release"])), max_size=40))
def test_slots_never_leak_and_never_exceed_their_number(size, story):
    async def play():
        slots, tasks, held = Slots(size, 8), [], []

        async def ask(client):
            await slots.acquire(client)
            held.append(client)

        for client, act in story:
            if act == "ask":
                tasks.append(asyncio.ensure_future(ask(client)))
            elif act == "cancel" and tasks:
                tasks[-1].cancel()
            elif act == "release" and held:
                slots.release(held.pop())
            await settle()
            assert slots.running_now == len(held) <= size
            assert slots.waiting_now == 0 or slots.running_now == size
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        while held:
            slots.release(held.pop())
        assert (slots.running_now, slots.waiting_now) == (0, 0)

    run(play())


def test_a_stopped_run_ends_its_thread_before_the_slot_is_free():
    async def story():
        slots, ended = Slots(1, 4), threading.Event()

        def count(should_stop):
            number = 0
            while not should_stop():
                yield (number := number + 1)
            ended.set()

        await slots.acquire("a")
        running = slots.run("a", count)
        assert [await anext(running) for _ in range(3)] == [1, 2, 3]
        running.stop()
        await slots.acquire("b")
        assert ended.is_set()
        slots.close()

    run(story())


def test_an_error_in_the_thread_reaches_the_reader_and_frees_the_slot():
    async def story():
        slots = Slots(1, 4)

        def fail(_):
            yield 1
            raise ZeroDivisionError("in the thread")

        await slots.acquire("a")
        running = slots.run("a", fail)
        with pytest.raises(AnswerFailed) as caught:
            [item async for item in running]
        assert isinstance(caught.value.__cause__, ZeroDivisionError)
        assert slots.running_now == 0
        slots.close()

    run(story())
