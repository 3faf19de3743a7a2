# SPDX-License-Identifier: Apache-2.0
"""A pool server over hosts and clients that do what a test tells them to; no engine, no process, no port."""

from __future__ import annotations

import asyncio
import itertools
import json
from argparse import Namespace
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from http import HTTPStatus
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.responses import JSONResponse, StreamingResponse

from tokenpool.config import ModelSpec, PoolConfig
from tokenpool.errors import ConfigError, HostError
from tokenpool.process import keeper
from tokenpool.serve.access.admission import EngineQueue
from tokenpool.serve.gateway.endpoints import build_outer_app
from tokenpool.serve.gateway.router import ModelRouter
from tokenpool.serve.launch.model_plan import ModelPlan
from tokenpool.serve.pool import local_hosts, pool_operator
from tokenpool.serve.pool.local_hosts import LocalHosts
from tokenpool.serve.pool.models import Models
from tokenpool.serve.pool.pool import Pool
from tokenpool.serve.pool.pool_operator import PoolOperator
from tokenpool.serve.start import local_pool

_LIMIT_S = 30.0
_pids = itertools.count(1 << 22)  # above those of any process


class StandInHost:
    """A host without a process; `world` says how its models fare."""

    guard = None

    def __init__(self, world: World) -> None:
        self.name, self.pid = "host", next(_pids)
        self.world = world
        self.models: list[str] = []
        self._end = asyncio.Event()

    @property
    def ended(self) -> bool:
        return self._end.is_set()

    def die(self) -> None:
        self._end.set()

    async def wait(self) -> int:
        await self._end.wait()
        return -9

    async def kill(self) -> None:
        self.die()

    async def stop(self, limit_s: float) -> None:
        await self.world.hold.wait()
        self.die()

    async def call(self, method: str, *args: Any) -> Any:
        if self.ended:
            raise HostError(f"engine host does not answer {method}")
        if method == "remove_model":
            if self.world.unloads:
                raise self.world.unloads.pop(0)
            if args[0] not in self.models:
                raise KeyError(args[0])
            self.models.remove(args[0])
        return {} if method == "state" else None

    async def load(self, name: str) -> None:
        """Load a model, as a client asks for it."""
        self.world.loads.append(name)
        await self.world.gates.get(name, self.world.hold).wait()
        if name in self.world.deadly:
            self.die()
        if self.ended:
            raise HostError("engine host does not answer add_model")
        if name in self.world.broken:
            raise ConfigError("no file", key=f"model {name!r}")
        self.models.append(name)


class StandInClient:
    """A model's client; requests are names in `waiting`."""

    num_seats = 1
    queue = staticmethod(EngineQueue)

    def __init__(self, plan: ModelPlan, world: Any = None) -> None:
        self.plan = plan
        self.world = world
        self.core = self
        self.added = {"build_s": 0.0}
        self.on_fault: Callable[[str], None] = lambda fault: None
        self.waiting: list[str] = []
        self.told: dict[str, str] = {}
        self.closed = False

    @classmethod
    async def start(cls, plan: ModelPlan, host: StandInHost) -> StandInClient:
        await host.load(plan.spec.name)
        return cls(plan, host.world)

    async def join(self, host: StandInHost) -> None:
        await host.load(self.plan.spec.name)

    async def app(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer a request with its id and the model, once the model is in a host for a moment without a break."""
        asked = json.loads((await receive())["body"])
        name = self.plan.spec.name
        self.waiting.append(asked["id"])
        try:
            for _ in range(asked.get("steps", 2)):
                await asyncio.sleep(0.001)
                assert not self.closed, f"a client of {name} was closed that had a request"
                while name not in self.world.host.models or self.world.host.ended:
                    await asyncio.sleep(0.001)
            stream = asked.get("stream", False)
            response = StreamingResponse(_events(asked["id"]), media_type="text/event-stream") if stream else None
            await (response or JSONResponse({"id": asked["id"], "model": name}))(scope, receive, send)
        finally:
            if asked["id"] in self.waiting:
                self.waiting.remove(asked["id"])

    @property
    def num_unfinished(self) -> int:
        return len(self.waiting)

    def lost(self, host: str, *, blame: bool = True) -> None: ...

    def rest(self, is_resting: bool) -> None: ...

    async def drain(self, limit_s: float) -> bool:
        return not self.waiting

    async def abort_all(self) -> None:
        self.waiting.clear()

    def fail_all(self, reason: str, status: HTTPStatus = HTTPStatus.BAD_GATEWAY) -> None:
        self.told |= dict.fromkeys(self.waiting, f"{status.value}: {reason}")
        self.waiting.clear()

    async def close(self) -> None:
        self.closed = True


async def _events(request_id: str) -> AsyncIterator[bytes]:
    yield b"data: " + request_id.encode() + b"\n\n"
    yield b"data: [DONE]\n\n"


class World:
    """What goes wrong, and what was asked for."""

    def __init__(self) -> None:
        self.broken: set[str] = set()
        """Models that cannot be loaded."""
        self.deadly: set[str] = set()
        """Models that a host dies of while it loads them."""
        self.unloads: list[Exception] = []
        """What the next removals raise."""
        self.loads: list[str] = []
        """All attempts to load, in order."""
        self.hosts: list[StandInHost] = []
        self.hold = asyncio.Event()
        """Hosts neither load nor end while it is not set."""
        self.hold.set()
        self.gates: dict[str, asyncio.Event] = {}
        """As `hold`, for the loading of single models."""
        self.pool: Pool[LocalHosts]
        self.operator: PoolOperator

    @property
    def host(self) -> StandInHost:
        """The present one."""
        return self.hosts[-1]

    @property
    def states(self) -> dict[str, str]:
        return {name: model.app.state for name, model in self.pool.models.items()}

    def client(self, name: str) -> StandInClient:
        client: Any = self.pool.models[name].client
        return client

    async def until(self, look: Callable[[], object]) -> None:
        """Wait until that holds."""
        async with asyncio.timeout(_LIMIT_S):
            while not look():
                await asyncio.sleep(0.005)

    async def start_host(self, *_: Any, **__: Any) -> StandInHost:
        self.hosts.append(StandInHost(self))
        return self.host


def plan_of(name: str, **settings: Any) -> ModelPlan:
    """A plan that nobody builds."""
    args = Namespace(tensor_parallel_size=1, lora_modules=None, default_mm_loras=None, served_model_name=None)
    checked: Any = SimpleNamespace()
    return ModelPlan(ModelSpec(name=name, model="/none", **settings), args, 0, checked)


def models_of(*names: str) -> Models:
    """A table of these models, which are loading."""
    plans = [plan_of(name) for name in names]
    config = PoolConfig(models=tuple(plan.spec for plan in plans), device_memory=1 << 30, host_memory=1 << 30)
    models = Models(config, ModelRouter(build_outer_app(), max_request_bytes=1 << 20))
    for plan in plans:
        models.add(plan)
    return models


@asynccontextmanager
async def stand_in_pool(
    patch: pytest.MonkeyPatch,
    folder: Path,
    names: Sequence[str] = ("a", "b", "c"),
    *,
    of_models: Mapping[str, Any] | None = None,
    **settings: Any,
) -> AsyncIterator[World]:
    """A pool of these models that was not started; it is stopped at the end.

    `of_models` are settings of each model, `settings` those of the pool.
    """
    world = World()
    patch.setenv("PROMETHEUS_MULTIPROC_DIR", str(folder))
    patch.setattr(keeper, "RESTART_WAITS_S", (0.02,))
    patch.setattr(pool_operator, "_LOOK_S", 0.01)
    patch.setattr(local_hosts, "_END_LIMIT_S", 0.02)
    patch.setattr(local_hosts, "_SILENT_END_LIMIT_S", 0.02)
    patch.setattr(local_hosts, "HostProcess", SimpleNamespace(start=world.start_host))
    patch.setattr(local_hosts, "ModelClient", StandInClient)
    patch.setattr(ModelPlan, "engine_config", lambda plan: SimpleNamespace())
    plans = [plan_of(name, **(of_models or {})) for name in names]
    models = tuple(plan.spec for plan in plans)
    settings = {"device_memory": 1 << 30, "host_memory": 1 << 30, "shutdown_timeout_s": 0.2} | settings
    config = PoolConfig(models=models, **settings)
    outer = build_outer_app()
    world.pool = local_pool(config, plans, None, None, outer)
    world.operator = outer.state.operator
    try:
        yield world
    finally:
        world.hold.set()
        await world.pool.stop()
