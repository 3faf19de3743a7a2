# SPDX-License-Identifier: Apache-2.0
"""Nobody waits for long because of what others wait for at the engine, whatever the shares of the two are."""

from __future__ import annotations

import asyncio
import random
from types import SimpleNamespace
from typing import Any

import pytest

from tokenpool.serve.access import tenant_line
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


@pytest.fixture(autouse=True)
def soon_late(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tenant_line, "LATE_S", 0.02)


@pytest.mark.parametrize("seed", range(20))
def test_sequences_that_stay_without_a_token_keep_no_other_tenant_waiting(seed: int) -> None:
    """Grammars that compile for a minute have all places of the engine's queue: others have their own soon.

    Whoever comes, begins and ends, in any order and at any cost; one tenant has no more than the queue in the end.
    """
    draw = random.Random(seed)

    async def main() -> None:
        line, names = Line(), ("a", "b", "c")
        for _ in range(60):
            tenant = draw.choice(names)
            what = draw.randrange(5)
            if what < 3:
                line.come(tenant)
            elif line.has(tenant):
                if what == 3:
                    line.seats[tenant][0].begin()
                line.end(tenant, draw.choice([1.0, 50.0, 3000.0]))
            await line.settle()
            if draw.random() < 0.2:
                await asyncio.sleep(0.04)
        await asyncio.sleep(0.04)
        for name in names:
            num_held = line.line.num_held(name)
            assert line.has(name) >= min(ENGINE_QUEUE, line.has(name) + num_held)
            assert line.has(name) == ENGINE_QUEUE or not num_held
            line.come(name)
        for name in names:
            while line.has(name):
                line.end(name, 1.0)
                await line.settle()
        assert not len(line.line) and not line.line._late.total() and not line.line._ahead.total()
        await line.close()

    asyncio.run(main())


def test_many_that_are_given_up_at_once_are_passed_over() -> None:
    """A client of a long list goes: all of it that waits is cancelled at the same moment, and then one ends."""

    async def test() -> None:
        line = Line()
        for _ in range(2000):
            line.come("t")
        await line.settle()
        running = line.has("t")
        assert ENGINE_QUEUE < running < 2000
        for task in line.waiting["t"]:
            task.cancel()
        for _ in range(running):
            line.end("t", 10.0)
        await line.settle()
        assert (len(line.line), line.line.shares.taken("t"), line.has("t")) == (0, 0, 0)
        line.come("t")
        await line.settle()
        assert line.has("t") == 1
        await line.close()

    asyncio.run(test())


def test_whoever_waits_behind_one_that_is_given_up_has_his_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """At once, not when a sequence of another tenant begins: he has none at the engine himself."""
    monkeypatch.setattr(tenant_line, "LATE_S", 1000.0)

    async def test() -> None:
        line = Line()
        line.come("dear")
        await line.settle()
        line.end("dear", 1e6)
        for _ in range(ENGINE_QUEUE + 1):
            line.come("cheap")
        await line.settle()
        line.come("dear")
        await line.settle()
        assert (line.has("cheap"), line.has("dear")) == (ENGINE_QUEUE, 0), "his turn comes after that of the other"
        line.waiting["cheap"][-1].cancel()
        await line.settle()
        assert line.has("dear") == 1
        await line.close()

    asyncio.run(test())


def test_calls_aside_that_are_given_up_leave_nothing_in_their_line() -> None:
    """While those that have the places stay, as when what they ask for hangs."""

    async def test() -> None:
        line = TenantLine(lambda tenant: 1.0)
        calls: list[Any] = [
            SimpleNamespace(account=SimpleNamespace(config=SimpleNamespace(name="t")), held_s=0.0, spare=None)
            for _ in range(10)
        ]
        gone = asyncio.Event()

        async def receive() -> dict[str, Any]:
            await gone.wait()
            return {"type": "http.disconnect"}

        entering = [asyncio.create_task(line.enter_aside(call, receive)) for call in calls]
        await asyncio.sleep(0)
        gone.set()
        came = await asyncio.gather(*entering)
        assert came.count(True) == tenant_line.ASIDE_AT_ONCE
        assert not line._aside["t"]._waiting
        for call in calls:
            if call.spare is not None:
                call.spare.close()
        assert line._aside["t"]._free == tenant_line.ASIDE_AT_ONCE

    asyncio.run(test())
