# SPDX-License-Identifier: Apache-2.0
"""The host actors of a pool, as its controller makes, finds and ends them. They outlive it: it finds them by name."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Collection, Mapping
from typing import Any

import ray
from ray.actor import ActorHandle

from tokenpool.cluster.host_actor import THREADS, HostActor
from tokenpool.cluster.pool_record import CONTROLLER, PoolRecord, wanted_hosts
from tokenpool.cluster.values import Peer
from tokenpool.errors import text_of
from tokenpool.host_kinds import ANY, Kind, selectors

logger = logging.getLogger(__name__)

_UNKNOWN_END_S = 1.0
"""For a host that has never reported, such as one that Ray has no room for."""
_STOP_MARGIN_S = 2.0
_EMPTY_END_S = 1.0
"""For a host that has nothing to finish."""
_RETRY_S = 1.0
_GONE_LIMIT_S, _LOOK_S = 10.0, 0.1
"""How long Ray may take to forget an actor that was ended."""


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

    def start_missing(self, wanted: Mapping[str, Kind] | None = None) -> None:
        """Start those of `wanted` that are missing, each of its kind; None = as many as there are to be, of any.

        One that cannot be started now holds up no other one: it is still missing when this is called again.

        Ray places them when there is room, also on nodes that join later; for an actor without a node its autoscaler
        adds one, with the labels that its kind asks for. One that a former controller started is found; one that was
        killed for good, so that Ray does not restart it, is made anew. Blocks, for any thread.
        """
        controller = ray.get_actor(CONTROLLER, self._namespace)
        self._forget_ended()
        if wanted is None:
            wanted = {f"host-{index}": ANY for index in range(self.num_wanted())}
        for name, kind in wanted.items():
            with self._making:
                if self._is_ending or name in self._made:
                    continue
                try:
                    self._made[name] = self._make(name, kind, controller)
                except Exception as error:  # such as Ray's, of labels that it does not take
                    logger.warning("host not started host=%s: %s", name, text_of(error)[:200])

    def _forget_ended(self) -> None:
        """Take those as missing that Ray knows no more; it knows what it restarts, and what it has no node for."""
        found = ray.util.list_named_actors(all_namespaces=True)
        there = {actor["name"] for actor in found if actor["namespace"] == self._namespace}
        with self._making:
            for name in [] if self._is_ending else self._made.keys() - there:
                logger.warning("host was killed for good, another one is made host=%s", name)
                del self._made[name]

    def _make(self, name: str, kind: Kind, controller: ActorHandle) -> ActorHandle:
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
            # Where hosts come and go they share nodes, so that others get empty.
            "scheduling_strategy": "DEFAULT" if record.config.host_range else "SPREAD",
        }
        if kind:
            first, *others = selectors(kind)
            options |= {"label_selector": first, "fallback_strategy": [{"label_selector": other} for other in others]}
        given = (name, record.host_config, controller, record.config.reconcile_period_s, record.host_env)
        actor = ray.remote(concurrency_groups=THREADS)(HostActor).options(**options)
        return actor.remote(*given, record.host_template, record.has_network)

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

        await asyncio.to_thread(self._make_no_more)
        limits = {host: limit_s if host in reported else None for host in self._made}
        await asyncio.gather(*(self._end_one(actor, limits[host], servers) for host, actor in self._made.items()))

    async def _end_one(self, actor: ActorHandle, limit_s: float | None, servers: Collection[Peer] = ()) -> None:
        """End a host after at most `limit_s`, None = it has never reported, and its actor."""
        with contextlib.suppress(Exception):  # one that is gone needs no stop, one that hangs gets none
            async with asyncio.timeout(_UNKNOWN_END_S if limit_s is None else limit_s + _STOP_MARGIN_S):
                await asyncio.gather(*(actor.clear_after.remote(server) for server in servers))
                await actor.stop.remote(limit_s or 0.0)
        with contextlib.suppress(Exception):
            ray.kill(actor, no_restart=True)

    async def give_back(self, host: str, *, has_reported: bool) -> None:
        """End a host that has nothing, and its actor, so that its node may go; returns once Ray knows it no more.

        Raises TimeoutError if that takes too long.
        """
        with contextlib.suppress(ValueError):  # a former controller has ended it
            await self._end_one(await self.handle(host), _EMPTY_END_S if has_reported else None)
        deadline_s = time.monotonic() + _GONE_LIMIT_S
        while await asyncio.to_thread(self._is_known, host):
            if time.monotonic() > deadline_s:
                raise TimeoutError(f"Ray has not ended {host}")
            await asyncio.sleep(_LOOK_S)
        self._made.pop(host, None)

    def _is_known(self, host: str) -> bool:
        try:
            ray.get_actor(host, self._namespace)
        except ValueError:
            return False
        return True

    def _make_no_more(self) -> None:
        with self._making:
            self._is_ending = True

    def end_controller(self) -> None:
        """End the actor that calls this, for good. Blocks until it ends, for any thread.

        Its pool has ended, so Ray is told again and again, whose head may be away: nobody else would end it.
        """
        while True:
            try:
                ray.kill(ray.get_actor(CONTROLLER, self._namespace), no_restart=True)
            except Exception as error:  # Ray raises many kinds
                logger.warning("the controller is not ended: %s", text_of(error)[:200])
            time.sleep(_RETRY_S)
