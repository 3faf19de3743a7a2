# SPDX-License-Identifier: Apache-2.0
"""What a pool asks of that through which the requests of a model go."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any, Protocol

from tokenpool.serve.access.admission import EngineQueue
from tokenpool.serve.launch.model_plan import ModelPlan


class Client(Protocol):
    """What a model's requests go through, here or in several frontends."""

    plan: ModelPlan
    app: Any
    """The ASGI app of its routes."""
    added: dict[str, Any]
    """What the first host said of the model."""

    @property
    def num_unfinished(self) -> int:
        """Requests accepted and not yet finished."""
        ...

    @property
    def num_seats(self) -> int:
        """Requests that can run at a time, at all hosts together."""
        ...

    def queue(self) -> EngineQueue:
        """What waits and what runs."""
        ...

    def rest(self, is_resting: bool) -> None:
        """Its model finishes what it has and gets cold then, or that was called off; `num_unfinished` tells when."""
        ...

    async def drain(self, limit_s: float) -> bool:
        """Wait until nothing is unfinished, at most `limit_s`; returns whether that came about."""
        ...

    async def abort_all(self) -> None:
        """End every unfinished request."""
        ...

    def fail_all(self, reason: str, status: HTTPStatus = HTTPStatus.BAD_GATEWAY) -> None:
        """End every unfinished request with an error that says why."""
        ...

    def lost(self, host: str, *, blame: bool = True) -> None:
        """A host is gone, with `blame` perhaps because of its requests: they go on at the next one."""
        ...

    async def close(self) -> None:
        """Free the client."""
        ...
