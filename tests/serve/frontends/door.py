# SPDX-License-Identifier: Apache-2.0
"""A supervisor and its frontends, both with their real logic, without processes, sockets or engines.

A test decides what becomes of each call of a frontend, and when frontends and hosts die.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from contextvars import ContextVar
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.helpers.stand_ins import StandInClient, StandInHost, World, plan_of
from tokenpool.config import PoolConfig
from tokenpool.errors import HostError
from tokenpool.model_life import Life
from tokenpool.process import keeper
from tokenpool.serve.frontends import followed_host, followed_hosts, frontend_main, shared_host
from tokenpool.serve.frontends import frontends as all_frontends
from tokenpool.serve.frontends.followed_hosts import FollowedHosts
from tokenpool.serve.frontends.frontend_main import followed_pool
from tokenpool.serve.frontends.frontend_view import FrontendSettings
from tokenpool.serve.frontends.frontends import Frontends
from tokenpool.serve.frontends.shared_host import host_frontends
from tokenpool.serve.gateway.endpoints import build_outer_app
from tokenpool.serve.launch.model_plan import ModelPlan
from tokenpool.serve.pool import local_hosts, models, pool_operator
from tokenpool.serve.pool.pool import Pool

_PID: ContextVar[int] = ContextVar("pid")
_CALLER: ContextVar[Frontend] = ContextVar("caller")
_engines = itertools.count(1)
_pids = itertools.count(1 << 23)

Fate = Callable[["Frontend", str, tuple[Any, ...]], Awaitable[None]]
"""What becomes of a call before the supervisor gets it; it may raise, or take its time."""


class DoorHost(StandInHost):
    """A host whose engines frontends attach themselves to."""

    def __init__(self, world: Door, pid: int) -> None:
        super().__init__(world)
        self.pid = pid
        self.control_path = f"control-{len(world.hosts)}"
        self.key = b""
        self.engines: dict[str, int] = {}
        """By model; each load makes another one."""
        self.attached: dict[tuple[int, str], int] = {}
        """Engines, by index and address of the frontends that were attached to them."""

    async def load(self, name: str) -> None:
        await super().load(name)
        self.engines[name] = next(_engines)

    async def call(self, method: str, *args: Any, timeout_s: float | None = None) -> Any:
        if method == "attach_frontend":
            if args[0] not in self.models:
                raise HostError(f"model {args[0]!r} is not on this host")
            self.attached[args[1], args[2].inputs[0]] = self.engines[args[0]]
        return await super().call(method, *args)


class Core:
    """A client's connections: which engine each is to."""

    def __init__(self, config: Any, *, client_index: int) -> None:
        self.links: dict[str, int] = {}
        self.index = client_index

    def close(self) -> None:
        self.links.clear()


class DoorClient(StandInClient):
    """A model's client in one frontend."""

    @classmethod
    async def over(cls, plan: ModelPlan, core: Any, state: Any) -> DoorClient:
        client = cls(plan, _CALLER.get().door)
        client.core = core
        return client

    def lost(self, host: str, *, blame: bool = True) -> None:
        self.core.links.pop(host, None)

    async def drain(self, limit_s: float) -> bool:
        deadline_s = time.monotonic() + limit_s
        while self.waiting and time.monotonic() < deadline_s:
            await asyncio.sleep(0.001)
        return not self.waiting


class Frontend:
    """One of the frontends; in place of a FrontendProcess, too."""

    def __init__(self, door: Door, settings: FrontendSettings) -> None:
        self.door, self.settings, self.pid = door, settings, _PID.get()
        _CALLER.set(self)
        self.pool: Pool[FollowedHosts] = followed_pool(settings, build_outer_app())
        self.pool.hosts.early_works.clear()
        self._ended = asyncio.Event()
        self.task = asyncio.create_task(self.pool.hosts.start())

    @property
    def hosts(self) -> FollowedHosts:
        return self.pool.hosts

    def client(self, name: str) -> Any:
        return self.pool.models[name].client

    def serves(self, name: str) -> bool:
        """Whether it sends requests of the model to the engine that there is of it now, as it was added last."""
        model, host = self.pool.models.get(name), self.door.hosts[-1]
        if model is None or model.app.state != "ready" or model.client is None:
            return False
        links = {host.name: host.engines.get(name)}
        plan = self.door.supervisor.models[name].plan_to_send
        return model.client.core.links == links and model.client.plan.spec == plan.spec

    def die(self) -> None:
        self.task.cancel()
        self.hosts.freeze()
        self._ended.set()

    async def wait(self) -> int:
        await self._ended.wait()
        return -9

    async def stop(self, limit_s: float) -> None:
        self.die()


async def _in_time(frontend: Frontend, method: str, args: tuple[Any, ...]) -> None:
    pass


class Door(World):
    """All of them."""

    def __init__(self) -> None:
        super().__init__()
        self.frontends: dict[int, Frontend] = {}
        """Those that are there, by index."""
        self.fate: Fate = _in_time
        self.attach: Fate = _in_time
        """The same for what attaches frontends to engines."""
        self.pids = _pids
        """Of the next frontends."""
        self.host_pids = _pids
        self.supervisor: Pool[Any]
        self.shown: Frontends

    async def start_host(self, *_: Any, **__: Any) -> DoorHost:
        self.hosts.append(host := DoorHost(self, next(self.host_pids)))
        return host

    async def start_frontend(self, settings: FrontendSettings, sock: Any) -> Frontend:
        _PID.set(next(self.pids))
        frontend = self.frontends[settings.index] = Frontend(self, settings)
        return frontend

    async def ask(self, address: Any, key: bytes, method: str, *args: Any, timeout_s: float | None = None) -> Any:
        """A frontend calls the supervisor, to which the call gets though the frontend dies meanwhile."""

        async def call() -> Any:
            await self.fate(_CALLER.get(), method, args)
            return await self.answers[method](*args)

        called = asyncio.create_task(call())
        called.add_done_callback(lambda done: done.cancelled() or done.exception())
        return await asyncio.shield(called)

    async def ask_frontend(self, address: str, key: bytes, method: str, *, timeout_s: float) -> Any:
        """The supervisor asks a frontend for its report."""
        for frontend in self.frontends.values():
            if address == frontend.settings.own_socket(getattr(frontend.settings, "life", frontend.pid)):
                return {"inflight": frontend.pool.inflight(), "tenants": {}}
        raise HostError("no frontend answers there")

    async def ask_host(self, address: Any, key: bytes, method: str, *args: Any, timeout_s: float | None = None) -> Any:
        """A frontend calls the host."""
        if method == "attach_frontend":
            await self.attach(_CALLER.get(), method, args)
        host = next(host for host in self.hosts if host.control_path == address)  # type: ignore[attr-defined]
        return await host.call(method, *args)

    async def connect(self, host: Any, core: Core, addresses: Any) -> None:
        """A frontend's connection to an engine, whose greeting comes at once."""
        if host.name in core.links:
            raise ValueError(f"host {host.name!r} has joined already")
        there: Any = next(h for h in self.hosts if h.control_path == host.address.control)  # type: ignore[attr-defined]
        core.links[host.name] = there.attached[core.index, addresses.inputs[0]]

    async def add(self, name: str, **settings: Any) -> None:
        """Add a model, as an operator does."""
        await self.operator.add_model(plan_of(name, **settings).spec)

    def rest(self, name: str, is_resting: bool = True) -> None:
        """Have a model unloaded once it has finished, as for want of room, or call that off."""
        model = self.supervisor.models[name]
        model.app.is_resting = is_resting
        model.client.rest(is_resting)
        if is_resting:
            model.app.move(Life.DRAINING)
            self.supervisor.models.wanted.set()
        else:
            model.restore()

    async def turns(self, count: int = 200) -> None:
        """Let everybody do what they are about to do."""
        for _ in range(count):
            await asyncio.sleep(0)

    def states_of(self, state: str) -> list[str]:
        """Names of the supervisor's models in that state."""
        return [name for name, model in self.supervisor.models.items() if model.app.state == state]

    def all_serve(self, name: str) -> bool:
        return len(self.frontends) == 2 and all(frontend.serves(name) for frontend in self.frontends.values())


@asynccontextmanager
async def door(patch: pytest.MonkeyPatch, folder: Path, **settings: Any) -> AsyncIterator[Door]:
    """A pool of two frontends and no model, which has started; it is stopped at the end."""
    made = Door()
    real_pid = os.getpid()
    patch.setenv("PROMETHEUS_MULTIPROC_DIR", str(folder))
    patch.setattr(os, "getpid", lambda: _PID.get(real_pid))
    for module in (all_frontends, local_hosts, models):
        patch.setattr(module, "Backoff", lambda **_: keeper.Backoff(waits_s=(0.02,)))
    patch.setattr(pool_operator, "_LOOK_S", 0.01)
    patch.setattr(followed_hosts, "_RETRY_S", 0.002)
    patch.setattr(all_frontends, "_LOOK_S", 0.001)
    patch.setattr(local_hosts, "_END_LIMIT_S", 0.02)
    patch.setattr(local_hosts, "_SILENT_END_LIMIT_S", 0.02)
    patch.setattr(local_hosts, "host_config", lambda config, plans: None)
    patch.setattr(local_hosts, "HostProcess", SimpleNamespace(start=made.start_host))
    patch.setattr(ModelPlan, "engine_config", lambda plan: SimpleNamespace())
    patch.setattr(pool_operator, "plan_added", lambda spec, *_: replace(plan_of(spec.name), spec=spec))
    patch.setattr(all_frontends, "FrontendProcess", SimpleNamespace(start=made.start_frontend))
    patch.setattr(all_frontends, "ControlServer", lambda *_: SimpleNamespace(serve=lambda calls: None))
    patch.setattr(frontend_main, "SUSPECTS", SimpleNamespace(share=lambda path: None))
    patch.setattr(followed_hosts, "call_beside", made.ask)
    patch.setattr(followed_host, "call_beside", made.ask_host)
    patch.setattr(all_frontends, "call_beside", made.ask_frontend)
    patch.setattr(followed_host, "PoolEngineClient", Core)
    patch.setattr(followed_host, "ModelClient", DoorClient)
    patch.setattr(followed_host, "connect", made.connect)

    async def load_model(host: DoorHost, plan: ModelPlan, addresses: Any) -> dict[str, Any]:
        await host.load(plan.spec.name)
        return {"build_s": 0.0}

    patch.setattr(shared_host, "load_model", load_model)
    settings = {"device_memory": 1 << 30, "host_memory": 1 << 30, "shutdown_timeout_s": 0.2, "frontends": 2} | settings
    config = PoolConfig(models=(plan_of("first").spec,), **settings)
    frontends = host_frontends(config, [], None, None, SimpleNamespace())  # type: ignore[arg-type]
    made.shown, made.supervisor, made.operator = frontends, frontends._pool, frontends._operator
    made.answers = {call.__name__: call for call in frontends._calls()}
    await frontends.start()
    await made.until(lambda: len(frontends._sayings.up) == 2)
    try:
        yield made
    finally:
        made.fate = made.attach = _in_time
        made.hold.set()
        await frontends.stop()
