# SPDX-License-Identifier: Apache-2.0
"""The host actors of a pool, as its controller makes, finds and ends them. They outlive it: it finds them by name."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Collection
from typing import Any

import ray
from ray.actor import ActorHandle

from tokenpool.cluster.host_actor import HostActor
from tokenpool.cluster.pool_record import CONTROLLER, PoolRecord, wanted_hosts
from tokenpool.cluster.values import Peer

logger = logging.getLogger(__name__)

_UNKNOWN_END_S = 1.0
"""For a host that has never reported, such as one that Ray has no room for."""
_STOP_MARGIN_S = 2.0


class HostActors:
    """Host actors by name."""

    def __init__(self, record: PoolRecord, namespace: str) -> None:
        self._record = record
        self._namespace = namespace
        self._made: dict[str, ActorHandle] = {}
        self._making = threading.Lock()
        self._is_ending = False

    def num_wanted(self) -> int:
        """How many there are to be."""
        return wanted_hosts(self._record.config, use_gpus=self._record.use_gpus)

    def start_missing(self) -> None:
        """Start those that are missing; Ray places them when there is room, also on nodes that join later.

        One that a former controller started is found. Blocks, for any thread.
        """
        controller = ray.get_actor(CONTROLLER, self._namespace)
        for index in range(len(self._made), self.num_wanted()):
            name = f"host-{index}"
            with self._making:
                if not self._is_ending:
                    self._made[name] = self._make(name, controller)

    def _make(self, name: str, controller: ActorHandle) -> ActorHandle:
        record = self._record
        options: dict[str, Any] = {
            "name": name,
            "namespace": self._namespace,
            "lifetime": "detached",
            "get_if_exists": True,
            "num_cpus": record.config.num_cpus_per_host,
            "num_gpus": 1 if record.use_gpus else 0,
            "max_restarts": -1,
            "max_concurrency": 32,
            "scheduling_strategy": "SPREAD",
        }
        given = (name, record.host_config, controller, record.config.reconcile_period_s, record.host_env)
        return ray.remote(HostActor).options(**options).remote(*given, record.host_template, record.has_network)

    async def handle(self, host: str) -> ActorHandle:
        """The actor of a host; raises ValueError if there is none."""
        if host not in self._made:
            return await asyncio.to_thread(ray.get_actor, host, self._namespace)
        return self._made[host]

    async def forget(self, peer: Peer, hosts: Collection[str]) -> None:
        """Let hosts drop the requests of a server that is gone; one that does not answer is gone, or soon will be."""

        async def forget_at(host: str) -> None:
            actor = await self.handle(host)
            await actor.clear_after.remote(peer)
            for index in range(peer.first_index, peer.first_index + peer.num_indexes):
                await actor.call.remote("detach_frontend", index)

        answers = await asyncio.gather(*map(forget_at, hosts), return_exceptions=True)
        for host, answer in zip(hosts, answers, strict=True):
            if isinstance(answer, BaseException):
                logger.warning("host does not forget server=%s host=%s: %s", peer.name, host, answer)

    async def end(self, limit_s: float, reported: Collection[str], servers: Collection[Peer]) -> None:
        """End all hosts, each after at most `limit_s`, and their actors.

        `reported` are those that ever were there; what `servers` have left that were killed is removed.
        """

        async def end_one(host: str, actor: ActorHandle) -> None:
            own_limit_s = limit_s + _STOP_MARGIN_S if host in reported else _UNKNOWN_END_S
            with contextlib.suppress(Exception):  # one that is gone needs no stop, one that hangs gets none
                async with asyncio.timeout(own_limit_s):
                    await asyncio.gather(*(actor.clear_after.remote(server) for server in servers))
                    await actor.stop.remote(limit_s)
            with contextlib.suppress(Exception):
                ray.kill(actor, no_restart=True)

        await asyncio.to_thread(self._make_no_more)
        await asyncio.gather(*(end_one(host, actor) for host, actor in self._made.items()))

    def _make_no_more(self) -> None:
        with self._making:
            self._is_ending = True

    def end_controller(self) -> None:
        """End the actor that calls this, for good. Blocks, for any thread."""
        ray.kill(ray.get_actor(CONTROLLER, self._namespace), no_restart=True)
