# SPDX-License-Identifier: Apache-2.0
"""Builds models beside the ones that run: on a thread of its own, but only in slices that the loop grants it."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)
from vllm.utils import torch_utils

from tokenpool.errors import HostError
from tokenpool.host.engine.engine_globals import EngineGlobals

SLICE_S = 0.005
"""How long a build runs at a time, at least, beside models that have work."""

_T = TypeVar("_T")


class BuildLane:
    """Runs jobs one after the other on a side thread that holds still whenever the loop runs, and the other way round.

    So a build needs no locks: nothing happens at the same time, and what it finds at the end of a pause is what the
    loop has left between two steps. It pauses where `pause` is called: between two modules or parameters of a model
    that is made, and between two tensors of its checkpoint. vLLM's globals are exchanged at each pause.
    """

    def __init__(self, engine_globals: EngineGlobals, beat: Callable[[], None] = lambda: None) -> None:
        """`beat` is called whenever a build could pause: it gets on."""
        self._globals = engine_globals
        self._beat = beat
        self._jobs: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._thread: threading.Thread | None = None
        self._go, self._back = threading.Semaphore(0), threading.Semaphore(0)
        self._until_s = 0.0
        self._aborted = False

    @property
    def busy(self) -> bool:
        """Whether a job runs or waits."""
        return self._thread is not None or bool(self._jobs)

    def submit(self, job: Callable[[], _T]) -> Future[_T]:
        """Run `job` after those before it; usable from any thread, but the loop must be woken."""
        future: Future[_T] = Future()
        self._jobs.append((job, future))
        return future

    def run_slice(self, *, beside: bool) -> None:
        """Let the present job go on for about SLICE_S; called on the loop's thread.

        Unless `beside`, a job that has not begun runs to its end here: it has nothing to wait for, and the first
        engine of a process binds the cores of the thread it is built on, which must be the one that steps.
        """
        if self._thread is None:
            if not self._jobs:
                return
            job, future = self._jobs.popleft()
            if not beside:
                _settle(future, job)
                return
            if not self._begin(job, future):
                return
        self._until_s = time.perf_counter() + SLICE_S
        self._go.release()
        self._back.acquire()

    def pause(self) -> None:
        """Give way to the loop when the slice is over; does nothing on other threads.

        Raises HostError in a job that is not to go on.
        """
        self.note_progress()
        if threading.current_thread() is not self._thread or time.perf_counter() < self._until_s:
            return
        with self._globals.build_paused():
            self._back.release()
            self._go.acquire()
        if self._aborted:
            raise HostError("the host is ending: the model is not added")

    def note_progress(self) -> None:
        """A build gets on, where it cannot give way."""
        self._beat()

    def abort(self) -> None:
        """Let the present job fail at its next pause, and those that wait at once."""
        self._aborted = True
        while self._jobs:
            _settle(self._jobs.popleft()[1], _refuse)

    @contextmanager
    def pausing(self) -> Iterator[None]:
        """Pause whenever a module or parameter is registered on this thread in the block."""
        hooks = [
            register_module_module_registration_hook(self._registered),
            register_module_parameter_registration_hook(self._registered),
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _registered(self, *_: Any) -> None:
        self.pause()

    def _begin(self, job: Callable[[], Any], future: Future[Any]) -> bool:
        """Start the thread of a job; if there is none to be had, the job has failed."""
        args = (job, future, engine_stream())
        self._thread = threading.Thread(target=self._work, args=args, name="build", daemon=True)
        try:
            self._thread.start()
        except RuntimeError as error:  # the system gives no more threads
            self._thread = None
            future.set_exception(error)
            return False
        return True

    def _work(self, job: Callable[[], Any], future: Future[Any], stream: Any) -> None:
        self._go.acquire()
        try:
            _settle(future, on_stream(stream, job))
        finally:  # whatever happens: the loop holds still until then
            self._thread = None
            self._back.release()


def engine_stream() -> Any:
    """The stream on which this thread's engines compute, None without CUDA.

    A stream is current per thread, and runners remember the one on which they were warmed up: a model that is built on
    a side thread must find the stream on which it will be stepped.
    """
    return torch_utils.current_stream() if torch.cuda.is_initialized() else None


def on_stream(stream: Any, job: Callable[[], _T]) -> Callable[[], _T]:
    """A job for a thread of its own, on this stream if there is one."""

    def on_its_stream() -> _T:
        if stream is not None:
            torch.cuda.set_stream(stream)
        return job()

    return on_its_stream


def _refuse() -> None:
    raise HostError("the host is ending: the model is not added")


def _settle(future: Future[Any], job: Callable[[], Any]) -> None:
    """Run `job`, unless nobody waits for it any more, and tell the future how it ended, whatever it raised."""
    if not future.set_running_or_notify_cancel():
        return
    try:
        result = job()
    except Exception as error:  # goes to whoever waits for the future
        future.set_exception(error)
    except BaseException as error:  # the code of a model may call sys.exit; waiters take Exceptions for answers
        failure = HostError(f"building ended by {type(error).__name__}: {error}")
        failure.__cause__ = error
        future.set_exception(failure)
        if isinstance(error, KeyboardInterrupt):  # is for the process, and comes on its main thread only
            raise
    else:
        future.set_result(result)
