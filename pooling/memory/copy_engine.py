# SPDX-License-Identifier: Apache-2.0
"""Long copies beside the host loop: jobs that one side thread runs in the order in which they came.

A job works in chunks and says after each how far it is. Cancelling takes effect at the next such point, and at once for
a job that has not begun, so nobody waits longer than for one chunk. What a job did is used only after it is done, on
the thread that submitted it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

logger = logging.getLogger(__name__)


class JobCancelled(BaseException):
    """Raised inside a job's work when somebody cancelled the job; it never leaves `CopyJob.run`.

    No Exception, so that code which the work calls and which handles those lets it pass.
    """


Work = Callable[["CopyJob"], Any]
"""What a job does: reports bytes through `job.advance` at least once per chunk and returns the job's result."""


class CopyJob:
    """One piece of work and how far it is; its state may be read, and the job cancelled, from any thread."""

    num_chunks = 0
    """Chunks that all jobs of the process have reported, about: it changes while any of them gets on."""

    def __init__(self, label: str, total_bytes: int, work: Work, notify: Callable[[CopyJob], None]) -> None:
        self.label = label
        self.total_bytes = total_bytes
        """Bytes that the work will report; an estimate where the work reads a checkpoint."""
        self.progress = 0
        """Bytes reported so far."""
        self.error: Exception | None = None
        """What the work raised; set before the job is done, never JobCancelled."""
        self.result: Any = None
        """What the work returned; None unless the job succeeded."""
        self.seconds = 0.0
        """How long the work ran; 0 until it is done."""
        self._work = [work]  # until somebody takes it: the thread that runs it, or who cancels it before
        self._notify = notify
        self._cancel = False
        self._stopped_early = False
        self._began_s: float | None = None
        self._ended = threading.Event()

    def advance(self, nbytes: int) -> None:
        """Report `nbytes` more, from inside the work; raises JobCancelled once the job is cancelled."""
        self.progress += nbytes
        CopyJob.num_chunks += 1
        if self._cancel:
            raise JobCancelled

    def cancel(self) -> None:
        """Ask the work to stop at its next chunk; a job that is done stays as it is.

        One that has not begun ends at once, however long those before it take.
        """
        self._cancel = True
        if self._take() is not None:
            self._stopped_early = True
            self._ended.set()

    def done(self) -> bool:
        """True once the work has ended, whatever the outcome."""
        return self._ended.is_set()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait at most `timeout` seconds, or for ever, until the job is done; returns whether it is."""
        return self._ended.wait(timeout)

    @property
    def cancelled(self) -> bool:
        """True when the job is done because it was cancelled; it did only part of its work or none."""
        return self._stopped_early and self.done()

    @property
    def succeeded(self) -> bool:
        """True when the job is done and did all of its work."""
        return self.done() and self.error is None and not self._stopped_early

    @property
    def running_s(self) -> float:
        """How long the work has been running so far; 0 before it begins."""
        return time.perf_counter() - self._began_s if self._began_s is not None else 0.0

    @property
    def problem(self) -> str:
        """Why a job that is done did not succeed, in one line."""
        return f"{type(self.error).__name__}: {self.error}" if self.error else "it was cancelled"

    def run(self) -> None:
        """Do the work on this thread; called once, by the engine or by who wants to wait for it anyway.

        Without effect on a job that was cancelled before.
        """
        if (work := self._take()) is None:
            assert self.cancelled, "a job runs once"
            return
        start = self._began_s = time.perf_counter()
        try:
            self.advance(0)
            self.result = work(self)
        except JobCancelled:
            self._stopped_early = True
        except Exception as error:  # goes to whoever finishes the job
            self.error = error
        except BaseException as error:  # so does this: the code of a model may call sys.exit, and there are other jobs
            self.error = RuntimeError(f"it ended by {type(error).__name__}: {error}")
            self.error.__cause__ = error
            if isinstance(error, KeyboardInterrupt):  # is for the process, and comes on its main thread only
                raise
        finally:
            del work
            self.seconds = time.perf_counter() - start
            self._ended.set()
            self._tell()

    def _take(self) -> Work | None:
        """The work, for one caller only: what it holds on to is freed when that one lets go of it."""
        try:
            return self._work.pop()
        except IndexError:
            return None

    def _tell(self) -> None:
        try:
            self._notify(self)
        except Exception:  # the thread must live on for the other jobs
            logger.exception("notify failed job=%s", self.label)


class CopyEngine:
    """One side thread with a queue of jobs; all methods may be called from any thread.

    `on_start` runs once on the new thread, before the first job; it may set the cores that the thread runs on.
    `notify` is called with each job that has ended, on the side thread; with none that was cancelled before it began.
    """

    def __init__(
        self,
        *,
        on_start: Callable[[], None] | None = None,
        notify: Callable[[CopyJob], None] | None = None,
        name: str = "weights-copy",
    ) -> None:
        self.notify: Callable[[CopyJob], None] = notify or (lambda job: None)
        self._on_start = on_start
        self.name = name
        """Of the side thread."""
        self._jobs: deque[CopyJob] = deque()
        self._wake = threading.Condition()
        self._closed = False
        self._current: CopyJob | None = None
        self._thread: threading.Thread | None = None

    def job(self, label: str, total_bytes: int, work: Work) -> CopyJob:
        """Make a job without running it."""
        return CopyJob(label, total_bytes, work, lambda job: self.notify(job))

    def submit(self, label: str, total_bytes: int, work: Work) -> CopyJob:
        """Queue a job for the side thread; raises RuntimeError after `close`."""
        job = self.job(label, total_bytes, work)
        with self._wake:
            if self._closed:
                raise RuntimeError(f"the copy engine is closed: cannot take job {label!r}")
            if self._thread is None:  # a host that never moves weights needs no thread
                self._thread = threading.Thread(target=self._run, name=self.name, daemon=True)
                self._thread.start()
            self._jobs.append(job)
            self._wake.notify()
        return job

    @property
    def current(self) -> CopyJob | None:
        """The job that the side thread has in hand."""
        return self._current

    def pending(self) -> int:
        """Jobs that are queued or running."""
        with self._wake:
            return len(self._jobs) + (self._current is not None)

    def close(self) -> None:
        """Cancel everything, wait for the running chunk and end the thread; may be called twice."""
        with self._wake:
            self._closed = True
            for job in (*self._jobs, *([self._current] if self._current else [])):
                job.cancel()
            self._wake.notify()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        try:
            if self._on_start is not None:
                self._on_start()
        except Exception:  # a thread on the wrong cores is slow, no thread would hang the host
            logger.exception("the copy thread could not be set up")
        while True:
            with self._wake:
                self._current = None
                while not self._jobs:
                    if self._closed:
                        return
                    self._wake.wait()
                self._current = job = self._jobs.popleft()
            job.run()
            del job
