# SPDX-License-Identifier: Apache-2.0
"""What a frontend has to tell its supervisor is heard, and counts for that for which it was said."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.serve.frontends.door import Door, Frontend
from tokenpool.errors import HostError
from tokenpool.serve.frontends import shared_host, shared_hosts

pytestmark = pytest.mark.vllm


class Deaf:
    """The supervisor does not hear the first words of each frontend, by what they say."""

    def __init__(self, method: str, num_lost: int = 3) -> None:
        self.lost: list[int] = []
        self._method, self._num_lost = method, num_lost

    async def __call__(self, frontend: Frontend, method: str, args: tuple[Any, ...]) -> None:
        index = frontend.settings.index
        if method == self._method and self.lost.count(index) < self._num_lost:
            self.lost.append(index)
            raise HostError(f"engine host does not answer {method} within 30 s")


@pytest.fixture(autouse=True)
def endless_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """No limit helps."""
    monkeypatch.setattr(shared_hosts, "_DRAIN_LIMIT_S", 1e6)


def test_a_model_is_added_though_nobody_hears_that_it_is_joined_at_first(run: Any) -> None:
    async def test(d: Door) -> None:
        d.fate = deaf = Deaf("joined")
        await d.add("a")
        assert d.all_serve("a") and sorted(deaf.lost) == [0, 0, 0, 1, 1, 1]

    run(test)


def test_a_model_is_removed_though_nobody_hears_that_it_is_drained_at_first(run: Any) -> None:
    async def test(d: Door) -> None:
        await d.add("a")
        d.fate = deaf = Deaf("drained")
        await d.operator.remove_model("a", 0.0)
        assert sorted(deaf.lost) == [0, 0, 0, 1, 1, 1]

    run(test)


def test_a_model_gets_cold_though_nobody_hears_that_it_is_drained_at_first(run: Any) -> None:
    async def test(d: Door) -> None:
        await d.add("a")
        d.fate = deaf = Deaf("drained")
        d.rest("a")
        await d.until(lambda: d.supervisor.models["a"].app.state == "cold")
        assert sorted(deaf.lost) == [0, 0, 0, 1, 1, 1]

    run(test)


class Late:
    """A word of one frontend comes late, the first one of its kind."""

    def __init__(self, frontend: Frontend, method: str) -> None:
        self.is_said, self.comes = asyncio.Event(), asyncio.Event()
        self._frontend, self._method = frontend, method

    async def __call__(self, frontend: Frontend, method: str, args: tuple[Any, ...]) -> None:
        if frontend is self._frontend and method == self._method and not self.is_said.is_set():
            self.is_said.set()
            await self.comes.wait()


def test_a_late_word_counts_for_no_later_drain(run: Any) -> None:
    """One frontend was slow to say that it had finished; meanwhile that was called off, and it has a request again."""

    async def test(d: Door) -> None:
        await d.add("a")
        model, second = d.supervisor.models["a"], d.frontends[1]
        d.fate = late = Late(second, "drained")
        d.rest("a")
        await late.is_said.wait()
        d.rest("a", False)
        await d.until(lambda: d.all_serve("a"))
        second.client("a").waiting.append("request")
        d.rest("a")
        await d.until(lambda: second.pool.models["a"].app.state == "draining")
        late.comes.set()
        await d.turns()
        assert model.client is not None and model.client.num_unfinished
        second.client("a").waiting.clear()
        await d.until(lambda: model.app.state == "cold")

    run(test)


def test_a_drain_that_is_called_off_and_asked_for_again_between_two_looks_is_said_again(run: Any) -> None:
    async def test(d: Door) -> None:
        await d.add("a")
        model = d.supervisor.models["a"]
        async with d.supervisor.models.changing:
            d.rest("a")
            await d.until(lambda: not model.client.num_unfinished)
            d.rest("a", False)
            d.rest("a")
            assert model.client.num_unfinished
        await d.until(lambda: model.app.state == "cold")

    run(test)


def test_requests_of_a_resting_model_have_the_whole_time_that_its_removal_gives_them(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though frontends see that it does not rest any more before they see how long its requests may take."""

    async def test(d: Door) -> None:
        await d.add("a")
        client, may_retire = d.frontends[0].client("a"), asyncio.Event()
        client.waiting.append("request")
        d.rest("a")
        await d.until(lambda: all(frontend.pool.models["a"].app.is_resting for frontend in d.frontends.values()))

        async def retire(model: Any, drain_s: float) -> None:
            await may_retire.wait()

        monkeypatch.setattr(d.supervisor.hosts, "retire", retire)
        removing = asyncio.create_task(d.operator.remove_model("a", 1e6))
        await d.until(lambda: not any(frontend.pool.models["a"].app.is_resting for frontend in d.frontends.values()))
        await d.turns()
        assert client.waiting
        may_retire.set()
        await d.turns()
        assert client.waiting and not removing.done()
        client.waiting.clear()
        await removing

    run(test)


def test_an_engine_that_not_all_could_join_is_loaded_and_joined_again(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the same host: who had joined it says so again, of the engine that is there now."""

    async def test(d: Door) -> None:
        await d.add("a")
        is_held, may_attach = asyncio.Event(), asyncio.Event()

        async def attach(frontend: Frontend, method: str, args: tuple[Any, ...]) -> None:
            if frontend is d.frontends[1]:
                is_held.set()
                await may_attach.wait()

        d.attach = attach
        monkeypatch.setattr(shared_host, "JOIN_LIMIT_S", 0.05)
        d.hosts[-1].die()
        await is_held.wait()
        await d.until(lambda: d.supervisor.models["a"].error is not None)
        monkeypatch.setattr(shared_host, "JOIN_LIMIT_S", 1e6)
        may_attach.set()
        await d.until(lambda: len(d.hosts) == 2 and d.all_serve("a"))
        assert d.loads.count("a") >= 3

    run(test)
