# SPDX-License-Identifier: Apache-2.0
"""What a model of a cluster does about the controller's views; no engine is needed for that."""

from __future__ import annotations

import asyncio
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tokenpool.cluster.values import ModelView, SeatState, SeatView
from tokenpool.cluster_config import ClusterConfig
from tokenpool.errors import HostError
from tokenpool.policy.capacity import Role

pytestmark = pytest.mark.vllm


def test_roles_of_hosts_reach_the_client() -> None:
    """By host and life, so that a host's new process has the role; a host without one does everything."""
    from tokenpool.serve.client.engine_client import PoolEngineClient
    from tokenpool.serve.clustered.cluster_model import ClusterModel

    async def test() -> None:
        nothing: Any = SimpleNamespace()
        model = ClusterModel(nothing, 1, nothing, nothing, lambda _: None)
        model._core = core = PoolEngineClient(SimpleNamespace(parallel_config=SimpleNamespace()))  # type: ignore[arg-type]
        try:
            model.apply(ModelView(1, {}), {"h0": "x", "h1": "y"}, {"h0": Role.PREFILL, "h1": Role.DECODE})
            assert core.roles == {"h0/x": Role.PREFILL, "h1/y": Role.DECODE}
            model.apply(ModelView(1, {}), {"h0": "z", "h1": "y"}, {"h0": Role.PREFILL})
            assert core.roles == {"h0/z": Role.PREFILL}
        finally:
            core.close()

    asyncio.run(test())


def test_a_host_that_cannot_be_joined_is_tried_until_it_can_and_that_is_told() -> None:
    """First silently, then as the model's error; the controller hears of it once requests are sent there."""
    from tokenpool.serve.clustered import seat_follower
    from tokenpool.serve.clustered.seat_follower import Key, SeatFollower

    class Model(SeatFollower):
        hosts: Any = ()
        attempts = 0

        async def _connect(self, key: Key, machine: str) -> None:
            self.attempts += 1
            if self.attempts <= 12:
                raise HostError("no engine said it is ready")
            self.hosts = ("h0/x",)

        async def _disconnect(self, key: Key) -> None:
            raise AssertionError("nothing is left")

        def _lose(self, key: Key, blame: bool = True) -> None:
            raise AssertionError("nothing is lost")

    told: list[str] = []
    errors: list[Any] = []

    async def tell(method: str, *args: Any) -> None:
        told.append(method)

    async def test() -> None:
        plan: Any = SimpleNamespace(spec=SimpleNamespace(name="m"))
        model = Model(plan, 1, tell, lambda follower: errors.append(follower.error))
        model.apply(ModelView(1, {"h0": SeatView("x", SeatState.SERVING, 1, "address", "machine")}), {"h0": "x"}, {})
        while not told:
            await asyncio.sleep(0.001)
        assert (told, model.attempts, model.hosts) == (["joined"], 13, ("h0/x",))
        assert [str(error) for error in errors if error] == ["h0 cannot be joined: no engine said it is ready"] * 3
        assert errors[0] is None and model.error is None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(seat_follower, "RETRY_S", 0.0)
        asyncio.run(test())


@pytest.mark.parametrize("silent", [frozenset[str](), frozenset({"h0"})])
def test_the_requests_of_a_host_that_fell_silent_are_not_to_blame(silent: frozenset[str]) -> None:
    """As its network may be; those of one that died are suspected."""
    from tokenpool.serve.clustered.seat_follower import Key, SeatFollower

    lost: list[tuple[Key, bool]] = []

    class Model(SeatFollower):
        hosts: Any = ("h0/x",)

        async def _connect(self, key: Key, machine: str) -> None:
            pass

        async def _disconnect(self, key: Key) -> None:
            raise AssertionError("nothing is left")

        def _lose(self, key: Key, blame: bool = True) -> None:
            lost.append((key, blame))

    async def tell(method: str, *args: Any) -> None:
        pass

    async def test() -> None:
        plan: Any = SimpleNamespace(spec=SimpleNamespace(name="m"))
        model = Model(plan, 1, tell, lambda follower: None)
        seats = {"h0": SeatView("x", SeatState.SERVING, 1, "address", "machine")}
        model.apply(ModelView(1, seats), {"h0": "x"}, {})
        model.apply(ModelView(1, {}, silent=silent), {}, {})

    asyncio.run(test())
    assert lost == [(("h0", "x"), not silent)]


def test_what_hosts_tell_decides_where_requests_go(tmp_path: Path) -> None:
    """To the host with the weights, to the other one where the first token would be late; what is old is forgotten."""
    from tests.helpers.told_engine import ToldEngine, make_request
    from tokenpool.policy import routing
    from tokenpool.serve.client import request_route
    from tokenpool.serve.client.engine_client import PoolEngineClient
    from tokenpool.serve.clustered.cluster_model import ClusterModel

    def told(residency: str, first_token_in_s: float) -> dict[str, Any]:
        return {"m": {"residency": residency, "first_token_in_s": first_token_in_s, "prefill_s": 0.5}}

    async def test() -> None:
        nothing: Any = SimpleNamespace(spec=SimpleNamespace(name="m"))
        model = ClusterModel(nothing, 1, nothing, nothing, lambda _: None)
        route = partial(request_route.by_prefix, ttft_s=60.0)
        model._core = core = PoolEngineClient(SimpleNamespace(parallel_config=SimpleNamespace()), route=route)  # type: ignore[arg-type]
        core._knows_config = True
        engines = {name: ToldEngine(tmp_path / name[:2]) for name in ("h0/x", "h1/y")}
        try:
            for name, engine in engines.items():
                await core.join(name, engine.addresses)

            async def goes_to(request_id: str) -> str:
                before = {name: core.load(name) for name in engines}
                await core.add_request_async(make_request(request_id))
                return next(name for name in engines if core.load(name) > before[name])

            assert await goes_to("a") == "h0/x"  # nothing is known
            model.learn({"h0": told("in host memory", 1.0), "h1": told("on device", 1.0)})
            assert [await goes_to(name) for name in "bcd"] == ["h1/y"] * 3
            model.learn({"h0": told("in host memory", 1.0), "h1": HostError("no answer")})
            assert await goes_to("e") == "h1/y"
            model.learn({"h0": told("in host memory", 1.0), "h1": told("on device", 39.9)})
            assert [await goes_to(name) for name in "fg"] == ["h1/y", "h0/x"]  # 1.5 times 40.4 s are above a minute
            model.learn({"h0": told("in host memory", 1.0), "h1": told("on device", 1.0)})
            patch.setattr(routing, "_TOLD_LIFE_S", -1.0)
            assert await goes_to("h") == "h0/x"
        finally:
            core.close()
            for engine in engines.values():
                engine.close()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(routing, "_TOLD_LIFE_S", 1e6)
        asyncio.run(test())


def test_a_frontend_is_attached_to_engines_that_serve_and_to_no_others() -> None:
    """Again after an engine that went without a word; a failed attempt is repeated; it leaves what is being removed."""
    from tokenpool.serve.clustered import seat_follower
    from tokenpool.serve.clustered.seat_follower import Key, SeatFollower, name_of

    class Model(SeatFollower):
        joined: Any = ()

        @property
        def hosts(self) -> Any:
            return self.joined

        async def _connect(self, key: Key, machine: str) -> None:
            await self._tell("attach", "m", *key)
            self.joined = (*self.joined, name_of(key))

        async def _disconnect(self, key: Key) -> None:
            self._lose(key)

        def _lose(self, key: Key, blame: bool = True) -> None:
            self.joined = tuple(name for name in self.joined if name != name_of(key))

    told: list[tuple[str, ...]] = []

    async def tell(method: str, model: str, host: str, life: str, *_: Any) -> None:
        told.append((method, host, life))
        if len(told) == 1:
            raise HostError("it has just ended")

    async def test() -> None:
        plan: Any = SimpleNamespace(spec=SimpleNamespace(name="m"))
        model = Model(plan, 1, tell, lambda _: None)

        async def see(state: SeatState | None) -> None:
            seats = {} if state is None else {"h0": SeatView("x", state, 1, "address", "machine")}
            model.apply(ModelView(1, seats), {"h0": "x"}, {})
            await asyncio.sleep(0.01)

        await see(SeatState.LOADING)
        assert told == []
        await see(SeatState.SERVING)
        await asyncio.sleep(0.01)
        assert (told[:2], model.joined) == ([("attach", "h0", "x")] * 2, ("h0/x",))
        model.attach_anew()
        assert model.joined == ()
        await see(SeatState.SERVING)
        assert (told[-2:], model.joined) == ([("attach", "h0", "x"), ("joined", "h0", "x")], ("h0/x",))
        await see(None)
        assert model.joined == ()
        await see(SeatState.SERVING)
        assert model.joined == ("h0/x",)
        await see(SeatState.REMOVING)
        assert (told[-1], model.joined) == (("left", "h0", "x"), ())
        num_told = len(told)
        await see(SeatState.REMOVING)
        assert len(told) == num_told, "it has left already"

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(seat_follower, "RETRY_S", 0.0)
        asyncio.run(test())


@pytest.mark.parametrize("end", ["joined", "removing", "lost", "unreachable", "not wanted"])
def test_a_model_that_moves_is_served_until_its_new_host_has_been_joined(end: str) -> None:
    """By the host that it leaves, however long the join takes, unless nothing comes of it or that host is cleared."""
    from tokenpool.serve.clustered import seat_follower
    from tokenpool.serve.clustered.seat_follower import Key, SeatFollower, name_of

    class Model(SeatFollower):
        joined: Any = ()

        @property
        def hosts(self) -> Any:
            return self.joined

        async def _connect(self, key: Key, machine: str) -> None:
            if key[0] == "h1":
                await may_join.wait()
                if end == "unreachable":
                    raise HostError("no engine said it is ready")
            self.joined, self.client = (*self.joined, name_of(key)), object()

        async def _disconnect(self, key: Key) -> None:
            self._lose(key)

        def _lose(self, key: Key, blame: bool = True) -> None:
            self.joined = tuple(name for name in self.joined if name != name_of(key))

    may_join, told, served = asyncio.Event(), list[str](), list[bool]()

    async def tell(method: str, model: str, host: str, *_: Any) -> None:
        told.append(f"{method} {host}")

    async def settle() -> None:
        for _ in range(20):
            await asyncio.sleep(0)

    async def test() -> None:
        plan: Any = SimpleNamespace(spec=SimpleNamespace(name="m"))
        model = Model(plan, 1, tell, lambda follower: served.append(follower.is_served))
        lives = {"h0": "x", "h1": "y"}

        async def see(**states: SeatState) -> None:
            seats = {host: SeatView(lives[host], state, 1, "address", "machine") for host, state in states.items()}
            model.apply(ModelView(1, seats), lives, {})
            await settle()

        await see(h0=SeatState.SERVING)
        served.clear()
        await see(h0=SeatState.SERVING, h1=SeatState.LOADING)
        await see(h0=SeatState.LEAVING, h1=SeatState.LOADING)  # the host reported it before its order was answered
        await see(h0=SeatState.LEAVING, h1=SeatState.SERVING)
        assert (told, model.joined, set(served)) == (["joined h0"], ("h0/x",), {True})
        if end == "joined":
            may_join.set()
            await settle()
            assert (told[1:], model.joined, set(served)) == (["joined h1", "left h0"], ("h1/y",), {True})
            return
        if end == "removing":
            await see(h0=SeatState.REMOVING, h1=SeatState.SERVING)
        elif end == "lost":
            del lives["h1"]
            model.apply(ModelView(1, {"h0": SeatView("x", SeatState.LEAVING, 1, "address", "machine")}), lives, {})
        elif end == "not wanted":
            await see(h0=SeatState.LEAVING, h1=SeatState.LEAVING)
        may_join.set()
        while "left h0" not in told:
            await asyncio.sleep(0)
        assert "h0/x" not in model.joined

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(seat_follower, "RETRY_S", 0.0)
        asyncio.run(asyncio.wait_for(test(), 20))


@pytest.mark.parametrize("end", ["joined", "failed", "lost", "removing"])
def test_requests_wait_while_a_server_that_was_given_up_is_attached_anew(end: str) -> None:
    """Hosts have forgotten it, and are there: new requests go to them in a moment, unless the first attempt fails."""
    from tokenpool.serve.clustered import seat_follower
    from tokenpool.serve.clustered.seat_follower import Key, SeatFollower, name_of

    may_join, served = asyncio.Event(), list[bool]()

    class Model(SeatFollower):
        hosts: Any = ()

        async def _connect(self, key: Key, machine: str) -> None:
            if self.client is not None:
                await may_join.wait()
                if end == "failed":
                    raise HostError("no engine said it is ready")
            self.hosts, self.client = (name_of(key),), object()

        async def _disconnect(self, key: Key) -> None: ...

        def _lose(self, key: Key, blame: bool = True) -> None:
            self.hosts = ()

    async def tell(method: str, *_: Any) -> None: ...

    async def test() -> None:
        plan: Any = SimpleNamespace(spec=SimpleNamespace(name="m"))
        model = Model(plan, 1, tell, lambda follower: served.append(follower.is_served))

        async def see(*states: SeatState) -> None:
            seats = {f"h{i}": SeatView("x", state, 1, "address", "machine") for i, state in enumerate(states)}
            model.apply(ModelView(1, seats), dict.fromkeys(seats, "x"), {})
            for _ in range(20):
                await asyncio.sleep(0)

        await see(SeatState.SERVING)
        served.clear()
        model.attach_anew()
        await see(SeatState.SERVING)
        assert (model.hosts, set(served), model.is_served) == ((), {True}, True)
        if end in ("lost", "removing"):
            await see(*[SeatState.REMOVING] * (end == "removing"))
            assert not model.is_served and served[-1] is False
            return
        may_join.set()
        await see(SeatState.SERVING)
        assert (model.hosts, set(served)) == ((("h0/x",), {True}) if end == "joined" else ((), {True, False}))
        await model.close()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(seat_follower, "RETRY_S", 60.0)
        asyncio.run(asyncio.wait_for(test(), 20))


def test_what_a_follower_has_done_is_told_until_it_is_heard() -> None:
    """Joined and left, whoever is away for a while."""
    from tokenpool.serve.clustered import seat_follower
    from tokenpool.serve.clustered.seat_follower import Key, SeatFollower

    class Model(SeatFollower):
        hosts: Any = ()

        async def _connect(self, key: Key, machine: str) -> None:
            self.hosts = ("h0/x",)

        async def _disconnect(self, key: Key) -> None:
            self.hosts = ()

        def _lose(self, key: Key, blame: bool = True) -> None:
            raise AssertionError("nothing is lost")

    told: list[str] = []

    async def tell(method: str, *_: Any) -> None:
        told.append(method)
        if told.count(method) <= 2:
            raise HostError("it is away")

    async def test() -> None:
        plan: Any = SimpleNamespace(spec=SimpleNamespace(name="m"))
        model = Model(plan, 1, tell, lambda _: None)
        for state, said in ((SeatState.SERVING, "joined"), (SeatState.LEAVING, "left")):
            model.apply(ModelView(1, {"h0": SeatView("x", state, 1, "address", "machine")}), {"h0": "x"}, {})
            async with asyncio.timeout(20):
                while told.count(said) < 3:
                    await asyncio.sleep(0.001)
        assert told == ["joined"] * 3 + ["left"] * 3

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(seat_follower, "RETRY_S", 0.0)
        asyncio.run(test())


def test_ports_of_an_endpoint_are_kept_until_they_are_bound(tmp_path: Path) -> None:
    """From their making to the join nobody else gets them, and ZMQ can bind them; then they are let go."""
    import socket

    import zmq

    from tokenpool.serve.clustered.cluster_model import EndpointMaker

    maker = EndpointMaker(str(tmp_path), "127.0.0.1", ClusterConfig())
    made = maker.make("elsewhere")
    ports = [int(address.rpartition(":")[2]) for address in made[:2]]
    for port in ports:
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind(("127.0.0.1", port))
    context = zmq.Context()
    try:
        for address in made[:2]:
            context.socket(zmq.ROUTER).bind(address)
        maker.release(made)
        maker.release(made)
        assert not maker._kept
    finally:
        context.destroy(linger=0)
    unwanted = maker.make("elsewhere")
    maker.release(unwanted)
    with socket.socket() as other:
        other.bind(("127.0.0.1", int(unwanted.input.rpartition(":")[2])))


def test_a_model_is_served_while_one_of_its_hosts_can_be_counted_on() -> None:
    """Hosts that are overdue do not count, until they are in time again or have another life."""
    from tokenpool.serve.clustered.seat_follower import Key, SeatFollower

    class Model(SeatFollower):
        hosts: Any = ("h0/x", "h1/y")

        async def _connect(self, key: Key, machine: str) -> None:
            raise AssertionError("nothing is joined")

        async def _disconnect(self, key: Key) -> None:
            raise AssertionError("nothing is left")

        def _lose(self, key: Key, blame: bool = True) -> None:
            raise AssertionError("nothing is lost")

    nothing: Any = SimpleNamespace()
    model = Model(nothing, 1, nothing, lambda _: None)
    model.client = object()
    lives = {"h0": "x", "h1": "y"}
    seen = []
    for overdue in ((), ("h0",), ("h0", "h1"), ("h1",), ("h0", "h2")):
        model.apply(ModelView(1, {}), lives, {}, overdue)
        seen.append(model.is_served)
    assert [True, True, False, True, True] == seen


def test_the_app_is_built_on_when_the_host_that_came_first_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That takes seconds, in which a host may die or be left: the next one serves the model."""
    from tests.helpers.stand_ins import StandInClient, plan_of
    from tests.helpers.told_engine import ToldEngine
    from tokenpool.cluster.machine import machine_id
    from tokenpool.serve.clustered import cluster_model
    from tokenpool.serve.clustered.cluster_model import ClusterModel, EndpointMaker
    from tokenpool.wire.addresses import EngineAddresses

    engines: list[Any] = []
    told: list[str] = []

    async def tell(method: str, model: str, host: str, life: str, *made: Any) -> None:
        told.append(f"{method} {host}")
        if method == "attach":
            engines.append(ToldEngine(EngineAddresses((made[0].input,), (made[0].output,))))

    async def test() -> None:
        num_begun, may_end = 0, asyncio.Event()

        async def over(plan: Any, core: Any, state: Any) -> Any:
            nonlocal num_begun
            num_begun += 1
            try:
                await may_end.wait()
            except BaseException:  # as ModelClient.over does
                core.close()
                raise
            client: Any = StandInClient(plan)
            client.core = core
            return client

        monkeypatch.setattr(cluster_model, "ModelClient", SimpleNamespace(over=over))
        plan = plan_of("m")
        model = ClusterModel(plan, 1, tell, EndpointMaker(str(tmp_path), "", ClusterConfig()), lambda _: None)
        await model.prepare()
        core: Any = model._core
        core._knows_config = True

        def see(**lives: str) -> None:
            seats = {h: SeatView(life, SeatState.SERVING, 1, "address", machine_id()) for h, life in lives.items()}
            model.apply(ModelView(1, seats), lives, {})

        try:
            async with asyncio.timeout(20):
                see(h0="x")
                while not num_begun:
                    await asyncio.sleep(0.001)
                see(h1="y")
                while "h1/y" not in model.hosts:
                    await asyncio.sleep(0.001)
                may_end.set()
                while "joined h1" not in told:
                    await asyncio.sleep(0.001)
            assert model.is_served and list(model.hosts) == ["h1/y"] and not core.resources.engine_dead
            assert (num_begun, model.error) == (1, None)
        finally:
            await model.close()
            core.close()
            for engine in engines:
                engine.close()

    monkeypatch.setattr(
        "tokenpool.serve.launch.model_plan.ModelPlan.engine_config",
        lambda plan: SimpleNamespace(parallel_config=SimpleNamespace()),
    )
    asyncio.run(test())


def test_an_app_that_could_not_be_built_is_built_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over a new client of the engines, which are attached to that one; meanwhile the model's error is told."""
    from tests.helpers.stand_ins import StandInClient, plan_of
    from tests.helpers.told_engine import ToldEngine
    from tokenpool.cluster.machine import machine_id
    from tokenpool.process.keeper import Backoff
    from tokenpool.serve.client.engine_client import PoolEngineClient
    from tokenpool.serve.clustered import cluster_model
    from tokenpool.serve.clustered.cluster_model import ClusterModel, EndpointMaker
    from tokenpool.wire.addresses import EngineAddresses

    engines: list[Any] = []
    told: list[str] = []
    errors: list[str] = []

    async def tell(method: str, model: str, host: str, life: str, *made: Any) -> None:
        told.append(method)
        if method == "attach":
            engines.append(ToldEngine(EngineAddresses((made[0].input,), (made[0].output,))))

    async def over(plan: Any, core: Any, state: Any) -> Any:
        if told.count("attach") < 3:
            core.close()  # as ModelClient.over does
            raise HostError("no memory")
        client: Any = StandInClient(plan)
        client.core = core
        return client

    def show(follower: Any) -> None:
        errors.extend([str(follower.error)] if follower.error else [])

    async def test() -> None:
        model = ClusterModel(plan_of("m"), 1, tell, EndpointMaker(str(tmp_path), "", ClusterConfig()), show)
        model._backoff = Backoff(waits_s=(0.0,))
        await model.prepare()
        seats = {"h0": SeatView("x", SeatState.SERVING, 1, "address", machine_id())}
        try:
            async with asyncio.timeout(20):
                model.apply(ModelView(1, seats), {"h0": "x"}, {"h0": Role.DECODE})
                while "joined" not in told:
                    await asyncio.sleep(0.001)
            assert model.is_served and model.error is None and errors[0] == "no memory"
            assert model._core is not None and model._core.roles == {"h0/x": Role.DECODE}
        finally:
            await model.close()
            assert model._core is not None
            model._core.close()
            for engine in engines:
                engine.close()

    monkeypatch.setattr(cluster_model, "ModelClient", SimpleNamespace(over=over))
    monkeypatch.setattr(PoolEngineClient, "_apply_ready_response", lambda core, greeting: None)
    monkeypatch.setattr(
        "tokenpool.serve.launch.model_plan.ModelPlan.engine_config",
        lambda plan: SimpleNamespace(parallel_config=SimpleNamespace()),
    )
    asyncio.run(test())
