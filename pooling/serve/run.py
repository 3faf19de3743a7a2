# SPDX-License-Identifier: Apache-2.0
"""Runs a pool: plan, bind the port, start the models, serve, drain on SIGTERM."""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import signal
import socket
import ssl
import threading
from argparse import Namespace
from collections.abc import Callable
from typing import Any

import uvicorn
import uvloop
from starlette.applications import Starlette
from vllm import envs
from vllm.entrypoints.launchers.launcher import NoSignalServer, create_server_socket
from vllm.entrypoints.launchers.utils.constants import H11_MAX_INCOMPLETE_EVENT_SIZE_DEFAULT
from vllm.entrypoints.launchers.utils.server_utils import get_uvicorn_log_config
from vllm.utils.system_utils import set_ulimit

from tokenpool.config import PoolConfig
from tokenpool.errors import ConfigError, PoolError
from tokenpool.logs import log_to_stderr
from tokenpool.serve.ending import END_MARGIN_S, end_after
from tokenpool.serve.endpoints import build_outer_app
from tokenpool.serve.http_limits import HEAD_BYTES
from tokenpool.serve.http_protocol import http_protocol
from tokenpool.serve.launch_plan import ModelPlan, first_line, plan_pool
from tokenpool.serve.loop_watch import LoopWatch
from tokenpool.serve.model_life import reason_of
from tokenpool.serve.pool_server import PoolServer
from tokenpool.serve.port import with_port_flags
from tokenpool.serve.tls import CertificateRefresh, tls_options
from tokenpool.serve.tracing import end_tracing
from tokenpool.units import format_bytes, format_count

logger = logging.getLogger(__name__)


def describe_plan(config: PoolConfig, plans: list[ModelPlan]) -> str:
    """The plan in a few lines for people."""
    assert config.device_memory is not None
    memory = f"device memory {format_bytes(config.device_memory)} in pages of {format_bytes(config.page_size)}"
    lines = [f"{memory}, weights {config.weights}"]
    if config.weights == "movable" and config.host_memory is not None:
        lines[0] += f", host memory {format_bytes(config.host_memory)}"
    for item in plans:
        weights = format_bytes(item.weight_bytes) if item.weight_bytes else "weights of unknown size"
        slo = f", ttft {item.spec.slo.ttft_s:g} s, tpot {item.spec.slo.tpot_s:g} s" if item.spec.slo else ""
        lines.append(f"  {item.spec.name}: {item.spec.model}, {weights}{slo}")
    total = sum(item.weight_bytes for item in plans)
    if config.weights == "movable" and config.host_memory is not None and total > config.host_memory:
        lines.append(
            f"  host memory is less than the {format_bytes(total)} of all weights: models take turns in it, "
            "and are read from disk before their turn"
        )
    lines.append("ok")
    return "\n".join(lines)


_TRACING_END_S = 2.0
Timers = list[threading.Timer]
MakePool = Callable[[Starlette], PoolServer]
"""Makes the server behind the port, given the app for pool-level paths."""


def serve(config: PoolConfig, cluster: str | None = None, pool_file: str | None = None) -> int:
    """Serve until SIGTERM or SIGINT; returns 0 after a clean drain.

    `cluster` is the address of a Ray cluster, `auto` or `local`; there `pool_file` is watched for changes.
    """
    log_to_stderr()
    try:
        sock = create_server_socket((config.host or "", config.port), reuse_port=False)
    except OSError as error:
        where = f"{config.host or '*'}:{config.port}"
        raise ConfigError(f"cannot listen on {where}: {error.strerror}", key="port") from None
    try:
        if config.frontends > 1:
            from tokenpool.serve.supervisor import supervise

            supervise(config, cluster, pool_file, sock)
        else:
            run(*_plan(config, cluster, pool_file), sock)
    finally:
        shutil.rmtree(os.environ["PROMETHEUS_MULTIPROC_DIR"], ignore_errors=True)
    return 0


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


def _plan(
    config: PoolConfig, cluster: str | None, pool_file: str | None
) -> tuple[PoolConfig, list[ModelPlan], MakePool]:
    if cluster is None:
        planned, plans = plan_pool(config)
        return planned, plans, lambda outer: PoolServer(planned, plans, outer)
    from tokenpool.serve.cluster_server import ClusterServer, plan_on_cluster

    planned, plans, session = plan_on_cluster(config, cluster)
    return planned, plans, lambda outer: ClusterServer(planned, plans, outer, session, pool_file)


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
    # The port answers while models load: /health is up, /ready and the models say 503.
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
        timers.append(end_after(config.shutdown_timeout_s + END_MARGIN_S))
        logger.info("draining: no new requests, at most %g s", config.shutdown_timeout_s)
        server.should_exit = True  # closes the listening socket and waits for open responses
        starting.cancel()
        await asyncio.wait({starting}, timeout=config.shutdown_timeout_s)
        await pool.stop()
        await asyncio.wait({serving}, timeout=2.0)
        stopping.cancel()
        watch.stop()


def _how_it_ended(task: asyncio.Task[None]) -> str:
    error = None if task.cancelled() else task.exception()
    return "without an error" if error is None else reason_of(error)


async def _answer(server: NoSignalServer, pool: PoolServer, sock: socket.socket, args: Namespace) -> None:
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
