# SPDX-License-Identifier: Apache-2.0
"""Latencies of the requests of the last minute: a ring, so that memory and time stay small on a busy host."""

from __future__ import annotations

import math
from collections import deque
from typing import NamedTuple


class LatencySummary(NamedTuple):
    """Quantiles of recent requests, by nearest rank; seconds."""

    p50: float
    p99: float
    count: int  # type: ignore[assignment]  # hides tuple.count, which nobody calls
    """How many requests these are: at most the size of the ring."""


class RecentLatencies:
    """The last `size` latencies with their times. O(1) to add; a summary sorts them."""

    def __init__(self, size: int = 128) -> None:
        self._values: deque[tuple[float, float]] = deque(maxlen=size)

    def add(self, now_s: float, latency_s: float) -> None:
        """Note a latency that ended now."""
        self._values.append((now_s, latency_s))

    def summary(self, now_s: float, window_s: float = 60.0) -> LatencySummary | None:
        """Quantiles of what ended in the last `window_s` seconds; None when nothing did."""
        values = sorted(latency_s for time_s, latency_s in self._values if time_s > now_s - window_s)
        if not values:
            return None
        p50, p99 = (values[math.ceil(share * len(values)) - 1] for share in (0.5, 0.99))
        return LatencySummary(p50, p99, len(values))
