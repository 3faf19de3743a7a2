# SPDX-License-Identifier: Apache-2.0
"""How an actor's process begins and ends: it ends with the Ray node that it is on."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from tokenpool.errors import PoolError

logger = logging.getLogger(__name__)

_LOOK_S = 0.5
_AGAIN_S = 1.0


@contextmanager
def beginning() -> Iterator[None]:
    """Around the start of an actor: what fails there ends the process, after which Ray starts the actor again.

    One whose start raises is dead to Ray for good, however often it may be restarted. A PoolError is raised, because it
    would come again.
    """
    try:
        yield
    except PoolError:
        raise
    except Exception:  # such as Ray's head that is away for a moment
        logger.exception("the actor does not begin, and is started again")
        time.sleep(_AGAIN_S)
        os._exit(1)


def end_with_raylet() -> None:
    """End this process once its raylet is gone: Ray counts it as lost, and a worker may outlive its raylet."""
    raylet = os.getppid()

    def watch() -> None:
        while os.getppid() == raylet:
            time.sleep(_LOOK_S)
        os._exit(1)  # and with it, by the kernel, the host process

    threading.Thread(target=watch, name="raylet-watch", daemon=True).start()
