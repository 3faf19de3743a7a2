# SPDX-License-Identifier: Apache-2.0
"""The process above several frontends: it answers no client, and starts, watches and restarts hosts and frontends."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Callable

import uvloop
from vllm.utils.system_utils import set_ulimit

from tokenpool.config import PoolConfig
from tokenpool.process.ending import END_MARGIN_S, end_after
from tokenpool.serve.frontends.frontends import Frontends
from tokenpool.serve.launch.model_plan import ModelPlan
from tokenpool.serve.pool.http_loop import Timers, check_http, log_address


def supervise(config: PoolConfig, plans: list[ModelPlan], make: Callable[[], Frontends], sock: socket.socket) -> None:
    """Serve on `sock` with several frontends until SIGTERM or SIGINT; raises PoolError when the pool cannot start.

    `make` is called on the event loop.
    """
    check_http(plans[0].args, config)
    set_ulimit()
    timers: Timers = []
    try:
        uvloop.run(_supervise(config, plans, make, sock, timers))
    finally:
        for timer in timers:
            timer.cancel()


async def _supervise(
    config: PoolConfig, plans: list[ModelPlan], make: Callable[[], Frontends], sock: socket.socket, timers: Timers
) -> None:
    frontends = make()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    starting, stopping = asyncio.create_task(frontends.start()), asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            starting.result()
            log_address(plans, sock)
            await stopping
    finally:
        timers.append(end_after(config.shutdown_timeout_s + END_MARGIN_S))
        starting.cancel()
        sock.close()  # nobody may connect any more; the frontends close theirs
        await asyncio.wait({starting}, timeout=config.shutdown_timeout_s)
        await frontends.stop()
        stopping.cancel()
