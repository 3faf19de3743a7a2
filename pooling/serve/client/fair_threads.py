# SPDX-License-Identifier: Apache-2.0
"""Runs what would hold an event loop up on a few threads, in turn of who asked for it.

A thread cannot be ended. So one whose work takes too long keeps its place until it is done, and no owner may have more
than a part of the places: who sends what takes for ever keeps himself waiting, not the others.
"""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

from tokenpool.process.affinity import yield_to_others

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, eq=False)
class _Task(Generic[_T]):
    work: Callable[[], _T]
    future: Future[_T]

    def run(self) -> None:
        if not self.future.set_running_or_notify_cancel():
            return
        try:
            result = self.work()
        except BaseException as error:  # the caller's, whatever it is
            self.future.set_exception(error)
        else:
            self.future.set_result(result)


class FairThreads:
    """Its threads yield the cores to all others, end when nothing waits, and keep no process alive; for any thread."""

    def __init__(self, name: str, places: int, places_each: int) -> None:
        """At most `places` tasks run at a time, and `places_each` of one owner."""
        self._name, self._places, self._places_each = name, places, places_each
        self._lock = threading.Lock()
        self._waiting: OrderedDict[str, OrderedDict[_Task[Any], None]] = OrderedDict()
        self._running: Counter[str] = Counter()
        self._is_closed = False

    @property
    def num_running(self) -> int:
        """Tasks that have a place, those that nobody waits for any more included."""
        return self._running.total()

    def submit(self, owner: str, work: Callable[[], _T]) -> Future[_T]:
        """Begin `work` when it is its turn; one whose future is cancelled before is let go at once.

        An owner's own tasks keep their order. Raises RuntimeError after `shutdown`; a future has one if no thread can
        be started for it.
        """
        task, failed = _Task(work, Future[_T]()), None
        with self._lock:
            if self._is_closed:
                raise RuntimeError("nothing more is taken: its model is gone")
            self._waiting.setdefault(owner, OrderedDict())[task] = None
            while failed is None and (following := self._next()) is not None:
                failed = self._begin(*following)
        if failed is not None:
            failed.run()
        task.future.add_done_callback(lambda future: self._let_go(owner, task) if future.cancelled() else None)
        return task.future

    def shutdown(self) -> None:
        """Take no more, and cancel what waits; what runs is not waited for."""
        with self._lock:
            self._is_closed = True
            waiting = [task for tasks in self._waiting.values() for task in tasks]
        for task in waiting:
            task.future.cancel()

    def _next(self) -> tuple[str, _Task[Any]] | None:
        """Whose turn it is, with his first task, if there is a place; he goes behind the others."""
        if self._running.total() >= self._places:
            return None
        owner = next((owner for owner in self._waiting if self._running[owner] < self._places_each), None)
        if owner is None:
            return None
        tasks = self._waiting.pop(owner)
        task, _ = tasks.popitem(last=False)
        if tasks:
            self._waiting[owner] = tasks
        self._running[owner] += 1
        return owner, task

    def _begin(self, owner: str, task: _Task[Any]) -> _Task[Any] | None:
        """Start a thread; if that cannot be its place is free again, and what says so is to be run instead."""
        try:
            threading.Thread(target=partial(self._work, owner, task), name=self._name, daemon=True).start()
        except RuntimeError as error:
            self._leave(owner)
            return _Task(partial(_raise, error), task.future)
        return None

    def _leave(self, owner: str) -> None:
        self._running[owner] -= 1
        self._running += Counter()  # drops owners without any

    def _work(self, owner: str, task: _Task[Any]) -> None:
        yield_to_others()
        while True:
            task.run()
            with self._lock:
                self._leave(owner)
                following = self._next()
            if following is None:
                return
            owner, task = following

    def _let_go(self, owner: str, task: _Task[Any]) -> None:
        with self._lock:
            tasks = self._waiting.get(owner)
            if tasks is not None and task in tasks:
                del tasks[task]
                if not tasks:
                    del self._waiting[owner]


def _raise(error: Exception) -> None:
    raise error
