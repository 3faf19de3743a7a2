# SPDX-License-Identifier: Apache-2.0
"""`python -m tokenpool.node_store FOLDER [SECONDS]`: leaves a keeper behind, unless there is one, and ends."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import sys
from pathlib import Path

from tokenpool.logs import log_to_stderr
from tokenpool.node_store.keeper import STAYS_S, Keeper
from tokenpool.node_store.place import BACKLOG, listen

_OOM_SCORE = 900
"""The kernel ends it rather than a host when memory is short: copies that nobody holds are free then."""


def main(folder: Path, stays_s: float) -> None:
    """Become a process of no parent, terminal or folder, then serve."""
    listening = listen(folder)
    if listening is None or os.fork():
        os._exit(0)
    listening.listen(BACKLOG)  # anew, so that clients are shown this process as the keeper
    os.chdir("/")
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write(str(_OOM_SCORE))
    log_to_stderr("store")
    gc.freeze()
    Keeper(listening, stays_s).run()


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]) if len(sys.argv) > 2 else STAYS_S)
