# SPDX-License-Identifier: Apache-2.0
"""Files in a folder that nobody else can have made, read or changed, though its name can be guessed.

Below a temporary folder anybody may make a folder first, or a link in its place. So one that is not this user's own is
refused, and files are opened from the open folder, without following links.
"""

from __future__ import annotations

import json
import logging
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from secrets import token_hex
from typing import Any

logger = logging.getLogger(__name__)

_OPEN_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_MAX_BYTES = 16 << 20
OF_POOL = "pool"
"""Key of a snapshot: of which start of a pool it is."""


class NotPrivateError(OSError):
    """The folder belongs to somebody else, or others may look into it."""


def read_private(path: Path) -> bytes:
    """The content of a file in a private folder; raises OSError, NotPrivateError among them."""
    with _folder(path.parent) as folder:
        file = os.open(path.name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
        with open(file, "rb") as content:
            return content.read(_MAX_BYTES)


def read_snapshot(path: Path, identity: str) -> dict[str, Any]:
    """What a controller of the pool of that start has written there.

    Empty if that cannot be read, for hosts know it too, or is of an earlier pool of that name.
    """
    try:
        snapshot = json.loads(read_private(path))
        return snapshot if isinstance(snapshot, dict) and snapshot.get(OF_POOL) == identity else {}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        logger.warning("snapshot not read path=%s: %s", path, error)
        return {}


def write_private(path: Path, content: bytes) -> None:
    """Make or replace a file in a private folder, which is made if it is not there; raises OSError."""
    path.parent.parent.mkdir(parents=True, exist_ok=True)
    with suppress(FileExistsError):
        path.parent.mkdir(mode=0o700)
    with _folder(path.parent) as folder:
        beside = f"{path.name}.{token_hex(8)}"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        opened = os.open(beside, flags, 0o600, dir_fd=folder)
        try:
            with open(opened, "wb") as file:
                file.write(content)
            os.replace(beside, path.name, src_dir_fd=folder, dst_dir_fd=folder)
        except OSError:
            with suppress(OSError):
                os.unlink(beside, dir_fd=folder)
            raise


@contextmanager
def _folder(path: Path) -> Iterator[int]:
    folder = os.open(path, _OPEN_FOLDER)
    try:
        found = os.fstat(folder)
        mode = stat.S_IMODE(found.st_mode)
        if found.st_uid != os.geteuid() or mode & 0o077:
            raise NotPrivateError(
                f"{path} is of user {found.st_uid} with mode {mode:04o}: it must be of user {os.geteuid()} with 0700; "
                "remove it, or give another cluster.state_dir"
            )
        yield folder
    finally:
        os.close(folder)
