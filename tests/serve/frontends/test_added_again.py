# SPDX-License-Identifier: Apache-2.0
"""A model that is removed and added again under its name is another one, however fast that was."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.serve.frontends.door import Door, Frontend
from tokenpool.errors import HostError
from tokenpool.process import keeper
from tokenpool.serve.frontends import followed_hosts
from tokenpool.serve.frontends.frontends import Frontends
from tokenpool.serve.pool.model_use import ModelUse

pytestmark = pytest.mark.vllm


@pytest.mark.parametrize("load", ["start", "on_demand"])
def test_a_model_that_is_added_again_between_two_looks_has_its_new_settings(
    run: Any, monkeypatch: pytest.MonkeyPatch, load: str
) -> None:
    """Frontends answer with the app and the settings of the new one, and have not seen that there was none."""
    is_looking, look = True, Frontends._show_view

    async def look_now_and_then(frontends: Frontends) -> None:
        if is_looking:
            await look(frontends)

    async def test(d: Door) -> None:
        hosts = d.supervisor.hosts
        await d.add("a", priority=1, load=load)
        remove, add, introduce = hosts.remove, hosts.add, hosts.introduce

        async def unseen(model: Any) -> None:
            nonlocal is_looking
            is_looking = False
            await remove(model)

        async def seen(model: Any) -> None:
            nonlocal is_looking
            is_looking = True
            await (introduce if model.is_on_demand else add)(model)

        monkeypatch.setattr(hosts, "remove", unseen)
        monkeypatch.setattr(hosts, "add", seen)
        monkeypatch.setattr(hosts, "introduce", seen)
        await d.operator.remove_model("a", 0.0)
        assert all("a" in frontend.pool.models for frontend in d.frontends.values()), "the gap was seen"
        await d.add("a", priority=2, load=load)
        if load == "start":
            assert d.all_serve("a")
        await d.until(lambda: all(_priority(frontend) == 2 for frontend in d.frontends.values()))

    monkeypatch.setattr(Frontends, "_show_view", look_now_and_then)
    run(test)


def _priority(frontend: Frontend) -> int | None:
    model = frontend.pool.models.get("a")
    return None if model is None else model.plan.spec.priority


def test_a_model_that_falls_asleep_while_it_is_removed_is_awake_when_it_is_added_again(run: Any) -> None:
    async def test(d: Door) -> None:
        await d.add("a")
        asleep, call = d.supervisor.hosts.lending.asleep, d.hosts[-1].call

        async def remove_asleep(method: str, *args: Any, **limits: Any) -> Any:
            assert method != "sleep"
            if method == "remove_model":
                asleep["a"] = 1  # what the host has answered before reaches the server now
            return await call(method, *args)

        d.hosts[-1].call = remove_asleep  # type: ignore[method-assign]
        await d.operator.remove_model("a", 0.0)
        await d.add("a")
        assert {} == asleep and d.all_serve("a")

    run(test)


def test_what_waited_for_the_model_before_does_not_wait_for_the_one_that_is_added_again(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A frontend tells of it late; nobody wants the new one to be loaded."""
    told: list[Any] = []
    wanted: list[str] = []
    late = asyncio.Event()

    async def test(d: Door) -> None:
        await d.add("a", load="on_demand")
        old = d.frontends[1].pool.models["a"]
        use = followed_hosts.use_of

        async def fate(frontend: Frontend, method: str, args: tuple[Any, ...]) -> None:
            if method == "uses" and frontend is d.frontends[1] and not told:
                told.append(args)
                await late.wait()

        def use_of(model: Any) -> ModelUse:
            return use(model)._replace(num_held=int(model is old), due_by_tenant={"": 1.0} if model is old else {})

        monkeypatch.setattr(followed_hosts, "use_of", use_of)
        d.fate = fate
        await d.until(lambda: told)
        await d.operator.remove_model("a", 0.0)
        await d.add("a", load="on_demand")
        model = d.supervisor.models["a"]
        model.app.on_wanted = lambda: wanted.append("a")
        late.set()
        await d.turns()
        await d.until(lambda: len(model.app.hold.told) == 2)
        assert [] == wanted

    run(test)


def test_what_a_frontend_has_of_models_is_told_again_when_nobody_hears_it(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not only when a task that died is started again, which takes up to half a minute."""
    lost: list[str] = []
    failures: list[str] = []

    async def test(d: Door) -> None:
        async def fate(frontend: Frontend, method: str, args: tuple[Any, ...]) -> None:
            if method == "uses" and len(lost) < 5:
                lost.append(method)
                raise HostError("engine host does not answer uses within 30 s")

        d.fate = fate
        await d.add("a", load="on_demand")
        hold: Any = d.supervisor.models["a"].app.hold
        await d.until(lambda: len(hold.told) == 2)
        assert (len(lost), failures) == (5, [])

    monkeypatch.setattr(keeper, "note_failure", lambda task, what_follows: failures.append(task))
    run(test)
