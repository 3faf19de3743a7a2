# SPDX-License-Identifier: Apache-2.0
"""Nobody who has nothing at the engine waits for somebody who has, whatever the shares of the two are."""

from __future__ import annotations

import asyncio
import random
from types import SimpleNamespace
from typing import Any

import pytest

from tokenpool.serve.access.tenant_line import ENGINE_QUEUE, LineSeat, TenantLine

pytestmark = pytest.mark.cpu


class Line:
    """A line, and tenants whose sequences get their first token when the test says so."""

    def __init__(self) -> None:
        self.line = TenantLine(lambda tenant: 1.0)
        self.seats: dict[str, list[LineSeat]] = {}
        self.waiting: dict[str, list[asyncio.Task[None]]] = {}

    def come(self, tenant: str) -> None:
        call: Any = SimpleNamespace(account=SimpleNamespace(config=SimpleNamespace(name=tenant)))

        async def take() -> None:
            self.seats.setdefault(tenant, []).append(await self.line.more(call))

        self.waiting.setdefault(tenant, []).append(asyncio.create_task(take()))

    def end(self, tenant: str, cost: float) -> None:
        seat = self.seats[tenant].pop(0)
        seat.cost = cost
        seat.close()

    def has(self, tenant: str) -> int:
        return len(self.seats.get(tenant, ()))

    async def settle(self) -> None:
        for _ in range(20):
            await asyncio.sleep(0)

    async def close(self) -> None:
        for task in (task for tasks in self.waiting.values() for task in tasks):
            task.cancel()
        await self.settle()


def test_a_tenant_whose_sequences_wait_for_something_keeps_no_other_waiting() -> None:
    """Grammars that compile for a minute keep all places of the engine's queue; its tenant is next by its share, too."""

    async def main() -> None:
        line = Line()
        line.come("polite")
        await line.settle()
        for _ in range(3 * ENGINE_QUEUE):
            line.come("odd")
        await line.settle()
        line.end("polite", 1000.0)  # it is far ahead of its share now
        line.come("polite")
        await line.settle()
        assert (line.has("odd"), line.has("polite")) == (ENGINE_QUEUE, 1)
        line.come("polite")
        await line.settle()
        assert line.has("polite") == 1, "it has one there"
        line.end("polite", 10.0)
        await line.settle()
        assert line.has("polite") == 1, "and one after the other goes on"
        await line.close()

    asyncio.run(main())


@pytest.mark.parametrize("seed", range(20))
def test_whoever_has_none_there_does_not_wait(seed: int) -> None:
    """Whoever comes, begins and ends, in any order and at any cost."""
    draw = random.Random(seed)

    async def main() -> None:
        line, names = Line(), ("a", "b", "c")
        for _ in range(200):
            tenant = draw.choice(names)
            what = draw.randrange(4)
            if what < 2:
                line.come(tenant)
            elif line.has(tenant):
                if what == 2:
                    line.seats[tenant][0].begin()
                line.end(tenant, draw.choice([1.0, 50.0, 3000.0]))
            await line.settle()
            for name in names:
                assert line.has(name) or not line.line.num_held(name)
        await line.close()

    asyncio.run(main())
