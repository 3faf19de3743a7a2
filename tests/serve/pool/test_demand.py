# SPDX-License-Identifier: Apache-2.0
"""Models that are loaded when requests want them, and unloaded when nobody does: no request is lost, nothing stays."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.serve.access.test_tenants import tenant as tenant_of
from tests.serve.gateway.test_router import CHAT, make_scope
from tokenpool.model_life import Life
from tokenpool.serve.access.admission import EngineQueue
from tokenpool.serve.access.auth import TENANT_KEY
from tokenpool.serve.access.tenants import TenantBook

if TYPE_CHECKING:
    from tests.helpers.stand_ins import World

pytestmark = pytest.mark.vllm

Test = Callable[["World"], Coroutine[Any, Any, None]]
ON_DEMAND = {"load": "on_demand"}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Run a test on an event loop of its own, with a pool of the models a, b and c, which are loaded on demand."""
    from tests.helpers.stand_ins import stand_in_pool
    from tokenpool.process.keeper import Backoff
    from tokenpool.serve.pool import demand

    monkeypatch.setattr(Backoff, "next_s", lambda self: 0.01)
    monkeypatch.setattr(demand, "LOOK_S", 0.002)
    monkeypatch.setattr(demand, "PATIENCE_S", 0.02)

    async def with_pool(test: Test, of_models: Any = ON_DEMAND, **settings: Any) -> None:
        async with stand_in_pool(monkeypatch, tmp_path, of_models=of_models, **settings) as world:
            await test(world)

    return lambda test, **settings: asyncio.run(with_pool(test, **settings))


class Asked:
    """One request and what became of it."""

    def __init__(self, w: World, model: str, number: int = 0, tenant: str = "", **fields: Any) -> None:
        self.model, self.number, self.gone = model, number, asyncio.Event()
        self.sent: list[dict[str, Any]] = []
        body = json.dumps({"model": model, "id": f"{model}-{number}", **fields}).encode()
        messages = [{"type": "http.request", "body": body}]

        async def receive() -> dict[str, Any]:
            if messages:
                return messages.pop()
            await self.gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: dict[str, Any]) -> None:
            self.sent.append(message)

        scope = make_scope(CHAT, {"content-length": str(len(body)), "content-type": "application/json"})
        if tenant:
            scope[TENANT_KEY] = TenantBook([tenant_of(tenant)]).accounts[tenant]
        self.task = asyncio.create_task(w.pool.router(scope, receive, send))

    @property
    def statuses(self) -> list[int]:
        return [message["status"] for message in self.sent if message["type"] == "http.response.start"]

    @property
    def text(self) -> str:
        return b"".join(message.get("body", b"") for message in self.sent).decode()

    async def status(self) -> int:
        async with asyncio.timeout(30):
            await self.task
        (status,) = self.statuses
        return status


def test_one_load_serves_all_who_wait(run) -> None:
    """Nothing is loaded at the start; the pool is ready all the same."""

    async def test(w: World) -> None:
        await w.pool.start()
        assert w.states == dict.fromkeys("abc", "cold") and w.pool.ready and w.pool.settled and w.loads == []
        asked = [Asked(w, "b", number) for number in range(8)]
        assert [await one.status() for one in asked] == [200] * 8
        assert w.loads == ["b"] and w.states == {"a": "cold", "b": "ready", "c": "cold"}

    run(test)


def test_an_idle_model_leaves_nothing_behind(run) -> None:
    """Engine, client and app go, and with the next request they are there again."""

    async def test(w: World) -> None:
        await w.pool.start()
        assert await Asked(w, "a").status() == 200
        client, model = w.client("a"), w.pool.models["a"]
        await w.until(lambda: w.states["a"] == "cold")
        assert client.closed and w.host.models == [] and (model.client, model.host_pid) == (None, 0)
        assert model.plan.checked is None and "StandIn" not in repr(model.app.app)
        assert model.app.gate.engine is EngineQueue
        assert await Asked(w, "a", 1).status() == 200 and w.loads == ["a", "a"]

    run(test, unload_after_s=0.02)


def test_nobody_looks_where_nothing_can_happen(run, monkeypatch) -> None:
    """Nothing is asked for, nothing can be unused for too long; the first request is heard all the same."""
    from tokenpool.serve.pool import demand

    looks: list[int] = []
    look = demand.Demand.look

    async def counted(self: Any) -> None:
        looks.append(1)
        await look(self)

    monkeypatch.setattr(demand.Demand, "look", counted)

    async def test(w: World) -> None:
        await w.pool.start()
        for _ in range(2):
            await asyncio.sleep(20 * demand.LOOK_S)
            looks.clear()
            await asyncio.sleep(20 * demand.LOOK_S)
            assert [] == looks
            assert await Asked(w, "a").status() == 200

    run(test)


def test_the_least_recently_used_idle_model_makes_room(run) -> None:
    """At most `max_loaded` are loaded; one that is kept is not asked, nor one with a request."""

    async def test(w: World) -> None:
        await w.pool.start()
        for name in "abac":
            assert await Asked(w, name).status() == 200
        assert w.states == {"a": "ready", "b": "cold", "c": "ready"}
        busy = Asked(w, "a", 1, steps=1 << 30)
        await w.until(lambda: w.client("a").waiting)
        assert await Asked(w, "b").status() == 200
        assert w.states == {"a": "ready", "b": "ready", "c": "cold"}
        busy.task.cancel()

    run(test, max_loaded=2)


def test_nobody_starves_beside_models_that_are_always_busy(run) -> None:
    """Who has waited for some time gets a model to finish; its next requests wait and are answered, too."""

    async def test(w: World) -> None:
        await w.pool.start()
        asked: list[Asked] = []
        stop = asyncio.Event()

        async def busy(name: str) -> None:
            while not stop.is_set():
                asked.append(one := Asked(w, name, len(asked), steps=20))
                assert await one.status() == 200

        streams = [asyncio.create_task(busy("a")) for _ in range(4)]
        await w.until(lambda: w.states["a"] == "ready")
        assert await Asked(w, "b", 999).status() == 200
        await w.until(lambda: w.loads.count("a") >= 2)
        stop.set()
        await asyncio.gather(*streams)

    run(test, max_loaded=1)


def test_a_failed_load_is_told_to_all_and_tried_again_on_demand(run) -> None:
    """The model is failed for a while, then cold; nobody builds it before somebody wants it."""

    async def test(w: World) -> None:
        await w.pool.start()
        w.broken.add("a")
        asked = [Asked(w, "a", number) for number in range(4)]
        assert [await one.status() for one in asked] == [503] * 4
        assert all("no file" in one.text for one in asked) and w.loads == ["a"] and w.pool.ready
        await w.until(lambda: w.states["a"] == "cold")
        w.broken.clear()
        assert w.loads == ["a"] and await Asked(w, "a", 9).status() == 200

    run(test)


def test_what_is_held_is_loaded_by_the_next_host(run) -> None:
    """A host that dies of nothing in particular while it loads: who waits waits on, and is answered."""

    async def test(w: World) -> None:
        await w.pool.start()
        w.gates["a"] = asyncio.Event()
        asked = Asked(w, "a")
        await w.until(lambda: w.loads == ["a"])
        w.host.die()
        w.gates["a"].set()
        assert await asked.status() == 200
        assert len(w.hosts) == 2 and w.loads == ["a", "a"]

    run(test)


def test_a_tenant_that_wants_many_models_waits_for_itself(run) -> None:
    """Another one's model is loaded next but one, however many the first had asked for; weights count."""

    async def test(w: World) -> None:
        await w.pool.start()
        w.gates["a0"] = asyncio.Event()
        names = [f"a{number}" for number in range(12)]
        asked = [Asked(w, name, tenant="many") for name in names]
        await w.until(lambda: w.loads == ["a0"])
        asked += [Asked(w, name, tenant="few") for name in ("b0", "b1")]
        await w.until(lambda: all(len(model.app.hold) for model in list(w.pool.models.values())[1:]))
        w.gates["a0"].set()
        assert [await one.status() for one in asked] == [200] * 14
        assert w.loads[:2] == ["a0", "b0"] and w.loads.index("b1") <= 4
        assert [name for name in w.loads if name in names] == names

    tenants = (tenant_of("many"), tenant_of("few"))
    names = [f"a{number}" for number in range(12)] + ["b0", "b1"]
    run(test, names=names, tenants=tenants, max_loaded=2)


def test_the_most_urgent_comes_first(run) -> None:
    """Of models that are wanted while another one is loaded, the one whose request is due first."""
    from tokenpool.config import SLO

    async def test(w: World) -> None:
        await w.pool.start()
        w.pool.models["c"].app.hold.ttft_s = SLO(ttft_s=1.0, tpot_s=1.0).ttft_s
        w.gates["a"] = asyncio.Event()
        asked = [Asked(w, "a")]
        await w.until(lambda: w.loads == ["a"])
        asked += [Asked(w, "b"), Asked(w, "c")]
        await w.until(lambda: len(w.pool.models["c"].app.hold))
        w.gates["a"].set()
        assert [await one.status() for one in asked] == [200] * 3 and w.loads == ["a", "c", "b"]

    run(test)


def test_who_waits_is_told_when_the_model_or_the_server_goes(run) -> None:
    """A model that is removed, or a server that stops, refuses those that are held."""

    async def test(w: World) -> None:
        await w.pool.start()
        w.gates["a"] = w.gates["b"] = asyncio.Event()
        held = [Asked(w, "a"), Asked(w, "b")]
        await w.until(lambda: w.loads == ["a"] and len(w.pool.models["b"].app.hold))
        removing = asyncio.create_task(w.operator.remove_model("b", 1.0))
        assert await held[1].status() == 503 and "draining" in held[1].text
        stopping = asyncio.create_task(w.pool.stop())
        assert await held[0].status() == 503 and "stops" in held[0].text
        w.gates["a"].set()
        await asyncio.wait([removing, stopping])

    run(test)


def test_a_model_can_be_added_cold(run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its configuration is checked, nothing is built; the first request has it loaded."""
    from tests.helpers.stand_ins import plan_of
    from tokenpool.serve.launch.model_plan import ModelPlan
    from tokenpool.serve.pool import pool_operator

    checked: list[str] = []
    monkeypatch.setattr(pool_operator, "plan_added", lambda spec, *_: plan_of(spec.name, **ON_DEMAND))

    async def test(w: World) -> None:
        await w.pool.start()
        monkeypatch.setattr(ModelPlan, "engine_config", lambda self: checked.append(self.spec.name))
        await w.operator.add_model(plan_of("d", **ON_DEMAND).spec)
        assert w.states["d"] == "cold" and checked == ["d"] and w.loads == []
        assert await Asked(w, "d").status() == 200

    run(test)


@pytest.mark.parametrize("seed", range(12))
def test_no_request_is_lost_or_answered_twice(run, seed: int) -> None:
    """Through loads, unloads, failures, deaths of hosts, clients that go; at the end nothing of any model is left."""
    rng = random.Random(seed)
    max_loaded, with_tenants = rng.choice([1, 2, None]), rng.random() < 0.5

    async def test(w: World) -> None:
        await w.pool.start()
        asked: list[Asked] = []
        for number in range(150):
            tenant = rng.choice(["x", "y"]) if with_tenants else ""
            asked.append(Asked(w, rng.choice("abc"), number, tenant, steps=rng.choice([1, 2, 10])))
            await asyncio.sleep(rng.choice([0, 0, 0, 0.001, 0.01, 0.05]))
            if rng.random() < 0.1:
                rng.choice(asked).gone.set()
            if rng.random() < 0.03:
                w.host.die()
            if rng.random() < 0.05:
                w.broken ^= {rng.choice("abc")}
            if max_loaded:
                assert len(w.host.models) <= max_loaded
            assert all(count == 1 for count in Counter(w.host.models).values())
        w.broken.clear()
        async with asyncio.timeout(60):
            await asyncio.gather(*(one.task for one in asked))
        for one in asked:
            assert len(one.statuses) == 1 or (not one.statuses and one.gone.is_set()), one.number
            if one.statuses == [200]:
                assert json.loads(one.text) == {"id": f"{one.model}-{one.number}", "model": one.model}
            elif one.statuses:
                assert one.statuses == [503] and ("no file" in one.text or "unavailable" in one.text), one.text
        await w.until(lambda: set(w.states.values()) == {Life.COLD})
        assert w.host.models == []
        for model in w.pool.models.values():
            assert (model.client, model.host_pid, len(model.app.hold), model.app.inflight) == (None, 0, 0, 0)
            assert model.app.gate.unanswered == 0 and not model.app.hold.counts

    run(test, unload_after_s=0.03, max_loaded=max_loaded)
