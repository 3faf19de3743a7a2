# SPDX-License-Identifier: Apache-2.0
"""Where requests of tenants wait for one model: here, in fair shares, not in vLLM's queue, which is first come first.

Only a few requests without a token are with the engine at a time; whose is next is decided when one of them gets its
first token. So a tenant with a thousand waiting requests is as far from its turn as one with a single one. The tenant
whose turn it is does not wait for others if it has none there: a step begins before the frontend hears of the tokens of
the last one, so that this would cost it the step after it too. While others use the model, a tenant has its share of
the engine's seats at most (`policy.fairness.SeatShares`). Imports no vLLM.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Callable
from functools import partial

from starlette.types import Receive

from tokenpool.policy.fairness import FairQueue, SeatShares
from tokenpool.serve.tenants import Call

ENGINE_QUEUE = 4
"""Requests without a token that the engine has at a time. More would fill its steps better while prompts are short, but
all of them go before a tenant that comes now."""


class TenantLine:
    """The line in front of one model; lives on one event loop."""

    def __init__(self, weight_of: Callable[[str], float], engine_queue: int = ENGINE_QUEUE) -> None:
        self._queue: FairQueue[tuple[Call, asyncio.Future[float]]] = FairQueue(weight_of)
        self.shares = SeatShares(weight_of)
        """Who has how many of the engine's seats, and of how many."""
        self._engine_queue = engine_queue
        self._ahead: Counter[str] = Counter()  # calls let through that have no token yet

    def __len__(self) -> int:
        """Calls that are held."""
        return len(self._queue)

    def num_held(self, tenant: str) -> int:
        """Calls of one tenant that are held."""
        return self._queue.num_waiting(tenant)

    def num_before(self, tenant: str) -> int:
        """About how many held calls go before a new one of `tenant`: its own, and as many of each other's."""
        own = self.num_held(tenant)
        return own + sum(min(own + 1, self.num_held(name)) for name in self._queue.tenants if name != tenant)

    def is_within_share(self, tenant: str, bound: int) -> bool:
        """Whether others have calls here and a tenant less than an equal part of a line of `bound` calls."""
        tenants = {*self._queue.tenants, tenant}
        return len(tenants) > 1 and self.num_held(tenant) < bound // len(tenants)

    async def enter(self, call: Call, receive: Receive) -> bool:
        """Wait for the call's turn; False if its client has gone away meanwhile. The call must be closed after it."""
        granted: asyncio.Future[float] = asyncio.get_running_loop().create_future()
        entry = (call, granted)
        since_s = time.monotonic()
        self._queue.push(call.account.config.name, entry)
        self._let_through()
        if granted.done():
            return True
        gone = asyncio.create_task(_disconnect(receive))
        try:
            await asyncio.wait({granted, gone}, return_when=asyncio.FIRST_COMPLETED)
            call.held_s = time.monotonic() - since_s
            return granted.done()
        finally:
            if not granted.done():
                self._queue.discard(call.account.config.name, entry)
            gone.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await gone

    def _let_through(self) -> None:
        now_s = time.monotonic()
        while (tenant := self._queue.next_tenant(lambda name: self.shares.may_take(name, now_s))) is not None:
            if self._ahead[tenant] and self._ahead.total() >= self._engine_queue:
                return
            taken = self._queue.pop(tenant)
            assert taken is not None
            _, (call, granted), charged = taken
            self._ahead[tenant] += 1
            self.shares.take(tenant, now_s)
            call.on_begun = partial(self._begun, tenant)
            call.on_end = partial(self._ended, tenant, charged, call)
            granted.set_result(charged)

    def _begun(self, tenant: str) -> None:
        self._ahead[tenant] -= 1
        self._let_through()

    def _ended(self, tenant: str, charged: float, call: Call) -> None:
        self._queue.settle(tenant, charged, call.cost)
        self.shares.leave(tenant, time.monotonic())
        self._let_through()


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
