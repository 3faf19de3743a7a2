# SPDX-License-Identifier: Apache-2.0
"""A process is not taken for one that was there before it, though it has its index and its pid."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

import pytest

from tests.serve.frontends.door import Door, Frontend
from tokenpool.serve.frontends.frontends import Frontends

pytestmark = pytest.mark.vllm


def test_models_come_and_go(run: Any) -> None:
    """As far as the stand-ins go: nothing fails, and all follow."""

    async def test(d: Door) -> None:
        await d.add("a")
        assert d.all_serve("a")
        await d.operator.remove_model("a", 0.0)
        assert not any(frontend.hosts.models for frontend in d.frontends.values())
        await d.add("a")
        d.host.die()
        await d.until(lambda: len(d.hosts) == 2 and d.all_serve("a"))

    run(test)


def test_what_a_dead_frontend_said_does_not_count_for_one_with_its_pid(run: Any) -> None:
    """Its last word comes late: the supervisor waits for its successor, which has not joined yet."""

    async def test(d: Door) -> None:
        d.pids = itertools.repeat(d.frontends[1].pid)
        first, late, may_attach = d.frontends[1], asyncio.Event(), asyncio.Event()

        async def fate(frontend: Frontend, method: str, args: tuple[Any, ...]) -> None:
            if method == "joined" and frontend in (first, d.frontends[0]):
                if frontend is first:
                    first.die()
                await late.wait()

        async def attach(frontend: Frontend, method: str, args: tuple[Any, ...]) -> None:
            if frontend is d.frontends[1] and frontend is not first:
                late.set()
                await may_attach.wait()

        d.fate, d.attach = fate, attach
        adding = asyncio.create_task(d.add("a"))
        await late.wait()
        await d.turns()
        assert not adding.done()
        may_attach.set()
        await adding
        assert d.all_serve("a")

    run(test)


def test_a_host_with_the_pid_of_the_one_before_is_joined(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though frontends have not seen that there was none for a moment."""
    is_looking, look = True, Frontends._show_view

    async def look_now_and_then(frontends: Frontends) -> None:
        if is_looking:
            await look(frontends)

    async def test(d: Door) -> None:
        nonlocal is_looking
        await d.add("a")
        d.host_pids = itertools.repeat(d.host.pid)
        is_looking = False
        d.host.die()
        await d.until(lambda: len(d.hosts) == 2 and d.loads == ["a", "a"])
        is_looking = True
        await d.until(lambda: d.all_serve("a"))

    monkeypatch.setattr(Frontends, "_show_view", look_now_and_then)
    run(test)
