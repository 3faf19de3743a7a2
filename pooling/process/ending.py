# SPDX-License-Identifier: Apache-2.0
"""Ends that come, whatever hangs: each part of a shutdown has a limit, and so has the whole."""

from __future__ import annotations

import asyncio
import faulthandler
import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Coroutine
from typing import Any

logger = logging.getLogger(__name__)

END_MARGIN_S = 20.0
"""What a shutdown may take beyond `shutdown_timeout`."""
HOST_END_S = 10.0
"""How long a host that was asked to end may take before it is killed."""
KILL_S = 2.0
"""How long the kernel may take to end a process that was killed."""
STATUS_OF_A_HANG = 70
_LOOK_S = 0.02


async def within(limit_s: float, what: str, work: Coroutine[Any, Any, object]) -> bool:
    """Run one part of a shutdown; returns whether it ended in time. What it raises is logged, and the rest goes on."""
    task = asyncio.ensure_future(work)
    await asyncio.wait({task}, timeout=limit_s)
    if not task.done():
        logger.error("%s takes more than %g s, going on without", what, limit_s)
        task.cancel()  # not awaited: it may not listen
        return False
    if not task.cancelled() and (error := task.exception()) is not None:
        logger.error("%s failed, going on without", what, exc_info=error)
    return True


async def let_finish(model: Any, limit_s: float) -> None:
    """Let a model that takes nothing new finish what it has, for at most `limit_s`, then abort the rest.

    Whatever its routes were called for counts until they return: what is read, fetched or checked before an engine has
    it, and what its client has not read yet.
    """
    client, app, deadline_s = model.client, model.app, time.monotonic() + max(0.0, limit_s)
    if client is None:
        return
    await client.drain(max(0.0, limit_s))
    while client.num_unfinished or app.inflight:
        if time.monotonic() > deadline_s:
            break
        await asyncio.sleep(_LOOK_S)
    else:
        return
    name = client.plan.spec.name
    logger.warning("drain limit reached, aborting model=%s requests=%d calls=%d", name, client.num_unfinished,
                   app.inflight)  # fmt: skip
    await within(1.0, f"aborting requests of model {name!r}", client.abort_all())
    if client.num_unfinished:
        await client.drain(1.0)


def end_after(limit_s: float, end: Callable[[int], object] = os._exit) -> threading.Timer:
    """End this process once `limit_s` have passed, unless the timer that is returned is cancelled before.

    A thread does it, which no event loop or lock holds up; child processes die with this one.
    """

    def give_up() -> None:
        logger.critical("the shutdown hangs for more than %g s, ending without it; stacks follow", limit_s)
        traceback.print_stack(sys._current_frames().get(threading.main_thread().ident or 0))
        faulthandler.dump_traceback()  # of the newest hundred
        end(STATUS_OF_A_HANG)

    timer = threading.Timer(limit_s, give_up)
    timer.daemon = True
    timer.start()
    return timer
