# SPDX-License-Identifier: Apache-2.0
"""A pool on the hosts of a Ray cluster: plans it, and puts it together for one frontend."""

from __future__ import annotations

import tempfile
from dataclasses import asdict, replace

from starlette.applications import Starlette
from vllm.platforms import current_platform

from tokenpool.cluster.session import Session, connect, wanted_hosts
from tokenpool.config import PoolConfig
from tokenpool.errors import ConfigError
from tokenpool.serve.clustered.cluster_model import ClusterModel, EndpointMaker
from tokenpool.serve.clustered.ray_hosts import RayHosts
from tokenpool.serve.launch.launch_plan import host_config, plan_pool
from tokenpool.serve.launch.model_plan import ModelPlan
from tokenpool.serve.pool.models import PoolModel
from tokenpool.serve.pool.pool import Pool
from tokenpool.serve.pool.pool_operator import PoolOperator


def plan_cluster(config: PoolConfig, num_hosts: int) -> tuple[PoolConfig, list[ModelPlan]]:
    """Plan a pool whose memory settings are those of each host; raises ConfigError.

    With `weights: fixed` all models must fit on all hosts together, else on each: a host may get any of them.
    """
    config.refuse_demand("on a cluster")
    for key in ("device_memory", "host_memory"):
        if getattr(config, key) is None:
            raise ConfigError("auto is not there for a cluster: give the size that each host may use", key=key)
    if config.weights != "fixed":
        return plan_pool(config)
    assert config.device_memory is not None
    planned, plans = plan_pool(replace(config, device_memory=config.device_memory * num_hosts))
    return replace(planned, device_memory=config.device_memory), plans


def plan_on_cluster(config: PoolConfig, address: str) -> tuple[PoolConfig, list[ModelPlan], Session]:
    """Connect to Ray, plan, start the actors; raises PoolError."""
    use_gpus = current_platform.is_cuda()
    connect(address, config.cluster, config.cluster.hosts or 1)
    config, plans = plan_cluster(config, wanted_hosts(config.cluster, use_gpus=use_gpus))
    hosts = asdict(host_config(config, plans))
    return config, plans, Session(config.cluster, hosts, use_gpus=use_gpus, host_template=config.host_template)


def ray_pool(
    config: PoolConfig, plans: list[ModelPlan], session: Session, pool_file: str | None, outer: Starlette
) -> Pool[RayHosts]:
    """A pool whose engines this process has sockets to; `pool_file` is followed."""
    folder = tempfile.TemporaryDirectory(prefix="tokenpool-")  # mode 0700: only this user reaches the sockets
    endpoints = EndpointMaker(folder.name, session.address, always_tcp=config.cluster.transport == "tcp")

    def follow(model: PoolModel, revision: int, hosts: RayHosts) -> ClusterModel:
        follower = ClusterModel(model.plan, revision, hosts.tell, endpoints, hosts.show)
        follower.on_fault = model.note_client_fault
        return follower

    pool = Pool(config, plans, outer, lambda models: RayHosts(models, session, follow))
    pool.hosts.on_stop = folder.cleanup
    outer.state.operator = PoolOperator(pool, pool_file)
    return pool
