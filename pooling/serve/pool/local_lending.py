# SPDX-License-Identifier: Apache-2.0
"""What the host of a pool has lent, and which of its models sleep: asked of the present host, kept for the next one."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

from tokenpool.errors import HostError, ModelUnavailableError, PoolError
from tokenpool.serve.client.host_process import HostProcess
from tokenpool.serve.pool.models import Models
from tokenpool.wire.budget import BudgetOrder, BudgetState
from tokenpool.wire.spec import HostConfig

_LOOK_S = 0.05
_QUESTION_LIMIT_S = 30.0
_WAIT_LIMIT_S = 600.0
"""How long the running requests of a model may take that is to sleep when they have ended."""
_RETRY_S = 5.0


class LocalLending:
    """Lives on the pool's event loop."""

    def __init__(self, models: Models, host: Callable[[], HostProcess | None]) -> None:
        self.asleep: dict[str, int] = {}
        """Models that sleep, with the level."""
        self._models = models
        self._host = host
        self._budget: BudgetState | None = None  # None: the pool file's

    @property
    def is_parked(self) -> bool:
        """Whether no model can be loaded."""
        return self._budget is not None and self._budget.is_parked

    def config(self, config: HostConfig) -> HostConfig:
        """What a new host is given, which has the present budget."""
        if self._budget is None:
            return config
        return replace(config, device_budget=self._budget.device_memory, host_memory=self._budget.host_memory)

    async def until_unparked(self) -> None:
        """Wait until models can be loaded; raises HostError when the host ends meanwhile."""
        while self.is_parked:
            self._living()
            await asyncio.sleep(_LOOK_S)

    async def set_budget(self, order: BudgetOrder) -> BudgetState:
        """See Operator."""
        if order.is_question:
            return await self._call("set_budget", order, timeout_s=_QUESTION_LIMIT_S)
        async with self._models.changing:  # a build has its room already
            self._budget = await self._call("set_budget", order)
        return self._budget

    async def sleep(self, name: str, level: int, mode: str) -> None:
        """See Operator."""
        deadline, loaded = time.monotonic() + _WAIT_LIMIT_S, self._loaded(name)
        is_waiting = False
        try:
            while not await self._call("sleep", name, level, mode):
                is_waiting = True  # the model takes no requests in meanwhile
                if time.monotonic() > deadline:
                    raise HostError(f"requests of model {name!r} still run after {_WAIT_LIMIT_S:g} s: it is awake")
                await asyncio.sleep(_LOOK_S)
        except BaseException:  # nobody asks any more
            if is_waiting:
                with suppress(PoolError):  # there is no host, or no such model, any more
                    await self._call("wake", name)
                self.asleep.pop(name, None)
            raise
        if self._loaded(name) == loaded:  # else it was removed, or unloaded, since its host had said so
            self.asleep[name] = level

    async def wake(self, name: str) -> None:
        """See Operator."""
        await self._call("wake", name)
        self.asleep.pop(name, None)

    async def put_back(self, name: str) -> None:
        """A model was loaded anew: it sleeps again if it did."""
        if name in self.asleep:
            await self._call("sleep", name, self.asleep[name], "keep")

    def _loaded(self, name: str) -> tuple[object, object] | None:
        """Tells a model from another one of its name, and one load of it from the next."""
        model = self._models.get(name)
        return None if model is None else (model, model.client)

    async def _call(self, method: str, *args: Any, timeout_s: float | None = None) -> Any:
        try:
            return await self._living().call(method, *args, timeout_s=timeout_s)
        except KeyError:  # a name that the host does not have
            raise ModelUnavailableError(f"model {args[0]!r} is not loaded now", retry_after_s=_RETRY_S) from None

    def _living(self) -> HostProcess:
        host = self._host()
        if host is None:
            raise ModelUnavailableError("the engine host is not there", retry_after_s=_RETRY_S)
        if host.ended:
            raise HostError("the engine host ended")
        return host
