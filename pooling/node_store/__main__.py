# SPDX-License-Identifier: Apache-2.0
"""`python -m tokenpool.node_store FOLDER [SECONDS]`: leaves a keeper behind, unless there is one, and ends."""

from __future__ import annotations

import contextlib
import gc
import os
import resource
import signal
import sys
from pathlib import Path

from tokenpool.logs import log_to_stderr
from tokenpool.node_store.keeper import GRACE_S, STAYS_S, Keeper
from tokenpool.node_store.place import BACKLOG, clear_up, listen

_OOM_SCORE = 900
"""The kernel ends it rather than a host when memory is short: copies that nobody holds are free then."""


def main(folder: Path, stays_s: float) -> None:
    """Become a process of no parent, terminal or folder, then serve."""
    listening = listen(folder)
    if listening is None or os.fork():
        os._exit(0)
    listening.socket.listen(BACKLOG)  # anew, so that clients are shown this process as the keeper
    os.chdir("/")
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write(str(_OOM_SCORE))
    with contextlib.suppress(OSError, ValueError):  # one descriptor for each copy and host
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    log_to_stderr("store")
    gc.freeze()
    try:
        Keeper(listening.socket, stays_s, GRACE_S if listening.is_next else 0.0).run()
    finally:
        clear_up(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]) if len(sys.argv) > 2 else STAYS_S)
