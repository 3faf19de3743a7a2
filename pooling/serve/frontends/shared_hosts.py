# SPDX-License-Identifier: Apache-2.0
"""Hosts whose engines several frontends have sockets to, as the supervisor of the frontends knows them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from http import HTTPStatus
from typing import Any, Protocol

from tokenpool.errors import PoolError
from tokenpool.serve.access.admission import EngineQueue
from tokenpool.serve.frontends.frontend_view import ModelStanding, SupervisorView
from tokenpool.serve.frontends.sayings import Sayings
from tokenpool.serve.launch.model_plan import ModelPlan
from tokenpool.serve.pool.models import PoolModel

JOIN_LIMIT_S = 300.0
"""For all frontends to join an engine."""
_DRAIN_LIMIT_S = 10.0
"""What frontends may take beyond the limit of a drain to say that they have done it; one that hangs never does."""


class SharedClients:
    """A model's clients in all frontends, as one. See `Client`."""

    app: Any = None
    num_seats = 1  # nothing goes through this process's gates

    def __init__(self, plan: ModelPlan, sayings: Sayings) -> None:
        self.plan = plan
        self.added: dict[str, Any] = {}
        self.drain_s = 0.0
        """How long the requests of a model that is being removed may take."""
        self.drain_number = 0
        """With which frontends say that they have drained it; another one each time, 0 before the first."""
        self._sayings = sayings
        self._is_resting = False

    @property
    def num_unfinished(self) -> int:
        """See Client: not 0 while the model rests and a frontend has not said that it has finished."""
        return int(self._is_resting and not self._sayings.have_all_said("drained", self.drain_number))

    def queue(self) -> EngineQueue:
        """See Client."""
        return EngineQueue()

    def rest(self, is_resting: bool) -> None:
        """See Client: frontends see it, and say when they have finished."""
        self._is_resting = is_resting
        if is_resting:
            self._drain_anew()

    async def drain(self, limit_s: float) -> bool:
        """Let all frontends finish, or abort after `limit_s`, what they have."""
        self.drain_s = limit_s
        self._drain_anew()
        try:
            async with asyncio.timeout(limit_s + _DRAIN_LIMIT_S):
                await self._sayings.all_say("drained", self.drain_number)
        except TimeoutError:
            return False
        return True

    def _drain_anew(self) -> None:
        self._sayings.drop(self.drain_number)
        self.drain_number = self._sayings.ask()

    async def abort_all(self) -> None:
        """Nothing: the frontends did."""

    def fail_all(self, reason: str, status: HTTPStatus = HTTPStatus.BAD_GATEWAY) -> None:
        """Nothing: the frontends do when they see that the model is given up."""

    def lost(self, host: str, *, blame: bool = True) -> None:
        """Nothing: the frontends see it."""

    async def close(self) -> None:
        """Nothing is to be said of it any more."""
        self._sayings.drop(self.drain_number)


class SharedHosts(Protocol):
    """What the supervisor of frontends asks of hosts."""

    def view(self, version: int, has_started: bool, pids: Mapping[int, int]) -> SupervisorView:
        """What is so now, for frontends with these pids."""
        ...

    async def detach(self, index: int) -> None:
        """Let all engines drop what the frontend with that index had."""
        ...

    async def fail(self, model: str, birth: int, error: PoolError) -> None:
        """A frontend cannot join that model, as it was when it had that birth."""
        ...

    def calls(self) -> list[Callable[..., Any]]:
        """What frontends may call, beside what the supervisor answers."""
        ...


def standing_of(model: PoolModel, *, engine: int = 0, version: int = 0, birth: int = 0) -> ModelStanding:
    """A model, as frontends are told of it."""
    drain_s, drain = 0.0, 0
    if isinstance(model.client, SharedClients):
        drain_s, drain = model.client.drain_s, model.client.drain_number
    given_up = model.is_given_up or (model.is_leaving and model.error is not None)
    app = model.app
    resting, plan = app.is_resting, None if model.is_told else model.plan_to_send
    return ModelStanding(
        plan,
        app.state,
        drain_s,
        drain,
        engine=engine,
        reason=app.reason,
        is_given_up=given_up,
        number=model.number,
        version=version,
        is_resting=resting,
        birth=birth,
    )
