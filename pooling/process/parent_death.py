# SPDX-License-Identifier: Apache-2.0
"""Ends a process with its parent, or with another one, however that ends."""

from __future__ import annotations

import ctypes
import os
import select
import signal
import threading

_PR_SET_PDEATHSIG = 1


def end_with_parent() -> None:
    """Have the kernel kill this process when its parent is gone; to be called by the child, first of all."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def end_with(pid: int) -> None:
    """Kill this process when the one with `pid` is gone, which need not be its parent.

    Raises OSError where the kernel gives no file for a process (Linux before 5.3, or a container that forbids it).
    """
    try:
        process = os.pidfd_open(pid)  # unlike its number, never another process
    except ProcessLookupError:
        os.kill(os.getpid(), signal.SIGKILL)
        return

    def wait() -> None:
        poller = select.poll()
        poller.register(process, select.POLLIN)
        poller.poll()
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=wait, name="end-with", daemon=True).start()
