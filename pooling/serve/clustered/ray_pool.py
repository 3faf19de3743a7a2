# SPDX-License-Identifier: Apache-2.0
"""A pool on the hosts of a Ray cluster: starts or joins it, and puts it together for one frontend."""

from __future__ import annotations

import logging
import pickle
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from secrets import token_hex

from starlette.applications import Starlette
from vllm.platforms import current_platform
from vllm.version import __version__ as VLLM_VERSION

import tokenpool
from tokenpool.cluster.pool_record import PoolRecord, PoolStanding, differing, digests, unpack, wanted_hosts
from tokenpool.cluster.session import Session, connect, host_env
from tokenpool.cluster.values import Deployment
from tokenpool.config import ModelSpec, PoolConfig
from tokenpool.errors import ConfigError
from tokenpool.serve.access.tenants import tenants_of
from tokenpool.serve.clustered.cluster_model import ClusterModel, EndpointMaker
from tokenpool.serve.clustered.eldest_file import EldestFile
from tokenpool.serve.clustered.lease_keeper import LeaseKeeper
from tokenpool.serve.clustered.ray_hosts import RayHosts
from tokenpool.serve.clustered.seat_follower import deployment_of
from tokenpool.serve.launch.launch_plan import host_config, plan_pool
from tokenpool.serve.launch.model_plan import ModelPlan
from tokenpool.serve.launch.pool_file import in_order
from tokenpool.serve.pool.models import PoolModel
from tokenpool.serve.pool.pool import Pool
from tokenpool.serve.pool.pool_operator import PoolOperator

logger = logging.getLogger(__name__)

SOFTWARE = {"tokenpool": tokenpool.__version__, "vllm": VLLM_VERSION}
"""What all servers of a pool, and its hosts, must have alike."""

_AGREE_LIMIT_S, _AGREE_LOOK_S = 15.0, 0.5
"""How long a joiner waits for the others to have followed the same pool file as it has."""


@dataclass(frozen=True, slots=True)
class PlannedCluster:
    """A pool that is there, and a server that is to join it."""

    config: PoolConfig
    plans: list[ModelPlan]
    """Of the models that the pool has."""
    port_plans: list[ModelPlan]
    """Those whose flags the port has: the same, or where the pool has none those of the pool file."""
    versions: Mapping[str, int]
    session: Session


def plan_cluster(config: PoolConfig, num_hosts: int) -> tuple[PoolConfig, list[ModelPlan]]:
    """Plan a pool whose memory settings are those of each host; raises ConfigError.

    With `weights: fixed` all models must fit on all hosts together, else on each: a host may get any of them.
    """
    for key in ("device_memory", "host_memory"):
        if getattr(config, key) is None:
            raise ConfigError("auto is not there for a cluster: give the size that each host may use", key=key)
    if config.weights != "fixed":
        return plan_pool(config)
    assert config.device_memory is not None
    planned, plans = plan_pool(replace(config, device_memory=config.device_memory * num_hosts))
    return replace(planned, device_memory=config.device_memory), plans


def plan_on_cluster(config: PoolConfig, address: str) -> PlannedCluster:
    """Connect to Ray, and start the pool unless it is there; raises PoolError.

    Of several servers that do so at the same moment one starts it, and the others join it.
    """
    connect(address, config.cluster, config.cluster.most_hosts or 1)
    session = Session(config.cluster, owns_ray=address == "local")
    try:
        standing, plans = session.find(), None
        if standing is None:
            planned, plans = _plan(config)
            record = replace(_record_of(config, planned, plans), has_network=not session.owns_ray)
            standing = session.start(record)
        if not session.has_started:
            standing = _agreed(config, session, standing)
            logger.info("joining pool name=%s servers=%d", config.cluster.name, standing.num_servers)
        return _joined(config, session, standing.record, plans)
    except BaseException:
        session.abandon()
        raise


def _plan(config: PoolConfig) -> tuple[PoolConfig, list[ModelPlan]]:
    return plan_cluster(config, wanted_hosts(config.cluster, use_gpus=current_platform.is_cuda()))


def _record_of(given: PoolConfig, config: PoolConfig, plans: Sequence[ModelPlan]) -> PoolRecord:
    """What a pool is started with: servers must agree on what was `given`, before it was planned."""
    identity, use_gpus = token_hex(16), current_platform.is_cuda()
    return PoolRecord(
        identity,
        config.cluster,
        asdict(host_config(config, list(plans))),
        host_env(config.cluster, use_gpus=use_gpus),
        use_gpus,
        config.host_template,
        tuple(_deployment(config, plan) for plan in plans),
        {"weights": config.weights, "policy": config.scheduling.policy},
        digests(given, SOFTWARE, identity),
        {tenant.name: tenant.max_concurrent or 0 for tenant in tenants_of(config)},
        {tenant.name: tenant.weight for tenant in config.tenants},
        config.max_loaded,
        pickle.dumps(config.models),
    )


def _deployment(config: PoolConfig, plan: ModelPlan) -> Deployment:
    """A model of the pool file; what hosts need of one that is loaded on demand is made when it is."""
    rule = config.loading_of(plan.spec)
    return deployment_of(plan, 1, rule, is_bare=not rule.at_start and plan.checked is None)


def _agreed(config: PoolConfig, session: Session, standing: PoolStanding) -> PoolStanding:
    """The pool as it is once a server with this config may join it; raises ConfigError if the two do not agree.

    The only server of a pool follows its own pool file; beside others, the files must be the same.
    """
    if wrong := differing(config, SOFTWARE, standing.record):
        raise ConfigError(
            f"pool {config.cluster.name!r} runs in this cluster with other settings: {', '.join(wrong)}; give it the "
            "same pool file and flags, end it (tokenpool down), or give this one another name",
            key="cluster.name",
        )
    deadline_s = time.monotonic() + _AGREE_LIMIT_S
    while standing.num_servers and (names := _other_models(config.models, standing.record)):
        if time.monotonic() > deadline_s:
            raise ConfigError(
                f"the servers of pool {config.cluster.name!r} have another pool file: {', '.join(names)}; give all the "
                "same one",
                key="models",
            )
        time.sleep(_AGREE_LOOK_S)
        standing = session.find() or standing
    return standing


def _other_models(own: Sequence[ModelSpec], record: PoolRecord) -> list[str]:
    """The names of models whose entries in the pool file are not those that the pool follows."""
    theirs: Sequence[ModelSpec] = unpack(record.file_models)
    mine, others = {spec.name: in_order(spec) for spec in own}, {spec.name: in_order(spec) for spec in theirs}
    return sorted(name for name in mine.keys() | others.keys() if mine.get(name) != others.get(name))


def _joined(
    config: PoolConfig, session: Session, record: PoolRecord, own_plans: list[ModelPlan] | None
) -> PlannedCluster:
    if session.has_started and own_plans is not None:
        plans = own_plans
    else:
        plans = [unpack(deployment.plan) for deployment in record.models]
    scheduling = replace(config.scheduling, policy=record.planned["policy"])
    config = replace(config, weights=record.planned["weights"], scheduling=scheduling)
    versions = {deployment.name: deployment.version for deployment in record.models}
    return PlannedCluster(config, plans, plans or own_plans or _plan(config)[1], versions, session)


def ray_pool(planned: PlannedCluster, pool_file: str | None, outer: Starlette) -> Pool[RayHosts]:
    """A pool whose engines this process has sockets to; `pool_file` is followed."""
    config, session = planned.config, planned.session
    endpoints = EndpointMaker(session.folder, session.address, config.cluster)

    def follow(model: PoolModel, version: int, hosts: RayHosts) -> ClusterModel:
        index = session.first_index
        follower = ClusterModel(model.plan, version, hosts.answer, endpoints, hosts.show, client_index=index)
        follower.on_fault = model.note_client_fault
        return follower

    pool = Pool(config, planned.plans, outer, lambda models: RayHosts(models, session, follow, planned.versions))
    if (tenants := pool.tenants) is not None:
        pool.hosts.leases = LeaseKeeper(tenants.accounts, pool.tenants_report, tenants.set_leases)
    outer.state.operator = cluster_operator(pool, pool_file)
    return pool


def cluster_operator(pool: Pool[RayHosts], pool_file: str | None) -> PoolOperator:
    """Changes the pool; while this server is the eldest it follows `pool_file`."""
    operator = PoolOperator(pool)
    if pool_file:
        pool.works["following the pool file"] = EldestFile(pool_file, operator, pool.hosts).follow
    return operator
