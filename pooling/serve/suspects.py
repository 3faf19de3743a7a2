# SPDX-License-Identifier: Apache-2.0
"""Finds the request that engine hosts die of, without failing those that were only there. Imports no vLLM.

Whoever had a request at a host that died is suspected. Suspects go on one at a time, behind those that are not; each
until its first token, which shows that it does not end a host at once. When the host dies again, the one that was on
trial is blamed, and those that had no token yet. A request that was there at three deaths goes on alone until it ends,
and new requests wait for its first token; one that a host dies of then, or of which three did on trial, is guilty.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

from tokenpool.serve.blamed_tenants import BlamedTenants
from tokenpool.serve.tenant_call import CURRENT_CALL

logger = logging.getLogger(__name__)

MAX_LOSSES = 3
"""Hosts that a request may be there to see die; then it goes on alone, and the next one is on it."""

_TRIAL_LIMIT_S = 30.0
"""A suspect without a token for so long keeps nobody else waiting: it may wait for memory, or for a grammar."""
_LOOK_S = 0.05
_MAX_JUDGED = 256

Entry = Any
"""A JournalEntry, whose place is an EngineLink."""


@dataclass(slots=True)
class _Trial:
    entry: Entry
    timer: asyncio.TimerHandle
    holds_others: bool
    """Whether new requests wait; until the first token of one that was there at many deaths."""


class Suspects:
    """The suspects of all models of a process; on one event loop."""

    def __init__(self) -> None:
        self.tenants = BlamedTenants()
        self._journals: WeakSet[Any] = WeakSet()
        self._line: dict[Entry, Callable[[], None]] = {}
        self._trial: _Trial | None = None
        self._judged: dict[str, float] = {}
        self._lock: int | None = None
        self._due: asyncio.Handle | None = None

    def share(self, path: str) -> None:
        """Hold trials one at a time with all processes that share this file; the kernel lets go for one that dies."""
        self._lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def watch(self, journal: Any) -> None:
        """Know of the requests of one more model."""
        self._journals.add(journal)

    def forget(self, journal: Any) -> None:
        """A model's requests are nobody's business any more."""
        self._journals.discard(journal)
        for entry in journal:
            self._line.pop(entry, None)
        if self._due is not None:
            self._due.cancel()
            self._due = None
        if self._trial is not None and journal.get(self._trial.entry.request_id) is self._trial.entry:
            self._end_trial()
        elif self._line:
            self._look_for_next()

    @staticmethod
    def owner() -> str | None:
        """The tenant whose call the running task works for."""
        call = CURRENT_CALL.get()
        return None if call is None else call.account.config.name

    def may_go(self, entry: Entry, go: Callable[[], None]) -> bool:
        """Whether a request may be sent now; else `go`, which sends it, is called when its turn comes."""
        held = self._trial is not None and self._trial.holds_others
        if entry.is_released or not (held or self._is_suspect(entry)):
            return True
        self._line[entry] = go
        self._look_for_next()
        return False

    def look(self) -> None:
        """See whether the one on trial has shown something; to be called when an engine has told something."""
        trial = self._trial
        if trial is None:
            return
        entry = trial.entry
        if entry.is_closed or entry.place is None:
            self._end_trial()
        elif entry.is_proven:
            if entry.num_losses < MAX_LOSSES:
                self._end_trial()
            elif trial.holds_others:
                trial.holds_others = False
                self._let_others_go()

    def host_died(self, host: str, since_s: float) -> None:
        """Judge the requests at `host`, as long as they are there; a connection to it was made at `since_s`.

        Each model tells of the same death; the first one's word counts for all.
        """
        if self._judged.get(host, -math.inf) >= since_s:
            return
        self._judged[host] = time.monotonic()
        if len(self._judged) > _MAX_JUDGED:
            del self._judged[next(iter(self._judged))]
        there = [e for journal in self._journals for e in journal if e.place is not None and e.place.host == host]
        guilty, trial = there, self._trial
        if trial is not None and trial.entry in there:
            is_late = trial.entry.num_losses >= MAX_LOSSES  # then tokens prove nothing, for those that came meanwhile
            others = (e for e in there if not e.is_proven or (is_late and not e.num_losses))
            guilty = [trial.entry, *(e for e in others if e is not trial.entry)]
        for entry in guilty:
            entry.num_losses += 1
            entry.is_released = False
        if trial is not None and trial.entry in there:
            # Who came meanwhile may have done it; but this cannot go on for ever.
            limit = MAX_LOSSES if len(guilty) == 1 else 2 * MAX_LOSSES
            trial.entry.is_guilty = trial.entry.num_losses >= limit
            self._end_trial()
        blamed: dict[str, list[str]] = {}
        for entry in guilty:
            if entry.owner is not None:
                blamed.setdefault(entry.owner, []).append(entry.request_id)
        logger.warning("engine host died host=%s requests=%d suspected=%d", host, len(there), len(guilty))
        if guilty:
            self.tenants.host_died(blamed)

    # -- trials --------------------------------------------------------------------------------------

    def _is_suspect(self, entry: Entry) -> bool:
        return entry.num_losses > 0 or self.tenants.is_suspected(entry.owner)

    def _look_for_next(self, wait_s: float = 0.0) -> None:
        """Begin the next trial, once those that are not suspected have been sent."""
        if self._trial is None and self._due is None:
            self._due = asyncio.get_running_loop().call_later(wait_s, self._next)

    def _next(self) -> None:
        """Begin the trial of the one that has seen the fewest hosts die."""
        self._due = None
        if self._trial is not None or not self._line:
            return
        loop = asyncio.get_running_loop()
        if not self._take_lock():
            self._look_for_next(_LOOK_S)
            return
        for entry in sorted(self._line, key=lambda entry: entry.num_losses):
            go = self._line.pop(entry)
            if entry.is_closed or entry.place is not None:
                continue
            entry.is_released = True
            go()
            if entry.place is None:  # its model has no host, and is sent when it has
                entry.is_released = False
            elif self._is_suspect(entry):
                timer = loop.call_later(_TRIAL_LIMIT_S, self._time_is_up, entry)
                self._trial = _Trial(entry, timer, holds_others=entry.num_losses >= MAX_LOSSES)
                return
        self._leave_lock()

    def _time_is_up(self, entry: Entry) -> None:
        if self._trial is None or self._trial.entry is not entry:
            return
        if entry.num_losses < MAX_LOSSES:
            self._end_trial()
        elif self._trial.holds_others:
            self._trial.holds_others = False
            self._let_others_go()

    def _let_others_go(self) -> None:
        for entry in [entry for entry in self._line if not self._is_suspect(entry)]:
            self._line.pop(entry)()

    def _end_trial(self) -> None:
        assert self._trial is not None
        self._trial.timer.cancel()
        self._trial = None
        self._leave_lock()
        if self._line:
            self._look_for_next()

    def _take_lock(self) -> bool:
        if self._lock is not None:
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
        return True

    def _leave_lock(self) -> None:
        if self._lock is not None:
            fcntl.flock(self._lock, fcntl.LOCK_UN)


SUSPECTS = Suspects()
"""Of this process."""
