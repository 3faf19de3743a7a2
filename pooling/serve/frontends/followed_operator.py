# SPDX-License-Identifier: Apache-2.0
"""Answers for the whole pool in one of several frontends, by asking the supervisor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokenpool.config import ModelSpec
from tokenpool.errors import ModelUnavailableError
from tokenpool.recent_logs import in_order, recent_lines
from tokenpool.serve.frontends.followed_hosts import FollowedHosts
from tokenpool.serve.pool.pool import Pool
from tokenpool.wire.budget import BudgetOrder, BudgetState
from tokenpool.wire.control import limit_of


class FollowedOperator:
    """See `Operator`."""

    def __init__(self, pool: Pool[FollowedHosts]) -> None:
        self._pool = pool
        self._ask = pool.hosts.ask

    async def add_model(self, spec: ModelSpec) -> dict[str, Any]:
        """See Operator; returns when all frontends serve it."""
        if self._pool.stopping:
            raise ModelUnavailableError("the pool is stopping", retry_after_s=30.0)
        added: dict[str, Any] = await self._ask("add_model", spec)
        return added

    async def remove_model(self, name: str, drain_s: float) -> None:
        """See Operator; returns when no frontend knows it any more."""
        await self._ask("remove_model", name, drain_s, timeout_s=drain_s + limit_of("remove_model"))

    async def budget(self, order: BudgetOrder) -> BudgetState:
        """See Operator."""
        limit_s = None if order.is_question else limit_of("set_budget")
        state: BudgetState = await self._ask("budget", order, timeout_s=limit_s)
        return state

    async def sleep(self, name: str, level: int, mode: str) -> None:
        """See Operator."""
        await self._ask("sleep", name, level, mode)

    async def wake(self, name: str) -> None:
        """See Operator."""
        await self._ask("wake", name)

    async def asleep(self) -> dict[str, int]:
        """See Operator."""
        levels: dict[str, int] = await self._ask("asleep")
        return levels

    async def state(self) -> dict[str, Any]:
        """See Operator; with the frontends that are there."""
        state: dict[str, Any] = await self._ask("state")
        return state

    async def inflight(self) -> dict[str, int]:
        """See Operator; at all frontends."""
        counts: dict[str, int] = (await self._ask("report"))["inflight"]
        return counts

    async def tenants_report(self) -> dict[str, Any]:
        """See Operator; at all frontends."""
        tenants: dict[str, Any] = (await self._ask("report"))["tenants"]
        return tenants

    async def trace(self, last_s: float | None) -> dict[str, Any]:
        """See Operator."""
        trace: dict[str, Any] = await self._ask("trace", last_s)
        return trace

    async def host_metrics(self) -> dict[str, str]:
        """See Operator; a host on this machine shares the folder of metrics with all frontends."""
        scrapes: dict[str, str] = await self._ask("host_metrics") if self._pool.hosts.settings.address else {}
        return scrapes

    async def decisions(self, limit: int | None) -> list[dict[str, Any]] | None:
        """See Operator."""
        decided: list[dict[str, Any]] | None = await self._ask("decisions", limit)
        return decided

    async def logs(self, seen: Mapping[str, int]) -> list[dict[str, Any]]:
        """See Operator; of this frontend, the supervisor and the hosts, not of the other frontends."""
        return in_order([*recent_lines(seen), *await self._ask("logs", seen)])

    async def drain(self, host: str, is_wanted: bool) -> list[str]:
        """See Operator."""
        models: list[str] = await self._ask("drain", host, is_wanted)
        return models

    async def check(self) -> None:
        """See Operator."""
        await self._ask("check")
