# SPDX-License-Identifier: Apache-2.0
"""Where a process runs, as far as sockets are concerned, and what one that was killed leaves there."""

from __future__ import annotations

import functools
import os
import shutil
import stat
import tempfile
from collections.abc import Iterable
from pathlib import Path


@functools.cache
def machine_id() -> str:
    """Equal for two processes that see the same file system and kernel, and so can share a Unix socket."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}/{os.stat('/proc/self/ns/mnt').st_ino}/{os.getuid()}"


def clear_after(pid: int, folders: Iterable[str]) -> None:
    """Remove the temporary folders of a process of this machine that is gone; nothing else that is named."""
    if os.path.exists(f"/proc/{pid}"):
        return
    for folder in map(Path, folders):
        is_ours = folder.parent == Path(tempfile.gettempdir()) and folder.name.startswith("tokenpool-")
        try:
            found = folder.lstat()
        except OSError:
            continue
        if is_ours and stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid():
            shutil.rmtree(folder, ignore_errors=True)
