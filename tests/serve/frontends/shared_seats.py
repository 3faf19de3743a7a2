# SPDX-License-Identifier: Apache-2.0
"""One model of a cluster at a server with two frontends: its supervisor's part and theirs, without Ray and engines."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.helpers.stand_ins import StandInClient, models_of, plan_of
from tokenpool.cluster.values import ModelView, SeatState, SeatView
from tokenpool.config import PoolConfig
from tokenpool.model_life import Life
from tokenpool.serve.clustered import seat_follower
from tokenpool.serve.clustered.seat_follower import Key, name_of
from tokenpool.serve.frontends import followed_cluster, followed_hosts, frontend_main
from tokenpool.serve.frontends.followed_cluster import FrontendModel
from tokenpool.serve.frontends.frontend_main import followed_pool
from tokenpool.serve.frontends.frontend_view import FrontendSettings
from tokenpool.serve.frontends.frontends import Frontends
from tokenpool.serve.frontends.sayings import Sayings
from tokenpool.serve.frontends.shared_cluster import SharedCluster, SharedModel
from tokenpool.serve.gateway.endpoints import build_outer_app


class Joining(FrontendModel):
    """Joins engines when the test lets it."""

    seats: SharedSeats

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.engines: list[str] = []
        self.num_joined = 0
        self.index: int = kwargs["client_index"]

    async def prepare(self) -> None:
        pass

    @property
    def hosts(self) -> list[str]:
        return self.engines

    def _give_roles(self, roles: Any) -> None:
        pass

    async def _connect(self, key: Key, machine: str) -> None:
        await self.seats.gates["join", self.index].wait()
        self.num_joined += 1
        self.engines.append(name_of(key))
        self.client = self.client or StandInClient(self.plan)

    async def _disconnect(self, key: Key) -> None:
        await self.seats.gates["leave", self.index].wait()
        self._lose(key)

    def _lose(self, key: Key, blame: bool = True) -> None:
        self.engines = [name for name in self.engines if name != name_of(key)]

    async def close(self) -> None:
        self._is_closed = True


class SharedSeats:
    """The model `m` on the host `h0`."""

    def __init__(self) -> None:
        self.told: list[str] = []
        """What the controller was told."""
        self.gates = {(what, index): asyncio.Event() for what in ("join", "leave", "say") for index in (0, 1)}
        for gate in self.gates.values():
            gate.set()
        self.sayings = Sayings(2)
        self.sayings.up, self.sayings.has_started = {0: 10, 1: 11}, True
        self.model = SharedModel(plan_of("m"), 1, self.tell, lambda _: None, self.sayings)
        self.models = models_of("m")
        self.models["m"].app.state = Life.READY
        self.hosts = SimpleNamespace(
            view=None, versions={"m": 1}, followers={"m": self.model}, overdue=frozenset(), num_attachments=0,
            is_alive=True, birth_of=lambda name: self.model.birth,
        )  # fmt: skip
        self.shared = SharedCluster(self.hosts, self.models, self.sayings)  # type: ignore[arg-type]
        self.frontends: list[Any] = []

    async def tell(self, method: str, *args: Any) -> None:
        self.told.append(method)

    async def ask(self, index: int, method: str, *args: Any) -> None:
        """A frontend calls the supervisor."""
        supervisor: Any = SimpleNamespace(_sayings=self.sayings, _hosts=self.shared)
        await self.gates["say", index].wait()
        answers: dict[str, Callable[..., Any]] = {
            "joined": partial(Frontends.joined, supervisor),
            "failed": partial(Frontends.failed, supervisor),
            "left": self.shared.left,
        }
        await answers[method](*args)

    def follower(self, index: int) -> Joining:
        """What follows the model's seats in a frontend."""
        found: Joining = self.frontends[index].hosts.engines._followers["m"]
        return found

    def see(self, state: SeatState | None) -> None:
        """The controller shows the seat so, or that there is none."""
        seats = {} if state is None else {"h0": SeatView("x", state, 1, "address", "machine")}
        view = ModelView(1, seats)
        self.hosts.view = SimpleNamespace(models={"m": view}, hosts={"h0": "x"}, roles={}, peers=["server"])
        self.model.apply(view, {"h0": "x"}, {})

    async def show(self, *indexes: int) -> None:
        """Let these frontends, or all, see what is so now, and everybody do what is to be done."""
        for _ in range(3):  # a follower is made first
            view = self.shared.view(1, True, {})
            for index in indexes or (0, 1):
                self.frontends[index].hosts.apply(view)
            await asyncio.sleep(0.005)

    async def until(self, look: Callable[[], object]) -> None:
        async with asyncio.timeout(20):
            while not look():
                await asyncio.sleep(0.001)


@asynccontextmanager
async def shared_seats(patch: pytest.MonkeyPatch, folder: Path) -> AsyncIterator[SharedSeats]:
    """Both frontends know the model, which has no seat yet."""
    made = SharedSeats()
    patch.setattr(seat_follower, "RETRY_S", 0.0)
    patch.setattr(followed_cluster, "FrontendModel", type("JoiningHere", (Joining,), {"seats": made}))
    patch.setattr(frontend_main, "SUSPECTS", SimpleNamespace(share=lambda path: None))
    plan = plan_of("m")
    config = PoolConfig(models=(plan.spec,), device_memory=1 << 30, host_memory=1 << 30, frontends=2)

    async def call(address: Any, key: bytes, method: str, index: int, *args: Any, **_: Any) -> None:
        await made.ask(index, method, index, 10 + index, *args[1:])

    patch.setattr(followed_hosts, "call_beside", call)
    for index in (0, 1):
        settings = FrontendSettings(index, config, [plan], str(folder), b"", address="127.0.0.1")
        made.frontends.append(followed_pool(settings, build_outer_app()))
    try:
        yield made
    finally:
        for frontend in made.frontends:
            frontend.hosts.freeze()
