# SPDX-License-Identifier: Apache-2.0
"""What a server of a cluster does about what others of the same pool do: the real logic of both, without Ray."""

from __future__ import annotations

import asyncio
import math
import os
import pickle
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from tests.cluster.deciding.test_reconcile import MemoryHost, Rig
from tests.helpers.stand_ins import StandInClient, models_of, plan_of
from tokenpool.cluster.values import Deployment, Peer
from tokenpool.errors import ConfigError, HostError, PoolError
from tokenpool.model_life import Life
from tokenpool.policy.leases import Lease, LeaseBook
from tokenpool.serve.clustered import cluster_models, ray_hosts, seat_follower
from tokenpool.serve.clustered.lease_keeper import LeaseKeeper
from tokenpool.serve.clustered.ray_hosts import RayHosts
from tokenpool.serve.clustered.seat_follower import Key, SeatFollower, deployment_of, name_of
from tokenpool.serve.launch.model_plan import ModelPlan
from tokenpool.serve.pool import pool_operator
from tokenpool.serve.pool.pool_operator import PoolOperator

pytestmark = pytest.mark.vllm

_LIMIT_S = 20.0


class Refused(Exception):
    """As Ray wraps what a call raises."""

    def __init__(self, cause: Exception) -> None:
        self.cause = cause


class Cluster:
    """A controller and one host in memory; time passes by periods."""

    def __init__(self, models: Sequence[Deployment] = (), max_loaded: int | None = None) -> None:
        self.rig = Rig(MemoryHost("h0"), models=models, max_loaded=max_loaded)
        self.leases = LeaseBook({"t": 4})

    @property
    def control(self) -> Any:
        return self.rig.control

    @property
    def host(self) -> Any:
        """As a stand-in client looks at it."""
        return SimpleNamespace(models=self.rig.hosts["h0"].models, ended=False)

    async def run(self) -> None:
        while True:
            self.rig.now_s += 0.002
            self.rig.hosts["h0"].labels = frozenset()
            self.control.host_reported(self.rig.hosts["h0"].report(self.rig.now_s), self.rig.now_s)
            for order in self.control.tick(self.rig.now_s):
                self.rig.carry_out(order)
            self.control.check()
            await asyncio.sleep(0.002)

    async def tell(self, method: str, *args: Any) -> Any:
        try:
            return await self._answer(method, *args)
        except PoolError as error:
            raise Refused(error) from error

    async def actor(self, name: str) -> Any:
        """A host's actor, as a server finds it."""
        raise ValueError(name)

    async def _answer(self, method: str, *args: Any) -> Any:
        control, now_s = self.control, self.rig.now_s
        answers: dict[str, Callable[..., Any]] = {
            "join": lambda peer: control.join(peer, now_s),
            "beat": lambda server, claims: (
                self.leases.answer(server, claims) if control.peers.beat(server, now_s) else None
            ),
            "deploy": lambda server, deployment: control.deploy(deployment),
            "uses": lambda server, uses: control.tell(server, uses, now_s),
            "equip": lambda server, *told: control.equip(*told, now_s),
            "withdraw": lambda server, name: control.withdraw(name),
            "retire": lambda server, name, drain_s: control.retire(name, drain_s, now_s),
            "drained": lambda server, name: control.models.drained(name, server),
            "joined": control.seats.joined,
            "left": control.seats.left,
            "deployments": lambda names: [control.models[name] for name in names if name in control.models],
        }
        if method == "watch":
            server, epoch, version = args
            while control.peers.beat(server, self.rig.now_s):
                if control.is_ending or (control.is_settled and (control.epoch, control.version) != (epoch, version)):
                    return control.view()
                await asyncio.sleep(0.001)
                if control is not self.control:
                    raise ConnectionError("the controller has died")
            return None
        if method == "all_joined":
            while not control.seats.are_joined(control.peers.names, args[1]):
                await asyncio.sleep(0.001)
            return True
        return answers[method](*args)


class Follower(SeatFollower):
    """Joins every engine at once, with a client that holds what a test puts into it."""

    def __init__(self, plan: ModelPlan, version: int, tell: Any, on_change: Any) -> None:
        super().__init__(plan, version, tell, on_change)
        self.joined: list[str] = []
        self.num_attached = 0
        self.world: Any = None

    @property
    def hosts(self) -> list[str]:
        return self.joined

    async def _connect(self, key: Key, machine: str) -> None:
        self.num_attached += 1
        self.joined.append(name_of(key))
        self.client = self.client or StandInClient(self.plan, self.world)

    async def _disconnect(self, key: Key) -> None:
        assert not self.client.waiting, "it was left with a request"
        self.joined = [name for name in self.joined if name != name_of(key)]

    async def close(self) -> None:
        await super().close()
        if self.client is not None:
            await self.client.close()

    def _lose(self, key: Key, blame: bool = True) -> None:
        self.joined = [name for name in self.joined if name != name_of(key)]


class Server:
    """One server: its models, hosts and operator."""

    def __init__(self, name: str, cluster: Cluster, plans: Sequence[ModelPlan] = ()) -> None:
        self.name = name
        self.models = models_of("x")
        self.models.remove("x")
        session: Any = SimpleNamespace(
            name=name, has_started=False, tell=cluster.tell, peer=lambda num: Peer(name, 64, num), leave=self._leave,
            look_at_head=lambda limit_s: None, host=cluster.actor,
        )  # fmt: skip
        self.cluster = cluster
        for plan in plans:
            self.models.add(plan)
        self.hosts = RayHosts(self.models, session, self._follow, {plan.spec.name: 1 for plan in plans})
        pool: Any = SimpleNamespace(
            models=self.models, works={}, hosts=self.hosts, stopping=False, config=SimpleNamespace(tenants=())
        )
        self.operator = PoolOperator(pool)

    async def _leave(self) -> None:
        self.cluster.control.leave(self.name, self.cluster.rig.now_s)

    def _follow(self, model: Any, version: int, hosts: RayHosts) -> Follower:
        follower = Follower(model.plan, version, hosts.answer, hosts.show)
        follower.world = self.cluster
        return follower

    def follower(self, name: str) -> Follower:
        found: Any = self.hosts.followers[name]
        return found

    async def add(self, name: str) -> None:
        await self.operator.add_model(plan_of(name).spec)

    def states(self) -> dict[str, str]:
        return {name: model.app.state for name, model in self.models.items()}


async def until(look: Callable[[], object]) -> None:
    async with asyncio.timeout(_LIMIT_S):
        while not look():
            await asyncio.sleep(0.002)


@asynccontextmanager
async def two_servers(
    patch: pytest.MonkeyPatch, plans: Sequence[ModelPlan] = (), max_loaded: int | None = None
) -> AsyncIterator[tuple[Server, Server]]:
    """Both have joined a pool with these models, which are loaded on demand."""
    patch.setattr(ray_hosts, "RETRY_S", 0.005)
    patch.setattr(ray_hosts, "_BEAT_S", 0.005)
    patch.setattr(seat_follower, "RETRY_S", 0.005)
    patch.setattr(pool_operator, "plan_added", lambda spec, *_: plan_of(spec.name, load=spec.load))
    patch.setattr(pool_operator, "forget_models", lambda names: None)
    patch.setattr(cluster_models, "forget_models", lambda names: None)
    patch.setattr(cluster_models, "RETRY_S", 0.005)
    patch.setattr(cluster_models, "_USES_PERIOD_S", 0.005)
    patch.setattr(cluster_models, "_REST_PERIOD_S", 0.002)
    patch.setattr(cluster_models, "_GAP_S", 0.002)
    patch.setattr(ModelPlan, "for_host", lambda plan, config: SimpleNamespace())
    rules = {plan.spec.name: models_of("x")._config.loading_of(plan.spec) for plan in plans}
    models = [deployment_of(plan, 1, rules[plan.spec.name], is_bare=True) for plan in plans]
    cluster = Cluster(models, max_loaded)
    running = asyncio.create_task(cluster.run())
    servers = Server("one", cluster, plans), Server("two", cluster, plans)
    try:
        for server in servers:
            await server.hosts.start()
        await until(lambda: all(server.hosts.view is not None for server in servers))
        yield servers
    finally:
        for server in servers:
            server.hosts.watch.stopping = True
            await server.hosts.stop()
        running.cancel()


def run(patch: pytest.MonkeyPatch, test: Callable[[Server, Server], Awaitable[None]]) -> None:
    async def main() -> None:
        async with two_servers(patch) as (one, two):
            await test(one, two)

    asyncio.run(main())


def test_a_model_that_one_adds_is_served_by_all_when_that_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other one takes in the plan that comes with it."""

    async def test(one: Server, two: Server) -> None:
        await one.add("a")
        assert (one.states(), two.states()) == ({"a": "ready"}, {"a": "ready"})
        assert two.models["a"].plan.spec == plan_of("a").spec
        assert pickle.loads(one.cluster.control.models["a"].plan).checked is None

    run(monkeypatch, test)


def test_a_model_that_one_removes_lets_the_requests_of_all_finish(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes no new ones meanwhile, is unloaded when the last one has ended, and then nobody knows it."""

    async def test(one: Server, two: Server) -> None:
        await one.add("a")
        client: Any = two.models["a"].client
        client.waiting.append("request")

        async def drain(limit_s: float) -> bool:
            assert limit_s == 30.0
            await until(lambda: not client.waiting)
            return True

        client.drain = drain
        removing = asyncio.create_task(one.operator.remove_model("a", 30.0))
        await until(lambda: two.states() == {"a": Life.DRAINING})
        assert one.cluster.rig.loaded() == {"h0": ["a"]} and not removing.done()
        client.waiting.clear()
        await removing
        await until(lambda: two.states() == {})
        assert (one.states(), one.cluster.rig.loaded()) == ({}, {"h0": []})
        assert client.closed or two.models.get("a") is None
        await two.add("a")
        assert (one.states(), two.states()) == ({"a": "ready"}, {"a": "ready"})

    run(monkeypatch, test)


def test_a_server_that_has_finished_waits_for_the_drain_of_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its limit for the hosts begins when that of the drain has passed."""

    async def test(one: Server, two: Server) -> None:
        await one.add("a")
        client: Any = two.models["a"].client
        client.waiting.append("request")

        async def drain(limit_s: float) -> bool:
            await until(lambda: not client.waiting)
            return True

        client.drain = drain
        removing = asyncio.create_task(one.operator.remove_model("a", 600.0))
        await until(lambda: two.states() == {"a": Life.DRAINING})
        await asyncio.wait({removing}, timeout=0.5)  # ten times the limit for the hosts
        client.waiting.clear()
        await removing
        assert one.states() == {}

    monkeypatch.setattr(ray_hosts, "_UNLOAD_LIMIT_S", 0.05)
    run(monkeypatch, test)


def test_of_two_that_add_one_name_one_is_refused_and_serves_it_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(one: Server, two: Server) -> None:
        adding = [asyncio.create_task(server.add("a")) for server in (one, two)]
        answers = await asyncio.gather(*adding, return_exceptions=True)
        assert sorted(isinstance(answer, ConfigError) for answer in answers) == [False, True], answers
        await until(lambda: one.states() == two.states() == {"a": "ready"})
        assert one.cluster.rig.loaded() == {"h0": ["a"]}

    run(monkeypatch, test)


def test_a_model_that_could_not_be_withdrawn_stops_no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """The controller goes away while one is added: it is there when that is back, as if another server had added it."""
    monkeypatch.setattr(cluster_models, "_RETRY_CALLS_S", 0.02)

    async def test(one: Server, two: Server) -> None:
        answer = one.cluster._answer

        async def away(method: str, *args: Any) -> Any:
            if method in ("all_joined", "withdraw"):
                raise ConnectionError("the controller is away")
            return await answer(method, *args)

        one.cluster._answer = away  # type: ignore[method-assign]
        with pytest.raises(HostError, match="the controller does not answer"):
            await one.add("a")
        one.cluster._answer = answer  # type: ignore[method-assign]
        await two.add("b")
        await until(lambda: one.states() == two.states() == {"a": "ready", "b": "ready"})
        await one.operator.remove_model("a", 0.0)
        await until(lambda: one.states() == two.states() == {"b": "ready"})

    run(monkeypatch, test)


def test_a_server_that_was_given_up_is_attached_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once; one that a new controller knows is not."""

    async def test(one: Server, two: Server) -> None:
        await one.add("a")
        control = one.cluster.control
        control.leave("two", one.cluster.rig.now_s, "it says nothing any more")
        await until(lambda: "two" in control.peers.names and two.follower("a").num_attached == 2)
        await until(lambda: control.seats.are_joined({"one", "two"}, "a"))
        assert one.follower("a").num_attached == 1
        control.peers._known_until_s = math.inf
        control.peers._known["one"] = control.peers._peers.pop("one")  # as a controller that has just been started
        await until(lambda: "one" in control.peers.names)
        assert one.follower("a").num_attached == 1

    run(monkeypatch, test)


def test_servers_end_with_the_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the signal that a person would send."""
    sent: list[tuple[int, int]] = []

    async def test(one: Server, two: Server) -> None:
        monkeypatch.setattr(os, "kill", lambda pid, number: sent.append((pid, number)))
        one.cluster.control.end()
        await until(lambda: len(sent) >= 2)
        for server in (one, two):
            server.hosts.watch.stopping = True
        assert set(sent) == {(os.getpid(), signal.SIGTERM)}

    run(monkeypatch, test)


def test_limits_are_split_and_follow_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two servers never hold more than the whole; the part of one that left goes to the other."""

    async def test(one: Server, two: Server) -> None:
        asked, kept = {"one": 0, "two": 0}, {"one": Lease(), "two": Lease()}
        for server in (one, two):
            name = server.name

            def told(name: str = name) -> dict[str, Any]:
                usage = {"m": {"requests": asked[name]}}
                return {"t": {"usage": usage, "refused": {"queue": 0}, "inflight": 0, "fill": 0.5}}

            def keep(leases: Any, name: str = name) -> None:
                kept[name] = leases.get("t", kept[name])
                assert kept["one"].slots + kept["two"].slots <= 4
                assert kept["one"].share + kept["two"].share <= 1 + 1e-9

            server.hosts.leases = LeaseKeeper(["t"], told, keep)
        await until(lambda: (kept["one"].slots, kept["two"].slots) == (2, 2))
        assert one.hosts.leases is not None
        await one.hosts.may_listen()

        async def work() -> None:
            while True:
                asked["one"] += 10
                await asyncio.sleep(0.002)

        working = asyncio.create_task(work())
        await until(lambda: kept["one"].share > 0.85)
        working.cancel()
        one.cluster.leases.forget("one")
        kept["one"], one.hosts.leases = Lease(), None
        await until(lambda: kept["two"][:2] == (1.0, 4))

    run(monkeypatch, test)
