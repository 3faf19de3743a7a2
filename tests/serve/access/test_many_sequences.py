# SPDX-License-Identifier: Apache-2.0
"""A request of many sequences leaves seats to others, and those of its own tenant do not wait behind all of it."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from tokenpool.serve.access.tenant_line import LineSeat, TenantLine

pytestmark = pytest.mark.cpu

NAMES = ("a", "b", "c")


class Sequence:
    """One that waits for its place, or has it."""

    def __init__(self, tenant: str, *, of_many: bool) -> None:
        self.tenant, self.of_many = tenant, of_many
        self.seat: LineSeat | None = None
        self.bound = 0
        """How many of lists of its tenant may go before it from now on, if it is alone."""


class Engine:
    """A line before an engine of few seats, which takes sequences in the order in which they come."""

    def __init__(self, num_seats: int) -> None:
        self.line = TenantLine(lambda tenant: 1.0)
        self.line.shares.seats = self.num_seats = num_seats
        self.kept = max(1, num_seats // 8)
        self.there: list[Sequence] = []
        self.held: list[Sequence] = []
        self.tasks: list[asyncio.Task[None]] = []

    def ask(self, tenant: str, count: int) -> None:
        """A request of so many sequences comes; the others follow when its first one has its place."""
        self.tasks.append(asyncio.create_task(self._request(tenant, count)))

    async def _request(self, tenant: str, count: int) -> None:
        call: Any = SimpleNamespace(account=SimpleNamespace(config=SimpleNamespace(name=tenant)))
        await self._take(call, Sequence(tenant, of_many=count > 1))
        await asyncio.gather(*(self._take(call, Sequence(tenant, of_many=True)) for _ in range(count - 1)))

    async def _take(self, call: Any, mine: Sequence) -> None:
        tenant = mine.tenant
        if not mine.of_many:
            mine.bound = 1 + sum(other.tenant == tenant and not other.of_many for other in self.held)
        self.held.append(mine)
        mine.seat = await self.line.more(call, mine.of_many)
        self.held.remove(mine)
        self.there.append(mine)
        if mine.of_many:
            for other in self.held:
                if other.tenant == tenant and not other.of_many:
                    other.bound -= 1
                    assert other.bound >= 0, "one that is alone waits behind a list"

    def step(self) -> None:
        """Those that have a seat at the engine get a token."""
        for mine in self.there[: self.num_seats]:
            assert mine.seat is not None
            mine.seat.begin()

    def end(self, mine: Sequence) -> None:
        assert mine.seat is not None
        self.there.remove(mine)
        mine.seat.cost = 100.0
        mine.seat.close()

    def count(self, *, of_many: bool) -> int:
        return sum(mine.of_many == of_many for mine in self.there)

    async def settle(self) -> None:
        for _ in range(30):
            await asyncio.sleep(0)
        for task in self.tasks:
            if task.done():
                task.result()

    def check(self) -> None:
        """A single seat is for all: nothing can be kept."""
        assert self.num_seats == 1 or self.count(of_many=True) <= self.num_seats - self.kept


@asynccontextmanager
async def engine_of(num_seats: int) -> AsyncIterator[Engine]:
    """An engine which all leave in the end: nobody waits for ever, and nothing stays in the books."""
    engine = Engine(num_seats)
    yield engine
    for _ in range(10_000):
        if not engine.there and not engine.held:
            break
        engine.step()
        if engine.there:
            engine.end(engine.there[0])
        await engine.settle()
        engine.check()
    await asyncio.gather(*engine.tasks)
    assert (0, 0) == (len(engine.line), engine.line._ahead.total())
    assert [0, 0, 0] == [engine.line.shares.taken(name) for name in NAMES]
    assert engine.line.shares._num_many == 0


@pytest.mark.parametrize("seed", range(30))
def test_lists_leave_seats_and_singles_pass(seed: int) -> None:
    """Requests of one to many sequences of three tenants come and end at random."""
    draw = random.Random(seed)

    async def main() -> None:
        async with engine_of(draw.choice((1, 2, 3, 8, 16, 24))) as engine:
            for _ in range(80):
                tenant, what = draw.choice(NAMES[: 1 + seed % 3]), draw.randrange(6)
                if what < 2:
                    engine.ask(tenant, draw.choice((1, 1, 1, 2, engine.num_seats, 2 * engine.num_seats)))
                elif what < 4:
                    engine.step()
                elif engine.there:
                    engine.end(draw.choice(engine.there[: engine.num_seats]))
                await engine.settle()
                engine.check()

    asyncio.run(main())


@pytest.mark.parametrize("seed", range(10))
def test_who_comes_alone_runs_beside_a_request_of_all_seats(seed: int) -> None:
    """One request of as many sequences as there are seats, or more; another tenant's single one has a seat at once, and
    so has one of the same tenant as soon as the list has its tokens."""
    draw = random.Random(seed)

    async def main() -> None:
        num_seats = draw.choice((2, 5, 16, 64))
        async with engine_of(num_seats) as engine:
            engine.ask("a", num_seats * draw.choice((1, 2, 4)))
            for _ in range(draw.randrange(2 * num_seats)):
                await engine.settle()
                engine.step()
            await engine.settle()
            tenant = draw.choice(("a", "b"))
            if tenant == "a":
                engine.step()
            engine.ask(tenant, 1)
            await engine.settle()
            assert len(engine.there) <= num_seats, "it waits in the engine for the end of another"
            assert [] == [mine for mine in engine.held if not mine.of_many]

    asyncio.run(main())
