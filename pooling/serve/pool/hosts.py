# SPDX-License-Identifier: Apache-2.0
"""What a pool asks of its engine hosts, wherever they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from tokenpool.process.keeper import Work
from tokenpool.serve.pool.host_watch import HostWatch
from tokenpool.serve.pool.models import PoolModel
from tokenpool.wire.budget import BudgetOrder, BudgetState


class Hosts(Protocol):
    """The engine hosts of a pool. All calls are made on the pool's event loop and end within limits of their own."""

    watch: HostWatch
    """Follows what they say of themselves."""

    @property
    def is_alive(self) -> bool:
        """Whether a host is there and its pulse is not overdue."""
        ...

    @property
    def has_started(self) -> bool:
        """Whether all models were loaded once, or could not be."""
        ...

    async def may_listen(self) -> None:
        """Return when the port may be answered."""
        ...

    async def start(self) -> None:
        """Load all models, those aside that are `failed` then; raises PoolError when nothing can be served."""
        ...

    def works(self) -> Mapping[str, Work]:
        """What goes on beside the requests once they have started, by name."""
        ...

    def freeze(self) -> None:
        """Begin nothing new: the pool is ending, and what it has is being finished."""
        ...

    async def stop(self) -> None:
        """End them."""
        ...


class HostLending(Protocol):
    """Memory that is lent and models that sleep; all raise ConfigError where the hosts cannot do that."""

    @property
    def asleep(self) -> Mapping[str, int]:
        """Models that sleep, with the level."""
        ...

    async def set_budget(self, order: BudgetOrder) -> BudgetState:
        """Change the memory budget, or ask for it; see Operator."""
        ...

    async def sleep(self, name: str, level: int, mode: str) -> None:
        """Put a model to sleep; see Operator."""
        ...

    async def wake(self, name: str) -> None:
        """Let it take turns again; see Operator."""
        ...


class ManagedHosts(Hosts, Protocol):
    """Hosts that this process manages."""

    @property
    def lending(self) -> HostLending:
        """What they have lent."""
        ...

    @property
    def is_there(self) -> bool:
        """Whether a model can be added."""
        ...

    async def add(self, model: PoolModel) -> None:
        """Load a model, after which it is served; raises PoolError, with nothing left of it."""
        ...

    async def introduce(self, model: PoolModel) -> None:
        """Let whoever else serves it know a model that is loaded on demand; raises PoolError."""
        ...

    async def retry(self, model: PoolModel) -> None:
        """Load a model that was `failed`; raises HostError when its host ends."""
        ...

    async def retire(self, model: PoolModel, drain_s: float) -> None:
        """Let whoever else serves a model drain it for `drain_s`, before it is removed; raises PoolError."""
        ...

    async def remove(self, model: PoolModel) -> None:
        """Unload a model that has no more requests; raises PoolError."""
        ...

    async def report(self) -> dict[str, Any]:
        """Their part of the pool's state."""
        ...

    def report_on(self, model: PoolModel) -> dict[str, Any]:
        """Their part of a model's state."""
        ...

    async def trace(self, last_s: float | None) -> dict[str, Any]:
        """Their traces in Chrome's format, of the last `last_s` seconds or all that is kept; raises PoolError."""
        ...

    async def metrics(self) -> dict[str, str]:
        """Scrapes of those that do not share this process's folder of metrics, by host."""
        ...

    async def decisions(self, limit: int | None) -> list[dict[str, Any]] | None:
        """What decided where models are, oldest first; None where nothing is decided. Raises PoolError."""
        ...

    async def logs(self, seen: Mapping[str, int]) -> list[dict[str, Any]]:
        """Their log lines newer than `seen`; none of those that do not answer."""
        ...

    async def drain(self, host: str, is_wanted: bool) -> list[str]:
        """Empty one of them, or use it again; see Operator."""
        ...

    async def check(self) -> None:
        """Check their books; raises what is wrong."""
        ...
