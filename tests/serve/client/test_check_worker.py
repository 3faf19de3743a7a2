# SPDX-License-Identifier: Apache-2.0
"""Checks run beside the event loop, end for their caller in time, and who blocks his places blocks no others."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tokenpool.serve.client.check_worker import PLACES, PLACES_EACH, ChecksBusyError, CheckWorker

pytestmark = pytest.mark.cpu


@contextmanager
def stuck() -> Iterator[Callable[[], bool]]:
    """A check that does not end before the context does."""
    ends = threading.Event()
    try:
        yield lambda: ends.wait(60)
    finally:
        ends.set()


async def emptied(worker: CheckWorker) -> None:
    async with asyncio.timeout(60):
        while worker.num_running:
            await asyncio.sleep(0.001)


def run(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(main())


def test_results_and_errors_are_those_of_the_check():
    """What the check returns or raises comes to its caller, and its place is free again."""

    async def main() -> None:
        worker = CheckWorker(limit_s=60)
        assert 3 == await worker.run(lambda: 3)
        with pytest.raises(ZeroDivisionError):
            await worker.run(lambda: 1 // 0)
        await emptied(worker)

    run(main)


def test_the_loop_goes_on_while_a_check_does_not_end():
    """The check waits for something that only the event loop does."""

    async def main() -> None:
        worker, told = CheckWorker(limit_s=60), threading.Event()
        check = asyncio.create_task(worker.run(lambda: told.wait(60)))
        await asyncio.sleep(0)
        told.set()
        assert await check

    run(main)


def test_a_check_that_does_not_end_keeps_its_place_but_not_its_caller():
    """The caller gets TimeoutError; the place is free when the thread has ended, not before."""

    async def main() -> None:
        worker = CheckWorker(limit_s=0.01)
        with stuck() as check:
            with pytest.raises(TimeoutError):
                await worker.run(check)
            assert 1 == worker.num_running
        await emptied(worker)

    run(main)


def test_an_owner_blocks_only_his_own_places():
    """With all his places lost he is told to come back; another one is served, until all places are lost."""

    async def main() -> None:
        worker = CheckWorker(limit_s=0.01)
        with stuck() as check:
            for _ in range(PLACES_EACH):
                with pytest.raises(TimeoutError):
                    await worker.run(check, "bomber")
            with pytest.raises(ChecksBusyError):
                await worker.run(lambda: 1, "bomber")
            worker.limit_s = 60
            assert 1 == await worker.run(lambda: 1, "polite")
            worker.limit_s = 0.01
            for i in range(PLACES - PLACES_EACH):
                with pytest.raises(TimeoutError):
                    await worker.run(check, f"another {i}")
            with pytest.raises(ChecksBusyError):
                await worker.run(lambda: 1, "polite")
        await emptied(worker)
        worker.limit_s = 60
        assert 1 == await worker.run(lambda: 1, "bomber")

    run(main)


def test_who_waits_for_a_place_gets_it():
    """A check that ends in time lets the next one begin."""

    async def main() -> None:
        worker = CheckWorker(limit_s=60)
        with stuck() as check:
            running = [asyncio.create_task(worker.run(check)) for _ in range(PLACES_EACH)]
            while worker.num_running < PLACES_EACH:
                await asyncio.sleep(0)
            last = asyncio.create_task(worker.run(lambda: "last"))
            await asyncio.sleep(0)
            assert PLACES_EACH == worker.num_running
        assert "last" == await last
        assert [True] * PLACES_EACH == await asyncio.gather(*running)

    run(main)


def test_a_caller_that_goes_away_leaves_nothing_behind():
    """A cancelled wait, for a place or for the result, takes no place for good."""

    async def main() -> None:
        worker = CheckWorker(limit_s=60)
        with stuck() as check:
            tasks = [asyncio.create_task(worker.run(check)) for _ in range(PLACES_EACH + 1)]
            while worker.num_running < PLACES_EACH:
                await asyncio.sleep(0)
            for task in tasks:
                task.cancel()
            ends = await asyncio.gather(*tasks, return_exceptions=True)
            assert all(isinstance(end, asyncio.CancelledError) for end in ends)
        await emptied(worker)

    run(main)
