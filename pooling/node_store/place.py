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
from contextlib import contextmanager
from pathlib import Path

from tokenpool.errors import HostError

_SOCKET, _LOCK, LOG = "keeper", "lock", "log"
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


def listen(folder: Path) -> socket.socket | None:
    """The socket of the only keeper; None if there is one already. The lock lasts as long as this process."""
    lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        return None
    made = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    (folder / _SOCKET).unlink(missing_ok=True)  # of a keeper that is dead: it has no lock
    with _path_in(folder, _SOCKET) as path:
        made.bind(path)
    made.listen(BACKLOG)
    return made


def start_keeper(folder: Path) -> None:
    """Start one that outlives this process, unless there is one; raises HostError when that fails.

    It takes a tenth of a second; who connects at once may find it not there yet.
    """
    make_folder(folder)
    command = [sys.executable, "-m", "tokenpool.node_store", str(folder)]
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
