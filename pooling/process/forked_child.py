# SPDX-License-Identifier: Apache-2.0
"""A child process that another process has forked for this one, with what `subprocess.Popen` has of its own."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import select
import signal
import subprocess
import threading
from collections.abc import Iterator

_PR_SET_CHILD_SUBREAPER, _PR_GET_CHILD_SUBREAPER = 36, 37
_LOST_STATUS = 255
"""Exit status of a child whose real one somebody else has taken; asyncio's word for it."""
_adopting = threading.Lock()


@contextlib.contextmanager
def adopting_orphans() -> Iterator[None]:
    """For the time of the block, processes below this one whose parent ends become children of this one.

    One block at a time in this process. Raises OSError where the kernel has no such thing.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    was_set = ctypes.c_int()
    with _adopting:
        if libc.prctl(_PR_GET_CHILD_SUBREAPER, ctypes.byref(was_set)) or libc.prctl(_PR_SET_CHILD_SUBREAPER, 1):
            raise OSError(ctypes.get_errno(), "this kernel lets no process adopt orphans")
        try:
            yield
        finally:
            libc.prctl(_PR_SET_CHILD_SUBREAPER, was_set.value)


class ForkedChild:
    """A child of this process that it did not start itself; usable from any thread.

    It is known by a file descriptor, so no signal ever reaches another process that has its number.
    """

    def __init__(self, pid: int) -> None:
        """Raises OSError when there is no such child, or the kernel has no descriptors of processes."""
        self.pid = pid
        self._file = os.pidfd_open(pid)
        self._lock = threading.Lock()
        self._status: int | None = None

    def fileno(self) -> int:
        """A descriptor that is readable once the child has ended; open as long as this object is there."""
        return self._file

    def __del__(self) -> None:
        if (file := getattr(self, "_file", None)) is not None:
            os.close(file)

    @property
    def returncode(self) -> int | None:
        """The exit status, negative for a signal; None while it runs."""
        return self.poll()

    def poll(self) -> int | None:
        """See `returncode`."""
        with self._lock:
            if self._status is None:
                self._status = self._collect()
            return self._status

    def wait(self, timeout: float | None = None) -> int:
        """Wait until it ends and return `returncode`; raises subprocess.TimeoutExpired."""
        poller = select.poll()
        poller.register(self._file, select.POLLIN)
        while (status := self.poll()) is None:
            if not poller.poll(None if timeout is None else 1000 * timeout):
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0.0)
        return status

    def send_signal(self, number: int) -> None:
        """Send a signal, unless it has ended."""
        with self._lock:
            if self._status is None:
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(self._file, number)

    def terminate(self) -> None:
        """Ask it to end."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """End it at once."""
        self.send_signal(signal.SIGKILL)

    def _collect(self) -> int | None:
        try:
            ended = os.waitid(os.P_PIDFD, self._file, os.WEXITED | os.WNOHANG)
        except ChildProcessError:
            return _LOST_STATUS
        if ended is None:
            return None
        return ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status


class WatchedChild:
    """A forked child as `asyncio.subprocess.Process` shows a spawned one; made and used on an event loop."""

    def __init__(self, child: ForkedChild) -> None:
        self._child = child
        self._ended = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(child.fileno(), self._note_end)

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._child.pid

    @property
    def returncode(self) -> int | None:
        """Its exit status, negative for a signal; None until the loop has seen its end."""
        return self._child.returncode if self._ended.is_set() else None

    async def wait(self) -> int:
        """Wait until it ends; returns its exit status."""
        await self._ended.wait()
        status = self._child.returncode
        assert status is not None
        return status

    def terminate(self) -> None:
        """Ask it to end."""
        self._child.terminate()

    def kill(self) -> None:
        """End it at once."""
        self._child.kill()

    def _note_end(self) -> None:
        self._loop.remove_reader(self._child.fileno())
        self._child.wait()
        self._ended.set()
