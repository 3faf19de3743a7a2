# SPDX-License-Identifier: Apache-2.0
"""A rank that follows builds on a thread of its own, as rank 0 does (build_lane.py): modes of torch are a thread's."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import TypeVar

_T = TypeVar("_T")


class SideThread:
    """Runs work on the side; it holds still whenever the thread that asked for it does something, and vice versa."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "build")
        self._thread = 0
        self._holds: SimpleQueue[bool] = SimpleQueue()
        self._go: SimpleQueue[BaseException | None] = SimpleQueue()

    @property
    def is_here(self) -> bool:
        """Whether this is the thread at the side."""
        return threading.get_ident() == self._thread

    def run(self, work: Callable[[], _T], serve: Callable[[], None]) -> _T:
        """Run `work` there and return what it gives; whenever it holds, `serve` here. What that raises goes there."""

        def known() -> _T:
            self._thread = threading.get_ident()
            return work()

        future = self._pool.submit(known)
        future.add_done_callback(lambda _: self._holds.put(False))
        while self._holds.get():
            try:
                serve()
            except BaseException as error:
                self._go.put(error)
                if not isinstance(error, Exception):
                    raise
            else:
                self._go.put(None)
        return future.result()

    def hold(self) -> None:
        """At the side: wait until the other thread has served; raises what it raised."""
        self._holds.put(True)
        if (error := self._go.get()) is not None:
            raise error
