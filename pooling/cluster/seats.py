# SPDX-License-Identifier: Apache-2.0
"""The controller's seats: by model and host, and by host alone, because each report is about one host of thousands."""

from __future__ import annotations

from dataclasses import dataclass

from tokenpool.cluster.values import Deployment, Endpoints, SeatState

Pair = tuple[str, str]
"""Model, host."""


@dataclass(slots=True)
class Seat:
    """One model on one host."""

    deployment: Deployment
    life: str
    state: SeatState
    endpoints: Endpoints | None = None
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
