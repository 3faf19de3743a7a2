# SPDX-License-Identifier: Apache-2.0
"""What whoever runs a pool asks of it: add and remove models, tell how it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from tokenpool.config import ModelSpec
from tokenpool.wire.budget import BudgetOrder, BudgetState


class Operator(Protocol):
    """Answers for the whole pool, in the process that has the hosts or in one of several frontends."""

    async def add_model(self, spec: ModelSpec) -> dict[str, Any]:
        """Load one more model and return what its host says of it; the others pause meanwhile and lose nothing.

        Raises PoolError and changes nothing when it cannot be served.
        """
        ...

    async def remove_model(self, name: str, drain_s: float) -> None:
        """Stop taking requests for a model, let it finish for at most `drain_s`, abort the rest and unload it.

        What waits for a model that is `failed` ends at once. Raises KeyError for an unknown name; PoolError, with the
        model `failed`, when it cannot be unloaded, which is tried again then.
        """
        ...

    async def budget(self, order: BudgetOrder) -> BudgetState:
        """Change how much of the device and of host memory the pool uses, or ask; returns what holds from now on.

        Raises PoolError, with the budget as it was, when it cannot be. A host that is restarted keeps it.
        """
        ...

    async def sleep(self, name: str, level: int, mode: str) -> None:
        """Let a model leave the device and take no turns; its requests wait, and their KV is kept.

        With `mode` "wait" its running requests end first, with "abort" all are ended. Raises PoolError.
        """
        ...

    async def wake(self, name: str) -> None:
        """Let a model that sleeps take turns again; raises PoolError."""
        ...

    async def asleep(self) -> dict[str, int]:
        """Models that sleep, with the level."""
        ...

    async def state(self) -> dict[str, Any]:
        """The pool's state: models, hosts, memory, restarts."""
        ...

    async def inflight(self) -> dict[str, int]:
        """Requests in flight per model."""
        ...

    async def tenants_report(self) -> dict[str, Any]:
        """Each tenant's limits, what is left of them, its usage, and its requests that are held, per model."""
        ...

    async def trace(self, last_s: float | None) -> dict[str, Any]:
        """Hosts' traces in Chrome's format, of the last `last_s` seconds or all that is kept; raises PoolError."""
        ...

    async def host_metrics(self) -> dict[str, str]:
        """Scrapes of hosts that do not share this process's folder of metrics, by host."""
        ...

    async def decisions(self, limit: int | None) -> list[dict[str, Any]] | None:
        """What decided where models are, oldest first; None where nothing is decided. Raises PoolError."""
        ...

    async def logs(self, seen: Mapping[str, int]) -> list[dict[str, Any]]:
        """The log lines that are kept of all processes and newer than `seen`, by source; see `recent_logs`."""
        ...

    async def drain(self, host: str, is_wanted: bool) -> list[str]:
        """Empty a host of a cluster, or use it again; returns the models that are there. Raises PoolError."""
        ...

    async def check(self) -> None:
        """Check the books of the hosts' memory; raises what is wrong."""
        ...
