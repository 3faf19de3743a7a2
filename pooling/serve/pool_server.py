# SPDX-License-Identifier: Apache-2.0
"""The pool behind the port: supervises the host, starts and stops models, answers what concerns all of them."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Mapping
from functools import partial
from typing import Any

from prometheus_client import multiprocess
from starlette.applications import Starlette

from tokenpool.config import ModelSpec, PoolConfig
from tokenpool.errors import CapacityError, ConfigError, HostError, ModelBusyError, ModelUnavailableError, PoolError
from tokenpool.host.metric_files import forget_models
from tokenpool.host.trace import chrome_trace
from tokenpool.metric_registry import metric
from tokenpool.serve.admission import Gate
from tokenpool.serve.ending import HOST_END_S, KILL_S, let_finish, within
from tokenpool.serve.guard import guarded
from tokenpool.serve.host_process import HostProcess
from tokenpool.serve.host_watch import HostWatch, follow_forecasts
from tokenpool.serve.keeper import Backoff, Work, start_kept
from tokenpool.serve.launch_plan import ModelPlan, host_config, plan_added
from tokenpool.serve.model_app import ModelApp
from tokenpool.serve.model_client import ModelClient, first_config
from tokenpool.serve.model_life import ModelLives, reason_of
from tokenpool.serve.names import check_names, names_of, series_names
from tokenpool.serve.router import ModelRouter
from tokenpool.serve.shared_limits import SharedLimits
from tokenpool.serve.tenants import TenantBook

logger = logging.getLogger(__name__)

_HOST_RESTARTS = metric("host_restarts").make()
_LOOK_S = 0.1
_END_LIMIT_S, _SILENT_END_LIMIT_S = 0.5, 10.0
"""How long it may take until a host is seen to have ended; a large one that does not answer takes longer."""
_CLOSE_S = 3.0
_UNLOAD_LIMIT_S = 30.0
"""How long the host may say that a drained model has requests."""


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
        self.tenants = TenantBook.of(config, limits, frontend)
        self.router = ModelRouter(outer, max_request_bytes=config.max_request_bytes, tenants=self.tenants)
        self.app = guarded(self.router, config, self.tenants)
        self.host_restarts = 0
        self.stopping = False
        self._plans = {plan.spec.name: plan for plan in plans}
        self._clients: dict[str, ModelClient] = {}
        self._host: HostProcess | None = None
        self._changing = asyncio.Lock()  # one model is added or removed at a time
        self._tasks: list[asyncio.Task[None]] = []
        self._watching: asyncio.Task[None] | None = None
        self.lives = ModelLives(self.router.models)
        self._host_config = host_config(config, plans)
        self.watch = HostWatch(
            self.router.models, self._host_call, lambda: self._host.guard if self._host else None, self.lives.restored
        )
        outer.state.pool = self

    # -- life ----------------------------------------------------------------------------------------

    async def may_listen(self) -> None:
        """Return when the port may be answered: at once, while models load."""

    async def start(self) -> None:
        """Start the host and all models; raises PoolError, with nothing left running, when none can be served."""
        for plan in self._plans.values():
            self.router.add(self._model_app(plan))
        self._watching = start_kept("watching the host", self.watch.run)
        try:
            await self._first_start()
            self.lives.refuse_if_all_failed()
        except BaseException:
            await self.stop()
            raise
        self._tasks = [start_kept(task, work) for task, work in self._background().items()]

    def _background(self) -> Mapping[str, Work]:
        """What goes on beside the requests, by name."""
        return {
            "supervising the host": self._supervise,
            "trying failed models": self._try_failed,
            "asking for forecasts": lambda: follow_forecasts(self.router.models, self._host_call),
        }

    async def stop(self) -> None:
        """Finish what was accepted, at most `shutdown_timeout` long, then end everything, each part within a limit."""
        self.stopping = self.watch.stopping = True
        for task in self._tasks:
            task.cancel()
        deadline = time.monotonic() + self.config.shutdown_timeout_s
        await self.router.let_through(self.config.shutdown_timeout_s)
        clients = list(self._clients.values())
        await asyncio.gather(*(let_finish(client, deadline - time.monotonic()) for client in clients))
        await asyncio.gather(*(within(_CLOSE_S, f"closing model {c.plan.spec.name!r}", c.close()) for c in clients))
        if self._host is not None:
            await within(HOST_END_S + KILL_S, "stopping the host", self._host.stop(HOST_END_S))
        if self._watching is not None:
            self._watching.cancel()
        self._clients.clear()

    @property
    def ready(self) -> bool:
        """True when all models but the failed ones can be served, and the pool is not shutting down."""
        return not self.stopping and self.lives.ready

    def _model_app(self, plan: ModelPlan) -> ModelApp:
        gate = Gate.of(plan.spec.name, self.config.admission_of(plan.spec), plan.spec.slo)
        return ModelApp(plan.spec.name, _no_app, retry_after_s=5, gate=gate, claimed={n for n, _ in names_of(plan)})

    # -- starting ------------------------------------------------------------------------------------

    async def _first_start(self) -> None:
        while True:
            await self._start_host()
            try:
                await self._load_all()
                return
            except HostError:
                if not self.lives.can_go_on:
                    raise
                assert self._host is not None
                await self._host_died(self._host.pid)

    async def _start_host(self) -> None:
        if self._host is not None:
            self.host_restarts += 1
            _HOST_RESTARTS.inc()
        async with self._changing:
            self._host = await HostProcess.start(self._host_config, await first_config(self._plans.values()))

    async def _load_all(self) -> None:
        """Load what is wanted into a new host; raises HostError when that ends."""
        for name in self.lives.to_load(self._plans):
            await self._load(name)

    async def _load(self, name: str) -> None:
        """Load a model, which is `failed` if that cannot be done; raises HostError when the host ends."""
        async with self._changing:
            plan, began_s = self._plans.get(name), time.monotonic()
            if plan is None or (self.lives[name].is_leaving and name not in self._clients):
                return  # removed, or about to be, and nobody waits for it
            if self._host is not None and self._host.pid == self.lives[name].host_pid:
                return  # somebody was faster
            try:
                await self._start_model(plan)
                if self._host is not None and not self._host.ended:
                    return
                error: Exception = HostError("the engine host ended")
            except Exception as caught:  # of vLLM's making, too: it is the model's failure, unless the host ended
                error = caught
            if await self._ends_soon(_SILENT_END_LIMIT_S if isinstance(error, HostError) else _END_LIMIT_S):
                self.lives.host_died_loading(name)
                if self.lives[name].is_given_up:
                    self._give_up(name)
                raise HostError(f"the engine host ended while it loaded model {name!r}") from error
            self.lives[name].host_deaths = 0  # this attempt ended without one
            self.lives.failed(name, error, took_s=time.monotonic() - began_s)
            if self.lives[name].is_leaving:
                self._fail_requests(name)

    def _give_up(self, name: str) -> None:
        deaths = self.lives[name].host_deaths
        self.lives.failed(name, HostError(f"{deaths} engine hosts ended in a row while they loaded it"))
        self._fail_requests(name)

    def _fail_requests(self, name: str, reason: str = "") -> None:
        """End what was accepted for a model that will not be loaded any more."""
        if client := self._clients.get(name):
            client.fail_all(f"The model `{name}` is not loaded any more: {reason or self.router.models[name].reason}")

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
        self.router.models[name].answer_with(client)
        self.lives.served(name, self._host.pid)
        logger.info("model ready model=%s seconds=%.2f", name, client.added["build_s"])
        return client

    async def _make_client(self, plan: ModelPlan) -> ModelClient:
        assert self._host is not None
        client = await ModelClient.start(plan, self._host)
        client.on_fault = partial(self.lives.client_fault, plan.spec.name)
        return client

    # -- supervision ---------------------------------------------------------------------------------

    async def _supervise(self) -> None:
        backoff = Backoff()
        while True:
            assert self._host is not None
            status = await self._host.wait()
            logger.error("engine host ended pid=%d status=%d, restarting", self._host.pid, status)
            await self._host_died(self._host.pid)
            while True:
                await asyncio.sleep(backoff.next_s())
                try:
                    await self._start_host()
                    await self._load_all()
                    break
                except Exception:  # whatever stops a restart, the next attempt may work
                    logger.exception("engine host does not come back, trying again")
                    died = await self._ends_soon()
                    await self._host.kill()
                    await self._host_died(self._host.pid, blame=died)

    async def _host_died(self, pid: int, *, blame: bool = True) -> None:
        self.lives.host_gone()
        assert self._host is not None
        for client in self._clients.values():
            client.core.lost(self._host.name, blame=blame)
        multiprocess.mark_process_dead(pid, os.environ["PROMETHEUS_MULTIPROC_DIR"])

    async def _try_failed(self) -> None:
        """Try again what could not be loaded, or removed, when its time has come."""
        while True:
            await asyncio.sleep(_LOOK_S)
            for name in self.lives.due():
                try:
                    if self.lives[name].is_unwanted:
                        await self.remove_model(name, 0.0)
                    elif self._host is not None and not self._host.ended:
                        await self._load(name)
                except PoolError as error:  # the host ended, or its removal failed again: it is seen to
                    logger.debug("no success model=%s: %s", name, error)

    # -- models at run time --------------------------------------------------------------------------

    async def add_model(self, spec: ModelSpec) -> dict[str, Any]:
        """Load one more model; the others pause while it is built and lose nothing.

        Raises PoolError and changes nothing when it cannot be served.
        """
        self._refuse_while_stopping()
        plan = await asyncio.to_thread(plan_added, spec, [*self._plans.values()], bool(self.config.tenants))
        async with self._changing:
            if any(spec.name in model.aliases() for model in self.router.models.values()):
                raise ConfigError(f"model {spec.name!r} is in the pool already: choose another name", key="name")
            taken = {alias: f"model {m.name!r}" for m in self.router.models.values() for alias in m.aliases()}
            check_names([plan], {name: owner for p in self._plans.values() for name, owner in names_of(p)} | taken)
            self.router.add(self._model_app(plan))
            try:
                client = await self._start_model(plan)
            except BaseException:
                self.router.remove(spec.name)
                self.lives.forget(spec.name)
                raise
            self._plans[spec.name] = plan
            return client.added

    async def remove_model(self, name: str, drain_s: float) -> None:
        """Stop taking requests for a model, let it finish for at most `drain_s`, abort the rest and unload it.

        What waits for a model that is `failed` ends at once. Raises KeyError for an unknown name; PoolError, with the
        model `failed`, when it cannot be unloaded, which is tried again then.
        """
        model, life = self.router.models.get(name), self.lives[name]
        if model is None:
            self.lives.forget(name)
            raise KeyError(name)
        if life.is_leaving:
            raise ModelUnavailableError(f"model {name!r} is being removed already", retry_after_s=5.0)
        life.is_leaving, model.state = True, "draining"
        try:
            if life.error is not None:
                self._fail_requests(name)
            if name in self._clients:  # a host that dies meanwhile comes back with the model and finishes
                await let_finish(self._clients[name], drain_s)
            async with self._changing:
                await self._unload(name)
                names = series_names(self.router.models[name], self._plans.get(name))
                self.router.remove(name)
                self.lives.forget(name)
                self._plans.pop(name, None)
                client = self._clients.pop(name, None)
        except Exception as error:
            life.is_leaving, life.is_unwanted = False, True
            cause = error if isinstance(error, PoolError) else HostError(reason_of(error))
            self.lives.failed(name, HostError(f"it cannot be removed: {cause}"))
            raise cause from error
        if client is not None:
            await client.close()
        await asyncio.to_thread(forget_models, names)

    async def _unload(self, name: str) -> None:
        deadline = time.monotonic() + _UNLOAD_LIMIT_S
        while self._host is not None and not self._host.ended:
            try:
                await self._host.call("remove_model", name)
                return
            except KeyError:
                return  # it could not be loaded
            except ModelBusyError:
                if time.monotonic() > deadline:
                    raise
            except HostError:
                if not await self._ends_soon(_SILENT_END_LIMIT_S):
                    raise
            await asyncio.sleep(0.05)

    async def _ends_soon(self, limit_s: float = _END_LIMIT_S) -> bool:
        """Whether the host is going: it stops to answer a moment before it can be seen to have ended."""
        assert self._host is not None
        deadline = time.monotonic() + limit_s
        while not self._host.ended and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
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
                "reason": model.reason or None,
                "inflight": model.inflight,
                "model": self._plans[name].spec.model if name in self._plans else None,
            }
            for name, model in self.router.models.items()
        }
        return {
            "ready": self.ready,
            "stopping": self.stopping,
            "progress": self.watch.progress(),
            "host_pid": self._host.pid if self._host else None,
            "host_pulse": self.watch.pulse(),
            "host_restarts": self.host_restarts,
            "models": models,
            "host": host,
        }

    async def inflight(self) -> dict[str, int]:
        """Requests in flight per model."""
        return {name: model.inflight for name, model in self.router.models.items()}

    async def tenants_report(self) -> dict[str, Any]:
        """Each tenant's limits, what is left of them, its usage, and its requests that are held, per model."""
        lines = {model.name: model.gate.line for model in self.router.models.values()}
        return self.tenants.report(lines) if self.tenants is not None else {}

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

    def _host_call(self) -> Any:
        return self._host.call if self._host else None

    def _refuse_while_stopping(self) -> None:
        if self.stopping or self._host is None:
            raise ModelUnavailableError("the pool is stopping", retry_after_s=30.0)


async def _no_app(scope: Any, receive: Any, send: Any) -> None:
    raise AssertionError("a model that is not resident takes no requests")
