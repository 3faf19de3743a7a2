# SPDX-License-Identifier: Apache-2.0
"""Gives memory back: of engines and of their clients that are gone to the process, of bodies to the system."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import inspect
import traceback
from collections.abc import Callable

from prometheus_client import values

_WORTH_BYTES = 8 << 20
_WAIT_S = 5.0
_AGAIN_S = 20.0


def release_engine(error: BaseException | None = None) -> None:
    """Collect the cycles of an engine that nothing refers to but, with `error`, the frames of a failed build.

    vLLM freezes the heap after each build, which hides the engine from the collector. Costs a full collection.
    """
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
    gc.unfreeze()
    gc.collect()
    gc.freeze()


def release_metrics() -> None:
    """Let go of the values of metrics that nobody else refers to.

    In its multiprocess mode prometheus_client keeps all values that it ever made, to begin them anew after a fork; none
    of ours forks once it has some. The values of a model, about 330, take 0.3 MB.
    """
    kept = inspect.getclosurevars(values.ValueClass.__init__).nonlocals.get("values")
    if kept is not None:  # there are none in its other mode
        kept.clear()


def trim_heap() -> bool:
    """Give free memory of the C library's heaps back to the system; False where it cannot: only glibc does.

    Other threads compute meanwhile, but wait where they ask for memory of the heap that is looked through: some
    milliseconds for each hundred megabytes.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    return trim is not None and trim(0) >= 0


class HeapTrimmer:
    """Trims the heap some time after much was freed. glibc keeps what lies between pieces that are in use.

    Once nothing large has come for a while it does so again, and collects cycles before: threads may have computed on
    for requests that were over, and errors of requests hold each other, with what was wrong, until they are collected.

    Lives on one event loop, beside which it trims, at most once in `_WAIT_S` seconds.
    """

    def __init__(self, trim: Callable[[], object] = trim_heap) -> None:
        self._trim = trim
        self._num_bytes = 0  # since the last time
        self._is_due = False
        self._again: asyncio.TimerHandle | None = None

    def freed(self, num_bytes: int) -> None:
        """So much has been freed, or will be in a moment; called on the loop."""
        self._num_bytes += num_bytes
        if self._num_bytes >= _WORTH_BYTES and not self._is_due:
            self._is_due = True
            loop = asyncio.get_running_loop()
            if self._again is not None:
                self._again.cancel()
            loop.call_later(_WAIT_S, self._begin, loop)

    def _begin(self, loop: asyncio.AbstractEventLoop) -> None:
        self._num_bytes = 0
        loop.run_in_executor(None, self._trim).add_done_callback(self._end)

    def _end(self, done: asyncio.Future[object]) -> None:
        self._is_due = False
        _look_at(done)
        self._again = done.get_loop().call_later(_AGAIN_S, self._collect_and_trim, done.get_loop())

    def _collect_and_trim(self, loop: asyncio.AbstractEventLoop) -> None:
        gc.collect()  # on the loop: what is collected may belong to it
        loop.run_in_executor(None, self._trim).add_done_callback(_look_at)


def _look_at(done: asyncio.Future[object]) -> None:
    if not done.cancelled():
        done.exception()  # a heap that is not trimmed is no fault of a request
