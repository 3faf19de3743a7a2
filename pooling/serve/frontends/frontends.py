# SPDX-License-Identifier: Apache-2.0
"""The frontends of a pool that has several: starts, watches and restarts them, and tells them what is served.

Frontends wait for the next view, join engines by themselves and say so.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import secrets
import shutil
import socket
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from prometheus_client import multiprocess

from tokenpool.errors import HostError, PoolError
from tokenpool.metric_registry import metric
from tokenpool.policy.leases import Lease
from tokenpool.process.ending import within
from tokenpool.process.keeper import Backoff, Work, note_failure, start_kept
from tokenpool.serve.access.shared_limits import SharedLimits
from tokenpool.serve.access.tenants import with_default
from tokenpool.serve.client.host_calls import call_beside
from tokenpool.serve.frontends.frontend_process import FrontendProcess
from tokenpool.serve.frontends.frontend_reports import merged_reports, state_of_all, used_only
from tokenpool.serve.frontends.frontend_view import FrontendSettings, SupervisorView
from tokenpool.serve.frontends.sayings import Sayings
from tokenpool.serve.frontends.shared_hosts import SharedHosts
from tokenpool.serve.frontends.told_uses import ToldUses
from tokenpool.serve.pool.hosts import ManagedHosts
from tokenpool.serve.pool.model_use import ModelUse
from tokenpool.serve.pool.pool import Pool
from tokenpool.serve.pool.pool_operator import PoolOperator
from tokenpool.wire.control import ControlServer

logger = logging.getLogger(__name__)

_LOOK_S, _LOOK_MODEL_S = 0.02, 5e-5
"""Between two looks at what frontends are to see, and what each model adds."""
_WATCH_LIMIT_S = 10.0
_REPORT_PERIOD_S = 1.0
_REPORT_LIMIT_S = 5.0
_COUNT_LIMIT_S = 0.3
_END_LIMIT_S = 6.0
"""What a frontend may take beyond `shutdown_timeout` before it is killed."""
_DETACH_LIMIT_S = _FOLLOW_LIMIT_S = 30.0
_FRONTEND_RESTARTS = metric("frontend_restarts").make()


class Frontends:
    """Serves a pool that has no port of its own; see the module. Lives on the pool's event loop."""

    def __init__(
        self,
        pool: Pool[ManagedHosts],
        operator: PoolOperator,
        hosts: SharedHosts,
        sayings: Sayings,
        sock: socket.socket,
        address: str = "",
        first_index: int = 0,
        folder: str | None = None,
    ) -> None:
        """`address` is that of this node in a cluster, where engines know the first frontend by `first_index`.

        Sockets lie in `folder`, which only this user may reach; else one is made.
        """
        self._pool = pool
        self._operator = operator
        operator.after_change = self._all_follow
        self._hosts = hosts
        self._sayings = sayings
        self._sock = sock
        self._sockets = folder or tempfile.mkdtemp(prefix="tokenpool-")  # mode 0700: only this user reaches them
        config, plans = pool.config, [model.plan_to_send for model in pool.models.values()]
        for model in pool.models.values():
            model.is_told = True
        key = secrets.token_bytes(32)
        self._settings = FrontendSettings(0, config, plans, self._sockets, key, address, first_index)
        self._limits: SharedLimits | None = None
        if config.tenants:
            table, tenants = self._settings.limits, with_default(config.tenants)
            self._limits = SharedLimits.create(table, tenants, config.frontends, is_leased=bool(address))
        self.processes: dict[int, FrontendProcess] = {}
        """By index; one that is gone is not among them."""
        self.num_restarts = 0
        self._uses = ToldUses(pool.models)
        self._lives: dict[int, int] = {}  # of those that were started and are not known to be gone, by index
        self._starts = itertools.count(1)
        self._followed: dict[int, int] = {}  # the version of the view that each has done what is to be done for
        self._reports: dict[int, dict[str, Any]] = {}  # the last of each, by life
        self._past: list[dict[str, Any]] = []  # of those that are gone
        self._shown = self._look(0)
        self._tasks: list[asyncio.Task[None]] = []

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
        works: dict[str, Work] = {
            f"keeping frontend {index}": partial(self._keep, index) for index in range(self._pool.config.frontends)
        }
        works |= {"showing the view": self._publish, "collecting reports": self._collect}
        self._tasks = [start_kept(task, work) for task, work in works.items()]
        await self._pool.start()
        self._sayings.has_started = True
        await self._all_follow()

    def _calls(self) -> list[Callable[..., Any]]:
        """What frontends may call."""
        of_operator = self._operator
        told: list[Callable[..., Any]] = [of_operator.trace, of_operator.host_metrics, of_operator.decisions]
        told += [of_operator.budget, of_operator.sleep, of_operator.wake, of_operator.asleep]
        told += [
            of_operator.logs,
            of_operator.drain,
            of_operator.check,
            of_operator.add_model,
            of_operator.remove_model,
            self.state,
            self.report,
        ]
        return [self.view, self.joined, self.drained, self.failed, self.uses, *told, *self._hosts.calls()]

    async def stop(self) -> None:
        """Let the frontends finish, then end the rest."""
        self._pool.announce_stop()
        await self._sayings.notify()
        limit_s = self._pool.config.shutdown_timeout_s + _END_LIMIT_S
        ends = [(f"stopping frontend {index}", process.stop(limit_s)) for index, process in self.processes.items()]
        await asyncio.gather(*(within(limit_s + 2.0, what, end) for what, end in ends))
        for task in self._tasks:
            task.cancel()
        for model in self._pool.models.values():
            model.client = None  # its requests ended with the frontends
        await self._pool.stop()
        shutil.rmtree(self._sockets, ignore_errors=True)

    # -- processes -----------------------------------------------------------------------------------

    async def _keep(self, index: int) -> None:
        """Keep one frontend running."""
        backoff = Backoff(first_at_once=True)
        while not self._pool.stopping:
            life = self._lives[index] = next(self._starts)
            process = await FrontendProcess.start(replace(self._settings, index=index, life=life), self._sock)
            self.processes[index] = process
            logger.debug("frontend started index=%d pid=%d", index, process.pid)
            status = await process.wait()
            if self._pool.stopping:
                return
            logger.error("frontend ended index=%d pid=%d status=%s, restarting", index, process.pid, status)
            try:
                await self._died(index, life, process.pid)
            except Exception:  # whatever is left of it, its successor is needed
                note_failure("clearing up after a frontend", "its successor starts")
            await asyncio.sleep(backoff.next_s())

    async def _died(self, index: int, life: int, pid: int) -> None:
        self.processes.pop(index, None)
        self._lives.pop(index, None)
        self._sayings.forget(index, life)
        self._uses.forget(life)
        self.num_restarts += 1
        _FRONTEND_RESTARTS.inc()
        if report := self._reports.pop(life, None):
            self._past = [merged_reports([*self._past, used_only(report)])]
        if self._limits is not None:
            self._limits.forget(index)
        multiprocess.mark_process_dead(pid)
        with contextlib.suppress(OSError):
            os.unlink(self._settings.own_socket(life))
        await self._sayings.notify()
        await within(_DETACH_LIMIT_S, f"detaching frontend {index}", self._hosts.detach(index))

    # -- what frontends ask --------------------------------------------------------------------------

    async def view(self, index: int, life: int, version: int) -> SupervisorView:
        """The view, once it is not the one that the frontend has; after a while in any case."""
        if self._lives.get(index) != life:
            raise HostError("this frontend is gone, and another one has its index")
        self._sayings.up[index], self._followed[index] = life, version
        await self._sayings.notify()
        async with self._sayings.news:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_WATCH_LIMIT_S):
                    await self._sayings.news.wait_for(lambda: self._pool.stopping or self._shown.version != version)
        if self._pool.stopping:  # a frontend cannot end while it waits here
            await asyncio.sleep(_LOOK_S)
        return self._shown

    async def joined(self, index: int, life: int, model: str, number: int) -> None:
        """A frontend has joined the engine of a model that has that number."""
        await self._sayings.say("joined", life, number)

    async def drained(self, index: int, life: int, model: str, number: int) -> None:
        """A frontend has no more requests of a model, for the drain that has that number."""
        await self._sayings.say("drained", life, number)

    async def uses(self, index: int, life: int, uses: dict[tuple[str, int], ModelUse]) -> None:
        """What a frontend has of models, as far as that has changed."""
        if life in self._sayings.up.values():
            self._uses.tell(life, uses)

    async def failed(self, index: int, life: int, model: str, birth: int, error: PoolError) -> None:
        """A frontend could not join a model; it will try again."""
        if life in self._sayings.up.values():
            await self._hosts.fail(model, birth, error)

    async def state(self) -> dict[str, Any]:
        """The pool's state; requests in flight and handed over are those of all frontends."""
        return state_of_all(await self._operator.state(), await self.report(), self._pids)

    async def report(self) -> dict[str, Any]:
        """What all frontends together have in flight and what tenants used, those that are gone included."""
        await self._ask_all()
        merged = merged_reports([*self._reports.values(), *self._past])
        return {**merged, "frontend_restarts": self.num_restarts}

    def tenants_told(self) -> dict[str, Any]:
        """What tenants use and used, by the last reports."""
        tenants: dict[str, Any] = merged_reports([*self._reports.values(), *self._past])["tenants"]
        return tenants

    def set_leases(self, leases: Mapping[str, Lease]) -> None:
        """Let all frontends together keep to these parts of tenants' limits."""
        assert self._limits is not None
        for i, tenant in enumerate(with_default(self._pool.config.tenants)):
            if tenant.name in leases:
                limits = {"requests": tenant.requests_per_minute, "tokens": tenant.tokens_per_minute}
                self._limits.set_lease(i, leases[tenant.name], limits)

    async def count_requests(self) -> dict[str, int]:
        """The requests that each model has in all frontends, as far as these say so in a moment."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_COUNT_LIMIT_S):
                await self._ask_all()
        return merged_reports([*self._reports.values()])["inflight"]

    async def _ask_all(self) -> None:
        await asyncio.gather(*(self._ask_one(life) for life in self._sayings.up.values()))

    async def _ask_one(self, life: int) -> None:
        """Get a frontend's report; without an answer the last one stays."""
        settings = self._settings
        try:
            report = await call_beside(settings.own_socket(life), settings.key, "report", timeout_s=_REPORT_LIMIT_S)
        except PoolError as error:  # it ends, or has just come
            logger.debug("no report life=%d: %s", life, error)
        else:
            if life in self._sayings.up.values():
                self._reports[life] = report

    async def _collect(self) -> None:
        """Ask for reports now and then, so that little is forgotten of what a frontend counted that is killed."""
        while True:
            await asyncio.sleep(_REPORT_PERIOD_S)
            if self._limits is not None:
                await self._ask_all()

    # -- the view ------------------------------------------------------------------------------------

    @property
    def _pids(self) -> dict[int, int]:
        return {index: process.pid for index, process in self.processes.items()}

    def _look(self, version: int) -> SupervisorView:
        return self._hosts.view(version, self._sayings.has_started, self._pids)

    async def _publish(self) -> None:
        """Show frontends what changes; models change their state in many places."""
        while True:
            await asyncio.sleep(_LOOK_S + _LOOK_MODEL_S * len(self._pool.models))
            await self._show_view()

    async def _show_view(self) -> None:
        seen = self._look(self._shown.version)
        if seen != self._shown:
            self._shown = replace(seen, version=seen.version + 1)
            await self._sayings.notify()

    async def _all_follow(self) -> None:
        """Wait until all frontends answer by what is so now."""
        await self._show_view()
        version, up = self._shown.version, self._sayings.up
        try:
            async with asyncio.timeout(_FOLLOW_LIMIT_S), self._sayings.news:
                await self._sayings.news.wait_for(lambda: all(self._followed[index] >= version for index in up))
        except TimeoutError:  # it will follow when it looks again, or be replaced
            late = [pid for index, pid in self._pids.items() if index in up and self._followed[index] < version]
            logger.error("frontends do not follow after %g s pids=%s", _FOLLOW_LIMIT_S, late)
