# SPDX-License-Identifier: Apache-2.0
"""One model of a clustered pool in a frontend: keeps its streams connected to the hosts that serve it."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any

import zmq

from tokenpool.cluster.machine import machine_id
from tokenpool.cluster.values import Endpoints
from tokenpool.cluster_config import ClusterConfig
from tokenpool.policy.capacity import Role
from tokenpool.serve.client.engine_client import PoolEngineClient
from tokenpool.serve.client.model_client import ModelClient
from tokenpool.serve.client.request_route import by_prefix
from tokenpool.serve.clustered.seat_follower import Key, SeatFollower, Tell, name_of
from tokenpool.serve.launch.model_plan import ModelPlan
from tokenpool.wire.addresses import EngineAddresses

_VIEW_S = 2.0
"""In which a view mostly tells of a host that died."""
_BUILDING = asyncio.Lock()
"""One app at a time, of all models: vLLM registers its metrics anew with each, and two threads must not do that."""


class EndpointMaker:
    """Makes addresses at which this frontend can listen for one engine."""

    def __init__(self, folder: str, address: str, config: ClusterConfig) -> None:
        self._folder = folder
        self._address = address
        self._config = config
        self._num_made = 0
        self._kept: dict[str, tuple[bytes, list[socket.socket]]] = {}  # secret key and ports by input address

    def make(self, machine: str) -> Endpoints:
        """Unix sockets for a host on this machine, else TCP on this node's address: nobody else gets these ports.

        `release` must be called once they are bound, or not wanted any more.
        """
        if machine == machine_id() and self._config.transport != "tcp":
            self._num_made += 1
            base = f"ipc://{os.path.join(self._folder, str(self._num_made))}"
            return Endpoints(f"{base}.in", f"{base}.out")
        kept = [self._keep_port() for _ in range(2)]
        input_address, output_address = (f"tcp://{self._address}:{sock.getsockname()[1]}" for sock in kept)
        public, secret = zmq.curve_keypair()  # of their own: an engine that was left may try these ports once more
        self._kept[input_address] = secret, kept
        return Endpoints(input_address, output_address, public)

    def release(self, made: Endpoints) -> None:
        """Keep the ports no longer; nothing for addresses that have none."""
        for sock in self._kept.pop(made.input, (b"", ()))[1]:
            sock.close()

    def addresses(self, made: Endpoints) -> EngineAddresses:
        """What this frontend listens with, its secret key included."""
        secret = self._kept[made.input][0] if made.server_key else b""
        return EngineAddresses((made.input,), (made.output,), made.server_key, secret, self._config.host_timeout_s)

    def _keep_port(self) -> socket.socket:
        """A free port that only a socket with the same option can bind, as those of ZMQ have, and nobody is given."""
        sock = socket.socket()
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((self._address, 0))
        except BaseException:
            sock.close()
            raise
        return sock


class ClusterModel(SeatFollower):
    """A model whose engines this process has sockets to."""

    client: ModelClient | None

    def __init__(
        self,
        plan: ModelPlan,
        version: int,
        tell: Tell,
        endpoints: EndpointMaker,
        on_change: Callable[[ClusterModel], None],
        *,
        client_index: int = 0,
    ) -> None:
        """`client_index` tells the engines which of several frontends this is; see SeatFollower for the rest."""
        super().__init__(plan, version, tell, on_change)
        self._core: PoolEngineClient | None = None
        self._building: asyncio.Task[None] | None = None
        self._beginning = asyncio.Lock()
        self._endpoints = endpoints
        self._client_index = client_index
        self.on_fault: Callable[[str], None] = lambda fault: None
        """See ModelClient."""

    async def prepare(self) -> None:
        """Make what joins engines."""
        config = await asyncio.to_thread(self.plan.engine_config)
        slo = self.plan.spec.slo
        route = partial(by_prefix, ttft_s=slo.ttft_s) if slo else by_prefix
        self._core = PoolEngineClient(config, route=route, client_index=self._client_index)
        self._core.on_broken = self._join_again

    @property
    def hosts(self) -> Collection[str]:
        """See SeatFollower."""
        return self._core.hosts if self._core is not None else ()

    @property
    def num_handed_over(self) -> int:
        """See SeatFollower."""
        return self._core.num_handed_over if self._core is not None else 0

    def learn(self, loads: Mapping[str, Any]) -> None:
        """See SeatFollower."""
        for name in self.hosts:
            told = loads.get(name.rpartition("/")[0])
            if isinstance(told, Mapping) and (load := told.get(self.plan.spec.name)) is not None:
                assert self._core is not None
                self._core.learn(name, load)

    def _give_roles(self, roles: Mapping[str, Role]) -> None:
        assert self._core is not None
        self._core.roles = dict(roles)

    async def _connect(self, key: Key, machine: str) -> None:
        async with self._beginning:
            await self._begin_anew()
        assert self._core is not None
        made = self._endpoints.make(machine)
        try:
            attach = partial(self._tell, "attach", self.plan.spec.name, *key, made)
            await self._core.join(name_of(key), self._endpoints.addresses(made), attach)
        finally:
            self._endpoints.release(made)
        if self._building is None:
            self._building = asyncio.create_task(self._build())
            self._building.add_done_callback(lambda task: task.cancelled() or task.exception())  # it is in `_fatal`
        await asyncio.shield(self._building)  # all engines need it: it goes on when this one is gone meanwhile

    async def _begin_anew(self) -> None:
        """Make another client of the engines where the last one was closed, because no app could be built over it."""
        if self._core is not None and self._core.resources.engine_dead:
            roles = self._core.roles
            await self.prepare()
            self._core.roles, self._building, self._fatal = roles, None, None

    async def _build(self) -> None:
        assert self._core is not None
        try:
            async with _BUILDING:
                self.client = await ModelClient.over(self.plan, self._core, {})
            self.client.on_fault = self.on_fault
        except Exception as error:
            self._fatal = self.error = error  # its client is closed: no other host can help
            raise

    def _join_again(self, name: str) -> None:
        """A connection broke: begin another one. The next view may say that the host is gone, and who is to blame."""
        host, _, life = name.rpartition("/")
        self._rejoin((host, life))
        asyncio.get_running_loop().call_later(_VIEW_S, self._go_elsewhere, name)

    def _go_elsewhere(self, name: str) -> None:
        """Requests of a connection that broke wait no longer for another one."""
        if self._core is not None:
            self._core.lost(name, blame=False, only_broken=True)

    async def _disconnect(self, key: Key) -> None:
        if name_of(key) in self.hosts:
            assert self._core is not None
            await self._core.leave(name_of(key))

    def _lose(self, key: Key, blame: bool = True) -> None:
        assert self._core is not None
        self._core.lost(name_of(key), blame=blame)

    async def close(self) -> None:
        """Free the client; its engines end by themselves."""
        await super().close()
        if self._building is not None:
            self._building.cancel()
            await asyncio.wait({self._building})
        if self.client is not None:
            await self.client.close()
        elif self._core is not None:
            self._core.close()
