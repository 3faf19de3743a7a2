# SPDX-License-Identifier: Apache-2.0
"""What hosts have to do, from their reports: rates are differences of running totals over sliding windows."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from tokenpool.cluster.values import HostReport

_SAMPLE_S = 1.0

Key = tuple[str, str, str]
"""Model, host, and life of the host."""


class Totals(NamedTuple):
    """Counts since the model came to the host, or differences of such."""

    requests: float = 0
    """That began."""
    prompt_tokens: float = 0
    finished: float = 0
    tokens: float = 0
    on_time: float = 0
    """Tokens by their due time."""
    step_s: float = 0
    """Seconds in steps."""


class Rates(NamedTuple):
    """Per second over one window; zeros while there are less than two samples."""

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


class _Series:
    """Totals at moments of the last `keep_s` seconds, oldest first; one sample before them is kept."""

    __slots__ = ("_at_s", "_totals")

    def __init__(self) -> None:
        self._at_s: list[float] = []
        self._totals: list[Totals] = []

    @property
    def last(self) -> Totals:
        return self._totals[-1] if self._totals else Totals()

    def add(self, now_s: float, totals: Totals, keep_s: float) -> None:
        self._at_s.append(now_s)
        self._totals.append(totals)
        old = bisect_right(self._at_s, now_s - keep_s) - 1
        if old > 0:
            del self._at_s[:old], self._totals[:old]

    def rates(self, window_s: float) -> Rates:
        """Over the last `window_s`, or over what there is of it."""
        if len(self._at_s) < 2:
            return Rates()
        last = len(self._at_s) - 1
        first = min(last - 1, max(0, bisect_right(self._at_s, self._at_s[-1] - window_s) - 1))
        seconds = self._at_s[last] - self._at_s[first]
        pairs = zip(self._totals[last], self._totals[first], strict=True)
        return Rates(*(max(0.0, late - early) / seconds for late, early in pairs))


class TrafficBook:
    """Series of all seats, and of all models over all hosts, which go on when a model moves."""

    def __init__(self, keep_s: float) -> None:
        self._keep_s = keep_s
        self._seats: dict[Key, _Series] = {}
        self._models: dict[str, _Series] = {}
        self._since_s: dict[Key, float] = {}
        self._taken_s = float("-inf")

    def take(self, now_s: float, reports: Iterable[HostReport], models: Iterable[str]) -> None:
        """Note what hosts report of the wanted `models`; more often than once per second does nothing."""
        if now_s - self._taken_s < _SAMPLE_S:
            return
        self._taken_s = now_s
        seats: dict[Key, _Series] = {}
        grown = dict.fromkeys(models, Totals())
        for report in reports:
            for name, hosted in report.models.items():
                key = (name, report.host, report.life)
                series = seats[key] = self._seats.get(key) or _Series()
                is_new, totals = key not in self._seats, _totals(hosted.load)
                if not hosted.load and not is_new:
                    totals = series.last  # a report on the way to which the loads were lost
                # What was before the first report with numbers is of the time before this controller.
                before = totals if is_new else series.last
                series.add(now_s, totals, self._keep_s)
                self._since_s.setdefault(key, now_s)
                if name in grown:
                    grown[name] = _plus(grown[name], totals, before)
        self._seats = seats
        self._since_s = {key: since_s for key, since_s in self._since_s.items() if key in seats}
        self._models = {name: self._models.get(name) or _Series() for name in grown}
        for name, more in grown.items():
            series = self._models[name]
            series.add(now_s, _plus(series.last, more, Totals()), self._keep_s)

    def seat(self, name: str, report: HostReport, window_s: float) -> Rates:
        """One model on one host."""
        series = self._seats.get((name, report.host, report.life))
        return series.rates(window_s) if series else Rates()

    def model(self, name: str, window_s: float) -> Rates:
        """One model on all hosts."""
        series = self._models.get(name)
        return series.rates(window_s) if series else Rates()

    def since_s(self, report: HostReport) -> float | None:
        """When the host's last seat came, on the clock of `take`; None without seats."""
        times = [self._since_s.get((name, report.host, report.life)) for name in report.models]
        return max((time_s for time_s in times if time_s is not None), default=None)


def _plus(base: Totals, late: Totals, early: Totals) -> Totals:
    """`base` and what came between two totals; a total that fell began anew."""
    if late.tokens < early.tokens or late.requests < early.requests:
        early = Totals()
    return Totals(*(b + max(0.0, x - y) for b, x, y in zip(base, late, early, strict=True)))


def _totals(load: Mapping[str, Any]) -> Totals:
    if not load:
        return Totals()
    keys = ("requests", "prompt_tokens", "finished", "tokens", "tokens_on_time", "step_seconds")
    return Totals(*(load[key] for key in keys))
