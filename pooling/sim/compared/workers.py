# SPDX-License-Identifier: Apache-2.0
"""Calls in several processes: those that are wanted, and, while a process has nothing to do, those that may be next."""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from threading import Condition, Thread
from types import TracebackType
from typing import Any, NamedTuple

_NUM_FLAGS = 4096
"""More than there are ever calls at a time."""
_WANTED = -1


class Call(NamedTuple):
    """A method of one of the subjects and its arguments. Equal names are equal calls."""

    name: Hashable
    subject: int
    method: Callable[..., Any]
    args: Sequence[Any] = ()
    named: Mapping[str, Any] | None = None

    def do(self, subjects: Sequence[Any]) -> Any:
        """Call it here and now."""
        return self.method(subjects[self.subject], *self.args, **(self.named or {}))


@dataclass(eq=False, slots=True)
class _Job:
    call: Call
    number: int
    rank: int = _WANTED
    """Else the place among those that may be wanted, the likeliest has 0."""
    future: Future[Any] = field(default_factory=Future)


class Workers:
    """Calls methods of `subjects` in so many processes, or, with one, in this one and at once. Use it as a context.

    Each process gets the subjects once, when it begins; the rest goes by pickling. Threads may call it at the same
    time. What is wanted goes first: where no process is free, one ends a call for it that only may be wanted.
    """

    def __init__(self, num_processes: int, subjects: Sequence[Any]) -> None:
        self._subjects, self._numbers = subjects, itertools.count()
        self._changed = Condition()
        self._waiting: list[_Job] = []
        self._running: list[_Job] = []
        self._foreseen: dict[Hashable, dict[Hashable, _Job]] = {}  # by line, by name of the call
        self._is_closed, self._error = False, ""
        self._processes: list[BaseProcess] = []
        self._threads: list[Thread] = []
        if num_processes < 2:
            return
        # A process that is begun anew shares no thread and no lock with this one.
        context = get_context("spawn")
        self._flags = context.RawArray("b", _NUM_FLAGS)
        for _ in range(num_processes):
            near, far = context.Pipe()
            process = context.Process(target=_serve, args=(far, list(subjects), self._flags, os.getpid()), daemon=True)
            process.start()
            far.close()
            self._processes.append(process)
            self._threads.append(Thread(target=self._work, args=(near,), daemon=True))
            self._threads[-1].start()

    @property
    def are_several(self) -> bool:
        """Whether calls run side by side."""
        return bool(self._processes)

    def begin(self, call: Call, line: Hashable = None, maybe: Sequence[Call] = ()) -> Future[Any]:
        """Have it called. `maybe` may be wanted next in this line, the likeliest first; what it had before is not.

        The answer raises what the call raises, and RuntimeError if a process died.
        """
        if not self._processes:
            done: Future[Any] = Future()
            done.set_result(call.do(self._subjects))
            return done
        with self._changed:
            if self._error:
                raise RuntimeError(self._error)
            before = self._foreseen.pop(line, {})
            wanted = self._job(call, before, _WANTED)
            kept = {other.name: self._job(other, before, rank) for rank, other in enumerate(maybe)}
            for name, job in before.items():
                if job is not wanted and name not in kept:
                    if job.future.done():
                        kept[name] = job
                    else:
                        self._give_up(job)
            if kept:
                self._foreseen[line] = kept
            self._make_place()
            self._changed.notify_all()
        return wanted.future

    def _job(self, call: Call, before: Mapping[Hashable, _Job], rank: int) -> _Job:
        job = before.get(call.name)
        if job is None:
            job = _Job(call, next(self._numbers) % _NUM_FLAGS)
            self._waiting.append(job)
        job.rank = rank
        return job

    def _give_up(self, job: _Job) -> None:
        if job in self._waiting:
            self._waiting.remove(job)
        elif job in self._running:
            self._flags[job.number] = 1

    def _make_place(self) -> None:
        """End what only may be wanted, the least likely first, as far as what is wanted finds no free process."""
        free = len(self._processes) - len([job for job in self._running if not self._flags[job.number]])
        missing = len([job for job in self._waiting if job.rank == _WANTED]) - free
        others = [job for job in self._running if job.rank != _WANTED and not self._flags[job.number]]
        others.sort(key=lambda job: -job.rank)
        for job in others[: max(0, missing)]:
            self._flags[job.number] = 1
            for line in self._foreseen.values():  # whoever wants it later has it called anew
                if line.get(job.call.name) is job:
                    del line[job.call.name]

    def _work(self, pipe: Connection) -> None:
        """Serve one process, in a thread of its own."""
        with pipe:
            while (job := self._next()) is not None:
                try:
                    pipe.send((job.number, job.call))
                    is_good, answer = pipe.recv()
                except (EOFError, OSError):
                    self.stop("a process that simulates died: it may have run out of memory")
                    is_good, answer = False, RuntimeError(self._error)
                with self._changed:
                    self._running.remove(job)
                if is_good:
                    job.future.set_result(answer)
                else:
                    job.future.set_exception(answer)

    def _next(self) -> _Job | None:
        with self._changed:
            while not (self._waiting or self._is_closed):
                self._changed.wait()
            if self._is_closed:
                return None
            job = min(self._waiting, key=lambda job: job.rank)
            self._waiting.remove(job)
            self._running.append(job)
            self._flags[job.number] = 0
            return job

    def stop(self, why: str) -> None:
        """Begin nothing any more, and end what runs; those who wait for an answer get RuntimeError."""
        with self._changed:
            self._error, failed, self._waiting = self._error or why, self._waiting, []
            self._is_closed = True
            for job in self._running:
                self._flags[job.number] = 1
            self._changed.notify_all()
        for job in failed:
            job.future.set_exception(RuntimeError(self._error))

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop("it was ended")
        for process in self._processes:
            if kind is not None:
                process.terminate()
        for thread in self._threads:
            thread.join()
        for process in self._processes:
            process.join()


class _Here:
    """What a process of `Workers` has."""

    flags: Any = None
    number = parent = 0


def _serve(pipe: Connection, subjects: Sequence[Any], flags: Any, parent: int) -> None:
    """Do what comes through the pipe until it is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that began this one ends it
    _Here.flags, _Here.parent = flags, parent
    while True:
        try:
            _Here.number, call = pipe.recv()
        except (EOFError, OSError):
            return
        try:
            answer = True, call.do(subjects)
        except Exception as error:
            answer = False, error
        try:
            pipe.send(answer)
        except OSError:  # who began this process is gone
            return


def is_unwanted() -> bool:
    """Whether nobody waits any more for the call that runs in this process: it should end soon, with any result."""
    return _Here.flags is not None and (bool(_Here.flags[_Here.number]) or os.getppid() != _Here.parent)
