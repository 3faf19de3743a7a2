# SPDX-License-Identifier: Apache-2.0
"""Where requests of tenants wait for one model: here, in fair shares, not in vLLM's queue, which is first come first.

Only a few sequences without a token are with the engine at a time; whose is next is decided when one of them gets its
first token. So a tenant with a thousand waiting ones, of as many requests or of one, is as far from its turn as one
with a single one, and of one tenant those of long lists take turns with its requests of one sequence. The tenant whose
turn it is does not wait for others if it has none there: a step begins before the frontend hears of the tokens of the
last one, so that this would cost it the step after it too. While others use the model, a tenant has its share of the
engine's seats at most, and lists leave some to single ones (`policy.fairness.SeatShares`). Imports no vLLM.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Set
from types import MappingProxyType
from typing import Any, TypeAlias

from starlette.types import Receive

from tokenpool.policy.fairness import FairQueue, Head, SeatShares
from tokenpool.serve.access.gone import until_gone
from tokenpool.serve.access.tenant_call import Call

ENGINE_QUEUE = 4
"""Sequences without a token that the engine has at a time. More would fill its steps better while prompts are short,
but all of them go before a tenant that comes now."""
LATE_S = 1.0
"""A sequence that has had no token for so long waits for more than a step, such as its grammar. It is no reason for
other tenants to wait; its own has no more than `ENGINE_QUEUE` of either kind there."""
ALONE_QUEUE = 64
"""The same for sequences of calls that have many, while no other tenant uses the model."""
ASIDE_AT_ONCE = 4
"""Calls of one tenant that have no sequence, such as `/tokenize`, at a time; more of them wait."""

_Granted: TypeAlias = "asyncio.Future[LineSeat]"
_GrantedAside: TypeAlias = "asyncio.Future[_AsideSeat]"


class LineSeat:
    """The place of one sequence; see `tenant_call.Seat`."""

    def __init__(self, line: TenantLine, head: Head, charged: float) -> None:
        self.cost = 0.0
        self._line, self._charged = line, charged
        self._tenant, self._of_many = head
        self._has_begun = self._is_closed = self._is_late = False
        self._timer = asyncio.get_running_loop().call_later(LATE_S, self._become_late)

    def _become_late(self) -> None:
        self._is_late = True
        self._line._became_late(self._tenant)

    def begin(self) -> None:
        """The sequence has its first token: the next one may go to the engine."""
        if not self._has_begun:
            self._has_begun = True
            self._timer.cancel()
            self._line._begun(self._tenant, self._is_late)

    def close(self) -> None:
        """The sequence is over: its seat is free, and its tenant pays what it cost."""
        if not self._is_closed:
            self._is_closed = True
            self.begin()
            self._line._ended(Head(self._tenant, self._of_many), self._charged, self.cost)


class _AsideSeat:
    """The place of a call that has no sequence."""

    cost = 0.0

    def __init__(self, places: _Places) -> None:
        self._places: _Places | None = places

    def begin(self) -> None:
        """Nothing."""

    def close(self) -> None:
        """The next such call of the tenant may go on."""
        places, self._places = self._places, None
        if places is not None:
            places.leave()


class _Places:
    """A few places, given in the order in which they were asked for."""

    def __init__(self, count: int) -> None:
        self._free = count
        self._waiting: OrderedDict[_GrantedAside, None] = OrderedDict()

    def ask(self, granted: _GrantedAside) -> None:
        self._waiting[granted] = None
        self._give()

    def give_up(self, granted: _GrantedAside) -> None:
        self._waiting.pop(granted, None)

    def leave(self) -> None:
        self._free += 1
        self._give()

    def _give(self) -> None:
        while self._free and self._waiting:
            granted, _ = self._waiting.popitem(last=False)
            if not granted.done():
                self._free -= 1
                granted.set_result(_AsideSeat(self))


class TenantLine:
    """The line in front of one model; lives on one event loop."""

    def __init__(self, weight_of: Callable[[str], float], engine_queue: int = ENGINE_QUEUE) -> None:
        self._queue: FairQueue[_Granted] = FairQueue(weight_of)
        self.shares = SeatShares(weight_of)
        """Who has how many of the engine's seats, and of how many."""
        self._engine_queue = engine_queue
        self._ahead: Counter[str] = Counter()  # sequences let through that have no token yet
        self._late: Counter[str] = Counter()  # of these, the ones that have had none for LATE_S
        self._aside: dict[str, _Places] = {}

    def __len__(self) -> int:
        """Sequences that are held."""
        return len(self._queue)

    def num_held(self, tenant: str) -> int:
        """Sequences of one tenant that are held."""
        return self._queue.num_waiting(tenant)

    def num_before(self, tenant: str) -> int:
        """About how many held ones go before a new one of `tenant`: its own, and as many of each other's."""
        own = self.num_held(tenant)
        return own + sum(min(own + 1, self.num_held(name)) for name in self._queue.tenants if name != tenant)

    def is_within_share(self, tenant: str, bound: int, held: Mapping[str, int] = MappingProxyType({})) -> bool:
        """Whether others have sequences here and a tenant less than an equal part of a line of `bound`.

        `held` counts, by tenant, what waits until the model is loaded and is not here yet.
        """
        tenants = {*self._queue.tenants, *held, tenant}
        return len(tenants) > 1 and self.num_held(tenant) + held.get(tenant, 0) < bound // len(tenants)

    async def enter(self, call: Call, receive: Receive) -> bool:
        """Wait for the place of the call's first sequence; False if its client has gone away meanwhile.

        The call must be closed after it.
        """
        granted: _Granted = asyncio.get_running_loop().create_future()
        tenant = call.account.config.name
        self._queue.push(tenant, granted, of_many=call.sequences > 1)
        self._let_through()
        return await _wait(call, granted, receive, lambda: self._give_up(tenant, granted))

    async def enter_aside(self, call: Call, receive: Receive) -> bool:
        """The same for a call that has no sequence, such as one that only tokenizes: each tenant has a few at a time,
        because one thread does it for all."""
        granted: _GrantedAside = asyncio.get_running_loop().create_future()
        places = self._aside.setdefault(call.account.config.name, _Places(ASIDE_AT_ONCE))
        places.ask(granted)
        return await _wait(call, granted, receive, lambda: places.give_up(granted))

    async def more(self, call: Call, of_many: bool = True) -> LineSeat:
        """Wait for the place of one more sequence of a call, which is one of many or alone."""
        granted: _Granted = asyncio.get_running_loop().create_future()
        tenant = call.account.config.name
        self._queue.push(tenant, granted, of_many=of_many)
        self._let_through()
        try:
            return await granted
        except BaseException:
            self._give_up(tenant, granted)
            if granted.done() and not granted.cancelled():
                granted.result().close()
            raise

    def _give_up(self, tenant: str, granted: _Granted) -> None:
        """Nobody waits for that place any more: who waited behind may have his turn."""
        self._queue.discard(tenant, granted)
        self._let_through()

    def _let_through(self) -> None:
        now_s = time.monotonic()
        stuck: set[str] = set()
        while (head := self._next(now_s, stuck)) is not None:
            tenant = head.tenant
            if self._ahead[tenant]:
                bound = self._bound_for(head, now_s)
                if self._ahead.total() - self._late.total() >= bound:
                    return
                if self._ahead[tenant] >= bound:
                    stuck.add(tenant)
                    continue
            taken = self._queue.pop(head)
            assert taken is not None
            _, granted, charged = taken
            if granted.cancelled():  # whoever waited has not left yet
                self._queue.settle(tenant, charged, 0.0)
                continue
            self._ahead[tenant] += 1
            self.shares.take(tenant, now_s, of_many=head.of_many)
            granted.set_result(LineSeat(self, head, charged))

    def _next(self, now_s: float, stuck: Set[str]) -> Head | None:
        """What is next of all that may have a seat."""
        may_many = self.shares.may_many()
        return self._queue.head(
            lambda tenant: tenant not in stuck and self.shares.may_take(tenant, now_s), may_many=may_many
        )

    def _bound_for(self, head: Head, now_s: float) -> int:
        """Sequences without a token that the engine may have. While a tenant is alone, those of its lists fill the
        engine's steps; who comes then waits for them once."""
        is_alone = head.of_many and not self.shares.others(head.tenant, now_s)
        return ALONE_QUEUE if is_alone else self._engine_queue

    def _became_late(self, tenant: str) -> None:
        self._late[tenant] += 1
        self._let_through()

    def _begun(self, tenant: str, was_late: bool) -> None:
        self._ahead[tenant] -= 1
        self._late[tenant] -= was_late
        self._let_through()

    def _ended(self, head: Head, charged: float, cost: float) -> None:
        self._queue.settle(head.tenant, charged, cost)
        self.shares.leave(head.tenant, time.monotonic(), of_many=head.of_many)
        self._let_through()


async def _wait(call: Call, granted: _Granted | _GrantedAside, receive: Receive, leave: Callable[[], object]) -> bool:
    """Give the call its place as soon as it is granted; False if its client has gone away before."""
    since_s = time.monotonic()
    if not granted.done():
        gone = asyncio.create_task(until_gone(receive))
        try:
            ends: set[asyncio.Future[Any]] = {granted, gone}
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            call.held_s = time.monotonic() - since_s
        finally:
            if not granted.done():
                leave()
            elif not granted.cancelled():
                call.spare = granted.result()
            gone.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await gone
    if granted.done() and not granted.cancelled():
        call.spare = granted.result()
        return True
    return False
