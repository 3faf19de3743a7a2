# SPDX-License-Identifier: Apache-2.0
"""Connects to Ray and keeps a pool's actors there. The driver owns them: they end with it, whatever ends it."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenpool import settings
from tokenpool.cluster_config import ClusterConfig
from tokenpool.errors import ConfigError, PoolError

logger = logging.getLogger(__name__)

_FORWARDED = ("VLLM_", "HF_", "OMP_NUM_THREADS", settings.LOG_LEVEL.name)
_SECRET = ("TOKEN", "KEY", "SECRET")
_LOOK_S = 5.0


def prepare(address: str) -> None:
    """Set Ray's authentication, then import Ray, which reads it then; raises PoolError that says how to get Ray.

    A Ray that is started here gets a token that nobody else knows. Another one is asked with this user's token; without
    one it is refused, unless RAY_AUTH_MODE says `disabled`: whoever reaches such a Ray runs code on its nodes. Call it
    before vLLM, which imports Ray too.
    """
    mode = settings.RAY_AUTH_MODE.get()
    if mode is None and address != "local" and not _has_token():
        raise ConfigError(
            "no token of Ray's is here (RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token): give it, or set "
            "RAY_AUTH_MODE=disabled for a cluster that asks for none, where whoever reaches Ray runs code",
            key="--cluster",
        )
    settings.RAY_AUTH_MODE.set_default("token")
    if address == "local" and settings.RAY_AUTH_MODE.get() == "token":
        settings.RAY_AUTH_TOKEN.set_default(secrets.token_hex(32))
    try:
        import ray  # noqa: F401
    except ImportError as error:
        raise PoolError("--cluster needs Ray: pip install 'tokenpool[cluster]'") from error
    if mode == "disabled":
        logger.warning("Ray asks for no token (RAY_AUTH_MODE=disabled): whoever reaches its ports runs code here")


def _has_token() -> bool:
    named = settings.RAY_AUTH_TOKEN.get() or settings.RAY_AUTH_TOKEN_PATH.get()
    return bool(named) or Path("~/.ray/auth_token").expanduser().exists()


def connect(address: str, config: ClusterConfig, num_hosts: int) -> None:
    """Connect this process to a Ray cluster, or start one here for `local`, after `prepare`; raises PoolError."""
    import ray

    options: dict[str, Any] = {"namespace": namespace_of(config), "logging_level": logging.WARNING}
    if address == "local":
        # The object store carries nothing of weight here: orders and reports.
        options |= {"num_cpus": num_hosts * config.num_cpus_per_host, "object_store_memory": 100 << 20}
        options |= {"include_dashboard": False}
    try:
        ray.init(address=address, **options)
    except Exception as error:  # Ray raises many kinds
        raise PoolError(f"no Ray cluster at {address}: {' '.join(str(error).split())[:300]}") from error


def namespace_of(config: ClusterConfig) -> str:
    """Ray namespace of a pool's actors."""
    return f"tokenpool-{config.name}"


def wanted_hosts(config: ClusterConfig, *, use_gpus: bool) -> int:
    """How many hosts there are to be, with `hosts: auto` one per GPU that the cluster has now."""
    if config.hosts is not None:
        return config.hosts
    import ray

    return max(1, int(ray.cluster_resources().get("GPU", 0))) if use_gpus else 1


class Session:
    """A pool's controller and host actors; made after `connect`."""

    def __init__(
        self, config: ClusterConfig, host_config: Mapping[str, Any], *, use_gpus: bool, host_template: bool = True
    ) -> None:
        """Start the controller and as many hosts as are asked for. `host_config` holds the fields of a HostConfig.

        With `host_template` each host's supervisor keeps a template of hosts.
        Raises ConfigError when a pool of this name runs in the cluster, or no host can be placed.
        """
        import ray

        from tokenpool.cluster.actors import Controller

        self._ray = ray
        self._config = config
        self._host_config = dict(host_config)
        self._use_gpus = use_gpus
        self._host_template = host_template
        namespace = namespace_of(config)
        num_hosts = wanted_hosts(config, use_gpus=use_gpus)
        options = {"name": "controller", "num_cpus": 0, "max_restarts": -1, "max_concurrency": 1000}
        try:
            self.controller = ray.remote(Controller).options(**options).remote(config, num_hosts, namespace)
        except ValueError as error:
            problem = f"a pool named {config.name!r} runs in this cluster already: give this one another name"
            raise ConfigError(problem, key="cluster.name") from error
        self.address: str = ray.util.get_node_ip_address()
        """IP address of this node."""
        self.hosts: dict[str, Any] = {}
        self.add_hosts()

    def add_hosts(self) -> None:
        """Start the host actors that are missing; Ray places them when there is room, also on nodes that join later."""
        from tokenpool.cluster.actors import HostActor

        for index in range(len(self.hosts), wanted_hosts(self._config, use_gpus=self._use_gpus)):
            name = f"host-{index}"
            options = {
                "name": name,
                "num_cpus": self._config.num_cpus_per_host,
                "num_gpus": 1 if self._use_gpus else 0,
                "max_restarts": -1,
                "max_concurrency": 32,
                "scheduling_strategy": "SPREAD",
            }
            self.hosts[name] = (
                self._ray.remote(HostActor)
                .options(**options)
                .remote(
                    name,
                    self._host_config,
                    self.controller,
                    self._config.reconcile_period_s,
                    self._host_env(),
                    self._host_template,
                )
            )

    async def follow_nodes(self) -> None:
        """With `hosts: auto`, start a host for every GPU that joins; runs until cancelled."""
        while True:
            await asyncio.sleep(_LOOK_S)
            await asyncio.to_thread(self.add_hosts)

    def _host_env(self) -> dict[str, str | None]:
        # These may be in the environment of Ray's workers too.
        env: dict[str, str | None] = dict.fromkeys(settings.SECRETS)
        given = settings.environment()
        env |= {k: v for k, v in given.items() if k.startswith(_FORWARDED) and not any(s in k for s in _SECRET)}
        if not self._use_gpus:
            env.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # several hosts would be bound to the same cores
            env.setdefault("OMP_NUM_THREADS", str(max(1, int(self._config.num_cpus_per_host))))
        return env

    async def stop(self, limit_s: float) -> None:
        """End the hosts, each after at most `limit_s`, and all actors."""

        async def stop_host(handle: Any) -> None:
            try:
                async with asyncio.timeout(limit_s + 2.0):
                    await handle.stop.remote(limit_s)
            except Exception as error:  # one that is gone needs no stop
                logger.debug("host not stopped: %s", error)

        await asyncio.gather(*(stop_host(handle) for handle in self.hosts.values()))
        await asyncio.to_thread(self._ray.shutdown)
