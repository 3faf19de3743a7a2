# SPDX-License-Identifier: Apache-2.0
"""Which host stands for which of the kinds that are wanted. Plain Python."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence, Set
from dataclasses import dataclass, field

from tokenpool.host_kinds import Kind


@dataclass(slots=True)
class _Alike:
    """Hosts that are of the same kinds, so that one is as good as another."""

    is_of: tuple[bool, ...]
    """For each of the kinds."""
    hosts: dict[str, None] = field(default_factory=dict)
    """In the order in which they are taken."""
    held: defaultdict[int, list[int]] = field(default_factory=lambda: defaultdict(list))
    """Places that have one of these hosts, by their kind."""
    num_held: int = 0
    is_needed: bool = False
    """Whether it is known that none of them can be left out."""


class Matching:
    """A host for as many of these kinds as can be had at once; no host stands for two.

    Kinds that come first get one if any of their places can: a later one takes no host from them. A free host is taken
    first; only where there is none do others move. `is_of` is asked once for each host and different kind, and to place
    one takes at most as many steps as there are different kinds, times groups of hosts that are alike.
    """

    def __init__(
        self,
        kinds: Sequence[Kind],
        hosts: Iterable[str],
        is_of: Callable[[str, Kind], bool],
        last: Set[str] = frozenset(),
    ) -> None:
        """As few of the hosts in `last` are taken as can be. Of hosts that are alike the first ones are taken; which of
        different ones are does not depend on their order."""
        number = {kind: i for i, kind in enumerate(dict.fromkeys(kinds))}
        self._kinds = [number[kind] for kind in kinds]
        found: dict[tuple[bool, int, tuple[bool, ...]], _Alike] = {}
        self._of: dict[str, _Alike] = {}
        for host in hosts:
            is_so = tuple(is_of(host, kind) for kind in number)
            self._of[host] = alike = found.setdefault((host in last, sum(is_so), is_so), _Alike(is_so))
            alike.hosts[host] = None
        self._alike: list[_Alike] = []
        for is_last in (False, True):
            self._alike += [found[key] for key in sorted(found) if key[0] is is_last]
            self._place_all()

    def __len__(self) -> int:
        return sum(alike.num_held for alike in self._alike)

    @property
    def placed(self) -> dict[int, str]:
        """The hosts by the places of their kinds."""
        return {
            index: host
            for alike in self._alike
            for index, host in zip(sorted(i for held in alike.held.values() for i in held), alike.hosts, strict=False)
        }

    def leave_out(self, host: str) -> bool:
        """Go on without a host, if as many kinds can have one without it; returns whether that is so."""
        alike = self._of[host]
        if alike.is_needed:
            return False
        del alike.hosts[host]
        if alike.num_held <= len(alike.hosts):
            return True
        held = next(places for places in alike.held.values() if places)
        index = held.pop()
        alike.num_held -= 1
        if self._place(index):
            return True
        held.append(index)
        alike.num_held += 1
        alike.hosts[host] = None
        alike.is_needed = True  # also when others were left out meanwhile
        return False

    def _place_all(self) -> None:
        """Give a host to those that have none and can."""
        have = {index for alike in self._alike for held in alike.held.values() for index in held}
        hopeless: set[int] = set()
        for index, kind in enumerate(self._kinds):
            # Where one of a kind gets no host, none does that comes later: hosts that are taken stay so.
            if index not in have and kind not in hopeless and not self._place(index):
                hopeless.add(kind)

    def _place(self, index: int) -> bool:
        """Give a host to this place: a free one, or that of another place that can move, perhaps to that of a third."""
        start = self._kinds[index]
        came: dict[int, tuple[int, _Alike]] = {}
        queue = [start]
        for kind in queue:
            for alike in (alike for alike in self._alike if alike.is_of[kind]):
                if alike.num_held < len(alike.hosts):
                    alike.num_held += 1
                    mover, to = kind, alike
                    while mover != start:
                        follower, left = came[mover]
                        to.held[mover].append(left.held[mover].pop())
                        mover, to = follower, left
                    to.held[start].append(index)
                    return True
                for other, places in alike.held.items():
                    if places and other != start and other not in came:
                        came[other] = kind, alike
                        queue.append(other)
        return False


def match(
    kinds: Sequence[Kind], hosts: Iterable[str], is_of: Callable[[str, Kind], bool], last: Set[str] = frozenset()
) -> dict[int, str]:
    """The hosts by the places of their kinds, see `Matching`."""
    return Matching(kinds, hosts, is_of, last).placed
