# SPDX-License-Identifier: Apache-2.0
"""Several frontends of one host: a process that answers no client starts, watches and restarts the host and them.

It is the one place that decides what is served. Frontends wait for its next view, join the engines by themselves and
say so; a model counts as ready once all of them have it, so that every frontend gives the same answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import shutil
import signal
import socket
import tempfile
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import uvloop
from prometheus_client import multiprocess
from starlette.applications import Starlette
from vllm.utils.system_utils import set_ulimit

from tokenpool.config import ModelSpec, PoolConfig
from tokenpool.errors import ConfigError, HostError, PoolError
from tokenpool.host.control import ControlServer, call_host
from tokenpool.host.hosted_core import EngineAddresses
from tokenpool.metric_registry import metric
from tokenpool.serve.admission import EngineQueue
from tokenpool.serve.endpoints import HOST_RESTARTS
from tokenpool.serve.frontend_process import FrontendProcess, FrontendSettings
from tokenpool.serve.frontend_reports import merged_reports, used_only
from tokenpool.serve.frontend_view import HostAddress, ModelStanding, SupervisorView
from tokenpool.serve.host_process import HostProcess
from tokenpool.serve.launch_plan import ModelPlan, plan_pool
from tokenpool.serve.model_client import load_model
from tokenpool.serve.pool_server import PoolServer
from tokenpool.serve.run import log_address
from tokenpool.serve.shared_limits import SharedLimits
from tokenpool.serve.tenants import with_default

logger = logging.getLogger(__name__)

_LOOK_S = 0.02
_WATCH_LIMIT_S = 10.0
_JOIN_LIMIT_S = 300.0
_REPORT_PERIOD_S = 1.0
_REPORT_LIMIT_S = 5.0
_RESTART_WAITS_S = (0.0, 0.5, 1.0, 2.0, 5.0, 10.0)
_STABLE_AFTER_S = 60.0
_FRONTEND_RESTARTS = metric("frontend_restarts").make()


def supervise(config: PoolConfig, cluster: str | None, sock: socket.socket) -> None:
    """Serve on `sock` with several frontends until SIGTERM or SIGINT; raises PoolError when the pool cannot start."""
    if cluster is not None:
        raise ConfigError("with --cluster there is one frontend: leave it at 1", key="frontends")
    config, plans = plan_pool(config)
    set_ulimit()
    uvloop.run(_supervise(config, plans, sock))


async def _supervise(config: PoolConfig, plans: list[ModelPlan], sock: socket.socket) -> None:
    pool = Supervisor(config, plans, sock)
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
        else:
            starting.cancel()
    finally:
        sock.close()  # nobody may connect any more; the frontends close theirs
        await pool.stop()
        stopping.cancel()


class _Clients:
    """A model's clients in all frontends, as the one client that `PoolServer` knows."""

    app: Any = None
    queue = staticmethod(EngineQueue)
    num_unfinished = 0
    num_seats = 1  # nothing goes through this process's gates

    def __init__(self, plan: ModelPlan, wait_for: Callable[[str, _Clients], Any]) -> None:
        self.plan = plan
        self.core = self
        self.added: dict[str, Any] = {}
        self.host_pid = 0
        """The host process that has the model; 0 without one."""
        self.drain_s = 0.0
        self.was_blamed = True
        self._wait_for = wait_for
        self.has_served = False
        """Whether all frontends had it once: then one that cannot join is no reason to give up."""

    async def join(self, host: HostProcess) -> None:
        """Load the model in the host and wait until all frontends are there; raises PoolError."""
        self.added = await load_model(host, self.plan, EngineAddresses((), ()))
        self.host_pid = host.pid
        try:
            async with asyncio.timeout(_JOIN_LIMIT_S):
                await self._wait_for("joined", self)
                self.has_served = True
        except TimeoutError:
            raise HostError(f"not all frontends could join model {self.plan.spec.name!r}") from None

    def lost(self, host: str, *, blame: bool = True) -> None:
        """The host is gone."""
        self.host_pid, self.was_blamed = 0, blame

    async def drain(self, limit_s: float) -> bool:
        """Let all frontends finish, or abort after `limit_s`, what they have."""
        self.drain_s = limit_s
        await self._wait_for("drained", self)
        return True

    async def abort_all(self) -> None:
        """Nothing: the frontends did."""

    async def close(self) -> None:
        """Nothing."""


class Supervisor(PoolServer):
    """The pool without a port of its own; see the module."""

    def __init__(self, config: PoolConfig, plans: list[ModelPlan], sock: socket.socket) -> None:
        super().__init__(config, plans, Starlette())
        self._sock = sock
        self._folder = tempfile.mkdtemp(prefix="tokenpool-")  # mode 0700: only this user reaches the sockets
        self._stripped = {plan.spec.name: replace(plan, checked=None) for plan in plans}
        key = secrets.token_bytes(32)
        self._settings = FrontendSettings(0, config, list(self._stripped.values()), self._folder, key)
        self._limits: SharedLimits | None = None
        if config.tenants:
            self._limits = SharedLimits.create(self._settings.limits, with_default(config.tenants), config.frontends)
        self.frontends: dict[int, FrontendProcess] = {}
        """By index; one that is gone is not among them."""
        self.frontend_restarts = 0
        self._up: dict[int, int] = {}  # pids of those that asked for a view
        self._followed: dict[int, int] = {}  # the version of the view that each has done what is to be done for
        self._said: set[tuple[str, int, str, int]] = set()  # what, pid, model, host's pid
        self._failures: dict[str, PoolError] = {}
        self._reports: dict[int, dict[str, Any]] = {}  # the last of each, by pid
        self._past: list[dict[str, Any]] = []  # of those that are gone
        self._has_started = False
        self._news = asyncio.Condition()
        self._view = self._look(0)
        self._keepers: list[asyncio.Task[None]] = []

    # -- life ----------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Start the frontends, which say that models are loading, then the host and the models; raises PoolError."""
        loop = asyncio.get_running_loop()
        calls = ControlServer(
            self._settings.supervisor,
            self._settings.key,
            lambda make: asyncio.run_coroutine_threadsafe(make(), loop),
        )
        names = ("view", "joined", "drained", "failed", "add_model", "remove_model", "report")
        calls.serve({name: getattr(self, name) for name in names})
        keeping = [self._keep(index) for index in range(self.config.frontends)]
        self._keepers = [asyncio.create_task(work) for work in (*keeping, self._publish(), self._collect())]
        await super().start()
        self._has_started = True
        await self._all_follow()

    async def stop(self) -> None:
        """Let the frontends finish, then end the host."""
        self.stopping = self.watch.stopping = True
        await self._notify()
        limit_s = self.config.shutdown_timeout_s + 10.0
        await asyncio.gather(*(frontend.stop(limit_s) for frontend in list(self.frontends.values())))
        for task in self._keepers:
            task.cancel()
        self._clients.clear()
        await super().stop()
        shutil.rmtree(self._folder, ignore_errors=True)

    # -- frontends -----------------------------------------------------------------------------------

    async def _keep(self, index: int) -> None:
        """Keep one frontend running."""
        loop, attempt = asyncio.get_running_loop(), 0
        while not self.stopping:
            began_s = loop.time()
            frontend = await FrontendProcess.start(replace(self._settings, index=index), self._sock)
            self.frontends[index] = frontend
            logger.debug("frontend started index=%d pid=%d", index, frontend.pid)
            status = await frontend.wait()
            if self.stopping:
                return
            logger.error("frontend ended index=%d pid=%d status=%s, restarting", index, frontend.pid, status)
            await self._frontend_died(index, frontend.pid)
            attempt = 0 if loop.time() - began_s > _STABLE_AFTER_S else attempt + 1
            await asyncio.sleep(_RESTART_WAITS_S[min(attempt, len(_RESTART_WAITS_S)) - 1] if attempt else 0.0)

    async def _frontend_died(self, index: int, pid: int) -> None:
        self.frontends.pop(index, None)
        self._up.pop(index, None)
        self.frontend_restarts += 1
        _FRONTEND_RESTARTS.inc()
        self._said = {said for said in self._said if said[1] != pid}
        if report := self._reports.pop(pid, None):
            self._past = [merged_reports([*self._past, used_only(report)])]
        if self._limits is not None:
            self._limits.forget(index)
        multiprocess.mark_process_dead(pid, os.environ["PROMETHEUS_MULTIPROC_DIR"])
        with contextlib.suppress(OSError):
            os.unlink(self._settings.own_socket(pid))
        if self._host is not None:
            with contextlib.suppress(PoolError):  # a host that is gone has none of its requests either
                await self._host.call("detach_frontend", index)
        await self._notify()

    # -- what frontends ask --------------------------------------------------------------------------

    async def view(self, index: int, pid: int, version: int) -> SupervisorView:
        """The view, once it is not the one that the frontend has; after a while in any case."""
        self._up[index], self._followed[index] = pid, version
        await self._notify()
        async with self._news:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_WATCH_LIMIT_S):
                    await self._news.wait_for(lambda: self.stopping or self._view.version != version)
        if self.stopping:  # a frontend cannot end while it waits here
            await asyncio.sleep(_LOOK_S)
        return self._view

    async def joined(self, index: int, pid: int, model: str, host_pid: int) -> None:
        """A frontend has joined the engine of a model in that host process."""
        self._said.add(("joined", pid, model, host_pid))
        await self._notify()

    async def drained(self, index: int, pid: int, model: str) -> None:
        """A frontend has no more requests of a model that is being removed."""
        self._said.add(("drained", pid, model, 0))
        await self._notify()

    async def failed(self, index: int, pid: int, model: str, error: PoolError) -> None:
        """A frontend could not join a model; it will try again."""
        self._failures[model] = error
        await self._notify()

    async def report(self) -> dict[str, Any]:
        """What all frontends together have in flight and what tenants used, those that are gone included."""
        await self._ask_all()
        merged = merged_reports([*self._reports.values(), *self._past])
        return {**merged, "frontend_restarts": self.frontend_restarts}

    async def _ask_all(self) -> None:
        await asyncio.gather(*(self._ask_one(pid) for pid in self._up.values()))

    async def _ask_one(self, pid: int) -> None:
        """Get a frontend's report; without an answer the last one stays."""
        settings = self._settings
        try:
            async with asyncio.timeout(_REPORT_LIMIT_S):
                asked = asyncio.to_thread(call_host, settings.own_socket(pid), settings.key, "report")
                report = await asked
        except (PoolError, TimeoutError) as error:  # it ends, or has just come
            logger.debug("no report pid=%d: %s", pid, error)
        else:
            if pid in self._up.values():
                self._reports[pid] = report

    async def _collect(self) -> None:
        """Ask for reports now and then, so that little is forgotten of what a frontend counted that is killed."""
        while True:
            await asyncio.sleep(_REPORT_PERIOD_S)
            if self._limits is not None:
                await self._ask_all()

    # -- the view ------------------------------------------------------------------------------------

    async def _publish(self) -> None:
        """Show frontends what changes; models change their state in many places."""
        while True:
            await asyncio.sleep(_LOOK_S)
            await self._show()

    async def _show(self) -> None:
        seen = self._look(self._view.version)
        if seen != self._view:
            self._view = replace(seen, version=seen.version + 1)
            await self._notify()

    async def _all_follow(self) -> None:
        """Wait until all frontends answer by what is so now."""
        await self._show()
        version = self._view.version
        async with self._news:
            await self._news.wait_for(lambda: all(self._followed[index] >= version for index in self._up))

    def _look(self, version: int) -> SupervisorView:
        host = self._host
        models = {}
        for name, model in self.router.models.items():
            clients: Any = self._clients.get(name)
            plan = clients.plan if clients is not None else self._stripped.get(name)
            if plan is not None:
                pid, drain_s = (clients.host_pid, clients.drain_s) if clients is not None else (0, 0.0)
                models[name] = ModelStanding(plan, model.state, pid, drain_s)
        blamed = all(clients.was_blamed for clients in self._clients.values())  # type: ignore[attr-defined]
        address = None
        if host is not None and not host.ended:
            address = HostAddress(host.name, host.pid, host.control_path, host.key)
        pids = {index: frontend.pid for index, frontend in self.frontends.items()}
        return SupervisorView(version, address, self.host_restarts, blamed, self._has_started, models, pids)

    async def _notify(self) -> None:
        async with self._news:
            self._news.notify_all()

    async def _wait_for(self, what: str, clients: _Clients) -> None:
        """Until all frontends have said that they did it; at the start those count, too, that are still starting."""
        name = clients.plan.spec.name
        self._said = {said for said in self._said if said[0] != what or said[2] != name}
        self._failures.pop(name, None)

        def is_done() -> bool:
            if not clients.has_served and what == "joined" and name in self._failures:
                raise self._failures[name]
            host_pid = clients.host_pid if what == "joined" else 0
            if what == "joined" and (self._host is None or self._host.ended):
                raise HostError("the engine host ended")
            pids = self._up.values()
            is_complete = self._has_started or len(pids) == self.config.frontends
            return is_complete and all((what, pid, name, host_pid) in self._said for pid in pids)

        while not is_done():
            async with self._news:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(0.5):
                        await self._news.wait()

    # -- models --------------------------------------------------------------------------------------

    async def add_model(self, spec: ModelSpec) -> dict[str, Any]:
        """See PoolServer.add_model; returns when all frontends serve it."""
        added = await super().add_model(spec)
        await self._all_follow()
        return added

    async def remove_model(self, name: str, drain_s: float) -> None:
        """See PoolServer.remove_model; returns when no frontend knows it any more."""
        await super().remove_model(name, drain_s)
        await self._all_follow()

    async def _start_host(self) -> None:
        if self._host is not None:  # the frontends' own count is that of the view, not of their metrics
            HOST_RESTARTS.inc()
        await super()._start_host()

    async def _make_client(self, plan: ModelPlan) -> Any:
        assert self._host is not None
        clients = _Clients(replace(plan, checked=None), self._wait_for)
        self._clients[plan.spec.name] = clients  # type: ignore[assignment]
        try:
            await clients.join(self._host)
        except BaseException:
            clients.host_pid = 0
            with contextlib.suppress(HostError):  # a host that is gone holds nothing either
                await self._host.call("remove_model", plan.spec.name)
            del self._clients[plan.spec.name]
            raise
        return clients
