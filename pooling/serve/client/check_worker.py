# SPDX-License-Identifier: Apache-2.0
"""Runs checks of requests beside the event loop, a few at a time and each with a time limit."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import TypeVar

from tokenpool.serve.client.fair_threads import FairThreads

PLACES, PLACES_EACH = 4, 2
"""Checks that run at a time, and those of one owner."""
CHECK_LIMIT_S = 2.0
"""How long a check may take, and how long it may wait for a place."""

_T = TypeVar("_T")


class ChecksBusyError(Exception):
    """No check could be begun in time: others still run."""


class CheckWorker:
    """Lives on one event loop."""

    def __init__(self, limit_s: float = CHECK_LIMIT_S) -> None:
        self.limit_s = limit_s
        """For each check; see CHECK_LIMIT_S."""
        self._threads = FairThreads("request-check", PLACES, PLACES_EACH)

    @property
    def num_running(self) -> int:
        """Checks whose threads have not ended, those that nobody waits for any more included."""
        return self._threads.num_running

    async def run(self, check: Callable[[], _T], owner: str = "") -> _T:
        """The result of `check` on a thread; raises what it raises, TimeoutError, or ChecksBusyError."""
        loop, has_begun = asyncio.get_running_loop(), asyncio.Event()

        def work() -> _T:
            with contextlib.suppress(RuntimeError):  # the loop is closed, and nobody waits
                loop.call_soon_threadsafe(has_begun.set)
            return check()

        done = asyncio.wrap_future(self._threads.submit(owner, work))
        try:
            async with asyncio.timeout(self.limit_s):
                await has_begun.wait()
        except TimeoutError:
            raise ChecksBusyError(f"{self.num_running} checks of other requests still run") from None
        finally:
            if not has_begun.is_set():
                done.cancel()
        return await asyncio.wait_for(done, self.limit_s)
