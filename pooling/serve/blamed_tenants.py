# SPDX-License-Identifier: Apache-2.0
"""Which tenants were there when engine hosts died, and which of them are refused for a while. Imports no vLLM."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from starlette.responses import Response
from starlette.types import Scope

from tokenpool.metric_registry import metric
from tokenpool.serve.auth import error_response
from tokenpool.tenant_config import DEFAULT_TENANT

logger = logging.getLogger(__name__)

REASON = "host_deaths"
"""Why such a tenant is refused, in metrics and in the error's `param`."""
MAX_IN_A_ROW = 3
"""Deaths of hosts in a row with a request of the same tenant under blame, after which it is refused."""
REFUSED_S = 600.0

_DEATHS = metric("tenant_host_deaths").make()


@dataclass(slots=True)
class _Row:
    count: int
    last_s: float


class BlamedTenants:
    """Counts per tenant; of one process, on one event loop."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._rows: dict[str, _Row] = {}
        self._refused_until_s: dict[str, float] = {}

    def host_died(self, blamed: Mapping[str, Sequence[str]]) -> None:
        """An engine host died; `blamed` has the requests under blame by tenant. Whoever is not there begins anew."""
        now_s, before = self._clock(), self._rows
        self._rows = {name: _Row(self._in_a_row(before.get(name)) + 1, now_s) for name in blamed}
        for name, row in self._rows.items():
            _DEATHS.labels(name).inc()
            logger.error(
                "engine host died with requests of tenant=%s in_a_row=%d ids=%s",
                name, row.count, ",".join(blamed[name]),
            )  # fmt: skip
            # Behind the pool's own keys nobody is told from anybody: they are counted, and not refused.
            if row.count >= MAX_IN_A_ROW and name != DEFAULT_TENANT:
                self._refused_until_s[name] = now_s + REFUSED_S
                logger.error("tenant is refused tenant=%s seconds=%g", name, REFUSED_S)

    def is_suspected(self, tenant: str | None) -> bool:
        """Whether new requests of a tenant are tried one at a time: the next death in a row is the last one."""
        if tenant is None or tenant == DEFAULT_TENANT:
            return False
        return self._in_a_row(self._rows.get(tenant)) >= MAX_IN_A_ROW - 1

    def refusal(self, scope: Scope, tenant: str) -> Response | None:
        """The answer that refuses what could make an engine work; None for a tenant in good standing."""
        left_s = self._refused_until_s.get(tenant, -math.inf) - self._clock()
        if left_s <= 0:
            self._refused_until_s.pop(tenant, None)
            return None
        if scope["type"] != "websocket" and scope["method"] != "POST":
            return None
        retry_s = math.ceil(left_s)
        message = f"Engine hosts died {MAX_IN_A_ROW} times in a row while they had requests of the tenant {tenant}: "
        message += f"it is refused for {retry_s} s. The server's log has the ids of the requests."
        return error_response(429, "RateLimitError", message, REASON, {"retry-after": str(retry_s)})

    def _in_a_row(self, row: _Row | None) -> int:
        return row.count if row is not None and self._clock() - row.last_s < REFUSED_S else 0
