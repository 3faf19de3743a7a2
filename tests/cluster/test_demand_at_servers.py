# SPDX-License-Identifier: Apache-2.0
"""Models on demand at two servers of a cluster: the real logic of servers and controller, without Ray and engines."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import pytest

from tests.helpers.stand_ins import plan_of
from tests.serve.pool.test_demand import Asked
from tests.serve.pool.test_other_servers import Server, two_servers, until
from tokenpool.cluster import seats
from tokenpool.cluster.deciding import lives
from tokenpool.errors import ConfigError
from tokenpool.serve.launch.model_plan import ModelPlan

pytestmark = pytest.mark.vllm

Test = Callable[[Server, Server], Awaitable[None]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Run a test with two servers of a pool of the models a, b and c, which are loaded on demand."""
    monkeypatch.setattr(lives, "PATIENCE_S", 0.05)
    monkeypatch.setattr(lives, "BAR_S", (0.05,))
    monkeypatch.setattr(seats, "BAR_S", (0.05,))
    monkeypatch.setattr(ModelPlan, "engine_config", lambda plan: SimpleNamespace())

    async def main(test: Test, max_loaded: int | None, **settings: Any) -> None:
        plans = [plan_of(name, **{"load": "on_demand"} | settings) for name in "abc"]
        async with two_servers(monkeypatch, plans, max_loaded) as (one, two):
            await test(one, two)

    return lambda test, max_loaded=None, **settings: asyncio.run(main(test, max_loaded, **settings))


def ask(server: Server, model: str, number: int = 0, **fields: Any) -> Asked:
    world: Any = SimpleNamespace(pool=SimpleNamespace(router=server.models._router))
    return Asked(world, model, number, **fields)


def builds(server: Server) -> list[str]:
    """Models that hosts have built for these servers, in that order."""
    return [d["model"] for d in server.cluster.control.log.last() if d["action"] == "model_added"]


def test_one_load_serves_who_waits_at_all_servers(run) -> None:
    """Nothing is loaded or configured before; then both serve it, and what was held is answered."""

    async def test(one: Server, two: Server) -> None:
        assert one.states() == two.states() == dict.fromkeys("abc", "cold") and not one.hosts.followers
        assert one.cluster.control.models["a"].payload is None
        asked = [ask(server, "b", number) for number, server in enumerate((one, two, two, one))]
        assert [await each.status() for each in asked] == [200] * 4
        assert builds(one) == ["b"] and one.cluster.control.models["a"].payload is None
        await until(lambda: one.states() == two.states() == {"a": "cold", "b": "ready", "c": "cold"})

    run(test)


def test_a_server_without_a_request_serves_it_too(run) -> None:
    async def test(one: Server, two: Server) -> None:
        assert await ask(one, "a").status() == 200
        await until(lambda: two.states()["a"] == "ready")
        assert await ask(two, "a", 1).status() == 200 and builds(one) == ["a"]

    run(test)


def test_what_is_idle_at_all_servers_leaves_nothing_behind(run) -> None:
    """Not while one of them has a request; then engine, client and app go, and the next request has it loaded."""

    async def test(one: Server, two: Server) -> None:
        long = ask(two, "a", steps=150)
        assert await ask(one, "a", 1).status() == 200
        await asyncio.sleep(0.1)
        assert one.states()["a"] == "ready" and not long.task.done()
        client: Any = one.models["a"].client
        assert await long.status() == 200
        await until(lambda: one.states()["a"] == two.states()["a"] == "cold")
        assert client.closed and one.cluster.rig.loaded() == {"h0": []}
        for server in (one, two):
            model = server.models["a"]
            assert (model.client, server.hosts.followers, "StandIn" in repr(model.app.app)) == (None, {}, False)
        assert await ask(two, "a", 2).status() == 200 and builds(one) == ["a", "a"]

    run(test, unload_after_s=0.03)


def test_two_servers_that_want_different_models_take_turns(run) -> None:
    """`max_loaded: 1`: whatever each always has running, the other's model has its turn, and nothing is lost."""

    async def test(one: Server, two: Server) -> None:
        async def busy(server: Server, name: str) -> list[int]:
            return [await ask(server, name, number, steps=10).status() for number in range(8)]

        answers = await asyncio.gather(*(busy(s, n) for s, n in ((one, "a"), (two, "b"), (one, "a"), (two, "b"))))
        assert answers == [[200] * 8] * 4
        assert {"a", "b"} == set(builds(one)) and len(builds(one)) <= 16

    run(test, max_loaded=1)


def test_a_failed_load_is_told_to_all_at_all_servers(run) -> None:
    async def test(one: Server, two: Server) -> None:
        host = one.cluster.rig.hosts["h0"]
        host.refuses["a"] = ConfigError("no file")
        asked = [ask(server, "a", number) for number, server in enumerate((one, two, two))]
        assert [await each.status() for each in asked] == [503] * 3 and all("no file" in each.text for each in asked)
        await until(lambda: one.states()["a"] == two.states()["a"] == "cold")
        host.refuses.clear()
        assert await ask(two, "a", 9).status() == 200

    run(test)


def test_what_cannot_be_configured_is_told_by_its_first_request(run, monkeypatch) -> None:
    def broken(plan: ModelPlan) -> Any:
        raise ConfigError("is no flag", key="--x")

    async def test(one: Server, two: Server) -> None:
        for model in one.models.values():
            model.plan.checked = None
        monkeypatch.setattr(ModelPlan, "engine_config", broken)
        asked = ask(one, "a")
        assert await asked.status() == 503 and "--x: is no flag" in asked.text
        assert builds(one) == []

    run(test)


def test_who_goes_away_leaves_nothing_loading(run) -> None:
    """A client that goes before its model is loaded is forgotten, and the model is cold at that server again."""

    async def test(one: Server, two: Server) -> None:
        one.cluster.rig.hosts["h0"].pages = 0
        one.cluster.control.host_lost("h0", "away")
        asked = ask(one, "a")
        await until(lambda: one.states()["a"] == "loading")
        asked.gone.set()
        await asked.task
        await until(lambda: not len(one.models["a"].app.hold) and asked.statuses == [])

    run(test)


def test_a_model_on_demand_is_added_and_removed_at_all_servers(run) -> None:
    async def test(one: Server, two: Server) -> None:
        await one.operator.add_model(plan_of("d", load="on_demand").spec)
        await until(lambda: two.states().get("d") == "cold")
        assert builds(one) == [] and await ask(two, "d").status() == 200
        await two.operator.remove_model("d", 1.0)
        await until(lambda: "d" not in one.states())
        assert one.cluster.rig.loaded() == {"h0": []}
        await two.operator.remove_model("c", 1.0)  # one that is cold
        await until(lambda: "c" not in one.states() and "c" not in one.hosts.versions)

    run(test)


@pytest.mark.parametrize("seed", range(10))
def test_no_request_is_lost_or_answered_twice(run, seed: int) -> None:
    """Through loads, unloads, failures, deaths of the host and of controllers, and clients that go; nothing is left."""
    rng = random.Random(seed)
    max_loaded = rng.choice([1, 2, None])

    async def test(one: Server, two: Server) -> None:
        rig, asked = one.cluster.rig, []
        for number in range(120):
            steps = rng.choice([1, 2, 10])
            asked.append(ask(rng.choice([one, two]), rng.choice("abc"), number, steps=steps))
            await asyncio.sleep(rng.choice([0, 0, 0, 0.001, 0.01, 0.05]))
            if rng.random() < 0.1:
                rng.choice(asked).gone.set()
            if rng.random() < 0.03:
                rig.hosts["h0"].start()
            if rng.random() < 0.03:
                rig.replace_controller(rng.choice([rig.control.snapshot(), {}]), f"c{number}")
            if rng.random() < 0.05:
                rig.hosts["h0"].refuses = {rng.choice("abc"): ConfigError("no file")} if rng.random() < 0.5 else {}
        rig.hosts["h0"].refuses = {}
        async with asyncio.timeout(60):
            await asyncio.gather(*(each.task for each in asked))
        for each in asked:
            assert len(each.statuses) == 1 or (not each.statuses and each.gone.is_set()), each.number
            if each.statuses == [200]:
                assert json.loads(each.text) == {"id": f"{each.model}-{each.number}", "model": each.model}
            elif each.statuses:
                assert each.statuses == [503] and ("no file" in each.text or "unavailable" in each.text), each.text
        await until(lambda: {*one.states().values(), *two.states().values()} == {"cold"})
        assert rig.loaded() == {"h0": []}
        for server in (one, two):
            assert server.hosts.followers == {}
            for model in server.models.values():
                assert (model.client, len(model.app.hold), model.app.inflight) == (None, 0, 0)
                assert model.app.gate.unanswered == 0 and not model.app.hold.counts

    run(test, max_loaded=max_loaded, unload_after_s=0.03)
