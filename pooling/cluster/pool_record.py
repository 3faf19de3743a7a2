# SPDX-License-Identifier: Apache-2.0
"""What a pool is started with, what whoever joins it is told, and what its controller keeps in Ray for the next one.

Both hold models as pickles, as orders do: whoever may call actors may run code on the hosts (docs/cluster.md). There is
no key in them: of settings that servers must agree on there are digests.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import pickle
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from tokenpool.cluster.deciding.scaling import HostsKept
from tokenpool.cluster.values import Deployment, Peer
from tokenpool.cluster_config import ClusterConfig
from tokenpool.config import PoolConfig
from tokenpool.errors import PoolError
from tokenpool.sections import key_of

logger = logging.getLogger(__name__)

CONTROLLER = "controller"
"""Name of the controller's actor in the pool's namespace."""
_OWN = ("models", "host", "port", "frontends", "shutdown_timeout_s")
"""Settings in which the servers of one pool may differ."""
KEEP_LIMIT_S = 2.0
"""How long a change waits until the next controller would know of it; while Ray's head is away it does not."""
_RETRY_S = 1.0


@dataclass(frozen=True, slots=True)
class PoolRecord:
    """A pool, as the server that started it made it."""

    identity: str
    """Of this start, drawn at random."""
    config: ClusterConfig
    host_config: Mapping[str, Any]
    """The fields of a HostConfig."""
    host_env: Mapping[str, str | None] = field(default_factory=dict)
    use_gpus: bool = False
    host_template: bool = True
    models: tuple[Deployment, ...] = ()
    planned: Mapping[str, str] = field(default_factory=dict)
    """What planning made of settings that are `auto`."""
    settings: Mapping[str, str] = field(default_factory=dict)
    """A digest of each setting that the servers must agree on."""
    tenant_slots: Mapping[str, int] = field(default_factory=dict)
    """Each tenant's `max_concurrent`, 0 without one."""
    tenant_weights: Mapping[str, float] = field(default_factory=dict)
    max_loaded: int | None = None
    """Models that are loaded at a time; None = all."""
    file_models: bytes = field(default=b"", repr=False)
    """The pickled entries of the pool file that the models come from; only servers open it."""
    has_network: bool = True
    """Whether hosts may be on several machines, and hand KV to each other over the network."""


class PoolStanding(NamedTuple):
    """What a server that wants to join is told."""

    record: PoolRecord
    """With the models of now."""
    num_servers: int
    is_ending: bool


class Kept(NamedTuple):
    """What the next controller cannot be told by hosts."""

    models: list[Deployment]
    file_models: bytes
    servers: list[Peer]
    hosts: HostsKept = HostsKept()
    """Those of a pool whose number of hosts follows the need."""
    draining: tuple[str, ...] = ()
    """Hosts that the operator wants empty."""

    def known(self, snapshot: Mapping[str, Any]) -> dict[str, Any]:
        """That snapshot with what is newer here: it may be one of another time, or of none, on this node."""
        return {**(snapshot or {"awake": ()}), "draining": self.draining}


def wanted_hosts(config: ClusterConfig, *, use_gpus: bool) -> int:
    """How many hosts there are to be, or may be, with `hosts: auto` one per GPU that the cluster has now."""
    if config.most_hosts is not None:
        return config.most_hosts
    import ray

    return max(1, int(ray.cluster_resources().get("GPU", 0))) if use_gpus else 1


def unpack(content: bytes) -> Any:
    """What was pickled: plans, entries of a pool file, or what is kept."""
    return pickle.loads(content)


def digests(config: PoolConfig, software: Mapping[str, str], identity: str) -> dict[str, str]:
    """A digest of each setting that the servers of a pool must agree on, which differs from one pool to the next.

    `software` has the versions of what they run.
    """
    plain = {key: value for key, value in asdict(config).items() if key not in _OWN}
    plain |= {f"cluster.{key}": value for key, value in plain.pop("cluster").items()}
    plain |= {f"version of {name}": number for name, number in software.items()}
    texts = {key: json.dumps(value, sort_keys=True, default=repr) for key, value in plain.items()}
    return {key: hashlib.sha256(f"{identity}{key}{text}".encode()).hexdigest() for key, text in texts.items()}


def differing(config: PoolConfig, software: Mapping[str, str], record: PoolRecord) -> list[str]:
    """The settings, by their keys in a pool file, in which a config differs from that of a pool."""
    own = digests(config, software, record.identity)
    found = [key for key in own.keys() | record.settings.keys() if own.get(key) != record.settings.get(key)]
    return sorted(".".join(map(key_of, key.split("."))) for key in found)


class PoolStore:
    """Keeps a pool in Ray's own store, which outlives every process of a pool but Ray's; used in Ray's processes.

    What an actor is made with would be lost with the process that made it, were it large.
    """

    _NAMESPACE = b"tokenpool"

    def __init__(self, pool: str) -> None:
        self._pool = pool

    def write_record(self, record: PoolRecord) -> None:
        """Keep what a pool is to be started with."""
        self._put(f"record-{record.identity}", record)

    def read_record(self, identity: str) -> PoolRecord:
        """What the pool of that start was started with; raises PoolError if it is gone."""
        record = self._get(f"record-{identity}")
        if not isinstance(record, PoolRecord):
            raise PoolError(f"Ray does not have the record of {self._pool} any more: end the pool (tokenpool down)")
        return record

    def drop_record(self, identity: str) -> None:
        """Keep it no longer."""
        self._delete(f"record-{identity}")

    def read(self, identity: str) -> Kept | None:
        """What was kept for the next controller of the pool of that start; None if nothing was."""
        whose, kept = self._get("kept") or ("", None)
        return kept if whose == identity else None

    def write(self, identity: str, kept: Kept) -> None:
        """Keep this for the next controller of that pool, in the place of what was kept before."""
        self._put("kept", (identity, kept))

    def next_generation(self, host: str) -> int:
        """A number larger than that of any earlier actor of this name; Ray starts one at a time."""
        generation: int = 1 + (self._get(f"generation-{host}") or 0)
        self._put(f"generation-{host}", generation)
        return generation

    def forget_host(self, host: str) -> None:
        """There will be no actor of this name any more."""
        self._delete(f"generation-{host}")

    def clear(self) -> None:
        """Keep nothing for the next controller."""
        self._delete("kept")

    def look(self, limit_s: float) -> None:
        """Return when Ray's head answers; raises what Ray raises if it does not within `limit_s`."""
        from ray.experimental.internal_kv import internal_kv_get_gcs_client

        internal_kv_get_gcs_client().internal_kv_exists(self._key("kept"), self._NAMESPACE, timeout=limit_s)

    def _get(self, name: str) -> Any:
        from ray.experimental.internal_kv import _internal_kv_get

        found = _internal_kv_get(self._key(name), namespace=self._NAMESPACE)
        return unpack(found) if found else None

    def _put(self, name: str, value: Any) -> None:
        from ray.experimental.internal_kv import _internal_kv_put

        _internal_kv_put(self._key(name), pickle.dumps(value), overwrite=True, namespace=self._NAMESPACE)

    def _delete(self, name: str) -> None:
        from ray.experimental.internal_kv import _internal_kv_del

        _internal_kv_del(self._key(name), namespace=self._NAMESPACE)

    def _key(self, name: str) -> bytes:
        return f"{self._pool}/{name}".encode()


class KeptWriter:
    """Writes what is kept beside the event loop: Ray's head may be away, and then a write takes a minute, or for ever.

    Only the newest value is written, again until it is. Made anywhere, used on one event loop.
    """

    def __init__(self, write: Callable[[Kept], None], *, retry_s: float = _RETRY_S) -> None:
        """`write` is called on a thread, one call at a time."""
        self._write, self._retry_s = write, retry_s
        self._newest: Kept | None = None
        self._num_put = self._num_written = 0
        self._is_late = self._is_stopping = False
        self._written = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def put(self, value: Kept) -> None:
        """Let this be what is kept; returns at once."""
        self._newest, self._num_put = value, self._num_put + 1
        self._written.clear()
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._run())

    async def written(self, limit_s: float) -> bool:
        """Wait until what was put is kept; returns whether it is. Once one has waited in vain, nobody waits."""
        if not self._is_late and self._num_written < self._num_put:
            try:
                async with asyncio.timeout(limit_s):
                    await self._written.wait()
            except TimeoutError:
                self._is_late = True
                logger.warning("Ray does not take what the next controller needs; it is written once it does")
        return self._num_written == self._num_put

    async def stop(self, limit_s: float) -> None:
        """Write nothing more; returns once no write is under way, or after `limit_s`."""
        self._is_stopping = True
        if self._task is not None:
            await asyncio.wait({self._task}, timeout=limit_s)

    async def _run(self) -> None:
        while self._num_written < self._num_put and not self._is_stopping:
            number, value = self._num_put, self._newest
            assert value is not None
            try:
                await asyncio.to_thread(self._write, value)
            except Exception as error:  # Ray raises many kinds
                logger.debug("not kept: %s", error)
                await asyncio.sleep(self._retry_s)
            else:
                self._num_written = number
        self._is_late, self._task = False, None
        self._written.set()
