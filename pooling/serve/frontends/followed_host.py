# SPDX-License-Identifier: Apache-2.0
"""The engines of one host on this machine, to which each of several frontends has sockets of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from tokenpool.model_life import Life
from tokenpool.process.keeper import Work
from tokenpool.serve.client.engine_client import PoolEngineClient
from tokenpool.serve.client.host_calls import call_beside
from tokenpool.serve.client.model_client import ModelClient, connect
from tokenpool.serve.frontends.followed_hosts import FollowedHosts
from tokenpool.serve.frontends.frontend_view import HostAddress, ModelStanding, SupervisorView
from tokenpool.serve.pool.host_watch import Call
from tokenpool.serve.pool.models import PoolModel
from tokenpool.wire.addresses import EngineAddresses


class _Host:
    """The host, as a frontend knows it: somebody else starts, guards and ends it."""

    def __init__(self, address: HostAddress) -> None:
        self.address = address
        self.name = address.name
        self._ended = asyncio.Event()

    @property
    def ended(self) -> bool:
        """Whether the supervisor says that it is gone."""
        return self._ended.is_set()

    async def wait(self) -> int:
        """Wait until it is gone."""
        await self._ended.wait()
        return 0

    async def call(self, method: str, *args: Any, timeout_s: float | None = None) -> Any:
        """See HostProcess.call."""
        return await call_beside(self.address.control, self.address.key, method, *args, timeout_s=timeout_s)

    def note_end(self) -> None:
        """It is gone."""
        self._ended.set()


class HostEngines:
    """See `Engines`."""

    def __init__(self, hosts: FollowedHosts) -> None:
        self._hosts = hosts
        self._host: _Host | None = None
        self._joined: dict[str, int] = {}  # number of the engine, by model
        self._births: dict[str, int] = {}  # which load the client is for
        self._num_endpoints = 0

    def call(self) -> Call | None:
        """See Engines."""
        return self._host.call if self._host is not None else None

    def works(self) -> Mapping[str, Work]:
        """See Engines."""
        return {}

    def has(self, name: str, standing: ModelStanding) -> bool:
        """See Engines."""
        return standing.state == Life.DRAINING or not standing.engine or self._joined.get(name) == standing.engine

    def follow_hosts(self, view: SupervisorView) -> None:
        """See Engines."""
        is_same = self._host is not None and self._host.address == view.host  # a pid alone comes again
        if self._host is not None and not is_same:
            self._host.note_end()
            for name in list(self._joined):
                del self._joined[name]
                if (client := self._hosts.models[name].client) is not None:
                    client.lost(self._host.name, blame=view.host_was_blamed)
        if not is_same:
            self._host = _Host(view.host) if view.host else None

    def follow(self, model: PoolModel, standing: ModelStanding, view: SupervisorView) -> None:
        """See Engines."""
        if self._joined.get(model.name, standing.engine) != standing.engine:
            del self._joined[model.name]
            if model.client is not None and self._host is not None:  # the host has the model no more, or anew
                model.client.lost(self._host.name, blame=False)
        is_here = standing.engine != 0 and model.name in self._joined
        is_old = model.client is not None and self._births.get(model.name, 0) != standing.birth
        if is_old and standing.state != Life.DRAINING:
            self._hosts.begin(model.name, self._hosts.chill(model))
        elif standing.engine and not is_here and self._host is not None:
            self._hosts.begin(model.name, self._join(model, standing, self._host))
        self._hosts.take_state(model, standing, is_here)

    async def _join(self, model: PoolModel, standing: ModelStanding, host: _Host) -> None:
        """Connect to the model's engine, and with the first one build the app."""
        client, index, engine = model.client, self._hosts.settings.index, standing.engine
        if host.ended:
            return
        if client is None:
            core = PoolEngineClient(await asyncio.to_thread(model.plan.engine_config), client_index=index)
        else:
            assert isinstance(client, ModelClient)
            core = client.core
        base = f"ipc://{self._hosts.folder}/{self._num_endpoints}"
        self._num_endpoints += 1
        addresses = EngineAddresses((f"{base}.in",), (f"{base}.out",))
        try:
            await host.call("attach_frontend", model.name, index, addresses)
            await connect(host, core, addresses)
            if client is None:
                async with self._hosts.building:
                    client = await ModelClient.over(model.plan, core, {})
                client.on_fault = model.note_client_fault
        except BaseException:
            if model.client is None:
                core.close()
            raise
        self._births[model.name] = standing.birth
        model.answer_with(client)
        if host.ended:
            client.lost(host.name)
            return
        self._joined[model.name] = engine
        await self._hosts.say("joined", model.name, engine, while_so=lambda: self._joined.get(model.name) == engine)

    async def close(self, model: PoolModel) -> None:
        """See Engines."""
        self._joined.pop(model.name, None)
        self._births.pop(model.name, None)
        if model.client is not None:
            await model.client.close()

    def report(self) -> dict[str, Any]:
        """See Engines."""
        return {}
