# SPDX-License-Identifier: Apache-2.0
"""What a host does and whether it moves: noted by its loop, asked for by whoever keeps it, judged without a clock.

    host                                   keeper (guard.py)
    Pulse.enter("step", "llama")           pulse = call_host(..., "pulse")       one a second
    Pulse.snapshot() ─────────────────►    book.take(pulse, passed_s)
                                           judge(book.silent_s, book.still, limits) → alive, overdue, silent or stuck

A keeper counts only the time that it has seen pass itself, in small portions: if it was stopped too, as by a container
that is frozen, nobody has hung. Imports neither vllm nor ray.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NamedTuple

from tokenpool.memory.copy_engine import CopyEngine, CopyJob

STACKS_SIGNAL = signal.SIGUSR2
"""Makes a host write the stacks of all its threads to its log."""
WAITING = "waiting"
_BUILD, _COPY, _READ, _LOOP = "build", "copy", "read", "loop"
_FEW_S = 5.0

Works = dict[str, dict[str, Any]]
"""What each thread that matters does: by the thread's name `what`, `model`, `for_s`, and a `mark` that changes when it
gets on."""


class Pulse:
    """The present deed of a host's loop. Written as one assignment by the loop's thread; read by any."""

    def __init__(self) -> None:
        self._doing = ("starting", "", 0, time.monotonic())

    def enter(self, what: str, model: str = "") -> None:
        """The loop begins something; some 200 ns."""
        self._doing = (what, model, self._doing[2] + 1, time.monotonic())

    def beat(self) -> None:
        """A build has got on, on whichever thread it is."""
        what, model, *_ = self._doing
        if what == _BUILD:
            self.enter(what, model)

    def snapshot(self, build: Mapping[str, Any] | None, engines: Iterable[CopyEngine]) -> Works:
        """What goes on now, as plain values; `build` is a snapshot of the BuildProgress. For any thread."""
        jobs = {engine.name: job for engine in engines if (job := engine.current) is not None}
        what, model, count, since_s = self._doing
        mark: list[Any] = [count, CopyJob.num_chunks]  # it may wait for the side threads, or do their work
        if what == _BUILD and build is not None:
            model = build["model"]
            what, mark = f"{_BUILD}: {build['phase']}", [count, build["phase"]]
        works = {_LOOP: _work(what, model, mark, time.monotonic() - since_s)} if what != WAITING else {}
        for name, job in jobs.items():
            verb, _, model = job.label.partition(" ")
            works[name] = _work(_COPY if verb == "load" else _READ, model, [id(job), job.progress], job.running_s)
        return works


def _work(what: str, model: str, mark: list[Any], for_s: float) -> dict[str, Any]:
    return {"what": what, "model": model, "mark": repr(mark), "for_s": round(for_s, 3)}


@dataclass(frozen=True, slots=True)
class PulseLimits:
    """From when on a host counts as dead; seconds."""

    host_s: float = 120.0
    """Without a pulse, or in one step, copy or call."""
    load_s: float = 1800.0
    """In one phase of a build, or in a read of a checkpoint, that does not get on."""

    @property
    def overdue_s(self) -> float:
        """Without a pulse: from then on nobody should count on the host."""
        return min(_FEW_S, self.host_s / 2)

    def of(self, what: str) -> float:
        """How long `what` may go on without getting on."""
        return self.load_s if what.startswith((_BUILD, _READ)) else self.host_s


class Still(NamedTuple):
    """Something that has not got on for some seconds."""

    what: str
    model: str
    seconds: float


class PulseBook:
    """The pulses of one host process, in seconds that its keeper has seen pass."""

    def __init__(self) -> None:
        self.silent_s = 0.0
        """Since the last pulse."""
        self.still: dict[str, Still] = {}
        """What goes on, by thread."""
        self._marks: dict[str, tuple[Any, ...]] = {}

    def take(self, pulse: Works | None, passed_s: float) -> None:
        """Book an answer, None if there was none, `passed_s` after the one before."""
        if pulse is None:
            self.silent_s += passed_s
            return
        self.silent_s, before = 0.0, self.still
        marks = {name: (work["what"], work["model"], work["mark"]) for name, work in pulse.items()}
        self.still = {
            name: Still(*mark[:2], before[name].seconds + passed_s if self._marks.get(name) == mark else 0.0)
            for name, mark in marks.items()
        }
        self._marks = marks


class Standing(StrEnum):
    """How a host is."""

    ALIVE = "alive"
    OVERDUE = "overdue"
    """It may come back: nobody should count on it meanwhile."""
    SILENT = "silent"
    """Dead: it gives no pulse."""
    STUCK = "stuck"
    """Dead: it has been in one thing for too long."""


class Verdict(NamedTuple):
    """A standing and the reason for it, for people; empty for a host that is alive."""

    standing: Standing
    reason: str = ""

    @property
    def is_dead(self) -> bool:
        """Whether the process must end."""
        return self.standing in (Standing.SILENT, Standing.STUCK)


def judge(silent_s: float, still: Mapping[str, Still], limits: PulseLimits) -> Verdict:
    """How a host is that has been silent, and in what it does, for so long."""
    if silent_s > limits.overdue_s:
        standing = Standing.SILENT if silent_s > limits.host_s else Standing.OVERDUE
        return Verdict(standing, f"no pulse for {silent_s:.1f} s")
    parts = [(work.seconds / limits.of(work.what), work) for work in still.values()]
    part, worst = max(parts, default=(0.0, None), key=lambda one: one[0])
    if worst is None or part <= 0.5:
        return Verdict(Standing.ALIVE)
    of = f" of {worst.model}" if worst.model else ""
    return Verdict(Standing.STUCK if part > 1.0 else Standing.OVERDUE, f"in {worst.what}{of} for {worst.seconds:.1f} s")
