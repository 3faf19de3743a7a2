# SPDX-License-Identifier: Apache-2.0
"""Runs checks of requests beside the event loop, a few at a time and each with a time limit.

A thread cannot be ended. So one whose check takes too long keeps its place until it is done, and no owner may have
more than a part of the places: who sends what takes for ever keeps himself waiting, not the others.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any, TypeVar

PLACES, PLACES_EACH = 4, 2
"""Checks that run at a time, and those of one owner."""
CHECK_LIMIT_S = 2.0
"""How long a check may take, and how long it may wait for a place."""

_T = TypeVar("_T")


class ChecksBusyError(Exception):
    """No check could be begun in time: others still run."""


class CheckWorker:
    """Lives on one event loop; the threads are its own and keep no process alive."""

    def __init__(self, limit_s: float = CHECK_LIMIT_S) -> None:
        self.limit_s = limit_s
        """For each check; see CHECK_LIMIT_S."""
        self._running: Counter[str] = Counter()
        self._changed = asyncio.Condition()

    @property
    def num_running(self) -> int:
        """Checks whose threads have not ended, those that nobody waits for any more included."""
        return self._running.total()

    async def run(self, check: Callable[[], _T], owner: str = "") -> _T:
        """The result of `check` on a thread; raises what it raises, TimeoutError, or ChecksBusyError."""
        await self._take_place(owner)
        loop = asyncio.get_running_loop()
        done: asyncio.Future[_T] = loop.create_future()

        def work() -> None:
            try:
                result, error = check(), None
            except BaseException as caught:  # the caller's, whatever it is
                result, error = None, caught
            with contextlib.suppress(RuntimeError):  # the loop is closed, and nobody waits
                loop.call_soon_threadsafe(self._ended, owner, done, result, error)

        threading.Thread(target=work, name="request-check", daemon=True).start()
        return await asyncio.wait_for(done, self.limit_s)

    async def _take_place(self, owner: str) -> None:
        def is_free() -> bool:
            return self._running.total() < PLACES and self._running[owner] < PLACES_EACH

        try:
            async with asyncio.timeout(self.limit_s), self._changed:
                await self._changed.wait_for(is_free)
                self._running[owner] += 1
        except TimeoutError:
            raise ChecksBusyError(f"{self._running.total()} checks of other requests still run") from None

    def _ended(self, owner: str, done: asyncio.Future[Any], result: Any, error: BaseException | None) -> None:
        self._running[owner] -= 1
        self._running += Counter()  # drops owners without any
        if not done.done():
            if error is None:
                done.set_result(result)
            else:
                done.set_exception(error)
        asyncio.ensure_future(self._tell())

    async def _tell(self) -> None:
        async with self._changed:
            self._changed.notify_all()
