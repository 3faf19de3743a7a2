# SPDX-License-Identifier: Apache-2.0
"""The pool behind a port: its router, its models, and its hosts, which may be anywhere."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from typing import Any, Generic, TypeVar

from starlette.applications import Starlette
from starlette.responses import Response

from tokenpool.config import PoolConfig
from tokenpool.process.ending import let_finish, within
from tokenpool.process.keeper import Work, start_kept
from tokenpool.serve.access.auth import error_response
from tokenpool.serve.access.guard import guarded
from tokenpool.serve.access.holding import Hold
from tokenpool.serve.access.shared_limits import SharedLimits
from tokenpool.serve.access.tenants import TenantBook
from tokenpool.serve.gateway.router import ModelRouter
from tokenpool.serve.launch.model_plan import ModelPlan
from tokenpool.serve.pool.hosts import Hosts
from tokenpool.serve.pool.models import Models

_CLOSE_S = 3.0


HostsT_co = TypeVar("HostsT_co", bound=Hosts, covariant=True)


class Pool(Generic[HostsT_co]):
    """Serves models on hosts. Lives on one event loop."""

    def __init__(
        self,
        config: PoolConfig,
        plans: Iterable[ModelPlan],
        outer: Starlette,
        make_hosts: Callable[[Models], HostsT_co],
        *,
        frontend: int | None = None,
        limits: SharedLimits | None = None,
        make_hold: Callable[[], Hold] = Hold,
    ) -> None:
        """`outer` answers for the whole pool and finds this object in its state.

        With several frontends this one has the index `frontend`, and `limits` is where all keep tenants' limits.
        `make_hold` makes the place where requests wait for a model.
        """
        self.config = config
        self.tenants = TenantBook.of(config, limits, frontend or 0)
        self.router = ModelRouter(outer, max_request_bytes=config.max_request_bytes, tenants=self.tenants)
        self.app = guarded(self.router, config, self.tenants)
        self.models = Models(config, self.router, 1 if frontend is None else config.frontends, make_hold)
        for plan in plans:
            self.models.add(plan)
        self.hosts = make_hosts(self.models)
        self.models.progress_of = self.hosts.watch.share
        self.works: dict[str, Work] = {}
        """What goes on beside the requests from the start on, by name, with what the hosts have to do."""
        self.stopping = False
        self._tasks: list[asyncio.Task[None]] = []
        self._watching: asyncio.Task[None] | None = None
        outer.state.pool = self

    @property
    def ready(self) -> bool:
        """Whether it wants requests: a host is alive, some model serves or holds them, and it is not shutting down."""
        return not self.stopping and self.hosts.is_alive and not self.models.have_failed

    @property
    def settled(self) -> bool:
        """Whether it is ready and no model is on its way: each is ready, cold or failed."""
        return self.ready and self.hosts.has_started and self.models.settled

    def inflight(self) -> dict[str, int]:
        """Requests in flight here, per model."""
        return {model.name: model.app.inflight for model in self.models.values()}

    def tenants_report(self) -> dict[str, Any]:
        """Each tenant's limits, what is left of them, and its usage and requests that are held here, per model."""
        lines = {model.name: model.app.gate.line for model in self.models.values()}
        return self.tenants.report(lines) if self.tenants is not None else {}

    async def may_listen(self) -> None:
        """Return when the port may be answered."""
        await self.hosts.may_listen()

    async def start(self) -> None:
        """Start the hosts and all models; raises PoolError, with nothing left running, when none can be served."""
        self._watching = start_kept("watching the host", self.hosts.watch.run)
        try:
            await self.hosts.start()
            self.models.refuse_if_all_failed()
        except BaseException:
            await self.stop()
            raise
        self._tasks = [start_kept(task, work) for task, work in {**self.works, **self.hosts.works()}.items()]

    async def stop(self) -> None:
        """Finish what was accepted, at most `shutdown_timeout` long, then end everything, each part within a limit."""
        self.announce_stop()
        for task in self._tasks:
            task.cancel()
        for model in self.models.values():
            model.app.hold.close(_stopping)
        deadline = time.monotonic() + self.config.shutdown_timeout_s
        await self.router.let_through(self.config.shutdown_timeout_s)
        served = [model for model in self.models.values() if model.client is not None]
        clients = {model.name: model.client for model in served if model.client is not None}
        await asyncio.gather(*(let_finish(model, deadline - time.monotonic()) for model in served))
        await asyncio.gather(*(within(_CLOSE_S, f"closing model {name!r}", c.close()) for name, c in clients.items()))
        await self.hosts.stop()
        if self._watching is not None:
            self._watching.cancel()
        for model in self.models.values():
            model.client = None

    def announce_stop(self) -> None:
        """Take no more changes, and be not ready any more."""
        self.stopping = self.hosts.watch.stopping = True
        self.hosts.freeze()


def _stopping() -> Response:
    message = "The server stops, and no model is loaded any more; retry after 5 s."
    return error_response(503, "ServiceUnavailableError", message, None, {"retry-after": "5"})
