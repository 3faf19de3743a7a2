# SPDX-License-Identifier: Apache-2.0
"""Functions that other threads want run on the host loop's thread, between two steps."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from tokenpool.errors import EngineLostError, HostError
from tokenpool.wire.pulse import Pulse

_T = TypeVar("_T")


class LoopCalls:
    """A queue of calls; `submit` and `guarded` are for any thread, `run` is for the loop's."""

    def __init__(self, pulse: Pulse) -> None:
        self.lost: EngineLostError | None = None
        """Set by a guarded job on another thread in which an engine was lost: the loop must end."""
        self._pulse = pulse
        self._calls: deque[tuple[Callable[[], Any], Future[Any]]] = deque()

    def __bool__(self) -> bool:
        return bool(self._calls)

    def submit(self, function: Callable[[], _T]) -> Future[_T]:
        """Let the loop run `function`; it must be woken."""
        future: Future[_T] = Future()
        self._calls.append((function, future))
        return future

    def run(self) -> None:
        """Run all calls that wait; those that come meanwhile wait for the next step.

        Raises EngineLostError, for which each caller gets a HostError.
        """
        for _ in range(len(self._calls)):
            function, future = self._calls.popleft()
            self._pulse.enter(f"call {getattr(function, '__name__', '')}")
            try:
                future.set_result(function())
            except EngineLostError as error:
                future.set_exception(HostError(f"the host ends: {error}"))
                raise
            except Exception as error:  # goes to whoever waits for the future
                future.set_exception(error)

    def guarded(self, job: Callable[[], _T]) -> _T:
        """Run a job that may take models off the device: an engine lost in it ends the host, not only the job."""
        try:
            return job()
        except EngineLostError as error:
            self.lost = error
            raise HostError(f"the host ends: {error}") from error
