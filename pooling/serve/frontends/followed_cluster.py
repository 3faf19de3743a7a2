# SPDX-License-Identifier: Apache-2.0
"""The engines of a cluster's hosts, to which each of several frontends has sockets of its own.

A frontend knows neither Ray nor the controller: the supervisor tells it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import Any

from tokenpool.cluster.values import SeatView
from tokenpool.errors import PoolError
from tokenpool.model_life import Life
from tokenpool.policy.routing import LOADS_PERIOD_S
from tokenpool.process.keeper import Work
from tokenpool.serve.clustered.cluster_model import ClusterModel, EndpointMaker
from tokenpool.serve.clustered.seat_follower import Key, name_of
from tokenpool.serve.frontends.followed_hosts import FollowedHosts
from tokenpool.serve.frontends.frontend_view import ModelStanding, SupervisorView, sendable
from tokenpool.serve.pool.host_watch import Call
from tokenpool.serve.pool.models import PoolModel

logger = logging.getLogger(__name__)


class FrontendModel(ClusterModel):
    """A model in one of several frontends, which tells its supervisor what it does."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.numbers: dict[str, int] = {}
        """By engine: with which number to say that it was joined, or left."""

    async def _tell_fatal(self) -> None:
        """See SeatFollower."""
        assert self._fatal is not None
        await self._say("failed", self.birth, sendable(self._fatal))

    def heed(self, numbers: Mapping[str, int]) -> None:
        """Follow seats that have these numbers, by engine, and begin anew where another number was."""
        for key in list(self._joining):
            if numbers.get(name_of(key), self.numbers[name_of(key)]) != self.numbers[name_of(key)]:
                self._forget(key, blame=False)
        kept = {name_of(key) for key in self._joining}
        self.numbers = {engine: number for engine, number in self.numbers.items() if engine in kept} | dict(numbers)

    def _follow(self, key: Key, seat: SeatView) -> None:
        if name_of(key) in self.numbers:
            super()._follow(key, seat)

    def _where(self, key: Key) -> tuple[Any, ...]:
        return (self.numbers.get(name_of(key), 0),)


class ClusterEngines:
    """See `Engines`."""

    def __init__(self, hosts: FollowedHosts) -> None:
        self._hosts = hosts
        self._followers: dict[str, FrontendModel] = {}
        settings = hosts.settings
        self._endpoints = EndpointMaker(hosts.folder, settings.address, settings.config.cluster)

    def call(self) -> Call | None:
        """See Engines."""
        return self._ask_hosts

    async def _ask_hosts(self, method: str, *args: Any) -> Any:
        """What the hosts answer together."""
        return await self._hosts.ask("ask_hosts", method, *args)

    def works(self) -> Mapping[str, Work]:
        """See Engines."""
        return {"asking for queues": self._ask_loads}

    async def _ask_loads(self) -> None:
        """Learn of the hosts' queues and where weights are, while a model has several hosts to choose from."""
        while True:
            await asyncio.sleep(LOADS_PERIOD_S)
            if shared := [follower for follower in self._followers.values() if len(follower.hosts) > 1]:
                try:
                    loads = await self._hosts.ask("loads")
                except PoolError as error:
                    logger.debug("no loads: %s", error)
                    continue
                for follower in shared:
                    follower.learn(loads)

    def has(self, name: str, standing: ModelStanding) -> bool:
        """See Engines."""
        return standing.state != Life.READY or (name in self._followers and self._followers[name].is_served)

    def follow_hosts(self, view: SupervisorView) -> None:
        """See Engines; each model follows its hosts by itself."""
        if view.cluster is not None:
            self._hosts.models.share_queues(max(1, view.cluster.num_servers))

    def follow(self, model: PoolModel, standing: ModelStanding, view: SupervisorView) -> None:
        """See Engines."""
        follower, seats = self._followers.get(model.name), view.cluster
        assert seats is not None
        if follower is not None and follower.birth != standing.birth:
            if model.client is None or model.has_finished:
                self._hosts.begin(model.name, self._hosts.chill(model))
            else:  # what it has goes on once the model is loaded again
                follower.birth = standing.birth or follower.birth
        elif follower is None and standing.birth:
            self._hosts.begin(model.name, self._make(model, standing))
        if follower is not None:
            follower.heed(seats.numbers.get(model.name, {}))
            follower.apply(seats.models.get(model.name), seats.lives, seats.roles, seats.overdue)
        self._hosts.take_state(model, standing, follower is not None and follower.is_served)

    async def _make(self, model: PoolModel, standing: ModelStanding) -> None:
        tell, index = self._hosts.ask_as_this, self._hosts.settings.client_index
        plan = self._hosts.plan_of(model.name, standing)
        follower = FrontendModel(plan, standing.version, tell, self._endpoints, self._show, client_index=index)
        follower.on_fault, follower.birth = model.note_client_fault, standing.birth
        await follower.prepare()
        self._followers[model.name] = follower

    def _show(self, follower: ClusterModel) -> None:
        """Let the router know whether the model takes requests."""
        name = follower.plan.spec.name
        model = self._hosts.models.get(name)
        if model is None or self._followers.get(name) is not follower:
            return
        if follower.is_served:
            assert follower.client is not None
            model.answer_with(follower.client)
        if (standing := self._hosts.standing_of(model)) is not None:
            self._hosts.take_state(model, standing, follower.is_served)

    async def close(self, model: PoolModel) -> None:
        """See Engines; the client belongs to what follows the model's seats."""
        if follower := self._followers.pop(model.name, None):
            await follower.close()

    def report(self) -> dict[str, Any]:
        """See Engines."""
        return {"handed_over": {name: follower.num_handed_over for name, follower in self._followers.items()}}
