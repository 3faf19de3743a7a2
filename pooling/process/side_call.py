# SPDX-License-Identifier: Apache-2.0
"""Makes calls that nothing can end on threads of their own, so that one waits for each only as long as it may take."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Generic, TypeVar

from tokenpool.process.affinity import leave_to_others, use_all_cpus, yield_to_others

_LOOK_S = 0.02
_MOST_IDLE = 4
_LAST = 19  # there may be one for each request that runs
_T = TypeVar("_T")


class SideCalls(Generic[_T]):
    """Calls of one kind, of which at most so many go on after nobody waits for them; for any thread.

    The calls must let go of the interpreter while they compute, as those of C++ do, or nothing else runs meanwhile.
    """

    def __init__(self, name: str, most: int) -> None:
        self._name = name
        self._most = most
        self._lock = threading.Lock()
        self._idle: list[_Worker] = []
        self._left: set[_Worker] = set()

    @property
    def is_full(self) -> bool:
        """Whether as many go on as may."""
        return len(self._left) >= self._most

    def begin(self, call: Callable[[], _T]) -> SideCall[_T]:
        """Begin the call. Whoever drops the handle has left the call."""
        with self._lock:
            worker = self._idle.pop() if self._idle else None
        worker = worker or _Worker(self._name, self._ended)
        made: SideCall[_T] = SideCall(worker, self._leave)
        worker.jobs.put((call, made._answer))
        return made

    def run(self, call: Callable[[], _T], limit_s: float) -> tuple[_T, float]:
        """The call's result and the CPU seconds that it took; raises what it raises.

        Raises SideCallError when it has used `limit_s` of CPU time. From then on it has the cores that others leave.
        """
        made = self.begin(call)
        while not made.wait(_LOOK_S):
            if (used_s := made.used_s) > limit_s:
                made.leave()
                raise SideCallError(used_s)
        return made.result(), made.used_s

    def _leave(self, worker: _Worker, answer: Future[Any]) -> None:
        with self._lock:
            if not answer.done():
                self._left.add(worker)

    def _ended(self, worker: _Worker) -> bool:
        """Whether a worker that has made its call waits for the next one."""
        with self._lock:
            self._left.discard(worker)
            goes_on = not worker.yields and len(self._idle) < _MOST_IDLE
            if goes_on:
                self._idle.append(worker)
        return goes_on


class SideCall(Generic[_T]):
    """A call under way; used by one thread at a time."""

    def __init__(self, worker: _Worker, leave: Callable[[_Worker, Future[Any]], None]) -> None:
        self._worker, self._leave = worker, leave
        self._answer: Future[tuple[_T, float]] = Future()

    @property
    def is_done(self) -> bool:
        """Whether it has ended."""
        return self._answer.done()

    def wait(self, limit_s: float) -> bool:
        """Wait so many seconds at most for its end; returns `is_done`."""
        if not self._answer.done():
            try:
                self._answer.exception(limit_s)
            except TimeoutError:
                return self._answer.done()
        return True

    def result(self) -> _T:
        """What it gave, once it is done; raises what it raised."""
        return self._answer.result()[0]

    @property
    def used_s(self) -> float:
        """CPU seconds that it has used so far; 0 for one that raised an exception."""
        used_s = self._worker.used_s(self._answer)
        if self._answer.done():
            return 0.0 if self._answer.exception() is not None else self._answer.result()[1]
        return used_s

    def give_way(self) -> None:
        """Let it have the cores after others from now on; one that has ended stays as it is."""
        self._worker.give_way(self._answer, _yield)

    def leave(self) -> None:
        """Nobody waits for it any more: it has the cores that others leave."""
        if not self._answer.done():
            self._leave(self._worker, self._answer)
            self._worker.give_way(self._answer, leave_to_others)

    def __del__(self) -> None:
        self.leave()


class _Worker:
    """A thread that makes one call after another, until one of them had to give way: that cannot be taken back."""

    def __init__(self, name: str, ended: Callable[[_Worker], bool]) -> None:
        self.jobs: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]]] = queue.SimpleQueue()
        self.yields = False
        self._ended = ended
        self._lock = threading.Lock()  # the thread has not ended, nor begun another call, while it is held
        self._at: tuple[Future[Any], int, float] | None = None  # its call, its clock, and what that showed
        self._wish: tuple[Future[Any], Callable[[int], None]] | None = None  # of a call that it has not begun
        self._native_id = 0
        threading.Thread(target=self._work, name=name, daemon=True).start()

    def used_s(self, answer: Future[Any]) -> float:
        """CPU seconds of the call with this answer; 0 when it is not this thread's now."""
        with self._lock:
            if self._at is None or self._at[0] is not answer:
                return 0.0
            return time.clock_gettime(self._at[1]) - self._at[2]

    def give_way(self, answer: Future[Any], how: Callable[[int], None]) -> None:
        """Change what the thread has of the cores while it makes that call, and for good."""
        with self._lock:
            if self._at is None or self._at[0] is not answer:
                self._wish = answer, how
                return
            self.yields = True
            how(self._native_id)

    def _work(self) -> None:
        use_all_cpus()
        self._native_id = threading.get_native_id()
        clock = time.pthread_getcpuclockid(threading.get_ident())
        goes_on = True
        while goes_on:
            call, answer = self.jobs.get()
            with self._lock:
                self._at = answer, clock, time.thread_time()
            if self._wish is not None and self._wish[0] is answer:
                self.give_way(*self._wish)
            try:
                result, error = call(), None
            except BaseException as raised:  # the caller's, whatever it is
                result, error = None, raised
            used_s = time.thread_time() - self._at[2]
            with self._lock:
                self._at = self._wish = None
            if error is None:
                answer.set_result((result, used_s))
            else:
                answer.set_exception(error)
            goes_on = self._ended(self)
            del call, answer, result, error  # an idle thread holds nothing


def _yield(thread: int) -> None:
    yield_to_others(thread, niceness=_LAST)


class SideCallError(Exception):
    """A call has used its time."""

    def __init__(self, used_s: float) -> None:
        super().__init__(f"it has used {used_s:.2f} s")
        self.used_s = used_s
        """CPU seconds until then."""
