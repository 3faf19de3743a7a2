# SPDX-License-Identifier: Apache-2.0
"""Several frontends of a clustered pool: this process talks to Ray and the controller, and answers no client."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any

from starlette.applications import Starlette

from tokenpool.cluster.session import Session
from tokenpool.cluster.values import Endpoints
from tokenpool.config import PoolConfig
from tokenpool.errors import HostError, PoolError
from tokenpool.serve.cluster_server import ClusterServer
from tokenpool.serve.frontend_keeper import FrontendKeeper, SharedClients
from tokenpool.serve.frontend_reports import state_of_all
from tokenpool.serve.frontend_view import ClusterSeats, SupervisorView
from tokenpool.serve.launch_plan import ModelPlan
from tokenpool.serve.seat_follower import Key, SeatFollower, Tell, name_of

_JOIN_LIMIT_S = 300.0
_NOWHERE = Endpoints("", "")
"""Engines are loaded without a frontend; each frontend has itself attached afterwards."""


class SharedModel(SeatFollower):
    """A model whose engines the frontends have sockets to; here is only counted who has joined what."""

    def __init__(
        self, plan: ModelPlan, version: int, tell: Tell, on_change: Callable[[SharedModel], None], pool: FrontendKeeper
    ) -> None:
        super().__init__(plan, version, tell, on_change)
        self._joined: set[str] = set()
        self._pool = pool

    @property
    def hosts(self) -> Collection[str]:
        """See SeatFollower; those that all frontends have joined."""
        return self._joined

    def give_up(self, error: PoolError) -> None:
        """A frontend cannot build the model's app: no host can help, unless one does already."""
        if self.client is None:
            self._fatal = self.error = error
            self._notify()

    def _listen(self, machine: str) -> Endpoints:
        return _NOWHERE

    async def _connect(self, key: Key) -> None:
        name = self.plan.spec.name
        self._pool.unsay(name, *key)  # what came late of an earlier seat there
        try:
            async with asyncio.timeout(_JOIN_LIMIT_S):
                await self._pool.all_say("joined", name, *key)
        except TimeoutError:
            raise HostError(f"not all frontends could join model {name!r} on {key[0]}") from None
        self._joined.add(name_of(key))
        if self.client is None:
            self.client = SharedClients(self.plan, self._pool)

    async def _disconnect(self, key: Key) -> None:
        name = self.plan.spec.name
        await self._pool.all_say("left", name, *key)
        self._lose(key)

    def _lose(self, key: Key) -> None:
        self._joined.discard(name_of(key))
        self._pool.unsay(self.plan.spec.name, *key)


class ClusterSupervisor(FrontendKeeper, ClusterServer):
    """The pool without a port of its own; see the module."""

    def __init__(
        self,
        config: PoolConfig,
        plans: list[ModelPlan],
        sock: socket.socket,
        session: Session,
        pool_file: str | None = None,
    ) -> None:
        super().__init__(config, plans, Starlette(), session, pool_file)
        self._prepare_frontends(plans, sock, session.address)

    def _look(self, version: int) -> SupervisorView:
        standings, view = self._standings(), self._view
        for name, model in self._models.items():
            if name in standings:
                standings[name] = replace(standings[name], version=model.version)
        seats = ClusterSeats(view.models, view.hosts, view.roles, view.overdue) if view else ClusterSeats({}, {}, {})
        return SupervisorView(version, None, 0, True, self._has_started, standings, self._pids, seats)

    async def _detach(self, index: int) -> None:
        await self._hosts.ask("detach_frontend", index)  # a host that does not answer is gone, or soon will be

    def _plan_for_frontends(self, name: str) -> ModelPlan | None:
        return self._models[name].plan if name in self._models else super()._plan_for_frontends(name)

    def _model(self, plan: ModelPlan) -> SeatFollower:
        return SharedModel(replace(plan, checked=None), self._revision, self._tell, self._show, self)

    # -- what frontends ask --------------------------------------------------------------------------

    def _calls(self) -> list[Callable[..., Any]]:
        told = [self.state, self.trace, self.host_metrics, self.decisions, self.loads, self.ask_hosts]
        return [*super()._calls(), *told, self.attach, self.left]

    async def attach(self, index: int, pid: int, model: str, host: str, life: str, endpoints: Endpoints) -> None:
        """Let a model's engine on a host serve that frontend too, which listens at `endpoints`."""
        if self._view is None or self._view.hosts.get(host) != life:
            raise HostError(f"{host} has a new process: {life} is gone")
        await self._hosts.ask_one(host, "attach_at", model, index, *endpoints)

    async def left(self, index: int, pid: int, model: str, *where: str) -> None:
        """A frontend has nothing at a model's engine there any more."""
        await self._say("left", pid, model, where)

    async def failed(self, index: int, pid: int, model: str, error: PoolError) -> None:
        """See FrontendKeeper."""
        await super().failed(index, pid, model, error)
        if isinstance(shared := self._models.get(model), SharedModel):
            shared.give_up(error)

    async def loads(self) -> dict[str, Any]:
        """What hosts told last of their queues."""
        return {host: load for host, load in self._loads.items() if not isinstance(load, Exception)}

    async def ask_hosts(self, method: str, *args: Any) -> Any:
        """See the hosts' `call`."""
        return await self._hosts.call(method, *args)

    async def state(self) -> dict[str, Any]:
        """See ClusterServer.state; requests in flight and handed over are those of all frontends."""
        return state_of_all(await super().state(), await self.report(), self._pids)
