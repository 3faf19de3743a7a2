# SPDX-License-Identifier: Apache-2.0
"""The part of a pool that has several frontends: starts, watches and restarts them, and tells them what is served.

Frontends wait for the next view, join engines by themselves and say so; what has to hold at all of them is waited for
until all have said it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import shutil
import socket
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from prometheus_client import multiprocess

from tokenpool.config import ModelSpec
from tokenpool.errors import PoolError
from tokenpool.host.control import ControlServer
from tokenpool.metric_registry import metric
from tokenpool.serve.admission import EngineQueue
from tokenpool.serve.ending import within
from tokenpool.serve.frontend_process import FrontendProcess, FrontendSettings
from tokenpool.serve.frontend_reports import merged_reports, used_only
from tokenpool.serve.frontend_view import ModelStanding, SupervisorView
from tokenpool.serve.host_calls import call_beside
from tokenpool.serve.keeper import Backoff, note_failure, start_kept
from tokenpool.serve.launch_plan import ModelPlan
from tokenpool.serve.pool_server import PoolServer
from tokenpool.serve.shared_limits import SharedLimits
from tokenpool.serve.tenants import with_default

logger = logging.getLogger(__name__)

_LOOK_S = 0.02
_WATCH_LIMIT_S = 10.0
_REPORT_PERIOD_S = 1.0
_REPORT_LIMIT_S = 5.0
_END_LIMIT_S = 6.0
"""What a frontend may take beyond `shutdown_timeout` before it is killed."""
_DRAIN_LIMIT_S = 10.0
"""What frontends may take beyond the limit of a drain to say that they have done it; one that hangs never does."""
_DETACH_LIMIT_S = _FOLLOW_LIMIT_S = 30.0
_FRONTEND_RESTARTS = metric("frontend_restarts").make()


class SharedClients:
    """A model's clients in all frontends, as the one client that `PoolServer` knows."""

    app: Any = None
    queue = staticmethod(EngineQueue)
    num_unfinished = 0
    num_seats = 1  # nothing goes through this process's gates

    def __init__(self, plan: ModelPlan, keeper: FrontendKeeper) -> None:
        self.plan = plan
        self.core = self
        self.added: dict[str, Any] = {}
        self.drain_s = 0.0
        self.keeper = keeper

    async def drain(self, limit_s: float) -> bool:
        """Let all frontends finish, or abort after `limit_s`, what they have."""
        self.drain_s = limit_s
        self.keeper.unsay(self.plan.spec.name)
        try:
            async with asyncio.timeout(limit_s + _DRAIN_LIMIT_S):
                await self.keeper.all_say("drained", self.plan.spec.name)
        except TimeoutError:
            return False
        return True

    async def abort_all(self) -> None:
        """Nothing: the frontends did."""

    def fail_all(self, reason: str) -> None:
        """Nothing: the frontends do when they see that the model is given up."""

    async def close(self) -> None:
        """Nothing."""


class FrontendKeeper(PoolServer, ABC):
    """A pool without a port of its own; see the module. A subclass calls `_prepare_frontends` when it is made."""

    def _prepare_frontends(self, plans: list[ModelPlan], sock: socket.socket, address: str = "") -> None:
        """`address` is that of this node in a cluster."""
        self._sock = sock
        self._sockets = tempfile.mkdtemp(prefix="tokenpool-")  # mode 0700: only this user reaches them
        self._stripped = {plan.spec.name: replace(plan, checked=None) for plan in plans}
        key, config = secrets.token_bytes(32), self.config
        self._settings = FrontendSettings(0, config, list(self._stripped.values()), self._sockets, key, address)
        self._limits: SharedLimits | None = None
        if config.tenants:
            self._limits = SharedLimits.create(self._settings.limits, with_default(config.tenants), config.frontends)
        self.frontends: dict[int, FrontendProcess] = {}
        """By index; one that is gone is not among them."""
        self.frontend_restarts = 0
        self._up: dict[int, int] = {}  # pids of those that asked for a view
        self._followed: dict[int, int] = {}  # the version of the view that each has done what is to be done for
        self._said: set[tuple[str, int, str, tuple[Any, ...]]] = set()  # what, pid, model, where
        self._failures: dict[str, PoolError] = {}
        self._reports: dict[int, dict[str, Any]] = {}  # the last of each, by pid
        self._past: list[dict[str, Any]] = []  # of those that are gone
        self._has_started = False
        self._news = asyncio.Condition()
        self._shown = self._look(0)
        self._keepers: list[asyncio.Task[None]] = []

    @abstractmethod
    def _look(self, version: int) -> SupervisorView:
        """What is so now."""

    @abstractmethod
    async def _detach(self, index: int) -> None:
        """Let all engines drop what the frontend with that index had."""

    # -- life ----------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Start the frontends, which say that models are loading, then what they serve; raises PoolError."""
        loop = asyncio.get_running_loop()
        calls = ControlServer(
            self._settings.supervisor,
            self._settings.key,
            lambda make: asyncio.run_coroutine_threadsafe(make(), loop),
        )
        calls.serve({call.__name__: call for call in self._calls()})
        keeping = {f"keeping frontend {index}": partial(self._keep, index) for index in range(self.config.frontends)}
        works = {**keeping, "showing the view": self._publish, "collecting reports": self._collect}
        self._keepers = [start_kept(task, work) for task, work in works.items()]
        await super().start()
        self._has_started = True
        await self._all_follow()

    def _calls(self) -> list[Callable[..., Any]]:
        """What frontends may call."""
        return [self.view, self.joined, self.drained, self.failed, self.add_model, self.remove_model, self.report]

    async def stop(self) -> None:
        """Let the frontends finish, then end the rest."""
        self.stopping = self.watch.stopping = True
        await self._notify()
        limit_s = self.config.shutdown_timeout_s + _END_LIMIT_S
        ends = [(f"stopping frontend {index}", frontend.stop(limit_s)) for index, frontend in self.frontends.items()]
        await asyncio.gather(*(within(limit_s + 2.0, what, end) for what, end in ends))
        for task in self._keepers:
            task.cancel()
        self._clients.clear()
        await super().stop()
        shutil.rmtree(self._sockets, ignore_errors=True)

    # -- frontends -----------------------------------------------------------------------------------

    async def _keep(self, index: int) -> None:
        """Keep one frontend running."""
        backoff = Backoff(first_at_once=True)
        while not self.stopping:
            frontend = await FrontendProcess.start(replace(self._settings, index=index), self._sock)
            self.frontends[index] = frontend
            logger.debug("frontend started index=%d pid=%d", index, frontend.pid)
            status = await frontend.wait()
            if self.stopping:
                return
            logger.error("frontend ended index=%d pid=%d status=%s, restarting", index, frontend.pid, status)
            try:
                await self._frontend_died(index, frontend.pid)
            except Exception:  # whatever is left of it, its successor is needed
                note_failure("clearing up after a frontend", "its successor starts")
            await asyncio.sleep(backoff.next_s())

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
        await self._notify()
        await within(_DETACH_LIMIT_S, f"detaching frontend {index}", self._detach(index))

    # -- what frontends ask --------------------------------------------------------------------------

    async def view(self, index: int, pid: int, version: int) -> SupervisorView:
        """The view, once it is not the one that the frontend has; after a while in any case."""
        self._up[index], self._followed[index] = pid, version
        await self._notify()
        async with self._news:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_WATCH_LIMIT_S):
                    await self._news.wait_for(lambda: self.stopping or self._shown.version != version)
        if self.stopping:  # a frontend cannot end while it waits here
            await asyncio.sleep(_LOOK_S)
        return self._shown

    async def joined(self, index: int, pid: int, model: str, *where: Any) -> None:
        """A frontend has joined the engine of a model there."""
        await self._say("joined", pid, model, where)

    async def drained(self, index: int, pid: int, model: str) -> None:
        """A frontend has no more requests of a model that is being removed."""
        await self._say("drained", pid, model, ())

    async def _say(self, what: str, pid: int, model: str, where: tuple[Any, ...]) -> None:
        self._said.add((what, pid, model, where))
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
            report = await call_beside(settings.own_socket(pid), settings.key, "report", timeout_s=_REPORT_LIMIT_S)
        except PoolError as error:  # it ends, or has just come
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

    # -- what all say --------------------------------------------------------------------------------

    def unsay(self, model: str, *where: Any) -> None:
        """Forget what was said of a model there, and why it could not be joined."""
        self._said = {said for said in self._said if said[2:] != (model, where)}
        self._failures.pop(model, None)

    async def all_say(
        self, what: str, model: str, *where: Any, unless: Callable[[], object] = lambda: None
    ) -> None:
        """Wait until all frontends have said it, or `unless` raises.

        At the start those count, too, that are still starting.
        """

        def is_done() -> bool:
            unless()
            pids = self._up.values()
            is_complete = self._has_started or len(pids) == self.config.frontends
            return is_complete and all((what, pid, model, where) in self._said for pid in pids)

        while not is_done():
            async with self._news:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(0.5):
                        await self._news.wait()

    def why_failed(self, model: str) -> str:
        """What a frontend said last that could not join the model; empty if none did."""
        return str(self._failures.get(model, ""))

    def refuse_failed(self, model: str) -> None:
        """Raise why a frontend could not join a model, if one said so."""
        if model in self._failures:
            raise self._failures[model]

    # -- the view ------------------------------------------------------------------------------------

    async def _publish(self) -> None:
        """Show frontends what changes; models change their state in many places."""
        while True:
            await asyncio.sleep(_LOOK_S)
            await self._show_view()

    async def _show_view(self) -> None:
        seen = self._look(self._shown.version)
        if seen != self._shown:
            self._shown = replace(seen, version=seen.version + 1)
            await self._notify()

    async def _all_follow(self) -> None:
        """Wait until all frontends answer by what is so now."""
        await self._show_view()
        version = self._shown.version
        try:
            async with asyncio.timeout(_FOLLOW_LIMIT_S), self._news:
                await self._news.wait_for(lambda: all(self._followed[index] >= version for index in self._up))
        except TimeoutError:  # it will follow when it looks again, or be replaced
            late = [pid for index, pid in self._up.items() if self._followed[index] < version]
            logger.error("frontends do not follow after %g s pids=%s", _FOLLOW_LIMIT_S, late)

    def _standings(self) -> dict[str, ModelStanding]:
        """Each model, without an engine to join."""
        standings = {}
        for name, model in self.router.models.items():
            clients: Any = self._clients.get(name)
            plan = self._plan_for_frontends(name)
            if plan is not None:
                drain_s, life = clients.drain_s if clients is not None else 0.0, self.lives[name]
                given_up = life.is_given_up or (life.is_leaving and life.error is not None)
                standings[name] = ModelStanding(plan, model.state, drain_s, 0, model.reason, given_up)
        return standings

    def _plan_for_frontends(self, name: str) -> ModelPlan | None:
        """A model's plan, which frontends can be sent; None while there is none."""
        clients: Any = self._clients.get(name)
        return clients.plan if clients is not None else self._stripped.get(name)

    @property
    def _pids(self) -> dict[int, int]:
        return {index: frontend.pid for index, frontend in self.frontends.items()}

    async def _notify(self) -> None:
        async with self._news:
            self._news.notify_all()

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
