# SPDX-License-Identifier: Apache-2.0
"""Keeps background tasks running: one that dies is logged, counted and started again."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from tokenpool.metric_registry import metric

logger = logging.getLogger(__name__)

RESTART_WAITS_S = (0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
"""Before each attempt in a row to start what has ended; the last one stays."""
STABLE_AFTER_S = 60.0
_FAILURES = metric("task_failures").make()

Work = Callable[[], Coroutine[Any, Any, object]]


class Backoff:
    """The waits of one thing that is started again and again."""

    def __init__(
        self,
        *,
        first_at_once: bool = False,
        stable_after_s: float = STABLE_AFTER_S,
        waits_s: Sequence[float] = RESTART_WAITS_S,
    ) -> None:
        """What ran for `stable_after_s` since its last start begins anew with the shortest wait."""
        self._waits_s: Sequence[float] = (0.0, *waits_s) if first_at_once else waits_s
        self._stable_after_s = stable_after_s
        self._attempt = 0
        self._began_s = time.monotonic()

    def next_s(self) -> float:
        """How long to wait before the attempt that comes now."""
        now_s = time.monotonic()
        if now_s - self._began_s > self._stable_after_s:
            self._attempt = 0
        wait_s = self._waits_s[min(self._attempt, len(self._waits_s) - 1)]
        self._attempt += 1
        self._began_s = now_s + wait_s
        return wait_s

    def reset(self) -> None:
        """It works: the next wait is the shortest."""
        self._attempt = 0


async def keep(task: str, work: Work) -> None:
    """Run `work` until it returns or this is cancelled; when it raises, run it again after a while."""
    backoff = Backoff()
    while True:
        try:
            await work()
            return
        except Exception:  # whatever ends a task that the pool needs, the next run may do better
            wait_s = backoff.next_s()
            note_failure(task, f"again in {wait_s:g} s")
            await asyncio.sleep(wait_s)


def start_kept(task: str, work: Work) -> asyncio.Task[None]:
    """Begin to `keep` a task."""
    return asyncio.create_task(keep(task, work), name=task)


def count_failure(task: str) -> None:
    """Count one more end of `task` that was not wanted."""
    _FAILURES.labels(task).inc()


def note_failure(task: str, what_follows: str) -> None:
    """Log and count the exception that is being handled, as one that ended `task`."""
    count_failure(task)
    logger.exception("background task died task=%s, %s", task.replace(" ", "_"), what_follows)
