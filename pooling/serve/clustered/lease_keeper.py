# SPDX-License-Identifier: Apache-2.0
"""This server's parts of the tenants' limits, which the controller gives to it and takes back with each beat."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Collection, Mapping
from typing import Any

from tokenpool.policy.leases import Claim, Lease


class LeaseKeeper:
    """Lives on the event loop. While the controller is away, what was given last holds."""

    def __init__(
        self,
        tenants: Collection[str],
        tell: Callable[[], Mapping[str, Mapping[str, Any]]],
        keep: Callable[[Mapping[str, Lease]], None],
    ) -> None:
        """`tell` returns the reports of tenants, see `Account.report`; `keep` lets their accounts keep to leases."""
        self._leases = {name: Lease() for name in tenants}
        self._asked: dict[str, float] = {}
        self._tell = tell
        self._keep = keep
        self._has_some = asyncio.Event()

    def claims(self) -> dict[str, Claim]:
        """What is kept to, and what there was to do since this was called last."""
        reports, claims = self._tell(), {}
        for name, lease in self._leases.items():
            report = reports.get(name, {})
            asked = sum(usage["requests"] for usage in report.get("usage", {}).values())
            asked += sum(report.get("refused", {}).values())
            demand = max(0.0, asked - self._asked.get(name, asked)) + report.get("inflight", 0)
            self._asked[name] = asked
            claims[name] = Claim(lease.share, lease.slots, demand, report.get("fill", 1.0))
        return claims

    def take(self, leases: Mapping[str, Lease]) -> None:
        """Keep to these from now on."""
        changed = {name: lease for name, lease in leases.items() if lease[:2] != self._leases[name][:2]}
        self._keep(changed)
        self._leases |= changed
        if all(lease.share for lease in self._leases.values()):
            self._has_some.set()

    async def until_some(self, limit_s: float) -> None:
        """Wait until this server has a part of each limit, at most for a while."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(limit_s):
                await self._has_some.wait()
