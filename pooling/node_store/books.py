# SPDX-License-Identifier: Apache-2.0
"""The books of one node's host memory: copies by content, who holds them, and what each host has of its own.

    (absent) ──claim──► filling, no size yet ──allocate──► filling ──seal──► sealed ──the last lease ends──► evictable
        ▲                        │                            │                                                  │
        └────── drop, or its filler leaves ───────────────────┘                          room is wanted ─────────┘

A copy counts once, however many hosts have it mapped. What a host keeps for itself, such as KV, it tells as one sum.
Pure: no file, no clock, no process.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


class CopyState(StrEnum):
    """What a client may do with a copy that it has claimed."""

    MINE = "mine"
    """Nobody has it: the client is to fill it."""
    FILLING = "filling"
    """Another client fills it: ask again."""
    SEALED = "sealed"
    """It is whole, and the client holds it."""


@dataclass(slots=True)
class Copy:
    """One content."""

    nbytes: int = 0
    """0 = its filler does not know yet."""
    filler: int | None = None
    """The client that fills it; None = it is sealed."""
    leases: Counter[int] = field(default_factory=Counter)
    """Client -> how often it holds the copy."""
    meta: bytes = b""
    """What its filler said of it."""

    @property
    def is_sealed(self) -> bool:
        """Whether it is whole."""
        return self.filler is None

    @property
    def is_evictable(self) -> bool:
        """Whether nobody needs it."""
        return self.is_sealed and not self.leases


@dataclass(slots=True)
class _Client:
    budget_bytes: int
    own_bytes: int = 0
    wanted_bytes: int = 0


class NoRoomError(Exception):
    """The node's host memory is full of what is held."""


class NodeBooks:
    """Clients are numbers that the caller chooses; what they say that makes no sense raises ValueError."""

    def __init__(self) -> None:
        self.copies: dict[str, Copy] = {}  # least recently used first
        self.num_evictions = 0
        self._clients: dict[int, _Client] = {}
        self._last_budget = 0

    # -- clients -------------------------------------------------------------------------------------

    def join(self, client: int, budget_bytes: int) -> list[str]:
        """A client is there, whose pool says that the node may use so much; returns the copies that are evicted.

        It may be less than the budget that was kept while there was no client.
        """
        if client in self._clients:
            raise ValueError("it has joined already")
        self._clients[client] = _Client(max(0, budget_bytes))
        return self.evict(0)

    def leave(self, client: int) -> list[str]:
        """The client is gone, however: its leases, fills and budget end; returns the copies that are no more."""
        self._last_budget = self.budget_bytes
        self._clients.pop(client, None)
        dropped = [key for key, copy in self.copies.items() if copy.filler == client]
        for key in dropped:
            del self.copies[key]
        for copy in self.copies.values():
            del copy.leases[client]
        return dropped + self.evict(0)

    def set_budget(self, client: int, budget_bytes: int) -> list[str]:
        """What the client's pool says now; returns the copies that are evicted for it."""
        self._of(client).budget_bytes = max(0, budget_bytes)
        return self.evict(0)

    @property
    def budget_bytes(self) -> int:
        """The largest that a client was given; without one, the last one."""
        return max((client.budget_bytes for client in self._clients.values()), default=self._last_budget)

    @property
    def used_bytes(self) -> int:
        """All copies, and what clients keep for themselves."""
        return sum(copy.nbytes for copy in self.copies.values()) + self.own_bytes

    @property
    def own_bytes(self) -> int:
        """What clients keep for themselves, together."""
        return sum(client.own_bytes for client in self._clients.values())

    @property
    def evictable_bytes(self) -> int:
        """Copies that nobody holds."""
        return sum(copy.nbytes for copy in self.copies.values() if copy.is_evictable)

    @property
    def over_bytes(self) -> int:
        """How much more than the budget is held."""
        return max(0, self.used_bytes - self.evictable_bytes - self.budget_bytes)

    def wanted_of(self, client: int) -> int:
        """Bytes that this client is asked to give up, if it can do without, for others or for the budget."""
        others = sum(other.wanted_bytes for number, other in self._clients.items() if number != client)
        free = self.budget_bytes - self.used_bytes + self.evictable_bytes
        return max(0, others - max(0, free), self.over_bytes)

    # -- copies --------------------------------------------------------------------------------------

    def claim(self, client: int, key: str) -> CopyState:
        """Take a lease of a sealed copy, or the work to fill one that is not there."""
        self._of(client)
        copy = self.copies.get(key)
        if copy is None:
            self.copies[key] = Copy(filler=client)
            return CopyState.MINE
        if not copy.is_sealed:
            return CopyState.FILLING
        copy.leases[client] += 1
        self._touch(key)
        return CopyState.SEALED

    def allocate(self, client: int, key: str, nbytes: int, *, force: bool = False) -> list[str]:
        """Book what the client fills; returns the copies that are evicted for it.

        Raises NoRoomError, and notes that the client wants so much, unless `force`.
        """
        copy = self._filled_by(client, key)
        if copy.nbytes or nbytes <= 0:
            raise ValueError(f"copy of {copy.nbytes} bytes cannot get {nbytes}")
        evicted = self._make_room(client, nbytes, force=force)
        copy.nbytes = nbytes
        return evicted

    def seal(self, client: int, key: str, meta: bytes) -> None:
        """The copy is whole; its filler holds it from now on."""
        copy = self._filled_by(client, key)
        if not copy.nbytes:
            raise ValueError("the copy has no size")
        copy.filler, copy.meta = None, meta
        copy.leases[client] = 1
        self._touch(key)

    def drop(self, client: int, key: str) -> list[str]:
        """End one lease, or the filling; returns the copies that are no more."""
        copy = self.copies.get(key)
        if copy is not None and copy.filler == client:
            del self.copies[key]
            self._clients[client].wanted_bytes = 0
            return [key]
        if copy is None or not copy.leases[client]:
            raise ValueError("it does not hold this copy")
        copy.leases[client] -= 1
        if not copy.leases[client]:
            del copy.leases[client]
        return self.evict(0)

    def offer(self, client: int, key: str, nbytes: int, meta: bytes) -> bool:
        """A client has a sealed copy from before; False if the node has another one, or it is being filled.

        It is there already, so it is taken whatever the budget says.
        """
        self._of(client)
        if nbytes <= 0:
            raise ValueError("the copy has no size")
        if key in self.copies:
            return False
        self.copies[key] = Copy(nbytes, leases=Counter({client: 1}), meta=meta)
        return True

    def hold(self, client: int, own_bytes: int, *, force: bool = False) -> list[str]:
        """What the client keeps for itself is now so much; returns the copies that are evicted for it.

        Raises NoRoomError, and notes that the client wants more, unless `force`. Less is never refused.
        """
        known = self._of(client)
        if own_bytes < 0:
            raise ValueError("less than nothing is held")
        more = own_bytes - known.own_bytes
        evicted = self._make_room(client, more, force=force) if more > 0 else []
        known.own_bytes = own_bytes
        return evicted or self.evict(0)

    def evict(self, nbytes: int) -> list[str]:
        """Drop copies that nobody holds, least recently used first, until `nbytes` more fit; returns their keys."""
        evicted = []
        for key in [key for key, copy in self.copies.items() if copy.is_evictable]:
            if self.used_bytes + nbytes <= self.budget_bytes:
                break
            del self.copies[key]
            evicted.append(key)
        self.num_evictions += len(evicted)
        return evicted

    # -- state ---------------------------------------------------------------------------------------

    def snapshot(self) -> dict[str, Any]:
        """The whole book as plain values; keys of copies shortened to what people tell apart."""
        held = [copy for copy in self.copies.values() if copy.leases]
        return {
            "budget_bytes": self.budget_bytes,
            "used_bytes": self.used_bytes,
            "copies_bytes": self.used_bytes - self.own_bytes,
            "held_copies_bytes": sum(copy.nbytes for copy in held),
            "own_bytes": self.own_bytes,
            "over_bytes": self.over_bytes,
            "hosts": len(self._clients),
            "evictions": self.num_evictions,
            "copies": {
                key[:16]: {"bytes": copy.nbytes, "sealed": copy.is_sealed, "hosts": len(copy.leases)}
                for key, copy in self.copies.items()
            },
        }

    def check(self) -> None:
        """Raise AssertionError unless every copy belongs to somebody who is there, or to nobody, and fits."""
        for key, copy in self.copies.items():
            assert all(count > 0 for count in copy.leases.values()), f"{key}: an empty lease"
            assert copy.leases.keys() <= self._clients.keys(), f"{key} is held by a client that is gone"
            assert copy.filler is None or copy.filler in self._clients, f"{key} is filled by a client that is gone"
            assert copy.filler is None or not copy.leases, f"{key} is held before it is whole"
            assert copy.nbytes > 0 or copy.filler is not None, f"{key} is whole and has no bytes"
        assert self.used_bytes <= self.budget_bytes or not self.evictable_bytes, "a copy that nobody holds stays"

    # -- inside --------------------------------------------------------------------------------------

    def _make_room(self, client: int, nbytes: int, *, force: bool) -> list[str]:
        known = self._of(client)
        if not force and self.used_bytes - self.evictable_bytes + nbytes > self.budget_bytes:
            known.wanted_bytes = nbytes
            raise NoRoomError(f"{nbytes} bytes of host memory are wanted, the node holds {self.used_bytes} of "
                              f"{self.budget_bytes}")  # fmt: skip
        known.wanted_bytes = 0
        return self.evict(nbytes)

    def _of(self, client: int) -> _Client:
        if client not in self._clients:
            raise ValueError("it has not joined")
        return self._clients[client]

    def _filled_by(self, client: int, key: str) -> Copy:
        copy = self.copies.get(key)
        if copy is None or copy.filler != client:
            raise ValueError("it does not fill this copy")
        return copy

    def _touch(self, key: str) -> None:
        self.copies[key] = self.copies.pop(key)
