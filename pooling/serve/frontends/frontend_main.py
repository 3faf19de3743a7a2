# SPDX-License-Identifier: Apache-2.0
"""What a process of one of several frontends does from its fork to its end."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import sys
from typing import Any

from starlette.applications import Starlette

from tokenpool.logs import log_to_stderr
from tokenpool.process.parent_death import end_with, end_with_parent
from tokenpool.serve.access.shared_limits import SharedLimits
from tokenpool.serve.access.tenants import TenantBook
from tokenpool.serve.client.suspects import SUSPECTS
from tokenpool.serve.frontends.followed_cluster import ClusterEngines
from tokenpool.serve.frontends.followed_host import HostEngines
from tokenpool.serve.frontends.followed_hosts import FollowedHosts
from tokenpool.serve.frontends.followed_operator import FollowedOperator
from tokenpool.serve.frontends.frontend_view import FrontendSettings
from tokenpool.serve.pool.http_loop import run
from tokenpool.serve.pool.pool import Pool
from tokenpool.wire.control import ControlServer

logger = logging.getLogger(__name__)

_TELL_PERIOD_S = 1.0


def main(settings: FrontendSettings, sock: socket.socket) -> None:
    """Serve on `sock` until SIGTERM, then end the process."""
    end_with_parent()
    log_to_stderr()
    _end_with_supervisor(settings.supervisor_pid)
    if settings.index:  # what is told of all models is told once
        logging.getLogger("tokenpool.serve.pool.host_watch").setLevel(logging.WARNING)
    from tokenpool.patches import apply_all
    from tokenpool.process.metric_files import outlast_full_disks

    apply_all()
    outlast_full_disks()
    status = 1
    try:
        run(settings.config, settings.plans, lambda outer: followed_pool(settings, outer), sock, announce=False)
        status = 0
    except Exception:  # whatever it is, the log has it and the supervisor starts another one
        logger.exception("frontend ends index=%d", settings.index)
    logging.shutdown()
    sys.stdout.flush()
    os._exit(status)


def _end_with_supervisor(pid: int) -> None:
    """Its parent, the fork server, outlives the supervisor as long as there is a frontend."""
    try:
        end_with(pid)
    except OSError as error:
        logger.error("frontend does not notice when its supervisor is killed: %s", error)


def followed_pool(settings: FrontendSettings, outer: Starlette) -> Pool[FollowedHosts]:
    """The pool of one of several frontends, whose models and hosts the supervisor looks after."""
    config = settings.config
    SUSPECTS.share(os.path.join(settings.folder, "suspects"))
    pool = Pool(
        config,
        [],
        outer,
        lambda models: FollowedHosts(settings, models, ClusterEngines if settings.address else HostEngines),
        frontend=settings.index,
        limits=SharedLimits(settings.limits, config.frontends) if config.tenants else None,
    )
    outer.state.operator = FollowedOperator(pool)
    pool.hosts.early_works["answering the supervisor"] = lambda: _answer_supervisor(pool)
    if (tenants := pool.tenants) is not None:
        pool.hosts.early_works["telling calls"] = lambda: _tell_calls(tenants)
    return pool


async def _answer_supervisor(pool: Pool[FollowedHosts]) -> None:

    async def report() -> dict[str, Any]:
        """What this frontend adds to what is told of all."""
        return {"inflight": pool.inflight(), "tenants": pool.tenants_report(), **pool.hosts.engines.report()}

    loop, settings = asyncio.get_running_loop(), pool.hosts.settings
    address = settings.own_socket(settings.life)
    calls = ControlServer(address, settings.key, lambda make: asyncio.run_coroutine_threadsafe(make(), loop))
    calls.serve({"report": report})


async def _tell_calls(tenants: TenantBook) -> None:
    while True:
        tenants.count_sequences()
        await asyncio.sleep(_TELL_PERIOD_S)
