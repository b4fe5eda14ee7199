"""Orders to a loop on another thread: what becomes of them when it dies, or takes too long."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from ground.errors import InfraError, PacktrainError
from rollout.loop_thread import LoopThread

GONE = InfraError("the process is gone")


@pytest.fixture
def loop() -> Iterator[LoopThread]:
    loop = LoopThread("orders", "here")
    yield loop
    loop.end()


async def answer() -> int:
    return 42


async def fail() -> int:
    raise AttributeError("llm")


def test_an_order_that_is_queued_while_the_loop_dies_raises_the_cause(loop: LoopThread) -> None:
    """It was let in before, and its turn comes after: it must not meet what is torn down."""
    going_on = threading.Event()

    def dying() -> None:
        going_on.wait(5)
        loop.die(GONE)

    loop.soon(dying)
    with ThreadPoolExecutor() as threads:
        orders = [threads.submit(loop.order, "x", what, 5.0) for what in (answer, fail)]
        time.sleep(0.1)
        going_on.set()
        assert [each.exception() for each in orders] == [GONE, GONE]


def test_what_fails_while_everything_dies_has_failed_of_that(loop: LoopThread) -> None:
    async def torn() -> None:
        loop.die(GONE)
        raise AttributeError("llm")

    with pytest.raises(AttributeError):
        loop.order("x", fail, 5.0)
    with pytest.raises(InfraError, match="process is gone"):
        loop.order("x", torn, 5.0)


def test_an_ended_loop_refuses_at_once_and_fails_what_it_had(loop: LoopThread) -> None:
    with ThreadPoolExecutor() as threads:
        sleeping = threads.submit(loop.order, "x", lambda: asyncio.sleep(60), 60.0)
        time.sleep(0.1)
        began = time.monotonic()
        loop.end()
        assert isinstance(sleeping.exception(), InfraError)
    for _ in range(2):
        with pytest.raises(InfraError, match="loop has ended"):
            loop.order("x", answer, 60.0)
        loop.soon(lambda: None)
        loop.end()
    assert time.monotonic() - began < 2 and loop.loop.is_closed()


def test_an_order_that_takes_too_long_is_broken_off(loop: LoopThread) -> None:
    broken_off = threading.Event()

    async def slow() -> None:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            broken_off.set()
            raise

    with pytest.raises(InfraError, match=r"x must be done within 0\.1 s"):
        loop.order("x", slow, 0.1)
    assert broken_off.wait(5) and loop.order("x", answer, 5.0) == 42


def test_an_order_by_the_loops_own_thread_is_refused(loop: LoopThread) -> None:
    async def nested() -> int:
        return loop.order("y", answer, 5.0)

    with pytest.raises(PacktrainError, match="would wait for itself"):
        loop.order("x", nested, 5.0)
