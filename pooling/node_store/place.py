# SPDX-License-Identifier: Apache-2.0
"""Where the keeper of a store is found: a socket in a folder that only its user reaches; one keeper has its lock.

A path of a socket has at most 107 bytes; it is therefore named by a descriptor of its folder.
"""

from __future__ import annotations

import fcntl
import os
import socket
import stat
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from tokenpool.errors import HostError

_SOCKET, LOG = "keeper", "log"
BACKLOG = 128
_START_LIMIT_S = 20.0


def folder_of(name: str) -> Path:
    """The folder of the store of this name and user, which need not be there."""
    return Path(tempfile.gettempdir(), f"tokenpool-store-{os.getuid()}-{name}")


def make_folder(folder: Path) -> None:
    """Make it if it is not there; raises HostError for one that others reach, or that is somebody else's."""
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except OSError as error:
        raise HostError(f"{folder} cannot be made: {error.strerror}") from error
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise HostError(f"{folder} is not a folder that only this user reaches: remove it")


@contextmanager
def _path_in(folder: Path, name: str) -> Iterator[str]:
    directory = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        yield f"/proc/self/fd/{directory}/{name}"
    finally:
        os.close(directory)


def connect(folder: Path, limit_s: float) -> socket.socket:
    """A socket to the keeper, with this limit for every call; raises OSError, PermissionError for another user's."""
    made = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    made.settimeout(limit_s)
    try:
        with _path_in(folder, _SOCKET) as path:
            made.connect(path)
        if peer_of(made)[1] != os.getuid():
            raise PermissionError("the keeper is another user's")
    except BaseException:
        made.close()
        raise
    return made


def peer_of(connection: socket.socket) -> tuple[int, int]:
    """Process and user at the other end, as they were when it began."""
    pid, uid, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return pid, uid


class Listening(NamedTuple):
    """What the only keeper of a folder has."""

    socket: socket.socket
    lock: int
    """A descriptor of the folder; its lock lasts as long as whoever has it open."""
    is_next: bool
    """Whether there was one before that has not cleared up: it was killed, and its hosts may be there."""


def listen(folder: Path) -> Listening | None:
    """Become the only keeper; None if there is one already. Raises OSError when the folder goes meanwhile."""
    lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(lock), folder.lstat()):
            raise FileNotFoundError(f"{folder} is another one now")
        is_next = os.path.lexists(folder / _SOCKET)
        (folder / _SOCKET).unlink(missing_ok=True)
        made = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with _path_in(folder, _SOCKET) as path:
            made.bind(path)
        made.listen(BACKLOG)
    except BlockingIOError:
        os.close(lock)
        return None
    except BaseException:
        os.close(lock)
        raise
    return Listening(made, lock, is_next)


def clear_up(folder: Path) -> None:
    """Leave nothing behind; only for its keeper, which ends."""
    with suppress(OSError):
        for name in (_SOCKET, LOG):
            (folder / name).unlink(missing_ok=True)
        folder.rmdir()


def start_keeper(folder: Path, stays_s: float | None = None) -> None:
    """Start one that outlives this process, unless there is one; raises HostError when that fails.

    It takes a tenth of a second; who connects at once may find it not there yet.
    """
    make_folder(folder)
    command = [sys.executable, "-m", "tokenpool.node_store", str(folder)]
    command += [] if stays_s is None else [str(stays_s)]
    try:
        with open(
            os.open(folder / LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_TRUNC | os.O_CLOEXEC, 0o600), "wb"
        ) as log:
            done = subprocess.run(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
                timeout=_START_LIMIT_S, check=False,
            )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        raise HostError(f"the keeper of host copies cannot be started: {error}") from error
    if done.returncode:
        raise HostError(f"the keeper of host copies ended with status {done.returncode}: see {folder / LOG}")
