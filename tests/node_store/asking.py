# SPDX-License-Identifier: Apache-2.0
"""What tests ask of a store's keeper, and how they end it."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path
from typing import Any

from tests.helpers.server import is_running, poll
from tokenpool.node_store.messages import MESSAGE_BYTES, Show, pack, read_answer
from tokenpool.node_store.place import connect

MIB = 1 << 20
BUDGET = 64 * MIB


def keeper_pid(folder: Path) -> int:
    return book(folder)["pid"]


def book(folder: Path) -> dict[str, Any]:
    """What the keeper says to whoever asks; it looks at its own books before."""
    try:
        with connect(folder, 20.0) as line:
            line.send(pack(Show()))
            if content := line.recv(MESSAGE_BYTES):
                return read_answer(content).book
    except (ConnectionError, FileNotFoundError):
        pass
    return {"hosts": 0, "copies": {}, "pid": 0}  # one has ended, and the next one is not there yet


def end_keeper(folder: Path) -> None:
    pid = keeper_pid(folder)
    assert pid > 0, "there is no keeper"
    os.kill(pid, signal.SIGKILL)
    poll(lambda: not is_running(pid))


def kill_keeper(folder: Path) -> None:
    """End the keeper if there is one."""
    with contextlib.suppress(OSError):
        if (pid := keeper_pid(folder)) > 0:
            os.kill(pid, signal.SIGKILL)
