# SPDX-License-Identifier: Apache-2.0
"""Runs a pool: plan, bind the port, start the models, serve, drain on SIGTERM."""

from __future__ import annotations

import shutil
import socket
from functools import partial

from starlette.applications import Starlette
from vllm.entrypoints.launchers.launcher import create_server_socket

from tokenpool.config import PoolConfig
from tokenpool.errors import ConfigError
from tokenpool.logs import log_to_stderr
from tokenpool.process.template import Template
from tokenpool.serve.client.host_process import begin_template
from tokenpool.serve.launch.launch_plan import plan_pool
from tokenpool.serve.launch.model_plan import ModelPlan
from tokenpool.serve.pool.demand import Demand
from tokenpool.serve.pool.http_loop import run
from tokenpool.serve.pool.local_hosts import LocalHosts
from tokenpool.serve.pool.pool import Pool
from tokenpool.serve.pool.pool_operator import PoolOperator
from tokenpool.settings import METRICS_FOLDER


def serve(config: PoolConfig, cluster: str | None = None, pool_file: str | None = None) -> int:
    """Serve until SIGTERM or SIGINT; returns 0 after a clean drain, and raises PoolError if nothing can be served.

    `cluster` is the address of a Ray cluster, `auto` or `local`. Models that come and go in `pool_file` come and go.
    """
    log_to_stderr()
    try:
        sock = create_server_socket((config.host or "", config.port), reuse_port=False)
    except OSError as error:
        where = f"{config.host or '*'}:{config.port}"
        raise ConfigError(f"cannot listen on {where}: {error.strerror}", key="port") from None
    try:
        if cluster is None:
            _serve_here(config, pool_file, sock)
        else:
            _serve_cluster(config, cluster, pool_file, sock)
    finally:
        shutil.rmtree(METRICS_FOLDER.get() or "", ignore_errors=True)
    return 0


def local_pool(
    config: PoolConfig, plans: list[ModelPlan], template: Template | None, pool_file: str | None, outer: Starlette
) -> Pool[LocalHosts]:
    """A pool on one host of this machine, which this process answers for; `pool_file` is followed."""
    pool = Pool(config, plans, outer, partial(LocalHosts, config, template=template))
    outer.state.operator = PoolOperator(pool, pool_file, Demand(pool.models, pool.hosts, config.max_loaded))
    return pool


def _serve_here(config: PoolConfig, pool_file: str | None, sock: socket.socket) -> None:
    template = Template() if config.host_template else None
    config, plans = plan_pool(config, partial(begin_template, template) if template else None)
    if config.frontends == 1:
        run(config, plans, partial(local_pool, config, plans, template, pool_file), sock)
        return
    from tokenpool.serve.frontends.shared_host import host_frontends
    from tokenpool.serve.frontends.supervisor import supervise

    supervise(config, plans, partial(host_frontends, config, plans, template, pool_file, sock), sock)


def _serve_cluster(config: PoolConfig, cluster: str, pool_file: str | None, sock: socket.socket) -> None:
    from tokenpool.serve.clustered.ray_pool import plan_on_cluster, ray_pool

    planned = plan_on_cluster(config, cluster)
    try:
        if config.frontends == 1:
            run(planned.config, planned.port_plans, partial(ray_pool, planned, pool_file), sock)
        else:
            from tokenpool.serve.frontends.shared_cluster import cluster_frontends
            from tokenpool.serve.frontends.supervisor import supervise

            supervise(planned.config, planned.port_plans, partial(cluster_frontends, planned, pool_file, sock), sock)
        if planned.session.fault is not None:
            raise planned.session.fault
    finally:
        planned.session.abandon()
