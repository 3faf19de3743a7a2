# SPDX-License-Identifier: Apache-2.0
"""The hosts of a cluster, to whose engines several frontends have sockets: they know neither Ray nor the controller."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any

from starlette.applications import Starlette

from tokenpool.cluster.values import Endpoints, ModelView, SeatState, SeatView
from tokenpool.errors import HostError, PoolError
from tokenpool.policy.capacity import Role
from tokenpool.serve.access.tenants import tenants_of
from tokenpool.serve.clustered.lease_keeper import LeaseKeeper
from tokenpool.serve.clustered.ray_hosts import RayHosts
from tokenpool.serve.clustered.ray_pool import PlannedCluster, cluster_operator
from tokenpool.serve.clustered.seat_follower import Key, SeatFollower, Tell, name_of
from tokenpool.serve.frontends.frontend_view import ClusterSeats, SupervisorView
from tokenpool.serve.frontends.frontends import Frontends
from tokenpool.serve.frontends.sayings import Sayings
from tokenpool.serve.frontends.shared_hosts import JOIN_LIMIT_S, SharedClients, standing_of
from tokenpool.serve.frontends.told_uses import ToldHold
from tokenpool.serve.launch.model_plan import ModelPlan
from tokenpool.serve.pool.models import Models, PoolModel
from tokenpool.serve.pool.pool import Pool


class SharedModel(SeatFollower):
    """A model whose engines the frontends have sockets to; here is only counted who has joined what."""

    def __init__(
        self,
        plan: ModelPlan,
        version: int,
        tell: Tell,
        on_change: Callable[[SharedModel], None],
        sayings: Sayings,
    ) -> None:
        super().__init__(plan, version, tell, on_change)
        self.numbers: dict[str, int] = {}
        """By engine: with which number frontends say that they have joined it, or left it."""
        self._joined: set[str] = set()
        self._sayings = sayings

    @property
    def hosts(self) -> Collection[str]:
        """See SeatFollower; those that all frontends have joined."""
        return self._joined

    def give_up(self, error: PoolError) -> None:
        """A frontend cannot build the model's app, and tries again: no host can help, unless one does already."""
        if self.client is None:
            self._fatal = self.error = error
            self._notify()

    def apply(
        self,
        view: ModelView | None,
        lives: Mapping[str, str],
        roles: Mapping[str, Role],
        overdue: Collection[str] = (),
    ) -> None:
        """See SeatFollower; what frontends are to say of an engine that is gone is waited for no longer."""
        there = {(host, seat.life) for host, seat in view.seats.items()} if view is not None else set()
        for key in [key for key in self._leaving if key not in there or lives.get(key[0]) != key[1]]:
            self._leave_no_more(key)
        super().apply(view, lives, roles, overdue)
        for name in self.numbers.keys() - {name_of(key) for key in there}:
            self._sayings.drop(self.numbers.pop(name))

    def _follow(self, key: Key, seat: SeatView) -> None:
        is_new = seat.state is SeatState.SERVING and key not in self._joining
        if is_new and key in self._leaving:
            self._leave_no_more(key)
        if is_new or name_of(key) not in self.numbers:
            self._sayings.drop(self.numbers.get(name_of(key), 0))
            self.numbers[name_of(key)] = self._sayings.ask()
        super()._follow(key, seat)

    def _leave_no_more(self, key: Key) -> None:
        self._leaving.pop(key).cancel()
        self._lose(key)

    async def _connect(self, key: Key, machine: str) -> None:
        name = self.plan.spec.name
        try:
            async with asyncio.timeout(JOIN_LIMIT_S):
                await self._sayings.all_say("joined", self.numbers[name_of(key)])
        except TimeoutError:
            raise HostError(f"not all frontends could join model {name!r} on {key[0]}") from None
        self._joined.add(name_of(key))
        self._fatal = None  # whoever said so could build it now, or is gone
        if self.client is None:
            self.client = SharedClients(self.plan, self._sayings)

    async def _disconnect(self, key: Key) -> None:
        await self._sayings.all_say("left", self.numbers[name_of(key)])
        self._lose(key)

    def _lose(self, key: Key, blame: bool = True) -> None:
        self._joined.discard(name_of(key))

    async def close(self) -> None:
        """See SeatFollower; nothing is to be said of it any more."""
        await super().close()
        for number in self.numbers.values():
            self._sayings.drop(number)


def shared_model(sayings: Sayings, model: PoolModel, revision: int, hosts: RayHosts) -> SharedModel:
    """What follows a model's seats for all frontends; see RayHosts."""
    return SharedModel(model.plan_to_send, revision, hosts.answer, hosts.show, sayings)


class SharedCluster:
    """See `SharedHosts`."""

    def __init__(self, hosts: RayHosts, models: Models, sayings: Sayings) -> None:
        self._hosts = hosts
        self._models = models
        self._sayings = sayings

    def view(self, version: int, has_started: bool, pids: Mapping[int, int]) -> SupervisorView:
        """See SharedHosts."""
        view = self._hosts.view
        standings = {
            name: standing_of(self._models[name], version=version, birth=self._hosts.birth_of(name))
            for name, version in self._hosts.versions.items()
            if name in self._models
        }
        seats = ClusterSeats({}, {}, {})
        if view:
            seats = ClusterSeats(
                view.models, view.hosts, view.roles, self._hosts.overdue, self._numbers(), len(view.peers)
            )
        return SupervisorView(version, None, 0, True, has_started, standings, dict(pids), self._hosts.is_alive, seats)

    def _numbers(self) -> dict[str, dict[str, int]]:
        followers = self._hosts.followers.items()
        return {name: dict(each.numbers) for name, each in followers if isinstance(each, SharedModel)}

    async def detach(self, index: int) -> None:
        """See SharedHosts; a host that does not answer is gone, or soon will be."""
        await self._hosts.detach(index)

    async def fail(self, model: str, birth: int, error: PoolError) -> None:
        """See SharedHosts."""
        follower = self._hosts.followers.get(model)
        if isinstance(follower, SharedModel) and follower.birth == birth:
            follower.give_up(error)

    # -- what frontends ask --------------------------------------------------------------------------

    def calls(self) -> list[Callable[..., Any]]:
        """See SharedHosts."""
        return [self.loads, self.ask_hosts, self.attach, self.left]

    async def attach(self, index: int, life: int, model: str, host: str, host_life: str, endpoints: Endpoints) -> None:
        """Let a model's engine on a host serve that frontend too, which listens at `endpoints`."""
        if self._sayings.up.get(index) != life:
            raise HostError("this frontend is gone, and another one has its index")
        await self._hosts.attach(model, host, host_life, endpoints, index)

    async def left(self, index: int, life: int, model: str, number: int) -> None:
        """A frontend has nothing any more at the engine of a model that has that number."""
        await self._sayings.say("left", life, number)

    async def loads(self) -> dict[str, Any]:
        """What hosts told last of their queues."""
        return {host: load for host, load in self._hosts.loads.items() if not isinstance(load, Exception)}

    async def ask_hosts(self, method: str, *args: Any) -> Any:
        """See RayHosts.ask_as_one."""
        return await self._hosts.ask_as_one(method, *args)


def cluster_frontends(planned: PlannedCluster, pool_file: str | None, sock: socket.socket) -> Frontends:
    """Several frontends, which answer at `sock`, of a pool on the hosts of a cluster."""
    config, session, sayings = planned.config, planned.session, Sayings(planned.config.frontends)

    def make_hosts(models: Models) -> RayHosts:
        return RayHosts(models, session, partial(shared_model, sayings), planned.versions, config.frontends)

    pool = Pool(config, planned.plans, Starlette(), make_hosts, make_hold=ToldHold)
    shared = SharedCluster(pool.hosts, pool.models, sayings)
    operator = cluster_operator(pool, pool_file)
    where = (session.address, session.first_index, session.folder)
    frontends = Frontends(pool, operator, shared, sayings, sock, *where)
    if tenants := [tenant.name for tenant in tenants_of(config)]:
        pool.hosts.leases = LeaseKeeper(tenants, frontends.tenants_told, frontends.set_leases)
    return frontends
