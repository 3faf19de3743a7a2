# SPDX-License-Identifier: Apache-2.0
"""What leaves the device when pages are needed: whatever is cheapest to miss, by cost to bring it back and by use."""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import StrEnum
from typing import NamedTuple


class EvictionKind(StrEnum):
    """What a victim gives up."""

    CACHED_KV = "cached_kv"
    """Cached blocks that no request uses."""
    IDLE_KV = "idle_kv"
    """Slabs promised to a model without requests."""
    WEIGHTS = "weights"
    """A model's weights, with the KV that goes for free."""
    PAUSED_KV = "paused_kv"
    """KV of requests that are not finished; it is copied to the host."""


class Candidate(NamedTuple):
    """Something that may leave the device."""

    kind: EvictionKind
    owner: str
    pages: int
    """Pages that it frees."""
    cost_s: float
    """Seconds of copying, out and back, if it is needed again."""
    p_reuse: float
    """Probability that it is needed again soon, 0 to 1."""

    @property
    def regret_s(self) -> float:
        """Expected seconds lost per page freed."""
        return self.cost_s * self.p_reuse / max(1, self.pages)


def choose_victims(candidates: Sequence[Candidate], need_pages: int) -> list[Candidate] | None:
    """The cheapest candidates that together free `need_pages`; None if all together do not.

    Greedy by regret per page, then those are dropped again that the others make superfluous, the dearest first.
    O(n log n). The optimum is a knapsack problem; greedy is at most one candidate worse.
    """
    chosen: list[Candidate] = []
    freed = 0
    for candidate in sorted(candidates, key=lambda c: (c.regret_s, -c.pages, c.owner, c.kind)):
        if freed >= need_pages:
            break
        if candidate.pages > 0:
            chosen.append(candidate)
            freed += candidate.pages
    if freed < need_pages:
        return None
    for candidate in sorted(chosen, key=lambda c: (-c.cost_s * c.p_reuse, c.owner, c.kind)):
        if freed - candidate.pages >= need_pages:
            chosen.remove(candidate)
            freed -= candidate.pages
    return chosen


class ReuseEstimator:
    """How likely a model is asked again soon, from a fading average of its request rate."""

    def __init__(self, half_life_s: float = 300.0) -> None:
        self._decay_per_s = math.log(2) / half_life_s
        self._seen: dict[str, tuple[float, float]] = {}  # model -> (weight of arrivals, time of the last)

    def observe_arrival(self, model: str, now_s: float) -> None:
        """A request for the model came in."""
        self._seen[model] = (self._weight(model, now_s) + 1.0, now_s)

    def probability(self, model: str, now_s: float, horizon_s: float) -> float:
        """Probability of a request within `horizon_s`, arrivals taken as Poisson; small but above 0 for a new one."""
        rate_per_s = self._weight(model, now_s) * self._decay_per_s
        return max(1e-3, -math.expm1(-rate_per_s * horizon_s))

    def forget(self, model: str) -> None:
        """The model is gone."""
        self._seen.pop(model, None)

    def _weight(self, model: str, now_s: float) -> float:
        weight, last_s = self._seen.get(model, (0.0, now_s))
        return weight * math.exp(-self._decay_per_s * max(0.0, now_s - last_s))
