# SPDX-License-Identifier: Apache-2.0
"""The pool answers for its host while the host is busy: progress of loading, and the state that was last told."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import pytest

from tokenpool.errors import HostError
from tokenpool.serve.gateway.model_app import ModelApp
from tokenpool.serve.pool import host_watch
from tokenpool.serve.pool.host_watch import HostWatch

pytestmark = pytest.mark.cpu


class Host:
    """A host that answers `state` when it is let, and tells what it builds."""

    def __init__(self) -> None:
        self.building: dict[str, Any] | None = None
        self.free = asyncio.Event()
        self.asked = 0
        self.gone = False

    async def call(self, method: str) -> Any:
        if self.gone:
            raise HostError("the host is gone")
        if method == "progress":
            return self.building
        self.asked += 1
        await self.free.wait()
        return {"switches": self.asked}


def apps(**states: Any) -> dict[str, ModelApp]:
    async def app(*_: Any) -> None: ...

    return {name: ModelApp(name, app, state=state) for name, state in states.items()}


class Guard:
    """The guard of a host, as it is told to be."""

    def __init__(self, *, is_overdue: bool) -> None:
        self.is_overdue, self.is_over, self.age_s = is_overdue, False, 7.0


def watching(models: dict[str, ModelApp], host: Host | None) -> HostWatch:
    call: Callable[[], Any] = lambda: host.call if host else None  # noqa: E731
    return HostWatch(models, call)


def test_phases_come_from_the_host_and_from_what_is_before_and_after_it() -> None:
    """Without a host it starts; then the first model is planned, built as the host says, connected; others wait."""

    async def scenario() -> None:
        models, host = apps(a="loading", b="loading", c="ready"), Host()
        nobody = watching(models, None)
        await nobody._look()
        told = nobody.progress()
        assert told is not None
        assert (1, 3) == (told["done"], told["total"])
        assert {"a": "starting host", "b": "waiting"} == phases(told)

        watch = watching(models, host)
        await watch._look()
        assert {"a": "planning", "b": "waiting"} == phases(watch.progress())
        host.building = {"model": "a", "phase": "loading weights"}
        await watch._look()
        assert {"a": "loading weights", "b": "waiting"} == phases(watch.progress())
        host.building = None
        await watch._look()
        assert {"a": "connecting", "b": "waiting"} == phases(watch.progress())
        models["a"].state = "ready"
        await watch._look()
        assert {"b": "planning"} == phases(watch.progress())
        models["b"].state = "ready"
        assert watch.progress() is None

    asyncio.run(scenario())


def phases(told: dict[str, Any] | None) -> dict[str, str]:
    assert told is not None
    return {name: step["phase"] for name, step in told["loading"].items()}


def test_a_busy_host_is_asked_once_and_its_last_state_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Callers that give up leave one question behind, whose answer the next caller gets as the last known state."""
    monkeypatch.setattr(host_watch, "_PATIENCE_S", 0.0)

    async def scenario() -> None:
        host = Host()
        watch = watching(apps(a="ready"), host)
        assert await watch.state() is None
        assert await watch.state() is None
        assert 1 == host.asked

        host.free.set()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        host.free.clear()
        old = await watch.state()
        assert old is not None
        assert (1, 2) == (old["switches"], host.asked)
        assert old["age_s"] >= 0

    asyncio.run(scenario())


def test_a_free_host_is_asked_by_everybody() -> None:
    """A caller never gets an answer to a question that was asked before it came."""

    async def scenario() -> None:
        host = Host()
        host.free.set()
        watch = watching(apps(a="ready"), host)
        answers = await asyncio.gather(watch.state(), watch.state(), watch.state())
        assert [1, 2, 3] == sorted(answer["switches"] for answer in answers if answer)
        assert {0.0} == {answer["age_s"] for answer in answers if answer}

    asyncio.run(scenario())


def test_a_host_that_is_gone_is_an_error_of_the_state_but_not_of_the_progress() -> None:
    """`state` raises what the call raises; the progress says that a host is being started."""

    async def scenario() -> None:
        host = Host()
        host.gone = True
        watch = watching(apps(a="unavailable"), host)
        with pytest.raises(HostError, match="gone"):
            await watch.state()
        await watch._look()
        assert {"a": "starting host"} == phases(watch.progress())

    asyncio.run(scenario())


def test_loading_and_draining_are_logged_once_per_change(caplog: pytest.LogCaptureFixture) -> None:
    """One line per phase of the model that loads; requests that are left, every other second."""
    caplog.set_level(logging.INFO, logger=host_watch.__name__)

    async def scenario() -> None:
        models, host = apps(a="loading", b="loading", c="draining"), Host()
        models["c"].inflight = 3
        watch = watching(models, host)
        await watch._look()
        await watch._look()
        host.building = {"model": "a", "phase": "warming up"}
        await watch._look()

    asyncio.run(scenario())
    lines = [record.getMessage() for record in caplog.records]
    assert 3 == len(lines)
    assert lines[0].startswith("loading model=a phase=planning seconds=0.0 done=1 of=3")
    assert "draining model=c requests_left=3" == lines[1]
    assert lines[2].startswith("loading model=a phase=warming_up seconds=")


def test_models_are_off_while_the_pulse_of_their_host_is_overdue() -> None:
    """They are unavailable and not being loaded meanwhile, and ready again with the pulse; others stay."""

    async def scenario() -> None:
        models, host, guard = apps(a="ready", b="draining", c="loading"), Host(), Guard(is_overdue=True)
        watch = HostWatch(models, lambda: host.call, lambda: guard)  # type: ignore[arg-type, return-value]
        await watch._look()
        assert ["unavailable", "draining", "loading"] == [model.state for model in models.values()]
        assert {"c"} == set((watch.progress() or {})["loading"])
        guard.is_overdue = False
        await watch._look()
        assert ["ready", "draining", "loading"] == [model.state for model in models.values()]

    asyncio.run(scenario())


@pytest.mark.parametrize("is_new", [False, True])
def test_models_of_a_host_that_died_overdue_come_up_with_the_next_one_only(is_new: bool) -> None:
    """Neither the dead host's guard nor that of a host that has not loaded them yet makes them ready."""

    async def scenario() -> None:
        models, guards = apps(a="ready"), [Guard(is_overdue=True)]
        watch = HostWatch(models, lambda: None, lambda: guards[-1])  # type: ignore[arg-type, return-value]
        await watch._look()
        if is_new:
            guards.append(Guard(is_overdue=False))
        else:
            guards[0].is_over = True
        for _ in range(2):
            await watch._look()
            assert "unavailable" == models["a"].state
        assert {"a"} == set((watch.progress() or {})["loading"])

    asyncio.run(scenario())


def test_a_state_that_is_known_is_told_without_asking_a_host_that_is_overdue() -> None:
    """Nobody waits for a host that hangs: the last state is there, with its age."""

    async def scenario() -> None:
        models, host, guard = apps(a="ready"), Host(), Guard(is_overdue=False)
        watch = HostWatch(models, lambda: host.call, lambda: guard)  # type: ignore[arg-type, return-value]
        host.free.set()
        await watch.state()
        guard.is_overdue = True
        told = await watch.state()
        assert told is not None and 1 == told["switches"] == host.asked

    asyncio.run(scenario())
