# SPDX-License-Identifier: Apache-2.0
"""Waits for a call that nothing can end only as long as it may take; it goes on then, on a thread of its own."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Generic, TypeVar

from tokenpool.process.affinity import yield_to_others

_LOOK_S = 0.02
_T = TypeVar("_T")


class SideCalls(Generic[_T]):
    """Calls of one kind, of which at most so many go on after nobody waits for them; for one thread.

    The calls must let go of the interpreter while they compute, as those of C++ do, or nothing else runs meanwhile.
    """

    def __init__(self, name: str, most: int) -> None:
        self._name = name
        self._most = most
        self._left: list[threading.Thread] = []

    @property
    def is_full(self) -> bool:
        """Whether as many go on as may."""
        self._left = [thread for thread in self._left if thread.is_alive()]
        return len(self._left) >= self._most

    def run(self, call: Callable[[], _T], limit_s: float) -> tuple[_T, float]:
        """The call's result and the CPU seconds that it took; raises what it raises.

        Raises SideCallError when it has used `limit_s` of CPU time. From then on it has the cores that others leave.
        """
        answer: Future[tuple[_T, float]] = Future()
        is_read = threading.Event()

        def work() -> None:
            began_s = time.thread_time()
            try:
                result = call()
            except BaseException as error:
                answer.set_exception(error)
            else:
                answer.set_result((result, time.thread_time() - began_s))
            is_read.wait()  # the thread's clock is read until then

        thread = threading.Thread(target=work, name=self._name, daemon=True)
        thread.start()
        assert thread.ident is not None
        clock = time.pthread_getcpuclockid(thread.ident)
        try:
            while True:
                try:
                    return answer.result(_LOOK_S)
                except TimeoutError:
                    if answer.done():
                        return answer.result()  # it ended just now, or the error is its own
                used_s = time.clock_gettime(clock)
                if used_s > limit_s:
                    yield_to_others(thread.native_id)
                    self._left.append(thread)
                    raise SideCallError(used_s)
        finally:
            is_read.set()


class SideCallError(Exception):
    """A call has used its time."""

    def __init__(self, used_s: float) -> None:
        super().__init__(f"it has used {used_s:.2f} s")
        self.used_s = used_s
        """CPU seconds until then."""
