# SPDX-License-Identifier: Apache-2.0
"""Keeps OpenMP's core pinning to the compute threads.

OpenMP binds the thread that loads it to one core, and every thread started from there inherits that: sockets and
control would fight the model for its core. Import this module before torch.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

ALL_CPUS = frozenset(os.sched_getaffinity(0))
"""The cores of this process before anything was bound."""


def use_all_cpus() -> None:
    """Let the calling thread run on all cores of the process."""
    os.sched_setaffinity(0, ALL_CPUS)


@contextmanager
def unpinned() -> Iterator[None]:
    """Let threads started inside the block run on all cores of the process."""
    bound = os.sched_getaffinity(0)
    use_all_cpus()
    try:
        yield
    finally:
        os.sched_setaffinity(0, bound)
