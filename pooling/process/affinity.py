# SPDX-License-Identifier: Apache-2.0
"""Which cores threads run on, and which run after others.

OpenMP binds the thread that loads it to one core, and every thread started from there inherits that: sockets and
control would fight the model for its core. So those are let loose. Import this module before torch.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

ALL_CPUS = frozenset(os.sched_getaffinity(0))
"""The cores of this process before anything was bound."""
_LAST = 10


def use_all_cpus() -> None:
    """Let the calling thread run on all cores of the process."""
    os.sched_setaffinity(0, ALL_CPUS)


def yield_to_others(thread: int | None = None, niceness: int = _LAST) -> None:
    """Let a thread, and those that it starts from now on, have the cores only where others leave them.

    `thread` is its id in the system; None = the calling one. `niceness` is of 19 steps: with 10 it gets a tenth of
    what a thread without any gets, with 15 a thirtieth. For work that can take seconds beside steps or an event
    loop. Where the system refuses, or the thread has ended, all stays as it is.
    """
    if thread is None:
        thread = threading.get_native_id()
    with suppress(OSError):
        os.sched_setaffinity(thread, ALL_CPUS)
        os.setpriority(os.PRIO_PROCESS, thread, max(niceness, os.getpriority(os.PRIO_PROCESS, thread)))


def leave_to_others(thread: int) -> None:
    """Let a thread, by its id in the system, compute where a core would idle: work that nobody waits for any more.

    Even many of them take next to nothing from the others, while sixteen that yield have half of a core. For what
    holds no lock that others wait for. Where the system has no such class of threads, they yield.
    """
    yield_to_others(thread)
    with suppress(OSError, AttributeError):
        os.sched_setscheduler(thread, os.SCHED_IDLE, os.sched_param(0))


@contextmanager
def unpinned() -> Iterator[None]:
    """Let threads started inside the block run on all cores of the process."""
    bound = os.sched_getaffinity(0)
    use_all_cpus()
    try:
        yield
    finally:
        os.sched_setaffinity(0, bound)
