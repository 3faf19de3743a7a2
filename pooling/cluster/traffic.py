# SPDX-License-Identifier: Apache-2.0
"""What hosts have to do, from their reports: rates are differences of running totals over sliding windows.

Thousands of seats are sampled at the same moments, so each sample is one array for all of them.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection, Hashable, Iterable, Mapping
from operator import itemgetter
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np

from tokenpool.cluster.values import HostReport

_SAMPLE_S = 1.0
_NUM_SAMPLES = 60
"""Of the longest window, at most."""
_TOTALS = itemgetter("requests", "prompt_tokens", "finished", "tokens", "tokens_on_time", "step_seconds")
"""Counts since the model came to the host, in the order of the fields of `Rates`."""
_REQUESTS, _TOKENS, _COUNT = 0, 3, 6

Seat = tuple[str, str, str]
"""Model, host, and life of the host."""
K = TypeVar("K", bound=Hashable)


class Rates(NamedTuple):
    """Per second over one window."""

    arrivals_per_s: float = 0.0
    input_tokens_per_s: float = 0.0
    finished_per_s: float = 0.0
    tokens_per_s: float = 0.0
    on_time_per_s: float = 0.0
    busy_frac: float = 0.0

    @property
    def on_time_frac(self) -> float:
        """Share of tokens on time; 1 where there were none."""
        return min(1.0, self.on_time_per_s / self.tokens_per_s) if self.tokens_per_s > 0 else 1.0

    @property
    def wanted_tokens_per_s(self) -> float:
        """Tokens asked for: arrivals times the mean length of answers, so that a backlog counts as demand."""
        if self.finished_per_s <= 0:
            return self.tokens_per_s
        return max(self.tokens_per_s, self.arrivals_per_s * self.tokens_per_s / self.finished_per_s)


class _Growth(Generic[K]):
    """How much the totals of each key have grown, (6, rows) float64, now and at earlier moments."""

    def __init__(self) -> None:
        self.rows: dict[K, int] = {}
        self.grown = np.zeros((_COUNT, 0))
        self.since_s = np.zeros(0)
        """When the key came, by row."""
        self._free: list[int] = []
        self._at_s: list[float] = []
        self._past: list[np.ndarray] = []

    def keep(self, keys: Collection[K], now_s: float) -> list[int]:
        """Have a row for each of `keys` and for no other; returns the rows that are new."""
        for key in self.rows.keys() - keys:
            self._free.append(self.rows.pop(key))
        new = [key for key in keys if key not in self.rows]
        if len(new) > len(self._free):
            self._widen(max(len(new), self.grown.shape[1]))
        rows = [self._free.pop() for _ in new]
        self.rows.update(zip(new, rows, strict=True))
        if rows:
            self.since_s[rows] = now_s
            for totals in (self.grown, *self._past):
                totals[:, rows] = 0.0
        return rows

    def _widen(self, more: int) -> None:
        width = self.grown.shape[1]
        self._free += range(width, width + more)
        self.since_s = np.pad(self.since_s, (0, more))
        self.grown, *self._past = (np.pad(totals, ((0, 0), (0, more))) for totals in (self.grown, *self._past))

    def sample(self, now_s: float, keep_s: float) -> None:
        """Remember the totals of this moment, and one sample before the last `keep_s`."""
        self._at_s.append(now_s)
        self._past.append(self.grown.copy())
        old = bisect_right(self._at_s, now_s - keep_s) - 1
        if old > 0:
            del self._at_s[:old], self._past[:old]

    def rates(self, window_s: float) -> dict[K, Rates]:
        """Of the keys that grew in the last `window_s`, or in what there is of it; not of such that have just come."""
        if len(self._at_s) < 2:
            return {}
        last = len(self._at_s) - 1
        first = min(last - 1, max(0, bisect_right(self._at_s, self._at_s[-1] - window_s) - 1))
        more = self._past[last] - self._past[first]
        has_rate = (more.any(axis=0) & (self.since_s < self._at_s[last])).tolist()
        keys = [key for key, row in self.rows.items() if has_rate[row]]
        rows = [self.rows[key] for key in keys]
        per_s = more[:, rows] / (self._at_s[last] - np.maximum(self._at_s[first], self.since_s[rows]))
        return dict(zip(keys, map(Rates._make, per_s.T.tolist()), strict=True))

    def since(self) -> dict[K, float]:
        """When each key came."""
        return dict(zip(self.rows, self.since_s[list(self.rows.values())].tolist(), strict=True))


class TrafficBook:
    """What seats did, and models over all hosts, which goes on when a model moves."""

    def __init__(self, keep_s: float) -> None:
        self._keep_s = keep_s
        self._seats: _Growth[Seat] = _Growth()
        self._models: _Growth[str] = _Growth()
        self._last = np.zeros((_COUNT, 0))
        """What was reported last, by row of `_seats`; nan = nothing yet."""
        self._taken_s = float("-inf")

    def take(self, now_s: float, reports: Iterable[HostReport], models: Iterable[str]) -> None:
        """Note what hosts report of the wanted `models`; more often than once per second does nothing."""
        if now_s - self._taken_s < max(_SAMPLE_S, self._keep_s / _NUM_SAMPLES):
            return
        self._taken_s = now_s
        loads = {(name, r.host, r.life): hosted.load for r in reports for name, hosted in r.models.items()}
        new = self._seats.keep(loads, now_s)
        self._last = np.pad(self._last, ((0, 0), (0, self._seats.grown.shape[1] - self._last.shape[1])))
        self._last[:, new] = np.nan
        self._models.keep(dict.fromkeys(models), now_s)
        self._add({seat: load for seat, load in loads.items() if load})  # without: lost on the way
        self._seats.sample(now_s, self._keep_s)
        self._models.sample(now_s, self._keep_s)

    def _add(self, loads: dict[Seat, Mapping[str, Any]]) -> None:
        """Add what grew since the last report; what was before the first is of the time before this controller."""
        if not loads:
            return
        rows = [self._seats.rows[seat] for seat in loads]
        totals = np.array([_TOTALS(load) for load in loads.values()], float).T
        last, self._last[:, rows] = self._last[:, rows], totals
        is_anew = (totals[_TOKENS] < last[_TOKENS]) | (totals[_REQUESTS] < last[_REQUESTS])
        more = np.fmax(0.0, np.where(is_anew, totals, totals - last))  # fmax: nothing where there was no last report
        self._seats.grown[:, rows] += more
        models = np.array([self._models.rows.get(name, -1) for name, _, _ in loads])
        is_wanted = models >= 0
        for row, part in zip(self._models.grown, more, strict=True):
            row[:] += np.bincount(models[is_wanted], part[is_wanted], minlength=len(row))

    def seats(self, window_s: float) -> dict[Seat, Rates]:
        """Of the models that did something on a host lately."""
        return self._seats.rates(window_s)

    def models(self, window_s: float) -> dict[str, Rates]:
        """Of the wanted models that did something lately, on all hosts together."""
        return self._models.rates(window_s)

    def since_s(self) -> dict[Seat, float]:
        """When each seat came, on the clock of `take`."""
        return self._seats.since()
