# SPDX-License-Identifier: Apache-2.0
"""The controller's seats: by model and host, and by host alone, because each report is about one host of thousands."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, field

from tokenpool.cluster.values import Deployment, HostReport, SeatState, SeatView

Pair = tuple[str, str]
"""Model, host."""

BAR_S = (2.0, 5.0, 15.0, 60.0)
"""How long a host is not told again what it failed at, by the failures in a row."""


@dataclass(slots=True)
class Seat:
    """One model on one host."""

    deployment: Deployment
    life: str
    state: SeatState
    joined_by: set[str] = field(default_factory=set)
    """Servers all of whose frontends send requests there."""
    left_by: set[str] = field(default_factory=set)
    """Servers that have nothing there any more and will not come back, while it is LEAVING."""
    ordered: bool = False
    """Whether the host was told what the state says."""
    ordered_s: float = 0.0
    """When it was told, by the controller's clock."""
    failures: int = 0
    """Orders in a row that it failed at in this state."""
    retry_s: float = 0.0
    """Not told again before."""


class Seats(dict[Pair, Seat]):
    """Seats by (model, host); set and deleted one at a time."""

    def __init__(self) -> None:
        self._on_host: dict[str, dict[Pair, None]] = {}  # a dict keeps the order in which they came

    def __setitem__(self, pair: Pair, seat: Seat) -> None:
        super().__setitem__(pair, seat)
        self._on_host.setdefault(pair[1], {})[pair] = None

    def __delitem__(self, pair: Pair) -> None:
        super().__delitem__(pair)
        del self._on_host[pair[1]][pair]

    def on_host(self, host: str) -> list[Pair]:
        """The seats of one host. O(these)."""
        return list(self._on_host.get(host, ()))

    def views(self, hosts: Mapping[str, HostReport]) -> dict[str, dict[str, SeatView]]:
        """As frontends see them, by model and host, on the hosts that are there."""
        views: dict[str, dict[str, SeatView]] = {}
        for (name, host), seat in self.items():
            if (report := hosts.get(host)) is not None:
                seen = SeatView(seat.life, seat.state, seat.deployment.version, report.address, report.machine)
                views.setdefault(name, {})[host] = seen
        return views

    def joined(self, server: str, model: str, host: str, life: str) -> None:
        """All frontends of a server send requests to that engine."""
        seat = self.get((model, host))
        if seat is not None and seat.life == life:
            seat.joined_by.add(server)

    def left(self, server: str, model: str, host: str, life: str) -> None:
        """A server has nothing at that engine any more."""
        seat = self.get((model, host))
        if seat is not None and seat.life == life and seat.state is SeatState.LEAVING:
            seat.left_by.add(server)

    def are_joined(self, servers: Set[str], model: str) -> bool:
        """Whether each of these servers has an engine of that model."""
        serving = [seat for (name, _), seat in self.items() if name == model and seat.state is SeatState.SERVING]
        return servers <= set().union(*(seat.joined_by for seat in serving))


@dataclass(slots=True)
class _Bar:
    until_s: float
    failures: int


class Bars(dict[Pair, _Bar]):
    """What hosts failed to load, and are not told again before some time has passed."""

    def add(self, pair: Pair, now_s: float) -> float:
        """One more failure; returns for how long the pair is barred."""
        failures = self[pair].failures + 1 if pair in self else 1
        wait_s = BAR_S[min(failures, len(BAR_S)) - 1]
        self[pair] = _Bar(now_s + wait_s, failures)
        return wait_s

    def forget(self, model: str) -> None:
        """Let all hosts try a model."""
        for pair in [pair for pair in self if pair[0] == model]:
            del self[pair]

    def forget_host(self, host: str) -> None:
        """A host is gone for good."""
        for pair in [pair for pair in self if pair[1] == host]:
            del self[pair]

    def until_s(self, model: str, hosts: Iterable[str], now_s: float) -> float:
        """When the first of these hosts may try a model again."""
        return min((self[model, host].until_s for host in hosts if (model, host) in self), default=now_s)

    def at(self, now_s: float) -> set[Pair]:
        """What is barred now."""
        return {pair for pair, bar in self.items() if bar.until_s > now_s}
