# SPDX-License-Identifier: Apache-2.0
"""What leaves the device when pages are needed: the cheapest to miss, by expected cost per page.

Pure: reads no clock. Imports neither vllm nor ray.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from enum import StrEnum
from typing import NamedTuple


class EvictionKind(StrEnum):
    """What the pages hold; the order is that of preference between equal costs."""

    CACHED_KV = "cached_kv"
    """Prefix-cached blocks that no request uses."""
    IDLE_KV = "idle_kv"
    """Free blocks of a model: empty slabs above its floor."""
    WEIGHTS = "weights"
    """Weights of a model; the host has a copy, nothing is moved."""
    PAUSED_KV = "paused_kv"
    """KV of requests that wait for their model's turn; it moves to the host."""


_KINDS = list(EvictionKind)
_LEAST_P = 1e-3
_HORIZON_S = 10.0
"""How far ahead the next request of a model without work counts."""
_SPARE_P = 0.5
"""Of the busy model that a turn policy can spare: behind models without work, before other busy ones."""


class Candidate(NamedTuple):
    """Something that can leave as a whole."""

    kind: EvictionKind
    owner: str
    """Model."""
    pages: int
    """Pages that it frees; with 0 it is never chosen."""
    cost_s: float = 0.0
    """Seconds to bring it back, or to recompute it."""
    p_reuse: float = 1.0
    """Probability that it is needed again soon; 1 for a model with work."""
    needed_in_s: float = math.inf
    """Seconds until it is needed, if that is known: between equal costs, the later leaves first."""


def choose_evictions(candidates: Iterable[Candidate], need_pages: int) -> list[Candidate] | None:
    """The candidates that leave so that `need_pages` come free; None if all together do not suffice.

    They are taken in order of cost_s * p_reuse / pages until there are enough. Then those that turn out superfluous
    stay, the most expensive first, which keeps the overshoot small. Ties go to the one needed later, then by kind and
    owner, so the answer depends only on the values. O(n log n).
    """
    if need_pages <= 0:
        return []
    chosen: list[Candidate] = []
    freed = 0
    for candidate in sorted([c for c in candidates if c.pages > 0], key=_order):
        if freed >= need_pages:
            break
        chosen.append(candidate)
        freed += candidate.pages
    if freed < need_pages:
        return None
    for candidate in sorted(chosen, key=lambda c: (-c.cost_s * c.p_reuse, -c.pages, _order(c))):
        if freed - candidate.pages >= need_pages:
            chosen.remove(candidate)
            freed -= candidate.pages
    return chosen


def _order(candidate: Candidate) -> tuple[float | str, ...]:
    kind, owner, pages, cost_s, p_reuse, needed_in_s = candidate
    return cost_s * p_reuse / pages, -needed_in_s, _KINDS.index(kind), owner, pages, cost_s, p_reuse


class ReuseEstimator:
    """How likely a model gets a request soon, from an average of its arrivals that fades with time.

    Arrivals are taken as a Poisson process of rate r: P(one within h) = 1 - exp(-r * h). Each arrival adds 1/memory to
    r, and r falls by the factor exp(-t / memory) in t seconds. P is never below 0.001, so that of two models that
    nobody asks for the one that is cheaper to bring back leaves first.
    """

    def __init__(self, memory_s: float = 300.0) -> None:
        self._memory_s = memory_s
        self._rates: dict[str, tuple[float, float]] = {}  # model -> (arrivals per second, as of)

    def observe_arrival(self, model: str, now_s: float) -> None:
        """A request of the model came in now; time must not go back."""
        self._rates[model] = self.rate_per_s(model, now_s) + 1 / self._memory_s, now_s

    def rate_per_s(self, model: str, now_s: float) -> float:
        """Arrivals per second as estimated now; 0 for a model that never had one."""
        rate, since_s = self._rates.get(model, (0.0, now_s))
        return rate * math.exp(-max(0.0, now_s - since_s) / self._memory_s)

    def need(self, model: str, now_s: float, *, has_work: bool, is_spare: bool = False) -> float:
        """The `p_reuse` of what a model holds: 1 with work, less if its turns are those that can be spared longest."""
        if has_work:
            return _SPARE_P if is_spare else 1.0
        return self.probability(model, now_s, _HORIZON_S)

    def probability(self, model: str, now_s: float, horizon_s: float) -> float:
        """Probability of an arrival within `horizon_s` seconds from now."""
        return max(_LEAST_P, -math.expm1(-self.rate_per_s(model, now_s) * horizon_s))

    def forget(self, model: str) -> None:
        """The model left the pool."""
        self._rates.pop(model, None)
