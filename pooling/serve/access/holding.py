# SPDX-License-Identifier: Apache-2.0
"""Where requests wait for a model that is not loaded: in one queue per model, which knows nothing of loading.

Who waits is let in, all in order of arrival, when the model is ready, and is refused when it cannot be loaded, when it
leaves, or when the request has waited for `limit_s`. What was let in looks again whether the model is still ready: if
it is not, the request waits on, in its old place. Imports no vLLM.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from starlette.responses import Response
from starlette.types import Receive

from tokenpool.serve.access.auth import error_response
from tokenpool.serve.access.gone import until_gone
from tokenpool.serve.access.held_stream import HeldStream
from tokenpool.serve.access.refused import RefusedError

PROGRESS_PERIOD_S = 5.0
"""Between two signs of life of a stream that waits; proxies cut connections that say nothing for 30 to 60 s."""


class Held(Protocol):
    """The model that is waited for."""

    name: str
    hold: Hold

    @property
    def is_ready(self) -> bool:
        """Whether it takes requests."""
        ...

    @property
    def holds(self) -> bool:
        """Whether requests begin to wait for it now."""
        ...

    @property
    def may_come(self) -> bool:
        """Whether requests that wait for it wait on."""
        ...

    def want(self) -> None:
        """Somebody begins to wait."""
        ...

    def refusal(self) -> Response:
        """The answer while nobody may wait."""
        ...

    def progress(self) -> str:
        """How far its loading has come, in a few words."""
        ...


@dataclass(slots=True, eq=False)
class _Waiter:
    tenant: str
    due_s: float
    until_s: float
    news: asyncio.Future[Response | None]
    """None = let in; a response = refused with it."""


@dataclass(slots=True, eq=False)
class Hold:
    """The queue of one model; lives on one event loop."""

    limit_s: float = 1800.0
    """How long a request waits at most."""
    ttft_s: float = math.inf
    """Seconds in which a first token is due; inf without an SLO."""
    _waiters: dict[_Waiter, None] = field(default_factory=dict)
    _closed: Callable[[], Response] | None = None
    _counts: Counter[str] = field(default_factory=Counter)

    def __len__(self) -> int:
        """Requests that wait."""
        return len(self._waiters)

    @property
    def counts(self) -> Mapping[str, int]:
        """Requests that wait, by tenant; '' without tenants."""
        return self._counts

    @property
    def due_by_tenant(self) -> dict[str, float]:
        """When each tenant's most urgent one is due, on the monotonic clock.

        That is by the model's SLO, or else when it has waited for as long as it may.
        """
        due: dict[str, float] = {}
        for waiter in self._waiters:
            due[waiter.tenant] = min(waiter.due_s, due.get(waiter.tenant, math.inf))
        return due

    @property
    def since_s(self) -> float:
        """Since when the first one waits, on the monotonic clock; inf if none does."""
        return next((waiter.until_s - self.limit_s for waiter in self._waiters), math.inf)

    def let_in(self) -> None:
        """The model is ready."""
        for waiter in self._waiters:
            if not waiter.news.done():
                waiter.news.set_result(None)

    def refuse(self, answer: Callable[[], Response]) -> None:
        """The model will not be ready: each gets an answer of its own."""
        for waiter in self._waiters:
            if not waiter.news.done():
                waiter.news.set_result(answer())

    def close(self, answer: Callable[[], Response]) -> None:
        """Nothing is loaded any more: refuse who waits, and who comes."""
        self._closed = answer
        self.refuse(answer)

    async def wait(self, model: Held, receive: Receive, stream: HeldStream | None, tenant: str = "") -> bool:
        """Wait until `model` is ready; False if the client has gone away, of which `receive` tells.

        A `stream` is told how far loading is. Raises RefusedError.
        """
        if self._closed is not None:
            raise RefusedError(self._closed())
        now_s, loop = time.monotonic(), asyncio.get_running_loop()
        due_s = min(self.ttft_s, self.limit_s)
        waiter = _Waiter(tenant, now_s + due_s, now_s + self.limit_s, loop.create_future())
        self._waiters[waiter] = None
        self._counts[tenant] += 1
        try:
            while not model.is_ready:  # nothing is awaited after that, or the model might leave before it is used
                if not model.may_come:
                    raise RefusedError(model.refusal())
                if waiter.news.done():
                    waiter.news = loop.create_future()
                model.want()
                gone = asyncio.create_task(until_gone(receive))
                try:
                    if not await self._news(waiter, gone, model, stream):
                        return False
                finally:
                    gone.cancel()
                    with contextlib.suppress(asyncio.CancelledError):
                        await gone
            return True
        finally:
            del self._waiters[waiter]
            self._counts[tenant] -= 1
            if not self._counts[tenant]:
                del self._counts[tenant]

    async def _news(self, waiter: _Waiter, gone: asyncio.Task[None], model: Held, stream: HeldStream | None) -> bool:
        """Wait until the waiter is let in; False if its client has gone. Raises RefusedError."""
        ends: set[asyncio.Future[Any]] = {waiter.news, gone}
        while True:
            left_s = waiter.until_s - time.monotonic()
            if left_s <= 0:
                raise RefusedError(self._too_late(model))
            wait_s = left_s if stream is None else min(left_s, PROGRESS_PERIOD_S)
            await asyncio.wait(ends, timeout=wait_s, return_when=asyncio.FIRST_COMPLETED)
            if gone.done():
                return False
            if waiter.news.done():
                if (answer := waiter.news.result()) is not None:
                    raise RefusedError(answer)
                return True
            if stream is not None:
                await stream.comment(f"loading {model.progress()}")

    def _too_late(self, model: Held) -> Response:
        message = f"The model `{model.name}` was not loaded within {self.limit_s:g} s; retry after 5 s."
        return error_response(503, "ServiceUnavailableError", message, "model", {"retry-after": "5"})
