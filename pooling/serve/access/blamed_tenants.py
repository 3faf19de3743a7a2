# SPDX-License-Identifier: Apache-2.0
"""Which tenants were there when engine hosts died, and which of them are refused for a while. Imports no vLLM.

Whoever uses the pool all the time is there whenever a host dies, whatever it dies of. So that alone refuses nobody: it
puts the next few requests of a tenant on trial. Who is refused is the tenant for which alone a host died on trial.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from starlette.responses import Response
from starlette.types import Scope

from tokenpool.metric_registry import metric
from tokenpool.serve.access.auth import error_response
from tokenpool.tenant_config import DEFAULT_TENANT

logger = logging.getLogger(__name__)

REASON: Final = "host_deaths"
"""Why such a tenant is refused, in metrics and in the error's `param`."""
MAX_IN_A_ROW = 3
"""Deaths of hosts in a row with a request of the same tenant under blame, the last one on trial: it is refused."""
ACQUITTED_AFTER = 8
"""New requests of a suspected tenant that have a token on trial, after which the others are not tried."""
REFUSED_S = 600.0

_DEATHS = metric("tenant_host_deaths").make()


@dataclass(slots=True)
class _Row:
    count: int
    last_s: float
    num_proven: int = 0


class BlamedTenants:
    """Counts per tenant; of one process, on one event loop."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._rows: dict[str, _Row] = {}
        self._refused_until_s: dict[str, float] = {}

    def host_died(self, blamed: Mapping[str, Sequence[str]], *, on_trial: bool) -> None:
        """An engine host died; `blamed` has the requests under blame by tenant. Whoever is not there begins anew.

        `on_trial` says that the requests on trial are among them, so that no others need be suspected.
        """
        now_s, before = self._clock(), self._rows
        self._rows = {name: _Row(self._in_a_row(before.get(name)) + 1, now_s) for name in blamed}
        for name, row in self._rows.items():
            _DEATHS.labels(name).inc()
            logger.error(
                "engine host died with requests of tenant=%s in_a_row=%d ids=%s",
                name, row.count, ",".join(blamed[name]),
            )  # fmt: skip
            # Behind the pool's own keys nobody is told from anybody: they are counted, and not refused.
            if on_trial and len(blamed) == 1 and row.count >= MAX_IN_A_ROW and name != DEFAULT_TENANT:
                self._refused_until_s[name] = now_s + REFUSED_S
                logger.error("tenant is refused tenant=%s seconds=%g", name, REFUSED_S)

    def is_suspected(self, tenant: str | None) -> bool:
        """Whether new requests of a tenant are put on trial: the next death in a row may be its last one."""
        if tenant is None or tenant == DEFAULT_TENANT:
            return False
        row = self._rows.get(tenant)
        return row is not None and row.num_proven < ACQUITTED_AFTER and self._in_a_row(row) >= MAX_IN_A_ROW - 1

    def proven(self, tenant: str) -> None:
        """A new request of a tenant has passed its trial."""
        if (row := self._rows.get(tenant)) is not None:
            row.num_proven += 1

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
