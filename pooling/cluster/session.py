# SPDX-License-Identifier: Apache-2.0
"""Connects a server to Ray and to its pool there, which is started if it is not there. Nobody owns it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenpool import settings
from tokenpool.cluster.machine import machine_id
from tokenpool.cluster.pool_record import CONTROLLER, PoolRecord, PoolStanding, PoolStore
from tokenpool.cluster.values import Peer
from tokenpool.cluster_config import ClusterConfig
from tokenpool.errors import ConfigError, HostError, PoolError
from tokenpool.process.ending import HOST_END_S

logger = logging.getLogger(__name__)

_FORWARDED = ("VLLM_", "HF_", "OMP_NUM_THREADS", settings.LOG_LEVEL.name)
_SECRET = ("TOKEN", "KEY", "SECRET")
_MAX_FRONTENDS = 64
_FIND_LIMIT_S = 90.0
"""For a pool of that name that ends, or is being started or restarted."""
_ANSWER_LIMIT_S = 10.0
_RETRY_S = 0.2
_WITHOUT_HEAD_S = str(7 * 24 * 3600)
"""How long this process, and a Ray that it starts, go on while Ray's head is away; Ray would end them after 60 s."""
_END_MARGIN_S = 20.0


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
    settings.RAY_RECONNECT.set_default(_WITHOUT_HEAD_S)
    settings.RAY_EVENTS.set_default("0")
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


class Session:
    """A server's way to its pool in Ray; made after `connect`."""

    def __init__(self, config: ClusterConfig, *, owns_ray: bool) -> None:
        """With `owns_ray` Ray ends with this process, and the pool with it."""
        import ray

        self._ray = ray
        self._config = config
        self._namespace = namespace_of(config)
        self._controller: Any = None
        self._hosts: dict[str, Any] = {}
        self._finding: dict[str, asyncio.Future[Any]] = {}
        self._has_left = False
        self.owns_ray = owns_ray
        self.name = secrets.token_hex(6)
        """Of this server in the pool."""
        self.first_index = (1 + secrets.randbits(40)) * _MAX_FRONTENDS
        """The first of the indexes by which engines know its frontends: no other server ever has one of them."""
        self.address: str = ray.util.get_node_ip_address()
        """IP address of this node."""
        self.folder = tempfile.mkdtemp(prefix="tokenpool-")
        """For sockets; mode 0700: only this user reaches them."""
        self.has_started = False
        """Whether this server started the pool, and has not served yet."""
        self.fault: HostError | None = None
        """Why this server ends although nobody asked it to; None while it does not."""

    # -- the pool ------------------------------------------------------------------------------------

    def find(self) -> PoolStanding | None:
        """What a pool of this name tells that is there; None if there is none. Waits for one that ends.

        Raises PoolError if it does not answer.
        """
        deadline_s = time.monotonic() + _FIND_LIMIT_S
        problem = "it is ending"
        while time.monotonic() < deadline_s:
            try:
                controller = self._ray.get_actor(CONTROLLER, self._namespace)
                standing: PoolStanding = self._ray.get(controller.standing.remote(), timeout=_ANSWER_LIMIT_S)
            except ValueError:
                return None
            except Exception as error:  # it is being restarted, or has just ended
                problem = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            else:
                if not standing.is_ending:
                    self._controller = controller
                    return standing
            time.sleep(_RETRY_S)
        raise PoolError(f"pool {self._config.name!r} is there and does not take this server: {problem}")

    def start(self, record: PoolRecord) -> PoolStanding:
        """Start a pool, unless somebody else has just done so; returns the one that is there. Raises PoolError."""
        from tokenpool.cluster.controller import Controller

        options: dict[str, Any] = {
            "name": CONTROLLER, "namespace": self._namespace, "lifetime": "detached", "get_if_exists": True,
            "num_cpus": 0, "max_restarts": -1, "max_concurrency": 1000,
        }  # fmt: skip
        names = self._names()
        if CONTROLLER not in names:  # hosts of a pool whose controller was ended by force
            self._kill(names)
        store = PoolStore(self._namespace)
        store.write_record(record)
        self._ray.remote(Controller).options(**options).remote(record.identity, self._namespace)
        standing = self.find()
        if standing is None:
            raise PoolError(f"pool {self._config.name!r} ended while it was being started")
        self.has_started = standing.record.identity == record.identity
        if not self.has_started:
            store.drop_record(record.identity)
        return standing

    async def tell(self, method: str, *args: Any) -> Any:
        """Call the controller; raises what the call raises."""
        self._refuse_if_left()
        try:
            return await getattr(self._controller, method).remote(*args)
        except self._ray.exceptions.ActorDiedError:  # somebody else may have started the pool anew
            with contextlib.suppress(ValueError):
                self._controller = await self._find_actor(CONTROLLER)
            raise

    async def host(self, name: str) -> Any:
        """A host's actor; raises ValueError if there is none."""
        self._refuse_if_left()
        if name not in self._hosts:
            self._hosts[name] = await self._find_actor(name)
        return self._hosts[name]

    def look_again(self, host: str, error: Exception) -> None:
        """A call to a host's actor failed: the pool makes another one of that name where it was killed for good."""
        if isinstance(error, self._ray.exceptions.ActorDiedError):
            self._hosts.pop(host, None)

    async def _find_actor(self, name: str) -> Any:
        """An actor of the pool; raises ValueError if there is none. However many ask for it, one thread waits."""
        if (finding := self._finding.get(name)) is None:
            finding = asyncio.ensure_future(asyncio.to_thread(self._ray.get_actor, name, self._namespace))
            self._finding[name] = finding
            finding.add_done_callback(lambda done: (self._finding.pop(name), done.cancelled() or done.exception()))
        return await asyncio.shield(finding)

    def look_at_head(self, limit_s: float) -> None:
        """Return when Ray's head answers; raises what Ray raises if it does not in time. Blocks, for any thread."""
        PoolStore(self._namespace).look(limit_s)

    def peer(self, num_frontends: int) -> Peer:
        """This server, as the controller is told of it."""
        folders = (self.folder, settings.METRICS_FOLDER.get() or "")
        return Peer(self.name, self.first_index, num_frontends, self.address, os.getpid(), machine_id(), folders)

    # -- the end -------------------------------------------------------------------------------------

    async def leave(self) -> None:
        """Leave the pool, which lives on; end it if it is nobody's but this server's, and this one never served."""
        try:
            async with asyncio.timeout(_ANSWER_LIMIT_S):
                await self.tell("leave", self.name)
            if self.owns_ray or self.has_started:
                async with asyncio.timeout(HOST_END_S):
                    await self.tell("end", 0.0, None if self.owns_ray else self.name)
        except Exception as error:  # the pool notices without a word
            logger.warning("the pool does not hear that this server ends: %s", type(error).__name__)
        self.has_started, self._has_left = False, True
        shutil.rmtree(self.folder, ignore_errors=True)
        await asyncio.to_thread(self._ray.shutdown)

    def _refuse_if_left(self) -> None:
        if self._has_left:  # else Ray would connect once more
            raise HostError("this server has left the pool")

    def abandon(self) -> None:
        """This server does not come to serve: end the pool if it started it, and nobody else has joined."""
        if self.has_started:
            with contextlib.suppress(Exception):  # the pool ends by itself without servers
                self._ray.get(self._controller.end.remote(0.0, self.name), timeout=HOST_END_S)
        shutil.rmtree(self.folder, ignore_errors=True)

    def end(self, limit_s: float) -> bool:
        """End the pool, and whatever is left of an earlier one; returns whether there was any. Raises PoolError."""
        was_there, deadline_s = False, time.monotonic() + limit_s + _END_MARGIN_S
        while (names := self._names()) and time.monotonic() < deadline_s:
            was_there = True
            try:
                controller = self._ray.get_actor(CONTROLLER, self._namespace)
                self._ray.get(controller.end.remote(limit_s), timeout=max(1.0, deadline_s - time.monotonic()))
            except ValueError:  # it is gone, and hosts are there
                self._kill(names)
            except Exception as error:  # it is being restarted, or has just ended
                logger.debug("the pool does not answer: %s", error)
            time.sleep(_RETRY_S)
        shutil.rmtree(self.folder, ignore_errors=True)
        if names:
            raise PoolError(f"pool {self._config.name!r} does not end: {', '.join(sorted(names))} are still there")
        return was_there

    def _kill(self, names: Iterable[str]) -> None:
        for name in names:
            with contextlib.suppress(ValueError):
                self._ray.kill(self._ray.get_actor(name, self._namespace), no_restart=True)

    def _names(self) -> list[str]:
        """The pool's actors."""
        found = self._ray.util.list_named_actors(all_namespaces=True)
        return [actor["name"] for actor in found if actor["namespace"] == self._namespace]


def host_env(config: ClusterConfig, *, use_gpus: bool) -> dict[str, str | None]:
    """What the hosts of a pool find in their environment; a variable that is None is kept from them."""
    # These may be in the environment of Ray's workers too.
    env: dict[str, str | None] = dict.fromkeys(settings.SECRETS)
    given = settings.environment()
    env |= {k: v for k, v in given.items() if k.startswith(_FORWARDED) and not any(s in k for s in _SECRET)}
    if not use_gpus:
        env.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # several hosts would be bound to the same cores
        env.setdefault("OMP_NUM_THREADS", str(max(1, int(config.num_cpus_per_host))))
    return env
