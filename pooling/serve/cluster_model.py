# SPDX-License-Identifier: Apache-2.0
"""One model of a clustered pool, in the frontend: follows the controller's view and keeps its streams connected."""

from __future__ import annotations

import asyncio
import logging
import os
import pickle
import socket
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Any

import zmq

from tokenpool.cluster.machine import machine_id
from tokenpool.cluster.values import Deployment, Endpoints, ModelView, SeatState, SeatView
from tokenpool.host.hosted_core import EngineAddresses
from tokenpool.host.hosted_model import HostedModelSpec
from tokenpool.policy.capacity import Role
from tokenpool.serve.engine_client import PoolEngineClient
from tokenpool.serve.launch_plan import ModelPlan
from tokenpool.serve.model_client import ModelClient
from tokenpool.serve.request_route import by_prefix

logger = logging.getLogger(__name__)

Tell = Callable[..., Awaitable[Any]]
"""Calls the controller: the method's name and its arguments."""


_BUILDING = asyncio.Lock()
"""One app at a time, of all models: vLLM registers its metrics anew with each, and two threads must not do that."""


class EndpointMaker:
    """Makes addresses at which this frontend can listen for one engine."""

    def __init__(self, folder: str, address: str, *, always_tcp: bool) -> None:
        self._folder = folder
        self._address = address
        self._always_tcp = always_tcp
        self._num_made = 0
        self._keys: tuple[bytes, bytes] = zmq.curve_keypair()

    def make(self, machine: str) -> Endpoints:
        """Unix sockets for a host on this machine, else TCP on this node's address."""
        if machine == machine_id() and not self._always_tcp:
            self._num_made += 1
            base = f"ipc://{os.path.join(self._folder, str(self._num_made))}"
            return Endpoints(f"{base}.in", f"{base}.out")
        return Endpoints(*(f"tcp://{self._address}:{port}" for port in self._free_ports()), self._keys[0])

    def addresses(self, made: Endpoints) -> EngineAddresses:
        """What this frontend listens with, its secret key included."""
        secret = self._keys[1] if made.server_key else b""
        return EngineAddresses((made.input,), (made.output,), made.server_key, secret)

    def _free_ports(self) -> list[int]:
        sockets = [socket.socket() for _ in range(2)]
        try:
            for sock in sockets:
                sock.bind((self._address, 0))
            return [sock.getsockname()[1] for sock in sockets]
        finally:
            for sock in sockets:
                sock.close()


class ClusterModel:
    """A model and the hosts that serve it; lives on the event loop."""

    def __init__(
        self,
        plan: ModelPlan,
        version: int,
        tell: Tell,
        endpoints: EndpointMaker,
        on_change: Callable[[ClusterModel], None],
    ) -> None:
        """`on_change` is called whenever hosts joined or were lost, or the model failed."""
        self.plan = plan
        self.version = version
        self.client: ModelClient | None = None
        """Made when the first host has joined."""
        self.changed = asyncio.Event()
        """Set at the same moments as `on_change` is called."""
        self.error: Exception | None = None
        """Why no host serves it; None while one may."""
        self._core: PoolEngineClient | None = None
        self._fatal: Exception | None = None
        self._tell = tell
        self._endpoints = endpoints
        self._on_change = on_change
        self._offered: dict[tuple[str, str], Endpoints] = {}  # by (host, life)
        self._joining: dict[tuple[str, str], asyncio.Task[None]] = {}
        self._leaving: dict[tuple[str, str], asyncio.Task[None]] = {}

    async def deployment(self) -> Deployment:
        """What the controller and the hosts need to know of the model."""
        plan = self.plan
        config = await asyncio.to_thread(plan.engine_config)
        if self._core is None:
            slo = plan.spec.slo
            route = partial(by_prefix, ttft_s=slo.ttft_s) if slo else by_prefix
            self._core = PoolEngineClient(config, route=route)
            config = await asyncio.to_thread(plan.engine_config)
        spec = HostedModelSpec(
            name=plan.spec.name,
            vllm_config=config,
            slo=plan.spec.slo,
            priority=plan.spec.priority,
            weight_bytes=plan.weight_bytes,
            log_stats=not plan.args.disable_log_stats,
        )
        slo = plan.spec.slo
        details = {"ttft_s": slo.ttft_s, "tpot_s": slo.tpot_s} if slo else {}
        return Deployment(
            plan.spec.name,
            self.version,
            plan.weight_bytes,
            plan.spec.priority,
            pickle.dumps(spec),
            details,
            plan.spec.replicas,
            plan.spec.max_replicas,
        )

    @property
    def is_served(self) -> bool:
        """Whether a host takes its requests."""
        return self.client is not None and bool(self.client.core.hosts)

    def standing(self, view: ModelView) -> dict[str, str]:
        """Where it stands, by host; `serving` where this frontend sends requests, `joining` where it is about to."""
        joined = self._core.hosts if self._core is not None else ()
        states: dict[str, str] = {host: seat.state for host, seat in view.seats.items()}
        for host, seat in view.seats.items():
            if seat.state is SeatState.SERVING and _name((host, seat.life)) not in joined:
                states[host] = "joining"
        return states

    @property
    def num_handed_over(self) -> int:
        """Requests that went from a host that prefills to one that decodes."""
        return self._core.num_handed_over if self._core is not None else 0

    def learn(self, loads: Mapping[str, Any]) -> None:
        """Take in what hosts told when they were asked for `load`, by name; exceptions among them tell nothing."""
        if self._core is None:
            return
        for name in self._core.hosts:
            told = loads.get(name.rpartition("/")[0])
            if isinstance(told, Mapping) and (load := told.get(self.plan.spec.name)) is not None:
                self._core.learn(name, load)

    @property
    def num_hosts(self) -> int:
        """Hosts that take its requests."""
        return len(self._core.hosts) if self._core is not None else 0

    def apply(self, view: ModelView | None, lives: Mapping[str, str], roles: Mapping[str, Role]) -> None:
        """Do what a new view asks for; returns at once, the work goes on in tasks."""
        assert self._core is not None
        self._core.roles = {_name((host, life)): roles[host] for host, life in lives.items() if host in roles}
        for key in [key for key in {*self._offered, *self._joining} if lives.get(key[0]) != key[1]]:
            self._forget(key)
        seats = view.seats if view is not None else {}
        for host, seat in seats.items():
            if seat.version == self.version:
                self._follow(host, seat)
        is_tried = any(seat.version == self.version for seat in seats.values())
        self.error = self._fatal or (view.error if view is not None and not is_tried else None)
        self._notify()

    def _notify(self) -> None:
        self._on_change(self)
        self.changed.set()

    def _forget(self, key: tuple[str, str]) -> None:
        """A host is gone, or has a new process: its requests go elsewhere."""
        assert self._core is not None
        self._offered.pop(key, None)
        if task := self._joining.pop(key, None):
            task.cancel()
        self._core.lost(_name(key))

    def _follow(self, host: str, seat: SeatView) -> None:
        assert self._core is not None
        key = (host, seat.life)
        if seat.state is SeatState.WANTED:
            if key not in self._offered:
                self._offered[key] = self._endpoints.make(seat.machine)
            _spawn(self._say("offer", *key, self._offered[key]))
        elif seat.state is SeatState.SERVING and key in self._offered:
            if key not in self._joining:
                self._joining[key] = _spawn(self._join(key))
        elif seat.state is SeatState.SERVING:
            # Loaded for a frontend of the past, whose endpoints nobody listens at.
            _spawn(self._say("join_failed", *key, "no frontend listens for it"))
        elif seat.state is SeatState.LEAVING and key not in self._leaving:
            self._leaving[key] = _spawn(self._leave(key))

    async def _join(self, key: tuple[str, str]) -> None:
        assert self._core is not None
        addresses = self._endpoints.addresses(self._offered[key])
        try:
            await self._core.join(_name(key), addresses)
            async with _BUILDING:
                if self.client is None and self._fatal is None:
                    await self._build()
        except Exception as error:
            logger.exception("host cannot be joined model=%s host=%s", self.plan.spec.name, key[0])
            self._offered.pop(key, None)
            await self._say("join_failed", *key, str(error))
            return
        logger.info("host joined model=%s host=%s life=%s", self.plan.spec.name, *key)
        self._notify()

    async def _build(self) -> None:
        assert self._core is not None
        try:
            self.client = await ModelClient.over(self.plan, self._core, {})
        except Exception as error:
            self._fatal = self.error = error  # its client is closed: no host can help
            raise

    async def _leave(self, key: tuple[str, str]) -> None:
        assert self._core is not None
        try:
            if task := self._joining.pop(key, None):
                task.cancel()
            if _name(key) in self._core.hosts:
                await self._core.leave(_name(key))
                logger.info("host left model=%s host=%s life=%s", self.plan.spec.name, *key)
            self._offered.pop(key, None)
            await self._say("left", *key)
        finally:
            del self._leaving[key]
            self._notify()

    async def _say(self, method: str, *args: Any) -> None:
        try:
            await self._tell(method, self.plan.spec.name, *args)
        except Exception as error:  # a controller that is being restarted will ask again
            logger.debug("controller does not hear %s: %s", method, error)

    async def close(self) -> None:
        """Free the client; its engines end by themselves."""
        for task in (*self._joining.values(), *self._leaving.values()):
            task.cancel()
        if self.client is not None:
            await self.client.close()
        elif self._core is not None:
            self._core.close()


def _name(key: tuple[str, str]) -> str:
    return "/".join(key)


_tasks: set[asyncio.Task[None]] = set()


def _spawn(work: Any) -> asyncio.Task[None]:
    task = asyncio.get_running_loop().create_task(work)
    _tasks.add(task)  # the loop itself holds tasks weakly
    task.add_done_callback(_tasks.discard)
    return task
