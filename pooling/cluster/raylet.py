# SPDX-License-Identifier: Apache-2.0
"""Ends an actor's process with the Ray node that it is on."""

from __future__ import annotations

import os
import threading
import time

_LOOK_S = 0.5


def end_with_raylet() -> None:
    """End this process once its raylet is gone: Ray counts it as lost, and a worker may outlive its raylet."""
    raylet = os.getppid()

    def watch() -> None:
        while os.getppid() == raylet:
            time.sleep(_LOOK_S)
        os._exit(1)  # and with it, by the kernel, the host process

    threading.Thread(target=watch, name="raylet-watch", daemon=True).start()
