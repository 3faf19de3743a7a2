# SPDX-License-Identifier: Apache-2.0
"""The one book of host memory that the pool may use: copies of weights, KV of paused requests, cached KV."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from enum import StrEnum
from typing import Any, Protocol

from tokenpool.errors import CapacityError


class HostUse(StrEnum):
    """What host memory is used for."""

    WEIGHTS = "weights"
    """Permanent copies of weights, dropped only when only the disk has their model."""
    PAUSED_KV = "paused_kv"
    """KV blocks of requests whose model is away; needed until the requests end."""
    CACHED_KV = "cached_kv"
    """Prefix-cached KV blocks that no request uses; may be dropped at any time."""


class NodeBook(Protocol):
    """The book of the whole node, which all of its hosts are in."""

    free_bytes: int
    """What nobody on the node needs, as it was a moment ago."""

    book: dict[str, Any]
    """All of it as plain values, as it was a moment ago."""

    def cover(self, used_bytes: int) -> None:
        """Count what this host uses now."""

    def set_budget(self, budget_bytes: int) -> None:
        """This is what the host may use now."""


class HostLedger:
    """Counts bytes by owner and use against one budget; allocates nothing itself.

    Called on the host loop's thread only.
    """

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self.make_room: Callable[[int], None] = lambda nbytes: None
        """Called when too little is free, before `take` gives up; drops what can be dropped."""
        self.node: NodeBook | None = None
        """Hears of every change; None = this host is alone."""
        self._held: Counter[tuple[str, HostUse]] = Counter()
        self._used_bytes = 0

    @property
    def free_bytes(self) -> int:
        """Bytes of the budget that nobody holds."""
        return self.budget_bytes - self._used_bytes

    @property
    def spare_bytes(self) -> int:
        """Bytes that nobody needs, on the whole node."""
        return self.free_bytes if self.node is None else min(self.free_bytes, self.node.free_bytes)

    def held(self, owner: str, use: HostUse) -> int:
        """Bytes that `owner` holds for `use`."""
        return self._held[owner, use]

    def total(self, use: HostUse) -> int:
        """Bytes held for `use` by all owners together."""
        return sum(n for (_, u), n in self._held.items() if u is use)

    def take(self, owner: str, use: HostUse, nbytes: int) -> None:
        """Account `nbytes` to `owner`; raises CapacityError and changes nothing if they do not fit."""
        if nbytes > self.free_bytes:
            self.make_room(nbytes - self.free_bytes)
        if nbytes > self.free_bytes:
            raise CapacityError(
                f"{owner!r} needs {nbytes} bytes of host memory for {use}, {self.free_bytes} of "
                f"{self.budget_bytes} are free: raise host_memory",
                holders={f"{o}:{u}": n for (o, u), n in self._held.items() if n},
            )
        self._held[owner, use] += nbytes
        self._used_bytes += nbytes
        self._tell_node()

    def give(self, owner: str, use: HostUse, nbytes: int) -> None:
        """Take `nbytes` back from `owner`, who must hold as much."""
        if nbytes > self._held[owner, use]:
            raise AssertionError(f"{owner!r} gives back {nbytes} bytes of {use}, holds {self._held[owner, use]}")
        self._held[owner, use] -= nbytes
        self._used_bytes -= nbytes
        self._tell_node()

    def _tell_node(self) -> None:
        if self.node is not None:
            self.node.cover(self._used_bytes)

    def check(self) -> None:
        """Raise AssertionError unless the sum is right and within the budget."""
        assert all(n >= 0 for n in self._held.values()), "an owner holds less than nothing"
        assert sum(self._held.values()) == self._used_bytes, "held bytes drifted"
        assert self._used_bytes <= self.budget_bytes, "more host memory is used than the budget allows"

    def snapshot(self) -> dict[str, dict[str, int]]:
        """use -> owner -> bytes, only non-zero entries; for state and metrics."""
        held: dict[str, dict[str, int]] = {}
        for (owner, use), nbytes in sorted(self._held.items()):
            if nbytes:
                held.setdefault(use.value, {})[owner] = nbytes
        return held
