# SPDX-License-Identifier: Apache-2.0
"""One engine host on this machine: started, watched, and started again when it dies."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from prometheus_client import multiprocess

from tokenpool.config import PoolConfig
from tokenpool.errors import CapacityError, ConfigError, HostError, ModelBusyError, ModelUnavailableError, PoolError
from tokenpool.metric_registry import metric
from tokenpool.model_life import Life
from tokenpool.process.ending import HOST_END_S, KILL_S, within
from tokenpool.process.keeper import Backoff, Work
from tokenpool.process.template import Template
from tokenpool.serve.client.host_process import HostProcess
from tokenpool.serve.client.model_client import ModelClient, first_config
from tokenpool.serve.launch.launch_plan import host_config
from tokenpool.serve.pool.host_watch import HostWatch, follow_forecasts
from tokenpool.serve.pool.local_lending import LocalLending
from tokenpool.serve.pool.model_clients import Client
from tokenpool.serve.pool.models import Models, PoolModel
from tokenpool.wire.trace import chrome_trace

logger = logging.getLogger(__name__)

_HOST_RESTARTS = metric("host_restarts").make()
_END_LIMIT_S, _SILENT_END_LIMIT_S = 0.5, 10.0
"""How long it may take until a host is seen to have ended; a large one that does not answer takes longer."""
_STABLE_AFTER_S = 20.0
"""A host that lived so long is started again at once: what kills host after host does so at once, or is found out."""
_UNLOAD_LIMIT_S = 30.0
"""How long the host may say that a drained model has requests."""

Loader = Callable[[PoolModel, HostProcess], Awaitable[Client]]
"""Loads a model in a host and returns what its requests go through, the same with each host; raises PoolError."""


async def _no_room() -> bool:
    return False


async def load_here(model: PoolModel, host: HostProcess) -> Client:
    """Load a model whose requests go through this process."""
    if (client := model.client) is None:
        client = await ModelClient.start(model.plan, host)
        client.on_fault = model.note_client_fault
    else:
        assert isinstance(client, ModelClient)
        await client.join(host)
    return client


class LocalHosts:
    """See `Hosts`; all of them are one, or the one that comes after it."""

    def __init__(
        self, config: PoolConfig, models: Models, load: Loader = load_here, template: Template | None = None
    ) -> None:
        """`load` loads a model in a host; hosts are forked from `template` if there is one and it can be."""
        self.process: HostProcess | None = None
        """The present host, or the last one."""
        self.num_restarts = 0
        self._models = models
        self._movable = config.weights == "movable"
        self._max_loaded = config.max_loaded
        self._load_in = load
        self._template = template
        self._config = host_config(config, [model.plan for model in models.values()])
        self.lending = LocalLending(models, lambda: self.process)
        """See Hosts."""
        self.count_requests: Callable[[], Awaitable[Mapping[str, int]]] = self._count_here
        """How many accepted requests each model has that are not finished."""
        self.make_room: Callable[[], Awaitable[bool]] = _no_room
        """Unloads a model that nobody uses, with `changing` held; returns whether there was one."""
        self.watch = HostWatch(
            models.apps,
            lambda: self.process.call if self.process else None,
            lambda: self.process.guard if self.process else None,
            lambda name: models[name].restore(),
        )

    # -- life ----------------------------------------------------------------------------------------

    @property
    def is_there(self) -> bool:
        """See Hosts."""
        return self.process is not None

    @property
    def is_alive(self) -> bool:
        """See Hosts."""
        return self.process is not None and not self.process.ended and not self.watch.is_overdue

    @property
    def has_started(self) -> bool:
        """See Hosts; models that are loading say so themselves."""
        return True

    async def may_listen(self) -> None:
        """See Hosts: at once, while models load."""

    async def start(self) -> None:
        """See Hosts."""
        while True:
            await self._start_host()
            try:
                await self._load_all()
                return
            except HostError:
                if not self._models.can_go_on:
                    raise
                self._host_died()

    def works(self) -> Mapping[str, Work]:
        """See Hosts."""
        return {
            "supervising the host": self._supervise,
            "asking for forecasts": lambda: follow_forecasts(self._models.apps, lambda: self._host.call),
        }

    def freeze(self) -> None:
        """See Hosts."""

    async def stop(self) -> None:
        """See Hosts."""
        if self.process is not None:
            await within(HOST_END_S + KILL_S, "stopping the host", self.process.stop(HOST_END_S))
        if self._template is not None:
            await within(KILL_S, "stopping the template", asyncio.to_thread(self._template.stop))

    @property
    def _host(self) -> HostProcess:
        assert self.process is not None
        return self.process

    async def _start_host(self) -> None:
        if self.process is not None:
            self.num_restarts += 1
            _HOST_RESTARTS.inc()
        async with self._models.changing:
            first = await first_config([model.plan for model in self._models.values()])
            self.process = await HostProcess.start(self.lending.config(self._config), first, template=self._template)

    def _host_died(self, *, blame: bool = True) -> None:
        self._models.lose_host(self._host.name, blame=blame)
        multiprocess.mark_process_dead(self._host.pid)

    async def _supervise(self) -> None:
        backoff = Backoff(first_at_once=True, stable_after_s=_STABLE_AFTER_S)
        while True:
            status = await self._host.wait()
            logger.error("engine host ended pid=%d status=%d, restarting", self._host.pid, status)
            self._host_died()
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
                    self._host_died(blame=died)

    async def _ends_soon(self, limit_s: float = _END_LIMIT_S) -> bool:
        """Whether the host is going: it stops to answer a moment before it can be seen to have ended."""
        deadline = time.monotonic() + limit_s
        while not self._host.ended and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        return self._host.ended

    # -- models --------------------------------------------------------------------------------------

    async def _load_all(self) -> None:
        """Load what is wanted into a new host, first what requests wait for; raises HostError when that ends.

        Requests may begin to wait meanwhile, for models that are loaded on demand, too.
        """
        waiting, tried = await self.count_requests(), set[PoolModel]()

        def last(model: PoolModel) -> tuple[int, tuple[float, float], int]:
            return model.host_deaths, self._models.claim(model), -waiting.get(model.name, 0)

        while left := [model for model in self._models.to_load() if model not in tried and self._may_load(model)]:
            tried.add(model := min(left, key=last))
            self._models.take_turn(model)
            await self._load(model)

    def _may_load(self, model: PoolModel) -> bool:
        """Whether it is loaded with the host: one that is loaded on demand, if there is room beside the others."""
        if model.client is not None or not model.is_on_demand or self._max_loaded is None:
            return True
        return sum(m.client is not None or not m.is_on_demand for m in self._models.values()) < self._max_loaded

    async def _count_here(self) -> Mapping[str, int]:
        return {model.name: model.client.num_unfinished for model in self._models.values() if model.client is not None}

    async def retry(self, model: PoolModel) -> None:
        """See Hosts."""
        if self.process is not None and not self.process.ended and not self.lending.is_parked:
            await self._load(model)

    async def _load(self, model: PoolModel) -> None:
        """Load a model, which is `failed` if that cannot be done; raises HostError when the host ends."""
        await self.lending.until_unparked()
        async with self._models.changing:
            began_s = time.monotonic()
            if self._models.get(model.name) is not model or (model.is_leaving and model.client is None):
                return  # removed, or about to be, and nobody waits for it
            if self._host.pid == model.host_pid:
                return  # somebody was faster
            if model.app.state == Life.COLD:
                return  # it was unloaded, or nobody waits for it any more
            if self._host.ended:
                raise HostError("the engine host ended")  # before this model had a part in it
            error = await self._try_to_add(model)
            while isinstance(error, CapacityError) and await self.make_room():
                error = await self._try_to_add(model)
            if error is None:
                return
            if await self._ends_soon(_SILENT_END_LIMIT_S if isinstance(error, HostError) else _END_LIMIT_S):
                model.note_host_death()
                if model.is_given_up:
                    deaths = model.host_deaths
                    model.fail(HostError(f"{deaths} engine hosts ended in a row while they loaded it"))
                    model.fail_requests()
                raise HostError(f"the engine host ended while it loaded model {model.name!r}") from error
            model.host_deaths = 0  # this attempt ended without one
            model.fail(error, took_s=time.monotonic() - began_s)
            if model.is_leaving:
                model.fail_requests()

    async def _try_to_add(self, model: PoolModel) -> Exception | None:
        try:
            await self.add(model)
        except Exception as caught:  # of vLLM's making, too: it is the model's failure, unless the host ended
            return caught
        return HostError("the engine host ended") if self._host.ended else None

    async def add(self, model: PoolModel) -> None:
        """See Hosts."""
        host = self._host
        try:
            client = await self._load_in(model, host)
            await self.lending.put_back(model.name)
        except CapacityError as error:
            if self._movable or not error.holders:
                raise
            # Others hold the pages: weights of unknown size before, or a model that came later than the plan.
            raise CapacityError(f"{error}; or let weights leave the device (weights: movable)") from error
        model.answer_with(client)
        model.served(host.pid)
        logger.info("model ready model=%s seconds=%.2f", model.name, client.added["build_s"])

    async def introduce(self, model: PoolModel) -> None:
        """See Hosts: nobody else serves it."""

    async def retire(self, model: PoolModel, drain_s: float) -> None:
        """See Hosts: nobody else serves it."""

    async def remove(self, model: PoolModel) -> None:
        """See Hosts; a host that ends meanwhile has it no more."""
        self.lending.asleep.pop(model.name, None)
        try:
            await self._unload(model)
        finally:  # it may have fallen asleep meanwhile
            self.lending.asleep.pop(model.name, None)

    async def _unload(self, model: PoolModel) -> None:
        deadline = time.monotonic() + _UNLOAD_LIMIT_S
        while self.process is not None and not self.process.ended:
            try:
                await self.process.call("remove_model", model.name)
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

    # -- what is told --------------------------------------------------------------------------------

    async def report(self) -> dict[str, Any]:
        """See Hosts."""
        try:
            host = await self.watch.state()
        except PoolError as error:
            host = {"error": str(error)}
        told = {"host_pid": self.process.pid if self.process else None, "host_pulse": self.watch.pulse()}
        if self._template is not None:
            told["host_template"] = self._template.snapshot()
        return {**told, "host_restarts": self.num_restarts, "host": host}

    def report_on(self, model: PoolModel) -> dict[str, Any]:
        """See Hosts."""
        return {}

    async def trace(self, last_s: float | None) -> dict[str, Any]:
        """See Hosts."""
        if self.process is None:
            raise ModelUnavailableError("the engine host is not there", retry_after_s=5.0)
        events = await self.process.call("trace", last_s)
        return await asyncio.to_thread(chrome_trace, events)

    async def metrics(self) -> dict[str, str]:
        """See Hosts; the only one shares this process's folder."""
        return {}

    async def decisions(self, limit: int | None) -> list[dict[str, Any]] | None:
        """See Hosts."""
        return None

    async def logs(self, seen: Mapping[str, int]) -> list[dict[str, Any]]:
        """See Hosts."""
        if self.process is None:
            return []
        try:
            lines: list[dict[str, Any]] = await self.process.call("logs", dict(seen))
        except PoolError:  # the next one begins anew
            return []
        return lines

    async def drain(self, host: str, is_wanted: bool) -> list[str]:
        """See Hosts."""
        raise ConfigError(
            "there is one host here, and no other that could take its models: stop the server", key="host"
        )

    async def check(self) -> None:
        """See Hosts."""
        if self.process is not None:
            await self.process.call("check")
