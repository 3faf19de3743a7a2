# SPDX-License-Identifier: Apache-2.0
"""A model that is removed and added again under its name is another one, however fast that was."""

from __future__ import annotations

from typing import Any

import pytest

from tests.serve.frontends.door import Door, Frontend
from tokenpool.serve.frontends.frontends import Frontends

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
