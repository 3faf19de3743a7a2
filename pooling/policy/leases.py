# SPDX-License-Identifier: Apache-2.0
"""Splits tenants' limits among the servers of a pool, so that the parts never add up to more than the whole.

Each server says about once a second what part it keeps to and what it had to do, and is answered what part it may have.
What it was given counts until it says that it keeps to something else, so no word that is late or lost lets two servers
have the same part. Pure: reads no clock. Imports neither vllm nor ray.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

_EQUAL = 0.2
"""The part of each limit that is split equally; the rest goes by what servers have to do."""
_MEAN_WEIGHT = 0.5
_STEP = 1e-3
"""Smaller changes are not worth one."""
_FIRM, _LITTLE = 0.1, 0.01
"""Parts stay while no demand has changed by more than this share of it and this number of requests. Else two servers
whose means draw near each other could each have the smaller one at their own word, and a slot would be nobody's."""


class Lease(NamedTuple):
    """A server's part of one tenant's limits."""

    share: float = 0.0
    """Of the limits per minute, 0 to 1."""
    slots: int = 0
    """Of `max_concurrent`, if there is one."""
    fill: float = 1.0
    """How full the part of the buckets is that is new with this lease, 0 to 1."""


class Claim(NamedTuple):
    """What a server says of one tenant."""

    share: float
    slots: int
    """What it keeps to."""
    demand: float
    """Requests that came since its last word, refused ones included, and those that it has."""
    fill: float
    """How full its part of the buckets is, 0 to 1."""


class LeaseBook:
    """The parts of all servers."""

    def __init__(self, slots: Mapping[str, int]) -> None:
        """`slots` has each tenant's `max_concurrent`, 0 without one."""
        self._tenants = {name: _Tenant(count) for name, count in slots.items()}

    def answer(self, server: str, claims: Mapping[str, Claim], *, is_settled: bool = True) -> dict[str, Lease]:
        """What a server may have; what it has, while others that are there may not have been heard yet."""
        leases = {}
        for name, claim in claims.items():
            if (tenant := self._tenants.get(name)) is not None:
                tenant.hear(server, claim)
                leases[name] = tenant.give(server, claim) if is_settled else Lease(claim.share, claim.slots)
        return leases

    def forget(self, server: str) -> None:
        """A server is gone, and what it had is free."""
        for tenant in self._tenants.values():
            tenant.forget(server)


class _Tenant:
    def __init__(self, num_slots: int) -> None:
        self._num_slots = num_slots
        self._held: dict[str, Lease] = {}  # at most so much is with each
        self._demand: dict[str, float] = {}
        self._weighed: dict[str, float] = {}  # the demand that parts go by
        self._fill: dict[str, float] = {}

    def hear(self, server: str, claim: Claim) -> None:
        before = self._demand.get(server, claim.demand)
        demand = self._demand[server] = before + _MEAN_WEIGHT * (claim.demand - before)
        weighed = self._weighed.setdefault(server, demand)
        if abs(demand - weighed) > _FIRM * max(demand, weighed) + _LITTLE:
            self._weighed[server] = demand
        self._held[server] = Lease(claim.share, claim.slots)
        if claim.share:
            self._fill[server] = claim.fill

    def give(self, server: str, claim: Claim) -> Lease:
        others = [lease for name, lease in self._held.items() if name != server]
        wanted = self._parts()
        share = max(0.0, min(wanted[server], 1.0 - sum(lease.share for lease in others)))
        if abs(share - claim.share) < _STEP:
            share = claim.share
        slots = max(0, min(self._split(wanted)[server], self._num_slots - sum(lease.slots for lease in others)))
        self._held[server] = Lease(max(share, claim.share), max(slots, claim.slots))
        return Lease(share, slots, min(self._fill.values(), default=1.0))

    def forget(self, server: str) -> None:
        for book in (self._held, self._demand, self._weighed, self._fill):
            book.pop(server, None)

    def _parts(self) -> dict[str, float]:
        total, count = sum(self._weighed.values()), len(self._weighed)
        by_demand = {name: demand / total if total else 1 / count for name, demand in self._weighed.items()}
        return {name: _EQUAL / count + (1 - _EQUAL) * part for name, part in by_demand.items()}

    def _split(self, parts: Mapping[str, float]) -> dict[str, int]:
        """Whole slots by largest remainder."""
        exact = {name: part * self._num_slots for name, part in parts.items()}
        whole = {name: int(count) for name, count in exact.items()}
        most_left = sorted(exact, key=lambda name: (whole[name] - exact[name], name))
        for name in most_left[: self._num_slots - sum(whole.values())]:
            whole[name] += 1
        return whole
