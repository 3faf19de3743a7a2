# SPDX-License-Identifier: Apache-2.0
"""One host on this machine, to whose engines several frontends have sockets."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import socket
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from starlette.applications import Starlette

from tokenpool.config import PoolConfig
from tokenpool.errors import HostError, PoolError
from tokenpool.process.template import Template
from tokenpool.serve.client.host_process import HostProcess
from tokenpool.serve.client.model_client import load_model
from tokenpool.serve.frontends.frontend_view import HostAddress, SupervisorView
from tokenpool.serve.frontends.frontends import Frontends
from tokenpool.serve.frontends.sayings import Sayings
from tokenpool.serve.frontends.shared_hosts import JOIN_LIMIT_S, SharedClients, standing_of
from tokenpool.serve.frontends.told_uses import ToldHold
from tokenpool.serve.launch.model_plan import ModelPlan
from tokenpool.serve.pool.demand import Demand
from tokenpool.serve.pool.local_hosts import LocalHosts
from tokenpool.serve.pool.models import Models, PoolModel
from tokenpool.serve.pool.pool import Pool
from tokenpool.serve.pool.pool_operator import PoolOperator
from tokenpool.wire.addresses import EngineAddresses

_births = itertools.count(1)


class HostClients(SharedClients):
    """A model's clients in all frontends, and its engine on the host."""

    def __init__(self, plan: ModelPlan, sayings: Sayings) -> None:
        super().__init__(plan, sayings)
        self.engine = 0
        """Which of all loads of models in hosts the present one is; 0 while no host has it."""
        self.birth = next(_births)
        """Which of all loads of cold models this one is."""
        self.was_blamed = True
        """Whether the requests that the last dead host had may have killed it."""
        self.has_served = False
        """Whether all frontends had it once: then one that cannot join is no reason to give up."""

    async def join(self, host: HostProcess) -> None:
        """Load the model in the host and wait until all frontends are there; raises PoolError."""
        name = self.plan.spec.name
        self.added = await load_model(host, self.plan, EngineAddresses((), ()))
        self._sayings.forget_failure(self.birth)
        self._sayings.drop(self.engine)
        self.engine = self._sayings.ask()
        try:
            await self._until_all_joined(host, name)
        except BaseException:
            self._forget_engine()
            with contextlib.suppress(Exception):  # a host that is gone holds nothing either
                await host.call("remove_model", name)
            raise

    async def _until_all_joined(self, host: HostProcess, name: str) -> None:

        def go_on() -> None:
            if not self.has_served:
                self._sayings.refuse_failed(self.birth)
            if host.ended:
                raise HostError("the engine host ended")

        try:
            async with asyncio.timeout(JOIN_LIMIT_S):
                await self._sayings.all_say("joined", self.engine, unless=go_on)
                self.has_served = True
        except TimeoutError:
            said = self._sayings.why_failed(self.birth)
            raise HostError(f"not all frontends could join model {name!r}{f': {said}' if said else ''}") from None

    def lost(self, host: str, *, blame: bool = True) -> None:
        """See Client."""
        self._forget_engine()
        self.was_blamed = blame

    def _forget_engine(self) -> None:
        self._sayings.drop(self.engine)
        self.engine = 0

    async def close(self) -> None:
        """See Client."""
        await super().close()
        self._forget_engine()
        self._sayings.forget_failure(self.birth)


class SharedHost:
    """See `SharedHosts`."""

    def __init__(self, hosts: LocalHosts, models: Models, sayings: Sayings) -> None:
        self._hosts = hosts
        self._models = models
        self._sayings = sayings

    def view(self, version: int, has_started: bool, pids: Mapping[int, int]) -> SupervisorView:
        """See SharedHosts."""
        host, address = self._hosts.process, None
        if host is not None and not host.ended:
            address = HostAddress(host.name, host.pid, host.control_path, host.key)
        clients = {name: _clients_of(model) for name, model in self._models.items()}
        standings = {
            name: standing_of(model, engine=shared.engine, birth=shared.birth)
            if (shared := clients[name])
            else standing_of(model)
            for name, model in self._models.items()
        }
        blamed = all(shared.was_blamed for shared in clients.values() if shared)
        restarts, is_alive = self._hosts.num_restarts, self._hosts.is_alive
        return SupervisorView(version, address, restarts, blamed, has_started, standings, dict(pids), is_alive)

    async def detach(self, index: int) -> None:
        """See SharedHosts; a host that is gone has none of its requests either."""
        if self._hosts.process is not None:
            with contextlib.suppress(PoolError):
                await self._hosts.process.call("detach_frontend", index)

    async def fail(self, model: str, birth: int, error: PoolError) -> None:
        """See SharedHosts."""
        await self._sayings.fail(birth, error)

    def calls(self) -> list[Callable[..., Any]]:
        """See SharedHosts."""
        return []


async def load_for_all(sayings: Sayings, model: PoolModel, host: HostProcess) -> SharedClients:
    """Load a model in a host for all frontends; raises PoolError. See `Loader`."""
    if (clients := _clients_of(model)) is not None:
        await clients.join(host)
        return clients
    model.client = clients = HostClients(model.plan_to_send, sayings)  # frontends see where they are to join
    try:
        await clients.join(host)
    except BaseException:
        model.client = None
        raise
    return clients


def _clients_of(model: PoolModel) -> HostClients | None:
    assert model.client is None or isinstance(model.client, HostClients)
    return model.client


def host_frontends(
    config: PoolConfig, plans: list[ModelPlan], template: Template | None, pool_file: str | None, sock: socket.socket
) -> Frontends:
    """Several frontends, which answer at `sock`, of a pool on one host of this machine; `pool_file` is followed."""
    sayings = Sayings(config.frontends)
    load = partial(load_for_all, sayings)
    make_hosts = partial(LocalHosts, config, load=load, template=template)
    pool = Pool(config, plans, Starlette(), make_hosts, make_hold=ToldHold)
    shared = SharedHost(pool.hosts, pool.models, sayings)
    operator = PoolOperator(pool, pool_file, Demand(pool.models, pool.hosts, config.max_loaded))
    frontends = Frontends(pool, operator, shared, sayings, sock)
    pool.hosts.count_requests = frontends.count_requests
    return frontends
