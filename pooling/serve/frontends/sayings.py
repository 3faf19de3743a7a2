# SPDX-License-Identifier: Apache-2.0
"""What frontends have said to their supervisor; what has to hold at all is waited for until all have said it.

What is to be said has a number, which nothing else gets: a word that comes late counts for nothing that came after it.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Callable

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
        self._numbers = itertools.count(1)
        self._said: dict[int, set[tuple[str, int]]] = {}  # what and life, by number
        self._failures: dict[int, PoolError] = {}

    async def notify(self) -> None:
        """Wake whoever waits for news."""
        async with self.news:
            self.news.notify_all()

    def ask(self) -> int:
        """A number, above 0, for what frontends are to say; `drop` ends it."""
        number = next(self._numbers)
        self._said[number] = set()
        return number

    def drop(self, number: int) -> None:
        """Nothing is to be said with that number any more; nothing for one that is not in use."""
        self._said.pop(number, None)

    async def say(self, what: str, life: int, number: int) -> None:
        """A frontend says something."""
        if life in self.up.values() and number in self._said:
            self._said[number].add((what, life))
            await self.notify()

    def forget(self, index: int, life: int) -> None:
        """A frontend is gone."""
        self.up.pop(index, None)
        for said in self._said.values():
            said.difference_update([word for word in said if word[1] == life])

    async def all_say(self, what: str, number: int, unless: Callable[[], object] = lambda: None) -> None:
        """Wait until all frontends have said it, or `unless` raises."""

        def is_done() -> bool:
            unless()
            return self.have_all_said(what, number)

        while not is_done():
            async with self.news:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(0.5):
                        await self.news.wait()

    def have_all_said(self, what: str, number: int) -> bool:
        """Whether all frontends have said it."""
        lives, said = self.up.values(), self._said.get(number, set())
        is_complete = self.has_started or len(lives) == self._num_frontends
        return is_complete and all((what, life) in said for life in lives)

    async def fail(self, birth: int, error: PoolError) -> None:
        """A frontend could not join the model of that birth; it will try again."""
        self._failures[birth] = error
        await self.notify()

    def forget_failure(self, birth: int) -> None:
        """Forget why it could not be joined."""
        self._failures.pop(birth, None)

    def why_failed(self, birth: int) -> str:
        """What a frontend said last that could not join the model; empty if none did."""
        return str(self._failures.get(birth, ""))

    def refuse_failed(self, birth: int) -> None:
        """Raise why a frontend could not join a model, if one said so."""
        if birth in self._failures:
            raise self._failures[birth]
