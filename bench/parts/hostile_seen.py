# SPDX-License-Identifier: Apache-2.0
"""What the bench of hostile requests sees of the server, from outside and in its metrics."""

from __future__ import annotations

import re
import urllib.request
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import psutil

from bench.parts import common

_LAG = re.compile(r"^tokenpool:loop_lag_max_seconds(?:{[^}]*})? (\S+)$", re.MULTILINE)
_STALLS = re.compile(r'^tokenpool:loop_stalls_total{[^}]*over_seconds="([^"]+)"[^}]*} (\S+)$', re.MULTILINE)
_CPU = ("cpu frontend", "cpu host")


@dataclass(slots=True)
class Seen:
    """What is looked at while the arms are played."""

    port: int
    pids: tuple[int, int]
    """Frontend and engine host."""
    metrics_key: str
    lag_s: float = 0.0
    """The longest that the loop stood still."""
    stalls: dict[str, dict[str, float]] = field(default_factory=dict)
    """How often the loop was late by more than so many seconds, by arm."""
    cpu_s: dict[str, tuple[float, float]] = field(default_factory=dict)
    """CPU seconds of frontend and host, by arm."""
    _pss: int = 0
    _first_pss: int = 0
    _peak_pss: int = 0

    def begin(self) -> None:
        """What the frontend's memory is now it had before."""
        self.look()
        self._first_pss = self._peak_pss = self._pss

    def look(self) -> dict[str, float]:
        """Note the metrics and the memory of now; returns counts that go on growing."""
        self._pss = common.memory_of(self.pids[:1])["pss"]
        self._peak_pss = max(self._peak_pss, self._pss)
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}/metrics")
        request.add_header("Authorization", f"Bearer {self.metrics_key}")
        with urllib.request.urlopen(request, timeout=60) as answer:
            text = answer.read().decode()
        self.lag_s = max(self.lag_s, *(float(value) for value in _LAG.findall(text)))
        cpu_s = (sum(psutil.Process(pid).cpu_times()[:2]) for pid in self.pids)
        return {over_s: float(value) for over_s, value in _STALLS.findall(text)} | dict(zip(_CPU, cpu_s, strict=True))

    def count(self, arm: str, before: Mapping[str, float], after: Mapping[str, float]) -> None:
        """Add what came between two looks to that of an arm."""
        grown = {name: value - before.get(name, 0.0) for name, value in after.items()}
        frontend_s, host_s = self.cpu_s.get(arm, (0.0, 0.0))
        self.cpu_s[arm] = (frontend_s + grown.pop(_CPU[0]), host_s + grown.pop(_CPU[1]))
        counted = Counter(self.stalls.get(arm, {}))
        counted.update(grown)
        self.stalls[arm] = dict(counted)

    def cpu_beyond(self, arm: str, base: str, ratio: float) -> tuple[float, float]:
        """CPU seconds of frontend and host in `arm` beyond `ratio` times those in `base`."""
        frontend_s, host_s = self.cpu_s[arm]
        base_frontend_s, base_host_s = self.cpu_s[base]
        return frontend_s - ratio * base_frontend_s, host_s - ratio * base_host_s

    @property
    def growth_mib(self) -> float:
        """The frontend's proportional set size at its peak, less what it was."""
        return (self._peak_pss - self._first_pss) / 2**20

    @property
    def kept_mib(self) -> float:
        """The same at the last look."""
        return (self._pss - self._first_pss) / 2**20
