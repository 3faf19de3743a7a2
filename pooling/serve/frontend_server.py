# SPDX-License-Identifier: Apache-2.0
"""The pool behind the port in one of several frontends: the same server, with models and host that others look after.

It follows the supervisor's view. Tokens come from the host straight, over this frontend's own sockets; calls that
change the pool go to the supervisor, who lets all frontends know.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from starlette.applications import Starlette

from tokenpool.config import ModelSpec
from tokenpool.errors import PoolError
from tokenpool.host.control import ControlServer, limit_of
from tokenpool.host.hosted_core import EngineAddresses
from tokenpool.host.metric_files import forget_models
from tokenpool.serve.ending import let_finish
from tokenpool.serve.engine_client import PoolEngineClient
from tokenpool.serve.frontend_process import FrontendSettings
from tokenpool.serve.frontend_reports import state_of_all
from tokenpool.serve.frontend_view import HostAddress, ModelStanding, SupervisorView
from tokenpool.serve.host_calls import call_beside
from tokenpool.serve.keeper import Work, start_kept
from tokenpool.serve.launch_plan import ModelPlan
from tokenpool.serve.model_app import ModelApp
from tokenpool.serve.model_client import ModelClient, connect
from tokenpool.serve.names import series_names
from tokenpool.serve.pool_server import PoolServer
from tokenpool.serve.shared_limits import SharedLimits
from tokenpool.serve.suspects import SUSPECTS

logger = logging.getLogger(__name__)

RETRY_S = 0.2
"""Between two attempts."""


class _Host:
    """The host, as a frontend knows it: somebody else starts, guards and ends it."""

    guard = None

    def __init__(self, address: HostAddress) -> None:
        self.address = address
        self.name, self.pid = address.name, address.pid
        self._ended = asyncio.Event()

    @property
    def ended(self) -> bool:
        """Whether the supervisor says that it is gone."""
        return self._ended.is_set()

    async def wait(self) -> int:
        """Wait until it is gone."""
        await self._ended.wait()
        return 0

    async def call(self, method: str, *args: Any, timeout_s: float | None = None) -> Any:
        """See HostProcess.call."""
        return await call_beside(self.address.control, self.address.key, method, *args, timeout_s=timeout_s)

    async def stop(self, limit_s: float) -> None:
        """Nothing."""

    def note_end(self) -> None:
        """It is gone."""
        self._ended.set()


class FrontendServer(PoolServer):
    """A frontend; see the module."""

    def __init__(self, settings: FrontendSettings, outer: Starlette) -> None:
        config = settings.config
        limits = SharedLimits(settings.limits, config.frontends) if config.tenants else None
        super().__init__(config, settings.plans, outer, limits=limits, frontend=settings.index)
        self._plans = {}
        self._settings = settings
        SUSPECTS.share(os.path.join(settings.folder, "suspects"))
        self._view: SupervisorView | None = None
        self._changed = asyncio.Condition()
        self._joined: dict[str, int] = {}  # pid of the host by model
        self._work: dict[str, asyncio.Task[None]] = {}  # per model, one thing at a time
        self._building = asyncio.Lock()  # vLLM registers its metrics anew with each app
        self._folder = tempfile.mkdtemp(prefix="tokenpool-")
        self._num_endpoints = 0

    # -- life ----------------------------------------------------------------------------------------

    async def may_listen(self) -> None:
        """Wait until others cannot answer better: at the pool's start at once, later when all models are ready."""
        async with self._changed:
            await self._changed.wait_for(
                lambda: self._view is not None and (not self._view.has_started or self._has_all())
            )

    async def start(self) -> None:
        """Follow the supervisor, and return once all its models are ready here."""
        loop = asyncio.get_running_loop()
        calls = ControlServer(
            self._settings.own_socket(os.getpid()),
            self._settings.key,
            lambda make: asyncio.run_coroutine_threadsafe(make(), loop),
        )
        calls.serve({"report": self._report})
        self._watching = start_kept("watching the host", self.watch.run)
        self._tasks = [start_kept(task, work) for task, work in self._background().items()]
        async with self._changed:
            await self._changed.wait_for(self._has_all)

    def _background(self) -> Mapping[str, Work]:
        return {
            "following the supervisor": self._follow,
            "asking for forecasts": super()._background()["asking for forecasts"],
            "telling calls": self._tell_calls,
        }

    async def stop(self) -> None:
        """Finish what was accepted; the host and the other frontends are not concerned."""
        for task in self._work.values():
            task.cancel()
        await super().stop()
        with contextlib.suppress(OSError):
            os.unlink(self._settings.own_socket(os.getpid()))
        shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def ready(self) -> bool:
        """See PoolServer.ready."""
        return self._view is not None and self._view.has_started and super().ready

    def _has_all(self) -> bool:
        return self._view is not None and all(
            standing.state == "draining" or not standing.host_pid or self._joined.get(name) == standing.host_pid
            for name, standing in self._view.models.items()
        )

    async def _tell_calls(self) -> None:
        while self.tenants is not None:
            self.tenants.count_sequences()
            await asyncio.sleep(1.0)

    # -- the supervisor ------------------------------------------------------------------------------

    async def _ask(self, method: str, *args: Any, timeout_s: float | None = None) -> Any:
        settings = self._settings
        return await call_beside(settings.supervisor, settings.key, method, *args, timeout_s=timeout_s)

    async def _ask_as_this(self, method: str, *args: Any) -> Any:
        return await self._ask(method, self._settings.index, os.getpid(), *args)

    async def _follow(self) -> None:
        version = -1
        while True:
            try:
                view = await self._ask_as_this("view", version)
            except PoolError as error:  # it ends, and this process with it
                logger.warning("the supervisor does not answer: %s", error)
                await asyncio.sleep(RETRY_S)
                continue
            version = view.version
            self._apply(view)
            async with self._changed:
                self._changed.notify_all()

    def _apply(self, view: SupervisorView) -> None:
        self._view = view
        self._follow_host(view)
        for name in self.router.models.keys() - view.models.keys():
            self._begin(name, self._forget(name))
        for name, standing in view.models.items():
            if name not in self.router.models:
                self._plans[name] = standing.plan
                self.router.add(self._model_app(standing.plan))
            self._follow_model(name, standing)

    def _follow_host(self, view: SupervisorView) -> None:
        self.host_restarts = view.host_restarts
        pid = view.host.pid if view.host else 0
        if self._host is not None and self._host.pid != pid:
            self._host.note_end()  # type: ignore[attr-defined]
            for name in list(self._joined):
                self._lose(name, self._host.name)
        if self._host is None or self._host.pid != pid:
            self._host = _Host(view.host) if view.host else None  # type: ignore[assignment]

    def _lose(self, name: str, host: str) -> None:
        del self._joined[name]
        assert self._view is not None
        if client := self._clients.get(name):
            client.core.lost(host, blame=self._view.host_was_blamed)

    def _follow_model(self, name: str, standing: ModelStanding) -> None:
        is_here = self._joined.get(name) == standing.host_pid != 0
        if standing.host_pid and not is_here and self._host is not None:
            self._begin(name, self._join(name, standing))
        self._take_state(name, standing, is_here)

    def _take_state(self, name: str, standing: ModelStanding, is_here: bool) -> None:
        """Let the router show the model as it stands; `is_here` = it takes requests from this frontend."""
        model = self.router.models[name]
        if standing.state == "draining" and model.state != "draining":
            model.state = "draining"
            self._begin(name, self._drain(name, standing), anew=True)
        elif standing.state == "resident" and is_here:
            self.lives.served(name)
        elif standing.state != "draining":
            model.state = "loading" if standing.state == "resident" else standing.state
            model.retry_after_s, model.reason = 5.0, standing.reason
            if standing.is_given_up:
                self._fail_requests(name)

    def _begin(self, name: str, work: Any, *, anew: bool = False) -> None:
        before = self._work.get(name)
        if before is not None and not before.done() and not anew:
            work.close()  # it looks at the newest view when it is done
            return
        self._work[name] = asyncio.create_task(self._work_on(name, work, before))

    async def _work_on(self, name: str, work: Any, before: asyncio.Task[None] | None) -> None:
        if before is not None:
            await asyncio.wait({before})
        try:
            await work
        except Exception as error:
            logger.exception("frontend cannot follow model=%s", name)
            with contextlib.suppress(PoolError):  # a supervisor that does not hear ends, and this process with it
                await self._ask_as_this("failed", name, sendable(error))
            await asyncio.sleep(RETRY_S)
        if self._work.get(name) is asyncio.current_task():
            del self._work[name]
        if self._view is not None and not self.stopping:
            self._apply(self._view)
            async with self._changed:
                self._changed.notify_all()

    # -- models --------------------------------------------------------------------------------------

    def _model_app(self, plan: ModelPlan) -> ModelApp:
        model = super()._model_app(plan)
        limits, count = model.gate.limits, self.config.frontends  # each frontend keeps its part of the queue
        parts = [_part(bound, count) for bound in (limits.max_waiting, limits.max_waiting_tokens)]
        model.gate.limits = replace(limits, max_waiting=parts[0], max_waiting_tokens=parts[1])
        return model

    async def _join(self, name: str, standing: ModelStanding) -> None:
        """Connect to the model's engine, and with the first one build the app."""
        host = self._host
        if host is None or host.pid != standing.host_pid:
            return
        client = self._clients.get(name)
        core = client.core if client is not None else await self._make_core(standing.plan)
        base = f"ipc://{self._folder}/{self._num_endpoints}"
        self._num_endpoints += 1
        addresses = EngineAddresses((f"{base}.in",), (f"{base}.out",))
        try:
            await host.call("attach_frontend", name, self._settings.index, addresses)
            await connect(host, core, addresses)
            if client is None:
                async with self._building:
                    client = await ModelClient.over(standing.plan, core, {})
                    client.on_fault = partial(self.lives.client_fault, name)
        except BaseException:
            if name not in self._clients:
                core.close()
            raise
        self._clients[name] = client
        self.router.models[name].answer_with(client)
        if host.ended:
            core.lost(host.name)
            return
        self._joined[name] = host.pid
        await self._ask_as_this("joined", name, host.pid)

    async def _make_core(self, plan: ModelPlan) -> PoolEngineClient:
        return PoolEngineClient(await asyncio.to_thread(plan.engine_config), client_index=self._settings.index)

    async def _drain(self, name: str, standing: ModelStanding) -> None:
        if standing.is_given_up:
            self._fail_requests(name, standing.reason)
        if client := self._clients.get(name):
            await let_finish(client, standing.drain_s)
        await self._ask_as_this("drained", name)

    async def _forget(self, name: str) -> None:
        names = series_names(self.router.models[name], self._plans.get(name))
        self.router.remove(name)
        self.lives.forget(name)
        self._plans.pop(name, None)
        self._joined.pop(name, None)
        await self._close(name)
        await asyncio.to_thread(forget_models, names)

    async def _close(self, name: str) -> None:
        """Close what this frontend has of a model, after which nothing counts for it."""
        if client := self._clients.pop(name, None):
            await client.close()

    async def add_model(self, spec: ModelSpec) -> dict[str, Any]:
        """Load one more model, for all frontends."""
        self._refuse_while_stopping()
        return await self._ask("add_model", spec)

    async def remove_model(self, name: str, drain_s: float) -> None:
        """Remove a model from all frontends and from the host."""
        await self._ask("remove_model", name, drain_s, timeout_s=drain_s + limit_of("remove_model"))

    # -- what is told --------------------------------------------------------------------------------

    async def _report(self) -> dict[str, Any]:
        """What this frontend adds to what is told of all."""
        return {"inflight": await super().inflight(), "tenants": await super().tenants_report()}

    async def inflight(self) -> dict[str, int]:
        """Requests in flight per model, at all frontends."""
        return (await self._ask("report"))["inflight"]

    async def tenants_report(self) -> dict[str, Any]:
        """What tenants use and used, at all frontends."""
        return (await self._ask("report"))["tenants"]

    async def state(self) -> dict[str, Any]:
        """See PoolServer.state; with the frontends that are there."""
        state, report = await super().state(), await self._ask("report")
        return state_of_all(state, report, self._view.frontend_pids if self._view is not None else {})


def _part(bound: int | None, count: int) -> int | None:
    return None if bound is None else math.ceil(bound / count)


def sendable(error: Exception) -> PoolError:
    """The error as one that every process of the pool can read."""
    return error if isinstance(error, PoolError) else PoolError(f"{type(error).__name__}: {error}")
