# SPDX-License-Identifier: Apache-2.0
"""Sees when the event loop of a frontend stands still, and which request was running then. Imports no vLLM.

All requests of a frontend share one loop: while one of them computes on it, the streams of all models pause. A beat on
the loop measures how late it comes. A thread beside it looks who is at work when a beat is overdue, because nobody else
can say so before the loop goes on, if it does.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import os
import sys
import threading
import time
from collections.abc import Coroutine, Generator, Mapping
from types import FrameType
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from starlette.types import ASGIApp, Receive, Scope, Send

from tokenpool.metric_registry import metric
from tokenpool.serve.http.request_note import NOTE_KEY, RequestNote

logger = logging.getLogger(__name__)
_T = TypeVar("_T")

STALL_S = 0.2
"""How long the loop may stand still before the log tells of it."""
OVER_S = (0.05, STALL_S, 1.0, 5.0)
"""Stand-stills are counted by the largest of these that they exceed, and by all smaller ones."""
_BEAT_S = 0.05
_WINDOW_S = 30.0
_WAITS = frozenset(("threading.py", "queue.py", "selectors.py", "thread.py", "connection.py", "socket.py"))
"""Files of the standard library in which a thread waits."""
_MOST_BESIDE = 4

_LAG_S = metric("loop_lag_seconds").make()
_LAG_MAX_S = metric("loop_lag_max_seconds").make()
_STALLS = metric("loop_stalls").make()

_NOTE: contextvars.ContextVar[RequestNote | None] = contextvars.ContextVar("tokenpool_note", default=None)


class LoopWatch:
    """The watch of one event loop; `start` and `stop` are called on it."""

    def __init__(self) -> None:
        self._notes: WeakKeyDictionary[asyncio.Task[Any], RequestNote] = WeakKeyDictionary()
        self._due_s = 0.0
        self._cpu_s = self._all_cpu_s = 0.0  # that the loop's thread, and the process, had used at the last beat
        self._told_due_s = 0.0  # of the beat whose lateness was told last
        self._level = logging.INFO  # at which it was told
        self._max_s = [0.0, 0.0]  # in this window and in the one before
        self._window_end_s = 0.0
        self._beat: asyncio.TimerHandle | None = None
        self._ended = threading.Event()

    def start(self) -> None:
        """Watch the running loop; tasks that a request starts are known as its own from now on."""
        self._loop = asyncio.get_running_loop()
        self._loop.set_task_factory(self._make_task)
        self._thread_id = threading.get_ident()
        for over_s in OVER_S:
            _STALLS.labels(f"{over_s:g}")
        self._schedule()
        threading.Thread(target=self._look, name="loop-watch", daemon=True).start()

    def stop(self) -> None:
        """End the watch."""
        self._ended.set()
        if self._beat is not None:
            self._beat.cancel()

    def around(self, app: ASGIApp) -> ASGIApp:
        """Return `app` with each request known while it runs."""

        async def watched(scope: Scope, receive: Receive, send: Send) -> None:
            note = scope[NOTE_KEY] = RequestNote.of(scope)
            token = _NOTE.set(note)
            task = asyncio.current_task()
            assert task is not None
            self._notes[task] = note
            try:
                await app(scope, receive, send)
            finally:
                note.is_over = True
                _NOTE.reset(token)

        return watched

    def _make_task(
        self, loop: asyncio.AbstractEventLoop, work: Coroutine[Any, Any, _T] | Generator[Any, None, _T], **options: Any
    ) -> asyncio.Future[_T]:
        task = asyncio.Task(work, loop=loop, **options)
        if (note := _NOTE.get()) is not None and not note.is_over:
            self._notes[task] = note
        return task

    # -- on the loop ---------------------------------------------------------------------------------

    def _schedule(self) -> None:
        self._due_s = time.monotonic() + _BEAT_S
        self._cpu_s, self._all_cpu_s = time.thread_time(), time.process_time()
        self._beat = self._loop.call_later(_BEAT_S, self._on_beat)

    def _on_beat(self) -> None:
        due_s, now_s = self._due_s, time.monotonic()
        late_s = max(0.0, now_s - due_s)
        # CPU seconds much below `late_s`: other threads of the process had the CPU, or else other processes.
        cpu = f"cpu_seconds={time.thread_time() - self._cpu_s:.2f}"
        cpu += f" process_cpu_seconds={time.process_time() - self._all_cpu_s:.2f}"
        self._schedule()
        self._count(late_s, now_s)
        if due_s == self._told_due_s:
            logger.log(self._level, "event loop goes on seconds=%.2f %s", late_s, cpu)
        elif late_s > STALL_S:
            logger.warning("event loop stood still seconds=%.2f %s, nobody saw why", late_s, cpu)

    def _count(self, late_s: float, now_s: float) -> None:
        _LAG_S.inc(late_s)
        for over_s in OVER_S:
            if late_s > over_s:
                _STALLS.labels(f"{over_s:g}").inc()
        rolls = now_s > self._window_end_s
        if rolls:
            self._max_s, self._window_end_s = [0.0, self._max_s[0]], now_s + _WINDOW_S
        if rolls or late_s > self._max_s[0]:
            self._max_s[0] = max(self._max_s[0], late_s)
            _LAG_MAX_S.set(max(self._max_s))

    # -- beside it -----------------------------------------------------------------------------------

    def _look(self) -> None:
        while not self._ended.wait(_BEAT_S):
            due_s = self._due_s
            late_s = time.monotonic() - due_s
            if late_s > STALL_S and due_s != self._told_due_s:
                self._told_due_s = due_s
                task = asyncio.current_task(self._loop)
                note = self._notes.get(task) if task is not None else None
                is_asked = note is not None and not note.is_over  # else the pool itself is at work, as while it loads
                self._level = logging.WARNING if is_asked else logging.INFO
                who = note if is_asked else "request=none"
                frames = sys._current_frames()
                at = _where(frames[self._thread_id]) if self._thread_id in frames else "unknown"
                logger.log(self._level, "event loop stands still seconds=%.2f at=%s beside=%s %s", late_s, at,
                           ",".join(self._beside(frames)) or "none", who)  # fmt: skip

    def _beside(self, frames: Mapping[int, FrameType]) -> list[str]:
        """Where the other threads are that may hold the interpreter, at most a few: those that do not wait."""
        others = [frame for thread, frame in frames.items() if thread not in (self._thread_id, threading.get_ident())]
        busy = [frame for frame in others if os.path.basename(frame.f_code.co_filename) not in _WAITS]
        return [_where(frame) for frame in busy[:_MOST_BESIDE]]


def _where(frame: FrameType) -> str:
    """The line of code that a thread is in."""
    code = frame.f_code
    folder, name = os.path.split(code.co_filename)
    return f"{os.path.basename(folder)}/{name}:{frame.f_lineno}:{code.co_name}"
