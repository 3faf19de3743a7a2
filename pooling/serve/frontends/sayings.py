# SPDX-License-Identifier: Apache-2.0
"""What frontends have said to their supervisor; what has to hold at all is waited for until all have said it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any

from tokenpool.errors import PoolError


class Sayings:
    """Lives on the supervisor's event loop."""

    def __init__(self, num_frontends: int) -> None:
        self.up: dict[int, int] = {}
        """Lives of the frontends that asked for a view, by index; what others say comes late and counts for nothing."""
        self.has_started = False
        """Whether the pool has: before, those count, too, that are still starting."""
        self.news = asyncio.Condition()
        """Told of whatever frontends say, and of what they are to see."""
        self._num_frontends = num_frontends
        self._said: set[tuple[str, int, str, tuple[Any, ...]]] = set()  # what, life, model, where
        self._failures: dict[str, PoolError] = {}

    async def notify(self) -> None:
        """Wake whoever waits for news."""
        async with self.news:
            self.news.notify_all()

    async def say(self, what: str, life: int, model: str, *where: Any) -> None:
        """A frontend says something of a model, there."""
        if life in self.up.values():
            self._said.add((what, life, model, where))
            await self.notify()

    async def fail(self, model: str, error: PoolError) -> None:
        """A frontend could not join a model; it will try again."""
        self._failures[model] = error
        await self.notify()

    def unsay(self, model: str, *where: Any) -> None:
        """Forget what was said of a model there, and why it could not be joined."""
        self._said = {said for said in self._said if said[2:] != (model, where)}
        self._failures.pop(model, None)

    def forget(self, index: int, life: int) -> None:
        """A frontend is gone."""
        self.up.pop(index, None)
        self._said = {said for said in self._said if said[1] != life}

    async def all_say(self, what: str, model: str, *where: Any, unless: Callable[[], object] = lambda: None) -> None:
        """Wait until all frontends have said it, or `unless` raises."""

        def is_done() -> bool:
            unless()
            return self.have_all_said(what, model, *where)

        while not is_done():
            async with self.news:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(0.5):
                        await self.news.wait()

    def have_all_said(self, what: str, model: str, *where: Any) -> bool:
        """Whether all frontends have said it."""
        lives = self.up.values()
        is_complete = self.has_started or len(lives) == self._num_frontends
        return is_complete and all((what, life, model, where) in self._said for life in lives)

    def why_failed(self, model: str) -> str:
        """What a frontend said last that could not join the model; empty if none did."""
        return str(self._failures.get(model, ""))

    def refuse_failed(self, model: str) -> None:
        """Raise why a frontend could not join a model, if one said so."""
        if model in self._failures:
            raise self._failures[model]
