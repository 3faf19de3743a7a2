# SPDX-License-Identifier: Apache-2.0
"""Ends a host process that hangs: a thread takes its pulse, and kills it when it counts as dead.

Whoever waits for the process to end then sees it end, and does what it does for every host that died.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from tokenpool.wire.control import call_host
from tokenpool.wire.messages import Address
from tokenpool.wire.pulse import STACKS_SIGNAL, PulseBook, PulseLimits, Standing, Verdict, Works, judge

logger = logging.getLogger(__name__)

_PERIOD_S = 1.0
_QUESTION_LIMIT_S = 2.0
_STACKS_S = 1.0
_END_LIMIT_S = 10.0


class HostGuard:
    """Guards one process from `start` until it ends; its properties may be read by any thread."""

    def __init__(
        self,
        name: str,
        pid: int,
        ask: Callable[[float], Works],
        limits: PulseLimits,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`ask` takes the pulse within the seconds given, or raises."""
        self.name = name
        self._pid = pid
        self._ask = ask
        self._limits = limits
        self._book = PulseBook()
        self._pulse: Works = {}
        self._clock = clock
        self._heard_s = clock()
        self._verdict = Verdict(Standing.ALIVE)
        self.is_over = False
        """Whether the process has ended."""

    @classmethod
    def of(cls, name: str, pid: int, address: Address, key: bytes, config: Mapping[str, Any]) -> HostGuard:
        """A guard of the host that answers there, with the limits in the fields of its HostConfig; it has started."""
        fields = {"host_s": "host_timeout_s", "load_s": "load_timeout_s"}
        limits = PulseLimits(**{field: config[key] for field, key in fields.items() if key in config})
        made = cls(name, pid, lambda limit_s: call_host(address, key, "pulse", timeout_s=limit_s), limits)
        made.start()
        return made

    def start(self) -> None:
        """Begin; returns at once."""
        threading.Thread(target=self._run, name=f"guard of {self.name}", daemon=True).start()

    @property
    def is_overdue(self) -> bool:
        """Whether nobody should count on the host now."""
        return self._verdict.standing is not Standing.ALIVE

    @property
    def reason(self) -> str:
        """Why it is overdue, or was killed; empty for a host that is alive."""
        return self._verdict.reason

    @property
    def age_s(self) -> float:
        """Seconds since the last pulse."""
        return self._clock() - self._heard_s

    def snapshot(self) -> dict[str, Any]:
        """The last pulse, its age and how the host is, as plain values."""
        works = {name: {k: v for k, v in work.items() if k != "mark"} for name, work in self._pulse.items()}
        told = {"standing": self._verdict.standing.value, "age_s": round(self.age_s, 3), "works": works}
        return told | ({"reason": self.reason} if self.reason else {})

    def _run(self) -> None:
        try:
            process = os.pidfd_open(self._pid)  # unlike its number, never another process
        except ProcessLookupError:
            self.is_over = True
            return
        except OSError as error:  # Linux before 5.3, or a container that forbids it
            logger.error("engine host is not guarded, one that hangs is not noticed host=%s: %s", self.name, error)
            return
        try:
            self._watch(process)
        finally:
            self.is_over = True
            os.close(process)

    def _watch(self, process: int) -> None:
        period_s = min(_PERIOD_S, self._limits.host_s / 20)
        question_s = min(_QUESTION_LIMIT_S, self._limits.host_s / 10)
        looked_s = self._clock()
        while not _has_ended(process, period_s):
            pulse = self._take(question_s)
            now_s = self._clock()
            passed_s, looked_s = min(now_s - looked_s, 2 * (period_s + question_s)), now_s
            self._book.take(pulse, passed_s)
            before, self._verdict = self._verdict, judge(self._book.silent_s, self._book.still, self._limits)
            if self._verdict.is_dead:
                self._end(process)
                return
            if before.standing is not self._verdict.standing:
                reason = self._verdict.reason or "it gets on again"
                logger.warning("engine host is %s host=%s: %s", self._verdict.standing, self.name, reason)

    def _take(self, limit_s: float) -> Works | None:
        try:
            pulse = self._ask(limit_s)
        except Exception as error:  # whatever the host said instead, it is no pulse
            logger.debug("no pulse host=%s: %s", self.name, error)
            return None
        self._pulse, self._heard_s = pulse, self._clock()
        return pulse

    def _end(self, process: int) -> None:
        logger.error("engine host hangs host=%s pid=%d: %s; it is killed", self.name, self._pid, self.reason)
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(process, STACKS_SIGNAL)
            if not _has_ended(process, _STACKS_S):  # one that is stopped writes no stacks
                signal.pidfd_send_signal(process, signal.SIGKILL)
            while not _has_ended(process, _END_LIMIT_S):
                logger.critical("a killed engine host does not end pid=%d: the kernel holds it in a call", self._pid)


def _has_ended(process: int, limit_s: float) -> bool:
    """Whether the process ends within the limit."""
    poller = select.poll()
    poller.register(process, select.POLLIN)
    return bool(poller.poll(1000 * limit_s))
