# SPDX-License-Identifier: Apache-2.0
"""Whose waiting request is next, and how many a tenant may have in the engine: weighted fair shares of one model.

Pure: reads no clock. Imports neither vllm nor ray.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, NamedTuple, TypeVar

COMPLETION_COST = 2.0
"""What a token put out costs, when one of a prompt costs 1."""
RECENT_S = 5.0
"""A tenant counts as a user of a model for so long after its last request there."""
_PART_FOR_SINGLES = 8
_MEAN_WEIGHT = 0.2
_FIRST_COST = 256.0

_T = TypeVar("_T")


def token_cost(prompt_tokens: int, completion_tokens: int) -> float:
    """The service that a request has had, in prompt tokens."""
    return prompt_tokens + COMPLETION_COST * completion_tokens


class _Waiting(Generic[_T]):
    """What one tenant has waiting, each item with its number: those that came alone, and those of lists, each in order.

    While there are both they take turns. So one that is alone does not wait behind a long list that came before it, and
    a list goes on however many come alone.
    """

    def __init__(self) -> None:
        self._lanes: tuple[OrderedDict[int, _T], OrderedDict[int, _T]] = OrderedDict(), OrderedDict()  # by number
        self._places: dict[int, tuple[bool, int]] = {}  # lane and number of each item, by its identity
        self._next = 0

    def __len__(self) -> int:
        return sum(map(len, self._lanes))

    def push(self, number: int, item: _T, *, of_many: bool) -> None:
        self._lanes[of_many][number] = item
        self._places[id(item)] = of_many, number

    def discard(self, item: _T) -> None:
        if (place := self._places.pop(id(item), None)) is not None:
            of_many, number = place
            del self._lanes[of_many][number]

    def head(self, *, may_many: bool) -> tuple[int, _T, bool] | None:
        """The next item, with its number and whether it is one of many; None if there is none that may go."""
        for of_many in (self._next, 1 - self._next):
            if self._lanes[of_many] and (may_many or not of_many):
                return *next(iter(self._lanes[of_many].items())), bool(of_many)
        return None

    def pop(self, *, of_many: bool) -> _T:
        self._next = 1 - of_many
        _, item = self._lanes[of_many].popitem(last=False)
        del self._places[id(item)]
        return item


class Head(NamedTuple):
    """What would be taken next."""

    tenant: str
    of_many: bool


class FairQueue(Generic[_T]):
    """Waiting items by tenant; the next is one of the tenant that is furthest behind its share, see `_Waiting`.

    Each tenant has a counter of the service it has had, divided by its weight. An item is charged when it is taken,
    with what the tenant's items cost on average, because its true cost is known at its end only; `settle` corrects it.
    A tenant that comes back after a pause starts at the counter of the item taken last: a pause is no credit. So with
    n tenants waiting, none waits behind more than about one item of each other one, however many the others have.

    Source: start-time fair queueing (Goyal et al., 1996) with counters of tokens (VTC, Sheng et al., OSDI'24); there a
    token is charged when it is served, here an expected cost when the request is let in.
    """

    def __init__(self, weight_of: Callable[[str], float] = lambda tenant: 1.0) -> None:
        self._weight_of = weight_of
        self._waiting: dict[str, _Waiting[_T]] = {}
        self._served: dict[str, float] = {}
        self._mean_cost: dict[str, float] = {}
        self._virtual = 0.0  # the counter of the tenant whose item was taken last, before it was charged
        self._pushed = 0

    def __len__(self) -> int:
        return sum(len(items) for items in self._waiting.values())

    def num_waiting(self, tenant: str) -> int:
        """Items of one tenant."""
        return len(self._waiting.get(tenant, ()))

    @property
    def tenants(self) -> list[str]:
        """Those with waiting items."""
        return list(self._waiting)

    def push(self, tenant: str, item: _T, *, of_many: bool = False) -> None:
        """Let an item wait, once at a time; one of many belongs to a request that has more."""
        if tenant not in self._waiting:
            self._waiting[tenant] = _Waiting()
            self._served[tenant] = max(self._served.get(tenant, 0.0), self._virtual)
        self._pushed += 1
        self._waiting[tenant].push(self._pushed, item, of_many=of_many)

    def discard(self, tenant: str, item: _T) -> None:
        """Drop a waiting item, compared by identity; one that does not wait is ignored."""
        if (waiting := self._waiting.get(tenant)) is not None:
            waiting.discard(item)
            self._forget_idle(tenant)

    def head(self, may: Callable[[str], bool] = lambda tenant: True, *, may_many: bool = True) -> Head | None:
        """Whose item is next, of the tenants that `may`, and of which kind. O(tenants)."""
        best: tuple[tuple[float, int], Head] | None = None
        for tenant, waiting in self._waiting.items():
            if not may(tenant) or (found := waiting.head(may_many=may_many)) is None:
                continue
            number, _, of_many = found
            order = (self._served[tenant], number)
            if best is None or order < best[0]:
                best = order, Head(tenant, of_many)
        return best and best[1]

    def pop(self, head: Head | None = None) -> tuple[str, _T, float] | None:
        """Take the next item, or that of `head`: its tenant, itself and the cost it was charged.

        None when nothing waits.
        """
        if (head := head or self.head()) is None:
            return None
        tenant, of_many = head
        item = self._waiting[tenant].pop(of_many=of_many)
        self._forget_idle(tenant)
        self._virtual = max(self._virtual, self._served[tenant])
        charged = self._mean_cost.get(tenant, _FIRST_COST)
        self._charge(tenant, charged)
        return tenant, item, charged

    def settle(self, tenant: str, charged: float, cost: float) -> None:
        """An item that was charged `charged` has ended and did cost `cost`: 0 for one that was never begun."""
        self._charge(tenant, cost - charged)
        if cost:
            mean = self._mean_cost.get(tenant, cost)
            self._mean_cost[tenant] = mean + _MEAN_WEIGHT * (cost - mean)

    def _charge(self, tenant: str, cost: float) -> None:
        self._served[tenant] = self._served.get(tenant, 0.0) + cost / self._weight_of(tenant)

    def _forget_idle(self, tenant: str) -> None:
        if not self._waiting[tenant]:
            del self._waiting[tenant]


class FairTurns:
    """Whose turn is next where a turn costs the same whoever has it, and one may do for several tenants.

    As in `FairQueue`, each has a counter of the turns it has had, divided by its weight, and one that comes back after
    a pause starts at the counter of the turn taken last.
    """

    def __init__(self, weight_of: Callable[[str], float] = lambda tenant: 1.0) -> None:
        self._weight_of = weight_of
        self._had: dict[str, float] = {}
        self._virtual = 0.0

    def counter(self, tenant: str) -> float:
        """The one with the smallest is next."""
        return max(self._had.get(tenant, 0.0), self._virtual)

    def take(self, tenant: str) -> None:
        """The tenant has a turn."""
        self._virtual = self.counter(tenant)
        self._had = {name: had for name, had in self._had.items() if had > self._virtual}
        self._had[tenant] = self._virtual + 1.0 / self._weight_of(tenant)


class SeatShares:
    """How many of an engine's seats, which are requests that run at a time, each tenant may take.

    A running request is not taken away, and a step is as slow as its batch is large. So while others use the model, a
    tenant leaves seats free: for each of them as many as it had lately and one more, its share by weight at most. What
    others do not use is not kept for them, and a tenant alone may take all seats and queue behind them. Each may always
    have one. Sequences of requests that have many leave an eighth of the seats, one at least, to those that come alone.
    """

    def __init__(self, weight_of: Callable[[str], float] = lambda tenant: 1.0, seats: int | None = None) -> None:
        self.seats = seats
        """How many the engine has; None = not known, no bound."""
        self._weight_of = weight_of
        self._taken: dict[str, int] = {}
        self._num_many = 0
        self._peaks: dict[str, tuple[int, float]] = {}  # most seats lately, and when that was

    def taken(self, tenant: str) -> int:
        """The seats that a tenant has."""
        return self._taken.get(tenant, 0)

    def take(self, tenant: str, now_s: float, *, of_many: bool = False) -> None:
        """A sequence of the tenant goes to the engine."""
        self._num_many += of_many
        self._set(tenant, self.taken(tenant) + 1, now_s)

    def leave(self, tenant: str, now_s: float, *, of_many: bool = False) -> None:
        """It has ended."""
        self._num_many -= of_many
        self._set(tenant, self.taken(tenant) - 1, now_s)

    def may_many(self) -> bool:
        """Whether one more sequence of a request that has many, of whomever, may take a seat."""
        if self.seats is None or self.seats == 1:
            return True
        return self._num_many < self.seats - max(1, self.seats // _PART_FOR_SINGLES)

    def others(self, tenant: str, now_s: float) -> list[str]:
        """The other tenants that use the model or have used it just now; forgets the rest. O(tenants)."""
        for name, (_, when_s) in list(self._peaks.items()):
            if now_s - when_s > RECENT_S:
                if self.taken(name):
                    self._peaks[name] = self.taken(name), now_s
                else:
                    del self._peaks[name]
        return [name for name in self._peaks if name != tenant]

    def may_take(self, tenant: str, now_s: float) -> bool:
        """Whether the tenant may have one more seat now. O(tenants)."""
        taken, others = self.taken(tenant), self.others(tenant, now_s)
        if self.seats is None or not taken or not others:
            return True
        weights = {name: self._weight_of(name) for name in (tenant, *others)}
        share_of_one = self.seats / sum(weights.values())
        kept = sum(min(share_of_one * weights[name], self._peaks[name][0] + 1) for name in others)
        return taken + 1 <= self.seats - kept

    def _set(self, tenant: str, count: int, now_s: float) -> None:
        if count:
            self._taken[tenant] = count
        else:
            self._taken.pop(tenant, None)
        peak, when_s = self._peaks.get(tenant, (0, 0.0))
        if count >= peak or now_s - when_s > RECENT_S:
            self._peaks[tenant] = count, now_s
