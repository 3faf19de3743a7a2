# SPDX-License-Identifier: Apache-2.0
"""The servers of a pool, as its controller knows them. Each says every second that it is there. Plain Python."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

from tokenpool.cluster.values import Peer


class Peers:
    """By name, eldest first; `now_s` is a monotonic clock of the caller."""

    def __init__(self, *, timeout_s: float, now_s: float, known: Iterable[Peer] = ()) -> None:
        """A server that says nothing for `timeout_s` is gone; `known` are those that a former controller had."""
        self._timeout_s = timeout_s
        self._peers: dict[str, Peer] = {}
        self._heard_s: dict[str, float] = {}
        self._known = {peer.name: peer for peer in known}
        self._known_until_s = now_s + timeout_s
        self._alone_since_s = now_s

    def __iter__(self) -> Iterator[Peer]:
        return iter(self._peers.values())

    def __len__(self) -> int:
        return len(self._peers)

    @property
    def names(self) -> set[str]:
        """Names of those that are there."""
        return set(self._peers)

    @property
    def all(self) -> tuple[Peer, ...]:
        """Those that are there, and those that may be."""
        return (*self._peers.values(), *self._known.values())

    @property
    def awaited(self) -> set[str]:
        """Names of those that are there, and of those that may be: what these have is not known to be nothing."""
        return self.names | self.missing

    @property
    def missing(self) -> set[str]:
        """Names of those that the former controller had and that have not come yet."""
        return set(self._known)

    def join(self, peer: Peer, now_s: float) -> bool:
        """A server is there; returns whether hosts know nothing of it, as it is new or was given up."""
        is_new = peer.name not in self._peers and self._known.pop(peer.name, None) is None
        self._peers[peer.name] = peer
        self._heard_s[peer.name] = now_s
        return is_new

    def beat(self, name: str, now_s: float) -> bool:
        """A server says that it is there; returns False if it has to join."""
        if name not in self._peers:
            return False
        self._heard_s[name] = now_s
        return True

    def leave(self, name: str, now_s: float) -> Peer | None:
        """A server ends; returns what it was."""
        peer = self._peers.pop(name, None) or self._known.pop(name, None)
        self._heard_s.pop(name, None)
        if not self._peers:
            self._alone_since_s = now_s
        return peer

    def expire(self, now_s: float) -> list[Peer]:
        """Forget those that have said nothing for too long, and return them."""
        late = [name for name, heard_s in self._heard_s.items() if now_s - heard_s > self._timeout_s]
        gone = [peer for name in late if (peer := self.leave(name, now_s)) is not None]
        if now_s > self._known_until_s and self._known:
            gone += self._known.values()
            self._known = {}
        return gone

    def forgive(self, seconds: float, now_s: float) -> None:
        """Count so much less of their silence: nobody could be heard."""
        self._heard_s = {name: min(now_s, heard_s + seconds) for name, heard_s in self._heard_s.items()}
        self._known_until_s += seconds

    def alone_s(self, now_s: float) -> float:
        """How long no server has been there."""
        return -math.inf if self._peers else now_s - self._alone_since_s
