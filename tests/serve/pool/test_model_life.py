# SPDX-License-Identifier: Apache-2.0
"""One bad model is one bad model: whatever happens to it, the others serve, and it can be seen and removed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tokenpool.errors import ConfigError, HostError, ModelBusyError, ModelUnavailableError

if TYPE_CHECKING:
    from tests.helpers.stand_ins import World

pytestmark = pytest.mark.vllm

Test = Callable[["World"], Coroutine[Any, Any, None]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Test], None]:
    """Run a test on an event loop of its own, with a pool of the models a, b and c."""
    from tests.helpers.stand_ins import stand_in_pool

    async def with_pool(test: Test) -> None:
        async with stand_in_pool(monkeypatch, tmp_path) as world:
            await test(world)

    return lambda test: asyncio.run(with_pool(test))


ALL_SERVE = {"a": "ready", "b": "ready", "c": "ready"}
A_FAILED = ALL_SERVE | {"a": "failed"}


def test_at_the_start_the_others_serve(run) -> None:
    """A model that cannot be loaded is failed, with its reason and a 503; the pool is ready, and it is tried again."""

    async def test(w: World) -> None:
        w.broken.add("a")
        await w.pool.start()
        assert w.states == A_FAILED
        assert w.pool.ready
        model = w.pool.models["a"].app
        assert model.reason == "model 'a': no file"
        refusal = model.refusal()
        assert refusal.status_code == 503 and int(refusal.headers["retry-after"]) >= 1
        assert b"no file" in refusal.body
        state = await w.operator.state()
        assert state["models"]["a"]["reason"] == model.reason and state["models"]["b"]["reason"] is None
        w.broken.clear()
        await w.until(lambda: w.states == ALL_SERVE)
        assert model.reason == "" and w.host.models == ["b", "c", "a"]

    run(test)


def test_a_pool_whose_every_model_fails_does_not_start(run) -> None:
    """The start raises the reason of the first one and leaves no host behind."""

    async def test(w: World) -> None:
        w.broken |= {"a", "b", "c"}
        with pytest.raises(ConfigError, match="model 'a': no file"):
            await w.pool.start()
        assert all(host.ended for host in w.hosts)

    run(test)


def test_after_the_death_of_a_host_the_others_serve(run) -> None:
    """Only what cannot be loaded again stays away; requests that wait for it wait while attempts go on, then get on."""

    async def test(w: World) -> None:
        await w.pool.start()
        w.client("a").waiting.append("stream")
        w.broken.add("a")
        w.host.die()
        await w.until(lambda: len(w.hosts) == 2 and w.states == A_FAILED)
        await w.until(lambda: w.loads.count("a") >= 4)
        assert len(w.hosts) == 2 and w.pool.hosts.num_restarts == 1
        assert w.client("a").waiting == ["stream"]
        w.broken.clear()
        await w.until(lambda: w.states == ALL_SERVE)

    run(test)


def test_a_host_that_is_back_loads_first_what_is_waited_for(run) -> None:
    """The models with the most requests, then the others in their order; what a host died of still comes last."""

    async def test(w: World) -> None:
        await w.pool.start()
        w.client("b").waiting.append("stream")
        w.client("c").waiting += ["stream", "another"]
        w.host.die()
        await w.until(lambda: len(w.hosts) == 2 and w.states == ALL_SERVE)
        assert w.host.models == ["c", "b", "a"]
        w.pool.models["c"].host_deaths = 1
        w.host.die()
        await w.until(lambda: len(w.hosts) == 3 and w.states == ALL_SERVE)
        assert w.host.models == ["b", "a", "c"]

    run(test)


def test_a_model_that_hosts_die_of_is_given_up(run) -> None:
    """The others are loaded before it; after three deaths in a row it is failed, and what waits for it is told why."""

    async def test(w: World) -> None:
        await w.pool.start()
        w.client("a").waiting.append("stream")
        w.deadly.add("a")
        w.host.die()
        await w.until(lambda: w.states == A_FAILED)
        assert len(w.hosts) == 5  # the first, three that died of it, and the one that serves
        assert w.host.models == ["b", "c"] and w.loads[-2:] == ["b", "c"]
        assert "3 engine hosts ended" in w.client("a").told["stream"]
        w.host.die()
        await w.until(lambda: len(w.hosts) == 6 and w.states == A_FAILED)
        await w.operator.remove_model("a", 0.0)
        assert list(w.states) == ["b", "c"]

    run(test)


def test_a_model_that_hosts_die_of_at_the_start_is_given_up(run) -> None:
    """The pool starts without it; one that has no other model does not start."""

    async def test(w: World) -> None:
        w.deadly.add("a")
        await w.pool.start()
        assert w.states == A_FAILED and w.pool.ready
        assert w.pool.hosts.num_restarts == 3

    async def all_deadly(w: World) -> None:
        w.deadly |= {"a", "b", "c"}
        with pytest.raises(HostError, match="ended while it loaded"):
            await w.pool.start()

    run(test)
    run(all_deadly)


def test_a_model_is_loaded_once_by_a_host(run) -> None:
    """An attempt that comes due while a new host loads all models takes its turn, and neither is made again."""

    async def test(w: World) -> None:
        w.broken.add("c")
        await w.pool.start()
        w.gates["a"] = asyncio.Event()
        w.host.die()
        await w.until(lambda: w.loads.count("a") == 2)
        w.broken.clear()
        await w.until(lambda: [model.name for model in w.pool.models.due()] == ["c"])
        await w.until(lambda: w.pool.models.changing._waiters)  # type: ignore[attr-defined]
        w.gates["a"].set()
        await w.until(lambda: w.states == ALL_SERVE)
        await w.until(lambda: not w.pool.models.changing.locked())
        assert w.states == ALL_SERVE and sorted(w.host.models) == ["a", "b", "c"]

    run(test)


def test_a_failed_model_can_be_removed_and_replaced(run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its requests end with the reason; a model under its name begins a life of its own."""
    from tests.helpers.stand_ins import plan_of
    from tokenpool.serve.pool import pool_operator

    monkeypatch.setattr(pool_operator, "plan_added", lambda spec, others, for_tenants: plan_of(spec.name))

    async def test(w: World) -> None:
        await w.pool.start()
        client = w.client("a")
        client.waiting.append("stream")
        w.broken.add("a")
        w.host.die()
        await w.until(lambda: w.states == A_FAILED)
        await w.operator.remove_model("a", 60.0)
        assert "no file" in client.told["stream"] and client.closed
        assert list(w.states) == ["b", "c"]
        w.broken.clear()
        await w.operator.add_model(plan_of("a").spec)
        assert w.states == ALL_SERVE and w.pool.models["a"].app.reason == ""

    run(test)


def test_the_removal_of_a_model_that_cannot_be_added_finds_none(run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever adds it hears why; whoever removes it meanwhile hears that it is not there, and nothing is left of it."""
    from tests.helpers.stand_ins import plan_of
    from tokenpool.serve.pool import pool_operator

    monkeypatch.setattr(pool_operator, "plan_added", lambda spec, others, for_tenants: plan_of(spec.name))

    async def test(w: World) -> None:
        await w.pool.start()
        w.broken.add("d")
        w.gates["d"] = asyncio.Event()
        adding = asyncio.create_task(w.operator.add_model(plan_of("d").spec))
        await w.until(lambda: "d" in w.loads)
        removing = asyncio.create_task(w.operator.remove_model("d", 0.0))
        await w.until(lambda: w.states["d"] == "draining")
        w.gates["d"].set()
        with pytest.raises(ConfigError, match="no file"):
            await adding
        with pytest.raises(KeyError):
            await removing
        assert w.states == ALL_SERVE

    run(test)


def test_a_model_can_be_removed_while_it_loads(run) -> None:
    """The removal ends once the attempt has; requests that came meanwhile were refused, and nothing is left of it."""

    async def test(w: World) -> None:
        w.gates["b"] = asyncio.Event()
        starting = asyncio.create_task(w.pool.start())
        await w.until(lambda: "b" in w.loads)
        removals = [asyncio.create_task(w.operator.remove_model(name, 0.0)) for name in "bc"]
        await w.until(lambda: w.states == {"a": "ready", "b": "draining", "c": "draining"})
        w.gates["b"].set()
        await asyncio.gather(starting, *removals)
        assert w.states == {"a": "ready"} and w.host.models == ["a"] and "c" not in w.loads

    run(test)


def test_a_model_can_be_removed_while_there_is_no_host(run) -> None:
    """It does not come back with the next one."""

    async def test(w: World) -> None:
        await w.pool.start()
        w.hold.clear()
        w.host.die()
        await w.until(lambda: "unavailable" in w.states.values())
        removing = asyncio.create_task(w.operator.remove_model("c", 0.0))
        await w.until(lambda: w.states.get("c") in ("draining", None))
        w.hold.set()
        await removing
        await w.until(lambda: w.states == {"a": "ready", "b": "ready"})
        assert w.host.models == ["a", "b"]

    run(test)


def test_a_removal_that_fails_leaves_no_model_draining(run) -> None:
    """The model is failed, says why, and is removed at the next attempt; a model that is busy for a moment is asked
    again, by its class and not by its words.
    """

    async def test(w: World) -> None:
        await w.pool.start()
        w.unloads += [ModelBusyError("call it what you like")]
        await w.operator.remove_model("b", 0.0)
        w.unloads += [RuntimeError("no such group"), HostError("still has requests")]
        with pytest.raises(HostError, match="no such group"):
            await w.operator.remove_model("a", 0.0)
        assert w.states["a"] == "failed" and "no such group" in w.pool.models["a"].app.reason
        await w.until(lambda: list(w.states) == ["c"])
        assert w.host.models == ["c"]

    run(test)


def test_two_cannot_remove_a_model(run) -> None:
    """The second one is told to come back; an unknown name is a KeyError."""

    async def test(w: World) -> None:
        await w.pool.start()
        w.gates["a"] = asyncio.Event()
        w.host.die()
        await w.until(lambda: w.loads.count("a") == 2)
        first = asyncio.create_task(w.operator.remove_model("a", 0.0))
        await w.until(lambda: w.states["a"] == "draining")
        with pytest.raises(ModelUnavailableError):
            await w.operator.remove_model("a", 0.0)
        w.gates["a"].set()
        await first
        with pytest.raises(KeyError):
            await w.operator.remove_model("a", 0.0)

    run(test)


def test_a_client_that_died_is_no_resident_model(run) -> None:
    """While it is not there its model is failed, whatever happens to the host; afterwards it serves again."""

    async def test(w: World) -> None:
        await w.pool.start()
        w.client("a").on_fault("the client died")
        assert w.states == A_FAILED and w.pool.ready
        w.host.die()
        await w.until(lambda: len(w.hosts) == 2 and w.states["c"] == "ready")
        assert w.states == A_FAILED and w.pool.models["a"].app.reason == "the client died"
        w.client("a").on_fault("")
        assert w.states == ALL_SERVE

    run(test)


# --- several frontends, and clusters ------------------------------------------------------------------------


def test_frontends_follow_the_states_of_the_supervisor(tmp_path: Path) -> None:
    """A failed model and its reason are the same at all; what waits at a frontend ends once the model is given up."""
    from tests.helpers.stand_ins import StandInClient, plan_of
    from tokenpool.config import PoolConfig
    from tokenpool.serve.frontends.frontend_main import followed_pool
    from tokenpool.serve.frontends.frontend_view import FrontendSettings, ModelStanding, SupervisorView
    from tokenpool.serve.gateway.endpoints import build_outer_app

    plan = plan_of("a")
    config = PoolConfig(models=(plan.spec,), device_memory=1 << 30, host_memory=1 << 30, frontends=2)

    def view(**standing: Any) -> SupervisorView:
        return SupervisorView(1, None, 0, True, True, {"a": ModelStanding(plan, drain_s=0.0, **standing)}, {})

    async def test() -> None:
        pool = followed_pool(FrontendSettings(0, config, [plan], str(tmp_path), b""), build_outer_app())
        client = StandInClient(plan)
        pool.hosts.apply(view(state="loading"))
        model = pool.models["a"]
        model.client = client
        client.waiting.append("stream")
        pool.hosts.apply(view(state="failed", reason="no file"))
        assert (model.app.state, model.app.reason, client.waiting) == ("failed", "no file", ["stream"])
        pool.hosts.apply(view(state="unavailable"))
        assert (model.app.state, model.app.reason, client.waiting) == ("unavailable", "", ["stream"])
        pool.hosts.apply(view(state="draining", reason="no file", is_given_up=True))
        async with asyncio.timeout(30):
            while not client.told:
                await asyncio.sleep(0.001)
        assert model.app.state == "draining" and "no file" in client.told["stream"]
        pool.hosts.freeze()

    asyncio.run(test())


def test_a_supervisor_tells_frontends_what_is_given_up() -> None:
    """A failed model is not given up while it is tried again, and is once it is being removed."""
    from tests.helpers.stand_ins import models_of
    from tokenpool.serve.frontends.shared_hosts import standing_of

    async def test() -> None:
        model = models_of("a")["a"]
        model.fail(ConfigError("no file"))
        told = standing_of(model)
        assert (told.state, told.reason, told.is_given_up) == ("failed", "no file", False)
        model.is_leaving = True
        assert standing_of(model).is_given_up

    asyncio.run(test())


def test_a_model_that_no_host_of_a_cluster_takes_is_failed() -> None:
    """It has the reason of the hosts, in the same words as on one host, and serves once one takes it."""
    from types import SimpleNamespace

    from tests.helpers.stand_ins import StandInClient, models_of
    from tokenpool.serve.clustered.ray_hosts import RayHosts

    async def test() -> None:
        models = models_of("a")
        app, session, make_follower = models["a"].app, SimpleNamespace(look_at_head=None), SimpleNamespace()
        hosts = RayHosts(models, session, make_follower)  # type: ignore[arg-type]
        follower: Any = SimpleNamespace(
            plan=models["a"].plan, is_served=False, error=HostError("host-0: no file"), client=None
        )
        hosts.show(follower)
        assert (app.state, app.reason, models.settled) == ("failed", "host-0: no file", False)
        follower.is_served, follower.error, follower.client = True, None, StandInClient(models["a"].plan)
        hosts.show(follower)
        assert (app.state, app.reason, models.settled) == ("ready", "", True)
        follower.is_served = False
        hosts.show(follower)
        assert app.state == "unavailable"

    asyncio.run(test())


def test_a_client_that_died_while_its_host_was_silent_is_not_served_when_that_answers() -> None:
    """The host's pulse says nothing of the client: the model is `failed`, with its reason, until that is back."""
    from tests.helpers.stand_ins import models_of

    async def test() -> None:
        model = models_of("chat")["chat"]
        model.served()
        model.app.state = "unavailable"
        model.note_client_fault("its client died")
        model.restore()
        assert ("failed", "its client died") == (model.app.state, model.app.reason)
        model.note_client_fault("")
        assert ("ready", "") == (model.app.state, model.app.reason)

    asyncio.run(test())
