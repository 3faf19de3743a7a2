# SPDX-License-Identifier: Apache-2.0
"""Whatever is lost or late between a supervisor and its frontends, and whoever dies: in the end all follow."""

from __future__ import annotations

import asyncio
import random
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.serve.frontends.door import Door, Frontend, door
from tokenpool.errors import HostError, PoolError
from tokenpool.serve.frontends import shared_host, shared_hosts

pytestmark = pytest.mark.vllm

LIMIT_S = 60.0
OPERATIONS = ("add", "remove", "rest", "host dies", "frontend dies", "wait")


@settings(max_examples=40, suppress_health_check=list(HealthCheck))
@given(
    st.lists(st.tuples(st.sampled_from(OPERATIONS), st.sampled_from("ab"), st.integers(0, 60)), max_size=10),
    st.integers(0, 1 << 32),
    st.sampled_from([0.0, 0.2, 0.6]),
)
def test_all_follow_in_the_end(operations: list[tuple[str, str, int]], seed: int, lost: float) -> None:
    """Each frontend has the supervisor's models, with their newest settings, and sends to the engines there are."""

    async def test(patch: pytest.MonkeyPatch, folder: Path) -> None:
        async with asyncio.timeout(LIMIT_S), door(patch, folder) as d:
            changes = [asyncio.create_task(changed) for changed in await _play(d, operations, _Line(seed, lost))]
            await asyncio.gather(*changes)
            await d.until(lambda: _all_follow(d))

    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.setattr(shared_host, "JOIN_LIMIT_S", 0.05)
        patch.setattr(shared_hosts, "_DRAIN_LIMIT_S", 1e6)
        asyncio.run(test(patch, Path(folder)))


class _Line:
    """Loses calls of frontends before they are heard, or is slow to let them through."""

    def __init__(self, seed: int, lost: float) -> None:
        self._random, self._lost = random.Random(seed), lost

    async def __call__(self, frontend: Frontend, method: str, args: tuple[Any, ...]) -> None:
        chance = self._random.random()
        if method != "view" and chance < self._lost:
            raise HostError(f"engine host does not answer {method} within 30 s")
        if chance > 0.8:
            for _ in range(self._random.randrange(100)):
                await asyncio.sleep(0)


async def _play(d: Door, operations: list[tuple[str, str, int]], line: _Line) -> list[Any]:
    """Do all of it, one thing after the other but not after its end; returns what is still being done."""
    d.fate = d.attach = line
    begun: list[Any] = []
    for priority, (what, name, turns) in enumerate(operations):
        if what == "add":
            begun.append(asyncio.ensure_future(d.add(name, priority=priority)))
        elif what == "remove":
            begun.append(asyncio.ensure_future(d.operator.remove_model(name, 0.0)))
        elif what == "rest" and name in d.states_of("ready"):
            d.rest(name)
        elif what == "host dies":
            d.hosts[-1].die()
        elif what == "frontend dies":
            d.frontends["ab".index(name)].die()
        await d.turns(turns)
    return [_ended(task) for task in begun]


async def _ended(task: asyncio.Future[Any]) -> None:
    with suppress(PoolError, KeyError):  # such as a model that is there already, or a host that dies
        await task


def _all_follow(d: Door) -> bool:
    states = {name: model.app.state for name, model in d.supervisor.models.items()}
    if not set(states.values()) <= {"ready", "cold"}:
        return False
    for frontend in d.frontends.values():
        seen = {name: model.app.state for name, model in frontend.pool.models.items()}
        if seen != states or not all(frontend.serves(name) for name, state in states.items() if state == "ready"):
            return False
    return True
