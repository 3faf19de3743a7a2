# SPDX-License-Identifier: Apache-2.0
"""One of several frontends of a clustered pool. It knows neither Ray nor the controller: the supervisor tells it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Mapping
from functools import partial
from typing import Any

from starlette.applications import Starlette

from tokenpool.cluster.values import ModelView, SeatState, SeatView
from tokenpool.errors import PoolError
from tokenpool.policy.capacity import Role
from tokenpool.serve.cluster_model import ClusterModel, EndpointMaker
from tokenpool.serve.frontend_process import FrontendSettings
from tokenpool.serve.frontend_server import RETRY_S, FrontendServer, sendable
from tokenpool.serve.frontend_view import ModelStanding, SupervisorView
from tokenpool.serve.keeper import Work
from tokenpool.serve.seat_follower import Key

logger = logging.getLogger(__name__)

_LOADS_PERIOD_S = 1.0


class FrontendModel(ClusterModel):
    """A model whose engines are there before this frontend: they are told where it listens once they serve."""

    def apply(
        self,
        view: ModelView | None,
        lives: Mapping[str, str],
        roles: Mapping[str, Role],
        overdue: Collection[str] = (),
    ) -> None:
        """See SeatFollower; an engine that went without a word, between two views, is not joined any more."""
        seats = view.seats if view is not None else {}
        there = {(host, seat.life) for host, seat in seats.items()}
        for key in self._joining.keys() - there:
            self._forget(key)
        super().apply(view, lives, roles, overdue)

    def _follow(self, key: Key, seat: SeatView) -> None:
        if seat.state is SeatState.SERVING and key not in self._joining:
            self._offered[key] = self._listen(seat.machine)
            self._begin_to_join(key)
        elif seat.state is SeatState.LEAVING or (seat.state is SeatState.REMOVING and key in self._joining):
            self._begin_to_leave(key)

    async def _join(self, key: Key) -> None:
        name = self.plan.spec.name
        while True:
            try:
                await self._tell("attach", name, *key, self._offered[key])
                await self._connect(key)
                break
            except Exception as error:  # such as a host that has just ended; the next view says so
                logger.warning("host cannot be joined model=%s host=%s: %s", name, key[0], error)
                if self._fatal is not None:
                    await self._say("failed", sendable(self._fatal))
                    return
                await asyncio.sleep(RETRY_S)
        self._notify()
        await self._say("joined", *key)


class _Hosts:
    """All hosts as the one host that `PoolServer` knows."""

    def __init__(self, ask: Callable[..., Awaitable[Any]]) -> None:
        self._ask = ask

    async def call(self, method: str, *args: Any) -> Any:
        """What the hosts answer together."""
        return await self._ask("ask_hosts", method, *args)

    async def stop(self, limit_s: float) -> None:
        """Nothing."""


class ClusterFrontend(FrontendServer):
    """A frontend; see the module."""

    def __init__(self, settings: FrontendSettings, outer: Starlette) -> None:
        super().__init__(settings, outer)
        self._host = _Hosts(self._ask)  # type: ignore[assignment]
        self._models: dict[str, FrontendModel] = {}
        always_tcp = settings.config.cluster.transport == "tcp"
        self._endpoints = EndpointMaker(self._folder, settings.address, always_tcp=always_tcp)

    # -- the supervisor ------------------------------------------------------------------------------

    def _background(self) -> Mapping[str, Work]:
        return {**super()._background(), "asking for queues": self._ask_loads}

    async def _ask_loads(self) -> None:
        """Learn of the hosts' queues and where weights are, while a model has several hosts to choose from."""
        while True:
            await asyncio.sleep(_LOADS_PERIOD_S)
            if shared := [model for model in self._models.values() if len(model.hosts) > 1]:
                try:
                    loads = await self._ask("loads")
                except PoolError as error:
                    logger.debug("no loads: %s", error)
                    continue
                for model in shared:
                    model.learn(loads)

    def _has_all(self) -> bool:
        return self._view is not None and all(
            standing.state != "resident" or (name in self._models and self._models[name].is_served)
            for name, standing in self._view.models.items()
        )

    def _follow_host(self, view: SupervisorView) -> None:
        """Nothing: each model follows its hosts."""

    def _follow_model(self, name: str, standing: ModelStanding) -> None:
        model = self._models.get(name)
        if model is None:
            self._begin(name, self._make(name, standing))
            return
        assert self._view is not None and self._view.cluster is not None
        seats = self._view.cluster
        model.apply(seats.models.get(name), seats.lives, seats.roles, seats.overdue)
        self._take_state(name, standing, model.is_served)

    # -- models --------------------------------------------------------------------------------------

    async def _make(self, name: str, standing: ModelStanding) -> None:
        plan, version, index = standing.plan, standing.version, self._settings.index
        model = FrontendModel(plan, version, self._ask_as_this, self._endpoints, self._show, client_index=index)
        model.on_fault = partial(self.lives.client_fault, name)
        await model.prepare()
        self._models[name] = model

    def _show(self, model: ClusterModel) -> None:
        """Let the router know whether the model takes requests."""
        name = model.plan.spec.name
        app = self.router.models.get(name)
        if app is None or self._models.get(name) is not model or self._view is None:
            return
        if model.is_served:
            assert model.client is not None
            self._clients[name] = model.client
            app.answer_with(model.client)
        if name in self._view.models:
            self._take_state(name, self._view.models[name], model.is_served)

    async def _close(self, name: str) -> None:
        self._clients.pop(name, None)  # it belongs to the model
        if model := self._models.pop(name, None):
            await model.close()

    # -- what is told --------------------------------------------------------------------------------

    async def _report(self) -> dict[str, Any]:
        handed_over = {name: model.num_handed_over for name, model in self._models.items()}
        return {**await super()._report(), "handed_over": handed_over}

    async def state(self) -> dict[str, Any]:
        """See ClusterServer.state."""
        return await self._ask("state")

    async def trace(self, last_s: float | None) -> dict[str, Any]:
        """See ClusterServer.trace."""
        return await self._ask("trace", last_s)

    async def host_metrics(self) -> dict[str, str]:
        """See ClusterServer.host_metrics."""
        return await self._ask("host_metrics")

    async def decisions(self, limit: int | None) -> list[dict[str, Any]]:
        """See ClusterServer.decisions."""
        return await self._ask("decisions", limit)
