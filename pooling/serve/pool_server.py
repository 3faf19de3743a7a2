# SPDX-License-Identifier: Apache-2.0
"""The pool behind the port: supervises the host, starts and stops models, answers what concerns all of them."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from typing import Any

from prometheus_client import multiprocess
from starlette.applications import Starlette

from tokenpool.config import ModelSpec, PoolConfig
from tokenpool.errors import CapacityError, ConfigError, HostError, ModelUnavailableError, PoolError
from tokenpool.host.metric_files import forget_models
from tokenpool.host.trace import chrome_trace
from tokenpool.serve.admission import FORECAST_PERIOD_S, Gate
from tokenpool.serve.auth import ApiKeyAuth
from tokenpool.serve.host_process import HostProcess
from tokenpool.serve.host_watch import HostWatch
from tokenpool.serve.launch_plan import ModelPlan, host_config, plan_model
from tokenpool.serve.model_client import ModelClient
from tokenpool.serve.names import check_names, names_of
from tokenpool.serve.router import ModelApp, ModelRouter
from tokenpool.serve.shared_limits import SharedLimits
from tokenpool.serve.tenants import TenantBook

logger = logging.getLogger(__name__)

_RESTART_WAITS_S = (0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
_STABLE_AFTER_S = 60.0


class PoolServer:
    """One host and the models on it. Lives on one event loop."""

    def __init__(
        self,
        config: PoolConfig,
        plans: list[ModelPlan],
        outer: Starlette,
        *,
        limits: SharedLimits | None = None,
        frontend: int = 0,
    ) -> None:
        """`limits` is where several frontends, of which this one has the index given, keep tenants' limits together."""
        self.config = config
        self.tenants = TenantBook(config.tenants, limits, frontend) if config.tenants else None
        self.router = ModelRouter(outer, max_request_bytes=config.max_request_bytes, tenants=self.tenants)
        options = self.tenants.auth_options() if self.tenants else {}
        self.app = ApiKeyAuth(self.router, api_keys=config.api_key, admin_keys=config.admin_key, **options)
        self.host_restarts = 0
        self.stopping = False
        self._plans = {plan.spec.name: plan for plan in plans}
        self._clients: dict[str, ModelClient] = {}
        self._host: HostProcess | None = None
        self._changing = asyncio.Lock()  # one model is added or removed at a time
        self._tasks: list[asyncio.Task[None]] = []
        self._watching: asyncio.Task[None] | None = None
        self._host_config = host_config(config, plans)
        self.watch = HostWatch(self.router.models, lambda: self._host.call if self._host else None)
        outer.state.pool = self

    # -- life ----------------------------------------------------------------------------------------

    async def may_listen(self) -> None:
        """Return when the port may be answered: at once, while models load."""

    async def start(self) -> None:
        """Start the host and all models; raises PoolError, with nothing left running, when one cannot be served."""
        for plan in self._plans.values():
            self.router.add(self._model_app(plan.spec))
        self._watching = asyncio.create_task(self.watch.run())
        try:
            await self._start_host()
        except BaseException:
            await self.stop()
            raise
        self._tasks = [asyncio.create_task(self._supervise()), asyncio.create_task(self._forecast())]

    async def stop(self) -> None:
        """Finish what was accepted, at most `shutdown_timeout` long, then end everything."""
        self.stopping = self.watch.stopping = True
        for task in self._tasks:
            task.cancel()
        limit_s = self.config.shutdown_timeout_s
        await self.router.let_through(limit_s)
        drained = await asyncio.gather(*(client.drain(limit_s) for client in self._clients.values()))
        for client, done in zip(self._clients.values(), drained, strict=True):
            if not done:
                logger.warning("drain limit reached, aborting model=%s requests=%d", client.plan.spec.name,
                               client.num_unfinished)
                await client.abort_all()
        for client in self._clients.values():
            await client.close()
        if self._host is not None:
            await self._host.stop(10.0)
        if self._watching is not None:
            self._watching.cancel()
        self._clients.clear()

    @property
    def ready(self) -> bool:
        """True when every model can be served and the pool is not shutting down."""
        return not self.stopping and all(m.state == "resident" for m in self.router.models.values())

    def _model_app(self, spec: ModelSpec) -> ModelApp:
        gate = Gate.of(spec.name, self.config.admission_of(spec), spec.slo)
        return ModelApp(spec.name, _no_app, state="loading", retry_after_s=5, gate=gate)

    async def _start_host(self) -> None:
        first = next(iter(self._plans.values()), None)
        config = (first.checked or await asyncio.to_thread(first.engine_config)) if first else None
        self._host = await HostProcess.start(self._host_config, config)
        for plan in list(self._plans.values()):
            await self._start_model(plan)

    async def _start_model(self, plan: ModelPlan) -> ModelClient:
        assert self._host is not None
        name = plan.spec.name
        client = self._clients.get(name)
        try:
            if client is None:
                client = self._clients[name] = await self._make_client(plan)
            else:
                await client.join(self._host)
        except CapacityError as error:
            if self.config.weights == "movable" or not error.holders:
                raise
            # Others hold the pages: weights of unknown size before, or a model that came later than the plan.
            raise CapacityError(f"{error}; or let weights leave the device (weights: movable)") from error
        model = self.router.models[name]
        model.answer_with(client)
        if model.state != "draining":
            model.state = "resident"
        logger.info("model ready model=%s seconds=%.2f", name, client.added["build_s"])
        return client

    async def _make_client(self, plan: ModelPlan) -> ModelClient:
        assert self._host is not None
        return await ModelClient.start(plan, self._host)

    # -- supervision ---------------------------------------------------------------------------------

    async def _supervise(self) -> None:
        attempt, started = 0, time.monotonic()
        while True:
            assert self._host is not None
            status = await self._host.wait()
            if time.monotonic() - started > _STABLE_AFTER_S:
                attempt = 0
            logger.error("engine host ended pid=%d status=%d, restarting", self._host.pid, status)
            await self._host_died(self._host.pid)
            while True:
                await asyncio.sleep(_RESTART_WAITS_S[min(attempt, len(_RESTART_WAITS_S) - 1)])
                attempt, started = attempt + 1, time.monotonic()
                self.host_restarts += 1
                try:
                    async with self._changing:
                        await self._start_host()
                    break
                except Exception:  # whatever stops a restart, the next attempt may work
                    logger.exception("engine host does not come back, trying again")
                    died = await self._ends_soon()
                    await self._host.kill()
                    await self._host_died(self._host.pid, blame=died)

    async def _host_died(self, pid: int, *, blame: bool = True) -> None:
        for model in self.router.models.values():
            if model.state != "draining":
                model.state, model.retry_after_s = "unavailable", 5.0
        assert self._host is not None
        for client in self._clients.values():
            client.core.lost(self._host.name, blame=blame)
        multiprocess.mark_process_dead(pid, os.environ["PROMETHEUS_MULTIPROC_DIR"])

    async def _forecast(self) -> None:
        """Ask the host when first tokens would come, while that can refuse a request."""
        while True:
            await asyncio.sleep(FORECAST_PERIOD_S)
            models = [m for m in self.router.models.values() if m.inflight and m.gate.wants_forecast]
            if not models or self._host is None:
                continue
            try:
                loads = await self._host.call("load")
            except Exception as error:  # such as a host that is being restarted: old forecasts lapse
                logger.debug("no forecast: %s", error)
                continue
            for model in models:
                if model.name in loads:
                    model.gate.learn(loads[model.name])

    # -- models at run time --------------------------------------------------------------------------

    async def add_model(self, spec: ModelSpec) -> dict[str, Any]:
        """Load one more model; the others pause while it is built and lose nothing.

        Raises PoolError and changes nothing when it cannot be served.
        """
        self._refuse_while_stopping()
        plan = await asyncio.to_thread(plan_model, spec)
        async with self._changing:
            if any(spec.name in model.aliases() for model in self.router.models.values()):
                raise ConfigError(f"model {spec.name!r} is in the pool already: choose another name", key="name")
            taken = {alias: f"model {m.name!r}" for m in self.router.models.values() for alias in m.aliases()}
            check_names([plan], {name: owner for p in self._plans.values() for name, owner in names_of(p)} | taken)
            self.router.add(self._model_app(spec))
            try:
                client = await self._start_model(plan)
            except BaseException:
                self.router.remove(spec.name)
                raise
            self._plans[spec.name] = plan
            return client.added

    async def remove_model(self, name: str, drain_s: float) -> None:
        """Stop taking requests for a model, let it finish for at most `drain_s`, abort the rest and unload it."""
        model = self.router.models.get(name)
        if model is None:
            raise KeyError(name)
        async with self._changing:
            client = self._clients.get(name)
            if client is None or model.state != "resident":
                raise ModelUnavailableError(f"model {name!r} is {model.state}", retry_after_s=5.0)
            model.state = "draining"
        if not await client.drain(drain_s):  # a host that dies meanwhile comes back with the model and finishes
            await client.abort_all()
            await client.drain(5.0)
        async with self._changing:
            await self._unload(name)
            names = self._names(name)
            self.router.remove(name)
            del self._plans[name], self._clients[name]
            await client.close()
            await asyncio.to_thread(forget_models, names)

    def _names(self, name: str) -> set[str]:
        """All names that a model and its adapters have: those now loaded, and those of its flags."""
        return self.router.models[name].aliases() | {alias for alias, _ in names_of(self._plans[name])}

    async def _unload(self, name: str) -> None:
        while self._host is not None and not self._host.ended:
            try:
                await self._host.call("remove_model", name)
                return
            except HostError as error:
                if "still has requests" not in str(error) and not await self._ends_soon():
                    raise
            await asyncio.sleep(0.05)

    async def _ends_soon(self) -> bool:
        """Whether the host is going: it stops to answer a moment before it can be seen to have ended."""
        assert self._host is not None
        await asyncio.sleep(0.5)
        return self._host.ended

    async def state(self) -> dict[str, Any]:
        """The pool's state: models, host memory map, restarts."""
        try:
            host = await self.watch.state()
        except PoolError as error:
            host = {"error": str(error)}
        models = {
            name: {
                "state": model.state,
                "inflight": model.inflight,
                "model": self._plans[name].spec.model if name in self._plans else None,
            }
            for name, model in self.router.models.items()
        }
        pid = self._host.pid if self._host else None
        return {
            "ready": self.ready,
            "stopping": self.stopping,
            "progress": self.watch.progress(),
            "host_pid": pid,
            "host_restarts": self.host_restarts,
            "models": models,
            "host": host,
        }

    async def inflight(self) -> dict[str, int]:
        """Requests in flight per model."""
        return {name: model.inflight for name, model in self.router.models.items()}

    async def tenants_report(self) -> dict[str, Any]:
        """Each tenant's limits, what is left of them, its usage, and its requests that are held, per model."""
        report = self.tenants.report() if self.tenants is not None else {}
        for name, tenant in report.items():
            lines = {model.name: model.gate.line for model in self.router.models.values()}
            tenant["held"] = {model: line.num_held(name) for model, line in lines.items() if line is not None}
        return report

    async def trace(self, last_s: float | None) -> dict[str, Any]:
        """The host's trace in Chrome's format, of the last `last_s` seconds or all that is kept."""
        if self._host is None:
            raise ModelUnavailableError("the engine host is not there", retry_after_s=5.0)
        events = await self._host.call("trace", last_s)
        return await asyncio.to_thread(chrome_trace, events)

    async def host_metrics(self) -> dict[str, str]:
        """Scrapes of hosts that do not share the frontend's folder of metrics, by host; here the only one does."""
        return {}

    async def check(self) -> None:
        """Check the host's books; raises what is wrong."""
        if self._host is not None:
            await self._host.call("check")

    def _refuse_while_stopping(self) -> None:
        if self.stopping or self._host is None:
            raise ModelUnavailableError("the pool is stopping", retry_after_s=30.0)


async def _no_app(scope: Any, receive: Any, send: Any) -> None:
    raise AssertionError("a model that is not resident takes no requests")
