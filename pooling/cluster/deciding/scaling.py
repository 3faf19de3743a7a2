# SPDX-License-Identifier: Apache-2.0
"""How many hosts a pool has that may have more or fewer: which to ask for, which to empty, which to give back.

    asked ──a node is there──► up ──nobody needs it──► leaving ──it is empty──► ending ──its actor is gone──► (gone)
      │                                                   └──it is needed again──► up
      └──nobody needs it──► ending

More hosts are asked for at once, fewer are kept once fewer were needed for `idle_after_s` without a break. Each host
has a name that no other ever had. Where models want hosts of a kind (host_kinds.py), such a host is asked for; at the
most hosts, one that nobody needs makes room for it. Plain Python: no Ray, no clock.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import NamedTuple

from tokenpool.cluster.deciding.matching import Matching, match
from tokenpool.cluster_config import HostRange
from tokenpool.group_config import may_be_on
from tokenpool.host_kinds import ANY, Kind, is_within, kind_of
from tokenpool.policy.capacity_live import LiveCapacity

MADE_WAY = "a host of another kind is needed"
"""Why a host goes at once that nobody needs."""
_USUAL = LiveCapacity()
_PATIENCE_S = 2.0
"""So long a model has no host with room for it until one more is asked for: those that are there may be changing."""


class Load(NamedTuple):
    """What hosts that are up have to do, as the capacity policy sees it; a load of 1 = a host's whole time."""

    total: float = 0.0
    is_over: bool = False
    """Whether tokens of a host come late, or surely will."""
    kind: Kind = ANY
    """Of hosts that could take load off the one that has the most."""


class HostUse(NamedTuple):
    """What is on a host that is up."""

    num_seats: int = 0
    """Of models, those included that leave it."""
    num_requests: int = 0
    load: float = 0.0
    num_beside: int = 0
    """Other hosts of its node: a node goes back once none is there."""
    labels: Set[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Need:
    """What hosts are needed for now."""

    now_s: float
    for_models: Sequence[Kind] = ()
    """Hosts on which what is to be loaded fits, each by its kind; empty = nobody needs any."""
    num_useful: float = math.inf
    """Hosts that could have a seat: more are of no use for the load."""
    load: Load = Load()
    homeless: Kind | None = None
    """Kind of the hosts of a model that has no room now and would have it on one more host; None = of no model."""
    is_known: bool = True
    """Whether all who may need a host have told."""
    up: Mapping[str, HostUse] | None = None
    """Hosts that are there."""
    drained: Set[str] = frozenset()
    """Hosts that the operator wants empty."""
    may_go: Callable[[str, Set[str]], bool] = lambda host, leaving: True
    """Whether what was used lately on a host has room elsewhere, beside others that leave."""
    may_make_way: Callable[[str, Set[str]], bool] = lambda host, leaving: True
    """Whether what is needed now on a host has."""


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
    kinds: Mapping[str, Kind] = {}
    """Of hosts that were asked for as of a kind."""


class Scaling:
    """See the module; times are those of the caller's monotonic clock."""

    def __init__(
        self,
        bounds: HostRange,
        idle_after_s: float,
        asked: Iterable[str] = (),
        ending: Iterable[str] = (),
        next_index: int = 0,
        kinds: Mapping[str, Iterable[str]] | None = None,
    ) -> None:
        """`asked` and what follows it are what a former controller had; see `kept`."""
        self.bounds = bounds
        self.asked = set(asked)
        """Hosts that are to have an actor, or still have one, whether it has a node or not."""
        self.ending = set(ending)
        """Of these: such that are given back now."""
        self.leaving: set[str] = set()
        """Of these: such that are to be empty. The next controller decides anew."""
        self.next_index = next_index
        self.idle_after_s = idle_after_s
        self._kinds = {host: kind_of(kind) for host, kind in (kinds or {}).items()}
        self._low_since_s = math.inf
        self._low_peak: Counter[Kind] = Counter()
        self._homeless_since_s = math.inf
        self._short_since_s = math.inf
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
        return HostsKept(tuple(sorted(self.asked)), tuple(sorted(self.ending)), self.next_index, dict(self._kinds))

    @property
    def wanted(self) -> list[str]:
        """Hosts that are to have an actor."""
        return _by_age(self.asked - self.ending)

    def kind(self, host: str) -> Kind:
        """As what a host was asked for."""
        return self._kinds.get(host, ANY)

    def may_make_way(
        self, kind: Kind, needed: Sequence[Kind], up: Mapping[str, Set[str]], may_go: Callable[[str], bool]
    ) -> bool:
        """Whether a host of another kind could be given up for one of a kind, because these that are needed are enough.

        `up` has the labels of the hosts that are there, `may_go` says whether what must stay loaded has room elsewhere.
        """
        is_of, hosts = self._is_of(up), self.asked - self.ending
        placed = match([*needed, kind], _by_age(hosts), is_of, hosts - up.keys()).values()
        return any(not is_of(host, kind) and may_go(host) for host in hosts - set(placed))

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
        self._kinds.pop(host, None)

    # -- what is decided -------------------------------------------------------------------------------

    def decide(self, need: Need) -> list[Change]:
        """Change what is to be changed now."""
        up = need.up or {}
        is_of = self._is_of({host: use.labels for host, use in up.items()})
        usable = self.asked - self.ending - self.leaving - need.drained
        wanted = self._wanted(need, usable, is_of)
        placed = match(wanted, _by_age(usable), is_of, usable - up.keys())
        missing = [kind for index, kind in enumerate(wanted) if index not in placed]
        spare = usable - set(placed.values())
        changes = self._grow(missing, need, f"{len(wanted)} are needed", is_of)
        num_short = len(missing) - len(changes) if spare and need.is_known else 0
        if not spare:
            self._low_since_s = math.inf
        elif need.is_known:
            changes += self._shrink(wanted, usable, need, is_of)
        if num_short:
            changes += self._make_way(num_short, spare - self.leaving - self.ending, need)
        else:
            self._short_since_s = math.inf
        return [*changes, *self._end_empty(up, need)]

    def _is_of(self, up: Mapping[str, Set[str]]) -> Callable[[str, Kind], bool]:
        """Whether a host is of a kind: one that is there by its labels, another one if it was asked for as such.

        One that was asked for as of a narrower kind may never come, where one of this kind would.
        """

        def is_of(host: str, kind: Kind) -> bool:
            if host in up:
                return may_be_on(kind, frozenset(up[host] | {host}))
            return self.kind(host) == kind

        return is_of

    def _wanted(self, need: Need, usable: Set[str], is_of: Callable[[str, Kind], bool]) -> list[Kind]:
        """Hosts that there are to be, by their kinds, at most as many as there may be."""
        kinds, count = list(need.for_models), len(usable)
        total = len(kinds)
        if kinds:
            total = max(total, int(min(self._for_load(need.load, count), need.num_useful)))
        grown = total - max(count, len(kinds))
        more = self._for_homeless(need, usable, is_of)
        if need.homeless == ANY:  # what is there may be about to have room
            total = max(total, count + len(more))
        more += [need.load.kind] * (grown - len(more))
        urgent = [*kinds, *more][: self.bounds.most]
        num_any = min(self.bounds.most, max(self.bounds.least, total)) - len(urgent)
        # In this order, because a host that is there may be what is missing only of those that may be any.
        return [*urgent[: len(kinds)], *[ANY] * num_any, *urgent[len(kinds) :]]

    def _for_homeless(self, need: Need, usable: Set[str], is_of: Callable[[str, Kind], bool]) -> list[Kind]:
        """One host more, once that has waited for what there may be soon."""
        kind = need.homeless
        if kind is None:
            self._homeless_since_s = math.inf
            return []
        self._homeless_since_s = min(self._homeless_since_s, need.now_s)
        not_there = usable - (need.up or {}).keys()
        placed = match(need.for_models, _by_age(usable), is_of, not_there)
        coming = [other for index, other in enumerate(need.for_models) if index not in placed]
        pending = {host for host in not_there if is_of(host, kind)}
        if any(is_within(other, kind) for other in coming) or not pending.isdisjoint(placed.values()):
            return []
        if pending:
            return [kind] if kind else []
        return [kind] if need.now_s - self._homeless_since_s >= _PATIENCE_S else []

    def _for_load(self, load: Load, count: int) -> int:
        """Hosts that have time for what is asked; between two limits as many as there are."""
        if load.is_over and load.total > _USUAL.full * count:
            return math.ceil(load.total / _USUAL.target_load)
        if load.total > _USUAL.drop_load * (count - 1):
            return count
        return math.ceil(load.total / _USUAL.drop_load)

    def _grow(
        self, missing: Sequence[Kind], need: Need, reason: str, is_of: Callable[[str, Kind], bool]
    ) -> list[Change]:
        """Have hosts of these kinds, as far as there may be more."""
        changes = []
        for kind in missing:
            back = sorted((self.leaving - self.ending - need.drained) & (need.up or {}).keys())
            host = next((host for host in back if is_of(host, kind)), None)
            why = f"{reason}, one of them with {' '.join(kind)}" if kind else reason
            if host is not None:
                self.leaving.discard(host)
                changes.append(Change("host_stays", host, why))
            elif len(self.asked) < self.bounds.most:
                changes.append(Change("host_asked", self._ask(kind), why))
        return changes

    def _ask(self, kind: Kind) -> str:
        while (host := f"host-{self.next_index}") in self.asked:
            self.next_index += 1
        self.next_index += 1
        self.asked.add(host)
        if kind:
            self._kinds[host] = kind
        return host

    def _make_way(self, count: int, spare: Set[str], need: Need) -> list[Change]:
        """Give hosts up that nobody needs for some that are missing, where there may be no more."""
        self._short_since_s = min(self._short_since_s, need.now_s)
        if need.now_s - self._short_since_s < _PATIENCE_S:
            return []
        count -= len(self.leaving | self.ending)
        return self._give_up(spare, count, MADE_WAY, need, need.may_make_way)

    def _shrink(
        self, wanted: Sequence[Kind], usable: Set[str], need: Need, is_of: Callable[[str, Kind], bool]
    ) -> list[Change]:
        if self._low_since_s == math.inf:
            self._low_since_s, self._low_peak = need.now_s, Counter(wanted)
        self._low_peak |= Counter(wanted)
        if need.now_s - self._low_since_s < self.idle_after_s:
            return []
        self._low_since_s = math.inf
        matching = Matching([*self._low_peak.elements()], usable, is_of)
        num_needed = len(matching)
        reason = f"{num_needed} were enough for {self.idle_after_s:g} s"
        return self._give_up(usable, len(usable) - num_needed, reason, need, need.may_go, matching.leave_out)

    def _give_up(
        self, hosts: Set[str], count: int, reason: str, need: Need, may_go: Callable[[str, Set[str]], bool],
        is_spare: Callable[[str], bool] = lambda host: True,
    ) -> list[Change]:  # fmt: skip
        """Give up to `count` of these hosts back, first of all such as are not there."""
        up, changes = need.up or {}, list[Change]()
        for host in reversed(_by_age(hosts - up.keys())):
            if len(changes) < count and is_spare(host):
                self.ending.add(host)
                changes.append(Change("host_ending", host, f"{reason}, and it is not there"))
        for host in sorted(hosts & up.keys(), key=lambda host: _use_key(host, up[host])):
            out = frozenset(self.leaving | need.drained)
            if len(changes) < count and may_go(host, out) and is_spare(host):
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


def _by_age(hosts: Iterable[str]) -> list[str]:
    """The eldest first."""
    return sorted(hosts, key=_age)


def _age(host: str) -> int:
    """Grows with each host that is asked for."""
    number = host.rpartition("-")[2]
    return int(number) if number.isdigit() else -1
