# SPDX-License-Identifier: Apache-2.0
"""Finds the request that engine hosts die of, without failing those that were only there. Imports no vLLM.

Whoever had a request at a host that died is suspected. Suspects go on in groups of 1, 2, 4, …, behind those that are
not suspected; each group until all of it have a first token, which shows that they do not end a host at once. When
the host dies again, those on trial that had no token yet are blamed, and others that had none. Whoever was blamed
twice goes on alone. The next few new requests of a tenant that was blamed twice in a row are suspected, too. A request
that was there at three deaths goes on alone until it ends, and new requests wait for its first token; one that a host
dies of then, or of which three did on trial, is guilty.
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

from tokenpool.serve.access.blamed_tenants import BlamedTenants
from tokenpool.serve.access.tenant_call import CURRENT_CALL

logger = logging.getLogger(__name__)

MAX_LOSSES = 3
"""Hosts that a request may be there to see die; then it goes on alone, and the next one is on it."""

_TRIAL_LIMIT_S = 30.0
"""Suspects without a token for so long keep nobody else waiting: they may wait for memory, or for a grammar."""
_LOOK_S = 0.05
_MAX_JUDGED = 256

Entry = Any
"""A JournalEntry, whose place is an EngineLink."""


@dataclass(slots=True)
class _Trial:
    entries: list[Entry]
    """One, or some that were blamed once; those that have a token leave."""
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
        self._group = 1
        """How many may be on trial together; doubled by each group that no host dies of."""
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
        if self._trial is not None:
            self._leave_trial(lambda entry: journal.get(entry.request_id) is entry)
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
        """See whether those on trial have shown something; to be called when an engine has told something."""
        trial = self._trial
        if trial is None:
            return
        self._leave_trial(_is_over)
        if trial is self._trial and trial.holds_others and trial.entries[0].is_proven:
            self._let_others_go(trial)

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
        guilty, tried = there, [] if self._trial is None else [e for e in self._trial.entries if e in there]
        if tried:
            is_late = tried[0].num_losses >= MAX_LOSSES  # then tokens prove nothing, for those that came meanwhile
            others = (e for e in there if not e.is_proven or (is_late and not e.num_losses))
            guilty = [*tried, *(e for e in others if e not in tried)]
        for entry in guilty:
            entry.num_losses += 1
            entry.is_released = False
        if tried:
            # Who came meanwhile may have done it; but this cannot go on for ever.
            limit = MAX_LOSSES if len(guilty) == 1 else 2 * MAX_LOSSES
            tried[0].is_guilty = len(tried) == 1 and tried[0].num_losses >= limit
            self._leave_trial(tried.__contains__)
        self._group = 1
        blamed: dict[str, list[str]] = {}
        for entry in guilty:
            if entry.owner is not None:
                blamed.setdefault(entry.owner, []).append(entry.request_id)
        logger.warning("engine host died host=%s requests=%d suspected=%d", host, len(there), len(guilty))
        if guilty:
            self.tenants.host_died(blamed, on_trial=bool(tried))

    # -- trials --------------------------------------------------------------------------------------

    def _is_suspect(self, entry: Entry) -> bool:
        return entry.num_losses > 0 or self.tenants.is_suspected(entry.owner)

    def _look_for_next(self, wait_s: float = 0.0) -> None:
        """Begin the next trial, once those that are not suspected have been sent."""
        if self._trial is None and self._due is None:
            self._due = asyncio.get_running_loop().call_later(wait_s, self._next)

    def _may_join(self, entry: Entry, group: list[Entry]) -> bool:
        """Whether a suspect may be on trial with others: requests that were blamed once, or new ones of one tenant."""
        if not group:
            return True
        first, losses = group[0], entry.num_losses
        alike = first.num_losses == losses < 2 and (losses == 1 or first.owner == entry.owner)
        return alike and len(group) < self._group

    def _next(self) -> None:
        """Begin the trial of the one that has seen the fewest hosts die, and of others with it."""
        self._due = None
        if self._trial is not None or not self._line:
            return
        loop = asyncio.get_running_loop()
        if not self._take_lock():
            self._look_for_next(_LOOK_S)
            return
        group: list[Entry] = []
        for entry in sorted(self._line, key=lambda entry: entry.num_losses):
            is_suspect = self._is_suspect(entry)
            if is_suspect and not self._may_join(entry, group):
                continue
            go = self._line.pop(entry)
            if entry.is_closed or entry.place is not None:
                continue
            entry.is_released = True
            go()
            if entry.place is None:  # its model has no host, and is sent when it has
                entry.is_released = False
            elif is_suspect:
                group.append(entry)
        if not group:
            self._leave_lock()
            return
        timer = loop.call_later(_TRIAL_LIMIT_S, self._time_is_up)
        self._trial = _Trial(group, timer, holds_others=group[0].num_losses >= MAX_LOSSES)

    def _time_is_up(self) -> None:
        trial = self._trial
        assert trial is not None, "a trial that has ended has no timer"
        if trial.entries[0].num_losses < MAX_LOSSES:
            self._end_trial()
        elif trial.holds_others:
            self._let_others_go(trial)

    def _let_others_go(self, trial: _Trial) -> None:
        trial.holds_others = False
        for entry in [entry for entry in self._line if not self._is_suspect(entry)]:
            self._line.pop(entry)()

    def _leave_trial(self, leaves: Callable[[Entry], bool]) -> None:
        """Take entries out of the trial, which ends with the last one."""
        assert self._trial is not None
        for entry in filter(leaves, self._trial.entries):
            if entry.is_proven and not entry.num_losses:
                self.tenants.proven(entry.owner)
        self._trial.entries = [entry for entry in self._trial.entries if not leaves(entry)]
        if not self._trial.entries:
            self._group *= 2
            self._end_trial()

    def _end_trial(self) -> None:
        assert self._trial is not None
        self._trial.timer.cancel()
        self._trial = None
        self._leave_lock()
        if self._line:
            self._look_for_next()
        else:
            self._group = 1

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


def _is_over(entry: Entry) -> bool:
    """Whether one on trial need not be looked at any more."""
    return entry.is_closed or entry.place is None or (entry.is_proven and entry.num_losses < MAX_LOSSES)


SUSPECTS = Suspects()
"""Of this process."""
