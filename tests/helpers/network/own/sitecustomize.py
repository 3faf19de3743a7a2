# SPDX-License-Identifier: Apache-2.0
"""What the Python processes of a machine have of their own; Python imports this at its start.

Their wall clock, and a list of processes with those of their own network only: Ray looks there for its node.
"""

import os
import time
from typing import Any

_true_time, _true_time_ns, _true_listdir = time.time, time.time_ns, os.listdir


def _network(pid: str) -> int:
    try:
        return os.stat(f"/proc/{pid}/ns/net").st_ino
    except OSError:
        return 0


def _listdir(path: Any = ".") -> list[Any]:
    found = _true_listdir(path)
    if path not in ("/proc", b"/proc"):
        return found
    own = _network("self")
    return [name for name in found if not os.fsdecode(name).isdigit() or _network(os.fsdecode(name)) == own]


if "TEST_CLOCK_AHEAD_S" in os.environ:
    _ahead_s = float(os.environ["TEST_CLOCK_AHEAD_S"])
    time.time = lambda: _true_time() + _ahead_s
    time.time_ns = lambda: _true_time_ns() + int(_ahead_s * 1e9)
    os.listdir = _listdir
