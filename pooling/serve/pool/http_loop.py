# SPDX-License-Identifier: Apache-2.0
"""The port of one process: answers while the models start, serves, and drains on SIGTERM."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import ssl
import threading
import time
from argparse import Namespace
from collections.abc import Callable
from typing import Any

import uvicorn
import uvloop
from starlette.applications import Starlette
from vllm import envs
from vllm.entrypoints.launchers.launcher import NoSignalServer
from vllm.entrypoints.launchers.utils.constants import H11_MAX_INCOMPLETE_EVENT_SIZE_DEFAULT
from vllm.entrypoints.launchers.utils.server_utils import get_uvicorn_log_config
from vllm.utils.system_utils import set_ulimit

from tokenpool.config import PoolConfig
from tokenpool.errors import ConfigError, PoolError
from tokenpool.process.ending import END_MARGIN_S, end_after
from tokenpool.serve.client.tracing import end_tracing
from tokenpool.serve.gateway.endpoints import build_outer_app
from tokenpool.serve.http.http_limits import HEAD_BYTES
from tokenpool.serve.http.http_protocol import http_protocol
from tokenpool.serve.http.loop_watch import LoopWatch
from tokenpool.serve.http.port import with_port_flags
from tokenpool.serve.launch.model_plan import ModelPlan, first_line
from tokenpool.serve.launch.tls import CertificateRefresh, tls_options
from tokenpool.serve.pool.hosts import Hosts
from tokenpool.serve.pool.models import reason_of
from tokenpool.serve.pool.pool import Pool
from tokenpool.units import format_count

logger = logging.getLogger(__name__)

_TRACING_END_S = 2.0
_ANSWERS_END_S = 2.0
"""For answers to be sent once the pool has stopped, if nothing is left of `shutdown_timeout`."""
Timers = list[threading.Timer]
MakePool = Callable[[Starlette], Pool[Hosts]]
"""Makes the pool behind the port, given the app for pool-level paths; called on the event loop."""


def run(
    config: PoolConfig, plans: list[ModelPlan], make_pool: MakePool, sock: socket.socket, *, announce: bool = True
) -> None:
    """Serve on `sock` until SIGTERM or SIGINT; raises PoolError when the pool does not start."""
    set_ulimit()
    check_http(plans[0].args, config)
    timers: Timers = []
    try:
        uvloop.run(_serve(config, plans, sock, make_pool, announce, timers))
    finally:
        end_tracing(_TRACING_END_S)
        for timer in timers:
            timer.cancel()


async def _serve(
    config: PoolConfig, plans: list[ModelPlan], sock: socket.socket, make_pool: MakePool, announce: bool, timers: Timers
) -> None:
    args, outer, watch = plans[0].args, build_outer_app(), LoopWatch()
    pool = make_pool(outer)
    watch.start()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    app = watch.around(with_port_flags(pool.app, args, outer))
    server = NoSignalServer(_uvicorn_config(app, args, config))
    # The port answers while models load: /health is up, /ready once a host is, and requests wait.
    serving = asyncio.create_task(_answer(server, pool, sock, args))
    starting = asyncio.create_task(pool.start())
    stopping = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({starting, stopping, serving}, return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            starting.result()
            if announce:
                log_address(plans, sock)
            await asyncio.wait({stopping, serving}, return_when=asyncio.FIRST_COMPLETED)
        if serving.done() and not stop.is_set():
            raise PoolError(f"the HTTP server has ended by itself: {_how_it_ended(serving)}")
    finally:
        deadline_s = time.monotonic() + config.shutdown_timeout_s
        timers.append(end_after(config.shutdown_timeout_s + END_MARGIN_S))
        logger.info("draining: no new requests, at most %g s", config.shutdown_timeout_s)
        server.should_exit = True  # closes the listening socket and waits for open responses
        starting.cancel()
        await asyncio.wait({starting}, timeout=config.shutdown_timeout_s)
        await pool.stop()
        await asyncio.wait({serving}, timeout=max(_ANSWERS_END_S, deadline_s - time.monotonic()))
        stopping.cancel()
        watch.stop()


def _how_it_ended(task: asyncio.Task[None]) -> str:
    error = None if task.cancelled() else task.exception()
    return "without an error" if error is None else reason_of(error)


async def _answer(server: NoSignalServer, pool: Pool[Hosts], sock: socket.socket, args: Namespace) -> None:
    await pool.may_listen()
    async with CertificateRefresh(args, server.config):
        await server.serve(sockets=[sock])


def check_http(args: Namespace, config: PoolConfig) -> None:
    """Refuse what the HTTP server would not start with, such as a certificate that cannot be read: ConfigError."""
    try:
        _uvicorn_config(lambda scope: None, args, config).load()
    except (OSError, ssl.SSLError, ValueError) as error:
        raise ConfigError(f"cannot be used: {first_line(error)}", key="--ssl-certfile, --ssl-keyfile") from error


def log_address(plans: list[ModelPlan], sock: socket.socket) -> None:
    """Say where the models are served."""
    address = sock.getsockname()
    scheme = "https" if plans[0].args.ssl_certfile or plans[0].args.ssl_keyfile else "http"
    logger.info("serving %s on %s://%s:%d", format_count(len(plans), "model"), scheme, address[0], address[1])


def _uvicorn_config(app: Any, args: Namespace, config: PoolConfig) -> uvicorn.Config:
    options: dict[str, Any] = {}
    is_default = args.h11_max_incomplete_event_size == H11_MAX_INCOMPLETE_EVENT_SIZE_DEFAULT
    if (log_config := get_uvicorn_log_config(args)) is not None:
        options["log_config"] = log_config
    uvicorn_config = uvicorn.Config(
        app,
        lifespan="off",
        log_level=args.uvicorn_log_level,
        access_log=not args.disable_uvicorn_access_log,
        timeout_keep_alive=envs.VLLM_HTTP_TIMEOUT_KEEP_ALIVE,
        timeout_graceful_shutdown=max(1, int(config.shutdown_timeout_s)),
        **tls_options(args),
        http=http_protocol(),
        h11_max_incomplete_event_size=HEAD_BYTES if is_default else args.h11_max_incomplete_event_size,
        **options,
    )
    uvicorn_config.h11_max_header_count = args.h11_max_header_count
    return uvicorn_config
