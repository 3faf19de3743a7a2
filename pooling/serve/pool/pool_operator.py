# SPDX-License-Identifier: Apache-2.0
"""Changes a pool, and tells how it is, in the process that has the hosts."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from tokenpool.config import ModelSpec
from tokenpool.errors import ConfigError, HostError, ModelUnavailableError, PoolError
from tokenpool.model_life import Life
from tokenpool.process.ending import let_finish
from tokenpool.process.metric_files import forget_models
from tokenpool.recent_logs import in_order, recent_lines
from tokenpool.serve.launch.launch_plan import plan_added
from tokenpool.serve.launch.names import check_names, names_of
from tokenpool.serve.launch.pool_file import PoolFile
from tokenpool.serve.pool.demand import Demand
from tokenpool.serve.pool.hosts import ManagedHosts
from tokenpool.serve.pool.models import reason_of
from tokenpool.serve.pool.pool import Pool
from tokenpool.wire.budget import BudgetOrder, BudgetState

logger = logging.getLogger(__name__)

_LOOK_S = 0.1
_STOPPING_RETRY_S = 30.0


class PoolOperator:
    """See `Operator`."""

    def __init__(self, pool: Pool[ManagedHosts], pool_file: str | None = None, demand: Demand | None = None) -> None:
        """`pool_file` is followed: models that come and go there come and go here. `demand` loads models on demand."""
        self._demand = demand
        if demand is not None:
            pool.works["loading on demand"] = demand.run
        self._pool = pool
        self._models = pool.models
        pool.works["trying failed models"] = self._try_failed
        if pool_file:
            self.follow(pool_file)
        self.after_change: Callable[[], Awaitable[None]] = _nothing
        """Called when a model was added or removed, before whoever asked for that is told."""

    def follow(self, path: str) -> None:
        """Follow the pool file at `path`, which no other server follows."""
        self._pool.works["following the pool file"] = PoolFile(path, self, self._pool.config.models).follow

    async def check_model(self, spec: ModelSpec) -> None:
        """Raise PoolError if this could not take the place of the model of its name. Nothing of it is loaded."""
        others = [model for model in self._models.values() if model.name != spec.name]
        plan = await asyncio.to_thread(
            plan_added, spec, [model.plan for model in others], bool(self._pool.config.tenants)
        )
        check_names([plan], {alias: f"model {m.name!r}" for m in others for alias in m.app.aliases()})
        await asyncio.to_thread(plan.engine_config)

    async def add_model(self, spec: ModelSpec) -> dict[str, Any]:
        """See Operator."""
        if self._pool.stopping or not self._pool.hosts.is_there:
            raise ModelUnavailableError("the pool is stopping", retry_after_s=_STOPPING_RETRY_S)
        plans = [model.plan for model in self._models.values()]
        plan = await asyncio.to_thread(plan_added, spec, plans, bool(self._pool.config.tenants))
        async with self._models.changing:
            models = self._models.values()
            if any(spec.name in model.app.aliases() for model in models):
                raise ConfigError(f"model {spec.name!r} is in the pool already: choose another name", key="name")
            taken = {name: owner for model in models for name, owner in names_of(model.plan)}
            check_names([plan], taken | {alias: f"model {m.name!r}" for m in models for alias in m.app.aliases()})
            if self._demand is not None:
                await self._demand.make_room_for_added(self._pool.config.loading_of(spec))
            model = self._models.add(plan, is_settled=False)
            try:
                if model.is_on_demand:
                    await asyncio.to_thread(plan.engine_config)
                    await self._pool.hosts.introduce(model)
                else:
                    await self._pool.hosts.add(model)
            except BaseException as error:
                model.app.reason = reason_of(error)
                model.app.show(Life.FAILED)
                self._models.remove(spec.name)
                raise
            model.is_settled = True
        await self.after_change()
        return model.client.added if model.client is not None else {}

    async def remove_model(self, name: str, drain_s: float) -> None:
        """See Operator."""
        model = self._models[name]
        if model.is_leaving:
            raise ModelUnavailableError(f"model {name!r} is being removed already", retry_after_s=5.0)
        model.is_leaving, model.app.is_resting = True, False
        try:
            await self._pool.hosts.retire(model, drain_s)
            model.app.move(Life.DRAINING)  # from here on frontends drain it, and may say so at once
            if model.error is not None:
                model.fail_requests()
            await let_finish(model, drain_s)  # a host that dies meanwhile comes back with the model and finishes
            async with self._models.changing:
                await self._pool.hosts.remove(model)
                series = self._models.remove(name)
        except Exception as error:
            if self._models.get(name) is not model:
                raise KeyError(name) from error  # it was being added, and could not be
            model.is_leaving, model.is_unwanted = False, True
            cause = error if isinstance(error, PoolError) else HostError(reason_of(error))
            model.fail(HostError(f"it cannot be removed: {cause}"))
            raise cause from error
        if model.client is not None:
            await model.client.close()
        await asyncio.to_thread(forget_models, series)
        await self.after_change()

    async def _try_failed(self) -> None:
        """Try again what could not be loaded, or removed, when its time has come."""
        while True:
            await asyncio.sleep(_LOOK_S)
            for model in self._models.due():
                try:
                    if model.is_on_demand and model.client is None and not model.is_unwanted:
                        model.get_cold()
                    elif model.is_unwanted:
                        await self.remove_model(model.name, 0.0)
                    else:
                        await self._pool.hosts.retry(model)
                except PoolError as error:  # the host ended, or its removal failed again: it is seen to
                    logger.debug("no success model=%s: %s", model.name, error)

    async def budget(self, order: BudgetOrder) -> BudgetState:
        """See Operator."""
        return await self._pool.hosts.lending.set_budget(order)

    async def sleep(self, name: str, level: int, mode: str) -> None:
        """See Operator."""
        await self._pool.hosts.lending.sleep(name, level, mode)

    async def wake(self, name: str) -> None:
        """See Operator."""
        await self._pool.hosts.lending.wake(name)

    async def asleep(self) -> dict[str, int]:
        """See Operator."""
        return dict(self._pool.hosts.lending.asleep)

    async def state(self) -> dict[str, Any]:
        """See Operator."""
        hosts = self._pool.hosts
        reported = await hosts.report()
        models = {
            model.name: {
                "state": model.app.state,
                "reason": model.app.reason or None,
                "inflight": model.app.inflight,
                "held": len(model.app.hold),
                "model": model.plan.spec.model,
                **hosts.report_on(model),
            }
            for model in self._models.values()
        }
        pool = {"ready": self._pool.ready, "stopping": self._pool.stopping, "progress": hosts.watch.progress()}
        return {**pool, "models": models, **reported}

    async def inflight(self) -> dict[str, int]:
        """See Operator."""
        return self._pool.inflight()

    async def tenants_report(self) -> dict[str, Any]:
        """See Operator."""
        return self._pool.tenants_report()

    async def trace(self, last_s: float | None) -> dict[str, Any]:
        """See Operator."""
        return await self._pool.hosts.trace(last_s)

    async def host_metrics(self) -> dict[str, str]:
        """See Operator."""
        return await self._pool.hosts.metrics()

    async def decisions(self, limit: int | None) -> list[dict[str, Any]] | None:
        """See Operator."""
        return await self._pool.hosts.decisions(limit)

    async def logs(self, seen: Mapping[str, int]) -> list[dict[str, Any]]:
        """See Operator."""
        return in_order([*recent_lines(seen), *await self._pool.hosts.logs(seen)])

    async def drain(self, host: str, is_wanted: bool) -> list[str]:
        """See Operator."""
        return await self._pool.hosts.drain(host, is_wanted)

    async def check(self) -> None:
        """See Operator."""
        await self._pool.hosts.check()


async def _nothing() -> None:
    pass
