# SPDX-License-Identifier: Apache-2.0
"""Loads models that requests wait for and unloads those that nobody uses, one at a time.

Which model is next depends on who waits: tenants have turns, and the most urgent request of one comes first. For one
more than `max_loaded` the model goes that has been idle for longest; if none is idle, and somebody has waited for
PATIENCE_S, the one that has the least to do takes nothing new, and goes when it has finished.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time

from tokenpool.config import Loading
from tokenpool.errors import CapacityError, PoolError
from tokenpool.metric_registry import metric
from tokenpool.model_life import Life
from tokenpool.process.ending import within
from tokenpool.process.metric_files import forget_models
from tokenpool.serve.pool.local_hosts import LocalHosts
from tokenpool.serve.pool.models import Models, PoolModel

logger = logging.getLogger(__name__)

LOOK_S = 0.1
PATIENCE_S = 5.0
"""So long a request waits for a model that is to be idle before one is asked to finish."""
_CLOSE_S = 3.0
_FINISH_LIMIT_S, _FINISH_LOOK_S = 5.0, 0.01
_TO_LOAD = (Life.LOADING, Life.UNAVAILABLE)
LOADS, UNLOADS = metric("demand_loads").make(), metric("unloads").make()


class Demand:
    """What is loaded of a pool; lives on its event loop."""

    def __init__(self, models: Models, hosts: LocalHosts, max_loaded: int | None) -> None:
        self._models = models
        self._hosts = hosts
        self._max_loaded = max_loaded
        hosts.make_room = self.give_way

    async def run(self) -> None:
        """Look when something is wanted, and when a model may be unused for long enough, until cancelled."""
        while True:
            await self.look()
            try:
                async with asyncio.timeout(self._next_look_s()):
                    await self._models.wanted.wait()
            except TimeoutError:
                pass
            self._models.wanted.clear()

    def _next_look_s(self) -> float | None:
        """After how long there may be something to do, if nobody says so before; None = not at all."""
        next_s, now_s = math.inf, time.monotonic()
        for model in self._models.values():
            app, unload_after_s = model.app, model.rule.unload_after_s
            is_coming = model.client is None and app.state != Life.COLD
            if app.is_resting or len(app.hold) or (is_coming and (model.is_on_demand or unload_after_s < math.inf)):
                return LOOK_S
            if model.client is not None:
                next_s = min(next_s, app.last_used_s + unload_after_s - now_s)
        return max(LOOK_S, next_s) if math.isfinite(next_s) else None

    async def look(self) -> None:
        """Do what is to be done now."""
        self._forget_unwanted()
        for model in self._models.loaded():
            idle_s = time.monotonic() - model.app.last_used_s
            is_unused = idle_s >= model.rule.unload_after_s and self._may_go(model) and model.is_idle
            if is_unused or model.app.is_resting:
                await self.unload(model)
        wanted = [model for model in self._models.to_load() if model.client is None and len(model.app.hold)]
        wanted = [model for model in wanted if model.app.state in _TO_LOAD]
        if wanted and await self.make_room(wanted[0]):
            self._models.take_turn(wanted[0])
            try:
                await self._hosts.retry(wanted[0])
                LOADS.inc(wanted[0].client is not None)
            except PoolError as error:  # the host ended: the next one loads what is waited for
                logger.debug("no success model=%s: %s", wanted[0].name, error)

    def _forget_unwanted(self) -> None:
        """Those for which nobody waits any more are cold again before anything of them is built."""
        if self._models.changing.locked():
            return  # something is being built, perhaps one of them
        for model in self._models.values():
            if model.app.state in _TO_LOAD and not model.is_wanted:
                model.app.move(Life.COLD)

    def _idle(self) -> list[PoolModel]:
        """Models that may go and have nothing to do, in the order of `Models.loaded`."""
        return [model for model in self._models.loaded() if self._may_go(model) and model.is_idle]

    def _may_go(self, model: PoolModel) -> bool:
        return model.app.state == Life.READY and model.rule.keep is None and not model.is_leaving

    async def make_room(self, wanted: PoolModel) -> bool:
        """Unload what `wanted` takes the place of; returns whether it may be loaded now."""
        loaded = self._models.loaded()
        if self._max_loaded is None or len(loaded) < self._max_loaded:
            return True
        if idle := self._idle():
            return await self.unload(idle[0]) and len(self._models.loaded()) < self._max_loaded
        if any(model.app.is_resting for model in loaded) or time.monotonic() - wanted.app.hold.since_s < PATIENCE_S:
            return False
        busy = [model for model in loaded if self._may_go(model)]
        if busy:
            model = min(busy, key=lambda model: model.app.inflight)
            logger.info("draining model=%s requests_left=%d for=%s", model.name, model.app.inflight, wanted.name)
            self._rest(model)
        return False

    def _rest(self, model: PoolModel) -> None:
        """Let it finish what it has; what comes now waits until it is loaded again."""
        assert model.client is not None
        model.app.is_resting = True
        model.client.rest(True)
        model.app.move(Life.DRAINING)

    async def unload(self, model: PoolModel) -> bool:
        """Unload an idle model, which is cold then, or rests until it has finished; returns whether it is gone."""
        async with self._models.changing:
            return await self._unload(model)

    async def make_room_for_added(self, rule: Loading) -> None:
        """The same as `make_room` for a model that is about to be added; the caller holds `changing`.

        Raises CapacityError if nothing is idle.
        """
        loaded = self._models.loaded()
        if not rule.at_start or self._max_loaded is None or len(loaded) < self._max_loaded:
            return
        if not await self.give_way():
            raise CapacityError(f"max_loaded is {self._max_loaded}, and what is loaded is kept or in use")

    async def give_way(self) -> bool:
        """Unload the one that has been idle for longest; returns whether there is one. The caller holds `changing`."""
        if not (idle := self._idle()):
            return False
        model, deadline_s = idle[0], time.monotonic() + _FINISH_LIMIT_S
        self._rest(model)
        while not model.has_finished and time.monotonic() < deadline_s:  # several frontends say so one after the other
            await asyncio.sleep(_FINISH_LOOK_S)
        is_gone = await self._unload(model)
        if not is_gone:
            self._models.wanted.set()  # that somebody sees to it when it has finished
        return is_gone

    async def _unload(self, model: PoolModel) -> bool:
        if self._models.get(model.name) is not model or model.is_leaving or (client := model.client) is None:
            return False
        if not model.app.is_resting:
            if not (self._may_go(model) and model.is_idle):
                return False  # somebody was faster
            self._rest(model)
        if not model.has_finished:
            return False
        try:
            await self._hosts.remove(model)
        except PoolError as error:  # it has requests, its host says, or does not answer: tried again
            logger.warning("model is not unloaded model=%s: %s", model.name, error)
            model.app.is_resting = False
            client.rest(False)
            model.restore()
            return False
        series, model.client = self._models.series_of(model), None
        await within(_CLOSE_S, f"closing model {model.name!r}", client.close())
        await asyncio.to_thread(forget_models, series)
        model.get_cold()
        UNLOADS.inc()
        logger.info("model cold model=%s", model.name)
        return True
