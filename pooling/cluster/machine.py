# SPDX-License-Identifier: Apache-2.0
"""Where a process runs, as far as sockets are concerned."""

from __future__ import annotations

import functools
import os
from pathlib import Path


@functools.cache
def machine_id() -> str:
    """Equal for two processes that see the same file system and kernel, and so can share a Unix socket."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}/{os.stat('/proc/self/ns/mnt').st_ino}/{os.getuid()}"
