# SPDX-License-Identifier: Apache-2.0
"""Whether a tensor parallel group has come to a stand: what rank 0 does with the others, since when, and why to end.

Ranks meet inside of what they do together, and one that waits there for another waits for ever: nothing but the end of
the process frees it. So there is a limit for each thing, shorter than the limit of whoever keeps the host, and the
reason names the rank. Only time that this process has seen pass in small portions counts: a container that was frozen
has no rank that hangs.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from tokenpool.wire.spec import HostConfig

_SHARE = 0.8


@dataclass(frozen=True, slots=True)
class RankLimits:
    """Seconds after which the host ends."""

    call_s: float = 96.0
    """In one call, copy or step of all ranks."""
    build_s: float = 1440.0
    """In what belongs to a build, without getting on."""
    alarm_s: float = 30.0
    """In anything after a rank has failed whose answer nobody takes: rank 0 may wait for that rank."""

    @classmethod
    def of(cls, config: HostConfig) -> RankLimits:
        """A little less than after which the host would be killed without a reason."""
        call_s = _SHARE * config.host_timeout_s
        return cls(call_s, max(call_s, _SHARE * config.load_timeout_s), min(cls().alarm_s, call_s / 2))


@dataclass(slots=True)
class Work:
    """Something that rank 0 does with the others, or asks of them."""

    what: str
    limit_s: float
    question: int = 0
    """What the others were asked for it; 0 = nothing yet."""
    seconds: float = 0.0
    """Since it began, or got on."""
    alarmed_s: float = 0.0
    """While another rank had failed."""


@dataclass(slots=True)
class RankWatch:
    """Books of one group. Times come from `pass_time`; the rest may be called on any thread."""

    size: int
    limits: RankLimits
    begun: list[int] = field(default_factory=list)
    """By follower, the question that it has begun and not ended, 0 = none; filled by whoever asks for a reason."""
    _works: dict[int, list[Work]] = field(default_factory=dict)
    _alarms: list[int] = field(default_factory=list)
    _taken: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._alarms, self._taken = [0] * (self.size - 1), [0] * (self.size - 1)

    @contextmanager
    def work(self, what: str, *, builds: bool = False) -> Iterator[Work]:
        """Rank 0 does `what` in the block; blocks may lie in one another, then the inner one counts."""
        mine = self._works.setdefault(threading.get_ident(), [])
        work = Work(what, self.limits.build_s if builds else self.limits.call_s)
        mine.append(work)
        try:
            yield work
        finally:
            mine.pop()
            if mine:
                mine[-1].seconds = mine[-1].alarmed_s = 0.0

    def beat(self) -> None:
        """What this thread does has got on."""
        for work in self._works.get(threading.get_ident(), [])[-1:]:
            work.seconds = 0.0

    def alarmed(self, follower: int) -> None:
        """A follower has failed, and told."""
        self._alarms[follower] += 1

    def taken(self, follower: int) -> None:
        """Rank 0 has read the answer of a follower that failed."""
        self._taken[follower] += 1

    def doing(self) -> str:
        """What rank 0 does now, empty if nothing."""
        return "; ".join(work.what for work in self._tops())

    def pass_time(self, seconds: float) -> str:
        """`seconds` have passed; returns why the host must end, or nothing."""
        failed = [index + 1 for index, given in enumerate(self._alarms) if given > self._taken[index]]
        for work in self._tops():
            work.seconds += seconds
            work.alarmed_s += seconds if failed else 0.0
            if failed and work.alarmed_s >= self.limits.alarm_s:
                return f"{_named(failed)} failed while rank 0 is in {work.what}, and may be waited for"
            if work.seconds >= work.limit_s:
                return f"{work.what} does not get on for {work.seconds:.1f} s: {self._whose(work)}"
        return ""

    def _whose(self, work: Work) -> str:
        """Which ranks are in it, as far as is known."""
        inside = [index + 1 for index, question in enumerate(self.begun) if work.question and question == work.question]
        outside = [rank for rank in range(1, self.size) if rank not in inside]
        if not outside:
            return "all ranks are in it"
        if not inside:
            return f"rank 0 waits, {_named(outside)} not in it"
        return f"{_named(inside)} in it as well, {_named(outside)} not"

    def _tops(self) -> list[Work]:
        return [works[-1] for works in list(self._works.values()) if works]


def _named(ranks: list[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"
