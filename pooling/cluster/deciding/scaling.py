# SPDX-License-Identifier: Apache-2.0
"""How many hosts a pool has that may have more or fewer: which to ask for, which to empty, which to give back.

    asked ──a node is there──► up ──nobody needs it──► leaving ──it is empty──► ending ──its actor is gone──► (gone)
      │                                                   └──it is needed again──► up
      └──nobody needs it──► ending

More hosts are asked for at once, fewer are kept once fewer were needed for `idle_after_s` without a break. Each host
has a name that no other ever had. Plain Python: no Ray, no clock.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import dataclass
from typing import NamedTuple

from tokenpool.cluster_config import HostRange
from tokenpool.policy.capacity_live import LiveCapacity

_USUAL = LiveCapacity()
_PATIENCE_S = 2.0
"""So long a model has no host with room for it until one more is asked for: those that are there may be changing."""


class Load(NamedTuple):
    """What hosts that are up have to do, as the capacity policy sees it; a load of 1 = a host's whole time."""

    total: float = 0.0
    is_over: bool = False
    """Whether tokens of a host come late, or surely will."""


class HostUse(NamedTuple):
    """What is on a host that is up."""

    num_seats: int = 0
    """Of models, those included that leave it."""
    num_requests: int = 0
    load: float = 0.0
    num_beside: int = 0
    """Other hosts of its node: a node goes back once none is there."""


@dataclass(frozen=True, slots=True)
class Need:
    """What hosts are needed for now."""

    now_s: float
    num_for_models: int = 0
    """Hosts on which what is to be loaded fits; 0 = nobody needs any."""
    num_useful: float = math.inf
    """Hosts that could have a seat: more are of no use for the load."""
    load: Load = Load()
    is_homeless: bool = False
    """Whether a model has no room that a further host would have for it."""
    is_known: bool = True
    """Whether all who may need a host have told."""
    up: Mapping[str, HostUse] | None = None
    """Hosts that are there."""
    drained: Set[str] = frozenset()
    """Hosts that the operator wants empty."""
    may_go: Callable[[str, Set[str]], bool] = lambda host, leaving: True
    """Whether what is needed on a host has room elsewhere, beside others that leave."""


class Change(NamedTuple):
    """What was decided of a host."""

    action: str
    """`host_asked`, `host_leaving`, `host_stays` or `host_ending`."""
    host: str
    reason: str


class HostsKept(NamedTuple):
    """What the next controller goes on with."""

    asked: tuple[str, ...] = ()
    ending: tuple[str, ...] = ()
    next_index: int = 0


class Scaling:
    """See the module; times are those of the caller's monotonic clock."""

    def __init__(
        self,
        bounds: HostRange,
        idle_after_s: float,
        asked: Iterable[str] = (),
        ending: Iterable[str] = (),
        next_index: int = 0,
    ) -> None:
        """`asked`, `ending` and `next_index` are what a former controller had; see `kept`."""
        self.bounds = bounds
        self.asked = set(asked)
        """Hosts that are to have an actor, or still have one, whether it has a node or not."""
        self.ending = set(ending)
        """Of these: such that are given back now."""
        self.leaving: set[str] = set()
        """Of these: such that are to be empty. The next controller decides anew."""
        self.next_index = next_index
        self.idle_after_s = idle_after_s
        self._low_since_s = math.inf
        self._low_peak = 0
        self._homeless_since_s = math.inf
        self._empty_since_s: dict[str, float] = {}

    def __repr__(self) -> str:
        return f"Scaling(asked={sorted(self.asked)}, leaving={sorted(self.leaving)}, ending={sorted(self.ending)})"

    def pending(self, up: Iterable[str]) -> set[str]:
        """Hosts that are asked for and not there."""
        return self.asked - self.ending - set(up)

    @property
    def may_grow(self) -> bool:
        """Whether one more may be asked for, or be kept."""
        return len(self.asked) < self.bounds.most or bool(self.leaving)

    @property
    def kept(self) -> HostsKept:
        """What the next controller is to know."""
        return HostsKept(tuple(sorted(self.asked)), tuple(sorted(self.ending)), self.next_index)

    @property
    def wanted(self) -> list[str]:
        """Hosts that are to have an actor."""
        return sorted(self.asked - self.ending, key=_age)

    def is_over(self, host: str) -> bool:
        """Whether a host is given back, or was: what it still says does not count."""
        return host in self.ending or (host not in self.asked and _age(host) < self.next_index)

    def adopt(self, host: str) -> None:
        """A host is there that nobody knows to have asked for."""
        self.asked.add(host)
        self.next_index = max(self.next_index, _age(host) + 1)

    def ended(self, host: str) -> None:
        """A host is gone that was given back."""
        for hosts in (self.asked, self.ending, self.leaving):
            hosts.discard(host)

    # -- what is decided -------------------------------------------------------------------------------

    def decide(self, need: Need) -> list[Change]:
        """Change what is to be changed now."""
        up = need.up or {}
        usable = self.asked - self.ending - self.leaving - need.drained
        wanted = self._wanted(need, len(usable), is_pending=not usable <= up.keys())
        changes: list[Change] = []
        if wanted >= len(usable):
            self._low_since_s = math.inf
        if wanted > len(usable):
            changes += self._grow(wanted, len(usable), up, need)
        elif wanted < len(usable) and need.is_known:
            changes += self._shrink(wanted, usable, up, need)
        return [*changes, *self._end_empty(up, need)]

    def _wanted(self, need: Need, count: int, *, is_pending: bool) -> int:
        wanted = need.num_for_models
        if wanted:
            wanted = max(wanted, min(self._for_load(need.load, count), need.num_useful))  # type: ignore[assignment]
        if not need.is_homeless:
            self._homeless_since_s = math.inf
        else:
            self._homeless_since_s = min(self._homeless_since_s, need.now_s)
            has_waited = need.now_s - self._homeless_since_s >= _PATIENCE_S
            wanted = max(wanted, count + (has_waited and not is_pending))
        return max(self.bounds.least, min(self.bounds.most, wanted))

    def _for_load(self, load: Load, count: int) -> int:
        """Hosts that have time for what is asked; between two limits as many as there are."""
        if load.is_over and load.total > _USUAL.full * count:
            return math.ceil(load.total / _USUAL.target_load)
        if load.total > _USUAL.drop_load * (count - 1):
            return count
        return math.ceil(load.total / _USUAL.drop_load)

    def _grow(self, wanted: int, count: int, up: Mapping[str, HostUse], need: Need) -> list[Change]:
        changes, missing = [], wanted - count
        reason = f"{wanted} are needed"
        for host in sorted((self.leaving - self.ending - need.drained) & up.keys())[:missing]:
            self.leaving.discard(host)
            changes.append(Change("host_stays", host, reason))
        while len(changes) < missing and len(self.asked) < self.bounds.most:
            host = f"host-{self.next_index}"
            self.next_index += 1
            if host not in self.asked:
                self.asked.add(host)
                changes.append(Change("host_asked", host, reason))
        return changes

    def _shrink(self, wanted: int, usable: Set[str], up: Mapping[str, HostUse], need: Need) -> list[Change]:
        if self._low_since_s == math.inf:
            self._low_since_s, self._low_peak = need.now_s, wanted
        self._low_peak = max(self._low_peak, wanted)
        if need.now_s - self._low_since_s < self.idle_after_s:
            return []
        excess, changes = len(usable) - self._low_peak, []
        self._low_since_s = math.inf
        reason = f"{self._low_peak} were enough for {self.idle_after_s:g} s"
        away = sorted(usable - up.keys(), key=_age, reverse=True)[:excess]
        for host in away:
            self.ending.add(host)
            changes.append(Change("host_ending", host, f"{reason}, and it is not there"))
        for host in sorted(usable & up.keys(), key=lambda host: _use_key(host, up[host])):
            if len(changes) < excess and need.may_go(host, frozenset(self.leaving | need.drained)):
                self.leaving.add(host)
                changes.append(Change("host_leaving", host, reason))
        return changes

    def _end_empty(self, up: Mapping[str, HostUse], need: Need) -> list[Change]:
        """Give back what is empty: at once what was to be, after a while what the operator has drained."""
        changes = []
        drained = (need.drained & self.asked) - self.leaving
        for host in sorted((self.leaving | drained) - self.ending):
            use = up.get(host)
            is_empty = use is None or (not use.num_seats and not use.num_requests)
            if not is_empty:
                self._empty_since_s.pop(host, None)
                continue
            since_s = self._empty_since_s.setdefault(host, need.now_s)
            if host in self.leaving or need.now_s - since_s >= self.idle_after_s:
                self.ending.add(host)
                changes.append(Change("host_ending", host, "it is empty" if use is not None else "it is gone"))
        waiting = drained - self.ending
        self._empty_since_s = {h: since_s for h, since_s in self._empty_since_s.items() if h in waiting}
        return changes


def _use_key(host: str, use: HostUse) -> tuple[int, float, int, int, int]:
    """The host that is missed least comes first, and of equal ones the one that may free its node, the youngest."""
    return use.num_requests, use.load, use.num_seats, use.num_beside, -_age(host)


def _age(host: str) -> int:
    """Grows with each host that is asked for."""
    number = host.rpartition("-")[2]
    return int(number) if number.isdigit() else -1
