# SPDX-License-Identifier: Apache-2.0
"""A token bucket: how much of something may be used per minute, with bursts of up to a minute's worth.

Pure: reads no clock. Imports neither vllm nor ray.
"""

from __future__ import annotations

LEAST_SHARE = 1e-3
"""Of a bucket that has none of the limit: it refills all but never."""


class TokenBucket:
    """Refills at `per_minute` / 60 per second up to `per_minute`; a level below zero is a debt to be waited off.

    Several frontends keep one limit together when each has a bucket with its share of it.
    """

    __slots__ = ("per_minute", "_share", "_level", "_as_of_s")

    def __init__(self, per_minute: float, *, now_s: float, share: float = 1.0) -> None:
        """Start full; `share` is this bucket's part, above 0 to 1, of the whole limit."""
        self.per_minute = per_minute
        """The whole limit, of which this bucket has a share."""
        self._share = _checked(share)
        self._level = self.capacity
        self._as_of_s = now_s

    @property
    def fill(self) -> float:
        """How full it was when it was looked at last, 0 to 1."""
        return min(1.0, max(0.0, self._level / self.capacity))

    @property
    def capacity(self) -> float:
        """The highest level; never below 1, or a small share would let nothing through."""
        return max(1.0, self.per_minute * self._share)

    def level(self, now_s: float) -> float:
        """What is left now; below zero after an overdraft. Time that goes back counts as standing still."""
        if now_s > self._as_of_s:
            refill = (now_s - self._as_of_s) * self._rate_per_s
            self._level = min(self.capacity, self._level + refill)
            self._as_of_s = now_s
        return self._level

    def ready_in_s(self, now_s: float, amount: float = 1.0) -> float:
        """Seconds until the level is at least `amount`, of which no more than the capacity is asked; 0 = now."""
        level = self.level(now_s)
        missing = min(amount, self.capacity) - level
        return max(0.0, missing / self._rate_per_s)

    def take(self, now_s: float, amount: float) -> None:
        """Use `amount`, whatever the level is; a negative amount is given back."""
        self._level = min(self.capacity, self.level(now_s) - amount)

    def set_share(self, now_s: float, share: float, fill: float = 0.0) -> None:
        """Take another share of the limit, so that all shares together hold no more than before.

        What is given up takes its part of the level along; what is new is full by `fill`. A debt stays.
        """
        level, before = self.level(now_s), self.capacity
        self._share = _checked(share)
        if self.capacity > before:
            self._level = level + fill * (self.capacity - before)
        elif level > 0:
            self._level = level * self.capacity / before

    @property
    def _rate_per_s(self) -> float:
        return self.per_minute * self._share / 60.0


def _checked(share: float) -> float:
    if not 0 < share <= 1:
        raise ValueError(f"a share is above 0 and at most 1, got {share!r}")
    return share
