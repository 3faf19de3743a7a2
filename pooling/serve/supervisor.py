# SPDX-License-Identifier: Apache-2.0
"""Several frontends of one host: a process that answers no client starts, watches and restarts the host and them."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import uvloop
from starlette.applications import Starlette
from vllm.utils.system_utils import set_ulimit

from tokenpool.config import PoolConfig
from tokenpool.errors import HostError, PoolError
from tokenpool.host.hosted_core import EngineAddresses
from tokenpool.serve.ending import END_MARGIN_S, end_after
from tokenpool.serve.frontend_keeper import FrontendKeeper, SharedClients
from tokenpool.serve.frontend_view import HostAddress, SupervisorView
from tokenpool.serve.host_process import HostProcess
from tokenpool.serve.launch_plan import ModelPlan, plan_pool
from tokenpool.serve.model_client import load_model
from tokenpool.serve.run import Timers, check_http, log_address

_JOIN_LIMIT_S = 300.0


def supervise(config: PoolConfig, cluster: str | None, pool_file: str | None, sock: socket.socket) -> None:
    """Serve on `sock` with several frontends until SIGTERM or SIGINT; raises PoolError when the pool cannot start."""
    if cluster is None:
        config, plans = plan_pool(config)

        def make() -> FrontendKeeper:
            return Supervisor(config, plans, sock)
    else:
        from tokenpool.serve.cluster_server import plan_on_cluster
        from tokenpool.serve.cluster_supervisor import ClusterSupervisor

        config, plans, session = plan_on_cluster(config, cluster)

        def make() -> FrontendKeeper:
            return ClusterSupervisor(config, plans, sock, session, pool_file)

    check_http(plans[0].args, config)
    set_ulimit()
    timers: Timers = []
    try:
        uvloop.run(_supervise(make, plans, sock, timers))
    finally:
        for timer in timers:
            timer.cancel()


async def _supervise(
    make: Callable[[], FrontendKeeper], plans: list[ModelPlan], sock: socket.socket, timers: Timers
) -> None:
    pool = make()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    starting, stopping = asyncio.create_task(pool.start()), asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            starting.result()
            log_address(plans, sock)
            await stopping
    finally:
        timers.append(end_after(pool.config.shutdown_timeout_s + END_MARGIN_S))
        starting.cancel()
        sock.close()  # nobody may connect any more; the frontends close theirs
        await asyncio.wait({starting}, timeout=pool.config.shutdown_timeout_s)
        await pool.stop()
        stopping.cancel()


class _Clients(SharedClients):
    """A model's clients, and the engine on the host that they share."""

    keeper: Supervisor

    def __init__(self, plan: ModelPlan, keeper: Supervisor) -> None:
        super().__init__(plan, keeper)
        self.host_pid = 0
        """The host process that has the model; 0 without one."""
        self.was_blamed = True
        self.has_served = False
        """Whether all frontends had it once: then one that cannot join is no reason to give up."""

    async def join(self, host: HostProcess) -> None:
        """Load the model in the host and wait until all frontends are there; raises PoolError."""
        self.added = await load_model(host, self.plan, EngineAddresses((), ()))
        name = self.plan.spec.name
        self.keeper.unsay(name, host.pid)
        self.host_pid = host.pid
        try:
            await self._until_all_joined(host, name)
        except BaseException:
            self.host_pid = 0
            with contextlib.suppress(Exception):  # a host that is gone holds nothing either
                await host.call("remove_model", name)
            raise

    async def _until_all_joined(self, host: HostProcess, name: str) -> None:

        def go_on() -> None:
            if not self.has_served:
                self.keeper.refuse_failed(name)
            if not self.keeper.has_host:
                raise HostError("the engine host ended")

        try:
            async with asyncio.timeout(_JOIN_LIMIT_S):
                await self.keeper.all_say("joined", name, host.pid, unless=go_on)
                self.has_served = True
        except TimeoutError:
            said = self.keeper.why_failed(name)
            raise HostError(f"not all frontends could join model {name!r}{f': {said}' if said else ''}") from None

    def lost(self, host: str, *, blame: bool = True) -> None:
        """The host is gone."""
        self.host_pid, self.was_blamed = 0, blame


class Supervisor(FrontendKeeper):
    """The pool without a port of its own; see the module."""

    def __init__(self, config: PoolConfig, plans: list[ModelPlan], sock: socket.socket) -> None:
        super().__init__(config, plans, Starlette())
        self._prepare_frontends(plans, sock)

    @property
    def has_host(self) -> bool:
        """Whether the host is there."""
        return self._host is not None and not self._host.ended

    def _look(self, version: int) -> SupervisorView:
        host, address = self._host, None
        if host is not None and not host.ended:
            address = HostAddress(host.name, host.pid, host.control_path, host.key)
        standings = self._standings()
        for name, clients in self._clients.items():
            if name in standings:
                standings[name] = replace(standings[name], host_pid=clients.host_pid)  # type: ignore[attr-defined]
        blamed = all(clients.was_blamed for clients in self._clients.values())  # type: ignore[attr-defined]
        return SupervisorView(
            version, address, self.host_restarts, blamed, self._has_started, standings, self._pids
        )

    async def _detach(self, index: int) -> None:
        if self._host is not None:
            with contextlib.suppress(PoolError):  # a host that is gone has none of its requests either
                await self._host.call("detach_frontend", index)

    async def _make_client(self, plan: ModelPlan) -> Any:
        assert self._host is not None
        clients = _Clients(replace(plan, checked=None), self)
        self._clients[plan.spec.name] = clients  # type: ignore[assignment]
        try:
            await clients.join(self._host)
        except BaseException:
            del self._clients[plan.spec.name]
            raise
        return clients
